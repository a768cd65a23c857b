"""The finished adapter on the Hugging Face Hub, where a run asks for it.

The folder goes there as it is: what a trainer would push by itself is a checkpoint, from where it is still being made.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi

from .config import RunConfig
from .errors import gist


def on_hub(base: str) -> bool:
    """Whether ``base`` is a name on the Hub, by its form, and no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()


def public_name(base: str) -> str:
    """What a base is called where others read it: its name on the Hub, or that of its folder, and not where it lies."""
    return base if on_hub(base) else Path(base).resolve().name


def push(config: RunConfig, adapter: Path) -> None:
    """Upload the folder ``adapter`` to ``hub_model_id``, if ``training.arguments`` of ``config`` say ``push_to_hub``.

    Of several processes the first does it.

    Raises:
        UserError: if the Hub does not take it; the adapter stays, and another call tries again.
    """
    given = config.training.arguments
    if not given.get("push_to_hub") or os.environ.get("RANK", "0") != "0":
        return
    hub, revision = HfApi(), given.get("hub_revision")
    try:
        repo = hub.create_repo(given["hub_model_id"], private=given.get("hub_private_repo"), exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        words = f"{config.method['name']}, by lorasculpt"
        hub.upload_folder(repo_id=repo, folder_path=adapter, revision=revision, commit_message=words)
    except Exception as error:  # whatever the Hub and the way there may say: the training is done
        why = gist(error)
        raise config.error(
            "training.arguments.push_to_hub",
            f"did not work ({why}); the adapter is whole in {adapter}: mend that, with hf auth login if need be, and "
            "run it again.",
        ) from error
