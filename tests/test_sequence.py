"""A sequence of tasks: config → tasks learned in turn → matrix, and what an interruption or a mistake leaves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pico
import pytest
import torch
import yaml
from commands import done
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from lorasculpt import UserError
from lorasculpt.adapters.clock import ClockCallback
from lorasculpt.adapters.load import load as load_adapter
from lorasculpt.config import RunConfig
from lorasculpt.measure import measure
from lorasculpt.models.load import load
from lorasculpt.sequence import continued, learn, placed_beside, stages_of, transfer
from lorasculpt.train import train

TASKS = ("color", "shape")
OLORA = "{name: regularized, penalty: olora, weight: 0.5, r: 4, lora_alpha: 6}"


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


@pytest.mark.parametrize(("stop", "method"), [(2, "am_lora"), (4, "am_lora"), (5, "am_lora"), (5, "olora")])
def test_a_killed_sequence_goes_on_as_if_it_had_never_stopped(run, monkeypatch, stop, method):
    """Killed at a step of the first task, at the first step of the second, or in the middle of it."""
    overrides = [f"method={OLORA}"] if method == "olora" else []
    whole, expected = learn(run(*overrides), progress=False)
    config, begun = run("output=broken", "training.save_every=1", *overrides), []
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


@pytest.mark.parametrize(
    "method",
    [
        "{name: lwf, r: 4}",
        "{name: regularized, penalty: ewc, fisher_texts: 2, r: 4}",
        "{name: full}",
        "{name: dora, r: 4}",
    ],
)
def test_any_other_method_that_knows_no_tasks_learns_a_sequence(run, method):
    config = run(f"method={method}", "training.steps=2", "evaluate.limit=1", "evaluate.max_new_tokens=1")
    adapter, matrix = learn(config, progress=False)
    assert [row["after"] for row in json.loads(matrix.read_text())["rows"]] == [None, *TASKS]
    earlier, later = weights(config.output / "1-color" / "adapter"), weights(adapter)
    assert earlier.keys() == later.keys()
    assert any(not torch.equal(later[key], value) for key, value in earlier.items())


def test_general_data_is_known_to_every_task(run, tmp_path):
    config = run(f"data.general={tmp_path / 'general.jsonl'}", "method={name: lora, r: 4}")
    assert [stage.data.general for stage in stages_of(config)] == [tmp_path / "general.jsonl"] * len(TASKS)


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


def factors(folder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of every linear in an adapter folder, in fp64."""
    saved = {key: value.double().numpy() for key, value in weights(folder).items()}
    names = {key.rpartition(".lora_")[0]: None for key in saved}
    return {name: (saved[f"{name}.lora_A.weight"], saved[f"{name}.lora_B.weight"]) for name in names}


def test_with_olora_an_adapter_is_the_sum_of_a_lora_for_each_task(run):
    """The last checkpoint of a task holds what it has trained alone."""
    settings = [stage.model_dump(mode="json") for stage in run().data.sequence]
    data = {"sequence": [*settings, settings[0] | {"name": "again"}]}
    config = run(f"data={json.dumps(data)}", f"method={OLORA}", "training.save_every=3")
    learn(config, progress=False)
    stages = stages_of(config)
    own = [factors(stage.output / "checkpoint-3") for stage in stages]
    model = PeftModel.from_pretrained(load(config.base)[0], stages[2].output / "adapter")
    assert type(model.peft_config["default"]) is LoraConfig
    assert model.peft_config["default"].r == 12
    for name in own[0]:
        deltas = [6 / 4 * B @ A for A, B in (each[name] for each in own)]
        found = model.get_submodule(name).get_delta_weight("default").numpy()
        np.testing.assert_allclose(found, sum(deltas), atol=1e-6)
        assert min(np.abs(delta).max() for delta in deltas) > 1e-4
    first, second, third = (weights(stage.output / "adapter") for stage in stages)
    starts = []
    for key, value in first.items():  # what was learned earlier is there to the bit
        side = 0 if "lora_A" in key else 1
        assert torch.equal(second[key].narrow(side, 4, 4), value)
        assert torch.equal(third[key].narrow(side, 4, 8), second[key])
        starts.append(abs(torch.corrcoef(second[key].reshape(2, -1))[0, 1])) if side == 0 else None
    assert max(starts) < 0.7  # a task does not begin as the one before did


def test_with_olora_the_earlier_tasks_act_and_are_kept_off(run):
    overlap = {}
    for weight in (0, 0.5):
        overrides = (f"method.weight={weight}", f"output=weight-{weight}", "training.save_every=3", "training.lr=0.03")
        config = run(f"method={OLORA}", *overrides)
        learn(config, progress=False)
        first, second = stages_of(config)
        one, two = factors(first.output / "checkpoint-3"), factors(second.output / "checkpoint-3")
        overlap[weight] = sum(np.abs(two[name][0] @ one[name][0].T).sum() for name in one)
    assert overlap[0.5] < 0.7 * overlap[0]

    ids, earlier = torch.arange(4, 20)[None], first.output / "adapter"
    training = placed_beside(earlier, 1)(load(config.base)[0], second).eval()
    with torch.no_grad():
        expected = load_adapter(load(config.base)[0], earlier).eval()(input_ids=ids).logits
        torch.testing.assert_close(training(input_ids=ids).logits, expected)
        training.load_adapter(second.output / "checkpoint-3", "default")
        expected = load_adapter(load(config.base)[0], second.output / "adapter").eval()(input_ids=ids).logits
        torch.testing.assert_close(training(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("method.name=mtl_lora", "method.name is mtl_lora, which has to know all tasks at once"),
        ("method.name=am_lorra", "which is no method"),
        ("method.gate=all", "method.gate is refused"),
        ("method.tasks=[color]", "method.tasks is what data.sequence says"),
        (f"method={OLORA[:-1]}, earlier: [a]}}", "method.earlier is what data.sequence says"),
        (f"method={OLORA[:-1]}, modules_to_save: [lm_head]}}", "method.modules_to_save is of whole modules"),
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


def test_the_command_line_shows_the_matrix(run, tmp_path):
    out = done("train", tmp_path / "sequence.yaml", "training.steps=1")
    assert "after shape" in out
    assert "backward transfer" in out
    assert "matrix.json" in out
    shutil.rmtree(tmp_path / "out")
