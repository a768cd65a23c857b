"""Tasks learned in turn: what ``matrix.json``, or a comparison of several methods, says of each, as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from ..console import NONE
from ..errors import UserError
from .results import NEAR_BASE, Number, load
from .words import bracket, listed, percent

MATRIX = "matrix.json"
NUMBERS = {
    "last": "After the last task (%)",
    "average": "On the way (%)",
    "backward": "Change since learned (points)",
    "forward": "Change before learned (points)",
}


def split(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """``paths`` of runs, and those of tasks learned in turn: files that tell of them, and folders of a matrix."""
    others: list[Path] = []
    matrices: list[Path] = []
    for path in paths:
        if path.is_dir() and not (path / "results.json").is_file() and (path / MATRIX).is_file():
            path = path / MATRIX
        (matrices if path.is_file() and _is_matrix(path) else others).append(path)
    return others, matrices


def _is_matrix(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads it next says what is wrong
    return isinstance(content, dict) and "tasks" in content and ("rows" in content or "sequences" in content)


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The matrices in ``paths``: ``label``, ``tasks``, ``rows`` as in ``matrix.json``, and ``numbers`` by name.

    A ``label`` is the method, with its seed where there are several of that method; a row of a comparison has its own,
    and the mean over its seeds.

    Raises:
        UserError: a file cannot be read, or has no row after any task, or their tasks are not the same.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        content = load(path)
        try:
            some = _of_comparison(content) if "sequences" in content else [_of_run(content, path)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is not whole ({error}); go on with what wrote it.") from error
        if not some or any(len(matrix["rows"]) < 2 for matrix in some):
            raise UserError(f"{path}: no task has been learned yet; go on with what wrote it first.")
        found += some
        if content["tasks"] != found[0]["tasks"]:
            raise UserError(f"{path}: its tasks are not those of {paths[0]}; report them apart.")
    for names in (("seed", ", seed {}"), ("folder", " ({})")):  # what tells the equal apart
        labels = [matrix["label"] for matrix in found]
        for matrix in found:
            if labels.count(matrix["label"]) > 1 and names[0] in matrix:
                matrix["label"] += names[1].format(matrix[names[0]])
    return found


def _of_run(content: dict[str, Any], path: Path) -> dict[str, Any]:
    numbers = {name: Number(content[name]) for name in NUMBERS if content.get(name) is not None}
    kept = {key: content[key] for key in ("tasks", "rows", "seed")}
    kept |= {"versions": content.get("versions", {}), "complete": len(content["rows"]) > len(content["tasks"])}
    return kept | {"label": content["method"], "folder": path.parent.name, "numbers": numbers}


def _of_comparison(content: dict[str, Any]) -> list[dict[str, Any]]:
    about = {"tasks": content["tasks"], "versions": content["versions"], "complete": content["complete"]}
    found = []
    for row in content["table"]:
        stages = zip([None, *content["tasks"]], row["matrix"], row["source"], strict=True)
        rows = [{"after": after, "accuracy": accuracy, "source": source} for after, accuracy, source in stages]
        known = {name: row[name] for name in NUMBERS if row[name]["mean"] is not None}
        numbers = {name: Number(each["mean"], each["low"], each["high"]) for name, each in known.items()}
        label = f"{row['label']} ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else row["label"]
        found.append(about | {"label": label, "rows": rows, "numbers": numbers})
    return found


def _cell(text: str, value: float | None, share: float | None = None) -> dict[str, Any]:
    return {"text": text, "value": value, "interval": "", "test": "", "bold": False, "share": share}


def _scored(value: float | None, tinted: bool = True) -> dict[str, Any]:
    """A score in percent, on a tint of its own strength."""
    return _cell(NONE if value is None else percent(value), value, value if tinted else None)


def _learned(matrix: dict[str, Any]) -> int:
    """How many of its tasks are learned."""
    return len(matrix["rows"]) - 1


def summary_table(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for each method: what its matrix comes to, and the source before all tasks and after all of them."""
    heads = {name: head for name, head in NUMBERS.items() if any(name in matrix["numbers"] for matrix in found)}
    rows = []
    for matrix in found:
        cells = []
        for name in heads:
            number = matrix["numbers"].get(name)
            cell = _scored(None if number is None else number.value, tinted=False)
            cells.append(cell | {"interval": "" if number is None else bracket(number)})
        after = matrix["rows"][-1]["source"] if _learned(matrix) == len(matrix["tasks"]) else None
        cells += [_scored(source, tinted=False) for source in (matrix["rows"][0]["source"], after)]
        rows.append({"name": matrix["label"], "cells": cells})
    return {"head": ["Method", *heads.values(), "Source before (%)", "Source after (%)"], "rows": rows}


def matrix_table(matrix: dict[str, Any]) -> dict[str, Any]:
    """The accuracy on every task, before the first and after each, and the source beside them."""
    rows = []
    for row in matrix["rows"]:
        name = "before" if row["after"] is None else f"after {row['after']}"
        rows.append({"name": name, "cells": [_scored(value) for value in (*row["accuracy"], row["source"])]})
    return {"head": ["Accuracy (%)", *matrix["tasks"], "source"], "rows": rows}


def _average(row: dict[str, Any]) -> float:
    """The accuracy over all tasks at one stage."""
    return mean(row["accuracy"])


def _share(row: dict[str, Any]) -> str:
    return f"{percent(_average(row), 0)}\u00a0%"


def _ended(matrix: dict[str, Any]) -> str:
    text = f"{matrix['label']} has {_share(matrix['rows'][-1])} on average"
    if (change := matrix["numbers"].get("backward")) is not None:
        text += f" ({'+' * (change.value > 0)}{percent(change.value)} points since each was learned)"
    return text


def headline(found: Sequence[dict[str, Any]]) -> list[str]:
    """What is left of the tasks after the last one, and which are still to be learned.

    Of more than two methods it is told of the one that has the most left, and of the first of the others.
    """
    tasks = found[0]["tasks"]
    ended = [matrix for matrix in found if _learned(matrix) == len(tasks)]
    sentences = []
    if len(ended) > 2:
        best = max(ended, key=lambda matrix: _average(matrix["rows"][-1]))
        other = next(matrix for matrix in ended if matrix is not best)
        told = f"{_ended(best)}; {_ended(other)}"
        sentences.append(f"Highest of {len(ended)} after {listed(tasks)}, learned in turn: {told}.")
    elif ended:
        sentences.append(f"After {listed(tasks)}, learned in turn: {'; '.join(map(_ended, ended))}.")
    if ended:
        sentences.append(f"Before the first, the base had {_share(found[0]['rows'][0])}.")
        before = [_average(matrix["rows"][0]) for matrix in found]
        others = [
            matrix["label"] for matrix, share in zip(found, before, strict=True) if abs(share - before[0]) > NEAR_BASE
        ]
        if others:
            sentences.append(f"That of {listed(others)} had another share: another base, or other questions.")
    counts = [(matrix["label"], _learned(matrix)) for matrix in found if matrix not in ended]
    if counts:
        unfinished = "; ".join(f"{label} has learned {n} of {len(tasks)} tasks" for label, n in counts)
        sentences.append(f"Not everything is learned yet: {unfinished}.")
    if not all(matrix["complete"] for matrix in ended):  # more of their comparison is to follow
        sentences.append("Some sequences of the comparison are still missing: these numbers may change.")
    return sentences


def as_json(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The matrices, ready for JSON."""
    return [
        {key: matrix[key] for key in ("label", "tasks", "rows")}
        | {name: asdict(number) for name, number in matrix["numbers"].items()}
        for matrix in found
    ]
