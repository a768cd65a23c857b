"""Tasks learned in turn: what ``matrix.json`` says of each method, as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .results import load
from .words import NONE, listed, percent

MATRIX = "matrix.json"
NUMBERS = {
    "last": "After the last task (%)",
    "average": "On the way (%)",
    "backward": "Change since learned (points)",
    "forward": "Change before learned (points)",
}


def split(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """``paths`` of runs, and those of tasks learned in turn: files of a matrix, and folders that hold one."""
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
    return isinstance(content, dict) and {"tasks", "rows"} <= set(content)


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The matrices, each with a ``label``: its method, and its seed where there are several of that method.

    Raises:
        UserError: one cannot be read, or has no row after any task, or their tasks are not the same.
    """
    found = [load(path) for path in paths]
    for path, matrix in zip(paths, found, strict=True):
        if len(matrix["rows"]) < 2:
            raise UserError(f"{path}: no task has been learned yet; run lorasculpt train first.")
        if matrix["tasks"] != found[0]["tasks"]:
            raise UserError(f"{path}: its tasks are not those of {paths[0]}; report them apart.")
    methods = [matrix["method"] for matrix in found]
    names = [f"{m['method']}, seed {m['seed']}" if methods.count(m["method"]) > 1 else m["method"] for m in found]
    twice = {name for name in names if names.count(name) > 1}
    labels = [
        f"{name} ({path.parent.name})" if name in twice else name for name, path in zip(names, paths, strict=True)
    ]
    return [matrix | {"label": label} for matrix, label in zip(found, labels, strict=True)]


def _cell(text: str, value: float | None, share: float | None = None) -> dict[str, Any]:
    return {"text": text, "value": value, "interval": "", "test": "", "bold": False, "share": share}


def _scored(value: float | None, tinted: bool = True) -> dict[str, Any]:
    """A score in percent, on a tint of its own strength."""
    return _cell(NONE if value is None else percent(value), value, value if tinted else None)


def summary_table(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for each method: what its matrix comes to, and the source before and after."""
    numbers = {name: head for name, head in NUMBERS.items() if any(matrix.get(name) is not None for matrix in found)}
    rows = []
    for matrix in found:
        first, last = matrix["rows"][0], matrix["rows"][-1]
        cells = [_scored(matrix.get(name), tinted=False) for name in numbers]
        cells += [_scored(row["source"], tinted=False) for row in (first, last)]
        rows.append({"name": matrix["label"], "cells": cells})
    return {"head": ["Method", *numbers.values(), "Source before (%)", "Source after (%)"], "rows": rows}


def matrix_table(matrix: dict[str, Any]) -> dict[str, Any]:
    """The accuracy on every task, before the first and after each, and the source beside them."""
    rows = []
    for row in matrix["rows"]:
        name = "before" if row["after"] is None else f"after {row['after']}"
        rows.append({"name": name, "cells": [_scored(value) for value in (*row["accuracy"], row["source"])]})
    return {"head": ["Accuracy (%)", *matrix["tasks"], "source"], "rows": rows}


def headline(found: Sequence[dict[str, Any]]) -> list[str]:
    """What is left of the tasks after the last one, and which numbers are still to come."""
    tasks = found[0]["tasks"]
    said = []
    for matrix in found:
        last = matrix["rows"][-1]
        scores = last["accuracy"][: len(matrix["rows"]) - 1]
        text = f"{matrix['label']} has {percent(sum(scores) / len(scores), 0)}\u00a0% on average"
        if matrix.get("backward") is not None:
            text += f" ({'+' * (matrix['backward'] > 0)}{percent(matrix['backward'])} points since each was learned)"
        said.append(text)
    sentences = [f"After {listed(tasks)}, learned in turn: {'; '.join(said)}."]
    unfinished = [matrix["label"] for matrix in found if len(matrix["rows"]) <= len(tasks)]
    if unfinished:
        sentences.append(f"Not all tasks are learned yet: {listed(unfinished)}.")
    return sentences
