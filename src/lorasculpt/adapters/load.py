"""Bring an adapter folder back: its weights, and the method that made it."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError
from .method import methods_of, read_record, read_state

PROJECTOR_FILE = "projector.safetensors"


def load(base: nn.Module, folder: str | Path, trainable: bool = False, adapter: str = "default") -> PeftModel:
    """``base`` with the adapter in ``folder``.

    Args:
        base: the model that the adapter was trained on, freshly loaded. A fully trained projector that was saved with
            the adapter replaces the projector in it.
        folder: a folder written by ``save_pretrained``, by this library or by stock PEFT.
        trainable: whether training is to go on. The method, its masks and its settings then come back with the
            weights. Without it the adapter is a plain LoRA for inference.
        adapter: the name it gets in the model.

    Raises:
        UserError: if ``folder`` holds no adapter, or one of another model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: there is no adapter_config.json in it.")
    record = read_record(folder)
    if record is not None and trainable:
        kind = record["method"].upper()
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise UserError(f"{folder} was made by the method {record['method']!r}, which this version does not have.")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    else:
        config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    load_projector(base, folder)
    try:
        model = PeftModel.from_pretrained(base, str(folder), adapter, is_trainable=trainable, config=config)
    except (RuntimeError, ValueError) as error:
        if "size mismatch" in str(error) or "Target modules" in str(error):
            line = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"the adapter in {folder} does not fit this base model ({line}).") from error
        raise
    if record is not None and trainable:
        methods_of(model)[adapter].restore(*read_state(folder))
    return model


def load_projector(model: nn.Module, folder: Path) -> None:
    """Put a fully trained projector that was saved beside an adapter into the base model, if there is one."""
    path = folder / PROJECTOR_FILE
    if not path.is_file():
        return
    unexpected = model.load_state_dict(load_file(path), strict=False).unexpected_keys
    if unexpected:
        raise UserError(f"the projector in {path} does not fit this base model: it has no {unexpected[0]}.")
