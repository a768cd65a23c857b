from __future__ import annotations

import math

import numpy as np
import pico
import pytest
import torch
import transformers as hf
from contract import (
    adapt,
    batches,
    close,
    equal,
    plain,
    records,
    sft,
    sgd,
    start,
    texts,
    train,
    trained,
    weights,
)
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from lorasculpt import Clock, LwFConfig, UserError, method_logs
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.teacher import Teacher
from lorasculpt.methods import lwf
from lorasculpt.models.parts import target_regex

WEIGHT, T = 0.7, 3.0
SMALL = r"model\.layers\.[01]\.self_attn\.v_proj"


def sharp(targets=SMALL, **settings):
    """A text model with opinions, in float64, and an adapter of rank 1 that has already learned something."""
    base = pico.build("llama")[0].double()
    with torch.no_grad():
        base.lm_head.weight.mul_(20)
    torch.manual_seed(1)
    settings = {"r": 1, "lora_alpha": 2, "weight": WEIGHT, "temperature": T, "target_modules": targets} | settings
    model = get_peft_model(base, LwFConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    """Two rows: their questions, answers and padding differ in length."""
    ids, labels = texts(length=7)[0]["input_ids"].clone(), torch.full((2, 7), -100)
    labels[0, 3:6], labels[1, 2:7] = ids[0, 3:6], ids[1, 2:7]
    mask = torch.ones_like(ids)
    mask[0, 6], ids[0, 6] = 0, 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


# --- value and gradient, in numpy -----------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits - logits.max())
    return found / found.sum()


def by_hand(model, given, temperature=T) -> float:
    """Equation (2) with whole forward passes and a loop over positions, in float64."""
    asked = {key: value for key, value in given.items() if key != "labels"}
    model.eval()
    with torch.no_grad():
        tuned = model(**asked).logits.double().numpy()
        with model.disable_adapter():
            base = model(**asked).logits.double().numpy()
    model.train()
    found = []
    for row, labels in enumerate(given["labels"].tolist()):
        for at, label in enumerate(labels):
            if label != -100:
                p, q = (softmax(logits[row, at - 1] / temperature) for logits in (base, tuned))
                found.append((p * np.log(p / q)).sum())
    return temperature**2 * np.mean(found)


def gradients(model, window):
    """Gradients of an optimizer step that has no loss but this one, and what is shown after it."""
    clock = Clock(model, optimizer := sgd(model, lr=0.0))
    clock.begin_step(len(window))
    for each in window:
        (0 * model(**each).logits.sum()).backward()
    optimizer.step()
    clock.end_step()
    clock.close()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, method_logs(model)


def check(model, given):
    """The gradient and the value are those of ``by_hand``, by central differences over every entry."""
    found, logs = gradients(model, [given])
    assert logs == pytest.approx({"distillation": by_hand(model, given)}, rel=1e-5)
    largest = 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        slope = torch.zeros_like(parameter).flatten()
        for i in range(len(slope)):
            ends = []
            for step in (5e-3, -5e-3):  # norms are computed in fp32
                with torch.no_grad():
                    parameter.view(-1)[i] += step
                    ends.append(by_hand(model, given))
                    parameter.view(-1)[i] -= step
            slope[i] = WEIGHT * (ends[0] - ends[1]) / 1e-2
        largest = max(largest, float(slope.abs().max()))
        torch.testing.assert_close(found[name].flatten(), slope, rtol=0, atol=5e-3 * float(slope.abs().max()))
    assert largest > 1e-2


@pytest.mark.parametrize("tokens", [256, 3])
def test_value_and_gradient_are_those_of_the_equations(tokens, monkeypatch):
    monkeypatch.setattr(lwf, "TOKENS", tokens)
    check(sharp(), batch())


def no_square(self, tuned, base, right=lwf.LwF._divergence):
    return right(self, tuned, base) / T**2


def reverse(self, tuned, base):
    with self.teacher.asked(self.teacher.head):
        p = (self.teacher.logits(base) / T).log_softmax(-1)
    q = (self.teacher.logits(tuned) / T).log_softmax(-1)
    return F.kl_div(p, q, reduction="sum", log_target=True)


def cold(self, tuned, base):
    with self.teacher.asked(self.teacher.head):
        p = self.teacher.logits(base).log_softmax(-1)
    q = (self.teacher.logits(tuned) / T).log_softmax(-1)
    return F.kl_div(q, p, reduction="sum", log_target=True)


def unshifted(self, model, args, kwargs):
    self._counted = kwargs["labels"] != -100


def with_padding(self, model, args, kwargs):
    labels = torch.where(kwargs["attention_mask"] == 0, 0, kwargs["labels"])
    self._counted = F.pad(labels[:, 1:] != -100, (0, 1))


def with_the_question(self, model, args, kwargs):
    self._counted = F.pad(kwargs["attention_mask"][:, 1:] == 1, (0, 1))


FAULTS = {
    no_square: (lwf.LwF, "_divergence"),
    reverse: (lwf.LwF, "_divergence"),
    cold: (lwf.LwF, "_divergence"),
    unshifted: (Teacher, "_read"),
    with_padding: (Teacher, "_read"),
    with_the_question: (Teacher, "_read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault], fault)
    with pytest.raises(AssertionError):
        check(sharp(), batch())


def test_an_adapter_that_stays_on_is_caught(monkeypatch):
    monkeypatch.setattr(Teacher, "asked", lambda self, part: torch.no_grad())
    with pytest.raises(AssertionError):
        check(sharp(), batch())


def test_for_logits_the_head_alone_is_turned_be_it_adapted_itself(monkeypatch):
    turned, asked = [], Teacher.asked
    monkeypatch.setattr(Teacher, "asked", lambda self, part: turned.append(part) or asked(self, part))
    monkeypatch.setattr(lwf, "TOKENS", 3)
    model = sharp(rf"lm_head|{SMALL}", lora_dropout=0.0)
    _, logs = gradients(model, [batch()])
    assert logs == pytest.approx({"distillation": by_hand(model, batch())}, rel=1e-5)
    whole, *others = turned
    assert whole is model.base_model.model
    assert others == [whole.lm_head] * 2 * 3  # three times three tokens, and what a checkpoint computes again
    assert all(part.training for part in model.modules())
    assert not whole.lm_head.disable_adapters


def test_it_is_averaged_over_micro_batches():
    rows = [{key: value[i : i + 1] for key, value in batch().items()} for i in (0, 1)]
    whole, logs = gradients(sharp(), rows)
    parts = [gradients(sharp(), [row]) for row in rows]
    assert logs["distillation"] == pytest.approx(np.mean([part[1]["distillation"] for part in parts]), rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sum(part[0][name] for part in parts) / 2, rtol=1e-5, atol=1e-8)


def test_a_batch_without_answers_adds_nothing():
    found, logs = gradients(sharp(), [batch() | {"labels": torch.full((2, 7), -100)}])
    assert logs == {"distillation": 0.0}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        (hf.Gemma2ForCausalLM, hf.Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 8}),
        (hf.CohereForCausalLM, hf.CohereConfig, {"logit_scale": 0.25}),
        (hf.GraniteForCausalLM, hf.GraniteConfig, {"logits_scaling": 4.0}),
        (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    ],
)
def test_logits_are_the_models_own(model, config, settings):
    base = model(config(**pico.TEXT, **settings)).eval()
    given = {"input_ids": texts()[0]["input_ids"]}
    teacher = Teacher(base.requires_grad_(False), base.model, lambda hidden, tuned, base: hidden)
    with torch.no_grad():
        found = teacher.logits(base.model(**given).last_hidden_state)
        torch.testing.assert_close(found, base(**given).logits)


# --- training -------------------------------------------------------------------------------------------------------


def test_with_weight_0_it_is_lora_bit_for_bit():
    base = pico.build("llama")[0]
    torch.manual_seed(1)
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=target_regex(base, "language")))
    model = adapt(pico.build("llama")[0], "lwf", weight=0.0)
    other = adapt(pico.build("llama")[0], "lwf", weight=1.0)
    for each in (lora, model, other):
        train(each, [texts()] * 3)
    assert equal(weights(model), weights(lora))
    assert not equal(weights(other), weights(lora))
    assert method_logs(model) == {}


@pytest.mark.parametrize("saved", ["multi_modal_projector", "embed_tokens", "lm_head"])
def test_what_is_saved_beside_the_adapter_is_held_back_too(saved, asked):
    base, processor = pico.build("llava")
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(20)
    model = adapt(base, "lwf", modules_to_save=[saved], temperature=1.0).train()
    given = batches(processor, asked, 2)[0]
    shifted = (given["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    with torch.no_grad():
        before = model(**given).logits[shifted].log_softmax(-1)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        after = model(**given).logits[shifted].log_softmax(-1)
    expected = float(F.kl_div(after, before, reduction="batchmean", log_target=True))
    _, logs = gradients(model, [given])
    assert expected > 1e-3
    assert logs["distillation"] == pytest.approx(expected, rel=1e-3)


def test_a_larger_weight_stays_nearer_to_the_base():
    found = []
    for weight in (0.0, 1.0, 10.0):
        model = start("llama", "lwf", weight=weight)[0]
        train(model, [texts()] * 6)
        found.append(by_hand(model, texts()[0], temperature=2.0))
    assert found[0] > 1.02 * found[1] > 1.02**2 * found[2] > 0


@pytest.fixture
def asked(tmp_path):
    return records(tmp_path / "asked")


def test_chunks_that_never_are_logits_learn_the_same(asked, tmp_path):
    """TRL's loss against that of transformers, with checkpoints and accumulation."""
    settings = {
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 3.0,
    }
    runs = [
        sft(tmp_path, "lwf", "llava", asked, gradient_checkpointing=True, **settings),
        plain(tmp_path, "lwf", "llava", asked, **settings),
    ]
    for run in runs:
        run.train()
    close(weights(runs[0].model), weights(runs[1].model), rtol=1e-4, atol=1e-6)
    shown = [[row["distillation"] for row in run.state.log_history if "distillation" in row] for run in runs]
    assert len(shown[0]) == 4
    assert shown[0] == pytest.approx(shown[1], rel=1e-3)
    assert shown[0][0] < 1e-9 < shown[0][1]  # at first the model is its base


def spread(model):
    """``model`` in training, after its adapter has learned something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize("scope", ["language", "all"])
@pytest.mark.parametrize("family", [*pico.FAMILIES, "paligemma"])
def test_every_family_is_asked_with_its_pictures(family, scope, asked):
    base, processor = pico.build(family)
    model = spread(adapt(base, "lwf", target_modules=target_regex(base, scope)))
    given = batches(processor, asked[:2], 2)[0]
    assert gradients(model, [given])[1]["distillation"] == pytest.approx(by_hand(model, given, 2.0), rel=1e-3)


@pytest.mark.parametrize(("scope", "times"), [("language", 1), ("all", 2)])
def test_pictures_are_looked_at_again_only_where_the_tower_is_adapted(scope, times, asked):
    base, processor = pico.build("llava")
    model, looks = spread(adapt(base, "lwf", target_modules=target_regex(base, scope))), []
    base.model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    gradients(model, batches(processor, asked[:2], 2))
    assert len(looks) == times


@pytest.mark.parametrize("cached", [False, True])
def test_the_base_is_asked_without_dropout_or_cache(cached):
    """The tuned model's dropout is its own affair; the base answers as it would after training."""
    base = pico.build("llama")[0]
    base.config._attn_implementation = "eager"
    model = adapt(base, "lwf", lora_dropout=0.3)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    given, heard = batch(), []
    method = methods_of(model)["default"]
    clock = Clock(model, sgd(model))
    method.teacher.compare = lambda hidden, tuned, base: heard.append((tuned, base)) or hidden
    clock.begin_step()
    model.train()(**given, use_cache=cached)
    clock.close()
    counted = F.pad(given.pop("labels")[:, 1:] != -100, (0, 1))
    with torch.no_grad(), model.eval().disable_adapter():
        expected = model(**given, output_hidden_states=True).hidden_states[-1][counted]
    (tuned, asked) = heard[0]
    torch.testing.assert_close(asked, expected)
    assert not torch.allclose(tuned, expected, atol=1e-3)


def test_a_scaled_loss_scales_it_too():
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        model = sharp()
        clock = Clock(model, sgd(model), scaler=scaler)
        clock.begin_step()
        (0 * model(**batch()).logits.sum()).backward()
        clock.close()
        found.append([parameter.grad for parameter in trained(model)])
    for plain_gradient, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, 8 * plain_gradient)


def state_of(model):
    """Hooks, modes and what is trained."""
    modules = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    switches = [m._disable_adapters for m in model.modules() if hasattr(m, "_disable_adapters")]
    return modules, switches, [p.requires_grad for p in model.parameters()]


def test_nothing_is_left_on_the_model_even_by_a_broken_step():
    model = sharp()
    before = state_of(model)
    gradients(model, [batch()])
    assert state_of(model) == before
    clock = Clock(model, sgd(model))
    clock.begin_step()
    assert state_of(model) != before
    methods_of(model)["default"].teacher.compare = None
    with pytest.raises(TypeError):
        model(**batch())
    assert state_of(model)[1:] == before[1:]
    clock.close()
    assert state_of(model) == before
    model.train()(**batch()).loss.backward()  # outside of a step nobody is asked
    model.unload()


# --- what is refused ------------------------------------------------------------------------------------------------


def test_labels_are_needed():
    model = sharp()
    clock = Clock(model, sgd(model))
    clock.begin_step()
    with pytest.raises(UserError, match=r"^the model was given no labels, .*pass labels to it in training.*\.$"):
        model(input_ids=batch()["input_ids"])
    clock.close()


def test_a_base_that_is_trained_is_no_base():
    model = adapt(pico.build("llava")[0], "lwf")
    projector = model.get_base_model().model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(UserError, match=r"^model\.multi_modal_projector\.\S+ of the base is being trained, .*\.$"):
        Clock(model, torch.optim.SGD(trained(model)))
    projector.requires_grad_(False)
    Clock(model, torch.optim.SGD(trained(model))).close()


def test_a_model_without_a_head_is_refused():
    model = get_peft_model(pico.build("llama")[0].model, LwFConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"^LlamaModel shows no language head of its own"):
        Clock(model, sgd(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "at least 0; got -1.0"),
        ({"weight": math.nan}, "got nan"),
        ({"temperature": 0.0}, "temperature is above 0; got 0.0"),
        ({"temperature": math.inf}, "got inf"),
        ({"init_lora_weights": "pissa"}, "does not support init_lora_weights='pissa'"),
        ({"use_dora": True}, "does not support use_dora"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=r"^[^\n]*\.$") as error:
        LwFConfig(**settings)
    assert message in str(error.value)
