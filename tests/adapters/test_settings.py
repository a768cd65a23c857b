"""A setting of another type than a config says is one sentence, before anything is made with it."""

from __future__ import annotations

import math
import re

import numpy as np
import pico
import pytest
import transformers as hf
from contract import CASES
from peft import get_peft_model

from lorasculpt import METHODS, LoRASculptConfig, SpiderConfig, UserError


@pytest.mark.parametrize(
    ("method", "setting", "value", "taken"),
    [
        ("lorasculpt", "density", None, "a number"),
        ("lorasculpt", "density", "0.1", "a number"),
        ("lorasculpt", "density_a", "0.1", "a number or None"),
        ("lorasculpt", "prune_step", "0.05", "a number"),
        ("lorasculpt", "prune_step", True, "a number"),
        ("lorasculpt", "rescale", "no", "true or false"),
        ("lorasculpt", "cmr_modules", None, "text or a list of texts"),
        ("lorasculpt", "r", np.int64(8), "a whole number"),  # which no adapter_config.json can hold
        ("loramoe", "num_experts", 2.5, "a whole number"),
        ("loramoe", "knowledge", "a", "a list of texts"),
        ("mosld", "num_experts", 2.5, "a whole number or text or a list of whole numbers"),
        ("spider", "last_layers", 1.5, "a whole number"),
        ("spider", "last_layers", "2", "a whole number"),
        ("regularized", "weight", None, "a number"),
        ("regularized", "earlier", "folder", "a list of texts or None"),
        ("lwf", "temperature", "1", "a number"),
    ],
)
def test_another_type_is_told(method, setting, value, taken):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{setting} must be {taken}; got {value!r}.')}$"):
        METHODS[method](**{setting: value})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_looks_at_its_types(method):
    with pytest.raises(ValueError, match="inference_mode must be true or false; got 'no'"):
        CASES[method](inference_mode="no")


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        *[("lorasculpt", name) for name in ("cmr_weight", "cmr_connector_weight", "omega")],
        *[(name, "balance_weight") for name in ("loramoe", "malora", "mosld")],
    ],
)
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_a_weight_is_finite(method, setting, value):
    with pytest.raises(ValueError, match=f"{setting} is .* and finite; got {value}"):
        METHODS[method](**{setting: value})


def test_what_python_has_for_a_list_or_a_number_will_do():
    config = LoRASculptConfig(
        target_modules={"q_proj"},
        cmr_modules=("q_proj",),
        density=np.float64(0.5),
        lora_alpha=0.5,
        task_type="CAUSAL_LM",
    )
    assert get_peft_model(pico.build("llama")[0], config).peft_config["default"].cmr_modules == ["q_proj"]


def test_a_model_whose_layers_are_not_known_asks_for_their_names():
    base = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=420))
    with pytest.raises(UserError, match="no linear layers to adapt; use another scope, or target_modules"):
        get_peft_model(base, SpiderConfig())
