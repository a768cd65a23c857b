"""The report: one page that stands alone, a Markdown table to paste, and the numbers as JSON."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..console import NONE, duration, size
from ..data.images import open_image
from ..errors import UserError
from ..evaluation.correlation import drift_and_loss
from ..evaluation.score import normalise
from ..files import write_json, write_text
from . import plots, sequences
from .inside import TOTALS, inside
from .results import (
    NEAR_BASE,
    Entry,
    Number,
    against,
    best,
    ends,
    entries,
    equalled,
    front,
    made_on,
    measured,
    read,
    reference,
)
from .words import (
    MANY,
    SPACE,
    about_costs,
    about_intervals,
    about_tests,
    bracket,
    by_heart,
    difference,
    headline,
    listed,
    not_compared,
    one_by_one,
    percent,
    spread,
    times,
)

COLUMNS = {
    "source_after": "Source average (%)",
    "kept": "Kept (%)",
    "target_after": "Target (%)",
    "retention": "Retention (%)",
    "gain": "Gain (points)",
    "h_mean": "H-mean (%)",
    "average": "Average (%)",
}
PICTURE = 240  # pixels of the longer side, at most


def _plain_cell(text: str, value: float | None) -> dict:
    """``text``, sorted by ``value``."""
    return {"text": text, "value": value, "interval": "", "test": "", "bold": False}


def _cell(found: Number, bold: bool = False, test: dict | None = None) -> dict:
    value = None if math.isnan(found.value) else found.value
    marks = {"interval": bracket(found), "test": difference(test), "bold": bold}
    return _plain_cell(percent(found.value), value) | marks


def _drift_cell(drift: Number | None) -> dict:
    if drift is None:
        return _plain_cell(NONE, None)
    known = drift.low is not None and drift.high is not None
    interval = f"[{drift.low:.3f}, {drift.high:.3f}]".replace("-", "−") if known else ""
    return _plain_cell(f"{drift.value:.3f}", drift.value) | {"interval": interval}


def columns(found: list[Entry]) -> dict[str, str]:
    """Those of ``COLUMNS`` that the entries have."""
    return {name: head for name, head in COLUMNS.items() if name in found[0].numbers}


def summary_table(found: list[Entry]) -> dict:
    """One row for the base and one for each entry: the numbers that there are, and drift where it is known.

    The best of each column is bold if there is a best; numbers that are tested against the reference say how.
    """
    drift = [_drift_cell(entry.drift) for entry in found] if any(entry.drift is not None for entry in found) else []
    heads = columns(found)
    base = [_cell(found[0].base[side]) for side in (found[0].side, "target")]
    rows = [{"name": "base model", "cells": base + [_plain_cell(NONE, None)] * (len(heads) - 2 + bool(drift))}]
    winners = {name: best([entry.numbers[name] for entry in found]) for name in heads}
    tests = against(found)
    for i, entry in enumerate(found):
        own = tests.get(entry.label, {})
        cells = [_cell(entry.numbers[name], winners[name] == i, own.get(name)) for name in heads]
        name = entry.label if len(entry.runs) == 1 else f"{entry.label} ({len(entry.runs)} seeds)"
        rows.append({"name": name, "cells": cells + drift[i : i + 1]})
    return {"head": ["Method", *heads.values(), *["Drift (nats)"] * bool(drift)], "rows": rows}


def cost_table(found: list[Entry]) -> dict:
    """What each entry took: time, memory, weights and bytes; what nobody knows has no column."""
    known = reference(found)
    columns = {
        "seconds": ("Training time", duration),
        "memory_bytes": ("Peak memory", size),
        "trainable": ("Weights trained", lambda count: NONE if count is None else f"{count:,}"),
        "adapter_bytes": ("Adapter", size),
    }
    columns = {k: v for k, v in columns.items() if any(getattr(entry, k) is not None for entry in found)}
    measured_alike = len({run.get("memory_of") for entry in found for run in entry.runs}) == 1
    rows = []
    for entry in found:
        cells = {k: _plain_cell(words(getattr(entry, k)), getattr(entry, k)) for k, (_, words) in columns.items()}
        if known not in (None, entry) and len({made_on(run) for run in (*entry.runs, *known.runs)}) == 1:
            for key in ("seconds", *["memory_bytes"] * measured_alike):
                if key in cells:
                    cells[key]["test"] = times(getattr(entry, key), getattr(known, key), known.label)
        rows.append({"name": entry.label, "cells": list(cells.values())})
    return {"head": ["Method", *(head for head, _ in columns.values())], "rows": rows}


def task_table(found: list[Entry]) -> dict:
    """Every source and target task: base, each entry after training, number of questions.

    One row for each task; of more than ``MANY`` entries one for each of these, with the tasks across.
    """
    rows: list[dict[str, Any]] = []
    across = []
    for side in ("source", "target"):
        for task, first in getattr(found[0], side).items():
            after = [getattr(entry, side)[task]["after"] for entry in found]
            winner = best(after)
            cells = [_cell(first["before"]), *(_cell(value, i == winner) for i, value in enumerate(after))]
            own = [getattr(entry, side)[task] for entry in found]
            many = " or ".join(str(n) for n in sorted({one["n"] for one in own}))
            alike = first["groups"] and all(one["groups"] == first["groups"] for one in own)
            together = f" in {first['groups']} groups" if alike else ""
            cells.append(_plain_cell(f"{many}{together}", first["n"]))
            name = f"{task.replace('_', ' ')} ({side})"
            rows.append({"name": name, "cells": cells})
            across.append(f"{name}, {many}{SPACE}questions{together}")
    heads = ["base model", *(entry.label for entry in found)]
    if len(found) <= MANY:
        return {"head": ["Task (%)", *heads, "Questions"], "rows": rows}
    turned = [{"name": name, "cells": [row["cells"][i] for row in rows]} for i, name in enumerate(heads)]
    return {"head": ["Method (%)", *across], "rows": turned}


def seed_table(found: list[Entry]) -> dict | None:
    """One row for each run, where a method was trained with several seeds."""
    rows = [
        {
            "name": f"{entry.label}, seed {run['seed']}",
            "cells": [_cell(measured(run["summary"], name)) for name in columns(found)],
        }
        for entry in found
        for run in entry.runs
        if len(entry.runs) > 1
    ]
    return {"head": ["Run", *columns(found).values()], "rows": rows} if rows else None


def equal_table(found: list[Entry]) -> tuple[dict, str, str] | None:
    """What each adapter has left where all reach the same target score, that score, and who is left out.

    None if not known.
    """
    equal = found[0].runs[0].get("equal_target") or {}
    if not equalled(equal):
        return None
    rows = [
        {"name": label, "cells": [_cell(Number(left["mean"], left["low"], left["high"]))]}
        for label, left in equalled(equal).items()
    ]
    return {"head": ["Method", COLUMNS[found[0].after]], "rows": rows}, percent(equal["target"]), not_compared(equal)


def made_of_table(totals: dict[str, dict]) -> dict | None:
    """What each adapter is made of; numbers against the base only where one is known."""
    names = [name for name in TOTALS if any(total[name] is not None for total in totals.values())]

    def cell(name: str, value: float | None) -> dict:
        if value is None:
            return _plain_cell(NONE, None)
        return _plain_cell(percent(value) if TOTALS[name].endswith("(%)") else f"{value:.3g}", value)

    rows = [{"name": label, "cells": [cell(name, total[name]) for name in names]} for label, total in totals.items()]
    return {"head": ["Adapter", *(TOTALS[name] for name in names)], "rows": rows} if rows else None


def markdown_table(table: dict) -> str:
    """``table`` as a GitHub table."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [table["head"], ["---", *["---:"] * (len(table["head"]) - 1)]]
    for row in table["rows"]:
        texts = [f"**{c['text']}**" if c["bold"] else c["text"] for c in row["cells"]]
        intervals = [f" {c['interval']}" if c["interval"] else "" for c in row["cells"]]
        tests = [f" ({c['test']})" if c["test"] else "" for c in row["cells"]]
        lines.append([row["name"], *map("".join, zip(texts, intervals, tests, strict=True))])
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def data_uri(path: Path) -> str | None:
    """The picture in ``path``, made small, as a ``data:`` URI; None if it cannot be opened any more."""
    try:
        picture = open_image(path)
    except UserError:
        return None
    picture.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    kind = "PNG" if max(picture.size) <= 128 else "JPEG"  # small pictures are drawings, large ones photographs
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gallery(found: list[Entry]) -> list[dict]:
    """The pictures of the first entry's first run, with the answers of the base and of every entry that shows them.

    Each has the ``groups`` that it is in: ``forgotten`` (of the source: the base is right, an entry is wrong),
    ``learned`` (the base is wrong, an entry is right) or ``both`` (the base and all entries are right).
    """

    def pictures(run: dict) -> dict[tuple[Path, str], dict]:
        items = run.get("gallery") or ()
        return {((run["folder"] / item["image"]).resolve(), item["question"]): item for item in items}

    shown = [pictures(entry.runs[0]) for entry in found]
    items = []
    for key, first in shown[0].items():

        def said(name: str, item: dict, who: str, answer: str = first["answer"]) -> dict:
            right = item.get(f"{who}_score", normalise(item[who]) == normalise(answer)) >= 0.5
            return {"name": name, "text": item[who] or "(nothing)", "right": right}

        answers = [said("base model", first, "base")]
        answers += [said(e.label, own[key], "tuned") for e, own in zip(found, shown, strict=True) if key in own]
        base, *tuned = (answer["right"] for answer in answers)
        groups = {
            "forgotten": base and not all(tuned) and _of_source(first, found[0]),
            "learned": not base and any(tuned),
            "both": base and all(tuned),
        }
        picture = data_uri(key[0])
        items.append(
            {"picture": picture, "answers": answers, "groups": [name for name, within in groups.items() if within]}
            | {part: first[part] for part in ("question", "answer")}
        )
    return items


def _of_source(item: dict, entry: Entry) -> bool:
    """Whether a picture's question is one of what is to be kept; a file of before does not say of which side it is."""
    return item["side"] == "source" if "side" in item else item.get("task") in entry.source


def filters(items: list[dict], source: bool) -> list[dict]:
    """What the gallery can be narrowed to, with the number of pictures that are left; only of a source is forgotten."""
    names = {"all": "all"} | ({"forgotten": "forgotten"} if source else {})
    names |= {"learned": "learned", "both": "both right"}
    return [
        {"name": name, "text": text, "count": sum(name in (*item["groups"], "all") for item in items)}
        for name, text in names.items()
    ]


def _plain(found: Number) -> dict:
    known = {"value": found.value, "low": found.low, "high": found.high}
    return {key: None if value is None or math.isnan(value) else value for key, value in known.items()}


def as_json(found: list[Entry], sentences: list[str]) -> dict:
    """Every number of the page, unrounded."""

    def tasks(side: dict) -> dict:
        return {
            name: {"before": _plain(task["before"]), "after": _plain(task["after"]), "n": task["n"]}
            | ({"groups": task["groups"]} if task["groups"] else {})
            for name, task in side.items()
        }

    tests = against(found)
    methods = [
        {
            "label": entry.label,
            "method": entry.runs[0]["method"],
            "seeds": entry.seeds,
            "summary": {name: _plain(number) for name, number in entry.numbers.items()},
            "source": tasks(entry.source),
            "target": tasks(entry.target),
            "curve": [
                {"strength": p["strength"], entry.side: _plain(p[entry.side]), "target": _plain(p["target"])}
                for p in entry.curve
            ],
            "by_seed": [
                {"seed": run["seed"]} | {name: _plain(measured(run["summary"], name)) for name in entry.numbers}
                for run in entry.runs
            ],
            "against": tests.get(entry.label, {}),
            "seconds": entry.seconds,
            "trainable": entry.trainable,
            "adapter_bytes": entry.adapter_bytes,
            "memory_bytes": entry.memory_bytes,
            "drift": None if entry.drift is None else _plain(entry.drift),
        }
        for entry in found
    ]
    about = {"pareto": front(ends(found)), "drift": _correlation(found)}
    return {"schema": 1, "headline": sentences, "methods": methods, **about}


def _correlation(found: list[Entry]) -> dict | None:
    """How well the drift tells the loss of source accuracy, over all runs."""
    return drift_and_loss([run for entry in found for run in entry.runs])


def _settings(found: list[Entry]) -> list[dict]:
    """What each entry was trained and measured with, as name and text; first what all of several have in common."""
    blocks: list[dict[str, Any]] = []
    for entry in found:
        run = entry.runs[0]
        rows = {"method": run["method"], "seeds": listed([str(seed) for seed in entry.seeds])}
        rows |= {key: run[key] for key in ("steps", "trainable") if run.get(key) is not None}
        if run.get("chosen_by"):
            rows["rate chosen by"] = run["chosen_by"].replace("_", " ")
            rows |= {"rate chosen on": run["chosen_on"]} if run.get("chosen_on") else {}
        own = {key: value for key, value in run.get("settings", {}).items() if key != "seed"}
        for key, value in _of_file(run).items():
            own[key] = value | own.get(key, {}) if isinstance(value, dict) else value
        rows |= own
        rows["questions"] = {task: part["n"] for side in (entry.source, entry.target) for task, part in side.items()}
        texts = {
            key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in rows.items()
        }
        blocks.append({"name": entry.label, "rows": texts})
    if len(blocks) == 1:
        return blocks
    first, *others = (block["rows"] for block in blocks)
    common = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    apart = [block | {"rows": {k: v for k, v in block["rows"].items() if k not in common}} for block in blocks]
    return [{"name": "All of them", "rows": common}, *apart]


def _of_file(run: dict) -> dict[str, Any]:
    """``base``, ``data`` and ``evaluate`` of the ``run.yaml`` in the run's folder, without what says nothing.

    Of folders and files the names alone, since a page is shown to others. Empty where there is no such file.
    """
    home = run.get("home")
    try:
        content = yaml.safe_load((home / "run.yaml").read_text(encoding="utf-8")) if home is not None else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(content, dict):
        return {}

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(part) for key, part in value.items() if part not in (None, [], {})}
        if isinstance(value, list):
            return [short(part) for part in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return {key: short(content[key]) for key in ("base", "data", "evaluate") if content.get(key)}


def _notes(found: list[Entry]) -> list[str]:
    """What a reader has to know before comparing the entries."""
    sides = [side for side in ("source_before", "target_before") if side in found[0].numbers]
    notes = [note for side in sides for note in _bases(found, side)]
    runs = [run for entry in found for run in entry.runs]
    if others := [entry.label for entry in found[1:] if not _asked_alike(found[0], entry)]:
        were = "were" if len(others) > 1 else "was"
        notes.append(f"{listed(others)} {were} asked other questions than {found[0].label}: compare with care.")
    notes += dict.fromkeys(filter(None, map(by_heart, runs)))
    if not all(run["complete"] for run in runs):
        notes.append("Some runs are still missing: these numbers may change.")
    if any(run["compared"] for run in runs) and not found[0].runs[0].get("gallery"):
        notes.append("No pictures are shown: the folders of the runs are not beside the file of the comparison.")
    return notes


def _asked_alike(one: Entry, other: Entry) -> bool:
    """Whether two entries were asked the same questions, as far as both tell; as many at least."""
    asked = [{run["questions"] for run in entry.runs if run.get("questions")} for entry in (one, other)]
    counts = [[task["n"] for side in (e.source, e.target) for task in side.values()] for e in (one, other)]
    return counts[0] == counts[1] and (asked[0] == asked[1] or not all(asked))


def _bases(found: list[Entry], side: str) -> list[str]:
    """Whose base scored otherwise than the first's on a ``side``, and whether the precision tells why."""

    def started(entry: Entry) -> str:
        return listed(list(dict.fromkeys(f"{percent(run['summary'][side])}{SPACE}%" for run in entry.runs)))

    def precision(run: dict) -> str:
        return run.get("precision") or "another"

    def precisions(entry: Entry) -> str:
        counts = sorted(Counter(map(precision, entry.runs)).items())
        many = len(entry.runs)
        return listed([name if count == many else f"{name} ({count} of {many})" for name, count in counts])

    def bases(entry: Entry) -> set[tuple[str, float]]:
        return {(precision(run), round(run["summary"][side], 9)) for run in entry.runs}

    def another(of: set[tuple[str, float]]) -> bool:
        """Whether they are more than one base, which answers nearly alike in one precision, be it on two machines."""
        by_precision: dict[str, list[float]] = defaultdict(list)
        for name, value in of:
            by_precision[name].append(value)
        return any(max(values) - min(values) > NEAR_BASE for values in by_precision.values())

    first, alike = found[0], defaultdict(list)
    for entry in found[1:]:
        both = bases(entry) | bases(first)
        unlike = another(both) or precisions(entry) != precisions(first)
        if len({value for _, value in both}) > 1 and unlike:
            alike[another(both), precisions(entry), started(entry)].append(entry.label)
    name, notes = side.removesuffix("_before"), []
    notes += [
        f"The runs of {entry.label} start from different bases ({name} {started(entry)} before training): they are no "
        "seeds of one method."
        for entry in found
        if another(bases(entry))
    ]
    for (differ, ran, before), labels in alike.items():
        if differ:
            starts = "start from another base" if len(labels) > 1 else "starts from another base"
            notes.append(f"{listed(labels)} {starts} ({name} {before} before training): compare with care.")
        else:
            notes.append(
                f"{listed(labels)} ran in {ran} precision, {first.label} in {precisions(first)}: the base "
                f"answers a little differently there ({name} {before} before training, not {started(first)})."
            )
    return notes


def report(results: str | Path | Sequence[str | Path], out_dir: str | Path, remark: str | None = None) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.json`` about one or more results files.

    Args:
        results: a ``results.json``, a ``compare.json``, the ``matrix.json`` of tasks learned in turn, a folder that
            holds the first or the last, or several of these; a comparison may be one of sequences. The first run is
            what the others are compared with; runs that differ in nothing but the seed are put together. Beside its
            ``results.json`` a run may have its ``adapter`` and an ``inspect.json`` (`lorasculpt.report.inside`).
        out_dir: folder to write to, made if need be. The same results give the same bytes.
        remark: a sentence that a reader should have beside the headline.

    Returns:
        the path of ``report.html``: one file that needs no network and nothing beside it. Its short script
            sorts tables; without it everything is still there.

    Raises:
        UserError: a file cannot be read, or files are about different tasks.
    """
    paths = [Path(results)] if isinstance(results, str | Path) else [Path(path) for path in results]
    paths = list({path.resolve(): path for path in paths}.values())  # one that is named twice is one run, not two
    runs, matrices = sequences.split(paths)
    parts = [_runs(runs, remark)] if runs or not matrices else []
    parts += [_in_turn(matrices)] if matrices else []
    page = {"found": None, "turns": None} | {key: value for part in parts for key, value in part.page.items()}
    first = parts[0]
    sentences = [sentence for part in parts for sentence in part.sentences]
    out = Path(out_dir)

    content = {key: value for part in reversed(parts) for key, value in part.content.items()}
    content |= {"headline": [*sentences, *first.notes]}
    write_json(out / "report.json", content, nan=False)
    lead = page["lead"] if page.get("many") else len(sentences)
    blocks = [f"# {first.title}", " ".join([*sentences[:lead], *first.notes])]
    blocks += ["\n".join(f"- {sentence}" for sentence in sentences[lead:])]
    for part in parts:
        blocks += [*map(markdown_table, part.tables), part.note]
    text = "\n\n".join(block.rstrip() for block in blocks if block) + "\n"
    write_text(out / "report.md", text)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page |= {"title": first.title, "sentences": sentences, "notes": first.notes, "versions": first.versions}
    return write_text(out / "report.html", environment.get_template("page.html.j2").render(page))


@dataclass(frozen=True)
class _Part:
    """What results of one kind add to the page, its Markdown and its JSON."""

    title: str
    sentences: list[str]
    notes: list[str]
    note: str
    tables: list[dict]
    content: dict
    page: dict
    versions: dict


def _runs(paths: list[Path], remark: str | None) -> _Part:
    found = entries(read(paths))
    lead, notes, note = headline(found), _notes(found), about_intervals(found)
    sentences = lead + one_by_one(found)
    notes += [remark] if remark else []
    known = reference(found)
    if known and against(found):
        note += " " + about_tests(known.label)
    content = as_json(found, sentences)
    tables = [summary_table(found), task_table(found), cost_table(found)]
    pictures, equal = gallery(found), equal_table(found)
    within = inside(found)
    on_the_way = plots.on_the_way([found[i] for i in plots.drawn(found)])
    made_of = made_of_table(within["totals"])
    page = {
        "found": found,
        "lead": len(lead),
        "many": len(found) > MANY,
        "note": note,
        "by": found[0].side,
        "of_costs": about_costs(found),
        "tables": tables,
        "equal": equal,
        "seeds": seed_table(found),
        "tradeoff": plots.tradeoff(found),
        "closer": plots.closer(found),
        "kept": f"{100 * plots.KEPT:.0f}",
        "learned": f"{100 * plots.LEARNED:.0f}",
        "legend": plots.legend(found),
        "curves": [found[i].label for i in plots.curved(found)],
        "fewer": plots.fewer(found),
        "training": plots.training(found),
        "on_the_way": [{"source": "source average", "target": "target average"}.get(x, x) for x in on_the_way],
        "drift": plots.drift(found),
        "spread": spread(content["drift"]),
        "made_of": made_of,
        "against_base": any(total["m_plain"] is not None for total in within["totals"].values()),
        "maps": within["maps"],
        "unread": within["notes"],
        "gallery": pictures,
        "filters": filters(pictures, bool(found[0].source)),
        "several": len(found) > 1,
        "settings": _settings(found),
    }
    content |= {"equal_target": found[0].runs[0].get("equal_target"), "adapters": within["totals"]}
    tables += [made_of] if made_of else []
    title = f"Learned and kept: {listed(list(found[0].target))}"
    note = " ".join(filter(None, [note, about_costs(found)]))
    return _Part(title, sentences, notes, note, tables, content, page, found[0].runs[0]["versions"])


def _in_turn(paths: list[Path]) -> _Part:
    found = sequences.read(paths)
    whole, each = sequences.summary_table(found), [sequences.matrix_table(matrix) for matrix in found]
    page = {"turns": {"whole": whole, "each": [(m["label"], table) for m, table in zip(found, each, strict=True)]}}
    title = f"Learned in turn: {listed(found[0]['tasks'])}"
    content = {"schema": 1, "sequences": sequences.as_json(found)}
    return _Part(title, sequences.headline(found), [], "", [whole, *each], content, page, found[0]["versions"])
