r"""SPIDER: fine-tunes weights directly, and takes back what moves where pretraining matters more than the new task.

Huang et al., *Learn from Downstream and Be Yourself in Multimodal Large Language Models Fine-Tuning*, ICML 2025,
arXiv 2411.10928. No low rank: the weights of a few layers are trained. How much a weight matters to what the model
knew is read off its magnitude, how much it matters to the new task off its summed gradients; both are made comparable
within their tensor. After every optimizer step a weight that matters more to the former is put back, the others keep
all or most of the step.

With a frozen W_0 (m x n) and D = W - W_0 (m x n, 0 at the start), which is what is trained and saved; the optimizer
sees the gradient g_t in step t and proposes D'_t; importance :math:`\rho(V) = \sigma(z(|V|))`, where z takes the mean
of the tensor off and divides by its standard deviation, :math:`\rho(0) = 0`:

.. math::
    h &= W_0 x + D x                                                                              \tag{1} \\
    I_{pre} &= \rho(W_0)                                                                          \tag{2} \\
    G_t &= G_{t-1} + g_t, \qquad I_{grad} = \rho(G_t)                                             \tag{3} \\
    R &= [I_{pre} < I_{grad}] \circ I_{grad} / (I_{pre} + I_{grad}), \qquad
    M_t = \min\big(1,\ R / \mathrm{mean}\{R_{ij} > 0\}\big)                                     \tag{4} \\
    D_t &= M_t \circ D'_t                                                                         \tag{5}

Equation (5) is the paper's :math:`W_t = (1 - M_t) \circ W_0 + M_t \circ W'_t`. As M_t is made anew and W_0 stays, an
entry with M below 1 is drawn towards W_0 at every step, and one with M = 0 is at W_0 again.

**Memory** per trained weight: D, its gradient and AdamW's two moments take 16 bytes in fp32, as in any full
fine-tuning; G and I_pre take 8 more (``memory="full"``) or G alone takes 2 (``"low"``). Each step also needs a few
tensors of the size of the largest linear. Under FSDP2 the 16 bytes are sharded, G and I_pre are whole in each process.
G is saved beside the adapter, so that a resumed run goes on as if it had never stopped.

Where the official code (WenkeHuang/SPIDER) departs:

* It also trains the norms and the biases of the chosen layers; here they stay as they are, as under any adapter.
* It trains W itself, so that weight decay draws W towards 0; here it draws D towards 0, which is W towards W_0.
* It reads gradients after the optimizer step, when some optimizers have changed them; here they are read before it,
  accumulated, clipped and unscaled as the optimizer gets them.
* A resumed run takes the weights it resumes from for W_0 and starts the sum anew; here both go on.

Neither paper nor code has a form for LoRA, and none is made up here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapters.dense import DenseConfig, DenseUpdate
from ..adapters.layers import full, sharded_like
from ..adapters.method import Method
from ..adapters.update import Update, UpdateMethod, register_update
from ..models.parts import linears, parts
from ..ops.sums import total

STACKS = ("layers", "h", "block", "blocks")  # what models call their list of decoder layers


def importance(values: Tensor) -> Tensor:
    """rho of equations (2) and (3), in fp32: above a half where a magnitude is above the mean of its tensor."""
    size = values.float().abs()
    deviation, mean = torch.std_mean(size)
    return ((size - mean) / deviation.clamp_min(1e-38)).sigmoid() * size.any()


def blend(pre: Tensor, grad: Tensor) -> Tensor:
    """M of equation (4): 0 where ``pre`` is not below ``grad``, otherwise above 0 and at most 1."""
    ratio = torch.where(pre < grad, grad / (pre + grad), 0.0)
    mean = ratio.sum() / ratio.count_nonzero()
    return (ratio / mean.nan_to_num(1.0)).clamp_max(1)


class Spider(UpdateMethod):
    """Equations (2) to (5) after every optimizer step."""

    config: SpiderConfig

    def __init__(self, config, model, adapter):
        super().__init__(config, model, adapter)
        self.sums: dict[str, Tensor] = {}  # G by the name of the linear
        self._pre: dict[str, Tensor] = {}
        self._moved: list[Tensor] = []  # by the last step, entries of each linear

    @torch.no_grad()
    def before_step(self):
        for number, (name, update) in enumerate(self.updates.items()):
            if update.D.grad is None:
                continue
            gradient = full(update.D.grad).float()
            past = self.sums.get(name)
            G = gradient.clone() if past is None else past.to(gradient) + gradient  # (3)
            low = self.config.memory == "low"
            self.sums[name] = _to_bf16(G, seed=self.step * len(self.updates) + number) if low else G

    @torch.no_grad()
    def after_step(self, step):
        super().after_step(step)
        self._moved = []
        for name, G in self.sums.items():
            D, mask = self.updates[name].D, blend(self._pretrained(name), importance(G))  # (3), (4)
            D.mul_(sharded_like(mask.to(D.dtype), D))  # (5)
            self._moved.append(mask.count_nonzero())

    def logs(self):
        if not self._moved:
            return super().logs()
        return super().logs() | {"moved": int(total(self._moved)) / sum(G.numel() for G in self.sums.values())}

    def _pretrained(self, name: str) -> Tensor:
        """I_pre of one linear, from memory or computed anew."""
        if name in self._pre:
            return self._pre[name]
        found = importance(self.updates[name].base_weight())  # (2)
        if self.config.memory == "full":
            self._pre[name] = found
        return found

    def loaded(self, weights):
        self.uncertain = True  # nothing in the weights tells G

    def state(self):
        return super().state()[0], {name: G.to("cpu", copy=True) for name, G in self.sums.items()}

    def has_tensors(self, values):
        return values["step"] > 0

    def restore(self, values, tensors):
        super().restore(values, tensors)
        self.sums = {name: G.to(self.updates[name].D.device, copy=True) for name, G in tensors.items()}
        self.uncertain = False


def _to_bf16(values: Tensor, seed: int) -> Tensor:
    """``values`` in fp32 rounded up or down at random, right in the mean: a long sum keeps its small terms."""
    generator = torch.Generator(values.device).manual_seed(seed)  # the same in every process, and in a resumed run
    bits = values.view(torch.int32)
    below = torch.randint(1 << 16, bits.shape, generator=generator, device=values.device, dtype=torch.int32)
    return ((bits + below) & -(1 << 16)).view(torch.float32).bfloat16()


@register_update
@dataclass
class SpiderConfig(DenseConfig):
    """Full fine-tuning of a few layers that spares what matters. Use it wherever PEFT takes a ``LoraConfig``.

    The paper trains the projector (learning rate 2e-5) and the last two decoder layers (2e-4) for 5 epochs of batches
    of 16. There is no low rank: ``r``, ``lora_alpha``, their patterns, ``use_rslora`` and ``lora_dropout`` mean
    nothing here and are refused.

    Args:
        target_modules: as of ``LoraConfig``, the layers to train. Default: those that ``last_layers`` says.
        last_layers: how many of the last decoder layers are trained where ``target_modules`` is not given, at least
            1; with them the linears of the projector. Paper: 2.
        memory: "full" keeps G in fp32 and I_pre; "low" keeps G in bf16, rounded at random so that it is right in the
            mean, and computes I_pre at every step.

    Raises:
        ValueError: for a value out of its range, or a setting of low rank.
    """

    method: ClassVar[str] = "spider"
    update: ClassVar[type[Update]] = DenseUpdate  # (1)
    implementation: ClassVar[type[Method]] = Spider
    sure: ClassVar[str] = "equations from the official code; number of layers and rates from a third party"

    last_layers: int = 2
    memory: str = "full"

    def __post_init__(self):
        super().__post_init__()
        if self.last_layers < 1:
            raise ValueError(f"last_layers is at least 1; got {self.last_layers}.")
        if self.memory not in ("full", "low"):
            raise ValueError(f"memory is 'full' or 'low'; got {self.memory!r}.")

    def default_targets(self, model):
        """The linears of the last decoder layers and of the projector (it may have none), by name."""
        places = parts(model)
        lists = [
            f"{places.language}.{name}"
            for name, module in model.get_submodule(places.language).named_modules()
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in STACKS
        ]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        if not outer:
            raise ValueError(f"no list of decoder layers was found in {places.language}: give target_modules.")
        stack = outer[-1]  # an encoder comes before its decoder
        last = range(len(model.get_submodule(stack)))[-self.last_layers :]
        wanted = tuple(f"{name}." for name in (*(f"{stack}.{layer}" for layer in last), *places.projector))
        return {name for name in linears(model, "all") if f"{name}.".startswith(wanted)}
