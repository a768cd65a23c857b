"""The list of methods: this is the registry, and what ``lorasculpt`` exports of them. A new method is added here."""

from __future__ import annotations

from .am_lora import AMLoRAConfig
from .full import FullConfig
from .loramoe import LoRAMoEConfig
from .lorasculpt import LoRASculptConfig
from .lwf import LwFConfig
from .malora import MALoRAConfig
from .mixlora import MixLoRAConfig
from .mosld import MoSLDConfig
from .mtl_lora import MTLLoRAConfig
from .regularized import RegularizedConfig
from .smora import SMoRAConfig
from .spider import SpiderConfig

__all__ = [
    "METHODS",
    "AMLoRAConfig",
    "FullConfig",
    "LoRAMoEConfig",
    "LoRASculptConfig",
    "LwFConfig",
    "MALoRAConfig",
    "MTLLoRAConfig",
    "MixLoRAConfig",
    "MoSLDConfig",
    "RegularizedConfig",
    "SMoRAConfig",
    "SpiderConfig",
]

METHODS = {
    config.method: config
    for config in (
        LoRASculptConfig,
        LoRAMoEConfig,
        MixLoRAConfig,
        MTLLoRAConfig,
        MoSLDConfig,
        MALoRAConfig,
        SMoRAConfig,
        AMLoRAConfig,
        SpiderConfig,
        RegularizedConfig,
        LwFConfig,
        FullConfig,
    )
}
