"""A trained run → ``results.json``: before and after on every task, the curve over strength, ten pictures."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import card, posthoc
from .adapters.load import load as load_adapter
from .asked import ask_base
from .config import WATCHING, RunConfig
from .errors import UserError
from .evaluation import comparison, curve, drift, evaluate, gallery
from .evaluation.budget import closer, within
from .evaluation.run import curve_point, next_strength
from .evaluation.strength import fixed
from .evaluation.tasks import Task
from .files import write_json
from .posthoc.files import RECORD
from .provenance import versions
from .run.folder import ADAPTER, LOG_FILE, adapter_of
from .run.model import asking, loaded, several_processes
from .run.records import check_metrics, check_tasks_of, drift_prompts, held_out, questions, rehearsed, training_rows
from .run.trainer import PUSHING

RESULTS_FILE, RETAINED = "results.json", "adapter-retained"
PLACES = ("source", "target", "validation", "validation_source", "images")  # of evaluate
ANSWERING = ("limit", "max_new_tokens", "metric", "as_task")  # of evaluate: what decides an answer and its score
TEXTS = 32  # of the drift, where a budget needs one and the run says nothing
AT_BASE = {"value": 0.0, "interval": [0.0, 0.0]}  # the drift of the base from itself


def measure(
    config: RunConfig,
    *,
    strengths: Sequence[float] | None = None,
    progress: bool = True,
) -> Path:
    """Measure the adapter of a finished run against its base and write ``results.json`` into the run's folder.

    What the base answered to these questions in a run beside this one is not asked again (`lorasculpt.asked`).

    Without source tasks, forgetting is told by the drift alone (on ``evaluate.drift`` texts, or 32 where only
    ``evaluate.retain`` is given), and what needs source accuracy is null in the file. The strength for
    ``evaluate.retain`` is chosen on ``evaluate.validation`` where there is one, which has the tuned model answer that
    at every strength as well: a strength that is chosen on the test flatters the test.

    Args:
        config: the run.
        strengths: where the curve of source against target is taken, between 0 and 1. Default:
            ``config.evaluate.strengths``.

    Returns:
        The file.

    Raises:
        UserError: there is no trained adapter, or that of another run, nothing to measure it with, or no source and no
            drift either; or under a launcher of several processes.
    """
    if several_processes():
        raise UserError("a run is measured by one process; start lorasculpt eval without a launcher.")
    if config.data.sequence:
        raise config.error("data.sequence", "is measured while it is learned; lorasculpt train shows the numbers.")
    folder, how = adapter_of(config), manner(config)
    config, source, target = _measurable(config)
    choosing = _choosing(config)
    check_tasks_of(folder, config, [*source, *target, *(task for side in choosing for task in side)])
    (model, processor), options = loaded(config), asking(config)
    name = config.method["name"]
    before = ask_base(config, model, processor, source, target, progress="base" if progress else None, **options)
    model = load_adapter(model, folder)
    after = evaluate(model, processor, source, target, progress=name if progress else None, **options)
    drifted = None
    prompts = drift_prompts(config, model, processor, options["precision"])
    if not source and not prompts:
        raise UserError(f"{folder} has no drift, because its base is no longer there; name evaluate.source.")
    if prompts:
        told = {key: value for key, value in options.items() if key != "max_new_tokens"}
        drifted = drift(model, processor, prompts, progress=f"{name} drift" if progress else None, **told)
    small = held_out(config, each=config.evaluate.curve)
    strengths = config.evaluate.strengths if strengths is None else strengths
    obstacle = "the projector was replaced" if config.projector == "full" else fixed(model)
    if obstacle is not None:
        strengths = ()
    options["progress"] = name if progress else None
    at_base = AT_BASE if drifted else None
    ends = [curve_point(0.0, _of(before, *small), at_base), curve_point(1.0, _of(after, *small), drifted)]
    points, again = _curves(
        config,
        ends,
        strengths,
        partial(curve, model, processor, *small, prompts=prompts, **options),
        partial(curve, model, processor, *choosing, **options) if choosing and obstacle is None else None,
    )
    budget = _budget(config, points, again, obstacle)
    training = json.loads((config.output / LOG_FILE).read_text())
    run = {
        **_trained_as(config, training),
        "evaluate": how,
        "questions": questions([*source, *target]),
        **comparison(before, after),
        **({"drift": drifted} if drifted else {}),
        "curve": points if obstacle is None else [],
        **({"budget": budget} if budget else {}),
        "training": training["history"],
        "gallery": [
            entry | {"image": os.path.relpath(entry["image"], config.output.resolve())}
            for entry in gallery(source, target, before, after)
        ],
    }
    content = {"schema": 1, "versions": versions(), "places": places(config), "runs": [run]}
    path = write_json(config.output / RESULTS_FILE, content)
    card.measured(config, folder, training, content)
    return path


def _measurable(config: RunConfig) -> tuple[RunConfig, list[Task], list[Task]]:
    """``config``, with a drift to measure where there is no source, and its source and target tasks.

    Raises:
        UserError: as of :func:`measure`.
    """
    check_metrics(config)
    source, target = held_out(config)
    if not target or not (source or config.evaluate.drift or config.evaluate.retain):
        raise config.error(
            "evaluate",
            "must name what to measure: target (to be learned) and source (to be kept), or without source data drift, "
            "such as drift: 32.",
        )
    if source:
        return config, source, target
    if config.projector == "full":
        raise config.error("projector", "is full, so there is no drift to measure; name evaluate.source.")
    asked = config.evaluate.model_copy(update={"drift": config.evaluate.drift or TEXTS})
    return config.model_copy(update={"evaluate": asked}), source, target


def _curves(
    config: RunConfig,
    ends: list[dict[str, Any]],
    strengths: Sequence[float],
    ask: Callable[[list[float]], list[dict[str, Any]]],
    choose: Callable[[list[float]], list[dict[str, Any]]] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The points of the curve over strength, from its ends, and those on the validation sets: none without ``choose``.

    Args:
        config: the run.
        ends: the points at strength 0 and 1.
        strengths: where it is measured first; at none more where there are none.
        ask: what gives the points at such strengths.
        choose: what gives them on the validation sets.
    """
    points = ends + ask(list(strengths))
    tries = config.evaluate.refine if strengths else 0
    for _ in range(tries):
        if (least_known := next_strength(points)) is None:
            break
        points += ask([least_known])
    again = choose([point["strength"] for point in points]) if choose else []
    if (share := config.evaluate.retain) is not None:
        for _ in range(tries):
            if (between := closer(_chosen_among(points, again), share)) is None:
                break
            points += ask([between])
            again += choose([between]) if choose else []
    for found in (points, again):
        found.sort(key=lambda point: point["strength"])
    return points, again


def _budget(
    config: RunConfig, points: list[dict[str, Any]], again: list[dict[str, Any]], obstacle: str | None
) -> dict[str, Any]:
    """Which of ``points`` keeps ``evaluate.retain``; nothing where no share is asked.

    Args:
        config: the run.
        points: the curve over strengths.
        again: the same strengths on the validation sets, where there are any to choose by.
        obstacle: why there is one strength alone, where there is.
    """
    share = config.evaluate.retain
    if share is None:
        return {}
    if obstacle is not None:
        return within(points, share) | {"fixed": obstacle}
    among = _chosen_among(points, again)
    if not again:
        return within(among, share)
    return within(among, share) | {"on": "validation", "questions": chosen_on(config), "points": among}


def chosen_on(config: RunConfig) -> str | None:
    """What tells the questions that choose a strength from others; None where it is chosen on what is measured."""
    sides = _choosing(config)
    return questions([task for side in sides for task in side]) if sides else None


def _chosen_among(points: list[dict[str, Any]], again: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points by which a strength is chosen: of the validation sets where there are any, with the same drift."""
    return [point | other for point, other in zip(points, again, strict=True)] if again else points


def _trained_as(config: RunConfig, training: dict[str, Any]) -> dict[str, Any]:
    """What a result says of how its adapter came about; ``training`` is what `lorasculpt.train` wrote of it."""
    known = _rehearsed(config)
    return {
        "method": config.method["name"],
        "seed": config.seed,
        "steps": training["steps"],
        "machine": training.get("machine"),
        "precision": training.get("precision"),
        "settings": shape(config),
        **{key: training[key] for key in ("data", "general") if key in training},
        **({} if known is None else {"trained_on": known}),
        "seconds": training["seconds"],
        "memory_bytes": training.get("memory_bytes"),
        "memory_of": training.get("memory_of"),
        "adapter_bytes": sum(path.stat().st_size for path in (config.output / ADAPTER).glob("*.safetensors")),
        "trainable": training["trainable"],
    }


def _rehearsed(config: RunConfig) -> dict[str, int] | None:
    """How many questions of each task were trained on; None where the training data are no longer there to be read."""
    try:
        trained = training_rows(config, check_images=False).trained
    except (UserError, OSError):
        return None
    return dict(Counter(task for task, _, _ in rehearsed(config, trained)))


def shape(config: RunConfig) -> dict[str, Any]:
    """The settings that shape a run and its numbers: not where it lies, how it is watched, its data, or its seed."""
    found = config.model_dump(
        mode="json",
        include={"method", "scope", "projector", "training"},
        exclude={"training": {**dict.fromkeys(WATCHING, True), "arguments": {"run_name", *PUSHING}}},
    )
    found |= config.model_dump(include={"dtype", "quantization", "image_processor"}, exclude_defaults=True)
    found |= {"evaluate": {"as_task": config.evaluate.as_task}} if config.evaluate.as_task else {}
    data = config.data.model_dump(include={"replay", "limit"}, exclude_defaults=True)
    return found | ({"data": data} if data else {})


def measured(config: RunConfig) -> dict[str, Any] | None:
    """The content of the run's ``results.json``; None if it is not there, or was asked other files or otherwise."""
    path = config.output / RESULTS_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    where = places(config)
    told = tells(content["runs"][0].get("evaluate"), config) and content.get("places", where) == where
    return content if told else None


def manner(config: RunConfig) -> dict[str, Any]:
    """How a run is measured, but for where the questions lie."""
    return config.evaluate.model_dump(mode="json", exclude={*PLACES, "every", "during", "batch"})


def tells(how: dict[str, Any] | None, config: RunConfig) -> bool:
    """Whether a run that was measured in the manner ``how`` (None: not told) says all that ``config`` asks.

    Its curve may have strengths that are not asked, if it may have as many in all; a strength that is chosen is chosen
    among those that are.
    """
    asked = manner(config)
    if how is None or how == asked:
        return True

    def most(one: dict[str, Any]) -> int:
        return len(one["strengths"]) + one.get("refine", 0) if one["strengths"] else 0

    finer = set(how["strengths"]) >= set(asked["strengths"]) and most(how) >= most(asked) and asked["retain"] is None
    return finer and how | {key: asked[key] for key in ("strengths", "refine")} == asked


def answered_alike(how: dict[str, Any] | None, config: RunConfig) -> bool:
    """Whether questions that were asked in the manner ``how`` (None: not told) have the answers and scores of today's.

    What a curve, a drift or a strength takes besides is not looked at.
    """
    asked = manner(config)
    return how is None or all(how.get(key) == asked[key] for key in ANSWERING)


def places(config: RunConfig) -> dict[str, list[str]]:
    """Where the questions lie, seen from the run's folder."""
    asked = config.evaluate
    files = {key: getattr(asked, key) for key in PLACES} | {"images": [asked.images] if asked.images else []}
    folder = config.output.resolve()  # which a link may lead to: ".." is then not where the link lies
    return {key: [os.path.relpath(path, folder) for path in paths] for key, paths in files.items()}


def _of(measured: dict[str, Any], source: Sequence[Task], target: Sequence[Task]) -> dict[str, Any]:
    """Groups and scores of the first questions of each task, those that ``source`` and ``target`` have."""

    def first(entry: dict[str, Any], n: int) -> dict[str, Any]:
        return {what: entry[what][:n] for what in ("groups", "scores")}

    sides = {"source": source, "target": target}
    return {
        side: {task.name: first(measured[side][task.name], len(task.records)) for task in tasks}
        for side, tasks in sides.items()
    }


def _choosing(config: RunConfig) -> tuple[()] | tuple[list[Task], list[Task]]:
    """Source and target tasks by which a strength is chosen; none where it is chosen on those that are measured."""
    asked = config.evaluate
    if not (asked.retain and asked.validation):
        return ()
    instead = {"source": asked.validation_source or asked.source, "target": asked.validation}
    return held_out(config.model_copy(update={"evaluate": asked.model_copy(update=instead)}), each=asked.curve)


def retained(config: RunConfig, budget: dict[str, Any]) -> str:
    """Leave the adapter of a run at the strength that ``budget`` chose in ``adapter-retained``, as a plain LoRA.

    One that an earlier budget left there goes. None is written where no strength keeps enough, where it is 1, and where
    the adapter is no plain LoRA.

    Args:
        config: the run.
        budget: what :func:`measure` wrote of it under ``budget``.

    Returns:
        Where the adapter of that budget is, or why there is none, in a sentence.

    Raises:
        UserError: ``adapter-retained`` is there and was not made by this.
    """
    adapter, out, chosen = config.output / ADAPTER, config.output / RETAINED, budget["strength"]
    if out.exists():
        if not (out / RECORD).is_file():
            raise UserError(f"{out} was not made by lorasculpt eval, so it is not replaced; move it away.")
        with tempfile.TemporaryDirectory(prefix=f".{RETAINED}-", dir=config.output) as gone:
            out.rename(Path(gone) / RETAINED)  # at once: half of it is never there under its name
    if chosen is None:
        return "So no adapter of this run is there to take for that share."
    if chosen == 1:
        return f"That is the adapter itself: {adapter}"
    try:
        plain = posthoc.read(adapter)
    except UserError as error:
        return f"It is not written at that strength, which only a plain LoRA can be: {error}"
    made = {"edit": "scale", "by": chosen, "retain": budget["retain"], "kept": budget["kept"]}
    posthoc.write(posthoc.scale(plain, chosen), out, made=made)
    return f"The adapter at that strength: {out}"
