from __future__ import annotations

import math

import pytest
import torch

from lorasculpt.ops.density import (
    density,
    expected_density,
    product_density,
    redundancy_curve,
    solve_density,
)


def bernoulli(generator: torch.Generator, rows: int, columns: int, share: float) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=generator)
    return values * (torch.rand(rows, columns, generator=generator) < share)


def exact(generator: torch.Generator, rows: int, columns: int, share: float) -> torch.Tensor:
    """Exactly int(share * n) entries kept, as a magnitude mask does it."""
    values = torch.randn(rows * columns, generator=generator)
    keep = torch.randperm(values.numel(), generator=generator)[: int(share * values.numel())]
    return torch.zeros_like(values).index_copy(0, keep, values[keep]).view(rows, columns)


@pytest.mark.parametrize(
    ("r", "share", "value"),
    [(16, 0.05, 0.039), (16, 0.10, 0.149), (32, 0.04, 0.050), (32, 0.05, 0.077), (32, 0.10, 0.275), (64, 0.10, 0.474)],
)
def test_expected_density_has_the_hand_worked_values(r, share, value):
    assert round(expected_density(share, share, r), 3) == value


def test_expected_density_at_its_ends():
    assert expected_density(0, 1, 8) == 0
    assert expected_density(1, 1, 8) == 1
    assert expected_density(0.3, 0.5, 1) == pytest.approx(0.15)
    assert expected_density(1e-9, 1e-9, 32) == pytest.approx(32e-18, rel=1e-9)  # small density: r s_A s_B


# (p, q, r, s_A, s_B), and the standard deviation of one trial with Bernoulli and with exact-k masks
MONTE_CARLO = [
    (256, 256, 8, 0.10, 0.10, 0.0066, 0.0009),
    (256, 256, 32, 0.10, 0.10, 0.0112, 0.0020),
    (256, 512, 16, 0.05, 0.10, 0.0048, 0.0007),
]
TRIALS = 30


@pytest.mark.parametrize("case", MONTE_CARLO, ids=str)
@pytest.mark.parametrize("mask", [bernoulli, exact])
def test_random_masks_agree_with_the_theorem(case, mask):
    p, q, r, s_a, s_b, sd_bernoulli, sd_exact = case
    generator = torch.Generator().manual_seed(0)
    expected = expected_density(s_a, s_b, r)
    measured = [product_density(mask(generator, p, r, s_b), mask(generator, r, q, s_a)) for _ in range(TRIALS)]
    # four standard errors; exact-k masks lie about 0.0006 below, for kept entries repel each other
    sd, shift = (sd_bernoulli, 0.0) if mask is bernoulli else (sd_exact, 0.0006)
    assert abs(sum(measured) / TRIALS - expected) < 4 * sd / math.sqrt(TRIALS) + shift


@pytest.mark.parametrize("r", [1, 4, 32, 256])
@pytest.mark.parametrize("target", [0.0, 1e-12, 0.05, 0.275, 0.9, 1.0])
def test_solve_density_inverts_the_theorem(target, r):
    s = solve_density(target, r)
    assert expected_density(s, s, r) == pytest.approx(target, rel=1e-9)


def test_density_counts_non_zeros():
    assert density(torch.tensor([[0.0, 1.0], [-2.0, 0.0]])) == 0.5
    assert density(torch.zeros(3)) == 0


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product_density_does_not_depend_on_the_block(block, dtype):
    generator = torch.Generator().manual_seed(1)
    B, A = exact(generator, 19, 4, 0.2).to(dtype), exact(generator, 4, 13, 0.3).to(dtype)
    assert product_density(B, A, block) == density(B.double() @ A.double())


def test_product_density_does_not_lose_small_products_of_half_precision():
    small = torch.full((2, 2), 2.0**-14, dtype=torch.float16)
    assert density(small @ small) == 0
    assert product_density(small, small) == 1


def test_redundancy_curve_by_hand():
    # squares 16, 9, 0, 0: the largest of four holds sqrt(16 / 25) of the norm
    curve = redundancy_curve(torch.tensor([[0.0, -4.0], [3.0, 0.0]]), [0, 0.24, 0.25, 0.5, 1])
    assert curve == pytest.approx([0, 0, 0.8, 1, 1])
    assert redundancy_curve(torch.full((4,), 1e-30), [0.25, 1]) == pytest.approx([0.5, 1])
    assert redundancy_curve(torch.zeros(4), [0, 1]) == [1, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: expected_density(-0.1, 0.5, 4),
        lambda: expected_density(0.1, 1.5, 4),
        lambda: expected_density(0.1, float("nan"), 4),
        lambda: expected_density(0.1, 0.5, 0),
        lambda: solve_density(1.1, 4),
        lambda: solve_density(0.5, 0),
        lambda: density(torch.zeros(0)),
        lambda: product_density(torch.zeros(3, 2), torch.zeros(3, 2)),
        lambda: product_density(torch.zeros(0, 2), torch.zeros(2, 3)),
        lambda: redundancy_curve(torch.zeros(0), [0.5]),
        lambda: redundancy_curve(torch.ones(2), [1.5]),
    ],
)
def test_values_out_of_range_raise(call):
    with pytest.raises(ValueError, match=r"must be|expected|empty"):
        call()
