"""A trained run → ``dial.json``: what each strength of its adapter learns and keeps, and which one to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig

from . import posthoc
from .adapters.load import load as load_adapter
from .adapters.update import UpdateConfig
from .config import RunConfig
from .errors import UserError
from .evaluation import drift, evaluate, strength
from .evaluation.budget import within
from .evaluation.run import curve_point
from .evaluation.strength import fixed
from .measure import TEXTS, versions, write_json
from .models.load import load
from .train import ADAPTER, check_tasks, drift_prompts, held_out, precision

DIAL_FILE = "dial.json"
RETAIN = 0.97  # where the run says nothing


def dial(
    config: RunConfig, *, retain: float | None = None, write: str | Path | None = None, progress: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Measure the adapter of a finished run at every strength, choose one, and write ``dial.json`` into its folder.

    Target, source where the run names one, and drift (on ``evaluate.drift`` texts, or 32) are measured at 0, at
    ``evaluate.strengths`` and at 1. The target is ``evaluate.validation`` where there is one: a strength that is chosen
    on the test flatters the test.

    Args:
        config: the run.
        retain: the share of the base to keep, in (0, 1]. Default: ``evaluate.retain``, or 0.97.
        write: a new folder for the adapter at the strength chosen, as a plain LoRA whose B is multiplied by it.
        progress: whether to show progress bars.

    Returns:
        The file and its content: ``points``, and under ``budget`` what :func:`~lorasculpt.evaluation.budget.within`
        returns.

    Raises:
        UserError: there is no trained adapter or no target, the adapter has no strength, it is to be written but is no
            plain LoRA or its folder is taken, or no strength keeps enough for writing one.
    """
    retain = retain or config.evaluate.retain or RETAIN
    if not 0 < retain <= 1:
        raise UserError(f"the share to keep is {retain:g}; it must lie above 0 and not above 1.")
    folder = config.output / ADAPTER
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{config.output} holds no trained adapter yet; run lorasculpt train first.")
    if config.projector == "full":
        raise config.error("projector", "is full, and a projector that was replaced has no strength to turn down.")
    if write is not None and Path(write).exists():
        raise UserError(f"{write} exists; name a folder that does not.")
    plain = None if write is None else posthoc.read(folder)
    asked = config.evaluate
    changes: dict[str, Any] = {"drift": asked.drift or TEXTS, "target": asked.validation or asked.target}
    config = config.model_copy(update={"evaluate": asked.model_copy(update=changes)})
    source, target = held_out(config)
    if not target:
        raise config.error("evaluate.target", "must name what is to be learned.")
    saved = PeftConfig.from_pretrained(str(folder))
    if isinstance(saved, UpdateConfig) and saved.multitask:
        check_tasks(config, saved.tasks, [*source, *target])
    model, processor = load(config.base)
    model = load_adapter(model, folder)
    if (obstacle := fixed(model)) is not None:
        raise UserError(f"{folder} cannot be turned down: {obstacle}.")
    options: dict[str, Any] = {"precision": precision(config, model), "batch": asked.batch, "as_task": asked.as_task}
    prompts = drift_prompts(config, model, processor, options["precision"])
    points: list[dict[str, Any]] = []
    for value in sorted({0.0, *asked.strengths, 1.0}):
        words = f"strength {value:g}" if progress else None
        with strength(model, value):
            found = evaluate(
                model, processor, source, target, max_new_tokens=asked.max_new_tokens, progress=words, **options
            )
            moved = drift(model, processor, prompts, progress=words, **options)
        points.append(curve_point(value, found) | {"drift": moved["value"], "drift_interval": moved["interval"]})
    content: dict[str, Any] = {"schema": 1, "versions": versions(), "points": points, "budget": within(points, retain)}
    path = write_json(config.output / DIAL_FILE, content)
    if plain is not None and write is not None:
        chosen = content["budget"]["strength"]
        if chosen is None:
            raise UserError(f"no strength keeps {retain:g} of the base, so {write} was not written; retain less.")
        posthoc.write(posthoc.scale(plain, chosen), write, made={"edit": "scale", "by": chosen})
    return path, content
