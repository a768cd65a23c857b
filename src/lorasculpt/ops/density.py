"""How dense a sparse update is: a theorem of LoRASculpt, and the measurements to hold against it.

LoRASculpt keeps a share s_A of the entries of A (r, q) and a share s_B of the entries of B (p, r). Its Theorem 1 says
how dense the product BA (p, q) is when the kept entries lie at random. A magnitude mask is not random: entries crowded
onto few ranks make BA denser, entries crowded onto few rows or columns make it sparser. So measure, then compare.

Density is the share of entries that are not zero, in [0, 1].

References: Liang et al., LoRASculpt, CVPR 2025 (arXiv 2503.16843), Theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def expected_density(density_a: float, density_b: float, r: int) -> float:
    """Expected density of BA for random masks (Theorem 1): E[s_BA] = 1 - (1 - s_A s_B)^r.

    An entry of BA is zero unless one of the r ranks has both of its factors kept, each with probability s_A s_B. Kept
    values are taken to be in general position: sums do not cancel exactly.

    Args:
        density_a: s_A, in [0, 1].
        density_b: s_B, in [0, 1].
        r: rank, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(density_a=density_a, density_b=density_b)
    _check_positive(r=r)
    hit = density_a * density_b
    # 1 - (1 - hit)^r without losing the digits of a small hit
    return 1.0 if hit == 1.0 else -math.expm1(r * math.log1p(-hit))


def solve_density(target: float, r: int) -> float:
    """The density s of both A and B at which BA is expected to have density ``target``: s = sqrt(1 - (1 - s*)^(1/r)).

    The inverse of Theorem 1 for s_A = s_B.

    Args:
        target: s*, the wanted density of BA, in [0, 1].
        r: rank, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check(target=target)
    _check_positive(r=r)
    return 1.0 if target == 1.0 else math.sqrt(-math.expm1(math.log1p(-target) / r))


def density(tensor: Tensor) -> float:
    """Share of the entries of ``tensor`` (any shape) that are not zero.

    Raises:
        ValueError: the tensor has no entries.
    """
    if tensor.numel() == 0:
        raise ValueError("an empty tensor has no density")
    return int(torch.count_nonzero(tensor)) / tensor.numel()


def product_density(B: Tensor, A: Tensor, block: int = 2**22) -> float:
    """Share of the entries of B @ A that are not zero, counted by blocks of rows: the full product is never kept.

    Args:
        B: (p, r).
        A: (r, q).
        block: entries of the product held at a time.

    Raises:
        ValueError: the shapes do not make a product, or it has no entries.
    """
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(f"B (p, r) and A (r, q) expected, not {tuple(B.shape)} and {tuple(A.shape)}")
    if not B.shape[0] * A.shape[1]:
        raise ValueError("an empty product has no density")
    # half precision would round small products to zero
    B, A = (x if x.dtype == torch.float64 else x.float() for x in (B, A))
    nonzero = sum(int(torch.count_nonzero(rows @ A)) for rows in B.split(max(1, block // A.shape[1])))
    return nonzero / (B.shape[0] * A.shape[1])


def redundancy_curve(tensor: Tensor, shares: Sequence[float]) -> list[float]:
    """Share of the Frobenius norm that is kept when only the largest entries are kept.

    For each share s, with k = int(s n) of the n entries kept, as the mask of LoRASculpt does:
    ||top_k(X)||_F / ||X||_F. A curve that rises at once says that few entries carry the update. A tensor of zeros has
    nothing to lose: 1 everywhere.

    Args:
        tensor: any shape, at least one entry.
        shares: shares of the entries, each in [0, 1].

    Raises:
        ValueError: a share is out of range, or the tensor has no entries.
    """
    if tensor.numel() == 0:
        raise ValueError("an empty tensor has no redundancy")
    for share in shares:
        _check(share=share)
    # the largest magnitude becomes 1, so that squares neither overflow nor vanish
    magnitudes = tensor.detach().flatten().abs().float().cpu()
    magnitudes.numpy().sort()  # in place, and in a tenth of torch's time, which sorts their places as well
    if magnitudes[-1] == 0:
        return [1.0] * len(shares)
    energy = (magnitudes.flip(0) / magnitudes[-1]).square_().cumsum(0, dtype=torch.float64)
    kept = [int(share * tensor.numel()) for share in shares]
    return [math.sqrt(float(energy[k - 1] / energy[-1])) if k else 0.0 for k in kept]


def _check(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, not {value}")


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
