r"""Full fine-tuning: trains the weights themselves: all of them, half of the linears, or the small entries alone.

Hui et al., *HFT: Half Fine-Tuning for Large Language Models*, ACL 2025, arXiv 2404.18466. Three methods that others
are compared with. "all" is plain full fine-tuning. "half", half fine-tuning, is of that paper: it leaves a random half
of the linears as they are, so that they go on knowing what they knew. In each block it trains two of the four of
attention, and of the three of a gated MLP two in a random half of the blocks and one in the others. "magnitude", the
magnitude mask that SPIDER (arXiv 2411.10928) is compared with, leaves the large entries of every weight as they are.

With a frozen W_0 (m x n) and D = W - W_0 (m x n, 0 at the start), which is what is trained and saved; the optimizer
proposes D'_t in step t = 1, 2, ...; rounds are k steps long; H_i is the half of the linears that is drawn for round i,
and s the share of the entries that train:

.. math::
    h &= W_0 x + D x                                                                              \tag{1} \\
    D_t &= M_t \circ D'_t + (1 - M_t) \circ D_{t-1}                                               \tag{2} \\
    M_t &= \big[\text{the linear is in } H_{\lfloor (t-1)/k \rfloor}\big]  & \text{"half"}        \tag{3} \\
    M_{ij} &= \big[|W_0|_{ij} \text{ is not among the } \lfloor (1 - s)\, m n \rfloor \text{ largest}\big]
                                                                           & \text{"magnitude"}   \tag{4}

and M = 1 for "all". A linear that a later round leaves out keeps what it learned before.

What stays frozen in any case: embeddings, norms, biases, and what is out of scope, which is the vision tower and the
projector unless they are asked for, and the head unless ``target_modules`` names it.

**Memory** per weight: D, its gradient and AdamW's two moments take 16 bytes in fp32, beside W_0. "half" takes 2 more
while a step is taken (D of what stands still), "magnitude" 1 (its mask). All of it is sharded under FSDP2. Nothing is
saved by training less: gradients and moments of what stands still are made as well. The products with W are made twice,
for W_0 and for D, as a training of W itself would not need.

No official code of HFT is known, and its paper is known here by what others write of it. This departs from it:

* The paper freezes a half before the step, here it is put back after it. So its gradients count when they are clipped,
  and its moments go on while it stands still.
* The paper halves the norms as well, and trains embeddings and head.
* A round of the paper is a stage of training, or a task of a sequence; here it is the training, or ``round_steps``.
* The paper has blocks of Llama in mind. Here it is half of what lies in one module, whatever that is; a coin is tossed
  for what is left over where an odd number of modules has an odd number of linears.

Where the official code of the magnitude mask (WenkeHuang/SPIDER) departs:

* It trains the projector and the last layers, with their norms and biases; here it is the linears in scope.
* It trains W itself, so that weight decay draws W towards 0; here it draws D towards 0, which is W towards W_0.
* A resumed run takes the weights it resumes from for W_0; here W_0 stays.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..adapters.dense import DenseConfig, DenseUpdate
from ..adapters.layers import sharded_like
from ..adapters.method import Method
from ..adapters.update import Update, UpdateMethod, register_update
from ..ops.masks import magnitude_mask

SELECT = ("all", "half", "magnitude")


def half(names: Iterable[str], seed: int, number: int) -> set[str]:
    """H of equation (3): which of the linears ``names`` train in round ``number``, always the same for a ``seed``.

    Half of those that lie in one module; where their number is odd, one more in half of the modules of this kind.
    """
    draw = random.Random(f"{seed}/{number}")
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    odd: dict[tuple[str, int], list[str]] = {}
    for module, members in modules.items():
        if len(members) % 2:
            odd.setdefault((re.sub(r"\d+", "", module), len(members)), []).append(module)
    more = {module for alike in odd.values() for module in draw.sample(alike, _halved(len(alike), draw))}
    chosen = (draw.sample(members, len(members) // 2 + (module in more)) for module, members in modules.items())
    return {name for names in chosen for name in names}


def _halved(count: int, draw: random.Random) -> int:
    """Half of ``count``; a coin is tossed for what is left over."""
    return (count + draw.getrandbits(1)) // 2


def small(weight: Tensor, share: float) -> Tensor:
    """M of equation (4), a bool tensor of the shape of ``weight``."""
    if int((1 - share) * weight.numel()) == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    return ~magnitude_mask(weight, 1 - share)


class Full(UpdateMethod):
    """Equation (2) after every optimizer step."""

    config: FullConfig

    def __init__(self, config, model, adapter):
        super().__init__(config, model, adapter)
        self._masks: dict[str, Tensor] = {}  # of equation (4), by the name of the linear
        self._held: dict[str, Tensor] = {}  # D of the linears that stand still, while a step is taken

    @torch.no_grad()
    def before_step(self):
        if self.config.select != "half":
            return
        number = self.step // self.config.round_steps if self.config.round_steps else 0
        moving = half(self.updates, self.config.seed, number)  # (3)
        self._held = {name: update.D.clone() for name, update in self.updates.items() if name not in moving}

    @torch.no_grad()
    def after_step(self, step):
        super().after_step(step)
        for name, D in self._held.items():
            self.updates[name].D.copy_(D)  # (2)
        self._held = {}
        if self.config.select == "magnitude":
            for name, update in self.updates.items():
                update.D.mul_(self._mask(name, update))  # (2), where D is 0 off the mask

    def moved(self):
        return self.config.select != "all" and super().moved()  # all of it is trained by any loop

    def _mask(self, name: str, update: Update) -> Tensor:
        if name not in self._masks:
            self._masks[name] = sharded_like(small(update.base_weight(), self.config.share), update.D)  # (4)
        return self._masks[name]


@register_update
@dataclass
class FullConfig(DenseConfig):
    """Full fine-tuning of linears as an adapter. Use it wherever PEFT takes a ``LoraConfig``.

    There is no low rank: ``r``, ``lora_alpha``, their patterns, ``use_rslora`` and ``lora_dropout`` mean nothing here
    and are refused. The learning rate should be smaller than a LoRA's; a tenth of it is a rule of thumb.

    Args:
        select: "all", "half" or "magnitude": what is trained.
        share: for "magnitude", s of equation (4), above 0 and at most 1, where it is "all". SPIDER's code: 0.5.
        round_steps: for "half", the optimizer steps of a round, at least 1; None: one round, the whole training.
        seed: for "half", of the draws: the same halves with the same seed, whatever else is random.

    Raises:
        ValueError: for a value out of its range, a setting of low rank, or one that belongs to another ``select``.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                                      num_hidden_layers=1, num_attention_heads=4))
        >>> model = get_peft_model(model, FullConfig(select="half"))
        >>> sorted(model.targeted_module_names)[:2]
        ['model.layers.0.mlp.down_proj', 'model.layers.0.mlp.gate_proj']
    """

    method: ClassVar[str] = "full"
    update: ClassVar[type[Update]] = DenseUpdate  # (1)
    implementation: ClassVar[type[Method]] = Full
    sure: ClassVar[str] = "HFT from third parties, without code; magnitude mask from the official code of SPIDER"

    select: str = "all"
    share: float = 0.5
    round_steps: int | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.select not in SELECT:
            raise ValueError(f"select is one of {', '.join(SELECT)}; got {self.select!r}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is above 0 and at most 1; got {self.share}.")
        if self.round_steps is not None and self.round_steps < 1:
            raise ValueError(f"round_steps is at least 1, or None for one round; got {self.round_steps}.")
        for name, default, owner in (("share", 0.5, "magnitude"), ("round_steps", None, "half"), ("seed", 0, "half")):
            if getattr(self, name) != default and self.select != owner:
                raise ValueError(f"{name} belongs to select={owner!r}; leave it out with select={self.select!r}.")
