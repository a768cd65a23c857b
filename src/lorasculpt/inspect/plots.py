"""What `lora` and `update` found, drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from . import lora, update
from .lora import LARGE, SHARES, Measures, together
from .places import in_order, order
from .update import ALL, Linear

ABREAST = 4
"""Panels of the plot side by side."""


def of_lora(inspection: lora.Inspection, path: str | Path) -> None:
    """One picture, ``.png`` or ``.svg`` by the name of ``path``.

    Heat maps of energy and density over layers and kinds, density against expectation, the redundancy curves, and with
    a base the share of the energy on large weights.
    """
    height = 0.28 * len(inspection.kinds) + 1  # inches of a heat map
    figure = Figure(figsize=(12, 2 * height + 4), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[2 * height, 4])
    above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    groups: dict[tuple[str, int | None], list[Measures]] = {}
    for layer in inspection.layers:
        groups.setdefault((layer.kind, layer.block), []).append(layer.measures)
    cells = {cell: together(group) for cell, group in groups.items()}
    energy, density = above.subplots(2, 1)
    kinds = list(inspection.kinds)
    heat(energy, kinds, {cell: 100 * m.share for cell, m in cells.items()}, "Share of the update's energy, %")
    heat(density, kinds, {cell: 100 * m.density_ba for cell, m in cells.items()}, "Density of BA, %")
    axes = below.subplots(1, 2 if inspection.base is None else 3)
    _scatter(axes[0], inspection)
    _curves(axes[1], inspection)
    if inspection.base is not None:
        _overlaps(axes[2], inspection)
    figure.savefig(path, dpi=150)


def _scatter(axes: Axes, inspection: lora.Inspection) -> None:
    # a colour for each kind, or for each part where there are more kinds than colours the eye can tell apart
    field = "kind" if len(inspection.kinds) <= 8 else "part"
    for name in dict.fromkeys(
        getattr(x, field) for x in sorted(inspection.layers, key=lambda x: order(x.part, x.kind))
    ):
        own = [x.measures for x in inspection.layers if getattr(x, field) == name]
        axes.scatter([100 * m.expected_ba for m in own], [100 * m.density_ba for m in own], s=14, alpha=0.7, label=name)
    seen = [100 * x for layer in inspection.layers for x in (layer.measures.expected_ba, layer.measures.density_ba)]
    margin = max(2.0, 0.1 * (max(seen) - min(seen)))
    ends = (min(seen) - margin, max(seen) + margin)
    axes.plot(ends, ends, color="0.5", linewidth=1, linestyle="--")
    axes.set(xlim=ends, ylim=ends, xlabel="expected of random masks, %", ylabel="measured, %")
    axes.set_title("Density of BA", loc="left")
    axes.legend(fontsize="x-small", frameon=False)


def _curves(axes: Axes, inspection: lora.Inspection) -> None:
    shares = [100 * share for share in SHARES]
    for field, label in (("curve_a", "A"), ("curve_b", "B"), ("curve_ba", "BA (sampled rows)")):
        curves = 100 * np.array([getattr(x.measures, field) for x in inspection.layers])
        low, middle, high = np.percentile(curves, [10, 50, 90], axis=0)
        (line,) = axes.plot(shares, middle, label=label)
        axes.fill_between(shares, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="largest entries kept, %", ylabel="norm kept, %")
    axes.set_title("Redundancy, 10th to 90th percentile", loc="left")
    axes.legend(fontsize="small", frameon=False, loc="lower right")


def _overlaps(axes: Axes, inspection: lora.Inspection) -> None:
    kinds = list(inspection.kinds)
    values = [100 * (inspection.kinds[kind].overlap or 0.0) for kind in kinds]
    axes.barh(range(len(kinds)), values)
    axes.axvline(100 * LARGE, color="0.5", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"% on the largest {LARGE:.0%}")
    axes.set_title("Energy on large |W|", loc="left")


def of_update(inspection: update.Inspection, path: str | Path) -> None:
    """One picture, ``.png`` or ``.svg`` by the name of ``path``.

    A heat map of loads for each task, layers across and the experts of every kind of linear down; above them, where the
    update is a matrix, its energy and its relative size over layers and kinds.
    """
    linears = sorted(inspection.linears, key=lambda x: order(x.part, x.kind))
    kinds = list(dict.fromkeys(linear.kind for linear in linears))
    groups: dict[tuple[str, int | None], list[Linear]] = {}
    for linear in linears:
        groups.setdefault((linear.kind, linear.block), []).append(linear)
    sizes = list(linears[0].energy)
    experts = [(kind, i) for kind in kinds for i in range(max(len(x.load) for x in linears if x.kind == kind))]
    heights = [0.28 * len(kinds) + 1] * len(sizes)  # inches
    if inspection.records:
        heights.append(math.ceil(len(inspection.records) / ABREAST) * (min(max(0.14 * len(experts), 1.5), 10) + 1))
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flatten())
    for task in sizes:
        left, right = parts.pop(0).subplots(1, 2)
        of = "" if task == ALL else f" for {task}"
        whole = math.fsum(linear.energy[task] for linear in linears) or 1.0
        share = {cell: 100 * math.fsum(x.energy[task] for x in group) / whole for cell, group in groups.items()}
        heat(left, kinds, share, f"Share of the update's energy{of}, %")
        relative = {cell: 100 * fmean(x.relative[task] for x in group) for cell, group in groups.items()}
        heat(right, kinds, relative, f"Size relative to the base weight{of}, %")
    if inspection.records:
        _panels(parts.pop(0), inspection, experts, groups)
    figure.savefig(path, dpi=150)


def _panels(
    figure: SubFigure,
    inspection: update.Inspection,
    experts: list[tuple[str, int]],
    groups: Mapping[tuple[str, int | None], list[Linear]],
) -> None:
    """The loads: a panel for each task, all with the same colours."""
    tasks, blocks = list(inspection.records), in_order(block for _, block in groups)
    down = math.ceil(len(tasks) / ABREAST)
    panels = figure.subplots(down, min(len(tasks), ABREAST), sharex=True, sharey=True, squeeze=False).flatten()
    top = max(max(load) for linear in inspection.linears for load in linear.tasks.values())
    starts = [row for row, (_, expert) in enumerate(experts) if expert == 0]
    middles = [(a + b - 1) / 2 for a, b in pairwise([*starts, len(experts)])]
    for axes, task in zip_longest(panels, tasks):
        if task is None:
            axes.set_visible(False)
            continue
        cells = {
            ((kind, expert), block): fmean(linear.tasks[task][expert] for linear in routed)
            for (kind, block), group in groups.items()
            for expert in range(len(group[0].load))
            if (routed := [linear for linear in group if task in linear.tasks])
        }
        image = axes.imshow(
            grid(experts, blocks, cells), aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest"
        )
        axes.set_facecolor("0.9")
        for start in starts[1:]:
            axes.axhline(start - 0.5, color="white", linewidth=1.5)
        across(axes, blocks)
        axes.set_yticks(middles, [experts[start][0] for start in starts])
        axes.tick_params("y", length=0)
        axes.set_title(f"Loads, {task} ({inspection.records[task]})", loc="left")
    for axes in panels[::ABREAST]:
        axes.set_ylabel("experts of every kind, the first on top")
    figure.colorbar(image, ax=panels, pad=0.01, label="load of an expert; 1 is a fair share")


def heat(axes: Axes, kinds: Sequence[str], cells: Mapping[tuple[str, int | None], float], title: str) -> None:
    """Kinds down, layers across, a colour bar beside; ``cells`` is by kind and layer, grey where there is none."""
    blocks = in_order(block for _, block in cells)
    image = axes.imshow(grid(kinds, blocks, cells), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_facecolor("0.9")
    across(axes, blocks)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title(title, loc="left")
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def grid(rows: Sequence[Any], columns: Sequence[Any], cells: Mapping[tuple[Any, Any], float]) -> np.ndarray:
    """``cells`` as an array, not-a-number where there is none."""
    return np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])


def across(axes: Axes, blocks: Sequence[int | None]) -> None:
    """Layer numbers below a heat map, not more than have room."""
    step = math.ceil(len(blocks) / 32)
    axes.set_xticks(range(0, len(blocks), step), ["none" if b is None else str(b) for b in blocks[::step]])
    axes.set_xlabel("layer")
