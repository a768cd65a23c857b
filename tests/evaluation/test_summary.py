"""The numbers of a run, against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorasculpt.evaluation import comparison
from lorasculpt.evaluation.score import interval
from lorasculpt.evaluation.summary import (
    average,
    average_interval,
    combined,
    correlation,
    gain,
    h_mean,
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


def test_how_pairs_go_together():
    rng = np.random.default_rng(0)
    before = {"a": rng.integers(0, 2, 50).tolist(), "b": rng.random(80).tolist()}
    noise = {"a": rng.integers(0, 2, 50).tolist(), "b": rng.random(80).tolist()}
    after = {name: np.where(rng.random(len(x)) < 0.5, x, noise[name]).tolist() for name, x in before.items()}
    drawn = []  # the averages of items that are drawn anew, each with its score before and after
    for _ in range(4000):
        rows = {name: rng.integers(len(x), size=len(x)) for name, x in before.items()}
        drawn.append([task_average({n: np.array(x)[rows[n]] for n, x in side.items()}) for side in (before, after)])
    assert correlation(before, after) == pytest.approx(np.corrcoef(np.array(drawn).T)[0, 1], abs=0.03)
    assert correlation(before, before) == pytest.approx(1)
    assert correlation({"a": [1, 1]}, {"a": [0, 1]}) == correlation({}, {}) == 0
    with pytest.raises(ValueError, match="same items"):
        correlation({"t": [1, 0]}, {"t": [1]})


def test_newcombes_example():
    """Of his table of paired differences: 36 pairs right twice, 12 and 2 once, none never (his method 10)."""
    before, after = [1] * 48 + [0] * 2, [1] * 36 + [0] * 12 + [1] * 2
    numbers = summary({"s": before}, {"s": after}, {"t": before}, {"t": after})
    assert numbers["gain"] == pytest.approx(-0.2)
    assert numbers["gain_interval"] == pytest.approx([-0.3406, -0.0562], abs=0.0035)


@pytest.mark.parametrize(("right", "kept", "n"), [(0.8, 0.97, 80), (0.8, 0.02, 80), (0.95, 0.6, 40), (0.5, 0.9, 30)])
def test_the_truth_is_within_the_intervals_as_often_as_they_say(right, kept, n):
    """Three tasks; an item that was right stays so by chance ``kept``, one that was wrong becomes right by 0.05."""
    rng, names, trials = np.random.default_rng(0), ("source_after", "retention", "h_mean", "average", "gain"), 800
    after, learned = right * kept + (1 - right) * 0.05, 0.7
    truth = dict(
        zip(names, (after, after / right, h_mean(after, learned), average(after, learned), learned), strict=True)
    )
    within = dict.fromkeys(names, 0)
    for _ in range(trials):
        old = {name: rng.random(n) < right for name in "abc"}
        new = {name: np.where(x, rng.random(n) < kept, rng.random(n) < 0.05) for name, x in old.items()}
        numbers = summary(old, new, {"t": np.zeros(n)}, {"t": rng.random(n) < learned})
        for name in names:
            low, high = numbers[f"{name}_interval"]
            within[name] += low <= truth[name] <= high
    assert min(within.values()) > 0.925 * trials


def test_so_it_is_where_items_stand_and_fall_together():
    """A hundred groups of one to nine questions, most of a group answered alike, and kept or lost alike."""
    rng, trials, names = np.random.default_rng(1), 500, ("source_after", "retention", "target_after", "gain")
    truth = dict(zip(names, (0.7 * 0.8, 0.8, 0.4, 0.4), strict=True))
    within, alone = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def drawn(share, which):
        of_group = rng.random(which.max() + 1) < share
        return np.where(rng.random(which.size) < 0.8, of_group[which], rng.random(which.size) < share)

    for _ in range(trials):
        which = np.repeat(np.arange(100), rng.integers(1, 10, 100))
        old, kept, new = drawn(0.7, which), drawn(0.8, which), drawn(0.4, which)
        scores = {"s": old}, {"s": old & kept}, {"t": np.zeros(which.size)}, {"t": new}
        for count, groups in ((within, ({"s": which}, {"t": which})), (alone, ())):
            numbers = summary(*scores, *groups)
            for name in names:
                low, high = numbers[f"{name}_interval"]
                count[name] += low <= truth[name] <= high
    assert min(within.values()) > 0.925 * trials
    assert max(alone.values()) < 0.8 * trials  # as if each stood alone


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


def test_what_is_lost_or_known_altogether_has_a_width_too():
    lost, known = {"a": [0] * 40, "b": [0] * 60}, {"a": [1] * 40, "b": [1] * 60}
    assert average_interval({"a": [0] * 40, "b": [0] * 40}) == pytest.approx(interval([0] * 80))  # Wilson's of all
    assert average_interval({"a": [0] * 40}) == list(interval([0] * 40))
    low, high = average_interval({"a": [1 / 3] * 50})  # as VQA's scores may be
    assert low < 0.25 < 0.4 < high
    assert average_interval(lost)[0] == 0 < 0.03 < average_interval(lost)[1] < 0.05
    assert average_interval(known) == pytest.approx([1 - average_interval(lost)[1], 1])
    numbers = summary(known, lost, lost, known)
    assert numbers["retention"] == 0
    assert numbers["retention_interval"] == pytest.approx([0, average_interval(lost)[1]], rel=0.01)
    assert numbers["gain_interval"][0] < 0.95 < numbers["gain_interval"][1] == 1
    assert numbers["h_mean_interval"][1] > 0.05
    assert 0.02 < summary(known, lost, lost, lost)["h_mean_interval"][1] < average_interval(lost)[1]
    # a source whose interval begins at 0 may have been lost by any factor
    assert np.isnan(combined(retention, (0.1, 0.0, 0.2), (0.1, 0.0, 0.2))).all()


def test_nothing_known():
    numbers = summary({"a": [0, 0]}, {"a": [0, 1]}, {"t": [0, 0]}, {"t": [0, 0]})
    assert math.isnan(numbers["retention"])
    assert all(math.isnan(bound) for bound in numbers["retention_interval"])
    assert numbers["h_mean"] == 0


def test_comparison():
    def measured(scores, groups=(0, 1)):
        n = len(scores)
        return {"value": sum(scores) / n, "low": 0.0, "high": 1.0, "n": n, "groups": groups, "scores": scores}

    before = {"source": {"a": measured([1, 1])}, "target": {"t": measured([0, 0])}}
    after = {"source": {"a": measured([1, 0])}, "target": {"t": measured([0, 1])}}
    result = comparison(before, after)
    assert result["source"] == {
        "a": {"before": 1, "after": 0.5, "before_interval": [0.0, 1.0], "after_interval": [0.0, 1.0], "n": 2}
    }
    assert result["target"]["t"]["after"] == 0.5
    assert (result["summary"]["retention"], result["summary"]["gain"]) == (0.5, 0.5)
    for each in (before, after):
        each["target"]["t"] = measured(each["target"]["t"]["scores"], (0, 0))
    together = comparison(before, after)
    assert (result["target"]["t"].get("groups"), together["target"]["t"]["groups"]) == (None, 1)
    ends = [found["summary"]["gain_interval"] for found in (result, together)]
    assert ends[1][0] < ends[0][0] < ends[0][1] < ends[1][1]


def test_a_side_without_tasks_has_no_numbers():
    numbers = summary({}, {}, {"t": [0, 1]}, {"t": [1, 1]})
    assert (numbers["gain"], numbers["target_after"]) == (0.5, 1)
    for name in ("source_before", "source_after", "retention", "h_mean", "average"):
        assert math.isnan(numbers[name])
        assert np.isnan(numbers[f"{name}_interval"]).all()
