"""Several methods on the same data: what does each learn, and what does it forget?

    lorasculpt compare run.yaml --methods lora,lorasculpt,dora --seeds 3 --rates 2e-4,5e-4,1.5e-3

    1. each method at each learning rate, one seed: the rate that does best on a *validation set of the target* is taken
    2. each method at its rate, several seeds, measured on the test set
    3. what is made of these without training (`lorasculpt.comparison.edits`), measured in the same way

Everything but the method is the same: data, their order, steps, evaluation. The validation set is
``evaluate.validation``, or else a tenth of the training rows, set aside by a hash of each and not trained on while
rates are chosen; of tasks in turn it is ``validation`` of each. The test set chooses nothing, but that a label ``by:
h_mean`` looks at the source of the test where there is no ``evaluate.validation_source``; the results say so.

Every run is an ordinary run in its own folder under ``output``, with its YAML file beside it. What is there already is
not done again: a comparison that was stopped goes on, and runs may be made elsewhere (:func:`commands`). Where
``evaluate`` has changed they are measured again and not trained again. A test takes the adapter of the trial that was
trained like it, where the validation set is a file. Nor is what the results file has already
(`lorasculpt.comparison.known`): that file alone is enough to go on from on another machine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from .comparison.forecast import ahead, cost
from .comparison.launch import launch
from .comparison.plan import Comparison
from .config import RunConfig
from .errors import UserError
from .files import write_json
from .hub import public_name
from .run.model import several_processes

COMPARISON_FILE = "compare.json"
planned = Comparison  # what `commands` takes


def compare(
    config: RunConfig,
    methods: Sequence[str] | None = None,
    *,
    seeds: int = 3,
    rates: Sequence[float] | None = None,
    out: Path | None = None,
    cluster: str | None = None,
    job: dict[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Make the runs of a :class:`Comparison` that are still missing, and write what they say.

    The file is written anew after every run, so that it can be read at any time; it says whether it is complete. Runs
    that it has already are not made again. Those that this comparison does not have go into a file beside it,
    ``<name>.before.json``, which is the old one, or ``<name>.before-2.json`` where that is taken.

    Args:
        config, methods, seeds, rates: Of the comparison.
        out: The file. Default: ``compare.json`` in ``config.output``.
        cluster: Make them there, each by a job (`lorasculpt.comparison.launch`), such as ``"slurm"``. Default: here,
            one after the other.
        job: Options of such a job.
        progress: Show bars, and what the runs that are still to be made are going to take: at first, where some are
            there already, and after every run.

    Returns:
        The file.

    Raises:
        UserError: for anything in the config, the data or the folders that the user can mend, and under a launcher of
            several processes.
    """
    if several_processes():
        raise UserError(
            "a comparison is made by one process; start lorasculpt compare without a launcher, or launch the runs that "
            "its --dry-run prints."
        )
    path = out or config.output / COMPARISON_FILE
    comparison = planned(config, methods, seeds, rates, path)

    def told() -> None:
        if progress and comparison.left():
            print(ahead(comparison.costs(), [kind for _, kind in comparison.left()]))

    def written() -> None:
        write_json(path, comparison.record())
        told()

    if progress and (other := comparison.other_base()) is not None:
        now = public_name(config.base)
        print(f"{path} is of a base called {other}, not {now}: if it is another model, name another file with --out.")
    if left_out := comparison.left_out():
        kept = _free(path.with_suffix(".before.json"))
        shutil.copy(path, kept)
        if progress:
            number = "1 run" if left_out == 1 else f"{left_out} runs"
            print(f"{path} has {number} of another comparison or of other settings, kept in {kept}.")
    told()
    if cluster:
        launch(comparison, cluster, job or {}, done=written, progress=progress)
    costs = comparison.costs()  # of the runs that were there: what measuring took is not known
    while (run := comparison.next()) is not None:
        began = time.monotonic()
        run.write()
        saved = comparison.make(run, progress)
        took = time.monotonic() - began
        costs.append((run.kind, took + saved))
        write_json(path, comparison.record())
        if progress:
            print(cost(run.name, took, costs, [kind for _, kind in comparison.left()]))
    return write_json(path, comparison.record())


def _free(path: Path) -> Path:
    """``path``, or the first of ``<stem>-2``, ``<stem>-3``, ... that is not there."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(name for name in chain([path], names) if not name.exists())


def commands(comparison: Comparison) -> Iterator[str]:
    """A shell line for each run that can be made now, and a comment on those that cannot yet.

    The lines need each other in nothing: they can be run on several machines that share the folder, each by one. The
    YAML files that they name are written, and the folders into which an edit goes.
    """
    ready = comparison.ready()
    yield from map(comparison.command, ready)
    now = {run.name for run in ready}
    waiting = [run.label for run in comparison.tests() if comparison.result(run) is None and run.name not in now]
    unknown = {label for label, found in comparison.rates_of().items() if found["chosen"] is None}
    runs = sum(comparison.labels[label].seeds for label in unknown)
    if unknown:
        names = ", ".join(label for label in comparison.labels if label in unknown)
        yield f"# {runs} more runs, of {names}, when these have chosen the learning rates: ask again then."
    if waiting:
        names = ", ".join(dict.fromkeys(waiting))
        yield f"# {len(waiting)} more runs, of {names}, when what they are edits of is there: ask again then."
