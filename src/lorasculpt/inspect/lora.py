"""What an adapter on disk does to its base model: where its energy goes, how dense it is, which weights it touches.

Reads the files of a plain LoRA folder, one module at a time, and never builds the model. The energy of an update is
||(alpha/r) BA||_F². It and the stable rank ||BA||_F² / ||BA||_2² follow from two r x r Gram matrices:

    ||BA||_F² = tr(BᵀB · AAᵀ),    the squared singular values of BA are the eigenvalues of BᵀB · AAᵀ

The product itself is formed by blocks of rows, and only to count its non-zeros and to hold it against the base weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from .. import files
from ..adapters.folder import folder_of
from ..adapters.load import check_family
from ..adapters.origin import check_same, comparable, kept, recorded
from ..adapters.plain import Pair, read_adapter
from ..console import numbers
from ..errors import UserError
from ..files import read_json
from ..models.weights import BaseWeights
from ..ops.conflict import awareness
from ..ops.density import density, expected_density, product_density, redundancy_curve
from .places import order, place
from .update import config_of

SHARES = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the entries at which the redundancy curves are read."""
LARGE = 0.1
"""The share of the base weights that counts as large."""
OMEGA = 1.0
"""Steepness of LoRASculpt's M; the paper's default."""
SAMPLE = 2**19
"""Entries of BA that its redundancy curve is drawn from: as many random rows as hold about so many."""
OF_BASE = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
"""The files of a base that are read, by their names on the Hub."""
BLOCK = 2**22
"""Entries of a product or of a base weight worked on at a time."""


@dataclass(frozen=True)
class Measures:
    """What is measured of one module, or of several together. Everything but energy and ranks is a share in [0, 1].

    Densities of several modules are over all their entries; their overlap and ``m_update`` are over all their energy;
    what has no natural sum (stable rank, concentration, curves) is the plain mean over modules.
    """

    modules: int
    size: int  # entries of the update, out * in
    size_a: int
    size_b: int
    density_a: float
    density_b: float
    density_ba: float
    expected_ba: float  # 1 - (1 - s_A s_B)^r with the measured s_A and s_B
    energy: float  # ||(alpha/r) BA||_F²
    share: float  # of the adapter's energy
    stable_rank: float  # ||BA||_F² / ||BA||_2², between 1 and r; 0 for an update of zeros
    used_rows: float  # rows of B with a non-zero
    used_columns: float  # columns of A with a non-zero
    used_ranks: float  # rank indices with a non-zero in both factors
    curve_a: tuple[float, ...]  # share of the norm kept at each of SHARES
    curve_b: tuple[float, ...]
    curve_ba: tuple[float, ...]  # from a sample of rows
    overlap: float | None = None  # share of the energy on the largest 10 % of |W|; 0.1 would be no preference
    m_update: float | None = None  # LoRASculpt's M = tanh(omega |1 / ln(|W| / ||W||_F)|), mean weighted by energy
    m_plain: float | None = None  # its plain mean over the entries of W


@dataclass(frozen=True)
class Layer:
    """One adapted module."""

    name: str
    part: str  # "language_model", "vision_tower", ...; "model" where there is one part only
    kind: str  # "q_proj"; "language_model.q_proj" where the adapter is in several parts
    block: int | None  # which decoder or encoder layer; None outside of them
    out_features: int
    in_features: int
    r: int
    scaling: float
    measures: Measures


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    folder: str
    base: str | None
    method: str | None  # from lorasculpt.json; None for a plain LoRA
    layers: tuple[Layer, ...]
    kinds: dict[str, Measures]  # modules of one kind together
    total: Measures
    other: tuple[str, ...]  # tensors in the file that are no LoRA factors and were not measured

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"schema": 1, "shares": list(SHARES), "large": LARGE, "omega": OMEGA, **asdict(self)}


def inspect(adapter_folder: str | Path, base: str | Path | None = None, *, fetch: bool = True) -> Inspection:
    """Measure a plain LoRA adapter, and with ``base`` hold its update against the pretrained weights.

    Args:
        adapter_folder: a folder with ``adapter_config.json`` (peft_type LORA) and ``adapter_model.safetensors``.
        base: the base model, a folder or a name on the Hub. Only the adapted weights are read from its safetensors
            files.
        fetch: whether a base that is not whole in the Hub's cache on this disk is fetched.

    Raises:
        UserError: the adapter cannot be read (`lorasculpt.adapters.plain`), or the base is not the adapter's.
    """
    other = config_of(adapter_folder)
    if other is not None:
        raise UserError(
            f"{adapter_folder} is a {other.method} adapter, no plain LoRA; lorasculpt.inspect.update.inspect shows it."
        )
    adapter = read_adapter(adapter_folder)
    weights = _weights(base, fetch) if base is not None else None
    if weights is not None and (weights.folder / "config.json").is_file():
        told = read_json(weights.folder / "config.json")
        check_family(adapter.folder, told.get("model_type"), told.get("architectures") or [])
    keys = weights.match(pair.name for pair in adapter.pairs) if weights else {}
    if weights is not None and (said := recorded(adapter.folder)) is not None:
        check_same(adapter.folder, said, kept((f"{name}.weight", weights.read(key)) for name, key in keys.items()))
    layers = []
    for pair in adapter.pairs:
        against = _against(pair, weights, keys[pair.name], adapter.config) if weights else {}
        layers.append(_layer(pair, _measure(pair, against)))
    energy = math.fsum(layer.measures.energy for layer in layers)
    if energy:
        layers = [replace(x, measures=replace(x.measures, share=x.measures.energy / energy)) for x in layers]
    if len({layer.part for layer in layers}) > 1:
        layers = [replace(x, kind=f"{x.part}.{x.kind}") for x in layers]
    groups: dict[str, list[Measures]] = {}
    for layer in sorted(layers, key=lambda x: order(x.part, x.kind)):
        groups.setdefault(layer.kind, []).append(layer.measures)
    own = Path(adapter_folder) / "lorasculpt.json"
    return Inspection(
        folder=str(adapter_folder),
        base=None if base is None else str(base),
        method=read_json(own).get("method") if own.is_file() else None,
        layers=tuple(layers),
        kinds={kind: together(group) for kind, group in groups.items()},
        total=together([layer.measures for layer in layers]),
        other=adapter.other,
    )


def _weights(base: str | Path, fetch: bool) -> BaseWeights:
    """Those of ``base``. What is in the cache goes before what the Hub has by now: it is what was trained on."""
    try:
        return BaseWeights.open(folder_of(base, OF_BASE, local_files_only=True))
    except UserError:
        if not fetch:
            raise
    return BaseWeights.open(folder_of(base, OF_BASE))


def _measure(pair: Pair, against: dict[str, float]) -> Measures:
    A, B = pair.A.float(), pair.B.float()
    (r, q), p = A.shape, B.shape[0]
    s_a, s_b = density(A), density(B)
    squares = _squared_singular_values(B, A)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(p, generator=generator)[: max(1, SAMPLE // q)]
    return Measures(
        modules=1,
        size=p * q,
        size_a=r * q,
        size_b=p * r,
        density_a=s_a,
        density_b=s_b,
        density_ba=product_density(B, A, BLOCK),
        expected_ba=expected_density(s_a, s_b, r),
        energy=pair.scaling**2 * float(squares.sum()),
        share=0.0,
        stable_rank=float(squares.sum() / squares.max()) if squares.max() > 0 else 0.0,
        used_rows=density(B.any(1)),
        used_columns=density(A.any(0)),
        used_ranks=density(B.any(0) & A.any(1)),
        curve_a=tuple(redundancy_curve(A, SHARES)),
        curve_b=tuple(redundancy_curve(B, SHARES)),
        curve_ba=tuple(redundancy_curve(B[rows] @ A, SHARES)),
        **against,
    )


def _squared_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Of BA, (r,): eigenvalues of BᵀB · AAᵀ, made symmetric with the square root of AAᵀ."""
    B, A = B.double(), A.double()
    values, vectors = torch.linalg.eigh(A @ A.T)
    root = vectors * values.clamp(min=0).sqrt()  # AAᵀ = root rootᵀ
    return torch.linalg.eigvalsh(root.T @ (B.T @ B) @ root).clamp(min=0)


def _against(pair: Pair, weights: BaseWeights, key: str, config: dict[str, Any]) -> dict[str, float]:
    """``overlap``, ``m_update`` and ``m_plain`` of one module; the first two are left out for an update of zeros."""
    W = weights.read(key)
    if not comparable(W):
        raise UserError(f"{weights.folder}: {key} is stored as {W.dtype}; give the base model before quantisation.")
    if config.get("fan_in_fan_out"):
        W = W.T
    shape = (pair.B.shape[0], pair.A.shape[1])
    if tuple(W.shape) != shape:
        raise UserError(
            f"{weights.folder}: {key} is {tuple(W.shape)}, but the adapter's {pair.name} needs {shape}; name the model "
            "it was trained on."
        )
    W = W.float()
    if not torch.isfinite(W).all():
        raise UserError(f"{weights.folder}: {key} has values that are not finite; copy the base model again.")
    norm = torch.linalg.vector_norm(W, dtype=torch.float64).float().clamp(min=torch.finfo(torch.float32).tiny)
    large = max(1, int(LARGE * W.numel()))
    threshold = float(np.partition(W.abs().flatten().numpy(), W.numel() - large)[-large])
    above = equal = 0
    energy = energy_above = energy_equal = m_energy = m_sum = 0.0
    rows = max(1, BLOCK // W.shape[1])
    for block, B in zip(W.split(rows), pair.B.float().split(rows), strict=True):
        squares = (B @ pair.A.float()).square_()
        magnitude, M = block.abs(), awareness(block, norm, OMEGA)
        over, tied = magnitude > threshold, magnitude == threshold
        above, equal = above + int(over.sum()), equal + int(tied.sum())
        energy += float(squares.sum(dtype=torch.float64))
        energy_above += float(squares[over].sum(dtype=torch.float64))
        energy_equal += float(squares[tied].sum(dtype=torch.float64))
        m_energy += float((squares * M).sum(dtype=torch.float64))
        m_sum += float(M.sum(dtype=torch.float64))
    m_plain = m_sum / W.numel()
    if not energy:
        return {"m_plain": m_plain}
    # bf16 weights are often tied at the threshold; the tied ones count in proportion, so that exactly 10 % are large
    overlap = (energy_above + energy_equal * (large - above) / equal) / energy
    return {"overlap": overlap, "m_update": m_energy / energy, "m_plain": m_plain}


def _layer(pair: Pair, measures: Measures) -> Layer:
    part, kind, block = place(pair.name)
    return Layer(
        name=pair.name,
        part=part,
        kind=kind,
        block=block,
        out_features=pair.B.shape[0],
        in_features=pair.A.shape[1],
        r=pair.A.shape[0],
        scaling=pair.scaling,
        measures=measures,
    )


def together(group: Sequence[Measures]) -> Measures:
    """Several modules as one; how each field is combined is said at :class:`Measures`."""

    def by(weight: str, field: str) -> Any:
        pairs = [(getattr(m, weight), getattr(m, field)) for m in group if getattr(m, field) is not None]
        total = math.fsum(w for w, _ in pairs)
        return math.fsum(w * value for w, value in pairs) / total if total else None

    def mean(field: str) -> Any:
        return np.mean([getattr(m, field) for m in group], axis=0).tolist()

    return Measures(
        modules=len(group),
        size=sum(m.size for m in group),
        size_a=sum(m.size_a for m in group),
        size_b=sum(m.size_b for m in group),
        density_a=by("size_a", "density_a"),
        density_b=by("size_b", "density_b"),
        density_ba=by("size", "density_ba"),
        expected_ba=by("size", "expected_ba"),
        energy=math.fsum(m.energy for m in group),
        share=math.fsum(m.share for m in group),
        stable_rank=mean("stable_rank"),
        used_rows=mean("used_rows"),
        used_columns=mean("used_columns"),
        used_ranks=mean("used_ranks"),
        curve_a=tuple(mean("curve_a")),
        curve_b=tuple(mean("curve_b")),
        curve_ba=tuple(mean("curve_ba")),
        overlap=by("energy", "overlap"),
        m_update=by("energy", "m_update"),
        m_plain=by("size", "m_plain"),
    )


# --- showing --------------------------------------------------------------------------------------------------------


def write_json(inspection: Inspection, path: str | Path) -> None:
    """Everything that was measured, as JSON."""
    files.write_json(path, inspection.to_dict(), nan=False)


def show(inspection: Inspection, *, layers: bool = False, console: Console | None = None) -> None:
    """Print the measurements by kind of module, or of every module with ``layers``."""
    console = console or Console()
    rows = [(x.name, x.measures) for x in inspection.layers] if layers else list(inspection.kinds.items())
    total = inspection.total
    title = f"{inspection.folder} ({inspection.method or 'LoRA'}, {total.modules} modules)"
    _table(console, title, OF_UPDATE, rows, total)
    console.print(
        "In percent, but the stable rank. energy: share of ||(alpha/r) BA||²; A, B, BA: entries that are not zero; "
        "expected: those of BA if the kept entries lay at random; rows of B, columns of A and ranks that are used.",
        style="dim",
    )
    if inspection.base is not None:
        console.print()
        _table(console, f"On the weights of {inspection.base}", ON_BASE, rows, total)
        console.print(
            f"on large |W|: percent of the energy on the largest {LARGE:.0%} of the base weights, {100 * LARGE:g} "
            "being no preference; M: how much LoRASculpt takes a weight to hold, where the update is and everywhere.",
            style="dim",
        )
    if inspection.other:
        console.print(f"Not measured: {', '.join(inspection.other[:5])}{' ...' if len(inspection.other) > 5 else ''}")


# Heads, with what stands below them and how it is written; two tables, because one is wider than a terminal.
Column = tuple[Callable[[Measures], float | None], str]
OF_UPDATE: dict[str, Column] = {
    "energy": (lambda m: 100 * m.share, ".1f"),
    "A": (lambda m: 100 * m.density_a, ".1f"),
    "B": (lambda m: 100 * m.density_b, ".1f"),
    "BA": (lambda m: 100 * m.density_ba, ".1f"),
    "expected": (lambda m: 100 * m.expected_ba, ".1f"),
    "stable rank": (lambda m: m.stable_rank, ".1f"),
    "rows": (lambda m: 100 * m.used_rows, ".0f"),
    "cols": (lambda m: 100 * m.used_columns, ".0f"),
    "ranks": (lambda m: 100 * m.used_ranks, ".0f"),
}
ON_BASE: dict[str, Column] = {
    "on large |W|": (lambda m: None if m.overlap is None else 100 * m.overlap, ".1f"),
    "M update": (lambda m: m.m_update, ".3f"),
    "M plain": (lambda m: m.m_plain, ".3f"),
}


def _table(
    console: Console, title: str, columns: Mapping[str, Column], rows: Sequence[tuple[str, Measures]], total: Measures
) -> None:
    """A row for each of ``rows`` and one for all."""
    table = numbers("module", *columns, title=title)
    for name, measures in [*rows, ("all", total)]:
        if name == "all":
            table.add_section()
        values = [(value(measures), form) for value, form in columns.values()]
        cells = ["-" if value is None else format(value, form) for value, form in values]
        table.add_row(name, *cells, style="bold" if name == "all" else None)
    console.print(table)
