"""What a method is to PEFT: a config, a tuner that injects it, and one object per adapter that the clock drives."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..files import read_json
from ..models.parts import in_language, linears, target_regex
from .folder import folder_of
from .layers import MaskedLinear, Site, sharded, sites
from .origin import origin, write_origin
from .settings import check_types

SETTINGS_FILE = "lorasculpt.json"
STATE_FILE = "lorasculpt_state.safetensors"
SCHEMA = 1

# What a plain LoRA may be told and a method may not, with the reason.
REFUSED = {
    "megatron_config": "Megatron layers are not nn.Linear",
    "megatron_core": "Megatron layers are not nn.Linear",
    "trainable_token_indices": "trained tokens are not part of the update B A",
    "loftq_config": "it changes the base weights",
    "eva_config": "it needs an initialisation pass of its own",
    "corda_config": "it changes the base weights",
    "lora_ga_config": "it changes the base weights",
    "use_dora": "DoRA's magnitude vector is not part of the update B A",
    "velora_config": "it replaces the forward pass of LoRA",
    "alora_invocation_tokens": "it replaces the forward pass of LoRA",
    "use_qalora": "it replaces the forward pass of LoRA",
    "monteclora_config": "it replaces the forward pass of LoRA",
    "layer_replication": "replicated layers share their base weight",
    "lora_bias": "the adapter would not be a plain B A",
    "target_parameters": "bare parameters have no lora_A and lora_B layers",
    "use_bdlora": "it replaces the forward pass of LoRA",
    "arrow_config": "it replaces the forward pass of LoRA",
    "kasa_config": "it changes the base weights",
    "ensure_weight_tying": "tied adapters would be counted twice",
}


class MethodType(str):
    """A PEFT type of our own: a string with the ``value`` and ``name`` that PEFT's closed enum has."""

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


class Method:
    """One adapter's method at work: what it does when training begins, around every optimizer step, in the log.

    The clock calls ``begin`` once, ``open`` and ``penalties`` when a step begins, ``before_step`` and ``after_step``
    around every optimizer step that is taken, ``close`` when a step has ended, and ``logs`` when something is about to
    be logged. ``state`` and ``restore`` carry what must survive a restart. A method that needs less overrides less.
    """

    def __init__(self, config: MethodConfig, model: nn.Module, adapter: str):
        self.config, self.adapter = config, adapter
        self.sites: dict[str, Site] = sites(model, adapter)
        self.language = {name for name in self.sites if in_language(model.model, name)}
        self.step = 0  # optimizer steps taken
        self.gradient: tuple[Tensor, Tensor] | None = None  # squared norms: the task's, the penalties'
        self.combined = False  # whether its weights were made of other adapters
        self.uncertain = False  # whether ``loaded`` could not tell all of its state from the weights

    def begin(self, total_steps: int | None) -> None:
        """Training of ``total_steps`` optimizer steps is about to start or to go on."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapter."""
        return [leaf.weight for site in self.sites.values() for leaf in (site.a, site.b)]

    def aside(self) -> list[nn.Parameter]:
        """Those of its parameters that lie outside the language model, where a batch of text alone never comes."""
        outside = (site for name, site in self.sites.items() if name not in self.language)
        return [leaf.weight for site in outside for leaf in (site.a, site.b)]

    def open(self, weight: float) -> None:
        """An optimizer step begins; a loss of one of its micro-batches counts ``weight``."""

    def penalties(self) -> dict[nn.Parameter, Tensor]:
        """What to add to the gradient of each parameter, once per optimizer step."""
        return {}

    def before_step(self) -> None:
        """An optimizer step is about to be taken: all gradients are there, clipped and unscaled."""

    def after_step(self, step: int) -> None:
        """Optimizer step number ``step`` (from 1) has been taken."""
        self.step = step

    def close(self) -> None:
        """An optimizer step has ended, taken or not; also called when training ends in its middle."""

    def logs(self) -> dict[str, float]:
        """What to show beside the loss: here the penalties' gradient norm over the task's, where both act."""
        if self.gradient is None or not self.gradient[0]:
            return {}
        task, penalty = self.gradient
        return {"penalty_ratio": float((penalty / task).sqrt())}

    def loaded(self, weights: dict[str, Tensor]) -> None:
        """The adapter's weights were replaced by those of a file, ``{parameter name: tensor}``."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a restart needs: plain values and tensors."""
        return {"step": self.step}, {}

    def has_tensors(self, values: dict[str, Any]) -> bool:
        """Whether :meth:`state` gave tensors beside these plain ``values``."""
        return False

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave; tensors that it gave may be missing where ``loaded`` was certain."""
        self.step = values.get("step", 0)

    def settle(self) -> None:
        """Make the weights what the forward pass makes of them, before they are saved or merged."""

    def moved(self) -> bool:
        """Whether the adapter is no longer what a fresh one is, which adds nothing to its base."""
        fresh = self.config.init_lora_weights is False  # B is then random from the start
        return not fresh and any(bool(site.b.weight.detach().any()) for site in self.sites.values())

    def unfinished(self) -> str | None:
        """What the method has not done that training was to do, in a sentence; None if all is done."""
        return None


@dataclasses.dataclass
class MethodConfig(LoraConfig):
    """Shared by the configs of all methods: on disk a stock LoRA config, and beside it the method's own file.

    Args:
        target_modules: as of ``LoraConfig``, the layers to adapt, wherever they are. Default: every linear of the
            language part, as of ``scope: language`` in a run, whatever PEFT has by itself for the family; of a text
            model that has no such part here, such as a classifier, what PEFT has.
    """

    method: ClassVar[str]
    implementation: ClassVar[type[Method]]
    clock: ClassVar[bool] = True  # whether a loop without the clock would train something else
    sure: ClassVar[str] = "equations from the official code"  # how sure the reproduction is
    unused: ClassVar[tuple[str, ...]] = ()  # fields of LoraConfig that the method refuses, having no use for them

    def __post_init__(self):
        # before PEFT's own checks, which know other reasons or other packages
        stock = {f.name: f for f in dataclasses.fields(LoraConfig)}
        for name, reason in REFUSED.items():
            if name in stock and getattr(self, name) != default(stock[name]):
                raise ValueError(f"{type(self).__name__} does not support {name}: {reason}.")
        if self.bias != "none":
            raise ValueError(f"{type(self).__name__} does not support bias={self.bias!r}: a plain LoRA has none.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"{type(self).__name__} does not support init_lora_weights={self.init_lora_weights!r}: it changes the "
                "base weights or starts from B A that is not 0; use True or 'gaussian'."
            )
        check_types(self)
        super().__post_init__()
        self.peft_type = MethodType(self.method.upper())
        self._state: tuple[dict, dict[str, Tensor]] | None = None
        self._origin: dict[str, Any] | None = None

    @classmethod
    def exports(cls) -> tuple[str, ...]:
        """What ``lorasculpt export`` can make of such an adapter: a plain LoRA, a merged model."""
        return "lora", "merged"

    @classmethod
    def apart(cls, settings: Mapping[str, Any], earlier: Sequence[str]) -> dict[str, Any] | None:
        """What ``settings`` have to say besides, where each task of a sequence gets a LoRA of its own and those of the
        tasks before, in the folders ``earlier``, stay beside it, frozen; None where it does not."""
        return None

    def default_targets(self, model: nn.Module) -> set[str] | str | None:
        """The linears of ``model`` to adapt where ``target_modules`` is not given, by name or as a pattern of names.

        None leaves it to PEFT: of a text model whose parts are not known, such as a classifier, where PEFT knows some.

        Raises:
            UserError: the parts of this model are not known.
        """
        try:
            if self.layers_to_transform is None:
                return target_regex(model, "language")
            return set(linears(model, "language"))  # PEFT takes no pattern beside numbers of layers
        except UserError:
            if getattr(getattr(model, "config", None), "model_type", None) not in Methods.target_module_mapping:
                raise
            return None

    def check_steps(self, total_steps: int) -> None:
        """See that the settings suit a training of ``total_steps`` optimizer steps.

        Raises:
            ValueError: for the first that does not.
        """

    def wants_fisher(self) -> int | None:
        """Of how many texts a run is to make the Fisher information of the base; None if none is needed, or given."""
        return None

    def take_fisher(self, path: str) -> None:
        """Take the file that was made, where the method wanted one."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The fields that plain LoRA does not have."""
        stock = {f.name for f in dataclasses.fields(LoraConfig)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in stock}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write ``adapter_config.json`` as stock LoRA and the method's settings and state beside it."""
        stock = LoraConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig) if f.init})
        stock.save_pretrained(save_directory, **kwargs)
        self._save_record(Path(save_directory), self.settings())

    def _save_record(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write what belongs beside ``adapter_config.json``: settings that it does not hold, the state, the base's."""
        values, tensors = self._state or ({}, {})
        if self._origin is not None:
            write_origin(folder, self._origin)
        self._state = self._origin = None
        record = {"schema": SCHEMA, "method": self.method, "settings": settings, "state": values}
        (folder / SETTINGS_FILE).write_text(json.dumps(record, indent=2) + "\n")
        if tensors:
            save_file(tensors, folder / STATE_FILE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """The config of a folder written by :meth:`save_pretrained`, here or on the Hub, method settings included."""
        folder = folder_of(pretrained_model_name_or_path, (CONFIG_NAME, SETTINGS_FILE), subfolder, **kwargs)
        stock = LoraConfig.from_pretrained(str(folder))
        record = read_record(folder)
        if record is None or record["method"] != cls.method:
            raise ValueError(f"{folder} holds no {cls.method} adapter: there is no {SETTINGS_FILE} that says so.")
        fields = {f.name: getattr(stock, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
        fields.pop("peft_type")
        return cls(**fields, **record["settings"])


def default(field: dataclasses.Field) -> Any:
    """The default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The contents of ``lorasculpt.json`` in ``folder``, or None if it is a plain adapter.

    Raises:
        UserError: if the file is of a newer version of this package, damaged, or something else.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record.get("schema"), int) or not record.keys() >= {"method", "settings", "state"}:
        raise UserError(f"{path} is not what lorasculpt writes beside an adapter; put the file of the training back.")
    if record["schema"] > SCHEMA:
        raise UserError(f"{path} was written by a newer lorasculpt (schema {record['schema']}); upgrade to read it.")
    return record


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The method's saved state in ``folder``: plain values and tensors.

    Raises:
        UserError: if a file of it is damaged.
    """
    record, path = read_record(folder) or {"state": {}}, folder / STATE_FILE
    try:
        tensors = load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}); put it back.") from None
    return record["state"], tensors


def bring_back(method: Method, folder: Path) -> None:
    """Give ``method``, whose weights were loaded from ``folder``, the state that was saved with them.

    Raises:
        UserError: if a part of it is no longer there, and the weights do not tell it.
    """
    values, tensors = read_state(folder)
    if not tensors and method.has_tensors(values) and method.uncertain:
        raise UserError(
            f"{folder} lacks {STATE_FILE}, which was saved with this adapter and holds what its weights do not tell; "
            "put it back."
        )
    method.restore(values, tensors)


def _check_driven(method: Method) -> None:
    """Warn where an adapter was trained as a plain LoRA, without the clock that its method needs."""
    if method.config.clock and not (method.step or method.combined) and method.moved():
        warnings.warn(
            f"adapter {method.adapter!r} was trained without a clock, so not as {method.config.method}: give a trainer "
            "callbacks=[lorasculpt.ClockCallback()], or drive a lorasculpt.Clock in your own loop.",
            stacklevel=2,
        )


class Methods(BaseTuner):
    """What the PEFT tuners of all methods share: a :class:`Method` per adapter, its state saved and loaded with it."""

    peft_config: dict[str, MethodConfig]
    target_module_mapping = LoraModel.target_module_mapping

    @property
    def methods(self) -> dict[str, Method]:
        """The methods at work, by adapter name; built on first use, when every layer is in place."""
        made = self.__dict__.setdefault("_methods", {})
        for adapter, config in self.peft_config.items():
            if adapter not in made or made[adapter].config is not config:
                made[adapter] = config.implementation(config, self, adapter)
        for adapter in set(made) - set(self.peft_config):
            del made[adapter]
        return made

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            found = peft_config.default_targets(self.model)
            peft_config.target_modules = _left(found, peft_config) if isinstance(found, set) else found
        return super()._prepare_adapter_config(peft_config, model_config)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, Methods):
            # PeftModel.save_pretrained asks for the tensors first and for the config file next
            method = tuner.methods[adapter_name]
            if not any(map(sharded, method.parameters())):  # those are gathered, and saved by one process alone
                _check_driven(method)
                method.settle()
            config._state = method.state()
            if not any(getattr(layer, "merged", False) for layer in tuner.modules()):  # else the base is no longer it
                config._origin = origin(tuner.model, config.base_model_name_or_path, frozen=True)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, Methods):
            tuner.methods[adapter_name].loaded(found)
        return found


def _left(names: set[str], config: MethodConfig) -> set[str]:
    """Those of ``names`` that ``layers_to_transform`` and ``exclude_modules`` leave.

    PEFT takes a full name at its word, whatever layer it lies in, and so is asked about last names.
    """
    asked = copy.copy(config)
    asked.target_modules = {name.rpartition(".")[2] for name in names}
    left = {name for name in names if check_target_module_exists(asked, f".{name}")}
    if not left:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform} and exclude_modules={config.exclude_modules} leave none "
            f"of the layers that {type(config).__name__} adapts by itself: correct them, or give target_modules."
        )
    return left


class MethodModel(Methods, LoraModel):
    """PEFT's LoRA tuner with masked leaves."""

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer = getattr(parent, target_name)
        base = layer.get_base_layer()
        uncalled = isinstance(base, nn.MultiheadAttention)  # PEFT adds B A to its weights: the leaves are never called
        for leaves in (layer.lora_A, layer.lora_B):
            if uncalled or adapter_name not in leaves or type(leaves[adapter_name]) is not nn.Linear:
                raise ValueError(
                    f"{current_key} is a {type(base).__name__}, which {type(lora_config).__name__} "
                    "cannot adapt: target linear layers only."
                )
            leaves[adapter_name] = MaskedLinear.of(leaves[adapter_name])

    def add_weighted_adapter(self, adapters, weights, adapter_name, *args, **kwargs):
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        self.methods[adapter_name].combined = True

    def merge_adapter(self, *args, **kwargs):
        self._settle()
        super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        self._settle()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _settle(self) -> None:
        for method in self.methods.values():
            method.settle()


def register(config: type[MethodConfig], tuner: type[Methods] = MethodModel) -> type[MethodConfig]:
    """Let PEFT know a method by the upper-case form of its name."""
    kind = MethodType(config.method.upper())
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = "lora_"
    return config


def methods_of(model: nn.Module) -> dict[str, Method]:
    """The methods at work in ``model`` (wrapped or not), by adapter name; empty if it has none."""
    for module in model.modules():
        if isinstance(module, Methods):
            return module.methods
    return {}


def method_logs(model: nn.Module) -> dict[str, float]:
    """What the methods at work in ``model`` have to show: their penalties, densities and shares.

    Keys are plain for one adapter and begin with ``adapter/`` where several are at work.
    """
    methods = methods_of(model)
    if len(methods) == 1:
        return next(iter(methods.values())).logs()
    return {f"{name}/{key}": value for name, method in methods.items() for key, value in method.logs().items()}


def pruned(factors: Sequence[Tensor]) -> bool:
    """Whether all of ``factors``, the A of an adapter, hold the zeros of a pruned one: dense training leaves none."""
    return bool(factors) and all(int(A.count_nonzero()) < 0.9 * A.numel() for A in factors)


def looks_sculpted(model: nn.Module) -> bool:
    """Whether a plain LoRA in ``model`` holds the zeros of a pruned adapter."""
    for module in model.modules():
        if isinstance(module, LoraModel) and not isinstance(module, MethodModel):
            for adapter in module.peft_config:
                if pruned([site.A for site in sites(module, adapter).values()]):
                    return True
    return False
