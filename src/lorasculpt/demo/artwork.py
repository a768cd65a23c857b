"""Drawings of the same emoji by other hands, as SVG: more to learn from when the base is built.

``npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat @iconify-json/emojione`` puts four
archives into a folder (Apache-2.0, Apache-2.0, MIT, CC BY 4.0); each holds one JSON file of named SVG bodies. They are
read in place and nothing of them is shipped.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from ..errors import UserError

SETS = ("noto", "noto-v1", "fluent-emoji-flat", "emojione")


def rasterise(svg: str, side: int) -> Image.Image:
    """``svg`` drawn ``side`` pixels wide, with its transparency."""
    import resvg_py

    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=side))).convert("RGBA")


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
