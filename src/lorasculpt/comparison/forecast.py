"""What the runs of a comparison that are still to be made will take, by what others took.

A cost is the kind of a run (`lorasculpt.comparison.runs.Run.kind`) and its seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from ..console import duration


def expected(costs: Sequence[tuple[tuple[str, str], float]], left: Sequence[tuple[str, str]]) -> float:
    """The seconds that runs of the kinds ``left`` will take, by what others did, of which there is one at least.

    One takes as long as those of its kind and label did on average; where there are none yet, as those of its label,
    or else of its kind, or else all.
    """

    def one(kind: tuple[str, str]) -> float:
        own = [seconds for known, seconds in costs if known == kind]
        label = [seconds for known, seconds in costs if known[1] == kind[1]]
        same = [seconds for known, seconds in costs if known[0] == kind[0]]
        return mean(own or label or same or [seconds for _, seconds in costs])

    return sum(map(one, left))


def ahead(costs: Sequence[tuple[tuple[str, str], float]], left: Sequence[tuple[str, str]]) -> str:
    """How many runs are ``left``, and how long they will train, one after the other, by the ``costs`` of others."""
    number = "1 run is" if len(left) == 1 else f"{len(left)} runs are"
    if not costs:
        told = "what it takes is told when it is done" if len(left) == 1 else "what they take is told after the first"
        return f"{number} to be made; {told}."
    seconds = expected(costs, [kind for kind in left if kind[0] != "edit"])
    return f"{number} to be made: about {duration(seconds)} of training, by those that are there."


def cost(
    name: str, seconds: float, costs: Sequence[tuple[tuple[str, str], float]], left: Sequence[tuple[str, str]]
) -> str:
    """What the run ``name`` took, and what those that are ``left`` will by the ``costs``."""
    words = f"{name} took {duration(seconds)}"
    if not left:
        return f"{words}; it was the last."
    number = "the one run that is missing takes" if len(left) == 1 else f"the {len(left)} runs missing take"
    return f"{words}; {number} about {duration(expected(costs, left))}."
