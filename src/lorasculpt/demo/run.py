"""The demo: teach the small real model to read handwriting, once with LoRA and once with LoRASculpt, and look.

It uses nothing that a user's own run could not: a data folder, two YAML files, ``train``, ``measure`` and ``report``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import RunConfig
from ..files import write_text
from ..measure import measure
from ..models.load import autocast_dtype, computing, cpu_rate
from ..models.tower import remembering
from ..report.page import report
from ..train import train
from . import base, world

# What each method is given; everything else is the same for both. The rates are those that learned the target best on
# its validation set (``results``), and happen to be the same.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "r": 32, "lora_alpha": 64}, "lr": 1.5e-3},
    "lorasculpt": {
        "method": {"name": "lorasculpt", "r": 32, "lora_alpha": 64, "prune_step": 0.1, "cmr_memory": "cache"},
        "lr": 1.5e-3,
    },
}
STEPS = 160  # two minutes a run on two cores with fast bf16, eight on two threads of one core without
REMARKS = {
    "digits": (
        "Both ran at the learning rate that teaches digits best on a validation set. At a seventh of that rate LoRA "
        "learned and kept as much as LoRASculpt (results/demo.json)."
    ),
    "flags": f"One run each, at rates that were chosen for digits. {world.TOGETHER}",
}
QUICK = 60  # items behind each number of the quick demo
WORK = {False: 1.4e14, True: 6.2e14}  # operations in products of the quick and of the full demo
BESIDE = 1.1e-12  # seconds for each of them that everything else takes


def write_data(folder: Path, target: str = "digits") -> None:
    """The demo's data as JSON lines and PNG files, with the training set of ``target`` and all held-out sets."""
    for split in ("test", "validation", "train"):
        if not (folder / f"{target}_{split}.jsonl").is_file():
            world.write(folder, world.TARGETS[target](split), f"{target}_{split}.jsonl")
        if split != "train" and not (folder / f"source_{split}.jsonl").is_file():
            world.write(folder, world.source_items(split), f"source_{split}.jsonl")


def settings(name: str, *, target: str = "digits", seed: int = 0, split: str = "test", **changes) -> dict[str, Any]:
    """The YAML of one run as a dict; ``changes`` go to its sections (``steps=``, ``lr=``, ``limit=``, ``method=``)."""
    chosen = METHODS[name]
    method = chosen["method"] | changes.pop("method", {})
    limit = changes.pop("limit", None)
    return {
        "base": str(base.folder()),
        "output": changes.pop("output", name),
        "seed": seed,
        "method": method,
        "data": {"train": f"data/{target}_train.jsonl"},
        "training": {"steps": STEPS, "batch": 12, "lr": chosen["lr"], "log_every": 10, "report_to": []} | changes,
        "evaluate": {
            "source": [f"data/source_{split}.jsonl"],
            "target": [f"data/{target}_{split}.jsonl"],
            "limit": limit,
            "batch": 64,
            "max_new_tokens": 12,
        },
    }


def expected(full: bool) -> str:
    """How long the demo takes here, in words: by what this machine's processor does in a product, at its best."""
    if computing().type != "cpu":
        return "some minutes"
    dtype = autocast_dtype("cpu") or torch.float32
    rate = max(cpu_rate(dtype) for _ in range(20))
    return f"about {max(1, round(WORK[full] * (1 / rate + BESIDE) / 60))} minutes on this machine"


def demo(out: Path, *, target: str = "digits", full: bool = False) -> list[Path]:
    """Run the demo in ``out`` and return the two result files; ``full`` measures every held-out item.

    ``target`` is what is learned: "digits", or "flags", which is harder.

    A second call goes on where the first was stopped.
    """
    began = time.monotonic()
    print(f"The base model, the data and two runs of {STEPS} steps: {expected(full)}.")
    write_data(out / "data", target)
    results: list[Path] = []
    with remembering():
        for name in METHODS:
            every = {"every": STEPS // 3, "during": 20, "curve": None if full else 3 * QUICK // 2}
            run = settings(name, target=target, limit=None if full else QUICK)
            run["evaluate"] |= every
            path = out / f"{name}.yaml"
            config = RunConfig.load(write_text(path, yaml.safe_dump(run, sort_keys=False)))
            print(f"\n{name}: training on {target} (lorasculpt train {path})")
            train(config)
            results.append(measure(config))
    page = report(results, out / "report", REMARKS[target])
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Open {page}")
    print(REMARKS[target])
    return results
