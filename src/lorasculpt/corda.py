"""CorDA's start: what its layers see on some texts, from which PEFT decides what an adapter takes from the base.

CorDA (Yang et al., 2024, arXiv 2406.05223) decomposes W C, with C the covariance of a layer's inputs. In its mode that
preserves knowledge (``kpm``) the adapter gets the directions that matter least on general texts, in the other (``ipm``)
those that matter most on the task's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from .data.batches import read_through
from .data.records import Record
from .errors import UserError
from .evaluation.drift import Prompt
from .evaluation.prompts import evaluating, tokenizer_of

METHODS = ("ipm", "kpm")
TEXTS = 256
"""How many texts the covariances are taken over; the paper's number."""


def said(processor: Any, prompts: Sequence[Prompt]) -> list[Record]:
    """The texts that a base wrote, as records."""
    tokenizer = tokenizer_of(processor)
    answers = [tokenizer.decode(prompt.tokens, skip_special_tokens=True) for prompt in prompts]
    return [
        Record(prompt.record.prompt, answer or "-", prompt.record.images)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def check(model: nn.Module, config: LoraConfig) -> None:
    """See that :func:`prepare` can be done, which may take long.

    Raises:
        UserError: attrs is not installed, which PEFT imports here without asking for it.
        ValueError: a setting that it cannot do with.
    """
    try:
        from peft.tuners.lora.corda import target_modules
    except ModuleNotFoundError as error:
        raise UserError(f"CorDA needs {error.name}, which PEFT does not install: pip install attrs.") from None
    settings = config.corda_config
    if settings.corda_method not in METHODS:
        raise ValueError(f"corda_config has the corda_method {settings.corda_method!r}, which is none of {METHODS}")
    if settings.cache_file or settings.covariance_file:
        raise ValueError("corda_config names a file that is a pickle, which may run code when it is read")
    most = max([config.r, *config.rank_pattern.values()])
    smallest = min(min(layer.weight.shape) for _, layer in target_modules(model, config))
    if most > smallest:
        raise ValueError(f"r is {most}, but the smallest layer has only {smallest} directions")


def prepare(
    model: nn.Module, processor: Any, config: LoraConfig, records: Sequence[Record], precision: torch.dtype | None
) -> None:
    """Give the linears of ``model`` that ``config`` adapts what ``get_peft_model`` begins CorDA with.

    Args:
        model: the base.
        processor: its processor or tokenizer.
        config: with ``init_lora_weights="corda"``.
        records: question and answer are read together, one at a time. Layers that see another shape than (1, length,
            features), as in a vision tower, are none for CorDA.
        precision: dtype of autocast; None computes in the model's own.

    Raises:
        ValueError: what a layer sees, or its covariance, is not finite.
    """
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        with evaluating(model, precision):
            for batch in read_through(model, processor, records):
                model(**batch)

    preprocess_corda(model, config, run_model=run)
