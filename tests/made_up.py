"""Made-up results of runs, as ``lorasculpt eval`` writes them: for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pico
import torch
from safetensors.torch import save_file

from lorasculpt.evaluation import comparison, interval


def measured(share: float, n: int = 200) -> dict:
    scores = [1.0] * round(share * n) + [0.0] * (n - round(share * n))
    low, high = interval(scores)
    return {
        "value": float(np.mean(scores)),
        "low": low,
        "high": high,
        "n": n,
        "groups": list(range(n)),
        "scores": scores,
    }


def run(method: str, source: tuple[float, float], target: float, seed: int = 0, **fields) -> dict:
    """A made-up run: two source tasks from 80 % and 60 % to ``source``, one target task from 10 % to ``target``."""
    before = {"source": {"a_b": measured(0.8), "c": measured(0.6)}, "target": {"digits": measured(0.1)}}
    after = {"source": {"a_b": measured(source[0]), "c": measured(source[1])}, "target": {"digits": measured(target)}}
    return {"method": method, "seed": seed, "settings": {"r": 8, "seed": seed}, **comparison(before, after), **fields}


def details(i: int) -> dict:
    """The parts of a run that it may lack."""
    picture = {"image": "0.png", "question": "<b>Which</b> & why?", "answer": "7", "task": "digits"}
    known = {
        "image": "0.png",
        "question": "Is it a shape?",
        "answer": "yes",
        "task": "a_b",
        "base": "yes",
        "tuned": "Yes",
    }
    gone = {"image": "gone.png", "question": "Is it?", "answer": "yes", "task": "a_b", "base": "Yes.", "tuned": ""}
    point = {"source": 0.6, "target": 0.4, "source_interval": [0.5, 0.7], "target_interval": [0.3, 0.5]}
    return {
        "steps": 20,
        "seconds": 75.0,
        "adapter_bytes": 1_234_567,
        "trainable": 1000,
        "curve": [{"strength": 0.5} | point],
        "training": [{"step": s, "loss": 3 - s / 20 - i / 10} for s in range(1, 21)]
        + [{"step": s, "source": 0.7 - s / 100, "target": s / 40} for s in (0, 10, 20)],
        "gallery": [picture | {"base": "nine", "tuned": "7" if i == 0 else "1"}, gone, known],
    }


def write(folder: Path, *runs: dict, name: str = "results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pico.picture(0).save(folder / "0.png")
    path = folder / name
    path.write_text(json.dumps({"schema": 1, "versions": {"torch": "2.0"}, "runs": list(runs)}, allow_nan=False))
    return path


def two() -> list[dict]:
    return [
        run("lora", (0.3, 0.2), 0.6, label="LoRA", **details(0)),
        run("sparse", (0.7, 0.5), 0.55, **details(1)),
    ]


def seeds(name: str, sources: list[float], targets: list[float], **fields) -> list[dict]:
    """One run for each seed; both source tasks go to the same share."""
    pairs = enumerate(zip(sources, targets, strict=True))
    return [run(name, (source, source), target, seed=seed, **fields) for seed, (source, target) in pairs]


def lora(home: Path, densities: list[float], size: int = 24, base: Path | None = None) -> None:
    """The adapter of the run in ``home``: a linear in every layer, with that share of the entries of A and B.

    With ``base`` the base is written there, its large weights in the last columns, and ``run.yaml`` names it.
    """
    tensors, weights = {}, {}
    for i, density in enumerate(densities):
        name = f"model.layers.{i}.self_attn.q_proj"
        kept = (torch.arange(4 * size) < round(density * 4 * size)).float()
        tensors[f"base_model.model.{name}.lora_A.weight"] = kept.reshape(4, size).clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = kept.reshape(4, size).T.contiguous()
        weights[f"{name}.weight"] = torch.arange(1.0, size + 1).repeat(size, 1)
    (home / "adapter").mkdir(parents=True)
    save_file(tensors, home / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    if base is not None:
        base.mkdir()
        save_file(weights, base / "model.safetensors")
        (home / "run.yaml").write_text(json.dumps({"base": str(base)}))
