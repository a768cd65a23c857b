"""How well drift tells the source that is lost: the rank correlation, and what its interval is of."""

from __future__ import annotations

import numpy as np
import pytest

from lorasculpt.evaluation.correlation import along, drift_and_loss, rank_correlation, spearman


def run(drift: float | None, lost: float, points=()) -> dict:
    """A made-up run that lost so much of a source of 0.8; ``points``: strength, drift and loss along its curve."""
    curve = [{"strength": s, "drift": d, "source": 0.8 - gone, "target": 0} for s, d, gone in points]
    found = {"summary": {"source_before": 0.8, "source_after": 0.8 - lost}, "curve": curve}
    return found | ({"drift": {"value": drift}} if drift is not None else {})


def slow_spearman(x, y) -> float:
    """Pearson's correlation of ranks, each counted by looking at all others."""

    def ranks(values):
        return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]

    a, b = ranks(x), ranks(y)
    n, centre = len(a), (len(a) + 1) / 2
    cov = sum((a[i] - centre) * (b[i] - centre) for i in range(n))
    return cov / (sum((v - centre) ** 2 for v in a) * sum((v - centre) ** 2 for v in b)) ** 0.5


def test_a_rank_correlation_is_that_of_ranks_counted_one_by_one():
    rng = np.random.default_rng(0)
    for n in (2, 5, 12):
        x, y = rng.normal(size=n), rng.normal(size=n)
        assert spearman(x, y) == pytest.approx(slow_spearman(x, y))
        assert spearman(x, np.exp(3 * x)) == pytest.approx(1)
        tied = rng.integers(3, size=12), rng.integers(4, size=12)
        assert spearman(*tied) == pytest.approx(slow_spearman(*tied))
    assert spearman(np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7])) == pytest.approx(0.8207826817)  # textbooks'
    assert np.isnan(spearman(np.ones(3), np.arange(3)))


def test_the_drift_is_compared_with_the_source_lost_over_runs_and_points_of_curves():
    plain = run(None, 0.7)
    points = [(0.1, 0.0), (0.2, 0.05), (0.3, 0.2), (0.4, 0.1), (0.5, 0.5)]
    found = drift_and_loss([plain, *(run(*point) for point in points)])
    assert found["curve"] is None
    assert found["runs"]["rho"] == pytest.approx(0.9)
    assert found["runs"]["n"] == 5
    assert found["runs"]["low"] is found["runs"]["high"] is None
    found = drift_and_loss([plain, *(run(*point) for point in points * 2)])
    assert -1 <= found["runs"]["low"] < 0.9 <= found["runs"]["high"] <= 1
    assert drift_and_loss([plain]) is None

    ends = [(0, 0.0, 0.0), (1, 0.2, 0.2)]  # the runs themselves, once more
    assert drift_and_loss([run(0.2, 0.2, ends)])["curve"] is None

    # strength 0 has neither and proves nothing; whole runs are drawn, so that two of them have no interval
    falling = [(0, 0.0, 0.0), (0.5, 0.1, 0.3), (1, 0.2, 0.2)], [(0, 0.0, 0.0), (0.5, 0.3, 0.1), (1, 0.4, 0.0)]
    found = drift_and_loss([run(0.2, 0.2, falling[0]), run(0.4, 0.0, falling[1])])
    assert found["curve"] == {"rho": pytest.approx(-1), "low": None, "high": None, "n": 4}
    assert found["runs"] == {"rho": pytest.approx(-1), "low": None, "high": None, "n": 2}
    assert drift_and_loss([run(0.2, 0.2)])["runs"] == {"rho": None, "low": None, "high": None, "n": 1}


def test_what_a_curve_lost_is_against_its_own_beginning():
    """It may be of other questions than the summary, of which the base knows more or less."""
    one = run(0.2, 0.2, [(0, 0.0, 0.1), (0.5, 0.1, 0.1), (1, 0.2, 0.3)])
    assert along(one) == [(0.1, 0.0), (0.2, pytest.approx(0.2))]
    one["curve"].pop(0)
    assert along(one) == [(0.1, pytest.approx(0.1)), (0.2, pytest.approx(0.3))]
    assert along(run(0.2, 0.2)) == []


def test_whole_groups_are_drawn_for_the_interval():
    """Ten equal points of each of eight runs are eight facts, not eighty."""
    groups = [[(x, y)] * 10 for x, y in enumerate((1, 0, 3, 2, 7, 4, 6, 5))]
    found = rank_correlation(groups)
    assert found["n"] == 80
    apart = rank_correlation([[point] for group in groups for point in group])
    assert apart["rho"] == pytest.approx(found["rho"])
    assert found["low"] < 0.5 < apart["low"] < apart["rho"] < apart["high"] < found["high"]


def test_few_groups_have_no_interval_nor_have_draws_that_are_all_equal():
    """Three independent runs would have one without 0 in every third case, and a perfect order one without width."""
    mixed = [[(x, y)] for x, y in enumerate((1, 0, 3, 2, 7, 4, 6, 5))]
    assert rank_correlation(mixed[:7])["low"] is None
    assert rank_correlation(mixed)["low"] is not None
    assert rank_correlation([[(x, x)] for x in range(9)]) == {
        "rho": pytest.approx(1),
        "low": None,
        "high": None,
        "n": 9,
    }
