r"""AM-LoRA: a LoRA for every task of a sequence, and attention over what they all say.

Liu et al., *Learning Attentional Mixture of LoRAs for Language Model Continual Learning*, arXiv 2409.19611. Tasks are
learned one after the other, without old data. Each gets a LoRA of its own; those of earlier tasks are frozen, and on
every token an attentional selector weighs them all by their outputs, so that a new task neither overwrites the old ones
nor does without them. Nobody has to name the task of a question.

After t tasks, with a small head (v_i, c_i) for each LoRA (A_i, B_i) and scores and weights in fp32:

.. math::
    o_i &= \tfrac{\alpha}{r} B_i A_i\, \mathrm{drop}(x), \qquad i = 1, \dots, t                   \tag{1} \\
    u_i &= \mathrm{relu}(v_i \cdot o_i + c_i)                                                     \tag{2} \\
    h &= W_0 x + \sum_{i=1}^{t} g_i\, o_i, \qquad g = \mathrm{softmax}(u_1, \dots, u_t)           \tag{3} \\
    \mathcal{L} &= \mathcal{L}_{task} + \lambda \textstyle\sum_{\text{linears}}
    \text{mean over tokens of } \sum_i |u_i|                                                      \tag{4}

With one task the softmax is 1, equation (4) is left out, and this is LoRA. At a switch the output jumps, because a
softmax over one entry more gives less to all others. With Z = sum of exp(u_i) over the entries so far, a new entry of
output o' and score u' makes of what the adapter adds, h - W_0 x,

.. math::
    h' - W_0 x = \frac{Z\, (h - W_0 x) + e^{u'} o'}{Z + e^{u'}}                                    \tag{5}

For an empty LoRA (B = 0) of score 0 that is Z / (Z + 1) times what it was: at least t / (t + 1), so that the second
task begins with the first one's LoRA at half its strength or a little more. Training makes up for it.

No official code is known, and of the paper only the abstract was at hand: what is attended to, the frozen LoRAs and an
L1 norm are the authors'; the form of (2) and (4) is reconstructed. The L1 norm of a softmax is always 1, so it is taken
of the scores. ``gate`` has two other readings of the selector, ``selector`` another of what is trained in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.update import Update, UpdateConfig, register_update
from ..errors import UserError
from ..ops.routing import token_sums, wide


class AMLoRAUpdate(Update):
    """Equations (1) to (4) on one linear, for t tasks.

    A: (r, in) and B: (out, r) of the newest task; A_old: (t - 1, r, in) and B_old: (t - 1, out, r), frozen, of the
    others. v: (t, out), (t, out, out) for ``gate="dense"``; c: (t,), (t, out) for gates of features. With
    ``selector="new"`` v and c are of the newest task alone, and v_old and c_old, frozen, of the others.
    """

    config: AMLoRAConfig
    A_old: Tensor | None  # None where there is no other task
    B_old: Tensor | None
    v_old: Tensor | None
    c_old: Tensor | None

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        old, features = len(config.tasks) - 1, place.out_features
        self.A = nn.Parameter(torch.empty(self.r, place.in_features))
        self.B = nn.Parameter(torch.zeros(features, self.r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.keep("A_old", torch.zeros(old, self.r, place.in_features))
        self.keep("B_old", torch.zeros(old, features, self.r))
        v, c = self._heads(old + 1)
        if config.selector == "new":
            self.keep("v_old", v[:-1].clone())
            self.keep("c_old", c[:-1].clone())
            v, c = v[-1:].clone(), c[-1:].clone()
        self.v, self.c = nn.Parameter(v), nn.Parameter(c)

    def forward(self, x: Tensor) -> Tensor:
        A, B = _joined(self.A_old, self.A[None]), _joined(self.B_old, self.B[None])
        z = F.linear(self.dropout(x), A.flatten(0, 1)).unflatten(-1, A.shape[:2])  # (..., t, r)
        if self.config.gate == "token":
            score = self.token_scores(z, B)  # (..., t)
            gate = score.softmax(-1)
            z = z * gate[..., None].to(z.dtype)
            output = self.scaling * F.linear(z.flatten(-2), B.transpose(0, 1).flatten(1))  # (3)
        else:
            o = self.scaling * torch.einsum("...tr,tor->...to", z, B)  # (1)
            score = self.feature_scores(o)  # (..., t, out)
            gate = score.softmax(-2)
            output = (gate.to(o.dtype) * o).sum(-2)  # (3)
            score, gate = score.mean(-1), gate.mean(-1)
        return self.routed(output, gate, self.sparsity(score, x))

    def token_scores(self, z: Tensor, B: Tensor) -> Tensor:
        """(..., t) the scores, from z = A drop(x): v_i . B_i z_i is (v_i B_i) . z_i, and no o_i is ever formed."""
        with torch.autocast(z.device.type, enabled=False):
            v, c = self.heads()
            keys = (wide(B) * v[..., None]).sum(1)
            return F.relu(self.scaling * (wide(z) * keys).sum(-1) + c)  # (2)

    def feature_scores(self, o: Tensor) -> Tensor:
        """(..., t, out) the scores of every feature."""
        with torch.autocast(o.device.type, enabled=False):
            v, c = self.heads()
            if self.config.gate == "dense":
                return F.relu(torch.einsum("...to,tpo->...tp", wide(o), v) + c)
            return F.relu(wide(o) * v + c)

    def heads(self) -> tuple[Tensor, Tensor]:
        """v and c of all tasks."""
        if self.config.selector == "all":
            return wide(self.v), wide(self.c)
        return wide(_joined(self.v_old, self.v)), wide(_joined(self.c_old, self.c))

    def sparsity(self, score: Tensor, x: Tensor) -> Tensor | None:
        """lambda |u| over the tokens (``shared``); ``score`` is (..., t). None where it would do nothing."""
        if not (self.config.l1_weight and score.shape[-1] > 1 and self._learning()):
            return None
        sums, tokens = token_sums(score, self.context.real(x))
        total, tokens = self.shared(torch.stack([sums.sum(), tokens]))
        return self.config.l1_weight * total / tokens.clamp_min(1)  # (4)

    # --- the switch of tasks ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def append(self, lora: tuple[Tensor, Tensor] | None = None) -> None:
        if lora is not None and self.config.selector == "new":
            raise UserError("a LoRA from elsewhere needs selector='all': with 'new' its head would never be trained.")
        a, b = (self.A, self.B) if lora is None else (given.to(self.A) for given in lora)
        self.keep("A_old", _joined(self.A_old, a[None]))
        self.keep("B_old", _joined(self.B_old, b[None]))
        if lora is None:
            a = torch.empty_like(self.A)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            self.A, self.B = _as(self.A, a), _as(self.B, torch.zeros_like(self.B))  # (5) with o' = 0 and u' = 0
        v, c = (head.to(self.v) for head in self._heads(1))
        if self.config.selector == "new":
            self.keep("v_old", _joined(self.v_old, self.v))
            self.keep("c_old", _joined(self.c_old, self.c))
        else:
            at = len(self.v) - (lora is not None)  # what comes from elsewhere stands before the newest
            v, c = torch.cat([self.v[:at], v, self.v[at:]]), torch.cat([self.c[:at], c, self.c[at:]])
        self.v, self.c = _as(self.v, v), _as(self.c, c)

    def _heads(self, n: int) -> tuple[Tensor, Tensor]:
        """v and c of ``n`` new LoRAs: small numbers, as in nn.Linear, and 0."""
        features = self.place.out_features
        v = torch.empty(n, features, features) if self.config.gate == "dense" else torch.empty(n, features)
        c = torch.zeros(n) if self.config.gate == "token" else torch.zeros(n, features)
        return v.uniform_(-(features**-0.5), features**-0.5), c


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old.to(new.dtype), new])


def _as(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A new parameter, trained or not as ``parameter`` is: no optimizer has anything to remember of it."""
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


@register_update
@dataclass
class AMLoRAConfig(UpdateConfig):
    """A sequence of LoRAs and attention over their outputs. Use it wherever PEFT takes a ``LoraConfig``; then
    ``lorasculpt.add_task(model, "name")`` before each further task. Ranks and rates of the paper are not known.

    Args:
        tasks: the tasks learned so far, the newest last. To begin, the first one's name; ``add_task`` appends the
            others. They need not be in the data: nobody has to name the task of a question.
        gate: "token" gives every LoRA one weight on a token, by equation (2); "feature" one for each of its features,
            u_i = relu(v_i * o_i + c_i) elementwise; "dense" likewise with a full matrix, u_i = relu(V_i o_i + c_i),
            which has out x out weights for each task and linear.
        selector: which heads a new task trains: "all", or the "new" one alone, so that those of earlier tasks stay as
            they are, bit for bit. Alone a LoRA has no use for its head, so the first one's is then never trained.
        l1_weight: lambda of equation (4), at least 0; with gates of features of the mean over them. Not known.

    Raises:
        ValueError: for a value out of its range, or no task.
    """

    method: ClassVar[str] = "am_lora"
    update: ClassVar[type[Update]] = AMLoRAUpdate
    why_not: ClassVar[str] = "every token weighs the LoRAs anew"
    sequence: ClassVar[bool] = True
    sure: ClassVar[str] = "idea from the abstract; every detail reconstructed"

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    tasks: list[str] = field(default_factory=lambda: ["first"])
    gate: str = "token"
    selector: str = "all"
    l1_weight: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks:
            raise ValueError('tasks names at least the first task, such as ["first"].')
        if self.gate not in ("token", "feature", "dense"):
            raise ValueError(f"gate is 'token', 'feature' or 'dense'; got {self.gate!r}.")
        if self.selector not in ("all", "new"):
            raise ValueError(f"selector is 'all' or 'new'; got {self.selector!r}.")
        if not 0 <= self.l1_weight < math.inf:
            raise ValueError(f"l1_weight is at least 0; got {self.l1_weight}.")
