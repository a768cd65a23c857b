"""The adapter, turned down: how much of it is needed, and what each bit of it costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..adapters.residual import moved_by
from ..adapters.update import UpdateLayer


@contextmanager
def _scaled(layer: BaseTunerLayer, value: float) -> Iterator[None]:
    """``layer`` with the contribution of its active adapters times ``value``."""
    before = dict(layer.scaling)
    for name in layer.active_adapters:
        if name in layer.scaling:
            layer.scaling[name] *= value
    try:
        yield
    finally:
        layer.scaling.update(before)


@contextmanager
def _muffled(layer: UpdateLayer, value: float) -> Iterator[None]:
    """The same for adapters of whose forward pass nothing is known but that what it returns is added."""
    updates = [layer.lora_update[name] for name in layer.active_adapters if name in layer.lora_update]
    hooks = [update.register_forward_hook(lambda _, inputs, output: value * output) for update in updates]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _interpolated(wrapper: ModulesToSaveWrapper, value: float) -> Iterator[None]:
    """``wrapper`` with its trained copy moved to original + value · (trained − original)."""
    trained = wrapper.modules_to_save[wrapper.active_adapters[0]]
    before = {name: tensor.detach().clone() for name, tensor in trained.state_dict().items()}
    original = wrapper.original_module.state_dict()
    moved = {
        name: torch.lerp(original[name], tensor, value) if tensor.is_floating_point() else tensor
        for name, tensor in before.items()
    }
    try:
        trained.load_state_dict(moved)
        yield
    finally:
        trained.load_state_dict(before)


def moved(model: nn.Module) -> str | None:
    """Why ``model`` without its adapters is not the base that it started from, or None if it is."""
    for config in getattr(model, "peft_config", {}).values():
        if (start := moved_by(config)) is not None:
            return f"an adapter that starts with {start} has moved the base weights"
    return None


def fixed(model: nn.Module) -> str | None:
    """Why the adapters of ``model`` have one strength alone, or None if it can be set.

    The effect of DoRA, and of some of PEFT's that are no LoRA, is no multiple of a scaling. LoRAs that began by moving
    the base weights and were not saved as plain ones (`lorasculpt.adapters.residual`) have no base to go back to.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return "the model has no adapter whose strength could be set"
    for layer in layers:
        if layer.merged:
            return "the adapter is merged into the base weights: unmerge it before setting its strength"
        if any(getattr(layer, "use_dora", {}).values()):
            return "the effect of DoRA is not a multiple of its scaling"
        if not isinstance(layer, UpdateLayer) and not hasattr(layer, "scaling"):
            return f"the effect of {layer.__module__.split('.')[-2].upper()} is not a multiple of any scaling"
    return moved(model)


@contextmanager
def strength(model: nn.Module, value: float) -> Iterator[None]:
    """Within the block the active adapters of ``model`` count ``value`` times: 0 is the base, 1 changes nothing.

    What counts is what an adapter adds to the output of each linear; a router goes on as if nothing had happened.
    Modules trained in full (PEFT's ``modules_to_save``) are interpolated between base and trained weights. Blocks
    multiply when nested; leaving one restores what was there before it, bit for bit.

    Raises:
        ValueError: there is no adapter, it is merged into the base weights, or it is ``fixed`` otherwise.
    """
    if (obstacle := fixed(model)) is not None:
        raise ValueError(obstacle)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    with ExitStack() as stack:
        for layer in layers:
            turned_down = _muffled if isinstance(layer, UpdateLayer) else _scaled
            stack.enter_context(turned_down(layer, value))
        for wrapper in wrappers:
            if wrapper.active_adapters:
                stack.enter_context(_interpolated(wrapper, value))
        yield
