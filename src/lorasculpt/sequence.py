"""Tasks learned one after the other: a run whose data are a ``sequence``, and what each task does to the others.

```yaml
base: HuggingFaceTB/SmolVLM-256M-Instruct
output: runs/office
method: {name: am_lora, r: 8}
data:
  sequence:
    - {name: charts, train: charts/train.jsonl, test: charts/test.jsonl}
    - {name: receipts, train: receipts/train.jsonl, test: receipts/test.jsonl}
training: {epochs: 2}
evaluate: {source: general/test.jsonl}
```

Every task is a run of its own in ``output/<number>-<name>``, with the same settings, that goes on from the adapter of
the task before. A method that learns sequences gets a new task each time (`lorasculpt.add_task`); of any other one
adapter goes on from task to task, with what it has pruned or summed up, which is what such a method has to be better
than. O-LoRA has a LoRA for each task, and ``adapter`` is the sum of those so far, a plain LoRA.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .adapters.beside import put_beside
from .adapters.load import load as load_adapter
from .adapters.load import load_projector
from .adapters.method import MethodConfig
from .asked import ask_base
from .config import Data, RunConfig, Stage
from .data.records import read
from .errors import Diverged, UserError
from .evaluation import Task, evaluate
from .evaluation.summary import task_average
from .files import read_json, write_json
from .measure import answered_alike, manner
from .provenance import versions
from .run.folder import ADAPTER, came_to_nothing, check_output, clear, diverged, leave_diverged, write_record
from .run.model import asking, attach, kind_of, loaded, several_processes, thaw_projector
from .run.records import held_out, questions
from .switch import add_task
from .train import train

MATRIX_FILE = "matrix.json"


def learn(config: RunConfig, *, progress: bool = True) -> tuple[Path, Path]:
    """Learn the tasks of ``config.data.sequence`` in turn, measuring all of them after each.

    Goes on by itself where it was interrupted: with the task that it was at, from its last checkpoint.

    ``matrix.json`` holds the accuracy on every task before training (``after: null``) and after each, the same for
    source, and ``switches``: what is left right after a new task was added, before it is trained; once all are learned
    also what :func:`transfer` makes of them.

    Args:
        config: the run.
        progress: whether to show progress bars.

    Returns:
        The folder of the last adapter, and ``matrix.json``.

    Raises:
        UserError: for anything in the config, the data or the folders that the user can mend, and under a launcher of
            several processes.
    """
    grows = grown(config)
    if several_processes():
        raise config.error("data.sequence", "is learned by one process; start lorasculpt train without a launcher.")
    check_output(config.output, config)
    measured = _Matrix(config, progress)
    config.output.mkdir(parents=True, exist_ok=True)
    write_record(config)
    stages = stages_of(config)
    names = [stage.name for stage in config.data.sequence]
    try:
        for number, stage in enumerate(stages):
            earlier = stages[number - 1].output / ADAPTER if number else None
            start = None
            if earlier and _apart(config) is not None:
                start = placed_beside(earlier, number)
            elif earlier:
                start = continued(earlier, names[number] if grows else None)
            adapter = train(stage, progress=progress, start=start)
            measured.before()  # the base, once; only now, so that a mistake in the file is told first
            following = names[number + 1] if grows and stage is not stages[-1] else None
            measured.after(names[number], adapter, following)
    except Diverged:
        found, nothing = {**(diverged(stage.output) or {}), "task": names[number]}, came_to_nothing(stage.output)
        if alone := not number and nothing:
            clear(stage.output)
        leave_diverged(config, found, alone=alone)
        raise
    except UserError:
        if not any(stage.output.exists() for stage in stages):
            clear(config.output)  # nothing has run: leave the folder free for the mended file
        raise
    return adapter, measured.path


def grown(config: RunConfig) -> bool:
    """Whether the adapter of ``config.method`` gets a new task each time; otherwise one goes on from task to task.

    Raises:
        UserError: for a method that has to be told the task of every question, which a sequence does not, or a setting
            that a sequence does not leave open.
    """
    kind = kind_of(config)
    if getattr(kind, "multitask", False):
        name = config.method["name"]
        raise config.error("method.name", f"is {name}, which has to know all tasks at once: it learns no sequence.")
    grows = getattr(kind, "sequence", False)
    if grows and "tasks" in config.method:
        raise config.error("method.tasks", "is what data.sequence says; leave it out.")
    if (own := _apart(config)) is not None:
        for key in own:
            if key in config.method:
                raise config.error(f"method.{key}", "is what data.sequence says; leave it out.")
        if config.method.get("modules_to_save"):
            raise config.error("method.modules_to_save", "is of whole modules, of which no sum is kept; leave it out.")
    return grows


def _apart(config: RunConfig, earlier: Sequence[str] = ()) -> dict[str, Any] | None:
    """What `MethodConfig.apart` says: settings of a method with a LoRA for each task, None for any other."""
    kind = kind_of(config)
    return kind.apart(config.method, earlier) if issubclass(kind, MethodConfig) else None


def stages_of(config: RunConfig) -> list[RunConfig]:
    """The runs of the tasks, one after the other."""
    grows = grown(config)
    stages: list[RunConfig] = []
    for number in range(len(config.data.sequence)):
        earlier = [str(stage.output / ADAPTER) for stage in stages[-1:]]
        stages.append(_stage(config, number, grows, earlier))
    return stages


def transfer(accuracy: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """What a sequence of T tasks says, from the accuracy on each before it and after each task, (1 + T) x T.

    With R[0] that of the base and R[k] that after k tasks, ``last`` is the mean of R[T]; ``average`` the mean over k of
    the mean of R[k] over the k tasks learned by then; ``backward`` the mean of R[T, i] - R[i, i] over all tasks i but
    the last, what later tasks did to one that was learned; ``forward`` the mean of R[i - 1, i] - R[0, i] over all but
    the first, what earlier tasks did for one that was not yet learned. Both are None for a single task.

    Source: Lopez-Paz and Ranzato, *Gradient Episodic Memory for Continual Learning*, NeurIPS 2017 (arXiv 1706.08840),
    whose forward transfer is relative to an untrained network's guesses where this is to the base's; ``average`` is
    the average incremental accuracy of Rebuffi et al., *iCaRL*, CVPR 2017 (arXiv 1611.07725).
    """
    base, *after = accuracy
    tasks = range(len(base))
    backward = [after[-1][i] - after[i][i] for i in tasks[:-1]]
    forward = [after[i - 1][i] - base[i] for i in tasks[1:]]
    return {
        "last": mean(after[-1]),
        "average": mean(mean(row[: k + 1]) for k, row in enumerate(after)),
        "backward": mean(backward) if backward else None,
        "forward": mean(forward) if forward else None,
    }


def _stage(config: RunConfig, number: int, grows: bool, earlier: Sequence[str]) -> RunConfig:
    """The run of one task, ``earlier`` being the adapter of the one before, if there is one."""
    stage = config.data.sequence[number]
    names = [known.name for known in config.data.sequence[: number + 1]]
    folder = re.sub(r"[^\w-]+", "_", stage.name)
    own = {"tasks": names} if grows else _apart(config, earlier)
    target = config.evaluate.target or [stage.test]
    changes: dict[str, Any] = {
        "output": config.output / f"{number + 1}-{folder}",
        "evaluate": config.evaluate.model_copy(update={"target": target}),
        "data": Data(
            train=stage.train, images=config.data.images, limit=config.data.limit, general=config.data.general
        ),
        "method": config.method | (own or {}),
    }
    return config.model_copy(update=changes)


def continued(earlier: Path, task: str | None) -> Callable[[nn.Module, RunConfig], PeftModel]:
    """What gives a base the adapter of the task before, ready for a new ``task`` or, with None, to go on as it is."""

    def start(model: nn.Module, config: RunConfig) -> PeftModel:
        adapted = load_adapter(model, earlier, trainable=True, saves_projector=True)
        if task is not None:
            add_task(adapted, task)
        thaw_projector(adapted, config)
        return adapted

    return start


def placed_beside(earlier: Path, number: int) -> Callable[[nn.Module, RunConfig], PeftModel]:
    """What gives a base a fresh adapter for the task ``number`` beside the sum of those before, which is frozen."""

    def start(model: nn.Module, config: RunConfig) -> PeftModel:
        load_projector(model, earlier)
        # a seed of its own: with that of the run every A would begin as the first one did
        torch.manual_seed(random.Random(f"{config.seed} {number}").getrandbits(32))
        adapted = attach(model, config)
        put_beside(adapted, earlier)
        return adapted

    return start


class _Matrix:
    """``matrix.json``: what was measured already is not measured again."""

    def __init__(self, config: RunConfig, progress: bool):
        self.config, self.progress = config, progress
        self.path = config.output / MATRIX_FILE
        self.source, self.tasks = asked(config)
        told = {"questions": questions([*self.source, *self.tasks]), "evaluate": manner(config)}
        self.record: dict[str, Any] = {
            "schema": 1,
            "versions": versions(),
            "method": config.method["name"],
            "seed": config.seed,
            "tasks": [task.name for task in self.tasks],
            **told,
            "rows": [],
            "switches": [],
        }
        if self.path.is_file():
            before = read_json(self.path)
            if before.get("questions") in (None, told["questions"]) and answered_alike(before.get("evaluate"), config):
                self.record = before  # else every row is measured again

    def before(self) -> None:
        """Measure the base."""
        if not self.record["rows"]:
            model, processor = loaded(self.config)
            self._add("rows", "after", None, model, processor)

    def after(self, task: str, adapter: Path, following: str | None) -> None:
        """Measure what was learned up to ``task``, and what is left of it when the task ``following`` is added."""
        done = [row["after"] for row in self.record["rows"]]
        switched = [row["to"] for row in self.record["switches"]]
        if task in done and following in (None, *switched):
            return
        model, processor = loaded(self.config)
        model = load_adapter(model, adapter)
        if task not in done:
            self._add("rows", "after", task, model, processor)
        if following is not None:
            add_task(model, following)
            self._add("switches", "to", following, model, processor)

    def _add(self, part: str, key: str, task: str | None, model: nn.Module, processor) -> None:
        options = asking(self.config) | {"progress": f"{key} {task or 'nothing'}" if self.progress else None}
        if task is None:
            found = ask_base(self.config, model, processor, self.source, self.tasks, **options)
        else:
            found = evaluate(model, processor, self.source, self.tasks, **options)
        scores = {name: entry["scores"] for name, entry in found["source"].items()}
        row = {key: task, "accuracy": [found["target"][name]["value"] for name in self.record["tasks"]]}
        self.record[part].append(row | {"source": task_average(scores) if scores else None})
        measured = [row["accuracy"] for row in self.record["rows"]]
        if len(measured) > len(self.tasks):
            self.record |= transfer(measured)
        write_json(self.path, self.record)


def asked(config: RunConfig) -> tuple[list[Task], list[Task]]:
    """What is asked after every task: the source tasks, and those of the sequence."""
    source, _ = held_out(config)
    return source, [_asked(config, stage) for stage in config.data.sequence]


def _asked(config: RunConfig, stage: Stage) -> Task:
    """The held-out questions of one task, whatever task their rows name."""
    records = read(stage.test, images=config.evaluate.images)[: config.evaluate.limit]
    return Task(stage.name, tuple(records), config.evaluate.metric.get(stage.name, "exact"))
