"""The runs of a comparison, in the order in which they are made, and what those that are done say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import Diverged, UserError
from ..hub import public_name
from ..provenance import versions
from ..run.folder import RUN_FILE, diverged, same_run, trained_alike
from ..run.records import check_metrics, general_data
from ..train import take
from . import edits, known, labels, runs
from .known import Known
from .runs import Run, choose, numbers
from .sequences import InTurn
from .single import Single


class Comparison:
    """The runs of a comparison, and what those that are done say.

    Args:
        config: The run that all have in common; their folders are made in its ``output``.
        methods: What is compared: methods (`lorasculpt.kinds`), or names of your own that ``config.methods`` explains
            (`lorasculpt.comparison.labels`). Default: all that ``config.methods`` explains, in its order.
        seeds: How many, from ``config.seed`` upwards, of a label that does not say it itself.
        rates: One to three learning rates, of a label that says nothing of them. One is used as it is; of several each
            label takes the one that is best for it on the validation set, the lowest of equals. Default: ``RATES``.
        results: A file that an earlier comparison wrote. Runs of it are not made again if label, seed and settings are
            those of a run here, and its test was asked in that manner, as many questions with the same commonest
            answer; of a trial, if the rates were chosen by the same rule. Default: none.

    Raises:
        UserError: for what can be told about these before anything is trained.
    """

    def __init__(
        self,
        config: RunConfig,
        methods: Sequence[str] | None = None,
        seeds: int = 3,
        rates: Sequence[float] | None = None,
        results: Path | None = None,
    ):
        self.config = config
        self.scenario = InTurn(config) if config.data.sequence else Single(config)
        check_metrics(config)
        if (config.output / RUN_FILE).is_file():
            raise config.error("output", f"is {config.output}, which holds a single run; add output=FOLDER for this.")
        methods = list(config.methods) if methods is None else methods
        if not methods or len(set(methods)) < len(methods):
            raise UserError("--methods must name each method once, such as lora,lorasculpt, or the file list methods.")
        rates = self.scenario.rates if rates is None else rates
        if mistake := labels.mistaken(rates):
            raise UserError(f"--rates {mistake}.")
        if seeds < 1:
            raise UserError("--seeds must be at least 1.")
        self.labels = labels.read(config, methods, seeds, rates)
        last = config.seed + max(what.seeds for what in self.labels.values()) - 1
        if last >= 2**32:
            raise config.error(
                "seed", f"is {config.seed}, so the last of the seeds would be {last}: it is below 2**32."
            )
        self.scenario.check(self.labels)
        self._known = known.read(results, self.scenario.rows) if results else Known()
        self._results: dict[Path, dict[str, Any]] = {}

    def trials(self) -> list[Run]:
        """The runs that choose the rates; none where there is one rate."""
        return runs.trials(self.scenario.common["validation"], self.labels)

    def tests(self) -> list[Run]:
        """The runs at the rates that are chosen already, in the order in which they are made (`runs.wanted`)."""
        chosen = {label: found["chosen"] for label, found in self.rates_of().items()}
        return runs.tests(self.scenario.common["test"], self.labels, chosen)

    def rates_of(self) -> dict[str, dict[str, Any]]:
        """By label what each rate did on the validation set, and the rate that is ``chosen`` (`runs.choose`)."""
        tried: dict[str, dict[float, dict]] = {label: {} for label in self.labels}
        for run, result in self.done(self.trials()):
            tried[run.label][run.rate] = self._scores(result)
        return choose(self.labels, tried)

    def result(self, run: Run) -> dict[str, Any] | None:
        """What was measured in ``run``, without its pictures; None if that is still to be done.

        Raises:
            UserError: if its folder holds another run.
        """
        folder = run.config.output
        if folder not in self._results:
            found = self.scenario.read(run) or _diverged(run)
            if found and not self._same_data(found):
                words = f"has other rows than {folder} was trained on; name another output, or remove it."
                raise self.config.error("data", words)
            if found := found or self._recorded(run):
                self._results[folder] = found | {"label": run.label}
        return self._results.get(folder)

    def _recorded(self, run: Run) -> dict[str, Any] | None:
        """What the results file says of ``run``."""
        found = self._known.find(run, self.scenario.validation)
        return found if found and self._same_data(found) and self.scenario.asked_alike(found, run) else None

    def _same_data(self, found: dict[str, Any]) -> bool:
        """Whether it is of a run that was trained on the rows of today, where it tells."""
        if found.get("data") not in (None, self.scenario.data):
            return False
        return found.get("general") is None or self._general in (None, found["general"])

    @cached_property
    def _general(self) -> str | None:
        """What tells the rows of ``data.general``, for runs that learned from them."""
        return general_data(self.config)

    def _scores(self, result: dict[str, Any]) -> dict[str, float]:
        """What a trial says of its rate; one of the results file, and one that diverged, have nothing else."""
        return result["scores"] if "scores" in result else self.scenario.scores(result)

    def done(self, asked: Iterable[Run]) -> list[tuple[Run, dict[str, Any]]]:
        """Those of ``asked`` that are there, each with its result."""
        return [(run, result) for run in asked if (result := self.result(run)) is not None]

    def make(self, run: Run, progress: bool = True) -> float:
        """Train ``run`` and measure it, where that is still to be done; the base is asked once for all.

        A trial whose weights come to no numbers is done with that. What another run was trained to is taken from it.

        Returns:
            The seconds that this saves.

        Raises:
            UserError: also where the base does not do what it did in the runs of the results file.
        """
        measured = self.result(run) is not None  # elsewhere, and an edit needs its adapter
        saved = self._take(run)
        try:
            self.scenario.make(run, adapter_only=measured, progress=progress)
        except Diverged:
            if not run.trial:
                raise
        if not measured:
            self._check_base(run)
        return saved

    def _check_base(self, run: Run) -> None:
        """Raise :class:`UserError` if the base of ``run``, just made, is not that of the results file."""
        side, *_ = numbers(self.config)
        if own := self.result(run):
            for other in self.trials() if run.trial else self.tests():
                if found := self._recorded(other):
                    self._known.check(side, self._scores(found)[side], self._scores(own)[side])

    def _take(self, run: Run) -> float:
        """Give ``run`` the adapter of one that was trained alike, as a trial and the first test are; its seconds or 0.

        What is measured while it trains, and a sequence, is made by training.
        """
        config = run.config
        if run.edit or config.data.sequence or config.evaluate.every or (config.output / RUN_FILE).is_file():
            return 0.0
        for other, _ in self.done((*self.trials(), *self.tests())):
            if other.edit is None and trained_alike(other.config.output, config):
                return take(config, other.config.output)
        return 0.0

    def command(self, run: Run) -> str:
        """The shell line that does what :meth:`make` would."""
        self._take(run)
        return self.scenario.command(run, adapter_only=self.result(run) is not None)

    def next(self) -> Run | None:
        """The run to be made now; None where all are done.

        A label's trials come right before its first test, so that what is done can be read at any time: some labels
        whole with one seed, then all, then more seeds.
        """
        order = runs.wanted(self.labels, self.config.seed)
        planned = sorted((*self.trials(), *self.tests()), key=lambda run: order.index((run.label, run.config.seed)))
        return next((self._first(run) for run in planned if self.result(run) is None), None)

    def _first(self, run: Run) -> Run:
        """What is to be made for ``run``: it, or what it edits where that has no adapter here."""
        if run.of is None or edits.ready(run.of):
            return run
        return next(test for test in self.tests() if test.config.output == run.of)

    def ready(self) -> list[Run]:
        """The runs that are still to be made and can be made now, in any order."""
        left = [run for run in (*self.trials(), *self.tests()) if self.result(run) is None]
        return list({first.name: first for first in map(self._first, left)}.values())

    def missing(self) -> list[str]:
        """What is still to be done: trials by their folders, tests by method and seed."""
        return [name for name, _ in self.left()]

    def left(self) -> list[tuple[str, tuple[str, str]]]:
        """What is :meth:`missing`, and of what kind each is: its cost is like that of others of this kind."""
        trials = [(run.name, run.kind) for run in self.trials() if self.result(run) is None]
        done = {(run.label, run.config.seed) for run, _ in self.done(self.tests())}
        return trials + [
            (f"test/{label}-seed{seed}", ("edit" if self.labels[label].edit else "test", label))
            for label, seed in runs.wanted(self.labels, self.config.seed)
            if (label, seed) not in done
        ]

    def costs(self) -> list[tuple[tuple[str, str], float]]:
        """The kind of each trained run that is there, and what its training took, in seconds: not what measuring did.

        An edit costs no training; the time in its results is that of what it edits. A trial of the results file tells
        none.
        """
        trained = [run for run in (*self.trials(), *self.tests()) if run.edit is None]
        return [(run.kind, result["seconds"]) for run, result in self.done(trained) if "seconds" in result]

    def left_out(self) -> int:
        """How many runs of the results file are not of this comparison, or no longer what is measured here."""
        own = [result for _, result in self.done(self.tests())]
        return sum(one not in own for one in self._known.tests)

    def other_base(self) -> str | None:
        """The name of the base that the results file is of, where it is not called as that of today."""
        before = self._known.base
        return before if before not in (None, public_name(self.config.base)) else None

    def record(self) -> dict[str, Any]:
        """Everything that is known by now, as a results file: the runs one by one, and what they say together.

        ``table`` is :func:`~lorasculpt.comparison.table.table`, with which rows have all their seeds; ``pareto`` and
        ``equal_target`` are made by those beside it, ``drift`` by `lorasculpt.evaluation.correlation`; without source
        tasks they are of what is kept by drift. ``missing`` is empty where ``complete``. A run has the ``versions``
        that it was made with, and each of its target tasks its ``majority``, the score of the commonest answer: to
        reach that proves nothing. Of tasks in turn there are ``sequences`` and their table instead.
        """
        scenario, missing = self.scenario, self.missing()
        chosen_on = scenario.validation
        if any(what.by == "h_mean" for what in self.labels.values()) and not self.config.evaluate.validation_source:
            chosen_on += ", and for h_mean the source of the tests, evaluate.source"
        tests = [result for _, result in self.done(self.tests())]
        order = list(self.labels)
        rows = scenario.table(sorted(tests, key=lambda result: order.index(result["label"])))
        rows = [row | {"complete": len(row["seeds"]) == self.labels[row["label"]].seeds} for row in rows]
        return {
            "schema": 1,
            "complete": not missing,
            "missing": missing,
            "versions": versions(),
            "base": self._known.base or public_name(self.config.base),
            **scenario.heading,
            "validation": chosen_on,
            "rates": self.rates_of(),
            "trials": [
                known.trial(run, result | {"scores": self._scores(result)}, scenario.validation)
                for run, result in self.done(self.trials())
            ],
            scenario.rows: tests,
            "table": rows,
            **scenario.together(tests, rows),
        }


def _diverged(run: Run) -> dict[str, Any] | None:
    """What a trial says whose weights came to no numbers: no score, and at which ``step`` of how many."""
    folder = run.config.output
    if not run.trial or (found := diverged(folder)) is None or not same_run(folder, run.config):
        return None
    scores = dict.fromkeys(numbers(run.config))
    return {"scores": scores | {"diverged": [found["step"], found["steps"]]}, "versions": found["versions"]}
