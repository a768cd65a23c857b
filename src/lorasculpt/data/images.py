"""Pictures from files: opened the same way for training and evaluation, and checked before either begins."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Turn what Pillow raises about ``path`` into a sentence that says what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as odd EXIF data, which harms nothing
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist; correct the path or put the file there") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(f"image {path} has more than {limit} million pixels; scale it down") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} is damaged, cut short or no image ({error}); replace it") from None


def open_image(path: str | Path) -> Image.Image:
    """The picture in ``path`` as RGB: turned as its EXIF data say, transparency laid on white, 16-bit grey scaled to 8.

    Raises:
        UserError: the file is missing, damaged, no image, or larger than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    with _explained(path), Image.open(path) as file:
        file.getexif()
        file.info.pop("exif", None)  # which would be written anew when it is turned, and may be odd
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):  # Pillow would clip at 255: an X-ray would turn white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def check_image(path: str | Path) -> tuple[int, int]:
    """Raise the ``UserError`` that `open_image` would raise, without decoding PNG and JPEG files (0.1 to 1 ms each).

    Returns the width and height that the file says, not turned as its EXIF data say.

    A PNG file is read through for its checksums. A JPEG file has none, but one that was cut short lacks its end marker;
    only a file without the marker at its very end, and every other format, is decoded. What was whole is not looked at
    again while its size and time stay what they are: training and measuring read the same files many times.
    """
    with _explained(path):
        found = os.stat(path)
        return _see(path, found.st_size, found.st_mtime_ns)


@cache
def _see(path: str | Path, size: int, time: int) -> tuple[int, int]:
    with Image.open(path) as image:
        if image.format == "PNG":
            image.verify()
        elif image.format != "JPEG" or not _ends_as_jpeg(path):
            image.load()
        return image.size


def _ends_as_jpeg(path: str | Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"
