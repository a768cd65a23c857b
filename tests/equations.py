"""What tests of a method against its equations share: its tensors and input, faults to be caught, a second process."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lorasculpt.adapters import carrier
from lorasculpt.adapters.update import Update


def drawn(update: Update) -> Update:
    """``update`` with random values in all that it saves, always the same."""
    generator = torch.Generator().manual_seed(5)
    for tensor in update.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return update


def normal(*shape: int) -> Tensor:
    """A random input in float64, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def tensors(update: Update) -> dict[str, np.ndarray]:
    """Copies of all that ``update`` saves."""
    return {key: value.detach().numpy().copy() for key, value in update.state_dict().items()}


def run(update: Update, x: Tensor, seed: int) -> tuple[Tensor, float]:
    """What ``update`` adds, drawing from ``seed``, and the loss that its backward pass notes."""
    update.noted = {}
    torch.manual_seed(seed)
    output = update(x)
    output.sum().backward()
    return output.detach(), float(update.noted["loss"])


# --- faults ---------------------------------------------------------------------------------------------------------


def unscaled(update: Update) -> None:
    """Without alpha / r."""
    update.scaling = 1.0


def all_real(update: Update) -> None:
    """With padding counted."""
    update.context.padding = None


def swapped(update: Update) -> None:
    """With the scores of other experts."""
    update.router.data = update.router.data.flip(0)


def unpaired(update: Update) -> None:
    """With the up-projections of other experts."""
    update.B.data = update.B.data.flip(0)


def all_chosen(update: Update) -> None:
    """With no expert left out, of four."""
    update.config.top_k = 4


# --- several processes ----------------------------------------------------------------------------------------------


def two_processes(monkeypatch: pytest.MonkeyPatch, work: Callable[[int], None], timeout: float = 20) -> None:
    """``work(0)`` and ``work(1)`` side by side, in threads that pass for processes: what they reduce is their sum."""
    given, meet = {}, threading.Barrier(2, timeout=timeout)

    def all_reduce(tensor: Tensor) -> None:
        given[threading.get_ident()] = tensor.clone()
        meet.wait()
        total = sum(given[key] for key in sorted(given))
        meet.wait()
        tensor.copy_(total)

    monkeypatch.setattr(carrier, "world", lambda: 2)
    monkeypatch.setattr(carrier.dist, "all_reduce", all_reduce)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
