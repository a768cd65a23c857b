"""Pictures: what is opened looks as it should, and what cannot be opened is caught and explained."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lorasculpt.data import images
from lorasculpt.data.images import check_image, open_image
from lorasculpt.errors import UserError

FORMATS = ("png", "jpg", "webp", "gif", "bmp", "tiff")


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (2, 2))
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("a.png", "p.png"):
        image = open_image(tmp_path / name)
        assert image.mode == "RGB"
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_photograph_stands_upright(tmp_path: Path, noise: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    noise.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (60, 80)
    exif[0x011A] = 72.0
    odd = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x28\x00\x05")  # no whole number
    noise.save(tmp_path / "b.jpg", exif=odd)
    with Image.open(tmp_path / "b.jpg") as image, pytest.raises(struct.error):  # which Pillow cannot write anew
        ImageOps.exif_transpose(image)
    assert open_image(tmp_path / "b.jpg").size == (60, 80)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "xray.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "xray.png"))[..., 0], grey >> 8)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_whole_picture_passes(tmp_path: Path, noise: Image.Image, suffix: str) -> None:
    noise.save(tmp_path / f"a.{suffix}")
    assert check_image(tmp_path / f"a.{suffix}") == (80, 60)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_picture_is_caught(tmp_path: Path, noise: Image.Image, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"a\.\w+ is damaged, cut short or no image"):
        check_image(path)


def test_a_jpeg_with_bytes_after_its_end_passes(tmp_path: Path, noise: Image.Image) -> None:
    path = tmp_path / "a.jpg"
    noise.save(path)
    path.write_bytes(path.read_bytes() + b"camera notes")
    check_image(path)


def test_png_and_jpeg_are_not_decoded(tmp_path: Path, noise: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    for suffix in ("png", "jpg"):
        noise.save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for suffix in ("png", "jpg"):
        check_image(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("look", [open_image, check_image])
def test_what_is_missing_or_no_picture_is_explained(tmp_path: Path, look) -> None:
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        look(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="no image"):
        look(tmp_path / "text.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png"):
        look(tmp_path / "folder.png")


@pytest.mark.parametrize("look", [open_image, check_image])
@pytest.mark.parametrize("limit", [50, 20])  # Pillow warns above its limit and raises above twice its limit
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch, look, limit: int) -> None:
    Image.new("RGB", (10, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match="million pixels; scale it down"):
        look(tmp_path / "a.png")
