"""What the runs of a comparison say together: the table, the Pareto front, the comparison at equal target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..evaluation.student import mean_interval, paired
from ..report.results import NUMBERS, REFERENCE, front
from ..report.words import size


def table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each label, in the order of first appearance.

    Every number of a run's summary, and every task after training, is a mean over seeds with the 95 % interval of
    Student's t: how much another seed would change. (How sure the test items make us stands in each run.) ``steps``,
    ``lr``, ``seeds``, and the ``n`` of each task say what is behind it.

    ``against`` are paired t-tests against the rows of ``REFERENCE`` over the seeds that both have; p is not corrected
    for the number of tests. ``time`` is the training time in units of the reference's.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    reference = {run["seed"]: run for run in groups.get(REFERENCE, [])}
    return [_row(label, group, {} if label == REFERENCE else reference) for label, group in groups.items()]


def _row(label: str, runs: list[dict], reference: dict[int, dict]) -> dict[str, Any]:
    first = runs[0]
    pairs = [(run, reference[run["seed"]]) for run in runs if run["seed"] in reference]
    seconds = mean(run["seconds"] for run in runs)
    base = mean(run["seconds"] for run in reference.values()) if reference else seconds
    return {
        "label": label,
        "method": first["method"],
        "seeds": [run["seed"] for run in runs],
        "steps": first["steps"],
        "lr": first["settings"]["training"]["lr"],
        **{name: mean_interval([run["summary"][name] for run in runs]) for name in NUMBERS},
        **{
            side: {
                task: mean_interval([run[side][task]["after"] for run in runs])
                | {"before": found["before"], "n": found["n"]}
                for task, found in first[side].items()
            }
            for side in ("source", "target")
        },
        "seconds": seconds,
        "time": seconds / base if base and (reference or label == REFERENCE) else None,
        "trainable": first["trainable"],
        "adapter_bytes": round(mean(run["adapter_bytes"] for run in runs)),
        "against": {
            name: paired([one["summary"][name] for one, _ in pairs], [two["summary"][name] for _, two in pairs])
            for name in NUMBERS
            if pairs and not name.endswith("_before")
        },
    }


def pareto(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The labels of those rows of a :func:`table` that no other row equals or beats in both source and target."""
    return front({row["label"]: (row["source_after"]["mean"], row["target_after"]["mean"]) for row in rows})


def equal_target(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Source average of every method where its strength gives the target score that all of them reach.

    Read off each run's curve over strength, between its points linearly; the mean over the seeds of a method. Runs
    without a curve (of adapters whose strength cannot be set) are left out.
    """
    runs = [run for run in runs if run["curve"]]
    if not runs:
        return {"target": None, "source": {}}
    level = min(max(point["target"] for point in run["curve"]) for run in runs)
    sources: dict[str, list[float]] = {}
    for run in runs:
        points = sorted(run["curve"], key=lambda point: point["strength"])
        label = run.get("label", run["method"])
        for low, high in pairwise(points):
            if low["target"] <= level <= high["target"]:
                share = (level - low["target"]) / max(high["target"] - low["target"], 1e-9)
                sources.setdefault(label, []).append(low["source"] + share * (high["source"] - low["source"]))
                break
    return {"target": level, "source": {label: float(np.mean(values)) for label, values in sources.items()}}


# --- on the screen --------------------------------------------------------------------------------------------------


def show(path: Path) -> None:
    """Print the table of a comparison, the tests against the reference, and what a reader has to know."""
    record = json.loads(path.read_text())
    columns = ("source_after", "target_after", "retention", "gain", "h_mean", "average")
    shown = Table("method", "seeds", "lr", "source", "target", "retention", "gain", "H-mean", "average", "time", "size")
    tests = Table(f"against {REFERENCE}", "source", "p", "target", "p", "H-mean", "p")
    for row in record["table"]:
        ratio = "-" if row["time"] is None else f"{row['time']:.2f}"
        cells = [row["label"], str(len(row["seeds"])), f"{row['lr']:g}", *(_cell(row[name]) for name in columns)]
        shown.add_row(*cells, ratio, size(row["adapter_bytes"]))
        found = [row["against"].get(name) for name in ("source_after", "target_after", "h_mean")]
        if any(found):
            tests.add_row(row["label"], *(text for test in found for text in _tested(test)))
    console = Console()
    console.print(shown)
    if tests.row_count:
        console.print(tests)
    steps = ", ".join(str(steps) for steps in sorted({row["steps"] for row in record["table"]}))
    print(f"Points of 100, ± the half of a 95 % interval over seeds; {steps} steps; time in that of {REFERENCE}.")
    equal = record["equal_target"]
    if equal["source"]:
        kept = ", ".join(f"{label} {100 * source:.1f}" for label, source in equal["source"].items())
        print(f"Source where all reach the target {100 * equal['target']:.1f}: {kept}.")
    print(f"Pareto front of source and target: {', '.join(record['pareto'])}.")
    for label, rates in record["rates"].items():
        tried = [float(rate) for rate in rates["validation"]]
        for end, best, beyond in ((min, "smallest", "smaller"), (max, "largest", "larger")):
            if tried and rates["chosen"] == end(tried):
                print(f"{label}: of the learning rates the {best} did best; a {beyond} one may do better.")
    if not record["complete"]:
        print(f"{len(record['missing'])} runs are still missing.")


def _cell(found: dict[str, float | None]) -> str:
    """``71.3 ±2.0``"""
    value, high = found["mean"], found["high"]
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ±{100 * (high - value):.1f}" if high is not None else "")


def _tested(found: dict[str, float | None] | None) -> tuple[str, str]:
    """``+3.1 ±2.0`` and ``0.012``"""
    if found is None:
        return "-", "-"
    difference, high, p = found["difference"], found["high"], found["p"]
    assert difference is not None  # of two pairs or more everything but t and p is known
    assert high is not None
    return f"{100 * difference:+.1f} ±{100 * (high - difference):.1f}", "-" if p is None else f"{p:.3f}"
