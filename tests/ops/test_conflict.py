from __future__ import annotations

import numpy as np
import pytest
import torch

from lorasculpt.ops.conflict import awareness, blocks, conflict

Factors = tuple[np.ndarray, np.ndarray, np.ndarray]


def brute_force(W: np.ndarray, B: np.ndarray, A: np.ndarray, omega: float) -> float:
    """The penalty as the paper writes it, in double precision."""
    normalised = W / np.sqrt(np.sum(W**2))
    with np.errstate(divide="ignore"):
        saliency = np.abs(1 / np.log(np.abs(normalised) + 1e-15))
    return float(np.linalg.norm(np.tanh(omega * saliency) * (B @ A)))


def differences(f, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Central differences of a scalar function at ``x``."""
    found = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = h
        found[place] = (f(x + step) - f(x - step)) / (2 * h)
    return found


def factors(m: int, n: int, r: int) -> Factors:
    generator = np.random.default_rng(0)
    return generator.normal(size=(m, n)), generator.normal(size=(m, r)), generator.normal(size=(r, n))


def closed_form(W: np.ndarray, B: np.ndarray, A: np.ndarray, omega: float = 1.0, rows: int = 1024):
    weight, B, A = (torch.tensor(x, dtype=torch.float32) for x in (W, B, A))
    norm = torch.linalg.vector_norm(weight)
    return conflict(B, A, lambda i, j: awareness(weight[i:j], norm, omega).square(), rows)


@pytest.mark.parametrize("shape", [(7, 5, 2), (4, 9, 3), (6, 6, 1)])
@pytest.mark.parametrize("omega", [0.5, 1.0, 20.0])
def test_value_and_gradient_agree_with_double_precision_and_differences(shape, omega):
    W, B, A = factors(*shape)
    W[0, 0] = 0.0
    value, grad_B, grad_A = closed_form(W, B, A, omega)
    assert float(value) == pytest.approx(brute_force(W, B, A, omega), rel=1e-5)
    by_B = differences(lambda x: brute_force(W, x, A, omega), B)
    by_A = differences(lambda x: brute_force(W, B, x, omega), A)
    np.testing.assert_allclose(grad_B.numpy(), by_B, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_A.numpy(), by_A, rtol=1e-4, atol=1e-5)


def test_it_agrees_with_autograd():
    W, B, A = (torch.tensor(x, dtype=torch.float32) for x in factors(12, 10, 3))
    B.requires_grad_()
    A.requires_grad_()
    M = awareness(W, W.norm(), 1.0)
    direct = (M * (B @ A)).norm()
    direct.backward()
    value, grad_B, grad_A = conflict(B, A, lambda i, j: M[i:j].square())
    torch.testing.assert_close(value, direct.detach())
    torch.testing.assert_close(grad_B, B.grad)
    torch.testing.assert_close(grad_A, A.grad)


@pytest.mark.parametrize("zero", ["B", "A", "both"])
def test_a_zero_update_has_a_zero_gradient_and_no_nan(zero):
    W, B, A = factors(6, 5, 2)
    B, A = (B * (zero == "A"), A * (zero == "B"))
    for result in closed_form(W, B, A):
        assert torch.equal(result, torch.zeros_like(result))


def test_the_gradient_does_not_vanish_with_the_update():
    """The norm is not squared: a thousandth of B leaves the gradient to B as it is."""
    W, B, A = factors(6, 5, 2)
    torch.testing.assert_close(closed_form(W, B, A)[1], closed_form(W, B / 1000, A)[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 7, 16, 17])
def test_the_size_of_a_block_changes_nothing(rows):
    W, B, A = factors(16, 9, 4)
    for block, whole in zip(closed_form(W, B, A, rows=rows), closed_form(W, B, A), strict=True):
        torch.testing.assert_close(block, whole, rtol=1e-5, atol=1e-6)


def test_blocks_cover_every_row_once():
    assert list(blocks(7, 3)) == [(0, 3), (3, 6), (6, 7)]
    assert list(blocks(6, 3)) == [(0, 3), (3, 6)]


def test_half_precision_factors_give_full_precision_results():
    W, B, A = factors(6, 5, 2)
    weight, B, A = torch.tensor(W).float(), torch.tensor(B).bfloat16(), torch.tensor(A).bfloat16()
    results = conflict(B, A, lambda i, j: awareness(weight[i:j], weight.norm(), 1.0).square())
    assert {result.dtype for result in results} == {torch.float32}


@pytest.mark.parametrize(
    ("magnitude", "value"),
    [(0.0, 0.029), (1 / 4096, 0.120), (10 / 4096, 0.165), (1.0, 1.0)],
    ids=["zero", "typical of 4096 x 4096", "ten times that", "the whole matrix"],
)
def test_awareness_has_the_hand_worked_values(magnitude, value):
    assert float(awareness(torch.tensor([[magnitude]]), 1.0, 1.0)) == pytest.approx(value, abs=6e-4)


def test_a_typical_entry_of_a_random_matrix():
    weight = torch.randn(512, 512)
    typical = awareness(weight, weight.norm(), 1.0).median()
    assert float(typical) == pytest.approx(np.tanh(1 / np.log(512 / 0.6745)), rel=1e-2)  # 0.6745: median of |N(0, 1)|


def test_a_weight_of_zeros_is_as_light_as_can_be():
    """A block that was put into a model untrained, as LLaMA-Pro does."""
    found = awareness(torch.zeros(2, 3), torch.zeros(()), 1.0)
    assert torch.equal(found, awareness(torch.zeros(2, 3), 7.0, 1.0))
    assert torch.equal(found, awareness(torch.zeros(2, 3), 0.0, 1.0))
    assert found.isfinite().all()


def test_awareness_grows_with_the_weight_and_with_omega():
    magnitudes = torch.logspace(-8, 0, 50)[None]
    values = awareness(magnitudes, 1.0, 1.0)
    assert bool((values.diff() > 0).all())
    assert bool((awareness(magnitudes, 1.0, 2.0) >= values).all())
    assert torch.equal(awareness(-magnitudes, 1.0, 1.0), values)


def test_an_update_costs_more_where_the_weight_is_larger():
    """Same B A and same ||W||: moving W's one large entry under the update raises the penalty, step by step."""
    B, A = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    values = []
    for here in (0.0, 0.1, 0.5, 0.9):
        W = torch.tensor([[here, 0.0], [0.0, (1 - here**2) ** 0.5]])
        values.append(float(conflict(B, A, lambda i, j, W=W: awareness(W[i:j], W.norm(), 1.0).square())[0]))
    assert values == sorted(set(values))
