"""Config → trained adapter, on TRL's ``SFTTrainer``; no method is named here.

    run.yaml → records → model + adapter → SFTTrainer + ClockCallback → output/adapter

``output`` holds ``run.yaml`` (what ran), ``checkpoint-<step>`` (whole ones only), ``adapter`` and ``training.json``:
``seconds``, ``memory_bytes`` (the peak of the main process while it trained, measurements at steps included, over all
parts of a run that was interrupted; null where it cannot be told) and ``memory_of``, what that is of: ``cuda`` or
``process`` (`lorasculpt.memory`); ``machine``, what it ran on, and ``precision``, what ``auto`` came to: ``fp32``,
``bf16`` or ``fp16``; ``steps``, ``trainable`` parameters, and the log as ``history``. A run whose weights came to no
numbers has ``diverged.json`` in place of these two: the ``step``, of how many ``steps``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from . import card, corda
from .adapters.beside import beside
from .adapters.clock import ClockCallback
from .adapters.load import PROJECTOR_FILE
from .adapters.method import methods_of
from .adapters.residual import taken, write_plain
from .adapters.update import UpdateConfig, known_tasks
from .config import WATCHING, RunConfig
from .data.batches import Collator, rows
from .data.records import Record, read, replayed, set_aside, shared
from .errors import Diverged, UserError
from .evaluation import Task, drift, evaluate, fisher, self_prompts, spoken, tasks
from .evaluation.drift import Prompt, question
from .evaluation.strength import moved
from .evaluation.summary import task_average
from .evaluation.tasks import asked_as
from .files import disk_full, free, write_json, write_text
from .hub import push
from .kinds import KINDS, built, must_be, settings_of, started, words
from .memory import Peak, machine
from .methods import METHODS
from .models.head import answers_alone
from .models.load import autocast_dtype, computing, load
from .models.parts import parts, target_regex

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast
RUN_FILE, LOG_FILE, DRIFT_FILE, ADAPTER = "run.yaml", "training.json", "drift.jsonl", "adapter"
COST_FILE, CORDA_FILE, FISHER_FILE = "cost.json", "corda.jsonl", "fisher.safetensors"
DIVERGED_FILE = "diverged.json"
OF_CHECKPOINT = 3  # its size over that of the trained weights: they and AdamW's two moments


def train(
    config: RunConfig, *, progress: bool = True, start: Callable[[nn.Module, RunConfig], PeftModel] | None = None
) -> Path:
    """Train the adapter that ``config`` describes and return its folder.

    Goes on by itself from the last whole checkpoint in ``config.output``; an adapter that is already there is left
    alone. What is written is written under another name first. A run that says so is pushed (`lorasculpt.hub`).

    Args:
        config: the run.
        progress: whether to show a progress bar.
        start: gives a freshly loaded base the adapter to train. Default: :func:`attach`, a fresh one.

    Raises:
        UserError: for anything in the config, the data or the folders that the user can mend; :class:`Diverged` where
            the weights came to no numbers.
    """
    output = config.output
    if config.data.train is None:
        raise config.error("data.sequence", "is no single run; lorasculpt.sequence.learn takes it.")
    check_arguments(config)
    check_output(output, config)
    adapter = output / ADAPTER
    if (adapter / "adapter_config.json").is_file():
        push(config, adapter)
        return adapter
    set_seed(config.seed)
    records = trained_on(config)
    check_measured(config)
    named = _with_tasks(config, records)
    model, processor = loaded(config)
    if start is None:
        prepare(model, processor, named, records)
    model = (start or attach)(model, named)
    others = taken(model) or beside(model)
    autocast = precision(config)
    measured = [_Measure(config, model, processor, autocast)] if config.evaluate.every else []
    resume = _last_checkpoint(output)
    clock = ClockCallback(resume)
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    trainer = SFTTrainer(
        model=model,
        args=_on_one_gpu(_arguments(config, progress, autocast), progress),
        train_dataset=rows(records),
        processing_class=processor,
        data_collator=Collator(processor, tasks=_routed(model)),
        optimizers=(_optimizer(model, config), None),
    )
    for parameter, value in trained:
        if parameter.dtype != value.dtype:  # TRL rounds the adapter of a quantised base to bf16
            parameter.data = value.to(parameter.device)
    clock.lead(trainer)
    cost = _Cost(trainer.args.device, resume)
    for callback in (_Keep(config, cost), *measured):
        trainer.add_callback(callback)
    with _telling_where_it_goes_on(output):
        write_text(output / RUN_FILE, config.to_yaml())
        (output / DIVERGED_FILE).unlink(missing_ok=True)
        try:
            _inform(config, trainer.model, processor, records, autocast, progress)
            with nullcontext() if trainer.args.device.type != "cpu" else answers_alone(model.get_base_model()):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except (UserError, ValueError) as error:
            # some settings can only be judged once the steps are counted
            key = _setting(config, error) if isinstance(error, ValueError) else None
            if resume is not None or trainer.state.global_step or (key is None and not isinstance(error, UserError)):
                raise
            shutil.rmtree(output)  # nothing has run: leave the folder free for the mended file
            if key is None:
                raise
            raise config.error(key, f"is refused: {error}") from error
        if trainer.is_world_process_zero():
            _write(output, config, trainer, cost, others, autocast)
    if trainer.is_world_process_zero():
        push(config, adapter)
    return adapter


@contextmanager
def _telling_where_it_goes_on(output: Path) -> Iterator[None]:
    """Remove what is half written where there was no room for the rest, and say where the run will go on."""
    try:
        yield
    except Exception as error:
        if not disk_full(error):
            raise
        shutil.rmtree(output / ".partial", ignore_errors=True)
        last = _last_checkpoint(output)
        where = f"goes on from {last.name}" if last else "begins again, because it had made no checkpoint"
        raise UserError(f"the disk of {output} has no room left; make some and run it again: it {where}.") from error


def _split(config: RunConfig) -> tuple[list[Record], list[Record]]:
    """What is trained on, and what of the training data is set aside."""
    data = config.data
    assert data.train is not None
    records = read(data.train, images=data.images, limit=data.limit)
    return set_aside(records, data.validation, data.images or data.train.parent) if data.validation else (records, [])


def trained_on(config: RunConfig) -> list[Record]:
    """The rows of one pass: those of ``data.train`` that are not set aside, and what is replayed of ``data.general``.

    Raises:
        UserError: as of :func:`general`.
    """
    records, _ = _split(config)
    share = config.data.replay
    return records if share is None else records + replayed(general(config), len(records), share, config.seed)


def general(config: RunConfig) -> list[Record]:
    """The rows of ``data.general``.

    Raises:
        UserError: for one that asks what is to be measured.
    """
    assert config.data.general is not None
    records = read(config.data.general, images=config.data.images)
    files = [*config.evaluate.source, *config.evaluate.target, *config.evaluate.validation]
    measured = [record for file in files for record in read(file, images=config.evaluate.images)]
    if config.data.validation:
        measured += _split(config)[1]
    if (same := shared(records, measured)) is not None:
        raise UserError(
            f"{same[0].where}: asks what {same[1].where} asks, which is measured and may not be trained on; remove the "
            "row from data.general."
        )
    return records


def _inform(
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
                texts = spoken(processor, draw.sample(given, min(number, len(given))))
            else:
                images = list(dict.fromkeys(record.images[0] for record in records if record.images))
                draw.shuffle(images)
                options: dict[str, Any] = {"batch": config.evaluate.batch, "precision": autocast}
                texts = self_prompts(model, processor, number, images=images, **options)
            words = "Fisher information" if progress else None
            fisher(model, processor, texts, path, precision=autocast, progress=words)
        method.config.take_fisher(os.path.relpath(path))


def _with_tasks(config: RunConfig, records: Sequence[Record]) -> RunConfig:
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


def attach(model: nn.Module, config: RunConfig) -> PeftModel:
    """``model`` with the adapter of ``config.method`` on the linears of its scope, and its projector as asked.

    Raises:
        UserError: for an unknown method, or a setting that it does not take, with the line in the file.
    """
    made = adapter_config(model, config)
    with _refusing(config):
        adapted = get_peft_model(model, made)
    thaw_projector(adapted, config)
    return adapted


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
    with _refusing(config):
        corda.check(model, made)
    autocast, fresh = precision(config), not config.output.exists()
    try:
        if made.corda_config.corda_method != "ipm":
            records = general(config) if config.data.general else _said(config, model, processor, records, autocast)
        texts = list(records)
        random.Random(config.seed).shuffle(texts)
        with _refusing(config):
            corda.prepare(model, processor, made, texts[: corda.TEXTS], autocast)
    except UserError:
        if fresh:  # nothing has run: leave the folder free for the mended file
            shutil.rmtree(config.output, ignore_errors=True)
        raise


def _said(
    config: RunConfig, model: nn.Module, processor, records: Sequence[Record], autocast: torch.dtype | None
) -> list[Record]:
    """What the base writes, kept in the run's folder: a run that goes on must begin with the same texts."""
    images = list(dict.fromkeys(record.images[0] for record in records if record.images))
    write_text(config.output / RUN_FILE, config.to_yaml())
    path, batch = config.output / CORDA_FILE, config.evaluate.batch
    prompts = self_prompts(
        model, processor, corda.TEXTS, config.seed, images, path=path, batch=batch, precision=autocast
    )
    return corda.said(processor, prompts)


def adapter_config(model: nn.Module, config: RunConfig) -> PeftConfig:
    """What :func:`attach` gives ``model``.

    Raises:
        UserError: as of :func:`attach`.
    """
    kind, settings = kind_of(config), {}
    if "target_modules" not in config.method and not _own_targets(kind, config):
        scope = config.scope or "language"
        scopes = [scope] + (["projector"] if config.projector == "lora" and scope != "all" else [])
        settings["target_modules"] = "|".join(target_regex(model, scope) for scope in scopes)
    with _refusing(config):
        return built(config.method, **settings)


@contextmanager
def _refusing(config: RunConfig) -> Iterator[None]:
    """Give what PEFT and the methods say against a setting its place in the file."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise config.error(_setting(config, error) or "method", f"is refused: {error}") from error


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
            listed = f"lorasculpt methods {name} lists them." if name in METHODS else f"{words(name)}."
            raise config.error(
                f"method.{key}", f"is no setting of {name}; {f'did you mean {close[0]}?' if close else listed}"
            )
        if key != "name" and (taken := must_be(KINDS[name], key, config.method[key])) is not None:
            raise config.error(f"method.{key}", f"must be {taken}; got {config.method[key]!r:.80}.")
    return KINDS[name]


def _own_targets(kind: type[PeftConfig], config: RunConfig) -> bool:
    """Whether the method is to name the layers that it adapts itself."""
    names = issubclass(kind, UpdateConfig) and kind.default_targets is not UpdateConfig.default_targets
    if not names or config.scope is not None:
        return False
    if config.projector != "frozen":
        raise config.error(
            "projector",
            f"is {config.projector}, but {config.method['name']} says by itself which layers it trains; leave it out, "
            "or give the adapter a scope.",
        )
    return True


def _routed(model: PeftModel) -> list[str] | None:
    """The tasks whose ids every batch has to carry for the adapter of ``model``."""
    config = model.active_peft_config
    return config.tasks if isinstance(config, UpdateConfig) and config.tasks and not config.sequence else None


def check_tasks(config: RunConfig, known: Sequence[str], tasks: Iterable[Task]) -> None:
    """See that an adapter that knows the tasks ``known`` can be asked the questions of ``tasks``, and of the drift.

    Raises:
        UserError: if ``config.evaluate.as_task`` is none of them, or is missing and needed.
    """
    as_task = config.evaluate.as_task
    if as_task is not None and as_task not in known:
        raise config.error(
            "evaluate.as_task", f"is {as_task!r}, a task that the adapter does not know; use one of {', '.join(known)}."
        )
    general = [question(0)] if config.evaluate.drift else []
    asked_as([*(record for task in tasks for record in task.records), *general], known, as_task)


def thaw_projector(model: nn.Module, config: RunConfig) -> None:
    """Let the projector be trained where ``config`` wants it whole."""
    if config.projector == "full":
        for parameter in _projector(model).values():
            parameter.requires_grad_(True)


def _setting(config: RunConfig, error: Exception) -> str | None:
    """The setting of the method that ``error`` speaks of, as a dotted key: a written one, or what it begins with."""
    written = next((key for key in config.method if re.search(rf"\b{key}\b", str(error))), None)
    first = re.split(r"\W", str(error), maxsplit=1)[0]
    key = written or (first if first in settings_of(kind_of(config)) else None)
    return key and f"method.{key}"


def loaded(config: RunConfig) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """The base of a run and its processor, where models compute.

    Several processes share the base as the trainer places it: none begins with all of it on its GPU.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return load(config.base, **config.loading, device=computing() if alone else "cpu")


def precision(config: RunConfig) -> torch.dtype | None:
    """The dtype of autocast that ``config.training.precision`` asks for; None is full precision."""
    wanted = config.training.precision
    return autocast_dtype(computing()) if wanted == "auto" else DTYPES[wanted]


def held_out(config: RunConfig, limit: int | None = None, *, each: int | None = None) -> tuple[list[Task], list[Task]]:
    """The source and target tasks of ``config.evaluate``, with at most ``limit`` questions a task.

    With ``each``, the tasks of the source share about so many questions evenly, and so do those of the target. What
    ``data.validation`` sets aside takes the place of the target.
    """
    found = []
    limit = config.evaluate.limit if limit is None else limit
    aside = _split(config)[1] if config.data.validation else []
    for files, instead in ((config.evaluate.source, []), (config.evaluate.target, aside)):
        records = instead or [record for file in files for record in read(file, images=config.evaluate.images)]
        grouped = tasks(records)
        count = limit if each is None or not grouped else math.ceil(each / len(grouped))
        kept = [dataclasses.replace(task, records=task.records[:count]) for task in grouped]
        metrics = config.evaluate.metric
        found.append([dataclasses.replace(task, metric=metrics.get(task.name, task.metric)) for task in kept])
    return found[0], found[1]


def check_measured(config: RunConfig) -> None:
    """Read all that ``config.evaluate`` names, so that a bad row or picture is told before training and not after it.

    Raises:
        UserError: for the first, with its file and line.
    """
    held_out(config)
    asked = config.evaluate
    instead = asked.target if config.data.validation else []
    for file in (*instead, *asked.validation, *asked.validation_source):
        read(file, images=asked.images)


def drift_prompts(config: RunConfig, model: nn.Module, processor, autocast: torch.dtype | None) -> list[Prompt]:
    """The texts that the drift of a run is measured on, kept in its folder; none where it is not to be or cannot be."""
    if not config.evaluate.drift or config.projector == "full" or moved(model):
        return []
    source, target = held_out(config, config.evaluate.drift)
    shown = [record.images[0] for task in source or target for record in task.records if record.images]
    images = list(dict.fromkeys(shown))
    random.Random(0).shuffle(images)
    options: dict[str, Any] = {"batch": config.evaluate.batch, "precision": autocast}
    return self_prompts(
        model, processor, config.evaluate.drift, images=images, path=config.output / DRIFT_FILE, **options
    )


def _projector(model: nn.Module) -> dict[str, nn.Parameter]:
    base = model.get_base_model()
    names = parts(base).projector
    if not names:
        raise UserError("this model has no projector to train; set projector: frozen.")
    return {
        name: parameter
        for name, parameter in base.named_parameters()
        if ".lora_" not in name and any(name.startswith(f"{part}.") for part in names)
    }


def _optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer | None:
    """AdamW with two learning rates: the projector's (adapted or full), and everybody else's.

    None where the projector is frozen: the trainer's own AdamW does, and under FSDP a trainer takes no other.
    """
    settings = config.training
    names = tuple(f".{part.split('.')[-1]}." for part in parts(model).projector)
    projector: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (projector if any(part in name for part in names) else others).append(parameter)
    if not projector:
        return None
    groups = [{"params": others, "lr": settings.lr}, {"params": projector, "lr": settings.projector_lr}]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


# What no one may give under ``training.arguments``, and what stands for it.
OWN_ARGUMENTS = {
    "max_steps": "training.steps",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch",
    "gradient_accumulation_steps": "training.accumulation",
    "learning_rate": "training.lr",
    "warmup_steps": "training.warmup",
    "lr_scheduler_type": "training.schedule",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.checkpointing",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "logging_steps": "training.log_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep",
    "report_to": "training.report_to",
    "dataloader_num_workers": "training.workers",
    "seed": "seed",
    "output_dir": "output",
    "hub_token": "hf auth login: a token is not for a file",
}
PUSHING = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision")  # `lorasculpt.hub` reads these
# set below, or without a use here: what is kept, measured and pushed is decided by this package
FIXED = (
    *("optim", "dataloader_pin_memory", "disable_tqdm", "use_cpu", "remove_unused_columns", "max_length"),
    *("dataset_kwargs", "packing", "padding_free", "save_strategy", "save_only_model", "load_best_model_at_end"),
    *("eval_strategy", "eval_on_start", "do_eval", "hub_strategy", "hub_always_push", "resume_from_checkpoint"),
)


def check_arguments(config: RunConfig) -> None:
    """See that ``training.arguments`` are arguments of ``SFTConfig``, of its types, that nothing here stands for.

    Raises:
        UserError: for the first that is not, with its line in the file.
    """
    given = config.training.arguments
    known = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
    free = [name for name in known if name not in OWN_ARGUMENTS and name not in FIXED]
    for key in given:
        place = f"training.arguments.{key}"
        if key in OWN_ARGUMENTS:
            raise config.error(place, f"is not taken here; use {OWN_ARGUMENTS[key]}.")
        if key in FIXED:
            raise config.error(place, "is set by lorasculpt itself; remove it.")
        if key not in known:
            close = difflib.get_close_matches(key, free, n=1)
            mend = f"did you mean {close[0]}?" if close else "see its documentation."
            raise config.error(place, f"is no argument of TRL's SFTConfig; {mend}")
        if (taken := must_be(SFTConfig, key, given[key])) is not None:
            raise config.error(place, f"must be {taken}; got {given[key]!r:.80}.")
    if given.get("push_to_hub") and not given.get("hub_model_id"):
        raise config.error("training.arguments.push_to_hub", "needs a hub_model_id, such as name/invoices; add it.")


def _arguments(config: RunConfig, progress: bool, autocast: torch.dtype | None) -> SFTConfig:
    settings = config.training
    length = {"max_steps": settings.steps} if settings.steps else {"num_train_epochs": settings.epochs}
    on_cpu = computing().type == "cpu"
    further = {key: value for key, value in settings.arguments.items() if key not in PUSHING}
    own: dict[str, Any] = dict(
        # checkpoints are made here and moved out when they are whole
        output_dir=str(config.output / ".partial"),
        **length,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        warmup_steps=settings.warmup,
        # transformers' plain "constant" leaves the warm-up out
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.checkpointing,
        bf16=autocast == torch.bfloat16,
        fp16=autocast == torch.float16,
        logging_steps=settings.log_every,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        report_to=settings.report_to,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=not on_cpu,
        seed=config.seed,
        disable_tqdm=not progress,
        use_cpu=on_cpu,
        remove_unused_columns=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    try:
        return SFTConfig(**own, **further)
    except (TypeError, ValueError, ImportError) as error:
        SFTConfig(**own)  # fails by itself where the fault is not in what was given
        raise config.error("training.arguments", f"is refused: {str(error).splitlines()[0]}") from error


def _on_one_gpu(arguments: SFTConfig, progress: bool) -> SFTConfig:
    """A launcher gives each process its GPU. Without one transformers takes all by DataParallel, which TRL refuses."""
    if arguments.n_gpu > 1:
        if progress:
            print(f"One of {arguments.n_gpu} GPUs trains; for all: accelerate launch -m lorasculpt train ...")
        arguments._n_gpu = 1
    return arguments


def check_output(output: Path, config: RunConfig) -> None:
    """See that ``output`` is free or already this run's, and clear what an interrupted checkpoint left there.

    It is this run's if all is the same but how it is watched, and what is measured once it is trained. A run that came
    to nothing leaves it free.
    """
    path = output / RUN_FILE
    if path.is_file():
        if not same_run(output, config) and not came_to_nothing(output):
            raise config.error("output", f"is {output}, which holds another run (see {path}); choose another folder.")
    elif output.is_dir() and any(output.iterdir()):
        raise config.error("output", f"is {output}, which holds something else; choose an empty folder.")
    shutil.rmtree(output / ".partial", ignore_errors=True)


def same_run(output: Path, config: RunConfig) -> bool:
    """Whether the run in ``output`` is this one in all but how it is watched, and what is measured afterwards."""
    before, asked = RunConfig.load(output / RUN_FILE), config
    left_out: Any = {"training": WATCHING}
    if not (config.data.sequence or before.evaluate.every or asked.evaluate.every):  # these measure while they train
        left_out["evaluate"] = True
    return before.model_dump(exclude=left_out) == asked.model_dump(exclude=left_out)


def diverged(output: Path) -> dict[str, Any] | None:
    """What the run in ``output`` left there if its weights came to no numbers."""
    path = output / DIVERGED_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def came_to_nothing(output: Path) -> bool:
    """Whether there is nothing else in ``output`` of a run."""
    return {path.name for path in output.iterdir()} == {RUN_FILE, DIVERGED_FILE}


def leave_diverged(config: RunConfig, found: dict[str, Any], *, alone: bool) -> None:
    """Leave what :func:`diverged` reads in the run's folder, where it is to be ``alone`` with the settings."""
    if alone:
        shutil.rmtree(config.output)
        write_text(config.output / RUN_FILE, config.to_yaml())
    write_json(config.output / DIVERGED_FILE, found)


def check_trained(config: RunConfig) -> None:
    """See that the run in ``config.output`` was trained as ``config`` says. What is measured may have changed since.

    Raises:
        UserError: for the first setting that was another, with its line in the file.
    """
    path = config.output / RUN_FILE
    if not path.is_file():
        return
    trained, asked = (_trained_with(each) for each in (RunConfig.load(path), config))
    for key in {**asked, **trained}:
        own, before = asked.get(key), trained.get(key)
        if own != before:
            was = "without it" if before is None else f"with {before}"
            raise config.error(
                key,
                f"is {'not set' if own is None else own}, but {config.output} was trained {was} (see {path}); correct "
                "it, or name another output.",
            )


def _trained_with(config: RunConfig) -> dict[str, Any]:
    """The settings that shape an adapter, by their dotted keys."""
    settings: dict[str, Any] = {}
    left_out: Any = {"output": True, "methods": True, "evaluate": True, "training": WATCHING}
    for section, value in config.model_dump(mode="json", exclude=left_out).items():
        inner = {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {section: value}
        settings |= inner
    return settings


def _checkpoints(output: Path) -> list[Path]:
    """The whole ones, by their step."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _last_checkpoint(output: Path) -> Path | None:
    return next(reversed(_checkpoints(output)), None)


class _Cost:
    """Time and memory of training, over all the parts of a run that was interrupted."""

    def __init__(self, device: torch.device, resumed: Path | None):
        path = resumed / COST_FILE if resumed else None
        self.earlier = json.loads(path.read_text()) if path and path.is_file() else {}
        self.peak = Peak(device)
        self.began = time.monotonic()  # to forget an earlier peak takes a large process a second

    def record(self) -> dict[str, Any]:
        """``seconds``, ``memory_bytes`` and ``memory_of`` (:class:`~lorasculpt.memory.Peak`) so far."""
        seconds = self.earlier.get("seconds", 0) + time.monotonic() - self.began
        peaks = [self.peak.bytes()]
        if self.earlier.get("memory_of") == self.peak.of:
            peaks.append(self.earlier["memory_bytes"])
        known = [peak for peak in peaks if peak is not None]
        most = max(known) if len(known) == len(peaks) else None
        return {"seconds": round(seconds, 1), "memory_bytes": most, "memory_of": self.peak.of}


class _Keep(TrainerCallback):
    """Move each checkpoint out of ``.partial`` when it is whole, and drop the oldest.

    The one that a trainer makes at the very end is left out: the adapter is written then.
    """

    def __init__(self, config: RunConfig, cost: _Cost):
        self.config, self.output, self.cost = config, config.output, cost

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        every = self.config.training.save_every
        most = min(state.max_steps // every, self.config.training.keep + 1) if every else 0
        wanted = weights + OF_CHECKPOINT * weights * max(0, most - len(_checkpoints(self.output)))
        if (left := free(self.output)) < wanted:
            from .report.words import size  # brings the drawing along, which training does not need

            what = f"the adapter and {most} checkpoint{'s' if most > 1 else ''} take" if most else "the adapter takes"
            mend = "make room, or name a folder on another disk" + (", or lower training.keep" if most > 2 else "")
            raise self.config.error(
                "output", f"is {self.output}, whose disk has {size(left)} left, and {what} {size(wanted)}; {mend}."
            )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and state.global_step % (self.config.training.save_every or 1):
            control.should_save = False

    def on_log(self, args, state, control, model=None, **kwargs):
        self.check(model, state)

    def check(self, model: nn.Module, state) -> None:
        """See that there is something to keep: a trainer goes on with weights that are no numbers any more."""
        trained = (p.detach() for p in model.parameters() if p.requires_grad)
        own = (p.to_local() if isinstance(p, DTensor) else p for p in trained)  # clipping spreads a NaN to all shards
        if all(bool(torch.isfinite(p).all()) for p in own):
            return
        from .measure import versions  # which imports this module

        alone = _last_checkpoint(self.output) is None
        mend = "lower it, or training.max_grad_norm"
        if not alone:
            mend += f", and name another output than {self.output}"
        if state.is_world_process_zero:
            found = {"step": state.global_step, "steps": state.max_steps, "versions": versions()}
            leave_diverged(self.config, found, alone=alone)
        told = self.config.error(
            "training.lr",
            f"is {self.config.training.lr:g}, and at step {state.global_step} of {state.max_steps} the weights of the "
            f"adapter are not finite any more; {mend}.",
        )
        raise Diverged(str(told))

    def on_save(self, args, state, control, model=None, **kwargs):
        self.check(model, state)
        if not state.is_world_process_zero:
            return
        made = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.config.projector == "full":
            save_projector(model, made)
        (made / COST_FILE).write_text(json.dumps(self.cost.record()) + "\n")
        made.rename(self.output / made.name)
        for old in _checkpoints(self.output)[: -self.config.training.keep]:
            shutil.rmtree(old)


class _Measure(TrainerCallback):
    """Source, target and drift, measured on a few items at chosen steps: the curves of the report."""

    def __init__(self, config: RunConfig, model: nn.Module, processor, autocast: torch.dtype | None):
        self.config, self.processor, self.autocast = config, processor, autocast
        self.source, self.target = held_out(config, config.evaluate.during)
        known = known_tasks(model)
        if known is not None:
            check_tasks(config, known, [*self.source, *self.target])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.config.evaluate.every and state.global_step != state.max_steps:
            return
        options: dict[str, Any] = {
            "precision": self.autocast,
            "batch": self.config.evaluate.batch,
            "as_task": self.config.evaluate.as_task,
        }
        longest = self.config.evaluate.max_new_tokens
        found = evaluate(model, self.processor, self.source, self.target, max_new_tokens=longest, **options)
        point: dict[str, Any] = {"step": state.global_step}
        for side in ("source", "target"):
            if found[side]:
                point[side] = task_average({name: entry["scores"] for name, entry in found[side].items()})
        if prompts := drift_prompts(self.config, model, self.processor, self.autocast):
            point["drift"] = drift(model, self.processor, prompts[: self.config.evaluate.during], **options)["value"]
        state.log_history.append(point)


def save_projector(model: nn.Module, folder: Path) -> None:
    """Write a fully trained projector beside its adapter."""
    tensors = {name: value.detach().contiguous().cpu() for name, value in _projector(model).items()}
    save_file(tensors, folder / PROJECTOR_FILE)


def _write(
    output: Path,
    config: RunConfig,
    trainer: SFTTrainer,
    cost: _Cost,
    others: dict[str, Tensor],
    autocast: torch.dtype | None,
) -> None:
    """``training.json`` and then ``adapter``, whose presence says that the run is done."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    dtype = next(name for name, known in DTYPES.items() if known == autocast)
    record = cost.record() | {
        "machine": machine(trainer.args.device),
        "precision": dtype,
        "steps": trainer.state.global_step,
        "trainable": trained,
    }
    record["history"] = trainer.state.log_history
    write_json(output / LOG_FILE, record)
    partial = output / ".partial" / ADAPTER
    trainer.model.save_pretrained(partial)
    if others:
        write_plain(partial, others)
    if config.projector == "full":
        save_projector(trainer.model, partial)
    card.write(partial, config, record)
    partial.rename(output / ADAPTER)
    shutil.rmtree(output / ".partial", ignore_errors=True)
