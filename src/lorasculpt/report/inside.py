"""What the adapters are made of, where a run has its adapter beside its results: densities, conflict, routing.

Taken from ``inspect.json`` in the run's folder, which ``lorasculpt inspect RUN/adapter --base BASE --data FILE --json
RUN/inspect.json`` writes, or else measured. Routing is shown from such a file alone: to measure it the model is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml

from ..adapters.plain import read_adapter
from ..errors import UserError
from ..inspect.lora import LARGE, inspect
from ..inspect.places import in_order, order
from ..inspect.update import config_of
from .heat import Panel, even, heat, scale
from .results import Entry

INSPECTION = "inspect.json"
ENTRIES = 2**28
"""Of the update; a larger one is not held against the base here (a hundred million take some five seconds)."""
EXPERTS = 16
"""Loads of more experts than so many are not drawn."""
TENTH = f"{100 * LARGE:g}\u00a0%"
# of a plain LoRA, in percent: name, title, and the least difference that is shown
MAPS = (
    ("density_a", "Density of A (%)", 1.0),
    ("density_b", "Density of B (%)", 1.0),
    ("density_ba", "Density of BA (%)", 1.0),
    ("overlap", f"Conflict: share of the update on the largest {TENTH} of the pretrained weights (%)", 1.0),
    ("share", "Where the update is: share of its squared size (%)", 0.1),
)
# of a method that routes, as they are
ROUTED = (
    ("entropy", "Spread of the experts' loads (1: all alike, 0: a single one)", 0.05),
    ("apart", "Routing by task: the largest difference between two tasks (0: alike, 1: no expert in common)", 0.05),
)
# and of each task
BY_TASK = (
    ("load", "Loads of the experts (1: a fair share)", 0.1),
    ("relative", "Size of the update against that of the base weight (%)", 0.1),
)
TOTALS = {
    "density_a": "Density of A (%)",
    "density_b": "of B (%)",
    "density_ba": "of BA (%)",
    "expected_ba": "BA by chance (%)",
    "stable_rank": "Stable rank",
    "overlap": f"On the largest {TENTH} of weights (%)",
    "m_update": "M where the update is",
    "m_plain": "M everywhere",
}


def inside(found: Sequence[Entry]) -> dict[str, Any]:
    """``totals`` by label (of plain LoRAs, as `lorasculpt.inspect.lora.Measures` has them), ``maps``, and ``notes``.

    A map has a ``title``, its ``svg``, and ``even``: the labels of entries that are not drawn, being the same
    everywhere. Of several seeds the first is shown. What cannot be read, or held against its base, is told in a note.
    """
    known, notes = {}, []
    for entry in found:
        try:
            inspection, obstacle = _inspection(entry)
            if inspection is not None:
                known[entry.label] = _total(inspection), _panels(entry.label, inspection)
            if obstacle is not None:
                notes.append(f"{entry.label} is not held against its base here: {obstacle}")
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            said = str(error) if isinstance(error, UserError) else f"its {INSPECTION} or adapter cannot be read."
            notes.append(f"{entry.label} is not shown here: {said}")
    maps = []
    for name, title, least in (*MAPS, *ROUTED, *BY_TASK):
        panels = [(label, panel) for label, (_, own) in known.items() for panel in own.get(name, ())]
        if not panels:
            continue
        drawn = [panel for _, panel in panels if not even(panel, least)]
        alike = list(dict.fromkeys(label for label, panel in panels if even(panel, least)))
        if drawn:
            picture = heat(drawn, scale(drawn, least), f"map-{name}", f"{title} by layer and kind of module")
            maps.append({"title": title, "svg": picture, "even": alike})
    totals = {label: total for label, (total, _) in known.items() if total is not None}
    return {"totals": totals, "maps": maps, "notes": notes}


def _total(inspection: dict[str, Any]) -> dict[str, float | None] | None:
    """The numbers of a whole plain LoRA; None of an adapter that has none."""
    if "total" not in inspection:
        return None
    found = {name: inspection["total"][name] for name in TOTALS}
    if not all(value is None or math.isfinite(value) for value in found.values()):
        raise ValueError("a number that is none")
    return found


def _inspection(entry: Entry) -> tuple[dict[str, Any] | None, str | None]:
    """What is known of the first of the entry's runs that has a folder of its own; None where there is nothing.

    And why it tells nothing of the base, where that could not be looked into.
    """
    homes = (run["home"] for run in entry.runs if run.get("home") is not None)
    for home in homes:
        if (home / INSPECTION).is_file():
            return json.loads((home / INSPECTION).read_text(encoding="utf-8")), None
        if (home / "adapter" / "adapter_config.json").is_file():
            return _measured(home)
    return None, None


def _measured(home: Path) -> tuple[dict[str, Any], str | None]:
    """The adapter in ``home``, against its base where that is on this disk and the update no larger than ``ENTRIES``.

    Raises:
        UserError: it is no plain LoRA, or cannot be read.
    """
    if config_of(home / "adapter") is not None:
        raise UserError(
            "it is no plain LoRA, and takes its model to look into; run lorasculpt inspect with --base, --data and "
            f"--json {INSPECTION} in the run's folder first."
        )
    pairs = read_adapter(home / "adapter").pairs
    settings = home / "run.yaml"
    base = yaml.safe_load(settings.read_text(encoding="utf-8")).get("base") if settings.is_file() else None
    if base is None:
        return inspect(home / "adapter").to_dict(), None
    obstacle = f"that takes long; run lorasculpt inspect with --base and --json {INSPECTION} in the run's folder first."
    if sum(pair.B.shape[0] * pair.A.shape[1] for pair in pairs) <= ENTRIES:
        try:
            return inspect(home / "adapter", base, fetch=False).to_dict(), None
        except UserError as error:  # it is not here, not what it was, or quantised: the adapter can still be shown
            obstacle = str(error)
    return inspect(home / "adapter").to_dict(), obstacle


def _panels(label: str, inspection: dict[str, Any]) -> dict[str, list[Panel]]:
    """The panels of one entry, by the name of the map that they belong to."""
    if "linears" in inspection:
        return _routed(label, inspection)
    layers = sorted(inspection["layers"], key=lambda layer: order(layer["part"], layer["kind"]))
    found = {}
    for name, _, _ in MAPS:
        cells: dict[tuple[str, int | None], list[float]] = {}
        for layer in layers:
            if (value := layer["measures"][name]) is not None:
                cells.setdefault((layer["kind"], layer["block"]), []).append(100 * value)
        # shares add up; of anything else that several modules of a cell have the mean is taken
        together = math.fsum if name == "share" else fmean
        if cells:
            found[name] = [_panel(label, {cell: together(values) for cell, values in cells.items()})]
    return found


def _routed(label: str, inspection: dict[str, Any]) -> dict[str, list[Panel]]:
    linears = sorted(inspection["linears"], key=lambda linear: order(linear["part"], linear["kind"]))
    routed = [linear for linear in linears if linear["load"]]
    found = {}
    for name, _, _ in ROUTED if routed else ():
        cells: dict[tuple[str, int | None], list[float]] = {}
        for linear in routed:
            cells.setdefault((linear["kind"], linear["block"]), []).append(linear[name])
        if name != "apart" or len(inspection["records"]) > 1:
            found[name] = [_panel(label, {cell: fmean(values) for cell, values in cells.items()})]
    if routed and max(len(linear["load"]) for linear in routed) <= EXPERTS:
        panels = [_loads(f"{label}, {task}", task, routed) for task in inspection["records"]]
        found["load"] = [panel for panel in panels if not np.isnan(panel.values).all()]
    sizes: dict[str, dict[tuple[str, int | None], list[float]]] = {}
    for linear in linears:
        for task, size in linear["relative"].items():
            sizes.setdefault(task, {}).setdefault((linear["kind"], linear["block"]), []).append(100 * size)
    if sizes:
        means = {task: {cell: fmean(values) for cell, values in cells.items()} for task, cells in sizes.items()}
        found["relative"] = [_panel(f"{label}, {task}", cells) for task, cells in means.items()]
    return found


def _panel(title: str, cells: dict[tuple[str, int | None], float]) -> Panel:
    """Kinds of module down, layers across."""
    rows, blocks = list(dict.fromkeys(kind for kind, _ in cells)), in_order(block for _, block in cells)
    values = np.array([[cells.get((row, block), math.nan) for block in blocks] for row in rows])
    return Panel(title, tuple(rows), _numbers(blocks), values)


def _loads(title: str, task: str, routed: Sequence[dict[str, Any]]) -> Panel:
    """The experts of every kind of module down, layers across: the loads in ``task``."""
    kinds, blocks = list(dict.fromkeys(x["kind"] for x in routed)), in_order(x["block"] for x in routed)
    cells: dict[tuple[str, int | None, int], list[float]] = {}
    for linear in routed:
        for expert, load in enumerate(linear["tasks"].get(task, ())):
            cells.setdefault((linear["kind"], linear["block"], expert), []).append(load)
    rows, values = [], []
    for kind in kinds:
        for expert in range(max(len(x["load"]) for x in routed if x["kind"] == kind)):
            rows.append("" if expert else kind)
            values.append([_mean(cells.get((kind, block, expert), ())) for block in blocks])
    return Panel(title, tuple(rows), _numbers(blocks), np.array(values))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _numbers(blocks: Iterable[int | None]) -> tuple[str, ...]:
    return tuple("–" if block is None else str(block) for block in blocks)
