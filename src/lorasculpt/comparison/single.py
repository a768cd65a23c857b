"""A comparison on one task: what its runs are asked, how each is made and read, and what they say together."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..config import Evaluate, RunConfig
from ..evaluation.correlation import drift_and_loss
from ..evaluation.score import majority
from ..evaluation.tasks import Task
from ..measure import answered_alike, chosen_on, measure, measured, tells
from ..report.results import with_kept
from ..run.folder import DRIFT_FILE, check_output
from ..run.records import general, held_out, questions, training_rows, uses_general
from ..train import train
from . import edits
from .labels import Label
from .runs import RATES, Run, numbers
from .table import equal_target, pareto, table

TESTED: dict[str, Any] = {"validation": [], "validation_source": []}  # once a rate is chosen
SHARE = 0.1  # of the training rows, to validate with where there is no file


class Single:
    """How runs on one task are asked, made and read, and what they say together.

    Args:
        config: The run that all have in common.

    Raises:
        UserError: it does not say what to train on and what to measure.
    """

    rows = "runs"  # where a record has its tests
    heading: ClassVar[dict[str, Any]] = {}  # what it says first, for itself
    rates: ClassVar[Sequence[float]] = RATES  # where none are given

    def __init__(self, config: RunConfig):
        asked = config.evaluate
        if not asked.target or not (asked.source or asked.drift):
            raise config.error(
                "evaluate",
                "must name what to measure: source (to be kept) and target (to be learned), or without source data "
                "drift, such as drift: 32.",
            )
        if not asked.source and asked.validation_source:
            raise config.error("evaluate.validation_source", "is like evaluate.source, which is not given; name both.")
        if not asked.source and config.projector == "full":
            raise config.error("projector", "is full, so there is no drift to measure; name evaluate.source.")
        if {path.resolve() for path in asked.validation} & {path.resolve() for path in asked.target}:
            raise config.error("evaluate.validation", "holds a file of evaluate.target; rates may not be chosen on it.")
        self.config = config
        share = None if asked.validation else config.data.validation or SHARE
        #: The questions by whose target a rate is chosen, in words.
        self.validation = "evaluate.validation" if share is None else f"{share:g} of data.train"
        #: By group, what its runs have in common. Where a strength is chosen, it is not chosen on the test.
        self.common = {
            "validation": changed(config, {"validation": share}, choosing(asked)),
            "test": changed(config, {"validation": None}, {} if asked.retain else TESTED),
        }
        self._questions = {group: Questions(common) for group, common in self.common.items()}
        self._texts: dict[str, Path] = {}  # what it says by itself, for the drift; of trials about other pictures

    def check(self, labels: Mapping[str, Label]) -> None:
        """Raise :class:`UserError` for a row of general data that is measured: now, not after the trials."""
        for label, what in labels.items():
            data = self.config.data.model_copy(update={"replay": what.replay})
            if what.edit is None and uses_general(self.config.single(label, what.method, data=data)):
                general(self.config)
                break

    @cached_property
    def data(self) -> Any:
        """What tells the rows that a run is trained on from others, as an entry has it under ``data``."""
        return training_rows(self.config, check_images=False).data

    def read(self, run: Run) -> dict[str, Any] | None:
        """What was measured in ``run``, without its pictures; the versions that it was made with may not be today's."""
        if (content := measured(run.config)) is None:
            return None
        check_output(run.config.output, run.config)
        found, asked = content["runs"][0], self._questions[run.group]
        if found.get("questions") not in (None, asked.fingerprint) or not self._chosen_alike(found, run):
            return None  # and is measured again
        found = {key: value for key, value in found.items() if key != "gallery"}
        if run.edit:
            edits.check(run.edit, run.config)
            found["edit"] = run.edit.made(run.config)
        found["versions"] = content["versions"]
        return found if run.trial else asked.beside_majority(found)

    def asked_alike(self, found: dict[str, Any], run: Run) -> bool:
        """Whether ``found``, which the results file has for ``run``, was asked what ``run`` is asked today."""
        asked, how = self._questions[run.group], found.get("evaluate")
        if run.trial:  # which else went by drift, and there is a source now, or the other way round
            alike = answered_alike(how, run.config) and found.get("questions") in (None, asked.fingerprint)
            return alike and found["scores"].keys() >= set(numbers(self.config))
        return tells(how, run.config) and self._chosen_alike(found, run) and asked.same(found)

    def _chosen_alike(self, found: dict[str, Any], run: Run) -> bool:
        """Whether the strength of ``found`` was chosen on the questions that ``run`` chooses it on, as far as it tells.

        It is no longer where it was chosen on the test.
        """
        asked, budget = run.config.evaluate, found.get("budget") or {}
        if not (asked.retain and asked.validation) or "fixed" in budget:
            return True
        return "on" in budget and budget.get("questions") in (None, self._chosen_on)

    @cached_property
    def _chosen_on(self) -> str | None:
        return chosen_on(self.common["test"])

    def scores(self, result: dict[str, Any]) -> dict[str, float]:
        """The numbers that choose a rate, out of a measured run's summary."""
        summary = with_kept(result)["summary"]
        return {name: summary[name] for name in numbers(self.config)}

    def make(self, run: Run, *, adapter_only: bool, progress: bool) -> None:
        """Train ``run`` or edit what it is of, and measure it unless its adapter is all that is needed."""
        if run.edit and run.of:
            edits.apply(run.edit, run.config, run.of)
        else:
            train(run.config, progress=progress)
        if adapter_only:
            return
        texts = run.config.output / DRIFT_FILE
        if run.group in self._texts and not texts.is_file():
            shutil.copy(self._texts[run.group], texts)
        measure(run.config, progress=progress)
        if texts.is_file():
            self._texts[run.group] = texts

    def command(self, run: Run, *, adapter_only: bool) -> str:
        """The shell line that does what :meth:`make` would."""
        path = shlex.quote(str(run.write()))
        first = edits.command(run.edit, run.config, run.of) if run.edit and run.of else f"lorasculpt train {path}"
        return first if adapter_only else f"{first} && lorasculpt eval {path}"

    def table(self, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The results ``runs`` as one row for each label."""
        return table([with_kept(run) for run in runs])

    def together(self, runs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What else the results ``runs`` say together; ``rows`` are their table."""
        equal = equal_target([with_kept(run) for run in runs])
        return {"pareto": pareto(rows), "equal_target": equal, "drift": drift_and_loss(runs)}


@dataclass(frozen=True)
class Questions:
    """What the runs of a group, which have ``common``, are asked; read once, and not before it is needed."""

    common: RunConfig

    @cached_property
    def tasks(self) -> tuple[list[Task], list[Task]]:
        """Those of the source and of the target."""
        return held_out(self.common)

    @cached_property
    def fingerprint(self) -> str:
        """What tells these questions from others."""
        source, target = self.tasks
        return questions([*source, *target])

    @cached_property
    def majority(self) -> dict[str, float]:
        """By target task, what the commonest answer gets."""
        return {task.name: majority(task.records, task.metric) for task in self.tasks[1]}

    def beside_majority(self, run: dict[str, Any]) -> dict[str, Any]:
        """A result with ``majority`` in each target task; None where the files no longer have that task."""
        target = {name: found | {"majority": self.majority.get(name)} for name, found in run["target"].items()}
        return run | {"target": target}

    def same(self, found: dict[str, Any]) -> bool:
        """Whether a run of the results file was asked as many questions as are asked here, with these answers."""
        numbers = [{name: task["n"] for name, task in found[side].items()} for side in ("source", "target")]
        here = [{task.name: len(task.records) for task in side} for side in self.tasks]
        same = numbers == here and found == self.beside_majority(found)
        return same and ("questions" not in found or found["questions"] == self.fingerprint)


def changed(config: RunConfig, data: dict[str, Any], evaluate: dict[str, Any]) -> RunConfig:
    """``config`` with other values in ``data`` and ``evaluate``."""
    parts = {"data": config.data.model_copy(update=data), "evaluate": config.evaluate.model_copy(update=evaluate)}
    return config.model_copy(update=parts)


def choosing(asked: Evaluate) -> dict[str, Any]:
    """What trials change in ``evaluate``, which is ``asked`` of the tests: they choose a rate and nothing else."""
    return TESTED | {
        "strengths": [],
        "every": None,
        "drift": None if asked.source else asked.drift,
        "target": asked.validation or asked.target,
        "source": asked.validation_source or asked.source,
    }
