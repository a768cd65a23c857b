"""The card of an adapter: what it says after training, after measuring, and whom it leaves alone."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from lorasculpt import card, train
from lorasculpt.hub import on_hub
from lorasculpt.measure import measure
from lorasculpt.report.words import percent


@pytest.fixture
def run(a_run):
    """Write a run of the tiny llava and return a function that gives its config, changed by ``key=value``."""
    return a_run(
        method={"name": "lorasculpt", "r": 2, "prune_step": 1},
        training={"steps": 2, "batch": 2, "lr": 0.01, "precision": "fp32", "report_to": []},
        evaluate={
            "source": ["data/train.jsonl"],
            "target": ["data/train.jsonl"],
            "limit": 3,
            "max_new_tokens": 2,
            "strengths": [],
        },
    )


def test_a_card_tells_how_it_is_loaded_and_made_and_then_what_was_measured(run, tmp_path):
    config = run("evaluate.drift=2")
    path = train.train(config, progress=False) / "README.md"
    told = path.read_text()
    assert str(tmp_path) not in told  # a folder here is nobody else's
    assert ModelCard(told).data.to_dict() == {"library_name": "peft", "tags": ["lorasculpt"]}
    assert "PeftModel.from_pretrained" in told
    assert 'lorasculpt.load(model, "path/to/out", trainable=True)' in told
    assert "2 steps, seed 0, in fp32," in told
    settings = yaml.safe_load(told.partition("## How it was trained\n\n```yaml\n")[2].partition("```")[0])
    assert settings["method"] == config.method
    assert settings["training"] == {"steps": 2, "batch": 2, "lr": 0.01, "precision": "fp32", "report_to": []}
    assert "What it learned" not in told

    found = json.loads(measure(config, progress=False).read_text())
    told, (made,) = path.read_text(), found["runs"]
    assert "Percent of 3 questions a task" in told
    for side in ("source", "target"):
        ((name, task),) = made[side].items()
        row = next(line for line in told.splitlines() if line.startswith(f"| {name} ({side}) |"))
        before, after = row.split(" | ")[1:]
        assert before.split()[0] == percent(task["before"])
        assert after.split()[0] == percent(task["after"])
    assert f"Its drift from the base is {made['drift']['value']:.3f} nats a token" in told
    assert f"torch {found['versions']['torch']}" in told
    assert not list(path.parent.glob("*.partial"))


def test_a_task_may_be_called_anything(run):
    config = run()
    path = train.train(config, progress=False) / "README.md"
    data = config.data.train
    assert data is not None
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row | {"task": "a|b\n{c}"}) + "\n" for row in rows))
    measure(config, progress=False)
    assert "| a\\|b {c} (source) |" in path.read_text()


def test_without_source_tasks_it_tells_the_drift(run):
    config = run("evaluate.source=[]", "evaluate.drift=2")
    path = train.train(config, progress=False) / "README.md"
    measure(config, progress=False)
    told = path.read_text()
    assert "(target) |" in told
    assert "(source)" not in told
    assert "It keeps" not in told
    assert "Its drift from the base is" in told


def test_words_of_somebody_else_stay(run):
    config = run()
    path = train.train(config, progress=False) / "README.md"
    path.write_text("mine")
    measure(config, progress=False)
    assert path.read_text() == "mine"
    path.unlink()
    measure(config, progress=False)
    assert not path.exists()


@pytest.mark.parametrize("change", ["method={name: smora, r: 4, top_k: 2}", "projector=full"])
def test_what_peft_alone_does_not_load_is_said_to_need_this_library(run, change):
    told = (train.train(run(change, "evaluate.source=[]"), progress=False) / "README.md").read_text()
    assert "from lorasculpt import load" in told
    assert "PeftModel" not in told
    assert "trainable=True" not in told


def test_a_base_on_the_hub_is_linked_and_a_folder_is_not(run, tmp_path, monkeypatch):
    assert on_hub("HuggingFaceTB/SmolVLM-256M-Instruct")
    assert not on_hub(str(tmp_path))
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not on_hub("models/mine")
    config = run()
    adapter = train.train(config, progress=False)
    training = json.loads((config.output / "training.json").read_text())
    data = ModelCard(card.write(adapter, config.model_copy(update={"base": "me/tiny"}), training).read_text()).data
    assert data.base_model == "me/tiny"
    assert "base_model:adapter:me/tiny" in data.tags
