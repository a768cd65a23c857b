"""Student's t: how sure a mean over a few seeds is, and whether two methods differ. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import mean, stdev


def p_value(t: float, freedom: int) -> float:
    """Chance of a value at least as far from 0 as ``t``, for ``freedom`` >= 1 degrees of freedom.

    References:
        Abramowitz and Stegun, *Handbook of Mathematical Functions*, 1964, 26.7.3 and 26.7.4: a finite sum, exact.
    """
    angle, odd = math.atan(abs(t) / math.sqrt(freedom)), freedom % 2
    cosine = math.cos(angle)
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


@cache
def quantile(freedom: int, level: float = 0.95) -> float:
    """The t that a share ``level`` of values lies within, on both sides of 0."""
    low, high = 0.0, 1.0
    while p_value(high, freedom) > 1 - level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle, freedom) > 1 - level else (low, middle)
    return high


def mean_interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """``mean`` of one value per seed, and ``low`` and ``high`` of its 95 % interval.

    The interval is None for a single seed. All three are None if a value is, as the retention of nothing is.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "low": None, "high": None}
    centre = mean(known)
    if len(known) == 1:
        return {"mean": centre, "low": None, "high": None}
    half = quantile(len(known) - 1) * stdev(known) / math.sqrt(len(known))
    return {"mean": centre, "low": centre - half, "high": centre + half}


def paired(values: Sequence[float | None], others: Sequence[float | None]) -> dict[str, float | int | None] | None:
    """Paired t-test of ``values`` against ``others``, both in the order of the same seeds.

    Returns:
        ``difference`` (mean of values - others) with its 95 % interval ``low`` and ``high``, ``t``, the two-sided ``p``
        and the number of pairs ``n``. ``t`` and ``p`` are None where all differences are equal, up to rounding. None
        for fewer than two pairs, or where a value is None.
    """
    pairs = [(a, b) for a, b in zip(values, others, strict=True) if a is not None and b is not None]
    if len(pairs) < 2 or len(pairs) < len(values):
        return None
    differences = [a - b for a, b in pairs]
    found = mean_interval(differences)
    spread, n = stdev(differences), len(differences)
    rounding = 1e-12 * max(abs(value) for pair in pairs for value in pair)
    t = mean(differences) / (spread / math.sqrt(n)) if spread > rounding else None
    p = None if t is None else p_value(t, n - 1)
    return {"difference": found["mean"], "low": found["low"], "high": found["high"], "t": t, "p": p, "n": n}
