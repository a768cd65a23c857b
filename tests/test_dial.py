"""The dial of a finished run: its curve, its choice, the adapter that it writes, and its mistakes."""

from __future__ import annotations

import json
import sys

import pico
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model

from lorasculpt import UserError, cli
from lorasculpt.config import RunConfig
from lorasculpt.dial import dial
from lorasculpt.evaluation import strength
from lorasculpt.evaluation.drift import _unspoken
from lorasculpt.measure import measure
from lorasculpt.models.load import load
from lorasculpt.models.parts import target_regex
from lorasculpt.train import train


@pytest.fixture
def run(tmp_path, pico_folder):
    """A run of the tiny llava; a function that gives its config, changed by ``key=value``."""
    data = pico.write_data(tmp_path / "data", n=4)
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "lora", "r": 4},
        "data": {"train": str(data)},
        "training": {"steps": 2, "batch": 2, "lr": 0.01, "precision": "fp32", "report_to": []},
        "evaluate": {"target": [str(data)], "max_new_tokens": 2, "drift": 4, "strengths": [0.5]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda *overrides: RunConfig.load(path, overrides)


def test_without_source_by_drift(run, tmp_path):
    config = run()
    adapter = train(config, progress=False)
    path, found = dial(config, retain=0.5, write=tmp_path / "half" / "lora", progress=False)
    assert json.loads(path.read_text()) == found
    points = found["points"]
    assert [point["strength"] for point in points] == [0, 0.5, 1]
    assert points[0]["drift"] == pytest.approx(0, abs=1e-6)
    assert 0 < points[1]["drift"] < points[2]["drift"]
    assert all("source" not in point for point in points)
    assert (found["budget"]["by"], found["budget"]["strength"]) == ("drift", 0.5)  # the target is 0 at every strength
    assert str(tmp_path) not in path.read_text()

    inputs = {"input_ids": torch.arange(4, 20)[None]}
    tuned = PeftModel.from_pretrained(load(config.base)[0], str(adapter)).eval()
    written = PeftModel.from_pretrained(load(config.base)[0], str(tmp_path / "half" / "lora")).eval()
    with torch.no_grad():
        with strength(tuned, 0.5):
            turned_down = tuned(**inputs).logits
        torch.testing.assert_close(written(**inputs).logits, turned_down, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(tuned(**inputs).logits, turned_down, atol=1e-4)
    with pytest.raises(UserError, match="exists; name a folder"):
        dial(config, write=tmp_path / "half", progress=False)
    strict = run("evaluate.retain=1")  # nothing that changes anything keeps all
    with pytest.raises(UserError, match=r"no strength keeps 1 .* was not written"):
        dial(strict, write=tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    assert json.loads(path.read_text())["budget"]["strength"] is None


def test_with_source_on_the_command_line(run, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data" / "train.jsonl"
    config = run(f"evaluate.source=[{data}]", "evaluate.retain=0.9")
    train(config, progress=False)
    monkeypatch.setattr(
        sys, "argv", ["lorasculpt", "dial", str(tmp_path / "run.yaml"), f"evaluate.source=[{data}]", "--retain", "0.9"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "keeps 90 % of the source" in capsys.readouterr().out  # a base that knows nothing has nothing to keep
    found = json.loads((config.output / "dial.json").read_text())
    assert all("source" in point for point in found["points"])
    results, _ = measure(config, progress=False)
    assert json.loads(results.read_text())["runs"][0]["budget"] == found["budget"]


def test_what_has_no_dial(run, tmp_path):
    with pytest.raises(UserError, match="no trained adapter"):
        dial(run(), progress=False)
    routed = run("method={name: mosld, r: 4, lora_alpha: 8}", "output=routed")
    train(routed, progress=False)
    assert dial(routed, progress=False)[1]["points"][2]["drift"] > 0  # it has strengths,
    with pytest.raises(UserError):
        dial(routed, write=tmp_path / "no", progress=False)  # but is no plain LoRA
    for overrides, words in (
        (("method.use_dora=true", "output=dora"), "cannot be turned down"),
        (("projector=full", "output=whole"), "projector is full"),
        (("evaluate.target=[]", "output=dora"), "evaluate.target must name"),
    ):
        config = run(*overrides)
        if "target" not in overrides[0]:
            train(config, progress=False)
        with pytest.raises(UserError, match=words):
            dial(config, progress=False)
    with pytest.raises(UserError, match="above 0"):
        dial(run(), retain=1.5, progress=False)


def test_no_text_holds_a_mark():
    base, processor = pico.build("llava")
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token_id
    model = get_peft_model(base, LoraConfig(r=2, target_modules=target_regex(base, "language")))
    unspoken = _unspoken(model, processor, [end])
    assert tokenizer.convert_tokens_to_ids("<image>") in unspoken
    assert end not in unspoken
