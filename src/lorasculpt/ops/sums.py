"""Sums over the layers of a model, which may lie on several devices."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def total(values: Iterable[Tensor]) -> Tensor:
    """The sum of ``values``, at least one, on the device of the first: even single numbers add up on one alone."""
    first, *others = values
    return sum((value.to(first.device) for value in others), first)
