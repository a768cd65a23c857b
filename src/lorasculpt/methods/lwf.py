r"""Learning without Forgetting: on the new data the tuned model goes on saying what the base would have said.

Li and Hoiem, *Learning without Forgetting*, ECCV 2016, arXiv 1606.09282. A model that learns a new task answers the new
task's inputs as the old model would have answered them as well, softened by a temperature. No data of old tasks are
needed, and what is held in place is what the model says, not its weights. Here the old model is the base, which is
asked in every forward pass with the adapter off.

With the logits z_0 of the base and z of the tuned model at a position, and the positions P from which a token of an
answer is predicted (those whose label is counted), in all processes:

.. math::
    p &= \mathrm{softmax}(z_0 / T), \qquad q = \mathrm{softmax}(z / T)                            \tag{1} \\
    L_{old} &= \tfrac{T^2}{|P|} \sum_{P} \sum_{v} p_v \log (p_v / q_v)                            \tag{2} \\
    L &= L_{task} + \lambda L_{old}                                                               \tag{3}

(2) is averaged over the micro-batches of an optimizer step. Only the positions in P get logits, a few at a time. Each
micro-batch costs one more forward pass, without gradient; where the language part alone is adapted, of that part
alone.

Where the official code (lizhitwo/LearningWithoutForgetting) departs:

* It has the cross-entropy of q under p, which is (2) and a constant.
* It has no T^2, the factor with which the gradients of all temperatures are of one size (Hinton et al., 2015). Its
  lambda = 1 at T = 2 is 1/4 here.
* It knows classes, and gives each task a head, warmed up alone before the rest is trained. A language model has one
  head for all tasks, and nothing to warm up.
* It records the old answers once; the base is asked anew here, since pictures and batches may change from pass to pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..adapters.carrier import across, carry
from ..adapters.method import Method, MethodConfig, register
from ..adapters.teacher import Teacher
from ..errors import UserError
from ..models.parts import parts
from ..ops.conflict import blocks

TOKENS = 256  # that have logits at a time


class LwF(Method):
    """Equations (1) to (3) on one adapter, whose masks stay all-one."""

    config: LwFConfig

    def __init__(self, config, model, adapter):
        super().__init__(config, model, adapter)
        self.base = model.model
        self.teacher: Teacher | None = None
        self.share = torch.ones(())  # of a micro-batch in its optimizer step
        self._noted: list[Tensor] = []
        self._value: dict[str, float] = {}

    def begin(self, total_steps):
        self.close()
        self.teacher = Teacher(self.base, self._body(), self._compare) if self.config.weight else None

    def _body(self):
        """What is run twice: the language model if all that is trained is inside, or else everything but the head.

        What a modules_to_save holds may act before it, as embeddings and projectors do.
        """
        head = self.base.get_output_embeddings()
        saved = [m for m in self.base.modules() if isinstance(m, AuxiliaryTrainingWrapper) and m is not head]
        try:
            language = parts(self.base).language
        except UserError:  # a family that nobody knows
            language = None
        if language and not saved and all(name.startswith(f"{language}.") for name in self.sites):
            return self.base.get_submodule(language)
        return self.base.base_model

    def open(self, weight):
        self.share.fill_(weight)
        self._noted = []
        if self.teacher is not None:
            self.teacher.attach()

    def close(self):
        if self.teacher is not None:
            self.teacher.detach()

    def _compare(self, hidden: Tensor, tuned: Tensor, base: Tensor) -> Tensor:
        """``hidden``, with equation (3)'s second term on its way to it."""
        sums = [
            checkpoint(self._divergence, tuned[i:j], base[i:j], use_reentrant=False)
            for i, j in blocks(len(tuned), TOKENS)
        ]
        total = torch.stack(sums).sum() if sums else hidden.new_zeros((), dtype=torch.float32)
        total, count = across(torch.stack([total, total.new_tensor(float(len(tuned)))]))
        loss = self.config.temperature**2 * total / count.clamp_min(1)  # (2)
        return carry(hidden, self.config.weight * loss, self.share, loss, self._note)  # (3)

    def _divergence(self, tuned: Tensor, base: Tensor) -> Tensor:
        """KL(p || q) of equations (1) and (2), summed over tokens; both are hidden states, (tokens, features)."""
        assert self.teacher is not None
        with self.teacher.asked(self.teacher.head):
            p = (self.teacher.logits(base) / self.config.temperature).log_softmax(-1)
        q = (self.teacher.logits(tuned) / self.config.temperature).log_softmax(-1)
        return F.kl_div(q, p, reduction="sum", log_target=True)

    def _note(self, value: Tensor, loss: Tensor) -> None:
        self._noted.append(value)

    def after_step(self, step):
        super().after_step(step)
        if self._noted:
            self._value["distillation"] = float(torch.stack(self._noted).mean())

    def logs(self):
        return super().logs() | self._value


@register
@dataclass
class LwFConfig(MethodConfig):
    """LoRA that is taught by its own base on the new data: a baseline that needs no data of old tasks.

    All fields of ``LoraConfig`` that leave a plain LoRA behind work; the others are refused. The model must be given
    the labels, as every trainer does; the weights of the base, its projector among them, stay frozen. With ``weight=0``
    it is LoRA, bit for bit.

    Args:
        weight: lambda of equation (3), at least 0. Paper: 1, without the factor T^2.
        temperature: T of equation (1), above 0. Paper: 2.

    Raises:
        ValueError: for a value out of its range, or a field of LoraConfig that would not leave a plain LoRA behind.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                                      num_hidden_layers=1, num_attention_heads=4))
        >>> model = get_peft_model(model, LwFConfig(r=8, target_modules=["q_proj", "v_proj"]))
        >>> model.peft_config["default"].temperature
        2.0
    """

    method: ClassVar[str] = "lwf"
    implementation: ClassVar[type[Method]] = LwF
    sure: ClassVar[str] = "loss and temperature from the official code; lambda from the paper, by memory"

    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight is the weight of what the base would have said, at least 0; got {self.weight}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is above 0; got {self.temperature}.")
