"""Fine-tune a multimodal LLM on your task, keep what it already knew, and see both numbers."""

from __future__ import annotations

from .adapters.clock import Clock as Clock
from .adapters.clock import ClockCallback as ClockCallback
from .adapters.load import load as load
from .adapters.method import method_logs as method_logs
from .adapters.tasks import TaskCollator as TaskCollator
from .errors import UserError as UserError
from .methods import *  # noqa: F403  the config of every method, and METHODS: its __all__ is the one list of them
from .switch import add_task as add_task

__version__ = "0.1.0"
