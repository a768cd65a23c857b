"""The demo: teach the small real model to read handwriting, once with LoRA and once with LoRASculpt, and look.

It uses nothing that a user's own run could not: a data folder, two YAML files, ``train``, ``measure`` and ``report``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
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
# its validation set (``results``).
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", "r": 32, "lora_alpha": 64}, "lr": {"digits": 1.5e-3, "flags": 1.5e-3}},
    "lorasculpt": {
        "method": {"name": "lorasculpt", "r": 32, "lora_alpha": 64, "prune_step": 0.1, "cmr_memory": "cache"},
        "lr": {"digits": 1.5e-3, "flags": 4.5e-3},
    },
}
STEPS = {"digits": 160, "flags": 60}
REMARKS = {
    "digits": (
        "Both ran for as many steps, each with settings that were chosen for what they teach. At a seventh of the "
        "rate, in 160 steps, LoRA learned and kept as much as LoRASculpt (results/demo.json)."
    ),
    "flags": f"One run each, at the rate that taught it most (results/flags.json). {world.TOGETHER}",
}
BESIDE = 1.1e-12  # seconds that everything else takes, for each operation in products


@dataclass(frozen=True)
class Size:
    """How much a demo does.

    ``limit`` items are behind each number (None: all), ``during`` of each task at each of ``points`` steps while it
    trains, ``curve`` of the source and of the target at half strength and at ``refine`` more, where the curve is known
    least. ``work`` is how many operations in products all of it takes. Both runs are of ``steps``; ``own`` goes to the
    settings of one method.
    """

    limit: int | None
    points: int
    during: int
    curve: int | None
    refine: int
    work: float
    steps: int
    own: dict[str, dict[str, Any]] = field(default_factory=dict)


# Fewer steps want longer ones: each at an alpha at which 42 of them teach it much (docs/log.md). The sooner LoRASculpt
# is pruned, the more of them it has left.
QUICK = Size(
    limit=32,
    points=2,
    during=8,
    curve=32,
    refine=1,
    work=5.6e13,
    steps=42,
    own={"lora": {"lora_alpha": 128}, "lorasculpt": {"lora_alpha": 384, "prune_step": 0.05}},
)
FULL = Size(limit=None, points=4, during=20, curve=None, refine=5, work=6.2e14, steps=STEPS["digits"])
SIZES = {
    ("digits", False): QUICK,
    ("digits", True): FULL,
    ("flags", False): replace(QUICK, work=6.9e13, steps=STEPS["flags"], own={}),
    ("flags", True): replace(FULL, work=5.4e14, steps=STEPS["flags"]),
}


def write_data(folder: Path, target: str = "digits", splits: Sequence[str] = ("test", "validation", "train")) -> None:
    """The demo's data as JSON lines and PNG files: ``splits`` of ``target``, and the source's but for "train"."""
    for split in splits:
        if not (folder / f"{target}_{split}.jsonl").is_file():
            world.write(folder, world.TARGETS[target](split), f"{target}_{split}.jsonl")
        if split != "train" and not (folder / f"source_{split}.jsonl").is_file():
            world.write(folder, world.source_items(split), f"source_{split}.jsonl")


def settings(name: str, *, target: str = "digits", seed: int = 0, split: str = "test", **changes) -> dict[str, Any]:
    """The YAML of one run as a dict; ``changes`` go to its sections (``steps=``, ``lr=``, ``limit=``, ``method=``)."""
    chosen = METHODS[name]
    method = chosen["method"] | changes.pop("method", {})
    limit = changes.pop("limit", None)
    training = {"steps": STEPS[target], "batch": 12, "lr": chosen["lr"][target], "log_every": 10, "report_to": []}
    return {
        "base": str(base.folder()),
        "output": changes.pop("output", name),
        "seed": seed,
        "method": method,
        "data": {"train": f"data/{target}_train.jsonl"},
        "training": training | changes,
        "evaluate": {
            "source": [f"data/source_{split}.jsonl"],
            "target": [f"data/{target}_{split}.jsonl"],
            "limit": limit,
            "batch": 64,
            "max_new_tokens": 12,
        },
    }


def expected(work: float) -> str:
    """How long ``work`` takes here, in words: by what this machine's processor does in a product, most of the time."""
    if computing().type != "cpu":
        return "some minutes"
    dtype = autocast_dtype("cpu") or torch.float32
    rate = median(cpu_rate(dtype) for _ in range(20))
    return f"about {max(1, round(work * (1 / rate + BESIDE) / 60))} minutes on this machine"


def demo(out: Path, *, target: str = "digits", full: bool = False) -> list[Path]:
    """Run the demo in ``out`` and return the two result files.

    A second call goes on where the first was stopped.

    Args:
        out: the folder. What is of another target than digits, or full, has a name there that says so.
        target: what is learned: "digits", or "flags", which is harder.
        full: the runs of ``results/``, measured on every held-out item.
    """
    began = time.monotonic()
    size = SIZES[target, full]
    ending = ("" if target == "digits" else f"-{target}") + ("-full" if full else "")
    print(f"The base model, the data and two runs of {size.steps} steps: {expected(size.work)}.")
    write_data(out / "data", target, ("test", "train"))
    results: list[Path] = []
    with remembering():
        for name in METHODS:
            output, method = f"{name}{ending}", size.own.get(name, {})
            run = settings(name, target=target, output=output, limit=size.limit, steps=size.steps, method=method)
            run["evaluate"] |= {"every": size.steps // size.points, "during": size.during}
            run["evaluate"] |= {"curve": size.curve, "strengths": [0.5], "refine": size.refine}
            run["evaluate"] |= {"batch": 32}  # larger ones of a curve's few questions are mostly padding
            path = out / f"{name}{ending}.yaml"
            config = RunConfig.load(write_text(path, yaml.safe_dump(run, sort_keys=False)))
            print(f"\n{name}: training on {target} (lorasculpt train {path})")
            train(config)
            results.append(measure(config))
    page = report(results, out / f"report{ending}", REMARKS[target])
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Open {page}")
    print(REMARKS[target])
    return results
