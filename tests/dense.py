"""A net of two linears whose weights are trained, as an adapter's D and once more in numpy, gradients by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pico
import torch
from contract import close, equal, sgd, texts, train, trained, weights
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import lorasculpt
from lorasculpt import Clock
from lorasculpt.adapters.update import updates

STEPS, LR, MOMENTUM, CLIP = 5, 0.1, 0.9, 0.5
LINEARS = ["first", "second"]

Weights = list[np.ndarray]
Windows = Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def data() -> Windows:
    """``STEPS`` windows of two micro-batches of three rows."""
    draw = np.random.default_rng(4).normal
    return [[(draw(size=(3, 5)), draw(size=(3, 4))) for _ in range(2)] for _ in range(STEPS)]


def fit(model: nn.Module, windows: Windows) -> None:
    optimizer = sgd(model, LR, momentum=MOMENTUM)
    clock = Clock(model, optimizer)
    for window in windows:
        clock.begin_step()
        optimizer.zero_grad()
        for x, y in window:
            (0.5 * (model(torch.tensor(x)) - torch.tensor(y)).square().sum()).backward()
        nn.utils.clip_grad_norm_(trained(model), CLIP)
        optimizer.step()
        clock.end_step()


def gradients(W1: np.ndarray, W2: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sum (W2 tanh(W1 x) - y)^2 / 2 over the rows."""
    g1, g2 = np.zeros_like(W1), np.zeros_like(W2)
    for row in range(len(x)):
        h = np.tanh(W1 @ x[row])
        error = W2 @ h - y[row]
        g2 += np.outer(error, h)
        g1 += np.outer((W2.T @ error) * (1 - h**2), x[row])
    return g1, g2


def by_hand(W0: Weights, windows: Windows, kept: Callable[..., np.ndarray]) -> Weights:
    """The two weights after every window, trained as dense weights.

    ``kept(i, step, before, proposed, g)`` is what weight ``i`` becomes in a step (from 0) whose gradient is ``g``.
    """
    W, velocity = [w.copy() for w in W0], [0 * w for w in W0]
    for step, window in enumerate(windows):
        g = [sum(parts) for parts in zip(*(gradients(*W, x, y) for x, y in window), strict=True)]
        norm = np.sqrt(sum((each**2).sum() for each in g))
        for i in range(2):
            g[i] = g[i] * min(1, CLIP / (norm + 1e-6))
            velocity[i] = MOMENTUM * velocity[i] + g[i]
            W[i] = kept(i, step, W[i], W[i] - LR * velocity[i], g[i])
    return W


def check(config: PeftConfig, reference: Callable[[Weights, Windows], Weights]) -> PeftModel:
    """The net trained as ``config`` says; fails unless ``reference`` gives the same weights, and other ones than W0."""
    torch.manual_seed(3)
    model = get_peft_model(Net().double(), config)
    W0 = [update.base_weight().numpy().copy() for update in updates(model).values()]
    fit(model, data())
    for update, w0, expected in zip(updates(model).values(), W0, reference(W0, data()), strict=True):
        found = update.weight().detach().numpy()
        assert np.abs(found).max() > 1e-2
        np.testing.assert_allclose(found, expected - w0, rtol=1e-5, atol=1e-8)
    return model


def check_plain(model: PeftModel) -> None:
    """Fails unless ``model``, a pico Llama with a fresh adapter, learns what the base does by training its weights."""
    base, names = pico.build("llama")[0], updates(model)
    start = {name: base.get_submodule(name).weight.detach().clone() for name in names}
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in names)
    train(model, [texts()] * 5, sgd(model, momentum=0.9), clip=0.5)
    train(base, [texts()] * 5, sgd(base, momentum=0.9), clip=0.5)
    found = {name: update.base_weight() + update.weight() for name, update in names.items()}
    close(found, {name: base.get_submodule(name).weight for name in names}, rtol=1e-4)
    assert any(not torch.allclose(found[name], start[name], atol=1e-3) for name in names)


def check_resumed(fresh: Callable[[], PeftModel], folder: Path) -> None:
    """Two of five steps after a load, and again after going back in memory, end as five without a stop."""
    windows = [[batch] for batch in texts(number=5)]
    whole = fresh()
    train(whole, windows)
    model = fresh()
    clock = Clock(model, optimizer := sgd(model))
    train(model, windows[:3], optimizer, clock=clock)
    held, state = weights(model), clock.state_dict()
    model.save_pretrained(folder)
    loaded = lorasculpt.load(pico.build("llama")[0], folder, trainable=True)
    train(loaded, windows[3:])
    assert equal(weights(loaded), weights(whole))
    train(model, windows[3:], optimizer, clock=clock)
    for name, update in updates(model).items():  # back to where it was, in memory
        update.D.data.copy_(held[f"{name}.D"])
    clock.load_state_dict(state)
    train(model, windows[3:], optimizer, clock=clock)
    assert equal(weights(model), weights(whole))
