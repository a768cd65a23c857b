"""What the runs of a comparison say together: the table, the Pareto front, the comparison at equal target."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from ..console import numbers, size
from ..evaluation.run import KNOWN, rectangle
from ..evaluation.student import mean_interval, paired
from ..report.results import NEAR, OURS, REFERENCE, equalled, front, made_on, names, stands_for
from ..report.words import by_heart, chance, not_compared


def table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each label, in the order of first appearance.

    Every number of a run's summary, and every task after training, is a mean over seeds with the 95 % interval of
    Student's t: how much another seed would change. (How sure the test items make us stands in each run.) ``steps``,
    ``lr``, ``seeds``, and the ``n`` of each task say what is behind it; ``before`` of a task is the base's score, and
    ``majority`` what the commonest answer would get, where that is known. Runs without source tasks have ``kept`` in
    place of what needs them (:func:`~lorasculpt.report.results.with_kept`).

    ``against`` are paired t-tests against the label that stands for ``REFERENCE``
    (:func:`~lorasculpt.report.results.stands_for`) over the seeds that both have; p is not corrected for the number of
    tests. ``time`` and ``memory`` are those of :func:`costs`. ``drift`` is a mean over seeds, with
    None for each of its parts where it was not measured.
    """
    return [_row(label, group, reference) for label, group, reference in grouped(runs)]


def grouped(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict], dict[int, dict]]]:
    """The runs of each label, and by seed those of the label that the others are held against, if there is one."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    known = stands_for(REFERENCE, runs)
    reference = {run["seed"]: run for run in groups.get(known, [])} if known else {}
    return [(label, group, reference) for label, group in groups.items()]


def pairs(runs: list[dict], reference: dict[int, dict]) -> list[tuple[dict, dict]]:
    """The runs of a label beside those of the reference with their seeds; none of the reference itself."""
    both = [(run, reference[run["seed"]]) for run in runs if run["seed"] in reference]
    return [(run, other) for run, other in both if run["label"] != other["label"]]


def costs(runs: list[dict], reference: dict[int, dict]) -> dict[str, Any]:
    """Time, memory and size of the runs of a label.

    ``time`` and ``memory`` are the training time and its peak of memory in units of the reference's: the mean over the
    seeds that both have of one over the other, made on the same machine and in the same precision, with its 95 %
    interval; all None where one of them is not known.

    A process that trains several runs still holds some of the earlier ones, so that of the peaks of a process
    (``memory_of``) the smallest of a label is divided by the smallest of the reference, machine by machine and
    precision by precision; ``memory`` is the mean of these, without an interval. ``memory_bytes`` is the smallest peak
    either way.
    """
    others = list(reference.values())
    alike = [(run, reference[run["seed"]]) for run in runs if run["seed"] in reference]
    alike = [(one, two) for one, two in alike if made_on(one) == made_on(two)]
    of = {run.get("memory_of") for run in (*runs, *others)}
    if of == {"process"}:
        made = {made_on(run) for run in runs} & {made_on(run) for run in others}
        peaks = [[_peak([run for run in side if made_on(run) == one]) for side in (runs, others)] for one in made]
        memory = mean_interval([mean_interval([_over(one, two) for one, two in peaks])["mean"]])
    else:
        both = alike if len(of) == 1 else []
        memory = mean_interval([_over(one.get("memory_bytes"), two.get("memory_bytes")) for one, two in both])
    return {
        "seconds": mean(run["seconds"] for run in runs),
        "time": mean_interval([_over(one["seconds"], two["seconds"]) for one, two in alike]),
        "memory_bytes": _peak(runs),
        "memory": memory,
        "trainable": runs[0]["trainable"],
        "adapter_bytes": round(mean(run["adapter_bytes"] for run in runs)),
    }


def _row(label: str, runs: list[dict], reference: dict[int, dict]) -> dict[str, Any]:
    first = runs[0]
    both = pairs(runs, reference)
    return {
        "label": label,
        "method": first["method"],
        "seeds": [run["seed"] for run in runs],
        "steps": first["steps"],
        "lr": first["settings"]["training"]["lr"],
        **{name: mean_interval([run["summary"][name] for run in runs]) for name in names(first)},
        **{
            side: {
                task: mean_interval([run[side][task]["after"] for run in runs])
                | {key: found[key] for key in ("before", "majority", "n") if key in found}
                for task, found in first[side].items()
            }
            for side in ("source", "target")
        },
        "drift": mean_interval([(run.get("drift") or {}).get("value") for run in runs]),
        **costs(runs, reference),
        "against": {
            name: paired([one["summary"][name] for one, _ in both], [two["summary"][name] for _, two in both])
            for name in names(first)
            if both and not name.endswith("_before")
        },
    }


def _peak(runs: Sequence[dict]) -> int | None:
    """The smallest peak of memory among ``runs``, since what else a process holds adds to it; None: unknown."""
    known = [run["memory_bytes"] for run in runs if run.get("memory_bytes") is not None]
    return min(known) if known and len(known) == len(runs) else None


def _over(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def pareto(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The labels of those rows of a :func:`table` that no other equals or beats in both source, or kept, and target."""
    return front({row["label"]: (row[_side(row)]["mean"], row["target_after"]["mean"]) for row in rows})


def _side(row: dict[str, Any]) -> str:
    """The number of a row that is set against its target."""
    return "kept" if "kept" in row else "source_after"


def equal_target(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Source average of the labels where the strength of each gives the target score that all of them reach.

    Of runs without source tasks it is what is kept by drift, under ``kept`` in place of ``source``.

    Read off each run's curve over strength, between its points linearly where these are as close as ``refine`` wants
    them (:func:`~lorasculpt.evaluation.run.rectangle`): a straight line through more is a guess. What a label reaches
    and gains is the least of what its runs do at the best point of their curves, gained over the base. A label that
    gains less than ``NEAR`` of what the best one does is left out, because where nothing has been learned all look
    alike; the level is the least that the others reach. Runs without a curve (of adapters whose strength cannot be set)
    have no part in it.

    Returns:
        ``target``: the level, None where no run has a curve on which anything was gained. ``source``: of each label the
        ``seeds``, the ``values`` of the source average in their order, their ``mean`` with its 95 % interval ``low``
        and ``high``, and ``test``, the paired t-test against the label ``against`` over the seeds that both have (None
        for that label itself, and for fewer than two). ``against``: the label that stands for ``OURS``, or the first.
        ``left_out``: the labels that gain too little. ``coarse``: by label the seeds whose curve is not known there.
    """
    curves: dict[str, dict[int, list[dict]]] = {}
    for run in runs:
        if run["curve"]:
            own = sorted(run["curve"], key=lambda point: point["strength"])
            curves.setdefault(run["label"], {})[run["seed"]] = own
    side = "kept" if any("kept" in run.get("summary", ()) for run in runs) else "source"
    best = {label: [max(point["target"] for point in curve) for curve in own.values()] for label, own in curves.items()}
    base = {label: [curve[0]["target"] for curve in own.values()] for label, own in curves.items()}
    gained = {label: min(a - b for a, b in zip(best[label], base[label], strict=True)) for label in curves}
    most = max(gained.values(), default=0)
    if most <= 0:
        return {"target": None, "against": None, side: {}, "left_out": [], "coarse": {}}
    kept = [label for label in gained if gained[label] >= NEAR * most]
    level = min(min(best[label]) for label in kept)
    at: dict[str, dict[int, float]] = {}
    coarse: dict[str, list[int]] = {}
    for label in kept:
        for seed, curve in curves[label].items():
            if (kept_there := _at(level, curve, side)) is None:
                coarse.setdefault(label, []).append(seed)
            else:
                at.setdefault(label, {})[seed] = kept_there
    left_out = [label for label in gained if label not in kept]
    if not at:
        return {"target": level, "against": None, side: {}, "left_out": left_out, "coarse": coarse}
    ours = stands_for(OURS, runs)
    against = ours if ours in at else next(iter(at))

    def row(label: str, values: dict[int, float]) -> dict[str, Any]:
        both = [seed for seed in values if seed in at[against] and label != against]
        test = paired([values[seed] for seed in both], [at[against][seed] for seed in both])
        own = list(values.values())
        return {"seeds": list(values), "values": own} | mean_interval(own) | {"test": test}

    return {
        "target": level,
        "against": against,
        side: {label: row(label, values) for label, values in at.items()},
        "left_out": left_out,
        "coarse": coarse,
    }


def _at(level: float, curve: Sequence[dict], side: str) -> float | None:
    """The ``side`` of a curve at the smallest strength where its target, which gets there, is ``level``.

    None where that lies between two points too far apart to tell; at a point it was measured.
    """
    for low, high in pairwise([curve[0], *curve]):
        if high["target"] >= level:
            if high["target"] > level and rectangle(low, high) >= KNOWN:
                return None
            rise = high["target"] - low["target"]
            share = (level - low["target"]) / rise if rise > 0 else 1.0
            return low[side] + share * (high[side] - low[side])
    raise ValueError(f"no point of the curve has a target of {level}")


# --- on the screen --------------------------------------------------------------------------------------------------

BY_SOURCE = {
    "source_after": "source",
    "target_after": "target",
    "retention": "retention",
    "gain": "gain",
    "h_mean": "H-mean",
    "average": "average",
}
BY_DRIFT = {"kept": "kept", "target_after": "target", "gain": "gain"}


def show(record: dict[str, Any]) -> None:
    """Print the table of a comparison, the tests against the reference, and what a reader has to know."""
    by_drift = any("kept" in row for row in record["table"])
    columns = BY_DRIFT if by_drift else BY_SOURCE
    told = [name for name in columns if name in ("source_after", "kept", "target_after", "h_mean")]
    reference = stands_for(REFERENCE, record["runs"])
    shown = numbers("method", *columns.values())
    tests = numbers(f"against {reference}", *(words for name in told for words in (columns[name], "p")))
    for row in record["table"]:
        shown.add_row(row["label"], *(cell(row[name]) for name in columns))
        found = [row["against"].get(name) for name in told]
        if any(found):
            tests.add_row(row["label"], *(text for test in found for text in tested(test)))
    console = Console()
    console.print(shown)
    console.print(made_with(record["table"]))
    if tests.row_count:
        console.print(tests)
    steps = ", ".join(str(steps) for steps in sorted({row["steps"] for row in record["table"]}))
    print(f"Points of 100, ± half of a 95 % interval over seeds; {steps} steps; {measured_in(reference)}.")
    if by_drift:
        print("Kept: the base's probability of its own texts, a token, exp(-drift); there are no source tasks.")
    equal = record["equal_target"]
    if equalled(equal):
        kept = ", ".join(
            f"{label} {cell(found)}" + (f" ({chance(found['test']['p'])})" if (found["test"] or {}).get("p") else "")
            for label, found in equalled(equal).items()
        )
        side, level = "Kept" if by_drift else "Source", 100 * equal["target"]
        print(f"{side} where all reach the target {level:.1f}, p against {equal['against']}: {kept}.")
    if others := not_compared(equal):
        print(others)
    print(f"Pareto front of {'kept' if by_drift else 'source'} and target: {', '.join(record['pareto'])}.")
    if record["drift"]:
        words = {"runs": "runs", "curve": "points of curves"}
        ranked = ", ".join(_ranked(record["drift"][key], words[key]) for key in words if record["drift"][key])
        print(f"Drift and the source lost, Spearman's rank correlation (95 % interval): {ranked}.")
    for sentence in dict.fromkeys(filter(None, map(by_heart, record["runs"]))):
        print(sentence)
    tell_ends(record["rates"])
    tell_missing(record["missing"])


def measured_in(reference: str | None) -> str:
    """What times and memory are told in, or that there is nothing to tell them in and to test against, in words."""
    if reference is None:
        return f"no label is trained by {REFERENCE}, so nothing is tested against it and no time or memory told in its"
    return f"time and memory in those of {reference}"


def made_with(rows: Sequence[dict[str, Any]]) -> Table:
    """What the methods of a table were trained with and cost; drift, time and memory where some have them."""
    told = {"drift": 3, "time": 2, "memory": 2}
    told = {name: n for name, n in told.items() if any(row.get(name, {}).get("mean") is not None for row in rows)}
    shown = numbers("method", "seeds", "lr", *told, "parameters", "size")
    for row in rows:
        cells = [row["label"], str(len(row["seeds"])), f"{row['lr']:g}"]
        cells += [cell(row[name], 1, digits) for name, digits in told.items()]
        shown.add_row(*cells, f"{row['trainable']:,}", size(row["adapter_bytes"]))
    return shown


def tell_ends(rates: dict[str, dict[str, Any]]) -> None:
    """Print which learning rates broke a label, and which labels have one at the end of those that were tried."""
    for label, found in rates.items():
        for rate, score in found["validation"].items():
            if "diverged" in score:
                step, steps = score["diverged"]
                print(f"{label}: at the learning rate {rate} the weights came to no numbers by step {step} of {steps}.")
        tried = [float(rate) for rate in found["validation"]]
        if tried and found["chosen"] is None and all("diverged" in score for score in found["validation"].values()):
            print(f"{label}: no learning rate that was tried so far can be used; a smaller one may.")
        scores = [
            {key: value for key, value in score.items() if not key.endswith("_before")}
            for score in found["validation"].values()
        ]
        told_apart = any(score != scores[0] for score in scores)
        for end, best, beyond in ((min, "smallest", "smaller"), (max, "largest", "larger")):
            if told_apart and found["chosen"] == end(tried):
                print(f"{label}: of the learning rates the {best} did best; a {beyond} one may do better.")


def tell_missing(names: Sequence[str]) -> None:
    """Print how many runs are still to be made."""
    if names:
        print("1 run is still missing." if len(names) == 1 else f"{len(names)} runs are still missing.")


def cell(found: dict[str, float | None], unit: int = 100, digits: int = 1) -> str:
    """``71.3 ±2.0``"""
    value, high = found["mean"], found["high"]
    if value is None:
        return "-"
    spread = "" if high is None else f" {_half(unit * (high - value), digits)}"
    return f"{unit * value:.{digits}f}{spread}"


def _half(width: float, digits: int) -> str:
    """``±2.0``, and ``±94`` from ten on: what is known so badly needs no fraction, and it is two seeds' as a rule."""
    return f"±{width:.{digits if width < 9.95 else 0}f}"


def _ranked(found: dict[str, Any], words: str) -> str:
    """``0.83 (0.41 to 0.97) over 12 runs``"""
    rho = "none" if found["rho"] is None else f"{found['rho']:.2f}"
    spread = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{rho}{spread} over {found['n']} {words}"


def tested(found: dict[str, float | None] | None) -> tuple[str, str]:
    """``+3.1 ±2.0`` and ``0.012``, or ``<0.001``"""
    if found is None:
        return "-", "-"
    difference, high, p = found["difference"], found["high"], found["p"]
    assert difference is not None  # of two pairs or more everything but t and p is known
    assert high is not None
    return f"{100 * difference:+.1f} {_half(100 * (high - difference), 1)}", chance(p).removeprefix("p ")
