"""One row per method: every promise in ``test_contract.py`` is checked for every row, on two families or more.

Also what the tests of adapters share: a model with an adapter, batches, and a training loop written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pico
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lorasculpt import (
    AMLoRAConfig,
    Clock,
    ClockCallback,
    FullConfig,
    LoRAMoEConfig,
    LoRASculptConfig,
    LwFConfig,
    MALoRAConfig,
    MixLoRAConfig,
    MoSLDConfig,
    MTLLoRAConfig,
    RegularizedConfig,
    SMoRAConfig,
    SpiderConfig,
)
from lorasculpt.adapters.context import TASK_IDS
from lorasculpt.adapters.layers import full, sites
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.update import UpdateConfig, context_of, updates
from lorasculpt.data.batches import Collator, rows
from lorasculpt.data.records import Record, read
from lorasculpt.methods.lwf import LwF
from lorasculpt.models.parts import target_regex

TASKS = ("even", "odd")  # of a sample, by the sum of its tokens: the same however batches are cut


@dataclass(frozen=True)
class Row:
    """How the contract makes a config of one method.

    Args:
        config: its class.
        settings: what all tests use. Losses and densities are larger than anyone would train with, so that what they
            do can be told from rounding.
        additive: settings under which the loss of a batch is the sum over its samples (no loss over a whole batch).
        smooth: settings under which nothing that is chosen (a mask, an expert) turns on the last bit.
        moves: names of what has no gradient and is moved by the method itself.
    """

    config: type[PeftConfig]
    settings: dict[str, Any] = field(default_factory=dict)
    additive: dict[str, Any] = field(default_factory=dict)
    smooth: dict[str, Any] = field(default_factory=dict)
    moves: tuple[str, ...] = ()

    def __call__(self, **settings: Any) -> PeftConfig:
        return self.config(**{**self.settings, **settings})


CASES: dict[str, Row] = {
    "lorasculpt": Row(
        LoRASculptConfig,
        {"r": 4, "lora_alpha": 8, "density": 0.25, "prune_step": 2, "cmr_weight": 0.1},
        smooth={"prune_step": 5},
    ),
    "loramoe": Row(
        LoRAMoEConfig,
        {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "num_experts": 4, "tasks": TASKS, "knowledge": ["even"]},
        additive={"balance_weight": 0.0},
    ),
    "mixlora": Row(
        MixLoRAConfig,
        {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "num_factors": 4, "pool": "prompt"},
        smooth={"r": 1, "num_factors": 1},
    ),
    "mtl_lora": Row(MTLLoRAConfig, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "num_b": 2, "tasks": TASKS}),
    "mosld": Row(
        MoSLDConfig,
        {"r": 2, "lora_alpha": 4, "num_experts": "43", "weight_dropout": 0.0, "balance_weight": 0.5},
        additive={"balance_weight": 0.0},
        smooth={"num_experts": 2},
    ),
    "malora": Row(
        MALoRAConfig,
        {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "num_experts": 4, "shared_rank": 4, "balance_weight": 0.5},
        additive={"balance_weight": 0.0},
        smooth={"top_k": 4},
    ),
    "smora": Row(
        SMoRAConfig,
        {"r": 8, "lora_alpha": 4, "top_k": 4, "rank_partition": 2, "bias_rate": 0.05},
        smooth={"top_k": 8},
        moves=("bias",),
    ),
    "am_lora": Row(
        AMLoRAConfig,
        {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "tasks": ["first", "second"], "l1_weight": 0.1},
        additive={"l1_weight": 0.0},
    ),
    "spider": Row(SpiderConfig),
    "regularized": Row(RegularizedConfig, {"r": 4, "lora_alpha": 8, "penalty": "orth", "weight": 0.3}),
    "lwf": Row(LwFConfig, {"r": 4, "lora_alpha": 8, "weight": 3.0}, additive={"weight": 0.0}),
    "full": Row(FullConfig, {"select": "half", "round_steps": 2}),
}
FAMILIES = ("llava", "llava_next", "idefics3", "gemma3")

Batch = dict[str, Tensor]


def start(family: str, method: str = "lorasculpt", **settings: Any) -> tuple[PeftModel, Any]:
    """A pico model with a fresh adapter on the linears of its language part, and its processor or tokenizer."""
    base, processor = pico.build(family)
    return adapt(base, method, **settings), processor


def adapt(base: nn.Module, method: str = "lorasculpt", **settings: Any) -> PeftModel:
    """``base`` with a fresh adapter, always the same one."""
    if "target_modules" not in settings:
        settings["target_modules"] = target_regex(base, "language")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(base, CASES[method](**settings))


def records(folder: Path, n: int = 8) -> list[Record]:
    """``n`` questions about ``n`` pictures, written to ``folder`` and read back."""
    return read(pico.write_data(folder, n))


def batches(processor: Any, found: Sequence[Record], size: int) -> list[Batch]:
    """``found`` in batches of ``size``, in order."""
    table, collate = rows(found), Collator(processor)
    return [collate([table[i] for i in range(at, at + size)]) for at in range(0, len(found), size)]


def texts(size: int = 2, number: int = 1, length: int = 8) -> list[Batch]:
    """``number`` batches of random token ids for a text-only model, always the same."""
    generator = torch.Generator().manual_seed(2)
    found = (torch.randint(4, 400, (size, length), generator=generator) for _ in range(number))
    return [{"input_ids": ids, "labels": ids} for ids in found]


def with_tasks(batch: Mapping[str, Tensor]) -> Batch:
    """``batch`` with the task id of every sample."""
    ids = batch["input_ids"] * batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return {**batch, TASK_IDS: ids.sum(1) % len(TASKS)}


def inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Batch:
    """What ``model`` takes of ``batch``: no labels, and the tasks where its adapter routes."""
    found = {key: value for key, value in batch.items() if key != "labels"}
    return found if context_of(model) is None else with_tasks(found)


def collator(processor: Any, method: str) -> Callable[..., Batch]:
    """The collator of a training with ``method``."""
    collate = Collator(processor)
    return (lambda rows: with_tasks(collate(rows))) if issubclass(CASES[method].config, UpdateConfig) else collate


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy per token of the answer times their number: batches add up, however they are cut."""
    taught = any(isinstance(method, LwF) for method in methods_of(model).values())
    told = {"labels": batch["labels"]} if taught else {}
    logits = model(**inputs(model, batch), **told).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / 10


def train(
    model: nn.Module,
    windows: Iterable[Sequence[Batch]],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    total_steps: int | None = None,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
    clip: float | None = None,
    clock: Clock | None = None,
) -> Clock:
    """A loop written by hand: one optimizer step per window of micro-batches."""
    optimizer = optimizer or sgd(model)
    mine = clock is None
    clock = clock or Clock(model, optimizer, total_steps, scaler=scaler)
    model.train()
    for window in windows:
        clock.begin_step()
        optimizer.zero_grad()
        for batch in window:
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                value = loss(model, batch) / len(window)
            (scaler.scale(value) if scaler else value).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained(model), clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        clock.end_step()
    model.eval()
    if mine:
        clock.close()
    return clock


def sgd(model: nn.Module, lr: float = 0.1, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=lr, **settings)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model, batch)).logits


def weights(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of A and B of every adapted linear, or of all that its update holds."""
    found = {}
    for name, site in sites(model, adapter).items():
        found[f"{name}.A"], found[f"{name}.B"] = site.A.detach().clone(), site.B.detach().clone()
    for name, update in updates(model, adapter).items():
        for key, value in update.state_dict().items():
            found[f"{name}.{key}"] = full(value).detach().clone()
    return found


def masks(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of the masks of A and B of every adapted linear."""
    found = {}
    for name, site in sites(model, adapter).items():
        found[f"{name}.A"], found[f"{name}.B"] = site.a.mask.clone(), site.b.mask.clone()
    return found


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether both hold the same keys and the same bits."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def close(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Fails unless both hold the same keys and nearly the same values."""
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(
            left[key], right[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


# --- trainers -------------------------------------------------------------------------------------------------------

QUIET = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


def sft(folder, method, family, asked, wrap: bool = False, **settings) -> SFTTrainer:
    """TRL's trainer, given the adapted model or (``wrap``) the base and the config."""
    base, processor = pico.build(family)
    config = CASES[method](target_modules=target_regex(base, "language"))
    model = base if wrap else adapt(base, method)
    return SFTTrainer(
        model,
        SFTConfig(
            str(folder),
            **{**QUIET, **settings},
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=False,
        ),
        train_dataset=rows(asked),
        eval_dataset=rows(asked[:2]),
        processing_class=processor,
        data_collator=collator(processor, method),
        peft_config=config if wrap else None,
        callbacks=[ClockCallback()],
    )


def plain(folder, method, family, asked, **settings) -> Trainer:
    """The trainer of transformers."""
    model, processor = start(family, method)
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**QUIET, **settings}),
        train_dataset=rows(asked),
        eval_dataset=rows(asked[:2]),
        data_collator=collator(processor, method),
        callbacks=[ClockCallback()],
    )
