"""The numbers of one run: source and target averages, retention, gain, H-mean, average. Numpy only.

Scores are given by task, ``{"emoji_name": [1, 0, ...], ...}``, each in [0, 1]; an average is the mean of the tasks'
means, so that a task counts once whatever its size. Beside them may stand, by task too, the groups of the items that
stand or fall together (`score.worth`); items of a task that has none are each drawn by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from .score import interval, worth

Scores = Mapping[str, Sequence[float]]
Groups = Mapping[str, Sequence[int]]
NONE: Groups = {}
NORMAL = NormalDist()
Estimate = tuple[float, float, float]  # a value and the ends of its 95 % interval
Formula = Callable[[Any, Any], Any]


def task_average(scores: Scores) -> float:
    """Mean of the tasks' mean scores; nan without tasks."""
    return float(np.mean([np.mean(values) for values in scores.values()])) if scores else float("nan")


def retention(before, after):
    """Share of the source average that is left, after / before; nan where there was nothing to keep."""
    before, after = np.asarray(before, float), np.asarray(after, float)
    return np.divide(after, before, out=np.full_like(after, np.nan), where=before > 0)[()]


def gain(before, after):
    """What the target average rose by, after - before."""
    return after - before


def h_mean(source, target):
    """Harmonic mean 2ST / (S + T) of source and target average after training; 0 if both are."""
    source, target = np.asarray(source, float), np.asarray(target, float)
    total = source + target
    return np.divide(2 * source * target, total, out=np.zeros_like(total), where=total != 0)[()]


def average(source, target):
    """Mean (S + T) / 2 of source and target average after training."""
    return (source + target) / 2


def average_interval(scores: Scores, groups: Groups = NONE) -> list[float]:
    """95 % interval of a task average: the mean of the tasks' own (`score.interval`), each less sure.

    How much less is such that, were each task's mean of a normal law, the average's would be as sure as it is said to
    be: tasks err in different directions. Of one task it is the task's, of tasks alike that of all their items
    together. It has a width at 0 % and 100 % too, where no score differs from another. Without tasks it is nan.

    References:
        Yan and Su, "Stratified Wilson and Newcombe confidence intervals for multiple binomial proportions", Statistics
        in Biopharmaceutical Research 2, 2010.
    """
    if not scores:
        return [math.nan] * 2
    # padded, so that nothing is wholly sure (Agresti, Coull)
    errors = [
        math.sqrt(np.var([*values, 0, 0, 1, 1]) / (worth(values, groups.get(name)) + 4))
        for name, values in scores.items()
    ]
    level = 2 * NORMAL.cdf(NORMAL.inv_cdf(0.975) * math.hypot(*errors) / sum(errors)) - 1
    ends = np.array([interval(values, level, groups.get(name)) for name, values in scores.items()])
    return [float(end) for end in ends.mean(axis=0)]


def correlation(before: Scores, after: Scores, groups: Groups = NONE) -> float:
    """How the task averages before and after go together, over items drawn anew; 0 where one of them cannot move.

    A hard question is hard for both models: a difference or ratio of the two is surer than either.
    """
    if {name: len(values) for name, values in before.items()} != {name: len(values) for name, values in after.items()}:
        raise ValueError("scores before and after must be of the same items of the same tasks")
    both = np.zeros((2, 2))
    for name, values in before.items():
        n = len(values)
        _, which = np.unique(groups.get(name, range(n)), return_inverse=True)
        sums = np.array([np.bincount(which, np.asarray(x, float) - np.mean(x)) for x in (values, after[name])])
        both += sums @ sums.T / n**2
    spread = math.sqrt(both[0, 0] * both[1, 1])
    return float(both[0, 1] / spread) if spread > 0 else 0.0


def combined(formula: Formula, first: Estimate, second: Estimate, rho: float = 0.0) -> list[float]:
    """95 % interval of ``formula(first, second)``: what it comes to on the ellipse that their two intervals span.

    The ellipse leans as the estimates are correlated. Of a sum the ends are those of MOVER: the squares of both halves
    added up, with twice their product times the correlation. nan where the formula is not defined on all of it.

    Args:
        formula: of two arrays.
        first, second: ``(value, low, high)`` of each.
        rho: correlation of the two estimates.

    References:
        Zou and Donner, "Construction of confidence limits about effect measures: a general approach", Statistics in
        Medicine 27, 2008. Of a paired difference it is Newcombe's method 10 ("Improved confidence intervals for the
        difference between binomial proportions based on paired data", the same 17, 1998).
    """
    angle = np.linspace(0, 2 * np.pi, 721)
    x = np.cos(angle)
    y = rho * x + math.sqrt(max(0.0, 1 - rho**2)) * np.sin(angle)

    def moved(estimate: Estimate, by: np.ndarray) -> np.ndarray:
        value, low, high = estimate
        return value + by * np.where(by < 0, value - low, high - value)

    found = formula(moved(first, x), moved(second, y))
    return [float(found.min()), float(found.max())] if np.isfinite(found).all() else [math.nan] * 2


def summary(
    source_before: Scores,
    source_after: Scores,
    target_before: Scores,
    target_after: Scores,
    source_groups: Groups = NONE,
    target_groups: Groups = NONE,
) -> dict[str, float | list[float]]:
    """Every number of a run with its 95 % interval under ``<name>_interval``.

    The intervals tell how sure the test sets make us, not how much another seed of training would change. Where a side
    has no tasks, its numbers and those that need both sides are nan.
    """
    scores = {
        "source_before": source_before,
        "source_after": source_after,
        "target_before": target_before,
        "target_after": target_after,
    }
    groups = {"source": source_groups, "target": target_groups}
    numbers: dict[str, float | list[float]] = {}
    known: dict[str, Estimate] = {}
    for name, values in scores.items():
        value, (low, high) = task_average(values), average_interval(values, groups[name.split("_")[0]])
        numbers |= {name: value, f"{name}_interval": [low, high]}
        known[name] = (value, low, high)
    alike = {
        side: correlation(scores[f"{side}_before"], scores[f"{side}_after"], of_side)
        for side, of_side in groups.items()
    }
    for name, formula, (first, second), paired, (least, most) in (
        ("retention", retention, ("source_before", "source_after"), alike["source"], (0.0, math.inf)),
        ("gain", gain, ("target_before", "target_after"), alike["target"], (-1.0, 1.0)),
        ("h_mean", h_mean, ("source_after", "target_after"), 0.0, (0.0, 1.0)),
        ("average", average, ("source_after", "target_after"), 0.0, (0.0, 1.0)),
    ):
        value = float(formula(known[first][0], known[second][0]))
        ends = np.clip(combined(formula, known[first], known[second], paired), least, most)
        told = not math.isnan(value)  # of what is not defined there is no interval either
        numbers |= {name: value, f"{name}_interval": ends.tolist() if told else [math.nan, math.nan]}
    return numbers
