"""Plain LoRA folders in; plain LoRA folders or merged models out, as stock PEFT and transformers load them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ..adapters.load import PROJECTOR_FILE
from ..adapters.origin import check_origin, pass_origin_on
from ..adapters.plain import Adapter, read_adapter, write_pairs
from ..adapters.residual import moved_by
from ..errors import UserError
from ..export import DTYPES, known_dtype, place_of, save_model
from ..models.load import check_mergeable, load, see_as
from ..provenance import versions
from .edits import Update, rounded, truncate

RECORD = "posthoc.json"


@dataclass(frozen=True)
class Written:
    """What was written; ``posthoc.json`` in the folder holds the same."""

    out: str
    to: str  # "lora" or "merged"
    rank: int | None  # of a LoRA
    dtype: str
    loss: float  # ||edited update - written one||_F / ||edited update||_F: the rank's and the rounding's; 0 to about 1
    made: dict[str, Any]  # the edit, as the caller tells it
    versions: dict[str, str]


def read(folder: str | Path) -> Adapter:
    """A plain LoRA folder, of this library or of stock PEFT, that an edit can do justice to.

    Raises:
        UserError: it cannot be read (:func:`lorasculpt.adapters.plain.read_adapter`), holds more than lora_A and
            lora_B, or belongs to a base whose weights were moved when training began (PiSSA, OLoRA and their like).
    """
    adapter = read_adapter(folder)
    more = [*adapter.other, *([PROJECTOR_FILE] if (adapter.folder / PROJECTOR_FILE).is_file() else [])]
    if more:
        raise UserError(f"{folder} also holds {more[0]}, which no edit here covers; use an adapter of factors alone.")
    if (start := moved_by(adapter.config)) is not None:
        raise UserError(
            f"{folder} started with {start}, which moved the base weights; save it as a plain LoRA first (PEFT's "
            "path_initial_model_for_weight_conversion)."
        )
    return adapter


def write(
    edited: Adapter | Update,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    made: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Written:
    """Write what an edit returned. A folder appears under its name when it is complete, or not at all.

    An adapter is written as a plain LoRA. An update is written as a merged model where ``base`` is given, and as the
    nearest LoRA where ``rank`` is. Merging loads the base in fp32: 4 bytes of memory for each of its parameters.

    Args:
        edited: an adapter, or an update of all its layers.
        out: the folder; it must not exist or be empty.
        base: the model to merge an update into, a folder or a name on the Hub.
        rank: of the LoRA that is to come close to an update (see :func:`~lorasculpt.posthoc.truncate`).
        dtype: of a merged model: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None is the base's own.
        made: what is to be written down about how it was made.
        trust_remote_code: run the code that comes with ``base``.

    Raises:
        UserError: ``out`` is taken, not exactly one of ``base`` and ``rank`` is given for an update, one of them or
            ``dtype`` where it has no meaning, or the update does not fit the base.
    """
    out = Path(out)
    place = check_out(out)
    if isinstance(edited, Adapter) and (base is not None or rank is not None):
        raise UserError("This edit leaves a LoRA as it is written; leave out base and rank.")
    if isinstance(edited, Update) and (base is None) == (rank is None):
        raise UserError("This update has no low rank; give either a base to merge it into or the rank of a LoRA.")
    if dtype is not None and (base is None or dtype not in DTYPES):
        raise UserError(f"A dtype is for a merged model and one of {', '.join(DTYPES)}; correct {dtype!r} or omit it.")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as temporary:
        folder = Path(temporary) / place.name
        folder.mkdir()
        if isinstance(edited, Update) and base is not None:
            precision, loss = _write_merged(edited, str(base), folder, dtype, trust_remote_code=trust_remote_code)
        else:
            adapter, loss = truncate(edited, rank or 1) if isinstance(edited, Update) else rounded(edited)
            rank, precision = _write_lora(adapter, folder)
            pass_origin_on(adapter.folder, folder)
        written = Written(
            out=str(out),
            to="merged" if rank is None else "lora",
            rank=rank,
            dtype=precision,
            loss=loss,
            made=dict(made or {}),
            versions=versions(),
        )
        content = json.dumps({"schema": 1, **asdict(written)}, indent=1, allow_nan=False)
        (folder / RECORD).write_text(content + "\n", encoding="utf-8")
        folder.rename(place)
    return written


def check_out(out: Path) -> Path:
    """Where ``out`` leads (`lorasculpt.export.place_of`).

    Raises:
        UserError: it cannot be written; it must not exist or be an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name another one.")
    return place_of(out)


def _write_lora(adapter: Adapter, out: Path) -> tuple[int, str]:
    """Stock files; returns the largest rank and the precision."""
    config = {**adapter.config, "inference_mode": True, "init_lora_weights": True}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_pairs(adapter.pairs, out)
    first = adapter.pairs[0]
    return max(pair.A.shape[0] for pair in adapter.pairs), str(first.A.dtype).removeprefix("torch.")


@torch.no_grad()
def _write_merged(update: Update, base: str, out: Path, dtype: str | None, **trusted: Any) -> tuple[str, float]:
    """The model with the update in its weights; returns its precision, and what rounding to it took from the update."""
    model, processor = load(base, **trusted)
    check_mergeable(model, base)
    check_origin(update.adapter.folder, model)
    see_as(processor, update.adapter.folder)
    dtype = dtype or known_dtype(AutoConfig.from_pretrained(base, **trusted).dtype)
    weights = {name: _weight(model, name, base) for name in update}
    lost, all_ = 0.0, 0.0
    for name, delta in update.items():
        weight = weights[name]
        if weight.shape != delta.shape:
            raise UserError(f"{base} has another shape at {name} than the adapter; is it the base of this adapter?")
        before = weight.clone()
        weight.add_(delta)
        lost += float((weight.to(DTYPES[dtype]).float() - before - delta).square().sum())
        all_ += float(delta.square().sum())
    save_model(model, processor, out, dtype)
    return dtype, math.sqrt(lost / all_) if all_ else 0.0


def _weight(model: nn.Module, name: str, base: str) -> nn.Parameter:
    """The weight of one linear layer of the base, which must be no other layer's as well."""
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{base} has no linear {name}, which the adapter changes; is it the adapter's base?")
    weights = model.named_parameters(remove_duplicate=False)
    shared = [key for key, weight in weights if weight is layer.weight and key != f"{name}.weight"]
    if shared:
        raise UserError(f"{base} uses the weight of {name} as {shared[0]} too, so merging would change both.")
    return layer.weight
