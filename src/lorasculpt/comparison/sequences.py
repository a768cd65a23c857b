"""A comparison on tasks in turn: what its sequences are asked, what a finished one says, and what several do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console

from ..config import RunConfig
from ..console import numbers
from ..evaluation.student import mean_interval, paired
from ..evaluation.summary import h_mean
from ..measure import answered_alike, shape
from ..report.results import REFERENCE, stands_for
from ..run.folder import ADAPTER, LOG_FILE, check_output
from ..run.records import questions, training_rows
from ..sequence import MATRIX_FILE, asked, grown, learn, stages_of
from .labels import Label
from .runs import RATES, Run
from .single import TESTED, changed, choosing
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


class InTurn:
    """As `Single`, of runs that each learn several tasks in turn (`lorasculpt.sequence`).

    The source is that of ``evaluate``, the target that of each task. Where the tasks have ``validation`` files, a trial
    is the whole sequence, measured on those files; its score is ``last``. Otherwise nothing is chosen: a label has the
    rate that it says, or the one of ``rates`` (default: ``training.lr``).
    """

    rows, validation = "sequences", "data.sequence"

    def __init__(self, config: RunConfig):
        if not config.evaluate.source:
            raise config.error("evaluate", "must name source, which is to be kept; the target is that of each task.")
        stages = config.data.sequence
        tests = {stage.test.resolve() for stage in stages}
        for number, stage in enumerate(stages):
            if stage.validation and stage.validation.resolve() in tests:
                place = f"data.sequence.{number}.validation"
                raise config.error(place, "is a file that is tested on; rates may not be chosen on it.")
        tested = [stage.model_copy(update={"validation": None}) for stage in stages]
        tried = [stage.model_copy(update={"test": stage.validation, "validation": None}) for stage in stages]
        self.config = config
        self.heading = {"tasks": [stage.name for stage in stages]}
        self.validated = all(stage.validation for stage in stages)
        self.rates: Sequence[float] = RATES if self.validated else [config.training.lr]
        self.common = {
            "validation": changed(config, {"sequence": tried}, choosing(config.evaluate)),
            "test": changed(config, {"sequence": tested}, TESTED),
        }

    def check(self, labels: Mapping[str, Label]) -> None:
        """Raise :class:`UserError` for a label that a sequence cannot be learned as it says."""
        config = self.config
        for label, what in labels.items():
            if len(what.rates) > 1 and not self.validated:
                place = f"methods.{label}" if "rates" in config.methods.get(label, {}) else "data.sequence"
                words = "has no validation set to choose a learning rate on; give one rate, or each task such a file."
                raise config.error(place, words)
            if what.edit or what.replay:
                key = "edit" if what.edit else "replay"
                raise config.error(f"methods.{label}.{key}", "is not for a sequence; remove the label.")
            grown(config.single(label, what.method))

    @cached_property
    def data(self) -> Any:
        return [training_rows(stage, check_images=False).data for stage in stages_of(self.config)]

    @cached_property
    def _questions(self) -> dict[str, str]:
        """By group, what tells what its runs are asked from other questions."""
        groups = self.common if self.validated else {"test": self.common["test"]}
        return {group: questions([task for side in asked(common) for task in side]) for group, common in groups.items()}

    def read(self, run: Run) -> dict[str, Any] | None:
        if (found := entry(run.config)) is not None:
            check_output(run.config.output, run.config)
        return found if found is None or self.asked_alike(found, run) else None  # and is measured again

    def asked_alike(self, found: dict[str, Any], run: Run) -> bool:
        """Whether ``found`` was asked what ``run`` is asked today, as far as it tells."""
        alike = found.get("questions") in (None, self._questions[run.group])
        return alike and answered_alike(found.get("evaluate"), run.config)

    def scores(self, result: dict[str, Any]) -> dict[str, float]:
        ends = {name: result[name] for name in ("source_before", "source_after")}
        last = result["last"]  # what is left of all tasks
        return ends | {"target_after": last, "h_mean": float(h_mean(result["source_after"], last))}

    def make(self, run: Run, *, adapter_only: bool, progress: bool) -> None:
        learn(run.config, progress=progress)

    def command(self, run: Run, *, adapter_only: bool) -> str:
        return f"lorasculpt train {shlex.quote(str(run.write()))}"

    def table(self, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return table(runs)

    def together(self, runs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}


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
        **{key: logs[0][key] for key in ("general",) if key in logs[0]},
        **{key: found[key] for key in ("questions", "evaluate") if key in found},
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
