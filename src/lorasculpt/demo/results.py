"""The project's own evidence on the demo's base: one `lorasculpt.compare` for each target.

``lorasculpt demo results`` makes ``results/demo.json`` (digits), with ``--target flags`` ``results/flags.json``, with
``--others`` ``results/others.json`` (digits, more baselines), with ``--target tasks`` and ``--target sequence`` what
several tasks do (`lorasculpt.demo.several`). All it adds to ``lorasculpt compare`` is the data and the YAML file, which
it leaves in its folder to be read or run. It goes on where it was stopped, be it on another machine: what the file has
is not done again. The file says whether it is complete.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..compare import compare
from ..config import RunConfig
from ..files import write_text
from ..models.tower import remembering
from . import several, world
from .run import METHODS, settings, write_data

RATES = (2e-4, 5e-4, 1.5e-3)  # of digits; fewer steps are given larger ones (`ASKED`)
SEEDS = 3
WHOLE = [2e-5, 5e-5, 2e-4]  # rates of methods that train whole weights, which the others' would break
GENERAL = "general.jsonl"
TENTH = 2.1  # weight of the penalty at which its gradient is a tenth of the task's (`tenth`)
SCULPT = METHODS["lorasculpt"]["method"]
AS_SCULPT = SCULPT | {"lr": "lorasculpt"}  # LoRASculpt with something changed, at the rate that it chose
# In this order, one seed of each and then the next: what is done at any time can be read.
COMPARED: dict[str, dict[str, Any]] = {
    "lora": {"seeds": 5},
    "lorasculpt": SCULPT | {"seeds": 5},
    # of the rates that LoRA tried the one with the best H-mean: what someone takes who knows of forgetting
    "lora-careful": {"name": "lora", "lr": "lora", "by": "h_mean", "seeds": 5},
    # what LoRASculpt is made of, alone
    "pruned-only": AS_SCULPT | {"cmr_weight": 0.0},
    "penalty-only": AS_SCULPT | {"density": 1.0},
    # after training
    "half-strength": {"of": "lora", "edit": "scale", "by": 0.5, "seeds": SEEDS},
    "dare": {"of": "lora", "edit": "dare", "p": 0.9, "seeds": SEEDS},
    "model-tailor": {"of": "lora", "edit": "tailor", "seeds": SEEDS},
    "dora": {},
    "l2": {"name": "regularized", "penalty": "l2"},
    "orth": {"name": "regularized", "penalty": "orth"},
    "spider": {"rates": WHOLE},
    # density, and the weight of the penalty up to where it acts
    **{f"density-{density:g}": AS_SCULPT | {"density": density} for density in (0.02, 0.05, 0.2, 0.5)},
    **{f"penalty-{weight:g}": AS_SCULPT | {"cmr_weight": weight} for weight in (TENTH, 10 * TENTH, 100 * TENTH)},
    **{f"omega-{omega:g}": AS_SCULPT | {"cmr_weight": 10 * TENTH, "omega": omega} for omega in (0.3, 3.0, 10.0)},
}
# What else a reviewer may ask for, beside the first three of these.
OTHERS: dict[str, dict[str, Any]] = {label: COMPARED[label] for label in ("lora", "lorasculpt", "lora-careful")} | {
    "lwf": {},
    "ewc": {"name": "regularized", "penalty": "ewc", "fisher_texts": 48},
    "replay": {"name": "lora", "replay": 0.1},
    "full": {"rates": WHOLE},
    "half": {"name": "full", "select": "half", "rates": WHOLE},
    "magnitude": {"name": "full", "select": "magnitude", "rates": WHOLE},
    "pissa": {},
    "corda": {},
    "osf": {"rates": WHOLE},
    "shira": {},
}
# What a comparison on one task takes and asks, where it is not the same for all: ``pace`` times the rates, ``limit``
# items of a task behind each number, ``curve`` of source and target at each strength and ``refine`` more strengths.
ASKED: dict[str, dict[str, int]] = {
    "digits": {"pace": 1, "limit": 500, "curve": 400, "refine": 5},
    "flags": {"pace": 3, "limit": 160, "curve": 100, "refine": 7},
}
SEVERAL = {"tasks": several.together, "sequence": several.in_turn}
TARGETS = (*world.TARGETS, *SEVERAL)


def plan(work: Path, target: str = "digits", *, others: bool = False) -> Path:
    """Write the data and the YAML file of the comparison on ``target`` into ``work``; returns the file.

    ``others`` makes it that of OTHERS, which shares the runs of the methods that both have.
    """
    made = SEVERAL[target](work) if target in SEVERAL else _single(work, target, OTHERS if others else COMPARED)
    path = work / (f"{target}-others.yaml" if others else f"{target}.yaml")
    return write_text(path, yaml.safe_dump(made, sort_keys=False))


def _single(work: Path, target: str, methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The YAML of the comparison of ``methods`` on one task."""
    write_data(work / "data", target)
    if not (work / "data" / GENERAL).is_file():  # of the drawings and words that the base has seen
        world.write(work / "data", random.Random(GENERAL).sample(world.source_items("train"), 1000), GENERAL)
    asked = ASKED[target]
    made = settings("lora", target=target, output=target, limit=asked["limit"])
    made["methods"] = {
        label: what | {"rates": _paced(what["rates"], target)} if "rates" in what else what
        for label, what in methods.items()
    }
    made["data"]["general"] = f"data/{GENERAL}"
    made["training"].pop("lr")  # each label has its own
    made["evaluate"] |= {
        "validation": [f"data/{target}_validation.jsonl"],
        "validation_source": ["data/source_validation.jsonl"],
        "drift": 64,
        "strengths": [0.5],  # and more where the curve is known least, so that a steep one is known too
        "refine": asked["refine"],
        "curve": asked["curve"],
    }
    return made


def rates_of(target: str) -> tuple[float, ...]:
    """The learning rates of a label that says nothing of them."""
    return (several.RATE,) if target in SEVERAL else tuple(_paced(RATES, target))


def _paced(rates: Sequence[float], target: str) -> list[float]:
    """``rates`` as they are for ``target``."""
    return [float(f"{ASKED[target]['pace'] * rate:g}") for rate in rates]


def file_of(target: str = "digits", *, others: bool = False) -> Path:
    """Where the results of a comparison go, from the project's folder; each has a file of its own."""
    if target == "digits":
        return Path("results") / ("others.json" if others else "demo.json")
    return Path("results") / (f"{target}-others.json" if others else f"{target}.json")


def results(work: Path, path: Path | None = None, *, target: str = "digits", others: bool = False) -> Path:
    """Do what is still missing in ``work`` for ``target`` and write ``path`` (default: `file_of`)."""
    path = path or file_of(target, others=others)
    config = RunConfig.load(plan(work, target, others=others))
    with remembering():
        compare(config, seeds=SEEDS, rates=rates_of(target), out=path)
    return path


def tenth(history: list[dict[str, Any]], method: dict[str, Any]) -> dict[str, float]:
    """The penalty's gradient over the task's in a finished run, and the weight at which it would be a tenth."""
    ratio = float(np.median([row["penalty_ratio"] for row in history if row.get("penalty_ratio")]))
    weight = method.get("cmr_weight", 1e-3)
    return {"weight": weight, "gradient_ratio": ratio, "weight_for_a_tenth": float(f"{0.1 * weight / ratio:.2g}")}
