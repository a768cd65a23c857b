"""The list of methods: this is the registry. A new method is one more line here."""

from __future__ import annotations

from .lorasculpt import LoRASculptConfig

METHODS = {config.method: config for config in (LoRASculptConfig,)}

__all__ = ["METHODS", "LoRASculptConfig"]
