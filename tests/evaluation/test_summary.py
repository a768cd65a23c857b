"""The numbers of a run, against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorasculpt.evaluation import comparison
from lorasculpt.evaluation.summary import (
    average,
    gain,
    h_mean,
    paired_bootstrap,
    retention,
    summary,
    task_average,
)


def test_formulas():
    assert task_average({"a": [1, 0], "b": [1, 1, 1, 0]}) == pytest.approx((0.5 + 0.75) / 2)
    assert retention(0.8, 0.6) == pytest.approx(0.75)
    assert math.isnan(retention(0.0, 0.3))
    assert gain(0.1, 0.7) == pytest.approx(0.6)
    assert h_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert h_mean(0.0, 0.0) == 0
    assert average(0.5, 1.0) == 0.75
    assert retention(np.array([0.5, 0.0]), np.array([0.25, 0.5])).tolist() == pytest.approx([0.5, np.nan], nan_ok=True)


def test_pairs_are_drawn_together():
    items = np.random.default_rng(0).integers(0, 2, 50).tolist()
    before, after = paired_bootstrap({"t": items}, {"t": items})
    assert np.array_equal(before, after)
    assert before.std() == pytest.approx(np.std(items) / math.sqrt(50), rel=0.1)
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap({"t": [1, 0]}, {"t": [1]})


def test_pairing_against_the_exact_spread():
    # half of 100 items right before, 10 of those lost: the difference is a binomial of 100 at 0.1, over 100
    before, after = [1] * 50 + [0] * 50, [1] * 40 + [0] * 60
    numbers = summary({"s": before}, {"s": after}, {"t": after}, {"t": before})
    assert numbers["gain"] == pytest.approx(0.1)
    low, high = numbers["gain_interval"]
    assert (low, high) == pytest.approx((0.05, 0.16), abs=0.0101)  # its 2.5 % and 97.5 % quantiles are 5 and 16
    assert numbers["retention"] == pytest.approx(0.8)
    assert 0.65 < numbers["retention_interval"][0] < 0.8 < numbers["retention_interval"][1] < 0.92


def test_summary():
    numbers = summary({"a": [1, 1, 1, 1], "b": [1, 0]}, {"a": [1, 1, 0, 0], "b": [1, 0]}, {"t": [0, 0]}, {"t": [1, 1]})
    assert numbers["source_before"] == pytest.approx(0.75)
    assert numbers["source_after"] == pytest.approx(0.5)
    assert numbers["retention"] == pytest.approx(2 / 3)
    assert (numbers["target_before"], numbers["target_after"], numbers["gain"]) == (0, 1, 1)
    assert numbers["h_mean"] == pytest.approx(2 / 3)
    assert numbers["average"] == pytest.approx(0.75)
    for name in ("source_before", "source_after", "retention", "target_after", "gain", "h_mean", "average"):
        low, high = numbers[f"{name}_interval"]
        assert low <= numbers[name] <= high
    assert numbers["target_after_interval"][0] < 0.4  # two of two is not certainty
    again = summary({"a": [1, 1, 1, 1], "b": [1, 0]}, {"a": [1, 1, 0, 0], "b": [1, 0]}, {"t": [0, 0]}, {"t": [1, 1]})
    assert again == numbers


def test_nothing_known():
    numbers = summary({"a": [0, 0]}, {"a": [0, 1]}, {"t": [0, 0]}, {"t": [0, 0]})
    assert math.isnan(numbers["retention"])
    assert all(math.isnan(bound) for bound in numbers["retention_interval"])
    assert numbers["h_mean"] == 0


def test_comparison():
    def measured(scores):
        return {"value": sum(scores) / len(scores), "low": 0.0, "high": 1.0, "n": len(scores), "scores": scores}

    before = {"source": {"a": measured([1, 1])}, "target": {"t": measured([0, 0])}}
    after = {"source": {"a": measured([1, 0])}, "target": {"t": measured([0, 1])}}
    result = comparison(before, after)
    assert result["source"] == {
        "a": {"before": 1, "after": 0.5, "before_interval": [0.0, 1.0], "after_interval": [0.0, 1.0], "n": 2}
    }
    assert result["target"]["t"]["after"] == 0.5
    assert (result["summary"]["retention"], result["summary"]["gain"]) == (0.5, 0.5)


def test_a_side_without_tasks_has_no_numbers():
    numbers = summary({}, {}, {"t": [0, 1]}, {"t": [1, 1]})
    assert (numbers["gain"], numbers["target_after"]) == (0.5, 1)
    for name in ("source_before", "source_after", "retention", "h_mean", "average"):
        assert math.isnan(numbers[name])
        assert np.isnan(numbers[f"{name}_interval"]).all()
