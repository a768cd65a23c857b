"""MALoRA against its equations, written once more in numpy with loops; its start, its budget, its noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import close, start, texts, train, weights
from differences import check_gradients, detach_gate
from equations import all_chosen, all_real, drawn, normal, run, swapped, tensors, unscaled
from torch import nn
from torch.nn import functional as F

from lorasculpt import MALoRAConfig
from lorasculpt.adapters import update as shared
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.update import Place
from lorasculpt.methods import malora
from lorasculpt.methods.malora import MALoRAUpdate

ROWS, LENGTH, IN, OUT = 3, 4, 5, 4
REAL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
WEIGHT = 0.7  # what a micro-batch counts
SEED = 9  # of the noise


def fresh(kind: type[MALoRAUpdate] = MALoRAUpdate, features=(IN, OUT), **settings) -> MALoRAUpdate:
    """An update as it starts, with a random stack that is always the same."""
    given = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "num_experts": 4, "shared_rank": 3, "balance_weight": 0.5}
    torch.manual_seed(1)
    return kind(MALoRAConfig(**given | settings), Place("here", *features), Context(), nn.Linear(*features))


def make(kind: type[MALoRAUpdate] = MALoRAUpdate, *, padded=True, **settings) -> MALoRAUpdate:
    """An update in float64 whose every tensor is random."""
    update = fresh(kind, **settings).double()
    update.context.weight.fill_(WEIGHT)
    update.context.padding = REAL if padded else None
    return drawn(update)


def batch() -> torch.Tensor:
    return normal(ROWS, LENGTH, IN)


def noise(update) -> np.ndarray:
    """The noise as the generator draws it."""
    torch.manual_seed(SEED)
    return torch.randn(ROWS, LENGTH, len(update.B), dtype=torch.float64).numpy()


# --- the reference --------------------------------------------------------------------------------------------------


def reference(t, x, config, padded, drawn=None):
    """(h - W0 x, the loss)."""
    n = config.num_experts
    h, counts, sums, tokens = np.zeros((ROWS, LENGTH, OUT)), np.zeros(n), np.zeros(n), 0
    for row in range(ROWS):
        for i in range(LENGTH):
            score = [t["router"][j] @ x[row, i] for j in range(n)]
            if config.noisy_gate and drawn is not None:
                score = [score[j] + drawn[row, i, j] * np.log1p(np.exp(t["noise"][j] @ x[row, i])) for j in range(n)]
            p = np.exp(score) / sum(np.exp(score))
            best = sorted(range(n), key=lambda j: -p[j])[: config.top_k]
            for j in best:
                g = p[j] / sum(p[k] for k in best)
                h[row, i] += config.lora_alpha / config.r * g * (t["B"][j] @ (t["P"][j] @ (t["S"] @ x[row, i])))
            if REAL[row, i] or not padded:
                counts[best] += 1
                sums += p
                tokens += 1
    balance = sum(counts[j] / counts.sum() * sums[j] / tokens for j in range(n))
    return h, config.balance_weight * n * balance


def compare(update: MALoRAUpdate, padded=True, **settings) -> None:
    """Fails unless ``update`` gives what the equations give under the config of ``make(**settings)``."""
    right = make(**settings)
    expected, loss = reference(tensors(right), batch().numpy(), right.config, padded, noise(right))
    output, found = run(update, batch(), SEED)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found, loss, rtol=1e-5)


CASES = [
    {},
    {"noisy_gate": True},
    {"top_k": 4, "shared_rank": 1},
    {"top_k": 1, "r": 3, "shared_rank": 5, "budget": True},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_output_and_loss_are_the_equations(settings, padded):
    compare(make(padded=padded, **settings), padded, **settings)


def differentiate(update: MALoRAUpdate, padded=True) -> None:
    """Fails unless the gradients of ``update`` are the slopes of the equations."""
    x = batch().requires_grad_()
    c = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    drawn = noise(update)
    torch.manual_seed(SEED)
    (update(x) * c).sum().backward()
    values = tensors(update) | {"x": x.detach().numpy().copy()}

    def total() -> float:
        h, loss = reference(values, values["x"], update.config, padded, drawn)
        return (h * c.numpy()).sum() + WEIGHT * loss

    check_gradients([*update.named_parameters(), ("x", x)], values, total)


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_the_finite_differences(settings, padded):
    differentiate(make(padded=padded, **settings), padded)


# --- faults that the reference must see -----------------------------------------------------------------------------


class OtherExperts(MALoRAUpdate):
    def balance_loss(self, gate, probability, weight):
        return super().balance_loss(gate.flip(-1), probability, weight)


class OfGates(MALoRAUpdate):
    def balance_loss(self, gate, probability, weight):
        return super().balance_loss(gate, gate, weight)


class WithoutN(MALoRAUpdate):
    def balance_loss(self, gate, probability, weight):
        return super().balance_loss(gate, probability, weight) / gate.shape[-1]


class WithoutNoise(MALoRAUpdate):
    def scores(self, x):
        return malora.scores(x, self.router)


class PlainNoise(MALoRAUpdate):
    def scores(self, x):
        score = malora.scores(x, self.router)
        return score + torch.randn_like(score) * malora.scores(x, self.noise)


class OneNoise(MALoRAUpdate):
    def scores(self, x):
        score = malora.scores(x, self.router)
        return score + torch.randn_like(score)


def of_other_experts(update):
    update.P.data = update.P.data.flip(0)


def unshared(update):
    update.S.data = update.S.data.flip(0)


@pytest.mark.parametrize("fault", [OtherExperts, OfGates, WithoutN, WithoutNoise, PlainNoise, OneNoise])
def test_a_faulty_class_does_not_pass(fault):
    with pytest.raises(AssertionError):
        compare(make(fault, noisy_gate=True), noisy_gate=True)


@pytest.mark.parametrize("fault", [of_other_experts, swapped, unscaled, all_real, all_chosen, unshared])
def test_a_spoilt_update_does_not_pass(fault):
    fault(update := make())
    with pytest.raises(AssertionError):
        compare(update)


@pytest.mark.parametrize(
    "fault",
    [lambda gate, share: gate.flip(-1), lambda gate, share: share * (gate > 0), lambda gate, share: (gate > 0) / 2],
    ids=["flipped", "not renormalised", "equal"],
)
def test_faulty_gates_do_not_pass(monkeypatch, fault):
    right = malora.top_k_softmax
    monkeypatch.setattr(malora, "top_k_softmax", lambda *args: (fault(*right(*args)).double(), right(*args)[1]))
    with pytest.raises(AssertionError):
        compare(make(balance_weight=0.0), balance_weight=0.0)


def test_a_router_that_learns_nothing_of_the_output_is_seen_by_its_gradient_alone(monkeypatch):
    detach_gate(monkeypatch, malora)
    compare(make())
    with pytest.raises(AssertionError, match=r"^router$"):
        differentiate(make())


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [*CASES, {"p_init": "kaiming"}], ids=str)
def test_at_the_start_it_adds_nothing(settings):
    assert not fresh(**settings)(batch().float()).any()


def test_p_times_s_is_the_best_there_is_of_the_plain_experts(monkeypatch):
    """No d directions are nearer to the down-projections of all experts: what is left are the other singular values."""
    stack = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **how: stack.append(x.clone()) or svd(x, **how))
    for d in (1, 3, 8):
        update = fresh(features=(12, OUT), shared_rank=d)
        bound = 12**-0.5
        assert stack[-1].shape == (8, 12)
        assert 0.8 * bound < stack[-1].abs().max() < bound
        found = (update.P @ update.S).detach().flatten(0, 1).numpy()
        sigma = np.linalg.svd(stack[-1].numpy(), compute_uv=False)
        left = np.linalg.norm(stack[-1].numpy() - found)
        assert left == pytest.approx(np.sqrt((sigma[d:] ** 2).sum()), abs=1e-5)
        np.testing.assert_allclose(np.linalg.norm(update.S.detach().numpy(), axis=1), sigma[:d], rtol=1e-5)


def test_a_random_p_leaves_s_as_it_is():
    svd, kaiming = fresh(), fresh(p_init="kaiming")
    assert torch.equal(svd.S, kaiming.S)
    assert not torch.equal(svd.P, kaiming.P)
    assert 0.8 * 3**-0.5 < kaiming.P.abs().max() < 3**-0.5


def test_x_goes_through_the_shared_subspace_once(monkeypatch):
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: seen.append(tuple(weight.shape)) or linear(x, weight))
    update = make()
    update(batch())
    assert [shape for shape in seen if shape[1] == IN] == [(4, IN), (3, IN)]  # the router, and S
    assert sum(p.numel() for p in update.parameters()) == 3 * IN + 4 * 2 * (3 + OUT) + 4 * IN


# --- the budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [(64, 64), (64, 16), (32, 64)], ids=str)
@pytest.mark.parametrize("r", [2, 4])
def test_a_budget_is_what_plain_experts_would_cost(features, r):
    inputs, outputs = features
    update = fresh(features=features, r=r, shared_rank=6, budget=True)
    rank, plain = update.B.shape[-1], 4 * r * (inputs + outputs)

    def cost(rank):
        return 6 * inputs + 4 * rank * (6 + outputs)

    assert sum(x.numel() for x in (update.S, update.P, update.B)) == cost(rank) <= plain
    assert rank == 6 or cost(rank + 1) > plain
    assert update.scaling == 3 / r


def test_sharing_pays_for_a_higher_rank():
    config = MALoRAConfig(r=8, shared_rank=32, budget=True)
    assert config.expert_rank(8, Place("here", 4096, 4096)) == 11
    assert config.expert_rank(32, Place("here", 4096, 4096)) == 32
    assert MALoRAConfig(r=8, shared_rank=32).expert_rank(8, Place("here", 4096, 4096)) == 8


def test_what_does_not_fit_a_linear_is_said():
    with pytest.raises(ValueError, match="4 plain experts of rank 1 at here have fewer parameters than shared_rank=16"):
        fresh(features=(64, 4), r=1, shared_rank=16, budget=True)
    with pytest.raises(ValueError, match="at most 5 at here, which has 5 inputs and 4 experts of rank 2; got 6"):
        fresh(shared_rank=6)
    with pytest.raises(ValueError, match="at most 8 at here"):
        fresh(features=(64, 4), shared_rank=9)


# --- the noise ------------------------------------------------------------------------------------------------------


def test_an_answer_has_no_noise_changes_nothing_and_waits_for_no_process(monkeypatch):
    update = make(noisy_gate=True).eval()
    before = tensors(update)
    monkeypatch.setattr(shared, "across", None)
    expected, _ = reference(before, batch().numpy(), update.config, True)
    np.testing.assert_allclose(update(batch()).detach().numpy(), expected, rtol=1e-5, atol=1e-8)
    assert not update.noted
    assert all(np.array_equal(before[key], value) for key, value in tensors(update).items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_has_the_same_noise(reentrant):
    def trained(seed, checkpointing):
        model, _ = start("llama", "malora", noisy_gate=True)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(seed)
        train(model, [texts(number=2)] * 2)
        return weights(model)

    expected = trained(1, False)
    close(trained(1, True), expected)
    with pytest.raises(AssertionError):
        close(trained(2, False), expected)


# --- special cases --------------------------------------------------------------------------------------------------


def test_one_expert_is_plain_lora():
    update = make(num_experts=1, top_k=1, shared_rank=2)
    update.P.data = torch.eye(2, dtype=torch.float64)[None]
    torch.testing.assert_close(update(batch()), update.scaling * batch() @ update.S.mT @ update.B[0].mT)


def test_tokens_that_are_not_in_rows_are_weighed_alike():
    update = make(padded=False).eval()
    torch.testing.assert_close(update(batch().flatten(0, 1)), update(batch()).flatten(0, 1))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"top_k": 0}, "top_k lies from 1 to num_experts, 8"),
        ({"top_k": 9}, "top_k"),
        ({"shared_rank": 0}, "shared_rank"),
        ({"p_init": "zeros"}, "p_init"),
        ({"balance_weight": -0.1}, "balance_weight"),
        ({"balance_weight": float("nan")}, "balance_weight"),
    ],
    ids=str,
)
def test_config_says_what_is_wrong(wrong, says):
    with pytest.raises(ValueError, match=says):
        MALoRAConfig(**wrong)
