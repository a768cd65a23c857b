"""What each process of ``accelerate launch`` runs in ``test_launched.py``: ``lorasculpt train`` under FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor

from lorasculpt import train as training
from lorasculpt.config import RunConfig
from lorasculpt.run import trainer


def as_accelerators(arguments, progress):
    """Accelerate shards on accelerators only: two processes on a CPU pass for some."""
    assert arguments.device.type == "cpu"
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return arguments


def main(path: Path) -> None:
    torch.set_num_threads(1)
    trainer.on_one_gpu = as_accelerators
    write = training._write

    def sharded(config, made, *more):
        assert all(isinstance(p, DTensor) for p in made.model.parameters() if p.requires_grad)
        write(config, made, *more)

    training._write = sharded
    adapter = training.train(RunConfig.load(path), progress=False)
    assert (adapter / "adapter_model.safetensors").is_file()  # for every process, once it is told where


if __name__ == "__main__":
    main(Path(sys.argv[1]))
