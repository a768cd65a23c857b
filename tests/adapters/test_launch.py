"""``accelerate launch`` with two processes trains what one process trains: under DDP, FSDP2, and FSDP2 that spares RAM.

One pair of processes runs them all; its checkpoints resume to the same weights. Where one process collates for both,
every sample keeps its task.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from contract import close, equal, masks, weights
from launched import RUNS, trainer
from launching import launch

from lorasculpt import method_logs

pytestmark = pytest.mark.timeout(900)  # sixty trainings in turn, on a machine that may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("launched")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    launch(str(here / "launched.py"), str(made), PYTHONPATH=path)
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process trains with the whole batch, made once per method."""
    made: dict[str, dict] = {}

    def run(method: str) -> dict:
        if method not in made:
            whole = trainer(tmp_path_factory.mktemp("alone") / method, method, 4, save_strategy="no")
            whole.train()
            model = whole.model
            made[method] = {"weights": weights(model), "masks": masks(model), "logs": method_logs(model)}
        return made[method]

    return run


@pytest.mark.parametrize(("strategy", "method"), RUNS)
def test_two_launched_processes_train_what_one_trains(strategy, method, folder, alone):
    found, expected = torch.load(folder / f"{strategy}-{method}.pt"), alone(method)
    close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-5)
    assert equal(found["masks"], expected["masks"])
    for key in ("cmr", "balance_loss", "distillation"):
        if key in expected["logs"]:
            assert found["logs"][key] == pytest.approx(expected["logs"][key], rel=1e-3)
    assert equal(found["resumed"], found["weights"])
