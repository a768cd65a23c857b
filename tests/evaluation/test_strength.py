"""Strength 0 is the base, 1 the adapter, and afterwards nothing has changed."""

from __future__ import annotations

from contextlib import suppress

import pico
import pytest
import torch
from contract import CASES, start, texts, train, trained
from contract import logits as answers
from peft import LoraConfig, get_peft_model

from lorasculpt.adapters.update import UpdateConfig, UpdateLayer, updates
from lorasculpt.data.records import Record
from lorasculpt.evaluation import Task, curve, strength
from lorasculpt.models.parts import target_regex

ONLY_LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"


def tuned(**options):
    """A tiny VLM with an adapter that does something, and its logits for one text."""
    base, processor = pico.build("llava")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=ONLY_LANGUAGE, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model, processor


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(4, 12)[None]).logits


def scalings(model) -> list[float]:
    return [
        module.scaling["default"]
        for module in model.modules()
        if hasattr(module, "scaling") and "default" in getattr(module, "lora_A", {})
    ]


def test_ends():
    model, _ = tuned()
    whole = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert not torch.allclose(whole, base, atol=1e-3)
    with strength(model, 0):
        assert torch.equal(logits(model), base)
    with strength(model, 1):
        assert torch.equal(logits(model), whole)
    with strength(model, 0.5):
        half = logits(model)
    assert not torch.allclose(half, base, atol=1e-3)
    assert not torch.allclose(half, whole, atol=1e-3)


def test_restores_exactly_and_nests():
    model, _ = tuned(lora_alpha=7)
    before = scalings(model)
    with suppress(KeyboardInterrupt), strength(model, 0.3):
        with strength(model, 0):
            assert set(scalings(model)) == {0}
        assert scalings(model) == [value * 0.3 for value in before]
        with strength(model, 0.5):
            assert scalings(model) == pytest.approx([value * 0.15 for value in before])
        raise KeyboardInterrupt
    assert scalings(model) == before


def test_only_active_adapters():
    model, _ = tuned()
    model.add_adapter("other", LoraConfig(r=2, target_modules=ONLY_LANGUAGE))
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    with strength(model, 0.5):
        assert (layer.scaling["default"], layer.scaling["other"]) == (1.0, 4.0)


def test_fully_trained_modules():
    model, _ = tuned(modules_to_save=["multi_modal_projector"])
    wrapper = model.base_model.model.model.multi_modal_projector
    copy, original = wrapper.modules_to_save["default"], wrapper.original_module
    trained = {name: value.clone() for name, value in copy.state_dict().items()}
    with strength(model, 0):
        assert all(torch.equal(copy.state_dict()[name], value) for name, value in original.state_dict().items())
    with strength(model, 0.5), strength(model, 0.5):
        quarter = original.linear_1.weight * 0.75 + trained["linear_1.weight"] * 0.25
        assert torch.allclose(copy.linear_1.weight, quarter, atol=1e-6)
    assert all(torch.equal(copy.state_dict()[name], value) for name, value in trained.items())


def test_refuses():
    base, _ = pico.build("llava")
    with pytest.raises(ValueError, match="no adapter"), strength(base, 0.5):
        pass
    model, _ = tuned(use_dora=True)
    with pytest.raises(ValueError, match="not a multiple"), strength(model, 0.5):
        pass
    model, _ = tuned()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), strength(model, 0.5):
        pass


UPDATES = [name for name, row in CASES.items() if issubclass(row.config, UpdateConfig)]


@pytest.mark.parametrize("method", UPDATES)
def test_methods_that_change_the_forward_pass(method):
    """On the output of one linear what the adapter adds is halved; a router further on sees what comes of that."""
    model = start("llama", method)[0]
    train(model, [texts(size=2)] * 2, torch.optim.AdamW(trained(model), lr=0.05))
    batch = texts(size=2)[0]
    seen: list[torch.Tensor] = []
    layer = next(module for module in model.modules() if isinstance(module, UpdateLayer))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        found = answers(model, batch)
        return found, seen[-1]

    whole, added = outputs()
    with model.disable_adapter():
        base, without = outputs()
    assert not torch.allclose(whole, base, atol=1e-3)
    with strength(model, 0):
        assert torch.equal(outputs()[0], base)
    with strength(model, 1):
        assert torch.equal(outputs()[0], whole)
    with suppress(KeyboardInterrupt), strength(model, 0.5):
        torch.testing.assert_close(outputs()[1], (added + without) / 2, rtol=1e-5, atol=1e-6)
        with strength(model, 0.5):
            torch.testing.assert_close(outputs()[1], 0.25 * added + 0.75 * without, rtol=1e-5, atol=1e-6)
        raise KeyboardInterrupt
    assert torch.equal(outputs()[0], whole)
    assert not any(update._forward_hooks for update in updates(model).values())


def test_of_several_adapters_that_change_the_forward_pass_only_the_active_ones():
    model = start("llama", "mixlora")[0]
    model.add_adapter("other", CASES["mixlora"](target_modules=target_regex(model, "language")))
    for name in ("default", "other"):
        for update in updates(model, name).values():
            torch.nn.init.normal_(update.B)
    model.set_adapter("other")
    batch = texts(size=2)[0]
    with strength(model, 0):
        model.set_adapter("default")
        whole = answers(model, batch)
    assert torch.equal(answers(model, batch), whole)
    with strength(model, 0.5):
        assert not torch.allclose(answers(model, batch), whole, atol=1e-3)


def test_curve():
    model, processor = tuned()
    question = Record(({"role": "user", "content": "yes?"},), "yes")
    points = curve(model, processor, [Task("a", (question,))], [Task("b", (question,))], (0.5,), max_new_tokens=2)
    assert [point["strength"] for point in points] == [0.5]
    low, high = points[0]["source_interval"]
    assert low <= points[0]["source"] <= high
