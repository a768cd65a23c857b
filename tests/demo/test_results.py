"""The evidence: the weight that is computed from a run, and the README that quotes it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from commands import done, refused

from lorasculpt.compare import planned
from lorasculpt.comparison.plan import Comparison
from lorasculpt.comparison.table import table
from lorasculpt.config import RunConfig
from lorasculpt.demo import results, run, several
from lorasculpt.kinds import KINDS

ROOT = Path(__file__).parents[2]


def test_the_weight_for_a_tenth_scales_with_the_measured_ratio():
    history = [{"loss": 1.0}, {"penalty_ratio": 0.0}, {"penalty_ratio": 2e-4}, {"penalty_ratio": 4e-4}]
    found = results.tenth(history, {"cmr_weight": 1e-3})
    assert found["gradient_ratio"] == pytest.approx(3e-4)
    assert found["weight_for_a_tenth"] == pytest.approx(0.33)


@pytest.mark.parametrize(("target", "others"), [("digits", False), ("flags", False), ("digits", True)])
def test_the_comparison_can_be_made_as_it_is_planned(target, others, tmp_path, monkeypatch):
    monkeypatch.setattr(run.base, "folder", lambda: tmp_path)
    monkeypatch.setattr(results, "write_data", lambda folder, name: None)
    (tmp_path / "data").mkdir()
    for file in (
        "source_test",
        "source_validation",
        "general",
        *(f"{target}_{s}" for s in ("train", "validation", "test")),
    ):
        row = {"question": f"What is {file}?", "answer": "data", "task": file}
        (tmp_path / "data" / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    config = RunConfig.load(results.plan(tmp_path, target, others=others))
    rates = results.rates_of(target)
    comparison = Comparison(config, seeds=results.SEEDS, rates=rates)
    assert list(comparison.labels) == list(results.OTHERS if others else results.COMPARED)
    assert {label: what.seeds for label, what in comparison.labels.items() if what.seeds != results.SEEDS} == {
        "lora": 5,
        "lorasculpt": 5,
        "lora-careful": 5,
    }
    whole = [0.00006, 0.00015, 0.0006] if target == "flags" else results.WHOLE
    for label, what in comparison.labels.items():
        settings = {key: value for key, value in what.method.items() if key != "name"}
        KINDS[what.method["name"]](**settings)
        tried = [trial.rate for trial in comparison.trials() if trial.label == label]
        assert tried in ([], list(rates), whole)
    first = comparison.next()
    assert first is not None
    assert (first.label, first.rate) == ("lora", min(rates))
    assert [path.name for path in first.config.evaluate.source] == ["source_validation.jsonl"]


@pytest.mark.parametrize("target", ["tasks", "sequence"])
def test_so_can_those_of_several_tasks(target, tmp_path, monkeypatch):
    monkeypatch.setattr(run.base, "folder", lambda: tmp_path)
    (tmp_path / "data").mkdir()
    for file in ("kept", "three_tasks", *(f"{task}_{s}" for task in several.TASKS for s in ("few", "held_out"))):
        row = {"question": f"What is {file}?", "answer": "data", "task": file.removesuffix("_held_out")}
        (tmp_path / "data" / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    config = RunConfig.load(results.plan(tmp_path, target))
    comparison = planned(config, None, 1, results.rates_of(target), tmp_path / "none.json")
    methods = {"tasks": several.TOGETHER, "sequence": several.IN_TURN}[target]
    assert comparison.missing() == [f"test/{label}-seed0" for label in methods]
    assert {run.rate for run in comparison.tests()} == {several.RATE}
    names = {run.label: run.config.method["name"] for run in comparison.tests()}
    assert names["lora"] == "lora"
    assert names.get("mixlora-prompt", "mixlora") == "mixlora"


def test_the_held_out_questions_of_several_tasks_are_no_training_questions():
    found = several.items()
    tested = [item for task in several.TASKS for item in found[f"{task}_held_out"]]
    assert len(found["three_tasks"]) == len(several.TASKS) * several.EACH
    assert len(tested) == len(several.TASKS) * several.HELD_OUT
    assert {item.task for item in found["kept"]} == set(several.KEPT)
    taught, measured = ({item.image for item in some} for some in (found["three_tasks"], [*tested, *found["kept"]]))
    assert not taught & (measured - {None})


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ((), "demo"),
        (("--target", "flags"), "flags"),
        (("--others",), "others"),
        (("--target", "flags", "--others"), "flags-others"),
        (("--target", "tasks"), "tasks"),
        (("--target", "sequence"), "sequence"),
    ],
)
def test_each_comparison_has_a_file_of_its_own(options, file, monkeypatch):
    asked = []
    monkeypatch.setattr(results, "plan", lambda *_, **__: None)
    monkeypatch.setattr(results.RunConfig, "load", lambda _: None)
    monkeypatch.setattr(results, "compare", lambda _, **settings: asked.append(settings["out"]))
    assert f"results: results/{file}.json" in done("demo", "results", *options)
    assert "results: mine.json" in done("demo", "results", "--out", "mine.json", *options)
    assert asked == [Path("results") / f"{file}.json", Path("mine.json")]


def test_what_is_no_target_is_told():
    assert "use one of digits, flags, tasks, sequence" in refused("demo", "results", "--target", "shapes")
    assert "--others works with a target of one task" in refused("demo", "results", "--target", "tasks", "--others")


@pytest.fixture
def page(monkeypatch) -> ModuleType:
    """The script that writes the pages, as a module."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = SourceFileLoader("pages", str(ROOT / "scripts" / "results"))
    module = ModuleType(loader.name)
    module.__file__ = loader.path
    loader.exec_module(module)
    return module


def judged(label: str, seed: int, source: float, target: float) -> dict:
    """A made-up run of a comparison: source from 0.8, target from 0.1, where the commonest answer gets 0.3."""
    ends = {"source_after": source, "target_after": target, "h_mean": 2 * source * target / (source + target)}
    before = {"source_before": 0.8, "target_before": 0.1}
    beside = {"retention": source / 0.8, "gain": target - 0.1, "average": (source + target) / 2}
    return {
        "method": label,
        "label": label,
        "seed": seed,
        "steps": 9,
        "settings": {"training": {"lr": 0.1}},
        "source": {"old": {"before": 0.8, "after": source, "n": 50}},
        "target": {"new": {"before": 0.1, "after": target, "majority": 0.3, "n": 50}},
        "summary": before | ends | beside,
        "seconds": 10.0,
        "adapter_bytes": 2000,
        "trainable": 500,
        "curve": [],
    }


@pytest.mark.parametrize(
    ("lora", "fit"),
    [
        ((0.69, 0.61), True),
        ((0.69, 0.59), False),  # 49 points over the base, 29 over the commonest answer
        ((0.71, 0.61), False),  # 9 points of the source lost
    ],
)
def test_a_claim_about_forgetting_counts_only_where_lora_learned_and_forgot(page, lora, fit):
    source, target = lora
    runs = [judged("lora", seed, source + wobble, target) for seed, wobble in enumerate((0.0, 0.001, -0.001))]
    runs += [judged("lorasculpt", seed, 0.75 + 0.001 * seed, 0.65 + 0.001 * seed) for seed in range(3)]
    found = {"runs": runs, "table": table(runs), "rates": {"lora": {}, "lorasculpt": {}}}
    counts, why = page.counts(found)
    assert counts is fit
    assert f"gained {100 * target - 30:.1f} points on the target" in why
    assert f"lost {80 - 100 * source:.1f} on the source: {'enough' if fit else 'too little'} for" in why
    rows = [line.split(" | ") for line in page.verdicts(found, counts).splitlines()[2:]]
    told = {row[0].strip("| "): row[1] for row in rows}
    forgetting = {told[claim] for claim, _, _, name in page.CLAIMS if name != "target_after" and claim in told}
    assert forgetting == {"holds" if fit else "does not count"}
    assert told["It learns as much as LoRA there, or more"] == "holds"  # says nothing of forgetting


def test_a_claim_whose_pairs_differ_in_precision_is_marked(page):
    runs = [judged(label, seed, 0.7, 0.65) for label in ("lora", "lorasculpt", "l2") for seed in range(2)]
    for one in runs:
        one["precision"] = "bf16" if one["label"] == "l2" and one["seed"] == 1 else "fp32"
    told = page.verdicts({"runs": runs, "rates": {"lora": {}, "lorasculpt": {}, "l2": {}}}, True)
    marked = [line for line in told.splitlines() if line.startswith("|") and page.MIXED in line]
    assert [line.split(" | ")[0] for line in marked] == ["| It is ahead of L2-Reg"]
    assert told.endswith(page.ABOUT_MIXED)
    assert page.ABOUT_MIXED not in page.verdicts({"runs": runs, "rates": {"lora": {}, "lorasculpt": {}}}, True)


def test_a_drift_has_its_interval_and_the_number_of_its_texts(page):
    drift = {"value": 0.5, "interval": [0.4, 0.7], "n": 9}
    runs = [judged("lora", 0, 0.7, 0.65) | {"drift": drift}, judged("l2", 0, 0.7, 0.65)]
    found = {"runs": runs, "table": table(runs)}
    told = page.costs(found).splitlines()[2:]
    assert [line.split(" | ")[1] for line in told] == ["0.50 [0.40, 0.70]", "–"]
    assert page.texts(found).startswith("Drift is of 9 texts that the base wrote")


def test_what_the_pictures_of_a_flag_are_worth_is_told(page):
    told = "160 pictures of 20 flags, each in 8 ways: pictures of a flag stand or fall together"
    assert told in run.REMARKS["flags"]
    assert told in " ".join(page.target_page("flags"))
    assert told not in " ".join(page.target_page("demo"))


def test_one_run_is_told_as_one(page):
    runs = [{"precision": "bf16"}, {"precision": "fp32"}, {"precision": "fp32"}, {}]
    assert page.precisions(runs) == ", 1 run in bf16 and 2 runs in fp32"


def test_the_pages_quote_the_results_as_they_are():
    subprocess.run([sys.executable, ROOT / "scripts" / "results", "--check"], check=True)
