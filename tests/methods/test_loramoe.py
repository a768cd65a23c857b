"""LoRAMoE against its equations, written once more in numpy with loops; its constraint over several processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import start, texts
from differences import check_gradients, detach_gate
from equations import all_real, drawn, normal, swapped, tensors, two_processes, unpaired, unscaled
from torch import nn

from lorasculpt import LoRAMoEConfig, UserError
from lorasculpt.adapters import update as shared
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.update import Place
from lorasculpt.methods import loramoe
from lorasculpt.methods.loramoe import LoRAMoEUpdate

ROWS, LENGTH, IN, OUT = 4, 3, 5, 4
NAMES = ["a", "b", "c"]
IDS = [2, 0, 1, 0]
REAL = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
WEIGHT = 0.7  # what a micro-batch counts
KINDS = {"tasks": NAMES, "knowledge": ["b", "c"]}


def make(kind: type[LoRAMoEUpdate] = LoRAMoEUpdate, *, padded=True, **settings) -> LoRAMoEUpdate:
    """An update in float64 whose every tensor is random, in a batch of mixed tasks."""
    given = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "num_experts": 4, "balance_weight": 0.5, "delta": 0.2}
    context = Context()
    context.weight.fill_(WEIGHT)
    context.tasks, context.padding = torch.tensor(IDS), REAL if padded else None
    update = kind(LoRAMoEConfig(**given | settings), Place("here", IN, OUT), context, nn.Linear(IN, OUT)).double()
    return drawn(update)


def batch() -> torch.Tensor:
    return normal(ROWS, LENGTH, IN)


def constraint(update, x) -> float:
    """The constraint that the backward pass of ``update`` notes."""
    update.noted = {}
    update(x).sum().backward()
    return float(update.noted["loss"])


# --- the reference --------------------------------------------------------------------------------------------------


def reference(t, x, config, padded):
    """(h - W0 x, the constraint)."""
    n = config.num_experts
    h, z = np.zeros((len(x), x.shape[1], OUT)), []
    for row in range(len(x)):
        q = np.zeros(n)
        for i in range(x.shape[1]):
            e = np.exp([t["router"][j] @ x[row, i] for j in range(n)])
            w = e / e.sum()
            for j in range(n):
                h[row, i] += config.lora_alpha / config.r * w[j] * (t["B"][j] @ (t["A"][j] @ x[row, i]))
            if REAL[row, i] or not padded:
                q += w
        for j in range(n):
            importance = 1.0
            if config.tasks:
                for_knowledge = config.tasks[IDS[row]] in config.knowledge
                importance = 1 + config.delta if (j < n // 2) == for_knowledge else 1 - config.delta
            z.append(importance * q[j])
    mean = sum(z) / len(z)
    variance = sum((value - mean) ** 2 for value in z) / max(len(z) - 1, 1)
    return h, config.balance_weight * variance / (mean if config.balance == "paper" else mean**2)


def compare(update: LoRAMoEUpdate, padded=True, **settings) -> None:
    """Fails unless ``update`` gives what the equations give under the config of ``make(**settings)``."""
    right = make(**settings)
    expected, loss = reference(tensors(right), batch().numpy(), right.config, padded)
    np.testing.assert_allclose(update(batch()).detach().numpy(), expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(constraint(update, batch()), loss, rtol=1e-5)


CASES = [
    {"balance": balance, "num_experts": experts} | kinds
    for balance in ("paper", "code")
    for experts in (2, 4)
    for kinds in ({}, KINDS)
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_output_and_constraint_are_the_equations(settings, padded):
    compare(make(padded=padded, **settings), padded, **settings)


def differentiate(update: LoRAMoEUpdate, padded=True) -> None:
    """Fails unless the gradients of ``update`` are the slopes of the equations."""
    x = batch().requires_grad_()
    c = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (update(x) * c).sum().backward()
    values = tensors(update) | {"x": x.detach().numpy().copy()}

    def total() -> float:
        h, loss = reference(values, values["x"], update.config, padded)
        return (h * c.numpy()).sum() + WEIGHT * loss

    check_gradients([*update.named_parameters(), ("x", x)], values, total)


@pytest.mark.parametrize("settings", [CASES[2], CASES[3], CASES[7]], ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_the_finite_differences(settings, padded):
    differentiate(make(padded=padded, **settings), padded)


# --- faults that the reference must see -----------------------------------------------------------------------------


class Biased(LoRAMoEUpdate):
    def balance(self, gate, x):
        return super().balance(gate, x) * (1 - 1 / (len(x) * gate.shape[-1]))


class Averaged(LoRAMoEUpdate):
    def balance(self, gate, x):
        return super().balance(gate / LENGTH, x)


class OtherHalf(LoRAMoEUpdate):
    def _kinds(self, x, q):
        return super()._kinds(x, q).flip(-1)


class OneKind(LoRAMoEUpdate):
    def _kinds(self, x, q):
        return super()._kinds(x, q)[:1].expand_as(q)


class OtherOrder(LoRAMoEUpdate):
    def _kinds(self, x, q):
        return super()._kinds(x, q).flip(0)


@pytest.mark.parametrize("fault", [Biased, Averaged, OtherHalf, OneKind, OtherOrder])
def test_a_faulty_constraint_does_not_pass(fault):
    with pytest.raises(AssertionError):
        compare(make(fault, **KINDS), **KINDS)


@pytest.mark.parametrize("fault", [swapped, unpaired, unscaled, all_real])
def test_a_spoilt_update_does_not_pass(fault):
    fault(update := make(**KINDS))
    with pytest.raises(AssertionError):
        compare(update, **KINDS)


@pytest.mark.parametrize(
    "other",
    [{"balance": "code"}, {"delta": 0.1}, {"balance_weight": 0.4}, {"knowledge": ["a"]}, {"tasks": []}],
    ids=str,
)
def test_another_config_does_not_pass(other):
    found = KINDS | other
    with pytest.raises(AssertionError):
        compare(make(**found if found["tasks"] else {}), **KINDS)


def test_gates_left_out_do_not_pass(monkeypatch):
    mix = loramoe.mix
    monkeypatch.setattr(loramoe, "mix", lambda x, A, B, gate: mix(x, A, B, torch.full_like(gate, 1 / gate.shape[-1])))
    with pytest.raises(AssertionError):
        compare(make(**KINDS), **KINDS)


def test_a_router_that_learns_nothing_of_the_output_is_seen_by_its_gradient_alone(monkeypatch):
    detach_gate(monkeypatch, loramoe)
    compare(make(**KINDS), **KINDS)
    with pytest.raises(AssertionError, match=r"^router$"):
        differentiate(make(**KINDS))


# --- the constraint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["paper", "code"])
def test_order_of_samples_does_not_matter(balance):
    update, order = make(balance=balance, **KINDS), torch.tensor([2, 0, 3, 1])
    expected = constraint(update, batch())
    update.context.tasks, update.context.padding = torch.tensor(IDS)[order], REAL[order]
    assert constraint(update, batch()[order]) == pytest.approx(expected, rel=1e-6)


def test_it_is_zero_only_where_all_experts_serve_alike():
    update = make(padded=False)
    assert constraint(update, batch()) > 1e-3
    nn.init.zeros_(update.router)
    assert constraint(update, batch()) == pytest.approx(0, abs=1e-12)
    update = make(padded=False, **KINDS)
    nn.init.zeros_(update.router)
    assert constraint(update, batch()) > 1e-3  # kinds of experts are to serve kinds of samples


def test_following_it_sends_samples_to_experts_of_the_other_kind():
    """Z is even where an expert of the sample's own kind, which counts 1 + delta, serves less."""
    update = make(**KINDS | {"knowledge": ["a"]}, padded=False, delta=0.5)
    nn.init.zeros_(update.router)
    x = torch.zeros_like(batch())
    x[torch.arange(ROWS), :, torch.tensor(IDS)] = 1
    for _ in range(100):
        update.router.grad = None
        (update(x) * 0).sum().backward()
        update.router.data -= update.router.grad
    gate = (x[:, 0] @ update.router.T).softmax(-1)
    for row, task in enumerate(IDS):
        first, second = gate[row, :2].sum(), gate[row, 2:].sum()
        assert first < second if task == 0 else first > second


@pytest.mark.parametrize("balance", ["paper", "code"])
def test_a_single_number_has_no_variance(balance):
    update = make(num_experts=1, padded=False, balance=balance)
    assert constraint(update, batch()[:1]) == 0
    assert not update.router.grad.any()


def test_it_does_not_lose_digits_far_from_zero():
    """In fp32, with sums of a thousand tokens whose variance is a millionth of their square."""
    x = torch.randn(ROWS, 1000, IN, generator=torch.Generator().manual_seed(8))
    found = []
    for dtype in (torch.float32, torch.float64):
        update = make(padded=False).to(dtype)
        update.router.data *= 1e-2
        found.append(constraint(update, x.to(dtype)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("balance", ["paper", "code"])
def test_two_processes_have_the_constraint_of_the_whole_batch(monkeypatch, balance):
    whole = make(balance=balance, **KINDS)
    (whole(batch()) * 0).sum().backward()
    parts = [slice(0, 3), slice(3, 4)]  # of different sizes
    updates = [make(balance=balance, **KINDS) for _ in parts]

    def work(rank):
        update, part = updates[rank], parts[rank]
        update.context.tasks, update.context.padding = torch.tensor(IDS)[part], REAL[part]
        (update(batch()[part]) * 0).sum().backward()

    two_processes(monkeypatch, work)
    assert float(updates[0].noted["loss"]) == pytest.approx(float(whole.noted["loss"]), rel=1e-6)
    average = (updates[0].router.grad + updates[1].router.grad) / 2  # what DDP makes of them
    torch.testing.assert_close(average, whole.router.grad)


def test_an_answer_needs_no_tasks_and_no_other_process(monkeypatch):
    update = make(**KINDS)
    update.context.tasks = None
    with pytest.raises(UserError, match="needs the task of every sample"):
        update(batch())
    monkeypatch.setattr(shared, "across", None)
    with torch.no_grad():
        expected = update(batch())
    assert torch.equal(update.eval()(batch()), expected)
    assert not update.noted
    model, _ = start("llama", "loramoe")
    assert torch.isfinite(model.eval()(**texts()[0]).loss)


# --- special cases --------------------------------------------------------------------------------------------------


def test_at_the_start_it_adds_nothing():
    update = LoRAMoEUpdate(LoRAMoEConfig(), Place("here", IN, OUT), Context(), nn.Linear(IN, OUT))
    assert not update(batch().float()).any()


def test_one_expert_is_plain_lora():
    update = make(num_experts=1)
    torch.testing.assert_close(update(batch()), update.scaling * batch() @ update.A[0].mT @ update.B[0].mT)


def test_tokens_that_are_not_in_rows_are_weighed_alike():
    update = make(padded=False).eval()
    torch.testing.assert_close(update(batch().flatten(0, 1)), update(batch()).flatten(0, 1))


def test_gates_are_noted_without_padding_and_in_full_precision():
    update, seen = make().float().train(), {}
    update.context.recorder = lambda name, load, tasks: seen.update({name: load})
    with torch.autocast("cpu", torch.bfloat16):
        update(batch().float()).sum().backward()
    gate = (batch() @ update.router.double().T).softmax(-1) * REAL[..., None]
    torch.testing.assert_close(seen["here"].double(), gate.sum(1), rtol=1e-5, atol=1e-6)
    assert update.noted["tokens"] == REAL.sum()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_experts": 0}, "num_experts is at least 1"),
        ({"num_experts": 3, "tasks": NAMES}, "num_experts is even"),
        ({"balance_weight": -0.1}, "balance_weight"),
        ({"balance_weight": float("nan")}, "balance_weight"),
        ({"delta": 1.5}, "delta"),
        ({"balance": "squared"}, "balance"),
        ({"tasks": NAMES, "knowledge": ["d"]}, "knowledge names 'd'"),
    ],
)
def test_config_says_what_is_wrong(wrong, says):
    with pytest.raises(ValueError, match=says):
        LoRAMoEConfig(**wrong)
    assert LoRAMoEConfig(num_experts=3).num_experts == 3  # without kinds any number will do
