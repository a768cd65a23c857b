"""The base as a teacher: what it would have said, in the forward passes of training, with the adapter off.

Two hooks do it, from the beginning of an optimizer step to its end. One reads the labels that the model is given; they
tell which tokens are answers. The other, on what makes the hidden states, runs it once more as the base, without
gradient, and lets a loss on both ride on the output. What a trainer makes of that output is its own affair: TRL never
makes logits of it, and reads its head's weight without calling it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError

IGNORED = -100  # a label that the loss skips


class Teacher:
    """The base of a model under training.

    Args:
        model: the base model, adapters in its layers: it is given the labels, and has a head.
        body: the part of ``model`` that is run twice. It holds every adapter, and its output has the hidden states.
        compare: called as ``compare(hidden, tuned, base)`` in every forward pass with a gradient; what it returns takes
            the place of ``hidden`` (rows, length, features). ``tuned`` and ``base`` (tokens, features) are the hidden
            states from which the tokens of answers are predicted, with the adapter and without.

    Raises:
        UserError: for a model without a head of its own, or one that trains weights of its base: there is nothing left
            to compare with.
    """

    def __init__(self, model: nn.Module, body: nn.Module, compare: Callable[[Tensor, Tensor, Tensor], Tensor]):
        name = type(model).__name__
        self.head = model.get_output_embeddings()
        if self.head is None or body is model:
            raise UserError(f"{name} shows no language head of its own, so its base cannot be asked what it would say.")
        for parameter, value in model.named_parameters():
            if value.requires_grad and "lora_" not in parameter and ".modules_to_save." not in parameter:
                raise UserError(
                    f"{parameter} of the base is being trained, so that the base is no longer there to compare with; "
                    "freeze it (projector: frozen) or choose another method."
                )
        self.model, self.body, self.compare = model, body, compare
        self._scale, self._cap = _scale_and_cap(model.config.get_text_config())
        self._parts = {part: _turned(part) for part in (model, self.head)}
        self._handles: list[Any] = []
        self._asking = False
        self._counted: Tensor | None = None

    def attach(self) -> None:
        """Listen to the forward passes from now on."""
        if not self._handles:
            self._handles = [  # before any hook that leaves some of the tokens out
                self.model.register_forward_pre_hook(self._read, with_kwargs=True, prepend=True),
                self.body.register_forward_hook(self._ask, with_kwargs=True, prepend=True),
            ]

    def detach(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def asked(self, part: nn.Module) -> Iterator[None]:
        """Within the block ``part`` is that of the base: adapters off, no dropout, no checkpoints, no gradient.

        Args:
            part: the whole model, or its head where that alone is called.
        """
        moded, switches = self._parts[part]
        modes = [module.training for module in moded]
        states = [switch._disable_adapters for switch in switches]
        try:
            self._asking = True
            for module in moded:
                module.training = False
            for switch in switches:  # PEFT's own switch would take their gradients from the parameters
                switch._disable_adapters = True
            with torch.no_grad():
                yield
        finally:
            self._asking = False
            for module, mode in zip(moded, modes, strict=True):
                module.training = mode
            for switch, state in zip(switches, states, strict=True):
                switch._disable_adapters = state

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, vocabulary) in fp32, of hidden states (tokens, features)."""
        found = self.head(hidden).float() * self._scale
        return found if self._cap is None else self._cap * torch.tanh(found / self._cap)

    def _read(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note from which positions the tokens of answers are predicted."""
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if shifted is not None:
            self._counted = shifted != IGNORED
        elif labels is not None:
            self._counted = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        else:
            self._counted = None

    @torch.compiler.disable  # modes and switches are turned: nothing that a graph could hold
    def _ask(self, body: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self._asking or not torch.is_grad_enabled():
            return None
        hidden = getattr(output, "last_hidden_state", None)
        if self._counted is None:
            raise UserError(
                "the model was given no labels, which tell where answers are: pass labels to it in training, and do "
                "without label smoothing or a loss function of your own."
            )
        if hidden is None or hidden.shape[:2] != self._counted.shape:
            raise UserError(f"the output of {type(body).__name__} has no hidden state for each label to compare by.")
        # without the cache that the first run has just filled
        again = {key: value for key, value in kwargs.items() if key != "past_key_values"} | {"use_cache": False}
        with self.asked(self.model):
            base = body(*args, **again).last_hidden_state
        counted = self._counted.to(hidden.device)
        output.last_hidden_state = self.compare(hidden, hidden[counted], base[counted])
        return output


def _turned(part: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """What has a mode in ``part``, and what has a switch."""
    switches = [m for m in part.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    # a linear has no mode, but one of bitsandbytes packs its weights for good when it answers in evaluation
    return [module for module in part.modules() if not isinstance(module, nn.Linear)], switches


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What a model multiplies its logits with, and where it then caps them softly."""
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((float(factor) for factor in factors if factor is not None), 1.0)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = 1 / divisor
    return scale, getattr(config, "final_logit_softcapping", None)
