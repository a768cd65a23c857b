"""What a base answers is asked once: a run keeps it in its folder, and the runs beside it take it from there.

``base-answers.json`` holds the answers to each task under a digest of all that they depend on: the weights, how they
are loaded and computed, and what is asked. Scores are not in it, so that a corrected answer in the data counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .config import RunConfig
from .errors import UserError
from .evaluation.run import ask, scored
from .evaluation.tasks import Task
from .files import write_json
from .provenance import machine
from .run.folder import ANSWERS_FILE


def ask_base(
    config: RunConfig,
    model: PreTrainedModel,
    processor,
    source: Sequence[Task],
    target: Sequence[Task],
    *,
    progress: str | None = None,
    **options: Any,
) -> dict[str, dict[str, dict]]:
    """`lorasculpt.evaluation.evaluate` of the base ``model``, of which only what is not known yet is asked.

    What was answered is left in ``config.output``. A base of which it cannot be told whether it is the same, without a
    folder or a commit of the Hub, is asked every time.

    Raises:
        UserError: what a run beside this one left cannot be read.
    """
    weights = _weights(config.base, model)
    known = {} if weights is None else _known(config.output)
    same = [weights, config.loading, str(options.get("precision")), machine(model.device)]
    same += [version(name) for name in ("torch", "transformers")]
    pictures: dict[Path, str] = {}
    kept: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, dict]] = {"source": {}, "target": {}}
    taken: dict[Path, int] = {}
    sides = [(side, task) for side, tasks in (("source", source), ("target", target)) for task in tasks]
    digests = [_digest([*same, *_put(task, options.get("max_new_tokens"), pictures)]) for _, task in sides]
    new = [task for (_, task), digest in zip(sides, digests, strict=True) if digest not in known]
    said = iter(ask(model, processor, new, progress=progress, **options) if new else ())
    for (side, task), digest in zip(sides, digests, strict=True):
        if digest in known:
            path, answers = known[digest]
            taken[path] = taken.get(path, 0) + len(answers)
        else:
            answers = next(said)
        kept[digest] = {"task": task.name, "answers": answers}
        found[side][task.name] = scored(task, answers)
    if weights is not None:
        write_json(config.output / ANSWERS_FILE, {"schema": 1, "base": config.base, "answered": kept})
    for path, number in taken.items() if progress else ():
        print(f"{progress}: {number} answers were given before, see {path}")
    return found


def _known(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """By digest the answers that ``folder`` and the folders beside it hold, and the file that holds them.

    Raises:
        UserError: one of these files holds something else.
    """
    found: dict[str, tuple[Path, list[str]]] = {}
    for path in sorted(folder.parent.glob(f"*/{ANSWERS_FILE}")):
        try:
            answered = json.loads(path.read_text(encoding="utf-8"))["answered"]
            found |= {digest: (path, one["answers"]) for digest, one in answered.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} holds no answers of a base; delete it to have them asked again.") from None
    return found


def _weights(base: str, model: PreTrainedModel) -> Any:
    """What tells one base from another: its files, or its commit on the Hub; None where there is neither."""
    if not Path(base).is_dir():
        return getattr(model.config, "_commit_hash", None)
    files = sorted(path for path in Path(base).rglob("*") if path.is_file())
    return [(str(path.relative_to(base)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _put(task: Task, longest: int | None, pictures: dict[Path, str]) -> list[Any]:
    """What a task asks, and how. ``pictures`` are the contents of files that were read already."""
    chosen = task.metric == "choice"
    for path in (path for record in task.records for path in record.images if path not in pictures):
        pictures[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    asked = [
        (record.prompt, [pictures[path] for path in record.images], record.choices if chosen else ())
        for record in task.records
    ]
    return [None if chosen else longest, asked]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
