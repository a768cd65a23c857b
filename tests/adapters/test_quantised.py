"""Adapters on a base that bitsandbytes holds in 4 or 8 bits: trained, saved, and merged or refused with the reason."""

from __future__ import annotations

import logging

import pico
import pytest
import torch
from contract import CASES, adapt, equal, logits, texts, train, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lorasculpt
from lorasculpt.adapters.layers import sites
from lorasculpt.adapters.update import updates

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama whose widths are multiples of what 4-bit blocks need."""
    made = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**pico.TEXT, "hidden_size": 64, "intermediate_size": 128})).save_pretrained(made)
    return made


@pytest.fixture(params=[4, 8])
def base(request, folder, monkeypatch):
    """Makes the same quantised model anew."""
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "disabled", True)
    four = request.param == 4
    how = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_compute_dtype=torch.float32)
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu").eval()


@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning")
@pytest.mark.parametrize("method", CASES)
def test_a_quantised_base_is_trained_on_and_merged_or_refused(method, base, tmp_path):
    batch = texts()[0]
    untouched = logits(base(), batch)
    model = adapt(base(), method)  # in evaluation, on a CPU, bitsandbytes packs 4-bit weights so that they cannot train
    train(model, [[batch]] * 3)
    found = logits(model, batch)
    assert float((found - untouched).norm() / untouched.norm()) > 1e-3
    model.save_pretrained(tmp_path)
    again = lorasculpt.load(base(), tmp_path, trainable=True).eval()
    assert equal(weights(again), weights(model))
    torch.testing.assert_close(logits(again, batch), found)

    if updates(model):
        with pytest.raises(ValueError, match=r"cannot be merged|another matrix for each task|is quantised"):
            model.merge_and_unload()
    else:  # PEFT dequantises, adds and quantises again: near, not equal
        merged = logits(model.merge_and_unload(), batch)
        assert float((merged - found).norm() / found.norm()) < 0.2


def test_the_frozen_weight_is_read_dequantised(base, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.self_attn.q_proj"
    exact = plain.get_submodule(name).weight.detach()
    for method in ("lorasculpt", "loramoe"):
        model = adapt(base(), method)
        read = sites(model)[name].weight() if sites(model) else updates(model)[name].base_weight()
        assert read.shape == exact.shape
        assert not read.requires_grad
        assert float((read - exact).norm() / exact.norm()) < 0.15
        logits(model, texts()[0])
        again = sites(model)[name].weight() if sites(model) else updates(model)[name].base_weight()
        torch.testing.assert_close(again.float(), read.float(), rtol=1e-2, atol=1e-3)  # packing rounds the scales
        logits(model, texts()[0])
