"""Conditional MixLoRA against its equations, written once more in numpy with loops, and its choice in generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import start
from differences import check_gradients
from equations import all_real, drawn, normal, unscaled
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from lorasculpt import MixLoRAConfig, UserError
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.update import Place, context_of, updates
from lorasculpt.evaluation.answer import log_probabilities
from lorasculpt.methods.mixlora import MixLoRAUpdate

ROWS, LENGTH, IN, OUT = 3, 4, 5, 4
REAL = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
PROMPT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)  # its padding is -100 as well
CONDITIONS, GRADS = ("input", "input_lora_a"), ("none", "straight_through", "weighted")


def make(kind: type[MixLoRAUpdate] = MixLoRAUpdate, *, padded=True, **settings) -> MixLoRAUpdate:
    """An update in float64 whose every tensor is random, and whose scores are far apart."""
    given = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "num_factors": 6}
    context = Context()
    context.padding = REAL if padded else None
    update = kind(MixLoRAConfig(**given | settings), Place("here", IN, OUT), context, nn.Linear(IN, OUT)).double()
    return drawn(update)


def inputs() -> torch.Tensor:
    return normal(ROWS, LENGTH, IN)


# --- the reference --------------------------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def best(score, r):
    return sorted(range(len(score)), key=lambda e: -score[e])[:r]


def gates(score, chosen):
    """r times the share of every chosen factor, from scores that are shares already."""
    return np.array([len(chosen) * score[e] / sum(score[j] for j in chosen) for e in chosen])


def reference(t, x, counted, config, start=None):
    """(h - W0 x, the gates of every row); ``start``: the gates whose values a straight-through estimator leaves out."""
    h, found, r = np.zeros((len(x), x.shape[1], t["B"].shape[1])), [], config.r
    for row in range(len(x)):
        tokens = [x[row, i] for i in range(x.shape[1]) if counted[row][i]]
        mean = sum(tokens) / len(tokens)
        s_a = softmax(np.array([w @ mean for w in t["W_A"]]))
        s_b = softmax(np.array([w @ mean for w in t["W_B"]]))
        of_a = best(s_a, r)
        if config.condition == "input_lora_a":
            u = np.zeros(len(s_b))
            for k in range(r):
                u += softmax(np.array([t["A"][of_a[k]] @ t["W_AB"][k][:, e] for e in range(len(u))]))
            s_b = s_b + config.cfs_weight * softmax(u)
        of_b = best(s_b, r)
        g_a, g_b = gates(s_a, of_a), gates(s_b, of_b)
        found.append((g_a, g_b))
        if config.router_grad == "none":
            g_a, g_b = np.ones(r), np.ones(r)
        elif config.router_grad == "straight_through":
            g_a, g_b = (1 + g - (g if start is None else start[row][i]) for i, g in enumerate((g_a, g_b)))
        for i in range(x.shape[1]):
            for k in range(r):
                inner = t["A"][of_a[k]] @ x[row, i]
                h[row, i] += config.lora_alpha / r * g_a[k] * g_b[k] * t["B"][of_b[k]] * inner
    return h, found


def counts(padded: bool, pool: str, prompt) -> np.ndarray:
    """The tokens that the mean is of."""
    counted = REAL if padded else torch.ones_like(REAL)
    return (counted & prompt if pool == "prompt" else counted).numpy()


def compare(update: MixLoRAUpdate, padded=True, **settings) -> None:
    """Fails unless ``update`` gives what the equations give under the config of ``make(**settings)``."""
    right, x = make(**settings), inputs()
    update.context.prompt = PROMPT
    tensors = {key: value.numpy() for key, value in right.state_dict().items()}
    counted = counts(padded, right.config.pool, PROMPT)
    expected, _ = reference(tensors, x.numpy(), counted, right.config)
    np.testing.assert_allclose(update(x).detach().numpy(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("router_grad", GRADS)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("pool", ["sequence", "prompt"])
def test_output_is_the_equations(condition, router_grad, padded, pool):
    settings = {"condition": condition, "router_grad": router_grad, "pool": pool, "cfs_weight": 1.5}
    compare(make(padded=padded, **settings), padded, **settings)


def differentiate(update: MixLoRAUpdate, padded=True) -> None:
    """Fails unless the gradients of ``update`` are the slopes of the equations."""
    x = inputs().requires_grad_()
    c = torch.randn(ROWS, LENGTH, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (update(x) * c).sum().backward()
    counted = counts(padded, "sequence", PROMPT)
    values = {key: value.detach().numpy().copy() for key, value in [*update.state_dict().items(), ("x", x)]}
    _, at_start = reference(values, values["x"], counted, update.config)

    def total() -> float:
        return (reference(values, values["x"], counted, update.config, at_start)[0] * c.numpy()).sum()

    trained = [(name, parameter) for name, parameter in update.named_parameters() if parameter.requires_grad]
    check_gradients([*trained, ("x", x)], values, total)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("router_grad", GRADS)
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_the_finite_differences(condition, router_grad, padded):
    differentiate(make(condition=condition, router_grad=router_grad, padded=padded), padded)


# --- faults that the reference must see -----------------------------------------------------------------------------


class Swapped(MixLoRAUpdate):
    def choose(self, x):
        return tuple(found.flip(1) for found in super().choose(x))


class Unpaired(MixLoRAUpdate):
    def choose(self, x):
        chosen, weight = super().choose(x)
        return torch.stack([chosen[:, 0], chosen[:, 1].flip(-1)], 1), weight


class Worst(MixLoRAUpdate):
    def _top(self, score):
        return super()._top(-score)


class Raw(MixLoRAUpdate):
    def _top(self, score):
        chosen, weight = super()._top(score)
        return chosen, weight / self.r


class OneForAll(MixLoRAUpdate):
    def pooled(self, x):
        return super().pooled(x).mean(0, keepdim=True).expand(len(x), -1)


def reversed_slots(update):
    update.W_AB.data = update.W_AB.data.flip(0)


SETTINGS = {"router_grad": "weighted", "pool": "prompt"}
FAULTS = {
    **{kind.__name__: lambda kind=kind: make(kind, **SETTINGS) for kind in (Swapped, Unpaired, Worst, Raw, OneForAll)},
    "other condition": lambda: make(**SETTINGS, condition="input"),
    "other lambda": lambda: make(**SETTINGS, cfs_weight=3.0),
    "no weights": lambda: make(**SETTINGS | {"router_grad": "none"}),
    "answer seen": lambda: make(**SETTINGS | {"pool": "sequence"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_update_does_not_pass(fault):
    with pytest.raises(AssertionError):
        compare(FAULTS[fault](), **SETTINGS)


@pytest.mark.parametrize("fault", [unscaled, all_real, reversed_slots])
def test_a_spoilt_update_does_not_pass(fault):
    fault(update := make(**SETTINGS))
    with pytest.raises(AssertionError):
        compare(update, **SETTINGS)


class Detached(MixLoRAUpdate):
    def choose(self, x):
        chosen, weight = super().choose(x)
        return chosen, weight.detach()


@pytest.mark.parametrize("router_grad", ["straight_through", "weighted"])
def test_routers_that_learn_nothing_are_seen_by_their_gradients_alone(router_grad):
    settings = {"router_grad": router_grad, "condition": "input"}
    compare(make(Detached, **settings), **settings)
    with pytest.raises(AssertionError, match=r"^W_A$"):
        differentiate(make(Detached, **settings))


# --- special cases --------------------------------------------------------------------------------------------------


def test_at_the_start_it_adds_nothing():
    update = MixLoRAUpdate(MixLoRAConfig(), Place("here", IN, OUT), Context(), nn.Linear(IN, OUT))
    assert not update(inputs().float()).any()


@pytest.mark.parametrize("factors", [1, 3])
def test_all_factors_in_the_same_order_are_plain_lora(factors):
    update, x = make(num_factors=factors, r=factors, condition="input"), inputs()
    update.W_B.copy_(update.W_A)
    torch.testing.assert_close(update(x), update.scaling * x @ update.A.T @ update.B)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_samples_of_a_batch_do_not_see_each_other(condition):
    update, x = make(condition=condition, router_grad="weighted"), inputs()
    together = update(x)
    assert len(update.choose(x)[0].unique(dim=0)) > 1
    for row in range(ROWS):
        update.context.padding = REAL[row : row + 1]
        torch.testing.assert_close(update(x[row : row + 1])[0], together[row])
        update.context.padding = None  # and padding is no part of a sample
        real = x[row : row + 1, REAL[row]]
        torch.testing.assert_close(update(real)[0], together[row, REAL[row]])


def test_routers_are_saved_and_trained_only_where_they_have_a_gradient():
    for router_grad in GRADS:
        update = make(router_grad=router_grad)
        assert update.state_dict().keys() == {"A", "B", "W_A", "W_B", "W_AB"}
        assert sum(parameter.requires_grad for parameter in update.parameters()) == (2 if router_grad == "none" else 5)


def test_straight_through_is_unweighted_in_the_forward_pass():
    assert torch.equal(make(router_grad="straight_through")(inputs()), make()(inputs()))


def test_load_is_of_both_pools():
    update, seen = make().train(), {}
    update.context.recorder = lambda name, load, tasks: seen.update({name: load})
    update(inputs()).sum().backward()
    assert (seen["here"].unflatten(-1, (2, 6)).sum(-1) == 2).all()
    assert update.noted["tokens"] == ROWS
    assert update.noted["chosen"].sum() == ROWS * 4


def test_an_evaluation_changes_no_state():
    update = make().eval()
    before = {key: value.clone() for key, value in update.state_dict().items()}
    update(inputs())
    assert all(torch.equal(before[key], value) for key, value in update.state_dict().items())
    assert not update.noted


def test_choices_are_made_in_full_precision_under_autocast():
    update, x = make(router_grad="weighted").float(), inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = update.choose(x)
    assert all(torch.equal(a, b) for a, b in zip(found, update.choose(x), strict=True))


WRONG = {"num_factors": 3, "condition": "instr", "cfs_weight": 0.0, "router_grad": "ste", "pool": "answer"}


@pytest.mark.parametrize("field", WRONG)
def test_config_says_what_is_wrong(field):
    with pytest.raises(ValueError, match=f"^{field} is .*; got"):
        MixLoRAConfig(**{field: WRONG[field]})


def test_no_linear_may_take_more_factors_than_there_are():
    with pytest.raises(ValueError, match="num_factors is at least r, here 17"):
        MixLoRAConfig(rank_pattern={"q_proj": 17})


def test_tokens_of_no_sample_are_refused():
    with pytest.raises(UserError, match="leave it out of target_modules"):
        make()(inputs()[0])


# --- the choice of a generation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "same"), [("prompt", True), ("sequence", False)])
def test_training_chooses_as_generation_does_where_it_does_not_see_the_answer(pool, same):
    update, x = make(pool=pool, padded=False), inputs()
    update.context.prompt = (torch.arange(LENGTH) < 2).expand(ROWS, -1)
    trained, _ = update.choose(x)
    update.context.prompt = None
    assert torch.equal(trained, update.choose(x[:, :2])[0]) == same


def test_plain_text_without_a_prompt_counts_as_a_whole():
    update, x = make(pool="prompt"), inputs()
    update.context.prompt = PROMPT & torch.tensor([[True], [False], [True]])
    expected = [x[0, 1:3], x[1], x[2, 2:3]]
    torch.testing.assert_close(update.pooled(x), torch.stack([tokens.mean(0) for tokens in expected]))


def test_what_goes_on_keeps_the_choice_of_its_prompt():
    update, x = make(padded=False), inputs()
    update.context.continues = True
    with pytest.raises(UserError, match="3 rows go on with a generation, but 0 prompts"):
        update(x[:, :1])
    update.context.continues = False
    update(x)
    update.context.continues = True
    other = -x.flip(0)[:, :1]
    a, b = (pool[update._held[0][:, i]] for i, pool in enumerate((update.A, update.B)))
    torch.testing.assert_close(update(other), update.scaling * other @ a.transpose(1, 2) @ b)
    with pytest.raises(UserError, match="2 rows go on with a generation, but 3 prompts"):
        update(other[:2])


@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generation_is_the_same_with_and_without_a_cache_alone_or_in_a_batch(search):
    model, _ = start("llama", "mixlora")
    for update in updates(model).values():
        nn.init.normal_(update.B, generator=torch.Generator().manual_seed(8))
    ids = torch.randint(4, 400, (2, 6), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    how = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, **search}
    found = model.eval().generate(input_ids=ids, attention_mask=mask, **how)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **how), found)
    each = len(found) // 2
    alone = model.generate(input_ids=ids[:1, 2:], attention_mask=mask[:1, 2:], **how)
    assert torch.equal(alone[:, 4:], found[:each, 6:])
    model(input_ids=ids[:1])  # after a generation every pass chooses anew


def apart(pool: str = "sequence") -> PeftModel:
    """A small Llama whose choices make a difference."""
    model, _ = start("llama", "mixlora", pool=pool)
    for update in updates(model).values():
        nn.init.normal_(update.B, generator=torch.Generator().manual_seed(8))
    return model.eval()


def windowed() -> PeftModel:
    """The same of a model that looks four tokens back."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(vocab_size=400, num_key_value_heads=2, sliding_window=4, **sizes))
    model = get_peft_model(
        base, MixLoRAConfig(r=2, num_factors=6, lora_dropout=0.0, target_modules=["q_proj", "up_proj"])
    )
    for update in updates(model).values():
        nn.init.normal_(update.B, generator=torch.Generator().manual_seed(8))
    return model.eval()


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(4, 400, (rows, length), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("form", ["by place", "added", "boolean", "of each kind", "window", "packed", "bias", "roomy"])
@torch.no_grad()
def test_padding_is_not_counted_however_the_mask_is_given(form):
    model, words = apart(), ids(2, 8)
    mask = torch.ones_like(words)
    mask[0, :3] = 0
    causal = torch.ones(8, 8, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    if form == "window":
        causal &= ~torch.ones(8, 8, dtype=torch.bool).tril(-2)
    elif form == "packed":
        causal[..., 5:, :5] = False
    least = torch.finfo(torch.float32).min
    added = torch.zeros(causal.shape).masked_fill(~causal, least)
    if form == "bias":
        added += -0.5 * (torch.arange(8)[:, None] - torch.arange(8)).abs()
    elif form == "roomy":
        added = torch.cat([added, torch.full((2, 1, 8, 5), least)], -1)
    expected = model(input_ids=words, attention_mask=mask).logits
    if form == "by place":
        found = model(words, mask).logits
    else:
        given = {"boolean": causal, "window": causal, "of each kind": {"full_attention": added}}.get(form, added)
        context = context_of(model)
        places = model.get_base_model().register_forward_pre_hook(
            lambda model, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )  # only the adapter is to read the mask: the small model takes that of two dimensions
        found = model(input_ids=words, attention_mask=given).logits
        places.remove()
        assert torch.equal(context.padding, mask.bool())
    torch.testing.assert_close(found[0, 3:], expected[0, 3:])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_is_not_counted_with_a_static_cache(family):
    model, words = apart() if family == "llama" else windowed(), ids(2, 8)
    mask = torch.ones_like(words)
    mask[0, :3] = 0
    how = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    expected = model.generate(input_ids=words, attention_mask=mask, **how)
    found = model.generate(input_ids=words, attention_mask=mask, cache_implementation="static", **how)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("pool", "same"), [("prompt", True), ("sequence", False)])
@torch.no_grad()
def test_a_text_is_as_likely_as_where_it_is_generated(pool, same):
    """Two prompts of unlike length, each with an answer of its own, as `choose` and the drift ask for them."""
    model, words = apart(pool), ids(2, 10)
    lengths, own = (2, 4), torch.arange(4, 0, -1) <= torch.tensor([[2], [4]])
    mask = torch.ones_like(words)
    mask[0, :3] = 0
    found = log_probabilities(model, {"input_ids": words, "attention_mask": mask}, own)
    for row, length in enumerate(lengths):
        begin = 3 if row == 0 else 0
        prompt, answer = words[row : row + 1, begin:-length], words[row, -length:]
        said = model(input_ids=prompt, use_cache=True)
        scores = [said.logits[0, -1]]
        for token in answer[:-1]:
            said = model(input_ids=token[None, None], past_key_values=said.past_key_values, use_cache=True)
            scores.append(said.logits[0, -1])
        close = torch.allclose(found[row, -length:], torch.stack(scores).log_softmax(-1), atol=1e-4)
        assert close == same
