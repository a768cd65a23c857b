"""Bring an adapter folder back: its weights, and the method that made it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_CLASSES

from ..errors import UserError
from ..files import read_json
from .folder import folder_of
from .layers import sites
from .method import SETTINGS_FILE, STATE_FILE, bring_back, methods_of, read_record
from .origin import ORIGIN_FILE, check_origin
from .residual import moved_by
from .update import updates

PROJECTOR_FILE = "projector.safetensors"
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, SETTINGS_FILE, STATE_FILE, PROJECTOR_FILE, ORIGIN_FILE)


def load(
    base: nn.Module,
    folder: str | Path,
    trainable: bool = False,
    adapter: str = "default",
    *,
    saves_projector: bool = False,
    **hub: Any,
) -> PeftModel:
    """``base`` with the adapter in ``folder``.

    Args:
        base: the model that the adapter was trained on, freshly loaded. A fully trained projector that was saved with
            the adapter replaces the projector in it. Or a model that has adapters of the same type already: this one
            comes beside them, and ``set_adapter`` switches to it.
        folder: a folder written by ``save_pretrained``, by this library or by stock PEFT, or its name on the Hub.
        trainable: whether training is to go on. The method, its masks and its settings then come back with the
            weights. Without it the adapter is a plain LoRA for inference.
        adapter: the name it gets in the model.
        saves_projector: whether who trains it further saves a projector that came with it, as a run does.
        hub: ``subfolder``, ``revision``, ``cache_dir``, ``token`` and the like.

    Raises:
        UserError: if ``folder`` holds no adapter, or one of another model, be it of the same shapes
            (`lorasculpt.adapters.origin`), or one to be trained whose projector nobody saves.
    """
    folder = folder_of(folder, FILES, **hub)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} holds no adapter: there is no adapter_config.json in it.")
    read_json(folder / CONFIG_NAME)  # PEFT would raise what json does
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise UserError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}; save the adapter anew: no pickle is read.")
    if trainable and (folder / PROJECTOR_FILE).is_file() and not saves_projector:
        raise UserError(
            f"{folder} comes with a trained projector, which save_pretrained would leave out after more training; "
            "export it to merged, and train a new adapter of that model."
        )
    record = read_record(folder)
    if record is not None and trainable:
        kind = record["method"].upper()
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise UserError(f"{folder} was made by the method {record['method']!r}, which this version does not have.")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    else:
        config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    if not isinstance(base, nn.Module):
        raise UserError(f"load takes the base as a model, loaded with from_pretrained, and not {base!r}.")
    within = base.get_base_model() if isinstance(base, PeftModel) else base
    kinds = [kind.__name__ for kind in type(within).__mro__]
    check_family(folder, getattr(getattr(within, "config", None), "model_type", None), kinds)
    if within is not base and any(moved_by(config) for config in base.peft_config.values()):
        raise UserError(
            f"the adapter in {folder} does not go with one that has changed the base; give it a fresh base."
        )
    check_origin(folder, within)
    if within is base:
        load_projector(base, folder)
    elif (folder / PROJECTOR_FILE).is_file():
        raise UserError(
            f"{folder} comes with a projector, which all adapters of a model share; give it a base of its own."
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            if isinstance(base, PeftModel):
                model = _added(base, folder, adapter, config, trainable)
            else:
                model = PeftModel.from_pretrained(base, str(folder), adapter, is_trainable=trainable, config=config)
    except SafetensorError as error:
        raise UserError(f"{folder / SAFETENSORS_WEIGHTS_NAME} is damaged or cut short ({error}).") from None
    except (RuntimeError, ValueError) as error:
        if "size mismatch" in str(error) or "Target modules" in str(error):
            raise _misfit(f"the adapter in {folder}", error) from error
        if "eigens" in str(error):
            raise UserError(f"{folder} is a checkpoint of CorDA, which only its own run can go on from.") from error
        raise
    _check_whole(model, folder, adapter)
    if record is not None and trainable:
        bring_back(methods_of(model)[adapter], folder)
    return model


def _added(model: PeftModel, folder: Path, adapter: str, config: PeftConfig, trainable: bool) -> PeftModel:
    """``model`` with one adapter more."""
    if adapter in model.peft_config:
        raise UserError(f"the model has an adapter {adapter!r} already; give this one another name: adapter=...")
    known = next(iter(model.peft_config.values())).peft_type
    if config.peft_type != known:
        mend = "load both with trainable=True" if read_record(folder) else "give each a base of its own"
        raise UserError(
            f"the model has an adapter of the type {known.value}, and the one in {folder} would be of "
            f"{config.peft_type.value}: PEFT does not put them side by side; {mend}."
        )
    model.add_adapter(adapter, config)
    if trainable:
        model.set_requires_grad(adapter)
    model.load_adapter(str(folder), adapter, is_trainable=trainable)
    return model


def check_family(folder: Path, family: str | None, kinds: Iterable[str]) -> None:
    """See that the adapter in ``folder`` was not trained on a model of another family, whose shapes may be the same.

    An adapter that does not tell, and a base of a family that transformers does not know, are let through.

    Args:
        folder: with ``adapter_config.json``.
        family: ``model_type`` of the base, as in ``"llava"``.
        kinds: names of classes that the base is of.

    Raises:
        UserError: it was.
    """
    record = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    trained_on: Any = (record.get("auto_mapping") or {}).get("base_model_class")
    classes = [*IMAGE_TEXT_CLASSES.items(), *CAUSAL_CLASSES.items()]
    known = {name for name, kind in classes if trained_on in (kind if isinstance(kind, tuple) else (kind,))}
    if not known and (trained_on := record.get("base_model_name_or_path")):
        try:
            found, _ = PretrainedConfig.get_config_dict(trained_on, local_files_only=True)
        except (OSError, ValueError):  # a folder that is gone, or a name that was never loaded here
            return
        known = {found["model_type"]} if "model_type" in found else set()
    if family is not None and known and family not in known and trained_on not in kinds:
        raise _misfit(f"the adapter in {folder}", f"it was trained on {trained_on}, and this is {family}")


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
    reason = str(why)
    size = re.search(r"size mismatch for (\S+):.*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)", reason, re.DOTALL)
    if size:
        reason = f"its {size[1]} is ({size[2]}) and would have to be ({size[3]})"
    elif "Target modules" in reason:
        reason = "it has none of the layers that were adapted"
    return UserError(f"{what} does not fit this base model ({reason}); name the model it was trained on.")
