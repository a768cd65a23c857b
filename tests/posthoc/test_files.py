from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pico
import pytest
import torch
from commands import call, refused
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from lorasculpt.adapters.plain import read_adapter
from lorasculpt.errors import UserError
from lorasculpt.models.load import load
from lorasculpt.posthoc import average, dare, prune, read, scale, ties, write

TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)"


@pytest.fixture
def make(tmp_path):
    """Write a LoRA with an effect, as stock PEFT saves it."""

    def one(name: str = "a", seed: int = 0, **settings) -> Path:
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})
        model = get_peft_model(pico.build("llava")[0], config)
        random = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.2, generator=random)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        return tmp_path / name

    return one


def deltas(base: Path, merged) -> dict[str, torch.Tensor]:
    """What a model with the update in its weights has more than the base, where it has anything."""
    before, after = AutoModelForImageTextToText.from_pretrained(base).state_dict(), merged.state_dict()
    assert before.keys() == after.keys()
    found = {key.removesuffix(".weight"): after[key].float() - before[key].float() for key in before}
    return {key: delta for key, delta in found.items() if delta.any()}


def by_peft(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder)
    return deltas(base, model.merge_and_unload(safe_merge=True))


def agree(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for key, delta in found.items():
        torch.testing.assert_close(delta, expected[key], rtol=tolerance, atol=tolerance)


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 6}}], ids=["plain", "patterns"]
)
def test_stock_peft_loads_an_adapter_that_was_scaled(make, tmp_path, pico_folder, settings):
    source = make(**settings)
    written = write(scale(read(source), 0.5), tmp_path / "out", made={"edit": "scale"})
    expected = {key: delta / 2 for key, delta in by_peft(pico_folder("llava"), source).items()}
    agree(by_peft(pico_folder("llava"), tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "posthoc.json").read_text()) == {"schema": 1, **asdict(written)}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out"}


def test_stock_peft_loads_an_average_and_a_pruned_adapter(make, tmp_path, pico_folder):
    base, a, b = pico_folder("llava"), make("a", 1), make("b", 2, r=2, lora_alpha=5)
    written = write(average([read(a), read(b)]), tmp_path / "both")
    one, two = by_peft(base, a), by_peft(base, b)
    agree(by_peft(base, tmp_path / "both"), {key: (one[key] + two[key]) / 2 for key in one})
    assert (written.rank, written.to, written.loss) == (6, "lora", 0)
    write(prune(read(a), 0.25), tmp_path / "sparse")
    for tensor in load_file(tmp_path / "sparse" / "adapter_model.safetensors").values():
        assert int((tensor != 0).sum()) == tensor.numel() // 4
    assert by_peft(base, tmp_path / "sparse").keys() == one.keys()


def test_a_merged_model_has_the_update_and_nothing_else(make, tmp_path, pico_folder):
    base, update = pico_folder("llava"), dare(read(make()), 0.5, seed=3)
    written = write(update, tmp_path / "out", base=base)
    agree(deltas(base, AutoModelForImageTextToText.from_pretrained(tmp_path / "out")), dict(update), 1e-6)
    assert (written.to, written.rank, written.dtype) == ("merged", None, "float32")
    assert written.loss < 1e-5


def test_what_half_precision_takes_from_a_merged_update_is_told(make, tmp_path, pico_folder):
    base, update = pico_folder("llava"), ties([read(make("a", 1)), read(make("b", 2))])
    written = write(update, tmp_path / "out", base=base, dtype="bfloat16")
    found = deltas(base, AutoModelForImageTextToText.from_pretrained(tmp_path / "out"))
    lost = sum((found[key] - delta).square().sum() for key, delta in update.items())
    assert written.loss == pytest.approx(float(lost / sum(delta.square().sum() for delta in update.values())) ** 0.5)
    assert 1e-4 < written.loss < 0.1


def test_what_half_precision_takes_from_a_scaled_adapter_is_told(make, tmp_path):
    source = make()
    path = source / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path)
    code, out, err = call("posthoc", "scale", source, "--by", 0.7, "--out", tmp_path / "out")
    assert code == 0, err
    written = json.loads((tmp_path / "out" / "posthoc.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / path.name).values()} == {torch.bfloat16}
    assert 1e-4 < written["loss"] < 1e-2
    assert f"lost to rounding: {100 * written['loss']:.2g} % of the update's norm" in out


def test_stock_peft_loads_a_truncated_update(make, tmp_path, pico_folder):
    update = dare(read(make()), 0.5)
    written = write(update, tmp_path / "out", rank=6)
    found, asked = by_peft(pico_folder("llava"), tmp_path / "out"), dict(update)
    lost = sum((found[key] - asked[key]).square().sum() for key in asked)
    assert written.loss == pytest.approx(
        float(lost / sum(delta.square().sum() for delta in asked.values())) ** 0.5, rel=1e-3
    )
    assert 0.1 < written.loss < 1


# --- what cannot be done --------------------------------------------------------------------------------------------


def test_folders_that_hold_more_are_refused(make):
    source = make()
    path = source / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=r"also holds base_model\.model\.lm_head\.weight"):
        read(source)


def test_a_base_that_was_moved_is_refused(make):
    source = make()
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_4"}))
    read_adapter(source)
    with pytest.raises(UserError, match="started with pissa_niter_4"):
        read(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a base to merge it into or the rank"),
        ({"base": "x", "rank": 2}, "either a base to merge it into or the rank"),
        ({"rank": 2, "dtype": "float16"}, "A dtype is for a merged model"),
        ({"base": "x", "dtype": "int4"}, "correct 'int4'"),
    ],
)
def test_an_update_is_written_in_one_way(make, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        write(dare(read(make()), 0.5), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_lora_is_written_as_it_is_and_over_nothing(make, tmp_path):
    source = make()
    with pytest.raises(UserError, match="leave out base and rank"):
        write(read(source), tmp_path / "out", rank=3)
    with pytest.raises(UserError, match="not an empty folder"):
        write(read(source), source)


def test_a_link_stays_one(make, tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        link = tmp_path / f"to {name}"
        link.symlink_to(tmp_path / "disk" / name)
        write(read(make()), link)
        assert link.is_symlink()
        assert (tmp_path / "disk" / name / "posthoc.json").is_file()
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"empty", "new"}


def test_a_folder_that_cannot_be_replaced_is_refused(make, tmp_path, monkeypatch):
    source, here = make(), tmp_path / "here"
    here.mkdir()
    message = f"{here} is the folder you are in, or a disk of its own; name a folder in it"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda path: path == here)
        with pytest.raises(UserError, match=message):
            write(read(source), here)
    monkeypatch.chdir(here)
    assert message in refused("posthoc", "scale", source, "--by", 0.5, "--out", ".")
    assert message in refused("export", source, "--base", "x", "--out", ".")
    assert not any(here.iterdir())
    write(read(source), "new")
    assert (here / "new").is_dir()


@pytest.mark.parametrize(
    ("family", "cut", "message"),
    [("llama", 0, "has no linear model.language_model"), ("llava", 1, "has another shape at model")],
)
def test_another_base_is_refused_and_nothing_is_left(make, tmp_path, pico_folder, family, cut, message):
    adapter = read(make())
    first = adapter.pairs[0]
    adapter = replace(adapter, pairs=(replace(first, A=first.A[:, cut:]), *adapter.pairs[1:]))
    with pytest.raises(UserError, match=message):
        write(dare(adapter, 0.5), tmp_path / "out", base=pico_folder(family))
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_weight_that_two_layers_share_is_not_changed_for_one(tmp_path, make):
    model, processor = pico.build("llava")
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = True
    model.tie_weights()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    source = make(target_modules=["lm_head"])
    with pytest.raises(UserError, match="too, so merging would change both"):
        write(dare(read(source), 0.5), tmp_path / "out", base=tmp_path / "base")


# --- the command line -----------------------------------------------------------------------------------------------


def test_every_verb(make, tmp_path, pico_folder):
    a, b, base = make("a", 1), make("b", 2), pico_folder("llava")

    def made(verb, *arguments) -> tuple[str, dict]:
        code, out, err = call("posthoc", verb, *arguments, "--out", tmp_path / verb)
        assert code == 0, err
        return out, json.loads((tmp_path / verb / "posthoc.json").read_text())

    assert made("scale", a, "--by", 0.5)[1]["made"] == {"edit": "scale", "adapters": [str(a)], "by": 0.5}
    assert made("prune", a, "--density", 0.5)[1]["made"]["density"] == 0.5
    out, record = made("dare", a, "--p", 0.5, "--seed", 3, "--to", "lora", "--rank", 2)
    assert "lost to rank 2: " in out
    assert record["made"]["seed"] == 3
    out, record = made("ties", a, b, "--base", base, "--weights", "1,0.5")
    assert re.search(rf"cosine of {a} and {b}: [+-]0\.\d{{3}}; \d+\.\d % of signs opposite\n", out)
    assert f"merged: {tmp_path / 'ties'}" in out
    assert record["made"]["weights"] == [1, 0.5]
    out, record = made("average", a, b)
    cosine, opposed = (record["made"][name][1][0] for name in ("cosines", "sign_conflicts"))
    assert f"cosine of {a} and {b}: {cosine:+.3f}; {100 * opposed:.1f} % of signs opposite\n" in out
    assert record["rank"] == 8
    data = pico.write_data(tmp_path / "data", n=3)
    out, record = made("tailor", a, "--base", base, "--data", data, "--limit", 2, "--keep", 0.2)
    assert (record["to"], record["made"]["limit"], record["made"]["released"]) == ("merged", 2, False)
    found = deltas(base, AutoModelForImageTextToText.from_pretrained(tmp_path / "tailor"))
    assert found.keys() == by_peft(base, a).keys()
    assert all(int((delta != 0).sum()) <= 0.2 * delta.numel() for delta in found.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dare", "nowhere", "--p", 0.5), "A merged model takes --base MODEL"),
        (("dare", "nowhere", "--p", 0.5, "--to", "lora"), "A LoRA takes --rank R"),
        (("dare", "nowhere", "--p", 0.5, "--base", "x"), "nowhere holds no adapter"),
        (("average", "a", "b", "--weights", "1;2"), "--weights is '1;2'"),
        (("tailor", "nowhere", "--base", "x", "--data", "y", "--rank", 2), "A merged model takes --base MODEL"),
        (("tailor", "a", "--base", "x", "--data", "y.jsonl"), "y.jsonl"),
        (("tailor", "a", "--base", "x", "--data", "y.jsonl", "--keep", 0), "not 0"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(make, tmp_path, monkeypatch, arguments, message):
    make("a"), make("b")
    monkeypatch.chdir(tmp_path)
    code, out, err = call("posthoc", *arguments, "--out", "new")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_merged_model_makes_of_pictures_what_its_adapter_did(make, tmp_path, pico_folder):
    base, folder = pico_folder("llava"), make()
    load(base, image_processor={"do_normalize": False})[1].image_processor.save_pretrained(folder)
    write(dare(read(folder), 0.5), tmp_path / "out", base=base)
    assert AutoProcessor.from_pretrained(base).image_processor.do_normalize
    assert not AutoProcessor.from_pretrained(tmp_path / "out").image_processor.do_normalize
