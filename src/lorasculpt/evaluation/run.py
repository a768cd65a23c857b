"""One model, measured: what it answers to source and target tasks, and what two measurements say together."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from .answer import answer, choose
from .drift import Prompt, drift
from .score import interval, score
from .strength import strength
from .summary import average_interval, summary, task_average
from .tasks import Task

KNOWN = (
    0.01  # such as ten points of what is kept times ten of the target: a curve is known where it has less to move in
)


def ask(model: nn.Module, processor, tasks: Sequence[Task], *, max_new_tokens: int = 16, **options) -> list[list[str]]:
    """The answers of ``model`` to each of ``tasks``, in their order. Arguments as in :func:`evaluate`.

    Tasks share batches, so that one of few questions costs no more a question than one of many.
    """
    found: dict[int, list[str]] = {}
    for chosen in (False, True):
        places = [i for i, task in enumerate(tasks) if (task.metric == "choice") == chosen]
        records = [record for i in places for record in tasks[i].records]
        if not records:
            continue
        if chosen:
            said = iter(choose(model, processor, records, **options))
        else:
            said = iter(answer(model, processor, records, max_new_tokens=max_new_tokens, **options))
        found |= {i: list(islice(said, len(tasks[i].records))) for i in places}
    return [found[i] for i in range(len(tasks))]


def scored(task: Task, answers: Sequence[str]) -> dict:
    """A task's entry in what :func:`evaluate` returns."""
    scores, groups = score(answers, task.records, task.metric), task.groups
    low, high = interval(scores, groups=groups)
    found = {"value": sum(scores) / len(scores), "low": low, "high": high, "n": len(scores)}
    return found | {"groups": groups, "scores": scores, "answers": list(answers)}


def evaluate(
    model: nn.Module,
    processor,
    source: Sequence[Task],
    target: Sequence[Task],
    *,
    batch: int = 32,
    max_new_tokens: int = 16,
    as_task: str | None = None,
    precision: torch.dtype | None = None,
    progress: str | None = None,
) -> dict[str, dict[str, dict]]:
    """Answers and scores of ``model``: ``{"source": {task: {...}}, "target": {task: {...}}}``.

    A task's entry holds ``value`` (mean score), ``low`` and ``high`` (95 % interval), ``n``, and in the order of its
    records ``groups`` (`Task.groups`), ``scores`` and ``answers``.

    Args:
        model: any Hugging Face vision-language or causal language model, wrapped by PEFT or not.
        processor: its processor (or tokenizer, for a model without pictures), with a chat template.
        source: tasks of what the model knew.
        target: tasks of what it is taught.
        batch: questions answered at once; of a task with the metric ``choice``, choices.
        max_new_tokens: length at which an answer is cut.
        as_task: the task that an adapter that knows tasks takes a question for, where it does not know the question's
            own.
        precision: dtype of autocast; None computes in the model's own.
        progress: words beside the progress bar; None shows no bar.

    Raises:
        UserError: for a task that the adapter does not know, if there is no ``as_task``.
    """
    options: dict[str, Any] = {"batch": batch, "max_new_tokens": max_new_tokens, "precision": precision}
    options |= {"as_task": as_task, "progress": progress}
    answers = iter(ask(model, processor, [*source, *target], **options))
    return {
        side: {task.name: scored(task, next(answers)) for task in group}
        for side, group in (("source", source), ("target", target))
    }


def _each(measured: dict, side: str, what: str) -> dict[str, list]:
    return {name: entry[what] for name, entry in measured[side].items()}


def _or_null(value: float | list[float]) -> float | list[float] | None:
    """``value``, or None where it is not defined: JSON has no nan."""
    return None if np.isnan(value).any() else value


def comparison(before: dict, after: dict) -> dict:
    """Two results of ``evaluate`` on the same tasks as the ``source``, ``target`` and ``summary`` of a results file.

    Args:
        before: what :func:`evaluate` returned for the base.
        after: the same for the tuned model.

    Raises:
        ValueError: they are not of the same items of the same tasks.
    """
    sides = {}
    for side in ("source", "target"):
        if before[side].keys() != after[side].keys():
            raise ValueError("results before and after must be of the same tasks")
        sides[side] = {
            name: {
                "before": old["value"],
                "after": after[side][name]["value"],
                "before_interval": [old["low"], old["high"]],
                "after_interval": [after[side][name]["low"], after[side][name]["high"]],
                "n": old["n"],
                **({"groups": count} if (count := len(set(old["groups"]))) < old["n"] else {}),
            }
            for name, old in before[side].items()
        }
    four = [_each(measured, side, "scores") for side in ("source", "target") for measured in (before, after)]
    groups = [_each(before, side, "groups") for side in ("source", "target")]
    return sides | {"summary": {name: _or_null(value) for name, value in summary(*four, *groups).items()}}


def curve(
    model: nn.Module,
    processor,
    source: Sequence[Task],
    target: Sequence[Task],
    strengths: Sequence[float] = (0.25, 0.5, 0.75),
    *,
    prompts: Sequence[Prompt] = (),
    progress: str | None = None,
    **options,
) -> list[dict]:
    """Source and target average with the adapter at each of ``strengths``, as the ``curve`` of a results file.

    Strengths 0 and 1 are the model before and after training, which are measured anyway.

    Args:
        model: the tuned model, wrapped by PEFT.
        processor: its processor or tokenizer.
        source: tasks of what the model knew.
        target: tasks of what it was taught.
        strengths: of the adapter, as :func:`strength` takes them.
        prompts: texts of ``self_prompts``; where there are some, every point has the drift on them too.
        progress: words beside the progress bar; None shows no bar.
        **options: ``batch``, ``max_new_tokens``, ``as_task`` and ``precision`` of :func:`evaluate`.

    Raises:
        UserError: for a task that the adapter does not know, if there is no ``as_task``.
        ValueError: the adapter has no strength that could be set.
    """
    of_drift = {key: value for key, value in options.items() if key != "max_new_tokens"}
    points = []
    for value in strengths:
        words = None if progress is None else f"{progress} strength {value:g}"
        with strength(model, value):
            measured = evaluate(model, processor, source, target, progress=words, **options)
            drifted = drift(model, processor, prompts, progress=words, **of_drift) if prompts else None
        points.append(curve_point(value, measured, drifted))
    return points


def next_strength(points: Sequence[dict]) -> float | None:
    """Where the curve through ``points`` is known least: the middle of two neighbouring strengths.

    A curve that falls in what is kept and rises in the target lies, between two of its points, within the rectangle
    that they span. Its strength is that of the largest rectangle; None where all are below ``KNOWN``.

    Args:
        points: of a curve with both its ends, in any order, as :func:`rectangle` takes them.
    """
    known = sorted(points, key=lambda point: point["strength"])
    left, right = max(pairwise(known), key=lambda both: rectangle(*both))
    return (left["strength"] + right["strength"]) / 2 if rectangle(left, right) >= KNOWN else None


def rectangle(left: dict, right: dict) -> float:
    """The area that two points of a curve span: what is kept times the target, each as far as it changes.

    Without source averages what is kept is exp(-drift).
    """
    a, b = (point["source"] if "source" in point else math.exp(-point["drift"]) for point in (left, right))
    return abs((b - a) * (right["target"] - left["target"]))


def curve_point(value: float, measured: dict, drifted: dict | None = None) -> dict:
    """Results of ``evaluate`` and ``drift`` with the adapter at strength ``value`` as one point of a ``curve``.

    A side without tasks is left out, and so is the drift where it is None.
    """
    point: dict = {"strength": value}
    for side in ("source", "target"):
        if not measured[side]:
            continue
        scores = _each(measured, side, "scores")
        point[side] = task_average(scores)
        point[f"{side}_interval"] = average_interval(scores, _each(measured, side, "groups"))
    return point | ({"drift": drifted["value"], "drift_interval": drifted["interval"]} if drifted else {})


def gallery(source: Sequence[Task], target: Sequence[Task], before: dict, after: dict, n: int = 10) -> list[dict]:
    """``n`` questions about pictures with the answers before and after, as the ``gallery`` of a results file.

    Half of them are target questions (all, where there are no source pictures). They are drawn by chance, never picked,
    and runs with the same test data show the same ones.

    Args:
        source: tasks of what the model knew.
        target: tasks of what it was taught.
        before: what :func:`evaluate` returned for the base, of these tasks.
        after: the same for the tuned model.
        n: number of questions, fewer where there are no more with pictures.
    """
    rng = random.Random(0)
    sides = {}
    for side, group in (("target", target), ("source", source)):
        sides[side] = [(task, i) for task in group for i, record in enumerate(task.records) if record.images]
    few = min(n // 2, len(sides["source"]))
    shown = []
    for side, count in (("target", min(n - few, len(sides["target"]))), ("source", few)):
        for task, i in rng.sample(sides[side], count):
            record, old, new = task.records[i], before[side][task.name], after[side][task.name]
            shown.append(
                {
                    "image": str(record.images[0]),
                    "question": record.question,
                    "answer": record.answer,
                    "task": task.name,
                    "side": side,
                    "base": old["answers"][i],
                    "base_score": old["scores"][i],
                    "tuned": new["answers"][i],
                    "tuned_score": new["scores"][i],
                }
            )
    return shown
