"""The table of families against the real module trees, and the patterns against what PEFT makes of them."""

from __future__ import annotations

import re

import pico
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from lorasculpt.errors import UserError
from lorasculpt.models.parts import FAMILIES, SCOPES, Parts, left_out, linears, parts, target_regex

NEED_TIMM = {"fast_vlm", "gemma3n", "perception_lm"}
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def shrink(config: hf.PretrainedConfig) -> None:
    """Two layers everywhere."""
    for name in ("num_hidden_layers", "depth", "num_global_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 2)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[-2:])
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name))


def outline(family: str) -> nn.Module:
    """The module tree of a family, without memory for its weights."""
    kwargs = {"vision_config": {}, "text_config": {}} if family == "gemma4" else {}  # it has no vision unless asked
    config = hf.AutoConfig.for_model(family, **kwargs)
    if family == "aya_vision":
        config.vision_config.num_attention_heads = 16  # the default does not divide the width
    shrink(config)
    with torch.device("meta"):
        return getattr(hf, CLASSES[family])(config)


@pytest.mark.filterwarnings("ignore")
def test_routers_and_gates_of_one_output_are_left_out():
    """Llama 4's router is a linear that returns two things, and Qwen's shared expert has a gate of one output."""
    llama4 = linears(outline("llama4"), "language")
    assert not any("router" in name for name in llama4)
    assert any(name.endswith("feed_forward.shared_expert.up_proj") for name in llama4)
    qwen = linears(outline("qwen3_5_moe"), "language")
    assert not any(name.endswith("shared_expert_gate") for name in qwen)
    assert any(name.endswith("shared_expert.up_proj") for name in qwen)


@pytest.mark.filterwarnings("ignore")
def test_what_no_linear_holds_is_known():
    """Experts of one tensor, of which a mixture mostly consists."""
    assert left_out(outline("llava")) == 0
    assert left_out(outline("gemma3")) == 0
    assert 0.9 < left_out(outline("qwen3_vl_moe")) < 1


@pytest.mark.filterwarnings("ignore")  # what a family's default configuration warns about is not the matter here
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NEED_TIMM))
def test_the_table_names_modules_that_exist(family: str) -> None:
    model = outline(family)
    names = parts(model)
    for path in (names.language, names.vision, *names.projector):
        assert isinstance(model.get_submodule(path), nn.Module)
    assert {name.rpartition(".")[2] for name in linears(model, "language")} & (LANGUAGE | {"qkv_proj", "att_proj"})
    together = linears(model, "all")
    pieces = [set(linears(model, scope)) for scope in SCOPES[:3] if family != "gemma3" or scope != "projector"]
    assert set().union(*pieces) == set(together)
    assert sum(map(len, pieces)) == len(together)
    for scope in SCOPES:
        if (family, scope) != ("gemma3", "projector"):
            pattern = target_regex(model, scope)
            everything = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
            assert everything == set(linears(model, scope))
            assert len(pattern) < 400


@pytest.mark.filterwarnings("ignore")
def test_nothing_but_the_head_and_the_dead_layers_is_left_out() -> None:
    model = outline("gemma3")
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # SigLIP pools with nn.MultiheadAttention, which never calls its out_proj
    assert every - set(linears(model, "all")) == {"lm_head", "model.vision_tower.head.attention.out_proj"}


def test_pixtral_is_a_tower_of_llava() -> None:
    assert CLASSES.get("pixtral") is None
    assert FAMILIES["llava"].vision == FAMILIES["mistral3"].vision == "model.vision_tower"


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", [*pico.FAMILIES, "llama"])
def test_peft_adapts_exactly_the_scope(family: str, scope: str) -> None:
    model, _ = pico.build(family)
    try:
        wanted = linears(model, scope)
    except UserError:
        assert (family, scope) in {("gemma3", "projector"), ("llama", "vision"), ("llama", "projector")}
        return
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target_regex(model, scope)))
    assert set(adapted.targeted_module_names) == set(wanted)


@pytest.mark.parametrize("family", ["llava", "idefics3", "llama"])
def test_an_adapted_model_has_the_same_parts(family: str) -> None:
    model, _ = pico.build(family)
    before, names, pattern = linears(model, "all"), parts(model), target_regex(model, "all")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=pattern))
    assert parts(adapted) == names
    assert target_regex(adapted, "all") == pattern
    after = linears(adapted, "all")
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_a_text_only_model_is_all_language() -> None:
    model, _ = pico.build("llama")
    assert parts(model) == Parts("model")
    assert linears(model, "all").keys() == linears(model, "language").keys()
    assert "lm_head" not in linears(model, "all")
    with pytest.raises(UserError, match="the vision part of 'llama' has no linear layers"):
        linears(model, "vision")


def test_a_numbered_layer_is_told_from_other_numbers() -> None:
    """Qwen's merger is a Sequential: ``mlp.0`` and ``mlp.2`` are linear, ``mlp.1`` and ``blocks.0`` are not."""
    model = outline("qwen2_vl")
    assert set(linears(model, "projector")) == {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
    assert not any("merger" in name for name in linears(model, "vision"))


def test_gemma3_has_no_linear_projector() -> None:
    model, _ = pico.build("gemma3")
    for ask in (linears, target_regex):
        with pytest.raises(UserError, match=r"projector part of 'gemma3' .* use projector: full or frozen"):
            ask(model, "projector")


def test_an_unknown_scope_or_family_lists_the_known_ones() -> None:
    model, _ = pico.build("llava")
    with pytest.raises(UserError, match="scope 'lm' is unknown; use one of language, vision, projector, all"):
        linears(model, "lm")
    model.config.model_type = "llama_with_ears"
    with pytest.raises(UserError, match=r"'llama_with_ears' are not known .* qwen3_vl"):
        parts(model)
