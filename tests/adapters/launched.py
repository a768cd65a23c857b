"""What each process of ``accelerate launch`` runs in ``test_launch.py``: a Trainer for every method and strategy."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import AcceleratorState, DistributedType, PartialState
from contract import CASES, masks, start, texts, weights, with_tasks
from transformers import Trainer, TrainingArguments

from lorasculpt import ClockCallback, method_logs
from lorasculpt.adapters.update import UpdateConfig

STEPS = 4
STRATEGIES: dict[str, dict] = {
    "ddp": {},
    # one process collates and hands out slices; before FSDP, which stays on in the environment
    "dispatch": {"accelerator_config": {"dispatch_batches": True}},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}},
    "fsdp-ram": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},
}
# all methods in the hardest way, and of the others those that have something of their own there: every method under DDP
# is in test_distributed.py
METHODS = {
    "ddp": ["lorasculpt", "mixlora", "lwf"],
    "dispatch": ["mtl_lora"],  # its every slice needs its tasks
    "fsdp": list(CASES),
    "fsdp-ram": ["lorasculpt", "mtl_lora", "smora", "spider"],  # masks, tasks, a bias that moves, whole weights
}
RUNS = [(strategy, method) for strategy in STRATEGIES for method in METHODS[strategy]]


def rows() -> list[dict[str, torch.Tensor]]:
    """Eight samples without padding."""
    return [{"input_ids": ids} for batch in texts(size=8) for ids in batch["input_ids"]]


def collate(found: list[dict[str, torch.Tensor]], method: str) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in found])
    batch = {"input_ids": ids, "labels": ids}
    return with_tasks(batch) if issubclass(CASES[method].config, UpdateConfig) else batch


def trainer(folder: Path, method: str, size: int, **settings) -> Trainer:
    """A Trainer on the pico Llama; ``size`` is the batch of one process."""
    model, _ = start("llama", method)
    if settings.get("fsdp"):
        settings["fsdp_config"] = {**settings["fsdp_config"], "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        adam_epsilon=1e-2,  # smooth: a gradient of nearly 0 must not be blown up to a whole step
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **settings,
    )
    if settings.get("fsdp"):  # accelerate shards on accelerators only: two processes on a CPU pass for some
        assert arguments.device.type == "cpu"
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return Trainer(
        model,
        arguments,
        train_dataset=rows(),
        data_collator=lambda found: collate(found, method),
        callbacks=[ClockCallback()],
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # see conftest.py
    for strategy, method in RUNS:
        settings = STRATEGIES[strategy]
        AcceleratorState._reset_state(True)
        run = trainer(folder / f"{strategy}-{method}", method, 2, **settings)
        run.train()
        sharded = any(hasattr(parameter, "full_tensor") for parameter in run.model_wrapped.parameters())
        assert sharded == ("fsdp" in settings), f"{strategy} did not do what it is called"
        dispatched = isinstance(run.callback_handler.train_dataloader, DataLoaderDispatcher)
        assert dispatched == (strategy == "dispatch"), f"{strategy} did not do what it is called"
        assert run.accelerator.num_processes == 2
        left = {"weights": weights(run.model), "masks": masks(run.model), "logs": method_logs(run.model)}
        AcceleratorState._reset_state(True)
        again = trainer(folder / f"{strategy}-{method}", method, 2, save_strategy="no", **settings)
        again.train(resume_from_checkpoint=str(folder / f"{strategy}-{method}" / "checkpoint-2"))
        left["resumed"] = weights(again.model)
        if run.is_world_process_zero():
            torch.save(left, folder / f"{strategy}-{method}.pt")
    torch.distributed.barrier()
    os._exit(0)  # see test_distributed.py


if __name__ == "__main__":
    main(Path(sys.argv[1]))
