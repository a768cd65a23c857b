"""The list of methods: this is the registry. A new method is one more line here."""

from __future__ import annotations

from .am_lora import AMLoRAConfig as AMLoRAConfig
from .full import FullConfig as FullConfig
from .loramoe import LoRAMoEConfig as LoRAMoEConfig
from .lorasculpt import LoRASculptConfig as LoRASculptConfig
from .lwf import LwFConfig as LwFConfig
from .malora import MALoRAConfig as MALoRAConfig
from .mixlora import MixLoRAConfig as MixLoRAConfig
from .mosld import MoSLDConfig as MoSLDConfig
from .mtl_lora import MTLLoRAConfig as MTLLoRAConfig
from .regularized import RegularizedConfig as RegularizedConfig
from .smora import SMoRAConfig as SMoRAConfig
from .spider import SpiderConfig as SpiderConfig

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
