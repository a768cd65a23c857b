r"""Regularized LoRA: a penalty on the update holds the model near what it was.

Li et al., *Explicit Inductive Bias for Transfer Learning with Convolutional Networks*, ICML 2018, arXiv 1802.01483.
Four penalties that other methods are compared with. L2-Reg, of that paper, draws all weights back to the pretrained
ones. Orth-Reg does so most where the update writes into what the pretrained weight writes into. EWC (Kirkpatrick et
al., PNAS 2017, arXiv 1612.00796) does so most where what the base says depends on a weight. O-LoRA (Wang et al.,
Findings of EMNLP 2023, arXiv 2310.14152) keeps the rows of A orthogonal to those of LoRAs that were learned earlier.

With a frozen W0 (m x n), B (m x r), A (r x n), the update D = s B A of a plain LoRA, s = alpha/r, the diagonal F
(m x n) of the base's Fisher information at W0, and A_i of earlier LoRAs of the same linear:

.. math::
    L &= L_{task} + \lambda \sum_{modules} R                                                      \tag{1} \\
    R_{l2} &= \lVert D \rVert_F^2                                                                 \tag{2} \\
    R_{orth} &= \tfrac{m}{\lVert W_0 \rVert_F^2} \lVert W_0^\top D \rVert_F^2                     \tag{3} \\
    R_{olora} &= \textstyle\sum_i \sum_{j,k} \left| A A_i^\top \right|_{jk}                       \tag{4} \\
    R_{ewc} &= \tfrac{1}{2} \textstyle\sum_{j,k} F_{jk}\, D_{jk}^2                                 \tag{5}

(2) and (3) are tr(D' C D) with C = I and with C = m W0 W0' / ||W0||^2, whose eigenvalues have a mean of 1: Orth-Reg is
L2-Reg with each direction of the output weighed by how much of W0 lies in it, and the same lambda fits both. F is
divided by its mean over all adapted weights, so that EWC is half of L2-Reg with each weight weighed by how much depends
on it (``fisher_scale="raw"`` leaves it as it is). The gradients have a closed form:

.. math::
    \frac{\partial R}{\partial B} &= 2 s^2\, C B\, (A A^\top), \qquad
    \frac{\partial R}{\partial A} = 2 s^2\, (B^\top C B)\, A                                      \tag{6} \\
    \frac{\partial R_{olora}}{\partial A} &= \textstyle\sum_i \mathrm{sign}(A A_i^\top)\, A_i     \tag{7} \\
    \frac{\partial R_{ewc}}{\partial B} &= s\, (F \circ D) A^\top, \qquad
    \frac{\partial R_{ewc}}{\partial A} = s\, B^\top (F \circ D)                                  \tag{8}

Nothing of the size of W0 is made, but for F, which EWC keeps in bf16, two bytes for each adapted weight. (3) costs two
products of W0 with r columns in each optimizer step, as much as the forward pass of 2 r tokens, (5) three products of
that size; (2) and (4) cost next to nothing.

F is the mean, over tokens, of squared gradients of the log-likelihood of texts that the base itself wrote, so that no
data of what it knew are needed (``lorasculpt.evaluation.fisher`` says how). ``lorasculpt train`` makes it before
training; in a program of one's own its file is given.

No official code is known of L2-Reg and Orth-Reg on a LoRA, nor of EWC. The paper of L2-Reg writes alpha / 2 for lambda,
and has a weight decay for a new head, which there is none of here. Orth-Reg is reconstructed: it is compared with by
name, and (3) is one reading of it. Another, the overlap of A's rows with the first right-singular vectors of W0, would
have to choose how many, and needs a decomposition of every weight. The paper of EWC has F of the old task's data, which
nobody has of a base; the texts that the base writes stand for them. Its F is not divided by anything.

Where the official code of O-LoRA departs from its paper, this follows the code: it sums absolute values, the paper
squares. Its second term, a norm of A and B, has weight 0 there and is left out. In two things this departs from the
code:

* The code adds (4) in every micro-batch, so that accumulation without DeepSpeed multiplies it. Here it counts once in
  an optimizer step.
* The code keeps the earlier LoRAs beside the new one. So does a run of a sequence of tasks (`lorasculpt.sequence`):
  every task gets a LoRA of its own, and what is written after each is the sum of all so far, one plain LoRA. In any
  other run they are to be merged into the base before (``lorasculpt export --to merged``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from torch import Tensor

from ..adapters.fisher import read_fisher
from ..adapters.layers import Site, sharded_like
from ..adapters.method import Method, MethodConfig, register
from ..adapters.plain import on_disk
from ..errors import UserError
from ..ops.conflict import blocks
from ..ops.sums import total

ROWS = 1024  # of W0 or F that are in fp32 at a time


class Regularized(Method):
    """Equations (1) to (8) on one adapter, whose masks stay all-one."""

    config: RegularizedConfig

    def __init__(self, config, model, adapter):
        super().__init__(config, model, adapter)
        self.earlier: dict[str, Tensor] = {}  # the A_i of a module, one above the other
        self.norms: dict[str, Tensor] = {}  # ||W0||^2 of a module
        self.fisher: dict[str, Tensor] = {}  # F of a module, in bf16, up to a factor
        self.factor = 1.0
        self._value: dict[str, float] = {}

    def begin(self, total_steps):
        self.earlier = _read(self.config.earlier or (), self.sites)
        if self.config.penalty == "ewc" and self.config.weight:
            self._read_fisher()

    def _read_fisher(self) -> None:
        """F of every adapted linear, with the factor that gives it a mean of 1 or its own."""
        if self.config.fisher is None:
            raise UserError(
                "penalty='ewc' needs fisher, a file that lorasculpt.evaluation.fisher makes; only lorasculpt train "
                "makes it by itself."
            )
        shapes = {name: (site.b.out_features, site.a.in_features) for name, site in self.sites.items()}
        found, raw = read_fisher(self.config.fisher, shapes)
        mean = sum(float(F.double().sum()) for F in found.values()) / sum(F.numel() for F in found.values())
        self.factor = raw if self.config.fisher_scale == "raw" else 1 / max(mean, 1e-30)
        self.fisher = {name: F.to(self.sites[name].a.weight.device) for name, F in found.items()}

    @torch.no_grad()
    def penalties(self):
        found, values = {}, []
        for site in self.sites.values() if self.config.weight else ():
            leaves = site.b.weight, site.a.weight
            if not leaves[0].requires_grad:
                continue
            value, *grads = PENALTIES[self.config.penalty](self, site, site.B.float(), site.A.float())
            values.append(value)
            for leaf, grad in zip(leaves, grads, strict=True):
                found[leaf] = sharded_like((self.config.weight * grad).to(leaf.dtype), leaf)  # (1)
        if values:
            self._value["penalty"] = float(total(values))
        return found

    def logs(self):
        return super().logs() | self._value


# --- the table of penalties: R of one module, dR/dB and dR/dA --------------------------------------------------------


def l2(method: Regularized, site: Site, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (2): C = I."""
    return _quadratic(B, B, A, site.scaling)


def orth(method: Regularized, site: Site, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (3), with C B by blocks of rows of W0."""
    weight = site.weight()
    rows = list(blocks(len(weight), ROWS))
    if site.name not in method.norms:
        method.norms[site.name] = torch.stack([weight[i:j].float().square().sum() for i, j in rows]).sum()
    P = torch.zeros_like(A.T)  # W0' B
    for i, j in rows:
        P += weight[i:j].float().T @ B[i:j]
    CB = torch.cat([weight[i:j].float() @ P for i, j in rows])
    CB *= len(weight) / method.norms[site.name].clamp_min(1e-30)  # a weight of zeros has no directions to keep off
    return _quadratic(CB, B, A, site.scaling)


def olora(method: Regularized, site: Site, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (4); 0 for a linear that no earlier LoRA adapts."""
    earlier = method.earlier.get(site.name, A[:0])
    overlap = A @ earlier.T
    return overlap.abs().sum(), torch.zeros_like(B), overlap.sign() @ earlier  # (4), (7)


def ewc(method: Regularized, site: Site, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (5) and (8), by blocks of rows of F."""
    F, s = method.fisher[site.name], site.scaling
    value, grad_B, grad_A = B.new_zeros(()), torch.zeros_like(B), torch.zeros_like(A)
    for i, j in blocks(len(B), ROWS):
        D = s * B[i:j] @ A
        weighed = method.factor * F[i:j].float() * D
        value += (weighed * D).sum() / 2
        grad_B[i:j] = s * weighed @ A.T
        grad_A += s * B[i:j].T @ weighed
    return value, grad_B, grad_A


def _quadratic(CB: Tensor, B: Tensor, A: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """tr(D' C D) and its gradients of equation (6), through r x r matrices."""
    rows, columns = scaling**2 * (A @ A.T), B.T @ CB
    return (rows * columns).sum(), 2 * CB @ rows, 2 * scaling**2 * columns @ A


Penalty = Callable[[Regularized, Site, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
PENALTIES: dict[str, Penalty] = {"l2": l2, "orth": orth, "olora": olora, "ewc": ewc}


def _read(folders: Sequence[str], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """The A_i of equation (4) for every module that an adapter in ``folders`` adapts, (R, n), in fp32."""
    found: dict[str, list[Tensor]] = {}
    for folder in folders:
        if not (Path(folder) / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise UserError(f"earlier names {folder}, which holds no adapter: there is no {SAFETENSORS_WEIGHTS_NAME}.")
        saved = load_peft_weights(folder, device="cpu")
        own = {name: saved.get(on_disk(name, "A")) for name in sites}
        there = {name: A for name, A in own.items() if A is not None}
        if not there or any(A.shape[1] != sites[name].a.in_features for name, A in there.items()):
            raise UserError(f"earlier names {folder}, which is no plain LoRA on linears that this one adapts.")
        for name, A in there.items():
            found.setdefault(name, []).append(A.to(sites[name].a.weight.device, torch.float32))
    return {name: torch.cat(each) for name, each in found.items()}


@register
@dataclass
class RegularizedConfig(MethodConfig):
    """LoRA with a penalty on its update: the baselines that methods against forgetting are compared with.

    All fields of ``LoraConfig`` that leave a plain LoRA behind work; the others are refused. With ``weight=0`` it is
    LoRA, bit for bit.

    Args:
        penalty: "l2", "orth", "olora" or "ewc": equation (2), (3), (4) or (5).
        weight: lambda of equation (1), at least 0. No paper has one for a LoRA but that of O-LoRA, whose code takes
            0.5.
        earlier: folders of the plain LoRAs that "olora" keeps off, relative to the working directory; an empty list
            where there are none yet. They are read when training begins or goes on, and the base should have them
            merged into it. A sequence of tasks says it by itself.
        fisher: file of F for "ewc", as ``lorasculpt.evaluation.fisher`` writes it, relative to the working directory;
            it is read when training begins or goes on. Where a run of the command line leaves it out, F is made before
            training and kept in the run's folder: of the answers in ``data.general``, or without it of texts that the
            base writes, half of them about pictures of the training data.
        fisher_texts: how many texts such an F is made of, at least 1.
        fisher_scale: "mean" divides F by its mean over all adapted weights, "raw" takes it as it is, per token.

    Raises:
        ValueError: for a value out of its range, for "olora" without ``earlier`` or another penalty with it, for
            another penalty than "ewc" with ``fisher``, or for a field of LoraConfig that would not leave a plain LoRA
            behind.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                                      num_hidden_layers=1, num_attention_heads=4))
        >>> model = get_peft_model(model, RegularizedConfig(r=8, target_modules=["q_proj", "v_proj"], penalty="orth"))
        >>> model.peft_config["default"].weight
        0.01
    """

    method: ClassVar[str] = "regularized"
    implementation: ClassVar[type[Method]] = Regularized
    sure: ClassVar[str] = "O-LoRA from the official code; the papers from memory; Orth-Reg reconstructed"

    penalty: str = "l2"
    weight: float = 1e-2
    earlier: list[str] | None = None
    fisher: str | None = None
    fisher_texts: int = 200
    fisher_scale: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty is one of {', '.join(PENALTIES)}; got {self.penalty!r}.")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight is the weight of the penalty, at least 0; got {self.weight}.")
        self.earlier = None if self.earlier is None else [str(folder) for folder in self.earlier]
        if self.earlier is None if self.penalty == "olora" else self.earlier:
            raise ValueError(
                "earlier lists the LoRAs that penalty='olora' keeps off: give both or neither; "
                f"got penalty={self.penalty!r} and earlier={self.earlier}."
            )
        if self.fisher is not None:
            self.fisher = str(self.fisher)
            if self.penalty != "ewc":
                raise ValueError(
                    f"fisher is for penalty='ewc'; got penalty={self.penalty!r} and fisher={self.fisher!r}."
                )
        if self.fisher_texts < 1:
            raise ValueError(f"fisher_texts is at least 1; got {self.fisher_texts}.")
        if self.fisher_scale not in ("mean", "raw"):
            raise ValueError(f"fisher_scale is 'mean' or 'raw'; got {self.fisher_scale!r}.")

    @classmethod
    def apart(cls, settings, earlier):
        """As of ``MethodConfig``."""
        return {"earlier": list(earlier)} if settings.get("penalty") == "olora" else None

    def wants_fisher(self):
        """As of ``MethodConfig``."""
        return self.fisher_texts if self.penalty == "ewc" and self.weight and self.fisher is None else None

    def take_fisher(self, path):
        """As of ``MethodConfig``."""
        self.fisher = path
