"""A trained run → ``dial.json``: what its adapter learns and keeps, turned down and pruned, and what to take of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import posthoc
from .adapters.layers import sites
from .adapters.load import load as load_adapter
from .adapters.plain import Adapter
from .config import RunConfig
from .errors import UserError
from .evaluation import curve
from .evaluation.budget import closer, kept, within
from .evaluation.strength import fixed
from .files import whole, write_json
from .measure import TEXTS
from .provenance import versions
from .run.folder import adapter_of
from .run.model import asking, loaded, several_processes
from .run.records import check_tasks_of, drift_prompts, held_out

DIAL_FILE = "dial.json"
RETAIN = 0.97  # where the run says nothing


def dial(
    config: RunConfig,
    *,
    retain: float | None = None,
    densities: Sequence[float] = (1.0,),
    write: str | Path | None = None,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Measure the adapter of a finished run at every setting, choose one, and write ``dial.json`` into its folder.

    Target, source where the run names one, and drift (on ``evaluate.drift`` texts, or 32) are measured at strength 0,
    and for each density at ``evaluate.strengths``, at 1, and at up to ``evaluate.refine`` strengths between the one
    that keeps enough and the next. Where there is ``evaluate.validation`` that is the target, and
    ``evaluate.validation_source`` the source: a setting that is chosen on the test flatters the test.

    Args:
        config: the run.
        retain: the share of the base to keep, in (0, 1]. Default: ``evaluate.retain``, or 0.97.
        densities: shares of the entries of every A and of every B to keep, in (0, 1]; the largest ones stay, as in
            :func:`lorasculpt.posthoc.prune`. 1 is the adapter as it is, which may be sparse already.
        write: a new folder for the adapter at what was chosen: a plain LoRA, pruned, its B multiplied by the strength.
        progress: whether to show progress bars.

    Returns:
        The file and its content: ``points``, and under ``budget`` what :func:`~lorasculpt.evaluation.budget.within`
        returns, with ``on`` where it was chosen on the validation set.

    Raises:
        UserError: there is no trained adapter or that of another run, or no target, the adapter has no strength, it is
            to be pruned or written but is no plain LoRA, its folder is taken, or a density is out of its range or keeps
            no entry of some factor, or under a launcher of several processes. Where no setting keeps enough none is
            written, and the budget says so.
    """
    if several_processes():
        raise UserError("an adapter is turned down by one process; start lorasculpt dial without a launcher.")
    retain = (config.evaluate.retain or RETAIN) if retain is None else retain
    if not 0 < retain <= 1:
        raise UserError(f"the share to keep is {retain:g}; it must lie above 0 and not above 1.")
    densities = sorted(set(densities), reverse=True)
    if not densities or not all(0 < density <= 1 for density in densities):
        words = ", ".join(f"{density:g}" for density in densities)
        raise UserError(f"the densities are [{words}]; name one or more, each above 0 and not above 1.")
    folder = adapter_of(config)
    if config.projector == "full":
        raise config.error("projector", "is full, and a projector that was replaced has no strength to turn down.")
    if write is not None and Path(write).exists():
        raise UserError(f"{write} exists; name a folder that does not.")
    pruned: dict[float, Adapter] = {}
    if write is not None or min(densities) < 1:
        plain = posthoc.read(folder)
        pruned = {density: posthoc.prune(plain, density) for density in densities}
    asked = config.evaluate
    changes: dict[str, Any] = {"drift": asked.drift or TEXTS, "target": asked.validation or asked.target}
    if asked.validation:
        changes["source"] = asked.validation_source or asked.source
    config = config.model_copy(update={"evaluate": asked.model_copy(update=changes)})
    source, target = held_out(config)
    if not target:
        raise config.error("evaluate.target", "must name what is to be learned.")
    check_tasks_of(folder, config, [*source, *target])
    model, processor = loaded(config)
    model = load_adapter(model, folder)
    if (obstacle := fixed(model)) is not None:
        raise UserError(f"{folder} cannot be turned down: {obstacle}.")
    options = asking(config)
    options["prompts"] = drift_prompts(config, model, processor, options["precision"])
    options["progress"] = "adapter" if progress else None
    base = curve(model, processor, source, target, [0.0], **options)
    points = [point | {"density": 1.0} for point in base]
    strengths = sorted({*asked.strengths, 1.0})
    for density in densities:
        if progress and density != 1:
            options["progress"] = f"density {density:g}"
        with nullcontext() if density == 1 else _holding(model, pruned[density]):
            found = curve(model, processor, source, target, strengths, **options)
            for _ in range(asked.refine if asked.strengths else 0):
                if (between := closer([*base, *found], retain)) is None:
                    break
                found += curve(model, processor, source, target, [between], **options)
        found.sort(key=lambda point: point["strength"])
        points += [point | {"density": density} for point in found]
    chosen = within(points, retain) | ({"on": "validation"} if asked.validation else {})
    content: dict[str, Any] = {"schema": 1, "versions": versions(), "points": points, "budget": chosen}
    path = write_json(config.output / DIAL_FILE, content)
    if write is not None and chosen["strength"] is not None:
        density, by = chosen["density"], chosen["strength"]
        edit = {"edit": "scale"} if density == 1 else {"edit": "prune and scale", "density": density}
        made = edit | {"adapters": [str(folder)], "by": by, "retain": retain, "kept": chosen["kept"]}
        posthoc.write(posthoc.scale(pruned[density], by), write, made=made)
    return path, content


@contextmanager
def _holding(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Within the block the linears of ``model`` have the factors of ``adapter``, and afterwards their own again."""
    own = sites(model)
    weights = [weight for pair in adapter.pairs for weight in (own[pair.name].a.weight, own[pair.name].b.weight)]
    before = [weight.detach().clone() for weight in weights]
    factors = [factor for pair in adapter.pairs for factor in (pair.A, pair.B)]
    try:
        _fill(weights, factors)
        yield
    finally:
        _fill(weights, before)


@torch.no_grad()
def _fill(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def plot(content: dict[str, Any], path: str | Path) -> None:
    """One picture, ``.png`` or ``.svg`` by the name of ``path``: target and share kept over strength.

    One line for each density. A star is what was chosen, a dashed line the share that was to be kept.

    Args:
        content: of ``dial.json``.
        path: the file; its folder is made if need be.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed for the numbers

    points, chosen = content["points"], content["budget"]
    by, shares = kept(points)
    base, *others = [point | {"kept": share} for point, share in zip(points, shares, strict=True)]
    densities = list(dict.fromkeys(point["density"] for point in others))
    figure = Figure(figsize=(6, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for key, axes in (("target", above), ("kept", below)):
        for density in densities:
            line = [base, *(point for point in others if point["density"] == density)]
            xs, ys = [point["strength"] for point in line], [100 * point[key] for point in line]
            axes.plot(xs, ys, marker="o", markersize=4, label=f"density {density:g}")
        if chosen["strength"] is not None:
            axes.plot(chosen["strength"], 100 * chosen[key], "k*", markersize=12, label="chosen")
    below.axhline(100 * chosen["retain"], color="0.5", linewidth=1, linestyle="--", zorder=0)
    above.set(ylabel="target, %")
    below.set(xlabel="strength", ylabel=f"kept, by {by}, %")
    above.legend(fontsize="small", frameon=False)
    path = Path(path)
    with whole(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
