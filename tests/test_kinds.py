"""PEFT's own methods: each trains, comes back from disk, is turned off, turned down where it can be, and merged."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pico
import pytest
import torch
from commands import done, refused
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from lorasculpt import corda
from lorasculpt.adapters.load import load as load_adapter
from lorasculpt.adapters.settings import must_be
from lorasculpt.config import RunConfig
from lorasculpt.data.batches import Collator, rows
from lorasculpt.data.records import Record
from lorasculpt.errors import UserError
from lorasculpt.evaluation.strength import fixed, strength
from lorasculpt.export import export
from lorasculpt.kinds import KINDS, OF_PEFT, settings_of, started, taken_over
from lorasculpt.measure import measure
from lorasculpt.models.load import load
from lorasculpt.run.model import adapter_config, prepare
from lorasculpt.run.records import one_pass, training_rows
from lorasculpt.train import _write, train

SMALL = {
    "shira": {"r": 2},
    "miss": {"r": 4},
    "fourierft": {"n_frequency": 50},
    "oft": {"oft_block_size": 4},
    "corda": {"r": 4},
}
"""What the defaults are too large for in a model of 32 features."""
FIXED = {"dora", "ia3", "oft", "hra", "osf", "vera", "fourierft", "miss", "delora", "hira", "deft", "supertuning"}
"""Those whose effect is no multiple of a scaling."""
# SHiRA multiplies with sparse tensors, which torch says once a process that it does not check
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
INPUTS = {"input_ids": torch.arange(4, 20)[None]}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**INPUTS).logits


def trained_on(config: RunConfig) -> list[Record]:
    return one_pass(config, training_rows(config).trained)


@pytest.fixture
def run(a_run):
    """A function that gives the config of a run of the tiny llava, changed by ``key=value``."""
    return a_run(
        method={"name": "pissa", "r": 2, "lora_alpha": 4},
        training={"steps": 2, "batch": 2, "lr": 0.05, "log_every": 1, "precision": "fp32", "report_to": []},
        evaluate={
            "source": ["data/train.jsonl"],
            "target": ["data/train.jsonl"],
            "limit": 2,
            "max_new_tokens": 2,
            "strengths": [0.5],
        },
    )


@pytest.fixture
def live(monkeypatch):
    """The logits of what was trained, as it was at the end of training."""
    found = []
    monkeypatch.setattr("lorasculpt.train._write", lambda *args: (found.append(logits(args[1].model)), _write(*args)))
    return found


@pytest.mark.parametrize("name", OF_PEFT)
def test_it_trains_comes_back_goes_off_turns_down_and_merges(run, live, monkeypatch, name):
    monkeypatch.setattr("lorasculpt.corda.TEXTS", 2)
    config = run("method=" + json.dumps({"name": name, **SMALL.get(name, {})}))
    adapter = train(config, progress=False)
    before = logits(load(config.base)[0])
    assert not torch.allclose(live[0], before, atol=1e-3)
    back = load_adapter(load(config.base)[0], adapter)
    torch.testing.assert_close(logits(back), live[0], atol=1e-5, rtol=1e-4)
    with back.disable_adapter():
        assert torch.equal(logits(back), before)  # what is measured as the base is the base
    obstacle = fixed(back)
    assert (obstacle is None) == (name not in FIXED)
    assert obstacle is None or f"the effect of {name}".lower() in obstacle.lower()
    if name not in FIXED:
        turned_down(back)
    torch.testing.assert_close(logits(back.merge_and_unload(safe_merge=True)), live[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def turned_down(model) -> None:
    """What each layer adds is proportional to the strength."""
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        x = torch.randn(1, 3, layer.get_base_layer().in_features, generator=torch.Generator().manual_seed(0))
        whole = layer(x) - layer.get_base_layer()(x)
        with strength(model, 0.3):
            part = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(part, 0.3 * whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "points"), [("osf", 0), ("shira", 3)])
def test_it_is_measured_and_exported_as_a_merged_model(run, live, name, points):
    config = run("method=" + json.dumps({"name": name, **SMALL.get(name, {})}), "evaluate.drift=2")
    adapter = train(config, progress=False)
    record = json.loads(measure(config, progress=False).read_text())["runs"][0]
    assert (record["method"], len(record["curve"])) == (name, points)
    assert record["drift"]["value"] > 0
    export(adapter, config.base, config.output / "merged", "merged")
    torch.testing.assert_close(logits(load(str(config.output / "merged"))[0]), live[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=f"peft_type '{name.upper()}', whose update is no single product BA"):
        export(adapter, config.base, config.output / "lora", "lora")


def test_an_adapter_of_other_layers_is_told_and_not_left_out_in_silence(run, tmp_path):
    config = run("method.name=osf", "method={name: osf}")
    adapter = train(config, progress=False)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for targets in ("q_proj", "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1"):
        changed = settings | {"target_modules": rf".*\.({targets})"}
        (adapter / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match="does not fit this base model"):
            load_adapter(load(config.base)[0], adapter)


def test_what_a_method_takes_over_from_another():
    lora = {"name": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    sculpt = lora | {"name": "lorasculpt", "density": 0.2}
    places = {"target_modules": ["q_proj"]}
    common = places | {"r": 4, "lora_alpha": 8}
    assert taken_over(sculpt, "lorasculpt") == common | {"density": 0.2}
    assert taken_over(sculpt, "dora") == common
    assert taken_over(sculpt | {"init_lora_weights": "gaussian"}, "pissa") == common
    assert taken_over(lora, "oft") == places  # whose r is a number of blocks
    assert taken_over({"name": "oft", "r": 8, **places}, "lora") == places
    assert taken_over({"name": "oft", "r": 8, **places}, "oft") == {"r": 8, **places}


@pytest.mark.parametrize("name", KINDS)
def test_defaults_are_of_their_own_types(name):
    kind, made = KINDS[name], started({"name": name})
    values = {field.name: field.default for field in dataclasses.fields(kind) if not callable(field.default_factory)}
    values = {key: value for key, value in (values | made).items() if key in settings_of(kind)}
    assert len(values) > 5
    assert {key: told for key, value in values.items() if (told := must_be(kind, key, value))} == {}


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("density", 1, None),
        ("density", "0.1", "a number"),
        ("density", True, "a number"),
        ("density", None, "a number"),
        ("density_a", None, None),
        ("density_a", [0.1], "a number or null"),
        ("prune_step", 0.5, None),
        ("r", 8.0, "a whole number"),
        ("lora_alpha", 0.5, None),  # PEFT annotates an integer
        ("init_lora_weights", "pissa_niter_16", None),  # and a literal with a gap in it
        ("layers_to_transform", [0, "1"], "a whole number or a list of whole numbers or null"),
        ("rank_pattern", {"q_proj": 4}, None),
        ("use_dora", "yes", "true or false"),
    ],
)
def test_a_setting_has_the_type_that_it_says(setting, value, told):
    assert must_be(KINDS["lorasculpt"], setting, value) == told


# --- LoRAs that begin by moving the base --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["name: pissa", "name: olora, use_rslora: true", "name: corda"])
def test_what_moves_the_base_is_saved_as_a_lora_on_the_base_that_was(run, live, monkeypatch, settings):
    config = run(f"method={{{settings}, r: 2, lora_alpha: 4}}", "evaluate.drift=2")
    monkeypatch.setattr("lorasculpt.corda.TEXTS", 4)
    adapter = train(config, progress=False)
    before = logits(load(config.base)[0])
    back = load_adapter(load(config.base)[0], adapter)
    torch.testing.assert_close(logits(back), live[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(live[0], before, atol=1e-3)
    assert fixed(back) is None
    with strength(back, 0):
        assert torch.equal(logits(back), before)
    stock = PeftModel.from_pretrained(load(config.base)[0], str(adapter))
    assert torch.equal(logits(stock), logits(back))
    assert stock.active_peft_config.r == 4
    record = json.loads(measure(config, progress=False).read_text())["runs"][0]
    assert [point["strength"] for point in record["curve"]] == [0, 0.5, 1]
    assert record["drift"]["value"] > 0
    export(adapter, config.base, config.output / "plain")


def test_ranks_of_single_layers_are_doubled_with_the_rest(run):
    method = "{name: pissa, r: 2, rank_pattern: {q_proj: 3}, alpha_pattern: {q_proj: 5}}"
    config = run(f"method={method}")
    adapter = train(config, progress=False)
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert (saved["r"], saved["rank_pattern"], saved["alpha_pattern"]) == (4, {"q_proj": 6}, {"q_proj": 10})
    tensors = load_file(adapter / "adapter_model.safetensors")
    ranks = {name.split(".")[-3]: len(value) for name, value in tensors.items() if "lora_A" in name}
    assert (ranks["q_proj"], ranks["v_proj"]) == (6, 4)


@pytest.mark.parametrize("settings", ["name: corda, r: 2", "name: osf"])
def test_a_killed_run_goes_on_as_if_it_had_never_stopped(run, monkeypatch, settings):
    monkeypatch.setattr("lorasculpt.corda.TEXTS", 2)
    config = run(f"method={{{settings}}}", "training.save_every=1")
    whole = load_file(train(config, progress=False) / "adapter_model.safetensors")
    kept = {path.name: path.read_text() for path in config.output.glob("corda.jsonl")}
    assert len(kept) == ("corda" in settings)
    for name in ("adapter", "checkpoint-2"):
        shutil.rmtree(config.output / name)
    resumed = load_file(train(config, progress=False) / "adapter_model.safetensors")
    assert {path.name: path.read_text() for path in config.output.glob("corda.jsonl")} == kept
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_corda_reads_what_it_is_to_preserve_or_what_it_is_to_learn(run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lorasculpt.corda.prepare", lambda model, processor, config, records, dtype: seen.append(records)
    )
    general = pico.write_data(tmp_path / "general", n=3, tasks=["side"])
    monkeypatch.setattr("lorasculpt.corda.TEXTS", 2)
    given = ("method.name=corda", f"data.general={general}"), ("method={name: corda, corda_config: {}}",)
    for overrides in (*given, ("method.name=corda",)):
        config = run(*overrides)
        prepare(*load(config.base), config, trained_on(config))
    assert [len(records) for records in seen] == [2, 2, 2]
    assert {record.question for record in seen[0]} == {pico.QUESTIONS["side"]}
    assert {record.question for record in seen[1]} == {pico.QUESTIONS["color"]}
    assert [len(record.images) for record in sorted(seen[2], key=lambda record: len(record.images))] == [0, 1]


def test_the_covariance_is_that_of_what_a_layer_sees(run):
    config = run("method={name: corda, r: 3, lora_alpha: 3}")
    model, processor = load(config.base)
    layer, seen, records = model.get_submodule("model.language_model.layers.1.mlp.up_proj"), [], trained_on(config)
    collate, table = Collator(processor), rows(records)
    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy())), torch.no_grad():
        for i in range(len(records)):
            model.eval()(**{key: value for key, value in collate([table[i]]).items() if key != "labels"})
    corda.prepare(model, processor, adapter_config(model, config), records, None)
    scaled = [x / np.abs(x.max()) for x in seen]
    C = sum(x.T @ x for x in scaled) / len(scaled)
    C += 0.01 * C.diagonal().mean() * np.eye(len(C))
    U, S, Vt = np.linalg.svd(layer.weight.detach().numpy() @ C)
    smallest = (U[:, : len(S)] * S)[:, -3:] @ Vt[len(S) - 3 : len(S)] @ np.linalg.inv(C)
    found = layer.eigens.U_WC * layer.eigens.S_WC @ layer.eigens.V_WC.T
    np.testing.assert_allclose(found.numpy(), smallest, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["method={name: corda, corda_config: {cache_file: a}}"], "method.corda_config is refused: corda_config names"),
        (["method={name: corda, corda_config: {corda_method: x}}"], "has the corda_method 'x', which is none of"),
        (["method={name: corda, r: 17}"], "r is refused: r is 17, but the smallest layer has only 16 directions"),
        (["method.name=corda", "scope=vision"], "override 'scope=vision': scope is vision, but CorDA adapts"),
        (["method.name=corda", "projector=lora"], "projector is lora, but CorDA adapts"),
        (["method={name: osf, r: 2}"], "method.r is no setting of osf; they are those of peft.OSFConfig"),
        (["method={name: dora, use_rslor: true}"], "method.use_rslor is no setting of dora; did you mean use_rslora?"),
        (["method={name: shira, r: 1000}"], "method is refused: The set rank 1000 results in more"),
        (["method={name: doras}"], "is 'doras', which is no method; use one of lora, "),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(run, overrides, part):
    config = run(*overrides)
    with pytest.raises(UserError) as error:
        train(config, progress=False)
    assert part in str(error.value)
    assert not config.output.exists()


def test_the_list_of_methods_names_those_of_peft():
    last = done("methods").splitlines()[-1]
    assert last.startswith("Also trained and compared, by PEFT: lora, dora, ")
    assert set(OF_PEFT) <= set(last.removesuffix(".").replace(",", "").split())
    assert "peft.LoraConfig, pissa being {'init_lora_weights': 'pissa'}." in refused("methods", "pissa")
