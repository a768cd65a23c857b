"""Sequences of tasks, compared: what a finished one says as an entry, and what several say together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from ..config import RunConfig
from ..console import numbers
from ..evaluation.student import mean_interval, paired
from ..evaluation.summary import h_mean
from ..measure import shape
from ..report.results import REFERENCE, stands_for
from ..run.folder import ADAPTER, LOG_FILE
from ..sequence import MATRIX_FILE, stages_of
from .table import cell, costs, grouped, made_with, measured_in, pairs, tell_ends, tell_missing, tested

NUMBERS = {
    "last": "Last",
    "average": "Avg",
    "backward": "backward",
    "forward": "forward",
    "source_before": "source before",
    "source_after": "source after",
}
"""The numbers of a sequence (:func:`lorasculpt.sequence.transfer`), and what they are called on the screen."""
MEANING = (
    "Last: mean over tasks after the last; Avg: mean over stages of those learned by then; backward: what later tasks "
    "did to earlier ones; forward: what earlier tasks did for later ones"
)


def entry(config: RunConfig) -> dict[str, Any] | None:
    """What a sequence says that was learned as ``config`` describes; None while it is not at its end.

    ``matrix`` is the accuracy on each task before any and after each, (1 + T) x T, ``source`` that on the source tasks,
    (1 + T). ``steps`` are those of each task, ``seconds`` those of all; ``memory_bytes`` is the largest peak.
    """
    path = config.output / MATRIX_FILE
    found = json.loads(path.read_text()) if path.is_file() else {}
    if "last" not in found:
        return None
    stages = stages_of(config)
    logs = [json.loads((stage.output / LOG_FILE).read_text()) for stage in stages]
    peaks = [log.get("memory_bytes") for log in logs]
    source = [row["source"] for row in found["rows"]]
    return {
        "method": found["method"],
        "seed": found["seed"],
        "lr": config.training.lr,
        "settings": shape(config),
        **({"data": [log["data"] for log in logs]} if all("data" in log for log in logs) else {}),
        "steps": [log["steps"] for log in logs],
        "machine": logs[-1].get("machine"),
        "precision": logs[-1].get("precision"),
        "tasks": found["tasks"],
        "matrix": [row["accuracy"] for row in found["rows"]],
        "source": source,
        **{name: found[name] for name in ("last", "average", "backward", "forward")},
        "source_before": source[0],
        "source_after": source[-1],
        "seconds": sum(log["seconds"] for log in logs),
        "memory_bytes": None if None in peaks else max(peaks),
        "memory_of": logs[0].get("memory_of"),
        "trainable": logs[-1]["trainable"],
        "adapter_bytes": sum(file.stat().st_size for file in (stages[-1].output / ADAPTER).glob("*.safetensors")),
        "versions": found["versions"],
    }


def scores(entry: dict[str, Any]) -> dict[str, float]:
    """What an entry says of its learning rate, in the words of a single task; the target is ``last``."""
    before, after, last = entry["source_before"], entry["source_after"], entry["last"]
    return {
        "source_before": before,
        "source_after": after,
        "target_after": last,
        "h_mean": float(h_mean(after, last)),
    }


def table(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each label, in the order of first appearance, as :func:`lorasculpt.comparison.table.table` has them.

    ``matrix`` and ``source`` are means over seeds.
    """
    rows = []
    for label, runs, reference in grouped(entries):
        both = pairs(runs, reference)
        rows.append(
            {
                "label": label,
                "method": runs[0]["method"],
                "seeds": [run["seed"] for run in runs],
                "steps": runs[0]["steps"],
                "lr": runs[0]["lr"],
                **{name: mean_interval([run[name] for run in runs]) for name in NUMBERS},
                "matrix": np.mean([run["matrix"] for run in runs], axis=0).tolist(),
                "source": np.mean([run["source"] for run in runs], axis=0).tolist(),
                **costs(runs, reference),
                "against": {
                    name: paired([one[name] for one, _ in both], [two[name] for _, two in both])
                    for name in NUMBERS
                    if both and name != "source_before"
                },
            }
        )
    return rows


def show(record: dict[str, Any]) -> None:
    """Print the table of a comparison of sequences, the tests against the reference, and every mean matrix."""
    names = {name: words for name, words in NUMBERS.items() if name != "source_before"}
    shown = numbers("method", *names.values())
    reference = stands_for(REFERENCE, record["sequences"])
    tests = numbers(f"against {reference}", *(words for name in names.values() for words in (name, "p")))
    for row in record["table"]:
        shown.add_row(row["label"], *(cell(row[name]) for name in names))
        found = [row["against"].get(name) for name in names]
        if any(found):
            tests.add_row(row["label"], *(text for test in found for text in tested(test)))
    console = Console()
    console.print(shown)
    console.print(made_with(record["table"]))
    if tests.row_count:
        console.print(tests)
    for row in record["table"]:
        matrix = numbers(row["label"], *record["tasks"], "source")
        stages = ("before", *(f"after {task}" for task in record["tasks"]))
        for stage, accuracy, source in zip(stages, row["matrix"], row["source"], strict=True):
            matrix.add_row(stage, *(f"{100 * value:.1f}" for value in (*accuracy, source)))
        console.print(matrix)
    print(f"Points of 100, ± the half of a 95 % interval over seeds. {MEANING}; {measured_in(reference)}.")
    tell_ends(record["rates"])
    tell_missing(record["missing"])
