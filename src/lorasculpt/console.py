"""What is said on a terminal: tables of 80 columns, a sentence once, and how long and how large in words."""

from __future__ import annotations

from functools import cache

from rich import box
from rich.table import Table

NONE = "–"


@cache
def say_once(text: str) -> None:
    """Print ``text``, if this process has not said it yet: the runs of a comparison have much to say in common."""
    print(text)


def numbers(name: str, *heads: str, title: str | None = None) -> Table:
    """A table of numbers with a name before each row. Where it is too narrow names and heads fold; no number is cut."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(name, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", min_width=max(5, *map(len, head.split())))
    return table


def duration(seconds: float | None) -> str:
    """75 -> '1 min 15 s'."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(count: float | None) -> str:
    """Bytes in the largest decimal unit that leaves at least 1: 1234567 -> '1.2 MB'."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
