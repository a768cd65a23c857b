from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pico
import pytest
import torch
import transformers as hf
from contract import (
    CASES,
    adapt,
    batches,
    equal,
    logits,
    loss,
    masks,
    records,
    sgd,
    start,
    texts,
    train,
    trained,
    weights,
)
from peft import LoraConfig, LoraRuntimeConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from lorasculpt import METHODS, Clock, LoRASculptConfig, method_logs
from lorasculpt.adapters.layers import MaskedLinear, sites
from lorasculpt.adapters.method import REFUSED, looks_sculpted, methods_of
from lorasculpt.adapters.update import UpdateConfig, updates
from lorasculpt.errors import UserError
from lorasculpt.models.parts import linears, target_regex

STOCK = {field.name: field for field in dataclasses.fields(LoraConfig)}

# a value that is not the default, for every field that is refused
OTHER = {
    "megatron_config": {"x": 1},
    "megatron_core": "elsewhere",
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": object(),
    "corda_config": object(),
    "lora_ga_config": object(),
    "use_dora": True,
    "velora_config": object(),
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": object(),
    "layer_replication": [(0, 1), (0, 2)],
    "lora_bias": True,
    "target_parameters": ["mlp.weight"],
    "use_bdlora": object(),
    "arrow_config": object(),
    "kasa_config": object(),
    "ensure_weight_tying": True,
}


# --- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, row in CASES.items() if row.config.clock])
def test_an_adapter_that_no_clock_has_seen_says_so(tmp_path, method):
    model, _ = start("llama", method)
    model.save_pretrained(tmp_path / "fresh")  # of a fresh one there is nothing to say
    optimizer = sgd(model)
    loss(model, texts()[0]).backward()
    optimizer.step()
    told = f"adapter 'default' was trained without a clock, so not as {method}: give a trainer callbacks="
    with pytest.warns(UserWarning, match=told):
        model.save_pretrained(tmp_path / "trained")


def test_an_adapter_that_was_made_of_others_was_not_trained(tmp_path):
    model, _ = start("llama", prune_step=1)
    train(model, [texts()] * 2)
    model.add_adapter("two", CASES["lorasculpt"](target_modules=target_regex(model, "language"), prune_step=1))
    model.set_adapter("two")
    train(model, [texts()] * 2)
    model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "both", combination_type="cat")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("method", "settings"), [("full", {"select": "all", "round_steps": None}), ("mtl_lora", {})])
def test_a_method_that_any_loop_trains_needs_none(tmp_path, method, settings):
    model, _ = start("llama", method, **settings)
    optimizer = sgd(model)
    loss(model, texts()[0]).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)


def test_weights_of_before_pruning_are_saved_and_merged_as_they_act(tmp_path):
    """As of a loop that keeps the best weights in memory and puts them back."""
    model, _ = start("llama", prune_step=2)
    best = copy.deepcopy(model.state_dict())
    train(model, [texts()] * 3)
    model.load_state_dict(best)
    with torch.no_grad():
        for site in sites(model).values():
            site.b.weight.add_(0.1)
    acts = logits(model.eval(), texts()[0])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    density = sum((value != 0).sum() for value in saved.values()) / sum(value.numel() for value in saved.values())
    assert density < 0.5
    plain = PeftModel.from_pretrained(pico.build("llama")[0], tmp_path).eval()
    assert torch.equal(logits(plain, texts()[0]), acts)
    assert torch.allclose(logits(model.merge_and_unload(), texts()[0]), acts, atol=1e-5)


# --- what LoraConfig may be told ------------------------------------------------------------------------------------


def test_every_field_of_lora_config_is_supported_or_refused():
    """A field that PEFT adds is neither, and lands here."""
    supported = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern"),
        *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "fan_in_fan_out", "init_lora_weights", "bias", "qalora_group_size"),
    }
    assert supported | REFUSED.keys() == STOCK.keys()
    assert not supported & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        LoRASculptConfig(**{name: OTHER[name]})
    assert f"does not support {name}: {REFUSED[name]}" in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_refused(bias):
    with pytest.raises(ValueError, match="does not support bias='"):
        LoRASculptConfig(bias=bias)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "orthogonal"])
def test_initialisations_that_are_no_plain_lora_are_refused(init):
    with pytest.raises(ValueError, match="does not support init_lora_weights="):
        LoRASculptConfig(init_lora_weights=init)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 32}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
        {"r": 2, "lora_alpha": 1},
        {"task_type": "CAUSAL_LM"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"revision": "main", "runtime_config": LoraRuntimeConfig()},
    ],
    ids=str,
)
def test_what_is_supported_trains_as_plain_lora_does(settings):
    """Before it prunes and without a penalty, the same bits as ``LoraConfig`` with the same settings."""
    base, _ = pico.build("llama")
    model = adapt(base, cmr_weight=0.0, prune_step=50, **settings)
    plain, _ = pico.build("llama")
    config = {"r": 4, "lora_alpha": 8, "target_modules": model.peft_config["default"].target_modules, **settings}
    torch.manual_seed(1)
    plain = get_peft_model(plain, LoraConfig(**config))
    for each in (model, plain):
        torch.manual_seed(2)
        train(each, [texts()] * 3)
    assert equal(weights(model), weights(plain))
    assert torch.equal(logits(model, texts()[0]), logits(plain, texts()[0]))


# --- where it goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*pico.FAMILIES, *pico.OTHERS])
def test_without_targets_it_goes_to_the_language_part(family, tmp_path):
    """Whatever PEFT has by itself for the family (of a Llama it takes q and v); stock PEFT finds the same layers."""
    base, other = (pico.build(family)[0] for _ in range(2))
    wanted = set(linears(base, "language"))
    model = get_peft_model(base, LoRASculptConfig(r=4, density=0.5, init_lora_weights=False))
    assert set(sites(model)) == wanted
    model.add_adapter("beside", LoRASculptConfig(r=2, density=0.5))
    assert set(sites(model, "beside")) == wanted
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(other, tmp_path)
    assert type(again.peft_config["default"]) is LoraConfig
    assert equal(weights(again), weights(model))


@pytest.mark.parametrize("method", sorted(set(CASES) - {"spider"}))
def test_every_method_but_one_that_names_its_layers_does(method):
    base, _ = pico.build("llava")
    wanted = set(linears(base, "language"))
    assert set(get_peft_model(base, CASES[method]()).targeted_module_names) == wanted


def test_a_model_whose_parts_are_not_known_asks_for_targets():
    with pytest.raises(UserError, match=r"are not known here, .*; list the layers in target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoRASculptConfig())


@pytest.mark.parametrize("method", ["lorasculpt", "smora"])
def test_a_text_model_of_another_kind_gets_what_peft_has_for_it(method):
    classifier = hf.LlamaForSequenceClassification(hf.LlamaConfig(**pico.TEXT))
    assert get_peft_model(classifier, CASES[method]()).peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_an_uninitialised_b_is_allowed():
    model, _ = start("llama", init_lora_weights=False)
    assert all(bool(site.B.any()) for site in sites(model).values())


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize(("target", "kind"), [("embed_tokens", "Embedding"), ("patch_embedding", "Conv2d")])
def test_layers_that_are_not_linear_are_refused(target, kind, method):
    base, _ = pico.build("llava")
    name = CASES[method].config.__name__
    with pytest.raises(ValueError, match=rf"{target} is a {kind}, which {name} cannot adapt"):
        adapt(base, method, target_modules=[target])


@pytest.mark.parametrize("method", CASES)
def test_an_attention_that_hides_its_linears_is_refused(method):
    """PEFT adds a plain LoRA to the weights of this one; nothing of ours would be called."""
    base, _ = pico.build("llama")
    base.model.layers[0].self_attn.q_proj = nn.MultiheadAttention(32, 4)
    with pytest.raises(ValueError, match=r"q_proj is a MultiheadAttention, which .* cannot adapt"):
        adapt(base, method, target_modules=["q_proj"])


class Packed(nn.Module):
    """A linear of another library: no ``nn.Linear``, its weight not where one looks for it."""

    in_features = out_features = 32

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ self.packed.to(x.dtype)


class PackedLinear(nn.Linear):
    """What the other library makes of A and B."""


class PackedLora(nn.Module, LoraLayer):
    """A LoRA of the other library's own, as PEFT lets anyone register one."""

    def __init__(self, base_layer, adapter_name, r, lora_alpha, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = PackedLinear(32, r), PackedLinear(r, 32)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, where it does not know a class
@pytest.mark.parametrize("method", CASES)
def test_a_strange_linear_gets_what_is_ours_or_is_refused(method):
    """And never the LoRA that PEFT was told to make of it."""
    base, _ = pico.build("llama")
    base.model.layers[0].self_attn.q_proj = Packed()
    config = CASES[method](target_modules=["q_proj"])
    config._register_custom_module({Packed: PackedLora})
    if issubclass(CASES[method].config, UpdateConfig):
        model = get_peft_model(base, config)
        assert sorted(updates(model)) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        assert not any(isinstance(module, LoraLayer) for module in model.modules())
        return
    with pytest.raises(ValueError, match=r"q_proj is a Packed, which .* cannot adapt"):
        get_peft_model(base, config)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_sites_are_the_adapted_linears_by_their_names_in_the_base():
    base, _ = pico.build("llama")
    names = [name for name, module in base.named_modules() if name.endswith(("q_proj", "down_proj"))]
    model = adapt(base, target_modules=["q_proj", "down_proj"])
    found = sites(model)
    assert list(found) == names
    for name, site in found.items():
        assert site.A.shape == (4, site.base.in_features)
        assert site.B.shape == (site.base.out_features, 4)
        assert site.scaling == 2.0
        assert torch.equal(site.weight(), pico.build("llama")[0].get_submodule(name).weight)
    assert sites(model, "another") == {}


def test_a_transposed_base_is_turned_round():
    base = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=420)).eval()
    stored = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = adapt(base, target_modules=["c_attn"], fan_in_fan_out=True, cmr_modules="all", prune_step=2)
    (name, site), *_ = sites(model).items()
    assert torch.equal(site.weight(), stored[f"{name}.weight"].T)
    assert site.weight().shape == (site.B.shape[0], site.A.shape[1])
    train(model, [texts()] * 3)
    assert method_logs(model)["cmr"] > 0
    assert int(torch.count_nonzero(site.A)) == int(0.25 * site.A.numel())


def test_adapters_of_half_precision_are_pruned_as_exactly():
    base, _ = pico.build("llama")
    config = CASES["lorasculpt"](target_modules=["q_proj", "v_proj"], prune_step=2, rescale=True)
    model = get_peft_model(base.to(torch.bfloat16), config, autocast_adapter_dtype=False)
    train(model, [texts()] * 4)
    for weight in weights(model).values():
        assert weight.dtype == torch.bfloat16
        assert int(torch.count_nonzero(weight)) == int(0.25 * weight.numel())


def test_adapters_may_be_combined_with_pefts_own_means():
    model, _ = start("llama", target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", CASES["lorasculpt"](target_modules=["q_proj", "v_proj"], prune_step=1))
    train(model, [texts()] * 3)
    for name in ("other", "default"):
        model.set_adapter(name)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    assert methods_of(model)["both"].pruned is False
    for name, site in sites(model, "both").items():
        one, two = sites(model, "default")[name], sites(model, "other")[name]
        summed = one.scaling * one.B @ one.A + two.scaling * two.B @ two.A
        torch.testing.assert_close(site.scaling * site.B @ site.A, summed, rtol=1e-4, atol=1e-6)


def test_a_masked_linear_shares_its_weight_and_masks_value_and_gradient():
    linear = nn.Linear(3, 2, bias=False)
    leaf = MaskedLinear.of(linear)
    assert leaf.weight is linear.weight
    assert list(leaf.state_dict()) == ["weight"]
    x = torch.randn(4, 3)
    assert torch.equal(leaf(x), linear(x))
    leaf.mask[0, 1] = False
    leaf(x).sum().backward()
    assert leaf.weight.grad[0, 1] == 0
    assert bool((leaf.weight.grad != 0).sum() == 5)
    dense = linear.weight.detach().clone()
    leaf.project()
    assert linear.weight[0, 1] == 0
    assert torch.equal(linear.weight[leaf.mask], dense[leaf.mask])


# --- several adapters -----------------------------------------------------------------------------------------------


def two() -> PeftModel:
    model, _ = start("llama", prune_step=2)
    torch.manual_seed(3)
    model.add_adapter("other", CASES["lorasculpt"](target_modules=["q_proj", "v_proj"], prune_step=1))
    return model


@pytest.mark.parametrize(("active", "idle"), [("default", "other"), ("other", "default")])
def test_only_the_adapter_that_trains_is_touched(active, idle):
    model = two()
    model.set_adapter(active)
    before = {**weights(model, idle)}
    train(model, [texts()] * 3)
    assert equal(weights(model, idle), before)
    assert all(bool(mask.all()) for mask in masks(model, idle).values())
    assert not methods_of(model)[idle].pruned
    assert methods_of(model)[idle].step == 0
    assert methods_of(model)[active].pruned
    assert all((~mask).any() for mask in masks(model, active).values())


def test_an_adapter_that_came_later_counts_its_own_steps():
    model, _ = start("llama", prune_step=2)
    train(model, [texts()] * 3)
    model.add_adapter("other", CASES["lorasculpt"](target_modules=["q_proj", "v_proj"], prune_step=2))
    model.base_model.set_adapter(["default", "other"])
    train(model, [texts()])
    assert {name: (method.step, method.pruned) for name, method in methods_of(model).items()} == {
        "default": (4, True),
        "other": (1, False),
    }
    train(model, [texts()])
    assert methods_of(model)["other"].pruned


def test_a_frozen_adapter_beside_the_one_in_training_balances_nothing():
    model, _ = start("llama", "mosld")
    model.add_adapter("other", CASES["mosld"](target_modules=target_regex(model, "language")))
    model.base_model.set_adapter(["default", "other"])
    for update in updates(model).values():
        update.requires_grad_(False)
    train(model, [texts()] * 2)
    noted = {name: [bool(u.noted) for u in updates(model, name).values()] for name in ("default", "other")}
    assert not any(noted["default"])
    assert all(noted["other"])


@pytest.mark.parametrize(("method", "settings"), [("loramoe", {"tasks": [], "knowledge": []}), ("am_lora", {})])
def test_a_frozen_adapter_asks_for_no_task_and_has_no_loss(method, settings):
    """The frozen one of ``loramoe`` knows tasks, of which nothing is told."""
    model, _ = start("llama", method)
    model.add_adapter("other", CASES[method](target_modules=target_regex(model, "language"), **settings))
    model.base_model.set_adapter(["default", "other"])
    for update in updates(model).values():
        update.requires_grad_(False)
    for update in updates(model, "other").values():
        nn.init.normal_(update.B, generator=torch.Generator().manual_seed(8))
    optimizer = sgd(model)
    clock = Clock(model, optimizer)
    model.train()
    clock.begin_step()
    model(**texts()[0]).loss.backward()
    optimizer.step()
    clock.end_step()
    assert not any(update.noted for update in updates(model).values())
    assert method_logs(model)["other/balance_loss"] > 0


def test_numbers_of_several_adapters_carry_their_names():
    model = two()
    train(model, [texts()] * 3)
    numbers = method_logs(model)
    assert {key.split("/")[0] for key in numbers} == {"default", "other"}
    assert numbers["default/density_a"] < 0.26
    assert numbers["other/density_a"] == 1.0


def test_a_deleted_adapter_is_forgotten_and_its_name_free():
    model = two()
    train(model, [texts()] * 3)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", CASES["lorasculpt"](target_modules=["q_proj"]))
    fresh = methods_of(model)["default"]
    assert not fresh.pruned
    assert list(fresh.sites) == [name for name in sites(model, "other") if name.endswith("q_proj")]
    model.delete_adapter("default")
    assert set(methods_of(model)) == {"other"}


def test_a_copy_of_a_model_lives_on_its_own():
    model, _ = start("llama", prune_step=1)
    train(model, [texts()])
    twin = copy.deepcopy(model)
    before = weights(model)
    assert methods_of(twin)["default"].pruned
    train(twin, [texts()] * 2)
    assert equal(weights(model), before)
    assert not equal(weights(twin), before)
    assert equal(masks(twin), masks(model))


def test_a_model_without_a_method_has_none():
    base, _ = pico.build("llama")
    assert methods_of(base) == {}
    assert methods_of(get_peft_model(base, LoraConfig(target_modules=["q_proj"]))) == {}
    assert method_logs(base) == {}


# --- what is saved --------------------------------------------------------------------------------------------------


@pytest.fixture
def sculpted(tmp_path) -> tuple[PeftModel, Path]:
    model, _ = start("llama", prune_step=2)
    train(model, [texts()] * 3, sgd(model, momentum=0.9, weight_decay=0.1))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_the_weight_file_is_plain_and_truly_sparse(sculpted):
    model, folder = sculpted
    saved = load_file(folder / "adapter_model.safetensors")
    expected = {f"base_model.model.{name}.{factor}.weight" for name in sites(model) for factor in ("lora_A", "lora_B")}
    assert set(saved) == expected
    for tensor in saved.values():
        assert int(torch.count_nonzero(tensor)) == int(0.25 * tensor.numel())


def test_the_config_file_is_stock(sculpted, tmp_path):
    _, folder = sculpted
    plain = get_peft_model(pico.build("llama")[0], LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "plain")
    ours, stock = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "plain"))
    assert ours.keys() == stock.keys()
    differing = {key for key in stock if ours[key] != stock[key]}
    assert differing <= {"target_modules"}
    assert ours["peft_type"] == "LORA"


def test_settings_and_state_are_in_files_of_their_own(sculpted):
    model, folder = sculpted
    record = json.loads((folder / "lorasculpt.json").read_text())
    assert record["schema"] == 1
    assert record["method"] == "lorasculpt"
    assert record["settings"] == model.peft_config["default"].settings()
    assert record["settings"].keys() == {f.name for f in dataclasses.fields(LoRASculptConfig)} - STOCK.keys()
    assert record["state"]["step"] == 3
    assert record["state"]["pruned"] is True
    assert record["state"]["prune_step"] == 2
    state = load_file(folder / "lorasculpt_state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8}
    assert len(state) == 2 * len(sites(model))


def test_before_pruning_there_are_no_masks_to_save(tmp_path):
    model, _ = start("llama", prune_step=2)
    train(model, [texts()])
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "lorasculpt_state.safetensors").exists()
    assert json.loads((tmp_path / "lorasculpt.json").read_text())["state"]["pruned"] is False


def test_every_adapter_of_a_model_is_saved_with_its_own_state(tmp_path):
    model = two()
    train(model, [texts()] * 3)
    model.save_pretrained(tmp_path)
    for folder, pruned, settings in ((tmp_path, True, 2), (tmp_path / "other", False, 1)):
        record = json.loads((folder / "lorasculpt.json").read_text())
        assert record["state"]["pruned"] is pruned
        assert record["settings"]["prune_step"] == settings
        assert (folder / "lorasculpt_state.safetensors").exists() is pruned


STOCK_ALONE = """
    import sys, warnings
    sys.modules["lorasculpt"] = None
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
    assert type(PeftConfig.from_pretrained(sys.argv[2])).__name__ == "LoraConfig"
    model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
    batch = torch.load(sys.argv[3])
    with torch.no_grad():
        torch.save(model(**batch).logits, sys.argv[4])
    try:
        import lorasculpt
    except ImportError:
        print("alone")
"""


def test_stock_peft_loads_it_where_this_library_is_not_installed(tmp_path, pico_folder):
    """Warnings are errors there too."""
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(pico_folder("llava"))
    model = adapt(base.eval())
    seen = batches(pico.build("llava")[1], records(tmp_path / "data", 2), 2)
    train(model, [seen] * 3)
    model.save_pretrained(tmp_path / "adapter")
    batch = {key: value for key, value in seen[0].items() if key != "labels"}
    assert "pixel_values" in batch
    torch.save(batch, tmp_path / "batch.pt")
    paths = [pico_folder("llava"), tmp_path / "adapter", tmp_path / "batch.pt", tmp_path / "logits.pt"]
    peft_asks = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # of every model, plain LoRA too
    command = [sys.executable, "-W", "error", "-W", peft_asks, "-c", textwrap.dedent(STOCK_ALONE), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "alone" in done.stdout
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, batch))


def test_a_sculpted_adapter_is_told_from_a_dense_one(sculpted, tmp_path):
    _, folder = sculpted
    assert looks_sculpted(PeftModel.from_pretrained(pico.build("llama")[0], folder))
    dense = get_peft_model(pico.build("llama")[0], LoraConfig(target_modules=["q_proj"]))
    assert not looks_sculpted(dense)
    assert not looks_sculpted(pico.build("llama")[0])


def test_every_registered_method_is_named_as_peft_names_it():
    for name, config in METHODS.items():
        assert config.method == name
        made = config(tasks=["one"]) if getattr(config, "multitask", False) else config()
        assert made.peft_type == name.upper()
        assert made.peft_type.value == made.peft_type.name == name.upper()


def test_only_what_trains_gets_a_gradient_and_the_clock_lets_go():
    model, _ = start("llama")
    optimizer = sgd(model)
    clock = Clock(model, optimizer)
    clock.close()
    loss(model, texts()[0]).backward()
    optimizer.step()  # no window is open, and nobody minds
    assert not any(leaf._post_accumulate_grad_hooks for leaf in trained(model))
