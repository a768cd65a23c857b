"""Which entries of a matrix are kept: the largest ones, counted exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(numel: int, density: float) -> int:
    """How many of ``numel`` entries a density in (0, 1] keeps: int(density * numel), as the released code counts.

    Raises:
        ValueError: if that keeps nothing.
    """
    count = int(density * numel)
    if count < 1:
        raise ValueError(f"a density of {density} keeps no entry of a tensor of {numel}; use at least {1 / numel:.2g}")
    return count


def magnitude_mask(weight: Tensor, density: float) -> Tensor:
    """The mask of the ``kept(numel, density)`` entries of largest magnitude, a bool tensor of ``weight``'s shape."""
    count = kept(weight.numel(), density)
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.detach().abs().flatten().topk(count, sorted=False).indices] = True
    return mask.view(weight.shape)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as a flat uint8 tensor, eight entries a byte."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (bits * places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`pack` for a mask of ``shape``.

    Raises:
        ValueError: if it is of another number of entries.
    """
    if packed.numel() != -(-shape.numel() // 8):
        raise ValueError(f"{8 * packed.numel()} entries are no mask of {tuple(shape)}")
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] & places) != 0
    return bits.flatten()[: shape.numel()].view(shape)
