"""Edits as runs: the finished adapter of another run, edited by `lorasculpt.posthoc`, in a run folder of its own.

The folder holds what a trained run's holds, so that it is measured and reported as one. Its ``training.json`` is that
of the run it edits: the steps and the seconds are those of the training that it needs, to which an edit adds nothing
worth counting.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import posthoc
from ..adapters.plain import Adapter
from ..config import RunConfig
from ..errors import UserError
from ..posthoc.files import RECORD
from ..run.folder import ADAPTER, LOG_FILE, check_output, write_record

Positive = Annotated[int, Field(ge=1)]


class Edit(BaseModel):
    """An edit and its arguments, which are those of ``lorasculpt posthoc``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    name: ClassVar[str]

    def made(self, config: RunConfig) -> dict[str, Any]:
        """What ``posthoc.json`` says of it, but for the folders and files it was made of."""
        return {"edit": self.name, **self.model_dump(exclude={"rank"})}

    def rank_of(self, adapter: Adapter) -> int | None:
        """The rank of the LoRA that the edited ``adapter`` is written as; None where it stays what it is."""
        return None

    def __call__(self, adapter: Adapter, config: RunConfig) -> Adapter | posthoc.Update:
        """``adapter``, which the run ``config`` is an edit of, edited."""
        raise NotImplementedError


class Scale(Edit):
    """``lorasculpt.posthoc.scale``"""

    name = "scale"
    by: Annotated[float, Field(ge=0)]

    def __call__(self, adapter: Adapter, config: RunConfig) -> Adapter:
        return posthoc.scale(adapter, self.by)


class Prune(Edit):
    """``lorasculpt.posthoc.prune``"""

    name = "prune"
    density: Annotated[float, Field(gt=0, le=1)]

    def __call__(self, adapter: Adapter, config: RunConfig) -> Adapter:
        return posthoc.prune(adapter, self.density)


class Dense(Edit):
    """An edit whose result has no low rank, but is written as a LoRA all the same.

    Args:
        rank: Of that LoRA. Default: as many as the layers have rows or columns, so that nothing is lost; the file is
            then larger than the layers.
    """

    rank: Positive | None = None

    def rank_of(self, adapter: Adapter) -> int:
        return self.rank or max(min(pair.B.shape[0], pair.A.shape[1]) for pair in adapter.pairs)


class Dare(Dense):
    """``lorasculpt.posthoc.dare`` with the run's seed."""

    name = "dare"
    p: Annotated[float, Field(ge=0, lt=1)]
    by: Literal["random", "magnitude"] = "random"
    rescale: bool = True

    def made(self, config: RunConfig) -> dict[str, Any]:
        return super().made(config) | {"seed": config.seed}

    def __call__(self, adapter: Adapter, config: RunConfig) -> posthoc.Update:
        return posthoc.dare(adapter, self.p, seed=config.seed, by=self.by, rescale=self.rescale)


class Tailor(Dense):
    """``lorasculpt.posthoc.model_tailor``, calibrated on the run's training data."""

    name = "tailor"
    keep: Annotated[float, Field(gt=0, le=1)] = 0.1
    limit: Positive = 128
    released: bool = False

    def __call__(self, adapter: Adapter, config: RunConfig) -> posthoc.Update:
        assert config.data.train is not None
        given: dict[str, Any] = {"images": config.data.images, "trust_remote_code": config.trust_remote_code}
        seen = posthoc.calibrate(adapter, config.base, config.data.train, self.limit, **given)
        return posthoc.model_tailor(adapter, *seen, self.keep, released=self.released)


EDITS: dict[str, type[Edit]] = {kind.name: kind for kind in (Scale, Prune, Dare, Tailor)}


def edit_of(config: RunConfig, label: str, name: Any, arguments: dict[str, Any]) -> Edit:
    """The edit that ``methods.<label>`` asks for.

    Raises:
        UserError: for the first mistake, with its line.
    """
    if not isinstance(name, str) or name not in EDITS:
        raise config.error(f"methods.{label}.edit", f"is {name!r}, which is no edit; use one of {', '.join(EDITS)}.")
    kind = EDITS[name]
    try:
        return kind(**arguments)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        key, place = str(mistake["loc"][0]), f"methods.{label}.{mistake['loc'][0]}"
        if mistake["type"] == "missing":
            raise config.error(f"methods.{label}", f"needs {key}, which {name} takes; add it.") from None
        if mistake["type"] == "extra_forbidden":
            listed = ", ".join(["seeds", *kind.model_fields])
            raise config.error(place, f"is no argument of {name}; it takes {listed}.") from None
        must = re.sub(r"^\w+ should (be|have)", r"must \1", mistake["msg"]).replace("valid ", "")
        raise config.error(place, f"{must}; got {mistake['input']!r}.") from None


def ready(parent: Path) -> bool:
    """Whether the run in ``parent`` is trained."""
    return (parent / ADAPTER / "adapter_config.json").is_file()


def apply(edit: Edit, config: RunConfig, parent: Path) -> Path:
    """Edit the adapter of the finished run in ``parent`` into the run ``config``, unless that is done.

    Returns:
        The folder of the adapter.

    Raises:
        UserError: the folder holds something else, or ``parent`` no plain LoRA.
    """
    prepare(edit, config, parent)
    out = config.output / ADAPTER
    if not out.exists():
        made = edit.made(config) | {"adapters": [str(parent / ADAPTER)]}
        adapter = posthoc.read(parent / ADAPTER)
        edited = edit(adapter, config)
        posthoc.write(edited, out, rank=edit.rank_of(adapter), made=made)
    return out


def command(edit: Edit, config: RunConfig, parent: Path) -> str:
    """The shell command that does what :func:`apply` would; the folder it writes into is made."""
    prepare(edit, config, parent)
    words = ["lorasculpt", "posthoc", edit.name, str(parent / ADAPTER)]
    for key, value in edit.made(config).items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif key != "edit":
            words += [f"--{key}", f"{value}"]
    if isinstance(edit, Tailor):
        words += ["--base", config.base, "--data", str(config.data.train)]
        words += ["--images", str(config.data.images)] if config.data.images else []
    if rank := edit.rank_of(posthoc.read(parent / ADAPTER)):
        words += ["--to", "lora", "--rank", str(rank)]
    return shlex.join([*words, "--out", str(config.output / ADAPTER)])


def prepare(edit: Edit, config: RunConfig, parent: Path) -> None:
    """Make the folder of the run ``config`` with everything in it but the adapter.

    Raises:
        UserError: it holds another run, or another edit.
    """
    check_output(config.output, config)
    check(edit, config)
    write_record(config)
    shutil.copy(parent / LOG_FILE, config.output / LOG_FILE)


def check(edit: Edit, config: RunConfig) -> None:
    """Raise `UserError` if the adapter in the folder of the run ``config`` was made by another edit."""
    path = config.output / ADAPTER / RECORD
    if not path.is_file():
        return
    found, wanted = json.loads(path.read_text()), edit.made(config)
    if any(found["made"].get(key) != value for key, value in wanted.items()):
        raise UserError(f"{config.output} holds another edit (see {path}); remove the folder or rename the label.")
