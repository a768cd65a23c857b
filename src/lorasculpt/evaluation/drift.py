"""Drift: how far a tuned model has moved from its base, on texts that the base itself wrote. No labels, no source data.

    prompts = self_prompts(model, processor, 64, path="drift.jsonl")
    drift(model, processor, prompts)  # {"value": 0.31, "interval": [0.27, 0.36], "n": 64}

The questions are fixed sentences (``ASKED``, ``ASKED_OF_PICTURES``), only the answers are the base's. The drift is the
mean of KL(base || tuned) over the tokens of these answers. Since they were sampled from the base, this estimates how
many nats per token the tuned model loses on what the base would have said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm

from ..data.records import Record
from ..errors import UserError
from ..files import whole
from ..models.template import stops
from .answer import GREEDY, asked, log_probabilities, own_positions, task_of
from .prompts import chat, evaluating, followed, prepared, tokenizer_of
from .score import RESAMPLES, bounds
from .strength import moved

ASKED = (
    "Tell me something that you know.",
    "Write a short story.",
    "How does something that people use every day work?",
    "Describe a place.",
    "Give some good advice.",
    "Name some animals and say where they live.",
    "How is a simple meal cooked?",
    "What happened long ago?",
)
ASKED_OF_PICTURES = (
    "What is in the picture?",
    "Describe the picture.",
    "What does the picture make you think of?",
    "What could one ask about the picture?",
)
SAMPLED = GREEDY | {"do_sample": True, "top_k": 0}  # the model's own distribution, unchanged


@dataclass(frozen=True)
class Prompt:
    """A question, with at most one picture, and ``tokens``: ids of what the base answered, with the end if it ended."""

    record: Record
    tokens: tuple[int, ...]


@contextmanager
def base_of(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` answers without its adapters; what was trainable is so again afterwards."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
            yield
    finally:  # PEFT makes an adapter that it turns on again trainable
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def self_prompts(
    model: nn.Module,
    processor,
    n: int,
    seed: int = 0,
    images: Sequence[Path] | None = None,
    *,
    path: str | Path | None = None,
    max_new_tokens: int = 24,
    batch: int = 32,
    precision: torch.dtype | None = None,
) -> list[Prompt]:
    """``n`` answers to general questions, sampled from the base of ``model`` at temperature 1.

    Args:
        model: a Hugging Face model, with PEFT's adapters (which are off meanwhile) or without.
        processor: its processor or tokenizer.
        n: number of texts, at least 1.
        seed: of the sampling; the random state outside is left as it was.
        images: pictures; where there are some, every second text is about one of them, in turn.
        path: a JSON lines file that keeps them. If it holds ``n`` texts already, these are returned.
        max_new_tokens: length at which a text is cut.
        batch: texts sampled at once.
        precision: dtype of autocast; None computes in the model's own.

    Raises:
        UserError: ``n`` is below 1, or the file holds something else.
    """
    if n < 1:
        raise UserError(f"drift needs at least one text, not {n}; ask for more.")
    path = None if path is None else Path(path)
    if path is not None and path.is_file() and len(kept := read_prompts(path)) == n:
        return kept
    records = [question(i, images or ()) for i in range(n)]
    texts, ends = [chat(processor, record) for record in records], stops(model, processor)
    said: dict[int, tuple[int, ...]] = {}
    options: dict[str, Any] = SAMPLED | {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": ends,
        "pad_token_id": tokenizer_of(processor).pad_token_id,
        "suppress_tokens": _unspoken(model, processor, ends),
    }
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with torch.random.fork_rng(devices), evaluating(model, precision), base_of(model):
        torch.manual_seed(seed)
        for part, inputs in prepared(model, processor, records, texts, batch):
            tokens = model.generate(**inputs, **options, use_cache=True)[:, inputs["input_ids"].shape[1] :]
            said |= {i: _ended(row, ends) for i, row in zip(part, tokens.tolist(), strict=True)}
    prompts = [Prompt(record, said[i]) for i, record in enumerate(records)]
    if path is not None:
        _write(prompts, tokenizer_of(processor), path)
    return prompts


def question(i: int, images: Sequence[Path] = ()) -> Record:
    """Question ``i``: pictures, where there are some, in every second one."""
    where = f"text {i + 1} of the drift"
    if images and i % 2:
        return _record(ASKED_OF_PICTURES[i // 2 % len(ASKED_OF_PICTURES)], [images[i // 2 % len(images)]], where)
    return _record(ASKED[(i // 2 if images else i) % len(ASKED)], [], where)


def _record(question: str, images: Sequence[Path], where: str) -> Record:
    return Record(({"role": "user", "content": question},), answer="-", images=tuple(images), where=where)


def _unspoken(model: nn.Module, processor, ends: Sequence[int]) -> list[int] | None:
    """Marks such as that of a picture, which no text may hold: read again, they would stand for pictures."""
    tokenizer = tokenizer_of(processor)
    marks = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    marks |= {getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")} - {None}
    return sorted(marks - set(ends)) or None


def _ended(tokens: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    """``tokens`` up to their first end, that one included."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: last + 1])


def _write(prompts: Sequence[Prompt], tokenizer, path: Path) -> None:
    """One JSON object a line; pictures relative to the file."""
    folder = path.parent.resolve()  # which a link may lead to
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            row = {
                "question": prompt.record.question,
                "images": [os.path.relpath(image, folder) for image in prompt.record.images],
                "answer": tokenizer.decode(prompt.tokens, skip_special_tokens=True),
                "tokens": prompt.tokens,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_prompts(path: str | Path) -> list[Prompt]:
    """The texts that ``self_prompts`` kept in a file.

    Raises:
        UserError: a line is not one of them.
    """
    path, prompts = Path(path), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            images = [(path.parent / image).resolve() for image in row["images"]]
            prompt = Prompt(_record(row["question"], images, where), tuple(map(int, row["tokens"])))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where}: not a text that drift is measured on; delete the file to sample anew.") from None
        if not prompt.tokens:
            raise UserError(f"{where}: has no tokens; delete the file to sample anew.")
        prompts.append(prompt)
    return prompts


def divergences(
    model: PeftModel,
    processor,
    prompts: Sequence[Prompt],
    *,
    batch: int = 32,
    as_task: str | None = None,
    precision: torch.dtype | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """(len(prompts),) sum of KL(base || tuned) over the tokens of each text, in nats.

    Exact over the vocabulary, in fp32, at the positions from which the text's tokens are predicted and nowhere else.
    Arguments as in ``answer``; ``model`` answers as tuned as it is now, and as its own base.

    Raises:
        ValueError: the adapter has moved the base weights, so that the base is no longer there.
    """
    if (obstacle := moved(model)) is not None:
        raise ValueError(obstacle)
    records = [prompt.record for prompt in prompts]
    texts, named = [chat(processor, record) for record in records], asked(model, records, as_task)
    sums = np.zeros(len(prompts))
    with evaluating(model, precision), tqdm(total=len(prompts), desc=progress, disable=progress is None) as bar:
        for part, given in prepared(model, processor, records, texts, batch):
            tokens = [list(prompts[i].tokens) for i in part]
            inputs = followed(given, tokens)
            own = own_positions(tokens, model.device)
            tuned = log_probabilities(model, inputs | task_of(named, part), own)[own]
            with base_of(model):
                base = log_probabilities(model, inputs, own)[own]
            each = torch.zeros(own.shape, device=own.device)
            each[own] = (base.exp() * (base - tuned)).sum(-1)
            sums[part] = each.sum(1).cpu().numpy()
            bar.update(len(part))
    return sums


def drift(model: PeftModel, processor, prompts: Sequence[Prompt], **options) -> dict[str, Any]:
    """Mean KL(base || tuned) in nats per token: ``value``, its 95 % ``interval``, and ``n`` texts.

    The interval is a bootstrap over texts: it tells how sure these texts make us.

    Args:
        model: the tuned model, wrapped by PEFT.
        processor: its processor or tokenizer.
        prompts: texts of the base, as :func:`self_prompts` makes them.
        **options: ``batch``, ``as_task``, ``precision`` and ``progress`` of `answer`.

    Raises:
        UserError: for a task that the adapter does not know, if there is no ``as_task``.
        ValueError: the adapter has moved the base weights, so that the base is no longer there.
    """
    sums = divergences(model, processor, prompts, **options)
    return per_token(sums, np.array([len(prompt.tokens) for prompt in prompts]))


def per_token(sums: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """``drift`` from the sums and lengths of the texts."""
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    draws = sums[drawn].sum(1) / lengths[drawn].sum(1)
    return {"value": float(sums.sum() / lengths.sum()), "interval": bounds(draws), "n": len(sums)}
