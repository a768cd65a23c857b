"""The drift is KL(base || tuned), on the text's own tokens, against one written out in numpy; faults are seen."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pico
import pytest
import torch
from contract import CASES, start, texts, train, trained
from peft import LoraConfig, get_peft_model

from lorasculpt import UserError
from lorasculpt.adapters.update import UpdateConfig, known_tasks
from lorasculpt.evaluation import strength
from lorasculpt.evaluation.drift import (
    SAMPLED,
    Prompt,
    base_of,
    divergences,
    drift,
    per_token,
    read_prompts,
    self_prompts,
)
from lorasculpt.evaluation.prompts import chat, encode

ONLY_LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"


def sharp():
    """The tiny VLM with opinions: fresh weights find all tokens alike, and KL the same in both directions."""
    base, processor = pico.build("llava")
    with torch.no_grad():
        base.lm_head.weight.mul_(10)
    return base, processor


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny VLM with an adapter that does something, its processor, and texts of different lengths."""
    base, processor = sharp()
    pictures = [pico.write_data(tmp_path_factory.mktemp("data"), n=2).parent / f"images/{i}.png" for i in range(2)]
    prompts = self_prompts(base, processor, 6, images=pictures, max_new_tokens=9)
    prompts = [Prompt(prompt.record, prompt.tokens[: 3 + i]) for i, prompt in enumerate(prompts)]
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules=ONLY_LANGUAGE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.train(), processor, prompts


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(model, processor, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of base and tuned at every position of one text alone, without padding, in float64."""
    model.eval()
    inputs = encode(model, processor, [prompt.record], [chat(processor, prompt.record)])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([prompt.tokens])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        whole = model(**inputs).logits[0].double().numpy()
        with strength(model, 0):
            base = model(**inputs).logits[0].double().numpy()
    model.train()
    return log_softmax(base), log_softmax(whole)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (np.exp(p) * (p - q)).sum(-1)


def test_it_is_the_kl_written_out_in_numpy(tuned):
    model, processor, prompts = tuned
    pairs = [by_hand(model, processor, prompt) for prompt in prompts]
    # from the position before the text's first token to that before its last
    own = [slice(-len(prompt.tokens) - 1, -1) for prompt in prompts]
    right = [kl(base[part], whole[part]).sum() for (base, whole), part in zip(pairs, own, strict=True)]
    lengths = [len(prompt.tokens) for prompt in prompts]
    assert len(set(lengths)) == len(lengths)
    for batch in (1, 4):  # with the padding of unequal texts and without
        found = divergences(model, processor, prompts, batch=batch)
        np.testing.assert_allclose(found, right, rtol=1e-4)
    answer = drift(model, processor, prompts)
    assert answer["value"] == pytest.approx(sum(right) / sum(lengths), rel=1e-4)
    assert answer["n"] == 6
    assert answer["interval"][0] < answer["value"] < answer["interval"][1]

    # what would be found by mistake lies far from it
    reverse = [kl(whole[part], base[part]).sum() for (base, whole), part in zip(pairs, own, strict=True)]
    with_prompt = [kl(base[:-1], whole[:-1]).sum() for base, whole in pairs]
    shifted = [kl(base[-n:], whole[-n:]).sum() for (base, whole), n in zip(pairs, lengths, strict=True)]
    for wrong in (reverse, with_prompt, shifted, np.array(right) * max(lengths) / lengths):
        assert not np.allclose(wrong, right, rtol=1e-2)


def test_the_base_has_none_and_more_strength_has_more(tuned):
    model, processor, prompts = tuned
    values = []
    for value in (0, 0.25, 1):
        with strength(model, value):
            values.append(drift(model, processor, prompts)["value"])
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[0] < values[1] < values[2]


def test_of_many_accelerators_only_those_of_the_model_are_asked_for_their_random_state(tuned, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(devices) or nullcontext())
    self_prompts(*tuned[:2], 1)
    assert asked == [set()]  # it lies on the CPU, whose state is always kept


def test_nothing_is_left_changed(tuned):
    model, processor, prompts = tuned
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    again = [drift(model, processor, prompts) for _ in range(2)]
    self_prompts(model, processor, 2)
    assert again[0] == again[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert model.training
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt), base_of(model):
        raise KeyboardInterrupt
    assert not frozen.requires_grad
    frozen.requires_grad_(True)


def test_texts_are_the_bases_own_and_kept(tuned, tmp_path):
    model, processor, prompts = tuned
    images = [prompt.record.images[0] for prompt in prompts if prompt.record.images]
    made = self_prompts(model, processor, 4, images=images, path=tmp_path / "drift.jsonl")
    base, _ = sharp()
    assert self_prompts(base, processor, 4, images=images) == made  # with the adapter off
    assert self_prompts(base, processor, 4, seed=1, images=images) != made
    assert [len(prompt.record.images) for prompt in made] == [0, 1, 0, 1]
    kept = read_prompts(tmp_path / "drift.jsonl")
    assert [prompt.tokens for prompt in kept] == [prompt.tokens for prompt in made]
    assert [prompt.record.images for prompt in kept] == [prompt.record.images for prompt in made]
    assert str(tmp_path) not in (tmp_path / "drift.jsonl").read_text()
    assert self_prompts(base, processor, 4, seed=9, path=tmp_path / "drift.jsonl") == kept  # not sampled again
    assert len(self_prompts(base, processor, 3, path=tmp_path / "drift.jsonl")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["drift.jsonl"]
    assert (SAMPLED["do_sample"], SAMPLED["temperature"], SAMPLED["top_k"]) == (True, 1.0, 0)


def test_no_text_holds_the_mark_of_a_picture_however_likely_it_is():
    base, processor = pico.build("llava")
    mark = processor.tokenizer.convert_tokens_to_ids("<image>")

    def prefer(head, inputs, logits):
        logits[..., mark] += 50
        return logits

    base.get_output_embeddings().register_forward_hook(prefer)
    assert all(mark not in prompt.tokens for prompt in self_prompts(base, processor, 2, max_new_tokens=3))


def test_longer_texts_count_for_more():
    found = per_token(np.array([1.0, 8.0]), np.array([1, 4]))
    assert found["value"] == pytest.approx(9 / 5)
    assert found["interval"] == [1.0, 2.0]
    assert per_token(np.zeros(5), np.ones(5))["interval"] == [0.0, 0.0]  # no adapter, no doubt


@pytest.mark.parametrize("method", [name for name, row in CASES.items() if issubclass(row.config, UpdateConfig)])
def test_methods_that_change_the_forward_pass(method):
    model, processor = start("llama", method)
    train(model, [texts(size=2)] * 2, torch.optim.AdamW(trained(model), lr=0.05))
    trainable = trained(model)
    prompts = self_prompts(model, processor, 3, max_new_tokens=3)
    assert prompts == self_prompts(pico.build("llama")[0], processor, 3, max_new_tokens=3)
    known = known_tasks(model)
    options = {"as_task": known[0] if known else None}
    assert drift(model, processor, prompts, **options)["value"] > 1e-6
    with strength(model, 0):
        assert drift(model, processor, prompts, **options)["value"] == pytest.approx(0, abs=1e-6)
    assert [id(parameter) for parameter in trained(model)] == [id(parameter) for parameter in trainable]
    if known:
        with pytest.raises(UserError, match=r"text 1 of the drift.*evaluate.as_task"):
            drift(model, processor, prompts)


@pytest.mark.parametrize(
    "line", ["{", '{"question": "?", "images": []}', '{"question": "?", "images": [], "tokens": []}', '"words"']
)
def test_a_broken_file_is_told_with_its_line(tmp_path, line):
    path = tmp_path / "drift.jsonl"
    good = json.dumps({"question": "?", "images": [], "answer": "a", "tokens": [5]})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=r"drift.jsonl:2.*delete the file"):
        read_prompts(path)


def test_no_texts_and_no_base():
    base, processor = pico.build("llama")
    with pytest.raises(UserError, match="at least one text"):
        self_prompts(base, processor, 0)
    prompts = self_prompts(base, processor, 2, max_new_tokens=2)
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="moved the base weights"):
        drift(model, processor, prompts)
