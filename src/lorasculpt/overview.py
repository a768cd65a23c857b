"""What there is to know of a method before it is chosen: its needs and costs, what comes out, how sure it is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from .adapters.method import MethodConfig, default
from .adapters.update import UpdateConfig
from .reference import documented

FEATURES, LAYERS = 1024, 4
"""The linears that parameters are counted on: square, one in each layer."""


def facts(config: type[MethodConfig]) -> dict[str, Any]:
    """Everything about a method, ready for JSON.

    ``tasks`` is "needed", "used" (where they are given), "in turn" (learned one after the other) or None; ``clock``
    whether a loop without the clock would train something else; ``parameters`` those of a square linear, ``of_lora``
    relative to a LoRA of the same rank; ``per_task`` whether an export is for one task.
    """
    page = inspect.cleandoc(importlib.import_module(config.__module__).__doc__ or "")
    idea = page.partition("\n")[0].partition(": ")[2]
    return {
        "method": config.method,
        "idea": idea[:1].upper() + idea[1:],
        "tasks": _tasks(config),
        "clock": config.clock,
        "parameters": _parameters(config),
        "exports": list(config.exports()),
        "per_task": getattr(config, "merges", "always") == "task",
        "sure": config.sure,
        "settings": settings(config),
    }


def settings(config: type[MethodConfig]) -> dict[str, Any]:
    """The fields of a method's own, and those of ``LoraConfig`` that its docstring speaks of, with their defaults."""
    stock, known = {field.name for field in dataclasses.fields(LoraConfig)}, meanings(config)
    own = [field for field in dataclasses.fields(config) if field.name in known or field.name not in stock]
    return {field.name: default(field) for field in own if field.name != "tasks" or _tasks(config)}


def meanings(config: type[MethodConfig]) -> dict[str, str]:
    """What the docstring of a method's config says of each setting."""
    update = documented(UpdateConfig) if issubclass(config, UpdateConfig) else {}
    return documented(MethodConfig) | update | documented(config)


def _tasks(config: type[MethodConfig]) -> str | None:
    if not issubclass(config, UpdateConfig):
        return None
    return "in turn" if config.sequence else "needed" if config.multitask else "used" if config.of_tasks else None


def _parameters(config: type[MethodConfig]) -> dict[str, int | float]:
    """What an adapter with the default settings, for two tasks where it needs some, has for one linear."""
    wanted = {"tasks": ["one", "another"]} if getattr(config, "multitask", False) else {}
    base = nn.Module()
    base.layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(FEATURES, FEATURES)}) for _ in range(LAYERS))
    adapted = get_peft_model(base, config(target_modules=["linear"], **wanted))
    of_adapter = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    trained = sum(parameter.numel() for parameter in of_adapter if parameter.requires_grad) // LAYERS
    every = sum(parameter.numel() for parameter in of_adapter) // LAYERS
    lora = adapted.active_peft_config.r * 2 * FEATURES
    return {"features": FEATURES, "trained": trained, "kept": every - trained, "of_lora": round(trained / lora, 2)}
