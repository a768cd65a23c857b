"""Records as the model's input: prompts as in training, batches, padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PaliGemmaProcessor

from ..data.batches import placed, prompt_text
from ..data.images import check_image, open_image
from ..data.records import Record
from ..errors import UserError, gist

LETTERS = 4  # of a token of text, about
PIXELS = 28**2  # of a token of a picture, about, where its processor does not say


def tokenizer_of(processor):
    """The tokenizer inside ``processor``, or ``processor`` itself for a model without pictures."""
    return getattr(processor, "tokenizer", processor)


def chat(processor, record: Record) -> str:
    """The prompt of ``record`` as it was in training, ready to be answered.

    Raises:
        UserError: the processor has no chat template, or takes no such record.
    """
    if isinstance(processor, PaliGemmaProcessor) and not record.images:
        raise UserError(
            f"{record.where}: has no picture, which PaliGemma needs with every question; add one or remove it."
        )
    try:
        return prompt_text(processor, record.prompt, len(record.images))
    except UserError:
        raise
    except Exception as error:  # a template may raise what it likes
        raise UserError(
            f"{record.where}: the base's chat template refuses it ({gist(error)}); change its turns or remove it."
        ) from error


def check_prompts(processor, records: Iterable[Record]) -> None:
    """See that the base can be asked each sequence of turns, with so many pictures, that ``records`` have.

    Each is rendered once, of the first record that has it, and not those of all rows, which may be a million.

    Raises:
        UserError: as of :func:`chat`, for the first that cannot.
    """
    kinds: dict[tuple, Record] = {}
    for record in records:
        kinds.setdefault((len(record.images), *(message["role"] for message in record.prompt)), record)
    for record in kinds.values():
        chat(processor, record)


def batches(processor, records: Sequence[Record], texts: Sequence[str], size: int) -> list[list[int]]:
    """Indices of ``records`` in lists of at most ``size``, longest prompt first, by its pictures' tokens and its text.

    Sorting saves padding, and the largest batch first means that memory runs out at once or never. Records of one batch
    have the same number of pictures, since not every processor takes a mixture.

    Raises:
        UserError: as of `check_image`, for a picture.
    """
    tokens = _tokens(processor, dict.fromkeys(path for record in records for path in record.images))
    lengths = [
        sum(tokens[path] for path in record.images) + len(text) / LETTERS
        for record, text in zip(records, texts, strict=True)
    ]

    def pictures(i: int) -> int:
        return len(records[i].images)

    order = sorted(range(len(records)), key=lambda i: (pictures(i), lengths[i]), reverse=True)
    groups = [list(group) for _, group in groupby(order, key=pictures)]
    parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    return sorted(parts, key=lambda part: len(part) * lengths[part[0]], reverse=True)


def _tokens(processor, paths: Iterable[Path]) -> dict[Path, int]:
    """How many tokens each picture becomes, by its size alone.

    Where the processor does not say, a power of two by the number of pixels: pictures of about one size are then taken
    to be equal, and texts decide among them, which is right where all become equally many.
    """
    sizes = {path: check_image(path)[::-1] for path in paths}
    each = list(dict.fromkeys(sizes.values()))
    try:
        told = processor._get_num_multimodal_tokens(image_sizes=each).num_image_tokens
        tokens = dict(zip(each, told, strict=True))
    except Exception:  # it has no such method, or not for its present settings
        tokens = {(height, width): 1 << (height * width // PIXELS).bit_length() for height, width in each}
    return {path: tokens[size] for path, size in sizes.items()}


def _processed(processor, records: Sequence[Record], texts: Sequence[str]) -> Mapping[str, Any]:
    """The model's inputs for ``texts`` and the pictures of ``records``, each file opened once, padded on the left."""
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
    if processor is not tokenizer_of(processor):
        opened = {path: open_image(path) for path in dict.fromkeys(path for each in records for path in each.images)}
        pictures = [[opened[path] for path in record.images] for record in records]
        options["images"] = pictures if opened else None
    return processor(text=list(texts), **options)


def encode(model: nn.Module, processor, records: Sequence[Record], texts: Sequence[str]) -> dict[str, Any]:
    """The model's inputs for ``texts`` and the pictures of ``records``, padded on the left, on the model's device."""
    return placed(_processed(processor, records, texts), model)


def prepared(
    model: nn.Module, processor, records: Sequence[Record], texts: Sequence[str], size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """The `batches` of ``records``, each with its inputs as of `encode`.

    An accelerator does not wait for them: a thread prepares a batch while the one before it is answered. ``processor``
    is the thread's until all are prepared, since tokenizers take no two threads at once.
    """
    made = (
        (part, _processed(processor, [records[i] for i in part], [texts[i] for i in part]))
        for part in batches(processor, records, texts, size)
    )
    for part, inputs in made if model.device.type == "cpu" else _ahead(made):
        inputs = placed(inputs, model)  # what lay on the CPU is given up
        yield part, inputs


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """``items``, each made by a thread while the one before it is in use; what the thread raises is raised here."""
    end = object()

    def begin() -> Future:
        pool = ThreadPoolExecutor(1)
        coming = pool.submit(next, items, end)
        pool.shutdown(wait=False)  # the thread ends with this item, even where nobody asks for another
        return coming

    coming = begin()
    while (held := [coming.result()])[0] is not end:
        coming = begin()
        yield held.pop()  # pictures take much room, and are not kept here meanwhile


def followed(inputs: dict, answers: list[list[int]]) -> dict:
    """``inputs`` with the tokens of one answer after each prompt, padding all on the left."""
    ids, width = inputs["input_ids"], max(map(len, answers))
    tail = torch.zeros(len(answers), width, dtype=ids.dtype)
    mask = torch.zeros_like(tail)
    for row, answer in enumerate(answers):
        tail[row, : len(answer)] = torch.tensor(answer)
        mask[row, : len(answer)] = 1
    tail, mask = tail.to(ids.device), mask.to(ids.device)
    tails = {"input_ids": tail, "attention_mask": mask, "token_type_ids": mask * 0, "mm_token_type_ids": mask * 0}
    joined = {name: torch.cat([inputs[name], extra], 1) for name, extra in tails.items() if name in inputs}
    order = joined["attention_mask"].argsort(dim=1, stable=True)  # padding first, the rest in its order
    return inputs | {name: value.gather(1, order) for name, value in joined.items()}


@contextmanager
def evaluating(model: nn.Module, precision: torch.dtype | None) -> Iterator[None]:
    """No dropout, no gradients, ``precision`` by autocast (None: as it is); every module's mode is restored.

    The language head gets what it multiplies in one piece: of the last tokens of prompts, cut out of all hidden states,
    a CPU makes a product for each row, which takes seven times as long.
    """
    modes = [(module, module.training) for module in model.modules()]
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda head, args: (args[0].contiguous(), *args[1:])) if head else None
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, precision, enabled=precision is not None):
            yield
    finally:
        if hook:
            hook.remove()
        for module, training in modes:
            module.training = training
