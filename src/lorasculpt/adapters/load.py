"""Bring an adapter folder back: its weights, and the method that made it."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError
from .layers import sites
from .method import methods_of, read_record, read_state
from .update import updates

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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            model = PeftModel.from_pretrained(base, str(folder), adapter, is_trainable=trainable, config=config)
    except (RuntimeError, ValueError) as error:
        if "size mismatch" in str(error) or "Target modules" in str(error):
            raise _misfit(f"the adapter in {folder}", error) from error
        if "eigens" in str(error):
            raise UserError(f"{folder} is a checkpoint of CorDA, which only its own run can go on from.") from error
        raise
    _check_whole(model, folder, adapter)
    if record is not None and trainable:
        methods_of(model)[adapter].restore(*read_state(folder))
    return model


def _check_whole(model: PeftModel, folder: Path, adapter: str) -> None:
    """See that what the adapter in ``folder`` adapts is there in ``model``, all of it and nothing else."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    if not isinstance(model.peft_config[adapter], LoraConfig):
        strange = keys ^ set(get_peft_model_state_dict(model, adapter_name=adapter))
        if strange:
            raise _misfit(f"the adapter in {folder}", f"{len(strange)} tensors are of layers that the other lacks")
        return
    saved = len({key.partition(mark)[0] for key in keys for mark in (".lora_A.", ".lora_update.") if mark in key})
    found = len(sites(model, adapter)) + len(updates(model, adapter))
    if saved != found:
        raise _misfit(f"the adapter in {folder}", f"it adapts {saved} layers, of which this model has {found}")


def load_projector(model: nn.Module, folder: Path) -> None:
    """Put a fully trained projector that was saved beside an adapter into the base model, if there is one."""
    path = folder / PROJECTOR_FILE
    if not path.is_file():
        return
    try:
        unexpected = model.load_state_dict(load_file(path), strict=False).unexpected_keys
    except RuntimeError as error:
        raise _misfit(f"the projector in {path}", error) from error
    if unexpected:
        raise _misfit(f"the projector in {path}", f"it has no {unexpected[0]}")


def _misfit(what: str, why: Exception | str) -> UserError:
    return UserError(f"{what} does not fit this base model ({str(why).strip().splitlines()[-1].strip(' .')}).")
