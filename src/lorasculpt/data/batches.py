"""Records to training batches: a data set of paths and texts, and the collator that opens, tokenises and labels.

The loss falls on the answer alone. Everything is rendered when a batch is made, so a picture is in memory only while
its batch is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .records import MARK, UNNAMED, Record

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
        tasks: Task names in the order of the adapter's task ids. If given, a batch has ``routing_task_ids`` (batch,).
        pad_to_multiple_of: Pad the length of a batch to a multiple of this. Default: to its longest row.

    Raises:
        UserError: no chat template, pictures for a tokenizer, a picture that cannot be opened, an unknown task.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        tasks: Sequence[str] | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.tasks = None if tasks is None else {name: number for number, name in enumerate(tasks)}
        self.pad_to_multiple_of = pad_to_multiple_of
        self._left = False  # the side that is padded
        if isinstance(processor, PaliGemmaProcessor):
            self._collate = self._paligemma
            return
        _require_template(processor)
        if isinstance(processor, ProcessorMixin):
            self._collate = self._multimodal
            self._trl = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        else:
            self._collate = self._text
            self._left = processor.padding_side == "left"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch, in the order of ``rows``."""
        batch = dict(self._collate([{**row, "images": _opened(row)} for row in rows]))
        if self.pad_to_multiple_of:
            self._pad(batch, -batch["input_ids"].shape[1] % self.pad_to_multiple_of)
        if self.tasks is not None:
            batch["routing_task_ids"] = torch.tensor([_number(row, self.tasks) for row in rows], dtype=torch.long)
        return batch

    def _multimodal(self, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        return self._trl([{key: row[key] for key in ("images", "prompt", "completion")} for row in rows])

    def _paligemma(self, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        for row in rows:
            if not row["images"]:
                raise UserError(
                    f"PaliGemma needs a picture with every question; {_question(row)!r} has none: remove it"
                )
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
        encoded, labels = [], []
        for row in rows:
            texts = apply_chat_template({key: row[key] for key in ("prompt", "completion")}, self.tokenizer)
            prompt, answer = (
                self.tokenizer(texts[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion")
            )
            encoded.append({"input_ids": prompt + answer})
            labels.append([IGNORED] * len(prompt) + answer)
        batch = self.tokenizer.pad(encoded, return_tensors="pt")
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for line, mask, values in zip(batch["labels"], batch["attention_mask"], labels, strict=True):
            line[mask.bool()] = torch.tensor(values)
        return batch

    def _pad(self, batch: dict[str, Tensor], extra: int) -> None:
        """Lengthen whatever has the length of ``input_ids``, on the side on which the batch is padded already."""
        values = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED}
        for key in ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids"):
            if key in batch:
                sides = (extra, 0) if self._left else (0, extra)
                batch[key] = torch.nn.functional.pad(batch[key], sides, value=values.get(key, 0))


def _number(row: Mapping[str, Any], tasks: Mapping[str, int]) -> int:
    name = row.get("task", UNNAMED)
    if name not in tasks:
        known = ", ".join(tasks)
        raise UserError(f"the row {_question(row)!r} has the unknown task {name!r}; the adapter knows {known}")
    return tasks[name]


def _opened(row: Mapping[str, Any]) -> list[Image.Image]:
    images = row.get("images") or ()
    return [image if isinstance(image, Image.Image) else open_image(image) for image in images]


def _question(row: Mapping[str, Any]) -> str:
    return row["prompt"][-1]["content"]


def _require_template(processor: Any) -> None:
    if getattr(processor, "chat_template", None) is None:
        raise UserError("the base model has no chat template; choose its instruction-tuned variant or set one")
