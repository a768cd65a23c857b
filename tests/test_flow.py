"""The whole path, as a user walks it: config → train → eval → report → export → reload, and its mistakes."""

from __future__ import annotations

import json
import re
import shutil

import pico
import pytest
import torch
import yaml
from commands import call, done
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoProcessor
from trl import SFTTrainer

from lorasculpt import METHODS, UserError, cli
from lorasculpt.adapters.load import load as load_adapter
from lorasculpt.adapters.origin import origin
from lorasculpt.adapters.tasks import TaskCollator
from lorasculpt.config import RunConfig
from lorasculpt.data.batches import Collator
from lorasculpt.data.records import Record
from lorasculpt.export import export
from lorasculpt.measure import measure
from lorasculpt.memory import Peak
from lorasculpt.models.load import load
from lorasculpt.overview import meanings
from lorasculpt.provenance import machine
from lorasculpt.run.callbacks import Cost
from lorasculpt.run.folder import checkpoints
from lorasculpt.run.model import attach
from lorasculpt.run.records import one_pass, training_rows
from lorasculpt.train import train


def trained_on(config: RunConfig) -> list[Record]:
    return one_pass(config, training_rows(config).trained)


@pytest.fixture
def run(tmp_path, pico_folder):
    """Write a run of the tiny llava and return a function that gives its config, changed by ``key=value``."""
    data = pico.write_data(tmp_path / "data", n=8)
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "lorasculpt", "r": 8, "lora_alpha": 16, "density": 0.2, "prune_step": 2, "cmr_weight": 0.1},
        "data": {"train": str(data)},
        "training": {"steps": 4, "batch": 2, "lr": 0.01, "log_every": 1, "precision": "fp32", "report_to": []},
        "evaluate": {"source": [str(data)], "target": [str(data)], "limit": 4, "max_new_tokens": 3},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda *overrides: RunConfig.load(path, overrides)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_from_config_to_an_adapter_that_stock_peft_loads(run, tmp_path):
    config = run("evaluate.every=2")
    adapter = train(config, progress=False)
    kept = {name: int(torch.count_nonzero(value)) / value.numel() for name, value in weights(adapter).items()}
    assert all(share == pytest.approx(0.2, abs=0.01) for share in kept.values())
    assert {name.split(".")[-2] for name in kept} == {"lora_A", "lora_B"}
    assert json.loads((adapter / "base.json").read_text()) == origin(load(config.base)[0], config.base)

    results = measure(config, progress=False)
    record = json.loads(results.read_text())["runs"][0]
    assert record["steps"] == 4
    assert record["trainable"] > 0
    assert [point["strength"] for point in record["curve"]] == [0, 0.25, 0.5, 0.75, 1]
    assert record["curve"][0]["source"] == record["summary"]["source_before"]
    assert [row["step"] for row in record["training"] if "source" in row] == [2, 4]
    assert str(tmp_path) not in results.read_text()

    command = ("report", results, "--out", tmp_path / "page")
    assert call(*command)[0] == 0
    assert "lorasculpt" in (tmp_path / "page" / "report.html").read_text()

    for to in ("lora", "merged"):
        command = ("export", adapter, "--base", config.base, "--to", to, "--out", tmp_path / to)
        code, _, err = call(*command)
        assert code == 0, err
    base, _ = load(config.base)
    inputs = {"input_ids": torch.arange(4, 20)[None]}
    with torch.no_grad():
        live = PeftModel.from_pretrained(base, str(adapter)).eval()(**inputs).logits
        exported = PeftModel.from_pretrained(load(config.base)[0], str(tmp_path / "lora")).eval()(**inputs).logits
        merged = load(str(tmp_path / "merged"))[0].eval()(**inputs).logits
    assert torch.equal(live, exported)
    torch.testing.assert_close(live, merged, atol=1e-5, rtol=1e-4)


def test_drift_is_measured_in_training_where_there_is_nothing_else_to_measure(run):
    config = run("evaluate={drift: 2, every: 1}", "training.steps=2", "method.prune_step=1")
    train(config, progress=False)
    history = json.loads((config.output / "training.json").read_text())["history"]
    points = [row for row in history if "drift" in row]
    assert [row["step"] for row in points] == [1, 2]
    assert all(row["drift"] >= 0 for row in points)
    assert points[-1]["drift"] > 0
    assert not any({"source", "target"} & set(row) for row in history)


def test_drift_is_measured_where_it_is_asked_for(run, capsys):
    config = run("evaluate.drift=4", "evaluate.every=2", "evaluate.during=3")
    train(config, progress=False)
    texts = (config.output / "drift.jsonl").read_text()
    results = measure(config, progress=False)
    record = json.loads(results.read_text())["runs"][0]
    low, high = record["drift"]["interval"]
    assert 0 < low <= record["drift"]["value"] <= high
    assert record["drift"]["n"] == 4
    assert [row["step"] for row in record["training"] if row.get("drift", 0) > 0] == [2, 4]
    assert (config.output / "drift.jsonl").read_text() == texts  # the same in training and after it
    assert texts.count('"images": []') == 2
    more = RunConfig.load(config.output / "run.yaml", ["evaluate.drift=6"])
    measure(more, progress=False)  # others, with pictures as well
    assert (config.output / "drift.jsonl").read_text().count('"images": []') == 3
    cli._summary([results])
    assert "drift" in capsys.readouterr().out

    whole = run("evaluate.drift=4", "projector=full", "output=whole")
    train(whole, progress=False)
    record = json.loads(measure(whole, progress=False).read_text())["runs"][0]
    assert "drift" not in record  # a replaced projector leaves no base to compare with


@pytest.mark.parametrize(
    ("stop", "more"), [(1, ()), (3, ()), (3, ("projector=full", "training.projector_lr=0.01"))], ids=str
)
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(run, monkeypatch, stop, more):
    def everything(folder) -> dict[str, torch.Tensor]:
        return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}

    whole = everything(train(run(*more), progress=False))
    config = run("output=broken", "training.save_every=1", *more)

    _interrupted(config, monkeypatch, stop)
    assert not (config.output / "adapter").exists()
    resumed = everything(train(config, progress=False))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_run_may_lie_behind_a_link(run, tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    config = run("output=link/out", "evaluate.every=2", "evaluate.drift=3")
    train(config, progress=False)
    for _ in range(2):
        record = json.loads(measure(config, progress=False).read_text())["runs"][0]
        assert record["drift"]["n"] == 3
        assert all((config.output.resolve() / shown["image"]).is_file() for shown in record["gallery"])
    assert record["gallery"]


class Killed(Exception):
    pass


def _interrupted(config, monkeypatch, step: int, how: type[BaseException] = Killed) -> None:
    """Train ``config`` until ``how`` ends it after ``step`` steps."""

    def kill(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise how

    with monkeypatch.context() as patch:
        patch.setattr("lorasculpt.adapters.clock.ClockCallback.on_step_begin", _also(kill))
        with pytest.raises(how):
            train(config, progress=False)


def _also(first):
    from lorasculpt.adapters.clock import ClockCallback

    original = ClockCallback.on_step_begin

    def both(self, args, state, control, **kwargs):
        first(self, args, state, control, **kwargs)
        return original(self, args, state, control, **kwargs)

    return both


def test_an_error_in_the_middle_of_training_loses_no_checkpoint(run, monkeypatch):
    config = run("training.save_every=1")

    def fail(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise ValueError("the density of this batch is strange")

    monkeypatch.setattr("lorasculpt.adapters.clock.ClockCallback.on_step_begin", _also(fail))
    with pytest.raises(ValueError, match="strange"):
        train(config, progress=False)
    assert (config.output / "checkpoint-2" / "adapter_model.safetensors").is_file()
    for name in ("checkpoint-2-kept", "checkpoint-best"):  # the user's own copies
        shutil.copytree(config.output / "checkpoint-2", config.output / name)
    assert [path.name for path in checkpoints(config.output)][-1] == "checkpoint-2"


def test_what_tensorboard_is_told_stays_for_all_parts_of_a_run(run, monkeypatch):
    config = run("training.report_to=[tensorboard]", "training.save_every=2")
    _interrupted(config, monkeypatch, 3, KeyboardInterrupt)  # its third step is taken twice
    train(config, progress=False)
    assert len(list((config.output / "logs").iterdir())) == 2
    events = EventAccumulator(str(config.output / "logs")).Reload()
    history = [row for row in json.loads((config.output / "training.json").read_text())["history"] if "loss" in row]
    for key in ("loss", "density_a"):
        found = events.Scalars(f"train/{key}")
        assert [event.step for event in found] == [1, 2, 3, 4]
        assert [event.value for event in found] == pytest.approx([row[key] for row in history])
    assert not (config.output / ".partial").exists()


def test_where_tensorboard_writes_may_be_told_otherwise(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    config = run("training.report_to=[tensorboard]", "training.steps=3")
    train(config, progress=False)
    assert list((tmp_path / "elsewhere").iterdir())
    assert not (config.output / "logs").exists()


def test_a_full_projector_is_trained_saved_and_brought_back(run):
    config = run("projector=full", "training.projector_lr=0.01")
    adapter = train(config, progress=False)
    saved = load_file(adapter / "projector.safetensors")
    base, _ = load(config.base)
    fresh = dict(base.named_parameters())
    assert saved
    assert all(not torch.equal(value, fresh[name]) for name, value in saved.items())
    loaded = dict(load_adapter(base, adapter).get_base_model().named_parameters())
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
    assert set(weights(adapter)) == {name for name in weights(adapter) if ".lora_" in name}


def test_a_full_projector_of_a_base_in_half_precision_is_trained_in_full(run):
    """A step of 2e-5 is less than what bfloat16 can tell of most weights."""
    half = ("projector=full", "dtype=bfloat16", "training.lr=1e-4")
    with pytest.raises(
        UserError, match=r"trained in fp32, but the base is in bfloat16 and training\.precision is fp32"
    ):
        train(run(*half), progress=False)
    config = run(*half, "training.precision=bf16")
    adapter = train(config, progress=False)
    base = dict(load(config.base)[0].named_parameters())
    for name, value in load_file(adapter / "projector.safetensors").items():
        assert value.dtype == torch.float32
        assert (value != base[name].bfloat16().float()).float().mean() > 0.9
    measure(config, progress=False)


@pytest.mark.parametrize("projector", ["lora", "full"])
def test_a_projector_learns_at_its_own_rate(run, monkeypatch, projector):
    trainers = []
    monkeypatch.setattr("lorasculpt.train.SFTTrainer.train", lambda self, **options: trainers.append(self))
    rates = ("training.lr=0.01", "training.projector_lr=0.003", "method.cmr_connector_weight=0.1")
    further = "training.arguments={adam_beta1: 0.8, adam_beta2: 0.9, adam_epsilon: 1e-6}"
    adapter = train(run(f"projector={projector}", *rates, further), progress=False)
    names = {id(parameter): name for name, parameter in trainers[0].model.named_parameters()}
    groups = {
        group["lr"]: {names[id(parameter)] for parameter in group["params"]}
        for group in trainers[0].optimizer.param_groups
    }
    trained = {name for name, parameter in trainers[0].model.named_parameters() if parameter.requires_grad}
    own = {name for name in trained if "multi_modal_projector" in name}
    assert groups == {0.01: trained - own, 0.003: own}
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6) for group in trainers[0].optimizer.param_groups)
    assert own
    assert trained - own
    assert {".lora_" in name for name in own} == {projector == "lora"}
    assert any("multi_modal_projector" in name for name in weights(adapter)) == (projector == "lora")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("method.name=lorasculp",), "method.name"),
        (("method.use_dora=true",), "use_dora"),
        (("method.r='8'",), r"override \"method.r='8'\": method.r must be a whole number; got '8'"),
    ],
)
def test_a_mistake_in_the_method_is_told_with_its_place_and_leaves_nothing(run, overrides, part):
    config = run(*overrides)
    with pytest.raises(UserError, match=part):
        train(config, progress=False)
    assert not config.output.exists()


def test_another_run_in_the_output_folder_is_not_touched(run):
    config = run()
    adapter = train(config, progress=False)
    stamp = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="holds another run"):
        train(run("training.lr=0.5"), progress=False)
    assert train(config, progress=False) == adapter
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_the_command_line_ends_with_2_for_a_users_mistake(run, tmp_path):
    for command, part in (
        (("train", tmp_path / "none.yaml"), "none.yaml"),
        (("train", tmp_path / "run.yaml", "training.lr=fast"), "training.lr"),
        (("eval", tmp_path / "run.yaml"), "lorasculpt train"),
        (("methods", "nothing"), "nothing"),
        (("report", tmp_path / "run.yaml"), "run.yaml"),
        (("inspect", tmp_path), "adapter"),
        (("frobnicate",), "frobnicate"),
    ):
        code, _, err = call(*command)
        assert code == 2, (command, err)
        assert part in err
        assert "Traceback" not in err


def test_methods_are_listed_with_their_settings():
    facts = json.loads(done("methods", "--json"))
    assert facts[0]["method"] == "lorasculpt"
    assert facts[0]["settings"]["density"] == 0.1
    assert [fact["method"] for fact in facts] == list(METHODS)
    for fact, config in zip(facts, METHODS.values(), strict=True):
        assert fact["idea"], fact["method"]
        assert fact["sure"], fact["method"]
        assert fact["parameters"]["trained"] > 0
        assert fact["settings"].keys() <= meanings(config).keys()
    told = {fact["method"]: fact for fact in facts}
    assert told["lorasculpt"]["parameters"]["of_lora"] == 1
    assert told["mtl_lora"] | {"tasks": "needed", "exports": ["lora", "merged"], "per_task": True} == told["mtl_lora"]
    assert told["spider"] | {"tasks": None, "exports": ["merged"], "per_task": False} == told["spider"]
    assert told["loramoe"] | {"tasks": "used", "exports": []} == told["loramoe"]
    assert "tasks" in told["loramoe"]["settings"]
    assert "tasks" not in told["mixlora"]["settings"]


@pytest.mark.parametrize("name", [None, *METHODS])
def test_the_tables_of_methods_are_readable(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = done("methods", *([name] if name else []))
    assert all(method in out for method in ([] if name else METHODS))
    assert "parameters" in out or "default" in out


# --- methods that know tasks ----------------------------------------------------------------------------------------


TASKS = ("color", "shape")


@pytest.fixture
def several(run, tmp_path):
    """A run of two tasks with a method that needs them; what is to be kept is of a third."""
    learned = pico.write_data(tmp_path / "two", n=4, tasks=TASKS)
    kept = pico.write_data(tmp_path / "kept", n=4, tasks=["side"])
    method = "{name: mtl_lora, r: 4, lora_alpha: 8, num_b: 2}"
    fixed = (f"data.train={learned}", f"evaluate.target={learned}", f"evaluate.source={kept}", f"method={method}")
    return lambda *overrides: run(*fixed, *overrides)


def live(config, adapter):
    return load_adapter(load(config.base)[0], adapter).eval()


INPUTS = {"input_ids": torch.arange(4, 20)[None]}


@torch.no_grad()
def logits(model, **task) -> torch.Tensor:
    return model(**INPUTS, **task).logits


def test_from_tasks_in_the_data_to_a_plain_lora_for_each(several, tmp_path):
    config = several("evaluate.every=2", "evaluate.as_task=shape")
    adapter = train(config, progress=False)
    assert json.loads((adapter / "adapter_config.json").read_text())["tasks"] == list(TASKS)
    assert RunConfig.load(config.output / "run.yaml") == config
    assert train(config, progress=False) == adapter

    results = measure(config, progress=False)
    record = json.loads(results.read_text())["runs"][0]
    assert set(record["target"]) == set(TASKS)
    assert set(record["source"]) == {"side"}
    assert [point["strength"] for point in record["curve"]] == [0, 0.25, 0.5, 0.75, 1]
    assert record["settings"]["evaluate"] == {"as_task": "shape"}
    command = ("report", results, "--out", tmp_path / "page")
    assert call(*command)[0] == 0

    for to in ("lora", "merged"):
        command = ("export", adapter, "--base", config.base, "--to", to, "--task", "all", "--out", tmp_path / to)
        code, _, err = call(*command)
        assert code == 0, err
    model, found = live(config, adapter), []
    for task in TASKS:
        expected = logits(model, task=task)
        exported = PeftModel.from_pretrained(load(config.base)[0], str(tmp_path / "lora" / task)).eval()
        torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            logits(load(str(tmp_path / "merged" / task))[0].eval()), expected, atol=1e-5, rtol=1e-4
        )
        assert json.loads((tmp_path / "lora" / task / "export.json").read_text())["task"] == task
        assert f"made for the task {task}." in (tmp_path / "lora" / task / "README.md").read_text()
        found.append(expected)
    assert not torch.equal(*found)


def test_tasks_that_would_share_a_folder_are_numbered(several, tmp_path):
    config = several("method.tasks=[color, shape, a/b, a b]")
    adapter = train(config, progress=False)
    command = ("export", adapter, "--base", config.base, "--task", "all", "--out", tmp_path / "loras")
    assert call(*command)[0] == 0
    assert {path.name for path in (tmp_path / "loras").iterdir()} == {"1-color", "2-shape", "3-a_b", "4-a_b"}


def test_a_run_with_tasks_goes_on_as_if_it_had_never_stopped(several):
    whole = weights(train(several("training.save_every=1", "training.keep=9"), progress=False))
    config = several("training.save_every=1", "training.keep=9")
    for path in (config.output / "adapter", config.output / "checkpoint-3", config.output / "checkpoint-4"):
        shutil.rmtree(path)
    resumed = weights(train(config, progress=False))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_every_batch_tells_the_tasks_in_the_order_that_was_given(several, monkeypatch):
    seen = set()

    def call(self, found):
        batch = collate(self, found)
        seen.update(zip([row["task"] for row in found], batch["routing_task_ids"].tolist(), strict=True))
        return batch

    collate = TaskCollator.__call__
    monkeypatch.setattr(TaskCollator, "__call__", call)
    train(several("method.tasks=[more, shape, color]"), progress=False)
    assert seen == {("shape", 1), ("color", 2)}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("method.tasks=[color]",), "two/train.jsonl:2: the task 'shape' is not one of method.tasks (color); add it"),
        (("method.tasks=color",), "method.tasks=color': method.tasks must be a list of texts; got 'color'"),
        (("method={name: loramoe, knowledge: [colour]}",), "knowledge names 'colour', which is not one of tasks"),
        (("evaluate.every=2",), "kept/train.jsonl:1: the adapter does not know the task 'side'; say with evaluate.as_"),
        (("evaluate.every=2", "evaluate.as_task=side"), "as_task is 'side', a task that the adapter does not know"),
    ],
)
def test_a_mistake_with_tasks_is_one_sentence_and_leaves_nothing(several, overrides, part):
    config = several(*overrides)
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        train(config, progress=False)
    assert part in str(error.value)
    assert not config.output.exists()


@pytest.mark.parametrize("step", [0, 2])
def test_a_users_mistake_in_the_first_step_frees_the_folder_and_a_later_one_does_not(several, monkeypatch, step):
    config = several()
    collate, batches = Collator.__call__, []

    def call(self, found):
        batches.append(found)
        if len(batches) > step + 1:  # a batch is made while the one before is in use
            raise UserError("this picture is gone")
        return collate(self, found)

    monkeypatch.setattr(Collator, "__call__", call)
    with pytest.raises(UserError, match="this picture is gone"):
        train(config, progress=False)
    assert config.output.exists() == bool(step)


def test_strange_tasks_are_told_before_anything_is_measured(several, monkeypatch):
    config = several()
    train(config, progress=False)
    monkeypatch.setattr("lorasculpt.measure.evaluate", lambda *args, **options: pytest.fail("measured"))
    for overrides, part in (
        ((), "kept/train.jsonl:1: the adapter does not know the task 'side'"),
        (("evaluate.as_task=size",), "override 'evaluate.as_task=size': evaluate.as_task is 'size'"),
    ):
        with pytest.raises(UserError) as error:
            measure(several(*overrides), progress=False)
        assert part in str(error.value)
        assert "color, shape" in str(error.value)


@pytest.mark.parametrize("method", ["loramoe", "mixlora", "spider", "mosld", "malora", "smora, r: 64, top_k: 8"])
def test_methods_that_need_no_tasks_are_measured_on_any(several, method):
    config = several(f"method={{name: {method}}}")
    assert json.loads((train(config, progress=False) / "adapter_config.json").read_text())["tasks"] == []
    record = json.loads(measure(config, progress=False).read_text())["runs"][0]
    assert record["curve"][0]["source"] is not None


def test_settings_that_name_tasks_find_them_in_the_data(several):
    adapter = train(several("method={name: loramoe, knowledge: [color]}"), progress=False)
    assert json.loads((adapter / "adapter_config.json").read_text())["tasks"] == list(TASKS)


def test_a_method_may_choose_its_own_layers(several):
    found = weights(train(several("method={name: spider, last_layers: 1}"), progress=False))
    names = {name.split(".lora_update")[0].removeprefix("base_model.model.model.") for name in found}
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector"}
    assert {name.split(".")[2] for name in names if "layers" in name} == {"1"}
    found = weights(train(several("output=all", "method={name: spider}", "scope=language"), progress=False))
    assert not any("projector" in name for name in found)
    assert any("layers.0." in name for name in found)
    chosen = several("method={name: lorasculpt, r: 2, layers_to_transform: [1]}")
    names = attach(pico.build("llava")[0], chosen).targeted_module_names
    assert {re.sub(r"\.\w+\.\w+$", "", name) for name in names} == {"model.language_model.layers.1"}
    with pytest.raises(UserError, match="projector is full, but spider says by itself"):
        train(several("output=none", "method={name: spider}", "projector=full"), progress=False)


def test_what_an_adapter_cannot_become_is_told(several, tmp_path, monkeypatch):
    for method, told in {
        "mtl_lora": [
            ((), "is another LoRA for each task; say which with task: color, shape (on the command"),
            (("--to", "merged"), "is another LoRA for each task"),
            (("--task", "side"), "knows no task 'side'; say which with task: color, shape (on the command"),
        ],
        "loramoe": [
            ((), "every token weighs the experts anew; deploy it with lorasculpt.load."),
            (("--to", "merged"), "every token weighs the experts anew"),
            (("--task", "all"), "every token weighs the experts anew"),
        ],
        "spider": [
            ((), "no low rank; export it to merged."),
            (("--to", "merged", "--task", "color"), "is the same for all tasks"),
            (("--to", "merged", "--task", "all"), "is the same for all tasks"),
        ],
        "lorasculpt": [(("--task", "color"), "is the same for all tasks")],
    }.items():
        config = several(f"output={method}", f"method={{name: {method}}}", "training.steps=101")
        with monkeypatch.context() as patch:
            patch.setattr("lorasculpt.train.SFTTrainer.train", lambda self, **options: None)
            adapter = train(config, progress=False)
        for options, part in told:
            command = ("export", adapter, "--base", config.base, "--out", tmp_path / "out", *options)
            code, _, err = call(*command)
            assert code == 2, err
            assert part in err
            assert not (tmp_path / "out").exists()


def test_what_is_no_low_rank_is_exported_merged(several, tmp_path):
    config = several("method={name: spider}")
    adapter = train(config, progress=False)
    report = export(adapter, config.base, tmp_path / "whole", "merged")
    assert report.parity.kept == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(
        logits(load(str(tmp_path / "whole"))[0].eval()), logits(live(config, adapter)), atol=1e-5, rtol=1e-4
    )


class Known(Peak):
    """A peak of 7 bytes."""

    def bytes(self):
        return 7


def test_time_and_memory_are_those_of_all_parts(run, monkeypatch):
    config = run("training.save_every=1", "training.keep=9", "evaluate.strengths=[]")
    monkeypatch.setattr("lorasculpt.run.callbacks.Peak", Known)
    train(config, progress=False)
    record = json.loads((config.output / "training.json").read_text())
    assert 0 < record["seconds"] < 100
    assert (record["memory_bytes"], record["memory_of"]) == (7, "process")
    for path in (config.output / "adapter", config.output / "checkpoint-3", config.output / "checkpoint-4"):
        shutil.rmtree(path)
    cost = config.output / "checkpoint-2" / "cost.json"
    assert json.loads(cost.read_text())["memory_bytes"] == 7
    cost.write_text(json.dumps({"seconds": 1000, "memory_bytes": 9, "memory_of": "process"}))
    train(config, progress=False)
    found = json.loads(measure(config, progress=False).read_text())["runs"][0]
    assert found["seconds"] > 1000
    assert (found["machine"], found["precision"]) == (machine(torch.device("cpu")), "fp32")
    assert (found["memory_bytes"], found["memory_of"]) == (9, "process")


@pytest.mark.parametrize(
    ("earlier", "most"),
    [((9, "process"), 9), ((1, "process"), 7), ((9, "cuda"), 7), ((None, "process"), None)],
)
def test_peaks_of_the_same_kind_are_compared(tmp_path, monkeypatch, earlier, most):
    monkeypatch.setattr("lorasculpt.run.callbacks.Peak", Known)
    record = {"seconds": 1000, "memory_bytes": earlier[0], "memory_of": earlier[1]}
    (tmp_path / "cost.json").write_text(json.dumps(record))
    found = Cost(torch.device("cpu"), tmp_path).record()
    assert 1000 <= found["seconds"] < 1001
    assert (found["memory_bytes"], found["memory_of"]) == (most, "process")
    assert Cost(torch.device("cpu"), tmp_path / "before-there-were-any").record()["memory_bytes"] == 7


# --- general data, replayed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mtl_lora", "lora"])
def test_general_rows_are_trained_on_beside_all_others(several, tmp_path, monkeypatch, method):
    seen = []

    def call(self, found):
        seen.extend((row["prompt"][0]["content"], row["images"][0]) for row in found)
        return collate(self, found)

    collate = Collator.__call__
    monkeypatch.setattr(Collator, "__call__", call)
    extra = pico.write_data(tmp_path / "general", n=4, tasks=["side"])
    settings = ("training.steps=5", f"data.general={extra}", "data.replay=0.2")
    config = several(*settings, f"method={{name: {method}, r: 4}}", "evaluate.source=[]")
    adapter = train(config, progress=False)
    assert len(seen) == 10  # one pass: all 8 rows and 2 of 4
    assert len(set(seen)) == 10
    general = {image for question, image in seen if question == pico.QUESTIONS["side"]}
    assert len(general) == 2
    assert {image for image in general if str(tmp_path / "general") in image} == general
    if method == "mtl_lora":
        assert json.loads((adapter / "adapter_config.json").read_text())["tasks"] == [*TASKS, "side"]
    drawn = [record.images[0] for record in trained_on(config)[8:]]
    assert general == set(map(str, drawn))  # the same ones, whatever the method
    assert trained_on(config)[8:] != trained_on(config.model_copy(update={"seed": 3}))[8:]


@pytest.mark.parametrize("measured", ["source", "target", "validation"])
def test_what_is_measured_is_never_replayed(several, tmp_path, measured):
    extra = pico.write_data(tmp_path / "general", n=4, tasks=["side"])
    settings = (f"data.general={extra}", "data.replay=0.2", "evaluate.source=[]", "evaluate.target=[]")
    kept = tmp_path / "kept" / "train.jsonl"  # the same questions about copies of the pictures
    config = several(*settings, f"evaluate.{measured}={kept}")
    with pytest.raises(UserError, match=rf"^{extra}:1: asks what {kept}:1 asks, which is measured"):
        train(config, progress=False)
    assert not config.output.exists()


def test_what_is_set_aside_is_never_replayed(several, tmp_path):
    extra = pico.write_data(tmp_path / "general", n=4, tasks=["shape"])
    settings = (f"data.general={extra}", "data.replay=0.2", "evaluate.source=[]", "evaluate.target=[]")
    assert len(trained_on(several(*settings))) == 10  # the train rows themselves may be general
    with pytest.raises(UserError, match=r"general/train.jsonl:\d: asks what .*two/train.jsonl:\d asks"):
        trained_on(several(*settings, "data.validation=0.1"))


EWC = "method={name: regularized, penalty: ewc, r: 4, weight: 0.5, fisher_texts: 5}"


def test_ewc_makes_its_fisher_information_once_and_goes_on_with_it(run, monkeypatch):
    whole = run(EWC, "output=whole", "training.steps=3")
    adapter = train(whole, progress=False)
    assert {path.name for path in whole.output.iterdir()} == {
        "adapter",
        "run.yaml",
        "training.json",
        "fisher.safetensors",
    }
    assert {name.split(".")[-2] for name in weights(adapter)} == {"lora_A", "lora_B"}
    assert {path.name for path in adapter.iterdir()} >= {"adapter_config.json", "lorasculpt.json"}
    assert not (adapter / "fisher.safetensors").exists()
    history = json.loads((whole.output / "training.json").read_text())["history"]
    assert [row["penalty"] > 0 for row in history[:3]] == [False, False, True]  # it warms up for a step

    config, made = run(EWC, "output=broken", "training.steps=3", "training.save_every=1"), []
    monkeypatch.setattr("lorasculpt.run.model.fisher", _counted(made))

    _interrupted(config, monkeypatch, 2)
    resumed = weights(train(config, progress=False))
    assert len(made) == 1
    assert all(torch.equal(resumed[name], value) for name, value in weights(adapter).items())


def _counted(made):
    from lorasculpt.evaluation import fisher

    def counted(*args, **kwargs):
        made.append(1)
        fisher(*args, **kwargs)

    return counted


def test_ewc_takes_the_answers_of_general_data_or_a_file(run, tmp_path, monkeypatch):
    general = pico.write_data(tmp_path / "general", n=8, tasks=("side",))
    texts = []
    monkeypatch.setattr(
        "lorasculpt.run.model.fisher", lambda *args, **kwargs: (texts.extend(args[2]), _counted([])(*args))
    )
    config = run(EWC, "training.steps=1", f"data.general={general}")
    train(config, progress=False)
    assert len(texts) == 5
    assert {text.record.answer for text in texts} == {"left"}
    file = config.output / "fisher.safetensors"
    train(run(EWC, "training.steps=1", f"method.fisher={file}", "output=given"), progress=False)
    assert len(texts) == 5
    with pytest.raises(UserError, match=r"gone\.safetensors, which is no file"):
        train(run(EWC, "method.fisher=gone.safetensors", "output=refused"), progress=False)
    assert not (tmp_path / "refused").exists()


SHORT = ("method={name: lora, r: 4}", "training.steps=2", "training.warmup=0", "training.save_every=null")
KIND = "training.arguments={{gradient_checkpointing_kwargs: {{{}}}}}"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_kwargs` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize(
    ("changes", "backward"),
    [
        ((), False),
        (("projector=full",), False),
        (("method={name: full}",), False),
        (("scope=all",), True),
        ((KIND.format("use_reentrant: false"),), False),
        ((KIND.format("use_reentrant: true"),), True),
        ((KIND.format("preserve_rng_state: false"),), True),  # torch takes that for the reentrant kind
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_checkpointing_runs_nothing_backward_that_is_frozen(run, monkeypatch, changes, backward):
    passed = []

    def watched(trainer, *arguments, **options):
        def told(layer, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: passed.append(layer))

        for name, layer in trainer.model.named_modules():
            if re.search(r"vision_tower\..*layers\.\d+$", name):
                layer.register_forward_hook(told)
        return begin(trainer, *arguments, **options)

    begin = SFTTrainer.train
    plain = weights(train(run(*SHORT, *changes, "training.checkpointing=false", "output=plain"), progress=False))
    monkeypatch.setattr(SFTTrainer, "train", watched)
    found = weights(train(run(*SHORT, *changes, "training.checkpointing=true"), progress=False))
    assert bool(passed) == backward
    assert plain.keys() == found.keys()
    assert all(torch.allclose(plain[name], value, rtol=1e-4, atol=1e-6) for name, value in found.items())


def test_the_base_teaches_in_a_run_and_a_projector_that_moves_is_refused(run, tmp_path):
    adapter = train(run("method={name: lwf, r: 4}", "training.checkpointing=true"), progress=False)
    assert {name.split(".")[-2] for name in weights(adapter)} == {"lora_A", "lora_B"}
    history = json.loads((adapter.parent / "training.json").read_text())["history"]
    assert [row["distillation"] > 0 for row in history[:4]] == [False, False, True, True]  # it warms up for a step
    with pytest.raises(
        UserError, match=r"projector\S* of the base is being trained, .*freeze it \(projector: frozen\)"
    ):
        train(run("method={name: lwf, r: 4}", "projector=full", "output=whole"), progress=False)
    assert not (tmp_path / "whole").exists()


def test_what_pictures_are_made_of_in_training_goes_with_the_adapter(run, tmp_path):
    config = run("image_processor={do_normalize: false}", "training.steps=3")
    adapter = train(config, progress=False)
    base = AutoProcessor.from_pretrained(config.base).image_processor
    for to in ("lora", "merged"):
        export(adapter, config.base, tmp_path / to, to)
    copied = json.loads((tmp_path / "lora" / "preprocessor_config.json").read_text())
    merged = AutoProcessor.from_pretrained(tmp_path / "merged").image_processor
    assert base.do_normalize
    assert not copied["do_normalize"]
    assert not merged.do_normalize
    plain = train(run("output=plain", "training.steps=3"), progress=False)
    assert not (plain / "preprocessor_config.json").exists()
    for folder in (adapter, tmp_path / "lora"):
        assert 'AutoImageProcessor.from_pretrained("path/to/' in (folder / "README.md").read_text()
        assert not AutoImageProcessor.from_pretrained(folder).do_normalize
    assert "AutoImageProcessor" not in (plain / "README.md").read_text()
