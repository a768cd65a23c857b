"""The plots, as SVG to be put inside a page.

Colours are drawn as place-holders that become CSS variables, so that one picture serves light and dark; text stays
text in the page's own font. What belongs to an entry has its class (``of s3``) and says what it is when it is pointed
at. The same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from itertools import pairwise
from typing import Any
from urllib.parse import quote, unquote

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle

from ..evaluation.correlation import along
from .results import Entry, Number, ends, front, ours, reference

Point = tuple[float, float]

SERIES = 9
MARKERS = "osD^vPXph"
INK, MUTED, GRID = "#010101", "#010102", "#010103"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line"} | {f"#01020{i}": f"series-{i}" for i in range(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
SIDES: dict[str, Any] = {"source": "-", "target": (0, (3, 2))}  # and the dashes of its line
AXES = {"source": "source: what it knew (%)", "kept": "kept: probability of the base's own texts (%)"}
WIDTH = 4.7  # inches: wide enough for a column of a page, and still readable when a phone shrinks it
CURVES = 6  # of more entries some have a mark for their end alone
KEPT, LEARNED = 0.9, 0.5  # what is seen closer: so much of the base's source, and of the best target


def colour(i: int) -> str:
    """The place-holder for series ``i``."""
    return f"#01020{i % SERIES}"


def marker(i: int) -> str:
    """The marker of series ``i``: where colours come round again each gets another one, so that no two are alike."""
    return MARKERS[(i + i // SERIES) % SERIES]


def legend(entries: list[Entry]) -> list[dict[str, str]]:
    """The one legend of all plots: the ``label``, the ``colour`` and the ``mark`` of each entry.

    The mark is a path in a box from -0.7 to 0.7.
    """
    found = []
    for i, entry in enumerate(entries):
        shape = MarkerStyle(marker(i))
        outline = np.asarray(shape.get_path().transformed(shape.get_transform()).to_polygons()[0])
        path = "L".join(f"{x:.2f} {-y:.2f}" for x, y in outline)
        found.append({"label": entry.label, "colour": f"var(--{VARIABLES[colour(i)]})", "mark": f"M{path}Z"})
    return found


def drawn(entries: list[Entry]) -> list[int]:
    """The entries whose curves are drawn: all of up to ``CURVES``, else the first, the reference, ours, the front."""
    if len(entries) <= CURVES:
        return list(range(len(entries)))
    others = [entry for entry in (entries[0], reference(entries), ours(entries)) if entry]
    chosen = {*front(ends(entries)), *(entry.label for entry in others)}
    return [i for i, entry in enumerate(entries) if entry.label in chosen]


def curved(entries: list[Entry]) -> list[int]:
    """Those of `drawn` that have a line: between both ends alone nobody knows the way."""
    return [i for i in drawn(entries) if len(entries[i].curve) > 2]


def fewer(entries: list[Entry]) -> bool:
    """Whether a line of `tradeoff` is of fewer questions (``evaluate.curve``) than the marks of its ends."""
    runs = [run for i in curved(entries) for run in entries[i].runs]
    asked = [((run.get("evaluate") or {}).get("curve") or math.inf, run) for run in runs]
    return any(most < sum(task["n"] for task in run[side].values()) for most, run in asked for side in SIDES)


def mine(i: int, text: str) -> dict[str, Any]:
    """What makes an artist one of the series ``i``, which says ``text`` of itself."""
    return {"gid": f"of s{i} {quote(text)}"}


def svg(figure: Figure, name: str, description: str, natural: bool = False) -> str:
    """``figure`` as an ``<svg>`` element without ids that could clash, dates or fonts.

    It takes the width that the page gives it, or with ``natural`` that of its letters at the size they were drawn.
    """

    def group(found: re.Match[str]) -> str:
        own = re.fullmatch(r"(of s\d+) (.*)", found[1])
        return f'<g class="{own[1]}"><title>{html.escape(unquote(own[2]))}</title>' if own else "<g>"

    with mpl.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True, bbox_inches="tight")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="([^"]*)">', group, text[text.index("<svg") :])
    box = re.findall(r'viewBox="[^"]*"', text)[0]
    style = f' style="width:{float(box.split()[2]) * 4 / 3:.0f}px"' if natural else ""
    text = re.sub(r"<svg[^>]*>", f'<svg {box}{style} role="img" aria-label="{description}">', text, count=1)
    for place, variable in VARIABLES.items():
        text = text.replace(place, f"var(--{variable})")
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\s+", " ", re.sub(r"(\.\d\d)\d+", r"\1", path[0])), text)
    text = re.sub(r"font-family: [^;\"]*; ", "", text)  # the page's own
    return re.sub(r"(font: *(?:\w+ )?[\d.]+px)[^;\"]*", r"\1 system-ui, sans-serif", text).strip()


def _both(point: dict) -> tuple[Number, Number]:
    """The target of a point of a curve, and what is set against it."""
    return point["target"], point["source"] if "source" in point else point["kept"]


def _place(point: dict) -> Point:
    """Where it lies, in percent."""
    target, other = _both(point)
    return 100 * target.value, 100 * other.value


def _bars(points: list[dict]) -> list[list[Point]]:
    """The two error bars, target's and source's, of each of ``points``, in percent."""
    bars = []
    for point in points:
        x, y = _both(point)
        if x.low is not None and x.high is not None:
            bars.append([(100 * x.low, 100 * y.value), (100 * x.high, 100 * y.value)])
        if y.low is not None and y.high is not None:
            bars.append([(100 * x.value, 100 * y.low), (100 * x.value, 100 * y.high)])
    return bars


class _Labels:
    """Puts small labels beside points, on whichever side collides least with lines and other labels.

    Where all that is near is taken, farther away, with a line to the point.
    """

    FAR = 3.5  # times as far

    SIDES = (
        (0.6, 0.7, "left"),
        (-0.6, -0.7, "right"),
        (-0.6, 0.7, "right"),
        (0.6, -0.7, "left"),
        (0, 1, "center"),
        (0, -1, "center"),
        (1, 0, "left"),
    )

    def __init__(self, axes: Axes, lines: list[list[Point]], bars: list[list[Point]]):
        self.axes = axes
        self.taken: list[tuple[float, float, float, float]] = []  # centre and half size of boxes, in points
        for line in (*lines, *bars):
            for start, end in pairwise(self._place(line)):
                self.taken += [(*(start + share * (end - start)), 1.5, 1.5) for share in np.linspace(0, 1, 24)]
        self.taken += [(*place, 4.5, 4.5) for line in lines for place in self._place(line)]

    def _place(self, points: list[Point]) -> np.ndarray:
        return self.axes.transData.transform(points) * 72 / self.axes.figure.dpi

    def put(self, text: str, point: Point, tint: str, gap: float = 6, **own: Any) -> None:
        """Write ``text`` beside ``point``, ``gap`` points from it; ``own`` goes to matplotlib."""
        (x, y), half, height = self._place([point])[0], 2.7 * len(text), 4.0
        boxes, offsets = [], []
        for far in (1.0, self.FAR):
            for across, up, align in self.SIDES:
                dx, dy = far * across * gap, up * (far * gap + height)
                offsets.append((dx, dy, align))
                boxes.append((x + dx + {"center": 0, "left": half, "right": -half}[align], y + dy, half, height))
        (left, low), (right, high) = self.axes.bbox.get_points() * 72 / self.axes.figure.dpi

        def collisions(box: tuple[float, float, float, float]) -> float:
            overlap = ((box[2] + w - abs(box[0] - cx), box[3] + h - abs(box[1] - cy)) for cx, cy, w, h in self.taken)
            beyond = max(0, left - (box[0] - box[2]), box[0] + box[2] - right, low - box[1], box[1] - high)
            return sum(a * b for a, b in overlap if a > 0 and b > 0) + 4 * height * beyond

        side = min(range(len(boxes)), key=lambda i: collisions(boxes[i]) + 12 * (i >= len(self.SIDES)))
        dx, dy, align = offsets[side]
        line = {"arrowstyle": "-", "color": tint, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        how: dict[str, Any] = {"arrowprops": line} if side >= len(self.SIDES) else {}
        where: dict[str, Any] = {"textcoords": "offset points", "ha": align, "va": "baseline"}
        self.axes.annotate(text, point, (dx, dy - 3), **where, size=9, color=tint, **how, **own)
        self.taken.append(boxes[side])


def _limits(axes: Axes, points: np.ndarray) -> None:
    """A margin around all ``points`` (n, 2), within 0 and 100 where they are."""
    for set_limits, values in ((axes.set_xlim, points[:, 0]), (axes.set_ylim, points[:, 1])):
        low, high = values.min(), values.max()
        margin = max(4.0, 0.1 * (high - low))
        set_limits(low - margin, high + margin)


def _stairs(points: list[Point], corner: Point) -> list[Point]:
    """The edge of what the front ``points`` equal or beat, from the left (``corner[0]``) to below (``corner[1]``)."""
    points = sorted(points)
    steps = [(corner[0], points[0][1])]
    for (x, y), (_, below) in pairwise([*points, (0.0, corner[1])]):
        steps += [(x, y), (x, below)]
    return steps


def near(entries: list[Entry]) -> list[int]:
    """The entries that `closer` shows: of more than ``CURVES`` those that learned and kept, if there are several."""
    if len(entries) <= CURVES:
        return []
    best = max(target for target, _ in ends(entries).values())
    before = entries[0].base[entries[0].side].value
    both = ends(entries).values()
    found = [i for i, (x, y) in enumerate(both) if x >= LEARNED * best and y >= KEPT * before]
    return found if len(found) > 2 else []


def closer(entries: list[Entry]) -> str | None:
    """The ends of those that are `near`, as in `tradeoff`, with all their names; None without any."""
    found = near(entries)
    if not found:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
        axes = figure.add_subplot(xlabel="target (%)", ylabel=f"{entries[0].side} (%)")
        places = {i: _place(entries[i].tuned) for i in found}
        own = {i: mine(i, _told(entries[i])) for i in found}
        _limits(axes, np.array(list(places.values())))
        for i, place in places.items():
            for bar in _bars([entries[i].tuned]):
                axes.plot(*zip(*bar, strict=True), color=colour(i), linewidth=1, alpha=0.35, **own[i])
            axes.plot(*place, color=colour(i), marker=marker(i), markersize=9, linestyle="none", **own[i])
        figure.draw_without_rendering()
        labels = _Labels(axes, [[place] for place in places.values()], [])
        for i, place in places.items():
            labels.put(entries[i].label, place, colour(i), gap=8, **own[i])
        return svg(figure, "closer", "Those that learned and kept, closer")


def _told(entry: Entry) -> str:
    """What the mark of an entry's end says of itself."""
    target, other = _place(entry.tuned)
    return f"{entry.label}: target {target:.1f} %, {entry.side} {other:.1f} %"


def tradeoff(entries: list[Entry]) -> str:
    """Source, or what is kept by drift, against target average as each adapter is turned from strength 0 to 1.

    The star and the large marks are of all questions, a line of those a curve is measured on. Every seed is a small
    hollow mark. Of several entries the Pareto front is drawn; only of up to three all large marks, and the points
    between the ends of a line, have their interval and the strength beside them. Of more than ``CURVES`` those that are
    `drawn` have their curve, and their name beside it unless they are `near`; the others have a mark for their end.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
        axes = figure.add_subplot(xlabel="target: what it was taught (%)", ylabel=AXES[entries[0].side])
        few, shown, lined = len(entries) <= 3, drawn(entries), curved(entries)
        named = set(shown) - set(near(entries)) if len(shown) < len(entries) else set()
        own = [mine(i, _told(entry)) for i, entry in enumerate(entries)]
        base, tuned = _place(entries[0].base), [_place(entry.tuned) for entry in entries]
        lines = {i: list(map(_place, entries[i].curve)) for i in lined}
        # a line's own ends say nothing of themselves: the star and the large mark do, of all questions
        points = [[*entry.curve[1:-1], entry.tuned] if few else [entry.tuned] for entry in entries]
        seeds = {
            i: [
                tuple(100 * run["summary"][name] for name in ("target_after", entries[i].after))
                for run in entries[i].runs
            ]
            for i in shown
            if len(entries[i].runs) > 1
        }
        bars = {i: _bars(points[i]) for i in shown}
        everything = [
            [base, *tuned],
            *lines.values(),
            *seeds.values(),
            *(bar for group in bars.values() for bar in group),
        ]
        _limits(axes, np.array([point for group in everything for point in group]))
        for i, end in enumerate(tuned):
            style: dict[str, Any] = {"color": colour(i), "marker": marker(i), **own[i]}
            axes.plot(*end, **style, markersize=10 if i in shown else 7, linestyle="none")
            if i in lines:
                first = 1 if lines[i][0] == base else 0  # which the star covers
                axes.plot(*zip(*lines[i], strict=True), **style, markevery=range(first, len(lines[i])))
            for bar in bars.get(i, ()):
                axes.plot(*zip(*bar, strict=True), **style | {"marker": None, "linewidth": 1, "alpha": 0.45})
            if i in seeds:
                small = style | {"markersize": 5, "markerfacecolor": "none", "markeredgewidth": 1}
                axes.plot(*zip(*seeds[i], strict=True), **small, linestyle="none")
        if len(entries) > 1:
            by_label = ends(entries)
            edge = [(100 * x, 100 * y) for x, y in (by_label[label] for label in front(by_label))]
            corner = (axes.get_xlim()[0], axes.get_ylim()[0])
            stairs = _stairs(edge, corner)
            axes.plot(*zip(*stairs, strict=True), color=MUTED, lw=1.2, ls=(0, (4, 3)), label="Pareto front", zorder=1)
        axes.plot(*base, marker="*", markersize=15, color=INK, linestyle="none", label="base model")
        figure.legend(loc="outside upper left", ncols=2)
        figure.draw_without_rendering()  # places the axes: labels are put in points
        labels = _Labels(
            axes,
            [*([end] for end in (base, *tuned)), *lines.values()],
            [bar for group in bars.values() for bar in group],
        )
        labels.put("base", base, INK, gap=9)
        for i, entry in enumerate(entries):
            for point in points[i] if few else ():
                gap = 9 if point is entry.tuned else 6
                labels.put(f"{point['strength']:g}", _place(point), colour(i), gap=gap, **own[i])
            if i in named:
                labels.put(entry.label, tuned[i], colour(i), gap=9, **own[i])
        said = {"source": "Source average", "kept": "What is kept"}[entries[0].side]
        return svg(figure, "tradeoff", f"{said} against target average over adapter strength")


def _means(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """The means of at most 60 windows of equal length: the loss of single batches is mostly noise."""
    width = -(-len(steps) // 60)
    windows = [slice(i, i + width) for i in range(0, len(steps), width)]
    return [float(np.mean(steps[w])) for w in windows], [float(np.mean(values[w])) for w in windows]


def _series(run: dict, key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run.get("training") or () if row.get(key) is not None]
    return [row["step"] for row in rows], [row[key] for row in rows]


def on_the_way(entries: list[Entry]) -> list[str]:
    """Which of source, target and drift were measured during the training of one of the ``entries``."""
    runs = [run for entry in entries for run in entry.runs]
    return [key for key in (*SIDES, "drift") if any(_series(run, key)[0] for run in runs)]


def training(entries: list[Entry]) -> str | None:
    """The loss over the steps of training; beneath it source and target average, and the drift, where measured.

    Of those entries that are `drawn`. None without anything to show.
    """
    shown = [(i, run) for i in drawn(entries) for run in entries[i].runs if run.get("training")]
    losses = any(_series(run, "loss")[0] for _, run in shown)  # none in a run shorter than ``log_every``
    known = on_the_way([entries[i] for i in drawn(entries)])
    sides = {side: dashes for side, dashes in SIDES.items() if side in known}
    kinds = ["training loss"] * losses + ["average (%)"] * bool(sides) + ["drift (nats a token)"] * ("drift" in known)
    if not kinds:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.6 + 1.6 * len(kinds)), layout="constrained")
        found = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        panels = dict(zip(kinds, found, strict=True))
        for kind, axes in panels.items():
            axes.set(ylabel=kind)
        found[-1].set(xlabel="optimizer step")
        for i, run in shown:
            style: dict[str, Any] = {"color": colour(i), "alpha": 1 if len(entries[i].runs) == 1 else 0.6}
            style |= mine(i, f"{entries[i].label}, seed {run['seed']}")
            small = style | {"marker": marker(i), "markersize": 4}
            steps, values = _series(run, "loss")
            if steps:
                # a mark now and then; the one of a single point would not be drawn
                sparse = {"markevery": 0.25} if len(steps) > 1 else {}
                panels["training loss"].plot(*_means(steps, values), **small, **sparse)
            for side, dashes in sides.items():
                steps, values = _series(run, side)
                panels["average (%)"].plot(steps, [100 * value for value in values], **small, linestyle=dashes)
            if "drift" in known:
                panels["drift (nats a token)"].plot(*_series(run, "drift"), **small)
        if sides:
            lines = [Line2D([], [], color=MUTED, ls=dashes, label=side) for side, dashes in sides.items()]
            figure.legend(handles=lines, loc="outside upper left", ncols=2)
        if losses:
            panels["training loss"].set_ylim(bottom=0)
        return svg(figure, "training", f"{', '.join([*['training loss'] * losses, *known])} over steps".capitalize())


def drift(entries: list[Entry]) -> str | None:
    """The source average that each run lost over its drift, and small the points of its curve that carry one.

    Of more than ``CURVES`` entries those that are `drawn` alone have a curve. The axis of the drift is logarithmic
    where it spans more than a factor of thirty. None where no run has a drift, or none a source.
    """
    drifted = [(i, run) for i, e in enumerate(entries) for run in e.runs if run.get("drift") and e.source]
    if not drifted:
        return None
    shown = drawn(entries)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.add_subplot(xlabel="drift (nats a token)", ylabel="source lost (points)")
        seen = []
        for i, run in drifted:
            end = (run["drift"]["value"], 100 * (run["summary"]["source_before"] - run["summary"]["source_after"]))
            line = [(x, 100 * lost) for x, lost in along(run)] if i in shown else []
            told = f"{entries[i].label}, seed {run['seed']}: drift {end[0]:.3g}, lost {end[1]:.1f} points"
            style: dict[str, Any] = {"color": colour(i), "marker": marker(i), **mine(i, told)}
            if line:
                small = {"markersize": 4, "markerfacecolor": "none", "linewidth": 0.8, "alpha": 0.7}
                axes.plot(*zip(*line, strict=True), **style | small)
            axes.plot(*end, **style, markersize=8)
            seen += [x for x, _ in (*line, end)]
        if min(seen) > 0 and max(seen) > 30 * min(seen):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        return svg(figure, "drift", "Source average lost over drift, for every run")
