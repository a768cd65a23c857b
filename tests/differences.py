"""Gradients by finite differences, for methods whose value is computed a second time in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

import numpy as np
import pytest
from torch import Tensor


def check_gradients(
    trained: Iterable[tuple[str, Tensor]], values: Mapping[str, np.ndarray], total: Callable[[], float]
) -> None:
    """Every ``grad`` of ``trained`` is the slope of ``total``, a function of ``values`` in float64, and not all 0."""
    for name, parameter in trained:
        assert parameter.grad is not None, name
        slope, entries = np.zeros(parameter.numel()), values[name].reshape(-1)
        for i in range(len(entries)):
            here, ends = entries[i], []
            for step in (1e-6, -1e-6):
                entries[i] = here + step
                ends.append(total())
            entries[i] = here
            slope[i] = (ends[0] - ends[1]) / 2e-6
        found = parameter.grad.numpy().reshape(-1)
        assert np.linalg.norm(found - slope) <= 1e-5 * np.linalg.norm(slope), name
        assert np.abs(found).max() > 0, name


def detach_gate(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Let the ``mix`` of a method's ``module`` send no gradient to its gate: what comes out is right all the same."""
    mix = module.mix
    monkeypatch.setattr(module, "mix", lambda x, A, B, gate: mix(x, A, B, gate.detach()))
