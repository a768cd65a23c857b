"""The folder of a run: whose it is, its checkpoints, and what an interrupted or broken run left there."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import WATCHING, RunConfig
from ..errors import UserError
from ..files import disk_full, read_json, write_json, write_text

RUN_FILE, LOG_FILE, ADAPTER, DIVERGED_FILE = "run.yaml", "training.json", "adapter", "diverged.json"
EVENTS = "logs"  # of TensorBoard, of all parts of a run that was interrupted
DRIFT_FILE, CORDA_FILE, FISHER_FILE = "drift.jsonl", "corda.jsonl", "fisher.safetensors"  # made of the base
ANSWERS_FILE = "base-answers.json"  # the base's own, asked once
COST_FILE = "cost.json"  # of each checkpoint
NAME = re.compile(r"checkpoint-\d+")  # a copy of the user's has another
HEAD = "# What this run is made with, written by lorasculpt: to change it, edit the file that it was started with.\n"


def check_output(output: Path, config: RunConfig) -> None:
    """See that ``output`` is free or already this run's, and clear what an interrupted checkpoint left there.

    It is this run's if all is the same but how it is watched, and what is measured once it is trained. A run that came
    to nothing leaves it free, and so does one that was killed before it had written anything.
    """
    path = output / RUN_FILE
    if path.is_file():
        if not path.read_text(encoding="utf-8").startswith(HEAD):  # somebody starts a run with it
            raise config.error(
                "output",
                f"is {output}, whose {RUN_FILE} no run has written; choose an empty folder, such as {output / 'run'}.",
            )
        if not same_run(output, config) and not came_to_nothing(output):
            raise config.error(
                "output",
                f"is {output}, which holds another run ({_differing(path, config)} is another in {path}); choose "
                "another folder.",
            )
    elif output.is_dir() and (found := list(output.iterdir())):
        for each in found:
            if each.name.startswith(f".{RUN_FILE}."):
                each.unlink(missing_ok=True)
        if any(output.iterdir()):
            raise config.error("output", f"is {output}, which holds something else; choose an empty folder.")
    shutil.rmtree(output / ".partial", ignore_errors=True)


def write_record(config: RunConfig) -> None:
    """Write what the run is made with into its folder, which is then its own."""
    write_text(config.output / RUN_FILE, HEAD + config.to_yaml())


def clear(output: Path) -> None:
    """Remove what a run has written that came to nothing, and the folder if nothing else is in it."""
    if not output.is_dir():
        return
    for name in (RUN_FILE, LOG_FILE, DIVERGED_FILE, DRIFT_FILE, CORDA_FILE, FISHER_FILE, ANSWERS_FILE):
        (output / name).unlink(missing_ok=True)
    for folder in (output / ".partial", output / EVENTS, *checkpoints(output)):
        shutil.rmtree(folder, ignore_errors=True)
    if not any(output.iterdir()):
        output.rmdir()


def same_run(output: Path, config: RunConfig) -> bool:
    """Whether the run in ``output`` is this one in all but how it is watched, and what is measured afterwards."""
    return not _differing(output / RUN_FILE, config)


def _differing(path: Path, asked: RunConfig) -> str:
    """The first setting by which the run of the file ``path`` is not ``asked``; none where it is."""
    before = RunConfig.load(path)
    left_out: Any = {"training": WATCHING}
    if not (asked.data.sequence or before.evaluate.every or asked.evaluate.every):  # these measure while they train
        left_out["evaluate"] = True
    own, other = (_flat(each.model_dump(mode="json", exclude=left_out)) for each in (asked, before))
    folders = asked.output, before.output
    return next((key for key in own | other if not _alike(own.get(key), other.get(key), *folders)), "")


def _alike(own: Any, other: Any, here: Path, there: Path) -> bool:
    """Whether two settings are the same, or paths that lead from ``here`` as from ``there``: folders are moved."""
    if isinstance(own, str) and isinstance(other, str) and os.path.isabs(own) and os.path.isabs(other):
        return own == other or os.path.relpath(own, here) == os.path.relpath(other, there)
    if isinstance(own, list) and isinstance(other, list):
        return len(own) == len(other) and all(_alike(a, b, here, there) for a, b in zip(own, other, strict=True))
    if isinstance(own, dict) and isinstance(other, dict):
        return own.keys() == other.keys() and all(_alike(own[key], other[key], here, there) for key in own)
    return own == other


def check_trained(config: RunConfig) -> None:
    """See that the run in ``config.output`` was trained as ``config`` says. What is measured may have changed since.

    Raises:
        UserError: for the first setting that was another, with its line in the file.
    """
    path = config.output / RUN_FILE
    if not path.is_file():
        return
    record = RunConfig.load(path)
    for key, own, before in _otherwise(record, config):
        was = "without it" if before is None else f"with {before}"
        raise config.error(
            key,
            f"is {'not set' if own is None else own}, but {config.output} was trained {was} (see {path}); correct it, "
            "or name another output.",
        )


def trained_alike(folder: Path, config: RunConfig) -> bool:
    """Whether the run in ``folder`` has the very adapter that ``config`` would train."""
    if not (folder / ADAPTER / "adapter_config.json").is_file():
        return False
    return next(_otherwise(RunConfig.load(folder / RUN_FILE), config), None) is None


def adapter_of(config: RunConfig) -> Path:
    """The folder of the adapter that the run in ``config.output`` ended with.

    Raises:
        UserError: there is none yet, or as of :func:`check_trained`.
    """
    folder = config.output / ADAPTER
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{config.output} holds no trained adapter yet; run lorasculpt train first.")
    check_trained(config)
    return folder


def check_rows(config: RunConfig, path: Path, told: Mapping[str, str]) -> None:
    """See that the rows of today, as ``told``, are those that the JSON file ``path`` of the run was written with.

    Raises:
        UserError: they are others.
    """
    before = read_json(path) if path.is_file() else {}
    for name, key in (("data", "data.train"), ("general", "data.general")):
        if name in told and before.get(name, told[name]) != told[name]:
            raise config.error(
                key, f"has other rows than {config.output} was trained on (see {path}); name another output."
            )


def _otherwise(trained: RunConfig, asked: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """What shapes an adapter and is another in ``asked`` than in ``trained``: dotted key, its value there and here."""
    left_out: Any = {"output": True, "methods": True, "evaluate": True, "training": WATCHING}
    own, before = (_flat(each.model_dump(mode="json", exclude=left_out)) for each in (asked, trained))
    for key in {**own, **before}:
        if not _alike(own.get(key), before.get(key), asked.output, trained.output):
            yield key, own.get(key), before.get(key)


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    """``{"method": {"r": 8}}`` -> ``{"method.r": 8}``."""
    settings: dict[str, Any] = {}
    for section, value in sections.items():
        settings |= (
            {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {section: value}
        )
    return settings


def diverged(output: Path) -> dict[str, Any] | None:
    """What the run in ``output`` left there if its weights came to no numbers."""
    path = output / DIVERGED_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def came_to_nothing(output: Path) -> bool:
    """Whether there is nothing else in ``output`` of a run."""
    return {path.name for path in output.iterdir()} == {RUN_FILE, DIVERGED_FILE}


def leave_diverged(config: RunConfig, found: dict[str, Any], *, alone: bool) -> None:
    """Leave what :func:`diverged` reads in the run's folder, where it is to be ``alone`` with the settings."""
    if alone:
        clear(config.output)
        write_record(config)
    write_json(config.output / DIVERGED_FILE, found)


def checkpoints(output: Path) -> list[Path]:
    """The whole ones that training made, by their step."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """After how many optimizer steps it was made."""
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(output: Path) -> Path | None:
    """The one that a run goes on from."""
    return next(reversed(checkpoints(output)), None)


@contextmanager
def telling_where_it_goes_on(output: Path) -> Iterator[None]:
    """Say where the run will go on that is stopped here, or has no room left; what is half written there goes."""

    def where() -> str:
        last = last_checkpoint(output)
        return f"goes on from {last.name}" if last else "begins again, because it had made no checkpoint"

    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # the latter by what ends a job (`lorasculpt.cli`)
        tqdm.write(f"\nlorasculpt: stopped; run it again, and it {where()}.", file=sys.stderr)
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        shutil.rmtree(output / ".partial", ignore_errors=True)
        raise UserError(f"the disk of {output} has no room left; make some and run it again: it {where()}.") from error
