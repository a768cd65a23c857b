"""A base model and its processor from a folder or the Hub, and where and in what precision it computes."""

from __future__ import annotations

import copy
import difflib
import gc
import importlib.util
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_CLASSES
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..errors import UserError, gist
from ..memory import ran_out
from . import tower
from .template import complete

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
QUANTIZATIONS = ("4bit", "8bit")


def load(
    base: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    quantization: str | None = None,
    attention: str | None = None,
    image_processor: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, ProcessorMixin | PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its processor (its tokenizer if it reads text only).

    Weights are read from safetensors files alone. A
    tokenizer without a padding token gets its end token for one: padding is masked everywhere. A chat template without
    the first token of a text or the last of an answer gets them (`lorasculpt.models.template`).

    Args:
        base: A model folder, or the name of a model on the Hub.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for what the files hold.
        trust_remote_code: Run the code that comes with the model.
        quantization: ``"4bit"`` (NF4, computing in bfloat16) or ``"8bit"`` through bitsandbytes. Default: as the files
            hold them, which may be quantised already.
        attention: How transformers is to compute it, such as ``"sdpa"`` or ``"flash_attention_2"``. Default: eager on a
            CPU, which was measured to be faster at the sizes that a CPU can train; else transformers' own choice, SDPA
            wherever the family has it.
        image_processor: Settings that replace those of the base's image processor, such as ``{"max_pixels": 1000000}``.
        device: Where the model is put; `computing` says where models are used. A quantised one is on the current GPU
            where there is one: not every kind of it can move.

    Raises:
        UserError: no model there, or one that needs another package or its own code; or an attention or a setting that
            it does not have; a quantization of what is quantised; or 4 bits that this processor reads wrongly.
    """
    tower.register()
    if torch.device(device).type != "cpu":
        gc.collect()  # the model of an earlier run in this process, which its trainer's cycles hold, makes room first
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if Path(base).exists() and not (Path(base) / "config.json").exists():
        raise UserError(f"{base} is no model folder: it has no config.json; name the folder that has one")
    if not Path(base).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(base)):
        raise UserError(f"the model folder {base} does not exist; correct the path")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    packed = _quantization(quantization)
    try:
        config = AutoConfig.from_pretrained(base, **options)
        kinds = (config, config.get_text_config(decoder=True))
        if any(getattr(kind, "quantization_config", None) for kind in kinds):
            if packed:
                raise UserError(f"{base} is quantised already; leave quantization out")
            if (where := computing()).type != "cpu":  # only bitsandbytes goes there by itself
                options["device_map"] = {"": torch.device(where.type, torch.accelerator.current_device_index())}
        own_code = getattr(config, "auto_map", {})
        sees = config.model_type in IMAGE_TEXT_CLASSES or "AutoModelForImageTextToText" in own_code
        processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(base, **options)
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
            base,
            dtype=DTYPES[dtype],
            attn_implementation=attention or ("eager" if computing().type == "cpu" else None),
            use_safetensors=True,
            **packed,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if ran_out(error):
            raise
        reason = str(error).strip().split("\n")[0]
        if "custom code" in reason:
            raise UserError(
                f"{base} comes with code of its own, which is not run unless asked: read it, then say "
                "trust_remote_code: true in the run's file, or --trust-remote-code"
            ) from None
        raise UserError(f"{base} cannot be loaded as a model ({reason}); check the name or the folder") from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    complete(model, processor)
    if image_processor:
        processor.image_processor = _with(image_processor, getattr(processor, "image_processor", None))
    if quantised(model):
        _leave_unpacked(model)
        _check_codes(model, base)
        return model, processor
    return model.to(device), processor


def _with(settings: Mapping[str, Any], given: Any) -> Any:
    """The image processor ``given`` with other ``settings``."""
    if given is None:
        raise UserError("image_processor has settings, and the base reads text only; remove them")
    known = sorted(given.valid_kwargs.__annotations__)
    if unknown := [name for name in settings if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        mend = f"did you mean {close[0]}?" if close else f"use some of {', '.join(known)}"
        raise UserError(f"image_processor.{unknown[0]} is no setting of the base's {type(given).__name__}; {mend}")
    try:
        return type(given)(**given.to_dict() | settings)
    except Exception as error:  # what transformers' checks of types and its own code raise
        raise UserError(f"image_processor has a setting that {type(given).__name__} refuses: {gist(error)}.") from error


def see_as(processor: Any, folder: Path) -> None:
    """Have ``processor`` make of pictures what it made of them where the adapter in ``folder`` was trained."""
    if (folder / IMAGE_PROCESSOR_NAME).is_file() and hasattr(processor, "image_processor"):
        processor.image_processor = type(processor.image_processor).from_pretrained(str(folder))


def quantised(model: nn.Module) -> bool:
    """Whether the weights of a freshly loaded ``model`` are codes, be it by its files or because that was asked for."""
    return getattr(model, "hf_quantizer", None) is not None


def _leave_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit layers anew, for good, when they first answer on a CPU with AVX512-BF16.

    No gradient passes a packed layer: a run that is measured on its way would hardly learn from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_codes(model: nn.Module, base: str | Path) -> None:
    """See that the 4-bit layers of bitsandbytes are read as they were written.

    On a CPU with AVX-512 it begins a block of codes with every row, though where rows are no whole blocks these go on
    from one row to the next.

    Raises:
        UserError: a layer is read otherwise by rows than as the one row of codes that it is.
    """
    for name, module in model.named_modules():
        codes: Any = getattr(module, "weight", None)
        state = getattr(codes, "quant_state", None)
        if state is None or state.shape[-1] % state.blocksize == 0:
            continue
        from bitsandbytes.functional import dequantize_4bit

        flat = copy.copy(state)
        flat.shape = torch.Size((1, state.shape.numel()))
        if not torch.equal(dequantize_4bit(codes.data, state), dequantize_4bit(codes.data, flat).view(state.shape)):
            raise UserError(
                f"{base} cannot be held in 4 bits here: {name} has rows of {state.shape[-1]} weights, no multiple of "
                f"{state.blocksize}, and what bitsandbytes reads of those is wrong on this processor; use "
                "quantization: 8bit, or none, with a base whose files are not in 4 bits."
            )


def check_mergeable(model: nn.Module, base: str | Path) -> None:
    """See that an update can be added to the weights of ``model``, loaded from ``base``.

    Raises:
        UserError: they are quantised: most of the update would be lost in rounding.
    """
    if quantised(model):
        raise UserError(
            f"{base} is quantised, and an update is not worked out on its weights, nor merged into them, without being "
            "rounded as they are; name the model that it was made from."
        )


def computing() -> torch.device:
    """Where models compute: this machine's accelerator, else the CPU, or where ``accelerate launch --cpu`` says so."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or parse_flag_from_env("ACCELERATE_USE_CPU") else found


def _quantization(name: str | None) -> dict[str, BitsAndBytesConfig]:
    """What transformers is told: nothing without ``name``, for a None would put aside how the files are quantised."""
    if name is None:
        return {}
    if name not in QUANTIZATIONS:
        raise UserError(f"quantization {name!r} is unknown; use one of {', '.join(QUANTIZATIONS)}, or none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization needs the package bitsandbytes; install it with: pip install bitsandbytes")
    if name == "8bit":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": how}


def autocast_dtype(device: torch.device | str) -> torch.dtype | None:
    """What ``precision: auto`` means on ``device``: bfloat16 where it is faster than float32, else None (no autocast).

    On CUDA and XPU that is a matter of hardware support. CPUs differ too much to know, so one is timed for some 20 ms.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "xpu":
        return torch.bfloat16 if torch.xpu.is_bf16_supported() else None
    if device.type != "cpu":
        return None
    return torch.bfloat16 if cpu_rate(torch.bfloat16) >= 1.5 * cpu_rate(torch.float32) else None


def cpu_rate(dtype: torch.dtype) -> float:
    """Operations a second of this CPU in a product of a small language model's size: the better of two tries."""
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
    times = []
    for _ in range(3):  # the first one warms up
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * a.numel() * b.shape[1] / min(times[1:])
