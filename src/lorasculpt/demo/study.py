"""Studies on the demo's base: what it knows, and where a sparse adapter turns from too little to enough.

``lorasculpt demo study`` trains LoRASculpt with one setting changed at a time, and LoRA beside it, and measures on
validation sets: ``results/study.json``. It goes on where it was stopped.
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
from ..files import write_json, write_text
from ..measure import RESULTS_FILE, measure, measured
from ..models.load import autocast_dtype, load
from ..models.tower import remembering
from ..provenance import versions
from ..run.folder import check_output
from ..train import train
from . import base, build
from .run import settings, write_data

# One change each to what the demo runs; the demo's own settings are the first row.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "as in the demo": ("lorasculpt", {}),
    "density 0.2": ("lorasculpt", {"method": {"density": 0.2}}),
    "density 0.5": ("lorasculpt", {"method": {"density": 0.5}}),
    "pruned at 2 %": ("lorasculpt", {"method": {"prune_step": 0.02}}),
    "pruned at 30 %": ("lorasculpt", {"method": {"prune_step": 0.3}}),
    "rescaled after pruning": ("lorasculpt", {"method": {"rescale": True}}),
    "twice the steps": ("lorasculpt", {"steps": 320}),
    "LoRA, rate 2e-4, twice the steps": ("lora", {"lr": 2e-4, "steps": 320}),
    "half the steps": ("lorasculpt", {"steps": 80}),
    "LoRA, rate 2e-4, half the steps": ("lora", {"lr": 2e-4, "steps": 80}),
    "LoRA, rate 2e-4": ("lora", {"lr": 2e-4}),
    "alpha 128": ("lorasculpt", {"method": {"lora_alpha": 128}}),
}


def knows(work: Path, path: Path) -> Path:
    """What the base answers to the source questions, with their pictures and with each other's; writes ``path``.

    ``exact`` compares its greedy answer, ``choice`` takes the likeliest of the answers that the question offers.
    ``definition_nll`` is what held-out definitions cost it given their words, in nats a token, and what they cost the
    language model that it was made of: asked for in the alignment's own form, and ``plain``.
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
                measured = evaluate(model, processor, wanted, [], progress=f"{pictures}, {metric}", **options)
                for name, entry in measured["source"].items():
                    numbers = {key: entry[key] for key in ("value", "low", "high", "n")}
                    found["tasks"].setdefault(name, {})[f"{metric}, {pictures}"] = numbers
    bf16 = autocast_dtype(torch.device("cpu")) is not None
    in_form, plain = (
        {
            name: build.definition_nll(each.eval(), processor.tokenizer, "test", bf16, plain=form)
            for name, each in (("base", model), ("untouched", base.unaligned()[0]))
        }
        for form in (False, True)
    )
    found["definition_nll"] = {**in_form, "plain": plain, "n": build.DEFINITIONS}
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
    write_text(path, yaml.safe_dump(made, sort_keys=False))
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
