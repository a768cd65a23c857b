"""Every run that a comparison can have: trials of learning rates, the rates that these choose, and tests at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..files import write_text
from .edits import Edit
from .labels import CHOICES, Label

RATES = (2e-4, 5e-4, 1.5e-3)


@dataclass(frozen=True)
class Run:
    """One run of a comparison: the method called ``label`` at a learning rate, and everything else about it.

    With ``edit`` it is not trained: the adapter of the run in the folder ``of`` is edited.
    """

    label: str
    rate: float
    config: RunConfig
    edit: Edit | None = None
    of: Path | None = None

    @property
    def name(self) -> str:
        """Its folder in that of the comparison."""
        return "/".join(self.config.output.parts[-2:])

    @property
    def group(self) -> str:
        """``"validation"``, where it is there to choose a rate, or ``"test"``."""
        return self.config.output.parent.name

    @property
    def trial(self) -> bool:
        """Whether it is there to choose a rate."""
        return self.group == "validation"

    @property
    def kind(self) -> tuple[str, str]:
        """What decides its cost: whether it is a trial, a test or an edit, and its label."""
        return "edit" if self.edit else self.group, self.label

    def write(self) -> Path:
        """Write its YAML file, beside its folder."""
        return write_text(Path(f"{self.config.output}.yaml"), self.config.to_yaml())


def trials(common: RunConfig, labels: Mapping[str, Label]) -> list[Run]:
    """The runs that choose the rates, of what they have in ``common``; none where there is one rate."""
    return [
        _run(common, "validation", label, what, rate, common.seed)
        for label, what in labels.items()
        if len(what.rates) > 1
        for rate in what.rates
    ]


def numbers(config: RunConfig) -> tuple[str, ...]:
    """The numbers that are told of a trial; the first is of the base alone."""
    if config.evaluate.source:
        return "source_before", "source_after", "target_after", "h_mean"
    return "target_before", "target_after", "kept"


def choose(labels: Mapping[str, Label], tried: Mapping[str, Mapping[float, dict[str, Any]]]) -> dict[str, dict]:
    """By label what each rate did on the validation set, and the rate that is ``chosen`` (None: not yet known).

    It is the one that is best ``by`` the target, or by the number that the label names, of those with which the
    weights stayed finite. A label that takes the rate of another, or chooses among its trials, says of which: ``like``.

    Args:
        labels: Those that are compared.
        tried: By label and rate the scores of the trials that are there.
    """

    def chosen(label: str, by: str | None) -> float | None:
        what = labels[label]
        by = by or what.by
        if what.like:
            return chosen(what.like, by)
        if len(what.rates) == 1:
            return what.rates[0]
        return _best(tried[label], by or "target") if len(tried[label]) == len(what.rates) else None

    return {
        label: {
            "validation": {f"{rate:g}": scores for rate, scores in tried[label].items()},
            "chosen": chosen(label, None),
            **({"like": what.like} if what.like else {}),
            **({"by": what.by} if what.by else {}),
        }
        for label, what in labels.items()
    }


def tests(common: RunConfig, labels: Mapping[str, Label], rates: Mapping[str, float | None]) -> list[Run]:
    """The runs at the ``rates`` that are chosen already, of what they have in ``common``, in the order of `wanted`."""
    found = [(label, rates[label], seed) for label, seed in wanted(labels, common.seed)]
    return [_run(common, "test", label, labels[label], rate, seed) for label, rate, seed in found if rate is not None]


def wanted(labels: Mapping[str, Label], first: int) -> list[tuple[str, int]]:
    """Label and seed of every test in the order of making: all with the ``first`` seed before any with the next.

    Of one seed, edits come after what they are edits of.
    """
    edits_last = sorted(labels, key=lambda label: labels[label].edit is not None)
    most = max(what.seeds for what in labels.values())
    return [(label, first + n) for n in range(most) for label in edits_last if n < labels[label].seeds]


def _best(tried: Mapping[float, dict[str, Any]], by: str) -> float | None:
    """The rate with the highest score, the lowest of equals; None where no rate has any."""
    scored = {rate: score[CHOICES[by]] for rate, score in tried.items() if score[CHOICES[by]] is not None}
    return max(scored, key=scored.__getitem__, default=None)


def _run(common: RunConfig, group: str, label: str, what: Label, rate: float, seed: int) -> Run:
    def folder(label: str | None) -> Path:
        return common.output / group / f"{label}-lr{rate:g}-seed{seed}"

    made = common.single(
        label,
        what.method,
        seed=seed,
        output=folder(label),
        data=common.data.model_copy(update={"replay": what.replay}),
        training=common.training.model_copy(update={"lr": rate}),
    )
    return Run(label, rate, made, what.edit, folder(what.like) if what.edit else None)
