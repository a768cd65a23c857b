"""What the page shows of the adapters: maps that agree with what was measured, and never a reason to fail."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from made_up import lora, run, write

from lorasculpt.inspect.lora import inspect, write_json
from lorasculpt.report.heat import FAINT, Panel, even, heat, scale
from lorasculpt.report.inside import TOTALS, _loads, inside
from lorasculpt.report.page import report
from lorasculpt.report.results import entries, read


def one(folder: Path, label: str, densities: list[float], **options) -> Path:
    """A run with its results and its adapter."""
    path = write(folder, run("made", (0.3, 0.2), 0.6, label=label))
    lora(folder, densities, **options)
    return path


def routed() -> dict:
    """An inspection of two linears of three experts and two tasks, as ``lorasculpt inspect --json`` writes it."""
    about = {"part": "model", "kind": "q_proj", "energy": {}, "load": [1.0, 1.0, 1.0], "entropy": 1.0}
    loads = [{"a": [3.0, 0.0, 0.0], "b": [0.0, 1.5, 1.5]}, {"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]}]
    linears = [
        about | {"name": f"model.layers.{i}.q_proj", "block": i, "tasks": tasks, "apart": 1.0 - i, "relative": {"a": i}}
        for i, tasks in enumerate(loads)
    ]
    return {"schema": 1, "folder": "x", "base": "y", "method": "m", "records": {"a": 2, "b": 2}, "linears": linears}


def boxes(svg: str) -> list[tuple[np.ndarray, float]]:
    """The rectangles of a heat map below its legend: their corners, and their tint."""
    shapes = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--series-0\)(?:; opacity: ([\d.]+))?', svg)
    found = [
        (np.array(re.findall(r"-?[\d.]+", box), float).reshape(-1, 2), float(tint or 1))
        for shape, tint in shapes
        for box in re.findall(r"M[^z]*z", shape)
    ]
    legend = min(corners[:, 1].min() for corners, _ in found)
    return [(corners, tint) for corners, tint in found if corners[:, 1].min() > legend + 5]


def cells(svg: str, panel: Panel) -> np.ndarray:
    """The tints of the only ``panel`` of a heat map, read off its rectangles; nan where there is none."""
    drawn = boxes(svg)
    left = min(corners[:, 0].min() for corners, _ in drawn)
    width = (max(corners[:, 0].max() for corners, _ in drawn) - left) / len(panel.columns)
    tops = sorted({corners[:, 1].min() for corners, _ in drawn})
    found = np.full(panel.values.shape, np.nan)
    for corners, tint in drawn:
        start, end = (round((f(corners[:, 0]) - left) / width) for f in (np.min, np.max))
        found[tops.index(corners[:, 1].min()), start:end] = tint
    return found


def test_a_map_has_the_tint_of_every_cells_step():
    values = np.random.default_rng(0).uniform(3, 57, (3, 7))
    values[1, 2:4] = np.nan
    panel = Panel("x", ("a", "b", "c"), tuple("0123456"), values)
    edges = scale([panel], 1.0)
    assert edges[0] <= np.nanmin(values) < edges[1]
    assert edges[-2] < np.nanmax(values) <= edges[-1]
    found = cells(heat([panel], edges, "map", "A map"), panel)
    for row, column in product(range(3), range(7)):
        if np.isnan(values[row, column]):
            assert np.isnan(found[row, column])
            continue
        step = next(i for i in range(len(edges) - 1) if values[row, column] <= edges[i + 1])
        assert found[row, column] == pytest.approx(FAINT + (1 - FAINT) * step / (len(edges) - 2), abs=1e-4)


def test_a_scale_makes_no_more_of_a_difference_than_it_is_worth():
    panel = Panel("x", ("a",), ("0", "1", "2"), np.array([[9.2, 10.4, 11.9]]))
    assert np.diff(scale([panel], 1.0)).min() >= 1
    assert not even(panel, 1.0)
    assert even(panel, 3.0)


def test_equal_cells_side_by_side_are_one_rectangle():
    values = np.array([[10.0] * 60 + [90.0] * 60])
    text = heat([Panel("x", ("a",), tuple(map(str, range(120))), values)], np.array([0.0, 50, 100]), "map", "A map")
    assert len(boxes(text)) == 2


def test_maps_are_what_was_inspected(tmp_path):
    plain = one(tmp_path / "plain", "plain", [1.0, 1.0])
    sparse = one(tmp_path / "sparse", "sparse", [0.2, 0.5], base=tmp_path / "base")
    found = inside(entries(read([plain, sparse])))
    assert found["notes"] == []
    known = inspect(tmp_path / "sparse" / "adapter", tmp_path / "base")
    assert found["totals"]["sparse"]["density_ba"] == known.total.density_ba
    assert found["totals"]["sparse"]["overlap"] == known.total.overlap
    assert found["totals"]["plain"]["overlap"] is None
    maps = {m["title"]: m["even"] for m in found["maps"]}
    assert maps["Density of A (%)"] == maps["Density of BA (%)"] == ["plain"]
    (conflict,) = (m["svg"] for m in found["maps"] if m["title"].startswith("Conflict"))
    overlaps = [100 * layer["measures"]["overlap"] for layer in known.to_dict()["layers"]]
    panel = Panel("", ("q_proj",), ("0", "1"), np.array([overlaps]))
    edges = scale([panel], 1.0)
    steps = np.array([max(i for i, edge in enumerate(edges[:-1]) if edge <= overlap) for overlap in overlaps])
    assert cells(conflict, panel)[0] == pytest.approx(FAINT + (1 - FAINT) * steps / (len(edges) - 2), abs=1e-4)
    assert steps[0] != steps[1]
    text = report([plain, sparse], tmp_path / "out").read_text()
    assert "The same everywhere, and not drawn: plain." in text
    assert "being no preference" in text
    assert text.count('class="scroll map"') == len(maps)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["adapters"]["sparse"]["density_b"] == known.total.density_b


def test_a_base_from_the_hub_is_taken_from_its_cache_or_missed(tmp_path, monkeypatch):
    path = one(tmp_path / "a", "a", [0.2, 0.5], base=tmp_path / "base")
    (tmp_path / "a" / "run.yaml").write_text("base: me/base")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    found = inside(entries(read([path])))
    assert found["totals"]["a"]["overlap"] is None
    assert found["notes"] == [
        "a is not held against its base here: me/base is no folder here, and nothing of it is in the Hub's cache."
    ]
    text = report(path, tmp_path / "out").read_text()
    assert found["notes"][0].partition(":")[0] in text
    assert "being no preference" not in text
    repo = tmp_path / "cache" / "models--me--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "snapshots").mkdir()
    (tmp_path / "base").rename(repo / "snapshots" / ("a" * 40))
    found = inside(entries(read([path])))
    assert found["notes"] == []
    assert found["totals"]["a"]["overlap"] is not None


def test_a_saved_inspection_is_taken(tmp_path):
    path = one(tmp_path / "a", "a", [0.2, 0.5])
    lora(tmp_path / "other", [0.3, 0.9])
    write_json(inspect(tmp_path / "other" / "adapter"), tmp_path / "a" / "inspect.json")
    totals = inside(entries(read([path])))["totals"]
    assert totals["a"]["density_a"] == pytest.approx(inspect(tmp_path / "other" / "adapter").total.density_a)


def test_routing(tmp_path):
    path = write(tmp_path / "a", run("made", (0.3, 0.2), 0.6))
    (tmp_path / "a" / "inspect.json").write_text(json.dumps(routed()))
    found = inside(entries(read([path])))
    assert (found["totals"], found["notes"]) == ({}, [])
    spread, loads, sizes = found["maps"]
    assert spread["title"].startswith("Routing by task")
    assert loads["title"].startswith("Loads of the experts")
    assert loads["even"] == []
    assert ">made, a<" in loads["svg"]
    assert ">made, b<" in loads["svg"]
    assert sizes["title"].startswith("Size of the update")
    # of the first expert in the first layer alone
    edges = scale([_loads("", task, routed()["linears"]) for task in "ab"], 0.1)
    first = cells(heat([panel := _loads("", "a", routed()["linears"])], edges, "map", "A map"), panel)
    assert np.argwhere(first == 1).tolist() == [[0, 0]]
    assert "Inside the adapters" in report(path, tmp_path / "out").read_text()


@pytest.mark.parametrize("spoil", ["cut", "dora", "routed", "json", "shape", "total", "nan", "yaml", "base"])
def test_a_report_never_fails_because_of_an_adapter(tmp_path, spoil):
    path = one(tmp_path / "a", "spoiled", [0.2, 0.5], base=tmp_path / "base")
    weights, settings = (tmp_path / "a" / "adapter" / f for f in ("adapter_model.safetensors", "adapter_config.json"))
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:40])
    elif spoil == "dora":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    elif spoil == "routed":
        (tmp_path / "a" / "adapter" / "lorasculpt.json").write_text(
            '{"schema": 1, "method": "mixlora", "settings": {}, "state": {}}'
        )
    elif spoil == "json":
        (tmp_path / "a" / "inspect.json").write_text("{")
    elif spoil == "shape":
        (tmp_path / "a" / "inspect.json").write_text('{"layers": [1]}')
    elif spoil in ("total", "nan"):
        total = {} if spoil == "total" else dict.fromkeys(TOTALS, float("nan"))
        (tmp_path / "a" / "inspect.json").write_text(json.dumps({"layers": [], "total": total}))
    elif spoil == "yaml":
        (tmp_path / "a" / "run.yaml").write_text("base: [")
    elif spoil == "base":
        (tmp_path / "base" / "model.safetensors").unlink()
    text = report(path, tmp_path / "out").read_text()
    assert ("spoiled is not shown here" in text) == (spoil != "base")
    assert ("takes its model to look into; run lorasculpt inspect" in text) == (spoil == "routed")
    assert ('class="scroll map"' in text) == (spoil == "base")
