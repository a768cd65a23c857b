r"""LoRAMoE: several small LoRAs and a dense router on every linear; experts are pushed towards kinds of tasks.

Dou et al., *LoRAMoE: Alleviating World Knowledge Forgetting in Large Language Models via MoE-Style Plugin*, ACL 2024,
arXiv 2312.09979. Every token gets a softmax over all experts, none is left out. A balance constraint makes some experts
serve samples that need world knowledge and the others the rest, so that new tasks do not overwrite what answers need.

With N experts, a router W_g (N x n), weights w(x) in fp32 from the input before dropout:

.. math::
    w(x) &= \mathrm{softmax}(W_g x)                                                              \tag{1} \\
    h &= W_0 x + \tfrac{\alpha}{r} \sum_{i=1}^{N} w_i(x)\, B_i A_i\, \mathrm{drop}(x)             \tag{2} \\
    Q_{nm} &= \textstyle\sum_{\text{tokens of sample } m} w_n(x), \qquad
    I_{nm} = 1 + \delta \text{ if expert } n \text{ is of the kind of sample } m \text{, else } 1 - \delta \tag{3} \\
    \mathcal{L} &= \mathcal{L}_{task} + \beta \textstyle\sum_{\text{linears}} \sigma^2(Z) / \mu(Z),
    \qquad Z = I \circ Q                                                                         \tag{4}

What makes Z even is a weight that is large where I is small: taken at its word, the constraint sends samples to the
experts that are *not* of their kind. It parts the experts all the same; the kinds are but names of the two halves.

Where the official code (Ablustrund/LoRAMoE) departs: it divides by the *squared* mean (``balance="code"``), counts
padding tokens (never done here), has the constraint off by default, and draws a dropout mask for every expert (one
for all here: the same in expectation, N times cheaper). The variance is the unbiased one, as there. The paper's formula
for Q has a temperature (from memory); it is 1, as in the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapters.update import Update, UpdateConfig, register_update
from ..ops.routing import mix, scores


class LoRAMoEUpdate(Update):
    """Equations (1) to (4) on one linear. A: (N, r, in), B: (N, out, r), router: (N, in)."""

    config: LoRAMoEConfig

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        n = config.num_experts
        self.A = nn.Parameter(torch.empty(n, self.r, place.in_features))
        self.B = nn.Parameter(torch.zeros(n, place.out_features, self.r))
        self.router = nn.Parameter(torch.empty(n, place.in_features))
        for matrix in (*self.A.data, self.router.data):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        gate = scores(x, self.router).softmax(-1)  # (1)
        output = self.scaling * mix(self.dropout(x), self.A, self.B, gate)  # (2)
        # only where there is something to learn: an answer needs no tasks, and no other process to wait for
        balanced = self.config.balance_weight and self._learning()
        return self.routed(output, gate, self.balance(gate, x) if balanced else None)

    def balance(self, gate: Tensor, x: Tensor) -> Tensor:
        """beta sigma^2(Z) / mu(Z) over the samples (``shared``); ``gate`` is (samples, length, N)."""
        real = self.context.real(x)
        q = gate if real is None else gate * real[..., None]
        q = q.sum(1) if q.dim() == 3 else q  # (3): (samples, N)
        z = self._kinds(x, q) * q
        total, count = self.shared(torch.stack([z.detach().sum(), z.new_tensor(float(z.numel()))]))
        # one value alone is its own mean, so that all is 0; to ask how many there are would wait for the device
        count, freedom = count.clamp_min(1), (count - 1).clamp_min(1)
        # sums of what is left of a constant: exact gradients, and no cancellation in the variance
        center = total / count
        first, second = self.shared(torch.stack([(z - center).sum(), (z - center).square().sum()]))
        variance, mean = (second - first.square() / count) / freedom, center + first / count
        power = 1 if self.config.balance == "paper" else 2
        return self.config.balance_weight * variance / (mean.pow(power) + 1e-10)  # (4)

    def _kinds(self, x: Tensor, q: Tensor) -> Tensor:
        """I of equation (3): (samples, N); all 1 without tasks. The first half of the experts is of kind knowledge."""
        if not self.config.tasks:
            return torch.ones_like(q)
        knows = torch.tensor([task in self.config.knowledge for task in self.config.tasks], device=x.device)
        sample = knows[self.task_ids(x)][:, None]
        expert = (torch.arange(q.shape[-1], device=x.device) < q.shape[-1] // 2)[None]
        return torch.where(sample == expert, 1 + self.config.delta, 1 - self.config.delta)


@register_update
@dataclass
class LoRAMoEConfig(UpdateConfig):
    """A dense mixture of LoRAs. Use it wherever PEFT takes a ``LoraConfig``; the paper targets gate, up and down.

    Args:
        r: rank of each expert. Official script: 4.
        lora_alpha: Official script: 32.
        num_experts: N, at least 1; an even number if ``tasks`` are given. Paper: 6 (from memory); official script: 8.
        balance_weight: beta of equation (4), at least 0; 0 leaves the constraint out. Paper: 0.1 (from memory).
        delta: of equation (3), in [0, 1]. Paper: 0.1 (from memory).
        balance: "paper" divides the variance by the mean, "code" by its square.
        tasks: names of the tasks of the training data; without any, all samples are of one kind. With some, every
            sample in training needs its own: ``task=...``, or under a trainer ``lorasculpt.TaskCollator``.
        knowledge: which of ``tasks`` need world knowledge. They have the kind of the first half of the experts; as
            equation (4) sends samples to experts of the other kind, the second half mostly serves them.

    Raises:
        ValueError: for a value out of its range, or ``knowledge`` that names no task.
    """

    method: ClassVar[str] = "loramoe"
    update: ClassVar[type[Update]] = LoRAMoEUpdate
    why_not: ClassVar[str] = "every token weighs the experts anew"
    sure: ClassVar[str] = "forward pass and one form of the loss from the official code; the paper's form from memory"
    of_tasks: ClassVar[tuple[str, ...]] = ("knowledge",)

    r: int = 4
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    num_experts: int = 6
    balance_weight: float = 0.1
    delta: float = 0.1
    balance: str = "paper"
    knowledge: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.knowledge = list(self.knowledge)
        if self.num_experts < 1:
            raise ValueError(f"num_experts is at least 1; got {self.num_experts}.")
        if self.tasks and self.num_experts % 2:
            raise ValueError(f"num_experts is even where experts have kinds; got {self.num_experts}.")
        if not 0 <= self.balance_weight < math.inf:
            raise ValueError(f"balance_weight is at least 0 and finite; got {self.balance_weight}.")
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta is between 0 and 1; got {self.delta}.")
        if self.balance not in ("paper", "code"):
            raise ValueError(f"balance is 'paper' or 'code'; got {self.balance!r}.")
        strange = [task for task in self.knowledge if task not in self.tasks]
        if strange:
            raise ValueError(f"knowledge names {strange[0]!r}, which is not one of tasks={self.tasks}.")
