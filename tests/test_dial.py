"""The dial of a finished run: its curves, its choice, the adapter that it writes, its picture, and its mistakes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pico
import pytest
import torch
from commands import call, done
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from lorasculpt import UserError
from lorasculpt import dial as dialing
from lorasculpt.dial import dial, plot
from lorasculpt.evaluation import drift, evaluate, strength
from lorasculpt.measure import measure
from lorasculpt.models.load import load
from lorasculpt.train import train


@pytest.fixture
def run(a_run):
    """A run of the tiny llava; a function that gives its config, changed by ``key=value``."""
    return a_run(
        method={"name": "lora", "r": 4},
        training={"steps": 2, "batch": 2, "lr": 0.01, "precision": "fp32", "report_to": []},
        evaluate={"target": ["data/train.jsonl"], "max_new_tokens": 2, "drift": 4, "strengths": [0.5]},
    )


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
    dial(strict, write=tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    assert json.loads(path.read_text())["budget"]["strength"] is None
    code, out, err = call("dial", tmp_path / "run.yaml", "evaluate.retain=1", "--write", tmp_path / "none")
    assert code == 2
    assert "none was not written, because no strength keeps enough" in err
    assert "No strength of this adapter keeps 100 %" in out  # after all that was measured
    assert not (tmp_path / "none").exists()


def test_with_source_on_the_command_line(run, tmp_path):
    data = tmp_path / "data" / "train.jsonl"
    config = run(f"evaluate.source=[{data}]", "evaluate.retain=0.9")
    train(config, progress=False)
    said = done("dial", tmp_path / "run.yaml", f"evaluate.source=[{data}]", "--retain", "0.9")
    assert "The base answers no question of the source right" in said
    assert "nan" not in said
    found = json.loads((config.output / "dial.json").read_text())
    assert all("source" in point for point in found["points"])
    results = measure(config, progress=False)
    assert json.loads(results.read_text())["runs"][0]["budget"] | {"density": None} == found["budget"]


def test_a_setting_is_not_chosen_on_the_test(run, tmp_path, monkeypatch):
    """The validation files are asked, of the source too, where there are any."""
    others = [pico.write_data(tmp_path / task, n=2, tasks=(task,)) for task in ("shape", "side")]
    data = tmp_path / "data" / "train.jsonl"
    config = run(f"evaluate.source=[{data}]")
    train(config, progress=False)
    config = run(
        f"evaluate.source=[{data}]",
        f"evaluate.validation=[{others[0]}]",
        f"evaluate.validation_source=[{others[1]}]",
    )
    asked, curve = [], dialing.curve

    def watched(model, processor, source, target, *arguments, **options):
        asked.append([task.name for task in (*source, *target)])
        return curve(model, processor, source, target, *arguments, **options)

    monkeypatch.setattr(dialing, "curve", watched)
    _, found = dial(config, retain=0.5, progress=False)
    assert asked == [["side", "shape"]] * 2  # at strength 0 and at the others
    assert found["budget"]["on"] == "validation"


# --- pruned as well -------------------------------------------------------------------------------------------------

SCULPTED = "method={name: lorasculpt, r: 4, density: 0.5, prune_step: 1}"


@pytest.fixture
def trained(run):
    """Runs of the tiny llava, trained: a plain LoRA, or a sculpted one."""

    def go(*overrides):
        config = run(*overrides)
        train(config, progress=False)
        return config

    return go


def by_hand(adapter, out, density, by):
    """A copy of a LoRA folder, pruned and scaled in numpy: entry by entry, from the largest down."""
    out.mkdir()
    shutil.copy(adapter / "adapter_config.json", out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, factor in tensors.items():
        flat = factor.reshape(-1)
        found = np.zeros_like(flat)
        for i in sorted(range(flat.size), key=lambda i: -abs(flat[i]))[: int(density * flat.size)]:
            found[i] = flat[i] * (by if ".lora_B." in key else 1)
        tensors[key] = found.reshape(factor.shape)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(4, 40)[None]).logits


def stock(config, folder):
    return PeftModel.from_pretrained(load(config.base)[0], str(folder)).eval()


@pytest.mark.parametrize("method", ["method={name: lora, r: 4}", SCULPTED])
def test_what_is_measured_pruned_is_what_stock_peft_loads(trained, tmp_path, monkeypatch, method):
    config = trained(method)
    adapter, curve, models, seen = config.output / "adapter", dialing.curve, [], []

    def watched(model, processor, source, target, strengths, *, prompts, progress, **options):
        for value in strengths:
            with strength(model, value):
                answers = evaluate(model, processor, source, target, **options)
                seen.append((logits(model), answers["target"], (processor, target, prompts, options)))
        models.append(model)
        return curve(model, processor, source, target, strengths, prompts=prompts, progress=progress, **options)

    monkeypatch.setattr(dialing, "curve", watched)
    densities = (0.5, 1, 0.125)
    out = tmp_path / "small"
    path, found = dial(config, retain=0.5, densities=densities, write=out, progress=False)
    points = found["points"]
    settings = [(point["density"], point["strength"]) for point in points]
    assert settings == [(1, 0), (1, 0.5), (1, 1), (0.5, 0.5), (0.5, 1), (0.125, 0.5), (0.125, 1)]
    assert json.loads(path.read_text()) == found

    said = [each[0] for each in seen]
    torch.testing.assert_close(said[0], logits(load(config.base)[0]))
    for i, (density, by) in enumerate(settings[1:], start=1):
        expected = stock(config, by_hand(adapter, tmp_path / f"{i}", density, by))
        torch.testing.assert_close(said[i], logits(expected), atol=1e-5, rtol=1e-4)
        answers, (processor, target, prompts, options) = seen[i][1:]
        assert evaluate(expected, processor, [], target, **options)["target"] == answers
        moved = drift(expected, processor, prompts, batch=options["batch"])
        assert points[i]["drift"] == pytest.approx(moved["value"], rel=1e-3, abs=1e-7)
    assert (points[3]["drift"] == points[1]["drift"]) == (method == SCULPTED)  # half of that is zero already
    assert not torch.allclose(said[5], said[1], atol=1e-4)
    torch.testing.assert_close(logits(models[0]), logits(stock(config, adapter)))  # it has its own factors again

    chosen = found["budget"]  # the target is 0 everywhere
    assert (chosen["strength"], chosen["density"]) == (0.5, 0.125)
    torch.testing.assert_close(said[5], logits(stock(config, out)), atol=1e-5, rtol=1e-4)
    assert json.loads((out / "posthoc.json").read_text())["made"] == {
        "edit": "prune and scale",
        "density": 0.125,
        "adapters": [str(adapter)],
        "by": 0.5,
        "retain": 0.5,
        "kept": chosen["kept"],
    }


def test_it_is_turned_closer_to_what_may_be_lost(trained, monkeypatch):
    config = trained("evaluate.refine=2")

    def curve(model, processor, source, target, strengths, **options):  # sparser keeps more
        dense = all(weight.all() for name, weight in model.named_parameters() if "lora_A" in name)
        kept = 0.4 if dense else 0.9
        return [{"strength": s, "target": s, "drift": float(s > kept)} for s in strengths]

    monkeypatch.setattr(dialing, "curve", curve)
    found = dial(config, retain=0.9, densities=(1, 0.25), progress=False)[1]
    settings = [(point["density"], point["strength"]) for point in found["points"]]
    assert settings[:6] == [(1, 0), (1, 0.25), (1, 0.375), (1, 0.5), (1, 1), (0.25, 0.5)]
    assert settings[6:] == [(0.25, 0.75), (0.25, 0.875), (0.25, 1)]
    assert (found["budget"]["density"], found["budget"]["strength"]) == (0.25, 0.875)


def test_densities_on_the_command_line(trained, tmp_path):
    config, file = trained(), tmp_path / "run.yaml"
    said = done("dial", file, "--retain", "0.5", "--densities", "1,0.25", "--plot", tmp_path / "plots" / "dial.png")
    assert "strength density target" in said
    assert "Strength 0.5 at density 0.25 learns the most" in said  # the target is 0 everywhere
    assert (tmp_path / "plots" / "dial.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["dial.png"]
    said = done("dial", file, "--retain", "0.5")
    assert "density" not in said
    assert "It was chosen on the questions it is scored on, which flatters the score" in said
    before = (config.output / "dial.json").read_text()
    for wrong, words in (
        (("--densities", "0"), r"the densities are [0]; name one or more"),
        (("--densities", "1,1.5"), "each above 0 and not above 1"),
        (("--densities", "nan"), "each above 0 and not above 1"),
        (("--densities", "half"), "--densities is 'half'; it must be numbers"),
        (("--densities", "1,"), "--densities is '1,'; it must be numbers"),
        (("--densities", "1e-5"), "keeps no entry"),
        (("--plot", "dial.jpg"), "must end in .png or .svg"),
        (("--retain", "0"), "the share to keep is 0"),
    ):
        code, _, err = call("dial", file, *wrong)
        assert code == 2
        assert words in err
        assert len(err.splitlines()) == 1
    assert (config.output / "dial.json").read_text() == before


def test_a_plot_of_what_nothing_kept(tmp_path):
    points = [
        {"strength": strength, "density": density, "target": target, "drift": moved}
        for strength, density, target, moved in ((0, 1, 0.1, 0), (0.5, 0.2, 0.4, 0.1), (1, 0.2, 0.6, 0.4))
    ]
    budget = {"retain": 0.97, "by": "drift", "strength": None, "density": None, "kept": None, "target": None}
    plot({"points": points, "budget": budget}, tmp_path / "dial.svg")
    assert (tmp_path / "dial.svg").read_text().count("<svg") == 1


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_what_has_no_dial(run, tmp_path, monkeypatch):
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
        (("evaluate.target=[]", "method.use_dora=true", "output=dora"), "evaluate.target must name"),
    ):
        config = run(*overrides)
        if "target" not in overrides[0]:
            train(config, progress=False)
        with pytest.raises(UserError, match=words):
            dial(config, progress=False)
    with pytest.raises(UserError, match="above 0"):
        dial(run(), retain=1.5, progress=False)
    with pytest.raises(UserError, match="name one or more"):
        dial(run(), densities=(), progress=False)
    monkeypatch.setattr(dialing, "loaded", lambda *_, **__: pytest.fail("the base was loaded"))
    for config, words in (
        (run("method.use_dora=true", "output=dora"), "sets use_dora"),
        (routed, "only LORA can be read here"),
    ):
        with pytest.raises(UserError, match=words):
            dial(config, densities=(1, 0.5), progress=False)
