"""Wheels are taken as zip files, from where they are, and only if they are the pinned ones."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

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


def test_a_folder_that_is_not_there_is_told(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASCULPT_WHEELS", str(tmp_path / "wheals"))
    with pytest.raises(UserError, match=r"LORASCULPT_WHEELS names .*wheals, which is no folder"):
        assets.fetch(wheel)


def test_a_wheel_of_another_content_is_refused(wheel, tmp_path):
    (tmp_path / "given" / wheel.file).write_bytes(b"something else")
    with pytest.raises(UserError, match="SHA-256"):
        assets.fetch(wheel)
    assert (tmp_path / "given" / wheel.file).exists()  # it is the user's


@pytest.fixture
def downloads(wheel, tmp_path, monkeypatch):
    """No wheel is given: pip puts one there, which ``downloads[0]`` is the content of. Its commands follow."""
    right = (tmp_path / "given" / wheel.file).read_bytes()
    monkeypatch.delenv("LORASCULPT_WHEELS")
    monkeypatch.delenv("LORASCULPT_OFFLINE")
    said = [right]

    def pip(command, **settings):
        said.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.file).write_bytes(said[0])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    return said


def test_it_is_downloaded_once_alone_and_pinned(wheel, downloads, tmp_path):
    assert [assets.read(wheel, "thing/a.txt") for _ in range(2)] == [b"seen"] * 2
    (command,) = downloads[1:]
    assert {"--no-deps", "thing==1.0"} <= set(command)
    assert assets.fetch(wheel) == tmp_path / "cache" / "wheels" / wheel.file


@pytest.mark.parametrize("where", ["download", "cache"])
def test_another_content_is_told_in_one_sentence_and_not_kept(where, wheel, downloads, tmp_path):
    right, folder = downloads[0], tmp_path / "cache" / "wheels"
    if where == "cache":
        folder.mkdir(parents=True)
        (folder / wheel.file).write_bytes(right[:-1])
    else:
        downloads[0] = right[:-1]
    with pytest.raises(UserError, match=r"is not the pinned thing 1\.0 \(its SHA-256 differs\)") as error:
        assets.read(wheel, "thing/a.txt")
    assert str(error.value).count(". ") == 0
    assert list(folder.iterdir()) == []
    downloads[0] = right
    assert assets.read(wheel, "thing/a.txt") == b"seen"


def test_a_wheel_that_cannot_be_had_is_told_in_one_sentence(wheel, monkeypatch):
    monkeypatch.delenv("LORASCULPT_WHEELS")
    with pytest.raises(UserError, match="LORASCULPT_WHEELS"):
        assets.fetch(wheel)
