"""Model Tailor: keep a tenth of a tuned model's weights, return the others to the base, and let the kept ones make up.

It needs inputs of each layer, as second moments E[x xᵀ] over the tokens of some calibration samples.

Source: Zhu et al., Model Tailor (arXiv 2402.12048), and ``llava/sparsegpt.py`` of the authors' code, which is followed
where the two differ: both parts of the score are standardised within each row of a block of 128 columns, and each
block keeps the same share. In one thing the code is not followed unless asked: it adds the compensation that OBS
subtracts, so that its kept weights move away from what they should make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.plain import Adapter
from ..errors import UserError
from .edits import Update, delta_of

BLOCK = 128
"""Columns that are scored together, before the compensation for them moves the next ones."""
DAMP = 0.01
"""Share of the mean of a moment's diagonal that is added to it, so that it can be inverted."""


def tailor(
    before: Tensor, after: Tensor, moment: Tensor, keep: float = 0.1, *, block: int = BLOCK, released: bool = False
) -> Tensor:
    """Model Tailor on the weight of one linear layer.

    Column by column, entries that are not kept return to the base, and the columns to the right take over what that
    takes from the outputs (OBS): W[:, j+1:] -= (w - w0) / h_jj · h_j,j+1:, with h the inverse of the moment without the
    columns that are done. What lies to the right of a block takes over from all of its columns at once, in one product.
    Kept are the int(keep · numel) entries of each block with the largest

        .5 z(|W - W0|) + .5 z(W² / h_jj)

    Args:
        before: W0, (out, in).
        after: W, the tuned weight, (out, in).
        moment: E[x xᵀ] of the layer's inputs, (in, in); its scale has no effect.
        keep: share of the entries that do not return to the base, in (0, 1].
        block: columns scored together.
        released: whether the compensation has the sign of the authors' code.

    Returns:
        The new weight, (out, in) in fp32; computed in fp64.

    Raises:
        UserError: ``keep`` is out of its range, shapes do not fit together, or the moment is not that of real inputs.
    """
    check_keep(keep)
    columns = before.shape[1]
    if after.shape != before.shape or moment.shape != (columns, columns):
        raise UserError(
            f"Weights of {tuple(before.shape)} and {tuple(after.shape)} and a moment of {tuple(moment.shape)} do not "
            "belong to one layer; make all three of the same one."
        )
    base, tuned = before.double(), after.double()
    changes, weight, found = (tuned - base).abs(), tuned.clone(), base.clone()
    factor = _inverse_factor(moment)  # row j is h_j,j: / sqrt(h_jj), with h_jj its first entry squared
    sign = 1 if released else -1
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        saliency = weight[:, part].square() / factor.diagonal()[part].square()
        scores = (_standard(changes[:, part]) + _standard(saliency)) / 2
        kept = torch.zeros(scores.numel(), dtype=torch.bool)
        kept[scores.flatten().sort(descending=True, stable=True).indices[: int(keep * scores.numel())]] = True
        kept = kept.view(scores.shape)
        lost = torch.empty_like(scores)
        for j in range(part.start, part.stop):
            found[:, j] = weight[:, j].where(kept[:, j - start], base[:, j])
            lost[:, j - start] = (weight[:, j] - found[:, j]) / factor[j, j]
            rest = slice(j + 1, part.stop)
            weight[:, rest] += sign * lost[:, j - start, None] * factor[j, rest]
        weight[:, part.stop :] += sign * lost @ factor[part, part.stop :]  # what is due to the right of the block
    return found.float()


def model_tailor(
    adapter: Adapter,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    keep: float = 0.1,
    *,
    released: bool = False,
) -> Update:
    """:func:`tailor` on every layer of an adapter.

    Args:
        adapter: as :func:`~lorasculpt.posthoc.read` returns it.
        weights: the base's weight of each layer, by the layer's name.
        moments: what :func:`moments_of` returns for the tuned model.
        keep: share of the entries of W0 + D that do not return to W0, in (0, 1].
        released: whether the compensation has the sign of the authors' code.

    Raises:
        UserError: ``keep`` is out of its range, a layer has no weight or no moment; and, when an update is
            asked for, what :func:`tailor` raises.
    """
    check_keep(keep)
    pairs = {pair.name: pair for pair in adapter.pairs}
    missing = [name for name in pairs if name not in weights or name not in moments]
    if missing:
        raise UserError(f"{missing[0]} has no weight or no moment; give both for every layer of the adapter.")

    def of(name: str) -> Tensor:
        before = weights[name].float()
        return tailor(before, before + delta_of(pairs[name]), moments[name], keep, released=released) - before

    return Update(adapter, of)


@torch.no_grad()
def moments_of(model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """E[x xᵀ] of the inputs of linear layers over all positions of some batches, (in, in) in fp32 on the CPU.

    Padding counts as any position does: take batches of one sample. Each moment has in² entries of 4 bytes.

    Args:
        model: the tuned model, as PEFT or transformers made it; in evaluation mode.
        names: of layers, as in ``Adapter.pairs``.
        batches: the model's keyword arguments, 128 samples in the authors' code.

    Raises:
        UserError: the model has no layer of a name, or a layer saw no input.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules, wanted = dict(inner.named_modules()), tuple(names)
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise UserError(f"The model has no layer {missing[0]}; is it the adapter's?")
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(wanted, 0)

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            product = (x.T @ x).cpu()
            if name in sums:
                sums[name] += product
            else:
                sums[name] = product
            counts[name] += x.shape[0]

        return hook

    with _hooked([(modules[name], note(name)) for name in wanted]):
        for batch in batches:
            model(**batch)
    if unseen := [name for name in wanted if not counts[name]]:
        raise UserError(f"{unseen[0]} saw no input; give samples that pass through every layer of the adapter.")
    return {name: sums[name] / counts[name] for name in wanted}


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper U with UᵀU the inverse of the damped moment; inputs that are always zero count as independent ones."""
    H = moment.double().clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMP * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        raise UserError(
            "A moment is not that of real inputs; compute it again and look for values not finite."
        ) from None


def _standard(values: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1; a row of equals is zero."""
    if values.shape[1] == 1:
        return torch.zeros_like(values)
    return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp_min(1e-300)


def check_keep(keep: float) -> None:
    """Raise :class:`UserError` unless ``keep`` is in (0, 1]."""
    if not 0 < keep <= 1:
        raise UserError(f"Model Tailor keeps a share above 0 and up to 1, not {keep:g}.")
