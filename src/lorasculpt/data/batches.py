"""Records to training batches: a data set of paths and texts, and the collator that opens, tokenises and labels.

The loss falls on the answer alone. Everything is rendered when a batch is made, so a picture is in memory only while
its batch is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch import Tensor
from transformers import PaliGemmaProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..errors import UserError
from .images import open_image
from .records import MARK, Record

IGNORED = -100  # a label that the loss skips
_MESSAGES = List({"role": Value("string"), "content": Value("string")})


def rows(records: Sequence[Record]) -> Dataset:
    """``records`` in the shape that TRL's ``SFTTrainer`` and `Collator` take.

    Columns: ``prompt`` and ``completion`` (lists of messages), ``task`` (name), and ``images`` (lists of paths) if any
    record has a picture: TRL refuses that column for a model that reads text only. Train with
    ``SFTConfig(remove_unused_columns=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})``.
    """
    columns: dict[str, list] = {
        "prompt": [list(record.prompt) for record in records],
        "completion": [[{"role": "assistant", "content": record.answer}] for record in records],
        "task": [record.task for record in records],
    }
    features = {"prompt": _MESSAGES, "completion": _MESSAGES, "task": Value("string")}
    if any(record.images for record in records):
        columns["images"] = [[str(path) for path in record.images] for record in records]
        features["images"] = List(Value("string"))
    return Dataset.from_dict(columns, features=Features(features))


def prompt_text(processor: Any, messages: Sequence[Mapping[str, Any]], images: int = 0) -> str:
    """The text of ``messages`` up to where the answer begins, with the marks of ``images`` pictures before the first
    question: what the model is trained on, and therefore what it must be asked with.

    Raises:
        UserError: the processor has no chat template.
    """
    if isinstance(processor, PaliGemmaProcessor) and processor.chat_template is None:
        return MARK * images + "\n".join(message["content"] for message in messages)
    _require_template(processor)
    messages = [dict(message) for message in messages]
    if isinstance(processor, ProcessorMixin):
        messages = prepare_multimodal_messages(messages, images=[None] * images)
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def placed(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """``batch`` where ``model`` computes, its pixels in the model's dtype; what is no tensor stays as it is."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)

    return {name: one(value) for name, value in batch.items()}


class Collator:
    """Rows of `rows` to a batch: ``input_ids``, ``attention_mask`` and ``labels`` (batch, length), and pixels if any.

    Rows with and without pictures may share a batch. Batches of a processor are padded on the right, as TRL's are;
    those of a plain tokenizer on its ``padding_side``. PaliGemma reads its prompt in both directions and ends it in its
    own way, so its batches come from its processor's prompt and suffix; it cannot take a row without a picture.

    Args:
        processor: The model's processor, or its tokenizer if it reads text only.

    Raises:
        UserError: no chat template, pictures for a tokenizer, a picture that cannot be opened.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase):
        self.processor = processor
        if isinstance(processor, PaliGemmaProcessor):
            self._collate = self._paligemma
            return
        _require_template(processor)
        if isinstance(processor, ProcessorMixin):
            self._collate = self._multimodal
            self._trl = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        else:
            self._collate = self._text

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch, in the order of ``rows``."""
        return dict(self._collate([{**row, "images": _opened(row)} for row in rows]))

    def _multimodal(self, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        return self._trl([{key: row[key] for key in ("images", "prompt", "completion")} for row in rows])

    def _paligemma(self, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        for row in rows:
            if not row["images"]:
                question = row["prompt"][-1]["content"]
                raise UserError(f"PaliGemma needs a picture with every question; {question!r} has none: remove it")
        batch = self.processor(
            images=[row["images"] for row in rows],
            text=[prompt_text(self.processor, row["prompt"], len(row["images"])) for row in rows],
            suffix=[row["completion"][0]["content"] for row in rows],
            padding=True,
            padding_side="right",
        )
        return batch.convert_to_tensors("pt")

    def _text(self, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        if any(row["images"] for row in rows):
            raise UserError("this model reads text only but the data have images; choose a vision-language model")
        tokenizer, encoded, labels = self.processor, [], []
        for row in rows:
            texts = apply_chat_template({key: row[key] for key in ("prompt", "completion")}, tokenizer)
            prompt, answer = (
                tokenizer(texts[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion")
            )
            encoded.append({"input_ids": prompt + answer})
            labels.append([IGNORED] * len(prompt) + answer)
        batch = tokenizer.pad(encoded, return_tensors="pt")
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for line, mask, values in zip(batch["labels"], batch["attention_mask"], labels, strict=True):
            line[mask.bool()] = torch.tensor(values)
        return batch


def read_through(model: PreTrainedModel, processor: Any, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """What ``model`` takes to read question and answer of each record, one by one: no loss, of the logits the last."""
    collate = Collator(processor)
    for row in rows(records):
        batch = placed(collate([row]), model)
        del batch["labels"]
        yield batch | {"use_cache": False, "logits_to_keep": 1}


def _opened(row: Mapping[str, Any]) -> list[Image.Image]:
    images = row.get("images") or ()
    return [image if isinstance(image, Image.Image) else open_image(image) for image in images]


def _require_template(processor: Any) -> None:
    if getattr(processor, "chat_template", None) is None:
        raise UserError("the base model has no chat template; choose its instruction-tuned variant or set one")
