"""An earlier LoRA that acts, frozen, beside the one that is trained; what is written of both is their sum.

With A₁ and B₁ frozen and one scaling s, the layer computes

    W + s B₁A₁ + s B₂A₂ = W + s [B₂, B₁] [A₂; A₁],

and the right-hand side is one plain LoRA on the W that everybody has (`lorasculpt.adapters.residual` writes it).
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import sites
from .plain import on_disk


def put_beside(model: PeftModel, folder: Path) -> None:
    """Let the LoRA in ``folder`` act beside the adapter of ``model``: it must have the same linears and scaling.

    It is turned off and down with that adapter. Call it once, before training.
    """
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    for name, site in sites(model).items():
        for side in "AB":
            # not persistent: a checkpoint is of what is trained
            site.layer.register_buffer(f"beside_{side}", saved[on_disk(name, side)], persistent=False)
        site.layer.register_forward_hook(_add)


def beside(model: PeftModel) -> dict[str, Tensor]:
    """The factors that :func:`put_beside` has given ``model``, by their names on disk; empty if there are none."""
    layers = {name: site.layer for name, site in sites(model).items() if hasattr(site.layer, "beside_A")}
    return {on_disk(name, side): getattr(layer, f"beside_{side}") for name, layer in layers.items() for side in "AB"}


def _add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    assert isinstance(layer, LoraLayer)
    if layer.disable_adapters:
        return output
    A, B = layer.beside_A, layer.beside_B
    return output + (layer.scaling["default"] * F.linear(F.linear(inputs[0].to(A.dtype), A), B)).to(output.dtype)
