"""An adapter and a base of the same shapes that is not its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pico
import pytest
import torch
from commands import done, refused
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText
from transformers.utils import IMAGE_PROCESSOR_NAME

from lorasculpt import LoRASculptConfig, MoSLDConfig, UserError, load
from lorasculpt.adapters.origin import ORIGIN_FILE, differing, kept, origin, pass_origin_on, write_origin
from lorasculpt.adapters.plain import read_adapter
from lorasculpt.inspect.lora import inspect
from lorasculpt.posthoc import average, dare, scale, ties, write

TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)"


def llava():
    return pico.build("llava")[0]


def trained_further(model):
    """``model`` with one of its matrices moved by what a small learning rate moves it."""
    weight = next(weight for name, weight in model.named_parameters() if name.endswith("layers.1.mlp.down_proj.weight"))
    weight.data.mul_(1.001)
    return model


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A LoRA with an effect, and what is kept of its base."""
    base = llava()
    record = origin(base, "me/base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    write_origin(tmp_path / "adapter", record)
    return tmp_path / "adapter"


@pytest.fixture
def another(tmp_path, pico_folder) -> Path:
    """The folder of the base, trained further."""
    folder = shutil.copytree(pico_folder("llava"), tmp_path / "another")
    trained_further(AutoModelForImageTextToText.from_pretrained(folder)).save_pretrained(folder)
    return folder


SAID = (
    r"does not fit this base model \(which has other weights than the one it was trained on in 1 matrix, such as "
    r"\S*layers.1.mlp.down_proj.weight\); name "
)


def test_a_base_that_was_trained_further_is_refused(adapter):
    load(llava(), adapter)
    with pytest.raises(UserError, match=f"{SAID}the model it was trained on, me/base, or .* remove .*base.json"):
        load(trained_further(llava()), adapter)
    (adapter / ORIGIN_FILE).unlink()
    load(trained_further(llava()), adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_makes_no_other_base(adapter, dtype):
    model = llava().to(dtype)
    load(model, adapter)
    coarse = origin(llava().to(dtype))
    assert differing(coarse, origin(llava())) == []
    assert differing(origin(llava()), origin(llava().to(dtype).float())) != []  # in one precision all of it counts


@pytest.mark.parametrize("config", [LoRASculptConfig, MoSLDConfig])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_method_of_ours_keeps_its_base_whoever_trains_it(tmp_path, config, trainable):
    model = get_peft_model(llava(), config(r=4, target_modules=TARGETS, modules_to_save=["linear_1"]))
    model.save_pretrained(tmp_path / "a")
    record = json.loads((tmp_path / "a" / ORIGIN_FILE).read_text())
    assert record["weights"] == origin(llava())["weights"]
    load(llava(), tmp_path / "a", trainable=trainable)
    with pytest.raises(UserError, match=SAID):
        load(trained_further(llava()), tmp_path / "a", trainable=trainable)


def test_a_base_that_holds_the_update_is_not_kept(tmp_path):
    model = get_peft_model(llava(), LoRASculptConfig(r=4, target_modules=TARGETS))
    model.merge_adapter()
    model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / ORIGIN_FILE).exists()


def test_numbers_are_those_of_the_matrix():
    weight = torch.arange(35.0).view(5, 7)
    assert kept([("w", weight)], "b") == {
        "schema": 1,
        "base": "b",
        "dtype": "float32",
        "weights": {"w": [weight[0, 0], weight[1, 2], weight[2, 4], weight[4, 6]]},
    }
    assert kept([("w", torch.ones(1, 2)), ("v", torch.ones(2, 1).half())])["dtype"] == "float16"


def test_quantised_weights_are_not_compared(adapter):
    model = llava()
    for name, weight in model.named_parameters():
        if "down_proj" in name:
            weight.data = weight.data.to(torch.float8_e4m3fn)
    found = origin(model)
    assert found["weights"].keys() < origin(llava())["weights"].keys()
    assert found["dtype"] == "float32"
    assert differing(json.loads((adapter / ORIGIN_FILE).read_text()), found) == []


def test_weights_of_4_bits_are_not_compared_however_they_are_stored():
    model = llava()
    name, weight = next((name, weight) for name, weight in model.named_parameters() if "down_proj" in name)
    weight.quant_state = object()  # as of bitsandbytes, whose bytes may lie in a matrix of bfloat16 (for FSDP)
    assert origin(llava())["weights"].keys() - origin(model)["weights"].keys() == {name}


def test_a_vocabulary_may_grow(adapter):
    model = llava()
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 8)
    load(model, adapter)


def test_a_second_adapter_beside_the_first_is_loaded(adapter):
    model = load(llava(), adapter)
    load(model, adapter, adapter="second")
    assert set(model.peft_config) == {"default", "second"}


def test_a_second_adapter_of_another_base_is_refused(adapter, tmp_path):
    alien = get_peft_model(trained_further(llava()), LoRASculptConfig(r=4, target_modules=TARGETS))
    alien.save_pretrained(tmp_path / "alien")
    model = load(llava(), adapter)
    with pytest.raises(UserError, match=SAID):
        load(model, tmp_path / "alien", adapter="alien")
    assert set(model.peft_config) == {"default"}
    model.merge_adapter()
    with pytest.raises(UserError, match="does not fit this base model"):
        load(model, adapter, adapter="second")


def test_a_second_adapter_beside_one_that_changed_the_base_is_refused(adapter, tmp_path):
    first = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa")
    get_peft_model(llava(), first).save_pretrained(tmp_path / "pissa")
    model = load(llava(), tmp_path / "pissa")
    with pytest.raises(UserError, match="does not go with one that has changed the base; give it a fresh base"):
        load(model, adapter, adapter="second")


def test_what_is_made_of_an_adapter_knows_its_base(adapter, tmp_path, pico_folder, another):
    base = pico_folder("llava")
    done("export", adapter, "--base", base, "--out", tmp_path / "exported")
    write(scale(read_adapter(adapter), 0.5), tmp_path / "scaled")
    write(dare(read_adapter(adapter), 0.5), tmp_path / "dared", rank=4)
    for folder in (tmp_path / "exported", tmp_path / "scaled", tmp_path / "dared"):
        assert json.loads((folder / ORIGIN_FILE).read_text())["base"] == "me/base"
        PeftModel.from_pretrained(llava(), folder)
        with pytest.raises(UserError, match=SAID):
            load(trained_further(llava()), folder)


def test_everything_that_takes_a_base_looks(adapter, tmp_path, pico_folder, another):
    assert "trained on" not in done("export", adapter, "--base", pico_folder("llava"), "--out", tmp_path / "exported")
    for to in ("lora", "merged"):
        wanted = ["--base", another, "--out", tmp_path / "o", "--to", to]
        assert re.search(SAID, refused("export", adapter, *wanted))
    assert not (tmp_path / "o").exists()
    inspect(adapter, pico_folder("llava"))
    with pytest.raises(UserError, match=SAID):
        inspect(adapter, another)
    with pytest.raises(UserError, match=SAID):
        write(dare(read_adapter(adapter), 0.5), tmp_path / "merged", base=another)
    assert not (tmp_path / "merged").exists()


def test_adapters_of_different_weights_are_not_merged(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    average([read_adapter(adapter), read_adapter(other)])
    write_origin(other, origin(trained_further(llava()), "you/base"))
    with pytest.raises(UserError, match=r"were trained on different weights, me/base and you/base: merge adapters of"):
        average([read_adapter(adapter), read_adapter(other)])
    (other / ORIGIN_FILE).unlink()
    pass_origin_on(other, adapter)  # nothing to pass on
    average([read_adapter(adapter), read_adapter(other)])


def test_adapters_that_see_pictures_otherwise_are_not_merged(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    for folder, mean in ((adapter, 0.5), (other, 0.1)):
        (folder / IMAGE_PROCESSOR_NAME).write_text(json.dumps({"image_mean": mean}))
    for merge in (average, ties):
        with pytest.raises(
            UserError, match=r"other settings of image_processor: merge adapters that see pictures alik"
        ):
            merge([read_adapter(adapter), read_adapter(other)])
    pass_origin_on(adapter, other)
    average([read_adapter(adapter), read_adapter(other)])


def test_a_file_that_says_nothing_is_told(adapter):
    (adapter / ORIGIN_FILE).write_text("{}")
    with pytest.raises(UserError, match=r"base.json does not say what its adapter was trained on; copy it again"):
        load(llava(), adapter)
