"""Fine-tune a multimodal LLM on your task, keep what it already knew, and see both numbers."""

from __future__ import annotations

from .adapters.clock import Clock as Clock
from .adapters.clock import ClockCallback as ClockCallback
from .adapters.load import load as load
from .adapters.method import method_logs as method_logs
from .errors import UserError as UserError
from .methods import METHODS as METHODS
from .methods import AMLoRAConfig as AMLoRAConfig
from .methods import FullConfig as FullConfig
from .methods import LoRAMoEConfig as LoRAMoEConfig
from .methods import LoRASculptConfig as LoRASculptConfig
from .methods import LwFConfig as LwFConfig
from .methods import MALoRAConfig as MALoRAConfig
from .methods import MixLoRAConfig as MixLoRAConfig
from .methods import MoSLDConfig as MoSLDConfig
from .methods import MTLLoRAConfig as MTLLoRAConfig
from .methods import RegularizedConfig as RegularizedConfig
from .methods import SMoRAConfig as SMoRAConfig
from .methods import SpiderConfig as SpiderConfig
from .switch import add_task as add_task

__version__ = "0.1.0"
