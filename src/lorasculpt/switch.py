"""The switch from one task to the next, for methods that learn a sequence of them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from .adapters.layers import sharded
from .adapters.method import methods_of
from .adapters.plain import read_adapter
from .adapters.residual import moved_by
from .adapters.update import Update, UpdateConfig, updates
from .errors import UserError


def add_task(model: nn.Module, name: str, from_adapter: str | Path | None = None, *, adapter: str = "default") -> None:
    r"""Begin the next task of a sequence: freeze what was learned so far, and give the new task a LoRA of its own.

        model = get_peft_model(base, AMLoRAConfig(tasks=["charts"]))
        ...                                                    train on charts
        lorasculpt.add_task(model, "receipts")
        ...                                                    train on receipts, with a new optimizer or trainer

    The new LoRA is empty (B = 0), and yet the output jumps, because a softmax over one entry more gives less to the
    others. On a token whose old entries have scores u_1, ..., u_t, what the adapter adds shrinks to Z / (Z + 1) of what
    it was, Z = exp(u_1) + ... + exp(u_t): at least t / (t + 1), that is half after the first task, and training makes
    up for it.

    Call it before the model is wrapped (DDP, FSDP, compile): it replaces parameters. Save and load need nothing more:
    the adapter's config lists its tasks.

    Args:
        model: a PEFT model whose adapter is of such a method.
        name: of the new task.
        from_adapter: the folder of a plain LoRA that was trained for the task ``name`` elsewhere, with stock PEFT or
            with this library, on the same linears and of the same rank; its alpha / r goes into B. It joins the frozen
            ones, before the newest, which stays as it is and goes on. Its output o' and its score u' then join the
            softmax: h - W0 x becomes (Z (h - W0 x) + exp(u') o') / (Z + exp(u')).
        adapter: the name of the adapter in the model.

    Raises:
        UserError: for an adapter that learns no sequence, a name that it has already, a LoRA that does not fit, or a
            model whose parameters are sharded already. Nothing is changed then.
    """
    config = _sequence(model, adapter)
    known = ", ".join(config.tasks)
    if not name or name in config.tasks:
        raise UserError(f"a new task needs a name of its own; got {name!r}, and this adapter has learned {known}.")
    found = updates(model, adapter)
    if any(sharded(parameter) for update in found.values() for parameter in update.parameters()):
        raise UserError("this model is sharded over processes already: add a task before it is wrapped.")
    if from_adapter is None:
        for update in found.values():
            update.append()
        config.tasks = [*config.tasks, name]
        return
    loras = _loras(Path(from_adapter), found)
    for place, update in found.items():
        update.append(loras[place])
    config.tasks = [*config.tasks[:-1], name, config.tasks[-1]]


def _sequence(model: nn.Module, adapter: str) -> UpdateConfig:
    """The config of ``adapter``, which learns tasks one after the other."""
    methods = methods_of(model)
    config = methods[adapter].config if adapter in methods else None
    if isinstance(config, UpdateConfig) and config.sequence:
        return config
    what = f"is of the method {config.method}" if config else "is none of this library's methods"
    raise UserError(
        f"only a method that learns tasks one after the other, such as am_lora, takes a new one; {adapter!r} {what}."
    )


def _loras(folder: Path, found: dict[str, Update]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of the plain LoRA in ``folder`` for every update in ``found``, in the scaling of that update."""
    saved = read_adapter(folder)
    if saved.other:
        raise UserError(f"{folder} holds more than a LoRA ({saved.other[0]}), which cannot join a sequence.")
    if (start := moved_by(saved.config)) is not None:
        raise UserError(f"{folder} began with init_lora_weights={start!r}, so it belongs to other base weights.")
    pairs = {pair.name: pair for pair in saved.pairs}
    for name in [*found, *pairs]:
        if name not in found or name not in pairs:
            here, there = ("this model", folder) if name in found else (folder, "this model")
            raise UserError(f"{here} adapts {name} and {there} does not: both must have the same target_modules.")
    loras = {}
    for name, update in found.items():
        pair, place = pairs[name], update.place
        shape = (place.out_features, update.r, place.in_features)
        if (*pair.B.shape, pair.A.shape[1]) != shape:
            raise UserError(
                f"{folder} has a LoRA of (out, r, in) = {(*pair.B.shape, pair.A.shape[1])} for {name}, and this "
                f"adapter one of {shape}: both must have the same base model and the same r."
            )
        loras[name] = pair.A, pair.B.float() * (pair.scaling / update.scaling)
    return loras
