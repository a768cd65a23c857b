"""Student's t against its density, summed numerically, and against printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorasculpt.evaluation.student import mean_interval, p_value, paired, quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("t", [0.0, 0.4, -1.3, 6.0])
def test_the_p_value_is_what_the_density_leaves_outside(t, freedom):
    x = np.linspace(-abs(t), abs(t), 20001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(math.pi * freedom)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert p_value(t, freedom) == pytest.approx(1 - np.trapezoid(density, x), abs=1e-7)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_the_quantiles_are_those_of_the_tables(freedom, expected):
    assert quantile(freedom) == pytest.approx(expected, abs=1e-4)


def test_a_mean_over_seeds():
    assert mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
    assert mean_interval([0.5, None]) == mean_interval([]) == {"mean": None, "low": None, "high": None}
    found = mean_interval([1.0, 2.0])
    assert found["mean"] == 1.5
    assert found["high"] - 1.5 == pytest.approx(12.7062 * math.sqrt(0.5 / 2), abs=1e-4)


def test_pairs():
    found = paired([0.3, 0.5, 0.4], [0.1, 0.2, 0.3])
    assert found["difference"] == pytest.approx(0.2)
    assert found["t"] == pytest.approx(0.2 / (0.1 / math.sqrt(3)))
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)
    assert (found["low"] > 0) == (found["p"] < 0.05)
    same = {"difference": 0.25, "low": 0.25, "high": 0.25}
    assert paired([0.5, 0.5], [0.25, 0.25]) == same | {"t": None, "p": None, "n": 2}
    assert paired([31 / 50, 36 / 50], [29 / 50, 34 / 50])["p"] is None  # both of two questions of fifty
    assert paired([0.5], [0.4]) is None
    assert paired([0.5, None], [0.4, 0.3]) is None
