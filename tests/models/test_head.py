"""Only answers go through the head: the loss and every gradient are those of all tokens, in three families."""

from __future__ import annotations

import pico
import pytest
import torch
from contract import batches, records, texts
from peft import get_peft_model
from torch.nn import functional as F
from trl.trainer.utils import add_fused_lm_head

from lorasculpt import Clock, LoRASculptConfig, LwFConfig
from lorasculpt.models.head import answers_alone
from lorasculpt.models.parts import target_regex


def adapted(family: str, config, folder):
    """A model with TRL's head and an adapter that has learned something; its base, and a batch of questions."""
    base, processor = pico.build(family)
    add_fused_lm_head(base)
    torch.manual_seed(0)
    model = get_peft_model(base, config(r=2, target_modules=target_regex(base, "language")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    if family == "llama":
        batch = texts(length=7)[0]
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, :3] = batch["labels"][1, 5:] = -100
    else:
        batch = batches(processor, records(folder, 2), 2)[0]
    return model.train(), base, batch


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_loss_and_gradients_are_those_of_all_tokens(family, tmp_path):
    model, base, batch = adapted(family, LoRASculptConfig, tmp_path)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1].double()
    naive = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    naive.backward()
    expected, count = gradients(model), int((batch["labels"][:, 1:] != -100).sum())
    assert 0 < count < logits.shape[0] * logits.shape[1]  # there is something to leave out
    with answers_alone(base):
        found = model(**batch, fused_lm_head=True)
        found.loss.backward()
    assert found.log_probs.shape == (1, count)
    assert found.label_mask.all()
    torch.testing.assert_close(found.loss.double(), naive, rtol=1e-5, atol=0)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    assert model(**batch, fused_lm_head=True).log_probs.shape == logits.shape[:2]  # and it is over


def test_other_passes_are_left_alone(tmp_path):
    model, base, batch = adapted("llava", LoRASculptConfig, tmp_path)
    with answers_alone(base), torch.no_grad():
        assert model(**batch, fused_lm_head=True).log_probs.shape == batch["labels"][:, 1:].shape
        whole = model(**batch).logits
    with answers_alone(base):
        torch.testing.assert_close(model(**batch).logits, whole)


def test_a_batch_without_answers_has_no_loss_and_no_gradient(tmp_path):
    model, base, batch = adapted("llava", LoRASculptConfig, tmp_path)
    with answers_alone(base):
        loss = model(**batch | {"labels": torch.full_like(batch["labels"], -100)}, fused_lm_head=True).loss
    loss.backward()
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_teacher_beside_it_teaches_the_same(family, tmp_path):
    """The base is run within the forward pass, over all tokens, whether they are left out later or not."""

    def taught(alone: bool) -> dict[str, torch.Tensor]:
        model, base, batch = adapted(family, LwFConfig, tmp_path)
        clock = Clock(model, torch.optim.SGD(model.parameters(), lr=0.0), total_steps=2)

        def step():
            clock.begin_step()
            model(**batch, fused_lm_head=True).loss.backward()

        if alone:
            with answers_alone(base):
                step()
        else:
            step()
        found = gradients(model)
        clock.end_step()
        return found

    expected, got = taught(False), taught(True)
    assert any(gradient.any() for gradient in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
