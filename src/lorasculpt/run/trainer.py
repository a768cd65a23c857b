"""TRL's trainer of a run, and what it is given: arguments, batches, an optimizer where its own does not do."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, SFTTrainer

from ..adapters.clock import ClockCallback
from ..adapters.settings import must_be
from ..adapters.tasks import TaskCollator
from ..adapters.update import UpdateConfig
from ..config import RunConfig
from ..data.batches import Collator, rows
from ..data.records import Record
from ..errors import UserError, gist
from ..files import free
from ..models.load import computing
from ..models.parts import parts
from .callbacks import Frozen
from .folder import EVENTS, RUN_FILE, clear, step_of
from .model import precision

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
    "activation_checkpointing": "training.checkpointing",
    "activation_checkpointing_kwargs": "training.checkpointing",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "logging_steps": "training.log_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep",
    "report_to": "training.report_to",
    "dataloader_num_workers": "training.workers",
    "seed": "seed",
    "trust_remote_code": "trust_remote_code",
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

# what the trainer takes and nothing comes of here, or harm, by the reason why
IDLE = {
    name: why
    for why, names in {
        "what is learned is the answer of a row, always": ("completion_only_loss", "assistant_only_loss"),
        "a row becomes part of a batch whole, padded to the longest": (
            *("dataset_text_field", "dataset_num_proc", "truncation_mode", "packing_strategy", "eval_packing"),
            *("pad_to_multiple_of", "pad_token", "length_column_name", "label_names"),
        ),
        "rows are taken in a new order in each pass, unless train_sampling_strategy is sequential": (
            "shuffle_dataset",
        ),
        "it is the base's own, in training as in answering": ("eos_token", "chat_template_path"),
        "dtype, quantization and attention say how the base is loaded": ("model_init_kwargs",),
        "AdamW trains, by adam_beta1, adam_beta2 and adam_epsilon": ("optim_args", "optim_target_modules"),
        "what is measured stands under evaluate": (
            *("eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"),
            *("bf16_full_eval", "fp16_full_eval", "metric_for_best_model", "greater_is_better", "do_predict"),
        ),
        "training.save_every and training.keep say what is saved": (
            *("save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"),
        ),
        "accelerate launch tells processes how they share the work": ("local_rank", "parallelism_config"),
        "DeepSpeed takes optimizer steps that no hook sees, where fsdp does not": ("deepspeed",),
        "training has no use for it": ("do_train", "use_cache"),
    }.items()
    for name in names
}


ROOM = 2**30  # of shared memory, for a few batches of photographs

# taken unless the file says otherwise: masks are buffers, but the same in all processes, so that DDP need not send them
DEFAULTS = {"ddp_broadcast_buffers": False}


def trainer_of(
    config: RunConfig,
    model: PeftModel,
    processor,
    records: Sequence[Record],
    resume: Path | None,
    progress: bool,
) -> SFTTrainer:
    """What trains ``model`` on ``records``, with a clock; its events go on from the checkpoint ``resume``, if any.

    Raises:
        UserError: if the trainer refuses what ``training.arguments`` says.
    """
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    told = on_one_gpu(arguments(config, progress, precision(config)), progress)
    with telling_what_it_refuses(config):
        trainer = SFTTrainer(
            model=model,
            args=told,
            train_dataset=rows(records),
            processing_class=processor,
            data_collator=collator(model, processor),
            optimizers=(optimizer(model, config, told), None),
            callbacks=[Frozen()],
        )
    while trained:  # and none is kept: they may lie on another device than what is trained
        parameter, value = trained.pop()
        if parameter.dtype != value.dtype:  # TRL rounds the adapter of a quantised base to bf16
            parameter.data = value.to(parameter.device)
    ClockCallback(resume).lead(trainer)
    keep_events(trainer, config, step_of(resume) if resume else 0)
    return trainer


def check_arguments(config: RunConfig) -> None:
    """See that ``training.arguments`` are arguments of ``SFTConfig``, of its types, that nothing here stands for.

    Raises:
        UserError: for the first that is not, with its line in the file.
    """
    _check_trackers(config)
    given = config.training.arguments
    known = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
    free = [name for name in known if name not in {*OWN_ARGUMENTS, *FIXED, *IDLE}]
    for key in given:
        place = f"training.arguments.{key}"
        if key in OWN_ARGUMENTS:
            raise config.error(place, f"is not taken here; use {OWN_ARGUMENTS[key]}.")
        if key in FIXED:
            raise config.error(place, "is set by lorasculpt itself; remove it.")
        if key in IDLE:
            raise config.error(place, f"is not taken here: {IDLE[key]}; remove it.")
        if key not in known:
            close = difflib.get_close_matches(key, free, n=1)
            mend = f"did you mean {close[0]}?" if close else "see its documentation."
            raise config.error(place, f"is no argument of TRL's SFTConfig; {mend}")
        if key == "fsdp" and given[key] is True:
            continue  # what transformers takes, and asks for, whatever it is annotated as
        if (taken := must_be(SFTConfig, key, given[key])) is not None:
            raise config.error(place, f"must be {taken}; got {given[key]!r:.80}.")
    if (order := given.get("train_sampling_strategy", "random")) not in ("random", "sequential"):
        told = f"must be random or sequential, because rows have no length before they are read; got {order!r}."
        raise config.error("training.arguments.train_sampling_strategy", told)
    if (shape := given.get("lr_scheduler_kwargs")) is not None:
        place = "training.arguments.lr_scheduler_kwargs"
        if config.training.schedule != "cosine":
            raise config.error(place, f"is nothing that a {config.training.schedule} schedule takes; remove it.")
        cycles = shape.get("num_cycles") if isinstance(shape, dict) and len(shape) == 1 else None
        if not isinstance(cycles, int | float) or isinstance(cycles, bool):
            told = f"must be {{num_cycles: NUMBER}}, which is all that a cosine takes; got {shape!r:.80}."
            raise config.error(place, told)
    if given.get("use_liger_kernel") and not is_liger_kernel_available():
        told = "needs liger-kernel, which is not installed; install it, or remove this."
        raise config.error("training.arguments.use_liger_kernel", told)
    if given.get("activation_offloading") and computing().type == "cpu":
        raise config.error("training.arguments.activation_offloading", "needs an accelerator; remove it.")
    if given.get("push_to_hub") and not given.get("hub_model_id"):
        raise config.error("training.arguments.push_to_hub", "needs a hub_model_id, such as name/invoices; add it.")


def _check_trackers(config: RunConfig) -> None:
    wanted, there = config.training.report_to, get_available_reporting_integrations()
    for name in wanted:
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            close = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            mend = f"did you mean {close[0]}?" if close else f"use some of {', '.join(INTEGRATION_TO_CALLBACK)}, or []."
            raise config.error("training.report_to", f"has {name!r}, which transformers does not know; {mend}")
        if name in INTEGRATION_TO_CALLBACK and name not in there:
            raise config.error(
                "training.report_to", f"has {name}, which is not installed; install it, or remove it here."
            )


def arguments(config: RunConfig, progress: bool, autocast: torch.dtype | None) -> SFTConfig:
    """What TRL's trainer is told: the settings of ``config.training``, and its ``arguments`` but for those of pushing.

    Args:
        progress: Whether there is a progress bar.
        autocast: bfloat16 or float16, which training computes in; None computes in the weights' own.

    Raises:
        UserError: if the trainer refuses what ``arguments`` says.
    """
    settings = config.training
    length = {"max_steps": settings.steps} if settings.steps else {"num_train_epochs": settings.epochs}
    on_cpu = computing().type == "cpu"
    given = {key: value for key, value in settings.arguments.items() if key not in PUSHING}
    # transformers writes into what it is given, and these are what the run is known by
    further = DEFAULTS | deepcopy(given)
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
        dataloader_num_workers=_spare() if settings.workers is None else settings.workers,
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


def _spare() -> int:
    """How many processes may prepare batches beside this one: none where the CPU itself trains.

    They hand batches over through /dev/shm. Where a container has little of it, the usual 64 MB, training would hang.
    """
    shared = Path("/dev/shm")
    if computing().type == "cpu" or (shared.is_dir() and free(shared) < ROOM):
        return 0
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(4, own // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def on_one_gpu(arguments: SFTConfig, progress: bool) -> SFTConfig:
    """A launcher gives each process its GPU. Without one transformers takes all by DataParallel, which TRL refuses."""
    if arguments.n_gpu > 1:
        if progress:
            print(f"One of {arguments.n_gpu} GPUs trains; for all: accelerate launch -m lorasculpt train ...")
        arguments._n_gpu = 1
    return arguments


@contextmanager
def telling_what_it_refuses(config: RunConfig) -> Iterator[None]:
    """Where the trainer cannot be made, leave nothing of it, and say what it refuses of ``training.arguments``."""
    try:
        yield
    except Exception as error:
        if not (config.output / RUN_FILE).is_file():
            clear(config.output)
        if not config.training.arguments or not isinstance(error, ValueError):
            raise
        raise config.error("training.arguments", f"is refused: {gist(error)}.") from error


def keep_events(trainer: SFTTrainer, config: RunConfig, step: int) -> None:
    """Have TensorBoard write where it stays, unless TENSORBOARD_LOGGING_DIR says where: ``.partial`` is cleared.

    What it was told there after ``step``, from which training goes on, it forgets: those steps are taken once more.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(config.output / EVENTS)
            callback._SummaryWriter = partial(callback._SummaryWriter, purge_step=step + 1)


def collator(model: PeftModel, processor) -> Collator | TaskCollator:
    """What makes batches of rows, with the tasks of the samples where the adapter of ``model`` routes by them."""
    collate, config = Collator(processor), model.active_peft_config
    routed = isinstance(config, UpdateConfig) and config.tasks and not config.sequence
    return TaskCollator(collate, config.tasks) if routed else collate


def optimizer(model: nn.Module, config: RunConfig, given: SFTConfig) -> torch.optim.Optimizer | None:
    """AdamW as ``given`` says, with two learning rates: the projector's (adapted or full), and everybody else's.

    None where the projector is frozen, or not known: the trainer's own AdamW does, and under FSDP a trainer takes no
    other.
    """
    settings = config.training
    try:
        names = tuple(f".{part.split('.')[-1]}." for part in parts(model).projector)
    except UserError:  # a family whose parts are not known here, whose layers the method listed
        names = ()
    projector: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (projector if any(part in name for part in names) else others).append(parameter)
    if not projector:
        return None
    groups = [{"params": others, "lr": settings.lr}, {"params": projector, "lr": settings.projector_lr}]
    betas = given.adam_beta1, given.adam_beta2
    return torch.optim.AdamW(groups, betas=betas, eps=given.adam_epsilon, weight_decay=settings.weight_decay)
