r"""MoSLD: experts that share one down-projection, some of whose entries are left out at random.

Zhao et al., *MoSLD: An Extremely Parameter-Efficient Mixture-of-Shared LoRAs for Multi-Task Learning*, COLING 2025,
arXiv 2412.08946. What tasks have in common is learned in one A that all experts share; what sets them apart in an
up-projection for each. Every token takes the K experts that suit it best. A is trained by the tokens of all experts,
each B by its own alone; so that A does not run ahead and overfit, every training pass leaves out some of its entries.
This is a dropout of weights, not of x.

With A (r x n), N matrices B_i (m x r), a router W_g (N x n) whose softmax is in fp32 from the input before dropout,
T(x) the K largest entries of s(x), a mask M of the shape of A and dropout p:

.. math::
    s(x) &= \mathrm{softmax}(W_g x), \qquad
    g_i(x) = s_i(x) \big/ \textstyle\sum_{j \in T(x)} s_j(x) \text{ for } i \in T(x), \text{ else } 0   \tag{1} \\
    \tilde A &= (M \circ A) / (1 - p), \quad M_{ij} = 1 \text{ with probability } 1 - p, \text{ else } 0,
    \text{ in training}, \qquad \tilde A = A \text{ after it}                                          \tag{2} \\
    h &= W_0 x + \tfrac{\alpha}{r} \sum_{i=1}^{N} g_i(x)\, B_i \tilde A x                              \tag{3} \\
    \mathcal{L} &= \mathcal{L}_{task} + \beta \textstyle\sum_{\text{linears}} N \sum_{i=1}^{N} c_i \bar s_i
                                                                                                        \tag{4}

Over the real tokens of a batch, c_i is the share of all choices that fell on expert i and :math:`\bar s_i` the mean of
s_i; N times the sum is 1 where both are even. One mask serves all tokens of a forward pass. A checkpointed layer that
is computed again draws the same one.

No official code is known. Reconstructed are the weight of the loss and its factor N (as in the Switch Transformer; the
paper has neither), which way A and B stand (the paper has both), and the spread of the Gaussian that A starts from.
The paper's c_i is the share of tokens, K times as large; :math:`\beta` absorbs that. Its text gives lower layers
more experts, in one of its figures fewer do better: ``num_experts`` takes both.
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


class MoSLDUpdate(Update):
    """Equations (1) to (4) on one linear. A: (r, in), B: (N, out, r), router: (N, in)."""

    config: MoSLDConfig

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        n = config.experts(place)
        self.A = nn.Parameter(torch.empty(self.r, place.in_features))
        self.B = nn.Parameter(torch.zeros(n, place.out_features, self.r))
        self.router = nn.Parameter(torch.empty(n, place.in_features))
        nn.init.normal_(self.A, std=config.a_std or (3 * place.in_features) ** -0.5)
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        gate, share = top_k_softmax(scores(x, self.router), self.config.top_k)  # (1)
        A = F.dropout(self.A, self.config.weight_dropout, self.training)  # (2)
        output = self.scaling * mix(self.dropout(x), A, self.B, gate)  # (3)
        return self.routed(output, gate, self.balance_loss(gate, share, self.config.balance_weight))  # (4)


@register_update
@dataclass
class MoSLDConfig(UpdateConfig):
    """A mixture of LoRAs that share A. Use it wherever PEFT takes a ``LoraConfig``; the paper targets q and v.

    Args:
        r: rank of A and of each B. Paper: 8.
        lora_alpha: Paper: 16.
        num_experts: N, at least top_k: a number; a list with a number for each layer; or a rule, a text of digits
            that cuts the layers into as many equal parts, lowest first. "8642" (paper) gives 8 experts to each layer
            of the lowest quarter and 2 to those of the highest; "2468" is its reverse. Write a rule in quotes. A
            linear that lies in no layer, as of a projector, takes the first number.
        top_k: K, how many experts a token takes, at least 1. Paper: 2.
        weight_dropout: p of equation (2), in [0, 1). Paper: 0.1.
        balance_weight: beta of equation (4), at least 0; 0 leaves the loss out. Reconstructed: 0.01, as in the Switch
            Transformer.
        a_std: deviation of the Gaussian that A starts from, above 0. Reconstructed: without one 1 / sqrt(3 n), that of
            PEFT's LoRA, whose learning rates then fit. PEFT's own Gaussian has 1 / r.
        lora_dropout: of x, beside that of A. Paper: none.

    Raises:
        ValueError: for a value out of its range, or a list of numbers that are not one for each layer.
    """

    method: ClassVar[str] = "mosld"
    update: ClassVar[type[Update]] = MoSLDUpdate
    why_not: ClassVar[str] = "every token takes its own experts"
    sure: ClassVar[str] = "equations from the paper, without code; weight of the loss reconstructed"

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    num_experts: int | list[int] | str = "8642"
    top_k: int = 2
    weight_dropout: float = 0.1
    balance_weight: float = 0.01
    a_std: float | None = None

    def __post_init__(self):
        super().__post_init__()
        numbers = self._numbers()
        if not numbers or not all(isinstance(n, int) and 1 <= n < 1000 for n in numbers):
            raise ValueError(
                "num_experts is a number, a list of one for each layer, or a rule in quotes such as '8642'; got "
                f"{self.num_experts!r}."
            )
        if not 1 <= self.top_k <= min(numbers):
            raise ValueError(f"top_k lies from 1 to the fewest experts of a layer, {min(numbers)}; got {self.top_k}.")
        if not 0 <= self.weight_dropout < 1:
            raise ValueError(f"weight_dropout is at least 0 and below 1; got {self.weight_dropout}.")
        if not 0 <= self.balance_weight < math.inf:
            raise ValueError(f"balance_weight is at least 0 and finite; got {self.balance_weight}.")
        if self.a_std is not None and not 0 < self.a_std < math.inf:
            raise ValueError(f"a_std is above 0, or none; got {self.a_std}.")

    def experts(self, place: Place) -> int:
        """How many experts the linear at ``place`` has."""
        numbers = self._numbers()
        if place.layer is None or place.layers is None:
            return numbers[0]
        if isinstance(self.num_experts, list) and len(numbers) != place.layers:
            raise ValueError(
                f"num_experts lists {len(numbers)} layers, but {place.name} is in a stack of {place.layers}: list as "
                "many, give a number or a rule, or leave it out of target_modules."
            )
        return numbers[place.layer * len(numbers) // place.layers]

    def _numbers(self) -> list[int]:
        """The numbers of experts, from the lowest layer on."""
        if isinstance(self.num_experts, str):
            return [int(digit) for digit in self.num_experts] if self.num_experts.isdecimal() else []
        return self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
