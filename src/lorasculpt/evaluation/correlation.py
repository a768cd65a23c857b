"""How well the drift, which needs no source data, tells the loss of source accuracy: a rank correlation over runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .score import RESAMPLES, bounds

# Fewer groups have no interval: of three with independent numbers it excludes 0 in a third of all cases, of five in a
# tenth, of eight in a twentieth, as it should. Drawn anew, three have ten different samples.
LEAST = 8
Points = list[tuple[float, float]]  # of one run: drift, and source accuracy lost


def drift_and_loss(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Rank correlation of the drift with the loss of source accuracy, of the entries of a results file.

    Returns:
        ``runs``: :func:`rank_correlation` over the runs that have a drift. ``curve``: the same over all points of the
        strength curves that carry one; not over strength 0, which is the base, with neither drift nor loss. None where
        no curve has a point but its ends, and altogether if no run has a drift and a source.
    """
    drifted: list[Points] = []
    curves: list[Points] = []
    for run in runs:
        if (before := run["summary"]["source_before"]) is None:
            continue  # there is no source
        if run.get("drift"):
            drifted.append([(run["drift"]["value"], before - run["summary"]["source_after"])])
        if points := along(run):
            curves.append(points)
    if not drifted:
        return None
    between = any(0 < p["strength"] < 1 and "drift" in p for run in runs for p in run.get("curve") or ())
    return {"runs": rank_correlation(drifted), "curve": rank_correlation(curves) if between else None}


def along(run: dict[str, Any]) -> Points:
    """The points of a run's strength curve that carry a drift, but strength 0.

    What they lost is against the curve's own strength 0, where it has one: a curve may be of fewer questions than the
    summary.
    """
    curve = run.get("curve") or ()
    before = next((p["source"] for p in curve if p["strength"] == 0), run["summary"]["source_before"])
    return [(p["drift"], before - p["source"]) for p in curve if "drift" in p and p["strength"] > 0]


def rank_correlation(groups: Sequence[Points]) -> dict[str, Any]:
    """:func:`spearman` over the points of all ``groups`` together.

    The interval is the percentile bootstrap's: groups are drawn anew with replacement, whole. It takes them for
    independent; runs of one method that differ in the seed alone are closer than that. In which order the groups come
    changes nothing.

    Returns:
        ``rho``, the 95 % interval ``low`` and ``high`` (None for fewer than ``LEAST`` groups, where all draws are
        equal, and without ``rho``), and the number of points ``n``. ``rho`` is None where one of the two is the same
        everywhere.
    """
    groups = sorted(groups)  # the same draws for the same runs
    points = np.asarray([point for group in groups for point in group], float)
    rho = spearman(*points.T)
    low, high = float("nan"), float("nan")
    if len(groups) >= LEAST:
        owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        of = [np.flatnonzero(owner == i) for i in range(len(groups))]
        rng, draws = np.random.default_rng(0), np.empty(RESAMPLES)
        for i in range(RESAMPLES):
            drawn = np.concatenate([of[j] for j in rng.integers(len(groups), size=len(groups))])
            draws[i] = spearman(*points[drawn].T)
        low, high = bounds(draws)
        if not high - low > 1e-9:  # as of a rho of 1, which is not sure for that
            low, high = float("nan"), float("nan")
    known = [None if np.isnan([rho, number]).any() else float(number) for number in (rho, low, high)]
    return dict(zip(("rho", "low", "high"), known, strict=True)) | {"n": len(points)}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two (n,) arrays, in [-1, 1]; equals share the mean of their ranks.

    nan where all values of one of them are equal, as of a single point.
    """
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
