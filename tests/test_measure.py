"""A run measured without source data, and the adapter that a budget leaves."""

from __future__ import annotations

import json

import pico
import pytest
import torch
from commands import done, refused
from peft import PeftModel

from lorasculpt import UserError
from lorasculpt.evaluation import strength
from lorasculpt.evaluation.budget import within
from lorasculpt.measure import _curves, measure, retained
from lorasculpt.models.load import load
from lorasculpt.run.folder import write_record
from lorasculpt.run.records import check_metrics, held_out
from lorasculpt.train import train


@pytest.fixture
def run(a_run):
    """A run of the tiny llava; a function that gives its config, changed by ``key=value``."""
    return a_run(
        method={"name": "lora", "r": 4},
        training={"steps": 2, "batch": 2, "lr": 0.01, "precision": "fp32", "report_to": []},
        evaluate={"target": ["data/train.jsonl"], "max_new_tokens": 2, "strengths": [0.5]},
    )


def entry(config) -> dict:
    return json.loads(measure(config, progress=False).read_text())["runs"][0]


def test_the_whole_curve_is_of_the_same_questions(run, monkeypatch):
    from lorasculpt.asked import ask_base
    from lorasculpt.evaluation import evaluate

    def graded(asked):
        def first_right(*arguments, **options):  # the first two questions of a task are answered right, at any strength
            found = asked(*arguments, **options)
            for entry in (entry for side in found.values() for entry in side.values()):
                entry["scores"] = [float(number < 2) for number in range(len(entry["scores"]))]
            return found

        return first_right

    monkeypatch.setattr("lorasculpt.measure.ask_base", graded(ask_base))
    for place in ("lorasculpt.measure.evaluate", "lorasculpt.evaluation.run.evaluate"):
        monkeypatch.setattr(place, graded(evaluate))
    config = run("evaluate.source=[data/train.jsonl]", "evaluate.retain=0.9", "evaluate.curve=2")
    train(config, progress=False)
    found = entry(config)
    tasks = len(found["source"])
    share = -(-2 // tasks)
    assert all(task["n"] > share for task in found["source"].values())
    points = {(point["source"], point["target"]) for point in found["curve"]}
    assert points == {(min(2, share) / share,) * 2}
    assert found["budget"]["kept"] == 1
    assert [len(task.records) for task in held_out(config, limit=1, each=100)[0]] == [1] * tasks


def test_without_source_the_adapter_that_keeps_enough_is_left(run, tmp_path):
    config = run("evaluate.retain=0.5", "evaluate.drift=4")
    adapter, out = train(config, progress=False), config.output / "adapter-retained"
    file, share = tmp_path / "run.yaml", "evaluate.retain=0.5"
    said = done("train", file, share, "evaluate.drift=4")
    assert f"keeps 50 % is chosen and written by: lorasculpt eval {file} {share} evaluate.drift=4\n" in said
    words = " ".join(done("eval", file, share, "evaluate.drift=4").split())
    assert f"The adapter at that strength: {out}" in words  # the target is the same at both, so the smaller is taken
    assert "chosen on the questions it is scored on" in words
    found = json.loads((config.output / "results.json").read_text())["runs"][0]
    assert found["source"] == {}
    assert found["target"]
    assert [found["summary"][key] for key in ("source_before", "retention", "h_mean", "average")] == [None] * 4
    assert found["summary"]["gain"] is not None
    points = found["curve"]
    assert [point["strength"] for point in points] == [0, 0.5, 1]
    assert points[0]["drift"] == 0 < points[1]["drift"] < points[2]["drift"] == found["drift"]["value"]
    assert found["budget"]["by"] == "drift"
    assert found["budget"]["strength"] == 0.5

    inputs = {"input_ids": torch.arange(4, 20)[None]}
    tuned = PeftModel.from_pretrained(load(config.base)[0], str(adapter)).eval()
    written = PeftModel.from_pretrained(load(config.base)[0], str(out)).eval()
    with torch.no_grad():
        with strength(tuned, 0.5):
            turned_down = tuned(**inputs).logits
        torch.testing.assert_close(written(**inputs).logits, turned_down, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(tuned(**inputs).logits, turned_down, atol=1e-4)

    done("report", config.output, "--out", tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "of the base's probability of its own texts" in page.replace("&#39;", "'")
    assert "or without source data drift" in refused("compare", file, share)

    budget = found["budget"]
    assert str(out) in retained(config, budget | {"strength": 0.25})  # again: it is replaced,
    assert json.loads((out / "posthoc.json").read_text())["made"]["by"] == 0.25
    assert {path.name for path in config.output.glob("*adapter*")} == {"adapter", "adapter-retained"}
    assert retained(config, budget | {"strength": 1}) == f"That is the adapter itself: {adapter}"
    assert not out.exists()  # or goes
    retained(config, budget)
    assert "no adapter of this run" in retained(config, budget | {"strength": None})
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by lorasculpt eval"):
        retained(config, budget)
    assert (out / "notes.txt").read_text() == "mine"


def test_it_is_chosen_on_validation_where_there_is_one(run, tmp_path, monkeypatch):
    data, others = (pico.write_data(tmp_path / name, n=2) for name in ("kept", "others"))
    asked_of = (f"evaluate.source={data}", f"evaluate.validation={others}")
    config = run("evaluate.retain=0.5", "evaluate.drift=4", "evaluate.refine=0", *asked_of)
    train(config, progress=False)
    asked = []

    def known(model, processor, source, target, **options):
        """Half the source is lost at strength 1 on the test, and nothing on the other questions."""
        asked.append(images := [record.images[0].parent.parent.name for task in target for record in task.records])
        lost = len(asked) != 1 and "others" not in images
        return {
            "source": {"color": measured([1.0, 1.0 - lost])},
            "target": {"color": measured([0.0, float(len(asked) > 1)])},
        }

    def measured(scores):
        found = {"value": sum(scores) / 2, "low": 0, "high": 1, "n": 2, "groups": [0, 1]}
        return found | {"scores": scores, "answers": ["a"] * 8}

    monkeypatch.setattr("lorasculpt.measure.ask_base", lambda config, *given, **options: known(*given, **options))
    monkeypatch.setattr("lorasculpt.measure.evaluate", known)
    monkeypatch.setattr("lorasculpt.evaluation.run.evaluate", known)
    monkeypatch.setattr("lorasculpt.measure.gallery", lambda *_: [])
    monkeypatch.setattr("lorasculpt.measure.rehearsed", lambda *_: [])
    found = entry(config)
    assert [set(images) for images in asked] == [{"data"}] * 3 + [{"others"}] * 3
    assert all("drift" in point for point in [*found["curve"], *found["budget"]["points"]])
    assert found["budget"]["on"] == "validation"
    assert (found["budget"]["by"], found["budget"]["kept"]) == ("source", 1.0)

    asked.clear()  # all is lost and learned between 0 and the first strength that is measured
    finer = run("evaluate.retain=0.5", "evaluate.drift=4", "evaluate.refine=2", *asked_of)
    found = entry(finer)
    assert [point["strength"] for point in found["curve"]] == [0, 0.125, 0.25, 0.5, 1]
    assert [point["strength"] for point in found["budget"]["points"]] == [0, 0.125, 0.25, 0.5, 1]
    assert [set(images) for images in asked] == [{"data"}] * 5 + [{"others"}] * 5


@pytest.mark.parametrize(
    ("limits", "between", "best"),
    [((0.45,), [0.4375, 0.46875], 0.4375), ((0.45, 0.3), [0.28125, 0.3125], 0.28125)],  # on the test, on validation
)
def test_a_budget_is_measured_where_there_is_more_to_be_learned(run, limits, between, best):
    def keeping(limit):
        return lambda strengths: [{"strength": s, "target": s, "source": 0.8 * (s <= limit)} for s in strengths]

    config = run("evaluate.retain=0.9", "evaluate.refine=2")
    first, *second = map(keeping, limits)
    points, again = _curves(config, first([0.0, 1.0]), [0.5], first, *(second or [None]))
    strengths = sorted([0, 0.25, 0.375, 0.5, 1, *between])  # these where it is known least
    assert [point["strength"] for point in points] == strengths
    assert [point["strength"] for point in again] == (strengths if second else [])
    assert within(again or points, 0.9)["strength"] == best
    assert len(_curves(run("evaluate.retain=0.9", "evaluate.refine=0"), first([0, 1]), [0.5], first, None)[0]) == 3
    assert len(_curves(config, first([0.0, 1.0]), [], first, None)[0]) == 2  # none is asked between the ends


def test_what_has_no_such_adapter(run):
    routed = run("method={name: mosld, r: 4, lora_alpha: 8}", "evaluate.drift=4", "evaluate.retain=0.5")
    train(routed, progress=False)
    budget = entry(routed)["budget"]
    assert budget["strength"] == 0.5
    assert "only a plain LoRA can be" in retained(routed, budget)
    assert not (routed.output / "adapter-retained").exists()

    dora = run("method.use_dora=true", "output=dora", "evaluate.retain=0.01")
    adapter = train(dora, progress=False)
    found = entry(dora)
    assert found["drift"]["n"] == 32  # as many where nothing is said
    assert found["curve"] == []
    assert found["budget"]["strength"] == 1
    assert "DoRA" in found["budget"]["fixed"]
    assert retained(dora, found["budget"]) == f"That is the adapter itself: {adapter}"

    for overrides, words in (
        ((), "without source data drift"),
        (("evaluate.target=[]", "evaluate.drift=4"), "must name what to measure: target"),
    ):
        with pytest.raises(UserError, match=words):
            measure(run("method.use_dora=true", "output=dora", *overrides), progress=False)
    whole = run("method.use_dora=true", "output=dora", "evaluate.drift=4", "projector=full")
    write_record(whole)
    with pytest.raises(UserError, match=r"projector.* is full, so there is no drift"):
        measure(whole, progress=False)


def test_questions_without_a_task_are_of_their_file(run, tmp_path):
    def unnamed(folder, n, **options):
        path = pico.write_data(tmp_path / folder, n=n, **options)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "task"}) + "\n" for row in rows))
        return path

    kept, more = unnamed("kept", 3, tasks=("shape",)), unnamed("more", 5)
    named = pico.write_data(tmp_path / "named", n=2, tasks=("side",))
    asked_of = (f"evaluate.source=[{kept},{named}]", f"evaluate.target={more}")
    source, target = held_out(run(*asked_of))
    assert [(task.name, len(task.records)) for task in source] == [("kept/train", 3), ("side", 2)]
    assert [(task.name, task.metric) for task in target] == [("more/train", "exact")]
    metrics = "evaluate.metric={default: contains, more/train: vqa}"
    assert [task.metric for side in held_out(run(*asked_of, metrics)) for task in side] == ["contains", "exact", "vqa"]
    check_metrics(run(*asked_of, metrics))
    with pytest.raises(UserError, match="names a task that no question has; the tasks are default, kept/train, "):
        check_metrics(run(*asked_of, "evaluate.metric={train: vqa}"))
    config = run(*asked_of)
    train(config, progress=False)
    found = entry(config)
    assert found["target"]["more/train"]["n"] == 5
    assert found["trained_on"] == {"more/train": 4}
    aside = held_out(run(*asked_of, "data.validation=0.5", f"data.train={more}"))[1]
    assert [task.name for task in aside] == ["more/train"]


def test_questions_that_were_trained_on_are_told(run, tmp_path):
    kept = pico.write_data(tmp_path / "kept", n=4, tasks=("shape",))
    more = pico.write_data(tmp_path / "more", n=6)  # the first four are those of the training data, under other names
    file, asked = tmp_path / "run.yaml", (f"evaluate.source={kept}", f"evaluate.target={more}")
    trained = tmp_path / "data" / "train.jsonl"
    told = " ".join(done("train", file, *asked).split())
    assert f"4 of the questions that are measured are also in the training data, such as {more}:1 ({trained}:1)" in told
    assert "are also in the training data" not in done("train", file, *asked, "output=again", "seed=1")  # said once
    sentence = "Also in the training data, and so perhaps memorised: 4 of 6 questions of color."
    assert sentence in " ".join(done("eval", file, *asked).split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    assert found["trained_on"] == {"color": 4}
    assert sentence in (tmp_path / "out" / "adapter" / "README.md").read_text()
    done("report", tmp_path / "out", "--out", tmp_path / "page")
    assert all(sentence in (tmp_path / "page" / f"report.{kind}").read_text() for kind in ("html", "md", "json"))

    apart = (asked[0], f"evaluate.target={kept}")
    assert "memorised" not in done("eval", file, *apart)
    assert entry(run(*apart))["trained_on"] == {}
    trained.unlink()
    assert "trained_on" not in entry(run(*asked))  # nobody can know any more


def test_the_tasks_of_a_side_share_the_questions_of_a_curve(run, tmp_path):
    several = pico.write_data(tmp_path / "several", n=4, tasks=("color", "shape", "side"))
    config = run(f"evaluate.source=[{several}]", "evaluate.limit=3")
    source, target = held_out(config, each=4)
    assert [len(task.records) for task in (*source, *target)] == [2, 2, 2, 3]  # 4 / 3, rounded up; and all of 3
    assert [len(task.records) for group in held_out(config) for task in group] == [3, 3, 3, 3]  # those of the limit
    config = run(f"evaluate.source=[{several}]")
    assert [len(task.records) for group in held_out(config, each=10**6) for task in group] == [4, 4, 4, 4]
    assert held_out(run(), each=2)[0] == []  # a side without tasks
