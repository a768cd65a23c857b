"""The numbers of one run: source and target averages, retention, gain, H-mean, average. Numpy only.

Scores are given by task, ``{"emoji_name": [1, 0, ...], ...}``, each in [0, 1]; an average is the mean of the tasks'
means, so that a task counts once whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .score import interval

Scores = Mapping[str, Sequence[float]]


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


def paired_bootstrap(before: Scores, after: Scores, *, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """(2, resamples): the task averages before and after, for items drawn anew with replacement within each task.

    An item's scores before and after are drawn together: a hard question is hard for both models, and a difference
    or ratio of the two rows has the smaller spread that this leaves.
    Without tasks all are nan.
    """
    if {name: len(values) for name, values in before.items()} != {name: len(values) for name, values in after.items()}:
        raise ValueError("scores before and after must be of the same items of the same tasks")
    rng = np.random.default_rng(seed)
    total = np.zeros((2, resamples))
    for name, values in before.items():
        pairs = np.asarray([values, after[name]], dtype=float)
        n = pairs.shape[1]
        for i in range(resamples):
            total[:, i] += pairs[:, rng.integers(n, size=n)].mean(axis=1)
    return total / len(before) if before else np.full_like(total, np.nan)


def bounds(draws: np.ndarray, level: float = 0.95) -> list[float]:
    """[low, high] percentiles of bootstrap ``draws``, those that are nan left out."""
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return [float("nan")] * 2
    return [float(x) for x in np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))]


def average_interval(scores: Scores, draws: np.ndarray) -> list[float]:
    """95 % interval of a task average: of one task ``interval``'s, which is right at 0 % and 100 % too."""
    return list(interval(next(iter(scores.values())))) if len(scores) == 1 else bounds(draws)


def summary(
    source_before: Scores, source_after: Scores, target_before: Scores, target_after: Scores, *, seed: int = 0
) -> dict[str, float | list[float]]:
    """Every number of a run with its 95 % interval under ``<name>_interval``.

    The intervals of retention, gain, H-mean and average are percentiles of one paired bootstrap over items (2000
    resamples): they tell how sure the test sets make us, not how much another seed of training would change. Where
    a side has no tasks, its numbers and those that need both sides are nan.
    """
    source = paired_bootstrap(source_before, source_after, seed=seed)
    target = paired_bootstrap(target_before, target_after, seed=seed + 1)
    scores = {
        "source_before": source_before,
        "source_after": source_after,
        "target_before": target_before,
        "target_after": target_after,
    }
    draws = dict(zip(scores, (*source, *target), strict=True))
    numbers: dict[str, float | list[float]] = {}
    for name, values in scores.items():
        numbers[name] = task_average(values)
        numbers[f"{name}_interval"] = average_interval(values, draws[name])
    for name, formula, (first, second) in (
        ("retention", retention, ("source_before", "source_after")),
        ("gain", gain, ("target_before", "target_after")),
        ("h_mean", h_mean, ("source_after", "target_after")),
        ("average", average, ("source_after", "target_after")),
    ):
        numbers[name] = float(formula(numbers[first], numbers[second]))
        numbers[f"{name}_interval"] = bounds(formula(draws[first], draws[second]))
    return numbers
