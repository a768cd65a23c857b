"""What a label of a comparison stands for: a method with its settings, or an edit of what another label has learned.

```yaml
methods:
  lora: {seeds: 5}
  sparser: {name: lorasculpt, density: 0.05}
  sparsest: {name: lorasculpt, density: 0.02, lr: sparser}   # at the rate that sparser chose
  gentle: {name: lora, lr: 2e-4}                             # at this rate
  whole: {name: spider, rates: [2e-5, 5e-5, 2e-4]}           # at the best of these
  both: {name: lora, lr: lora, by: h_mean}                   # of the rates that lora tried, by source and target
  replay: {name: lora, replay: 0.1}                          # with a tenth of general data (data.general)
  dare: {of: lora, edit: dare, p: 0.5}                       # no training: the adapters of lora, edited
```
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from ..adapters.residual import EXACTLY, moved_by
from ..adapters.update import UpdateConfig
from ..config import RunConfig
from ..errors import UserError
from ..kinds import KINDS, started, taken_over
from ..run.model import check_method
from .edits import EDITS, Edit, edit_of

SAID = ("lr", "rates", "by", "seeds", "replay")  # what a label may say beside the settings of its method
# What a learning rate is chosen by: the name of each in the summary of a trial
CHOICES = {"target": "target_after", "h_mean": "h_mean"}


@dataclass(frozen=True)
class Label:
    """What is compared under one name.

    Args:
        method: ``name`` and settings; of an edit, those of what it edits.
        seeds: How many, from the run's upwards.
        rates: The learning rates that it chooses from, or the one that it has; none where there is ``like``.
        like: The label whose learning rate it takes; of an edit, whose adapters.
        by: What its learning rate is chosen by, one of ``CHOICES``; with ``like`` among the trials of that label.
            Default: the target, or with ``like`` whatever that label chose.
        edit: What is done to these adapters in place of training.
        replay: Its ``data.replay``.
    """

    method: dict[str, Any]
    seeds: int
    rates: tuple[float, ...] = ()
    like: str | None = None
    edit: Edit | None = None
    replay: float | None = None
    by: str | None = None


def read(config: RunConfig, names: Sequence[str], seeds: int, rates: Sequence[float]) -> dict[str, Label]:
    """The labels called ``names``, in this order, each as ``config.methods`` explains it.

    Args:
        config: The run that all have in common.
        names: Of methods (`lorasculpt.kinds`), or of your own.
        seeds: How many a label has that says nothing of it; an edit has those of what it edits.
        rates: The learning rates of a label that says nothing of them.

    Raises:
        UserError: for the first mistake, with its line.
    """
    found: dict[str, Label] = {}
    for name in sorted(names, key=lambda name: "of" in config.methods.get(name, {})):  # edits last
        found[name] = _label(config, name, names, seeds, rates, found)
    return {name: found[name] for name in names}


def _label(
    config: RunConfig,
    label: str,
    names: Sequence[str],
    seeds: int,
    rates: Sequence[float],
    found: dict[str, Label],
) -> Label:
    if not re.fullmatch(r"[\w-][\w.-]*", label):
        raise UserError(f"{label!r} cannot be compared: it names folders; use letters, digits, -, _ and dots within.")
    said = config.methods.get(label, {})
    if "edit" in said or "of" in said:
        return _edited(config, label, said, names, found)
    settings = {key: value for key, value in said.items() if key not in SAID}
    method = _method(config, label, settings)
    check_method(config.single(label, method))
    own, like = _rates(config, label, said, names, rates)
    by = said.get("by")
    known = isinstance(by, str) and by in CHOICES
    if by is not None and (not known or len(own) == 1):
        mend = "chooses nothing: lr is given" if known else f"must be one of {', '.join(CHOICES)}; got {by!r}"
        raise config.error(f"methods.{label}.by", f"{mend}.")
    if by == "h_mean" and not config.evaluate.source:
        raise config.error(f"methods.{label}.by", "is h_mean, which needs the source; name evaluate.source.")
    replay = _replay(config, label, said)
    return Label(method, _seeds(config, label, said, seeds), own, like, replay=replay, by=by)


def _method(config: RunConfig, label: str, given: dict[str, Any]) -> dict[str, Any]:
    """The ``method`` of a run of ``label``: what is ``given``, else what it can take over from the run's own."""
    name = given.get("name", label)
    if not isinstance(name, str) or name not in KINDS:
        listed = ", ".join(KINDS)
        if "name" in given:
            raise config.error(f"methods.{label}.name", f"is {name!r}, which is no method; use one of {listed}.")
        if label in config.methods:
            raise config.error(f"methods.{label}", f"needs the name of a method: {listed}; or of and edit.")
        raise UserError(f"--methods: {label!r} is no method; use some of {listed}, or a name given under methods.")
    return {**taken_over(config.method, name), **given, "name": name}


def _edited(
    config: RunConfig, label: str, said: dict[str, Any], names: Sequence[str], found: dict[str, Label]
) -> Label:
    """The label of an edit; the labels that are trained are ``found`` already."""
    for key, mend in (("of", "the label whose adapters are edited"), ("edit", f"one of {', '.join(EDITS)}")):
        if key not in said:
            raise config.error(f"methods.{label}", f"needs {key}: {mend}.")
    of = _other(config, label, "of", said["of"], names)
    if "of" in config.methods.get(of, {}):
        raise config.error(f"methods.{label}.of", f"is {of!r}, which is an edit itself; name a label that is trained.")
    parent = found[of]
    kind, settings = KINDS[parent.method["name"]], started(parent.method)
    start = moved_by(settings)
    plain = issubclass(kind, LoraConfig) and not issubclass(kind, UpdateConfig) and not settings.get("use_dora")
    if not plain or (start is not None and not start.startswith(EXACTLY)) or config.projector == "full":
        raise config.error(f"methods.{label}.of", f"is {of!r}, which leaves no plain LoRA; edits are of plain LoRAs.")
    seeds = _seeds(config, label, said, parent.seeds)
    if seeds > parent.seeds:
        raise config.error(f"methods.{label}.seeds", f"is {seeds}, but {of}, which it edits, has {parent.seeds}.")
    arguments = {key: value for key, value in said.items() if key not in ("of", "edit", "seeds")}
    edit = edit_of(config, label, said["edit"], arguments)
    return Label(parent.method, seeds, like=of, edit=edit, replay=parent.replay)


def mistaken(rates: Any) -> str | None:
    """What is wrong with ``rates`` to choose from."""
    if not isinstance(rates, Sequence) or not all(_number(rate) and rate > 0 for rate in rates):
        return "must be numbers above 0, such as 2e-4,5e-4,1.5e-3"
    if not 1 <= len(rates) <= 3 or len(set(rates)) < len(rates):
        return "must be one to three different learning rates: every method gets the same tries"
    return None


def _rates(
    config: RunConfig, label: str, said: dict[str, Any], names: Sequence[str], rates: Sequence[float]
) -> tuple[tuple[float, ...], str | None]:
    """The learning rates of ``label``, or the label that it takes its own from."""
    if "rates" in said:
        if "lr" in said:
            raise config.error(f"methods.{label}", "has both lr and rates; remove one.")
        if mistake := mistaken(said["rates"]):
            raise config.error(f"methods.{label}.rates", f"{mistake}.")
        rates = said["rates"]
    if "lr" not in said:
        return tuple(sorted(rates)), None
    rate = said["lr"]
    if isinstance(rate, str):
        like = _other(config, label, "lr", rate, names)
        other = config.methods.get(like, {})
        if "of" in other or isinstance(other.get("lr"), str):
            raise config.error(f"methods.{label}.lr", f"is {like!r}, which takes its own from another; name that one.")
        return (), like
    if not _number(rate) or rate <= 0:
        raise config.error(f"methods.{label}.lr", f"must be a number above 0 or another label; got {rate!r}.")
    return (rate,), None


def _other(config: RunConfig, label: str, key: str, other: Any, names: Sequence[str]) -> str:
    """``other``, which must be compared too."""
    if other == label or other not in names:
        mend = "name another label" if other == label else "add it to --methods, or name one that is"
        raise config.error(f"methods.{label}.{key}", f"is {other!r}, which is not compared; {mend}.")
    return other


def _seeds(config: RunConfig, label: str, said: dict[str, Any], default: int) -> int:
    seeds = said.get("seeds", default)
    if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
        raise config.error(f"methods.{label}.seeds", f"must be a whole number of at least 1; got {seeds!r}.")
    return seeds


def _replay(config: RunConfig, label: str, said: dict[str, Any]) -> float | None:
    share = said.get("replay", config.data.replay)
    if share is None:
        return None
    if not _number(share) or not 0 < share < 1:
        raise config.error(f"methods.{label}.replay", f"must be a share between 0 and 1, or null; got {share!r}.")
    if config.data.general is None:
        raise config.error(f"methods.{label}.replay", "needs general data to take rows from; name it in data.general.")
    return share


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
