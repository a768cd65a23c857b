"""A frozen LoRA beside the one that is trained: what they do together, and the plain LoRA that is written of both."""

from __future__ import annotations

import json
import math

import numpy as np
import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lorasculpt import RegularizedConfig
from lorasculpt.adapters.beside import beside, put_beside
from lorasculpt.adapters.residual import write_plain

IDS = torch.arange(4, 20)[None]
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}}


def adapted(**settings) -> PeftModel:
    """The tiny llama, the same every time, with an adapter of random weights, another every time."""
    model = pico.build("llama")[0]
    config = RegularizedConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], **settings)
    model = get_peft_model(model, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    return model


def learned(tmp_path, **settings) -> tuple[list[PeftModel], list]:
    """Three adapters, each beside the sum of those before, and the folders of these sums."""
    models, folders = [], []
    for number in range(3):
        models.append(adapted(**settings))
        if number:
            put_beside(models[-1], folders[-1])
        folders.append(tmp_path / str(number))
        models[-1].save_pretrained(folders[-1])
        if number:
            write_plain(folders[-1], beside(models[-1]))
    return models, folders


def far(models: list[PeftModel], folder) -> float:
    """How far stock PEFT's update of ``folder`` is from the sum of those of ``models``, taken alone."""
    found = PeftModel.from_pretrained(pico.build("llama")[0], folder)
    assert type(found.peft_config["default"]) is LoraConfig
    furthest = 0.0
    for name, layer in found.named_modules():
        if not name.endswith(("q_proj", "v_proj")):
            continue
        expected = np.zeros(tuple(layer.weight.shape))
        for model in models:
            own = model.get_submodule(name)
            A, B = (leaf["default"].weight.detach().double().numpy() for leaf in (own.lora_A, own.lora_B))
            ranks = model.peft_config["default"]
            q = bool(ranks.rank_pattern) and name.endswith("q_proj")
            r, alpha = (3, 5) if q else (2, 6)
            expected += alpha / (math.sqrt(r) if ranks.use_rslora else r) * B @ A
        furthest = max(furthest, np.abs(layer.get_delta_weight("default").numpy() - expected).max())
    return furthest


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS, PATTERNS | {"use_rslora": True}])
def test_what_is_written_is_the_sum_of_all_three_and_does_what_they_do(tmp_path, settings):
    models, folders = learned(tmp_path, **settings)
    for number, folder in enumerate(folders):
        assert far(models[: number + 1], folder) < 1e-5
        loaded = PeftModel.from_pretrained(pico.build("llama")[0], folder)
        torch.testing.assert_close(loaded(IDS).logits, models[number](IDS).logits)
    saved = json.loads((folders[2] / "adapter_config.json").read_text())
    assert saved["r"] == 6
    assert saved["rank_pattern"] == ({"q_proj": 9} if "rank_pattern" in settings else {})
    assert sorted(path.name for path in folders[2].iterdir() if path.suffix in (".json", ".safetensors")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    ]


def forgetting_the_first(folder, others):
    """Only the one before is kept: the newer half of what stands beside."""
    write_plain(folder, {key: value.narrow(int("_B" in key), 0, 2) for key, value in others.items()})


def twice_as_strong(folder, others):
    write_plain(folder, others)
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"lora_alpha": 2 * saved["lora_alpha"]}))


def with_the_scaling_of_one(folder, others):
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    write_plain(folder, others)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))


@pytest.mark.parametrize("fault", [forgetting_the_first, twice_as_strong, with_the_scaling_of_one])
def test_a_sum_that_is_none_is_noticed(tmp_path, fault):
    models, folders = learned(tmp_path)
    models[2].save_pretrained(folders[2])
    fault(folders[2], beside(models[2]))
    assert far(models, folders[2]) > 0.1


def test_it_is_off_where_the_adapter_is_and_never_trained_nor_saved(tmp_path):
    models, folders = learned(tmp_path)
    model = models[1]
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, pico.build("llama")[0].eval()(IDS).logits)
    before = {key: value.clone() for key, value in beside(model).items()}
    model(IDS).logits.sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(value, before[key]) for key, value in beside(model).items())
    first = load_file(folders[0] / "adapter_model.safetensors")
    assert before.keys() == first.keys()
    assert all(torch.equal(value, first[key]) for key, value in before.items())
    model.save_pretrained(tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in alone.items()} == {key: value.shape for key, value in first.items()}
    assert not any("beside" in key for key in model.state_dict())
    assert beside(models[0]) == {}
