"""A budget for forgetting: of an adapter's settings, the one that learns the most and keeps enough. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .summary import retention

WORTH = 0.01  # of the target: what is to be won by another strength has to be more


def kept(points: Sequence[dict[str, Any]]) -> tuple[str, list[float]]:
    """By what it is told, ``"source"`` or ``"drift"``, and the share that each point of a curve keeps of the base.

    By source it is the retention, against the point of strength 0. Where no source is known it is exp(-drift): the
    share of the base's probability, as a geometric mean over tokens, that the tuned model still gives to what the base
    would have said. That is no accuracy: it falls before answers change.

    Args:
        points: ``{"strength": s, "target": t}`` with ``source``, or else ``drift`` in nats; strength 0 is among them.
    """
    if "source" in points[0]:
        before = next(point["source"] for point in points if point["strength"] == 0)
        return "source", [float(retention(before, point["source"])) for point in points]
    return "drift", [math.exp(-point["drift"]) for point in points]


def within(points: Sequence[dict[str, Any]], retain: float) -> dict[str, Any]:
    """The point with the largest target among those above strength 0 that keep at least ``retain``.

    Of equal targets the smaller strength is taken, then the smaller density. Shares are compared as measured, without
    their intervals.

    Args:
        points: as :func:`kept` takes them; those of several densities, where they carry one, together.
        retain: the share to keep, in (0, 1].

    Returns:
        ``retain``, ``by``, and of the point ``strength``, ``density`` where points carry one, ``kept`` and ``target``,
        which are None if none keeps enough; ``nothing`` where the base knows nothing of the source.
    """
    by, shares = kept(points)
    settings = ("strength", "density") if "density" in points[0] else ("strength",)
    enough = [
        point | {"kept": share}
        for point, share in zip(points, shares, strict=True)
        if point["strength"] > 0 and share >= retain
    ]
    best = max(enough, key=lambda point: (point["target"], *(-point[key] for key in settings)), default={})
    found = {"retain": retain, "by": by} | {key: best.get(key) for key in (*settings, "kept", "target")}
    return found | ({"nothing": True} if all(map(math.isnan, shares)) else {})


def closer(points: Sequence[dict[str, Any]], retain: float) -> float | None:
    """The strength to measure next, for more of the target within the budget.

    It is the middle between the strength that is chosen so far (0 where none keeps enough) and the next one, which does
    not keep enough. None where there is no such next one, or where it has learned hardly more.

    Args:
        points: of a curve, as :func:`kept` takes them.
        retain: the share to keep, in (0, 1].
    """
    chosen = within(points, retain)["strength"] or 0.0
    known = sorted(zip(points, kept(points)[1], strict=True), key=lambda pair: pair[0]["strength"])
    best = next(point for point, _ in known if point["strength"] == chosen)
    beyond, share = next(((point, share) for point, share in known if point["strength"] > chosen), (best, math.nan))
    if share < retain and beyond["target"] - best["target"] > WORTH:
        return (chosen + beyond["strength"]) / 2
    return None


def flattered(budget: dict[str, Any]) -> str:
    """That a setting was chosen on what it is told of, in a sentence; nothing where it was not, or none was chosen."""
    if budget["strength"] is None or {"on", "fixed"} & budget.keys():
        return ""
    return (
        "It was chosen on the questions it is scored on, which flatters the score; name evaluate.validation to choose "
        "on others."
    )


def in_words(budget: dict[str, Any]) -> str:
    """What ``within`` found, in a sentence.

    With ``on``, the setting whose questions it was chosen on, it names that too; with ``fixed`` it says why the adapter
    has no strength but 1.
    """
    on = f" on evaluate.{budget['on']}" if "on" in budget else ""
    only = f" It has no other strength than 1: {budget['fixed']}." if "fixed" in budget else ""
    what = "the source" if budget["by"] == "source" else "the base's probability of its own texts"
    if budget.get("nothing"):
        return f"The base answers no question of the source right{on}, so that nothing can be kept: ask what it knows."
    if budget["strength"] is None:
        return f"No strength of this adapter keeps {100 * budget['retain']:g} % of {what}{on}.{only}"
    pruned = f" at density {budget['density']:g}" if budget.get("density", 1) != 1 else ""
    return (
        f"Strength {budget['strength']:g}{pruned} learns the most (target {100 * budget['target']:.1f} %{on}) of those "
        f"that keep at least {100 * budget['retain']:g} % of {what}: it keeps {100 * budget['kept']:.1f} %.{only}"
    )
