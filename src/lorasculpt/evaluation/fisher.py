"""Fisher information: how much what a base says depends on each of its weights, from texts that it wrote itself.

    prompts = self_prompts(base, processor, 200)
    fisher(base, processor, prompts, "fisher.safetensors")
    model = get_peft_model(base, RegularizedConfig(penalty="ewc", fisher="fisher.safetensors"))

For a text with the log-likelihood l, the sum over its tokens, the diagonal of the Fisher information is the mean of
(dl / dW)^2, and here its share of one token. Texts that were sampled from the base make an unbiased estimate of it: the
gradients of different tokens are then uncorrelated, so that the square of their sum may stand for the sum of their
squares, and one backward pass does for a text. Other texts make what is called the empirical Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..adapters.fisher import save_fisher
from ..adapters.layers import sites
from ..data.batches import IGNORED, Collator, rows
from ..data.records import Record
from ..errors import UserError
from ..models.parts import linears
from .drift import Prompt, base_of
from .prompts import chat, encode, evaluating, followed
from .strength import moved

Seen = dict[str, list[tuple[Tensor, Tensor]]]  # inputs and outputs of each linear, in one forward pass


def fisher(
    model: nn.Module,
    processor,
    prompts: Sequence[Prompt],
    path: str | Path,
    *,
    modules: Sequence[str] | None = None,
    precision: torch.dtype | None = None,
    progress: str | None = None,
) -> None:
    """Write the diagonal Fisher information of the weights of ``model``'s base, per token, into a safetensors file.

    It is summed in fp32, four bytes for each weight; the file has two. The gradient of a weight is made of what goes in
    and out of its linear, and no parameter gets one, trained or not.

    Args:
        model: a Hugging Face model, with PEFT's adapters (which are off meanwhile) or without.
        processor: its processor or tokenizer.
        prompts: texts: those of ``self_prompts``, or ``spoken`` of given data.
        path: the file.
        modules: names of linears in the base model. Default: those that the adapter "default" adapts; without one,
            those of the language part.
        precision: dtype of autocast; None computes in the model's own.
        progress: words beside the progress bar; None shows no bar.

    Raises:
        UserError: without texts, if a linear takes part in none of them, or if gradients do not pass one (some
            quantised ones), and where an adapter has moved the base weights, so that the base is no longer there.
    """
    if not prompts:
        raise UserError("the Fisher information needs at least one text; give some.")
    if (obstacle := moved(model)) is not None:
        raise UserError(f"{obstacle}, so that its Fisher information cannot be told; begin with another.")
    layers = _layers(model, modules)
    sums: dict[str, Tensor] = {}
    texts = [chat(processor, prompt.record) for prompt in prompts]
    with (
        evaluating(model, precision),
        base_of(model),
        tqdm(total=len(texts), desc=progress, disable=not progress) as bar,
    ):
        for prompt, text in zip(prompts, texts, strict=True):
            inputs = followed(encode(model, processor, [prompt.record], [text]), [list(prompt.tokens)])
            for name, gradient in _gradients(model, layers, inputs, len(prompt.tokens)):
                sums[name] = sums[name].addcmul_(gradient, gradient) if name in sums else gradient.square_()
            bar.update()
    tokens = sum(len(prompt.tokens) for prompt in prompts)
    for name in layers:
        if name not in sums:
            raise UserError(f"no text says anything about {name}: give some with pictures, or adapt other linears.")
    save_fisher(path, {name: sums[name].div_(tokens) for name in layers}, texts=len(texts), tokens=tokens)


def spoken(processor, records: Sequence[Record]) -> list[Prompt]:
    """The answers of ``records`` as texts, with the tokens that training would have the model say.

    Args:
        processor: the processor or tokenizer of the model.
        records: questions with their answers.
    """
    collate, found = Collator(processor), []
    for record, row in zip(records, rows(records), strict=True):
        batch = collate([row])
        found.append(Prompt(record, tuple(batch["input_ids"][batch["labels"] != IGNORED].tolist())))
    return found


def _layers(model: nn.Module, modules: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linears whose weights are asked about, without their adapters."""
    adapted = {name: site.base for name, site in sites(model).items()}
    if modules is None:
        return dict(adapted or linears(model, "language"))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {name: base.get_submodule(name) for name in modules}
    return {
        name: layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for name, layer in found.items()
    }


def _gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: dict, width: int
) -> Iterator[tuple[str, Tensor]]:
    """Of each linear that takes part the gradient (out, in), in fp32, of how likely the last ``width`` tokens are."""
    with torch.enable_grad(), _watched(layers) as seen:
        logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[0, -width - 1 : -1]
        likelihood = -F.cross_entropy(logits.float(), inputs["input_ids"][0, -width:], reduction="sum")
        outputs = [output for pairs in seen.values() for _, output in pairs]
        found = iter(torch.autograd.grad(likelihood, outputs, allow_unused=True) if outputs else ())
    for name, pairs in seen.items():
        passes = [(x, at_output) for (x, _), at_output in zip(pairs, found, strict=False) if at_output is not None]
        if passes:
            inward = torch.cat([x.flatten(0, -2) for x, _ in passes])
            outward = torch.cat([at_output.flatten(0, -2) for _, at_output in passes])
            yield name, outward.float().T @ inward.float()


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[Seen]:
    """Within the block what goes in and out of the linears is kept, and gradients reach all outputs."""
    seen: Seen = {name: [] for name in layers}

    def watch(name: str):
        def hook(layer: nn.Module, args: tuple, output: Tensor) -> None:
            if args[0].requires_grad and not output.requires_grad:
                raise UserError(
                    f"no gradient passes {name}, a {type(layer).__name__}: load the base without quantization to find "
                    "its Fisher information."
                )
            output.requires_grad_()  # the first ones have nothing before them that needs a gradient
            seen[name].append((args[0].detach(), output))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
