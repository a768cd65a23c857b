"""Methods without low rank: the weights themselves are trained, as a matrix D beside the frozen W0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from .update import Update, UpdateConfig

LOW_RANK = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")


class DenseUpdate(Update):
    """D x on one linear. D: (out, in), 0 at the start."""

    def __init__(self, config, place, context, base):
        super().__init__(config, place, context, base)
        self.D = nn.Parameter(torch.zeros(place.out_features, place.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.D)

    def moved(self) -> bool:
        return bool(self.D.detach().any())

    def weight(self, task: int | None = None) -> Tensor:
        return self.D


@dataclass
class DenseConfig(UpdateConfig):
    """Shared by the configs of methods that train whole weights: settings of low rank are refused."""

    update: ClassVar[type[Update]] = DenseUpdate
    merges: ClassVar[str] = "always"
    unused: ClassVar[tuple[str, ...]] = LOW_RANK

    def __post_init__(self):
        super().__post_init__()
        stock, name = LoraConfig(), type(self).__name__
        for field in self.unused:
            if getattr(self, field) != getattr(stock, field):
                raise ValueError(f"{name} does not support {field}: it trains whole weights, no factors of them.")
