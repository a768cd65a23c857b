"""The tasks of samples on their way through a trainer: from a column of the data into the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ..errors import UserError
from .context import TASK_IDS

COLUMN = "task"


class TaskCollator:
    """A collator that takes the task of every sample along, from the column ``task`` of the data.

    It goes around the collator that a trainer has, whatever the trainer and its data::

        config = MTLLoRAConfig(tasks=["charts", "receipts"])
        arguments = SFTConfig("out", remove_unused_columns=False)
        trainer = SFTTrainer(model, arguments, train_dataset=data, peft_config=config)
        trainer.data_collator = TaskCollator(trainer.data_collator, config.tasks)

    Args:
        collator: what makes a batch of rows, such as ``trainer.data_collator``. It gets them without ``task``.
        tasks: the adapter's, in its order: ``config.tasks``.

    Raises:
        UserError: when a row has no task, or one that the adapter does not know.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], MutableMapping[str, Any]], tasks: Sequence[str]):
        self.collator = collator
        self.tasks = {name: number for number, name in enumerate(tasks)}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> MutableMapping[str, Any]:
        """The batch of ``rows``, with ``routing_task_ids`` (batch,)."""
        ids = torch.tensor([self._id(row) for row in rows], dtype=torch.long)
        batch = self.collator([{key: value for key, value in row.items() if key != COLUMN} for row in rows])
        batch[TASK_IDS] = ids
        return batch

    def _id(self, row: Mapping[str, Any]) -> int:
        if COLUMN not in row:
            raise UserError(
                f"a row has no column {COLUMN!r}, only {', '.join(row)}: add it to the data, and give the trainer "
                "remove_unused_columns=False and no packing, so that it stays."
            )
        if row[COLUMN] not in self.tasks:
            raise UserError(f"a row has the unknown task {row[COLUMN]!r}; the adapter knows {', '.join(self.tasks)}.")
        return self.tasks[row[COLUMN]]
