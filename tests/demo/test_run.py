"""The demo from end to end on a tiny model, and the table that it ends with."""

from __future__ import annotations

import re
from dataclasses import replace

import made_up
import pico
import pytest
import torch
from commands import done
from trl import SFTTrainer

from lorasculpt import cli
from lorasculpt.demo import run
from lorasculpt.evaluation import comparison
from lorasculpt.report.results import measured
from lorasculpt.report.words import bracket, percent


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a printed table by their row's name."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {first: others for first, *others in cells}


def known(found: dict, name: str) -> str:
    number = measured(found, name)
    return f"{percent(number.value)} {bracket(number)}"


def test_how_long_it_takes_is_told_by_what_the_processor_does(monkeypatch):
    monkeypatch.setattr(run, "computing", lambda: torch.device("cpu"))
    for rate, minutes in ((1e12, 5), (7.5e10, 34)):
        monkeypatch.setattr(run, "cpu_rate", lambda dtype, rate=rate: rate)
        assert run.expected(1.4e14) == f"about {minutes} minutes on this machine"
    monkeypatch.setattr(run, "computing", lambda: torch.device("cuda"))
    assert run.expected(1.4e14) == "some minutes"


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_the_table_has_every_number_with_its_interval(tmp_path, capsys, narrow):
    runs = made_up.two()
    runs[1] |= {"method": "lorasculpt", "drift": {"value": 0.25, "interval": [0.125, 0.5]}}
    cli._summary([made_up.write(tmp_path / run["method"], run) for run in runs])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    found, (lora, sculpted) = rows(shown), runs
    assert found["lora"] == ["lorasculpt"]
    for side, task in (("source", "a_b"), ("source", "c"), ("target", "digits")):
        assert found[task] == [known(lora[side][task], "before"), *(known(run[side][task], "after") for run in runs)]
    for side in ("source", "target"):
        after = [known(run["summary"], f"{side}_after") for run in runs]
        assert found[side.upper()] == [known(lora["summary"], f"{side}_before"), *after]
    for name, word in (("retention", "retention"), ("gain", "gain"), ("h_mean", "H-mean"), ("average", "average")):
        assert found[word] == [known(lora["summary"], name), known(sculpted["summary"], name)]
    assert all("[" in cell for word in ("retention", "gain", "H-mean", "average") for cell in found[word])
    assert found["drift (nats)"] == ["–", "0.250 [0.125, 0.500]"]
    assert found["training time"] == ["1 min 15 s"] * 2
    assert found["adapter size"] == ["1.2 MB"] * 2


def test_the_table_of_a_run_without_source_tasks(tmp_path, capsys, narrow):
    side = {"digits[/b]": made_up.measured(0.1)}  # a name that rich would take for a mark
    measured = comparison({"source": {}, "target": side}, {"source": {}, "target": side})
    record = made_up.run("lora", (0.3, 0.2), 0.6, **made_up.details(0)) | measured
    cli._summary([made_up.write(tmp_path, record)])
    found = rows(capsys.readouterr().out)
    assert found["digits[/b]"][0].startswith("10.0 [")
    assert found["retention"] == ["–"]
    assert "SOURCE" not in found


@pytest.fixture
def tiny(tmp_path, pico_folder, monkeypatch):
    """The demo on the tiny llava, in three steps; the list that is returned gets an entry for each training."""
    monkeypatch.setattr(run.base, "folder", lambda: pico_folder("llava"))
    small = run.Size(limit=4, points=1, during=2, curve=4, refine=1, work=1e9, steps=3)
    monkeypatch.setattr(run, "SIZES", {("digits", False): small, ("digits", True): replace(small, limit=None)})

    def write_data(folder, target, splits):
        for name in (f"{target}_train", f"{target}_test", "source_test"):
            task = "color" if name.startswith("source") else "shape"
            path = pico.write_data(folder / name, 8, (task,))
            text = path.read_text().replace('"images/', f'"{name}/images/')
            (folder / f"{name}.jsonl").write_text(text)

    monkeypatch.setattr(run, "write_data", write_data)
    trained, train = [], SFTTrainer.train
    monkeypatch.setattr(SFTTrainer, "train", lambda self, **settings: trained.append(self) or train(self, **settings))
    return trained


def test_two_runs_a_table_and_a_page_and_a_second_call_trains_nothing(tiny, tmp_path, narrow):
    out = tmp_path / "demo"
    shown = done("demo", "--out", out)
    assert len(tiny) == 2
    for name in ("lora", "lorasculpt"):
        assert (out / name / "adapter" / "adapter_model.safetensors").is_file()
    found = rows(shown)
    assert found["lora"] == ["lorasculpt"]
    assert len(found["color"]) == len(found["shape"]) == 3
    page = (out / "report" / "report.html").read_text()
    assert f"Open {out / 'report' / 'report.html'}" in shown
    assert run.REMARKS["digits"] in shown
    assert all(f">{name}<" in page for name in ("lora", "lorasculpt", "color (source)", "shape (target)"))

    again = run.demo(out)
    assert len(tiny) == 2
    assert again == [out / name / "results.json" for name in ("lora", "lorasculpt")]
    assert run.demo(out, full=True) == [out / f"{name}-full" / "results.json" for name in ("lora", "lorasculpt")]
    assert len(tiny) == 4
    assert (out / "report-full" / "report.html").is_file()
