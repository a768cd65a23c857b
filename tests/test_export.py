from __future__ import annotations

import json
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pico
import pytest
import torch
from commands import call, done
from contract import adapt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lorasculpt import MTLLoRAConfig
from lorasculpt import export as module
from lorasculpt.adapters.update import updates
from lorasculpt.errors import UserError
from lorasculpt.export import export
from lorasculpt.posthoc import files

TARGETS = r".*(language_model|text_model|model)\.layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)"


def adapter(family: str, folder: Path, **settings) -> Path:
    """A LoRA with an effect, as stock PEFT saves it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})
    model = get_peft_model(pico.build(family)[0], config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama", "llava", "gemma3", "idefics3"])
@pytest.mark.parametrize("to", ["lora", "merged"])
def test_what_is_written_answers_as_the_adapter_does(tmp_path, pico_folder, family, to):
    report = export(adapter(family, tmp_path / "a"), pico_folder(family), tmp_path / "out", to)
    assert report.parity.relative < 1e-4
    assert report.parity.top1 == 1
    assert report.parity.effect > 0.01
    assert report.parity.kept == pytest.approx(1, abs=1e-3)
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == {"schema": 1, **asdict(report)}
    assert entries(tmp_path) == {"a", "out"}


def test_a_plain_lora_holds_two_factors_a_module_and_nothing_else(tmp_path, pico_folder):
    source = adapter("llava", tmp_path / "a")
    (source / "lorasculpt.json").write_text('{"schema": 1, "method": "lorasculpt", "settings": {}, "state": {}}')
    export(source, pico_folder("llava"), tmp_path / "out")
    assert entries(tmp_path / "out") == {"README.md", "adapter_config.json", "adapter_model.safetensors", "export.json"}
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "--max-lora-rank 8" in card


def test_another_base_than_the_adapter_names_is_told(tmp_path, pico_folder):
    source, base, moved = adapter("llama", tmp_path / "a"), pico_folder("llama"), tmp_path / "moved"
    shutil.copytree(base, moved)
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    said = f"The adapter was trained on {base}; whether {moved} is that model is not checked."
    assert said not in done("export", source, "--base", base, "--out", tmp_path / "one")
    assert said in done("export", source, "--base", moved, "--out", tmp_path / "two")


def test_a_merged_model_comes_with_all_that_loading_needs(tmp_path, pico_folder):
    export(adapter("llava", tmp_path / "a"), pico_folder("llava"), tmp_path / "out", "merged", dtype="bfloat16")
    needed = {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"}
    assert needed <= entries(tmp_path / "out")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor is not None


def test_a_merged_model_generates_as_its_base_says_though_some_of_it_has_no_effect(tmp_path, pico_folder):
    base = shutil.copytree(pico_folder("llama"), tmp_path / "base")
    said = {"do_sample": False, "temperature": 0.1, "min_p": 0.1, "typical_p": 0.9, "length_penalty": 2.0}
    (base / "generation_config.json").write_text(json.dumps(said))
    export(adapter("llama", tmp_path / "a"), base, tmp_path / "out", "merged")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written.get(name) for name in said} == said


def test_a_merged_model_keeps_the_precision_its_base_is_stored_in(tmp_path):
    model, processor = pico.build("llava")
    for part in (model.to(torch.float16), processor):
        part.save_pretrained(tmp_path / "base")
    report = export(adapter("llava", tmp_path / "a"), tmp_path / "base", tmp_path / "out", "merged")
    assert report.dtype == "float16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_lora_in_half_precision(tmp_path, pico_folder, dtype):
    report = export(adapter("llama", tmp_path / "a"), pico_folder("llama"), tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert 0 < report.parity.relative < 0.01


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3}}]
)
def test_scalings_that_only_peft_knows_are_folded_in(tmp_path, pico_folder, settings):
    source = adapter("llama", tmp_path / "a", **settings)
    export(source, pico_folder("llama"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    live, written = (PeftModel.from_pretrained(pico.build("llama")[0], folder) for folder in (source, tmp_path / "out"))
    for name, layer in live.named_modules():
        if hasattr(layer, "get_delta_weight"):
            found = written.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(found, layer.get_delta_weight("default"))


def test_an_adapter_without_effect_can_be_exported(tmp_path, pico_folder):
    model = get_peft_model(pico.build("llama")[0], LoraConfig(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "a")
    parity = export(tmp_path / "a", pico_folder("llama"), tmp_path / "out").parity
    assert (parity.effect, parity.kept) == (0, None)


def test_a_trained_projector_is_merged_and_fits_no_plain_lora(tmp_path, pico_folder):
    source = adapter("llava", tmp_path / "a")
    trained = {
        name: x + 0.1 for name, x in pico.build("llava")[0].state_dict().items() if "multi_modal_projector" in name
    }
    save_file(trained, source / "projector.safetensors")
    with pytest.raises(UserError, match=r"projector\.safetensors"):
        export(source, pico_folder("llava"), tmp_path / "out")
    export(source, pico_folder("llava"), tmp_path / "out", "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[name], x) for name, x in trained.items())


def test_only_an_earlier_export_is_replaced_and_only_by_force(tmp_path, pico_folder):
    source, base, out = adapter("llama", tmp_path / "a"), pico_folder("llama"), tmp_path / "out"
    place = tmp_path / "disk" / "out"
    place.mkdir(parents=True)
    out.symlink_to(place)  # a link stays one
    export(source, base, out)  # an empty folder may be filled
    with pytest.raises(UserError, match="earlier export"):
        export(source, base, out)
    (out / "stale").touch()
    export(source, base, out, "merged", force=True)
    assert not {"stale", "adapter_config.json"} & entries(out)
    assert out.is_symlink()
    assert entries(place.parent) == {"out"}
    (out / "export.json").unlink()
    with pytest.raises(UserError, match="holds no export"):
        export(source, base, out, force=True)
    with pytest.raises(UserError, match="made from"):
        export(source, base, tmp_path, force=True)
    with pytest.raises(UserError, match="is a file"):
        export(source, base, source / "README.md")


@pytest.mark.parametrize(("factor", "message"), [(1.5, "150% of the adapter's effect"), (0.0, "with 0% of the")])
def test_an_export_that_answers_differently_is_not_kept(tmp_path, pico_folder, monkeypatch, factor, message):
    write = module._write_lora

    def spoiled(found, out, *rest):
        write(found, out, *rest)
        tensors = load_file(out / "adapter_model.safetensors")
        save_file(
            {key: x * factor if "lora_B" in key else x for key, x in tensors.items()}, out / "adapter_model.safetensors"
        )

    monkeypatch.setattr(module, "_write_lora", spoiled)
    source = adapter("llama", tmp_path / "a", lora_alpha=1)  # a small effect, so that it is nearly linear
    with pytest.raises(UserError, match="logits differ by") as error:
        export(source, pico_folder("llama"), tmp_path / "out")
    assert message in str(error.value)
    assert entries(tmp_path) == {"a"}


def test_a_failed_replacement_leaves_the_earlier_export(tmp_path, pico_folder, monkeypatch):
    source = adapter("llama", tmp_path / "a")
    export(source, pico_folder("llama"), tmp_path / "out")
    before = entries(tmp_path / "out")
    monkeypatch.setitem(module.TOLERANCE, "float32", -1.0)
    with pytest.raises(UserError, match="not kept"):
        export(source, pico_folder("llama"), tmp_path / "out", "merged", force=True)
    assert (entries(tmp_path / "out"), entries(tmp_path)) == (before, {"a", "out"})


@pytest.mark.parametrize(
    ("place", "command"),
    [(module, ["export", "--to=merged"]), (files, ["posthoc", "dare", "--p=0.5"])],
    ids=["export", "posthoc"],
)
def test_what_is_ended_from_outside_leaves_nothing_behind(tmp_path, pico_folder, monkeypatch, place, command):
    source, found = adapter("llava", tmp_path / "a"), []

    def ended(model, processor, out, dtype):
        (out / "model.safetensors").touch()
        found.append(entries(tmp_path))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(place, "save_model", ended)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the system would end it at once"))
    try:
        code, _, _ = call(*command, source, "--base", pico_folder("llava"), "--out", tmp_path / "out")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 143
    assert len(found[0]) == 2
    assert entries(tmp_path) == {"a"}


def edit_config(folder: Path, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = torch.nn.functional.pad(tensors[key], (0, 1))


@pytest.mark.parametrize(
    ("spoil", "to", "message"),
    [
        (lambda f: edit_config(f, peft_type="MTL_LORA"), "merged", "'MTL_LORA'"),
        (lambda f: edit_config(f, peft_type="MTL_LORA"), "lora", "'MTL_LORA'"),
        (lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.x": torch.ones(1)})), "lora", "also holds"),
        (lambda f: edit_tensors(f, widen), "lora", "does not fit"),
        (lambda f: edit_tensors(f, widen), "merged", "does not fit"),
        (lambda f: edit_config(f, target_modules=["q_proj", "down_proj", "k_proj"]), "merged", "does not fit"),
        (shutil.rmtree, "lora", "holds no adapter"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path, pico_folder, spoil, to, message):
    source = adapter("llama", tmp_path / "a")
    spoil(source)
    with pytest.raises(UserError, match=message):
        export(source, pico_folder("llama"), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


# --- methods whose update is another matrix for each task -----------------------------------------------------------


def routed(folder: Path, **settings) -> Path:
    """An adapter of two tasks, with an effect for each."""
    model = adapt(pico.build("llava")[0], "mtl_lora", tasks=["a", "b/c"], **settings)
    with torch.no_grad():
        for update in updates(model).values():
            update.B.add_(torch.randn(update.B.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
            update.Lambda[1] *= -1
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("to", ["lora", "merged"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
def test_a_task_is_a_plain_lora(tmp_path, pico_folder, settings, to):
    source = routed(tmp_path / "source", **settings)
    for task in ("a", "b/c"):
        report = export(source, pico_folder("llava"), tmp_path / task[0], to, task=task)
        assert report.parity.relative < 1e-4
        assert report.parity.kept == pytest.approx(1, abs=1e-3)
        assert report.task == task
    assert entries(tmp_path) == {"source", "a", "b"}
    if to == "lora":
        config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
        assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
        assert not (tmp_path / "b" / "lorasculpt.json").exists()


@pytest.mark.parametrize("task", [None, "all"])  # which only the command line knows
def test_a_task_has_to_be_named(tmp_path, task):
    source = routed(tmp_path / "source")
    with pytest.raises(
        UserError, match=r"; say which with task: a, b/c \(on the command line --task NAME, or --task all"
    ):
        export(source, "nowhere", tmp_path / "out", task=task)


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_a_task_that_was_written_wrongly_is_not_kept(tmp_path, pico_folder, monkeypatch, to):
    source = routed(tmp_path / "source")
    right = MTLLoRAConfig.update.factors
    monkeypatch.setattr(MTLLoRAConfig.update, "factors", lambda self, task: right(self, 1 - task))
    with pytest.raises(UserError, match="not kept"):
        export(source, pico_folder("llava"), tmp_path / "out", to, task="a")
    assert entries(tmp_path) == {"source"}


def test_a_projector_goes_into_a_task_that_is_merged_and_not_into_its_lora(tmp_path, pico_folder):
    source = routed(tmp_path / "source")
    projector = pico.build("llava")[0].model.multi_modal_projector.state_dict()
    moved = {f"model.multi_modal_projector.{name}": value + 0.1 for name, value in projector.items()}
    save_file(moved, source / "projector.safetensors")
    report = export(source, pico_folder("llava"), tmp_path / "out", "merged", task="a")
    assert report.parity.relative < 1e-4
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(next(v for k, v in written.items() if k.endswith(key[6:])), moved[key]) for key in moved)
    with pytest.raises(UserError, match=r"also holds projector\.safetensors.*export it as a merged model"):
        export(source, pico_folder("llava"), tmp_path / "lora", task="a")


@pytest.mark.parametrize(("to", "mend"), [("lora", "as a merged model"), ("merged", "cannot be merged for one task")])
def test_a_task_has_no_place_for_other_tensors(tmp_path, pico_folder, to, mend):
    source = routed(tmp_path / "source", modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=f"also holds base_model.model.lm_head.weight.*{mend}"):
        export(source, pico_folder("llava"), tmp_path / "out", to, task="a")
    assert entries(tmp_path) == {"source"}


def test_wrong_words_are_refused(tmp_path):
    with pytest.raises(UserError, match="not 'gguf'"):
        export(tmp_path, tmp_path, tmp_path / "out", "gguf")
    with pytest.raises(UserError, match="not 'int8'"):
        export(tmp_path, tmp_path, tmp_path / "out", dtype="int8")
