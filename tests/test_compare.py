"""Comparisons: what is run and on what, what is left to do after a stop, and what the runs say together."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pico
import pytest
import torch
import yaml
from commands import call
from safetensors.torch import load_file

from lorasculpt import UserError, compare, posthoc, sequence
from lorasculpt.compare import commands, planned
from lorasculpt.comparison import edits, sequences, single
from lorasculpt.comparison.forecast import ahead, cost
from lorasculpt.comparison.launch import launch
from lorasculpt.comparison.plan import Comparison
from lorasculpt.comparison.runs import RATES
from lorasculpt.comparison.table import equal_target, pareto, show, table
from lorasculpt.config import RunConfig
from lorasculpt.data.batches import Collator
from lorasculpt.evaluation.correlation import drift_and_loss
from lorasculpt.files import write_json
from lorasculpt.measure import shape
from lorasculpt.posthoc.edits import delta_of
from lorasculpt.provenance import versions
from lorasculpt.report.page import report
from lorasculpt.report.results import with_kept
from lorasculpt.report.words import unread
from lorasculpt.run import records
from lorasculpt.run.folder import write_record
from lorasculpt.sequence import transfer
from lorasculpt.train import train

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


# --- the runs -------------------------------------------------------------------------------------------------------


def test_a_stopped_comparison_goes_on(run, tmp_path, monkeypatch):
    config, done = run(), []

    def training(config, **options):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(config)
        return train(config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(single, "train", training)
        with pytest.raises(KeyboardInterrupt):
            compare.compare(config, METHODS, seeds=1, rates=[0.01, 0.001], progress=False)
    path = config.output / "compare.json"
    record = json.loads(path.read_text())
    assert (record["complete"], len(record["runs"]), len(record["table"])) == (False, 1, 1)
    assert [row["complete"] for row in record["table"]] == [True]  # the one seed of lora is there
    assert record["missing"] == ["test/lorasculpt-seed0"]
    trials = [(made.method["name"], made.training.lr) for made in done[:2] + done[3:]]
    assert trials == [("lora", 0.001), ("lora", 0.01), ("lorasculpt", 0.001), ("lorasculpt", 0.01)]
    assert [made.data.validation for made in done] == [0.1, 0.1, None, 0.1, 0.1]

    # what is left can be run from its own commands
    lines = list(commands(Comparison(config, METHODS, 1, [0.001, 0.01])))
    assert len(lines) == 1
    for line in lines:
        for command in line.split(" && "):
            code, _, err = call(*command.split()[1:])
            assert code == 0, err
    options = ("--methods", ",".join(METHODS), "--seeds", "1", "--rates", "1e-3,1e-2", "--out", tmp_path / "all.json")
    monkeypatch.setattr(single, "train", lambda *args, **options: pytest.fail("trained again"))
    code, out, err = call("compare", tmp_path / "run.yaml", *options)
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
    # two questions of the test, of two colours, are asked
    assert {made["target"]["color"]["majority"] for made in record["runs"]} == {lora["target"]["color"]["majority"]}
    assert lora["target"]["color"]["majority"] == 0.5
    assert lora["time"] == {"mean": 1, "low": None, "high": None}
    assert sparse["time"]["mean"] > 0
    assert str(tmp_path) not in (tmp_path / "all.json").read_text()
    assert "lorasculpt" in report(tmp_path / "all.json", tmp_path / "page").read_text()


def test_rows_that_were_changed_make_no_part_of_a_comparison(run, tmp_path, monkeypatch):
    """What is trained on: all anew. What is asked: measured anew, with the adapters that are there."""
    config, options = run(), {"seeds": 1, "rates": [0.01], "progress": False}
    path = compare.compare(config, ["lora"], **options)
    first = json.loads(path.read_text())["runs"][0]
    test, data = tmp_path / "test" / "train.jsonl", tmp_path / "data" / "train.jsonl"
    asked, taught = test.read_text(), data.read_text()
    test.write_text(asked.replace("What", "Which"))
    with monkeypatch.context() as patch:
        patch.setattr("lorasculpt.train.SFTTrainer", lambda **_: pytest.fail("trained again"))
        second = json.loads(compare.compare(config, ["lora"], **options).read_text())["runs"][0]
    assert second["questions"] != first["questions"]
    assert second["data"] == first["data"]
    shutil.rmtree(config.output / "test")
    assert planned(config, ["lora"], 1, [0.01], path).missing() == []
    test.write_text(asked)
    assert planned(config, ["lora"], 1, [0.01], path).missing() == ["test/lora-seed0"]
    compare.compare(config, ["lora"], **options)
    data.write_text(taught.replace("What", "Which"))
    with pytest.raises(UserError, match=r"data has other rows than .*lora-lr0\.01-seed0 was trained on; name another"):
        compare.compare(config, METHODS, **options)


def test_the_results_file_alone_is_enough_to_go_on_from(labelled, tmp_path, capsys, monkeypatch):
    text = "methods: {lora: {}, milder: {of: lora, edit: scale, by: 0.5}}"
    config, options = labelled(text), {"seeds": 1, "rates": [0.01, 0.02]}
    path = compare.compare(config, ["lora"], **options, out=tmp_path / "all.json", progress=False)
    before = json.loads(path.read_text())
    shutil.rmtree(config.output)  # another machine, which has the file alone
    assert len(list(commands(planned(config, ["lora"], 1, [0.01, 0.02])))) == 3
    assert list(commands(planned(config, ["lora"], 1, [0.01, 0.02], path))) == []

    trained, asked = [], []
    monkeypatch.setattr(single, "train", lambda made, **more: (trained.append(made.output.name), train(made, **more)))
    measure = single.measure
    monkeypatch.setattr(
        single, "measure", lambda made, **more: (asked.append(made.output.name), measure(made, **more))[1]
    )
    # the edit needs the adapter, which is trained and not measured again
    lines = list(commands(planned(config, None, 1, [0.01, 0.02], path)))
    name = f"lora-lr{before['rates']['lora']['chosen']:g}-seed0"
    assert [line.split("/")[-1] for line in lines] == [
        f"{name}.yaml",
        "# 1 more runs, of milder, when what they are edits of is there: ask again then.",
    ]
    assert "eval" not in lines[0]
    record = json.loads(compare.compare(config, **options, out=path, progress=False).read_text())
    assert (trained, asked) == ([name], [name.replace("lora", "milder")])
    assert record["complete"]
    assert record["runs"][0] == before["runs"][0]
    assert record["trials"] == before["trials"]
    assert [(trial["seed"], trial["settings"]["training"]["lr"]) for trial in record["trials"]] == [
        (0, 0.01),
        (0, 0.02),
    ]
    assert record["runs"][0]["curve"][1]["source"] == record["runs"][1]["summary"]["source_after"]

    # what the rates were chosen by is another set: only the tests are the same
    shutil.rmtree(config.output)
    validated = labelled(text, f"evaluate.validation={tmp_path / 'data' / 'train.jsonl'}")
    assert len(planned(validated, ["lora"], 1, [0.01, 0.02], path).missing()) == 3
    # nothing is, if more is asked; the trials alone, if the commonest answer of the test is another
    everything = ["validation/lora-lr0.01-seed0", "validation/lora-lr0.02-seed0", "test/lora-seed0"]
    assert planned(labelled(text, "evaluate.limit=3"), ["lora"], 1, [0.01, 0.02], path).missing() == everything
    rows = [json.loads(line) for line in (tmp_path / "test" / "train.jsonl").read_text().splitlines()]
    same = tmp_path / "test" / "same.jsonl"
    same.write_text("".join(json.dumps(row | {"answer": rows[0]["answer"]}) + "\n" for row in rows))
    other = labelled(text, f"evaluate.target=[{same}]")
    assert planned(other, ["lora"], 1, [0.01, 0.02], path).missing() == ["test/lora-seed0"]
    # and all of it is another, if it was trained on other rows
    assert planned(labelled(text, "data.limit=3"), ["lora"], 1, [0.01, 0.02], path).missing() == everything
    learned = tmp_path / "data" / "train.jsonl"
    kept = learned.read_text()
    learned.write_text(kept.replace('"red"', '"crimson"'))
    assert learned.read_text() != kept
    assert planned(labelled(text), ["lora"], 1, [0.01, 0.02], path).missing() == everything
    learned.write_text(kept)
    assert planned(labelled(text), ["lora"], 1, [0.01, 0.02], path).missing() == []
    # other settings are another run, and the file that has the old ones is kept
    compare.compare(labelled(text, "training.steps=1"), ["lora"], seeds=1, rates=[0.01], out=path)
    assert "all.json has 2 runs of another comparison or of other settings, kept in " in capsys.readouterr().out
    assert json.loads((tmp_path / "all.before.json").read_text()) == record
    assert [made["steps"] for made in json.loads(path.read_text())["runs"]] == [1]
    compare.compare(labelled(text, "output=again", "training.steps=2"), ["lora"], seeds=1, rates=[0.01], out=path)
    assert json.loads((tmp_path / "all.before.json").read_text()) == record  # it is not lost to the next one
    assert [made["steps"] for made in json.loads((tmp_path / "all.before-2.json").read_text())["runs"]] == [1]


TRIED = (["lora"], 1, [0.01, 0.02])


def turned(path: Path) -> str:
    """Give each row of a file another question, under the same name; returns what it held."""
    held = path.read_text()
    rows = [json.loads(line) for line in held.splitlines()]
    path.write_text("".join(json.dumps(row | {"question": f"Well? {row['question']}"}) + "\n" for row in rows))
    return held


def test_rates_are_chosen_anew_where_other_questions_choose_them(run, tmp_path):
    first, second = (pico.write_data(tmp_path / name, n=6) for name in ("val", "val2"))
    turned(second)
    chosen_on = f"evaluate.validation=[{first}]"
    path = compare.compare(run(chosen_on), ["lora"], seeds=1, rates=[0.01, 0.02], progress=False)
    assert planned(run(chosen_on), *TRIED, path).missing() == []
    trials = ["validation/lora-lr0.01-seed0", "validation/lora-lr0.02-seed0"]
    for overrides in (
        [f"evaluate.validation=[{second}]"],
        [chosen_on, f"evaluate.validation_source=[{second}]"],
        [chosen_on, "evaluate.limit=6"],
        [chosen_on, "evaluate.max_new_tokens=4"],
        [chosen_on, "evaluate.metric={color: contains}"],
    ):
        for elsewhere in ([], ["output=elsewhere"]):
            assert planned(run(*overrides, *elsewhere), *TRIED, path).missing()[:2] == trials
    for more in ("evaluate.strengths=[0.25]", "evaluate.curve=3", "evaluate.refine=4"):  # which trials do not measure
        assert planned(run(chosen_on, more, "output=elsewhere"), *TRIED, path).missing() == ["test/lora-seed0"]
    held = turned(first)  # corrected under its name
    assert planned(run(chosen_on), *TRIED, path).missing()[:2] == trials
    first.write_text(held)
    before = json.loads(path.read_text())
    compare.compare(run(f"evaluate.validation=[{second}]"), ["lora"], seeds=1, rates=[0.01, 0.02], progress=False)
    after = json.loads(path.read_text())
    told = [[trial["questions"] for trial in record["trials"]] for record in (before, after)]
    assert len(set(told[0])) == len(set(told[1])) == 1
    assert told[0] != told[1]
    assert after["runs"] == before["runs"]


def test_a_strength_is_chosen_anew_where_other_questions_choose_it(run, tmp_path):
    first, second = (pico.write_data(tmp_path / name, n=6) for name in ("val", "val2"))
    turned(second)
    kept = f"evaluate.validation=[{first}]", "evaluate.strengths=[0.5]", "evaluate.retain=0.9"
    path = compare.compare(run(*kept), ["lora"], seeds=1, rates=[0.01], progress=False)
    assert planned(run(*kept), ["lora"], 1, [0.01], path).missing() == []
    other = f"evaluate.validation=[{second}]", *kept[1:]
    for elsewhere in ([], ["output=elsewhere"]):
        assert planned(run(*other, *elsewhere), ["lora"], 1, [0.01], path).missing() == ["test/lora-seed0"]
    turned(first)
    assert planned(run(*kept), ["lora"], 1, [0.01], path).missing() == ["test/lora-seed0"]


def test_general_rows_are_those_of_today(run, tmp_path):
    first, second = (pico.write_data(tmp_path / name, n=n) for name, n in (("general", 6), ("general2", 8)))
    turned(first), turned(second)
    replayed = "methods={replayed: {name: lora, replay: 0.2}, plain: {name: lora}}"
    config = run(replayed, f"data.general={first}")
    path = compare.compare(config, seeds=1, rates=[0.01], progress=False)
    told = {made["label"]: "general" in made for made in json.loads(path.read_text())["runs"]}
    assert told == {"replayed": True, "plain": False}
    assert planned(config, None, 1, [0.01], path).missing() == []
    other = run(replayed, f"data.general={second}", "output=elsewhere")
    assert planned(other, None, 1, [0.01], path).missing() == ["test/replayed-seed0"]
    held = first.read_text()
    first.unlink()  # a finished run does without it, as it does without the training rows
    assert call("train", config.output / "test" / "replayed-lr0.01-seed0.yaml")[0] == 0
    first.write_text(held)
    turned(first)
    with pytest.raises(UserError, match=r"has other rows than .*replayed-lr0.01-seed0 was trained on"):
        planned(config, None, 1, [0.01], path).missing()
    code, _, err = call("train", config.output / "test" / "replayed-lr0.01-seed0.yaml")
    assert code == 2
    assert "data.general has other rows than" in err


def test_rates_are_not_chosen_on_the_test_by_another_name(run, tmp_path):
    test = tmp_path / "test" / "train.jsonl"
    link = tmp_path / "link.jsonl"
    link.symlink_to(test)
    for path in (link, tmp_path / "data" / ".." / "test" / "train.jsonl"):
        with pytest.raises(UserError, match=r"holds a file of evaluate\.target"):
            planned(run(f"evaluate.validation=[{path}]"), ["lora"])
        stage = f"{{name: a, train: {tmp_path / 'data' / 'train.jsonl'}, test: {test}, validation: {path}}}"
        with pytest.raises(UserError, match="is a file that is tested on"):
            planned(run(f"data={{sequence: [{stage}]}}", "evaluate.target=[]"), ["lora"])


def test_a_file_of_another_base_is_told_where_nothing_is_left_to_make(run, tmp_path, pico_folder, capsys):
    path = compare.compare(run(), ["lora"], seeds=1, rates=[0.01])
    name = pico_folder("llava").name
    assert json.loads(path.read_text())["base"] == name
    assert "is of a base called" not in capsys.readouterr().out
    another = tmp_path / "another"
    shutil.copytree(pico_folder("llava"), another)
    for _ in range(2):
        compare.compare(run(f"base={another}", "output=else"), ["lora"], seeds=1, rates=[0.01], out=path)
        assert f"is of a base called {name}, not another: if it is another model" in capsys.readouterr().out


def test_no_seed_goes_beyond_what_there_is(run):
    assert planned(run(f"seed={2**32 - 2}"), ["lora"], 2, [0.01]).missing()
    with pytest.raises(UserError, match=rf"seed is {2**32 - 2}, so the last of the seeds would be {2**32}"):
        planned(run(f"seed={2**32 - 2}"), ["lora"], 3, [0.01])


@pytest.mark.parametrize("by", ["[h_mean]", "{a: 1}"])
def test_a_rate_is_chosen_by_a_word(run, by):
    with pytest.raises(UserError, match=r"methods\.lora\.by must be one of"):
        planned(run(f"methods={{lora: {{by: {by}}}}}"), ["lora"])


def test_a_sequence_is_measured_again_on_other_questions(run, tmp_path):
    """Also one that was stopped on its way: no row of its matrix is of the questions of before."""
    test = pico.write_data(tmp_path / "asked", n=4)
    stages = ", ".join(f"{{name: {task}, train: {tmp_path / 'data' / 'train.jsonl'}, test: {test}}}" for task in "ab")
    overrides = f"data={{sequence: [{stages}]}}", "evaluate.target=[]", "training.lr=0.01"
    config = run(*overrides)
    path = compare.compare(config, ["lora"], seeds=1, progress=False)
    (before,) = json.loads(path.read_text())["sequences"]
    assert planned(config, ["lora"], 1, None, path).missing() == []
    for more in ("limit=4", "max_new_tokens=5", "metric={a: contains}", f"source=[{test}]"):
        other = run(*overrides, f"evaluate.{more}", "output=elsewhere")
        assert planned(other, ["lora"], 1, None, path).missing() == ["test/lora-seed0"]
    other = run(*overrides, "evaluate.strengths=[]", "evaluate.curve=3", "output=elsewhere")  # nothing of a sequence's
    assert planned(other, ["lora"], 1, None, path).missing() == []
    matrix = config.output / "test" / "lora-lr0.01-seed0" / "matrix.json"
    record = json.loads(matrix.read_text())
    turned(test)
    assert planned(config, ["lora"], 1, None, path).missing() == ["test/lora-seed0"]
    for rows in (record["rows"], record["rows"][:2]):
        matrix.write_text(json.dumps(record | {"rows": [row | {"accuracy": [7, 7]} for row in rows]}))
        (after,) = json.loads(compare.compare(config, ["lora"], seeds=1, progress=False).read_text())["sequences"]
        assert after["questions"] != before["questions"]
        assert 7 not in np.array(after["matrix"])
        assert after["data"] == before["data"]


def test_several_processes_make_no_comparison(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a comparison is made by one process; start lorasculpt compare without a laun"):
        compare.compare(run(), ["lora"], seeds=1, rates=[0.01], progress=False)


def test_the_runs_of_another_base_are_not_taken(run, tmp_path):
    path = compare.compare(run(), ["lora"], seeds=1, rates=[0.01], progress=False, out=tmp_path / "all.json")
    record = json.loads(path.read_text())
    record["runs"][0]["summary"]["source_before"] += 0.02
    path.write_text(json.dumps(record))
    shutil.rmtree(run().output)
    with pytest.raises(UserError, match=r"all.json holds runs of another base or other questions: the source was at"):
        compare.compare(run(), ["lora"], seeds=2, rates=[0.01], progress=False, out=path)
    assert json.loads(path.read_text()) == record
    assert (run().output / "test" / "lora-lr0.01-seed1" / "results.json").is_file()  # it is not lost


@pytest.mark.parametrize(
    "content", ["nothing", "[]", "{}", '{"runs": [1], "table": []}', '{"sequences": []}', '{"runs": []}']
)
def test_a_file_that_is_no_comparison_is_not_written_over(run, tmp_path, content):
    path = tmp_path / "notes.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"notes.json is there and is not the file of a comparison of single tasks"):
        compare.compare(run(), ["lora"], seeds=1, rates=[0.01], progress=False, out=path)
    assert path.read_text() == content


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


def test_all_runs_are_measured_on_the_same_texts_of_the_base(run, monkeypatch):
    sampled = []

    def self_prompts(model, processor, n, **options):
        sampled.append(options["path"].is_file())
        return prompts(model, processor, n, **options)

    prompts = records.self_prompts
    monkeypatch.setattr(records, "self_prompts", self_prompts)
    path = compare.compare(run("evaluate.drift=2"), METHODS, seeds=1, rates=[0.01], progress=False)
    assert sampled == [False, True]
    first, second = (found.read_text() for found in path.parent.glob("test/*/drift.jsonl"))
    assert first == second
    assert all(made["drift"]["n"] == 2 for made in json.loads(path.read_text())["runs"])


def test_the_cost_is_told_as_soon_as_a_run_is_done(run, capsys, monkeypatch):
    monkeypatch.setattr(single, "train", lambda config, **options: None)
    monkeypatch.setattr(single, "measure", measured_at(0.5))
    monkeypatch.setattr(compare, "time", SimpleNamespace(monotonic=lambda: 0.0))  # on a busy machine nothing takes 0 s
    compare.compare(run(), METHODS, seeds=2, rates=[0.01, 0.001])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "8 runs are to be made; what they take is told after the first."
    assert out[1] == "validation/lora-lr0.001-seed0 took 0 s; the 7 runs missing take about 0 s."
    assert out[-1] == "test/lorasculpt-lr0.001-seed1 took 0 s; it was the last."

    # what is there tells it before anything is done, and to those who have it done elsewhere
    for label in METHODS:
        shutil.rmtree(run().output / "test" / f"{label}-lr0.001-seed1")
    (run().output / "compare.json").unlink()
    monkeypatch.setattr(compare, "launch", lambda *arguments, done, **options: done())
    compare.compare(run(), METHODS, seeds=2, rates=[0.01, 0.001], cluster="slurm")
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["2 runs are to be made: about 20 s of training, by those that are there."] * 2
    assert out[2] == "test/lora-lr0.001-seed1 took 0 s; the one run that is missing takes about 10 s."


def test_what_is_left_costs_what_runs_of_its_label_did():
    costs = [(("validation", "lora"), 2.0), (("validation", "spider"), 10.0), (("test", "lora"), 4.0)]
    left = [("test", "lora")] * 4 + [("test", "spider"), ("validation", "dora"), ("edit", "dare")]
    # four seeds at 4 s; one as long as spider's trial; one as the mean of trials; one as the mean of all
    seconds = round(16 + 10 + 6 + 16 / 3)
    assert cost("x", 4.0, costs, left) == f"x took 4 s; the 7 runs missing take about {seconds} s."
    assert cost("x", 4.0, costs, left[:1]) == "x took 4 s; the one run that is missing takes about 4 s."
    assert cost("x", 4.0, costs, []) == "x took 4 s; it was the last."
    # all but the edit train
    assert ahead(costs, left) == "7 runs are to be made: about 32 s of training, by those that are there."
    assert ahead([], left[:1]) == "1 run is to be made; what it takes is told when it is done."


class Lines:
    """What ``launch`` needs of a comparison: runs that are shell lines, each after the one before it."""

    def __init__(self, folder, *lines):
        self.config = SimpleNamespace(output=folder)
        self.lines = {f"test/{n}": line for n, line in enumerate(lines)}

    def ready(self):
        left = [name for name in self.lines if not (self.config.output / Path(name).name).exists()]
        return [SimpleNamespace(name=name) for name in left[:1]]

    def left(self):
        return self.ready()

    def command(self, run):
        return self.lines[run.name]


def test_jobs_are_submitted_as_they_become_ready_and_never_twice(tmp_path):
    pytest.importorskip("submitit")
    seen = []
    first = f"command -v python > {tmp_path}/0 && echo x >> {tmp_path}/times"
    lines = Lines(tmp_path, first, f"cp {tmp_path}/0 {tmp_path}/1")
    launch(lines, "local", {"timeout_min": 5}, done=lambda: seen.append(len(lines.ready())), seconds=0.05)
    assert (tmp_path / "1").read_text().strip() == str(Path(sys.executable).parent / "python")
    assert seen == [1, 0]
    assert (tmp_path / "times").read_text() == "x\n"
    assert list(json.loads((tmp_path / "jobs" / "submitted.json").read_text())) == ["test/0", "test/1"]
    launch(lines, "local", {}, done=lambda: pytest.fail("nothing is left"))

    # what ended without a result is told with its log, and begun again when it is asked for again
    broken = Lines(tmp_path / "broken", "echo oh no >&2; exit 3")
    for times in (1, 2):
        with pytest.raises(UserError, match="1 jobs ended without a result; the first is test/0, see ") as told:
            launch(broken, "local", {}, seconds=0.05)
        log = re.search(r"see (\S+)\.$", str(told.value))
        assert log
        assert "oh no" in Path(log[1]).read_text()
        assert len(list((tmp_path / "broken" / "jobs").glob("*_log.err"))) == times


def test_a_job_that_still_runs_is_waited_for(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    lines = Lines(tmp_path, "false")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "submitted.json").write_text('{"test/0": "17"}')
    answers = iter([False, False, True, True])

    def done(self):
        answer = next(answers)
        if answer:
            (tmp_path / "0").touch()
        return answer

    monkeypatch.setattr(submitit.LocalJob, "done", done)
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda *args: pytest.fail("submitted twice"))
    launch(lines, "local", {}, seconds=0)


def test_what_cannot_be_launched_is_told(run, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    run()
    arguments = ("compare", tmp_path / "run.yaml", "--methods", "lora")
    for more, part in {
        ("--launch", "slurm", "--job", "gpus"): "--job is 'gpus'; it must be options of submitit",
        ("--launch", "slurm", "--job", "a={"): "--job is 'a={'; '{' is no value, such as 120 or gpu",
        ("--launch", "slurm", "--job", "a=2020-13-45"): "'2020-13-45' is no value, such as 120 or gpu",
        ("--job", "mem_gb=3"): "--job sets options for the jobs that --launch starts; add --launch slurm",
        ("--launch", "slurm"): "submitit cannot launch on slurm (",
    }.items():
        code, _, err = call(*arguments, *more)
        assert code == 2
        assert part in err
    with pytest.raises(UserError, match=r"Unknown argument 'colour' for executor 'slurm'"):
        launch(Lines(tmp_path), "local", {"slurm_colour": "red"})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'lorasculpt\[slurm\]'"):
        launch(Lines(tmp_path), "slurm", {})


def measured_at(target: float, **fields):
    """A stand-in for ``measure``: ``target`` at a rate of 0.01 and below, a tenth more above it."""

    return measured_by(lambda rate: (0.5, target + (0.1 if rate > 0.01 else 0)), **fields)


def measured_by(scores, **fields):
    """A stand-in for ``measure``: source and target as ``scores`` has them at the run's rate."""

    def measure(config, **options):
        rate = config.training.lr
        made = entry(config.method["name"], *scores(rate), config.seed, lr=rate, **fields)
        made["settings"] = shape(config)
        config.output.mkdir(parents=True, exist_ok=True)
        write_record(config)
        content = {"schema": 1, "versions": versions(), "runs": [made]}
        (config.output / "results.json").write_text(json.dumps(content))
        return config.output / "results.json"

    return measure


def test_rates_are_chosen_on_the_validation_file_and_tests_are_made_on_all_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(single, "train", lambda config, **options: None)
    monkeypatch.setattr(single, "measure", measured_at(0.3))
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


def test_nothing_is_trained_twice(run, tmp_path, monkeypatch):
    """The first test is the trial of its rate, also where that is the trial of another label, to the last bit."""
    trained = []

    def training(config, **options):
        if not (config.output / "adapter").exists():
            trained.append(config.output.name)
        return train(config, **options)

    monkeypatch.setattr(single, "train", training)
    methods = "methods={lora: {}, both: {name: lora, lr: lora, by: h_mean}}"
    config = run(f"evaluate.validation={tmp_path / 'data' / 'train.jsonl'}", methods)
    compare.compare(config, seeds=2, rates=[0.001, 0.01], progress=False)
    comparison = Comparison(config, seeds=2, rates=[0.001, 0.01])
    assert comparison.missing() == []
    lora, both = (comparison.rates_of()[label]["chosen"] for label in ("lora", "both"))
    assert sorted(trained) == sorted(
        {f"lora-lr{rate:g}-seed0" for rate in (0.001, 0.01)}
        | {f"lora-lr{lora:g}-seed1"}
        | ({f"both-lr{both:g}-seed1"} if both != lora else set())
    )
    taken = comparison.tests()[0].config
    again = taken.model_copy(update={"output": tmp_path / "again"})
    train(again, progress=False)
    own, other = (load_file(folder.output / "adapter" / "adapter_model.safetensors") for folder in (taken, again))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert (taken.output / "adapter" / "README.md").read_text().count(taken.output.name) > 0
    assert not (taken.output / ".partial").exists()

    # so it is where runs are made by their commands
    for test in comparison.tests():
        shutil.rmtree(test.config.output)
    (config.output / "compare.json").unlink()
    list(commands(Comparison(config, seeds=2, rates=[0.001, 0.01])))
    there = [test.config.seed for test in comparison.tests() if (test.config.output / "adapter").exists()]
    assert there == [0, 0]
    # but what is measured while it trains is made by training
    every = run(f"evaluate.validation={tmp_path / 'data' / 'train.jsonl'}", "evaluate.every=1", "output=every", methods)
    trained.clear()
    compare.compare(every, ["lora"], seeds=1, rates=[0.001, 0.01], progress=False)
    assert len(trained) == 3


def test_an_edited_adapter_is_taken_by_no_other_run(run):
    """An edit has the settings of what it is of."""
    config = run("methods={lora: {}, milder: {of: lora, edit: scale, by: 0.5}}")
    compare.compare(config, seeds=1, rates=[0.01], progress=False)
    (config.output / "compare.json").unlink()
    lora, milder = (test.config.output for test in Comparison(config, seeds=1, rates=[0.01]).tests())
    shutil.rmtree(lora)
    compare.compare(config, seeds=1, rates=[0.01], progress=False)
    made, edited = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (lora, milder))
    assert made != edited


def test_a_label_may_choose_by_both_numbers_among_the_trials_of_another(run, tmp_path, monkeypatch):
    monkeypatch.setattr(single, "train", lambda config, **options: None)
    monkeypatch.setattr(single, "measure", measured_by({0.001: (0.9, 0.5), 0.01: (0.5, 0.6), 0.02: (0.0, 0.7)}.get))
    known = tmp_path / "test" / "known.jsonl"
    known.write_text((tmp_path / "test" / "train.jsonl").read_text())
    config = run(f"evaluate.validation_source={known}", "methods={both: {name: lora, lr: lora, by: h_mean}}")
    rates = [0.001, 0.01, 0.02]
    comparison = Comparison(config, ["both", "lora"], seeds=1, rates=rates)
    assert {(trial.label, *trial.config.evaluate.source) for trial in comparison.trials()} == {("lora", known)}
    record = json.loads(compare.compare(config, ["both", "lora"], seeds=1, rates=rates, progress=False).read_text())
    assert record["rates"]["lora"]["chosen"] == 0.02
    assert record["rates"]["both"] == {"validation": {}, "chosen": 0.001, "like": "lora", "by": "h_mean"}
    assert {test.config.evaluate.source[0] for test in comparison.tests()} == {*config.evaluate.source}
    # without validation_source that is the source of the test, which the results say
    assert record["validation"] == record["trials"][0]["validation"] == "0.1 of data.train"
    on_the_test = Comparison(run("methods={both: {name: lora, lr: lora, by: h_mean}}"), ["both", "lora"], 1, rates)
    assert on_the_test.record()["validation"].endswith("train, and for h_mean the source of the tests, evaluate.source")


def test_a_strength_is_not_chosen_on_the_test(run, tmp_path, monkeypatch):
    """The tests keep the validation set for it; the trials choose nothing but the rate."""
    monkeypatch.setattr(single, "train", lambda config, **options: None)
    on = {"retain": 0.9, "on": "validation"}
    monkeypatch.setattr(single, "measure", measured_at(0.3, evaluate=None, budget=on))
    validation, known = tmp_path / "test" / "other.jsonl", tmp_path / "known.json"
    validation.write_text((tmp_path / "test" / "train.jsonl").read_text())
    given = (f"evaluate.validation={validation}", "methods={lora: {}}")
    (plain,) = Comparison(run(*given), None, 1, [0.01]).tests()
    assert plain.config.evaluate.validation == []
    config = run(*given, "evaluate.retain=0.9")
    comparison = Comparison(config, None, 1, [0.01, 0.02])
    assert all(trial.config.evaluate.validation == [] for trial in comparison.trials())
    path = compare.compare(config, None, seeds=1, rates=[0.01], out=known, progress=False)
    (test,) = Comparison(config, None, 1, [0.01]).tests()
    assert test.config.evaluate.validation == [validation]
    # one of a results file that chose on the test is another run
    monkeypatch.setattr(single.Questions, "same", lambda *_: True)  # the made-up ones are of no file
    elsewhere = config.model_copy(update={"output": tmp_path / "gone"})
    assert not Comparison(elsewhere, None, 1, [0.01], path).missing()
    record = json.loads(path.read_text())
    del record["runs"][0]["budget"]["on"]
    path.write_text(json.dumps(record))
    assert Comparison(elsewhere, None, 1, [0.01], path).missing() == ["test/lora-seed0"]


def test_without_source_it_goes_by_drift(run, tmp_path, capsys, monkeypatch):
    given = ("evaluate.source=[]", "evaluate.drift=2", "evaluate.strengths=[]")
    path = compare.compare(run(*given), ["lora"], seeds=1, rates=[0.01], progress=False)
    record = json.loads(path.read_text())
    (made,), (row,) = record["runs"], record["table"]
    assert row["kept"]["mean"] == np.exp(-made["drift"]["value"]) < 1
    assert not {"retention", "h_mean", "average", "source_before", "source_after"} & row.keys()
    assert (row["source"], record["pareto"], record["drift"]) == ({}, ["lora"], None)
    show(record)
    shown = capsys.readouterr().out
    assert "Kept: the base's probability of its own texts" in shown
    assert "Pareto front of kept and target: lora." in shown
    page = report(path, tmp_path / "page").with_suffix(".md").read_text()
    assert "of the base's probability of its own texts" in page

    def measure(config, **options):
        config.output.mkdir(parents=True)
        write_record(config)
        found = made | {"settings": shape(config), "seed": config.seed, "evaluate": None}
        write_json(config.output / "results.json", {"schema": 1, "versions": versions(), "runs": [found]})
        assert config.evaluate.drift == 2  # of a trial too, which else would have nothing to tell what is kept by

    monkeypatch.setattr(single, "train", lambda config, **options: None)
    monkeypatch.setattr(single, "measure", measure)
    monkeypatch.setattr(single.Questions, "fingerprint", made["questions"])
    tried = compare.compare(run(*given, "output=tried"), ["lora"], seeds=1, rates=[0.01, 0.02], progress=False)
    record = json.loads(tried.read_text())
    assert [set(trial["scores"]) for trial in record["trials"]] == [{"target_before", "target_after", "kept"}] * 2
    assert record["rates"]["lora"]["chosen"] == 0.01
    # trials that tell what is kept say nothing of a source, and pictures made otherwise are another experiment
    missing = planned(run("output=sourced"), ["lora"], 1, [0.01, 0.02], tried).missing()
    assert [name.partition("/")[0] for name in missing][:2] == ["validation"] * 2
    other = planned(run(*given, "image_processor={do_normalize: false}", "output=other"), ["lora"], 1, [0.01], path)
    assert (planned(run(*given), ["lora"], 1, [0.01], path).missing(), len(other.missing())) == ([], 1)
    # the base is known by its target
    made["summary"]["target_before"] += 0.02
    with pytest.raises(UserError, match="the target was at"):
        compare.compare(run(*given, "output=new"), ["lora"], seeds=2, rates=[0.01], out=path, progress=False)


def test_every_run_says_what_it_was_made_with_and_every_row_whether_all_its_seeds_are_there(run, monkeypatch):
    monkeypatch.setattr(single, "train", lambda config, **options: None)
    monkeypatch.setattr(single, "measure", measured_at(0.5))
    path = compare.compare(run(), METHODS, seeds=2, rates=[0.01], progress=False)
    older, gone = (path.parent / "test" / f"{label}-lr0.01-seed1" / "results.json" for label in METHODS)
    older.write_text(json.dumps(json.loads(older.read_text()) | {"versions": {"torch": "1.0"}}))
    gone.unlink()
    record = Comparison(run(), METHODS, 2, [0.01]).record()
    made = {(entry["label"], entry["seed"]): entry["versions"] for entry in record["runs"]}
    today = versions()
    assert made == {("lora", 0): today, ("lora", 1): {"torch": "1.0"}, ("lorasculpt", 0): today}
    assert {row["label"]: row["complete"] for row in record["table"]} == {"lora": True, "lorasculpt": False}


def test_what_is_measured_may_change_without_training_again(labelled, tmp_path, monkeypatch):
    text = "methods: {lora: {}, milder: {of: lora, edit: scale, by: 0.5}}"
    options = {"seeds": 1, "rates": [0.01, 0.02], "progress": False}
    path = compare.compare(labelled(text), **options, out=tmp_path / "first.json")
    before = json.loads(path.read_text())
    monkeypatch.setattr("lorasculpt.train.SFTTrainer", lambda *_, **__: pytest.fail("trained again"))
    longer = labelled(text, "evaluate.max_new_tokens=2")
    comparison = planned(longer, None, 1, [0.01, 0.02])
    assert len(comparison.missing()) == 4  # both trials, and both tests whose rate is not known
    assert all("train" in line and "eval" in line for line in list(commands(comparison))[:2])
    for evaluate in ("evaluate.max_new_tokens=2", "evaluate.strengths=[0.25]"):
        record = json.loads(compare.compare(labelled(text, evaluate), **options, out=tmp_path / "new.json").read_text())
        assert record["complete"]
        assert [run["seconds"] for run in record["runs"]] == [run["seconds"] for run in before["runs"]]
        key, _, value = evaluate.removeprefix("evaluate.").partition("=")
        assert [run["evaluate"][key] for run in record["runs"]] == [json.loads(value)] * 2
    assert [point["strength"] for point in record["runs"][0]["curve"]] == [0, 0.25, 1]
    both = labelled(text, "evaluate.strengths=[0.25,0.5]")
    record = json.loads(compare.compare(both, **options, out=tmp_path / "again.json").read_text())
    coarser = labelled(text, "evaluate.strengths=[0.5]")  # which the finer curve tells
    assert not planned(coarser, None, 1, [0.01, 0.02]).missing()
    for tries, missing in ((4, 0), (5, 2)):  # of a curve of as many points, and of more
        finest = labelled(text, "evaluate.strengths=[0.5]", f"evaluate.refine={tries}")
        assert len([name for name in planned(finest, None, 1, [0.01, 0.02]).missing() if "test" in name]) == missing
    record["runs"][1]["evaluate"]["refine"] = 1  # the same of a results file whose folders are gone
    (tmp_path / "known.json").write_text(json.dumps(record))
    elsewhere = coarser.model_copy(update={"output": tmp_path / "gone"})
    assert planned(elsewhere, None, 1, [0.01, 0.02], tmp_path / "known.json").missing() == ["test/milder-seed0"]
    compare.compare(labelled(text, "evaluate.strengths=[0.25]"), **options, out=tmp_path / "again.json")
    elsewhere = pico.write_data(tmp_path / "elsewhere", n=4)  # other files are other numbers, however they are asked
    moved = planned(
        labelled(text, "evaluate.strengths=[0.25]", f"evaluate.source=[{elsewhere}]"), None, 1, [0.01, 0.02]
    )
    assert len(moved.missing()) == 4
    retaining = labelled(text, "evaluate.strengths=[0.25]", "evaluate.retain=0.9")  # a strength chosen among others
    assert len(planned(retaining, None, 1, [0.01, 0.02]).missing()) == 4
    with pytest.raises(UserError, match="holds another run"):  # which was measured while it trained, or is to be
        compare.compare(labelled(text, "evaluate.strengths=[0.25]", "evaluate.every=1"), **options)


def test_a_rate_that_breaks_the_weights_is_not_chosen_and_not_tried_again(run, tmp_path, capsys, monkeypatch):
    methods = ("training.steps=6", "methods={lora: {}, twin: {name: lora, lr: lora}}")
    config, options = run(*methods), {"seeds": 1, "rates": [0.01, 1e30]}
    path = compare.compare(config, **options, out=tmp_path / "all.json", progress=False)
    record = json.loads(path.read_text())
    assert record["complete"]
    assert {label: found["chosen"] for label, found in record["rates"].items()} == {"lora": 0.01, "twin": 0.01}
    broken = record["rates"]["lora"]["validation"]["1e+30"]
    assert broken["diverged"][1] == 6
    assert {broken[name] for name in ("source_before", "source_after", "target_after", "h_mean")} == {None}
    show(record)
    assert "lora: at the learning rate 1e+30 the weights came to no numbers by step " in capsys.readouterr().out
    report(path, tmp_path / "page")

    monkeypatch.setattr(single, "train", lambda *args, **options: pytest.fail("trained again"))
    compare.compare(config, **options, out=tmp_path / "other.json", progress=False)
    other = planned(run("method.r=2", *methods), **options)
    assert other.result(next(trial for trial in other.trials() if trial.rate == 1e30)) is None  # another run broke
    shutil.rmtree(config.output)
    assert planned(config, **options, results=path).missing() == []

    monkeypatch.undo()
    config = run("training.steps=6", "methods={lora: {}}")
    path = compare.compare(config, **options | {"rates": [1e29, 1e30]}, progress=False)
    record = json.loads(path.read_text())
    assert (record["missing"], record["rates"]["lora"]["chosen"]) == (["test/lora-seed0"], None)
    show(record)
    assert "lora: no learning rate that was tried so far can be used; a smaller one may." in capsys.readouterr().out
    with pytest.raises(UserError, match="not finite any more"):  # a test is not passed over
        compare.compare(config, seeds=1, rates=[1e30], progress=False)


def test_a_sequence_that_breaks_is_a_trial_that_failed(run, tmp_path):
    file = str(pico.write_data(tmp_path / "validation", n=2))
    train, test = str(tmp_path / "data" / "train.jsonl"), str(tmp_path / "test" / "train.jsonl")
    stages = [{"name": name, "train": train, "test": test, "validation": file} for name in ("a", "b")]
    config = run(
        f"data={json.dumps({'sequence': stages})}", "methods={lora: {}}", "evaluate.target=[]", "training.steps=6"
    )
    record = json.loads(compare.compare(config, seeds=1, rates=[0.01, 1e30], progress=False).read_text())
    assert (record["complete"], record["rates"]["lora"]["chosen"]) == (True, 0.01)
    folder = config.output / "validation" / "lora-lr1e+30-seed0"
    assert sorted(path.name for path in folder.iterdir()) == ["diverged.json", "run.yaml"]
    assert json.loads((folder / "diverged.json").read_text())["task"] == "a"


def test_one_rate_needs_no_validation(run):
    comparison = Comparison(run("data.validation=0.2"), METHODS, 2, [0.1])
    assert comparison.trials() == []
    assert [test.name for test in comparison.tests()] == [
        f"test/{label}-lr0.1-seed{seed}" for seed in (0, 1) for label in METHODS
    ]
    assert {test.config.data.validation for test in comparison.tests()} == {None}


def test_each_method_gets_its_settings_and_what_it_can_take_over(run):
    labels = ["lora", "lorasculpt", "sparser", "dora", "rslora", "pissa", "osf"]
    shared = {"r": 4, "lora_alpha": 8}
    own = {"name": "lorasculpt", **shared, "density": 0.2, "prune_step": 1}
    assert {label: what.method for label, what in Comparison(run(), labels).labels.items()} == {
        "lora": {"name": "lora", **shared},
        "lorasculpt": own,
        "sparser": own | {"density": 0.1},
        "dora": {"name": "dora", "r": 2, "lora_alpha": 8},
        "rslora": {"name": "rslora", **shared},
        "pissa": {"name": "pissa", **shared},
        "osf": {"name": "osf"},
    }


@pytest.mark.parametrize("name", ["dora", "osf"])
def test_what_has_one_strength_is_measured_without_a_curve(run, name):
    path = compare.compare(run(), [name], seeds=1, rates=[0.01], progress=False)
    record = json.loads(path.read_text())
    assert record["runs"][0]["curve"] == []
    assert record["equal_target"] == {"target": None, "against": None, "source": {}, "left_out": [], "coarse": {}}
    assert name in report(path, path.parent / "page").with_suffix(".md").read_text()


def test_sequences_are_compared_at_one_rate(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    files = {task: pico.write_data(tmp_path / task, n=4, tasks=[task]) for task in ("color", "shape")}
    stages = ", ".join(f"{{name: {task}, train: {file}, test: {file}}}" for task, file in files.items())
    overrides = (
        f"data={{sequence: [{stages}]}}",
        *("evaluate.target=[]", "training.lr=0.01", "training.steps=1"),
        "methods={am_lora: {seeds: 1, lr: 1e-3}, lora: {}}",
    )
    config = run(*overrides)
    comparison = planned(config, seeds=2)
    assert [line.rsplit("/", 1)[-1] for line in commands(comparison)] == [
        "am_lora-lr0.001-seed0.yaml",
        "lora-lr0.01-seed0.yaml",
        "lora-lr0.01-seed1.yaml",
    ]
    first, second, *_ = (line.split()[2] for line in commands(comparison))
    assert call("train", first)[0] == 0  # from its own command
    measured, evaluate = [], sequence.evaluate

    def counted(model, *arguments, **options):
        measured.append(type(model).__name__)
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(sequence, "evaluate", counted)
    clock = SimpleNamespace(monotonic=count().__next__)  # a second passes from one look to the next
    monkeypatch.setattr("lorasculpt.run.callbacks.time", clock)
    monkeypatch.setattr("lorasculpt.asked.ask", lambda *_, **__: pytest.fail("the base was asked again"))
    record = json.loads(compare.compare(config, seeds=2, progress=False).read_text())
    assert (record["complete"], record["tasks"]) == (True, ["color", "shape"])
    assert measured == ["PeftModel"] * 4
    entries = {(made["label"], made["seed"]): made for made in record["sequences"]}
    assert list(entries) == [("am_lora", 0), ("lora", 0), ("lora", 1)]
    lora = entries["lora", 0]
    assert len(lora["matrix"]) == len(lora["source"]) == 3
    assert (lora["last"], lora["forward"]) == (transfer(lora["matrix"])["last"], transfer(lora["matrix"])["forward"])
    assert lora["source_after"] == lora["source"][-1]
    assert lora["settings"]["method"] == {"name": "lora", "r": 4, "lora_alpha": 8}
    assert (lora["steps"], lora["lr"], entries["am_lora", 0]["lr"]) == ([1, 1], 0.01, 0.001)
    logs = [json.loads(path.read_text()) for path in sorted(Path(second[:-5]).glob("*/training.json"))]
    assert lora["seconds"] == sum(log["seconds"] for log in logs)
    rows = {row["label"]: row for row in record["table"]}
    assert list(rows) == ["am_lora", "lora"]
    assert rows["am_lora"]["against"]["last"] is None
    # of the seed that both have
    assert rows["am_lora"]["time"]["mean"] == entries["am_lora", 0]["seconds"] / entries["lora", 0]["seconds"]
    code, out, err = call(
        "compare",
        tmp_path / "run.yaml",
        *overrides,
        *("--seeds", "2"),
    )
    assert code == 0, err
    assert "forward" in out
    assert out.count("after shape") == 2


def test_the_rates_of_sequences_are_chosen_by_what_is_left_of_all_tasks_on_their_validation_files(
    run, monkeypatch, tmp_path
):
    files = {
        (task, kind): pico.write_data(tmp_path / kind / task, n=2, tasks=[task])
        for task in ("color", "shape")
        for kind in ("train", "test", "validation")
    }
    other = pico.write_data(tmp_path / "other", n=2)
    stages = [
        {"name": task} | {kind: str(files[task, kind]) for kind in ("train", "test", "validation")}
        for task in ("color", "shape")
    ]
    apart = {"name": "regularized", "penalty": "olora", "weight": 0.5, "r": 2}
    config = run(
        f"data={json.dumps({'sequence': stages})}",
        f"methods={json.dumps({'apart': apart, 'both': apart | {'lr': 'apart', 'by': 'h_mean'}})}",
        *("evaluate.target=[]", "training.steps=1", f"evaluate.validation_source={other}"),
    )
    # of the first trial the mean over stages is better, of the second what it ends with; the source is the other way
    scores = iter(
        [
            *([0.0, 0.0, 0.9], [0.9, 0.9, 0.9], [0.4, 0.4, 0.8]),
            *([0.0, 0.0, 0.9], [0.1, 0.1, 0.2], [0.5, 0.4, 0.1]),
            *([0.0, 0.0, 0.9], [0.2, 0.2, 0.2], [0.3, 0.3, 0.3]),
            *([0.0, 0.0, 0.9], [0.2, 0.2, 0.2], [0.3, 0.3, 0.3]),
        ]
    )
    asked = []

    def answered(model, processor, source, tasks, **options):
        records = [record for task in (*source, *tasks) for record in task.records]
        asked.append({Path(record.where.rpartition(":")[0]) for record in records})
        *each, kept = next(scores)
        return {
            "source": {task.name: {"scores": [kept]} for task in source},
            "target": {task.name: {"value": value} for task, value in zip(tasks, each, strict=True)},
        }

    monkeypatch.setattr(sequence, "evaluate", answered)
    monkeypatch.setattr(sequence, "ask_base", lambda config, *given, **options: answered(*given, **options))
    lines = list(commands(planned(config, seeds=1, rates=[0.001, 0.01])))
    assert [line.rsplit("/", 1)[-1] for line in lines[:2]] == ["apart-lr0.001-seed0.yaml", "apart-lr0.01-seed0.yaml"]
    assert lines[2].startswith("# 2 more runs, of apart, both")
    record = json.loads(compare.compare(config, seeds=1, rates=[0.01, 0.001], progress=False).read_text())
    assert next(scores, None) is None
    assert record["complete"]
    trial, test = ({files["color", kind], files["shape", kind]} for kind in ("validation", "test"))
    assert asked == [trial | {other}] * 6 + [test | {tmp_path / "test" / "train.jsonl"}] * 6
    assert record["rates"] == {
        "apart": {
            "validation": {
                "0.001": {
                    "source_before": 0.9,
                    "source_after": 0.8,
                    "target_after": 0.4,
                    "h_mean": pytest.approx(2 * 0.8 * 0.4 / (0.8 + 0.4)),
                },
                "0.01": {
                    "source_before": 0.9,
                    "source_after": 0.1,
                    "target_after": 0.45,
                    "h_mean": pytest.approx(2 * 0.1 * 0.45 / (0.1 + 0.45)),
                },
            },
            "chosen": 0.01,
        },
        "both": {"validation": {}, "chosen": 0.001, "like": "apart", "by": "h_mean"},
    }
    assert [(made["label"], made["lr"], made["last"]) for made in record["sequences"]] == [
        ("apart", 0.01, 0.3),
        ("both", 0.001, 0.3),
    ]
    adapter = load_file(
        config.output / "test" / "apart-lr0.01-seed0" / "2-shape" / "adapter" / "adapter_model.safetensors"
    )
    assert {len(value) for key, value in adapter.items() if "lora_A" in key} == {4}
    # the file alone is enough to go on from
    written = config.output / "compare.json"
    kept = written.rename(tmp_path / "all.json")
    shutil.rmtree(config.output)
    assert list(commands(planned(config, None, 1, [0.01, 0.001], kept))) == []
    assert planned(config, None, 1, [0.01, 0.001], kept).record() == record
    with pytest.raises(UserError, match=r"all.json is there and is not the file of a comparison of single tasks"):
        Comparison(run(), METHODS, 1, [0.01], kept)


def test_a_sequence_is_validated_whole_and_on_other_files_than_it_is_tested_on(run):
    def data(*validation):
        stages = [{"name": f"{n}", "train": "a", "test": f"test{n}"} for n in range(2)]
        return (
            f"data={json.dumps({'sequence': [stage | more for stage, more in zip(stages, validation, strict=True)]})}"
        )

    with pytest.raises(UserError, match=r"data has a sequence with validation, but none for '1'; give it to all tasks"):
        run(data({"validation": "b"}, {}))
    config = run(data({"validation": "b"}, {"validation": "test0"}))
    with pytest.raises(UserError, match=r"override '.*': data\.sequence\.1\.validation is a file that is tested on"):
        planned(config, ["lora"])
    config = run(data({"validation": "b"}, {"validation": "c"}))
    assert [trial.rate for trial in planned(config, ["lora"]).trials()] == list(RATES)
    assert planned(config, ["lora"], rates=[0.1]).trials() == []
    with pytest.raises(UserError, match="--rates must be one to three"):
        planned(config, ["lora"], rates=[1, 2, 3, 4])


@pytest.mark.parametrize(
    ("methods", "part"),
    [
        ("{lora: {rates: [0.1, 0.2]}}", "methods.lora has no validation set to choose a learning rate on"),
        ("{lora: {}, x: {of: lora, edit: scale, by: 0.5}}", "methods.x.edit is not for a sequence"),
        ("{lora: {}, x: {name: mtl_lora}}", "is mtl_lora, which has to know all tasks at once"),
    ],
)
def test_what_a_sequence_cannot_be_compared_by_is_told(run, methods, part):
    files = "train: test/train.jsonl, test: test/train.jsonl"
    data = f"data={{sequence: [{{name: a, {files}}}, {{name: b, {files}}}]}}"
    with pytest.raises(UserError, match=re.escape(part)):
        planned(run(data, f"methods={methods}"))
    with pytest.raises(UserError, match=r"data\.sequence has no validation set to choose a learning rate on"):
        planned(run(data), ["lora"], rates=[0.1, 0.2])
    with pytest.raises(UserError, match="evaluate must name source"):
        planned(run(data, "evaluate.source=[]"), ["lora"])


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
        (("--methods", "../lora"), (), "'../lora' cannot be compared: it names folders"),
        ((), ("methods={}",), "--methods must name each method once, such as lora,lorasculpt, or the file list"),
        (("--methods", "sparser"), ("methods.sparser.densty=1",), "'methods.sparser.densty=1': method.densty is no"),
        (("--methods", "other"), ("methods.other.name=x",), "'methods.other.name=x': methods.other.name is 'x'"),
        (("--methods", "lora"), ("evaluate.source=[]",), "evaluate must name what to measure"),
        (("--methods", "lora"), ("evaluate.target=[]", "evaluate.drift=2"), "evaluate must name what to measure"),
        (
            ("--methods", "lora"),
            ("evaluate.source=[]", "evaluate.drift=2", "evaluate.validation_source=[test/train.jsonl]"),
            "evaluate.validation_source is like evaluate.source, which is not given; name both.",
        ),
        (
            ("--methods", "lora"),
            ("evaluate.source=[]", "evaluate.drift=2", "projector=full"),
            "projector is full, so there is no drift to measure",
        ),
        (
            (),
            ("evaluate.source=[]", "evaluate.drift=2", "methods={lora: {by: h_mean}}"),
            "methods.lora.by is h_mean, which needs the source; name evaluate.source.",
        ),
        (("--methods", "lora"), ("evaluate.validation=test/train.jsonl",), "rates may not be chosen on it"),
        (("--methods", "lora"), ("output=single",), "which holds a single run"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(run, tmp_path, monkeypatch, options, overrides, part):
    monkeypatch.setattr(single, "train", lambda *args, **options: pytest.fail("trained"))
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "run.yaml").write_text("a run")
    arguments = ("compare", tmp_path / "run.yaml", *overrides, *options)
    code, _, err = call(*arguments)
    assert code == 2
    assert part in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- what a label can say -------------------------------------------------------------------------------------------

EDITED = """
methods:
  milder: {of: lora, edit: scale, by: 0.5}
  lora: {seeds: 2}
  dare: {of: lora, edit: dare, p: 0.5, seeds: 1}
  rank: {of: lora, edit: dare, p: 0.5, by: magnitude, rescale: false, rank: 3, seeds: 1}
  tailor: {of: sparser, edit: tailor, limit: 2}
  pruned: {of: sparser, edit: prune, density: 0.05}
  sparser: {name: lorasculpt, density: 0.1, lr: lora, seeds: 1}
  fast: {name: lora, lr: 0.5, seeds: 3}
"""


@pytest.fixture
def labelled(run, tmp_path):
    """The same run with other ``methods``, from the text of a YAML file in which they come last."""

    def load(text: str, *overrides: str) -> RunConfig:
        settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
        del settings["methods"]
        path = tmp_path / "labels.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False) + text)
        return RunConfig.load(path, overrides)

    return load


def test_labels_without_methods_are_all_and_every_seed_of_all_comes_before_the_next(labelled):
    comparison = Comparison(labelled(EDITED, "seed=7"), seeds=4, rates=[0.1])
    assert list(comparison.labels) == ["milder", "lora", "dare", "rank", "tailor", "pruned", "sparser", "fast"]
    assert [(test.label, test.config.seed) for test in comparison.tests()] == [
        *(("lora", 7), ("sparser", 7), ("fast", 7)),
        *(("milder", 7), ("dare", 7), ("rank", 7), ("tailor", 7), ("pruned", 7)),
        *(("lora", 8), ("fast", 8), ("milder", 8), ("fast", 9)),
    ]
    assert len(comparison.missing()) == 12
    assert {what.seeds for what in Comparison(labelled("methods: {lora: {}}"), seeds=4).labels.values()} == {4}


def test_a_rate_that_is_given_or_taken_from_another_label_costs_no_trials(labelled, monkeypatch):
    monkeypatch.setattr(single, "train", lambda config, **options: None)
    monkeypatch.setattr(single, "measure", measured_at(0.3))
    text = """
methods:
  milder: {of: curve, edit: scale, by: 0.5}
  curve: {name: lorasculpt, density: 0.5, lr: lora}
  lora: {}
  fast: {name: lora, lr: 0.5}
"""
    monkeypatch.setattr(edits, "apply", lambda *arguments: None)
    monkeypatch.setattr(edits, "ready", lambda parent: True)
    comparison = Comparison(labelled(text), seeds=1, rates=[0.01, 0.02])
    assert [(trial.label, trial.rate) for trial in comparison.trials()] == [("lora", 0.01), ("lora", 0.02)]
    assert [test.label for test in comparison.tests()] == ["fast"]
    assert list(commands(comparison))[-1].startswith("# 3 more runs, of milder, curve, lora, when these have chosen")
    path = compare.compare(labelled(text), seeds=1, rates=[0.01, 0.02], progress=False)
    record = json.loads(path.read_text())
    assert {made["label"]: made["settings"]["training"]["lr"] for made in record["runs"]} == {
        "milder": 0.02,
        "curve": 0.02,
        "lora": 0.02,
        "fast": 0.5,
    }
    assert record["rates"]["curve"] == {"validation": {}, "chosen": 0.02, "like": "lora"}
    assert record["rates"]["fast"] == {"validation": {}, "chosen": 0.5}
    assert [row["label"] for row in record["table"]] == ["milder", "curve", "lora", "fast"]
    assert len(record["runs"]) == len(list((path.parent / "test").glob("*.yaml"))) == 4


def test_a_label_has_a_share_of_general_data_of_its_own(labelled, tmp_path):
    text = """
methods:
  none: {name: lora, replay: null}
  some: {name: lora, replay: 0.5}
  lora: {}
  milder: {of: some, edit: scale, by: 0.5}
"""
    known = f"data.general={pico.write_data(tmp_path / 'general', n=4, tasks=['shape'])}"
    for more, shares in (((), [None, 0.5, None, 0.5]), (("data.replay=0.2",), [None, 0.5, 0.2, 0.5])):
        tests = Comparison(labelled(text, known, *more), None, 1, [0.1]).tests()
        assert [test.config.data.replay for test in tests] == shares
    with pytest.raises(UserError, match="is measured and may not be trained on"):
        Comparison(labelled(text, f"data.general={tmp_path / 'test' / 'train.jsonl'}"), None, 1, [0.1])
    measured = f"data.general={tmp_path / 'test' / 'train.jsonl'}"
    for asks in ("{name: regularized, penalty: ewc}", "{name: corda}"):  # of the general data first
        with pytest.raises(UserError, match="is measured and may not be trained on"):
            Comparison(labelled(f"methods: {{lora: {{}}, asks: {asks}}}", measured), None, 1, [0.1])
    Comparison(labelled("methods: {lora: {}}", measured), None, 1, [0.1])


def test_edits_are_runs_of_what_was_trained(labelled, tmp_path, monkeypatch):
    chosen = ["lora", "sparser", "milder", "dare", "rank", "tailor", "pruned"]
    config = labelled(EDITED, "methods.lora.seeds=1", "seed=3")
    path = compare.compare(config, chosen, rates=[0.05], progress=False)
    record = json.loads(path.read_text())
    assert (record["complete"], [row["label"] for row in record["table"]]) == (True, chosen)
    runs = {made["label"]: made for made in record["runs"]}
    assert runs["dare"]["edit"] == {"edit": "dare", "p": 0.5, "by": "random", "rescale": True, "seed": 3}
    assert "edit" not in runs["lora"]
    folders = {test.label: test.config.output for test in Comparison(config, chosen, 3, [0.05]).tests()}
    adapters = {label: posthoc.read(folder / "adapter") for label, folder in folders.items()}
    expected = {
        "milder": posthoc.scale(adapters["lora"], 0.5),
        "dare": posthoc.dare(adapters["lora"], 0.5, seed=3),
        "rank": posthoc.truncate(posthoc.dare(adapters["lora"], 0.5, by="magnitude", rescale=False), 3)[0],
        "pruned": posthoc.prune(adapters["sparser"], 0.05),
    }
    for label, edited in expected.items():
        found = {pair.name: delta_of(pair) for pair in adapters[label].pairs}
        for name, delta in edited.items() if isinstance(edited, posthoc.Update) else deltas(edited):
            torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-6)
    for label, parent in {"milder": "lora", "tailor": "sparser"}.items():
        assert (folders[label] / "training.json").read_bytes() == (folders[parent] / "training.json").read_bytes()
        assert runs[label]["seconds"] == runs[parent]["seconds"]
    # at half of its strength lora is what milder is
    assert runs["lora"]["curve"][1]["source"] == runs["milder"]["summary"]["source_after"]

    # the commands of the edits make the same
    for label in ("milder", "dare", "rank", "tailor", "pruned"):
        shutil.rmtree(folders[label])
    lines = list(commands(Comparison(config, chosen, 3, [0.05])))
    assert len(lines) == 5
    for line in lines:
        for command in line.split(" && "):
            code, _, err = call(*shlex.split(command)[1:])
            assert code == 0, err
    monkeypatch.setattr(single, "train", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(edits.posthoc, "write", lambda *args, **options: pytest.fail("edited again"))
    again = json.loads(compare.compare(config, chosen, rates=[0.05], out=tmp_path / "again.json").read_text())
    assert again == record
    with pytest.raises(UserError, match=r"holds another edit \(see .*posthoc.json\)"):
        Comparison(
            labelled(EDITED, "methods.milder.by=0.4", "methods.lora.seeds=1", "seed=3"), chosen, 3, [0.05]
        ).record()
    # what is there and not measured is not taken for another edit's
    (folders["milder"] / "results.json").unlink()
    with pytest.raises(UserError, match="holds another edit"):
        compare.compare(
            labelled(EDITED, "methods.milder.by=0.4", "methods.lora.seeds=1", "seed=3"), chosen, rates=[0.05]
        )


def deltas(adapter) -> list[tuple[str, torch.Tensor]]:
    return [(pair.name, delta_of(pair)) for pair in adapter.pairs]


def test_edits_wait_for_what_they_edit(labelled):
    lines = list(commands(Comparison(labelled(EDITED), ["milder", "lora", "dare"], 1, [0.1])))
    assert [line.split(" && ")[0].rsplit("/", 1)[-1] for line in lines[:2]] == [
        "lora-lr0.1-seed0.yaml",
        "lora-lr0.1-seed1.yaml",
    ]
    assert lines[2:] == ["# 3 more runs, of milder, dare, when what they are edits of is there: ask again then."]


def test_a_label_with_a_dot_has_a_line_too(labelled, tmp_path):
    config = labelled("methods:\n  lora: {}\n  density-0.1: {name: lora,\n    lr: 0}\n  density-0: {name: lora}\n")
    number = (tmp_path / "labels.yaml").read_text().splitlines().index("    lr: 0}") + 1
    with pytest.raises(UserError, match=rf"labels.yaml:{number}: methods.density-0.1.lr must be a number above 0"):
        Comparison(config)


@pytest.mark.parametrize(
    ("label", "part"),
    [
        ("{name: lora, lr: fast}", "methods.x.lr is 'fast', which is not compared; add it to --methods"),
        ("{name: lora, lr: x}", "methods.x.lr is 'x', which is not compared; name another label"),
        ("{name: lora, lr: y}", "methods.x.lr is 'y', which takes its own from another"),
        ("{name: lora, lr: 0}", "methods.x.lr must be a number above 0 or another label; got 0"),
        ("{name: lora, lr: true}", "methods.x.lr must be a number above 0 or another label; got True"),
        ("{name: lora, seeds: 0}", "methods.x.seeds must be a whole number of at least 1; got 0"),
        ("{name: lora, replay: 1}", "methods.x.replay must be a share between 0 and 1, or null; got 1"),
        ("{name: lora, replay: 0.1}", "methods.x.replay needs general data to take rows from"),
        ("{r: 4}", "methods.x needs the name of a method"),
        ("{of: lora}", "methods.x needs edit: one of scale, prune, dare, tailor"),
        ("{edit: scale, by: 1}", "methods.x needs of: the label whose adapters are edited"),
        ("{of: z, edit: scale, by: 1}", "methods.x.of is 'z', which is not compared"),
        ("{of: [lora], edit: scale, by: 1}", "methods.x.of is ['lora'], which is not compared"),
        ("{of: lora, edit: [scale]}", "methods.x.edit is ['scale'], which is no edit"),
        ("{name: [lora]}", "methods.x.name is ['lora'], which is no method"),
        ("{of: milder, edit: scale, by: 1}", "methods.x.of is 'milder', which is an edit itself"),
        ("{of: dora, edit: scale, by: 1}", "methods.x.of is 'dora', which leaves no plain LoRA"),
        ("{of: mosld, edit: scale, by: 1}", "methods.x.of is 'mosld', which leaves no plain LoRA"),
        ("{of: lora, edit: shrink}", "methods.x.edit is 'shrink', which is no edit; use one of scale, prune"),
        ("{of: lora, edit: scale}", "methods.x needs by, which scale takes"),
        ("{of: lora, edit: scale, by: -1}", "methods.x.by must be greater than or equal to 0; got -1"),
        ("{of: lora, edit: dare, p: 0.5, by: size}", "methods.x.by must be 'random' or 'magnitude'; got 'size'"),
        ("{of: lora, edit: prune, density: 0.5, lr: 1e-3}", "methods.x.lr is no argument of prune; it takes seeds,"),
        ("{of: lora, edit: prune, density: 0.5, seeds: 9}", "methods.x.seeds is 9, but lora, which it edits, has 3"),
    ],
)
def test_a_mistake_in_a_label_is_told_with_its_line(labelled, tmp_path, label, part):
    text = f"""methods:
  lora: {{}}
  dora: {{}}
  mosld: {{}}
  y: {{name: lora, lr: lora}}
  milder: {{of: lora, edit: scale, by: 0.5}}
  x: {label}
"""
    config = labelled(text)
    number = next(n for n, line in enumerate((tmp_path / "labels.yaml").read_text().splitlines(), 1) if "  x: " in line)
    with pytest.raises(UserError, match=re.escape(part)) as told:
        Comparison(config)
    assert str(told.value).startswith(f"{tmp_path / 'labels.yaml'}:{number}: ")


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
    assert (first["seeds"], first["steps"], first["against"]) == ([0, 1, 2], 9, {})
    assert (second["adapter_bytes"], second["lr"]) == (2000, 0.1)
    test = second["against"]["source_after"]
    assert test["n"] == 3
    assert test["difference"] == pytest.approx(0.21)
    assert test["t"] == pytest.approx(0.21 / (0.01 / np.sqrt(3)))
    assert test["p"] < 0.001
    assert second["against"]["target_after"] | {"t": None, "p": None} == second["against"]["target_after"]


def learned(label: str, seed: int, matrix: list[list[float]], source: list[float], seconds: float) -> dict:
    """A made-up sequence of two tasks."""
    fields = {"method": label, "label": label, "seed": seed, "lr": 0.1, "steps": [9, 9], "memory_bytes": 1000}
    fields |= {"memory_of": "cuda", "trainable": 500, "adapter_bytes": 2000, "seconds": seconds}
    ends = {"source_before": source[0], "source_after": source[-1]}
    return fields | {"matrix": matrix, "source": source} | transfer(matrix) | ends


def test_sequences_are_one_row_for_each_label_with_their_mean_matrix():
    base = [0.1, 0.2]
    rows = sequences.table(
        [
            learned("lora", 0, [base, [0.9, 0.1], [0.3, 0.8]], [0.8, 0.5, 0.4], 10),
            learned("lora", 1, [base, [0.7, 0.3], [0.1, 0.6]], [0.8, 0.3, 0.2], 30),
            learned("am_lora", 1, [base, [0.7, 0.2], [0.5, 0.6]], [0.8, 0.7, 0.6], 40),
            learned("am_lora", 0, [base, [0.9, 0.2], [0.5, 0.8]], [0.8, 0.6, 0.7], 60),
        ]
    )
    lora, grown = rows
    assert np.allclose(lora["matrix"], [base, [0.8, 0.2], [0.2, 0.7]])
    assert lora["source"] == pytest.approx([0.8, 0.4, 0.3])
    assert lora["last"]["mean"] == pytest.approx((0.55 + 0.35) / 2)
    assert lora["average"]["mean"] == pytest.approx(((0.9 + 0.55) / 2 + (0.7 + 0.35) / 2) / 2)
    assert lora["backward"]["mean"] == pytest.approx(-0.6)
    assert lora["forward"]["mean"] == pytest.approx(((0.1 - 0.2) + (0.3 - 0.2)) / 2)
    assert lora["source_before"] == {"mean": 0.8, "low": 0.8, "high": 0.8}
    # 60 s for 10 s, and 40 s for 30 s
    assert grown["time"]["mean"] == pytest.approx((60 / 10 + 40 / 30) / 2)
    assert (lora["time"]["mean"], grown["memory"]["mean"], lora["against"]) == (1, 1, {})
    assert grown["against"]["last"]["difference"] == pytest.approx(((0.65 - 0.55) + (0.55 - 0.35)) / 2)  # seed by seed
    assert grown["against"]["source_after"]["difference"] == pytest.approx(((0.7 - 0.4) + (0.6 - 0.2)) / 2)
    assert grown["against"]["source_after"]["t"] == pytest.approx(0.35 / (0.1 / np.sqrt(2) / np.sqrt(2)))


def test_memory_and_drift_are_in_the_table_where_they_are_known():
    process = {"memory_of": "process"}
    runs = [
        entry("lora", 0.4, 0.8, 0, memory_bytes=2000, **process, drift={"value": 0.1, "interval": [0, 1], "n": 4}),
        entry("lora", 0.4, 0.8, 1, memory_bytes=2500, **process, drift={"value": 0.3, "interval": [0, 1], "n": 4}),
        entry("dora", 0.4, 0.8, 0, memory_bytes=3000, **process),
        entry("on a GPU", 0.4, 0.8, 0, memory_bytes=500, memory_of="cuda"),
        entry("unknown", 0.4, 0.8, 0, memory_bytes=None, **process),
        entry("half known", 0.4, 0.8, 0, memory_bytes=1000, **process, drift={"value": 0.1}),
        entry("half known", 0.4, 0.8, 1, memory_bytes=None, **process),
        entry("older", 0.4, 0.8, 0),
    ]
    rows = {row["label"]: row for row in table(runs)}
    assert {label: (row["memory_bytes"], row["memory"]["mean"]) for label, row in rows.items()} == {
        "lora": (2000, 1),
        "dora": (3000, 1.5),
        "on a GPU": (500, None),
        "unknown": (None, None),
        "half known": (None, None),
        "older": (None, None),
    }
    drift = rows["lora"]["drift"]
    assert drift["mean"] == pytest.approx(0.2)
    assert drift["high"] == pytest.approx(0.2 + 12.7062 * 0.1)
    assert {row["drift"]["mean"] for label, row in rows.items() if label != "lora"} == {None}
    (alone,) = table([entry("dora", 0.4, 0.8, 0, memory_bytes=3000, **process)])
    assert alone["memory"]["mean"] is None


def test_memory_is_compared_machine_by_machine():
    def runs(label: str, peaks: tuple[int, ...], machines: tuple[str, ...]) -> list[dict]:
        made = [{"memory_bytes": peak, "machine": machine} for peak, machine in zip(peaks, machines, strict=True)]
        return [entry(label, 0.4, 0.8, seed, memory_of="process", **fields) for seed, fields in enumerate(made)]

    lora = runs("lora", (100, 150, 1000), ("small", "small", "large"))
    dora = runs("dora", (130, 120, 4000), ("small", "small", "large"))
    elsewhere = runs("full", (9,), ("other",))
    found = [row["memory"] for row in table([*lora, *dora, *elsewhere])]
    assert [memory["mean"] for memory in found] == [1, pytest.approx((1.2 + 4) / 2), None]
    assert {memory["low"] for memory in found} == {None}


def test_what_a_method_costs_is_told_seed_by_seed_in_units_of_loras():
    seconds, peaks, ratios = (10.0, 20.0, 30.0), (100, 200, 250), (1.5, 1.6, 1.7)
    lora = [entry("lora", 0.4, 0.8, n, seconds=seconds[n], memory_bytes=peaks[n], memory_of="cuda") for n in range(3)]
    slow = [
        entry("slow", 0.4, 0.8, n, seconds=ratios[n] * seconds[n], memory_bytes=2 * peaks[n], memory_of="cuda")
        for n in (2, 0, 1)
    ]
    other = entry("other", 0.4, 0.8, seed=7, memory_bytes=1, memory_of="cuda")  # of a seed that lora has not
    first, second, third = table([*lora, *slow, other])
    assert first["time"] == first["memory"] == {"mean": 1, "low": 1, "high": 1}
    half = 4.302653 * 0.1 / np.sqrt(3)
    expected = {"mean": 1.6, "low": 1.6 - half, "high": 1.6 + half}
    assert second["time"] == pytest.approx(expected)
    assert second["memory"] == {"mean": 2, "low": 2, "high": 2}
    assert third["time"] == third["memory"] == {"mean": None, "low": None, "high": None}
    # on another machine, or in another precision, neither says anything
    slow[0] |= {"machine": "another", "seconds": 1.0}
    slow[1] |= {"precision": "bf16", "seconds": 1.0}
    _, second = table([*lora, *slow])
    assert (second["time"]["mean"], second["memory"]["mean"]) == (pytest.approx(1.6), 2)  # of seed 1 alone
    assert second["time"]["low"] is None
    _, second = table([run | {"memory_of": "process"} for run in (*lora, *slow[:2])])
    assert second["time"]["mean"] is second["memory"]["mean"] is None
    for run in slow:
        run |= {"machine": None, "precision": None, "seconds": ratios[run["seed"]] * seconds[run["seed"]]}
    # in one process the smallest peak of each counts, and says nothing of another seed
    _, second = table([run | {"memory_of": "process"} for run in (*lora, *slow[:2])])
    assert (second["memory"], second["memory_bytes"]) == ({"mean": 2, "low": None, "high": None}, 200)
    assert second["time"]["high"] > second["time"]["mean"]


def test_without_lora_or_with_one_seed_nothing_is_tested():
    (row,) = table([entry("sparse", 0.5, 0.5)])
    assert (row["time"]["mean"], row["against"]) == (None, {})
    assert row["source_after"] == {"mean": 0.5, "low": None, "high": None}
    _, row = table([entry("lora", 0.4, 0.5), entry("sparse", 0.5, 0.5)])
    assert row["against"]["source_after"] is None


def test_what_the_others_are_held_against_goes_by_the_method(capsys):
    """A label of one's own is as good as the method's name; an edit of it stands for nothing."""

    def labelled(label: str, method: str, **fields) -> list[dict]:
        return [entry(label, 0.4, 0.8, seed, method=method, **fields) for seed in (0, 1)]

    runs = labelled("milder", "lora", edit={"edit": "scale"}, seconds=99.0) + labelled("baseline", "lora")
    runs += labelled("other", "lora", seconds=50.0) + labelled("mine", "lorasculpt", seconds=20.0)
    for run in runs:
        run["curve"] = [{"strength": s, "source": 0.8 - 0.4 * s, "target": 0.8 * s} for s in (0, 1)]
    rows = {row["label"]: row for row in table(runs)}
    assert {label: row["time"]["mean"] for label, row in rows.items()} == {
        "milder": pytest.approx(9.9),
        "baseline": 1,
        "other": 5,
        "mine": 2,
    }
    assert {label for label, row in rows.items() if row["against"]} == {"milder", "other", "mine"}
    assert equal_target(runs)["against"] == "mine"
    # the name itself goes before
    assert table([*runs, *labelled("lora", "lora", seconds=40.0)])[-2]["time"]["mean"] == 0.5

    def shown(runs: list[dict]) -> str:
        about = {"equal_target": equal_target(runs), "pareto": [], "drift": None, "rates": {}, "missing": []}
        show({"runs": runs, "table": table(runs), **about})
        return capsys.readouterr().out

    words = shown(runs)
    assert "against baseline" in words
    assert "time and memory in those of baseline." in words
    words = shown(runs[-2:])
    assert "no label is trained by lora, so nothing is tested against it" in words
    assert not any("parameters" in line and "time" in line for line in words.splitlines())


def test_what_no_other_method_equals_or_beats_in_both_is_on_the_front():
    rows = table([entry("a", 0.5, 0.5), entry("b", 0.5, 0.6), entry("c", 0.7, 0.1), entry("d", 0.6, 0.05)])
    assert pareto(rows) == ["b", "c"]
    assert pareto(table([entry("a", 0.5, 0.5), entry("b", 0.5, 0.5)])) == ["a", "b"]
    assert pareto([]) == []


def on_curve(label: str, seed: int, *points: tuple[float, float, float]) -> dict:
    curve = [dict(zip(("strength", "source", "target"), point, strict=True)) for point in points]
    return {"label": label, "seed": seed, "curve": curve}


def test_sources_are_compared_where_all_methods_have_learned_the_same():
    runs = [
        on_curve("dense", 0, (0, 0.8, 0.0), (0.5, 0.41, 0.59), (0.75, 0.21, 0.63), (1, 0.2, 0.8)),
        on_curve("lorasculpt", 0, (0, 0.8, 0.0), (0.5, 0.7, 0.3), (1, 0.6, 0.6)),
        on_curve("lorasculpt", 1, (0, 0.8, 0.0), (1, 0.5, 0.6)),
        on_curve("dense", 1, (1, 0.1, 0.9), (0, 0.8, 0.0), (0.5, 0.79, 0.7)),  # in any order
        on_curve("dense", 2, (0, 0.8, 0.0), (1, 0.4, 0.6)),
        on_curve("without strength", 0),
    ]
    found = equal_target(runs)
    assert (found["target"], found["against"], found["left_out"]) == (0.6, "lorasculpt", [])
    dense, sparse = found["source"]["dense"], found["source"]["lorasculpt"]
    # a quarter of the way from 0.59 to 0.63; six sevenths of that from 0 to 0.7; the end
    assert (dense["seeds"], sparse["seeds"]) == ([0, 1, 2], [0, 1])
    assert dense["values"] == pytest.approx([0.36, 0.8 - 0.01 * 6 / 7, 0.4])
    assert (dense["mean"], sparse["mean"]) == (pytest.approx(np.mean(dense["values"])), pytest.approx(0.55))
    assert sparse["high"] == pytest.approx(0.55 + 12.7062 * 0.05)
    assert sparse["test"] is None
    assert dense["test"]["n"] == 2
    assert dense["test"]["difference"] == pytest.approx(np.mean([0.36 - 0.6, 0.8 - 0.01 * 6 / 7 - 0.5]))
    assert list(found["source"]) == ["dense", "lorasculpt"]
    assert equal_target(runs[:1])["against"] == "dense"
    nothing = {"target": None, "against": None, "source": {}, "left_out": [], "coarse": {}}
    assert equal_target(runs[-1:]) == nothing
    assert equal_target([on_curve("dense", 0, (0, 0.8, 0.5), (1, 0.4, 0.5))]) == nothing  # where nothing was learned


def test_what_is_kept_by_drift_is_tested_and_compared_as_a_source_is():
    def drifted(label: str, seed: int, drift: float, half: float) -> dict:
        """From a target of 0 by ``half`` at strength 0.5 to 0.8."""
        made = entry(label, 0.4, 0.8, seed)
        made["summary"] |= dict.fromkeys(("source_before", "source_after", "retention", "h_mean", "average"))
        points = ((0, 0.0, 0.0), (0.5, half, 0.5), (1, drift, 0.8))
        curve = [{"strength": s, "drift": d, "drift_interval": [d, d], "target": t} for s, d, t in points]
        return made | {"source": {}, "drift": {"value": drift, "interval": [drift, drift], "n": 2}, "curve": curve}

    runs = [drifted("lora", seed, 1.0, 0.2) for seed in (0, 1)]
    runs += [drifted("lorasculpt", seed, drift, 0.1) for seed, drift in enumerate((0.5, 0.4))]
    told = [with_kept(run) for run in runs]
    lora, sparse = table(told)
    assert lora["kept"]["mean"] == pytest.approx(np.exp(-1))
    assert sparse["against"].keys() == {"kept", "target_after", "gain"}
    assert sparse["against"]["kept"]["difference"] == pytest.approx((np.exp(-0.5) + np.exp(-0.4)) / 2 - np.exp(-1))
    assert pareto([lora, sparse]) == ["lorasculpt"]
    equal = equal_target(told)
    assert "source" not in equal
    assert (equal["target"], equal["against"]) == (0.8, "lorasculpt")
    assert equal["kept"]["lora"]["mean"] == pytest.approx(np.exp(-1))
    assert drift_and_loss(runs) is None


def test_where_no_curve_is_known_at_the_level_nobody_is_compared():
    runs = [on_curve(label, 0, (0, 0.8, 0.1), (1, 0.1, reach)) for label, reach in (("one", 0.9), ("two", 0.8))]
    runs[1]["curve"][-1]["target"] = 0.8
    found = equal_target(runs)
    assert found["source"].keys() <= {"two"}  # whose end it is
    assert found["coarse"]["one"] == [0]


def test_a_label_that_learns_far_less_does_not_set_the_level():
    """The best of whose worst seed counts: 0.8 from 0.25, so that 0.525 is just near enough and 0.52 is not."""
    points = (0, 0.8, 0.25), (0.5, 0.79, 0.5), (0.6, 0.7, 0.55)
    best = [on_curve("best", seed, *points, (1, 0.2, reach)) for seed, reach in enumerate((0.9, 0.8))]
    near = on_curve("near", 0, (0, 0.8, 0.25), (0.5, 0.7, 0.525), (1, 0.1, 0.5))  # learns less when turned up further
    far = [on_curve("far", seed, (0, 0.8, 0.25), (1, 0.7, reach)) for seed, reach in enumerate((0.9, 0.52))]
    idle = on_curve("idle", 0, (0, 0.8, 0.45), (1, 0.8, 0.46))  # more than half of the best, and nothing learned
    found = equal_target([*best, *far, near, idle])
    assert (found["target"], found["left_out"], found["coarse"]) == (0.525, ["far", "idle"], {})
    assert list(found["source"]) == ["best", "near"]
    assert found["source"]["near"]["values"] == [0.7]
    # where the base is above the level already, nothing has to be turned on
    knew = on_curve("knew", 0, (0, 0.8, 0.6), (1, 0.1, 0.8))
    assert equal_target([near, knew])["source"]["knew"]["values"] == [0.8]


def test_a_curve_that_is_hardly_known_at_the_level_is_not_read_there():
    """A straight line through .25 and .75 of one that falls between them would put it where it never was."""
    level = on_curve("lorasculpt", 0, (0, 0.8, 0), (1, 0.7, 0.5))
    points = (0, 0.8, 0.0), (0.25, 0.8, 0.3), (0.75, 0.1, 0.75), (1, 0.0, 0.8)
    steep = [on_curve("steep", 0, *points), on_curve("steep", 1, *points, (0.5, 0.75, 0.45), (0.55, 0.6, 0.51))]
    found = equal_target([level, *steep, on_curve("dare", 0, *points)])
    assert (found["target"], found["left_out"]) == (0.5, [])
    assert found["coarse"] == {"steep": [0], "dare": [0]}
    assert found["source"]["steep"]["seeds"] == [1]
    assert found["source"]["steep"]["values"] == pytest.approx([0.625])
    assert unread(found) == "steep (seed 0), dare"
    exactly = on_curve("dare", 0, *points, (0.5, 0.4, 0.5))  # at a point it was measured
    assert equal_target([level, exactly])["source"]["dare"]["values"] == [0.4]


def test_the_tables_fit_a_terminal_of_80_columns(capsys, monkeypatch):
    """With the project's own results: no row is folded and no number cut."""
    monkeypatch.setenv("COLUMNS", "80")
    record = json.loads((Path(__file__).parents[1] / "results" / "demo.json").read_text())
    show(record)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in record["table"]:
        first, second, *_ = [words for words in lines if words[:1] == [row["label"]]]
        values = [value for value in first[1:] if not value.startswith("±")]
        assert values == [
            f"{100 * row[name]['mean']:.1f}" for name in ("source_after", "target_after", "retention")
        ] + [f"{100 * row[name]['mean']:.1f}" for name in ("gain", "h_mean", "average")]
        assert second[1:3] == [str(len(row["seeds"])), f"{row['lr']:g}"]
        assert second[-3] == f"{row['trainable']:,}"


def test_the_screen_shows_tests_and_rates_at_the_edge(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(single, "train", lambda config, **options: None)
    monkeypatch.setattr(single, "measure", measured_at(0.5))
    path = compare.compare(run(), METHODS, seeds=2, rates=[0.01, 0.02], progress=False)
    record = json.loads(path.read_text())
    record["complete"], record["missing"] = False, ["test/lora-seed2"]
    record["equal_target"] = equal_target(
        [
            on_curve(label, n, (0, 0.8, 0), (1, 0.5 + n * up, 0.5))
            for label, up in (("a", 0.1), ("b", 0.2))
            for n in (0, 1)
        ]
        + [on_curve("weak", 0, (0, 0.8, 0), (1, 0.5, 0.2)), on_curve("steep", 0, (0, 0.8, 0), (1, 0.1, 0.9))]
    )
    record["table"][1]["retention"]["mean"] = None
    record["table"][1]["drift"] = {"mean": 0.0123, "low": 0.0, "high": 0.0246}
    record["table"][1] |= {"memory": {"mean": 1.25, "low": 1.0, "high": 1.5}, "memory_bytes": 10}
    record["table"][1] |= {"time": {"mean": 2.5, "low": 2.25, "high": 2.75}, "trainable": 1234567}
    record["drift"] = {"runs": {"rho": 0.831, "low": 0.412, "high": 0.97, "n": 12}}
    record["drift"]["curve"] = {"rho": None, "low": None, "high": None, "n": 36}
    write_json(path, record)
    show(json.loads(path.read_text()))
    out = capsys.readouterr().out
    assert "against lora" in out
    for words in (
        "0.012 ±0.012",
        "1.25 ±0.25",
        "2.50 ±0.25",
        "1,234,567",
        "0.83 (0.41 to 0.97) over 12 runs, none over 36 points of curves.",
    ):
        assert words in out
    assert "time and memory in those of lora" in out
    assert "lora: of the learning rates the largest did best; a larger one may do better." in out
    for found in record["rates"].values():  # all alike: none did best
        found["validation"] = {rate: {"source_after": 0.5, "target_after": 0.0} for rate in found["validation"]}
    show(record)
    assert "did best" not in capsys.readouterr().out
    assert "Source where all reach the target 50.0, p against a: a 55.0 ±64, b 60.0 ±127 (p 0.500)." in out
    assert "Left out there for gaining less than 50 % of the most that is gained on the target: weak; for curves" in out
    assert "that have no points close enough to this score: steep." in out
    assert "1 run is still missing." in out
    assert report(path, path.parent / "page").with_suffix(".md").read_text().count("still missing") == 1
