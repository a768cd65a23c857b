"""While a run trains: its cost is counted, checkpoints are kept, curves measured, what is frozen not run backward."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..adapters.update import known_tasks
from ..config import RunConfig
from ..console import size
from ..errors import Diverged
from ..evaluation import drift, evaluate
from ..evaluation.summary import task_average
from ..files import free
from ..memory import Peak
from ..provenance import versions
from .folder import COST_FILE, checkpoints, last_checkpoint, leave_diverged
from .model import asking, save_projector
from .records import check_tasks, drift_prompts, held_out

OF_CHECKPOINT = 3  # its size over that of the trained weights: they and AdamW's two moments


class Cost:
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


class Keep(TrainerCallback):
    """Move each checkpoint out of ``.partial`` when it is whole, and drop the oldest.

    The one that a trainer makes at the very end is left out: the adapter is written then.
    """

    def __init__(self, config: RunConfig, cost: Cost, data: Mapping[str, str]):
        self.config, self.output, self.cost, self.data = config, config.output, cost, data

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        every = self.config.training.save_every
        most = min(state.max_steps // every, self.config.training.keep + 1) if every else 0
        wanted = weights + OF_CHECKPOINT * weights * max(0, most - len(checkpoints(self.output)))
        if (left := free(self.output)) < wanted:
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
        alone = last_checkpoint(self.output) is None
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
        args.distributed_state.wait_for_everyone()  # each process writes a part of it
        if not state.is_world_process_zero:
            return
        made = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.config.projector == "full":
            save_projector(model, made)
        (made / COST_FILE).write_text(json.dumps({**self.cost.record(), **self.data}) + "\n")
        made.rename(self.output / made.name)
        for old in checkpoints(self.output)[: -self.config.training.keep]:
            shutil.rmtree(old)


class Frozen(TrainerCallback):
    """Let the backward pass end where nothing trains any more, under checkpointing as well.

    Trainers then ask for a gradient at the input of every part of a model, once when they are made and once when they
    begin, and a frozen vision tower is run backward for it. Reentrant checkpointing alone needs one; torch takes that
    kind where it is given settings that don't name one.
    """

    def on_init_end(self, args, state, control, model=None, **kwargs):
        given = args.gradient_checkpointing_kwargs
        if not given or given.get("use_reentrant") is False:
            model.disable_input_require_grads()

    on_train_begin = on_init_end  # each time, because a model knows the hooks of the last time alone


class Measure(TrainerCallback):
    """Source, target and drift, measured on a few items at chosen steps: the curves of the report."""

    def __init__(self, config: RunConfig, model: nn.Module, processor):
        self.config, self.processor = config, processor
        self.source, self.target = held_out(config, config.evaluate.during)
        known = known_tasks(model)
        if known is not None:
            check_tasks(config, known, [*self.source, *self.target])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.config.evaluate.every and state.global_step != state.max_steps:
            return
        options = asking(self.config)
        found = evaluate(model, self.processor, self.source, self.target, **options)
        point: dict[str, Any] = {"step": state.global_step}
        for side in ("source", "target"):
            if found[side]:
                point[side] = task_average({name: entry["scores"] for name, entry in found[side].items()})
        del options["max_new_tokens"]  # for the drift nothing is written
        if prompts := drift_prompts(self.config, model, self.processor, options["precision"]):
            point["drift"] = drift(model, self.processor, prompts[: self.config.evaluate.during], **options)["value"]
        state.log_history.append(point)
