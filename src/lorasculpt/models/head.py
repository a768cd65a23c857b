"""What trainers send through the language head: the tokens of answers, not those of questions as well.

TRL's fused head picks out the tokens that count on devices with Triton alone. On a CPU it multiplies every token of the
prompt with the whole vocabulary, there and back, for a result that is then masked: half a step's time where questions
are long and answers short.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import IGNORED


@contextmanager
def answers_alone(model: nn.Module) -> Iterator[None]:
    """Within the block, a forward pass with ``fused_lm_head=True`` and a gradient is given the tokens of answers alone.

    Two hooks: one takes from the labels which tokens count, the other leaves only these of the hidden states, as one
    row. Loss and gradients are those of the whole, up to the rounding of sums; what has one value per token comes as
    (1, tokens).

    Args:
        model: the base model, to whose forward TRL's trainer has given the argument ``fused_lm_head``.
    """
    counted: list[Tensor] = []

    def read(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        counted.clear()
        labels = kwargs.get("labels")
        if labels is None or not kwargs.get("fused_lm_head") or not torch.is_grad_enabled():
            return None
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        mask = following != IGNORED
        mask[0, 0] |= ~mask.any()  # a batch without answers still reaches the loss, which is then zero
        counted.append(mask)
        return args, kwargs | {"labels": None, "shift_labels": following[mask][None]}

    def pick(body: nn.Module, args: tuple, output: Any) -> Any:
        if counted and torch.is_grad_enabled():  # a teacher may run the body once more, for all of its tokens
            output.last_hidden_state = output.last_hidden_state[counted[0].to(output.last_hidden_state.device)][None]
        return output

    handles = [
        model.register_forward_pre_hook(read, with_kwargs=True),
        model.base_model.register_forward_hook(pick),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
