r"""LoRASculpt: prune the redundancy out of a LoRA once, and steer the rest away from weights that hold knowledge.

Liang et al., *LoRASculpt: Sculpting LoRA for Harmonizing General and Specialized Knowledge in Multimodal Large Language
Models*, CVPR 2025, arXiv 2503.16843. A dense LoRA is trained for a few steps; then the largest entries of A and of B
are kept, the others are set to zero for good (SRR). All along, a penalty weighs the update B A by how large the
pretrained weight is in each place (RKH).

With a frozen W0 (m x n), B (m x r), A (r x n), scale alpha/r:

.. math::
    h &= W_0 x + \tfrac{\alpha}{r} (B \odot M_B)(A \odot M_A)\, \mathrm{drop}(x)                              \tag{1} \\
    M_A &= \mathrm{top}_{\lfloor s_A r n \rfloor}(|A|),\quad
    M_B = \mathrm{top}_{\lfloor s_B m r \rfloor}(|B|) \quad \text{at step } T_0,\ \text{all-one before}       \tag{2} \\
    M &= \tanh\left(\omega \left| 1 / \ln\left( |W_0| / \lVert W_0 \rVert_F + 10^{-15} \right) \right|\right) \tag{3} \\
    L_{CMR} &= \frac{1}{\#} \sum_{modules} \lVert M \odot (B A) \rVert_F                                      \tag{4} \\
    L &= L_{task} + \lambda L_{CMR}                                                                           \tag{5}

Theorem 1: independent masks of density s_A and s_B give B A an expected density of 1 - (1 - s_A s_B)^r, which
``delta_density`` solves for s_A = s_B.

Where the released code departs from the paper, the code is the default and the paper an option:

* The code penalises q, k and v only, the mask covers all adapted linears: ``cmr_modules``.
* The paper also penalises a LoRA on the connector, with a weight of its own; the code trains the connector fully:
  ``cmr_connector_weight``.
* The code projects before each micro-batch, so what it saves holds values of the last step off the mask. Here the
  weights are projected right after every step, and a file is truly sparse.
* The code loses its masks when a run is resumed after T_0. Here they are saved beside the adapter.
* ``rescale`` is ours, not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapters.layers import Site, full, sharded, sharded_like
from ..adapters.method import Method, MethodConfig, pruned, register
from ..errors import UserError
from ..models.parts import FAMILIES
from ..ops.conflict import awareness, conflict
from ..ops.density import product_density, solve_density
from ..ops.masks import kept, magnitude_mask, pack, unpack
from ..ops.sums import total

CONNECTORS = {path.rpartition(".")[2] for parts in FAMILIES.values() for path in parts.projector} | {"mm_projector"}
"""Last names of what joins vision and language; ``mm_projector`` is that of the released code's LLaVA."""


class Sculpt(Method):
    """Equations (1) to (5) on one adapter."""

    config: LoRASculptConfig

    def __init__(self, config, model, adapter):
        super().__init__(config, model, adapter)
        self.prune_step: int | None = None if isinstance(config.prune_step, float) else config.prune_step
        self.pruned = False
        self.removed: float | None = None  # share of the update's energy that pruning took, where it is known
        self._seen = False  # whether a step has begun
        self._squared: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._cmr: dict[str, float] = {}
        self._density: dict[str, float] = {}
        for name, site in self.sites.items():  # an impossible density is refused before training, not at step T_0
            for leaf, density in self._pair(site):
                try:
                    kept(leaf.weight.numel(), density)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        language = self._summed()
        if config.cmr_weight and language and not self._penalised():
            names = sorted({site.name.rpartition(".")[2] for site in language})
            raise ValueError(
                f"cmr_modules={config.cmr_modules} names none of the adapted linears ({', '.join(names)}), so nothing "
                "would be penalised; name some of them, or 'all', or set cmr_weight=0."
            )

    # --- pruning --------------------------------------------------------------------------------------------------

    def _leaves(self) -> Iterator[tuple[nn.Linear, float]]:
        """Every masked leaf of equation (1), which PEFT computes through them, with the density it is pruned to."""
        for site in self.sites.values():
            yield from self._pair(site)

    def _pair(self, site: Site) -> Iterator[tuple[nn.Linear, float]]:
        return zip((site.a, site.b), self.config.densities(site.a.weight.shape[0]), strict=True)

    def begin(self, total_steps):
        if self.prune_step is None:
            if total_steps is None:
                raise ValueError(
                    f"prune_step={self.config.prune_step} is a share of training: give the clock total_steps."
                )
            self.prune_step = self.config.pruned_after(total_steps)
        if total_steps is not None and not self.pruned:
            self.config.check_steps(self.step + total_steps)  # it may be one that was stopped early and goes on
        self._seen = False

    def open(self, weight):
        fresh = not (self._seen or self.pruned or self.step or any(map(sharded, self.parameters())))
        self._seen = True
        if fresh and pruned([site.A for site in self.sites.values()]):
            raise UserError(
                "this adapter was pruned and its masks are not here, so training would fill its zeros again: load the "
                "state of the clock with the weights (clock.load_state_dict, or "
                "accelerator.register_for_checkpointing(clock) before save_state and load_state)."
            )

    def after_step(self, step):
        super().after_step(step)
        if not self.pruned and step >= self.prune_step:
            self.prune()
        self.settle()

    @torch.no_grad()
    def prune(self) -> None:
        """Equation (2), once: keep the largest entries of every A and B and zero the others."""
        before = self._energy()
        for leaf, density in self._leaves():
            leaf.mask.copy_(magnitude_mask(full(leaf.weight), density))
        self.removed = 1 - self._energy() / before if before else 0.0
        for leaf, _ in self._leaves() if self.config.rescale else ():
            weight = full(leaf.weight).float()
            energy, left = weight.square().sum(), (weight * leaf.mask).square().sum()
            gain = (energy / left).sqrt() if left > 0 else torch.ones_like(left)
            leaf.weight.mul_(gain.to(leaf.weight.dtype))
        self.pruned = True
        self._density = {}

    def _energy(self) -> float:
        """The squared norm of the update, summed over all modules, of what the masks leave of A and B."""
        found = 0.0
        for site in self.sites.values():
            B, A = (full(leaf.weight).float() * leaf.mask for leaf in (site.b, site.a))
            found += site.scaling**2 * float(((B.T @ B) * (A @ A.T)).sum())  # ||B A||^2 = tr(B'B AA')
        return found

    # --- the penalty ----------------------------------------------------------------------------------------------

    def _summed(self) -> list[Site]:
        """The modules that equation (4) may sum over: the connector apart, those of the language model.

        A vision tower has linears of the same names. Its modules count where ``cmr_modules`` is "all", and where it
        alone is adapted.
        """
        others = [site for name, site in self.sites.items() if not _in_connector(name)]
        language = [site for site in others if site.name in self.language]
        return others if self.config.cmr_modules == "all" else language or others

    def _penalised(self) -> list[tuple[Site, float]]:
        """The modules of equation (4) with lambda / # each; the connector is a group of its own."""
        wanted = self.config.cmr_modules
        language = [site for site in self._summed() if wanted == "all" or site.name.rpartition(".")[2] in wanted]
        connector = [site for name, site in self.sites.items() if _in_connector(name)]
        groups = (language, self.config.cmr_weight), (connector, self.config.cmr_connector_weight)
        return [(site, weight / len(group)) for group, weight in groups if weight for site in group]

    def _squared_awareness(self, site: Site):
        """``squared(i, j)``: M o M of equation (3) for rows i to j, from memory or computed anew."""
        name, omega = site.name, self.config.omega
        if name not in self._norms:
            self._norms[name] = torch.linalg.vector_norm(site.weight().float())
        if self.config.cmr_memory == "cache":
            if name not in self._squared:
                self._squared[name] = awareness(site.weight(), self._norms[name], omega).square_()
            return lambda i, j: self._squared[name][i:j]
        weight = site.weight()
        return lambda i, j: awareness(weight[i:j], self._norms[name], omega).square_()

    @torch.no_grad()
    def penalties(self):
        found, norms = {}, []
        for site, weight in self._penalised():
            a, b = site.a.weight, site.b.weight
            if not a.requires_grad:
                continue
            norm, grad_b, grad_a = conflict(site.B, site.A, self._squared_awareness(site))  # (3), (4)
            norms.append(norm)
            masks = (site.b.mask, site.a.mask)
            for leaf, grad, mask in zip((b, a), (grad_b, grad_a), masks, strict=True):
                found[leaf] = sharded_like((weight * grad * mask).to(leaf.dtype), leaf)  # (5)
        if norms:
            self._cmr["cmr"] = float(total(norms)) / len(norms)
        return found

    # --- what is shown, what is saved -----------------------------------------------------------------------------

    def logs(self):
        if not self._density or not self.pruned:
            self._density = self._densities()
        numbers = super().logs() | self._cmr | self._density
        if self.pruned and self.removed is not None:
            numbers["pruned_energy"] = self.removed
        return numbers

    def _densities(self) -> dict[str, float]:
        """Density of A, B and B A over all modules: 1 before pruning; afterwards the masks never change."""
        found = {}
        for key in ("a", "b", "ba"):
            nonzero = total = 0.0
            for site in self.sites.values():
                A, B = site.A, site.B
                size = {"a": A.numel(), "b": B.numel(), "ba": B.shape[0] * A.shape[1]}[key]
                if not self.pruned:
                    share = 1.0
                elif key == "ba":
                    share = product_density(B, A)
                else:
                    share = float((site.a if key == "a" else site.b).mask.float().mean())
                nonzero, total = nonzero + share * size, total + size
            found[f"density_{key}"] = nonzero / total
        return found

    def loaded(self, weights):
        """Take the masks from the zeros of a sculpted file; a dense one lifts them.

        A file is sculpted if no factor that pruning shortens holds more non-zeros than its density keeps, and one
        holds some (a fresh B is all 0). Its non-zeros are then the mask, provably so where their number is the number
        kept; where a kept entry happens to be 0, ``uncertain`` asks for the state file.
        """
        nonzero, counts = {}, []
        keys = [f"{name}.{factor}" for name in self.sites for factor in ("lora_A", "lora_B")]
        for key, (leaf, density) in zip(keys, self._leaves(), strict=True):
            saved = weights.get(f"base_model.model.{key}.{self.adapter}.weight")
            if saved is not None and saved.shape == leaf.weight.shape:  # PEFT refuses a misfit right after this
                nonzero[leaf] = saved != 0
                counts.append((int(nonzero[leaf].sum()), kept(saved.numel(), density), saved.numel()))
        shortened = [(found, most) for found, most, numel in counts if most < numel]
        self.pruned = all(found <= most for found, most in shortened) and any(found for found, _ in shortened)
        self.uncertain = self.pruned and any(found != most for found, most, _ in counts)
        for leaf, mask in nonzero.items():
            leaf.mask.copy_(mask if self.pruned else torch.ones_like(mask))

    def state(self):
        values = {"step": self.step, "pruned": self.pruned, "prune_step": self.prune_step, "removed": self.removed}
        tensors = {}
        if self.pruned:
            for site in self.sites.values():
                tensors[f"{site.name}.lora_A.mask"] = pack(site.a.mask)
                tensors[f"{site.name}.lora_B.mask"] = pack(site.b.mask)
        return values, tensors

    def has_tensors(self, values):
        return values["pruned"]

    def restore(self, values, tensors):
        self.step, self.pruned, self.prune_step = values["step"], values["pruned"], values["prune_step"]
        self.removed, self.uncertain = values["removed"], False
        if self.pruned and not tensors:
            return  # the masks stay those that `loaded` read off the zeros
        for site in self.sites.values():
            for factor, leaf in (("lora_A", site.a), ("lora_B", site.b)):
                packed = tensors.get(f"{site.name}.{factor}.mask")
                mask = torch.ones_like(leaf.mask) if packed is None else unpack(packed, leaf.weight.shape)
                leaf.mask.copy_(mask)

    def settle(self):
        if self.pruned:
            for leaf, _ in self._leaves():
                leaf.project()

    def unfinished(self):
        if self.pruned or not self.step:
            return None
        return f"it is not pruned: training ended, or its best model was saved, before prune_step={self.prune_step}"


def _in_connector(name: str) -> bool:
    """Whether a linear of this name belongs to what joins vision and language."""
    return any(part in CONNECTORS for part in name.split("."))


@register
@dataclass
class LoRASculptConfig(MethodConfig):
    """LoRA, pruned once and kept off the weights that hold knowledge. Use it wherever PEFT takes a ``LoraConfig``.

    The paper's code trains r = 32, lora_alpha = 64, lora_dropout = 0.05 on all linears of the language model for 1875
    steps of 16 samples. All fields of ``LoraConfig`` that leave a plain LoRA behind work; the others are refused.

    Args:
        density: share of the entries of A and of B that are kept, in (0, 1]. Paper's code: 0.1.
        density_a: the same for A alone; None takes ``density``.
        density_b: the same for B alone; None takes ``density``.
        delta_density: share of the entries of B A that may be non-zero, in (0, 1), instead of ``density``: Theorem 1
            solved for s_A = s_B. At r = 32 a density of 0.1 gives 0.275; the paper speaks of 0.05.
        prune_step: T_0, the optimizer step after which the masks are made: a number of steps (int, at least 1) or a
            share of training (float, between 0 and 1). Paper's code: 100, which was 5 % of its training.
        rescale: multiply what is kept of A and of B so that each keeps its Frobenius norm. Not in the paper.
        cmr_weight: lambda of equation (5), at least 0. Paper's code: 1e-3.
        cmr_connector_weight: the same for a LoRA on the connector (paper's beta); 0 leaves it out, as the code does.
        omega: steepness of equation (3), > 0. Paper's code: 1.
        cmr_modules: last names of the linears that equation (4) sums over, or "all". Names are those of the language
            model's, unless none of it is adapted; "all" are the vision tower's too, where it is adapted. Paper's code:
            q, k, v. At least one must be adapted, unless ``cmr_weight`` is 0 or the connector alone is adapted.
        cmr_memory: "recompute" M at every step by row blocks, or "cache" its square (a tensor of the size of every
            penalised weight, in fp32; the step is faster).

    Raises:
        ValueError: for a value out of its range, or a field of LoraConfig that would not leave a plain LoRA behind.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                                      num_hidden_layers=1, num_attention_heads=4))
        >>> model = get_peft_model(model, LoRASculptConfig(r=8))
        >>> model.peft_config["default"].density
        0.1
    """

    method: ClassVar[str] = "lorasculpt"
    implementation: ClassVar[type[Method]] = Sculpt

    density: float = 0.1
    density_a: float | None = None
    density_b: float | None = None
    delta_density: float | None = None
    prune_step: int | float = 100
    rescale: bool = False
    cmr_weight: float = 1e-3
    cmr_connector_weight: float = 0.0
    omega: float = 1.0
    cmr_modules: list[str] | str = ("q_proj", "k_proj", "v_proj")  # type: ignore[assignment]
    cmr_memory: str = "recompute"

    def __post_init__(self):
        super().__post_init__()
        if self.cmr_modules != "all":
            if isinstance(self.cmr_modules, str) or not self.cmr_modules:
                raise ValueError(f"cmr_modules is a list of last names of linears, or 'all'; got {self.cmr_modules!r}.")
            self.cmr_modules = list(self.cmr_modules)
        for name in ("density", "density_a", "density_b"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is the share of entries kept, above 0 and at most 1; got {value}.")
        if self.delta_density is not None:
            others = ("density", "density_a", "density_b")
            given = [name for name in others if getattr(self, name) != getattr(type(self), name)]
            if given:
                raise ValueError(f"delta_density stands in for {given[0]}: give one of the two.")
            if not 0 < self.delta_density < 1:
                raise ValueError(f"delta_density is the share of B A kept, between 0 and 1; got {self.delta_density}.")
        if not (self.prune_step >= 1 if isinstance(self.prune_step, int) else 0 < self.prune_step < 1):
            raise ValueError(
                "prune_step is a number of steps (a whole number from 1) or a share of training (between 0 and 1); "
                f"got {self.prune_step}."
            )
        for name in ("cmr_weight", "cmr_connector_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a weight, at least 0 and finite; got {getattr(self, name)}.")
        if not 0 < self.omega < math.inf:
            raise ValueError(f"omega is above 0 and finite; got {self.omega}.")
        if self.cmr_memory not in ("recompute", "cache"):
            raise ValueError(f"cmr_memory is 'recompute' or 'cache'; got {self.cmr_memory!r}.")

    def pruned_after(self, total_steps: int) -> int:
        """T_0 of a training of ``total_steps`` optimizer steps: at least 1."""
        share = self.prune_step
        return max(1, round(share * total_steps)) if isinstance(share, float) else share

    def check_steps(self, total_steps: int) -> None:
        after = self.pruned_after(total_steps)
        if after >= total_steps:
            raise ValueError(
                f"prune_step={after} is not before the end of training ({total_steps} steps): nothing would be pruned "
                "in time to recover. Lower prune_step (a share such as 0.05 works too) or train longer."
            )

    def densities(self, r: int) -> tuple[float, float]:
        """(s_A, s_B) of a module of rank ``r``."""
        if self.delta_density is not None:
            both = solve_density(self.delta_density, r)
            return both, both
        default = self.density
        return (
            default if self.density_a is None else self.density_a,
            default if self.density_b is None else self.density_b,
        )
