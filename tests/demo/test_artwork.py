"""Drawings by other hands: read in place from their archives, found by what they show."""

from __future__ import annotations

import io
import json
import random
import tarfile

import pytest
from PIL import Image

from lorasculpt import UserError
from lorasculpt.demo import artwork


def pack(folder, name: str, icons: dict[str, str], chars: dict[str, str] | None = None) -> None:
    """An archive as ``npm pack`` leaves it, of squares in one color each."""
    bodies = {icon: {"body": f'<rect width="8" height="8" fill="{color}"/>'} for icon, color in icons.items()}
    files = {"icons.json": {"icons": bodies, "width": 8, "height": 8}}
    files |= {"chars.json": chars} if chars else {}
    with tarfile.open(folder / f"iconify-json-{name}-1.2.3.tgz", "w:gz") as archive:
        for file, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    pack(tmp_path, "noto", {"heart": "#ff0000", "sea": "#0000ff"}, {"2764": "heart", "1f30a": "sea"})
    pack(tmp_path, "noto-v1", {"heart": "#00ff00"})
    pack(tmp_path, "fluent-emoji-flat", {"red-heart": "#ffff00"}, {"2764-fe0f": "red-heart"})
    pack(tmp_path, "emojione", {"red-heart": "#00ffff"})
    return tmp_path


def test_a_drawing_is_found_in_every_set_that_has_it_under_either_name(folder):
    found = artwork.drawings(folder, {"2764-fe0f", "1f30a", "1f600"})
    assert {code: len(drawn) for code, drawn in found.items()} == {"2764-fe0f": 4, "1f30a": 1}
    colors = [artwork.rasterise(svg, 16).getpixel((5, 5)) for svg in found["2764-fe0f"]]
    assert colors == [(255, 0, 0, 255), (0, 255, 0, 255), (255, 255, 0, 255), (0, 255, 255, 255)]


def test_a_missing_archive_is_named_with_the_command_that_gets_it(folder):
    (folder / "iconify-json-noto-1.2.3.tgz").unlink()
    with pytest.raises(UserError, match="npm pack @iconify-json/noto"):
        artwork.drawings(folder, {"2764"})


def test_a_drawing_held_differently_is_another_picture_and_mirrored_only_if_wanted():
    drawn = Image.new("RGB", (40, 40), "white")
    drawn.paste("red", (2, 10, 18, 30))  # all of it on the left
    pictures = [artwork.altered(drawn, random.Random(seed), mirror=False) for seed in range(20)]
    assert len({picture.tobytes() for picture in pictures}) == 20

    def red(picture: Image.Image, left: bool) -> int:
        half = picture.width // 2
        part = picture.crop((0, 0, half, picture.height) if left else (half, 0, picture.width, picture.height))
        return sum(r > 180 and g < 80 for r, g, _ in part.get_flattened_data())

    straight = [artwork.altered(drawn, random.Random(seed), mirror=False).resize((40, 40)) for seed in range(20)]
    turned = [artwork.altered(drawn, random.Random(seed)).resize((40, 40)) for seed in range(20)]
    assert sum(red(p, True) < red(p, False) for p in turned) > sum(red(p, True) < red(p, False) for p in straight)
