"""Where a model keeps its language, its vision and its projector: one table, and the layers of each part.

Adding a family is adding its ``model_type`` to a row of `FAMILIES`. The names are those of the module tree in
transformers 5; files saved by older versions load into the same tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast

from peft import PeftModel
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_CLASSES

from ..errors import UserError

SCOPES = ("language", "vision", "projector", "all")


@dataclass(frozen=True)
class Parts:
    """Module paths of a base model's three parts.

    Args:
        language: The language model, without its head.
        vision: The vision tower; None if the model reads text only.
        projector: What turns vision tokens into language tokens; sometimes several modules, sometimes inside
            ``vision``, which then does not count them.
    """

    language: str
    vision: str | None = None
    projector: tuple[str, ...] = ()


_LLAVA = Parts("model.language_model", "model.vision_tower", ("model.multi_modal_projector",))
_MLLAMA = Parts("model.language_model", "model.vision_model", ("model.multi_modal_projector",))
_LLAMA4 = Parts("language_model", "vision_model", ("multi_modal_projector",))
_IDEFICS = Parts("model.text_model", "model.vision_model", ("model.connector",))
_QWEN = Parts("model.language_model", "model.visual", ("model.visual.merger",))
_DEEPSTACK = Parts(
    "model.language_model", "model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list")
)
_GEMMA4 = Parts("model.language_model", "model.vision_tower", ("model.embed_vision",))
_ALIGNED = Parts("model.language_model", "model.vision_model", ("model.aligner",))
_ENCODED = Parts("model.language_model", "model.vision_encoder", ("model.vision_projection",))
_BLIP = Parts("language_model", "vision_model", ("qformer", "language_projection"))

FAMILIES: dict[str, Parts] = {
    **dict.fromkeys(("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava"), _LLAVA),
    **dict.fromkeys(("paligemma", "gemma3", "mistral3", "internvl", "qianfan_ocr"), _LLAVA),
    **dict.fromkeys(("aria", "aya_vision", "cohere2_vision", "fast_vlm", "got_ocr2"), _LLAVA),
    **dict.fromkeys(("lfm2_vl", "molmo2", "perception_lm"), _LLAVA),
    "mllama": _MLLAMA,
    "llama4": _LLAMA4,
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _IDEFICS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "exaone4_5"), _QWEN),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr"), _QWEN),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _DEEPSTACK),
    **dict.fromkeys(("gemma3n", "gemma4"), _GEMMA4),
    **dict.fromkeys(("deepseek_vl", "janus"), _ALIGNED),
    "lighton_ocr": _ENCODED,
    **dict.fromkeys(("blip-2", "instructblip"), _BLIP),
}


def parts(model: nn.Module) -> Parts:
    """The parts of ``model``, which may be wrapped by PEFT. A text-only causal language model has ``language`` alone.

    Raises:
        UserError: the family is not in `FAMILIES`, or it is no model of transformers.
    """
    base = _base(model)
    kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    if kind in FAMILIES:
        return FAMILIES[kind]
    text_only = kind not in IMAGE_TEXT_CLASSES and type(base).__name__ in CAUSAL_CLASSES.values()
    if text_only and hasattr(base, base.base_model_prefix):
        return Parts(base.base_model_prefix)
    raise UserError(
        f"models of the family {kind!r} are not known here, so no scope can be named; list the layers in "
        f"target_modules, or use one of {', '.join(sorted(FAMILIES))}"
    )


def linears(model: nn.Module, scope: str) -> dict[str, nn.Linear]:
    """The linear layers of a scope by their full names in the base model, in its order; never the head.

    Routers and gates of one output are left out: a low rank of them means nothing. Under PEFT an adapted layer is named
    and returned as it was before it was adapted.

    Args:
        scope: ``"language"``, ``"vision"``, ``"projector"`` or ``"all"``, which is the three together.

    Raises:
        UserError: unknown scope or family, or no linear layer in the scope (Gemma 3's projector, a text-only model).
    """
    if scope not in SCOPES:
        raise UserError(f"the scope {scope!r} is unknown; use one of {', '.join(SCOPES)}")
    base, names = _base(model), parts(model)
    head = base.get_output_embeddings()
    found = {
        name: layer
        for name, layer in _layers(base)
        if isinstance(layer, nn.Linear)
        # nn.MultiheadAttention reads the weight of its out_proj and never calls it, so an adapter there does nothing
        and not isinstance(layer, NonDynamicallyQuantizableLinear)
        and layer is not head
        and layer.out_features > 1
        and not (type(layer).__name__.endswith("Router") or "router" in name.split("."))  # Llama 4's returns two things
        and (part := _part(name, names)) is not None
        and scope in (part, "all")
    }
    if not found:
        mend = "projector: full or frozen" if scope == "projector" else "another scope, or target_modules"
        raise UserError(f"the {scope} part of {base.config.model_type!r} has no linear layers to adapt; use {mend}")
    return found


def target_regex(model: nn.Module, scope: str) -> str:
    """A short pattern for ``LoraConfig.target_modules`` that matches the layers of `linears`, and no other module.

    Raises:
        UserError: as `linears`, or no short pattern tells these layers from the rest.
    """
    wanted, names = set(linears(model, scope)), parts(model)
    everything = {name for name, _ in _layers(_base(model))}
    pattern = "|".join(_patterns(wanted, everything, names))
    if {name for name in everything if re.fullmatch(pattern, name)} != wanted:
        raise UserError(f"no pattern matches exactly the {scope} layers of this model; list them in target_modules")
    return pattern


def left_out(model: nn.Module) -> float:
    """The share of the language model's weights that no linear of its scope holds, such as experts in one tensor."""
    names = parts(model)
    held = sum(layer.weight.numel() for layer in linears(model, "language").values())
    whole = sum(
        weight.numel()
        for name, weight in _base(model).named_parameters()
        if _inside(name, names.language) and weight.ndim > 1 and "embed" not in name
    )
    return 1 - held / whole


def in_language(model: nn.Module, name: str) -> bool:
    """Whether ``name`` lies in the language part of the base ``model``, as all does in a model that is not known."""
    try:
        return _inside(name, parts(model).language)
    except UserError:
        return True


def _base(model: nn.Module) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def _layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``module``; an adapted layer counts as the layer it adapts and hides what it is made of."""
    for name, child in module.named_children():
        adapted = getattr(child, "base_layer", None)
        if isinstance(adapted, nn.Module):
            yield prefix + name, adapted
        else:
            yield prefix + name, child
            yield from _layers(child, f"{prefix}{name}.")


def _inside(name: str, prefix: str | None) -> bool:
    return prefix is not None and f"{name}.".startswith(f"{prefix}.")


def _part(name: str, names: Parts) -> str | None:
    if any(_inside(name, prefix) for prefix in names.projector):
        return "projector"
    if _inside(name, names.vision):
        return "vision"
    return "language" if _inside(name, names.language) else None


def _patterns(wanted: set[str], everything: set[str], names: Parts) -> Iterator[str]:
    """One pattern for each module of ``names`` that holds any of ``wanted``: its path, then how its layers end."""
    for prefix in filter(None, (names.language, names.vision, *names.projector)):
        within = {name for name in everything if _inside(name, prefix)}
        but = ""
        if prefix == names.vision:
            within = {name for name in within if _part(name, names) == "vision"}
            inner = [re.escape(path.removeprefix(f"{prefix}.")) for path in names.projector if _inside(path, prefix)]
            but = rf"(?!(?:{'|'.join(inner)})(?:\.|$))" if inner else ""
        if prefix in wanted:  # the module is itself a linear layer
            yield re.escape(prefix)
        tails = _tails(wanted & within - {prefix}, within - wanted)
        if tails:
            yield rf"{re.escape(prefix)}\.{but}(?:.*\.)?(?:{'|'.join(tails)})"


def _tails(wanted: set[str], unwanted: set[str]) -> list[str]:
    """How the names of ``wanted`` end: for each the fewest last words that no name of ``unwanted`` ends with."""

    @cache
    def unique(tail: str) -> bool:
        return not any(re.search(rf"(?:^|\.){tail}$", name) for name in unwanted)

    tails = set()
    for name in wanted:
        *front, last = name.split(".")
        words = [r"\d+" if word.isdigit() else re.escape(word) for word in front] + [re.escape(last)]
        ends = (r"\.".join(words[-count:]) for count in range(1, len(words) + 1))
        tails.add(next(filter(unique, ends), re.escape(name)))
    return sorted(tails)
