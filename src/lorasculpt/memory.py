"""The most memory in use while something is done, and how it is told that none is left."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch


def ran_out(error: BaseException) -> str | None:
    """That memory ran out, and for how much more or who may have it, if ``error`` says so; else None."""
    told = str(error)
    if re.search(r"(CUDA|HIP) error: out of memory|_STATUS_ALLOC_FAILED", told):  # not of torch's own allocator
        return "out of memory on the GPU, which another process may be using as well"
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator: can't alloc" not in told:
        return None
    wanted = re.search(r"ried to allocate ([\d.]+ \w+)", told)
    return "out of memory" + (f", for {wanted[1]} more" if wanted else "")


class Peak:
    """The peak from the making of this object until :meth:`bytes` is asked for.

    With CUDA it is that of torch's tensors on the device, whatever the allocator holds in reserve. On a CPU it is the
    resident size of this process: the interpreter, its libraries, the model and whatever else is alive, but no other
    process. What earlier work has freed is given back to the system first, as far as the C library can.

    Args:
        device: where the work is done.
    """

    of: str
    """What is measured: ``cuda`` or ``process``."""

    def __init__(self, device: torch.device):
        self._device = device
        self.of = "cuda" if device.type == "cuda" else "process"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if device.type == "cpu":
            _give_back()
        self._reset = device.type == "cpu" and _reset()
        self._before = _of_life() if device.type == "cpu" else None

    def bytes(self) -> int | None:
        """The peak so far. None where it cannot be told: the system has no such number, or one of the process's whole
        life alone and that was reached earlier, or the device is neither a CPU nor CUDA's.
        """
        if self.of == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._reset:
            return _high_water()
        now = _of_life() if self._before is not None else None
        return now if now is not None and now > (self._before or 0) else None


def _give_back() -> None:
    """Return memory that is free but still held by the process to the system; glibc alone can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def _reset(path: Path = Path("/proc/self/clear_refs")) -> bool:
    """Let Linux count the peak anew, as from the present size; whether it does."""
    try:
        path.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int | None:
    """Linux's peak since :func:`_reset`."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def _of_life() -> int | None:
    """The peak since the process began, where the system keeps one."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
