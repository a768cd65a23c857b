"""Tables for a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.table import Table


def numbers(name: str, *heads: str, title: str | None = None) -> Table:
    """A table of numbers with a name before each row. Where it is too narrow names and heads fold; no number is cut."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(name, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", min_width=max(5, *map(len, head.split())))
    return table
