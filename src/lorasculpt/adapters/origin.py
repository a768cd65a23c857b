"""Which weights an adapter was trained on: a few numbers of each matrix, by which another base is told.

An adapter fits every model of its base's shapes, and answers nonsense on another one without a word. A name does not
tell: a folder is moved, and a model is trained further or replaced under its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..errors import UserError
from ..files import read_json, write_json
from .layers import sharded

ORIGIN_FILE = "base.json"
PICTURES = """
It was trained with an image processor of other settings than the base's, which lies beside it:

```python
processor.image_processor = AutoImageProcessor.from_pretrained("path/to/{name}")  # of transformers
```
"""
EACH = 4  # numbers of a matrix, from its first corner to its last
SMALLEST = 2.0**-24  # that fp16 has, apart from 0
WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")  # what PEFT puts into the name of a weight
OTHERS = re.compile(r"\.(lora_\w+|modules_to_save)\.")  # weights beside the base's


def origin(model: nn.Module, name: str | None = None, *, frozen: bool = False) -> dict[str, Any]:
    """What is kept of a base, as the contents of ``base.json``.

    Of each matrix but those of the vocabulary, which may grow, ``EACH`` numbers. What is quantised, on another
    process or not there yet is left out, and so is an adapter.

    Args:
        model: the base, as it was before training.
        name: what it is called.
        frozen: leave out what is being trained, as beside an adapter that trains.
    """
    ends = [part() for part in (getattr(model, f"get_{side}put_embeddings", None) for side in ("in", "out")) if part]
    vocabulary = [part.weight for part in ends if part is not None]
    named = (
        (WRAPPED.sub("", key), weight)
        for key, weight in model.named_parameters()
        if not OTHERS.search(key)
        and not (weight.is_meta or sharded(weight) or (frozen and weight.requires_grad))
        and not any(weight is known for known in vocabulary)
    )
    return kept(named, name)


def comparable(weight: Tensor) -> bool:
    """Whether ``weight`` is a matrix, and no quantised one, whose numbers mean nothing without their scales."""
    packed = getattr(weight, "quant_state", None) is not None  # 4 bits each, be they stored as numbers of 16
    return weight.ndim == 2 and weight.is_floating_point() and weight.dtype.itemsize > 1 and not packed


def kept(named: Iterable[tuple[str, Tensor]], name: str | None = None) -> dict[str, Any]:
    """The contents of ``base.json`` for those that are `comparable` of the weights ``named``, of the base ``name``.

    They are taken one by one: together they may be larger than the memory.
    """
    coarsest, weights = torch.float64, {}
    for key, weight in named:
        if comparable(weight):
            coarsest = max(coarsest, weight.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            weights[key] = numbers(weight)
    dtype = str(coarsest if weights else torch.float32).removeprefix("torch.")
    return {"schema": 1, "base": name, "dtype": dtype, "weights": weights}


def write_origin(folder: Path, record: dict[str, Any]) -> None:
    """Write what :func:`origin` gave into the adapter's ``folder``, unless that is nothing."""
    if record["weights"]:
        write_json(folder / ORIGIN_FILE, record)


def pass_origin_on(adapter: Path, folder: Path) -> None:
    """Give the adapter in ``folder``, made of another one, what that one knows of its base and of its pictures."""
    for name in (ORIGIN_FILE, IMAGE_PROCESSOR_NAME):
        if (adapter / name).is_file():
            (folder / name).write_bytes((adapter / name).read_bytes())


def sees(folder: Path) -> str | None:
    """The image processor that the adapter in ``folder`` was trained with, None where that is its base's own."""
    path = folder / IMAGE_PROCESSOR_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def how_it_sees(folder: Path, name: str) -> str:
    """What a README says of :func:`sees` for the adapter in ``folder``, called ``name``; nothing of the base's own."""
    return PICTURES.format(name=name) if sees(folder) else ""


def recorded(folder: Path) -> dict[str, Any] | None:
    """The contents of ``base.json`` in ``folder``, or None where nobody has kept any.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    if not {"base", "dtype", "weights"} <= record.keys():
        raise UserError(f"{path} does not say what its adapter was trained on; copy it again, or remove it.")
    return record


def check_origin(folder: Path, model: nn.Module) -> None:
    """See that ``model`` is what the adapter in ``folder`` was trained on, where that was written down.

    Args:
        folder: with the adapter.
        model: the base, in any precision, freshly loaded or with other adapters, which may not have changed it.

    Raises:
        UserError: it is another model.
    """
    if (said := recorded(folder)) is not None:
        check_same(folder, said, origin(model))


def check_same(folder: Path, said: dict[str, Any], found: dict[str, Any]) -> None:
    """See that what the adapter in ``folder`` has ``said`` of its base is what was ``found`` in another.

    Raises:
        UserError: it is not.
    """
    if another := differing(said, found):
        called = f", {said['base']}" if said["base"] else ""
        many = "1 matrix" if len(another) == 1 else f"{len(another)} matrices"
        raise UserError(
            f"the adapter in {folder} does not fit this base model (which has other weights than the one it was "
            f"trained on in {many}, such as {another[0]}); name the model it was trained on{called}, or to use it on "
            f"this one all the same remove {folder / ORIGIN_FILE}."
        )


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The matrices whose numbers are not the same in two contents of ``base.json``.

    They may differ by the rounding of the coarser precision where it is not the same. Names that are not in both are
    passed over, since they change with the versions of transformers.
    """
    steps = [torch.finfo(getattr(torch, each["dtype"])).eps for each in (one, other)]
    step = 0.0 if steps[0] == steps[1] else max(steps)
    least = SMALLEST if step else 0.0
    return [
        key
        for key, values in one["weights"].items()
        if key in other["weights"]
        and any(
            abs(a - b) > step * max(abs(a), abs(b)) + least for a, b in zip(values, other["weights"][key], strict=True)
        )
    ]


def numbers(weight: Tensor) -> list[float]:
    """What is kept of one matrix: from its first corner to its last, as fp32 has it."""
    rows, columns = ([i * (size - 1) // (EACH - 1) for i in range(EACH)] for size in weight.shape)
    found = torch.stack([weight.detach()[row, column] for row, column in zip(rows, columns, strict=True)])
    return [float(f"{number:.9g}") for number in found.float().tolist()]
