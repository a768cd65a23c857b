"""A base is asked a question once by all the runs beside one another, and again where anything may be otherwise."""

from __future__ import annotations

import json
import os
import shutil

import pico
import pytest
from commands import done, refused
from PIL import Image

from lorasculpt import asked, provenance
from lorasculpt.measure import measure
from lorasculpt.sequence import learn
from lorasculpt.train import train

TASKS = ("color", "shape")


@pytest.fixture
def run(a_run, tmp_path, pico_folder):
    """A run of a base of its own, which may be touched."""
    files = {task: str(pico.write_data(tmp_path / task, n=4, tasks=[task])) for task in TASKS}
    return a_run(
        base=str(shutil.copytree(pico_folder("llava"), tmp_path / "base")),
        output="one",
        method={"name": "lora", "r": 4, "lora_alpha": 8},
        data={"train": files["shape"]},
        training={"steps": 2, "batch": 2, "lr": 0.05, "precision": "fp32", "report_to": []},
        evaluate={"source": [files["color"]], "target": [files["shape"]], "max_new_tokens": 2, "strengths": []},
    )


@pytest.fixture
def questions(monkeypatch):
    """The tasks that a base was asked, one after the other."""
    names: list[str] = []
    real = asked.ask
    monkeypatch.setattr(
        asked, "ask", lambda *given, **more: (names.extend(task.name for task in given[2]), real(*given, **more))[1]
    )
    return names


def found(config):
    (one,) = json.loads(measure(config, progress=False).read_text())["runs"]
    return one


def test_a_run_beside_it_takes_the_answers_and_says_so(run, tmp_path, questions):
    one, two = run(), run("output=two", "training.lr=0.01")
    train(one, progress=False)
    train(two, progress=False)
    first = found(one)
    assert questions == ["color", "shape"]
    told = done("eval", tmp_path / "run.yaml", "output=two", "training.lr=0.01")
    assert f"base: 8 answers were given before, see {one.output / 'base-answers.json'}" in told
    assert questions == ["color", "shape"]
    (second,) = json.loads((two.output / "results.json").read_text())["runs"]
    for side in ("source", "target"):
        for task, numbers in first[side].items():
            assert {key: numbers[key] for key in ("before", "before_interval", "n")}.items() <= second[side][
                task
            ].items()
    bases = [[(shown["question"], shown["base"]) for shown in each["gallery"]] for each in (first, second)]
    assert bases[0] == bases[1]
    shutil.rmtree(one.output)  # which needs nobody: each has the answers for itself
    found(two)
    assert questions == ["color", "shape"]


def test_what_may_be_answered_otherwise_is_asked_again(run, tmp_path, questions, monkeypatch):
    config = run()
    train(config, progress=False)
    found(config)
    del questions[:]
    path = tmp_path / "color" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    choices = sorted({row["answer"] for row in rows})
    path.write_text("".join(json.dumps(row | {"choices": choices}) + "\n" for row in rows))

    for changed in ("evaluate.max_new_tokens=3", "evaluate.limit=3", "training.precision=bf16"):
        train(other := run("output=other", changed), progress=False)
        found(other)
        shutil.rmtree(other.output)
        assert questions == ["color", "shape"], changed
        del questions[:]
    found(run("evaluate.metric={color: choice}"))
    assert questions == ["color"]
    del questions[:]
    found(run("evaluate.metric={color: choice}", "evaluate.max_new_tokens=3"))
    assert questions == ["shape"]  # the other picks one of its choices, however long
    del questions[:]

    found(run())
    assert questions == ["color", "shape"]  # of its own answers a run keeps the last
    del questions[:]
    picture = next((tmp_path / "shape").rglob("*.png"))
    Image.new("RGB", (30, 30), "white").save(picture)
    found(run())
    assert questions == ["shape"]
    del questions[:]

    weights = tmp_path / "base" / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    found(run())
    assert questions == ["color", "shape"]
    del questions[:]
    monkeypatch.setattr(asked, "machine", lambda device: f"not {provenance.machine(device)}")
    found(run())
    assert questions == ["color", "shape"]


def test_a_corrected_answer_counts_without_asking(run, tmp_path, questions):
    config = run()
    train(config, progress=False)
    before = found(config)
    said = json.loads((config.output / "base-answers.json").read_text())["answered"]
    answers = {one["task"]: one["answers"] for one in said.values()}
    path = tmp_path / "color" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    right = [row | {"answer": answer or "-", "choices": []} for row, answer in zip(rows, answers["color"], strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in right))
    after = found(config)
    assert questions == ["color", "shape"]
    assert before["source"]["color"]["before"] < 1
    assert after["source"]["color"]["before"] == sum(map(bool, answers["color"])) / len(rows)


def test_a_base_that_nobody_can_tell_is_asked_every_time(run, questions, monkeypatch):
    config = run()
    train(config, progress=False)
    monkeypatch.setattr(asked, "_weights", lambda base, model: None)
    found(config)
    found(config)
    assert questions == ["color", "shape"] * 2
    assert not (config.output / "base-answers.json").exists()


def test_a_model_of_the_hub_is_known_by_its_commit(pico_folder):
    class Model:
        class config:
            _commit_hash = "1a2b"

    assert asked._weights("somebody/model", Model) == "1a2b"


def test_a_file_of_something_else_is_told(run, tmp_path):
    train(run(), progress=False)
    strange = tmp_path / "strange" / "base-answers.json"
    strange.parent.mkdir()
    for text in ("[1]", "{}", '{"answered": {"a": 1}}', "{"):
        strange.write_text(text)
        assert f"{strange} holds no answers of a base; delete it" in refused("eval", tmp_path / "run.yaml")


def test_sequences_share_them_too(run, tmp_path, questions):
    files = [str(tmp_path / task / "train.jsonl") for task in TASKS]
    stages = [{"name": task, "train": file, "test": file} for task, file in zip(TASKS, files, strict=True)]
    for output in ("a", "b"):
        learn(run(f"data={{sequence: {json.dumps(stages)}}}", "evaluate.target=[]", f"output={output}"), progress=False)
        assert questions == ["color", "color", "shape"]  # source, then what is to be learned
    rows = [json.loads((tmp_path / output / "matrix.json").read_text())["rows"][0] for output in ("a", "b")]
    assert rows[0] == rows[1]
