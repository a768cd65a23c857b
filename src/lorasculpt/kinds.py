"""What a run can train: this library's methods, LoRA, and what PEFT has beside it.

PEFT's are here to be compared with. Each is one of its config classes, with the settings that make it what its name
says; they are started, trained, saved and merged by PEFT. All of them adapt the linears of a scope, can be merged, and
leave the base as it was when they are turned off. ``olora`` is Orthonormal LoRA, a way to begin; O-LoRA is a penalty.

Left out is what cannot be had by a config alone (AdaLoRA, X-LoRA, Poly), what adds tokens or prefixes instead of
adapting layers, LN tuning, which trains no linears, and BOFT, which compiles CUDA code when it is first used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import (
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeftConfig,
    RandLoraConfig,
    ShiraConfig,
    SupertuningConfig,
    VeraConfig,
)

from .methods import METHODS

STARTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    # the mode of CorDA that is to preserve knowledge
    "corda": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    # the layers whose inputs it scales, and not their outputs
    "ia3": {"feedforward_modules": r".*\.(down_proj|fc2)"},
}
"""Settings by which a name differs from its config class; a run's own go before them."""
TUNERS: dict[str, type[PeftConfig]] = {
    "osf": OSFConfig,
    "shira": ShiraConfig,
    "supertuning": SupertuningConfig,
    "deft": DeftConfig,
    "ia3": IA3Config,
    "oft": OFTConfig,
    "hra": HRAConfig,
    "vera": VeraConfig,
    "randlora": RandLoraConfig,
    "fourierft": FourierFTConfig,
    "loha": LoHaConfig,
    "lokr": LoKrConfig,
    "miss": MissConfig,
    "delora": DeloraConfig,
    "hira": HiraConfig,
    "gralora": GraloraConfig,
}
"""Those of PEFT's that are no LoRA."""
OF_PEFT: dict[str, type[PeftConfig]] = {name: TUNERS.get(name, LoraConfig) for name in (*STARTS, *TUNERS)}
KINDS: dict[str, type[PeftConfig]] = {"lora": LoraConfig, **METHODS, **OF_PEFT}
"""The config class of every method by its name."""
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def settings_of(kind: type[PeftConfig]) -> list[str]:
    """The names of the settings of a method."""
    unused = getattr(kind, "unused", ())
    return [field.name for field in dataclasses.fields(kind) if field.init and field.name not in unused]


def listed_where(name: str) -> str:
    """Where the settings of ``lora`` and of PEFT's methods are told."""
    start = STARTS.get(name)
    return f"they are those of peft.{KINDS[name].__name__}" + (f", {name} being {start}" if start else "")


def started(method: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``method``, a ``name`` of ``KINDS`` and settings, with those that its name stands for."""
    return {key: value for key, value in {**STARTS.get(method["name"], {}), **method}.items() if key != "name"}


def built(method: Mapping[str, Any], **others: Any) -> PeftConfig:
    """The config of ``method``; ``others`` are settings too.

    Raises:
        TypeError, ValueError: for a setting that is refused.
    """
    return KINDS[method["name"]](**others, **started(method))


def taken_over(method: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of ``method`` that the method ``name`` can be given too.

    Those of the same method are all of them; those of another, what all LoRAs have (``r``, ``lora_alpha``, ...) but for
    what ``name`` stands for, or where one of the two is no LoRA, which layers are adapted: a rank is another thing in
    every tuner.
    """
    kind, other = KINDS[name], KINDS.get(method["name"], LoraConfig)
    common = set(settings_of(LoraConfig)) & set(settings_of(kind)) - set(STARTS.get(name, {}))
    if not (issubclass(kind, LoraConfig) and issubclass(other, LoraConfig)):
        common &= set(PLACES)
    same = method["name"] == name
    return {key: value for key, value in method.items() if key != "name" and (same or key in common)}
