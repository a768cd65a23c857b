"""The evidence: the weight that is computed from a run, and the README that quotes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorasculpt.compare import Comparison
from lorasculpt.config import RunConfig
from lorasculpt.demo import results, run
from lorasculpt.train import KINDS

ROOT = Path(__file__).parents[2]


def test_the_weight_for_a_tenth_scales_with_the_measured_ratio(tmp_path):
    history = [{"loss": 1.0}, {"penalty_ratio": 0.0}, {"penalty_ratio": 2e-4}, {"penalty_ratio": 4e-4}]
    (tmp_path / "training.json").write_text(json.dumps({"history": history}))
    found = results.tenth(tmp_path, {"cmr_weight": 1e-3})
    assert found["gradient_ratio"] == pytest.approx(3e-4)
    assert found["weight_for_a_tenth"] == pytest.approx(0.33)


@pytest.mark.parametrize("target", ["digits", "flags"])
def test_the_comparison_can_be_made_as_it_is_planned(target, tmp_path, monkeypatch):
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
    comparison = Comparison(RunConfig.load(results.plan(tmp_path, target)), seeds=results.SEEDS, rates=results.RATES)
    assert list(comparison.labels) == list(results.COMPARED)
    assert {label: what.seeds for label, what in comparison.labels.items() if what.seeds != results.SEEDS} == {
        "lora": 5,
        "lorasculpt": 5,
        "lora-careful": 5,
    }
    for label, what in comparison.labels.items():
        settings = {key: value for key, value in what.method.items() if key != "name"}
        KINDS[what.method["name"]](**settings)
        tried = [trial.rate for trial in comparison.trials() if trial.label == label]
        assert tried in ([], list(results.RATES), results.WHOLE)
    first = comparison.next()
    assert first is not None
    assert (first.label, first.rate) == ("lora", min(results.RATES))
    assert [path.name for path in first.config.evaluate.source] == ["source_validation.jsonl"]


def test_the_pages_quote_the_results_as_they_are():
    subprocess.run([sys.executable, ROOT / "scripts" / "results", "--check"], check=True)
