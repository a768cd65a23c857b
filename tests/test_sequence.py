"""A sequence of tasks: config → tasks learned in turn → matrix, and what an interruption or a mistake leaves."""

from __future__ import annotations

import json
import shutil
import sys

import pico
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorasculpt import UserError, cli
from lorasculpt.adapters.clock import ClockCallback
from lorasculpt.adapters.load import load as load_adapter
from lorasculpt.config import RunConfig
from lorasculpt.measure import measure
from lorasculpt.models.load import load
from lorasculpt.sequence import continued, learn, stages_of, transfer
from lorasculpt.train import train

TASKS = ("color", "shape")


@pytest.fixture
def run(tmp_path, pico_folder):
    """Write a sequence of two tasks and return a function that gives its config, changed by ``key=value``."""
    files = {task: str(pico.write_data(tmp_path / task, n=4, tasks=[task])) for task in TASKS}
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "am_lora", "r": 4, "lora_alpha": 8},
        "data": {"sequence": [{"name": task, "train": file, "test": file} for task, file in files.items()]},
        "training": {"steps": 3, "batch": 2, "lr": 0.01, "precision": "fp32", "report_to": []},
        "evaluate": {"source": files["color"], "limit": 2, "max_new_tokens": 2},
    }
    path = tmp_path / "sequence.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda *overrides: RunConfig.load(path, overrides)


def weights(adapter) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def test_each_task_goes_on_from_the_one_before_and_all_are_measured(run):
    config = run()
    adapter, matrix = learn(config, progress=False)
    assert adapter == config.output / "2-shape" / "adapter"
    earlier, later = weights(config.output / "1-color" / "adapter"), weights(adapter)
    kept = [key for key in earlier if key.endswith((".A", ".B"))]
    assert kept
    assert all(torch.equal(later[f"{key}_old"][0], earlier[key]) for key in kept)
    assert not any(torch.equal(later[key], earlier[key]) for key in kept)
    assert json.loads((adapter / "adapter_config.json").read_text())["tasks"] == list(TASKS)

    record = json.loads(matrix.read_text())
    assert record["tasks"] == list(TASKS)
    assert [row["after"] for row in record["rows"]] == [None, *TASKS]
    assert [row["to"] for row in record["switches"]] == ["shape"]
    assert all(len(row["accuracy"]) == 2 and 0 <= row["source"] <= 1 for row in record["rows"])
    accuracy = [row["accuracy"] for row in record["rows"]]
    assert {key: record[key] for key in transfer(accuracy)} == transfer(accuracy)
    stamp = matrix.stat().st_mtime_ns
    assert learn(config, progress=False) == (adapter, matrix)
    assert matrix.stat().st_mtime_ns == stamp


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_killed_sequence_goes_on_as_if_it_had_never_stopped(run, monkeypatch, stop):
    """Killed at a step of the first task, at the first step of the second, or in the middle of it."""
    whole, expected = learn(run(), progress=False)
    config, begun = run("output=broken", "training.save_every=1"), []
    original = ClockCallback.on_step_begin

    def kill(self, args, state, control, **kwargs):
        begun.append(state.global_step)
        if len(begun) == stop:
            raise Killed
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ClockCallback, "on_step_begin", kill)
        with pytest.raises(Killed):
            learn(config, progress=False)
    steps = []
    monkeypatch.setattr(ClockCallback, "on_step_end", lambda self, *args, **kwargs: steps.append(self.clock.end_step()))
    adapter, matrix = learn(config, progress=False)
    assert len(steps) == 6 - (stop - 1)  # nothing was done twice
    found = weights(adapter)
    assert all(torch.equal(found[key], value) for key, value in weights(whole).items())
    assert json.loads(matrix.read_text()) == json.loads(expected.read_text())


def test_the_transfer_of_a_sequence_is_what_its_definitions_say():
    """Lopez-Paz and Ranzato's sums, written out for three tasks: R[k][i] is task i after k tasks."""
    R = [[0.1, 0.2, 0.3], [0.9, 0.25, 0.2], [0.6, 0.8, 0.5], [0.5, 0.7, 0.95]]
    assert transfer(R) == {
        "last": pytest.approx((0.5 + 0.7 + 0.95) / 3),
        "average": pytest.approx((0.9 + (0.6 + 0.8) / 2 + (0.5 + 0.7 + 0.95) / 3) / 3),
        "backward": pytest.approx(((R[3][0] - R[1][0]) + (R[3][1] - R[2][1])) / 2),
        "forward": pytest.approx(((R[1][1] - R[0][1]) + (R[2][2] - R[0][2])) / 2),
    }
    assert transfer([[0.1], [0.4]]) == {"last": 0.4, "average": 0.4, "backward": None, "forward": None}


@pytest.mark.parametrize("name", ["lorasculpt", "spider", "pissa"])
def test_a_method_that_knows_no_tasks_goes_on_where_it_was(run, name):
    settings = {
        "lorasculpt": "{name: lorasculpt, r: 4, density: 0.2, prune_step: 1}",
        "pissa": "{name: lora, r: 4, init_lora_weights: pissa}",
    }
    config = run(f"method={settings.get(name, f'{{name: {name}}}')}", "training.steps=2")
    adapter, _ = learn(config, progress=False)
    first, second = stages_of(config)
    assert adapter == second.output / "adapter"
    earlier = first.output / "adapter"
    going_on = continued(earlier, None)(load(config.base)[0], second).eval()
    loaded = load_adapter(load(config.base)[0], earlier).eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(going_on(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert any(parameter.requires_grad for parameter in going_on.parameters())
    before, after = weights(earlier), weights(adapter)
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    if name == "lorasculpt":  # the masks of the first task are kept
        assert all(not after[key][value == 0].any() for key, value in before.items())


def test_plain_lora_goes_on_from_task_to_task(run):
    config = run("method={name: lora, r: 4}", "projector=full")
    adapter, matrix = learn(config, progress=False)
    record = json.loads(matrix.read_text())
    assert len(record["rows"]) == 3
    assert record["switches"] == []
    for file in ("adapter_model", "projector"):
        folders = config.output / "1-color" / "adapter", adapter
        earlier, later = (load_file(folder / f"{file}.safetensors") for folder in folders)
        assert earlier.keys() == later.keys()
        assert any(not torch.equal(later[key], value) for key, value in earlier.items())


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("method.name=mtl_lora", "method.name is mtl_lora, which has to know all tasks at once"),
        ("method.name=am_lorra", "which is no method"),
        ("method.gate=all", "method.gate is refused"),
        ("method.tasks=[color]", "method.tasks is what data.sequence says"),
        ("data.sequence=[{name: a, train: none.jsonl, test: none.jsonl}]", "none.jsonl"),
    ],
)
def test_a_mistake_is_told_and_leaves_nothing(run, override, part):
    config = run(override)
    with pytest.raises(UserError, match=part):
        learn(config, progress=False)
    assert not config.output.exists()


def test_a_sequence_is_no_single_run(run, monkeypatch):
    for function in (train, measure):
        with pytest.raises(UserError, match=r"data\.sequence"):
            function(run(), progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        learn(run(), progress=False)


def test_the_command_line_shows_the_matrix(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lorasculpt", "train", str(tmp_path / "sequence.yaml"), "training.steps=1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "after shape" in out
    assert "backward transfer" in out
    assert "matrix.json" in out
    shutil.rmtree(tmp_path / "out")
