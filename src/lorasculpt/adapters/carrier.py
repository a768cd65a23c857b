"""Losses and counts of a layer that ride on its own output, and gradients of 0 that ride on a model's.

Whatever is decided is decided in the backward pass, which happens exactly once per micro-batch: a forward pass happens
twice under gradient checkpointing, and not at all with gradients under its reentrant kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, loss, weight, stats, note):
        ctx.note, ctx.weight = note, weight
        ctx.save_for_backward(stats, loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *gradients):
        stats, loss = ctx.saved_tensors
        ctx.note(stats, loss)
        return gradients[0], ctx.weight.to(loss), None, None, None


def carry(
    output: Tensor, loss: Tensor, weight: Tensor, stats: Tensor, note: Callable[[Tensor, Tensor], None]
) -> Tensor:
    """``output`` itself; when the gradient comes back, ``loss`` gets ``weight`` for its own.

    Args:
        output: what the layer returns.
        loss: a scalar in fp32.
        weight: a scalar tensor, read when the backward pass comes by.
        stats: numbers of this micro-batch.
        note: called once with ``stats`` and ``loss``, both detached, in the backward pass.
    """
    return _Carry.apply(output, loss, weight, stats.detach(), note)


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(output, *parameters):
        # of a loss a copy, which trainers scale in place, as they may no view
        return output.clone() if output.dim() == 0 else output.view_as(output)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0], *map(torch.zeros_like, ctx.saved_tensors)


def reach(output: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``output`` as it is; when the gradient comes back, each of ``parameters`` gets one of 0 beside what it gets."""
    return _Reach.apply(output, *parameters)


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def across(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, for a loss that is a function of the whole batch.

    The gradient reaches this process's part only, times the number of processes: DDP and FSDP average gradients over
    processes, and the average of these is the gradient of the loss.
    """
    if world() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total + world() * (tensor - tensor.detach())
