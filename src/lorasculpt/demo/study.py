"""Studies on the demo's base: what it knows, where a sparse adapter turns from too little to enough, several tasks.

``lorasculpt demo study`` trains LoRASculpt with one setting changed at a time, and LoRA beside it, and measures on
validation sets: ``results/study.json``. ``lorasculpt demo tasks`` teaches digits, flags and kinds of emoji together
with every method that is made for several tasks, and one after the other with AM-LoRA: ``results/tasks.json``. Both go
on where they were stopped.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import RunConfig
from ..data.records import read
from ..evaluation import evaluate
from ..evaluation import tasks as grouped
from ..files import write_json
from ..measure import RESULTS_FILE, measure, measured
from ..models.load import autocast_dtype, load
from ..models.tower import remembering
from ..provenance import versions
from ..run.folder import check_output
from ..sequence import learn
from ..train import train
from . import base, build, world
from .run import METHODS, STEPS, settings, write_data

# One change each to what the demo runs; the demo's own settings are the first row.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "as in the demo": ("lorasculpt", {}),
    "density 0.2": ("lorasculpt", {"method": {"density": 0.2}}),
    "density 0.5": ("lorasculpt", {"method": {"density": 0.5}}),
    "pruned at 2 %": ("lorasculpt", {"method": {"prune_step": 0.02}}),
    "pruned at 30 %": ("lorasculpt", {"method": {"prune_step": 0.3}}),
    "rescaled after pruning": ("lorasculpt", {"method": {"rescale": True}}),
    "twice the steps": ("lorasculpt", {"steps": 2 * STEPS}),
    "LoRA, rate 2e-4, twice the steps": ("lora", {"lr": 2e-4, "steps": 2 * STEPS}),
    "half the steps": ("lorasculpt", {"steps": STEPS // 2}),
    "LoRA, rate 2e-4, half the steps": ("lora", {"lr": 2e-4, "steps": STEPS // 2}),
    "LoRA, rate 2e-4": ("lora", {"lr": 2e-4}),
    "alpha 128": ("lorasculpt", {"method": {"lora_alpha": 128}}),
}
TOGETHER: dict[str, dict[str, Any]] = {
    "mtl_lora": {"name": "mtl_lora"},
    "smora": {"name": "smora"},
    "loramoe": {"name": "loramoe", "r": 8},
    "mosld": {"name": "mosld"},
    "malora": {"name": "malora"},
    "mixlora": {"name": "mixlora"},
    "mixlora-prompt": {"name": "mixlora", "pool": "prompt"},  # reads no answer where it chooses
    "lora": {"name": "lora", "r": 32, "lora_alpha": 64},
}
TASKS = ("digits", "flags", "emoji_category")
KEPT = ("emoji_kind", "definition")
TASK_STEPS = 300
EACH = 1000  # rows of a task to train on
HELD_OUT = 500  # rows of a task to be measured on; there are 400 at least


def knows(work: Path, path: Path) -> Path:
    """What the base answers to the source questions, with their pictures and with each other's; writes ``path``.

    ``exact`` compares its greedy answer, ``choice`` takes the likeliest of the answers that the question offers.
    ``definition_nll`` is what held-out definitions cost it given their words, in nats a token, and what they cost the
    language model that it was made of.
    """
    write_data(work / "data")
    model, processor = load(str(base.folder()))
    records = read(work / "data" / "source_test.jsonl")
    seen = [record.images for record in records if record.images]
    others = iter(random.Random(0).sample(seen, len(seen)))
    shuffled = [dataclasses.replace(r, images=next(others)) if r.images else r for r in records]
    found: dict[str, Any] = {"schema": 1, "versions": versions(), "tasks": {}}
    with remembering():
        for pictures, asked in (("right pictures", records), ("shuffled pictures", shuffled)):
            for metric in ("exact", "choice"):
                wanted = [dataclasses.replace(task, metric=metric) for task in grouped(asked)]
                options: dict[str, Any] = {"batch": 64, "precision": autocast_dtype(torch.device("cpu"))}
                measured = evaluate(model, processor, wanted, [], progress=f"{pictures}, {metric}:", **options)
                for name, entry in measured["source"].items():
                    numbers = {key: entry[key] for key in ("value", "low", "high", "n")}
                    found["tasks"].setdefault(name, {})[f"{metric}, {pictures}"] = numbers
    bf16 = autocast_dtype(torch.device("cpu")) is not None
    found["definition_nll"] = {
        name: build.definition_nll(each.eval(), processor.tokenizer, "test", bf16)
        for name, each in (("base", model), ("untouched", base.unaligned()[0]))
    } | {"n": build.DEFINITIONS}
    return write_json(path, found | {"complete": True})


def study(work: Path, path: Path) -> Path:
    """Do what is still missing in ``work`` and write ``path``."""
    write_data(work / "data")
    found: dict[str, Any] = {"schema": 1, "complete": False, "versions": versions(), "runs": []}
    with remembering():
        for number, (label, (name, changes)) in enumerate(CHANGES.items()):
            output = f"study-{number}"
            made = settings(name, split="validation", output=output, **dict(changes))
            entry = _measured(work / f"{output}.yaml", made)
            # a single source task has too few validation items for a number of its own
            items = {side: sum(task["n"] for task in entry[side].values()) for side in ("source", "target")}
            del entry["source"]
            found["runs"].append(entry | {"label": label, "items": items})
            write_json(path, found)
    found["complete"] = True
    return write_json(path, found)


def _measured(path: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The run of the YAML ``made``, trained and measured unless it already is.

    It has the ``versions`` that it was made with, which may not be those of today.

    Raises:
        UserError: its folder holds another run.
    """
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    config = RunConfig.load(path)
    check_output(config.output, config)
    if measured(config) is None:
        print(f"\n{path.stem}")
        train(config)
        measure(config, strengths=())
    content = json.loads((config.output / RESULTS_FILE).read_text())
    run = content["runs"][0]
    kept = (
        "method",
        "seed",
        "steps",
        "precision",
        "settings",
        "source",
        "target",
        "summary",
        "seconds",
        "adapter_bytes",
        "trainable",
    )
    return {key: run[key] for key in kept} | {"versions": content["versions"]}


def tasks(work: Path, path: Path) -> Path:
    """Teach three tasks at once with every method of ``TOGETHER``, in turn with AM-LoRA and LoRA; write ``path``."""
    _write_tasks(work / "data")
    found: dict[str, Any] = {"schema": 1, "complete": False, "versions": versions(), "runs": [], "sequences": []}
    with remembering():
        for name, method in TOGETHER.items():
            made = _several(name, method)
            entry = _measured(work / f"together-{name}.yaml", made)
            found["runs"].append(entry | {"label": name})
            write_json(path, found)
        in_turn: dict[str, dict[str, Any]] = {
            "am_lora": {"name": "am_lora", "r": 32, "lora_alpha": 64},
            "lora": METHODS["lora"]["method"],
        }
        for name, method in in_turn.items():
            output = f"sequence-{name}"
            made = _several(name, method) | {"output": output}
            stages = [{"name": t, "train": f"data/{t}_few.jsonl", "test": f"data/{t}_held_out.jsonl"} for t in TASKS]
            made["data"], made["evaluate"]["target"] = {"sequence": stages}, []
            made["training"]["steps"] = TASK_STEPS // len(TASKS)  # for each task
            config_path = work / f"{output}.yaml"
            config_path.write_text(yaml.safe_dump(made, sort_keys=False))
            _, matrix = learn(RunConfig.load(config_path))
            found["sequences"].append(
                {"method": name, "steps": TASK_STEPS // len(TASKS)} | json.loads(matrix.read_text())
            )
            write_json(path, found)
    found["complete"] = True
    return write_json(path, found)


def _write_tasks(folder: Path) -> None:
    if (folder / "three_tasks.jsonl").is_file():
        return
    rows: list[world.Item] = []
    for task in TASKS:
        parts = {"few": "train", "held_out": "test"}
        for file, split in parts.items():
            found = world.TARGETS[task](split) if task in world.TARGETS else world.source_items(split)
            found = [item for item in found if item.task == task][: EACH if file == "few" else HELD_OUT]
            world.write(folder, found, f"{task}_{file}.jsonl")
            rows += found if file == "few" else []
    random.Random("three tasks").shuffle(rows)
    kept = [item for item in world.source_items("test") if item.task in KEPT]
    world.write(folder, kept, "kept.jsonl")
    world.write(folder, rows, "three_tasks.jsonl")


def _several(name: str, method: dict[str, Any]) -> dict[str, Any]:
    """The YAML of a run on all three tasks. A task that is kept, not taught, is answered as the emoji are."""
    made = settings("lora", output=f"together-{name}", lr=5e-4, steps=TASK_STEPS)
    made["method"], made["data"] = dict(method), {"train": "data/three_tasks.jsonl"}
    made["evaluate"] |= {
        "source": ["data/kept.jsonl"],
        "target": [f"data/{task}_held_out.jsonl" for task in TASKS],
        "limit": HELD_OUT,
    }
    if name == "mtl_lora":
        made["evaluate"]["as_task"] = "emoji_category"
    return made
