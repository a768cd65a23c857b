"""The runs of the studies are runs that the configs take."""

from __future__ import annotations

import json

import pytest
import yaml
from peft import LoraConfig

from lorasculpt import METHODS, UserError
from lorasculpt.config import RunConfig
from lorasculpt.demo import run, study
from lorasculpt.run.folder import write_record


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run.base, "folder", lambda: tmp_path)
    return tmp_path


def built(made: dict, folder) -> RunConfig:
    """The YAML of a run read back, its method's config made."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(made))
    config = RunConfig.load(path)
    method = dict(config.method)
    {"lora": LoraConfig, **METHODS}[method.pop("name")](**method)
    return config


@pytest.mark.parametrize("label", study.CHANGES)
def test_a_change_changes_what_it_says(label, folder):
    name, changes = study.CHANGES[label]
    config = built(run.settings(name, split="validation", **dict(changes)), folder)
    for key, value in changes.get("method", {}).items():
        assert config.method[key] == value
    assert config.training.steps == changes.get("steps", run.STEPS["digits"])
    assert config.training.lr == changes.get("lr", run.METHODS[name]["lr"]["digits"])


def test_a_finished_run_is_not_done_again(folder, monkeypatch):
    numbers = dict.fromkeys(("method", "seed", "steps", "settings", "source", "target", "summary", "seconds"), 0)
    numbers |= {"precision": "fp32", "adapter_bytes": 1, "trainable": 2, "gallery": "left out"}
    made = run.settings("lora", output="done")
    (folder / "done").mkdir()
    write_record(built(made, folder))
    (folder / "done" / "results.json").write_text(json.dumps({"versions": {"torch": "1.0"}, "runs": [numbers]}))
    monkeypatch.setattr(study, "train", lambda config: pytest.fail("trained again"))
    entry = study._measured(folder / "run.yaml", made)
    assert "gallery" not in entry
    assert entry["trainable"] == 2
    assert entry["versions"] == {"torch": "1.0"}  # not today's
    with pytest.raises(UserError, match="which holds another run"):
        study._measured(folder / "run.yaml", run.settings("lora", output="done", steps=7))
