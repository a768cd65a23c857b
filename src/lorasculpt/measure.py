"""A trained run → ``results.json``: before and after on every task, the curve over strength, ten pictures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftConfig

from .adapters.load import load as load_adapter
from .adapters.update import UpdateConfig
from .config import RunConfig
from .errors import UserError
from .evaluation import comparison, curve, drift, evaluate, gallery
from .evaluation.budget import within
from .evaluation.run import curve_point
from .evaluation.strength import fixed
from .models.load import load
from .train import ADAPTER, LOG_FILE, check_tasks, drift_prompts, held_out, precision

RESULTS_FILE = "results.json"


def measure(
    config: RunConfig,
    *,
    before: dict | None = None,
    strengths: Sequence[float] | None = None,
    progress: bool = True,
) -> tuple[Path, dict]:
    """Measure the adapter of a finished run against its base and write ``results.json`` into the run's folder.

    Args:
        config: the run.
        before: what :func:`measure` returned for another run on the same base and tasks; saves measuring the base.
        strengths: where the curve of source against target is taken, between 0 and 1. Default:
            ``config.evaluate.strengths``.

    Returns:
        The file, and the measurement of the base for ``before``.

    Raises:
        UserError: if there is no trained adapter or nothing to measure it with.
    """
    if config.data.sequence:
        raise config.error("data.sequence", "is measured while it is learned; lorasculpt train shows the numbers.")
    folder = config.output / ADAPTER
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{config.output} holds no trained adapter yet; run lorasculpt train first.")
    source, target = held_out(config)
    if not source or not target:
        raise config.error(
            "evaluate",
            "must name what to measure: source (to be kept) and target (to be learned); without source "
            "lorasculpt dial goes by drift.",
        )
    saved = PeftConfig.from_pretrained(str(folder))
    if isinstance(saved, UpdateConfig) and saved.multitask:
        check_tasks(config, saved.tasks, [*source, *target])  # before the base is measured, which may take long
    model, processor = load(config.base)
    options: dict[str, Any] = {
        "precision": precision(config, model),
        "batch": config.evaluate.batch,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "as_task": config.evaluate.as_task,
    }
    name = str(config.method.get("name", "lorasculpt"))
    if before is None:
        before = evaluate(model, processor, source, target, progress="base" if progress else None, **options)
    model = load_adapter(model, folder)
    after = evaluate(model, processor, source, target, progress=name if progress else None, **options)
    drifted = None
    if prompts := drift_prompts(config, model, processor, options["precision"]):
        told = {key: value for key, value in options.items() if key != "max_new_tokens"}
        drifted = drift(model, processor, prompts, progress=f"{name} drift" if progress else None, **told)
    small_source, small_target = held_out(config, config.evaluate.curve)
    points = []
    if config.projector != "full" and fixed(model) is None:  # a replaced projector has no strength
        strengths = config.evaluate.strengths if strengths is None else strengths
        words = name if progress else None
        points = curve(model, processor, small_source, small_target, strengths, progress=words, **options)
        points = [curve_point(0.0, before), *points, curve_point(1.0, after)]
    training = json.loads((config.output / LOG_FILE).read_text())
    run = {
        "method": name,
        "seed": config.seed,
        "steps": training["steps"],
        # what shaped the run: not where it lies, nor its seed, which has a key of its own
        "settings": config.model_dump(mode="json", include={"method", "scope", "projector", "training"})
        | ({"evaluate": {"as_task": config.evaluate.as_task}} if config.evaluate.as_task else {})
        | ({"data": {"replay": config.data.replay}} if config.data.replay else {}),
        **comparison(before, after),
        **({"drift": drifted} if drifted else {}),
        "seconds": training["seconds"],
        "memory_bytes": training.get("memory_bytes"),
        "memory_of": training.get("memory_of"),
        "adapter_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "trainable": training["trainable"],
        "curve": points,
        **({"budget": within(points, config.evaluate.retain)} if config.evaluate.retain and points else {}),
        "training": training["history"],
        "gallery": [
            entry | {"image": os.path.relpath(entry["image"], config.output)}
            for entry in gallery(source, target, before, after)
        ],
    }
    path = config.output / RESULTS_FILE
    path.write_text(json.dumps({"schema": 1, "versions": versions(), "runs": [run]}, indent=1) + "\n")
    return path, before


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    names = ("lorasculpt", "torch", "transformers", "peft", "trl", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
