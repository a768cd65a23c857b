"""The switch from task to task: what stays as it is, what jumps, what comes back from a file, what is refused."""

from __future__ import annotations

import json

import pico
import pytest
import torch
from contract import adapt, logits, loss, start, texts, train, trained, weights
from peft import LoraConfig, get_peft_model
from torch import nn

import lorasculpt
from lorasculpt import LoRASculptConfig, UserError, add_task
from lorasculpt.adapters.update import updates

SELECTORS = ("all", "new")


def learn(model, steps: int = 3) -> None:
    """Some steps whose optimizer would move whatever it holds."""
    train(model, [texts()] * steps, torch.optim.AdamW(trained(model), lr=2e-2, weight_decay=0.5))


def first(**settings):
    """A model that has learned its first task."""
    model, _ = start("llama", "am_lora", tasks=["one"], **settings)
    learn(model)
    return model


def answers(model) -> torch.Tensor:
    return logits(model.eval(), {"input_ids": texts()[0]["input_ids"]})


@pytest.mark.parametrize("selector", SELECTORS)
def test_what_was_learned_stays_bit_for_bit_while_the_next_task_is_trained(selector):
    model = first(selector=selector)
    learned = weights(model)
    for number, task in enumerate(["two", "three"]):
        before = weights(model)
        add_task(model, task)
        assert model.peft_config["default"].tasks[-1] == task
        learn(model)
        after = weights(model)
        for name in updates(model):
            for key in ("A", "B"):
                assert torch.equal(after[f"{name}.{key}_old"][0], learned[f"{name}.{key}"])
                assert torch.equal(after[f"{name}.{key}_old"][-1], before[f"{name}.{key}"])
                assert not torch.equal(after[f"{name}.{key}"], before[f"{name}.{key}"])
            assert after[f"{name}.A_old"].shape[0] == number + 1
            if selector == "new":
                assert torch.equal(after[f"{name}.v_old"][-1:], before[f"{name}.v"])
            else:
                assert not torch.equal(after[f"{name}.v"][:-1], before[f"{name}.v"])


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_comes_back_bit_for_bit(selector, dtype, tmp_path):
    base = pico.build("llama")[0].to(dtype)
    model = adapt(base, "am_lora", tasks=["one"], selector=selector)
    learn(model)
    add_task(model, "two")
    learn(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tasks"] == ["one", "two"]
    for trainable in (True, False):
        again = lorasculpt.load(pico.build("llama")[0].to(dtype), tmp_path, trainable=trainable)
        assert again.peft_config["default"].tasks == ["one", "two"]
        found, expected = weights(again), weights(model)
        assert all(torch.equal(found[key], value) and value.dtype == torch.float32 for key, value in expected.items())
        assert torch.equal(answers(again), answers(model))
        add_task(again, "three")
        for name, parameter in again.named_parameters():
            assert parameter.requires_grad == (trainable and "lora_" in name and not name.endswith("_old"))


def test_the_jump_in_a_model_is_that_of_its_first_lora_at_half_its_strength():
    """With heads at 0 every layer's LoRA counts half: by (5), measured on the answers of the whole model."""
    model = first()
    for update in updates(model).values():
        nn.init.zeros_(update.v)
        nn.init.zeros_(update.c)
    before = answers(model)
    with model.disable_adapter():
        base = answers(model)
    add_task(model, "two")
    for update in updates(model).values():
        nn.init.zeros_(update.v)
    after = answers(model)
    for update in updates(model).values():
        update.scaling *= 2
    torch.testing.assert_close(answers(model), before, rtol=1e-4, atol=1e-5)
    jump = float((after - before).norm() / (before - base).norm())
    assert 0.3 < jump < 0.7


def stock(folder, base, **settings):
    """A LoRA trained with stock PEFT, saved in ``folder``."""
    targets = adapt(pico.build("llama")[0], "am_lora").peft_config["default"].target_modules
    model = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": targets} | settings))
    optimizer = torch.optim.AdamW(trained(model), lr=2e-2)
    for batch in texts(number=3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=["plain", "rslora"])
def test_a_lora_of_stock_peft_joins(settings, tmp_path):
    expected = answers(stock(tmp_path, pico.build("llama")[0], **settings))
    model = start("llama", "am_lora", tasks=["mine"])[0]
    newest = weights(model)
    add_task(model, "theirs", tmp_path)
    assert model.peft_config["default"].tasks == ["theirs", "mine"]
    for update in updates(model).values():
        assert torch.equal(update.A, newest[f"{update.place.name}.A"])
        update.c.data[0] = 1e4  # all attention to theirs
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-5)
    theirs = weights(model)
    learn(model)
    add_task(model, "more")
    learn(model)
    found = weights(model)
    for name in updates(model):
        assert torch.equal(found[f"{name}.B_old"][0], theirs[f"{name}.B_old"][0])
        assert len(found[f"{name}.B_old"]) == 2


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"r": 3}, "the same r"),
        ({"target_modules": ["q_proj"]}, "the same target_modules"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "holds more than a LoRA"),
        ({"init_lora_weights": "pissa"}, "other base weights"),
        ({"init_lora_weights": "OLoRA"}, "other base weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lora_that_does_not_fit_is_refused_and_nothing_changes(settings, part, tmp_path):
    stock(tmp_path, pico.build("llama")[0], **settings)
    model = first()
    before = weights(model)
    with pytest.raises(UserError, match=part):
        add_task(model, "theirs", tmp_path)
    assert model.peft_config["default"].tasks == ["one"]
    assert before.keys() == weights(model).keys()
    assert all(torch.equal(before[key], value) for key, value in weights(model).items())


def test_a_switch_that_makes_no_sense_is_refused(tmp_path):
    model = start("llama", "am_lora", tasks=["one"], selector="new")[0]
    for name in ("one", ""):
        with pytest.raises(UserError, match="a name of its own"):
            add_task(model, name)
    with pytest.raises(UserError, match="holds no adapter"):
        add_task(model, "two", tmp_path / "nowhere")
    stock(tmp_path, pico.build("llama")[0])
    with pytest.raises(UserError, match="selector"):
        add_task(model, "two", tmp_path)
    with pytest.raises(UserError, match="learns tasks one after the other"):
        add_task(model, "two", adapter="other")
    sculpted = get_peft_model(pico.build("llama")[0], LoRASculptConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="is of the method lorasculpt"):
        add_task(sculpted, "two")
    with pytest.raises(UserError, match="none of this library's"):
        add_task(pico.build("llama")[0], "two")
