"""Heat maps, as SVG to be put inside a page: one scale of a few steps for all panels of a map.

A step is one tint of one colour over whatever the page's paper is, so that a picture serves light and dark. Cells side
by side in the same step are one rectangle: a map of a hundred layers stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from .plots import MUTED, STYLE, colour, svg

STEPS = 8
FAINT = 0.12  # how much colour the lowest step has, so that it is not taken for an empty cell
CELL, TALL, LETTER = 0.2, 0.19, 0.075  # inches: a column, a row with a name of its own, a letter of it
THIN = 0.4  # of a row's height, where several share a name
ACROSS = 7.0  # inches that the columns have at most


@dataclass(frozen=True)
class Panel:
    """One map: ``values`` (rows, columns), nan where there is nothing.

    A row without a name belongs to the last one before it that has one.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


def scale(panels: Sequence[Panel], least: float) -> np.ndarray:
    """The edges of the steps, round numbers at least ``least`` apart, from the smallest value to the largest."""
    known = np.concatenate([panel.values[~np.isnan(panel.values)] for panel in panels])
    low, high = float(known.min()), float(known.max())
    count = int(np.clip((high - low) // least, 1, STEPS))
    edges = np.array(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    below, above = int(np.searchsorted(edges, low, "right")) - 1, int(np.searchsorted(edges, high))
    return edges[max(below, 0) : above + 1]


def even(panel: Panel, least: float) -> bool:
    """Whether all cells of ``panel`` are within ``least``: there is nothing to see."""
    return bool(np.nanmax(panel.values) - np.nanmin(panel.values) < least)


def heat(panels: Sequence[Panel], edges: np.ndarray, name: str, description: str) -> str:
    """``panels``, one below the other, under a legend of the steps between ``edges``."""
    left = 0.15 + LETTER * max(len(row) for panel in panels for row in panel.rows)
    widths = [min(CELL * len(panel.columns), ACROSS) for panel in panels]
    heights = [TALL * len(panel.rows) * (1 if all(panel.rows) else THIN) for panel in panels]
    legend, gap = 0.62, 0.66  # of the legend in all; of a panel's title and the numbers of its layers
    width = left + max(*widths, 3.4) + 0.2
    height = legend + sum(heights) + gap * len(panels)
    with mpl.rc_context(STYLE | {"axes.grid": False, "font.size": 9}):
        figure = Figure(figsize=(width, height))

        def place(top: float, across: float, down: float) -> Axes:
            return figure.add_axes((left / width, (height - top - down) / height, across / width, down / height))

        _legend(place(0.12, 3.2, 0.16), edges)
        top = legend
        for panel, across, down in zip(panels, widths, heights, strict=True):
            _draw(place(top + 0.24, across, down), panel, edges)
            top += down + gap
        return svg(figure, name, description, natural=True)


def _steps(values: np.ndarray, edges: np.ndarray) -> list[list[int | None]]:
    found = np.clip(np.searchsorted(edges, values, "right") - 1, 0, len(edges) - 2)
    return [
        [None if np.isnan(value) else int(step) for value, step in zip(row, of, strict=True)]
        for row, of in zip(values, found, strict=True)
    ]


def _tint(step: int, edges: np.ndarray) -> float:
    return FAINT + (1 - FAINT) * step / max(len(edges) - 2, 1)


def _fill(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], alpha: float) -> None:
    """One shape of all ``boxes`` (left, right, top, bottom)."""
    corners = [[(a, c), (b, c), (b, d), (a, d), (a, c)] for a, b, c, d in boxes]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    axes.add_patch(PathPatch(Path(np.concatenate(corners), codes), facecolor=colour(0), alpha=alpha, linewidth=0))


def _draw(axes: Axes, panel: Panel, edges: np.ndarray) -> None:
    named = [i for i, row in enumerate(panel.rows) if row]
    gap = 0.1 if len(named) == len(panel.rows) else 0.0  # a row of its own stands apart from the next
    boxes: dict[int, list[tuple[float, float, float, float]]] = {}
    for top, steps in enumerate(_steps(panel.values, edges)):
        start = 0
        for step, group in groupby(steps):
            end = start + len(list(group))
            if step is not None:
                boxes.setdefault(step, []).append((start, end, top, top + 1 - gap))
            start = end
    for step in sorted(boxes):
        _fill(axes, boxes[step], _tint(step, edges))
    axes.set(xlim=(0, len(panel.columns)), ylim=(len(panel.rows), 0), xlabel="layer")
    ends = [*named[1:], len(panel.rows)]
    axes.set_yticks([(i + end) / 2 for i, end in zip(named, ends, strict=True)])
    axes.set_yticklabels([panel.rows[i] for i in named])
    if len(named) < len(panel.rows):
        for i in named[1:]:
            axes.axhline(i, color=MUTED, linewidth=0.6)
    every = -(-len(panel.columns) // 16)
    axes.set_xticks(np.arange(0, len(panel.columns), every) + 0.5, panel.columns[::every])
    axes.tick_params(length=0)
    axes.xaxis.labelpad = 2
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(panel.title, loc="left", size=9, pad=4)


def _legend(axes: Axes, edges: np.ndarray) -> None:
    count = len(edges) - 1
    for step in range(count):
        _fill(axes, [(step, step + 1, 0, 1)], _tint(step, edges))
    axes.set(xlim=(0, count), ylim=(0, 1), yticks=[])
    axes.set_xticks(range(count + 1), [f"{edge:g}" for edge in np.round(edges, 6)])
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
