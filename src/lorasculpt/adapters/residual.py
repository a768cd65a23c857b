"""LoRAs with other factors beside those that were trained, written as the plain LoRAs that they amount to.

PiSSA, OLoRA and CorDA start at B₀A₀ ≠ 0 and take s B₀A₀ from the base weight W, so that nothing changes at first. On
the W that everybody has, the trained adapter is therefore

    W − s B₀A₀ + s BA = W + s [B, −B₀] [A; A₀],

a LoRA of twice the rank. As such it needs no change of the base when it is loaded, and has a strength. A LoRA that was
frozen before (`lorasculpt.adapters.beside`) joins the trained one in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from .method import SETTINGS_FILE

EXACTLY = ("pissa", "olora", "corda")
"""Values of ``init_lora_weights`` with which the adapter begins as what the base is short of, and as nothing else."""
MOVING = (*EXACTLY, "loftq", "lora_ga")
"""All values of ``init_lora_weights`` that change the base weights."""


def moved_by(config: PeftConfig | Mapping[str, Any]) -> str | None:
    """The ``init_lora_weights`` of ``config``, in lower case, where it changes the base weights."""
    key = "init_lora_weights"
    start = str(config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)).lower()
    return start if start.startswith(MOVING) else None


def taken(model: PeftModel) -> dict[str, Tensor]:
    """A₀ and −B₀ of what the active adapter of ``model``, fresh, took from the base; empty if it took nothing."""
    if not (moved_by(model.active_peft_config) or "").startswith(EXACTLY):
        return {}
    factors = get_peft_model_state_dict(model).items()
    return {name: -value if _factor(name) == "B" else value.clone() for name, value in factors if _factor(name)}


def write_plain(folder: Path, others: dict[str, Tensor]) -> None:
    """Turn the LoRA that was saved in ``folder`` into its sum with another of the same linears and scaling.

    Args:
        folder: as ``save_pretrained`` leaves it. The file of a method goes: the sum is nothing that it could train.
        others: the other's factors by their names on disk. Its rank is the same multiple of the first one's everywhere.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    tensors, times = load_file(path), 1
    for name, other in others.items():
        own, side = tensors[name], 0 if _factor(name) == "A" else 1
        tensors[name] = torch.cat([own, other.to(own)], side)
        times = tensors[name].shape[side] // own.shape[side]
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    # the scaling stays: alpha / r, or alpha / sqrt(r)
    alpha = times**0.5 if config["use_rslora"] else times
    config |= {"r": times * config["r"], "lora_alpha": alpha * config["lora_alpha"]}
    config["rank_pattern"] = {key: times * rank for key, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {key: alpha * value for key, value in config["alpha_pattern"].items()}
    config |= {"init_lora_weights": True, "corda_config": None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / SETTINGS_FILE).unlink(missing_ok=True)


def _factor(name: str) -> str | None:
    """``"A"`` or ``"B"`` if the tensor is a factor of the adapter."""
    return next((side for side in "AB" if name.endswith(f".lora_{side}.weight")), None)
