"""What can be done to the update D = scaling · BA of a LoRA after training; nothing here reads or writes a file.

All arithmetic is in fp32 and on the CPU, and what is random depends on the seed and the layer's name alone: the same
values stored in another precision or in another order of layers give the same result.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import combinations
from typing import Literal

import torch
from peft.utils import merge_utils
from torch import Tensor

from ..adapters.origin import differing, recorded, sees
from ..adapters.plain import Adapter, Pair, of_rank, settings_of_rank
from ..errors import UserError
from ..ops.masks import magnitude_mask


class Update(Mapping[str, Tensor]):
    """The dense update of each layer by the layer's name, (out, in) in fp32.

    Together they are as large as the weights that they are added to, so each is computed when it is asked for and none
    is kept: go through ``items()`` once.
    """

    def __init__(self, adapter: Adapter, of: Callable[[str], Tensor]) -> None:
        """``of`` computes the update of one of the layers of ``adapter``, which also lends its configuration."""
        self.adapter = adapter
        self._of = of
        self._names = tuple(pair.name for pair in adapter.pairs)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# --- edits whose result is a LoRA again -----------------------------------------------------------------------------


def scale(adapter: Adapter, by: float) -> Adapter:
    """Interpolate between the base and the tuned weights: W0 + by · D.

    It is B that is multiplied, not alpha, because some programs read alpha as a whole number. It is in fp32 then, until
    writing rounds it to the precision of A.

    Args:
        adapter: as :func:`~lorasculpt.posthoc.read` returns it.
        by: 0 is the base, 1 changes nothing, more than 1 goes beyond the adapter. Not negative.

    Raises:
        UserError: ``by`` is out of its range.
    """
    if not (math.isfinite(by) and by >= 0):
        raise UserError(f"An adapter cannot be scaled by {by:g}; use a number from 0 (the base) to 1 (as trained).")
    return replace(adapter, pairs=tuple(replace(pair, B=pair.B.float() * by) for pair in adapter.pairs))


def prune(adapter: Adapter, density: float) -> Adapter:
    """Keep the int(density · numel) entries of largest magnitude of every A and of every B, and set the rest to zero.

    Nothing is rescaled. A factor that is sparser already stays as it is.

    Args:
        adapter: as :func:`~lorasculpt.posthoc.read` returns it.
        density: share of entries to keep, in (0, 1].

    Raises:
        UserError: ``density`` is out of its range, or so small that a factor would keep nothing.
    """
    _check_density(density)
    return replace(
        adapter,
        pairs=tuple(
            replace(pair, A=_pruned(pair.name, pair.A, density), B=_pruned(pair.name, pair.B, density))
            for pair in adapter.pairs
        ),
    )


def _pruned(name: str, factor: Tensor, density: float) -> Tensor:
    try:
        return factor.where(magnitude_mask(factor, density), 0)
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


def average(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """The weighted sum of the updates of several adapters, exactly: their factors side by side.

    Its rank is the sum of theirs: with B = [w1 s1 B1, w2 s2 B2, ...] and A = [A1; A2; ...], BA is the sum of w s BA. A
    has the precision that holds all of theirs, B is in fp32 until writing rounds it to that of A.

    Args:
        adapters: two or more of the same layers.
        weights: one for each adapter. Default: the mean, 1/n each.

    Raises:
        UserError: fewer than two adapters, adapters of other layers, or weights that do not fit.
    """
    _check_alike(adapters)
    found = _weights(weights, len(adapters), 1 / len(adapters))
    dtype = reduce(torch.promote_types, (pair.A.dtype for adapter in adapters for pair in adapter.pairs))
    rank = max(sum(pair.A.shape[0] for pair in pairs) for pairs in zip(*(x.pairs for x in adapters), strict=True))
    merged = []
    for pairs in zip(*(adapter.pairs for adapter in adapters), strict=True):
        A = torch.cat([pair.A.to(dtype) for pair in pairs])
        B = torch.cat([pair.B.float() * (w * pair.scaling) for w, pair in zip(found, pairs, strict=True)], 1)
        merged.append(Pair(pairs[0].name, A, B, 1.0))
    return _of_rank(adapters[0], rank, merged)


def rounded(adapter: Adapter) -> tuple[Adapter, float]:
    """``adapter`` with each B in the precision of its A, and how far from it that is, as :func:`truncate` tells it.

    Raises:
        UserError: that precision has no numbers as large.
    """
    pairs = tuple(replace(pair, B=pair.B.to(pair.A.dtype)) for pair in adapter.pairs)
    lost = all_ = 0.0
    for before, after in zip(adapter.pairs, pairs, strict=True):
        if not after.B.isfinite().all():
            raise UserError(
                f"{adapter.folder} is stored in {after.A.dtype}, which has no numbers as large as this edit makes; "
                "scale or weigh it by less."
            )
        A, B = before.A.double(), before.B.double() * before.scaling
        lost += _square(A, B - after.B.double() * before.scaling)
        all_ += _square(A, B)
    return replace(adapter, pairs=pairs), math.sqrt(lost / all_) if all_ else 0.0


# --- edits whose result has no low rank -----------------------------------------------------------------------------


def drop(
    delta: Tensor,
    p: float,
    *,
    generator: torch.Generator | None = None,
    by: Literal["random", "magnitude"] = "random",
    rescale: bool = True,
) -> Tensor:
    """DARE on one tensor: set a share ``p`` of its entries to zero and divide the rest by 1 - p.

    Args:
        delta: of any shape.
        p: in [0, 1).
        generator: of random numbers, on the CPU; None is torch's own.
        by: ``"random"``: each entry with probability ``p``. ``"magnitude"``: the int(p · numel) smallest.
        rescale: whether to divide. At random it keeps the expected value; by magnitude it makes the update larger.

    Raises:
        UserError: ``p`` is out of [0, 1), or ``by`` is neither word.

    Source: Yu et al., Language Models are Super Mario (arXiv 2311.03099); ``mask_weights_utils.py`` of MergeLM.
    """
    if not 0 <= p < 1:
        raise UserError(f"DARE drops a share p of at least 0 and below 1, not {p:g}.")
    if by == "random":
        keep = torch.rand(delta.shape, generator=generator, dtype=torch.float32) >= p
    elif by == "magnitude":
        keep = torch.ones(delta.numel(), dtype=torch.bool)
        keep[delta.abs().flatten().sort(stable=True).indices[: int(p * delta.numel())]] = False
        keep = keep.view(delta.shape)
    else:
        raise UserError(f"DARE drops entries by 'random' or by 'magnitude', not by {by!r}.")
    return delta.where(keep, 0) / (1 - p if rescale else 1)


def dare(
    adapter: Adapter,
    p: float,
    *,
    seed: int = 0,
    by: Literal["random", "magnitude"] = "random",
    rescale: bool = True,
) -> Update:
    """:func:`drop` on the update of every layer.

    Args:
        adapter: as :func:`~lorasculpt.posthoc.read` returns it.
        p: share of the entries of D that are set to zero, in [0, 1).
        seed: of what is dropped at random.
        by: ``"random"``, or ``"magnitude"`` for the smallest.
        rescale: whether what is left is divided by 1 - p.

    Raises:
        UserError: ``p`` is out of [0, 1), or ``by`` is neither word.
    """
    drop(torch.zeros(0), p, by=by)  # a mistake is told now and not when the first layer is asked for
    pairs = {pair.name: pair for pair in adapter.pairs}

    def of(name: str) -> Tensor:
        return drop(delta_of(pairs[name]), p, generator=_generator(seed, name), by=by, rescale=rescale)

    return Update(adapter, of)


def ties(adapters: Sequence[Adapter], density: float = 0.2, weights: Sequence[float] | None = None) -> Update:
    """TIES: trim every update to its largest entries, elect a sign for each entry, average what agrees with it.

    This is ``peft.utils.merge_utils.ties``, layer by layer: it trims each layer by itself (the paper trims the whole
    model at once), the elected sign is that of the sum of the trimmed updates before weighting, and a sum of zero
    counts as positive.

    Args:
        adapters: two or more of the same layers; their ranks may differ.
        density: share of entries of each update that survives trimming, in (0, 1]; 0.2 is the paper's.
        weights: one for each adapter, by which its update is multiplied. Default: 1 each. The same number for all is
            the paper's lambda.

    Raises:
        UserError: fewer than two adapters, adapters of other layers, or a density or weights that do not fit.

    Source: Yadav et al., TIES-Merging (arXiv 2306.01708).
    """
    _check_alike(adapters)
    _check_density(density)
    found = torch.tensor(_weights(weights, len(adapters), 1.0))
    layers = {pairs[0].name: pairs for pairs in zip(*(adapter.pairs for adapter in adapters), strict=True)}

    def of(name: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density")  # that 1 trims nothing is what was asked for
            return merge_utils.ties([delta_of(pair) for pair in layers[name]], found, density)

    return Update(adapters[0], of)


def truncate(update: Update, rank: int) -> tuple[Adapter, float]:
    """The LoRA of a given rank that is nearest to an update (truncated SVD), and how far from it that is.

    One singular value decomposition of the layer's size for each layer: seconds for a thousand features, about a minute
    for several thousand. What DARE drops at random is spread over all ranks, so that a small rank undoes most of it.

    Args:
        update: what :func:`dare` or :func:`ties` returned.
        rank: of every layer, at least 1; a layer with fewer rows or columns is filled up with zeros.

    Returns:
        The adapter, in the precision of the one that was edited and with a scaling of 1; and ||D - BA||_F / ||D||_F
        over all layers together, rounding included, from 0 to about 1.

    Raises:
        UserError: ``rank`` is below 1.
    """
    if rank < 1:
        raise UserError(f"A LoRA has at least rank 1, not {rank}.")
    dtype = update.adapter.pairs[0].A.dtype
    pairs, lost, all_ = [], 0.0, 0.0
    for name, delta in update.items():
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        root = S[:rank].sqrt()
        pair = Pair(name, (root[:, None] * V[:rank]).to(dtype), (U[:, :rank] * root).to(dtype), 1.0)
        pairs.append(pair)
        lost += float((delta - delta_of(pair)).square().sum())
        all_ += float(delta.square().sum())
    return _of_rank(update.adapter, rank, pairs), math.sqrt(lost / all_) if all_ else 0.0


# --- interference ---------------------------------------------------------------------------------------------------


def cosines(adapters: Sequence[Adapter]) -> list[list[float]]:
    """The cosine between the updates of each two adapters, over all layers: how much they want the same, -1 to 1.

    Near 0 they can be added; below, each undoes a part of the other. An adapter that does nothing has 0 with all. From
    the factors alone: the inner product of B1 A1 and B2 A2 is the sum over the entries of (B1ᵀB2) ∘ (A1 A2ᵀ).

    Raises:
        UserError: fewer than two adapters, or adapters of other layers.
    """
    _check_alike(adapters)
    inner = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for pairs in zip(*(adapter.pairs for adapter in adapters), strict=True):
        factors = [(pair.A.double(), pair.B.double() * pair.scaling) for pair in pairs]
        for i, (A1, B1) in enumerate(factors):
            for j, (A2, B2) in enumerate(factors):
                inner[i, j] += ((B1.T @ B2) * (A1 @ A2.T)).sum()
    norm = inner.diagonal().clamp(min=0).sqrt()
    sizes = norm[:, None] * norm
    return (inner / sizes).where(sizes > 0, 0).clamp(-1, 1).tolist()


def sign_conflicts(adapters: Sequence[Adapter]) -> list[list[float]]:
    """The share of opposite signs between the updates of each two adapters, of the entries that both change, 0 to 1.

    By chance it is 0.5. Unlike the cosine it takes small entries for as much as large ones: TIES elects a sign for
    each. Two adapters that change no entry in common have 0. The updates are computed layer by layer, so that those of
    one layer are in memory together.

    Raises:
        UserError: fewer than two adapters, or adapters of other layers.
    """
    _check_alike(adapters)
    n = len(adapters)
    opposed, common = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for pairs in zip(*(adapter.pairs for adapter in adapters), strict=True):
        signs = [delta_of(pair).sign().to(torch.int8) for pair in pairs]
        for i, j in combinations(range(n), 2):
            product = signs[i] * signs[j]
            opposed[i, j] += int((product < 0).sum())
            common[i, j] += int(product.count_nonzero())
    shares = (opposed / common).where(common > 0, 0)
    return (shares + shares.T).tolist()


# --- shared ---------------------------------------------------------------------------------------------------------


def delta_of(pair: Pair) -> Tensor:
    """The update of one layer, scaling · BA, (out, in) in fp32."""
    return pair.scaling * (pair.B.float() @ pair.A.float())


def _square(A: Tensor, B: Tensor) -> float:
    """||BA||_F², by trace(BᵀB · AAᵀ), which rounding alone can bring below 0."""
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))


def _generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one layer, whatever was drawn for others."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _of_rank(adapter: Adapter, rank: int, pairs: Sequence[Pair]) -> Adapter:
    """``adapter`` with other factors, of one rank and with a scaling of 1, as stock configurations and servers do."""
    filled = tuple(of_rank(pair, rank) for pair in pairs)
    return replace(adapter, config={**adapter.config, **settings_of_rank(rank)}, pairs=filled)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise UserError(f"A density is a share above 0 and up to 1, not {density:g}.")


def _check_alike(adapters: Sequence[Adapter]) -> None:
    if len(adapters) < 2:
        raise UserError("Merging takes two adapters or more; name another one.")
    first = {pair.name: (pair.B.shape[0], pair.A.shape[1]) for pair in adapters[0].pairs}
    for other in adapters[1:]:
        found = {pair.name: (pair.B.shape[0], pair.A.shape[1]) for pair in other.pairs}
        if found != first:
            name = next(name for name in {**first, **found} if first.get(name) != found.get(name))
            raise UserError(
                f"{adapters[0].folder} and {other.folder} differ at {name}: merge adapters of the same base and layers."
            )
        one, another = (recorded(adapter.folder) for adapter in (adapters[0], other))
        if one and another and differing(one, another):
            raise UserError(
                f"{adapters[0].folder} and {other.folder} were trained on different weights, {one['base']} and "
                f"{another['base']}: merge adapters of the same base."
            )
        if sees(adapters[0].folder) != sees(other.folder):
            raise UserError(
                f"{adapters[0].folder} and {other.folder} were trained with other settings of image_processor: merge "
                "adapters that see pictures alike."
            )


def _weights(weights: Sequence[float] | None, n: int, default: float) -> list[float]:
    found = [default] * n if weights is None else [float(weight) for weight in weights]
    if len(found) != n or not all(map(math.isfinite, found)):
        raise UserError(f"{n} adapters take {n} finite weights, not {found}.")
    return found
