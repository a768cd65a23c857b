"""LoRAs that begin by taking their factors from the base, written as the plain LoRAs that they amount to.

PiSSA, OLoRA and CorDA start at B₀A₀ ≠ 0 and take s B₀A₀ from the base weight W, so that nothing changes at first. On
the W that everybody has, the trained adapter is therefore

    W − s B₀A₀ + s BA = W + s [B, −B₀] [A; A₀],

a LoRA of twice the rank. As such it needs no change of the base when it is loaded, and has a strength.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

EXACTLY = ("pissa", "olora", "corda")
"""Values of ``init_lora_weights`` with which the adapter begins as what the base is short of, and as nothing else."""
MOVING = (*EXACTLY, "loftq", "lora_ga")
"""All values of ``init_lora_weights`` that change the base weights."""


def taken(model: PeftModel) -> dict[str, Tensor]:
    """The factors that the active adapter of ``model``, fresh, has taken from the base; empty if it has taken none."""
    if not str(getattr(model.active_peft_config, "init_lora_weights", True)).lower().startswith(EXACTLY):
        return {}
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items() if _factor(name)}


def write_plain(folder: Path, taken: dict[str, Tensor]) -> None:
    """Turn the adapter that was saved in ``folder`` into a LoRA on the base that nothing was taken from.

    Args:
        folder: as ``save_pretrained`` leaves it.
        taken: as :func:`taken` returned it before training.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(path)
    for name, first in taken.items():
        last, first = tensors[name], first.to(tensors[name])
        tensors[name] = torch.cat([last, first]) if _factor(name) == "A" else torch.cat([last, -first], 1)
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    # the scaling stays: alpha / r, or alpha / sqrt(r)
    alpha = 2**0.5 if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "lora_alpha": alpha * config["lora_alpha"]}
    config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {key: alpha * value for key, value in config["alpha_pattern"].items()}
    config |= {"init_lora_weights": True, "corda_config": None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _factor(name: str) -> str | None:
    """``"A"`` or ``"B"`` if the tensor is a factor of the adapter."""
    return next((side for side in "AB" if name.endswith(f".lora_{side}.weight")), None)
