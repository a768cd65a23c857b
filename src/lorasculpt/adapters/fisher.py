"""The file of a base's Fisher information: a number for each weight of some linears.

It is made by ``lorasculpt.evaluation.fisher``, and holds F / mean(F) in bf16. F spans many orders of magnitude: fp16
would make 0 of some numbers as they are, and of others infinity once they are divided by their mean (of the 106 million
in the demo's base 0.7 %, and 8). bf16 has the range of fp32, and is off by at most 0.4 %. The mean is in the file's
metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import whole

KIND = "lorasculpt.fisher"  # the key of the metadata that says what the file is


def save_fisher(path: str | Path, found: Mapping[str, Tensor], **made_of: int) -> None:
    """Write F by the name of its linear, each (out, in), and the numbers it was made of.

    Raises:
        UserError: if F is 0 everywhere, or not finite.
    """
    path = Path(path)
    mean = sum(float(F.double().sum()) for F in found.values()) / sum(F.numel() for F in found.values())
    if not 0 < mean < float("inf"):
        raise UserError(f"the Fisher information is {mean} on average, which tells nothing; look at the texts.")
    tensors = {name: (F / mean).bfloat16().cpu().contiguous() for name, F in found.items()}
    with whole(path) as partial:
        save_file(tensors, partial, metadata={KIND: json.dumps({"mean": mean, **made_of})})


def read_fisher(path: str | Path, shapes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Tensor], float]:
    """F / mean(F) in bf16 for the linears named in ``shapes``, and mean(F).

    Args:
        path: the file.
        shapes: (out, in) of each linear.

    Raises:
        UserError: if there is no such file, it is none of these, or a linear is not in it as it should be.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"fisher names {path}, which is no file; lorasculpt.evaluation.fisher makes it.")
    try:
        with safe_open(path, "pt") as file:
            kept = (file.metadata() or {}).get(KIND)
            if kept is None:
                raise UserError(
                    f"fisher names {path}, which holds no Fisher information: lorasculpt.evaluation.fisher makes it."
                )
            there = set(file.keys())
            for name, shape in shapes.items():
                if name not in there or tuple(file.get_slice(name).get_shape()) != shape:
                    raise UserError(
                        f"fisher names {path}, which has nothing of shape {shape} for {name}: make it anew, for the "
                        "linears that this adapter adapts."
                    )
            return {name: file.get_tensor(name).to(torch.bfloat16) for name in shapes}, json.loads(kept)["mean"]
    except SafetensorError as error:
        raise UserError(f"fisher names {path}, which is no whole safetensors file ({error}); make it anew.") from None
