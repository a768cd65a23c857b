"""A plain LoRA folder, read and written without a model: its factors, module by module."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..files import read_json

# settings with which the update is something other than (alpha/r) BA
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
)


@dataclass(frozen=True)
class Pair:
    """The two factors of one adapted linear layer: the update of its weight is ``scaling * B @ A``."""

    name: str  # of the module in the model, "model.layers.0.self_attn.q_proj"
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA folder: its configuration, its factor pairs in the model's order, and the names of other tensors."""

    folder: Path
    config: dict[str, Any]
    pairs: tuple[Pair, ...]
    other: tuple[str, ...]


def read_config(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter that is a LoRA on disk.

    Raises:
        UserError: there is no adapter, its configuration is no JSON object, or it is of another PEFT type.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter: adapter_config.json is missing, name the folder that has it.")
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{path} has the peft_type {kind!r}, whose update is no single product BA; only LORA can be read here."
        )
    return config


def read_adapter(folder: str | Path) -> Adapter:
    """Read a plain LoRA folder, written by this library or by stock PEFT.

    ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` are honoured.

    Raises:
        UserError: no LoRA adapter in the folder, a file that cannot be read, a variant such as DoRA, a factor without
            its partner, shapes that do not fit together or to the configuration, or values that are not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    variants = [name for name in VARIANTS if config.get(name)]
    if variants:
        raise UserError(
            f"{folder / 'adapter_config.json'} sets {variants[0]}, so its update is more than (alpha/r) BA."
        )
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors; save the adapter again with safetensors.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); it may be cut short, copy it again.") from None

    factors: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            other.append(key)
            continue
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} has values that are not finite in {key}; use an earlier checkpoint.")
        factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise UserError(f"{path} has no lora_A and lora_B tensors; is it the adapter you meant?")
    pairs = tuple(_pair(path, config, name, factors[name]) for name in sorted(factors, key=_natural))
    return Adapter(folder, config, pairs, tuple(sorted(other)))


def on_disk(name: str, side: str) -> str:
    """The name on disk of a factor, the A or the B, of the module ``name``."""
    return f"base_model.model.{name}.lora_{side}.weight"


def of_rank(pair: Pair, r: int) -> Pair:
    """The same update with a larger rank and a scaling of 1: B takes the scaling in, zeros fill both factors up."""
    missing = r - pair.A.shape[0]
    return Pair(pair.name, F.pad(pair.A, (0, 0, 0, missing)), F.pad(pair.B * pair.scaling, (0, missing)), 1.0)


def settings_of_rank(r: int) -> dict[str, Any]:
    """The settings of a LoRA whose pairs are all of rank ``r`` and have a scaling of 1."""
    return {"r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}


def write_pairs(pairs: Sequence[Pair], folder: Path) -> None:
    """The weight file of a plain LoRA."""
    tensors = {on_disk(pair.name, side): getattr(pair, side).contiguous() for pair in pairs for side in "AB"}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _pair(path: Path, config: dict[str, Any], name: str, found: dict[str, Tensor]) -> Pair:
    if len(found) < 2:
        missing = "lora_B" if "A" in found else "lora_A"
        raise UserError(f"{path} has no {missing} for {name}; save the adapter again.")
    A, B = found["A"], found["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise UserError(
            f"{path}: {name} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, which are no factors of a linear."
        )
    try:
        r = int(_for_module(config.get("rank_pattern"), name, config.get("r")))
        alpha = float(_for_module(config.get("alpha_pattern"), name, config.get("lora_alpha")))
    except (TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path.with_name('adapter_config.json')} tells no r and lora_alpha of {name}; save the adapter again."
        ) from None
    if A.shape[0] != r:
        raise UserError(
            f"{path}: {name} has rank {A.shape[0]}, but adapter_config.json says {r}; they do not belong together."
        )
    return Pair(name, A, B, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _for_module(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    pattern = pattern or {}
    return pattern.get(get_pattern_key(pattern, name), default)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
