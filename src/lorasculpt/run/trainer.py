"""What TRL's trainer is given: its arguments, and an optimizer where its own does not do."""

from __future__ import annotations

import dataclasses
import difflib
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)
from trl import SFTConfig, SFTTrainer

from ..adapters.settings import must_be
from ..config import RunConfig
from ..errors import UserError
from ..models.load import computing
from ..models.parts import parts
from .folder import EVENTS

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
    _check_trackers(config)
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
        if key == "fsdp" and given[key] is True:
            continue  # what transformers takes, and asks for, whatever it is annotated as
        if (taken := must_be(SFTConfig, key, given[key])) is not None:
            raise config.error(place, f"must be {taken}; got {given[key]!r:.80}.")
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
    further = {key: value for key, value in settings.arguments.items() if key not in PUSHING}
    further = deepcopy(further)  # transformers writes into what it is given, and these are what the run is known by
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


def on_one_gpu(arguments: SFTConfig, progress: bool) -> SFTConfig:
    """A launcher gives each process its GPU. Without one transformers takes all by DataParallel, which TRL refuses."""
    if arguments.n_gpu > 1:
        if progress:
            print(f"One of {arguments.n_gpu} GPUs trains; for all: accelerate launch -m lorasculpt train ...")
        arguments._n_gpu = 1
    return arguments


def keep_events(trainer: SFTTrainer, config: RunConfig) -> None:
    """Have TensorBoard write where it stays, unless TENSORBOARD_LOGGING_DIR says where: ``.partial`` is cleared."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(config.output / EVENTS)


def optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer | None:
    """AdamW with two learning rates: the projector's (adapted or full), and everybody else's.

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
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
