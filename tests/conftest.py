"""What every test shares: no network, one thread, a fixed seed, and the pico models saved once per run."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
# The models are so small that a second thread only costs time; and it sums in another order, so the processes that a
# test starts must do as this one does for their numbers to be equal to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
import yaml

from lorasculpt.config import RunConfig

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What imports made stays: a Trainer looks through all objects when it ends, a third of what a test takes."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``pico_folder("llava")`` is that family as a Hugging Face folder. Tests share it: read only."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = pico.save(name, tmp_path_factory.mktemp("pico") / name)
        return saved[name]

    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A ``train.jsonl`` of eight pictures and one question each."""
    return pico.write_data(tmp_path / "data")


@pytest.fixture
def a_run(tmp_path: Path, pico_folder: Callable[[str], Path]) -> Callable[..., Callable[..., RunConfig]]:
    """``a_run(method=..., training=..., evaluate=...)`` writes ``run.yaml`` of a run of the tiny llava.

    It trains on four questions about pictures, ``data/train.jsonl``. What comes back is a function that gives the
    config, changed by ``key=value``.
    """

    def write(**sections) -> Callable[..., RunConfig]:
        pico.write_data(tmp_path / "data", n=4)
        settings = {"base": str(pico_folder("llava")), "output": "out", "data": {"train": "data/train.jsonl"}}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings | sections))
        return lambda *overrides: RunConfig.load(path, overrides)

    return write
