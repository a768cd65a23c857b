"""What an adapter on disk does to its base model: where its energy goes, how dense it is, which weights it touches.

Reads the files of a plain LoRA folder, one module at a time, and never builds the model. The energy of an update is
||(alpha/r) BA||_F². It and the stable rank ||BA||_F² / ||BA||_2² follow from two r x r Gram matrices:

    ||BA||_F² = tr(BᵀB · AAᵀ),    the squared singular values of BA are the eigenvalues of BᵀB · AAᵀ

The product itself is formed by blocks of rows, and only to count its non-zeros and to hold it against the base weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from . import files
from .adapters.load import check_family
from .console import numbers
from .errors import UserError
from .ops.conflict import awareness
from .ops.density import density, expected_density, product_density, redundancy_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the entries at which the redundancy curves are read."""
LARGE = 0.1
"""The share of the base weights that counts as large."""
OMEGA = 1.0
"""Steepness of LoRASculpt's M; the paper's default."""
SAMPLE = 2**19
"""Entries of BA that its redundancy curve is drawn from: as many random rows as hold about so many."""
BLOCK = 2**22
"""Entries of a product or of a base weight worked on at a time."""

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# settings with which the update is something other than (alpha/r) BA
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
)


# --- reading an adapter ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The two factors of one adapted linear layer: the update of its weight is ``scaling * B @ A``."""

    name: str  # of the module in the model, "model.layers.0.self_attn.q_proj"
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA folder: its configuration, its factor pairs in the model's order, and the names of other tensors."""

    folder: Path
    config: dict[str, Any]
    pairs: tuple[Pair, ...]
    other: tuple[str, ...]


def read_config(folder: str | Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter that is a LoRA on disk.

    Raises:
        UserError: there is no adapter, its configuration is no JSON object, or it is of another PEFT type.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter: adapter_config.json is missing, name the folder that has it.")
    config = _json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{path} has the peft_type {kind!r}, whose update is no single product BA; only LORA can be read here."
        )
    return config


def read_adapter(folder: str | Path) -> Adapter:
    """Read a plain LoRA folder, written by this library or by stock PEFT.

    ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` are honoured.

    Raises:
        UserError: no LoRA adapter in the folder, a file that cannot be read, a variant such as DoRA, a factor without
            its partner, shapes that do not fit together or to the configuration, or values that are not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    variants = [name for name in VARIANTS if config.get(name)]
    if variants:
        raise UserError(
            f"{folder / 'adapter_config.json'} sets {variants[0]}, so its update is more than (alpha/r) BA."
        )
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors; save the adapter again with safetensors.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); it may be cut short, copy it again.") from None

    factors: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            other.append(key)
            continue
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} has values that are not finite in {key}; use an earlier checkpoint.")
        factors.setdefault(match[1], {})[match[2]] = tensor
    if not factors:
        raise UserError(f"{path} has no lora_A and lora_B tensors; is it the adapter you meant?")
    pairs = tuple(_pair(path, config, name, factors[name]) for name in sorted(factors, key=_natural))
    return Adapter(folder, config, pairs, tuple(sorted(other)))


def _pair(path: Path, config: dict[str, Any], name: str, found: dict[str, Tensor]) -> Pair:
    if len(found) < 2:
        missing = "lora_B" if "A" in found else "lora_A"
        raise UserError(f"{path} has no {missing} for {name}; save the adapter again.")
    A, B = found["A"], found["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise UserError(
            f"{path}: {name} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, which are no factors of a linear."
        )
    r = int(_for_module(config.get("rank_pattern"), name, config.get("r")))
    if A.shape[0] != r:
        raise UserError(
            f"{path}: {name} has rank {A.shape[0]}, but adapter_config.json says {r}; they do not belong together."
        )
    alpha = float(_for_module(config.get("alpha_pattern"), name, config.get("lora_alpha")))
    return Pair(name, A, B, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _for_module(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's name or, as a regular expression, the end of it."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return content


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


# --- finding the base weight of a module ----------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseWeights:
    """The tensors of a Hugging Face model folder, read one by one from its safetensors shards."""

    folder: Path
    shards: dict[str, Path]  # tensor name -> the shard it is in

    @classmethod
    def open(cls, folder: str | Path) -> BaseWeights:
        """List the tensors of ``folder``; none is read yet.

        Raises:
            UserError: no such folder, or no safetensors weights in it.
        """
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = {key: folder / name for key, name in _json(index).get("weight_map", {}).items()}
        elif (folder / "model.safetensors").is_file():
            with _opened(folder / "model.safetensors") as file:
                shards = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise UserError(
                f"{folder} has no model.safetensors; the base must be a local folder with the model's weights."
            )
        return cls(folder, shards)

    def match(self, names: Iterable[str]) -> dict[str, str]:
        """The weight that belongs to each module, though prefixes may differ between versions of transformers.

        A candidate has the same layer numbers in the same order. Among the candidates the longest common end of the
        dotted names wins, then the larger number of words shared by what stands before it (``language_model`` or
        ``vision_tower``, say).

        Raises:
            UserError: a module has no weight here, several that fit equally well, or shares one with another module.
        """
        weights = [(key, _words(key)) for key in self.shards if key.endswith(".weight")]
        by_numbers: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
        for key, words in weights:
            by_numbers.setdefault((words[-1], *filter(str.isdigit, words)), []).append((key, words))
        found: dict[str, str] = {}
        for name in names:
            own = name.split(".")
            best: list[str] = []
            high = (0, 0)
            for key, words in by_numbers.get((own[-1], *filter(str.isdigit, own)), []):
                score = _likeness(own, words)
                if score > high:
                    best, high = [key], score
                elif score == high:
                    best.append(key)
            if len(best) != 1:
                what = f"both {best[0]} and {best[1]}" if best else "no weight"
                raise UserError(f"{self.folder} has {what} for the adapter's {name}; is it the base of this adapter?")
            if best[0] in found.values():
                raise UserError(f"{self.folder} has one weight {best[0]} for {name} and another module of the adapter.")
            found[name] = best[0]
        return found

    def read(self, key: str) -> Tensor:
        """One tensor, as it is stored."""
        with _opened(self.shards[key]) as file:
            return file.get_tensor(key)


def _words(key: str) -> list[str]:
    return key.removesuffix(".weight").split(".")


def _likeness(a: list[str], b: list[str]) -> tuple[int, int]:
    """Length of the common end, and how many different words what stands before it has in common."""
    end = next(
        (i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b))
    )
    return end, len({*a[: len(a) - end]} & {*b[: len(b) - end]})


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); it may be missing or cut short.") from None


# --- measuring ------------------------------------------------------------------------------------------------------


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


def inspect(adapter_folder: str | Path, base: str | Path | None = None) -> Inspection:
    """Measure a plain LoRA adapter, and with ``base`` hold its update against the pretrained weights.

    Args:
        adapter_folder: a folder with ``adapter_config.json`` (peft_type LORA) and ``adapter_model.safetensors``.
        base: local folder of the base model. Only the adapted weights are read from its safetensors files.

    Raises:
        UserError: the adapter cannot be read (see :func:`read_adapter`), or the base is not the adapter's.
    """
    adapter = read_adapter(adapter_folder)
    weights = BaseWeights.open(base) if base is not None else None
    if weights is not None and (weights.folder / "config.json").is_file():
        told = _json(weights.folder / "config.json")
        check_family(adapter.folder, told.get("model_type"), told.get("architectures") or [])
    keys = weights.match(pair.name for pair in adapter.pairs) if weights else {}
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
        method=_json(own).get("method") if own.is_file() else None,
        layers=tuple(layers),
        kinds={kind: _together(group) for kind, group in groups.items()},
        total=_together([layer.measures for layer in layers]),
        other=adapter.other,
    )


def order(part: str, kind: str) -> tuple[str, int, str]:
    """Sort key of kinds of module: as a decoder layer uses them, the others by name after them."""
    word = kind.rpartition(".")[2]
    return part, KINDS.index(word) if word in KINDS else len(KINDS), kind


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
    if not W.is_floating_point():
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


def place(name: str) -> tuple[str, str, int | None]:
    """(part, kind, block) of a module, as at :class:`Layer`."""
    words = name.split(".")
    first = next((i for i, word in enumerate(words[:-1]) if word.isdigit()), None)
    # without its last word: the list the number counts in ("layers"), or the module itself
    before = [word for word in words[: len(words) if first is None else first][:-1] if word != "model"]
    return (
        before[0] if before else "model",
        ".".join(words[-2:]) if words[-1].isdigit() else words[-1],
        None if first is None else int(words[first]),
    )


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


def _together(group: Sequence[Measures]) -> Measures:
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


def plot(inspection: Inspection, path: str | Path) -> None:
    """One picture, ``.png`` or ``.svg`` by the name of ``path``.

    Heat maps of energy and density over layers and kinds, density against expectation, the redundancy curves, and with
    a base the share of the energy on large weights.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed for the table

    height = 0.28 * len(inspection.kinds) + 1  # inches of a heat map
    figure = Figure(figsize=(12, 2 * height + 4), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[2 * height, 4])
    above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    groups: dict[tuple[str, int | None], list[Measures]] = {}
    for layer in inspection.layers:
        groups.setdefault((layer.kind, layer.block), []).append(layer.measures)
    cells = {cell: _together(group) for cell, group in groups.items()}
    energy, density = above.subplots(2, 1)
    kinds = list(inspection.kinds)
    heat(energy, kinds, {cell: 100 * m.share for cell, m in cells.items()}, "Share of the update's energy, %")
    heat(density, kinds, {cell: 100 * m.density_ba for cell, m in cells.items()}, "Density of BA, %")
    axes = below.subplots(1, 2 if inspection.base is None else 3)
    _scatter(axes[0], inspection)
    _curves(axes[1], inspection)
    if inspection.base is not None:
        _overlaps(axes[2], inspection)
    figure.savefig(path, dpi=150)


def heat(axes: Axes, kinds: Sequence[str], cells: Mapping[tuple[str, int | None], float], title: str) -> None:
    """Kinds down, layers across, a colour bar beside; ``cells`` is by kind and layer, grey where there is none."""
    blocks = in_order(block for _, block in cells)
    image = axes.imshow(grid(kinds, blocks, cells), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_facecolor("0.9")
    across(axes, blocks)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_title(title, loc="left")
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def in_order(blocks: Iterable[int | None]) -> list[int | None]:
    """Layer numbers, each once; what is outside of all layers comes last."""
    found = set(blocks)
    return [*sorted(block for block in found if block is not None), *([None] if None in found else [])]


def grid(rows: Sequence[Any], columns: Sequence[Any], cells: Mapping[tuple[Any, Any], float]) -> np.ndarray:
    """``cells`` as an array, not-a-number where there is none."""
    return np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])


def across(axes: Axes, blocks: Sequence[int | None]) -> None:
    """Layer numbers below a heat map, not more than have room."""
    step = math.ceil(len(blocks) / 32)
    axes.set_xticks(range(0, len(blocks), step), ["none" if b is None else str(b) for b in blocks[::step]])
    axes.set_xlabel("layer")


def _scatter(axes: Axes, inspection: Inspection) -> None:
    # a colour for each kind, or for each part where there are more kinds than colours the eye can tell apart
    field = "kind" if len(inspection.kinds) <= 8 else "part"
    for name in dict.fromkeys(
        getattr(x, field) for x in sorted(inspection.layers, key=lambda x: order(x.part, x.kind))
    ):
        own = [x.measures for x in inspection.layers if getattr(x, field) == name]
        axes.scatter([100 * m.expected_ba for m in own], [100 * m.density_ba for m in own], s=14, alpha=0.7, label=name)
    seen = [100 * x for layer in inspection.layers for x in (layer.measures.expected_ba, layer.measures.density_ba)]
    margin = max(2.0, 0.1 * (max(seen) - min(seen)))
    ends = (min(seen) - margin, max(seen) + margin)
    axes.plot(ends, ends, color="0.5", linewidth=1, linestyle="--")
    axes.set(xlim=ends, ylim=ends, xlabel="expected of random masks, %", ylabel="measured, %")
    axes.set_title("Density of BA", loc="left")
    axes.legend(fontsize="x-small", frameon=False)


def _curves(axes: Axes, inspection: Inspection) -> None:
    shares = [100 * share for share in SHARES]
    for field, label in (("curve_a", "A"), ("curve_b", "B"), ("curve_ba", "BA (sampled rows)")):
        curves = 100 * np.array([getattr(x.measures, field) for x in inspection.layers])
        low, middle, high = np.percentile(curves, [10, 50, 90], axis=0)
        (line,) = axes.plot(shares, middle, label=label)
        axes.fill_between(shares, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="largest entries kept, %", ylabel="norm kept, %")
    axes.set_title("Redundancy, 10th to 90th percentile", loc="left")
    axes.legend(fontsize="small", frameon=False, loc="lower right")


def _overlaps(axes: Axes, inspection: Inspection) -> None:
    kinds = list(inspection.kinds)
    values = [100 * (inspection.kinds[kind].overlap or 0.0) for kind in kinds]
    axes.barh(range(len(kinds)), values)
    axes.axvline(100 * LARGE, color="0.5", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"% on the largest {LARGE:.0%}")
    axes.set_title("Energy on large |W|", loc="left")
