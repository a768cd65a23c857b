"""Several tasks on the demo's base: digits, flags and kinds of emoji taught at once, or one after the other.

Two comparisons (`lorasculpt.demo.results`): ``tasks`` of the methods that are made for several tasks, beside LoRA, and
``sequence`` of those that can go on from one task to the next. All have the same rate and steps; what is kept is
what none of the three tasks asks.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from . import world
from .run import METHODS, settings

TASKS = ("digits", "flags", "emoji_category")
KEPT = ("emoji_kind", "definition")
RATE = 1e-3
STEPS = 120  # of all tasks at once
STEPS_EACH = 60  # of one after the other
EACH = 480  # rows of a task to train on, which is all that there are of flags
HELD_OUT = 120  # rows of a task to be measured on
LORA = METHODS["lora"]["method"]
TOGETHER: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "mtl_lora": {},
    "mixlora": {},
    "mixlora-prompt": {"name": "mixlora", "pool": "prompt"},  # reads no answer where it chooses
    "smora": {},
    "loramoe": {"r": 8},
    "mosld": {},
    "malora": {},
}
IN_TURN: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "am_lora": {"r": 32, "lora_alpha": 64},
    "olora": {"name": "regularized", "penalty": "olora", "r": 32, "lora_alpha": 64},
    "lorasculpt": METHODS["lorasculpt"]["method"],
}


def together(work: Path) -> dict[str, Any]:
    """The YAML of the comparison on all tasks at once."""
    made = _both(work, TOGETHER, STEPS) | {"output": "tasks", "data": {"train": "data/three_tasks.jsonl"}}
    made["evaluate"] |= {"target": [f"data/{task}_held_out.jsonl" for task in TASKS], "drift": 64}
    made["evaluate"]["as_task"] = "emoji_category"  # a question of no task is answered as those about emoji are
    return made


def in_turn(work: Path) -> dict[str, Any]:
    """The YAML of the comparison on the tasks one after the other."""
    made = _both(work, IN_TURN, STEPS_EACH) | {"output": "sequence"}
    made["evaluate"]["target"] = []
    files = {"train": "few", "test": "held_out"}
    stages = [{"name": task} | {key: f"data/{task}_{file}.jsonl" for key, file in files.items()} for task in TASKS]
    return made | {"data": {"sequence": stages}}


def _both(work: Path, methods: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    _write(work / "data")
    made = settings("lora", steps=steps, lr=RATE, limit=HELD_OUT)
    made["evaluate"] |= {"source": ["data/kept.jsonl"], "strengths": []}
    return made | {"method": {"name": "lora"}, "methods": methods}  # whose sizes are their own


def _write(folder: Path) -> None:
    if not (folder / "three_tasks.jsonl").is_file():
        for name, found in items().items():
            world.write(folder, found, f"{name}.jsonl")


def items() -> dict[str, list[world.Item]]:
    """What each data file holds, by its name."""
    found = {"kept": [item for item in world.source_items("test") if item.task in KEPT]}
    for task in TASKS:
        for file, split, most in (("few", "train", EACH), ("held_out", "test", HELD_OUT)):
            asked = world.TARGETS[task](split) if task in world.TARGETS else world.source_items(split)
            found[f"{task}_{file}"] = [item for item in asked if item.task == task][:most]
    rows = [item for task in TASKS for item in found[f"{task}_few"]]
    random.Random("three tasks").shuffle(rows)
    return found | {"three_tasks": rows}
