"""The evidence: the weight that is computed from a run, and the README that quotes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorasculpt.demo.results import _tenth

ROOT = Path(__file__).parents[2]


def test_the_weight_for_a_tenth_scales_with_the_measured_ratio(tmp_path):
    history = [{"loss": 1.0}, {"penalty_ratio": 0.0}, {"penalty_ratio": 2e-4}, {"penalty_ratio": 4e-4}]
    (tmp_path / "training.json").write_text(json.dumps({"history": history}))
    found = _tenth(tmp_path, {"cmr_weight": 1e-3})
    assert found["gradient_ratio"] == pytest.approx(3e-4)
    assert found["weight_for_a_tenth"] == pytest.approx(0.33)


def test_the_readme_quotes_the_results_as_they_are():
    subprocess.run([sys.executable, ROOT / "scripts" / "readme", "--check"], check=True)
