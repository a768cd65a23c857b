"""MoSLD against its equations, written once more in numpy with loops; its mask, its numbers of experts, its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import close, start, texts, train, weights
from differences import check_gradients, detach_gate
from equations import all_chosen, all_real, drawn, normal, run, tensors, two_processes, unpaired, unscaled
from torch import nn
from torch.nn import functional as F

from lorasculpt import MoSLDConfig
from lorasculpt.adapters import update as shared
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.update import Place, updates
from lorasculpt.methods import mosld
from lorasculpt.methods.mosld import MoSLDUpdate

ROWS, LENGTH, IN, OUT = 3, 4, 5, 4
REAL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
WEIGHT = 0.7  # what a micro-batch counts
SEED = 9  # of the mask


def make(kind: type[MoSLDUpdate] = MoSLDUpdate, *, padded=True, **settings) -> MoSLDUpdate:
    """An update in float64 whose every tensor is random."""
    given = {"r": 2, "lora_alpha": 3, "num_experts": 4, "weight_dropout": 0.0, "balance_weight": 0.5}
    context = Context()
    context.weight.fill_(WEIGHT)
    context.padding = REAL if padded else None
    update = kind(MoSLDConfig(**given | settings), Place("here", IN, OUT), context, nn.Linear(IN, OUT)).double()
    return drawn(update)


def batch() -> torch.Tensor:
    return normal(ROWS, LENGTH, IN)


# --- the reference --------------------------------------------------------------------------------------------------


def kept(config) -> np.ndarray:
    """M / (1 - p) as the generator draws it."""
    torch.manual_seed(SEED)
    drawn = F.dropout(torch.ones(config.r, IN, dtype=torch.float64), config.weight_dropout).numpy()
    assert set(np.unique(drawn)) <= {0.0, 1 / (1 - config.weight_dropout)}
    return drawn


def reference(t, x, config, padded, mask=1.0):
    """(h - W0 x, the loss)."""
    n = len(t["B"])
    h, counts, sums, tokens = np.zeros((ROWS, LENGTH, OUT)), np.zeros(n), np.zeros(n), 0
    for row in range(ROWS):
        for i in range(LENGTH):
            e = np.exp([t["router"][j] @ x[row, i] for j in range(n)])
            s = e / e.sum()
            best = sorted(range(n), key=lambda j: -s[j])[: config.top_k]
            for j in best:
                g = s[j] / sum(s[k] for k in best)
                h[row, i] += config.lora_alpha / config.r * g * (t["B"][j] @ ((mask * t["A"]) @ x[row, i]))
            if REAL[row, i] or not padded:
                counts[best] += 1
                sums += s
                tokens += 1
    balance = sum(counts[j] / counts.sum() * sums[j] / tokens for j in range(n))
    return h, config.balance_weight * n * balance


def compare(update: MoSLDUpdate, padded=True, **settings) -> None:
    """Fails unless ``update`` gives what the equations give under the config of ``make(**settings)``."""
    right = make(**settings)
    expected, loss = reference(tensors(right), batch().numpy(), right.config, padded, kept(right.config))
    output, found = run(update, batch(), SEED)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found, loss, rtol=1e-5)


CASES = [
    {"num_experts": 4, "top_k": 2},
    {"num_experts": 4, "top_k": 2, "weight_dropout": 0.4},
    {"num_experts": 3, "top_k": 1},
    {"num_experts": 2, "top_k": 2},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_output_and_loss_are_the_equations(settings, padded):
    compare(make(padded=padded, **settings), padded, **settings)


def differentiate(update: MoSLDUpdate, padded=True) -> None:
    """Fails unless the gradients of ``update`` are the slopes of the equations."""
    x = batch().requires_grad_()
    c = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mask = kept(update.config)
    torch.manual_seed(SEED)
    (update(x) * c).sum().backward()
    values = tensors(update) | {"x": x.detach().numpy().copy()}

    def total() -> float:
        h, loss = reference(values, values["x"], update.config, padded, mask)
        return (h * c.numpy()).sum() + WEIGHT * loss

    check_gradients([*update.named_parameters(), ("x", x)], values, total)


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_the_finite_differences(settings, padded):
    differentiate(make(padded=padded, **settings), padded)


# --- faults that the reference must see -----------------------------------------------------------------------------


class Swapped(MoSLDUpdate):
    def balance_loss(self, gate, probability, weight):
        return super().balance_loss(gate.flip(-1), probability, weight)


class OfGates(MoSLDUpdate):
    def balance_loss(self, gate, probability, weight):
        return super().balance_loss(gate, gate, weight)


class OfAll(MoSLDUpdate):
    def balance_loss(self, gate, probability, weight):
        return super().balance_loss(probability, probability, weight)


class WithoutN(MoSLDUpdate):
    def balance_loss(self, gate, probability, weight):
        return super().balance_loss(gate, probability, weight) / gate.shape[-1]


def unmasked(update):
    update.config.weight_dropout = 0.0


def of_x(update):
    update.config.weight_dropout, update.dropout = 0.0, nn.Dropout(0.4)


def heavier(update):
    update.config.balance_weight *= 2


@pytest.mark.parametrize("fault", [Swapped, OfGates, OfAll, WithoutN])
def test_a_faulty_loss_does_not_pass(fault):
    with pytest.raises(AssertionError):
        compare(make(fault))


@pytest.mark.parametrize("fault", [unpaired, unscaled, all_real, unmasked, of_x, all_chosen, heavier])
def test_a_spoilt_update_does_not_pass(fault):
    fault(update := make(weight_dropout=0.4))
    with pytest.raises(AssertionError):
        compare(update, weight_dropout=0.4)


@pytest.mark.parametrize(
    "fault",
    [lambda gate, share: gate.flip(-1), lambda gate, share: share * (gate > 0), lambda gate, share: (gate > 0) / 2],
    ids=["flipped", "not renormalised", "equal"],
)
def test_faulty_gates_do_not_pass(monkeypatch, fault):
    right = mosld.top_k_softmax
    monkeypatch.setattr(mosld, "top_k_softmax", lambda *args: (fault(*right(*args)).double(), right(*args)[1]))
    with pytest.raises(AssertionError):
        compare(make(balance_weight=0.0), balance_weight=0.0)


def test_a_router_that_learns_nothing_of_the_output_is_seen_by_its_gradient_alone(monkeypatch):
    detach_gate(monkeypatch, mosld)
    compare(make())
    with pytest.raises(AssertionError, match=r"^router$"):
        differentiate(make())


# --- the mask -------------------------------------------------------------------------------------------------------


def test_an_answer_has_no_mask_and_training_has_it_on_average():
    update = make(weight_dropout=0.4)
    expected, _ = reference(tensors(update), batch().numpy(), update.config, True)
    torch.manual_seed(SEED)
    with torch.no_grad():
        answer = update.eval()(batch())
        drawn = torch.stack([update.train()(batch()) for _ in range(2000)])
    error = (drawn.mean(0) - answer) / (drawn.std(0) / 2000**0.5)
    assert float(error.abs().max()) < 5
    np.testing.assert_allclose(answer.numpy(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_has_the_same_mask(reentrant):
    def trained(seed, checkpointing):
        model, _ = start("llama", "mosld", weight_dropout=0.5)
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


# --- the numbers of experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "layers", "expected"),
    [
        (3, 4, [3, 3, 3, 3]),
        ("8642", 8, [8, 8, 6, 6, 4, 4, 2, 2]),
        ("2468", 4, [2, 4, 6, 8]),
        ("8642", 6, [8, 8, 6, 4, 4, 2]),
        ("8642", 2, [8, 4]),
        ([5, 12, 2], 3, [5, 12, 2]),
    ],
    ids=str,
)
def test_every_layer_has_its_number_of_experts(rule, layers, expected):
    config = MoSLDConfig(num_experts=rule)
    assert [config.experts(Place("here", IN, OUT, layer, layers)) for layer in range(layers)] == expected
    assert config.experts(Place("projector", IN, OUT)) == expected[0]


def test_a_list_is_one_number_for_each_layer():
    with pytest.raises(ValueError, match="lists 3 layers, but here is in a stack of 2"):
        MoSLDConfig(num_experts=[2, 3, 4]).experts(Place("here", IN, OUT, 0, 2))


def test_a_model_has_them_and_they_come_back(tmp_path):
    model, _ = start("llama", "mosld", num_experts=[3, 2])
    assert [len(update.B) for update in updates(model).values()] == [3] * 7 + [2] * 7
    model.save_pretrained(tmp_path)
    assert MoSLDConfig.from_pretrained(str(tmp_path)).num_experts == [3, 2]


# --- the loss -------------------------------------------------------------------------------------------------------


def test_where_experts_serve_alike_it_is_its_weight():
    update = make(top_k=4)
    nn.init.zeros_(update.router)
    assert run(update, batch(), SEED)[1] == pytest.approx(0.5)


def test_two_processes_have_the_loss_of_the_whole_batch(monkeypatch):
    whole = make()
    (whole(batch()) * 0).sum().backward()
    parts = [slice(0, 2), slice(2, 3)]  # of different sizes
    halves = [make() for _ in parts]

    def work(rank):
        update, part = halves[rank], parts[rank]
        update.context.padding = REAL[part]
        (update(batch()[part]) * 0).sum().backward()

    two_processes(monkeypatch, work)
    assert float(halves[0].noted["loss"]) == pytest.approx(float(whole.noted["loss"]), rel=1e-6)
    average = (halves[0].router.grad + halves[1].router.grad) / 2  # what DDP makes of them
    torch.testing.assert_close(average, whole.router.grad)


def test_an_answer_changes_nothing_and_waits_for_no_process(monkeypatch):
    update = make()
    before = tensors(update)
    monkeypatch.setattr(shared, "across", None)
    with torch.no_grad():
        expected = update(batch())
    assert torch.equal(update.eval()(batch()), expected)
    assert not update.noted
    assert all(np.array_equal(before[key], value) for key, value in tensors(update).items())


# --- special cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a_std", "deviation"), [(0.2, 0.2), (None, (3 * 999) ** -0.5)])
def test_at_the_start_it_adds_nothing(a_std, deviation):
    update = MoSLDUpdate(MoSLDConfig(a_std=a_std), Place("here", 999, OUT), Context(), nn.Linear(999, OUT))
    assert not update(torch.randn(2, 3, 999)).any()
    assert float(update.A.detach().std()) == pytest.approx(deviation, rel=0.05)


def test_one_expert_without_a_mask_is_plain_lora():
    update = make(num_experts=1, top_k=1)
    torch.testing.assert_close(update(batch()), update.scaling * batch() @ update.A.mT @ update.B[0].mT)


def test_tokens_that_are_not_in_rows_are_weighed_alike():
    update = make(padded=False).eval()
    torch.testing.assert_close(update(batch().flatten(0, 1)), update(batch()).flatten(0, 1))


def test_choices_are_noted_without_padding():
    update = make()
    run(update, batch(), SEED)
    assert update.noted["tokens"] == REAL.sum()
    assert update.noted["chosen"].sum() == 2 * REAL.sum()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_experts": 0}, "num_experts is a number"),
        ({"num_experts": 8642}, "a rule in quotes"),
        ({"num_experts": "8-6"}, "num_experts"),
        ({"num_experts": ""}, "num_experts"),
        ({"num_experts": [4, 2.5]}, "num_experts"),
        ({"num_experts": "4321"}, "fewest experts of a layer, 1; got 2"),
        ({"top_k": 0}, "top_k"),
        ({"weight_dropout": 1.0}, "weight_dropout"),
        ({"balance_weight": float("nan")}, "balance_weight"),
        ({"a_std": 0.0}, "a_std"),
    ],
    ids=str,
)
def test_config_says_what_is_wrong(wrong, says):
    with pytest.raises(ValueError, match=says):
        MoSLDConfig(**wrong)
