"""The clock: what tells an adapter's method that an optimizer step begins, and that it has been taken.

    clock.begin_step()                      penalties are computed, once
    for batch in window:
        loss(model, batch).backward()       ... and added to the gradient in the first backward of the window
    clip; optimizer.step()                  right after it: prune, project
    optimizer.zero_grad()
    clock.end_step()

A penalty that depends on the weights alone is added to ``.grad`` by a hook that fires when a gradient has been
accumulated. So it counts exactly once per optimizer step, whatever the accumulation and the checkpointing; it is
clipped, reduced and unscaled with the task's gradient, as if it were part of the loss; and the forward pass, compiled
or not, knows nothing of it. Only where parameters outside the language model have a penalty does the model's output
give them a gradient of 0 besides: rows without a picture would give them none, and the penalty would be left out. That
parts a compiled graph right before its output.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakMethod, ref

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..errors import UserError
from ..ops.sums import total
from .carrier import reach
from .layers import MaskedLinear, full, sharded_like
from .method import Method, Methods, bring_back, looks_sculpted, method_logs, methods_of, read_record
from .update import UpdateLayer

_DRIVING: WeakKeyDictionary[Method, ReferenceType[Clock]] = WeakKeyDictionary()  # the last clock of each method


class Clock:
    """Drives the methods of ``model`` from a hand-written training loop.

    Args:
        model: a PEFT model, wrapped (DDP, compiled) or not.
        optimizer: the optimizer that trains it, be it accelerate's. A step that a loss scaler skips is no step.
        total_steps: optimizer steps of the whole training; needed where a setting is a share of training.
        accumulation: micro-batches in a full window. The last window of an epoch may be shorter.
        scaler: the ``torch.amp.GradScaler`` in use, if any. Default: that of accelerate's optimizer.

    A model has one clock: where an earlier one drives a method of it, that one is closed.

    Raises:
        UserError: if ``model`` holds a pruned adapter that was loaded as plain LoRA, which training would fill again,
            or one that is no adapter of a PEFT model, whose method nobody knows.
        ValueError: if a method cannot run for ``total_steps``, or ``optimizer`` has none of its parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None = None,
        accumulation: int = 1,
        scaler: Any = None,
    ):
        self._model = model
        self.methods = self._at_work()
        if not self.methods:
            _check_none(model)
        scaler = getattr(optimizer, "scaler", None) if scaler is None else scaler
        self.total_steps, self.accumulation, self.scaler = total_steps, accumulation, scaler
        self.step = max((method.step for method in self.methods.values()), default=0)
        self._open = False
        self._due: dict[nn.Parameter, Tensor] = {}
        self._aside = {id(parameter) for method in self.methods.values() for parameter in method.aside()}
        self._added: dict[nn.Parameter, Tensor] = {}
        self._task: dict[nn.Parameter, Tensor] = {}
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._trained = self._parameters()
        self._handles: list[Any] = []
        for name, method in self.methods.items():
            if not {id(p) for p in method.parameters()} & {id(p) for p in _stepped(optimizer)}:
                raise ValueError(
                    f"the optimizer has no parameter of adapter {name!r}: make it of the adapter's, and then the clock."
                )
            if method in _DRIVING and (earlier := _DRIVING[method]()) is not None:
                earlier.close()
            method.begin(total_steps)
            _DRIVING[method] = ref(self)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if self._aside:
            bases = [module.model for module in model.modules() if isinstance(module, Methods)]
            self._handles += [base.register_forward_hook(_Weak(self._reach)) for base in bases]
        for method in self.methods.values():
            for parameter in method.parameters():
                if parameter.requires_grad:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(_Weak(self._accumulated)))

    def begin_step(self, micro_batches: int | None = None) -> None:
        """Open the window of one optimizer step, before its first forward pass.

        ``micro_batches``: how many there are in this window, if not ``accumulation``. The losses of a method (balance
        of experts) are averaged over them.

        Raises:
            RuntimeError: if the window is open already and holds gradients, or if the trained parameters have
                changed since the clock was made.
        """
        if any(parameter.grad is not None for parameter in self._added):
            raise RuntimeError(
                "clock.begin_step() was called again in the same optimizer step; call it before the first of its "
                "micro-batches alone, and clock.end_step() once the gradients are set to None."
            )
        if self._parameters() != self._trained:
            raise RuntimeError(
                "the trained parameters have changed since this clock was made; make optimizer and clock anew."
            )
        self._open, self._stepped = True, False
        self._due = {}
        self._scale = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        for method in self.methods.values():
            method.open(self._scale / (micro_batches or self.accumulation))
            self._due |= method.penalties()
        self._added, self._task = {}, {}

    def end_step(self) -> None:
        """Close the window, after the optimizer step."""
        if self._open and self._added and not self._stepped and self.scaler is None:
            warnings.warn(
                "clock.end_step() came without a step of the optimizer that the clock was given: the method has not "
                "counted it. If the optimizer was made anew, make the clock anew as well.",
                stacklevel=2,
            )
        self._close_window()

    def _close_window(self) -> None:
        self._open = False
        self._due, self._added = {}, {}
        for method in self.methods.values():
            method.close()

    def _at_work(self) -> dict[str, Method]:
        return {name: method for name, method in methods_of(self._model).items() if _trains(method)}

    def _parameters(self) -> set[int]:
        """What the methods of the model train now, by identity."""
        if not self.methods:
            return set()
        return {id(p) for method in self._at_work().values() for p in method.parameters() if p.requires_grad}

    @torch.compiler.disable  # what is due changes within a window
    def _reach(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """See that the backward pass of ``output`` comes to every parameter that has a penalty in this window."""
        due = [parameter for parameter in (*self._due, *self._added) if id(parameter) in self._aside]

        def reached(value: Any) -> Any:
            return reach(value, due) if isinstance(value, Tensor) and value.is_floating_point() else value

        if not due or not torch.is_grad_enabled():
            return output
        if isinstance(output, MutableMapping):
            for key, value in list(output.items()):
                output[key] = reached(value)
            return output
        return tuple(map(reached, output)) if isinstance(output, tuple) else reached(output)

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """A gradient has just been accumulated in ``parameter.grad``: add what is due, once, and take both norms."""
        penalty = self._due.pop(parameter, None)
        grad = parameter.grad
        if penalty is not None:
            self._task[parameter] = grad.detach().float().square().sum()
            if self._scale != 1:
                penalty = penalty * self._scale
            grad.add_(penalty)
            self._added[parameter] = penalty
        elif parameter in self._added:  # a later micro-batch of the same window
            self._task[parameter] = (grad - self._added[parameter]).float().square().sum()

    def _before_step(self, optimizer, args, kwargs) -> None:
        if _skipped(optimizer):
            return
        scale = getattr(optimizer, "grad_scale", None)
        if self.methods and scale is not None:  # a fused optimizer would unscale within its step
            factor = float(scale)
            for parameter in _stepped(optimizer):
                if parameter.grad is not None:
                    parameter.grad.div_(factor)
            optimizer.grad_scale = torch.ones_like(scale)
        for method in self.methods.values():
            method.before_step()

    def _after_step(self, optimizer, args, kwargs) -> None:
        if not self._open:
            # torch takes a step with empty gradients to find out what an optimizer's state looks like when it is saved
            if self.methods and any(p.grad is not None and p.grad.any() for p in _stepped(optimizer)):
                raise RuntimeError("call clock.begin_step() before the first backward pass of every optimizer step.")
            return
        self._stepped = True
        if _skipped(optimizer):
            return
        self.step += 1
        if self._added:
            norms = total(self._task.values()), total(p.float().square().sum() for p in self._added.values())
            for method in self.methods.values():
                method.gradient = norms
        for method in self.methods.values():
            method.after_step(method.step + 1)  # one that was added later has taken fewer

    def state_dict(self) -> dict[str, Any]:
        """The step, and what every method needs to go on."""
        return {"step": self.step, "methods": {name: method.state() for name, method in self.methods.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it is of other adapters, of another method or of other shapes.
        """
        if state["methods"].keys() != self.methods.keys():
            told = [", ".join(map(repr, names)) or "none" for names in (state["methods"], self.methods)]
            raise ValueError(f"the state is of the adapters {told[0]}, and this clock drives {told[1]}.")
        for name, (values, tensors) in state["methods"].items():
            try:
                self.methods[name].restore(values, tensors)
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"the state of adapter {name!r} is of another method or of other shapes than the model's ({error})."
                ) from error
        self.step = state["step"]

    def close(self) -> None:
        """Let go of the optimizer, the parameters and the model."""
        self._close_window()
        for handle in self._handles:
            handle.remove()
        self._handles = []


class ClockCallback(TrainerCallback):
    """Drives the methods under any ``transformers`` trainer: ``Trainer(..., callbacks=[ClockCallback()])``.

    What the methods have to show joins the loss in the progress bar and in ``state.log_history``. Trackers that come
    before it in the trainer's list do not see it, so TensorBoard gets it from here; :meth:`lead` puts the callback in
    front, where every tracker sees it.

    Args:
        resume: the checkpoint folder that training resumes from, where it is not ``checkpoint-<step>`` in the
            trainer's own ``output_dir``: a trainer does not tell its callbacks.

    Raises:
        UserError: when training begins, for what :class:`Clock` refuses, under DeepSpeed, and where training resumes
            and the state of an adapter is neither in the checkpoint nor in its weights.
    """

    def __init__(self, resume: str | Path | None = None) -> None:
        self.clock: Clock | None = None
        self._resume = None if resume is None else Path(resume)
        self._leads = False
        self._board: Any = None

    def lead(self, trainer) -> ClockCallback:
        """Move to the front of ``trainer``'s callbacks (or join them there), so that all trackers see its numbers."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._leads = True
        return self

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if getattr(args, "deepspeed_plugin", None):  # set by a launcher's config as well as by args.deepspeed
            raise UserError("DeepSpeed takes optimizer steps that no hook sees; use DDP or FSDP2 for these methods.")
        if state.global_step:
            folder = self._resume or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            _resume(model, state.global_step, folder)
        if self.clock is not None:  # of a training that was interrupted
            self.clock.close()
        self.clock = Clock(model, optimizer, state.max_steps, args.gradient_accumulation_steps)

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if self.clock is not None:
            self.clock.begin_step(_window(train_dataloader, state.global_step, args.gradient_accumulation_steps))

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock is not None:
            self.clock.end_step()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if self.clock is None or "loss" not in (logs or {}):
            return
        numbers = method_logs(model)
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
        if numbers and not self._leads and state.is_world_process_zero and "tensorboard" in args.report_to:
            self._write(args, state, numbers)

    def _write(self, args, state, numbers: dict[str, float]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            given = os.environ.get("TENSORBOARD_LOGGING_DIR")
            runs = Path(args.output_dir) / "runs"
            # the trainer's own writer has just made its folder: write beside its file, so that it is one run
            newest = max(runs.iterdir(), key=lambda folder: folder.stat().st_mtime) if runs.is_dir() else runs
            self._board = SummaryWriter(given or str(newest))
        for key, value in numbers.items():
            self._board.add_scalar(f"train/{key}", value, state.global_step)
        self._board.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.clock is not None:
            for name, method in self.clock.methods.items():
                if (told := method.unfinished()) is not None:
                    warnings.warn(f"adapter {name!r}: {told}.", stacklevel=2)
            self.clock.close()
        if self._board is not None:
            self._board.close()
            self._board = None


class _Weak:
    """``method``, called as long as its object is there: what a parameter's hooks hold, Python never collects.

    A copy, or what is unpickled, calls nothing: the clock drives its own model and no other.
    """

    def __init__(self, method: Callable[..., Any] | None = None):
        self._method = None if method is None else WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        bound = None if self._method is None else self._method()
        return None if bound is None else bound(*args)

    def __reduce__(self):
        return _Weak, ()


def _stepped(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_none(model: nn.Module) -> None:
    """See that a model without a method at work has none to miss.

    Raises:
        UserError: for a pruned adapter that was loaded as plain LoRA, and for layers of a method outside a PEFT model.
    """
    if looks_sculpted(model):
        raise UserError(
            "this adapter was pruned and is a plain LoRA here, so training would fill its zeros again; load it with "
            "lorasculpt.load(base, folder, trainable=True), from the folder that was trained: what was exported or "
            "edited holds no method any more."
        )
    if not methods_of(model) and any(isinstance(module, MaskedLinear | UpdateLayer) for module in model.modules()):
        raise UserError(
            "the adapter of this model was added by the model itself (add_adapter), which leaves its method out; use "
            "PEFT's get_peft_model(model, config)."
        )


def _trains(method: Method) -> bool:
    return any(parameter.requires_grad for parameter in method.parameters())


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a loss scaler found no finite gradient and lets a fused optimizer, which sees to that itself, step."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _window(loader: Any, step: int, accumulation: int) -> int:
    """Micro-batches in the window of the optimizer step after ``step``: the last one of an epoch may be shorter.

    Where data are streamed, nobody knows which is the last, and it counts as a full one.
    """
    if accumulation == 1 or not has_length(loader):
        return accumulation
    batches = len(loader)
    windows = -(-batches // accumulation)
    last = step % windows == windows - 1
    return batches - (windows - 1) * accumulation if last else accumulation


def _resume(model: nn.Module, step: int, checkpoint: Path) -> None:
    """Give every method its saved state back; the trainer itself has only loaded the weights.

    Where ``checkpoint`` does not hold those weights, it is not where the trainer resumed from. The masks were then
    already taken from the zeros of the weight file, which is exact unless a kept entry is 0.
    """
    for name, method in methods_of(model).items():
        folder = checkpoint / name if name != "default" else checkpoint
        record = read_record(folder)
        if record is not None and _holds_weights(folder, method):
            _load_frozen(folder, method)
            bring_back(method, folder)
        elif method.uncertain:
            raise UserError(
                f"the state of adapter '{name}' cannot be read off its weights: give ClockCallback(resume=...) the "
                "checkpoint folder, whose lorasculpt_state.safetensors was saved with them."
            )
        else:
            method.step = step


def _holds_weights(folder: Path, method: Method) -> bool:
    """Whether the weight file in ``folder`` has what the adapter trains as it is now; a sharded checkpoint has none."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return True
    saved = load_file(path)
    held = {f"{name}.lora_A.weight": site.A for name, site in method.sites.items()}
    for name, update in getattr(method, "updates", {}).items():
        trained = {key: full(p) for key, p in update.named_parameters() if p.requires_grad}
        held |= {f"{name}.lora_update.{key}": value for key, value in trained.items()}
    both = [(saved[f"base_model.model.{key}"], value) for key, value in held.items()]
    return all(torch.equal(there.to(here), here) for there, here in both)


@torch.no_grad()
def _load_frozen(folder: Path, method: Method) -> None:
    """Give an adapter back what it keeps without a gradient: FSDP's own checkpoint of whole tensors leaves it out."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    saved = load_file(path)
    for name, update in getattr(method, "updates", {}).items():
        for key, parameter in update.named_parameters():
            if not parameter.requires_grad:
                value = saved[f"base_model.model.{name}.lora_update.{key}"].to(parameter.device, parameter.dtype)
                parameter.copy_(sharded_like(value, parameter))
