"""The folder of an adapter or of its base: one here, or what the Hugging Face Hub has under a name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError, gist

DOWNLOADING = inspect.signature(snapshot_download).parameters


def folder_of(name: str | Path, files: Sequence[str], subfolder: str | None = None, **options: Any) -> Path:
    """The folder of the adapter or base ``name``; what is no folder here, and may be a name on the Hub, is fetched.

    Args:
        name: a folder, or a name such as "me/tiny". A folder goes before a name.
        files: the names of those to fetch; one that the Hub does not have is left out.
        subfolder: where in it the adapter lies.
        options: ``revision``, ``cache_dir``, ``token`` and the like, as of ``huggingface_hub.snapshot_download``; what
            it does not take, as PEFT passes some on, is let go. With ``local_files_only`` nothing is fetched.

    Raises:
        UserError: the Hub does not give it. A folder that is not there, with a path that is no name on the Hub, is
            left for the caller to see.
    """
    inside = subfolder or ""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return Path(name, inside)
    if Path(name).exists():
        return Path(name, inside)
    patterns = [f"{inside}/{file}" if inside else file for file in files]
    kept = {key: value for key, value in options.items() if key in DOWNLOADING}
    try:
        return Path(snapshot_download(str(name), **kept, allow_patterns=patterns), inside)
    except Exception as error:  # whatever the Hub and the way there may say
        if options.get("local_files_only"):
            raise UserError(f"{name} is no folder here, and nothing of it is in the Hub's cache.") from error
        why = gist(error)
        raise UserError(
            f"{name} is no folder here, and the Hub does not give it ({why}): correct the name, or see to it that you "
            "may read it, with hf auth login."
        ) from error
