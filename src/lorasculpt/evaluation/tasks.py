"""A task: its name, its questions, and how an answer to them is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..data.records import Record
from ..errors import UserError
from .score import METRICS


@dataclass(frozen=True)
class Task:
    """Questions that are scored together. ``metric``: one of ``exact``, ``contains``, ``vqa``, ``choice``.

    Raises:
        UserError: no records, an unknown metric, or ``choice`` for a record without choices.
    """

    name: str
    records: tuple[Record, ...]
    metric: str = "exact"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"task {self.name!r}: metric {self.metric!r} is not one of {', '.join(METRICS)}.")
        if not self.records:
            raise UserError(f"task {self.name!r} has no questions: add some or leave the task out.")
        for record in self.records:
            if self.metric == "choice" and not record.choices:
                raise UserError(
                    f"{record.where}: the metric 'choice' of task {self.name!r} needs 'choices' in the row."
                )

    @property
    def groups(self) -> list[int]:
        """For each question the number of the first that it stands or falls with: of its group, or its pictures."""
        first: dict[object, int] = {}
        keys = (record.group or record.images or number for number, record in enumerate(self.records))
        return [first.setdefault(key, number) for number, key in enumerate(keys)]


def tasks(
    records: Sequence[Record], metric: str | Mapping[str, str] = "exact", names: Sequence[str] | None = None
) -> list[Task]:
    """``records`` grouped by their task, in the order of first appearance.

    Args:
        records: questions, such as `lorasculpt.data.records.read` returns.
        metric: that of every task, or a mapping from task names to metrics (``exact`` for those it leaves out).
        names: the tasks of the records, where these are not their own.

    Raises:
        UserError: an unknown metric, or ``choice`` for a record without choices.
    """
    groups: dict[str, list[Record]] = {}
    for name, record in zip(names or [record.task for record in records], records, strict=True):
        groups.setdefault(name, []).append(record)
    chosen = dict.fromkeys(groups, metric) if isinstance(metric, str) else metric
    return [Task(name, tuple(group), chosen.get(name, "exact")) for name, group in groups.items()]


def asked_as(records: Iterable[Record], known: Sequence[str], as_task: str | None = None) -> list[str]:
    """The task under which each record is put to an adapter that knows the tasks ``known``: its own, or ``as_task``.

    Raises:
        UserError: for a task that the adapter does not know, if there is no ``as_task``. Nobody else can say which of
            its tasks a strange question is to be taken for, and without the adapter nothing would be measured.
    """
    named = []
    for record in records:
        task = record.task if record.task in known else as_task
        if task is None:
            raise UserError(
                f"{record.where or repr(record.question)}: the adapter does not know the task {record.task!r}; say "
                f"with evaluate.as_task as which of its own such questions are to be answered ({', '.join(known)})."
            )
        named.append(task)
    return named
