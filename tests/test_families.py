"""Every method on every family: three steps of fine-tuning, an answer, a saved adapter that answers the same."""

from __future__ import annotations

import json

import pico
import pytest
import torch
from contract import CASES, TASKS, inputs, logits, sft
from pico import OTHERS, WITH_TORCHVISION

import lorasculpt
from lorasculpt.adapters.update import context_of
from lorasculpt.data.batches import Collator, rows
from lorasculpt.data.records import read

FAMILIES = [*dict.fromkeys([*pico.FAMILIES, *WITH_TORCHVISION]), "paligemma"]
assert "paligemma" in OTHERS


def as_messages(row: dict[str, str]) -> dict:
    """``row`` in the layout that chats are kept in."""
    asked = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    told = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["answer"]}]
    return {"messages": told, "images": [row["image"]], "task": row["task"]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Four questions in each of two layouts."""
    plain = pico.write_data(tmp_path_factory.mktemp("asked"), 4)
    chats = plain.with_name("chats.jsonl")
    lines = plain.read_text().splitlines()
    chats.write_text("".join(json.dumps(as_messages(json.loads(line))) + "\n" for line in lines))
    return {"question": read(plain), "messages": read(chats)}


@pytest.fixture
def asked(written, family):
    return written["messages" if family == "paligemma" else "question"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CASES)
def test_it_learns_answers_and_comes_back(method, family, asked, tmp_path):
    if family in WITH_TORCHVISION and family not in pico.FAMILIES:
        pytest.skip("this family's processor needs torchvision")
    run = sft(tmp_path, method, family, asked, max_steps=3, save_strategy="no", learning_rate=5e-2)
    run.train()
    model, processor = run.model.eval(), run.processing_class
    batch = Collator(processor)(list(rows(asked[:2])))
    found = logits(model, batch)
    assert not torch.equal(found, logits(pico.build(family)[0], batch))

    task = {"task": TASKS[0]} if context_of(model) else {}
    prompt = {key: value for key, value in Collator(processor)([rows(asked)[0]]).items() if key != "labels"}
    length = prompt["input_ids"].shape[1]
    assert model.generate(**prompt, **task, max_new_tokens=3, do_sample=False).shape[1] > length

    model.save_pretrained(tmp_path / "adapter")
    again = lorasculpt.load(pico.build(family)[0], tmp_path / "adapter", adapter="again").eval()
    assert torch.equal(logits(again, batch), found)
    assert inputs(again, batch).keys() == inputs(model, batch).keys()
