"""Loading: what comes back, and what is said when nothing can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
import transformers as hf
from PIL import Image

from lorasculpt.errors import UserError
from lorasculpt.models import load as loading
from lorasculpt.models import tower
from lorasculpt.models.load import autocast_dtype, computing, load


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_folder_comes_back_as_model_and_processor(pico_folder: Callable[[str], Path], family: str) -> None:
    model, processor = load(pico_folder(family))
    original, _ = pico.build(family)
    assert type(model) is type(original)
    assert isinstance(processor, hf.ProcessorMixin)
    assert not model.training
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())


def test_a_text_only_folder_comes_back_with_its_tokenizer(pico_folder: Callable[[str], Path]) -> None:
    model, tokenizer = load(str(pico_folder("llama")))
    assert isinstance(model, hf.LlamaForCausalLM)
    assert isinstance(tokenizer, hf.PreTrainedTokenizerBase)
    assert tokenizer.chat_template


def test_attention_is_eager_without_a_gpu(pico_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, expected in (("cpu", "eager"), ("cuda", "sdpa"), ("mps", "sdpa")):
        monkeypatch.setattr(loading, "computing", lambda kind=kind: torch.device(kind))
        assert load(pico_folder("llama"))[0].config._attn_implementation == expected


def test_models_compute_on_the_accelerator_if_there_is_one(
    pico_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert computing() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert computing() == torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert computing() == torch.device("cpu")
    assert load(pico_folder("llama"), device="meta")[0].device == torch.device("meta")  # the only other one on a CPU


def test_dtype(pico_folder: Callable[[str], Path]) -> None:
    assert load(pico_folder("llama"))[0].dtype == torch.float32
    assert load(pico_folder("llama"), dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype 'int8' is unknown; use one of float32"):
        load(pico_folder("llama"), dtype="int8")


def test_a_missing_padding_token_becomes_the_end_token(tmp_path: Path) -> None:
    folder = pico.save("llama", tmp_path / "m")
    tokenizer = pico.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load(folder)[1].pad_token == "<eos>"


def test_a_model_on_the_demos_tower_loads(tmp_path: Path) -> None:
    tower.register()
    original, processor = pico.build("llava")
    config = hf.LlavaConfig(text_config=original.config.text_config, vision_config=tower.LiteTowerConfig())
    hf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(load(tmp_path)[0].model.vision_tower, tower.LiteTower)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = pico.save("llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(pico.build("llama")[0].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded as a model"):
        load(folder)


def damage(folder: Path, file: str, text: str | None) -> None:
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", None, "no model folder: it has no config.json"),
        ("config.json", "{oops", "not a valid JSON"),
        ("config.json", '{"model_type": "none_such"}', "none_such"),
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", "junk", "header"),
    ],
)
def test_a_damaged_folder_is_explained(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    folder = pico.save("llama", tmp_path / "m")
    damage(folder, file, text)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_weights_of_other_shapes_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico.save("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(UserError, match=r"cannot be loaded as a model .*mismatched_sizes"):
        load(folder)

    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(hf.LlamaForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):  # which is a RuntimeError too, and has a mend of its own
        load(folder)


def test_a_missing_folder_and_an_unreachable_name_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the model folder .*none does not exist"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match="nobody/nothing cannot be loaded"):
        load("nobody/nothing")


def test_quantization_names_what_it_needs(pico_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="quantization '3bit' is unknown; use one of 4bit, 8bit"):
        load(pico_folder("llama"), quantization="3bit")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load(pico_folder("llama"), quantization="4bit")


def test_automatic_precision_takes_bf16_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for fp32, expected in ((3.0, torch.bfloat16), (1.4, None)):
        monkeypatch.setattr(loading, "cpu_rate", {torch.float32: 1 / fp32, torch.bfloat16: 1.0}.get)
        assert autocast_dtype("cpu") is expected
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert autocast_dtype("cuda") is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert autocast_dtype(torch.device("cuda", 0)) is torch.bfloat16
    assert autocast_dtype("mps") is None
    for known, expected in ((False, None), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda known=known: known)
        assert autocast_dtype("xpu") is expected


def test_the_cpu_is_really_timed() -> None:
    assert 1e8 < loading.cpu_rate(torch.float32) < 1e14
    assert autocast_dtype("cpu") in (None, torch.bfloat16)


def test_attention_may_be_asked_for(pico_folder: Callable[[str], Path]) -> None:
    assert load(pico_folder("llama"), attention="sdpa")[0].config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match=r"cannot be loaded as a model .*flash"):
        load(pico_folder("llama"), attention="flash")


def test_an_image_processor_takes_other_settings(pico_folder: Callable[[str], Path]) -> None:
    folder, picture = pico_folder("idefics3"), Image.new("RGB", (112, 56))
    tiles = [
        load(folder, image_processor=settings)[1].image_processor(picture, return_tensors="pt")["pixel_values"].shape[1]
        for settings in ({}, {"do_image_splitting": True})
    ]
    assert tiles[0] == 1 < tiles[1]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"max_pixels": 1}, "image_processor has settings, and the base reads text only; remove them"),
        (
            "llava",
            {"do_risize": False},
            "image_processor.do_risize is no setting of the base's .*; did you mean do_",
        ),
        (
            "llava",
            {"qqq": 1},
            "image_processor.qqq is no setting of the base's CLIPImage.*; use some of crop_",
        ),
        ("llava", {"size": "large"}, "image_processor has a setting that CLIPImageProcessor.* refuses: "),
    ],
)
def test_an_image_processor_takes_no_others(pico_folder, family: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(pico_folder(family), image_processor=settings)
