"""The settings of a run as they are listed, against the config that reads them."""

from __future__ import annotations

import json

import pytest
import yaml
from commands import done, refused

from lorasculpt import UserError
from lorasculpt.config import RunConfig
from lorasculpt.reference import settings


def test_every_setting_is_listed_with_the_default_that_a_run_gets(tmp_path):
    (tmp_path / "run.yaml").write_text("base: a/b\noutput: out\ndata: {train: a.jsonl}\n")
    written = yaml.safe_load(RunConfig.load(tmp_path / "run.yaml").to_yaml())
    sections = ("data", "training", "evaluate")
    flat = {key: value for key, value in written.items() if key not in sections}
    for section in sections:
        flat |= {f"{section}.{key}": value for key, value in written[section].items()}
    flat |= {"training.arguments": {}}  # left out of a file where there are none
    listed = {one.key: one for one in settings() if "[]" not in one.key}
    assert listed.keys() == flat.keys()
    given = {"base", "output", "data.train", "training.epochs", "training.report_to"}  # or of the machine
    for key in listed.keys() - given:
        assert yaml.safe_load(listed[key].default or "null") == flat[key], key
    assert {key for key, one in listed.items() if one.default == "required"} == {"base", "output"}
    assert all(one.meaning.endswith(".") and one.kind for one in settings())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("training.steps", "whole number, at least 1"),
        ("training.warmup", "number, at least 0, below 1"),
        ("training.schedule", "cosine, linear or constant"),
        ("training.checkpointing", "true or false"),
        ("quantization", "4bit or 8bit"),
        ("evaluate.source", "list of paths"),
        ("evaluate.strengths", "list of numbers, above 0, below 1"),
        ("evaluate.metric", "map"),
        ("data.sequence", "list of tasks"),
        ("data.sequence[].test", "path"),
        ("base", "text"),
    ],
)
def test_types_in_words(key, kind):
    assert {one.key: one.kind for one in settings()}[key] == kind


def test_a_part_of_the_file():
    assert {one.key.partition(".")[0] for one in settings("training")} == {"training"}
    assert [one.key for one in settings("data.sequence")][:2] == ["data.sequence", "data.sequence[].name"]
    assert [one.key for one in settings("method")] == ["method"]
    with pytest.raises(UserError, match="no setting is called 'trainin'; did you mean training"):
        settings("trainin")
    with pytest.raises(UserError, match="there are base, dtype, "):
        settings("x")


def test_on_the_command_line():
    said = " ".join(done("settings", "training.lr").split())
    assert "training.lr" in said
    assert "0.0002" in said
    assert "`" not in done("settings")
    assert json.loads(done("settings", "evaluate", "--json"))[0]["key"] == "evaluate.source"
    assert "no setting is called 'x'" in refused("settings", "x")
