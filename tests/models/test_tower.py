"""The folded tower against the network with its batch norms, and its memory."""

from __future__ import annotations

import pretend
import torch
from torch.nn import functional as F

from lorasculpt.models.tower import STAGES, LiteTower, LiteTowerConfig, convert, remembering


def published(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights and statistics under the names of the published file."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def part(conv: str, norm: str, *shape: int) -> None:
        state[f"{conv}.weight"] = torch.randn(shape, generator=g) / (shape[1] * shape[2] ** 2) ** 0.5
        for name in ("weight", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(shape[0], generator=g) + 0.5
        for name in ("bias", "running_mean"):
            state[f"{norm}.{name}"] = torch.randn(shape[0], generator=g) / 4

    part("_conv_stem", "_bn0", 32, 3, 3, 3)
    index = 0
    for repeats, kernel, _, expansion, first, outer in STAGES:
        for repeat in range(repeats):
            inner = outer if repeat else first
            wide, name = inner * expansion, f"_blocks.{index}"
            if expansion > 1:
                part(f"{name}._expand_conv", f"{name}._bn0", wide, inner, 1, 1)
            part(f"{name}._depthwise_conv", f"{name}._bn1", wide, 1, kernel, kernel)
            part(f"{name}._project_conv", f"{name}._bn2", outer, wide, 1, 1)
            index += 1
    part("_conv_head", "_bn1", 1280, 320, 1, 1)
    return state


def slow(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network as published, one operation after the other."""

    def conv(x, name, norm, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        k, n = weight.shape[-1], x.shape[-1]
        pad = max((-(-n // stride) - 1) * stride + k - n, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        x = F.conv2d(x, weight, stride=stride, groups=groups)
        numbers = [state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *numbers, training=False, eps=1e-3)

    x = F.relu6(conv(x, "_conv_stem", "_bn0", 2))
    index = 0
    for repeats, _, stride, expansion, _, _ in STAGES:
        for repeat in range(repeats):
            name, h = f"_blocks.{index}", x
            if expansion > 1:
                h = F.relu6(conv(h, f"{name}._expand_conv", f"{name}._bn0"))
            h = F.relu6(conv(h, f"{name}._depthwise_conv", f"{name}._bn1", 1 if repeat else stride, h.shape[1]))
            h = conv(h, f"{name}._project_conv", f"{name}._bn2")
            x = x + h if repeat else h
            index += 1
    x = F.relu6(conv(x, "_conv_head", "_bn1"))
    return F.adaptive_avg_pool2d(x, 3).flatten(2).transpose(1, 2)


def tower() -> tuple[LiteTower, dict[str, torch.Tensor]]:
    state = published()
    made = LiteTower(LiteTowerConfig())
    made.load_state_dict(convert(state))
    return made.train(), state


@torch.no_grad()
def test_folded_convolutions_give_what_the_published_network_gives():
    made, state = tower()
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = made(pixels).last_hidden_state
    assert found.shape == (2, 9, 1280)
    torch.testing.assert_close(found, slow(state, pixels), atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_each_picture_is_computed_once_and_the_memory_ends_with_the_block():
    made, _ = tower()
    calls = []
    original = made._tokens
    made._tokens = lambda x: calls.append(len(x)) or original(x)
    a, b = torch.rand(2, 1, 3, 96, 96)
    with remembering():
        first = made(torch.cat([a, b, a])).last_hidden_state
        again = made(torch.cat([b, a])).last_hidden_state
    assert calls == [2]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[[1, 0]], again)
    made(a)
    assert calls == [2, 1]


@torch.no_grad()
def test_it_remembers_on_an_accelerator_too():
    made, _ = tower()
    pictures = torch.rand(2, 3, 96, 96)
    here = made(pictures).last_hidden_state
    with pretend.device() as device, remembering():
        made.to(device)
        for _ in range(2):
            found = made(pictures.to(device)).last_hidden_state
            assert found.device == device
            assert torch.equal(found.cpu(), here)
