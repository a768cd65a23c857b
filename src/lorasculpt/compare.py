"""Several methods on the same data: what does each learn, and what does it forget?

    lorasculpt compare run.yaml --methods lora,lorasculpt,dora --seeds 3 --rates 2e-4,5e-4,1.5e-3

    1. each method at each learning rate, one seed: the rate that does best on a *validation set of the target* is taken
    2. each method at its rate, several seeds, measured on the test set

Everything but the method is the same: data, their order, steps, evaluation. The validation set is
``evaluate.validation``, or else a tenth of the training rows, set aside by a hash of each and not trained on while
rates are chosen. The test set chooses nothing.

Every run is an ordinary run in its own folder under ``output``, with its YAML file beside it. What is there already is
not done again: a comparison that was stopped goes on, and runs may be made elsewhere (:func:`commands`).
"""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .config import RunConfig
from .errors import UserError
from .evaluation.student import mean_interval, paired
from .measure import RESULTS_FILE, measure, versions
from .report.results import NUMBERS, REFERENCE, front
from .report.words import duration, size
from .train import KINDS, RUN_FILE, check_output, kind_of, settings_of, train

COMPARISON_FILE = "compare.json"
RATES = (2e-4, 5e-4, 1.5e-3)
SHARE = 0.1  # of the training rows, to validate with where there is no file
# What PEFT makes of a LoRA by one setting
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@dataclass(frozen=True)
class Run:
    """One run of a comparison: the method called ``label`` at a learning rate, and everything else about it."""

    label: str
    rate: float
    config: RunConfig

    @property
    def name(self) -> str:
        """Its folder in that of the comparison."""
        return "/".join(self.config.output.parts[-2:])

    def write(self) -> Path:
        """Write its YAML file, beside its folder."""
        path = Path(f"{self.config.output}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.config.to_yaml())
        return path


class Comparison:
    """The runs of a comparison, and what those that are done say.

    Args:
        config: The run that all have in common; their folders are made in its ``output``.
        methods: What is compared: methods, some of ``VARIANTS``, or names of your own that ``config.methods`` explains.
        seeds: How many, from ``config.seed`` upwards.
        rates: One to three learning rates. One is used as it is; of several each method takes the one that is best for
            it on the validation set, the lowest of equals.

    Raises:
        UserError: for what can be told about these before anything is trained.
    """

    def __init__(self, config: RunConfig, methods: Sequence[str], seeds: int = 3, rates: Sequence[float] = RATES):
        if config.data.sequence:
            raise config.error("data.sequence", "is not compared: give data.train.")
        if not config.evaluate.source or not config.evaluate.target:
            raise config.error("evaluate", "must name what to measure: source (to be kept) and target (to be learned).")
        if set(config.evaluate.validation) & set(config.evaluate.target):
            raise config.error("evaluate.validation", "holds a file of evaluate.target; rates may not be chosen on it.")
        if (config.output / RUN_FILE).is_file():
            raise config.error("output", f"is {config.output}, which holds a single run; choose another folder.")
        if not methods or len(set(methods)) < len(methods):
            raise UserError("--methods must name each method once, such as lora,lorasculpt.")
        if not 1 <= len(rates) <= 3 or len(set(rates)) < len(rates):
            raise UserError("--rates must be one to three different learning rates: every method gets the same tries.")
        if not all(rate > 0 and math.isfinite(rate) for rate in rates):
            raise UserError("--rates must be numbers above 0, such as 2e-4,5e-4,1.5e-3.")
        if seeds < 1:
            raise UserError("--seeds must be at least 1.")
        self.config, self.rates = config, sorted(rates)
        self.seeds = range(config.seed, config.seed + seeds)
        self.methods = {label: _method(config, label) for label in methods}
        for label, method in self.methods.items():
            kind_of(config.single(label, method))
        self._results: dict[Path, dict[str, Any]] = {}

    def trials(self) -> list[Run]:
        """The runs that choose the rates; none where there is one rate."""
        if len(self.rates) == 1:
            return []
        config = self.config
        share = None if config.evaluate.validation else config.data.validation or SHARE
        changes: dict[str, Any] = {"strengths": [], "every": None, "validation": []}
        changes["target"] = config.evaluate.validation or config.evaluate.target
        return [
            self._run("validation", label, rate, self.seeds[0], share, changes)
            for rate in self.rates
            for label in self.methods
        ]

    def _run(self, group: str, label: str, rate: float, seed: int, share: float | None, changes: dict[str, Any]) -> Run:
        config = self.config
        made = config.single(
            label,
            self.methods[label],
            seed=seed,
            output=config.output / group / f"{label}-lr{rate:g}-seed{seed}",
            data=config.data.model_copy(update={"validation": share}),
            training=config.training.model_copy(update={"lr": rate}),
            evaluate=config.evaluate.model_copy(update=changes),
        )
        return Run(label, rate, made)

    def result(self, run: Run) -> dict[str, Any] | None:
        """What was measured in ``run``, without its pictures; None if that is still to be done.

        Raises:
            UserError: if its folder holds another run.
        """
        folder = run.config.output
        if folder not in self._results and (folder / RESULTS_FILE).is_file():
            check_output(folder, run.config)
            content = json.loads((folder / RESULTS_FILE).read_text())
            found = {key: value for key, value in content["runs"][0].items() if key != "gallery"}
            others = {} if content["versions"] == versions() else {"versions": content["versions"]}
            self._results[folder] = found | {"label": run.label} | others
        return self._results.get(folder)

    def rates_of(self) -> dict[str, dict[str, Any]]:
        """By method what each rate did on the validation set, and the rate that is ``chosen`` (None: not yet known)."""
        if len(self.rates) == 1:
            return {label: {"validation": {}, "chosen": self.rates[0]} for label in self.methods}
        shown = ("source_before", "source_after", "target_after")
        scores: dict[str, dict[float, dict]] = {label: {} for label in self.methods}
        for run in self.trials():
            if (result := self.result(run)) is not None:
                scores[run.label][run.rate] = {key: result["summary"][key] for key in shown}
        return {
            label: {
                "validation": {f"{rate:g}": score for rate, score in found.items()},
                "chosen": max(found, key=lambda rate: found[rate]["target_after"])
                if len(found) == len(self.rates)
                else None,
            }
            for label, found in scores.items()
        }

    def tests(self) -> list[Run]:
        """The runs at the rates that are chosen already, every method with the first seed before any with the next."""
        chosen = {label: found["chosen"] for label, found in self.rates_of().items()}
        return [
            self._run("test", label, rate, seed, None, {"validation": []})
            for seed in self.seeds
            for label, rate in chosen.items()
            if rate is not None
        ]

    def missing(self) -> list[str]:
        """What is still to be done: trials by their folders, tests by method and seed."""
        trials = [run.name for run in self.trials() if self.result(run) is None]
        done = {(run.label, run.config.seed) for run in self.tests() if self.result(run) is not None}
        wanted = ((label, seed) for seed in self.seeds for label in self.methods)
        return trials + [f"test/{label}-seed{seed}" for label, seed in wanted if (label, seed) not in done]

    def record(self) -> dict[str, Any]:
        """Everything that is known by now, as a results file: the runs one by one, and what they say together.

        ``table`` is :func:`table`, ``pareto`` :func:`pareto`, ``equal_target`` :func:`equal_target`; ``missing`` is
        empty where ``complete``.
        """
        runs = [result for run in self.tests() if (result := self.result(run)) is not None]
        missing, rows = self.missing(), table(runs)
        share = self.config.data.validation or SHARE
        return {
            "schema": 1,
            "complete": not missing,
            "missing": missing,
            "versions": versions(),
            "validation": "evaluate.validation" if self.config.evaluate.validation else f"{share:g} of data.train",
            "rates": self.rates_of(),
            "runs": runs,
            "table": rows,
            "pareto": pareto(rows),
            "equal_target": equal_target(runs),
        }


def _method(config: RunConfig, label: str) -> dict[str, Any]:
    """The ``method`` of a run of ``label``: what ``methods.<label>`` says, else the run's own method where it can.

    Settings that all LoRAs have (``r``, ``lora_alpha``, ...) are taken over from the run's method; those that are
    peculiar to a method only by the same one.
    """
    given = config.methods.get(label, {})
    name = given.get("name", label)
    if not re.fullmatch(r"[\w-]+", label) or (name not in KINDS and name not in VARIANTS):
        listed = ", ".join([*KINDS, *VARIANTS])
        if "name" in given:
            raise config.error(f"methods.{label}.name", f"is {name!r}, which is no method; use one of {listed}.")
        raise UserError(f"--methods: {label!r} is no method; use some of {listed}, or a name given under methods.")
    preset, name = VARIANTS.get(name, {}), name if name in KINDS else REFERENCE
    common = set(settings_of(KINDS[REFERENCE])) & set(settings_of(KINDS[name]))
    same = config.method["name"] == name
    own = {key: value for key, value in config.method.items() if same or key in common}
    return {**own, **preset, **given, "name": name}


# --- doing it -------------------------------------------------------------------------------------------------------


def compare(
    config: RunConfig,
    methods: Sequence[str],
    *,
    seeds: int = 3,
    rates: Sequence[float] = RATES,
    out: Path | None = None,
    progress: bool = True,
) -> Path:
    """Make the runs of a :class:`Comparison` that are still missing, and write what they say.

    The file is written anew after every run, so that it can be read at any time; it says whether it is complete.

    Args:
        config, methods, seeds, rates: Of the comparison.
        out: The file. Default: ``compare.json`` in ``config.output``.
        progress: Show bars, and after every run what the others are going to take.

    Returns:
        The file.

    Raises:
        UserError: for anything in the config, the data or the folders that the user can mend.
    """
    comparison = Comparison(config, methods, seeds, rates)
    path = out or config.output / COMPARISON_FILE
    costs: dict[str, list[float]] = {}
    before: dict[str, dict] = {}
    for runs in (comparison.trials, comparison.tests):  # which tests there are is known after the trials
        for run in runs():
            if comparison.result(run) is not None:
                continue
            began, group = time.monotonic(), run.config.output.parent.name
            run.write()
            train(run.config, progress=progress)
            _, before[group] = measure(run.config, before=before.get(group), progress=progress)
            costs.setdefault(group, []).append(time.monotonic() - began)
            write(path, comparison.record())
            if progress:
                print(_cost(run, costs, comparison.missing()))
    return write(path, comparison.record())


def _cost(run: Run, costs: dict[str, list[float]], missing: list[str]) -> str:
    """What ``run`` took, and what those that are ``missing`` will: as much as the runs of their group on average."""
    group = run.config.output.parent.name
    words = f"{run.name} took {duration(costs[group][-1])}"
    if not missing:
        return f"{words}; it was the last."
    known = mean(cost for found in costs.values() for cost in found)
    left = sum(mean(costs.get(name.split("/")[0], [known])) for name in missing)
    number = "the one run that is missing takes" if len(missing) == 1 else f"the {len(missing)} runs missing take"
    return f"{words}; {number} about {duration(left)}."


def commands(comparison: Comparison) -> Iterator[str]:
    """A shell line for each run that can be made now, and a comment on those that cannot yet.

    The lines need each other in nothing: they can be run on several machines that share the folder, each by one. The
    YAML files that they name are written.
    """
    for run in (*comparison.trials(), *comparison.tests()):
        if comparison.result(run) is None:
            path = shlex.quote(str(run.write()))
            yield f"lorasculpt train {path} && lorasculpt eval {path}"
    unknown = [label for label, found in comparison.rates_of().items() if found["chosen"] is None]
    if unknown:
        yield (
            f"# {len(unknown) * len(comparison.seeds)} more runs, of {', '.join(unknown)}, when these have chosen the "
            "learning rates: ask again then."
        )


def write(path: Path, found: dict[str, Any]) -> Path:
    """``found`` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.rename(path)
    return path


# --- what the runs say together -------------------------------------------------------------------------------------


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
