"""SPIDER against a training of dense weights, written once more in numpy: with loops, and gradients by hand."""

from __future__ import annotations

import numpy as np
import pico
import pytest
import torch
from contract import adapt, logits, sgd, start, texts, train, trained, weights
from dense import LINEARS, by_hand, check, check_plain, check_resumed
from peft import get_peft_model
from torch import nn

import lorasculpt
from lorasculpt import SpiderConfig, method_logs
from lorasculpt.adapters.context import Context
from lorasculpt.adapters.dense import DenseUpdate
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.update import Place, updates
from lorasculpt.methods import spider
from lorasculpt.methods.spider import Spider, blend, importance

# --- the reference --------------------------------------------------------------------------------------------------


def rank(V):
    size = [abs(v) for v in V.flatten()]
    if not any(size):
        return np.zeros_like(V)
    mean = sum(size) / len(size)
    std = (sum((s - mean) ** 2 for s in size) / (len(size) - 1)) ** 0.5
    return np.array([1 / (1 + np.exp(-(s - mean) / std)) for s in size]).reshape(V.shape)


def mask(pre, grad):
    M = np.zeros_like(pre)
    for i, j in np.ndindex(*M.shape):
        if pre[i, j] < grad[i, j]:
            M[i, j] = grad[i, j] / (pre[i, j] + grad[i, j])
    chosen = [m for m in M.flatten() if m != 0]
    return np.minimum(1, M / (sum(chosen) / len(chosen))) if chosen else M


def reference(W0, windows):
    """The two weights after every window, trained as dense weights."""
    G = [0 * w for w in W0]

    def kept(i, step, before, proposed, g):
        G[i] = G[i] + g
        M = mask(rank(W0[i]), rank(G[i]))
        return (1 - M) * W0[i] + M * proposed

    return by_hand(W0, windows, kept)


def compare() -> None:
    """Fails unless our training and the reference's give the same weights."""
    check(SpiderConfig(target_modules=LINEARS), reference)


def test_training_is_that_of_dense_weights():
    compare()


# --- faults that the reference must see -----------------------------------------------------------------------------


class Forgetful(Spider):
    def before_step(self):
        self.sums = {}
        super().before_step()


class Unsigned(Spider):
    def before_step(self):
        for update in self.updates.values():
            update.D.grad.abs_()
        super().before_step()


class Once(Spider):
    """Masks a step alone, not all that has been learned."""

    def before_step(self):
        self.old = {name: update.D.detach().clone() for name, update in self.updates.items()}
        super().before_step()

    @torch.no_grad()
    def after_step(self, step):
        for name, update in self.updates.items():
            update.D.sub_(self.old[name])
        super().after_step(step)
        for name, update in self.updates.items():
            update.D.add_(self.old[name])


FUNCTIONS = {
    "swapped": ("blend", lambda pre, grad: blend(grad, pre)),
    "mask off": ("blend", lambda pre, grad: torch.ones_like(pre)),
    "binary": ("blend", lambda pre, grad: (pre < grad).to(pre)),
    "not divided by the mean": ("blend", lambda pre, grad: torch.where(pre < grad, grad / (pre + grad), 0.0)),
    "biased": ("importance", lambda v: (v.abs() - v.abs().mean()).div(v.abs().std(correction=0)).sigmoid()),
    "signed": ("importance", lambda v: (v - v.mean()).div(v.std()).sigmoid()),
}


@pytest.mark.parametrize("fault", FUNCTIONS)
def test_a_faulty_mask_does_not_pass(fault, monkeypatch):
    monkeypatch.setattr(spider, *FUNCTIONS[fault])
    with pytest.raises(AssertionError):
        compare()


@pytest.mark.parametrize("fault", [Forgetful, Unsigned, Once])
def test_a_faulty_method_does_not_pass(fault, monkeypatch):
    monkeypatch.setattr(SpiderConfig, "implementation", fault)
    with pytest.raises(AssertionError):
        compare()


# --- the mask -------------------------------------------------------------------------------------------------------


def test_mask_lies_between_0_and_1_and_is_the_references():
    generator = torch.Generator().manual_seed(5)
    W, G = torch.randn(2, 7, 9, generator=generator)
    M = blend(importance(W), importance(G))
    assert 0 == M.min() < M.max() == 1
    np.testing.assert_allclose(M, mask(rank(W.double().numpy()), rank(G.double().numpy())), rtol=1e-5)


def test_what_is_zero_matters_not_at_all():
    zero, G = torch.zeros(3, 4), torch.randn(3, 4, generator=torch.Generator().manual_seed(6))
    assert not importance(zero).any()
    assert not blend(importance(G), importance(zero)).any()
    assert not blend(importance(zero), importance(zero)).any()
    assert (blend(importance(zero), importance(G)) == 1).all()
    assert (importance(zero - 0.1) == 0.5).all()  # a constant is in the middle


def test_entries_with_a_mask_of_0_are_the_bases_again():
    model = start("llama", "spider")[0]
    method = methods_of(model)["default"]
    for _ in range(3):
        train(model, [texts()], torch.optim.AdamW(trained(model), lr=1e-2))
        masks = {n: blend(importance(u.base_weight()), importance(method.sums[n])) for n, u in updates(model).items()}
        moved = torch.cat([(M > 0).flatten() for M in masks.values()])
        D = torch.cat([update.D.detach().flatten() for update in updates(model).values()])
        assert not D[~moved].any()
        assert (D[moved] != 0).float().mean() > 0.9
        assert method_logs(model)["moved"] == pytest.approx(share := float(moved.float().mean()))
        assert 0.1 < share < 0.9


def test_without_a_mask_it_is_plain_fine_tuning(monkeypatch):
    monkeypatch.setattr(spider, "blend", lambda pre, grad: torch.ones_like(pre))
    check_plain(start("llama", "spider")[0])


# --- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 5)])
def test_output_and_gradients_are_those_of_a_linear(shape):
    update = DenseUpdate(SpiderConfig(), Place("here", 5, 4), Context(), nn.Linear(5, 4)).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    assert not update(x).any()
    nn.init.normal_(update.D, generator=torch.Generator().manual_seed(8))
    D, rows = update.D.detach().numpy(), x.detach().numpy().reshape(-1, 5)
    expected = np.array([[sum(D[o, i] * row[i] for i in range(5)) for o in range(4)] for row in rows])
    np.testing.assert_allclose(update(x).detach().numpy().reshape(-1, 4), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, D: torch.func.functional_call(update, {"D": D}, (x,)), (x, update.D))
    assert torch.equal(update.weight(), update.D)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_rounding_is_to_a_neighbour_and_right_in_the_mean():
    values = torch.randn(50, generator=torch.Generator().manual_seed(9)) * torch.logspace(-9, 3, 50)
    drawn = torch.stack([spider._to_bf16(values, seed).float() for seed in range(4000)])
    assert ((drawn - values).abs() <= 2.0**-7 * values.abs()).all()
    assert ((drawn.mean(0) - values).abs() <= 5 * 2.0**-8 / 4000**0.5 * values.abs()).all()
    exact = values.bfloat16()
    assert torch.equal(spider._to_bf16(exact.float(), 0), exact)
    assert torch.equal(spider._to_bf16(values, 1), spider._to_bf16(values, 1))


def test_low_memory_trains_nearly_the_same_and_keeps_less():
    found = []
    for memory in ("full", "low"):
        model = start("llama", "spider", memory=memory)[0]
        train(model, [[batch] for batch in texts(number=4)], sgd(model, 0.3))
        method = methods_of(model)["default"]
        assert {G.dtype for G in method.sums.values()} == {torch.float32 if memory == "full" else torch.bfloat16}
        assert len(method._pre) == (len(updates(model)) if memory == "full" else 0)
        found.append(torch.cat([D.flatten() for D in weights(model).values()]))
    assert 0 < float((found[1] - found[0]).norm() / found[0].norm()) < 0.1


# --- stopping and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["full", "low"])
def test_stopping_and_going_on_equals_never_stopping(memory, tmp_path):
    check_resumed(lambda: start("llama", "spider", memory=memory)[0], tmp_path)


# --- layers ---------------------------------------------------------------------------------------------------------

PROJECTORS = {
    "llava": {"model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"},
    "idefics3": {"model.connector.modality_projection.proj"},
    "gemma3": set(),  # its projector is no linear layer
    "llama": set(),
}


@pytest.mark.parametrize("family", PROJECTORS)
@pytest.mark.parametrize("last_layers", [1, 2, 9])
def test_the_last_layers_and_the_projector_are_trained(family, last_layers):
    base = pico.build(family)[0]
    model = get_peft_model(base, SpiderConfig(last_layers=last_layers))
    found = set(updates(model))
    inside = {name for name in found if ".layers." in name}
    assert {name.split(".layers.")[1].split(".")[0] for name in inside} == ({"1"} if last_layers == 1 else {"0", "1"})
    assert len(inside) == 7 * min(last_layers, 2)
    assert not any("vision" in name for name in found)
    assert found - inside == PROJECTORS[family]


def test_a_second_adapter_chooses_for_itself_and_saved_it_comes_back(tmp_path):
    model = get_peft_model(pico.build("llava")[0], SpiderConfig(last_layers=1))
    model.add_adapter("second", SpiderConfig())
    assert (len(updates(model)), len(updates(model, "second"))) == (9, 16)
    train(model, [texts()], torch.optim.AdamW(trained(model), lr=1e-2))
    model.save_pretrained(tmp_path)
    loaded = lorasculpt.load(pico.build("llava")[0], tmp_path).eval()
    assert torch.equal(logits(loaded, texts()[0]), logits(model, texts()[0]))


def test_targets_that_are_given_are_taken():
    model = adapt(pico.build("llama")[0], "spider", target_modules=["q_proj"], last_layers=1)
    assert list(updates(model)) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_decoder_comes_after_its_encoder():
    from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config

    text = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4)
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(Blip2Config(text_config=text.to_dict()))
    found = {name for name in SpiderConfig(last_layers=1).default_targets(model) if "language_model" in name}
    assert all(name.startswith("language_model.decoder.block.1.") for name in found)
    assert len(found) == 4 + 4 + 2


def test_layers_that_are_not_found_are_asked_for(monkeypatch):
    monkeypatch.setattr(spider, "STACKS", ())
    with pytest.raises(ValueError, match="give target_modules"):
        get_peft_model(pico.build("llama")[0], SpiderConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0.1} for name in ("r", "lora_alpha", "lora_dropout")),
        *({name: {"q_proj": 4}} for name in ("rank_pattern", "alpha_pattern")),
        *({"use_rslora": True}, {"last_layers": 0}, {"memory": "tiny"}),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_config_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SpiderConfig(**wrong)
