"""The leaves of a LoRA layer: a linear with a mask, and one way to walk over all adapted linears."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional as F


class MaskedLinear(nn.Linear):
    """``lora_A`` or ``lora_B`` whose forward sees ``weight * mask``.

    The mask is all-one until something is pruned. It sits on the leaf because every LoRA layer of PEFT, whatever base
    it wraps, calls its leaves: the chain rule then masks the gradient before any reduction, scaling or clipping.
    """

    mask: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> MaskedLinear:
        """A masked linear around the same parameters as ``linear``."""
        self = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        # a weight that waits for its file on "meta" gets its values from there; nothing would give a mask its own
        device = "cpu" if linear.weight.is_meta else linear.weight.device
        mask = torch.ones_like(linear.weight, dtype=torch.bool, device=device)
        # not persistent: the weight file of an adapter holds lora_A and lora_B and nothing else
        self.register_buffer("mask", mask, persistent=False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    @torch.no_grad()
    def project(self) -> None:
        """Set what the mask leaves out to exactly 0 in the weight itself."""
        self.weight.mul_(sharded_like(self.mask, self.weight))


@dataclass(frozen=True)
class Site:
    """One adapted linear: ``a`` (r, in) and ``b`` (out, r) are the leaves, ``base`` the frozen layer."""

    name: str
    layer: LoraLayer
    a: nn.Linear
    b: nn.Linear
    base: nn.Module
    scaling: float

    @property
    def A(self) -> Tensor:
        return full(self.a.weight)

    @property
    def B(self) -> Tensor:
        return full(self.b.weight)

    def weight(self) -> Tensor:
        """The frozen weight W0, (out, in), dequantised if need be."""
        return frozen_weight(self.base)


def sites(model: nn.Module, adapter: str = "default") -> dict[str, Site]:
    """Every linear that ``adapter`` adapts, by its name in the base model, in the order of the model."""
    tuner = next((module for module in model.modules() if isinstance(module, BaseTuner)), None)
    found = {}
    for name, layer in (tuner.model if tuner is not None else model).named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            leaves = layer.lora_A[adapter], layer.lora_B[adapter]
            found[name] = Site(name, layer, *leaves, layer.get_base_layer(), layer.scaling[adapter])
    return found


def frozen_weight(base: nn.Module) -> Tensor:
    """The weight of a linear, (out, in), dequantised and gathered if need be; the layer is left as it is."""
    if type(base.weight).__name__ == "Int8Params":  # on a CPU, PEFT's own function leaves the layer without its scales
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return int8_vectorwise_dequant(base.weight.data, scales)
    state: Any = getattr(base.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):  # bitsandbytes packed it anew for inference
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

        return dequantize_4bit(*_convert_weight_packed_for_cpu_inverse(base.weight.data, copy.deepcopy(state)))
    transposed = type(base).__name__ == "Conv1D"
    return transpose(full(dequantize_module_weight(base)).detach(), transposed)


def sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is sharded over processes."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """``tensor`` whole: gathered if it is sharded over processes."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def sharded_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """``tensor`` laid out over processes as ``reference`` is."""
    if not sharded(reference):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, reference.device_mesh, reference.placements)
