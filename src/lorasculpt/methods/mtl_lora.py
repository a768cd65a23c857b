r"""MTL-LoRA: one down-projection for all tasks, a small matrix of each task's own, and several up-projections to mix.

Yang et al., *MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning*, AAAI 2025, arXiv 2410.09437. In a LoRA that is
trained on many tasks all of them share the same r directions, and get into each other's way. Here every task turns
these directions with a matrix of its own, which costs r x r numbers, and weighs several shared up-projections in its
own way, so that related tasks can share what they learn. A sample needs its task, in training and after it; for one
task the update is a matrix of rank r, which can be written as a plain LoRA.

With T tasks, A (r x n), a matrix :math:`\Lambda_t` (r x r) and N_B weights :math:`w_t` for each task t, matrices
B_i (m x r), a temperature :math:`\tau` and the softmax in fp32:

.. math::
    \bar B_t &= \textstyle\sum_{i=1}^{N_B} \mathrm{softmax}(w_t / \tau)_i\, B_i                  \tag{1} \\
    h &= W_0 x + \tfrac{\alpha}{r}\, \bar B_t\, \Lambda_t\, A\, \mathrm{drop}(x)
    \qquad \text{for a sample of task } t                                                       \tag{2} \\
    \Delta_t &= \tfrac{\alpha}{r}\, \bar B_t \cdot \Lambda_t A                                   \tag{3}

:math:`\Lambda_t` starts as the identity, B_i at 0, :math:`w_t` at random. There is no loss beside the tasks' own.

Where the official code (pUmpKin-Co/MTL-LoRA) and descriptions of the paper differ: some of these call
:math:`\Lambda_t` diagonal; the paper's formula and the scripts have all of it (``transform="full"``, the default). The
code's scalar in front of the update, which is off by default, is left out, and so are the biases and layer norms that
the scripts on images and text train as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.update import Update, UpdateConfig, register_update


class MTLLoRAUpdate(Update):
    """Equations (1) to (3) on one linear. A: (r, in), Lambda: (T, r, r) or (T, r), B: (N_B, out, r), w: (T, N_B)."""

    config: MTLLoRAConfig

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        tasks = len(config.tasks)
        self.A = nn.Parameter(torch.empty(self.r, place.in_features))
        self.B = nn.Parameter(torch.zeros(config.num_b, place.out_features, self.r))
        self.w = nn.Parameter(torch.ones(tasks, config.num_b))
        diagonal = torch.ones(tasks, self.r)
        self.Lambda = nn.Parameter(diagonal if config.transform == "diagonal" else torch.diag_embed(diagonal))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if config.w_init == "kaiming":
            nn.init.kaiming_uniform_(self.w, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:  # tokens that are not in rows of one sample each: they need a batch of one task
            return self.forward(x[None])[0]
        task, share = self.task_ids(x), self.shares()
        z = F.linear(self.dropout(x), self.A) @ self.transforms()[task].mT
        output = self.scaling * z @ self.mixed(share)[task].mT  # (2)
        return self.routed(output, share[task])

    def shares(self) -> Tensor:
        """(T, N_B) in fp32: how much of every B each task takes."""
        return (self.w.float() / self.config.temperature).softmax(-1)

    def mixed(self, share: Tensor) -> Tensor:
        """(T, out, r) the up-projection of every task."""
        return torch.einsum("ti,ior->tor", share.to(self.B.dtype), self.B)  # (1)

    def transforms(self) -> Tensor:
        """(T, r, r) Lambda of every task."""
        return torch.diag_embed(self.Lambda) if self.config.transform == "diagonal" else self.Lambda

    def factors(self, task: int | None = None) -> tuple[Tensor, Tensor]:
        """The two factors of equation (3): the plain LoRA of one task."""
        if task is None:
            raise ValueError(f"say which task: one of {', '.join(self.config.tasks)}.")
        return self.transforms()[task] @ self.A, self.scaling * self.mixed(self.shares())[task]  # (3)


@register_update
@dataclass
class MTLLoRAConfig(UpdateConfig):
    """A LoRA for many tasks at once. Use it wherever PEFT takes a ``LoraConfig``; the paper targets q, k, v and o.

    Every sample needs the name of its task: ``model(**batch, task=["charts", "receipts"])``, and the same in
    ``generate``, where one name stands for all samples. Under a trainer it is the column ``task`` of the data, which
    ``lorasculpt.TaskCollator`` takes along.

    Args:
        tasks: names of the tasks, at least one; what is saved goes by their order.
        r: rank of the update. Official scripts: 8 on commonsense tasks, 64 on images and text.
        lora_alpha: Official scripts: 16.
        num_b: N_B, how many up-projections the tasks mix, at least 1. Official scripts: 3, on images and text 2.
        temperature: tau of equation (1), above 0: the smaller, the more a task takes one B alone. Official scripts:
            0.1, on images and text 0.8.
        transform: what Lambda is: "full", as in the official scripts, or "diagonal", r numbers for each task.
        w_init: how the weights w start: "kaiming" at random, as in the official code, so that tasks prefer different
            B; "equal" all alike. Then every B gets the same gradient, and they stay alike: N_B is 1 in effect.

    Raises:
        ValueError: for a value out of its range, or without ``tasks``.
    """

    method: ClassVar[str] = "mtl_lora"
    update: ClassVar[type[Update]] = MTLLoRAUpdate
    merges: ClassVar[str] = "task"
    multitask: ClassVar[bool] = True
    clock: ClassVar[bool] = False
    sure: ClassVar[str] = "equations and settings from the official code"

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    num_b: int = 3
    temperature: float = 0.1
    transform: str = "full"
    w_init: str = "kaiming"

    def __post_init__(self):
        super().__post_init__()
        if self.num_b < 1:
            raise ValueError(f"num_b is at least 1; got {self.num_b}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is above 0; got {self.temperature}.")
        if self.transform not in ("full", "diagonal"):
            raise ValueError(f"transform is 'full' or 'diagonal'; got {self.transform!r}.")
        if self.w_init not in ("kaiming", "equal"):
            raise ValueError(f"w_init is 'kaiming' or 'equal'; got {self.w_init!r}.")
