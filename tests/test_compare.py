"""Comparisons: what is run and on what, what is left to do after a stop, and what the runs say together."""

from __future__ import annotations

import json
import sys

import numpy as np
import pico
import pytest
import torch
import yaml
from peft import PeftModel

from lorasculpt import UserError, cli, compare
from lorasculpt.adapters.load import load as load_adapter
from lorasculpt.compare import Comparison, commands, equal_target, pareto, table
from lorasculpt.config import RunConfig
from lorasculpt.data.batches import Collator
from lorasculpt.evaluation.strength import fixed
from lorasculpt.models.load import load
from lorasculpt.report import report
from lorasculpt.train import attach, train

METHODS = ["lora", "lorasculpt"]


@pytest.fixture
def run(tmp_path, pico_folder):
    """Write a run of the tiny llava and return a function that gives its config, changed by ``key=value``."""
    data = pico.write_data(tmp_path / "data", n=8)
    test = pico.write_data(tmp_path / "test", n=4)
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "lorasculpt", "r": 4, "lora_alpha": 8, "density": 0.2, "prune_step": 1},
        "methods": {"sparser": {"name": "lorasculpt", "density": 0.1}, "dora": {"r": 2}},
        "data": {"train": str(data)},
        "training": {"steps": 2, "batch": 2, "log_every": 1, "precision": "fp32", "report_to": []},
        "evaluate": {"source": [str(test)], "target": [str(test)], "limit": 2, "max_new_tokens": 1, "strengths": [0.5]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return lambda *overrides: RunConfig.load(path, overrides)


def words(*arguments, capsys, monkeypatch) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command line."""
    monkeypatch.setattr(sys, "argv", ["lorasculpt", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


# --- the runs -------------------------------------------------------------------------------------------------------


def test_a_stopped_comparison_goes_on(run, tmp_path, capsys, monkeypatch):
    config, done = run(), []

    def training(config, **options):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(config)
        return train(config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "train", training)
        with pytest.raises(KeyboardInterrupt):
            compare.compare(config, METHODS, seeds=1, rates=[0.01, 0.001], progress=False)
    trials, path = list(done), config.output / "compare.json"
    record = json.loads(path.read_text())
    assert (record["complete"], record["runs"], record["table"]) == (False, [], [])
    assert record["missing"] == ["test/lora-seed0", "test/lorasculpt-seed0"]
    assert [(made.method["name"], made.training.lr) for made in trials] == [
        ("lora", 0.001),
        ("lorasculpt", 0.001),
        ("lora", 0.01),
        ("lorasculpt", 0.01),
    ]
    assert all(made.data.validation == 0.1 for made in trials)

    # what is left can be run from its own commands
    lines = list(commands(Comparison(config, METHODS, 1, [0.001, 0.01])))
    assert len(lines) == 2
    for line in lines:
        for command in line.split(" && "):
            code, _, err = words(*command.split()[1:], capsys=capsys, monkeypatch=monkeypatch)
            assert code == 0, err
    options = ("--methods", ",".join(METHODS), "--seeds", "1", "--rates", "1e-3,1e-2", "--out", tmp_path / "all.json")
    monkeypatch.setattr(compare, "train", lambda *args, **options: pytest.fail("trained again"))
    code, out, err = words("compare", tmp_path / "run.yaml", *options, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, err
    assert "Pareto front" in out
    assert "still missing" not in out
    record = json.loads((tmp_path / "all.json").read_text())
    assert (record["complete"], record["missing"]) == (True, [])
    assert record["validation"] == "0.1 of data.train"
    assert list(record["rates"]) == METHODS
    assert all(list(found["validation"]) == ["0.001", "0.01"] for found in record["rates"].values())
    assert [(made["label"], made["seed"], made["steps"]) for made in record["runs"]] == [
        ("lora", 0, 2),
        ("lorasculpt", 0, 2),
    ]
    assert [point["strength"] for point in record["runs"][0]["curve"]] == [0, 0.5, 1]
    lora, sparse = record["table"]
    assert lora["trainable"] == sparse["trainable"] > 0
    assert lora["source"]["color"]["n"] == 2
    assert lora["time"] == 1
    assert sparse["time"] > 0
    assert str(tmp_path) not in (tmp_path / "all.json").read_text()
    assert "lorasculpt" in report(tmp_path / "all.json", tmp_path / "page").read_text()


def test_every_method_sees_the_same_rows_in_the_same_order_and_never_those_set_aside(run, monkeypatch):
    seen: list[str] = []

    def call(self, found):
        seen.extend(row["images"][0] for row in found)
        return collate(self, found)

    collate, orders = Collator.__call__, []
    monkeypatch.setattr(Collator, "__call__", call)
    # loramoe draws more random numbers than lora does before the first batch
    for trial in Comparison(run("training.steps=4"), ["lora", "loramoe"], 1, [0.1, 0.2]).trials()[:2]:
        train(trial.config, progress=False)
        orders.append(seen.copy())
        seen.clear()
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == 7


def test_the_cost_is_told_as_soon_as_a_run_is_done(run, capsys, monkeypatch):
    monkeypatch.setattr(compare, "train", lambda config, **options: None)
    monkeypatch.setattr(compare, "measure", measured_at(0.5))
    compare.compare(run(), METHODS, seeds=2, rates=[0.01, 0.001])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "validation/lora-lr0.001-seed0 took 0 s; the 7 runs missing take about 0 s."
    assert out[-1] == "test/lorasculpt-lr0.001-seed1 took 0 s; it was the last."


def measured_at(target: float, **fields):
    """A stand-in for ``measure``: ``target`` at a rate of 0.01 and below, a tenth more above it."""

    def measure(config, before=None, **options):
        after = target + (0.1 if config.training.lr > 0.01 else 0)
        made = entry(config.method["name"], 0.5, after, config.seed, lr=config.training.lr, **fields)
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "run.yaml").write_text(config.to_yaml())
        content = {"schema": 1, "versions": compare.versions(), "runs": [made]}
        (config.output / "results.json").write_text(json.dumps(content))
        return config.output / "results.json", {}

    return measure


def test_rates_are_chosen_on_the_validation_file_and_tests_are_made_on_all_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "train", lambda config, **options: None)
    monkeypatch.setattr(compare, "measure", measured_at(0.3))
    validation = tmp_path / "data" / "train.jsonl"
    config = run(f"evaluate.validation={validation}", "seed=5", "evaluate.every=1")
    comparison = Comparison(config, ["lora"], seeds=2, rates=[0.01, 0.001, 0.02])
    assert [trial.config.evaluate.target for trial in comparison.trials()] == [[validation]] * 3
    assert {trial.config.data.validation for trial in comparison.trials()} == {None}
    assert {trial.config.evaluate.every for trial in comparison.trials()} == {None}
    assert comparison.tests() == []
    assert len(list(commands(comparison))) == 4
    assert list(commands(comparison))[-1].startswith("# 2 more runs, of lora, when these have chosen")
    compare.compare(config, ["lora"], seeds=2, rates=[0.01, 0.001, 0.02], progress=False)
    assert comparison.rates_of()["lora"]["chosen"] == 0.02
    for test, seed in zip(comparison.tests(), (5, 6), strict=True):
        assert test.config == RunConfig.load(test.config.output / "run.yaml")
        assert test.config == RunConfig.load(test.write())
        assert test.config.seed == seed
        assert test.config.training.lr == 0.02
        assert test.config.evaluate.target == config.evaluate.target
        assert test.config.evaluate.every == 1
    # a changed file is another comparison
    with pytest.raises(UserError, match="holds another run"):
        compare.compare(run("seed=5", "training.steps=3"), ["lora"], seeds=2, rates=[0.02], progress=False)


def test_one_rate_needs_no_validation(run):
    comparison = Comparison(run("data.validation=0.2"), METHODS, 2, [0.1])
    assert comparison.trials() == []
    assert [test.name for test in comparison.tests()] == [
        f"test/{label}-lr0.1-seed{seed}" for seed in (0, 1) for label in METHODS
    ]
    assert {test.config.data.validation for test in comparison.tests()} == {None}


def test_each_method_gets_its_settings_and_what_it_can_take_over(run):
    labels = ["lora", "lorasculpt", "sparser", "dora", "rslora", "pissa", "olora"]
    shared = {"r": 4, "lora_alpha": 8}
    own = {"name": "lorasculpt", **shared, "density": 0.2, "prune_step": 1}
    assert Comparison(run(), labels).methods == {
        "lora": {"name": "lora", **shared},
        "lorasculpt": own,
        "sparser": own | {"density": 0.1},
        "dora": {"name": "lora", "r": 2, "lora_alpha": 8, "use_dora": True},
        "rslora": {"name": "lora", **shared, "use_rslora": True},
        "pissa": {"name": "lora", **shared, "init_lora_weights": "pissa"},
        "olora": {"name": "lora", **shared, "init_lora_weights": "olora"},
    }


@pytest.mark.parametrize("name", compare.VARIANTS)
def test_variants_come_back_as_they_were_saved(run, tmp_path, name):
    config = Comparison(run(), [name], 1, [0.1]).tests()[0].config
    model = attach(load(config.base)[0], config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        logits = model(input_ids=torch.arange(4, 20)[None]).logits
    model.save_pretrained(tmp_path / "adapter")
    back = load_adapter(load(config.base)[0], tmp_path / "adapter").eval()
    assert isinstance(back, PeftModel)
    with torch.no_grad():
        found = back(input_ids=torch.arange(4, 20)[None]).logits
        base = load(config.base)[0].eval()(input_ids=torch.arange(4, 20)[None]).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, base, atol=1e-3)
    assert (fixed(back) is None) == (name == "rslora")


@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_what_has_one_strength_is_measured_without_a_curve(run, name):
    path = compare.compare(run(), [name], seeds=1, rates=[0.01], progress=False)
    record = json.loads(path.read_text())
    assert record["runs"][0]["curve"] == []
    assert record["equal_target"] == {"target": None, "source": {}}
    assert name in report(path, path.parent / "page").with_suffix(".md").read_text()


def test_a_setting_that_is_refused_later_is_placed_where_it_was_written(run):
    with pytest.raises(UserError, match=r"override 'methods.sparser.density=5': method.density is refused"):
        compare.compare(run("methods.sparser.density=5"), ["sparser"], rates=[0.1], progress=False)


@pytest.mark.parametrize(
    ("options", "overrides", "part"),
    [
        (("--methods", "lora,sculpt"), (), "--methods: 'sculpt' is no method; use some of lora,"),
        (("--methods", "lora,lora"), (), "--methods must name each method once"),
        (("--methods", "lora", "--rates", "1e-4,fast"), (), "--rates is '1e-4,fast'; it must be numbers"),
        (("--methods", "lora", "--rates", "1,2,3,4"), (), "--rates must be one to three"),
        (("--methods", "lora", "--rates", "-1"), (), "--rates must be numbers above 0"),
        (("--methods", "lora", "--seeds", "0"), (), "--seeds must be at least 1"),
        (("--methods", "sparser"), ("methods.sparser.densty=1",), "'methods.sparser.densty=1': method.densty is no"),
        (("--methods", "other"), ("methods.other.name=x",), "'methods.other.name=x': methods.other.name is 'x'"),
        (("--methods", "lora"), ("evaluate.source=[]",), "evaluate must name what to measure"),
        (("--methods", "lora"), ("evaluate.validation=test/train.jsonl",), "rates may not be chosen on it"),
        (("--methods", "lora"), ("output=single",), "which holds a single run"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(run, tmp_path, capsys, monkeypatch, options, overrides, part):
    monkeypatch.setattr(compare, "train", lambda *args, **options: pytest.fail("trained"))
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "run.yaml").write_text("a run")
    arguments = ("compare", tmp_path / "run.yaml", *overrides, *options)
    code, _, err = words(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- what they say --------------------------------------------------------------------------------------------------


def entry(label: str, source: float | None, target: float, seed: int = 0, *, lr: float = 0.1, **fields) -> dict:
    """A made-up run: source from 0.8, target from 0."""
    after = {"source_after": source, "target_after": target, "retention": source / 0.8, "gain": target}
    summary = {"source_before": 0.8, "target_before": 0.0, "h_mean": 2 * source * target / (source + target), **after}
    summary["average"] = (source + target) / 2
    task = {"before": 0.8, "before_interval": [0.7, 0.9], "after_interval": [0.1, 0.9], "n": 50}
    return {
        "method": label,
        "label": label,
        "seed": seed,
        "steps": 9,
        "settings": {"training": {"lr": lr}},
        "source": {"old": task | {"after": source}},
        "target": {"new": task | {"after": target, "before": 0.0}},
        "summary": summary,
        "seconds": 10.0,
        "adapter_bytes": 2000,
        "trainable": 500,
        "curve": [],
    } | fields


def test_the_table_is_made_of_means_over_seeds_and_of_pairs():
    lora = [entry("lora", source, 0.8, seed) for seed, source in enumerate((0.3, 0.4, 0.5))]
    sparse = [entry("sparse", source, 0.7, seed, seconds=15.0) for seed, source in ((2, 0.72), (0, 0.5), (1, 0.61))]
    first, second = table([*lora, *sparse])
    assert first["source_after"]["mean"] == pytest.approx(0.4)
    assert first["source_after"]["high"] == pytest.approx(0.4 + 4.302653 * 0.1 / np.sqrt(3))
    assert first["source"]["old"]["mean"] == pytest.approx(0.4)
    assert first["target_before"]["low"] == first["target_before"]["high"] == 0
    assert (first["seeds"], first["steps"], first["time"], first["against"]) == ([0, 1, 2], 9, 1, {})
    assert (second["time"], second["adapter_bytes"], second["lr"]) == (1.5, 2000, 0.1)
    test = second["against"]["source_after"]
    assert test["n"] == 3
    assert test["difference"] == pytest.approx(0.21)
    assert test["t"] == pytest.approx(0.21 / (0.01 / np.sqrt(3)))
    assert test["p"] < 0.001
    assert second["against"]["target_after"] | {"t": None, "p": None} == second["against"]["target_after"]


def test_without_lora_or_with_one_seed_nothing_is_tested():
    (row,) = table([entry("sparse", 0.5, 0.5)])
    assert (row["time"], row["against"]) == (None, {})
    assert row["source_after"] == {"mean": 0.5, "low": None, "high": None}
    _, row = table([entry("lora", 0.4, 0.5), entry("sparse", 0.5, 0.5)])
    assert row["against"]["source_after"] is None


def test_what_no_other_method_equals_or_beats_in_both_is_on_the_front():
    rows = table([entry("a", 0.5, 0.5), entry("b", 0.5, 0.6), entry("c", 0.7, 0.1), entry("d", 0.6, 0.05)])
    assert pareto(rows) == ["b", "c"]
    assert pareto(table([entry("a", 0.5, 0.5), entry("b", 0.5, 0.5)])) == ["a", "b"]
    assert pareto([]) == []


def on_curve(method: str, *points: tuple[float, float, float]) -> dict:
    return {
        "method": method,
        "curve": [dict(zip(("strength", "source", "target"), point, strict=True)) for point in points],
    }


def test_sources_are_compared_where_all_methods_have_learned_the_same():
    found = equal_target(
        [
            on_curve("dense", (0, 0.8, 0.0), (0.5, 0.6, 0.4), (1, 0.2, 0.8)),
            on_curve("sparse", (0, 0.8, 0.0), (0.5, 0.7, 0.3), (1, 0.6, 0.6)),
            on_curve("sparse", (0, 0.8, 0.0), (1, 0.5, 0.6)),
            on_curve("without strength"),
        ]
    )
    assert found["target"] == 0.6
    assert found["source"]["dense"] == pytest.approx(0.4)
    assert found["source"]["sparse"] == pytest.approx(0.55)
    assert "without strength" not in found["source"]
    assert equal_target([on_curve("without strength")]) == {"target": None, "source": {}}


def test_the_screen_shows_tests_and_rates_at_the_edge(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(compare, "train", lambda config, **options: None)
    monkeypatch.setattr(compare, "measure", measured_at(0.5))
    path = compare.compare(run(), METHODS, seeds=2, rates=[0.01, 0.02], progress=False)
    record = json.loads(path.read_text())
    record["complete"], record["missing"] = False, ["test/lora-seed2"]
    record["table"][1]["retention"]["mean"] = None
    compare.write(path, record)
    compare.show(path)
    out = capsys.readouterr().out
    assert "against lora" in out
    assert "lora: of the learning rates the largest did best; a larger one may do better." in out
    assert "1 runs are still missing." in out
    assert report(path, path.parent / "page").with_suffix(".md").read_text().count("still missing") == 1
