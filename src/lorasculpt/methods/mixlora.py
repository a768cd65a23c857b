r"""Conditional MixLoRA: every sample builds a LoRA of its own, from pools of rank-one factors.

Shen et al., *Multimodal Instruction Tuning with Conditional Mixture of LoRA*, ACL 2024, arXiv 2402.15896. One linear
has E factors for A and E for B, of which a sample takes r of each for all its tokens: those of A by its mean input,
those of B also by the factors of A. Tasks that pull in different directions can then take different factors. (Not the
MixLoRA of arXiv 2404.15159, a mixture of experts in the feed-forward blocks.)

With factors a_e (n numbers each) and b_e (m numbers each), routers W_A, W_B (E x n) and W_AB (r x n x E), all choices
in fp32 from the input before dropout, and the k-th of each choice in the order of falling scores:

.. math::
    \bar x &= \text{mean of } x \text{ over the real tokens of the sample}                        \tag{1} \\
    s_A &= W_A \bar x, \qquad I_A = \mathrm{top}_r(s_A)                                           \tag{2} \\
    s_B &= \log\big(\mathrm{softmax}(W_B \bar x) + \lambda\, \mathrm{softmax}(u)\big), \qquad
    u = \textstyle\sum_{k=1}^{r} \mathrm{softmax}(a_{I_A(k)} W_{AB}[k]), \qquad
    I_B = \mathrm{top}_r(s_B)                                                                     \tag{3} \\
    h &= W_0 x + \tfrac{\alpha}{r} \sum_{k=1}^{r} g_{A,k}\, g_{B,k}\,
    b_{I_B(k)} \big(a_{I_A(k)} \cdot \mathrm{drop}(x)\big)                                        \tag{4} \\
    g_{A} &= r\, \mathrm{softmax}\big(s_A[I_A]\big), \qquad g_{B} = r\, \mathrm{softmax}\big(s_B[I_B]\big)
    \qquad \text{or } 1                                                                           \tag{5}

Equation (2) is the paper's independent factor selection, (3) its conditional one; the logarithm changes no choice. The
official code (VT-NLP/MixLoRA) marks its routers as trainable, but a choice has no gradient, so that they stay as they
were drawn; this is the default here too (``router_grad="none"``: g = 1), and the routers are then saved, not trained.
Weights that train them are reconstructed: the code's own, which never run, sum to 1 and not to r.

Where the code departs: it counts padding tokens in (1) (never done here), and it chooses anew for every token that is
generated with a cache. Here the choice that the prompt made holds for the whole generation. In training (1) sees the
answer too, which no generation can: ``pool="prompt"`` leaves it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.update import Update, UpdateConfig, register_update
from ..errors import UserError
from ..ops.routing import wide


class MixLoRAUpdate(Update):
    """Equations (1) to (5) on one linear. A: (E, in), B: (E, out), W_A and W_B: (E, in), W_AB: (r, in, E)."""

    config: MixLoRAConfig

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        factors, features = config.num_factors, place.in_features
        self.A = nn.Parameter(torch.empty(factors, features))
        self.B = nn.Parameter(torch.zeros(factors, place.out_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self._add_router("W_A", features, factors, features)
        self._add_router("W_B", features, factors, features)
        if config.condition == "input_lora_a":
            self._add_router("W_AB", self.r * features, self.r, features, factors)
        self._held: tuple[Tensor, Tensor] | None = None  # what the last prompts chose

    def _add_router(self, name: str, fan_in: int, *shape: int) -> None:
        router = torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)  # as nn.Linear
        if self.config.router_grad == "none":
            self.keep(name, router)
        else:
            self.register_parameter(name, nn.Parameter(router))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise UserError(
                f"MixLoRA chooses for every sample, and {self.place.name} gets tokens that are not in rows of one "
                "sample each: leave it out of target_modules."
            )
        if self.context.continues:
            chosen, weight = self._choice_of_prompts(x)
        else:
            chosen, weight = self.choose(x)
            self._held = chosen, weight.detach()
        a, b = self.A[chosen[:, 0]], self.B[chosen[:, 1]]
        z = self.dropout(x) @ a.transpose(1, 2)
        gate = (weight[:, 0] * weight[:, 1])[:, None].to(z.dtype)
        output = self.scaling * (gate * z) @ b  # (4)
        # the factors of A, then those of B: each pool gets the same sum, so all have the same fair share
        load = weight.new_zeros(len(x), 2, len(self.A)).scatter(-1, chosen, weight.detach())
        return self.routed(output, load.flatten(1))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, 2, r) both: the factors of A and of B that every row takes, and their weights."""
        with torch.autocast(x.device.type, enabled=False):
            mean = self.pooled(wide(x))
            chosen_a, weight_a = self._top(F.linear(mean, wide(self.W_A)))  # (2)
            score = F.linear(mean, wide(self.W_B))
            if self.config.condition == "input_lora_a":
                logits = torch.einsum("bkn,kne->bke", wide(self.A[chosen_a]), wide(self.W_AB))
                u = logits.softmax(-1).sum(1)
                conditional = u.log_softmax(-1) + math.log(self.config.cfs_weight)
                score = torch.logaddexp(score.log_softmax(-1), conditional)  # (3)
            chosen_b, weight_b = self._top(score)
        return torch.stack([chosen_a, chosen_b], 1), torch.stack([weight_a, weight_b], 1)

    def pooled(self, x: Tensor) -> Tensor:
        """(rows, in) the mean over what counts of every row; plain text without a prompt counts as a whole."""
        counted = self.context.real(x)
        if self.config.pool == "prompt" and (prompt := self.context.prompts(x)) is not None:
            whole = torch.ones_like(prompt) if counted is None else counted
            counted = torch.where(prompt.any(1, keepdim=True), prompt, whole)
        if counted is None:
            return x.mean(1)
        total = x.masked_fill(~counted[..., None], 0).sum(1)
        return total / counted.sum(1, keepdim=True).clamp_min(1)  # (1)

    def _top(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, r) both: the r best of ``score`` (rows, E), best first, and their weights."""
        top, chosen = score.topk(self.r)
        if self.config.router_grad == "none":
            return chosen, torch.ones_like(top)
        weight = self.r * top.softmax(-1)  # (5)
        return chosen, weight if self.config.router_grad == "weighted" else 1 + (weight - weight.detach())

    def _choice_of_prompts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = 0 if self._held is None else len(self._held[0])
        if self._held is None or rows != len(x):
            raise UserError(
                f"{len(x)} rows go on with a generation, but {rows} prompts chose the factors of {self.place.name}: "
                "pass the prompts and what follows them through this adapter in the same rows."
            )
        return self._held


@register_update
@dataclass
class MixLoRAConfig(UpdateConfig):
    """A LoRA per sample, of factors from pools. Use it wherever PEFT takes a ``LoraConfig``; the paper targets all
    linears of the language model.

    Args:
        r: how many factors of each pool a sample takes. Paper: 4 (from memory).
        lora_alpha: Official script: 2 E.
        num_factors: E, the size of each pool, at least r. Paper: 16 (from memory).
        condition: what factors of B are chosen by: "input" is the input alone, as for A; "input_lora_a" also the
            factors of A that were chosen, the paper's conditional factor selection.
        cfs_weight: lambda of equation (3), above 0. Official code: 1 (there ``ifs_weight``).
        router_grad: "none" leaves the routers as they are drawn, as the official code does; "straight_through" trains
            them by the weights of equation (5) in the backward pass alone; "weighted" applies the weights.
        pool: what equation (1) is the mean of in training: "sequence" is prompt and answer, as in the official code;
            "prompt" the prompt alone, so that training chooses as generation does. Labels tell where it ends: in a
            loop written by hand give them to the model, or all that is real counts.

    Raises:
        ValueError: for a value out of its range.
    """

    method: ClassVar[str] = "mixlora"
    update: ClassVar[type[Update]] = MixLoRAUpdate
    why_not: ClassVar[str] = "every sample chooses its own factors"
    clock: ClassVar[bool] = False
    sure: ClassVar[str] = "equations from the official code, but for router weights; sizes of the paper from memory"

    r: int = 4
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    num_factors: int = 16
    condition: str = "input_lora_a"
    cfs_weight: float = 1.0
    router_grad: str = "none"
    pool: str = "sequence"

    def __post_init__(self):
        super().__post_init__()
        rank = max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r
        if self.num_factors < rank:
            raise ValueError(f"num_factors is at least r, here {rank}; got {self.num_factors}.")
        if self.condition not in ("input", "input_lora_a"):
            raise ValueError(f"condition is 'input' or 'input_lora_a'; got {self.condition!r}.")
        if not 0 < self.cfs_weight < math.inf:
            raise ValueError(f"cfs_weight is above 0 (without it: condition='input'); got {self.cfs_weight}.")
        if self.router_grad not in ("none", "straight_through", "weighted"):
            raise ValueError(f"router_grad is 'none', 'straight_through' or 'weighted'; got {self.router_grad!r}.")
        if self.pool not in ("sequence", "prompt"):
            raise ValueError(f"pool is 'sequence' or 'prompt'; got {self.pool!r}.")
