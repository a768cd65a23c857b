"""Pure functions of routing: gates over experts, experts on stacked tensors, balance losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mix(x: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:
    """sum_i gate_i B_i A_i x of all experts, as two matrix products.

    Args:
        x: (..., in).
        A: (experts, r, in), or (r, in) shared by all.
        B: (experts, out, r).
        gate: (..., experts), broadcast over what it lacks.

    Returns:
        (..., out).
    """
    experts, out, r = B.shape
    z = F.linear(x, A.flatten(0, 1)).unflatten(-1, (experts, r)) if A.dim() == 3 else F.linear(x, A)[..., None, :]
    z = z * gate[..., None].to(z.dtype)
    return F.linear(z.flatten(-2), B.transpose(0, 1).reshape(out, experts * r))


def scores(x: Tensor, router: Tensor) -> Tensor:
    """(..., experts) what ``router`` (experts, in) makes of ``x`` (..., in), in fp32 at least, under autocast too."""
    x = wide(x)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, router.to(x.dtype))


def top_k_softmax(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(gate, probabilities): the softmax of ``scores`` (..., experts), and its k largest renormalised to 1.

    In fp32 at least. Where entries tie, exactly k are kept all the same.
    """
    probabilities = wide(scores).softmax(-1)
    if k >= scores.shape[-1]:
        return probabilities, probabilities
    kept = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(k, -1).indices, 1.0)
    gate = probabilities * kept
    return gate / gate.sum(-1, keepdim=True), probabilities


def token_sums(values: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """((features,), scalar): ``values`` (..., features) summed over the real tokens, and the number of these."""
    if real is None:
        return values.flatten(0, -2).sum(0), values.new_tensor(values[..., 0].numel())
    return (values * real[..., None]).flatten(0, -2).sum(0), real.sum().to(values.dtype)


def switch_balance(chosen: Tensor, probability: Tensor, tokens: Tensor) -> Tensor:
    """experts x sum_i c_i s_i: c_i the share of tokens sent to expert i, s_i its mean probability. At least 1.

    Args:
        chosen: (experts,) tokens sent to each; divided by their sum.
        probability: (experts,) sums of the softmax over tokens.
        tokens: how many tokens.
    """
    share = chosen / chosen.sum().clamp_min(1e-12)
    return len(share) * (share.detach() * probability / tokens.clamp_min(1)).sum()
