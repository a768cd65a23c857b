r"""SMoRA: every rank of one LoRA is an expert, and every token takes the k ranks that suit it best.

Zhao et al., *Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning*, KDD 2026,
arXiv 2501.15103. Several LoRAs with a router are one LoRA whose ranks are switched in blocks; with blocks of a single
rank, tasks share what they have in common and part in the rest. A bias on each score, which no gradient moves, keeps
the ranks equally busy, so that no loss has to.

With A (r x n), B (m x r), groups of q ranks each, a router W_r (r/q x n) whose scores are in fp32 from the input before
dropout, a bias b (r/q numbers, 0 at the start) and :math:`v = s + b`:

.. math::
    s(x) &= W_r x \qquad \text{or } \sigma(W_r x)                                                       \tag{1} \\
    T(x) &= \text{the } k/q \text{ groups with the largest } s(x) + b                                  \tag{2} \\
    g_i(x) &= \tfrac{k}{q}\, \frac{e^{v_i}}{\sum_{j \in T} e^{v_j}} \qquad
    \text{or } \tfrac{k}{q}\, \frac{v_i}{\sum_{j \in T} v_j} \qquad
    \text{for } i \in T(x), \text{ else } 0                                                             \tag{3} \\
    h &= W_0 x + \tfrac{\alpha}{k}\, B \big(\bar g(x) \circ A\, \mathrm{drop}(x)\big), \qquad
    \bar g \text{: each } g_i \text{ for the } q \text{ ranks of its group}                            \tag{4} \\
    b_i &\leftarrow b_i + u\, \mathrm{sign}\big(\tfrac{q}{r} \textstyle\sum_j c_j - c_i\big)           \tag{5}

Equation (5) follows every optimizer step; c_i is how many real tokens of all its micro-batches and processes took group
i. The left forms of (1) and (3) are the paper's, a softmax over what is kept of :math:`W_r x + b`, and the default
(``gate="softmax"``). Its factor k is reconstructed, so that equal scores with k = r give plain LoRA; the paper's text
was read in part.

Where the official code (StyxXuan/smora) departs: it has the right forms, with the same factor k (``gate="sigmoid"``;
a v below 0 counts as 0 here); it updates b in every forward pass, also when a checkpointed layer is computed again, of
one process alone and with padding counted (none of it here), and it may train b besides; it routes by the input after
dropout. With q above 1 it has a score for each group as well, but a bias for each rank, and takes k single ranks, not
groups. Balance without a loss as first proposed for DeepSeek has v = s: ``bias_in_gate=False``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.carrier import across
from ..adapters.layers import sharded_like
from ..adapters.method import Method
from ..adapters.update import Update, UpdateConfig, UpdateMethod, register_update
from ..ops.routing import scores


class SMoRAUpdate(Update):
    """Equations (1) to (4) on one linear. A: (r, in), B: (out, r), router: (groups, in), kept bias: (groups,)."""

    config: SMoRAConfig

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        self.scaling *= (self.r / config.top_k) ** (0.5 if config.use_rslora else 1)  # alpha is over k, not over r
        self.groups = self.r // config.rank_partition
        self.A = nn.Parameter(torch.empty(self.r, place.in_features))
        self.B = nn.Parameter(torch.zeros(place.out_features, self.r))
        self.router = nn.Parameter(torch.empty(self.groups, place.in_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        self.keep("bias", torch.zeros(self.groups))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        z = F.linear(self.dropout(x), self.A)
        ranks = gate.repeat_interleave(self.config.rank_partition, -1)
        output = self.scaling * F.linear(ranks.to(z.dtype) * z, self.B)  # (4)
        return self.routed(output, gate)

    def gate(self, x: Tensor) -> Tensor:
        """(..., groups) the weight of every group: above 0 where a token takes it, else 0."""
        taken = self.config.top_k // self.config.rank_partition
        s = scores(x, self.router)
        s = s.sigmoid() if self.config.gate == "sigmoid" else s  # (1)
        kept = largest(s + self.bias, taken)  # (2)
        v = s + self.bias if self.config.bias_in_gate else s
        if self.config.gate == "softmax":
            v = v.masked_fill(~kept, -math.inf).softmax(-1)
        v = v.clamp_min(1e-12) * kept  # what a token takes is counted, however little it weighs
        return taken * v / v.sum(-1, keepdim=True)  # (3)


def largest(scores: Tensor, k: int) -> Tensor:
    """(..., groups) True for the k largest of ``scores``; where groups tie, for the first ones, on every device."""
    first = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]  # topk leaves open which of them it takes
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, first, True)


class SMoRA(UpdateMethod):
    """Equation (5) after every optimizer step, the same in every process."""

    config: SMoRAConfig

    @torch.no_grad()
    def after_step(self, step):
        super().after_step(step)
        if not self.config.bias_rate:
            return
        groups = [update.groups for update in self.updates.values()]
        biases = [update.bias for update in self.updates.values()]
        # one sum over processes for all linears, also for those that saw nothing here; of integers, to be exact
        found = [update.noted.get("chosen", torch.zeros(update.groups)) for update in self.updates.values()]
        counts = across(torch.cat([c.to(biases[0].device, torch.int64) for c in found]))
        for bias, c in zip(biases, counts.split(groups), strict=True):
            move = self.config.bias_rate * torch.sign(c.sum() - len(c) * c)  # (5)
            bias.add_(sharded_like(move.to(bias.device, bias.dtype), bias))


@register_update
@dataclass
class SMoRAConfig(UpdateConfig):
    """A LoRA whose ranks are experts. Use it wherever PEFT takes a ``LoraConfig``; the paper targets all linears.

    Args:
        r: how many ranks there are, a multiple of rank_partition. Official scripts: 64.
        lora_alpha: alpha of equation (4), over top_k (over its root with ``use_rslora``). Official scripts: 16.
        top_k: k, how many ranks a token takes, from rank_partition to r and a multiple of rank_partition. Where it is
            a single group, the weight of that is always the same, and the router learns nothing. Official scripts: 8.
        rank_partition: q, how many neighbouring ranks make a group that is taken as one, at least 1. Official code: 1.
        gate: "softmax" is the paper's form of equations (1) and (3), "sigmoid" that of the official code.
        bias_in_gate: whether v of equation (3) has the bias, as in the paper and the official code; without it the
            bias acts on what is taken alone.
        bias_rate: u of equation (5), at least 0; 0 leaves the balancing out. Official code: 1e-5, beside a sigmoid; the
            scores of a softmax lie further apart.

    Raises:
        ValueError: for a value out of its range.
    """

    method: ClassVar[str] = "smora"
    update: ClassVar[type[Update]] = SMoRAUpdate
    implementation: ClassVar[type[Method]] = SMoRA
    why_not: ClassVar[str] = "every token takes its own ranks"
    sure: ClassVar[str] = "equations from the official code; the paper's gate read in part, its scale reconstructed"

    r: int = 64
    lora_alpha: int = 16
    top_k: int = 8
    rank_partition: int = 1
    gate: str = "softmax"
    bias_in_gate: bool = True
    bias_rate: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        ranks, q = [self.r, *self.rank_pattern.values()], self.rank_partition
        if q < 1:
            raise ValueError(f"rank_partition is at least 1; got {q}.")
        if any(r % q for r in ranks):
            raise ValueError(f"r is a multiple of rank_partition={q}, in rank_pattern too; got {ranks}.")
        if not q <= self.top_k <= min(ranks) or self.top_k % q:
            raise ValueError(
                f"top_k lies from rank_partition={q} to r, here {min(ranks)}, and is a multiple of the former; got "
                f"{self.top_k}."
            )
        if self.gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate is 'softmax' or 'sigmoid'; got {self.gate!r}.")
        if not 0 <= self.bias_rate < math.inf:
            raise ValueError(f"bias_rate is at least 0; got {self.bias_rate}.")
