"""EfficientNet-Lite0 as a Hugging Face vision tower: an image becomes 9 tokens of 1280 numbers.

The batch norms are folded into the convolutions when the weights are converted, so the tower has no training mode and
no running statistics that fine-tuning could disturb. Within :func:`remembering` each image is computed once: the tower
is frozen in the demo, so its output for an image never changes.

Architecture: Tan & Le, EfficientNet (arXiv 1905.11946), in its Lite form: no squeeze-and-excitation, ReLU6, stem and
head of fixed width. The output of the head, 1280 channels on a 6 x 6 grid for 192-pixel images, is pooled to 3 x 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# (repeats, kernel, stride, expansion, in channels, out channels) of each stage
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class LiteTowerConfig(PretrainedConfig):
    """``hidden_size``: channels of a token; ``grid``: tokens per side; ``image_size``: pixels per side."""

    model_type = "lorasculpt_lite_tower"

    def __init__(self, hidden_size: int = 1280, grid: int = 3, image_size: int = 192, **kwargs):
        self.hidden_size = hidden_size
        self.grid = grid
        self.image_size = image_size
        super().__init__(**kwargs)


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: the odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        (k, s), (h, w) = (self.kernel_size[0], self.stride[0]), x.shape[-2:]
        across, down = (max((-(-n // s) - 1) * s + k - n, 0) for n in (w, h))
        if across or down:
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection, and the skip where shapes agree."""

    def __init__(self, kernel: int, stride: int, expansion: int, inner: int, outer: int):
        super().__init__()
        wide = inner * expansion
        self.expand = Conv(inner, wide, 1) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, kernel, stride, groups=wide)
        self.project = Conv(wide, outer, 1)
        self.skip = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.skip else h


class LiteTower(PreTrainedModel):
    """``pixel_values`` (batch, 3, image_size, image_size) in [-1, 1] -> ``last_hidden_state`` (batch, grid², 1280)."""

    config_class = LiteTowerConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    _known: dict[bytes, Tensor] | None = None  # shared by all towers while remembering

    def __init__(self, config: LiteTowerConfig):
        super().__init__(config)
        self.stem = Conv(3, 32, 3, 2)
        blocks = []
        for repeats, kernel, stride, expansion, inner, outer in STAGES:
            blocks.append(Block(kernel, stride, expansion, inner, outer))
            blocks += [Block(kernel, 1, expansion, outer, outer) for _ in range(repeats - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.head = Conv(320, config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, **_) -> BaseModelOutput:
        known = LiteTower._known
        tokens = self._tokens(pixel_values) if known is None else self._recalled(pixel_values, known)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def _tokens(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x.to(self.stem.weight.dtype)))
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(F.relu6(self.head(x)), self.config.grid)
        return x.flatten(2).transpose(1, 2)  # (batch, grid * grid, 1280)

    @torch.no_grad()
    def _recalled(self, pixel_values: Tensor, known: dict[bytes, Tensor]) -> Tensor:
        """The tokens of each image, computed unless they are remembered.

        Two images at a time: what twelve come to is no longer in a processor's cache when it is read again, which
        costs more than the convolutions (58 ms an image, against 24).
        """
        keys = [hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest() for image in pixel_values]
        new = {key: i for i, key in enumerate(keys) if key not in known}
        if new:
            # in full precision whatever autocast says: what is remembered must not depend on who asked first
            with torch.autocast(pixel_values.device.type, enabled=False):
                pairs = pixel_values[list(new.values())].split(2)
                known.update(zip(new, torch.cat([self._tokens(pair) for pair in pairs]), strict=True))
        return torch.stack([known[key] for key in keys])


@contextmanager
def remembering() -> Iterator[None]:
    """Within the block, compute each distinct image once. Only for frozen towers with the published weights."""
    LiteTower._known = {}
    try:
        yield
    finally:
        LiteTower._known = None


def register() -> None:
    """Make ``AutoConfig``/``AutoModel`` know the tower, so that Llava can be built on it and loaded again."""
    AutoConfig.register(LiteTowerConfig.model_type, LiteTowerConfig, exist_ok=True)
    AutoModel.register(LiteTowerConfig, LiteTower, exist_ok=True)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights (``efficientnet-lite0-57934424.pth``) with every batch norm folded into its convolution.

    For y = gamma (conv(x) - mean) / sqrt(var + eps) + beta the folded weight is w * gamma / sqrt(var + eps) and the
    folded bias beta - mean * gamma / sqrt(var + eps), with the network's eps of 1e-3.
    """

    def fold(conv: str, norm: str) -> dict[str, Tensor]:
        gain = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + 1e-3)
        return {
            "weight": state[f"{conv}.weight"] * gain[:, None, None, None],
            "bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain,
        }

    folded = {"stem": fold("_conv_stem", "_bn0"), "head": fold("_conv_head", "_bn1")}
    for i in range(sum(stage[0] for stage in STAGES)):
        old, new = f"_blocks.{i}", f"blocks.{i}"
        if f"{old}._expand_conv.weight" in state:
            folded[f"{new}.expand"] = fold(f"{old}._expand_conv", f"{old}._bn0")
        folded[f"{new}.depthwise"] = fold(f"{old}._depthwise_conv", f"{old}._bn1")
        folded[f"{new}.project"] = fold(f"{old}._project_conv", f"{old}._bn2")
    return {f"{name}.{key}": value for name, part in folded.items() for key, value in part.items()}
