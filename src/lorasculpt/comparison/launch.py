"""A comparison's runs as jobs of a cluster, through submitit: one for each command that waits for no other.

Needs the extra ``slurm``. The jobs and this process share the folder of the comparison; what a job says is in
``jobs/<id>_0_log.out`` and ``.err`` there, and ``jobs/submitted.json`` has the job of each run, so that a comparison
that was stopped waits for jobs that still run and does not start them twice.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import yaml

from ..errors import UserError
from ..files import write_json
from .plan import Comparison

JOBS, SUBMITTED = "jobs", "submitted.json"
MINUTES = 600  # that a job may take, where nothing else is said; submitit's own default is 5


def launch(
    comparison: Comparison,
    cluster: str,
    options: dict[str, Any],
    *,
    done: Callable[[], object] = lambda: None,
    seconds: float = 10,
    progress: bool = True,
) -> None:
    """Submit what can be done, wait, submit what can be done then, until nothing can be.

    Args:
        comparison: What is to be done.
        cluster: One of submitit's: ``"slurm"``, or ``"local"`` for processes on this machine, all at once.
        options: Parameters of submitit's ``AutoExecutor``, such as ``timeout_min`` (default: 600), ``gpus_per_node``,
            ``slurm_partition``.
        done: Called when runs are done.
        seconds: Between two looks at the jobs.
        progress: Print how many are done.

    Raises:
        UserError: there is no submitit, no such cluster or option; or jobs ended without a result, once all have ended.
    """
    executor, kind = _executor(comparison, cluster, options)
    note = comparison.config.output / JOBS / SUBMITTED
    known = json.loads(note.read_text()) if note.is_file() else {}
    jobs = {name: kind(executor.folder, known[name]) for name in known}
    begun: set[str] = {name for name, job in jobs.items() if not job.done()}
    while True:
        for run in comparison.ready():
            if run.name not in begun:
                begun.add(run.name)
                jobs[run.name] = executor.submit(_command(comparison.command(run)))
                _note(comparison, {name: job.job_id for name, job in jobs.items()})
        running = [name for name in begun if not jobs[name].done()]
        if not running:
            break
        time.sleep(seconds)
        ended = [name for name in running if jobs[name].done()]
        if ended:
            done()
            if progress:
                print(
                    f"{len(ended)} jobs ended, {len(running) - len(ended)} are left; missing: {len(comparison.left())}"
                )
    failed = [run.name for run in comparison.ready() if run.name in begun]
    if failed:
        raise UserError(
            f"{len(failed)} jobs ended without a result; the first is {failed[0]}, see {jobs[failed[0]].paths.stderr}."
        )


def _executor(comparison: Comparison, cluster: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """submitit's executor, and the class of its jobs."""
    try:
        import submitit
    except ImportError:
        raise UserError("--launch needs submitit, which is not installed: pip install 'lorasculpt[slurm]'.") from None
    try:
        executor = submitit.AutoExecutor(folder=comparison.config.output / JOBS, cluster=cluster)
        executor.update_parameters(**{"timeout_min": MINUTES, "name": "lorasculpt", **options})
    except (AssertionError, NameError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"submitit cannot launch on {cluster} ({reason}); correct --launch or --job.") from None
    return executor, {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]


def _command(line: str) -> Any:
    """A shell line as submitit's function, with the programs of this Python found first."""
    from submitit.core.utils import CommandFunction

    folder = shlex.quote(os.path.dirname(sys.executable))
    return CommandFunction(["bash", "-c", f"PATH={folder}:$PATH; {line}"])


def _note(comparison: Comparison, ids: dict[str, str]) -> None:
    write_json(comparison.config.output / JOBS / SUBMITTED, ids)


def options_of(text: str | None) -> dict[str, Any]:
    """``timeout_min=120,slurm_partition=gpu`` as the options of :func:`launch`.

    Raises:
        UserError: it has another form.
    """
    found: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UserError(
                f"--job is {text!r}; it must be options of submitit, such as timeout_min=120,gpus_per_node=1."
            )
        try:
            found[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--job is {text!r}; {value!r} is no value, such as 120 or gpu.") from None
    return found
