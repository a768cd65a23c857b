"""What an adapter does whose method changes the forward pass: which expert serves what, and where its energy lies.

Such an adapter is nothing without its model, so the model is built. Loads are measured: records run through the model
as in training, answers and all, and every adapted linear tells how much weight each of its experts got. The load of an
expert is its share of that weight times the number of experts, so that 1 is a fair share. The energy ||ΔW||_F² is known
where the update is a matrix, one for all inputs or one for each task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import files
from ..adapters.load import load as load_adapter
from ..adapters.method import read_record
from ..adapters.update import Update, UpdateConfig, context_of, updates
from ..console import numbers
from ..data.batches import Collator, placed, rows
from ..data.records import Record, read
from ..errors import UserError
from ..evaluation.prompts import batches, chat, evaluating
from ..models.load import computing, load, see_as
from .places import in_order, order, place

BATCH = 4
"""Records in one forward pass."""
ALL = "all"
"""The name under which energies stand where one matrix serves all tasks."""
COLUMNS = 5
"""Tasks that the table has a column for each of; of more it shows how far they are apart."""


@dataclass(frozen=True)
class Linear:
    """One adapted linear. Loads are empty without data, energies where the update is no matrix."""

    name: str  # of the module in the model
    part: str  # "language_model", "vision_tower", ...; "model" where there is one part only
    kind: str  # "q_proj"; "language_model.q_proj" where the adapter is in several parts
    block: int | None  # which decoder or encoder layer; None outside of them
    load: tuple[float, ...]  # of each expert, over all records
    tasks: dict[str, tuple[float, ...]]  # the same, over the records of each task
    energy: dict[str, float]  # ||ΔW||_F², by task or under ALL
    relative: dict[str, float]  # ||ΔW||_F / ||W0||_F

    @property
    def entropy(self) -> float:
        """Of the loads, over the largest there can be: 1 is all experts alike, 0 a single one."""
        share = np.array(self.load) / len(self.load)
        return float(-(share * np.log(share.clip(1e-12))).sum() / math.log(len(share))) if len(share) > 1 else 1.0

    @property
    def apart(self) -> float:
        """The largest difference between two tasks, in total variation: 0 is alike, 1 no expert in common."""
        shares = [np.array(load) / len(load) for load in self.tasks.values()]
        return max((float(np.abs(a - b).sum() / 2) for a, b in combinations(shares, 2)), default=0.0)


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    folder: str
    base: str
    method: str
    records: dict[str, int]  # how many of each task; empty without data
    linears: tuple[Linear, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        found = asdict(self)
        for linear, content in zip(self.linears, found["linears"], strict=True):
            if linear.load:
                content |= {"entropy": linear.entropy, "apart": linear.apart}
        return {"schema": 1, **found}


def config_of(adapter_folder: str | Path) -> type[UpdateConfig] | None:
    """The config class of an adapter whose method changes the forward pass; None for every other folder."""
    record = read_record(Path(adapter_folder))
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(record["method"].upper()) if record else None
    return config if config is not None and issubclass(config, UpdateConfig) else None


def inspect(
    adapter_folder: str | Path,
    base: str | Path | None,
    data: str | Path | None = None,
    limit: int = 64,
    *,
    trust_remote_code: bool = False,
) -> Inspection:
    """Measure the loads of the experts on ``data``, and the energies.

    Args:
        adapter_folder: an adapter for which :func:`config_of` has a config.
        base: the model it belongs to, a folder or a name on the Hub.
        data: a file of records.
        limit: how many records at most, as many of each task as there are.
        trust_remote_code: run the code that comes with the base.

    Raises:
        UserError: the adapter is of another kind, there is no base, nothing to measure without data, no routing to
            measure with them, or a task that the adapter does not know and would have to.
    """
    kind = config_of(adapter_folder)
    if kind is None:
        raise UserError(
            f"{adapter_folder} holds no adapter whose method changes the forward pass; lorasculpt.inspect.lora.inspect "
            "shows a plain LoRA."
        )
    named = f"the adapter in {adapter_folder} ({kind.method})"
    if data is None and kind.merges == "never":
        raise UserError(
            f"{named} is no matrix to be shown: {kind.why_not}. Give data (--data) to see which expert serves what."
        )
    if base is None:
        raise UserError(f"{named} is nothing without its model: give base (--base).")
    groups = _by_task(read(data, check_images=False), limit) if data is not None else {}
    known = kind.from_pretrained(str(adapter_folder)).tasks
    unknown = next((task for task in groups if task not in known), None)
    if kind.multitask and unknown is not None:
        where = groups[unknown][0].where
        raise UserError(f"{where}: there is no task {unknown!r}; the adapter knows {', '.join(known)}.")
    model, processor = load(base, dtype="auto", device=computing(), trust_remote_code=trust_remote_code)
    see_as(processor, Path(adapter_folder))
    model = load_adapter(model, adapter_folder)
    loads = _loads(model, processor, groups)
    if groups and not loads:
        raise UserError(f"{named} routes nothing, so there are no loads to show: leave data (--data) out.")
    places = {name: place(name) for name in updates(model)}
    several = len({part for part, _, _ in places.values()}) > 1
    linears = []
    for name, update in updates(model).items():
        part, word, block = places[name]
        tasks = loads.get(name, {})
        linears.append(
            Linear(
                name=name,
                part=part,
                kind=f"{part}.{word}" if several else word,
                block=block,
                load=_normal(sum(tasks.values())) if tasks else (),
                tasks={task: _normal(load) for task, load in tasks.items()},
                **_size(update),
            )
        )
    counts = {task: len(records) for task, records in groups.items()}
    return Inspection(str(adapter_folder), str(base), kind.method, counts, tuple(linears))


def _by_task(records: Sequence[Record], limit: int) -> dict[str, list[Record]]:
    """At most ``limit`` of the records, as many of each task as there are, by task."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.task, []).append(record)
    turns = (record for turn in zip_longest(*groups.values()) for record in turn if record is not None)
    chosen: dict[str, list[Record]] = {}
    for record in islice(turns, limit):
        chosen.setdefault(record.task, []).append(record)
    return chosen


def _loads(model: PeftModel, processor: Any, groups: dict[str, list[Record]]) -> dict[str, dict[str, Tensor]]:
    """By linear and task the weight that each expert got, (experts,), summed over tokens (or rows)."""
    context, known = context_of(model), model.active_peft_config.tasks
    assert context is not None, "no adapter in this model changes the forward pass"
    found: dict[str, dict[str, Tensor]] = {}
    collate = Collator(processor)
    # the context reads from the labels where a prompt ends; after that nobody needs the logits of every token
    spare = model.get_base_model().register_forward_pre_hook(_one_logit, with_kwargs=True)
    try:
        for task, records in groups.items():
            # one task at a time: in a vision tower a row need not be a sample

            def note(name: str, weight: Tensor, _: Tensor | None, task: str = task) -> None:
                tasks = found.setdefault(name, {})
                tasks[task] = tasks.get(task, 0) + weight.cpu().double().sum(0)

            context.recorder = note
            table = rows(records)
            with evaluating(model, None):
                for part in batches(processor, records, [chat(processor, record) for record in records], BATCH):
                    batch = placed(collate([table[i] for i in part]), model)
                    model(**batch, use_cache=False, **({"task": task} if task in known else {}))
    finally:
        context.recorder = None
        spare.remove()
    return found


def _one_logit(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    kwargs.pop("labels", None)
    return args, kwargs | {"logits_to_keep": 1}


def _normal(weight: Tensor) -> tuple[float, ...]:
    return tuple((weight / weight.sum().clamp_min(1e-12) * len(weight)).tolist())


@torch.no_grad()
def _size(update: Update) -> dict[str, dict[str, float]]:
    """Energy and relative size of the update, if it is a matrix."""
    config = update.config
    if config.merges == "never":
        return {"energy": {}, "relative": {}}
    tasks = {name: i for i, name in enumerate(config.tasks)} if config.merges == "task" else {ALL: None}
    energy = {name: float(update.weight(task).cpu().double().square().sum()) for name, task in tasks.items()}
    base = max(float(torch.linalg.vector_norm(update.base_weight().cpu(), dtype=torch.float64)), 1e-30)
    return {"energy": energy, "relative": {name: math.sqrt(value) / base for name, value in energy.items()}}


# --- showing --------------------------------------------------------------------------------------------------------


def write_json(inspection: Inspection, path: str | Path) -> None:
    """Everything that was measured, as JSON."""
    files.write_json(path, inspection.to_dict(), nan=False)


def show(inspection: Inspection, *, layers: bool = False, console: Console | None = None) -> None:
    """Print the loads by layer and the energies by kind of module, or both of every linear with ``layers``."""
    console = console or Console()
    if inspection.records:
        _show_loads(inspection, layers, console)
    if inspection.linears[0].energy:
        _show_energies(inspection, layers, console)
    if not inspection.records:
        console.print("If the method routes, --data FILE shows which expert serves what.", style="dim")


def _show_loads(inspection: Inspection, layers: bool, console: Console) -> None:
    routed = [linear for linear in inspection.linears if linear.load]
    several = len(inspection.records) > 1
    tasks = list(inspection.records) if several and len(inspection.records) <= COLUMNS else []
    few, many = min(len(linear.load) for linear in routed), max(len(linear.load) for linear in routed)
    experts = str(few) if few == many else f"{few} to {many}"
    table = Table(
        title=f"{inspection.folder} ({inspection.method}, {len(routed)} linears of {experts} experts)",
        title_justify="left",
    )
    table.add_column("linear" if layers else "layer", no_wrap=True)
    for head in ["entropy", "load", *(["apart"] if several else []), *tasks]:
        table.add_column(head, justify="right", overflow="fold")

    def add(name: str, group: list[Linear], style: str | None = None) -> None:
        cells = [f"{fmean(x.entropy for x in group):.2f}", _range(linear.load for linear in group)]
        cells += [f"{fmean(x.apart for x in group):.2f}"] if several else []
        cells += [_range(linear.tasks[task] for linear in group if task in linear.tasks) for task in tasks]
        table.add_row(name, *cells, style=style)

    if layers:
        for linear in routed:
            add(_name(linear), [linear])
    else:
        for block in in_order(linear.block for linear in routed):
            add("none" if block is None else str(block), [linear for linear in routed if linear.block == block])
    table.add_section()
    add("all", routed, "bold")
    console.print(table)
    counts = ", ".join(f"{count} {task}" for task, count in inspection.records.items())
    words = (
        f"Records: {counts}. load: the smallest and the largest share of the routing weight that an expert of these "
        "linears has, times the number of experts (1 is a fair share); entropy of the loads: 1 all alike, 0 one expert."
    )
    if several:
        words += " apart: the largest difference between two tasks, 0 alike, 1 no expert in common."
        words += "" if tasks else " Each task's loads are in --json and --plot."
    console.print(words, style="dim")


def _show_energies(inspection: Inspection, layers: bool, console: Console) -> None:
    title = f"{inspection.folder} ({inspection.method}, {len(inspection.linears)} linears)"
    tasks = list(inspection.linears[0].energy)
    heads = [head for task in tasks for head in ("energy" if task == ALL else f"{task}: energy", "relative")]
    table = numbers("module", *heads, title=title)
    groups: dict[str, list[Linear]] = {}
    for linear in sorted(inspection.linears, key=lambda x: order(x.part, x.kind)) if not layers else inspection.linears:
        groups.setdefault(_name(linear) if layers else linear.kind, []).append(linear)
    for name, group in [*groups.items(), ("all", list(inspection.linears))]:
        if name == "all":
            table.add_section()
        cells = []
        for task in tasks:
            total = math.fsum(linear.energy[task] for linear in inspection.linears)
            share = math.fsum(linear.energy[task] for linear in group) / total if total else 0.0
            cells += [f"{share:.1%}", f"{fmean(linear.relative[task] for linear in group):.2%}"]
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    console.print(table)
    console.print("energy: share of ||ΔW||²; relative: mean of ||ΔW|| / ||W0||.", style="dim")


def _name(linear: Linear) -> str:
    return linear.kind if linear.block is None else f"{linear.block} {linear.kind}"


def _range(loads: Iterable[Sequence[float]]) -> str:
    every = [value for load in loads for value in load]
    return f"{min(every):.2f}–{max(every):.2f}" if every else "-"
