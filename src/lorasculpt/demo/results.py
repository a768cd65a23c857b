"""The project's own evidence on the demo's base: ``lorasculpt demo results`` makes ``results/demo.json``.

    1. each method, three learning rates, one seed: the one that learns the *target's validation set* best is taken
    2. each method at its rate, several seeds, equal steps: measured on every held-out item
    3. the same at the rate with the best H-mean of source and target on the validation sets, where that is another one:
       what someone would take who knows of forgetting
    4. LoRASculpt once more with the penalty's weight at which its gradient is a tenth of the task's

Every run is an ordinary run in its own folder; what is there already is not done again, so the command goes on where it
was stopped, and the file it writes says whether it is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..compare import equal_target, write
from ..config import RunConfig
from ..measure import RESULTS_FILE, measure, versions
from ..train import LOG_FILE, train
from .run import METHODS, settings, write_data
from .tower import remembering

RATES = (2e-4, 5e-4, 1.5e-3)
SEEDS = (0, 1, 2)
LIMITS = {"test": 500, "validation": 200}  # items of a task; every source task has between 400 and 500 to be tested on


def results(work: Path, path: Path, *, target: str = "digits", seeds: tuple[int, ...] = SEEDS) -> Path:
    """Do what is still missing in ``work`` for the target task ``target`` and write ``path``."""
    write_data(work / "data", target)
    found: dict[str, Any] = {"schema": 1, "complete": False, "versions": versions(), "rates": {}, "runs": []}
    found["target"] = target
    before: dict[str, dict] = {}
    with remembering():
        for name in METHODS:
            scores = {
                rate: _run(work, f"rate-{name}-{rate:g}", before, name, "validation", target, lr=rate) for rate in RATES
            }
            best = max(scores, key=lambda rate: scores[rate]["summary"]["target_after"])
            careful = max(scores, key=lambda rate: scores[rate]["summary"]["h_mean"])
            shown = ("source_before", "source_after", "target_after", "h_mean")
            validation = {f"{rate:g}": {key: run["summary"][key] for key in shown} for rate, run in scores.items()}
            found["rates"][name] = {"validation": validation, "chosen": best, "by_h_mean": careful}
        for seed in seeds:
            for name in METHODS:
                rate = found["rates"][name]["chosen"]
                found["runs"].append(_run(work, f"{name}-{seed}", before, name, "test", target, lr=rate, seed=seed))
                write(path, found)
        for name, rates in found["rates"].items():
            if rates["by_h_mean"] == rates["chosen"]:
                continue
            for seed in seeds:
                folder, rate = f"{name}-careful-{seed}", rates["by_h_mean"]
                run = _run(work, folder, before, name, "test", target, lr=rate, seed=seed)
                found["runs"].append(run | {"label": f"{name}, rate by H-mean"})
                write(path, found)
        found["penalty"] = _tenth(work / f"lorasculpt-{seeds[0]}", METHODS["lorasculpt"]["method"])
        change = {"cmr_weight": found["penalty"]["weight_for_a_tenth"]}
        rate = found["rates"]["lorasculpt"]["chosen"]
        run = _run(
            work, "lorasculpt-tenth", before, "lorasculpt", "test", target, lr=rate, seed=seeds[0], method=change
        )
        found["runs"].append(run | {"label": "lorasculpt, penalty at a tenth"})
    found["equal_target"] = equal_target(found["runs"])
    found["complete"] = True
    return write(path, found)


def _run(
    work: Path, folder: str, before: dict[str, dict], name: str, split: str, target: str, **changes
) -> dict[str, Any]:
    """One run, trained and measured unless it already is; returns its entry without pictures and items."""
    made = settings(name, target=target, split=split, output=folder, limit=LIMITS[split], **changes)
    path = work / f"{folder}.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    config = RunConfig.load(path)
    if not (config.output / RESULTS_FILE).is_file():
        print(f"\n{folder}")
        train(config)
        # rates are judged by their scores alone; the curve costs as much again as everything else
        strengths = (0.25, 0.5, 0.75) if split == "test" else ()
        _, before[split] = measure(config, before=before.get(split), strengths=strengths, curve_limit=100)
    run = json.loads((config.output / RESULTS_FILE).read_text())["runs"][0]
    return {key: value for key, value in run.items() if key != "gallery"}


def _tenth(folder: Path, method: dict[str, Any]) -> dict[str, float]:
    """The penalty's gradient over the task's in a finished run, and the weight at which it would be a tenth."""
    history = json.loads((folder / LOG_FILE).read_text())["history"]
    ratio = float(np.median([row["penalty_ratio"] for row in history if row.get("penalty_ratio")]))
    weight = method.get("cmr_weight", 1e-3)
    return {"weight": weight, "gradient_ratio": ratio, "weight_for_a_tenth": float(f"{0.1 * weight / ratio:.2g}")}
