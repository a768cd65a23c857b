from __future__ import annotations

import math

import pytest

from lorasculpt.evaluation.run import KNOWN, next_strength


def points(*known: tuple[float, float, float], kept: str = "source") -> list[dict]:
    """Points of (strength, kept, target), not in order."""
    return [{"strength": s, kept: value, "target": target} for s, value, target in reversed(known)]


def test_the_next_strength_is_in_the_largest_rectangle():
    curve = [(0, 0.8, 0.0), (0.25, 0.8, 0.4), (0.5, 0.5, 0.7), (1, 0.1, 0.75)]
    assert next_strength(points(*curve)) == 0.375  # 0.3 by 0.3; the next is 0.4 by 0.05
    halved = [*curve, (0.375, 0.75, 0.6)]
    assert next_strength(points(*halved)) == 0.4375  # 0.25 by 0.1


@pytest.mark.parametrize("kept", ["source", "drift"])
def test_a_curve_that_has_little_to_move_in_is_known(kept):
    """Where nothing is lost, or nothing learned, however far apart the points are."""
    still, moved = (1.0, 0.1) if kept == "source" else (0.0, -math.log(0.1))
    assert next_strength(points((0, still, 0.0), (1, still, 1.0), kept=kept)) is None
    assert next_strength(points((0, still, 0.5), (1, moved, 0.5), kept=kept)) is None
    side = math.sqrt(KNOWN)
    assert next_strength(points((0, 1.0, 0.0), (1, 1.0 - 0.99 * side, side))) is None
    assert next_strength(points((0, 1.0, 0.0), (1, 1.0 - 1.01 * side, side))) == 0.5
    assert next_strength(points((0, still, 0.0), (1, moved, 1.0), kept=kept)) == 0.5
