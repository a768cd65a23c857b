"""Drawings as SVG, and what a drawing looks like when it is held a little differently.

Drawings of the same emoji by other hands are more to learn from when the base is built. In a folder of its own,
``npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat @iconify-json/emojione`` puts four
archives (Apache-2.0, Apache-2.0, MIT, CC BY 4.0) of one JSON file of named SVG bodies each. They are read in place and
nothing of them is shipped.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

from PIL import Image

from ..errors import UserError

SETS = ("noto", "noto-v1", "fluent-emoji-flat", "emojione")


def rasterise(svg: str, side: int) -> Image.Image:
    """``svg`` drawn ``side`` pixels wide, with its transparency."""
    import resvg_py

    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=side))).convert("RGBA")


def altered(picture: Image.Image, rng: random.Random, mirror: bool = True) -> Image.Image:
    """``picture`` mirrored (or not), turned, scaled and shifted a little, on a background of another light tint."""
    tint = tuple(rng.randint(215, 255) for _ in range(3)) if rng.random() < 0.5 else (255, 255, 255)
    if mirror and rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white")
    side = round(picture.width * rng.uniform(1.0, 1.35))
    room = side - picture.width
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(picture, (rng.randint(0, room), rng.randint(0, room)))
    if tint != (255, 255, 255):
        plain = Image.new("RGB", canvas.size, tint)
        canvas.paste(plain, mask=canvas.convert("L").point(lambda value: 255 if value > 250 else 0))
    return canvas


def _archive(folder: Path, name: str) -> dict[str, dict]:
    """The JSON files of the set ``name``, by their names."""
    # 'noto' must not find 'noto-v1': a version number starts with a digit
    found = sorted(folder.glob(f"iconify-json-{name}-[0-9]*.tgz"))
    if not found:
        raise UserError(f"No iconify-json-{name}-*.tgz in {folder}; run there: npm pack @iconify-json/{name}.")
    with tarfile.open(found[-1]) as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".json")]
        return {Path(m.name).name: json.load(archive.extractfile(m)) for m in members}  # type: ignore[arg-type]


def drawings(folder: Path, codes: set[str]) -> dict[str, list[str]]:
    """SVG drawings of each of ``codes`` (the hexadecimal code points of an emoji, joined by '-') in the sets.

    The sets share their names; two of them say which code points a name stands for.

    Raises:
        UserError: if the folder lacks an archive.
    """
    archives = {name: _archive(folder, name) for name in SETS}
    names: dict[str, list[str]] = {}
    for files in archives.values():
        for code, name in files.get("chars.json", {}).items():
            names.setdefault(code.replace("-fe0f", ""), []).append(name)
    found: dict[str, list[str]] = {}
    for code in codes:
        called = dict.fromkeys(names.get(code.replace("-fe0f", ""), ()))
        for files in archives.values():
            icons = files["icons.json"]
            name = next((name for name in called if name in icons["icons"]), None)
            if name is not None:
                width, height = icons.get("width", 16), icons.get("height", 16)
                box = f'viewBox="0 0 {width} {height}"'
                body = icons["icons"][name]["body"]
                links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
                found.setdefault(code, []).append(f"<svg {links} {box}>{body}</svg>")
    return found
