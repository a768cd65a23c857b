"""Conflict Mitigation Regularizer: how much an update B A falls on entries where the pretrained weight is large.

LoRASculpt (arXiv 2503.16843), its penalty on one module with frozen weight W (m x n):

    (1)  Mbar = W / ||W||_F
    (2)  S    = | 1 / ln(|Mbar| + 1e-15) |
    (3)  M    = tanh(omega S)                                       no gradient
    (4)  L    = || M o (B A) ||_F                                   not squared, alpha/r not included

and, in closed form, with G = (M o M o BA) / L:  dL/dB = G A^T,  dL/dA = B^T G,  both 0 where L = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

EPS = 1e-15


def awareness(weight: Tensor, norm: Tensor | float, omega: float) -> Tensor:
    """M of equations (1) to (3) for some rows of W: values in (0, 1], increasing in |W|.

    Args:
        weight: rows of W, (rows, n).
        norm: ||W||_F of the *whole* matrix. Where it is 0, of an untrained block, M is that of a weight of 0.
        omega: steepness, > 0; 1 in the paper's code.
    """
    magnitude = (weight.float() / (norm + (norm == 0))).abs() + EPS
    return torch.tanh(omega * (1 / torch.log(magnitude)).abs())


def conflict(
    B: Tensor, A: Tensor, squared: Callable[[int, int], Tensor], rows: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """L of equation (4) and its gradients, by blocks of rows: nothing of size m x n is kept.

    Args:
        B: (m, r).
        A: (r, n).
        squared: ``squared(i, j)`` gives M o M for rows i to j, (j - i, n).
        rows: rows of one block; the memory taken is a few times rows x n.

    Returns:
        L (scalar), dL/dB (m, r) and dL/dA (r, n), in fp32. At L = 0 both gradients are 0.
    """
    B, A = B.detach().float(), A.detach().float()
    total = torch.zeros((), device=B.device)
    grad_B, grad_A = torch.zeros_like(B), torch.zeros_like(A)
    for i, j in blocks(B.shape[0], rows):
        update = B[i:j] @ A
        weighted = squared(i, j) * update
        total += (weighted * update).sum()
        grad_B[i:j] = weighted @ A.T
        grad_A += B[i:j].T @ weighted
    value = total.sqrt()
    scale = torch.where(value > 0, 1 / value, torch.zeros_like(value))
    return value, grad_B * scale, grad_A * scale


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of at most ``size``."""
    for start in range(0, total, size):
        yield start, min(start + size, total)
