"""Methods that change the forward pass: what an adapter adds to one linear is a module of its own.

A method's file has the config and one :class:`Update`, whose forward is the paper's equation; everything that PEFT
wants to know (layers, tuner, saving, merging) is here, once. Unlike a sculpted LoRA such an adapter keeps its own type
on disk: stock PEFT would load a LoRA file without the router and say nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import CONFIG_NAME, get_quantization_config
from peft.utils.other import get_pattern_key, transpose
from torch import Tensor, nn

from ..errors import UserError
from ..models.parts import in_language
from ..ops.routing import switch_balance, token_sums
from .carrier import across, carry
from .context import Context
from .folder import folder_of
from .layers import frozen_weight, full
from .method import SETTINGS_FILE, Method, MethodConfig, Methods, read_record, register


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an update sits: ``name`` in the base model, its features, and its ``layer`` of how many ``layers``.

    ``language``: whether it lies in the language model, so that the rows it gets are samples.
    """

    name: str
    in_features: int
    out_features: int
    layer: int | None = None
    layers: int | None = None
    language: bool = True


class Update(nn.Module):
    """What one adapter adds to one linear: (rows, length, in) → (rows, length, out), or (tokens, in) → (tokens, out).

    A method overrides ``__init__`` (parameters, B = 0), ``forward`` and, where the update is a matrix, ``weight`` or
    ``factors``. Dense tensors of all experts, never a loop over them. Parameters are trained and saved; what is saved
    and not trained is registered with :meth:`keep`. ``scaling`` is alpha / r (alpha / sqrt(r) with ``use_rslora``).
    """

    def __init__(self, config: UpdateConfig, place: Place, context: Context, base: nn.Module):
        super().__init__()
        self.config, self.place, self.context = config, place, context
        self._kept: set[str] = set()
        self._base = [base]  # in a list: it is not a part of this module
        self.r, alpha = config.rank_and_alpha(place.name)
        self.scaling = alpha / (self.r**0.5 if config.use_rslora else self.r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.noted: dict[str, Tensor] = {}  # of the optimizer step under way

    def keep(self, name: str, value: Tensor) -> None:
        """Register ``value`` as a tensor that is saved and never trained, in place of an earlier one; None if empty.

        It is a parameter without gradient, not a buffer: FSDP shards it, and accelerate's loading that spares RAM stops
        at buffers.
        """
        self._kept.add(name)
        self.register_parameter(name, nn.Parameter(value, requires_grad=False) if value.numel() else None)

    def freeze(self) -> None:
        """See to it that what is kept is not trained: PEFT switches whole adapters on."""
        for name, parameter in self.named_parameters():
            if name in self._kept:
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def factors(self, task: int | None = None) -> tuple[Tensor, Tensor]:
        """(r, in) and (out, r) whose product is :meth:`weight`: the update as a plain LoRA with alpha = r."""
        raise NotImplementedError

    def weight(self, task: int | None = None) -> Tensor:
        """(out, in) the update as a matrix, of one task where the method knows tasks."""
        a, b = self.factors(task)
        return b @ a

    def base_weight(self) -> Tensor:
        """(out, in) the frozen weight W0 under this update, dequantised if need be."""
        return frozen_weight(self._base[0])

    def append(self, lora: tuple[Tensor, Tensor] | None = None) -> None:
        """One more task of a ``sequence``: an empty LoRA for it, with what was trained so far frozen; or else ``lora``,
        the factors (r, in) and (out, r) of one that was trained elsewhere, frozen, before the one in training.
        """
        raise NotImplementedError

    # --- routing ----------------------------------------------------------------------------------------------------

    def task_ids(self, x: Tensor) -> Tensor:
        """(rows,) the task of every row of ``x``, as its place in ``config.tasks``."""
        return self.context.task_ids(x, self.config.tasks, self.place.language)

    def routed(self, output: Tensor, gate: Tensor, loss: Tensor | None = None) -> Tensor:
        """``output`` unchanged; its routing is noted, and the backward pass carries ``loss`` to the router.

        Args:
            output: what ``forward`` returns.
            gate: (..., experts) the weight of every expert for every token (or for every row), at least 0.
            loss: the auxiliary loss of this micro-batch in fp32, already weighted, of sums that are :meth:`shared`.
        """
        watched, learning = self.context.recorder is not None, self._learning()
        if not (watched or learning):
            return output
        with torch.no_grad():
            load, real = gate.detach().float(), self.context.real(output)
            if load.dim() == 3 and real is not None:
                load = load * real[..., None]
        if self.context.recorder is not None:
            per_row = load.sum(1) if load.dim() == 3 else load
            self.context.recorder(self.place.name, per_row, self._recorded_tasks(per_row))
        if not learning:
            return output
        with torch.no_grad():
            flat = load.flatten(0, -2)
            share = flat / flat.sum(-1, keepdim=True).clamp_min(1e-12)
            entropy = -(share * share.clamp_min(1e-12).log()).sum()
            tokens = (flat.sum(-1) > 0).sum()
            chosen = (flat > 0).sum(0)
            stats = torch.cat([torch.stack([tokens.float(), entropy]), flat.sum(0), chosen.float()])
        zero = stats.new_zeros(())
        return carry(output, zero if loss is None else loss.float(), self.context.weight, stats, self._note)

    def balance_loss(self, gate: Tensor, probability: Tensor, weight: float) -> Tensor | None:
        """``weight`` times the balance loss of Switch over the real tokens (:meth:`shared`); None if nothing learns it.

        Args:
            gate: (..., experts), 0 for the experts that a token is not sent to.
            probability: (..., experts) the softmax over all experts.
        """
        if not (weight and self._learning()):
            return None  # an answer has no other process to wait for
        real, experts = self.context.real(gate), gate.shape[-1]
        chosen, tokens = token_sums((gate > 0).to(probability), real)
        sums = self.shared(torch.cat([chosen, token_sums(probability, real)[0], tokens[None]]))
        return weight * switch_balance(*sums.split([experts, experts, 1]))

    def shared(self, sums: Tensor) -> Tensor:
        """``sums`` over the batch of all processes, of which each has its own.

        Outside the language model they stay those of one process, and gradients become the mean over processes: one
        whose rows have no pictures never passes here, and the others would wait for it.
        """
        return across(sums) if self.place.language else sums

    def _learning(self) -> bool:
        """Whether this pass is one of its training: a frozen adapter beside the one in training has no part in it."""
        return self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def moved(self) -> bool:
        """Whether it was trained since it was made or loaded; of an update that routes its backward passes tell."""
        return bool(self.noted)

    def _recorded_tasks(self, x: Tensor) -> Tensor | None:
        return self.task_ids(x) if self.config.tasks and self.context.tasks is not None else None

    def _note(self, stats: Tensor, loss: Tensor) -> None:
        """In the backward pass of a micro-batch: add its numbers to those of the step."""
        experts = (len(stats) - 2) // 2
        new = {"tokens": stats[0], "entropy": stats[1], "load": stats[2 : 2 + experts], "chosen": stats[2 + experts :]}
        new |= {"loss": loss, "batches": torch.ones_like(loss)}
        for key, value in new.items():
            self.noted[key] = self.noted[key] + value if key in self.noted else value.clone()


class UpdateMethod(Method):
    """One adapter of updates at work. A method that acts on a step derives from it; most need nothing more."""

    def __init__(self, config: UpdateConfig, model: nn.Module, adapter: str):
        super().__init__(config, model, adapter)
        self.context: Context = model.context
        self.updates: dict[str, Update] = updates(model, adapter)
        self._noted: list[dict[str, Tensor]] = []  # what the linears noted of the last step

    def parameters(self):
        return [parameter for update in self.updates.values() for parameter in update.parameters()]

    def moved(self):
        return any(update.moved() for update in self.updates.values())

    def open(self, weight):
        self.context.weight.fill_(weight)
        for update in self.updates.values():
            update.noted = {}

    def after_step(self, step):
        super().after_step(step)
        self._noted = [update.noted for update in self.updates.values() if update.noted]

    def logs(self):
        return super().logs() | self._numbers()

    def _numbers(self) -> dict[str, float]:
        """Over all layers, of the last step: routing entropy (0 one expert, 1 all alike) and loads.

        A load is an expert's share of the routing weight times the number of experts: 1 is its fair share. Each
        expert's own is shown where all linears have as many, at most 16; otherwise only the largest and the smallest.
        """
        if not self._noted:
            return {}
        device = self._noted[0]["loss"].device  # layers may lie on several
        noted = [{key: value.to(device) for key, value in numbers.items()} for numbers in self._noted]
        shown: dict[str, Tensor] = {}
        many = [numbers for numbers in noted if len(numbers["load"]) > 1]
        if many:
            entropy = [n["entropy"] / n["tokens"].clamp_min(1) / math.log(len(n["load"])) for n in many]
            loads = [n["load"] / n["load"].sum().clamp_min(1e-12) * len(n["load"]) for n in many]
            shown["router_entropy"] = torch.stack(entropy).mean()
            shown["load_max"] = torch.stack([load.max() for load in loads]).mean()
            shown["load_min"] = torch.stack([load.min() for load in loads]).mean()
            if len({len(load) for load in loads}) == 1 and len(loads[0]) <= 16:
                mean = torch.stack(loads).mean(0)
                shown |= {f"load_{i}": value for i, value in enumerate(mean)}
        shown["balance_loss"] = torch.stack([n["loss"] / n["batches"] for n in noted]).sum()
        found = dict(zip(shown, torch.stack(list(shown.values())).tolist(), strict=True))  # the one wait for the device
        return {key: value for key, value in found.items() if value or key != "balance_loss"}


@dataclasses.dataclass
class UpdateConfig(MethodConfig):
    """Shared by the configs of methods that change the forward pass.

    Args:
        tasks: the names of the tasks, in the order of their ids; refused by a method that does not know tasks.
    """

    update: ClassVar[type[Update]]
    implementation: ClassVar[type[Method]] = UpdateMethod
    merges: ClassVar[str] = "never"  # or "always", or "task": one matrix for each task
    why_not: ClassVar[str] = "what it adds depends on the input"
    multitask: ClassVar[bool] = False  # whether every sample needs a task
    of_tasks: ClassVar[tuple[str, ...]] = ()  # settings that name tasks, and so need ``tasks``
    sequence: ClassVar[bool] = False  # whether tasks are learned one after the other, with add_task in between

    tasks: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.init_lora_weights is not True:
            raise ValueError(f"{name} does not support init_lora_weights={self.init_lora_weights!r}: it has its own.")
        if not isinstance(self.tasks, list | tuple):  # a set has no order
            raise ValueError(f"tasks is a list of names; got {self.tasks!r}.")
        self.tasks = list(self.tasks)
        if len(set(self.tasks)) != len(self.tasks) or not all(self.tasks):
            raise ValueError(f"tasks is a list of different names; got {self.tasks}.")
        if self.tasks and not (self.multitask or self.of_tasks or self.sequence):
            raise ValueError(f"tasks means nothing to {name}, which treats all samples alike: leave it out.")
        if self.multitask and not self.tasks:
            raise ValueError(f"{name} needs tasks=[...]: the names of the tasks, as in the column 'task' of the data.")

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """(r, alpha) of the linear ``name``, patterns considered."""

        def chosen(pattern: dict, default):
            return pattern.get(get_pattern_key(pattern, name), default)

        return chosen(self.rank_pattern, self.r), chosen(self.alpha_pattern, self.lora_alpha)

    @classmethod
    def exports(cls) -> tuple[str, ...]:
        if cls.merges == "never":
            return ()
        return ("lora", "merged") if cls.update.factors is not Update.factors else ("merged",)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write ``adapter_config.json`` with the method's own type, and its state beside it."""
        PeftConfig.save_pretrained(self, save_directory, **kwargs)
        self._save_record(Path(save_directory), {})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """The config of a folder written by :meth:`save_pretrained`, here or on the Hub."""
        folder = folder_of(pretrained_model_name_or_path, (CONFIG_NAME, SETTINGS_FILE), subfolder, **kwargs)
        record = read_record(folder)
        if record is None or record["method"] != cls.method:
            raise ValueError(f"{folder} holds no {cls.method} adapter.")
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        saved = json.loads((folder / CONFIG_NAME).read_text())
        saved.pop("peft_type", None)
        return cls(**{key: value for key, value in saved.items() if key in known})


class UpdateLayer(nn.Module, BaseTunerLayer):
    """A linear and, for every adapter, the :class:`Update` that is added to it."""

    adapter_layer_names = ("lora_update",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.lora_update = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def add(self, adapter: str, update: Update) -> None:
        self.lora_update[adapter] = update
        self._move_adapter_to_device_of_base_layer(adapter)
        self._active_adapter = adapter
        self.set_adapter(adapter, inference_mode=update.config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for adapter in self.active_adapters:
            if adapter in self.lora_update:
                update = self.lora_update[adapter]
                given = self._cast_input_dtype(x, next(update.parameters()).dtype)
                given = update.context.apart(given) if update.place.language else given
                output = output + update(given).reshape(output.shape).to(output.dtype)
        return output

    def _freeze_non_trainable_peft_weights(self, adapter_names=None) -> None:
        for update in self.lora_update.values():
            update.freeze()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add what the adapters amount to to the base weight.

        Raises:
            ValueError: where an adapter is no matrix, with what to do instead, or the sum is not finite
                (``safe_merge``).
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_update:
                continue
            update = self.lora_update[adapter]
            _check_mergeable(update.config)
            base = self.get_base_layer()
            if get_quantization_config(base, "quantization_config") or not base.weight.is_floating_point():
                raise ValueError(f"{update.place.name} is quantised: load the base model unquantised to merge into it.")
            merged = base.weight + _delta(update, base)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging {adapter} into {update.place.name} gives values that are not finite.")
            base.weight.copy_(merged)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.merged_adapters:
            update = self.lora_update[self.merged_adapters.pop()]
            base = self.get_base_layer()
            base.weight.sub_(_delta(update, base))


def _delta(update: Update, base: nn.Module) -> Tensor:
    """What ``update`` amounts to, laid out and in the dtype of the weight of ``base``."""
    return transpose(full(update.weight()), type(base).__name__ == "Conv1D").to(base.weight.dtype)


def _check_mergeable(config: UpdateConfig) -> None:
    if config.merges == "never":
        raise ValueError(
            f"a {config.method} adapter cannot be merged: {config.why_not}. Deploy it with this library "
            "(lorasculpt.load)."
        )
    if config.merges == "task":
        raise ValueError(
            f"a {config.method} adapter is another matrix for each task ({', '.join(config.tasks)}): export one plain "
            "LoRA per task with lorasculpt export --task NAME."
        )


class UpdateModel(Methods):
    """The PEFT tuner of all methods that change the forward pass."""

    prefix = "lora_"
    tuner_layer_cls = UpdateLayer

    @property
    def context(self) -> Context:
        """What this model's layers may know about a forward pass."""
        return self.__dict__.setdefault("_context", Context())

    def _post_injection_hook(self, model, config, adapter_name):
        self.context.attach(model)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        features = _get_in_out_features(base)
        if isinstance(base, nn.Embedding | nn.MultiheadAttention | nn.modules.conv._ConvNd) or None in features:
            raise ValueError(
                f"{current_key} is a {type(base).__name__}, which {type(peft_config).__name__} cannot adapt: target "
                "linear layers only."
            )
        language = in_language(self.model, current_key)
        place = Place(current_key, features[0], features[1], *_depth(self.model, current_key), language)
        update = peft_config.update(peft_config, place, self.context, base)
        if isinstance(target, UpdateLayer):
            target.add(adapter_name, update)
            if adapter_name not in self.active_adapters:
                update.requires_grad_(False)
                target.set_adapter(self.active_adapters)
            return
        adapted = UpdateLayer(target)
        adapted.add(adapter_name, update)
        self._replace_module(parent, target_name, adapted, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names, an adapter for each row, is for LoRA alone: set_adapter chooses one for the batch."
            )
        yield

    def _unload_and_optionally_merge(self, merge=True, *args, **kwargs):
        if merge:
            for adapter in self.active_adapters:
                _check_mergeable(self.peft_config[adapter])
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self.context.detach()
        return model


def _depth(model: nn.Module, name: str) -> tuple[int | None, int | None]:
    """(place, length) of the innermost list of layers that ``name`` lies in."""
    module = model
    found: tuple[int | None, int | None] = (None, None)
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            found = (int(part), len(module))
        module = getattr(module, part)
    return found


def updates(model: nn.Module, adapter: str = "default") -> dict[str, Update]:
    """Every update of ``adapter`` by the name of its linear in the base model, in the order of the model."""
    return {
        layer.lora_update[adapter].place.name: layer.lora_update[adapter]
        for layer in model.modules()
        if isinstance(layer, UpdateLayer) and adapter in layer.lora_update
    }


def context_of(model: nn.Module) -> Context | None:
    """The context of ``model`` (wrapped or not); None if no adapter in it changes the forward pass."""
    return next((module.context for module in model.modules() if isinstance(module, UpdateModel)), None)


def known_tasks(model: nn.Module) -> list[str] | None:
    """The tasks of which every sample must name one for the adapters that are on in ``model``; None if none asks."""
    configs = {
        id(layer.lora_update[adapter].config): layer.lora_update[adapter].config
        for layer in model.modules()
        if isinstance(layer, UpdateLayer) and not (layer.disable_adapters or layer.merged)
        for adapter in layer.active_adapters
        if adapter in layer.lora_update
    }
    asking = [config.tasks for config in configs.values() if config.multitask]
    return [task for task in asking[0] if all(task in tasks for tasks in asking)] if asking else None


def register_update(config: type[UpdateConfig]) -> type[UpdateConfig]:
    """Class decorator: let PEFT know a method that changes the forward pass."""
    register(config, UpdateModel)
    return config
