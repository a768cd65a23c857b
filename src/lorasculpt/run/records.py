"""What a run learns from, and what it is asked."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from ..adapters.update import UpdateConfig
from ..config import RunConfig
from ..data.records import UNNAMED, Record, fingerprint, read, replayed, set_aside, shared
from ..errors import UserError
from ..evaluation import Task, self_prompts, tasks
from ..evaluation.drift import Prompt, question, read_prompts
from ..evaluation.prompts import tokenizer_of
from ..evaluation.strength import moved
from ..evaluation.tasks import asked_as
from ..kinds import started
from .folder import DRIFT_FILE


@dataclass(frozen=True)
class Rows:
    """The rows of ``data.train``: what is trained on, and what is set aside. ``data`` tells other data from these."""

    trained: list[Record]
    aside: list[Record]
    data: str


def training_rows(config: RunConfig, *, check_images: bool = True) -> Rows:
    """Read ``data.train``.

    Raises:
        UserError: for the first row or picture that is no good, with its file and line.
    """
    data = config.data
    assert data.train is not None
    records, folder = read(data.train, images=data.images, limit=data.limit, check_images=check_images), data.images
    folder = folder or data.train.parent
    told = fingerprint(records, folder)
    return Rows(*(set_aside(records, data.validation, folder) if data.validation else (records, [])), told)


def one_pass(config: RunConfig, trained: list[Record]) -> list[Record]:
    """What is learned from in one pass: the rows ``trained`` on, and what is replayed of ``data.general``.

    Raises:
        UserError: as of :func:`general`.
    """
    share = config.data.replay
    return trained if share is None else trained + replayed(general(config), len(trained), share, config.seed)


def general(config: RunConfig) -> list[Record]:
    """The rows of ``data.general``.

    Raises:
        UserError: for one that asks what is to be measured.
    """
    assert config.data.general is not None
    records = read(config.data.general, images=config.data.images)
    asked = config.evaluate
    measured = [record for file in asked.files for record in read(file, images=asked.images)]
    if config.data.validation:
        measured += training_rows(config).aside
    for record, other in shared(records, measured):
        raise UserError(
            f"{record.where}: asks what {other.where} asks, which is measured and may not be trained on; remove the "
            "row from data.general."
        )
    return records


def uses_general(config: RunConfig) -> bool:
    """Whether the run learns from ``data.general``: replays it, or first has its rows tell what matters to the base."""
    data, settings = config.data, started(config.method)
    corda = settings.get("corda_config") or {}
    measured = settings.get("init_lora_weights") == "corda" and corda.get("corda_method", "ipm") != "ipm"
    measured |= settings.get("penalty") == "ewc" and settings.get("fisher") is None
    return data.general is not None and (data.replay is not None or measured)


def general_data(config: RunConfig) -> str | None:
    """What tells the rows of ``data.general`` from others; None where no such file is there."""
    data = config.data
    if data.general is None or not data.general.is_file():
        return None
    return fingerprint(read(data.general, images=data.images, check_images=False), data.images or data.general.parent)


def learned_from(config: RunConfig, given: Rows) -> dict[str, str]:
    """What tells the rows that a run learns from, ``given`` and others, as ``training.json`` and results have it."""
    told = general_data(config) if uses_general(config) else None
    return {"data": given.data} | ({} if told is None else {"general": told})


def questions(tasks: Iterable[Task]) -> str:
    """What tells the questions of ``tasks`` from others: their :func:`~lorasculpt.data.records.fingerprint`."""
    records = [record for task in tasks for record in task.records]
    folders = [image.parent for record in records for image in record.images]
    return fingerprint(records, os.path.commonpath(folders) if folders else Path())


def held_out(config: RunConfig, limit: int | None = None, *, each: int | None = None) -> tuple[list[Task], list[Task]]:
    """The source and target tasks of ``config.evaluate``, with at most ``limit`` questions a task.

    With ``each``, the tasks of the source share about so many questions evenly, and so do those of the target. What
    ``data.validation`` sets aside takes the place of the target.
    """
    found = []
    limit = config.evaluate.limit if limit is None else limit
    aside = training_rows(config).aside if config.data.validation else []
    for files, instead in ((config.evaluate.source, []), (config.evaluate.target, aside)):
        if instead and config.data.train:
            asked = [(config.data.train, record) for record in instead]
        else:
            asked = [(file, record) for file in files for record in read(file, images=config.evaluate.images)]
        grouped = tasks([record for _, record in asked], names=[_task(file, record) for file, record in asked])
        count = limit
        if each is not None and grouped:
            share = math.ceil(each / len(grouped))
            count = share if limit is None else min(share, limit)
        kept = [dataclasses.replace(task, records=task.records[:count]) for task in grouped]
        found.append([dataclasses.replace(task, metric=_metric(config, task)) for task in kept])
    return found[0], found[1]


def _task(file: Path, record: Record) -> str:
    """The task as which a question is measured: its own, or where it names none that of its file."""
    return f"{file.parent.name}/{file.stem}" if record.task == UNNAMED else record.task


def _metric(config: RunConfig, task: Task) -> str:
    """What ``evaluate.metric`` says of a task; of one that is called as its file also what it says of ``default``."""
    metrics = config.evaluate.metric
    unnamed = metrics.get(UNNAMED, task.metric) if task.records[0].task == UNNAMED else task.metric
    return metrics.get(task.name, unnamed)


def check_measured(config: RunConfig) -> list[Record]:
    """Read all that ``config.evaluate`` names, so that a bad row or picture is told before training and not after it.

    Raises:
        UserError: for the first, with its file and line.
    """
    found = [record for side in held_out(config) for task in side for record in task.records]
    asked = config.evaluate
    instead = asked.target if config.data.validation else []
    for file in (*instead, *asked.validation, *asked.validation_source):
        found += read(file, images=asked.images)
    return found


def check_metrics(config: RunConfig) -> None:
    """See that each task of ``evaluate.metric`` is asked: by a row, or as a task of a sequence.

    Raises:
        UserError: for the first that is not, with its line in the file.
    """
    asked = config.evaluate
    if not asked.metric:
        return
    known = {stage.name for stage in config.data.sequence}
    rows = [(file, record) for file in asked.files for record in read(file, images=asked.images, check_images=False)]
    if config.data.validation and config.data.train:
        rows += [(config.data.train, record) for record in training_rows(config, check_images=False).aside]
    known |= {name for file, record in rows for name in (record.task, _task(file, record))}
    for name in asked.metric:
        if name not in known:
            told = f"names a task that no question has; the tasks are {', '.join(sorted(known))}."
            raise config.error(f"evaluate.metric.{name}", told)


def check_lengths(records: Iterable[Record], model: nn.Module, processor) -> None:
    """See that the words of each row alone, without what its pictures take, are no more than the base reads at once.

    Raises:
        UserError: for the first, with its file and line.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokenizer = tokenizer_of(processor)
    for record in records:
        texts = [*(message["content"] for message in record.prompt), record.answer]
        if longest is None or sum(len(text.encode()) for text in texts) <= longest:
            continue  # a token is a byte at least
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        if tokens > longest:
            raise UserError(
                f"{record.where}: has {tokens} tokens, and the base reads {longest} at once; shorten or remove it."
            )


def rehearsed(config: RunConfig, trained: Sequence[Record]) -> list[tuple[str, Record, Record]]:
    """The questions of ``config.evaluate`` that are ``trained`` on: task, question, and the row that asks it."""
    asked = {id(record): (task.name, record) for side in held_out(config) for task in side for record in task.records}
    found = shared([record for _, record in asked.values()], trained)
    return [(asked[id(question)][0], question, row) for question, row in found]


def check_tasks(config: RunConfig, known: Sequence[str], tasks: Iterable[Task]) -> None:
    """See that an adapter that knows the tasks ``known`` can be asked the questions of ``tasks``, and of the drift.

    Raises:
        UserError: if ``config.evaluate.as_task`` is none of them, or is missing and needed.
    """
    as_task = config.evaluate.as_task
    if as_task is not None and as_task not in known:
        raise config.error(
            "evaluate.as_task", f"is {as_task!r}, a task that the adapter does not know; use one of {', '.join(known)}."
        )
    general = [question(0)] if config.evaluate.drift else []
    asked_as([*(record for task in tasks for record in task.records), *general], known, as_task)


def check_tasks_of(folder: Path, config: RunConfig, tasks: Iterable[Task]) -> None:
    """:func:`check_tasks` for the adapter in ``folder``: at once, because loading and measuring a base may take long.

    Raises:
        UserError: as of :func:`check_tasks`.
    """
    saved = PeftConfig.from_pretrained(str(folder))
    if isinstance(saved, UpdateConfig) and saved.multitask:
        check_tasks(config, saved.tasks, tasks)


def drift_prompts(config: RunConfig, model: nn.Module, processor, autocast: torch.dtype | None) -> list[Prompt]:
    """The texts that the drift of a run is measured on, kept in its folder; none where it is not to be or cannot be."""
    if not config.evaluate.drift or config.projector == "full" or moved(model):
        return []
    path = config.output / DRIFT_FILE
    known = path.is_file() and len(read_prompts(path)) == config.evaluate.drift  # these are taken as they are
    source, target = ([], []) if known else held_out(config, config.evaluate.drift)
    shown = [record.images[0] for task in source or target for record in task.records if record.images]
    images = list(dict.fromkeys(shown))
    random.Random(0).shuffle(images)
    options: dict[str, Any] = {"batch": config.evaluate.batch, "precision": autocast}
    return self_prompts(model, processor, config.evaluate.drift, images=images, path=path, **options)
