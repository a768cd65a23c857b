"""SMoRA against its equations, written once more in numpy with loops over ranks; the bias that balances them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import adapt, equal, start, texts, train, weights
from differences import check_gradients
from equations import normal, tensors, two_processes
from peft import LoraConfig, get_peft_model
from pico import build
from torch import nn

from lorasculpt import SMoRAConfig
from lorasculpt.adapters import carrier, clock
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.update import Place, updates
from lorasculpt.methods.smora import SMoRAUpdate, largest

ROWS, LENGTH, IN, OUT = 3, 4, 5, 4
REAL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)


def make(kind: type[SMoRAUpdate] = SMoRAUpdate, *, padded=True, **settings) -> SMoRAUpdate:
    """An update in float64 whose every tensor is random."""
    given = {"r": 6, "lora_alpha": 5, "top_k": 4}
    context = Context()
    context.padding = REAL if padded else None
    update = kind(SMoRAConfig(**given | settings), Place("here", IN, OUT), context, nn.Linear(IN, OUT)).double()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in update.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.3 if name == "bias" else 1))
    return update


def batch() -> torch.Tensor:
    return normal(ROWS, LENGTH, IN)


# --- the reference --------------------------------------------------------------------------------------------------


def reference(t, x, config, padded):
    """(h - W0 x, how many real tokens took each group), rank by rank."""
    r, k, q = config.r, config.top_k, config.rank_partition
    h, counts = np.zeros((ROWS, LENGTH, OUT)), np.zeros(r // q)
    for row in range(ROWS):
        for i in range(LENGTH):
            s = [t["router"][rank // q] @ x[row, i] for rank in range(r)]
            if config.gate == "sigmoid":
                s = [1 / (1 + np.exp(-value)) for value in s]
            biased = [s[rank] + t["bias"][rank // q] for rank in range(r)]
            taken = sorted(range(r), key=lambda rank: -biased[rank])[:k]
            v = biased if config.bias_in_gate else s
            v = np.exp(v) if config.gate == "softmax" else np.maximum(v, 0)
            for rank in taken:
                g = k * v[rank] / sum(v[j] for j in taken)
                h[row, i] += config.lora_alpha / k * g * t["B"][:, rank] * (t["A"][rank] @ x[row, i])
            if REAL[row, i] or not padded:
                for group in {rank // q for rank in taken}:
                    counts[group] += 1
    return h, counts


def compare(update: SMoRAUpdate, padded=True, **settings) -> None:
    """Fails unless ``update`` gives what the equations give under the config of ``make(**settings)``."""
    right = make(**settings)
    expected, counts = reference(tensors(right), batch().numpy(), right.config, padded)
    update.noted = {}
    output = update(batch())
    output.sum().backward()
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(update.noted["chosen"].numpy(), counts)


CASES = [
    {"gate": gate, "bias_in_gate": inside, "rank_partition": q}
    for gate in ("softmax", "sigmoid")
    for inside in (True, False)
    for q in (1, 2)
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_output_and_counts_are_the_equations(settings, padded):
    compare(make(padded=padded, **settings), padded, **settings)
    compare(make(padded=padded, **settings, top_k=2), padded, **settings, top_k=2)


def differentiate(update: SMoRAUpdate, padded=True) -> None:
    """Fails unless the gradients of ``update`` are the slopes of the equations."""
    x = batch().requires_grad_()
    c = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (update(x) * c).sum().backward()
    values = tensors(update) | {"x": x.detach().numpy().copy()}

    def total() -> float:
        return (reference(values, values["x"], update.config, padded)[0] * c.numpy()).sum()

    assert update.bias.grad is None
    trained = [(name, parameter) for name, parameter in update.named_parameters() if name != "bias"]
    check_gradients([*trained, ("x", x)], values, total)


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_gradients_are_the_finite_differences(settings):
    padded = settings["rank_partition"] == 1
    differentiate(make(padded=padded, **settings), padded)


# --- faults that the reference must see -----------------------------------------------------------------------------


class Swapped(SMoRAUpdate):
    def gate(self, x):
        return super().gate(x).flip(-1)


class WithoutK(SMoRAUpdate):
    def gate(self, x):
        return super().gate(x) / 2


class Equal(SMoRAUpdate):
    def gate(self, x):
        return (super().gate(x) > 0).to(x)


class Apart(SMoRAUpdate):
    """The ranks of a group are not neighbours."""

    def forward(self, x):
        order = torch.tensor([0, 2, 4, 1, 3, 5])
        self.A.data, self.B.data = self.A.data[order], self.B.data[:, order]
        return super().forward(x)


@pytest.mark.parametrize("fault", [Swapped, WithoutK, Equal, Apart])
def test_faulty_gates_do_not_pass(fault):
    with pytest.raises(AssertionError):
        compare(make(fault, rank_partition=2), rank_partition=2)


class Detached(SMoRAUpdate):
    def gate(self, x):
        return super().gate(x).detach()


def test_a_router_that_learns_nothing_is_seen_by_its_gradient_alone():
    compare(make(Detached))
    with pytest.raises(AssertionError, match=r"^router$"):
        differentiate(make(Detached))


SPOILT = {
    "ranks unpaired": lambda update: update.B.data.copy_(update.B.data.flip(1)),
    "other router": lambda update: update.router.data.copy_(update.router.data.roll(1, 0)),
    "alpha over r": lambda update: setattr(update, "scaling", 5 / 6),
    "padding counted": lambda update: setattr(update.context, "padding", None),
    "all taken": lambda update: setattr(update.config, "top_k", 6),
    "no bias": lambda update: update.bias.data.zero_(),
    "bias of the other sign": lambda update: update.bias.data.neg_(),
    "bias not in the gate": lambda update: setattr(update.config, "bias_in_gate", False),
    "other gate": lambda update: setattr(update.config, "gate", "sigmoid"),
}


@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize("q", [1, 2])
def test_a_spoilt_update_does_not_pass(fault, q):
    SPOILT[fault](update := make(rank_partition=q))
    with pytest.raises(AssertionError):
        compare(update, rank_partition=q)


# --- ties, and special cases ----------------------------------------------------------------------------------------


def test_where_scores_tie_the_first_ones_are_taken():
    ties = torch.randint(0, 3, (500, 64), generator=torch.Generator().manual_seed(8)).float()
    for k in (1, 8, 63):
        kept = largest(ties, k)
        expected = [sorted(range(64), key=lambda i, row=row: -row[i])[:k] for row in ties.tolist()]
        assert [sorted(row) for row in expected] == [row.nonzero().flatten().tolist() for row in kept]
    update = make(rank_partition=2)
    nn.init.zeros_(update.router)
    update.bias.data = torch.tensor([0.1, 0.3, 0.1]).double()
    assert (update.gate(batch()) > 0)[0, 0].tolist() == [True, True, False]


def test_all_ranks_with_equal_scores_are_plain_lora():
    for settings in CASES:
        update = make(top_k=6, **settings)
        nn.init.zeros_(update.router)
        if settings["bias_in_gate"]:
            nn.init.zeros_(update.bias)
        expected = 5 / 6 * batch() @ update.A.mT @ update.B.mT
        torch.testing.assert_close(update(batch()), expected)


def test_ranks_that_all_but_vanish_are_counted_and_stay_finite():
    update = make(gate="sigmoid").float()
    update.bias.data.fill_(-3)  # no v is above 0
    update(batch().float()).sum().backward()
    assert update.noted["chosen"].sum() == 4 * REAL.sum()
    assert all(torch.isfinite(p.grad).all() for p in (update.A, update.B, update.router))
    update = make(bias_in_gate=False).float()
    update.bias.data = 1e4 * torch.arange(6.0)
    update.router.data *= 1e3  # a softmax of fp32 has zeros
    update(batch().float()).sum().backward()
    assert update.noted["chosen"].tolist() == [0, 0, *[REAL.sum()] * 4]


def test_where_all_is_taken_alike_steps_are_those_of_a_lora():
    """With k = r, a router of zeros that does not learn and no balancing, steps are those of PEFT's LoRA."""
    mine, _ = start("llama", "smora", r=4, lora_alpha=8, top_k=4, bias_rate=0.0, target_modules=["q_proj"])
    base, _ = build("llama")
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, update in updates(mine).items():
            update.router.zero_().requires_grad_(False)
            base.get_submodule(name).lora_A["default"].weight.copy_(update.A)
    for model in (mine, lora):
        train(model, [texts(number=2)] * 3)
    for name, update in updates(mine).items():
        layer = base.get_submodule(name)
        torch.testing.assert_close(update.A, layer.lora_A["default"].weight)
        torch.testing.assert_close(update.B, layer.lora_B["default"].weight)
        assert update.B.any()


def test_alpha_is_over_the_root_of_k_in_rslora():
    assert make(use_rslora=True).scaling == pytest.approx(5 / 2)


def test_at_the_start_it_adds_nothing():
    update = SMoRAUpdate(SMoRAConfig(), Place("here", IN, OUT), Context(), nn.Linear(IN, OUT))
    assert not update(batch().float()).any()
    assert not update.bias.any()
    assert sum(p.numel() for p in update.parameters() if p.requires_grad) == 64 * (IN + OUT) + 64 * IN


def test_tokens_that_are_not_in_rows_are_weighed_alike():
    update = make(padded=False).eval()
    torch.testing.assert_close(update(batch().flatten(0, 1)), update(batch()).flatten(0, 1))


# --- the bias -------------------------------------------------------------------------------------------------------

RATE = 0.05  # in the rows of the contract


def biases(model) -> dict[str, torch.Tensor]:
    return {name: update.bias.detach().clone() for name, update in updates(model).items()}


def counts(model) -> dict[str, torch.Tensor]:
    return {name: update.noted["chosen"] for name, update in updates(model).items()}


def test_it_moves_by_the_sign_of_what_is_missing():
    model, _ = start("llama", "smora")
    found = texts(size=2, number=3)
    train(model, [found])  # one step of three micro-batches
    for name, c in counts(model).items():
        assert c.sum() == 2 * 3 * 16  # groups of a token, micro-batches, tokens
        expected = [RATE * float(np.sign(np.mean(c.tolist()) - value)) for value in c.tolist()]
        np.testing.assert_allclose(biases(model)[name].numpy(), expected, rtol=1e-6)


def test_it_makes_ranks_equally_busy():
    model, _ = start("llama", "smora", bias_rate=0.02, target_modules=["q_proj"])
    still = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for update in updates(model).values():
        update.bias.data = torch.tensor([1.0, 0.5, -0.5, -1.0])
    spread = []
    for steps in (1, 50, 10):
        train(model, [texts(size=8)] * steps, still)
        spread.append(sum(float(c.std() / c.mean()) for c in counts(model).values()))
    assert spread[0] > 0.6
    assert spread[2] < 0.2 * spread[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_counted_once(reentrant):
    found = []
    for checkpointing in (False, True):
        model, _ = start("llama", "smora")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        train(model, [texts(number=2)] * 2)
        found.append((counts(model), biases(model)))
    assert equal(found[0][0], found[1][0])
    assert equal(found[0][1], found[1][1])


def test_padding_is_not_counted():
    ids = texts(size=2)[0]["input_ids"]
    found = []
    for pad in (0, 5):
        model, _ = start("llama", "smora")
        longer = torch.cat([ids, torch.full((2, pad), 7)], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(2, pad, dtype=ids.dtype)], 1)
        labels = longer.masked_fill(mask == 0, -100)
        train(model, [[{"input_ids": longer, "attention_mask": mask, "labels": labels}]])
        found.append(biases(model))
    assert equal(*found)


def test_nothing_but_a_step_moves_it():
    model, _ = start("llama", "smora")
    train(model, [texts()] * 2, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.5))
    before = weights(model)
    model.set_adapter("default")  # PEFT switches gradients on here
    assert not any(update.bias.requires_grad for update in updates(model).values())
    noted = counts(model)
    with torch.no_grad():
        model.train()(**texts()[0])
    model.eval()(**texts()[0]).loss.backward()
    model.train()(**texts()[0])  # and no backward pass
    assert equal(weights(model), before)
    assert equal(counts(model), noted)


def test_it_comes_back_with_a_checkpoint_that_holds_only_what_is_trained(tmp_path):
    """As FSDP's own: the trainer has loaded that, and the rest is in the adapter's file beside it."""
    model, _ = start("llama", "smora")
    train(model, [texts()] * 2)
    model.save_pretrained(tmp_path)
    again, _ = start("llama", "smora")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    again.load_state_dict(trained, strict=False)
    assert not equal(weights(again), weights(model))
    clock._resume(again, 2, tmp_path)
    assert equal(weights(again), weights(model))
    assert methods_of(again)["default"].step == 2


def test_it_stays_in_fp32_on_a_base_in_bf16():
    base = build("llama")[0].bfloat16()
    assert all(update.bias.dtype == torch.float32 for update in updates(adapt(base, "smora")).values())


def test_two_processes_have_one_bias(monkeypatch):
    data = texts(size=5, number=3)
    whole, _ = start("llama", "smora")
    train(whole, [data[:1]])
    models = [start("llama", "smora")[0] for _ in range(2)]
    parts = [slice(0, 3), slice(3, 5)]  # of different sizes
    first = [{}, {}]

    def work(rank):
        halves = [{key: value[parts[rank]] for key, value in each.items()} for each in data]
        train(models[rank], [halves[:1]])
        first[rank] = biases(models[rank])
        train(models[rank], [halves[1:]])  # on weights that have drifted apart: no gradient was averaged

    two_processes(monkeypatch, work, timeout=60)
    assert equal(first[0], biases(whole))
    assert equal(first[0], first[1])
    assert not equal(counts(models[0]), counts(models[1]))
    assert equal(biases(models[0]), biases(models[1]))
    assert not equal(biases(models[0]), first[0])


def test_a_linear_without_tokens_here_learns_what_other_processes_counted(monkeypatch):
    model, _ = start("llama", "smora")
    method = methods_of(model)["default"]
    others = torch.tensor([3, 1, 2, 2]).repeat(len(method.updates))
    monkeypatch.setattr(carrier, "world", lambda: 2)
    monkeypatch.setattr(carrier.dist, "all_reduce", lambda tensor: tensor.add_(others))
    method.after_step(1)
    for bias in biases(model).values():
        torch.testing.assert_close(bias, RATE * torch.tensor([-1.0, 1, 0, 0]))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rank_partition": 0}, "rank_partition is at least 1"),
        ({"rank_partition": 3}, "r is a multiple of rank_partition=3"),
        ({"rank_partition": 4, "rank_pattern": {"q_proj": 10}}, "in rank_pattern too"),
        ({"top_k": 0}, "top_k lies"),
        ({"top_k": 65}, "top_k lies"),
        ({"rank_pattern": {"q_proj": 4}}, "to r, here 4"),
        ({"top_k": 6, "rank_partition": 4}, "multiple of the former"),
        ({"gate": "relu"}, "gate is"),
        ({"bias_rate": -1e-5}, "bias_rate"),
        ({"bias_rate": float("nan")}, "bias_rate"),
    ],
    ids=str,
)
def test_config_says_what_is_wrong(wrong, says):
    with pytest.raises(ValueError, match=says):
        SMoRAConfig(**wrong)
