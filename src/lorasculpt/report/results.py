"""Results files, read and put together: the runs of one method that differ in nothing but the seed are one entry."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ..errors import UserError
from ..evaluation.budget import kept
from ..evaluation.student import paired, quantile

NUMBERS = (
    "source_before",
    "source_after",
    "retention",
    "target_before",
    "target_after",
    "gain",
    "h_mean",
    "average",
)
BY_DRIFT = ("kept", "target_before", "target_after", "gain")  # those of a run without source tasks
SIDES = ("source", "target")
REFERENCE, OURS = "lora", "lorasculpt"  # what the others are tested against, and what is held against all
NEAR = 0.5  # of the most that is gained on the target: who gains less than this is not compared at equal target
# retention and gain only repeat source and target
TESTED = ("source_after", "kept", "target_after", "h_mean", "average")
NEAR_BASE = 0.01  # what the score of one base may differ by from machine to machine
LEVEL = 0.05  # a difference with a smaller p is told as one
REQUIRED = ("method", "seed", "source", "target", "summary")


@dataclass(frozen=True)
class Number:
    """A measured value and its 95 % interval (None, None if the results don't tell it)."""

    value: float
    low: float | None = None
    high: float | None = None

    def separate(self, other: Number) -> bool:
        """Both intervals are known and don't overlap."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low > other.high or other.low > self.high


@dataclass(frozen=True)
class Entry:
    """One method (with one choice of settings): its runs, and every number over them.

    ``source`` and ``target`` map a task to ``{"before": Number, "after": Number, "n": int, "groups": int | None}``, the
    latter where questions stand or fall together. ``base`` and ``tuned``,
    strength 0 and 1, are ``{"strength": float, "source": Number, "target": Number}`` of all questions, without source
    tasks with ``kept`` (:func:`with_kept`) in place of ``source``; ``curve`` is a list of such points from strength 0
    to 1, of the questions that curves are measured on. ``drift`` is in nats a token; of several peaks of memory the
    smallest is taken, since what else a process holds adds to it. What a run does not tell is None, and so is
    ``seconds`` where the runs are of several machines or precisions.
    """

    label: str
    runs: list[dict]
    numbers: dict[str, Number]
    source: dict[str, dict]
    target: dict[str, dict]
    base: dict
    tuned: dict
    curve: list[dict]
    seconds: float | None
    adapter_bytes: float | None
    drift: Number | None = None
    memory_bytes: int | None = None
    trainable: int | None = None

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [run["seed"] for run in self.runs]

    @property
    def side(self) -> str:
        """What is set against the target, as points of the curve have it."""
        return "source" if self.source else "kept"

    @property
    def after(self) -> str:
        """The number that it comes to after training."""
        return "source_after" if self.source else "kept"

    @property
    def share(self) -> str:
        """The number that is the share of the base that is kept."""
        return "retention" if self.source else "kept"


def load(path: Path) -> dict[str, Any]:
    """The JSON object of schema 1 in the file ``path``.

    Raises:
        UserError: it cannot be read, is no JSON, or has another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a results.json or its folder.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); evaluate the run again to write it anew.") from None
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise UserError(f'{path}: not a results file of schema 1; name one that begins with {{"schema": 1.')
    return content


def read(paths: Sequence[Path]) -> list[dict]:
    """The runs in the results files (or folders of runs) ``paths``; each gets its ``file`` and the
    ``folder`` that its pictures are in.

    A run of a file that says so itself is not ``complete``: others are to follow. The runs of a comparison have their
    pictures in folders of their own beside its file; where these are gone there is no ``gallery``. ``home`` is the
    folder that holds a run and no other, with its adapter; None where there is none. ``equal_target`` is what a single
    file says of all its runs, ``compared`` whether it is a comparison's, ``chosen_by`` what the run's learning rate was
    chosen by, and ``chosen_on`` of which data, where the file says that. A run without source tasks is told by its
    drift (:func:`with_kept`).

    Raises:
        UserError: a file is missing, is no JSON, has another schema, or lacks a part of a run, or a run has neither
            source nor drift, or other tasks than the first.
    """
    runs: list[dict] = []
    for path in paths:
        path = path / "results.json" if path.is_dir() else path
        content = load(path)
        found = content.get("runs", [])
        if not isinstance(found, list):
            raise UserError(f"{path}: its runs are no list; evaluate them again.")
        for number, run in enumerate(found, start=1):
            if (lacks := _lacks(run)) is not None:
                raise UserError(f"{path}: run {number} has no {lacks!r}; evaluate it again.")
            if not run["source"] and not run.get("drift"):
                raise UserError(
                    f"{path}: run {number} has neither source tasks nor a drift, and a report sets what is learned "
                    "against what is forgotten; name evaluate.source or evaluate.drift and evaluate it again."
                )
            about = {
                "versions": run.get("versions") or content.get("versions", {}),
                "complete": content.get("complete", True),
            }
            about["equal_target"] = content.get("equal_target") if len(paths) == 1 else None
            about["compared"] = "table" in content
            about["chosen_by"] = ((content.get("rates") or {}).get(run.get("label")) or {}).get("by")
            about["chosen_on"] = content.get("validation")
            places = {"file": path, "folder": path.parent, "home": path.parent if len(found) == 1 else None}
            runs.append(with_kept(run | about | places | _own(path.parent, run)))
    if not runs:
        raise UserError(f"{paths[0] if paths else 'results'}: no runs to report; evaluate one first.")
    first = runs[0]
    for run in runs:
        if any(list(run[side]) != list(first[side]) for side in SIDES):
            raise UserError(f"{run['file']}: its tasks are not those of {first['file']}; report them apart.")
    return runs


def _lacks(run: Any) -> str | None:
    """What a run of a results file lacks, or has of another kind than it should be; None if it is whole."""
    if not isinstance(run, dict):
        return "method"
    objects, curve = ("source", "target", "summary"), run.get("curve") or []
    lacks = [key for key in REQUIRED if key not in run or (key in objects and not isinstance(run[key], dict))]
    lacks = lacks or [key for key in NUMBERS if key not in run["summary"]]
    parts = ("strength", "target", "source" if run.get("source") else "drift")
    if not isinstance(curve, list) or not all(isinstance(point, dict) and point.keys() >= {*parts} for point in curve):
        lacks.append("curve")
    return lacks[0] if lacks else None


def _own(folder: Path, run: dict) -> dict[str, Any]:
    """What a ``run`` of the comparison in ``folder`` has in a folder of its own, if it is there and the same run."""
    rate = run.get("settings", {}).get("training", {}).get("lr")
    if "label" not in run or not isinstance(rate, int | float):
        return {}
    home = folder / "test" / f"{run['label']}-lr{rate:g}-seed{run['seed']}"  # as lorasculpt compare calls it
    try:
        (own,) = load(home / "results.json")["runs"]
    except (UserError, KeyError, ValueError):
        return {}
    if own.get("summary") != run["summary"]:
        return {}
    return {"folder": home, "home": home, "gallery": own.get("gallery") or []}


def with_kept(run: dict) -> dict:
    """``run``, and where it has no source tasks what it kept by drift, in its summary and at each point of its curve.

    That is exp(-drift) (:func:`lorasculpt.evaluation.budget.kept`) under ``kept``, and its interval.
    """
    drift = run.get("drift")
    if run["source"] or not drift:
        return run

    def left(value: float, interval: Sequence[float]) -> dict[str, Any]:
        _, (share, most, least) = kept([{"drift": nats} for nats in (value, *interval)])
        return {"kept": share, "kept_interval": [least, most]}

    curve = [point | left(point["drift"], point["drift_interval"]) for point in run.get("curve") or ()]
    return run | {"summary": run["summary"] | left(drift["value"], drift["interval"]), "curve": curve}


def names(run: dict) -> tuple[str, ...]:
    """The numbers of a run's summary that there are: those of source and target, or without source tasks by drift."""
    return NUMBERS if run["source"] else BY_DRIFT


def stands_for(method: str, runs: Iterable[dict]) -> str | None:
    """The label that stands for ``method`` among those of ``runs``; None where none does.

    It is the one that is called so, in capitals or not, or else the first that is trained by it, as no edit is.
    """
    found = {run["label"]: run.get("method") == method and "edit" not in run for run in runs}
    called = (label for label in found if label.casefold() == method)
    return next(called, None) or next((label for label, trained in found.items() if trained), None)


def equalled(equal: dict) -> dict[str, dict]:
    """What each label has left at equal target, of what a results file says of that: of the source, or by drift."""
    return equal.get("kept") or equal.get("source") or {}


def measured(found: dict, name: str) -> Number:
    """``found[name]`` with the interval beside it; what is null in the file is nan here."""
    value = math.nan if found[name] is None else found[name]
    low, high = found.get(f"{name}_interval") or (None, None)
    unknown = low is None or high is None or any(map(math.isnan, (value, low, high)))
    return Number(value, None if unknown else low, None if unknown else high)


def made_on(run: dict) -> tuple[str | None, str | None]:
    """Machine and precision of a run: time and memory are compared where both are the same."""
    return run.get("machine"), run.get("precision")


def over_seeds(values: Sequence[Number], least: float = 0.0, most: float = 1.0) -> Number:
    """One run's number as it is; of several seeds the mean, with an interval for seeds and test items together.

    The seeds are tested on the same items, so that their spread alone (Student's interval of the mean) does not tell
    how sure the items make us: the runs' own intervals, averaged, are added to it in quadrature. It ends at ``least``
    and ``most``, which bound the number, as 0 and 1 do a share.
    """
    if len(values) == 1:
        return values[0]
    x = [number.value for number in values]
    if any(map(math.isnan, x)):  # such as the retention of a source of which the base knew nothing
        return Number(math.nan)
    half = quantile(len(x) - 1) * stdev(x) / math.sqrt(len(x))
    below = mean(0.0 if number.low is None else number.value - number.low for number in values)
    above = mean(0.0 if number.high is None else number.high - number.value for number in values)
    low, high = mean(x) - math.hypot(half, below), mean(x) + math.hypot(half, above)
    return Number(mean(x), max(low, least), min(high, most))


def over_items(values: Sequence[Number]) -> Number:
    """The mean of several seeds, with the mean of their own intervals: how sure the test items alone make us of it."""
    ends = [(number.low, number.high) for number in values if number.low is not None and number.high is not None]
    low, high = map(mean, zip(*ends, strict=True)) if len(ends) == len(values) else (None, None)
    return Number(mean(number.value for number in values), low, high)


def _over_tasks(runs: list[dict], side: str) -> dict[str, dict]:
    return {
        name: {
            # the base is the same for every seed: its spread is that of the test items
            "before": measured(found, "before"),
            "after": over_seeds([measured(run[side][name], "after") for run in runs]),
            "n": found["n"],
            "groups": found.get("groups"),
        }
        for name, found in runs[0][side].items()
    }


def _ends(numbers: dict[str, Number]) -> tuple[dict, dict]:
    """The points at strength 0 and 1 as the summary has them."""
    if "kept" in numbers:
        before, after = {"kept": Number(1.0)}, {"kept": numbers["kept"]}
    else:
        before, after = {"source": numbers["source_before"]}, {"source": numbers["source_after"]}
    base = {"strength": 0} | before | {"target": numbers["target_before"]}
    return base, {"strength": 1} | after | {"target": numbers["target_after"]}


def _curve(runs: list[dict], base: dict, tuned: dict) -> list[dict]:
    """The mean of the curves that there are, at each strength of any of them; ``base`` and ``tuned`` for missing ends.

    A curve that was not measured at one of these is read there along the line between its neighbours; strengths beyond
    the ends of one are left out.
    """
    curves = [sorted(run["curve"], key=lambda point: point["strength"]) for run in runs if run.get("curve")]
    sides = [key for key in base if key != "strength"]
    means = {
        at: {"strength": at} | {key: over_seeds([_read(curve, at, key) for curve in curves]) for key in sides}
        for at in sorted({point["strength"] for curve in curves for point in curve})
        if all(curve[0]["strength"] <= at <= curve[-1]["strength"] for curve in curves)
    }
    points = {0: base} | means
    points.setdefault(1, tuned)
    return list(points.values())


def _read(curve: list[dict], strength: float, side: str) -> Number:
    """One side of a curve, whose points are in order, at a strength between its ends."""
    numbers = [measured(point, side) for point in curve]
    bounds = [(number.value, number.low, number.high) for number in numbers]
    known = np.array(bounds, float)  # nan where there is no interval
    value, low, high = (np.interp(strength, [point["strength"] for point in curve], column) for column in known.T)
    return Number(float(value), *(None if math.isnan(end) else float(end) for end in (low, high)))


def _entry(label: str, runs: list[dict]) -> Entry:
    found = {name: [measured(run["summary"], name) for run in runs] for name in names(runs[0])}
    bounds = {"retention": (0.0, math.inf), "gain": (-1.0, 1.0)}
    numbers = {
        name: values[0] if name.endswith("_before") else over_seeds(values, *bounds.get(name, ()))
        for name, values in found.items()
    }
    mean_of = {
        key: mean(known) if (known := [run[key] for run in runs if run.get(key) is not None]) else None
        for key in ("seconds", "adapter_bytes")
    }
    if len(set(map(made_on, runs))) > 1:
        mean_of["seconds"] = None
    base, tuned = _ends(numbers)
    drifts = [Number(run["drift"]["value"], *run["drift"]["interval"]) for run in runs if run.get("drift")]
    peaks = [run["memory_bytes"] for run in runs if run.get("memory_bytes") is not None]
    return Entry(
        label,
        runs,
        numbers,
        _over_tasks(runs, "source"),
        _over_tasks(runs, "target"),
        base,
        tuned,
        _curve(runs, base, tuned),
        **mean_of,
        drift=over_seeds(drifts, 0.0, math.inf) if len(drifts) == len(runs) else None,
        memory_bytes=min(peaks) if len(peaks) == len(runs) else None,
        trainable=runs[0].get("trainable"),
    )


def _without_seed(run: dict) -> dict:
    return {key: value for key, value in run.get("settings", {}).items() if key != "seed"}


def _leaves(settings: dict, prefix: str = "") -> dict:
    """``{"training": {"lr": 1e-4}}`` as ``{"training.lr": 1e-4}``."""
    found: dict = {}
    for key, value in settings.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _alike(one: dict, other: dict) -> bool:
    """Whether two runs differ in nothing but the seed; a label, or data, that one does not tell may be the other's."""

    def made(run: dict) -> list:
        edit = {key: value for key, value in (run.get("edit") or {}).items() if key != "seed"}
        return [run["method"], _without_seed(run), edit]

    known = [(one[key], other[key]) for key in ("label", "data", "questions") if one.get(key) and other.get(key)]
    return made(one) == made(other) and all(a == b for a, b in known)


def _grouped(runs: list[dict]) -> list[list[dict]]:
    """``runs`` that are alike together, one of each seed: a second one with the same numbers is the same run.

    One with other numbers is of something that neither tells, such as another base, and is set apart.
    """
    groups: list[list[dict]] = []
    for run in runs:
        alike = [group for group in groups if all(_alike(one, run) for one in group)]
        same_seed = [one for group in alike for one in group if one["seed"] == run["seed"]]
        if any(one["summary"] == run["summary"] for one in same_seed):
            continue
        free = [group for group in alike if all(one["seed"] != run["seed"] for one in group)]
        beside = [group for group in free if any(one.get("file") == run.get("file") for one in group)]
        if not free:
            groups.append([run])
        else:
            (beside or free)[0].append(run)
    return groups


def entries(runs: list[dict]) -> list[Entry]:
    """``runs`` by method, settings, data and questions, in the order of first appearance.

    An entry is called by its runs' ``label``, or their ``method``; two of the same name by the settings that set them
    apart too, or else by their folders. A run that is there twice counts once.
    """
    groups = _grouped(runs)
    names = [group[0].get("label") or group[0]["method"] for group in groups]
    told = []
    for name, group in zip(names, groups, strict=True):
        others = [_leaves(_without_seed(other[0])) for twin, other in zip(names, groups, strict=True) if twin == name]
        own = _leaves(_without_seed(group[0]))
        apart = [key for key in own if any(other.get(key) != own[key] for other in others)]
        told.append(" ".join([name, *(f"{key}={own[key]}" for key in apart)]))
    places = [f"{name} ({_place(group[0])})" for name, group in zip(told, groups, strict=True)]
    told = [place if told.count(name) > 1 else name for name, place in zip(told, places, strict=True)]
    numbered = [f"{name} {told[:at].count(name) + 1}" if name in told[:at] else name for at, name in enumerate(told)]
    return [_entry(name, group) for name, group in zip(numbered, groups, strict=True)]


def _place(run: dict) -> str:
    """Where a run was found, in a word: the folder of its ``results.json``, or the file that holds several."""
    path = Path(run.get("file", "results.json")).resolve()
    return path.parent.name if path.name == "results.json" else path.stem


def best(numbers: Sequence[Number]) -> int | None:
    """Index of the number that lies above all others beyond its interval and theirs, if there is one."""
    if len(numbers) < 2 or any(math.isnan(number.value) for number in numbers):
        return None
    top = max(range(len(numbers)), key=lambda i: numbers[i].value)
    return top if all(numbers[top].separate(other) for i, other in enumerate(numbers) if i != top) else None


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The Pareto front: the names of ``points`` (more is better) that no other equals or beats in both numbers."""
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    ]


def ends(found: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    """Target, and source average or what is kept by drift, after training, by label."""
    return {entry.label: (entry.numbers["target_after"].value, entry.numbers[entry.after].value) for entry in found}


def compared(one: Entry, other: Entry, name: str) -> dict | None:
    """Paired t-test of the number ``name`` of ``one`` against ``other``'s over the seeds that both have.

    As :func:`~lorasculpt.evaluation.student.paired` gives it; None where they share fewer than two seeds.
    """
    others = {run["seed"]: run["summary"][name] for run in other.runs}
    pairs = [(run["summary"][name], others[run["seed"]]) for run in one.runs if run["seed"] in others]
    return paired([a for a, _ in pairs], [b for _, b in pairs])


def way(one: Entry, other: Entry, name: str) -> str | None:
    """How ``other`` compares with ``one`` in the number ``name``: ``"more"``, ``"less"``, ``"noise"`` or ``"unsure"``.

    By :func:`compared`, at p < 0.05. With a larger p the difference is noise where the test items account for it, by
    the intervals of :func:`over_items`; else it is unsure: too few seeds can call nothing a difference. Without such a
    test, as of one seed, they differ where their intervals don't overlap; None where an interval is missing.
    """
    test = compared(other, one, name)
    if test is not None and test["p"] is not None:
        if test["p"] < LEVEL:
            return "more" if test["difference"] > 0 else "less"
        both = set(one.seeds) & set(other.seeds)
        a, b = (
            over_items([measured(run["summary"], name) for run in entry.runs if run["seed"] in both])
            for entry in (one, other)
        )
        return "unsure" if a.low is None or b.low is None or a.separate(b) else "noise"
    a, b = one.numbers[name], other.numbers[name]
    if a.low is None or b.low is None:
        return None
    if not a.separate(b):
        return "noise"
    return "more" if b.value > a.value else "less"


def gained(entry: Entry) -> str | dict | None:
    """What the gain of ``entry`` is worth: ``"noise"`` where the test items account for it, None where it is one.

    ``"loss"`` where it is less than nothing beyond the noise. Where its seeds are too few to tell it from none, the
    paired t-test of the target after training against before.
    """
    items = over_items([measured(run["summary"], "gain") for run in entry.runs])
    if items.low is not None and items.high is not None and items.low <= 0:
        return "noise" if items.high >= 0 else "loss"
    after, before = ([run["summary"][f"target_{when}"] for run in entry.runs] for when in ("after", "before"))
    test = paired(after, before)
    return None if test is None or test["p"] is None or test["p"] < LEVEL else test


def reference(found: Sequence[Entry]) -> Entry | None:
    """The entry that stands for ``REFERENCE`` (:func:`stands_for`)."""
    return _standing(REFERENCE, found)


def ours(found: Sequence[Entry]) -> Entry | None:
    """The entry that stands for ``OURS``."""
    return _standing(OURS, found)


def _standing(method: str, found: Sequence[Entry]) -> Entry | None:
    label = stands_for(method, [entry.runs[0] | {"label": entry.label} for entry in found])
    return next((entry for entry in found if entry.label == label), None)


def against(found: Sequence[Entry]) -> dict[str, dict[str, dict]]:
    """The tests of :func:`compared` against the :func:`reference`, by label and number."""
    known = reference(found)
    if known is None:
        return {}
    tests = {
        entry.label: {
            name: test
            for name in TESTED
            if name in known.numbers and (test := compared(entry, known, name)) is not None
        }
        for entry in found
        if entry is not known
    }
    return {label: own for label, own in tests.items() if own}
