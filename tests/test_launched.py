"""``accelerate launch`` of ``lorasculpt train``: two processes share the rows and leave one whole adapter."""

from __future__ import annotations

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


def test_two_processes_train_what_one_trains_and_leave_one_adapter(tmp_path, pico_folder):
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "lorasculpt", "r": 4, "lora_alpha": 8, "density": 0.25, "prune_step": 1},
        "data": {"train": str(pico.write_data(tmp_path / "data", n=8))},
        "training": {"epochs": 1, "batch": 2, "lr": 0.01, "save_every": 1, "precision": "fp32", "report_to": []},
    }
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
    found = load_file(out / "adapter" / "adapter_model.safetensors")
    whole = train(
        RunConfig.load(path, ["output=alone", "training.batch=4", "training.save_every=null"]), progress=False
    )
    expected = load_file(whole / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        assert torch.count_nonzero(value) / value.numel() <= 0.3
    PeftModel.from_pretrained(load(settings["base"])[0], str(out / "adapter"))
