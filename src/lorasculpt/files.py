"""Files that are whole or not there, and what a full disk says of itself."""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

# No room on the device, in the user's share of it, or for a file of this size.
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}
SAID = re.compile(  # by safetensors, then by torch.save, neither of which raises an OSError
    rf"\(os error ({'|'.join(map(str, FULL))})\)|PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+"
)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` once the block has ended, and is gone if it fails. Makes the folder.

    A link stays one, to the new file. What is no file, such as ``/dev/stdout``, is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # two machines may have a process of one number
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """``text`` as a file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, content: dict[str, Any], *, nan: bool = True) -> Path:
    """``content`` as JSON, whole or not at all; without ``nan`` a ValueError for a number that JSON does not have."""
    return write_text(path, json.dumps(content, indent=1, allow_nan=nan) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable JSON ({error}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return content


def disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it came of, says that there was no room for what was being written."""
    while error is not None:
        if error.errno in FULL if isinstance(error, OSError) else SAID.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def free(folder: str | Path) -> int:
    """Bytes that can still be written into ``folder``, which may not exist yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
