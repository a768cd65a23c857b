"""A compiled model: one graph, as many as plain LoRA has, and none more when it prunes."""

from __future__ import annotations

import pico
import pytest
import torch
from contract import adapt, close, loss, masks, sgd, start, texts, train, weights
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

STEPS = 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs(model, optimizer=None) -> tuple[int, int]:
    """(graphs, graph breaks) of ``STEPS`` steps of the compiled ``model``; compiling anything again is an error."""
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, [texts()] * STEPS, optimizer or sgd(model))
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("method", ["lorasculpt"])
def test_one_graph_as_plain_lora_and_none_more_when_it_prunes(method):
    model, _ = start("llama", method, prune_step=2)
    found = graphs(model)
    assert any(not bool(mask.all()) for mask in masks(model).values())  # it did prune
    torch._dynamo.reset()
    counters.clear()
    plain = get_peft_model(
        pico.build("llama")[0], LoraConfig(target_modules=model.peft_config["default"].target_modules)
    )
    assert found == graphs(plain) == (1, 0)


@pytest.mark.parametrize("method", ["lorasculpt"])
def test_compiled_it_learns_the_same(method):
    eager = adapt(pico.build("llama")[0], method, prune_step=2)
    train(eager, [texts()] * STEPS)
    model = adapt(pico.build("llama")[0], method, prune_step=2)
    graphs(model)
    close(weights(model), weights(eager), rtol=1e-4, atol=1e-6)
    assert loss(model, texts()[0]).isfinite()
