"""The questions of the demo's world: what is held out shares nothing with what is trained on."""

from __future__ import annotations

import pytest
from PIL import Image

from lorasculpt.demo import world
from lorasculpt.demo.world import Emoji


@pytest.fixture
def families(monkeypatch):
    """Four drawings in two splits, of which two look alike, and no words."""
    split = {"father": "train", "mother": "test", "grandmother": "test", "aunt": "test"}
    things = [Emoji((file,), file, "people", None, where, False) for file, where in split.items()]
    colours = {"father": "red", "mother": "red", "grandmother": "green", "aunt": "blue"}

    def pictures(names):
        for name in sorted(names):
            yield name, Image.new("RGB", (4, 4), colours[name.split("/")[1].removesuffix(".png")])

    for function, value in (("emoji", lambda: tuple(things)), ("pictures", pictures), ("definitions", tuple)):
        monkeypatch.setattr(world, function, value)
    monkeypatch.setattr(world, "twins", world.twins.__wrapped__)
    return things


def test_a_drawing_that_looks_like_a_training_drawing_is_not_held_out(families):
    assert world.twins() == {"emoji/mother.png"}
    asked = {item.image for item in world.source_items("test")}
    assert asked == {"emoji/grandmother.png", "emoji/aunt.png"}
    assert {item.image for item in world.source_items("train")} == {"emoji/father.png"}


def test_a_definition_that_training_has_for_another_word_is_not_held_out(monkeypatch):
    found = (("diary", "a daily record", "train"), ("journal", "a daily record", "test"), ("ledger", "of sums", "test"))
    monkeypatch.setattr(world, "definitions", lambda: found)
    assert world.words("train") == [("diary", "a daily record")]
    assert world.words("test") == [("ledger", "of sums")]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_flags_of_a_split_are_of_one_hand_and_in_ways_of_holding_that_no_other_has(split, monkeypatch):
    monkeypatch.setattr(world, "flags", lambda: (("1f1eb-1f1f7", "France"), ("1f1ef-1f1f5", "Japan")))
    own = {item.image for item in world.flag_items(split)}
    others = {
        item.image for other in ("train", "validation", "test") if other != split for item in world.flag_items(other)
    }
    assert len(own) == len(world.flag_items(split))
    assert not own & others
    assert {image.split("/")[0] for image in own} == {"openmoji" if split == "test" else "flags"}


def test_a_share_is_the_same_for_ever():
    assert world.share("word cat") == world.share("word cat") != world.share("word dog")
    shares = [world.share(str(number)) for number in range(2000)]
    assert 0 <= min(shares) < 0.01 < 0.99 < max(shares) < 1


def test_a_picture_is_whole_or_not_there(families, tmp_path, monkeypatch):
    def stopped(picture, file, *_):
        file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            world.write(tmp_path, world.source_items("test"), "source.jsonl")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    world.write(tmp_path, world.source_items("test"), "source.jsonl")
    assert {path.name for path in tmp_path.rglob("*.png")} == {"grandmother.png", "aunt.png"}
