"""The strength that learns the most within a budget, and what is said of it."""

from __future__ import annotations

import math

import pytest

from lorasculpt.evaluation.budget import closer, flattered, in_words, kept, within


def points(targets, **sides):
    strengths = (0, 0.25, 0.5, 1)
    return [
        {"strength": s, "target": t} | {side: values[i] for side, values in sides.items()}
        for i, (s, t) in enumerate(zip(strengths, targets, strict=True))
    ]


def test_by_source_against_the_base():
    found = points((0.1, 0.5, 0.7, 0.9), source=(0.8, 0.8, 0.76, 0.4), drift=(0, 9, 9, 9))
    by, shares = kept(found)
    assert by == "source"
    assert shares == pytest.approx([1, 1, 0.95, 0.5])
    budget = within(found, 0.95)
    assert (budget["strength"], budget["target"], budget["by"]) == (0.5, 0.7, "source")
    assert within(found, 0.97)["strength"] == 0.25
    assert within(found, 0.4)["strength"] == 1
    assert in_words(budget) == (
        "Strength 0.5 learns the most (target 70.0 %) of those that keep at least 95 % of the source: it keeps 95.0 %."
    )


def test_by_drift_where_no_source_is_known():
    found = points((0.1, 0.5, 0.7, 0.9), drift=(0, 0.01, 0.02, 0.1))
    by, shares = kept(found)
    assert by == "drift"
    assert shares == pytest.approx([math.exp(-d) for d in (0, 0.01, 0.02, 0.1)])
    budget = within(found, 0.97)
    assert (budget["strength"], budget["by"]) == (0.5, "drift")
    assert "the base's probability of its own texts" in in_words(budget)


def test_the_base_itself_is_no_answer():
    found = points((0.9, 0.5, 0.7, 0.9), source=(0.8, 0.1, 0.1, 0.1))
    budget = within(found, 0.97)
    assert (budget["strength"], budget["kept"], budget["target"]) == (None, None, None)
    assert in_words(budget) == "No strength of this adapter keeps 97 % of the source."
    assert within(points((0, 1, 1, 1), source=(0, 0, 0, 0)), 0.5)["strength"] is None  # there was nothing to keep


def test_of_equal_targets_the_smaller_strength():
    assert within(points((0, 0.7, 0.7, 0.7), source=(1, 1, 1, 1)), 0.97)["strength"] == 0.25


def test_closer_to_what_may_be_lost():
    def at(strength):  # all is kept up to .45, and then lost at once
        return {"strength": strength, "target": strength, "source": 0.8 * (strength <= 0.45)}

    found = [at(strength) for strength in (1, 0, 0.5)]
    for expected in (0.25, 0.375, 0.4375, 0.46875):
        assert closer(found, 0.97) == expected
        found.append(at(expected))
    assert within(found, 0.97)["strength"] == 0.4375
    while (between := closer(found, 0.97)) is not None:
        found.append(at(between))
    assert 0.44 < within(found, 0.97)["strength"] <= 0.45  # less than a point of the target is left to be won
    assert closer([at(0), at(0.25)], 0.97) is None  # the whole of what there is keeps enough
    assert closer(points((0.1, 0.5, 0.7, 0.7), source=(0.8, 0.8, 0.8, 0)), 0.97) is None  # and nothing is to be won
    assert closer(points((0, 1, 1, 1), source=(0, 0, 0, 0)), 0.97) is None  # or to be kept
    assert closer(points((0.0, 0.5, 0.7, 0.9), drift=(0, 9, 9, 9)), 0.97) == 0.125


def test_over_densities():
    found = [{"strength": 0, "density": 1, "target": 0.1, "source": 0.8}] + [
        {"strength": strength, "density": density, "target": target, "source": source}
        for strength, density, target, source in (
            (0.5, 1, 0.6, 0.80),
            (1, 1, 0.9, 0.40),
            (0.5, 0.5, 0.7, 0.78),
            (1, 0.5, 0.8, 0.60),
            (0.5, 0.2, 0.7, 0.80),
            (1, 0.1, 0.7, 0.80),
        )
    ]
    budget = within(found, 0.97)
    assert budget == {"retain": 0.97, "by": "source", "strength": 0.5, "density": 0.2, "kept": 1, "target": 0.7}
    assert within(found[::-1], 0.97) == budget
    assert in_words(budget).startswith("Strength 0.5 at density 0.2 learns the most (target 70.0 %) of those that keep")
    assert within(found, 0.7)["density"] == 0.5
    assert "density" not in in_words(within(found, 0.4))  # of all the largest target: strength 1 as it is
    none = within(found[:3], 1.1)
    assert (none["strength"], none["density"]) == (None, None)
    assert in_words(none).startswith("No strength of this adapter keeps")
    ignorant = within([{"strength": s, "target": s, "source": 0.0} for s in (0.0, 1.0)], 0.5)
    assert ignorant["nothing"]
    assert ignorant["strength"] is None
    assert in_words(ignorant).startswith("The base answers no question of the source right")


def test_on_what_it_was_chosen_and_that_there_was_no_choice():
    budget = within(points((0.1, 0.5, 0.7, 0.9), source=(0.8, 0.8, 0.76, 0.4)), 0.95)
    assert "(target 70.0 % on evaluate.validation) of" in in_words(budget | {"on": "validation"})
    assert in_words(budget | {"fixed": "DoRA is so"}).endswith("95.0 %. It has no other strength than 1: DoRA is so.")
    none = within(points((0.1, 0.5, 0.7, 0.9), drift=(0, 9, 9, 9)), 0.95) | {"on": "validation", "fixed": "so"}
    assert in_words(none) == (
        "No strength of this adapter keeps 95 % of the base's probability of its own texts on evaluate.validation. "
        "It has no other strength than 1: so."
    )
    assert "chosen on the questions it is scored on" in flattered(budget)
    for other in (none, budget | {"on": "validation"}, budget | {"fixed": "DoRA is so"}, budget | {"strength": None}):
        assert flattered(other) == ""
