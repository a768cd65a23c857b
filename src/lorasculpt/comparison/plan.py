"""The runs of a comparison, in the order in which they are made, and what those that are done say."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import Diverged, UserError
from ..evaluation.correlation import drift_and_loss
from ..evaluation.score import majority
from ..evaluation.tasks import Task
from ..files import write_text
from ..measure import measure, measured, shape, tells
from ..provenance import versions
from ..report.results import with_kept
from ..run.folder import DRIFT_FILE, RUN_FILE, check_output, diverged, same_run
from ..run.records import check_metrics, general, held_out, questions, training_rows
from ..train import train
from . import edits, known, labels
from .edits import Edit
from .known import Known
from .labels import CHOICES
from .table import equal_target, pareto, table

RATES = (2e-4, 5e-4, 1.5e-3)
TESTED: dict[str, Any] = {"validation": [], "validation_source": []}  # once a rate is chosen
SHARE = 0.1  # of the training rows, to validate with where there is no file


@dataclass(frozen=True)
class Run:
    """One run of a comparison: the method called ``label`` at a learning rate, and everything else about it.

    With ``edit`` it is not trained: the adapter of the run in the folder ``of`` is edited.
    """

    label: str
    rate: float
    config: RunConfig
    edit: Edit | None = None
    of: Path | None = None

    @property
    def name(self) -> str:
        """Its folder in that of the comparison."""
        return "/".join(self.config.output.parts[-2:])

    @property
    def trial(self) -> bool:
        """Whether it is there to choose a rate."""
        return self.config.output.parent.name == "validation"

    @property
    def kind(self) -> tuple[str, str]:
        """What decides its cost: whether it is a trial, a test or an edit, and its label."""
        return "edit" if self.edit else self.config.output.parent.name, self.label

    def write(self) -> Path:
        """Write its YAML file, beside its folder."""
        path = Path(f"{self.config.output}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.config.to_yaml())
        return path


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

    rows = "runs"  # where a record has its tests

    def __init__(
        self,
        config: RunConfig,
        methods: Sequence[str] | None = None,
        seeds: int = 3,
        rates: Sequence[float] | None = None,
        results: Path | None = None,
    ):
        self._check(config)
        check_metrics(config)
        if (config.output / RUN_FILE).is_file():
            raise config.error("output", f"is {config.output}, which holds a single run; add output=FOLDER for this.")
        methods = list(config.methods) if methods is None else methods
        if not methods or len(set(methods)) < len(methods):
            raise UserError("--methods must name each method once, such as lora,lorasculpt, or the file list methods.")
        rates = self._rates(config) if rates is None else rates
        if mistake := labels.mistaken(rates):
            raise UserError(f"--rates {mistake}.")
        if seeds < 1:
            raise UserError("--seeds must be at least 1.")
        self.config = config
        self.labels = labels.read(config, methods, seeds, rates)
        if config.data.train and any(what.replay for what in self.labels.values()):
            general(config)  # a row that is measured is told now, not after the trials
        self._known = known.read(results, self.rows) if results else Known()
        self._results: dict[Path, dict[str, Any]] = {}
        self._told: dict[bool, str] = {}
        self._texts: dict[bool, Path] = {}  # what it says by itself, for the drift; of trials about other pictures

    def _check(self, config: RunConfig) -> None:
        """Raise :class:`UserError` unless ``config`` says what to train on and what to measure."""
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
        if set(config.evaluate.validation) & set(config.evaluate.target):
            raise config.error("evaluate.validation", "holds a file of evaluate.target; rates may not be chosen on it.")

    def _rates(self, config: RunConfig) -> Sequence[float]:
        """The learning rates where none are given."""
        return RATES

    def trials(self) -> list[Run]:
        """The runs that choose the rates; none where there is one rate."""
        return [
            self._run("validation", label, rate, self.config.seed)
            for label, what in self.labels.items()
            if len(what.rates) > 1
            for rate in what.rates
        ]

    def _asked(self, group: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the runs of a group, ``"validation"`` or ``"test"``, have of their own in ``data`` and ``evaluate``."""
        if group == "test":  # where a strength is chosen, it is not chosen on the test
            return {"validation": None}, {} if self.config.evaluate.retain else TESTED
        config = self.config
        share = None if config.evaluate.validation else config.data.validation or SHARE
        changes = TESTED | {
            "strengths": [],
            "every": None,
            "drift": None if config.evaluate.source else config.evaluate.drift,
            "target": config.evaluate.validation or config.evaluate.target,
            "source": config.evaluate.validation_source or config.evaluate.source,
        }
        return {"validation": share}, changes

    def _run(self, group: str, label: str, rate: float, seed: int) -> Run:
        config, what = self.config, self.labels[label]
        data, changes = self._asked(group)

        def folder(label: str | None) -> Path:
            return config.output / group / f"{label}-lr{rate:g}-seed{seed}"

        made = config.single(
            label,
            what.method,
            seed=seed,
            output=folder(label),
            data=config.data.model_copy(update=data | {"replay": what.replay}),
            training=config.training.model_copy(update={"lr": rate}),
            evaluate=config.evaluate.model_copy(update=changes),
        )
        return Run(label, rate, made, what.edit, folder(what.like) if what.edit else None)

    def result(self, run: Run) -> dict[str, Any] | None:
        """What was measured in ``run``, without its pictures; None if that is still to be done.

        Raises:
            UserError: if its folder holds another run.
        """
        folder = run.config.output
        if folder not in self._results:
            if (found := self._read(run)) is not None:
                if not self._same_data(found):
                    raise self.config.error(
                        "data", f"has other rows than {folder} was trained on; name another output, or remove it."
                    )
                kept = {key: value for key, value in found.items() if key != "gallery"}
                self._results[folder] = kept | {"label": run.label}
            elif (found := self._recorded(run)) is not None:
                self._results[folder] = found
        return self._results.get(folder)

    def _recorded(self, run: Run) -> dict[str, Any] | None:
        """What the results file says of ``run``."""
        wanted = {"label": run.label, "seed": run.config.seed, "settings": shape(run.config)}
        wanted |= {"edit": run.edit.made(run.config)} if run.edit else {}
        if run.trial:
            found = self._known.find("validation", **wanted, validation=self._validation)
            if found is None or not found["scores"].keys() >= set(self._told_of_trials):
                return None  # or it went by drift, and there is a source now, or the other way round
            return found if self._same_data(found) else None
        found = self._known.find("test", **wanted)
        if found is None or not tells(found.get("evaluate"), run.config) or not self._same_data(found):
            return None
        asked = run.config.evaluate
        if asked.retain and asked.validation and not {"on", "fixed"} & (found.get("budget") or {}).keys():
            return None  # its strength was chosen on the test
        return found if self._same_questions(found) else None

    def _same_data(self, found: dict[str, Any]) -> bool:
        """Whether an entry of the results file was trained on the rows of today, where it tells."""
        return found.get("data") in (None, self._data)

    @cached_property
    def _data(self) -> Any:
        """What an entry has under ``data``."""
        return training_rows(self.config, check_images=False).data

    def _same_questions(self, found: dict[str, Any]) -> bool:
        """Whether a run of the results file was asked as many questions as are asked here, with these answers."""
        numbers = tuple({name: task["n"] for name, task in found[side].items()} for side in ("source", "target"))
        same = numbers == self._numbers and found == self._beside_majority(found)
        return same and ("questions" not in found or found["questions"] == self._questions(trial=False))

    def _questions(self, *, trial: bool) -> str:
        """What tells the questions of today's tests, or trials, from others."""
        if trial not in self._told:
            source, target = self._held_out("validation") if trial else self._test
            self._told[trial] = questions([*source, *target])
        return self._told[trial]

    def _read(self, run: Run) -> dict[str, Any] | None:
        """What was measured in ``run``, with the versions that it was made with, which may not be those of today."""
        if (content := measured(run.config)) is None:
            return self._diverged(run)
        check_output(run.config.output, run.config)
        asked = content["runs"][0].get("questions")
        if asked is not None and asked != self._questions(trial=run.trial):
            return None  # and is measured again
        if run.edit:
            edits.check(run.edit, run.config)
        edited = {"edit": run.edit.made(run.config)} if run.edit else {}
        return content["runs"][0] | edited | {"versions": content["versions"]}

    def _diverged(self, run: Run) -> dict[str, Any] | None:
        """What a trial says whose weights came to no numbers: no score, and at which ``step`` of how many."""
        folder = run.config.output
        if not run.trial or (found := diverged(folder)) is None or not same_run(folder, run.config):
            return None
        scores = dict.fromkeys(self._told_of_trials)
        return {"scores": scores | {"diverged": [found["step"], found["steps"]]}, "versions": found["versions"]}

    def make(self, run: Run, progress: bool = True) -> None:
        """Train ``run`` and measure it, where that is still to be done; the base is asked once for all.

        A trial whose weights come to no numbers is done with that.

        Raises:
            UserError: also where the base does not do what it did in the runs of the results file.
        """
        try:
            self._make(run, progress)
        except Diverged:
            if not run.trial:
                raise

    def _make(self, run: Run, progress: bool) -> None:
        if run.edit and run.of:
            edits.apply(run.edit, run.config, run.of)
        else:
            train(run.config, progress=progress)
        if self.result(run) is not None:
            return  # measured elsewhere: what is needed of it is its adapter
        texts = run.config.output / DRIFT_FILE
        if run.trial in self._texts and not texts.is_file():
            shutil.copy(self._texts[run.trial], texts)
        measure(run.config, progress=progress)
        if texts.is_file():
            self._texts[run.trial] = texts
        self._compare_base(run)

    def _compare_base(self, run: Run) -> None:
        """Raise :class:`UserError` if the base of ``run``, just made, is not that of the results file."""
        if (own := self.result(run)) is None:
            return
        for other in self.trials() if run.trial else self.tests():
            if (found := self._recorded(other)) is not None:
                side, *_ = self._told_of_trials
                self._known.check(side, *(self._scores(one)[side] for one in (found, own)))

    def command(self, run: Run) -> str:
        """The shell line that does what :meth:`make` would."""
        path = shlex.quote(str(run.write()))
        if self.result(run) is not None:
            return f"lorasculpt train {path}"
        first = edits.command(run.edit, run.config, run.of) if run.edit and run.of else f"lorasculpt train {path}"
        return f"{first} && lorasculpt eval {path}"

    def rates_of(self) -> dict[str, dict[str, Any]]:
        """By label what each rate did on the validation set, and the rate that is ``chosen`` (None: not yet known).

        It is the one that is best ``by`` the target, or by the number that the label names, of those with which the
        weights stayed finite. A label that takes the rate of another, or chooses among its trials, says of which:
        ``like``.
        """
        scores: dict[str, dict[float, dict]] = {label: {} for label in self.labels}
        for run in self.trials():
            if (result := self.result(run)) is not None:
                scores[run.label][run.rate] = self._scores(result)
        found: dict[str, dict[str, Any]] = {}
        for label, what in self.labels.items():
            tried, rate = scores[label], what.rates[0] if len(what.rates) == 1 else None
            if tried and len(tried) == len(what.rates):
                rate = _best(tried, what.by or "target")
            found[label] = {"validation": {f"{rate:g}": score for rate, score in tried.items()}, "chosen": rate}
        for label in self._order():
            what = self.labels[label]
            if what.like:
                tried, chosen = scores[what.like], found[what.like]["chosen"]
                if what.by and tried and len(tried) == len(self.labels[what.like].rates):
                    chosen = _best(tried, what.by)
                found[label] |= {"chosen": chosen, "like": what.like}
            if what.by:
                found[label] |= {"by": what.by}
        return found

    def _scores(self, result: dict[str, Any]) -> dict[str, float]:
        """What a trial says of its rate; that of a results file has nothing else."""
        return result["scores"] if "scores" in result else self._scored(result)

    def _scored(self, result: dict[str, Any]) -> dict[str, float]:
        """The numbers that choose a rate, out of a measured run's summary."""
        summary = with_kept(result)["summary"]
        return {key: summary[key] for key in self._told_of_trials}

    @property
    def _told_of_trials(self) -> tuple[str, ...]:
        """The numbers that are told of a trial; the first is of the base alone."""
        if self.config.evaluate.source:
            return "source_before", "source_after", "target_after", "h_mean"
        return "target_before", "target_after", "kept"

    def tests(self) -> list[Run]:
        """The runs at the rates that are chosen already: every label with the first seed before any with the next.

        Of one seed, edits come after what they are edits of.
        """
        chosen = {label: found["chosen"] for label, found in self.rates_of().items()}
        return [
            self._run("test", label, chosen[label], seed) for label, seed in self._wanted() if chosen[label] is not None
        ]

    def _wanted(self) -> list[tuple[str, int]]:
        """Label and seed of every test, in the order in which they are made."""
        order = self._order()
        most = max(what.seeds for what in self.labels.values())
        return [(label, self.config.seed + n) for n in range(most) for label in order if n < self.labels[label].seeds]

    def _order(self) -> list[str]:
        """The labels, edits last: what they are edits of, its rate above all, is known before."""
        return sorted(self.labels, key=lambda label: self.labels[label].edit is not None)

    def next(self) -> Run | None:
        """The run to be made now; None where all are done.

        A label's trials come right before its first test, so that what is done can be read at any time: some labels
        whole with one seed, then all, then more seeds.
        """
        trials, tests = self.trials(), {(test.label, test.config.seed): test for test in self.tests()}
        for label, seed in self._wanted():
            own = [trial for trial in trials if trial.label == label and seed == self.config.seed]
            own += [tests[label, seed]] if (label, seed) in tests else []
            for run in own:
                if self.result(run) is None:
                    return self._first(run)
        return None

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
        done = {(run.label, run.config.seed) for run in self.tests() if self.result(run) is not None}
        return trials + [
            (f"test/{label}-seed{seed}", ("edit" if self.labels[label].edit else "test", label))
            for label, seed in self._wanted()
            if (label, seed) not in done
        ]

    def costs(self) -> list[tuple[tuple[str, str], float]]:
        """The kind of each trained run that is there, and what its training took, in seconds: not what measuring did.

        An edit costs no training; the time in its results is that of what it edits. A trial of the results file tells
        none.
        """
        runs = [run for run in (*self.trials(), *self.tests()) if run.edit is None]
        found = [(run.kind, result) for run in runs if (result := self.result(run)) is not None]
        return [(kind, result["seconds"]) for kind, result in found if "seconds" in result]

    def left_out(self) -> int:
        """How many runs of the results file are not of this comparison, or no longer what is measured here."""
        own = self._done()
        return sum(one not in own for one in self._known.tests)

    def _done(self) -> list[dict[str, Any]]:
        """The results of the tests that are there, as the record has them."""
        return [self._beside_majority(result) for run in self.tests() if (result := self.result(run)) is not None]

    def _rows(self, runs: list[dict[str, Any]], tabled: Callable[[list[dict]], list[dict]]) -> list[dict[str, Any]]:
        """The table of ``runs``, in the order of the labels; a row with all its seeds is ``complete``."""
        order = list(self.labels)
        rows = tabled(sorted(runs, key=lambda run: order.index(run["label"])))
        return [row | {"complete": len(row["seeds"]) == self.labels[row["label"]].seeds} for row in rows]

    @property
    def _chosen_on(self) -> str:
        """By what rates are chosen, in words: by the tests' own source too, where ``h_mean`` looks at it."""
        both = any(what.by == "h_mean" for what in self.labels.values())
        tested = both and not self.config.evaluate.validation_source
        return self._validation + (", and for h_mean the source of the tests, evaluate.source" if tested else "")

    @property
    def _validation(self) -> str:
        """The questions by whose target a rate is chosen, in words."""
        if self.config.evaluate.validation:
            return "evaluate.validation"
        return f"{self.config.data.validation or SHARE:g} of data.train"

    def _tried(self) -> list[dict[str, Any]]:
        """The trials that are there, as the results file has them."""
        found = [(run, result) for run in self.trials() if (result := self.result(run)) is not None]
        return [
            {
                "label": run.label,
                "seed": run.config.seed,
                "validation": self._validation,
                "settings": shape(run.config),
                "scores": self._scores(result),
                "versions": result["versions"],
                **({"data": result["data"]} if "data" in result else {}),
            }
            for run, result in found
        ]

    @cached_property
    def _test(self) -> tuple[list[Task], list[Task]]:
        """The source and target tasks of the tests."""
        return self._held_out("test")

    def _held_out(self, group: str) -> tuple[list[Task], list[Task]]:
        """The source and target tasks of a group of runs."""
        config, (data, changes) = self.config, self._asked(group)
        parts = {"data": config.data.model_copy(update=data), "evaluate": config.evaluate.model_copy(update=changes)}
        return held_out(config.model_copy(update=parts))

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many questions each task of the tests has: (source, target)."""
        source, target = ({task.name: len(task.records) for task in side} for side in self._test)
        return source, target

    @cached_property
    def _majority(self) -> dict[str, float]:
        """By target task, what the commonest answer to its test questions gets."""
        return {task.name: majority(task.records, task.metric) for task in self._test[1]}

    def _beside_majority(self, run: dict[str, Any]) -> dict[str, Any]:
        """A result with ``majority`` in each target task; None where the files no longer have that task."""
        target = {name: found | {"majority": self._majority.get(name)} for name, found in run["target"].items()}
        return run | {"target": target}

    def record(self) -> dict[str, Any]:
        """Everything that is known by now, as a results file: the runs one by one, and what they say together.

        ``table`` is :func:`~lorasculpt.comparison.table.table`, ``pareto`` and ``equal_target`` are made by those
        beside it, ``drift`` by `lorasculpt.evaluation.correlation`; without source tasks they are of what is kept by
        drift. ``missing`` is empty where ``complete``. A run
        has the ``versions`` that it was made with, and each of its target tasks its ``majority``, the score of the
        commonest answer: to reach that proves nothing.
        """
        runs, missing = self._done(), self.missing()
        told = [with_kept(run) for run in runs]
        rows = self._rows(told, table)
        return {
            "schema": 1,
            "complete": not missing,
            "missing": missing,
            "versions": versions(),
            "validation": self._chosen_on,
            "rates": self.rates_of(),
            "trials": self._tried(),
            "runs": runs,
            "table": rows,
            "pareto": pareto(rows),
            "equal_target": equal_target(told),
            "drift": drift_and_loss(runs),
        }


def _best(tried: dict[float, dict[str, Any]], by: str) -> float | None:
    """The rate with the highest score, the lowest of equals; None where no rate has any."""
    scored = {rate: score[CHOICES[by]] for rate, score in tried.items() if score[CHOICES[by]] is not None}
    return max(scored, key=scored.__getitem__, default=None)
