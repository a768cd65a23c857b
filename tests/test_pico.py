"""The pico models are what the other tests stand on: each builds, learns, answers and comes back from disk."""

from __future__ import annotations

import importlib.util
import json

import pico
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="this family's processor needs torchvision"
)
ALL = [
    pytest.param(name, marks=needs_torchvision if name in pico.WITH_TORCHVISION else ())
    for name in {**pico.FAMILIES, **pico.WITH_TORCHVISION}
]


def batch(processor, n=2, answers=True):
    """``n`` pictures with their questions, and with their answers unless they are to be generated."""
    chats = []
    for i in range(n):
        question = [{"type": "image", "image": pico.picture(i)}, {"type": "text", "text": pico.QUESTIONS["color"]}]
        answer = [{"type": "text", "text": pico.facts(i)["color"]}]
        chats.append([{"role": "user", "content": question}])
        if answers:
            chats[-1].append({"role": "assistant", "content": answer})
    return processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not answers,
        processor_kwargs={"padding": True},
    )


@pytest.mark.parametrize("name", ALL)
def test_forward_and_backward(name):
    model, processor = pico.build(name)
    inputs = batch(processor)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    assert 4 < loss.item() < 9  # about ln(vocab): it knows nothing
    silent = [
        weight_name
        for weight_name, weight in model.named_parameters()
        if "vision" not in weight_name
        and "visual" not in weight_name
        and (weight.grad is None or not weight.grad.any())
    ]
    assert silent == []
    assert sum(weight.numel() for weight in model.parameters()) < 400_000


@pytest.mark.parametrize("name", ALL)
def test_the_picture_reaches_the_answer(name):
    model, processor = pico.build(name)
    inputs = batch(processor, n=1)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1).contiguous() + 0.5}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits[:, -1], model(**other).logits[:, -1])


@pytest.mark.parametrize("name", ALL)
def test_generates(name):
    model, processor = pico.build(name)
    inputs = batch(processor, answers=False)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2
    assert inputs["input_ids"].shape[1] < out.shape[1] <= inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("name", ALL)
def test_reloads(name, pico_folder):
    model, processor = pico.build(name)
    again = AutoModelForImageTextToText.from_pretrained(pico_folder(name))
    inputs, inputs_again = batch(processor), batch(AutoProcessor.from_pretrained(pico_folder(name)))
    assert sorted(inputs) == sorted(inputs_again)
    for key, value in inputs.items():  # torchvision, where it is installed, rounds a resized pixel another way
        torch.testing.assert_close(torch.as_tensor(inputs_again[key]), torch.as_tensor(value), atol=0.05, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("name", ALL)
def test_generation_markers_cover_the_answer_alone(name):
    tok = pico.build(name)[1].tokenizer
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    out = tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    answer = [token for token, mine in zip(out["input_ids"], out["assistant_masks"], strict=True) if mine]
    assert tok.decode(answer) == "red<eos>"


def test_llama(tmp_path):
    model, tok = pico.build("llama")
    inputs = tok("red green", return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    folder = pico.save("llama", tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, again(**inputs).logits)
    assert AutoTokenizer.from_pretrained(folder)("red green").input_ids == inputs["input_ids"][0].tolist()


def test_seeds():
    same, twin, other = (pico.build("llava", seed)[0].lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(same, twin)
    assert not torch.equal(same, other)


def test_data(tmp_path):
    path = pico.write_data(tmp_path, n=16, tasks=("color", "shape", "side"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 48
    assert rows[0] == {
        "image": "images/0.png",
        "question": "What color is the shape?",
        "answer": "red",
        "task": "color",
    }
    with Image.open(path.parent / rows[0]["image"]) as image:
        assert image.size == (48, 32)
    assert len({pico.picture(i).tobytes() for i in range(16)}) == 16
