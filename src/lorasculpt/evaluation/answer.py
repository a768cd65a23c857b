"""Answers: what the model says (greedy decoding), or which of a record's choices it finds most likely."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.update import context_of, known_tasks
from ..data.batches import prompt_text
from ..data.records import Record
from ..models.template import stops
from .prompts import chat, evaluating, followed, prepared, tokenizer_of
from .tasks import asked_as

# plain argmax, whatever sampling or penalties the model's own generation config suggests
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}


def answer(
    model: nn.Module,
    processor,
    records: Sequence[Record],
    *,
    batch: int = 32,
    max_new_tokens: int = 16,
    as_task: str | None = None,
    precision: torch.dtype | None = None,
    progress: str | None = None,
) -> list[str]:
    """The greedy answer to each record, in the order of ``records``, without special tokens and outer spaces.

    Args:
        model: any Hugging Face vision-language or causal language model, wrapped by PEFT or not.
        processor: its processor (or tokenizer, for a model without pictures), with a chat template.
        records: the questions.
        batch: questions answered at once.
        max_new_tokens: length at which an answer is cut.
        as_task: the task that an adapter that knows tasks takes a question for, where it does not know the question's
            own. Without such an adapter tasks make no difference.
        precision: dtype of autocast; None computes in the model's own.
        progress: words beside the progress bar; None shows no bar.

    Raises:
        UserError: for a task that the adapter does not know, if there is no ``as_task``.
    """
    tokenizer, named = tokenizer_of(processor), asked(model, records, as_task)
    texts = [chat(processor, record) for record in records]
    ends = stops(model, processor)
    said: dict[int, list[int]] = {}
    options = GREEDY | {"max_new_tokens": max_new_tokens, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    with evaluating(model, precision), tqdm(total=len(records), desc=progress, disable=progress is None) as bar:
        for part, inputs in prepared(model, processor, records, texts, batch):
            tokens = model.generate(**inputs, **options, **task_of(named, part), use_cache=True)
            said |= zip(part, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
            bar.update(len(part))
    return [tokenizer.decode(said[i], skip_special_tokens=True).strip() for i in range(len(records))]


def asked(model: nn.Module, records: Sequence[Record], as_task: str | None) -> list[str] | None:
    """The task of each record as the adapter of ``model`` is to be told it; None if there is none to tell."""
    known = known_tasks(model)
    return None if known is None else asked_as(records, known, as_task)


def task_of(named: list[str] | None, part: Sequence[int]) -> dict[str, list[str]]:
    """What a model has to be given for the tasks of the samples ``part``."""
    return {} if named is None else {"task": [named[i] for i in part]}


def _lead(processor, record: Record, prompt: str) -> str:
    """What the chat template writes between the prompt and an answer (a space, in some)."""
    choice = record.choices[0]
    answered = [*record.prompt, {"role": "assistant", "content": choice}]
    whole = prompt_text(processor, answered, len(record.images))
    if whole.startswith(prompt) and choice in whole[len(prompt) :]:
        return whole[len(prompt) :].split(choice)[0]
    return ""


def _mean_log_likelihood(model: nn.Module, inputs: dict, choices: list[list[int]]) -> Tensor:
    """(rows,) mean log-probability of the tokens of each choice after its prompt, in nats a token."""
    inputs, own = followed(inputs, choices), own_positions(choices, model.device)
    tokens = inputs["input_ids"][:, -own.shape[1] :, None]
    said = log_probabilities(model, inputs, own).gather(2, tokens)[..., 0]
    return (said * own).sum(1) / own.sum(1)


def own_positions(tokens: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(rows, width) which of the last positions, as many as the longest text has, are a text's own: all end right."""
    width, lengths = max(map(len, tokens)), torch.tensor([len(row) for row in tokens], device=device)
    return torch.arange(width, 0, -1, device=device) <= lengths[:, None]


def log_probabilities(model: nn.Module, inputs: dict[str, Any], own: Tensor) -> Tensor:
    """(rows, width, vocabulary): of each of the last tokens, given those before it.

    ``own`` (rows, width) says which of them are of the text that is asked about, and no prompt: an adapter that looks
    at prompts alone is to choose as it would where it wrote that text.
    """
    context, width = context_of(model), own.shape[1]
    with nullcontext() if context is None else context.answered(own):
        logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, -width - 1 : -1]
    return logits.float().log_softmax(-1)


def choose(
    model: nn.Module,
    processor,
    records: Sequence[Record],
    *,
    batch: int = 32,
    as_task: str | None = None,
    precision: torch.dtype | None = None,
    progress: str | None = None,
) -> list[str]:
    """For each record the one of its ``choices`` with the highest mean log-probability per token.

    For models that ramble: no decoding, nothing to parse. The end of the turn is not counted. ``batch`` counts
    rows, one for each choice of each record. Other arguments as in ``answer``.
    """
    tokenizer = tokenizer_of(processor)
    prompts = [chat(processor, record) for record in records]
    leads = [_lead(processor, record, prompt) for record, prompt in zip(records, prompts, strict=True)]
    rows = [(i, choice) for i, record in enumerate(records) for choice in record.choices]
    repeated, texts = [records[i] for i, _ in rows], [prompts[i] for i, _ in rows]
    tokens = [tokenizer(leads[i] + choice, add_special_tokens=False)["input_ids"] for i, choice in rows]
    named = asked(model, repeated, as_task)
    best: dict[int, tuple[float, str]] = {}
    with evaluating(model, precision), tqdm(total=len(rows), desc=progress, disable=progress is None) as bar:
        for part, inputs in prepared(model, processor, repeated, texts, batch):
            values = _mean_log_likelihood(model, inputs | task_of(named, part), [tokens[j] for j in part])
            for j, value in zip(part, values.tolist(), strict=True):
                i, choice = rows[j]
                if i not in best or value > best[i][0]:
                    best[i] = (value, choice)
            bar.update(len(part))
    return [best[i][1] for i in range(len(records))]
