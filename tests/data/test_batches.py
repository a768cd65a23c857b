"""Batches: only the answer is learned, pictures and texts mix, and TRL's trainer takes them as they are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pico
import pytest
import torch
import transformers as hf
from PIL import Image
from torch.utils.data import DataLoader
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from trl import SFTConfig, SFTTrainer

from lorasculpt.adapters.tasks import TaskCollator
from lorasculpt.data.batches import IGNORED, Collator, prompt_text, rows
from lorasculpt.data.records import Record, read
from lorasculpt.errors import UserError

USER = {"role": "user", "content": "What color is the shape?"}
TEXT = Record((USER,), "yes it is", task="talk")


@pytest.fixture
def records(data: Path) -> list[Record]:
    """Two pictures, then a text."""
    return [*read(data, limit=2), TEXT]


def learned(batch: dict[str, torch.Tensor], processor) -> list[str]:
    tokenizer = getattr(processor, "tokenizer", processor)
    return [tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]


def paligemma() -> hf.PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    return hf.PaliGemmaProcessor(images, pico.tokenizer(["<image>"], image_token="<image>"))


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_hold_paths_messages_and_tasks(records: list[Record]) -> None:
    data = rows(records)
    assert data[0] == {
        "prompt": [USER],
        "completion": [{"role": "assistant", "content": "red"}],
        "images": [str(records[0].images[0])],
        "task": "color",
    }
    assert data[2]["images"] == []


def test_rows_without_any_picture_have_no_column_of_pictures() -> None:
    assert rows([TEXT]).column_names == ["prompt", "completion", "task"]


# --- vision-language models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_only_the_answer_is_learned_in_every_mixture(family: str, records: list[Record]) -> None:
    model, processor = pico.build(family)
    collate = Collator(processor)
    data = rows(records)
    for picked in ([0, 1, 2], [0, 1], [2, 0], [2, 2]):
        batch = collate([data[i] for i in picked])
        assert learned(batch, processor) == [f"{records[i].answer}<eos>" for i in picked]
        assert ("pixel_values" in batch) == any(records[i].images for i in picked)
        assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_a_prompt_is_asked_as_it_was_trained(family: str, records: list[Record]) -> None:
    _, processor = pico.build(family)
    for record in records[1:]:
        (ids,), (labels,) = (
            Collator(processor)([rows(records)[records.index(record)]])[k] for k in ("input_ids", "labels")
        )
        images = [[pico.picture(1)]] if record.images else None
        text = [prompt_text(processor, record.prompt, len(record.images))]
        asked = processor(images=images, text=text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        assert torch.equal(ids[labels == IGNORED], asked)


def test_pictures_that_are_open_already_are_taken(records: list[Record]) -> None:
    _, processor = pico.build("llava")
    row = rows(records)[0]
    opened = {**row, "images": [Image.open(row["images"][0])]}
    assert torch.equal(Collator(processor)([row])["pixel_values"], Collator(processor)([opened])["pixel_values"])


def test_the_rows_are_left_as_they_were(records: list[Record]) -> None:
    _, processor = pico.build("llava")
    row = rows(records)[0]
    before = json.dumps(row)
    Collator(processor)([row])
    assert json.dumps(row) == before


@pytest.mark.parametrize("family", [*pico.FAMILIES, "llama"])
def test_a_process_that_is_not_a_copy_of_this_one_collates_as_this_one(family: str, records: list[Record]) -> None:
    collate = TaskCollator(Collator(pico.build(family)[1]), ["color", "talk"])
    given = [rows(records if family != "llama" else [TEXT])[0]]
    here, there = collate(given), pickle.loads(pickle.dumps(collate))(given)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on every fork
def test_a_worker_tells_it_in_the_same_words(records: list[Record]) -> None:
    collate = TaskCollator(Collator(pico.build("llava")[1]), ["color", "shape"])
    told = []
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            list(DataLoader([rows(records)[2]], collate_fn=collate, num_workers=workers))
        told.append(str(error.value))
    assert told[0] == told[1]
    assert "has the unknown task 'talk'" in told[0]


# --- text-only models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_pads_on_its_own_side(side: str) -> None:
    model, tokenizer = pico.build("llama")
    tokenizer.padding_side = side
    data = rows([TEXT, Record((USER,), "no", task="talk")])
    batch = Collator(tokenizer)([data[0], data[1]])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert learned(batch, tokenizer) == ["yes it is<eos>", "no<eos>"]
    assert batch["attention_mask"][1, 0 if side == "left" else -1] == 0
    assert batch["attention_mask"][0].all()
    assert model(**batch).loss.isfinite()


def test_pictures_for_a_text_only_model_are_refused(records: list[Record]) -> None:
    _, tokenizer = pico.build("llama")
    with pytest.raises(UserError, match="reads text only but the data have images"):
        Collator(tokenizer)([rows(records)[0]])


@pytest.mark.parametrize("family", ["llava", "llama"])
def test_a_base_model_without_a_chat_template_is_refused(family: str) -> None:
    _, processor = pico.build(family)
    processor.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Collator(processor)
    with pytest.raises(UserError, match="no chat template"):
        prompt_text(processor, TEXT.prompt)


# --- PaliGemma ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, pico.CHAT.replace("IMAGE", "<image>")])
def test_paligemma_learns_its_suffix(records: list[Record], template: str | None) -> None:
    processor = paligemma()
    processor.chat_template = template
    data = rows(records)
    batch = Collator(processor)([data[0], data[1]])
    assert learned(batch, processor) == ["red<eos>", "green<eos>"]
    assert ((batch["labels"] != IGNORED) == batch["token_type_ids"].bool()).all()
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 4]


def test_paligemma_needs_a_picture() -> None:
    with pytest.raises(UserError, match="PaliGemma needs a picture with every question; 'What color"):
        Collator(paligemma())([rows([TEXT])[0]])


# --- TRL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "picked"), [("llava", [0, 1, 2]), ("idefics3", [0, 1, 2]), ("llava", [2]), ("llama", [2])]
)
def test_trl_trains_on_rows(tmp_path: Path, records: list[Record], family: str, picked: list[int]) -> None:
    model, processor = pico.build(family)
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=rows([records[i] for i in picked]),
        data_collator=Collator(processor),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
