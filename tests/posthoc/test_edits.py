from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasculpt.adapters.plain import Adapter, Pair
from lorasculpt.errors import UserError
from lorasculpt.posthoc import average, cosines, dare, drop, prune, scale, sign_conflicts, ties, truncate
from lorasculpt.posthoc.edits import rounded

SHAPES = {"layers.0.q_proj": (12, 20), "layers.1.q_proj": (9, 20)}


def adapter(seed: int = 0, rank: int = 4, scaling: float = 0.5) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    pairs = tuple(
        Pair(name, torch.randn(rank, inner, generator=random), torch.randn(outer, rank, generator=random), scaling)
        for name, (outer, inner) in SHAPES.items()
    )
    return Adapter(Path(f"adapter-{seed}"), {"r": rank, "lora_alpha": rank * scaling}, pairs, ())


def stored(edited: Adapter, dtype: torch.dtype) -> Adapter:
    pairs = tuple(replace(pair, A=pair.A.to(dtype), B=pair.B.to(dtype)) for pair in edited.pairs)
    return replace(edited, pairs=pairs)


def dense(edited: Adapter) -> dict[str, np.ndarray]:
    """scaling · BA of every layer, in fp64."""
    return {pair.name: pair.scaling * pair.B.double().numpy() @ pair.A.double().numpy() for pair in edited.pairs}


def close(found, expected, tolerance=1e-5):
    assert list(found) == list(expected)
    for name, value in found.items():
        np.testing.assert_allclose(np.asarray(value), expected[name], rtol=tolerance, atol=tolerance)


# --- scale and prune ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [0, 0.3, 1, 1.5])
def test_scale(by):
    close(dense(scale(adapter(), by)), {name: by * delta for name, delta in dense(adapter()).items()})


def test_scale_by_one_changes_no_bit():
    before = stored(adapter(), torch.bfloat16)
    after, lost = rounded(scale(before, 1))
    assert all(torch.equal(a.B, b.B) for a, b in zip(before.pairs, after.pairs, strict=True))
    assert lost == 0


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_prune(density):
    for before, after in zip(adapter().pairs, prune(adapter(), density).pairs, strict=True):
        for factor, found in ((before.A, after.A), (before.B, after.B)):
            flat = factor.numpy().ravel()
            expected = np.zeros_like(flat)
            largest = np.argsort(-np.abs(flat))[: int(density * flat.size)]
            expected[largest] = flat[largest]
            np.testing.assert_array_equal(found.numpy().ravel(), expected)


def test_a_sparser_factor_is_not_pruned_again():
    once = prune(adapter(), 0.2)
    twice = prune(once, 0.4)
    assert all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in zip(once.pairs, twice.pairs, strict=True))


# --- average --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [0.7, -0.2, 1.0]])
def test_average_is_exact_though_ranks_and_scalings_differ(weights):
    several = [adapter(1), adapter(2, rank=3, scaling=2.0), adapter(3, rank=1)]
    merged = average(several, weights)
    used = weights or [1 / 3] * 3
    expected = {name: sum(w * dense(one)[name] for w, one in zip(used, several, strict=True)) for name in SHAPES}
    close(dense(merged), expected)
    assert {pair.A.shape[0] for pair in merged.pairs} == {8}
    assert (merged.config["r"], merged.config["lora_alpha"]) == (8, 8)


def test_ranks_that_differ_between_layers_are_filled_up():
    uneven = adapter()
    last = uneven.pairs[1]
    uneven = replace(uneven, pairs=(uneven.pairs[0], replace(last, A=last.A[:1], B=last.B[:, :1])))
    merged = average([uneven, uneven])
    assert {pair.A.shape[0] for pair in merged.pairs} == {8}
    close(dense(merged), dense(uneven))


@pytest.mark.parametrize(
    "edit", [lambda a, b: scale(a, 0.7), lambda a, b: average([a, b]), lambda a, b: average([a, b], [0.7, 0.3])]
)
def test_what_rounding_takes_is_measured(edit):
    edited = edit(stored(adapter(1), torch.bfloat16), stored(adapter(2, scaling=3.0), torch.bfloat16))
    found, lost = rounded(edited)
    assert {factor.dtype for pair in found.pairs for factor in (pair.A, pair.B)} == {torch.bfloat16}
    exact = dense(edited)
    off = sum(((delta - exact[name]) ** 2).sum() for name, delta in dense(stored(found, torch.float64)).items())
    assert lost == pytest.approx(np.sqrt(off / sum((delta**2).sum() for delta in exact.values())), rel=1e-4)
    assert lost > 1e-4


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_an_average_has_the_precision_that_holds_all(other):
    several = [stored(adapter(1), torch.bfloat16), stored(adapter(2), other)]
    found, lost = rounded(average(several))
    assert found.pairs[0].B.dtype == torch.float32
    assert lost == 0
    close(dense(found), {name: (dense(several[0])[name] + dense(several[1])[name]) / 2 for name in SHAPES})


# --- DARE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0, 0.25, 0.9])
@pytest.mark.parametrize("rescale", [True, False])
def test_drop_by_magnitude(p, rescale):
    delta = torch.randn(30, 20, generator=torch.Generator().manual_seed(4))
    flat = delta.numpy().ravel()
    expected = flat.copy()
    expected[np.argsort(np.abs(flat))[: int(p * flat.size)]] = 0
    expected /= 1 - p if rescale else 1
    np.testing.assert_allclose(drop(delta, p, by="magnitude", rescale=rescale).numpy().ravel(), expected, rtol=1e-6)


def test_drop_by_magnitude_counts_exactly_among_equals():
    assert int((drop(torch.ones(10, 10), 0.3, by="magnitude") != 0).sum()) == 70


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_drop_at_random_has_the_right_share_and_mean(p):
    found = drop(torch.ones(400, 500), p, generator=torch.Generator().manual_seed(5)).numpy()
    share = (found == 0).mean()
    assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / found.size)
    assert abs(found.mean() - 1) < 5 * np.sqrt(p / (1 - p) / found.size)
    np.testing.assert_allclose(found[found != 0], 1 / (1 - p), rtol=1e-6)


def test_dare_drops_from_the_product_by_seed_and_layer():
    full, found, again, other = dense(adapter()), *(dict(dare(adapter(), 0.5, seed=seed)) for seed in (1, 1, 2))
    for name, delta in found.items():
        kept = delta.numpy() != 0
        np.testing.assert_allclose(delta.numpy()[kept], 2 * full[name][kept], rtol=1e-4)
        assert torch.equal(delta, again[name])
        assert not torch.equal(delta, other[name])
    first, second = ((delta != 0)[:9] for delta in found.values())
    assert not torch.equal(first, second)  # one mask for all layers would be a fault


def test_dare_does_not_depend_on_the_order_of_layers_nor_on_torchs_own_seed():
    turned = replace(adapter(), pairs=adapter().pairs[::-1])
    expected = dict(dare(adapter(), 0.5))
    torch.manual_seed(99)
    assert all(torch.equal(delta, expected[name]) for name, delta in dare(turned, 0.5).items())


@pytest.mark.parametrize(
    "edit", [lambda x: dare(x, 0.5), lambda x: dare(x, 0.5, by="magnitude"), lambda x: ties([x, x])]
)
def test_the_precision_of_the_file_changes_nothing(edit):
    half = stored(adapter(), torch.bfloat16)
    expected = dict(edit(stored(half, torch.float32)))
    assert all(torch.equal(delta, expected[name]) for name, delta in edit(half).items())


def test_an_update_is_a_mapping():
    update = dare(adapter(), 0)
    assert list(update) == list(SHAPES)
    assert len(update) == 2
    assert "layers.7.q_proj" not in update
    close(dict(update), dense(adapter()))


# --- TIES -----------------------------------------------------------------------------------------------------------


def numpy_ties(deltas, density, weights):
    """Entry by entry, from the paper's algorithm."""
    trimmed = []
    for delta in deltas:
        limit = np.sort(np.abs(delta).ravel())[::-1][int(density * delta.size) - 1]
        trimmed.append(np.where(np.abs(delta) >= limit, delta, 0))
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        sign = 1 if sum(x[place] for x in trimmed) >= 0 else -1
        agreeing = [w * x[place] for w, x in zip(weights, trimmed, strict=True) if np.sign(x[place]) == sign]
        merged[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return merged


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_ties(density, weights):
    several = [adapter(1), adapter(2, rank=3), adapter(3, scaling=1.5)]
    expected = {
        name: numpy_ties([dense(one)[name] for one in several], density, weights or [1, 1, 1]) for name in SHAPES
    }
    close(dict(ties(several, density, weights)), expected)


def test_ties_of_opposites_keeps_one_sign_where_the_average_is_nothing():
    a = adapter()
    b = replace(a, pairs=tuple(replace(pair, B=-pair.B) for pair in a.pairs))
    close(dense(average([a, b])), {name: np.zeros(shape) for name, shape in SHAPES.items()})
    for name, delta in ties([a, b], 1.0).items():
        np.testing.assert_allclose(delta.numpy(), np.abs(dense(a)[name]), rtol=1e-5, atol=1e-6)


# --- truncation and interference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 11])
def test_truncate_is_the_nearest_and_tells_its_loss(rank):
    update = dare(adapter(), 0.5)
    found, loss = truncate(update, rank)
    lost = total = 0.0
    for name, delta in update.items():
        U, S, V = np.linalg.svd(delta.numpy().astype(float), full_matrices=False)
        nearest = (U[:, :rank] * S[:rank]) @ V[:rank]
        np.testing.assert_allclose(dense(found)[name], nearest, atol=1e-5)
        lost, total = lost + (S[rank:] ** 2).sum(), total + (S**2).sum()
    assert loss == pytest.approx(np.sqrt(lost / total), abs=1e-5)
    assert {pair.A.shape[0] for pair in found.pairs} == {rank}


def test_truncating_what_has_that_rank_loses_nothing_and_half_precision_is_counted():
    assert truncate(dare(adapter(), 0), 4)[1] < 1e-5
    found, loss = truncate(dare(stored(adapter(), torch.bfloat16), 0), 4)
    assert found.pairs[0].A.dtype == torch.bfloat16
    assert 1e-4 < loss < 1e-2


def test_an_update_of_nothing_loses_nothing():
    assert truncate(dare(scale(adapter(), 0), 0.5), 2)[1] == 0


def test_cosines():
    several = [adapter(1), adapter(2, rank=3), scale(adapter(1), 0.1), scale(adapter(1), 0)]
    flat = [np.concatenate([delta.ravel() for delta in dense(one).values()]) for one in several]
    for i, row in enumerate(cosines(several)):
        for j, value in enumerate(row):
            size = np.linalg.norm(flat[i]) * np.linalg.norm(flat[j])
            assert value == pytest.approx(flat[i] @ flat[j] / size if size else 0, abs=1e-6)


def test_sign_conflicts_are_counted_where_both_change_an_entry():
    against = scale(prune(adapter(1), 0.5), 2)
    against = replace(against, pairs=tuple(replace(pair, B=-pair.B) for pair in against.pairs))
    several = [adapter(1), prune(adapter(2, rank=3), 0.2), prune(adapter(1), 0.5), against, scale(adapter(1), 0)]
    flat = [np.concatenate([delta.ravel() for delta in dense(one).values()]) for one in several]
    found = np.array(sign_conflicts(several))
    for i, row in enumerate(found):
        for j, value in enumerate(row):
            both = [(a, b) for a, b in zip(flat[i], flat[j], strict=True) if a != 0 and b != 0]
            assert value == pytest.approx(sum(a * b < 0 for a, b in both) / len(both) if both else 0)
    assert (flat[1] == 0).any()
    assert (found == found.T).all()
    assert found[2, 3] == 1


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: scale(adapter(), -0.1), "cannot be scaled by -0.1"),
        (lambda: scale(adapter(), float("nan")), "cannot be scaled by nan"),
        (lambda: prune(adapter(), 0), "above 0 and up to 1, not 0"),
        (lambda: prune(adapter(), 1.1), "not 1.1"),
        (lambda: prune(adapter(), 0.001), r"layers\.0\.q_proj: a density of 0.001 keeps no entry"),
        (lambda: dare(adapter(), 1), "at least 0 and below 1, not 1"),
        (lambda: dare(adapter(), -0.5), "not -0.5"),
        (lambda: dare(adapter(), 0.5, by="luck"), "not by 'luck'"),
        (lambda: truncate(dare(adapter(), 0.5), 0), "at least rank 1"),
        (lambda: average([adapter()]), "two adapters or more"),
        (lambda: average([adapter(1), adapter(2)], [1.0]), "2 adapters take 2 finite weights"),
        (lambda: ties([adapter(1), adapter(2)], weights=[1.0, float("inf")]), "2 finite weights"),
        (lambda: ties([adapter(1), adapter(2)], 0), "not 0"),
        (
            lambda: rounded(scale(stored(adapter(), torch.float16), 1e6)),
            "stored in torch.float16, which has no numbers",
        ),
        (
            lambda: ties([adapter(1), replace(adapter(2), pairs=adapter(2).pairs[:1])]),
            r"adapter-1 and adapter-2 differ at layers\.1\.q_proj",
        ),
    ],
)
def test_mistakes_are_told_at_once(edit, message):
    with pytest.raises(UserError, match=message):
        edit()
