"""The model of a run: its base, and the adapter and the projector that are trained on it."""

from __future__ import annotations

import difflib
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .. import corda
from ..adapters.load import PROJECTOR_FILE
from ..adapters.method import MethodConfig, methods_of
from ..adapters.settings import must_be
from ..adapters.update import UpdateConfig
from ..config import RunConfig
from ..console import say_once
from ..data.records import Record
from ..errors import UserError
from ..evaluation import fisher, self_prompts, spoken
from ..evaluation.prompts import check_prompts
from ..kinds import KINDS, built, listed_where, settings_of, started
from ..methods import METHODS
from ..models.load import autocast_dtype, computing, load, quantised
from ..models.parts import left_out, parts, target_regex
from .folder import CORDA_FILE, FISHER_FILE, clear, write_record
from .records import general

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


def several_processes() -> bool:
    """Whether a launcher has begun this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def loaded(config: RunConfig) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """The base of a run and its processor, where models compute.

    Several processes share the base as the trainer places it: none begins with all of it on its GPU. A quantised base,
    which its own files may be, goes to the current one, which is to be the process's own.
    """
    if several_processes() and computing().type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    return load(config.base, **config.loading, device="cpu" if several_processes() else computing())


def precision(config: RunConfig) -> torch.dtype | None:
    """The dtype of autocast that ``config.training.precision`` asks for; None is full precision."""
    wanted = config.training.precision
    return autocast_dtype(computing()) if wanted == "auto" else DTYPES[wanted]


def asking(config: RunConfig) -> dict[str, Any]:
    """How the models of a run are asked: options of `lorasculpt.evaluation.evaluate` and of `curve`."""
    asked = config.evaluate
    return {
        "precision": precision(config),
        "batch": asked.batch,
        "max_new_tokens": asked.max_new_tokens,
        "as_task": asked.as_task,
    }


def with_tasks(config: RunConfig, records: Sequence[Record]) -> RunConfig:
    """``config`` with the names of the tasks of ``records``, where its method wants some and none are given.

    Raises:
        UserError: for a record whose task is not among those that are given.
    """
    kind = METHODS.get(config.method["name"])
    if kind is None or not issubclass(kind, UpdateConfig) or kind.sequence:
        return config
    given = config.method.get("tasks")
    if not given and (kind.multitask or any(config.method.get(name) for name in kind.of_tasks)):
        found = list(dict.fromkeys(record.task for record in records))
        return config.model_copy(update={"method": {**config.method, "tasks": found}})
    if given and isinstance(given, list):  # what is no list the method refuses
        for record in records:
            if record.task not in given:
                listed = ", ".join(map(str, given))
                raise UserError(
                    f"{record.where}: the task {record.task!r} is not one of method.tasks ({listed}); add it there or "
                    "correct the row."
                )
    return config


def prepare(model: nn.Module, processor, config: RunConfig, records: Sequence[Record]) -> None:
    """Give a fresh base what its adapter begins with, where that is measured on texts: in CorDA (`lorasculpt.corda`).

    In the mode ``ipm`` the texts are ``records``, else ``data.general``, or without it what the base itself writes,
    half of it about pictures of ``records``.

    Raises:
        UserError: for settings that it cannot do with, with the line in the file.
    """
    if started(config.method).get("init_lora_weights") != "corda":
        return
    made = adapter_config(model, config)
    if config.scope not in (None, "language") or config.projector == "lora":
        key = "scope" if config.projector != "lora" else "projector"
        raise config.error(key, f"is {getattr(config, key)}, but CorDA adapts language layers alone; leave it out.")
    with refusing(config):
        corda.check(model, made)
    autocast, fresh = precision(config), not config.output.exists()
    try:
        if made.corda_config.corda_method != "ipm":
            records = general(config) if config.data.general else _said(config, model, processor, records, autocast)
            check_prompts(processor, records)
        texts = list(records)
        random.Random(config.seed).shuffle(texts)
        with refusing(config):
            corda.prepare(model, processor, made, texts[: corda.TEXTS], autocast)
    except UserError:
        if fresh:  # nothing has run: leave the folder free for the mended file
            clear(config.output)
        raise


def _said(
    config: RunConfig, model: nn.Module, processor, records: Sequence[Record], autocast: torch.dtype | None
) -> list[Record]:
    """What the base writes, kept in the run's folder: a run that goes on must begin with the same texts."""
    images = list(dict.fromkeys(record.images[0] for record in records if record.images))
    write_record(config)
    path, batch = config.output / CORDA_FILE, config.evaluate.batch
    prompts = self_prompts(
        model, processor, corda.TEXTS, config.seed, images, path=path, batch=batch, precision=autocast
    )
    return corda.said(processor, prompts)


def attach(model: nn.Module, config: RunConfig) -> PeftModel:
    """``model`` with the adapter of ``config.method`` on the linears of its scope, and its projector as asked.

    Raises:
        UserError: for an unknown method, or a setting that it does not take, with the line in the file.
    """
    made = adapter_config(model, config)
    _check_names(model, config)
    with refusing(config):
        adapted = get_peft_model(model, made)
    thaw_projector(adapted, config)
    return adapted


def adapter_config(model: nn.Module, config: RunConfig) -> PeftConfig:
    """What :func:`attach` gives ``model``.

    Raises:
        UserError: as of :func:`attach`.
    """
    kind, settings = kind_of(config), {}
    if _open(kind, config):
        scope = config.scope or "language"
        scopes = [scope] + (["projector"] if config.projector == "lora" and scope != "all" else [])
        ours = issubclass(kind, MethodConfig) and kind.default_targets is MethodConfig.default_targets
        if not (ours and scopes == ["language"]):  # which it takes by itself
            settings["target_modules"] = "|".join(target_regex(model, scope) for scope in scopes)
        if scope in ("language", "all") and (share := left_out(model)) > 0.01:
            say_once(
                f"{share:.0%} of the language model's weights lie in no linear layer, as experts do that are one "
                "tensor: they stay as they are."
            )
    with refusing(config):
        return built(config.method, **settings)


def check_method(config: RunConfig) -> None:
    """See what can be told of ``config.method`` without the base, which may take long to load, or the training data.

    Raises:
        UserError: as of :func:`attach`.
    """
    kind = kind_of(config)
    if config.method.get("target_modules") is not None and config.scope is not None:
        raise config.error(
            "scope", "says nothing beside method.target_modules, which names layers wherever they are; remove one."
        )
    _check_patterns(config)
    unknown: dict[str, Any] = {"target_modules": ["q_proj"]} if _open(kind, config) else {}
    if issubclass(kind, UpdateConfig) and kind.multitask and not config.method.get("tasks"):
        unknown["tasks"] = ["one"]
    if config.data.sequence and issubclass(kind, MethodConfig):
        unknown |= kind.apart(config.method, ["before"]) or {}
    with refusing(config):
        made = built(config.method | unknown)
        if config.training.steps is not None and isinstance(made, MethodConfig):
            made.check_steps(config.training.steps)


def _check_patterns(config: RunConfig) -> None:
    """See that what PEFT reads as regular expressions is such."""
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        said = config.method.get(key)
        for pattern in said if isinstance(said, dict) else [said] if isinstance(said, str) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                words = f"has {pattern!r}, which is read as a regular expression and is none: {error}."
                raise config.error(f"method.{key}", words) from None


def _check_names(model: nn.Module, config: RunConfig) -> None:
    """See that each module that the method names is one: PEFT sees that one of them is."""
    names = [name for name, _ in model.named_modules()]
    pattern = config.method.get("target_modules")
    if isinstance(pattern, str) and pattern != "all-linear" and not any(re.fullmatch(pattern, name) for name in names):
        so_called = [name for name in names if name.endswith(f".{pattern}")]
        mend = (
            f"write [{pattern}] for all that are called so" if so_called else f"they are such as {max(names, key=len)}"
        )
        words = (
            f"is {pattern!r}, which is read as a regular expression for whole names of modules and fits none; {mend}."
        )
        raise config.error("method.target_modules", words)
    for key in ("target_modules", "modules_to_save"):
        listed = config.method.get(key)
        for wanted in listed if isinstance(listed, list) else []:
            if not any(f".{name}".endswith(f".{wanted}") for name in names):
                words = f"has {wanted!r}, and no module of the base is called so; correct it."
                raise config.error(f"method.{key}", words)


def kind_of(config: RunConfig) -> type[PeftConfig]:
    """The config class of ``config.method``; the names of its settings and their types are checked.

    Raises:
        UserError: for an unknown method, or a setting that it does not have or of another type, with the line in the
            file.
    """
    name = config.method["name"]
    if name not in KINDS:
        raise config.error("method.name", f"is {name!r}, which is no method; use one of {', '.join(KINDS)}.")
    known = settings_of(KINDS[name])
    for key in config.method:
        if key not in known and key != "name":
            close = difflib.get_close_matches(key, known, n=1)
            listed = f"lorasculpt methods {name} lists them." if name in METHODS else f"{listed_where(name)}."
            raise config.error(
                f"method.{key}", f"is no setting of {name}; {f'did you mean {close[0]}?' if close else listed}"
            )
        if key != "name" and (taken := must_be(KINDS[name], key, config.method[key])) is not None:
            raise config.error(f"method.{key}", f"must be {taken}; got {config.method[key]!r:.80}.")
    return KINDS[name]


def _open(kind: type[PeftConfig], config: RunConfig) -> bool:
    """Whether it is left to the scope which layers are adapted."""
    return "target_modules" not in config.method and not _own_targets(kind, config)


def _own_targets(kind: type[PeftConfig], config: RunConfig) -> bool:
    """Whether the method is to name the layers that it adapts itself."""
    names = issubclass(kind, MethodConfig) and kind.default_targets is not MethodConfig.default_targets
    if not names or config.scope is not None:
        return False
    if config.projector != "frozen":
        raise config.error(
            "projector",
            f"is {config.projector}, but {config.method['name']} says by itself which layers it trains; leave it out, "
            "or give the adapter a scope.",
        )
    return True


@contextmanager
def refusing(config: RunConfig) -> Iterator[None]:
    """Give what PEFT and the methods say against a setting its place in the file."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise refusal(config, error, blamed(config, error) or "method") from error


def refusal(config: RunConfig, error: Exception, key: str) -> UserError:
    """What to raise for an ``error`` that speaks of the setting ``key``, be it written or a default."""
    own = key.partition(".")[2]
    return config.error(
        key, f"{'has a default that is refused here' if own and own not in config.method else 'is refused'}: {error}"
    )


def blamed(config: RunConfig, error: Exception) -> str | None:
    """The setting of the method that ``error`` speaks of, as a dotted key: a written one, or what it begins with."""
    written = next((key for key in config.method if re.search(rf"\b{key}\b", str(error))), None)
    first = re.split(r"\W", str(error), maxsplit=1)[0]
    key = written or (first if first in settings_of(kind_of(config)) else None)
    return key and f"method.{key}"


def inform(
    config: RunConfig,
    model: nn.Module,
    processor,
    records: Sequence[Record],
    autocast: torch.dtype | None,
    progress: bool,
) -> None:
    """Give a method that asks for it the Fisher information of the base; it is kept in the run's folder.

    It is made of the answers in ``data.general``, or without it of what the base writes, half of it about pictures of
    ``records``.
    """
    for method in methods_of(model).values():
        number, path = method.config.wants_fisher(), config.output / FISHER_FILE
        if number is None:
            continue
        if not path.is_file():
            draw = random.Random(config.seed)
            if config.data.general:
                given = general(config)
                check_prompts(processor, given)
                texts = spoken(processor, draw.sample(given, min(number, len(given))))
            else:
                images = list(dict.fromkeys(record.images[0] for record in records if record.images))
                draw.shuffle(images)
                options: dict[str, Any] = {"batch": config.evaluate.batch, "precision": autocast}
                texts = self_prompts(model, processor, number, images=images, **options)
            words = "Fisher information" if progress else None
            fisher(model, processor, texts, path, precision=autocast, progress=words)
        method.config.take_fisher(str(path))


def thaw_projector(model: nn.Module, config: RunConfig) -> None:
    """Let the projector be trained where ``config`` wants it whole, in fp32 as an adapter is.

    In half precision a step at its small rate is lost in rounding for most weights.

    Raises:
        UserError: a base in half precision without autocast, in which fp32 weights cannot act, or a quantised one.
    """
    if config.projector == "full":
        if quantised(model.get_base_model()):
            raise config.error(
                "projector", f"is full, but {config.base} is quantised, of which no weight is trained; use lora."
            )
        projector = _projector_of(model).values()
        if any(parameter.dtype != torch.float32 for parameter in projector) and precision(config) is None:
            raise config.error(
                "projector",
                f"is full, whose weights are trained in fp32, but the base is in {config.dtype} and "
                "training.precision is fp32; set it to bf16, or dtype to float32.",
            )
        for parameter in projector:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _projector_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the projector of an adapted model, without what is adapted in it, by their names in the base.

    Raises:
        UserError: it has none.
    """
    base = model.get_base_model()
    names = parts(base).projector
    if not names:
        raise UserError("this model has no projector to train; set projector: frozen.")
    return {
        name: parameter
        for name, parameter in base.named_parameters()
        if ".lora_" not in name and any(name.startswith(f"{part}.") for part in names)
    }


def save_projector(model: nn.Module, folder: Path) -> None:
    """Write a fully trained projector beside its adapter."""
    tensors = {name: value.detach().contiguous().cpu() for name, value in _projector_of(model).items()}
    save_file(tensors, folder / PROJECTOR_FILE)
