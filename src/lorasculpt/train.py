"""Config → trained adapter, on TRL's ``SFTTrainer``; no method is named here.

    run.yaml → records → model + adapter → SFTTrainer + ClockCallback → output/adapter

``output`` holds ``run.yaml`` (what ran), ``checkpoint-<step>`` (whole ones only), ``logs`` (TensorBoard's events, where
there are any), ``adapter`` and ``training.json``:
``seconds``, ``memory_bytes`` (the peak of the main process while it trained, measurements at steps included, over all
parts of a run that was interrupted; null where it cannot be told) and ``memory_of``, what that is of: ``cuda`` or
``process`` (`lorasculpt.memory`); ``machine``, what it ran on, and ``precision``, what ``auto`` came to: ``fp32``,
``bf16`` or ``fp16``; ``steps``, ``trainable`` parameters, and the log as ``history``. A run whose weights came to no
numbers has ``diverged.json`` in place of these two: the ``step``, of how many ``steps``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import set_seed
from trl import SFTTrainer

from . import card
from .adapters.beside import beside
from .adapters.load import load_projector
from .adapters.origin import origin, write_origin
from .adapters.residual import taken, write_plain
from .config import RunConfig
from .console import say_once
from .data.records import Record
from .errors import UserError
from .evaluation.prompts import check_prompts
from .files import read_json, write_json
from .hub import push
from .models.head import answers_alone
from .provenance import machine
from .run.callbacks import Cost, Keep, Measure
from .run.folder import (
    ADAPTER,
    COST_FILE,
    DIVERGED_FILE,
    LOG_FILE,
    check_output,
    check_rows,
    clear,
    last_checkpoint,
    telling_where_it_goes_on,
    write_record,
)
from .run.model import (
    DTYPES,
    attach,
    blamed,
    check_method,
    inform,
    loaded,
    precision,
    prepare,
    refusal,
    save_projector,
    with_tasks,
)
from .run.records import check_lengths, check_measured, learned_from, one_pass, rehearsed, training_rows
from .run.trainer import check_arguments, trainer_of


def train(
    config: RunConfig, *, progress: bool = True, start: Callable[[nn.Module, RunConfig], PeftModel] | None = None
) -> Path:
    """Train the adapter that ``config`` describes and return its folder.

    Goes on by itself from the last whole checkpoint in ``config.output``; an adapter that is already there is left
    alone. What is written is written under another name first. A run that says so is pushed (`lorasculpt.hub`).

    Args:
        config: the run.
        progress: whether to show a progress bar.
        start: gives a freshly loaded base the adapter to train. Default: `lorasculpt.run.model.attach`, a fresh one.

    Raises:
        UserError: for anything in the config, the data or the folders that the user can mend; :class:`Diverged` where
            the weights came to no numbers.
    """
    if config.data.train is None:
        raise config.error("data.sequence", "is no single run; lorasculpt.sequence.learn takes it.")
    check_arguments(config)
    check_output(config.output, config)
    adapter = config.output / ADAPTER
    if (adapter / "adapter_config.json").is_file():
        if config.data.train.is_file():
            given = training_rows(config, check_images=False)
            check_rows(config, config.output / LOG_FILE, learned_from(config, given))
        push(config, adapter)
        return adapter

    set_seed(config.seed)
    given = training_rows(config)
    data = learned_from(config, given)
    records = one_pass(config, given.trained)
    measured_on = check_measured(config)
    if progress and os.environ.get("RANK", "0") == "0":
        _tell_rehearsed(config, given.trained)
    named = with_tasks(config, records)
    check_method(named)

    model, processor = loaded(config)
    check_lengths(records, model, processor)
    check_prompts(processor, [*records, *measured_on])
    base = origin(model, config.base)
    if start is None:
        prepare(model, processor, named, records)
    model = (start or attach)(model, named)
    others = taken(model) or beside(model)
    measured = [Measure(config, model, processor)] if config.evaluate.every else []

    resume = last_checkpoint(config.output)
    if resume is not None:
        check_rows(config, resume / COST_FILE, data)
        load_projector(model.get_base_model(), resume)  # the trainer restores the adapter alone
    trainer = trainer_of(config, model, processor, records, resume, progress)
    cost = Cost(trainer.args.device, resume)
    for callback in (Keep(config, cost, data), *measured):
        trainer.add_callback(callback)

    with telling_where_it_goes_on(config.output):
        _run(config, trainer, records, resume, progress)
        _write(config, trainer, cost, data, base, others)
    if trainer.is_world_process_zero():
        push(config, adapter)
    trainer.accelerator.wait_for_everyone()  # what is returned is there for all
    return adapter


def take(config: RunConfig, alike: Path) -> float:
    """Make the run ``config``, whose folder is free, of the run in ``alike``, trained as it would be; its seconds.

    Raises:
        UserError: the folder holds something else.
    """
    check_output(config.output, config)
    write_record(config)
    training = read_json(Path(shutil.copy(alike / LOG_FILE, config.output / LOG_FILE)))
    partial = config.output / ".partial" / ADAPTER
    shutil.copytree(alike / ADAPTER, partial)
    card.write(partial, config, training)
    partial.rename(config.output / ADAPTER)
    partial.parent.rmdir()
    return training["seconds"]


def _tell_rehearsed(config: RunConfig, trained: Sequence[Record]) -> None:
    """Say it now, and not after hours, where questions are ``trained`` on that are to be measured."""
    if found := rehearsed(config, trained):
        _, question, row = found[0]
        say_once(
            f"{len(found)} of the questions that are measured are also in the training data, such as {question.where} "
            f"({row.where}): right answers to them may be memorised."
        )


def _run(
    config: RunConfig, trainer: SFTTrainer, records: Sequence[Record], resume: Path | None, progress: bool
) -> None:
    """The training itself, from the checkpoint ``resume`` on where there is one; the folder is the run's from here on.

    Raises:
        UserError: as of :func:`train`, with nothing left in the folder where no step was taken.
    """
    write_record(config)
    (config.output / DIVERGED_FILE).unlink(missing_ok=True)
    model = trainer.model
    try:
        inform(config, model, trainer.processing_class, records, precision(config), progress)
        with nullcontext() if trainer.args.device.type != "cpu" else answers_alone(model.get_base_model()):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except (UserError, ValueError) as error:
        # some settings can only be judged once the steps are counted
        key = blamed(config, error) if isinstance(error, ValueError) else None
        if resume is not None or trainer.state.global_step or (key is None and not isinstance(error, UserError)):
            raise
        clear(config.output)  # nothing has run: leave the folder free for the mended file
        if key is None:
            raise
        raise refusal(config, error, key) from error


def _write(
    config: RunConfig,
    trainer: SFTTrainer,
    cost: Cost,
    data: dict[str, str],
    base: dict[str, Any],
    others: dict[str, Tensor],
) -> None:
    """``training.json`` and then ``adapter``, whose presence says that the run is done, by one process for all.

    Args:
        config: the run.
        trainer: what trained it.
        cost: what it took.
        data: what tells the rows that it learned from (`learned_from`).
        base: what is kept of it (`lorasculpt.adapters.origin`).
        others: weights that go beside those of the adapter.
    """
    # each process may hold a part of them
    whole = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    record = cost.record() | {
        "machine": machine(trainer.args.device),
        "precision": next(name for name, known in DTYPES.items() if known == precision(config)),
        **data,
        "steps": trainer.state.global_step,
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "history": trainer.state.log_history,
    }
    output = config.output
    write_json(output / LOG_FILE, record)
    partial = output / ".partial" / ADAPTER
    trainer.model.save_pretrained(partial, state_dict=whole)
    if others:
        write_plain(partial, others)
    if config.projector == "full":
        save_projector(trainer.model, partial)
    write_origin(partial, base)
    if config.image_processor:
        trainer.processing_class.image_processor.save_pretrained(partial)
    card.write(partial, config, record)
    partial.rename(output / ADAPTER)
    shutil.rmtree(output / ".partial", ignore_errors=True)
