"""A compiled model: one graph, as many as plain LoRA has, and none more when it prunes."""

from __future__ import annotations

import pico
import pytest
import torch
from contract import batches, close, logits, loss, masks, records, sgd, start, texts, train, weights
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

STEPS = 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def windows(family: str, folder) -> list:
    """The same batch in each of ``STEPS`` steps; of a family that sees, with its pictures."""
    if family == "llama":
        return [texts()] * STEPS
    found = batches(pico.build(family)[1], records(folder, 2), 2)
    assert "pixel_values" in found[0]
    return [found] * STEPS


def graphs(model, batches) -> tuple[int, int]:
    """(graphs, graph breaks) of the steps of the compiled ``model``; compiling anything again is an error."""
    logits(model, batches[0][0])  # transformers takes a lock in the first forward pass, which no graph can have
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(compiled, batches, sgd(model))
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_one_graph_as_plain_lora_none_more_when_it_prunes_and_it_learns_the_same(family, tmp_path):
    steps = windows(family, tmp_path)
    model, _ = start(family, prune_step=2)
    found = graphs(model, steps)
    assert any(not bool(mask.all()) for mask in masks(model).values())  # it did prune
    torch._dynamo.reset()
    counters.clear()
    plain = get_peft_model(
        pico.build(family)[0], LoraConfig(target_modules=model.peft_config["default"].target_modules)
    )
    assert found == graphs(plain, steps) == (1, 0)

    eager, _ = start(family, prune_step=2)
    train(eager, steps)
    close(weights(model), weights(eager), rtol=1e-4, atol=1e-6)
    assert loss(model, steps[0][0]).isfinite()
