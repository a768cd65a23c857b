r"""MALoRA: experts that read x through one small shared subspace, and may spend what this saves on a higher rank.

Wang et al., *MALoRA: Mixture of Asymmetric Low-Rank Adaptation for Enhanced Multi-Task Learning*, Findings of NAACL
2025, arXiv 2410.22782. In a mixture of LoRAs (MoLoRA) the down-projections of the experts become alike, while their
up-projections differ. Here all experts read x in one shared subspace, each through a small matrix of its own. What the
subspace holds of x is computed once for all. The paper spends the parameters that this saves on wider up-projections.
By default they are saved here; ``budget=True`` spends them, with a ``shared_rank`` above r.

With N experts, the shared S_A (d x n), private P_t :math:`(\bar r \times d)` and B_t :math:`(m \times \bar r)`, a
router W_g and :math:`W_\epsilon` for its noise (N x n both), the softmax in fp32 from the input before dropout, and
T(x) the k largest entries of p(x):

.. math::
    p(x) &= \mathrm{softmax}\big(W_g x + \epsilon \circ \mathrm{softplus}(W_\epsilon x)\big), \quad
    \epsilon \sim \mathcal{N}(0, 1) \text{ in training with a noisy gate, else } 0                       \tag{1} \\
    g_t(x) &= p_t(x) \big/ \textstyle\sum_{i \in T(x)} p_i(x) \text{ for } t \in T(x), \text{ else } 0    \tag{2} \\
    h &= W_0 x + \tfrac{\alpha}{r} \sum_{t=1}^{N} g_t(x)\, B_t P_t\, s, \qquad s = S_A\, \mathrm{drop}(x) \tag{3} \\
    \mathcal{L} &= \mathcal{L}_{task} + \beta \textstyle\sum_{\text{linears}} N \sum_{t=1}^{N} c_t \bar p_t \tag{4} \\
    [A_1; \dots; A_N] &= U \Sigma V^\top, \qquad
    S_A = \Sigma_d V_d^\top, \qquad P_t = U_{t,d}, \qquad B_t = 0 \qquad \text{at the start}              \tag{5} \\
    \bar r &= r, \qquad \text{or with a budget} \qquad
    \bar r = \min\Big(d, \Big\lfloor \frac{N r (n + m) - d n}{N (d + m)} \Big\rfloor\Big)                 \tag{6}

Over the real tokens of a batch, c_t is the share of all choices that fell on expert t and :math:`\bar p_t` the mean of
p_t. In (5) the A_t are the down-projections :math:`(\bar r \times n)` that the experts of a MoLoRA would start from,
one below the other, the index d takes the d largest singular values, and U_t are the rows of U that belong to A_t, so
that P_t S_A is what S_A has room for of A_t.

No official code is known, and of the paper only the abstract, the form of an expert and that S_A comes from an SVD
could be checked. Reconstructed are how (5) splits the SVD, the rank rule (6), which gives a linear no more parameters
than a MoLoRA of N experts of rank r has, and the loss (4). A third party's code (godofwar1007/MALoRA) draws P_t at
random (``p_init="kaiming"``), has a noisy gate (``noisy_gate=True``) and mixes whole feed-forward blocks, not linears.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.update import Place, Update, UpdateConfig, register_update
from ..ops.routing import mix, scores, top_k_softmax


class MALoRAUpdate(Update):
    """Equations (1) to (6) on one linear. S: (d, in), P: (N, rank, d), B: (N, out, rank), router and noise: (N, in)."""

    config: MALoRAConfig

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        n, d, rank = config.num_experts, config.shared_rank, config.expert_rank(self.r, place)
        if d > min(n * rank, place.in_features):
            raise ValueError(
                f"shared_rank is at most {min(n * rank, place.in_features)} at {place.name}, which has "
                f"{place.in_features} inputs and {n} experts of rank {rank}; got {d}."
            )
        self.S = nn.Parameter(torch.empty(d, place.in_features))
        self.P = nn.Parameter(torch.empty(n, rank, d))
        self.B = nn.Parameter(torch.zeros(n, place.out_features, rank))
        self.router = nn.Parameter(torch.empty(n, place.in_features))
        if config.noisy_gate:
            self.noise = nn.Parameter(torch.zeros(n, place.in_features))
        stack = torch.empty(n * rank, place.in_features)
        for matrix in (stack, self.router.data, self.P.data.flatten(0, 1)):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        U, sigma, V = torch.linalg.svd(stack.float(), full_matrices=False)
        self.S.data.copy_(sigma[:d, None] * V[:d])  # (5)
        if config.p_init == "svd":
            self.P.data.copy_(U[:, :d].unflatten(0, (n, rank)))

    def forward(self, x: Tensor) -> Tensor:
        gate, share = top_k_softmax(self.scores(x), self.config.top_k)  # (2)
        s = F.linear(self.dropout(x), self.S)
        output = self.scaling * mix(s, self.P, self.B, gate)  # (3)
        return self.routed(output, gate, self.balance_loss(gate, share, self.config.balance_weight))  # (4)

    def scores(self, x: Tensor) -> Tensor:
        """(..., N) what the softmax of equation (1) is taken of."""
        score = scores(x, self.router)
        if self.config.noisy_gate and self.training:
            score = score + torch.randn_like(score) * F.softplus(scores(x, self.noise))  # (1)
        return score


@register_update
@dataclass
class MALoRAConfig(UpdateConfig):
    """A mixture of LoRAs in a shared subspace. Use it wherever PEFT takes a ``LoraConfig``.

    Args:
        r: rank of each expert; with ``budget`` that of the plain experts whose parameters a linear may have. Third
            party: 16.
        lora_alpha: alpha of equation (3), over r in any case. Third party: r, a factor of 1.
        num_experts: N, at least 1. Third party, and the paper from memory: 8.
        top_k: k, how many experts a token takes, from 1 to N. Third party, and the paper from memory: 2.
        shared_rank: d, the dimension of the shared subspace, from 1 to N r and no more than a linear has inputs. What
            the experts add has no higher rank, alone or together. Third party: 16.
        budget: whether equation (6) sets the rank of the experts, for each linear its own, so that it has as many
            parameters as N plain experts of rank r, or just below (reconstructed). The rank is at most d: raise that
            too.
        p_init: how P starts: "svd" as in equation (5), reconstructed; "kaiming" at random, as in the third party's
            code.
        noisy_gate: whether training adds learned noise to the scores, as in equation (1). It starts with a deviation
            of 0.69 everywhere. Third party: yes.
        balance_weight: beta of equation (4), at least 0; 0 leaves the loss out. Third party: 0.001.

    Raises:
        ValueError: for a value out of its range, or a budget too small for S_A.
    """

    method: ClassVar[str] = "malora"
    update: ClassVar[type[Update]] = MALoRAUpdate
    why_not: ClassVar[str] = "every token takes its own experts"
    sure: ClassVar[str] = "form of the experts from the paper; start, ranks and loss reconstructed"

    r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    num_experts: int = 8
    top_k: int = 2
    shared_rank: int = 16
    budget: bool = False
    p_init: str = "svd"
    noisy_gate: bool = False
    balance_weight: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        if self.num_experts < 1:
            raise ValueError(f"num_experts is at least 1; got {self.num_experts}.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k lies from 1 to num_experts, {self.num_experts}; got {self.top_k}.")
        if self.shared_rank < 1:
            raise ValueError(f"shared_rank is at least 1; got {self.shared_rank}.")
        if self.p_init not in ("svd", "kaiming"):
            raise ValueError(f"p_init is 'svd' or 'kaiming'; got {self.p_init!r}.")
        if not 0 <= self.balance_weight < math.inf:
            raise ValueError(f"balance_weight is at least 0 and finite; got {self.balance_weight}.")

    def expert_rank(self, r: int, place: Place) -> int:
        """The rank of the experts at ``place``, where the config has ``r``."""
        if not self.budget:
            return r
        n, d, inputs, outputs = self.num_experts, self.shared_rank, place.in_features, place.out_features
        rank = min(d, (n * r * (inputs + outputs) - d * inputs) // (n * (d + outputs)))  # (6)
        if rank < 1:
            raise ValueError(
                f"{n} plain experts of rank {r} at {place.name} have fewer parameters than shared_rank={d} needs: "
                "lower it, or raise r."
            )
        return rank
