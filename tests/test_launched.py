"""``accelerate launch`` of ``lorasculpt train``: two processes share the rows and leave one whole adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pico
import pytest
import torch
import yaml
from launching import launch
from peft import PeftModel
from safetensors.torch import load_file

from lorasculpt.config import RunConfig
from lorasculpt.models.load import load
from lorasculpt.train import train

pytestmark = pytest.mark.timeout(900)  # half a minute, on a machine that may be busy


@pytest.fixture
def settings(tmp_path, pico_folder) -> dict:
    return {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "lorasculpt", "r": 4, "lora_alpha": 8, "density": 0.25, "prune_step": 1},
        "data": {"train": str(pico.write_data(tmp_path / "data", n=8))},
        "training": {"epochs": 1, "batch": 2, "lr": 0.01, "save_every": 1, "precision": "fp32", "report_to": []},
    }


def same_as_of_one(path: Path) -> None:
    """See that the adapter in ``out`` is what one process leaves, and that stock PEFT loads it."""
    found = load_file(path.parent / "out" / "adapter" / "adapter_model.safetensors")
    config = RunConfig.load(path, ["output=alone", "training.batch=4", "training.save_every=null"])
    config = config.model_copy(update={"training": config.training.model_copy(update={"arguments": {}})})
    expected = load_file(train(config, progress=False) / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        assert torch.count_nonzero(value) / value.numel() <= 0.3
    PeftModel.from_pretrained(load(config.base)[0], str(path.parent / "out" / "adapter"))


def test_two_processes_train_what_one_trains_and_leave_one_adapter(tmp_path, settings):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))

    launch("-m", "lorasculpt", "train", str(path))

    out = tmp_path / "out"
    assert sorted(entry.name for entry in out.iterdir()) == [
        "adapter",
        "checkpoint-1",
        "checkpoint-2",  # each process had half of the four batches
        "run.yaml",
        "training.json",
    ]
    for checkpoint in out.glob("checkpoint-*"):
        assert {f"rng_state_{rank}.pth" for rank in range(2)} < {path.name for path in checkpoint.iterdir()}
    same_as_of_one(path)


def test_under_fsdp_they_leave_the_whole_adapter(tmp_path, settings):
    wrapped = {"version": 2, "cpu_ram_efficient_loading": False, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    settings["training"]["arguments"] = {"fsdp": True, "fsdp_config": wrapped}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = str(Path(__file__).with_name("fsdp_train.py")), str(path)
    launch(*command)
    same_as_of_one(path)

    # killed after a step it goes on as if it had never stopped
    whole = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for folder in ("adapter", "checkpoint-2"):
        shutil.rmtree(tmp_path / "out" / folder)
    launch(*command)
    resumed = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
