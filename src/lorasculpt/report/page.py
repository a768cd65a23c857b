"""The report: one page that stands alone, a Markdown table to paste, and the numbers as JSON."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..data.images import open_image
from ..errors import UserError
from ..evaluation.score import normalise
from . import plots
from .results import NUMBERS, REFERENCE, Entry, Number, against, best, ends, entries, front, measured, read
from .words import (
    NONE,
    SPACE,
    about_intervals,
    about_tests,
    bracket,
    difference,
    duration,
    headline,
    listed,
    percent,
    size,
)

COLUMNS = {
    "source_after": "Source average (%)",
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


def summary_table(found: list[Entry]) -> dict:
    """One row for the base and one for each entry: the six numbers, wall time and size.

    The best of each column is bold if there is a best; numbers that are tested against the reference say how.
    """
    base = [_cell(found[0].numbers[name]) for name in ("source_before", "target_before")]
    rows = [{"name": "base model", "cells": base + [_plain_cell(NONE, None)] * 6}]
    winners = {name: best([entry.numbers[name] for entry in found]) for name in COLUMNS}
    tests = against(found)
    for i, entry in enumerate(found):
        own = tests.get(entry.label, {})
        cells = [_cell(entry.numbers[name], winners[name] == i, own.get(name)) for name in COLUMNS]
        cells.append(_plain_cell(duration(entry.seconds), entry.seconds))
        cells.append(_plain_cell(size(entry.adapter_bytes), entry.adapter_bytes))
        name = entry.label if len(entry.runs) == 1 else f"{entry.label} ({len(entry.runs)} seeds)"
        rows.append({"name": name, "cells": cells})
    return {"head": ["Method", *COLUMNS.values(), "Training time", "Adapter"], "rows": rows}


def task_table(found: list[Entry]) -> dict:
    """One row for each source and target task: base, each entry after training, number of questions."""
    rows = []
    for side in ("source", "target"):
        for task, first in getattr(found[0], side).items():
            after = [getattr(entry, side)[task]["after"] for entry in found]
            winner = best(after)
            cells = [_cell(first["before"]), *(_cell(value, i == winner) for i, value in enumerate(after))]
            cells.append(_plain_cell(str(first["n"]), first["n"]))
            rows.append({"name": f"{task.replace('_', ' ')} ({side})", "cells": cells})
    return {"head": ["Task (%)", "base model", *(entry.label for entry in found), "Questions"], "rows": rows}


def seed_table(found: list[Entry]) -> dict | None:
    """One row for each run, where a method was trained with several seeds."""
    rows = [
        {
            "name": f"{entry.label}, seed {run['seed']}",
            "cells": [_cell(measured(run["summary"], name)) for name in COLUMNS],
        }
        for entry in found
        for run in entry.runs
        if len(entry.runs) > 1
    ]
    return {"head": ["Run", *COLUMNS.values()], "rows": rows} if rows else None


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
    shown = [
        {(item["image"], item["question"]): item for item in entry.runs[0].get("gallery") or ()} for entry in found
    ]
    items = []
    for key, first in shown[0].items():

        def said(name: str, item: dict, who: str, answer: str = first["answer"]) -> dict:
            right = item.get(f"{who}_score", normalise(item[who]) == normalise(answer)) >= 0.5
            return {"name": name, "text": item[who] or "(nothing)", "right": right}

        answers = [said("base model", first, "base")]
        answers += [said(e.label, own[key], "tuned") for e, own in zip(found, shown, strict=True) if key in own]
        base, *tuned = (answer["right"] for answer in answers)
        groups = {
            "forgotten": base and not all(tuned) and first.get("task") in found[0].source,
            "learned": not base and any(tuned),
            "both": base and all(tuned),
        }
        picture = data_uri(found[0].runs[0]["folder"] / first["image"])
        items.append(
            {"picture": picture, "answers": answers, "groups": [name for name, within in groups.items() if within]}
            | {key: first[key] for key in ("question", "answer")}
        )
    return items


def filters(items: list[dict]) -> list[dict]:
    """What the gallery can be narrowed to, with the number of pictures that are left."""
    names = {"all": "all", "forgotten": "forgotten", "learned": "learned", "both": "both right"}
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
            for name, task in side.items()
        }

    tests = against(found)
    methods = [
        {
            "label": entry.label,
            "method": entry.runs[0]["method"],
            "seeds": entry.seeds,
            "summary": {name: _plain(entry.numbers[name]) for name in NUMBERS},
            "source": tasks(entry.source),
            "target": tasks(entry.target),
            "curve": [
                {"strength": p["strength"], "source": _plain(p["source"]), "target": _plain(p["target"])}
                for p in entry.curve
            ],
            "by_seed": [
                {"seed": run["seed"]} | {name: _plain(measured(run["summary"], name)) for name in NUMBERS}
                for run in entry.runs
            ],
            "against": tests.get(entry.label, {}),
            "seconds": entry.seconds,
            "adapter_bytes": entry.adapter_bytes,
        }
        for entry in found
    ]
    return {"schema": 1, "headline": sentences, "methods": methods, "pareto": front(ends(found))}


def _settings(found: list[Entry]) -> list[dict]:
    """What each entry was trained with, as name and text."""
    blocks = []
    for entry in found:
        run = entry.runs[0]
        rows = {"method": run["method"], "seeds": listed([str(seed) for seed in entry.seeds])}
        rows |= {key: run[key] for key in ("steps", "trainable") if run.get(key) is not None}
        rows |= {key: value for key, value in run.get("settings", {}).items() if key != "seed"}
        texts = {
            key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in rows.items()
        }
        blocks.append({"name": entry.label, "rows": texts})
    return blocks


def _notes(found: list[Entry]) -> list[str]:
    """What a reader has to know before comparing the entries."""
    first, notes = found[0].numbers, []
    for entry in found[1:]:
        for side in ("source_before", "target_before"):
            if abs(entry.numbers[side].value - first[side].value) > 1e-9:
                notes.append(
                    f"{entry.label} starts from another base ({side.split('_')[0]} "
                    f"{percent(entry.numbers[side].value)}{SPACE}% before training): compare with care."
                )
    if not all(run["complete"] for entry in found for run in entry.runs):
        notes.append("Some runs are still missing: these numbers may change.")
    return notes


def report(results: str | Path | Sequence[str | Path], out_dir: str | Path, remark: str | None = None) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.json`` about one or more results files.

    Args:
        results: a ``results.json``, a folder that holds one, or several of either. The first run is what the others
            are compared with; runs that differ in nothing but the seed are put together.
        out_dir: folder to write to, made if need be. The same results give the same bytes.
        remark: a sentence that a reader should have beside the headline.

    Returns:
        the path of ``report.html``: one file that needs no network and nothing beside it. Its short script
            sorts tables; without it everything is still there.

    Raises:
        UserError: a results file cannot be read, or the files are about different tasks.
    """
    paths = [Path(results)] if isinstance(results, str | Path) else [Path(path) for path in results]
    found = entries(read(paths))
    sentences, notes, note = headline(found), _notes(found), about_intervals(found)
    notes += [remark] if remark else []
    if against(found):
        note += " " + about_tests(REFERENCE)
    pictures = gallery(found)
    tables = [summary_table(found), task_table(found)]
    title = f"Learned and kept: {listed(list(found[0].target))}"
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)

    content = as_json(found, sentences + notes)
    (out / "report.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    parts = [f"# {title}", " ".join(sentences + notes), *map(markdown_table, tables), note]
    (out / "report.md").write_text("\n\n".join(part.rstrip() for part in parts) + "\n", encoding="utf-8")

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        sentences=sentences,
        notes=notes,
        note=note,
        tables=tables,
        seeds=seed_table(found),
        tradeoff=plots.tradeoff(found),
        training=plots.training(found),
        gallery=pictures,
        filters=filters(pictures),
        several=len(found) > 1,
        settings=_settings(found),
        versions=found[0].runs[0]["versions"],
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
