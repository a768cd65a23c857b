"""What is said on a terminal: tables of 80 columns, and a sentence once."""

from __future__ import annotations

from functools import cache

from rich import box
from rich.table import Table


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
