"""The recipe of an alignment, as the command line gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasculpt import UserError
from lorasculpt.demo.build import Recipe, recipe_of

ROOT = Path(__file__).parents[2]


def test_every_stretch_of_the_alignment_that_ships_can_be_asked_for():
    """The commands in docs/log.md are the recipes in its log."""
    text = (ROOT / "docs" / "log.md").read_text().replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.strip().startswith("lorasculpt demo build")]
    asked = [recipe_of([word for word in command if "=" in word]) for command in commands]
    rows = [json.loads(line) for line in (ROOT / "docs" / "alignment.jsonl").read_text().splitlines()]
    done = [Recipe(**row["recipe"]) for row in rows if "recipe" in row]
    assert len(asked) == 4
    assert asked == done


@pytest.mark.parametrize("change", ["minuets=3", "minutes", "minutes=long", "bf16=perhaps"])
def test_a_setting_that_no_recipe_has_is_refused(change):
    with pytest.raises(UserError, match=change.split("=")[0]):
        recipe_of([change])
