"""The whole path, as a user walks it: config → train → eval → report → export → reload, and its mistakes."""

from __future__ import annotations

import json
import sys

import pico
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from lorasculpt import METHODS, UserError, cli
from lorasculpt.config import RunConfig
from lorasculpt.measure import measure
from lorasculpt.models.load import load
from lorasculpt.train import train


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


def words(*arguments, capsys, monkeypatch) -> tuple[int, str]:
    """Exit code and standard error of one command line."""
    monkeypatch.setattr(sys, "argv", ["lorasculpt", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_from_config_to_an_adapter_that_stock_peft_loads(run, tmp_path, capsys, monkeypatch):
    config = run("evaluate.every=2")
    adapter = train(config, progress=False)
    kept = {name: int(torch.count_nonzero(value)) / value.numel() for name, value in weights(adapter).items()}
    assert all(share == pytest.approx(0.2, abs=0.01) for share in kept.values())
    assert {name.split(".")[-2] for name in kept} == {"lora_A", "lora_B"}

    results, before = measure(config, progress=False)
    record = json.loads(results.read_text())["runs"][0]
    assert record["steps"] == 4
    assert record["trainable"] > 0
    assert [point["strength"] for point in record["curve"]] == [0, 0.25, 0.5, 0.75, 1]
    assert record["curve"][0]["source"] == record["summary"]["source_before"]
    assert [row["step"] for row in record["training"] if "source" in row] == [2, 4]
    assert str(tmp_path) not in results.read_text()
    assert before["source"]

    command = ("report", results, "--out", tmp_path / "page")
    assert words(*command, capsys=capsys, monkeypatch=monkeypatch)[0] == 0
    assert "lorasculpt" in (tmp_path / "page" / "report.html").read_text()

    for to in ("lora", "merged"):
        command = ("export", adapter, "--base", config.base, "--to", to, "--out", tmp_path / to)
        code, err = words(*command, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 0, err
    base, _ = load(config.base)
    inputs = {"input_ids": torch.arange(4, 20)[None]}
    with torch.no_grad():
        live = PeftModel.from_pretrained(base, str(adapter)).eval()(**inputs).logits
        exported = PeftModel.from_pretrained(load(config.base)[0], str(tmp_path / "lora")).eval()(**inputs).logits
        merged = load(str(tmp_path / "merged"))[0].eval()(**inputs).logits
    assert torch.equal(live, exported)
    torch.testing.assert_close(live, merged, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(run, monkeypatch, stop):
    whole = weights(train(run(), progress=False))
    config = run("output=broken", "training.save_every=1")

    class Killed(Exception):
        pass

    def kill(self, args, state, control, **kwargs):
        if state.global_step == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lorasculpt.adapters.clock.ClockCallback.on_step_begin", _also(kill))
        with pytest.raises(Killed):
            train(config, progress=False)
    assert not (config.output / "adapter").exists()
    resumed = weights(train(config, progress=False))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


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


def test_a_full_projector_is_trained_saved_and_brought_back(run):
    from lorasculpt.adapters.load import load as load_adapter

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


def test_a_projector_with_an_adapter_learns_at_its_own_rate(run):
    adapter = train(run("projector=lora", "method.cmr_connector_weight=0.1"), progress=False)
    assert any("multi_modal_projector" in name for name in weights(adapter))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("method.name=lorasculp",), "method.name"),
        (("method.densty=0.1",), "did you mean density"),
        (("method.density=1.5",), "method.density"),
        (("method.prune_step=40",), "method.prune_step"),
        (("method.use_dora=true",), "use_dora"),
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


def test_the_command_line_ends_with_2_for_a_users_mistake(run, tmp_path, capsys, monkeypatch):
    for command, part in (
        (("train", tmp_path / "none.yaml"), "none.yaml"),
        (("train", tmp_path / "run.yaml", "training.lr=fast"), "training.lr"),
        (("eval", tmp_path / "run.yaml"), "lorasculpt train"),
        (("methods", "nothing"), "nothing"),
        (("report", tmp_path / "run.yaml"), "run.yaml"),
        (("inspect", tmp_path), "adapter"),
        (("frobnicate",), "frobnicate"),
    ):
        code, err = words(*command, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 2, (command, err)
        assert part in err
        assert "Traceback" not in err


def test_methods_are_listed_with_their_settings(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lorasculpt", "methods", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    facts = json.loads(capsys.readouterr().out)
    assert facts[0]["method"] == "lorasculpt"
    assert facts[0]["settings"]["density"] == 0.1
    config = METHODS["lorasculpt"]
    assert cli._meanings(config).keys() == cli._settings(config).keys()
