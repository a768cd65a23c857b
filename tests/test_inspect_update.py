from __future__ import annotations

import io
import json

import numpy as np
import pico
import pytest
import torch
from commands import call
from contract import CASES, adapt
from rich.console import Console

import lorasculpt
from lorasculpt import UserError
from lorasculpt.adapters.update import UpdateConfig, UpdateLayer, context_of
from lorasculpt.data.batches import Collator, rows
from lorasculpt.data.records import read
from lorasculpt.inspect import lora, plots
from lorasculpt.inspect.update import ALL, Linear, config_of, inspect, show, write_json
from lorasculpt.models.load import load

TASKS = ("color", "shape", "side")


@pytest.fixture
def data(tmp_path):
    return pico.write_data(tmp_path / "data", n=6, tasks=TASKS)


def folder(tmp_path, method: str, family: str = "llava", **settings):
    """A saved adapter whose parameters are all random."""
    model = adapt(pico.build(family)[0], method, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path / method)
    return tmp_path / method


def printed(found, **options) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(found, console=console, **options)
    return console.file.getvalue()


# --- loads ----------------------------------------------------------------------------------------------------------


def softmax_loads(adapter, base, data) -> dict[str, dict[str, np.ndarray]]:
    """The sums of LoRAMoE's gates by linear and task: one record at a time, from what goes into each linear."""
    model, processor = load(base)
    model = lorasculpt.load(model, adapter).eval()
    records, sums, seen = read(data), {}, {}
    for layer in model.modules():
        if isinstance(layer, UpdateLayer):
            layer.register_forward_pre_hook(lambda layer, args: seen.__setitem__(layer, args[0][0].numpy()))
    for record in records:
        with torch.no_grad():
            model(**Collator(processor)([rows([record])[0]]))
        for layer, x in seen.items():
            update = layer.lora_update["default"]
            scores = np.exp(x.astype(float) @ update.router.detach().numpy().T)
            gate = (scores / scores.sum(-1, keepdims=True)).sum(0)
            tasks = sums.setdefault(update.place.name, {})
            tasks[record.task] = tasks.get(record.task, 0) + gate
    return sums


@pytest.mark.parametrize("known", [(), ("color", "shape")])
def test_loads_are_those_of_one_record_at_a_time(tmp_path, pico_folder, data, known):
    settings = {"tasks": list(known), "knowledge": list(known[:1])}
    adapter = folder(tmp_path, "loramoe", **settings)
    found = inspect(adapter, pico_folder("llava"), data)
    expected = softmax_loads(adapter, pico_folder("llava"), data)
    assert found.records == dict.fromkeys(TASKS, 6)
    assert [linear.name for linear in found.linears] == list(expected)
    for linear in found.linears:
        sums = expected[linear.name]
        for task in TASKS:
            np.testing.assert_allclose(linear.tasks[task], 4 * sums[task] / sums[task].sum(), rtol=1e-5)
        share = sum(sums.values()) / sum(sums.values()).sum()
        np.testing.assert_allclose(linear.load, 4 * share, rtol=1e-5)
        assert linear.entropy == pytest.approx(-(share * np.log(share)).sum() / np.log(4), rel=1e-4)
        shares = [sums[task] / sums[task].sum() for task in TASKS]
        apart = max(np.abs(a - b).sum() / 2 for a in shares for b in shares)
        assert linear.apart == pytest.approx(apart, rel=1e-3)
    assert {(linear.kind, linear.block) for linear in found.linears} >= {("q_proj", 0), ("down_proj", 1)}


def test_entropy_and_distance_at_their_ends():
    def linear(load, **tasks):
        return Linear("q", "model", "q", 0, load, tasks, {}, {})

    assert linear((1.0, 1.0), a=(2.0, 0.0), b=(0.0, 2.0)).apart == 1
    assert linear((1.0, 1.0), a=(0.5, 1.5), b=(0.5, 1.5)).apart == 0
    assert linear((1.0, 1.0), a=(0.5, 1.5)).apart == 0
    assert linear((1.0, 1.0)).entropy == pytest.approx(1)
    assert linear((2.0, 0.0)).entropy == pytest.approx(0)
    assert linear((1.0,)).entropy == 1


@pytest.mark.parametrize("limit", [2, 7])
def test_a_limit_takes_of_every_task(tmp_path, pico_folder, data, limit):
    found = inspect(folder(tmp_path, "loramoe", tasks=[], knowledge=[]), pico_folder("llava"), data, limit)
    assert list(found.records.values()) == {2: [1, 1], 7: [3, 2, 2]}[limit]


def test_the_model_is_left_as_it_was_but_for_what_it_saw(tmp_path, pico_folder, data, monkeypatch):
    kept = []

    def keep(*arguments, **options):
        kept.append(lorasculpt.load(*arguments, **options))
        return kept[0]

    monkeypatch.setattr("lorasculpt.inspect.update.load_adapter", keep)
    inspect(folder(tmp_path, "loramoe", tasks=[], knowledge=[]), pico_folder("llava"), data)
    assert context_of(kept[0]).recorder is None
    ids = {"input_ids": torch.arange(4, 12)[None]}
    ids["labels"] = ids["input_ids"]
    assert kept[0](**ids).logits.shape[1] == 8
    assert kept[0](**ids).loss is not None


# --- energies -------------------------------------------------------------------------------------------------------


def test_energies_are_those_of_what_the_layers_add(tmp_path, pico_folder):
    adapter = folder(tmp_path, "mtl_lora", tasks=["color", "shape"])
    found = inspect(adapter, pico_folder("llava"))
    model = lorasculpt.load(pico.build("llava")[0], adapter).eval()
    layers = [layer for layer in model.modules() if isinstance(layer, UpdateLayer)]
    for linear, layer in zip(found.linears, layers, strict=True):
        identity = torch.eye(layer.base_layer.in_features)[None]
        for task in ("color", "shape"):
            context_of(model).tasks = task
            with torch.no_grad():
                update = layer(identity) - layer.base_layer(identity)
            assert linear.energy[task] == pytest.approx(float(update.square().sum()), rel=1e-3)
            relative = float(update.norm() / layer.base_layer.weight.norm())
            assert linear.relative[task] == pytest.approx(relative, rel=1e-3)
    assert found.records == {}
    assert not found.linears[0].load


def test_a_method_with_one_matrix_for_all(tmp_path, pico_folder, data):
    adapter = folder(tmp_path, "spider")
    found = inspect(adapter, pico_folder("llava"))
    assert set(found.linears[0].energy) == {ALL}
    text = printed(found)
    assert "100.0%" in text
    assert "--data FILE" in text
    plots.of_update(found, tmp_path / "a.png")
    with pytest.raises(UserError, match=r"routes nothing.*leave data \(--data\) out"):
        inspect(adapter, pico_folder("llava"), data)


# --- what is shown --------------------------------------------------------------------------------------------------

ROUTED = [name for name, row in CASES.items() if issubclass(row.config, UpdateConfig) and row.config.merges != "always"]


@pytest.mark.parametrize("method", ROUTED)
def test_every_method_that_routes_can_be_looked_at(tmp_path, pico_folder, data, method):
    settings = {"tasks": list(TASKS)} if CASES[method].settings.get("tasks") else {}
    if "knowledge" in CASES[method].settings:
        settings["knowledge"] = ["color"]
    adapter = folder(tmp_path, method, **settings)
    assert config_of(adapter) is CASES[method].config
    found = inspect(adapter, pico_folder("llava"), data, 6)
    for linear in found.linears:
        assert set(linear.tasks) == set(TASKS)
        for loads in (linear.load, *linear.tasks.values()):
            assert min(loads) >= 0
            assert sum(loads) == pytest.approx(len(loads))
    plots.of_update(found, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 10_000
    write_json(found, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["records"] == dict.fromkeys(TASKS, 2)
    assert len(content["linears"]) == len(found.linears)
    assert content["linears"][0]["load"] == pytest.approx(list(found.linears[0].load))
    assert content["linears"][0]["entropy"] == pytest.approx(found.linears[0].entropy)
    assert f"{max(max(linear.load) for linear in found.linears):.2f}" in printed(found)
    assert "1 down_proj" in printed(found, layers=True)


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_every_family_can_be_looked_at(tmp_path, pico_folder, data, family):
    settings = {"tasks": [], "knowledge": [], "target_modules": "all-linear"}
    found = inspect(folder(tmp_path, "loramoe", family, **settings), pico_folder(family), data, 3)
    parts = {linear.part for linear in found.linears if linear.load}
    assert len(parts) > 1
    assert all(linear.kind.startswith(f"{linear.part}.") for linear in found.linears)
    plots.of_update(found, tmp_path / "a.png")


def test_what_some_tasks_never_reach(tmp_path, pico_folder, data):
    with data.open("a") as file:
        file.write(json.dumps({"question": "What is red?", "answer": "a color", "task": "text"}) + "\n")
    settings = {"tasks": [], "knowledge": [], "target_modules": r".*vision_tower.*\.fc1"}
    found = inspect(folder(tmp_path, "loramoe", **settings), pico_folder("llava"), data)
    assert found.records["text"] == 1
    assert all(set(linear.tasks) == set(TASKS) for linear in found.linears if linear.load)
    assert " - " in printed(found)
    plots.of_update(found, tmp_path / "a.png")


def test_many_tasks_have_no_columns(tmp_path, pico_folder):
    data = pico.write_data(tmp_path / "data", n=1, tasks=TASKS)
    lines = [json.loads(line) | {"task": f"task{i}"} for line in data.read_text().splitlines() for i in range(3)]
    lines = [line | {"task": f"task{i}"} for i, line in enumerate(lines)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = inspect(folder(tmp_path, "loramoe", tasks=[], knowledge=[]), pico_folder("llava"), data)
    assert len(found.records) == 9
    text = printed(found)
    assert "apart" in text
    assert "Each task's loads are in --json and --plot." in text
    plots.of_update(found, tmp_path / "a.png")


def test_of_the_two_modules_each_names_the_other(tmp_path, pico_folder):
    routed, plain = folder(tmp_path, "mtl_lora", tasks=["color", "shape"]), folder(tmp_path, "lorasculpt")
    with pytest.raises(
        UserError, match=r"is a mtl_lora adapter, no plain LoRA; lorasculpt\.inspect\.update\.inspect shows"
    ):
        lora.inspect(routed)
    with pytest.raises(
        UserError, match=r"changes the forward pass; lorasculpt\.inspect\.lora\.inspect shows a plain LoRA"
    ):
        inspect(plain, pico_folder("llava"))


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, pico_folder, data):
    adapter, base = folder(tmp_path, "loramoe", tasks=[], knowledge=[]), pico_folder("llava")
    options = (
        "--base",
        base,
        "--data",
        data,
        "--limit",
        3,
        "--json",
        tmp_path / "a.json",
        "--plot",
        tmp_path / "a.svg",
    )
    code, out, err = call("inspect", adapter, *options)
    assert code == 0, err
    assert "entropy" in out
    assert json.loads((tmp_path / "a.json").read_text())["records"] == dict.fromkeys(TASKS, 1)
    assert "Loads, color (1)" in (tmp_path / "a.svg").read_text()


def test_mistakes_are_told_in_one_sentence(tmp_path, pico_folder, data):
    routed, plain = folder(tmp_path, "loramoe", tasks=[], knowledge=[]), folder(tmp_path, "lorasculpt")
    multitask = folder(tmp_path, "mtl_lora", tasks=["color", "shape"])
    base = pico_folder("llava")
    for arguments, message in (
        ((routed, "--base", base), "every token weighs the experts anew. Give data (--data)"),
        ((routed, "--data", data), "is nothing without its model: give base (--base)"),
        ((multitask,), "is nothing without its model: give base (--base)"),
        (
            (multitask, "--base", base, "--data", data),
            r"train.jsonl:3: there is no task 'side'; the adapter knows color",
        ),
        ((plain, "--base", base, "--data", data), "routes nothing"),
    ):
        code, _, err = call("inspect", *arguments)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1
