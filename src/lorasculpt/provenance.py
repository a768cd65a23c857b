"""What numbers were made with, and on."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("lorasculpt", "torch", "transformers", "peft", "trl", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def machine(device: torch.device) -> str:
    """What times on ``device`` are of: the GPU by its name, or the processor and the threads that torch takes of it.

    An accelerator without a name of its own, such as Apple's, is told beside the processor.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{name}, {device.type}"
