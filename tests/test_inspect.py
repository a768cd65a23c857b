from __future__ import annotations

import io
import json
from pathlib import Path

import pico
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorasculpt.adapters.plain import read_adapter
from lorasculpt.errors import UserError
from lorasculpt.inspect import plots
from lorasculpt.inspect.lora import LARGE, SHARES, inspect, show, write_json
from lorasculpt.models.weights import BaseWeights
from lorasculpt.ops.density import expected_density

Q = "model.layers.0.self_attn.q_proj"


def write_lora(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], **config) -> Path:
    """A stock LoRA folder of ``{module: (B, A)}``."""
    folder.mkdir(parents=True)
    r = next(iter(factors.values()))[1].shape[0]
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_base(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file({f"{name}.weight": W.contiguous() for name, W in weights.items()}, folder / "model.safetensors")
    return folder


def sparse(*shape: int, share: float = 0.3) -> torch.Tensor:
    return torch.randn(shape) * (torch.rand(shape) < share)


def test_measures_agree_with_the_dense_update(tmp_path):
    factors = {f"model.layers.{i}.mlp.up_proj": (sparse(24, 4), sparse(4, 16)) for i in range(3)}
    found = inspect(write_lora(tmp_path / "a", factors))
    updates = [2 * B @ A for B, A in factors.values()]
    energies = [float(update.square().sum()) for update in updates]
    for layer, update, energy, (B, A) in zip(found.layers, updates, energies, factors.values(), strict=True):
        m, sigma = layer.measures, torch.linalg.svdvals(update)
        assert (layer.kind, layer.part, layer.r, layer.scaling) == ("up_proj", "model", 4, 2.0)
        assert m.energy == pytest.approx(energy, rel=1e-5)
        assert m.share == pytest.approx(energy / sum(energies), rel=1e-5)
        assert m.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-5)
        assert m.density_ba == pytest.approx(float((update != 0).float().mean()))
        assert m.expected_ba == expected_density(m.density_a, m.density_b, 4)
        assert m.used_rows == pytest.approx(float((B != 0).any(1).float().mean()))
        assert m.used_columns == pytest.approx(float((A != 0).any(0).float().mean()))
    assert [layer.block for layer in found.layers] == [0, 1, 2]
    assert found.total.energy == pytest.approx(sum(energies), rel=1e-5)
    assert found.total.density_ba == pytest.approx(float((torch.stack(updates) != 0).float().mean()))
    assert found.kinds == {"up_proj": found.total}


def test_concentration_by_hand(tmp_path):
    B = torch.zeros(4, 2)
    B[0] = 3.0
    A = torch.zeros(2, 5)
    A[1, 2:4] = 1.0
    m = inspect(write_lora(tmp_path / "a", {Q: (B, A)}, lora_alpha=2)).total
    assert (m.density_a, m.density_b, m.density_ba) == (0.2, 0.25, 0.1)
    assert (m.used_rows, m.used_columns, m.used_ranks) == (0.25, 0.4, 0.5)
    assert (m.energy, m.stable_rank, m.share) == (pytest.approx(18), pytest.approx(1), 1)
    assert m.curve_ba[SHARES.index(0.1)] == 1


def test_an_adapter_that_never_moved_can_be_inspected(tmp_path):
    folder = write_lora(tmp_path / "a", {Q: (torch.zeros(6, 2), torch.randn(2, 4))})
    found = inspect(folder, write_base(tmp_path / "base", {Q: torch.randn(6, 4)}))
    m = found.total
    assert (m.energy, m.share, m.stable_rank, m.density_ba, m.overlap, m.m_update) == (0, 0, 0, 0, None, None)
    plots.of_lora(found, tmp_path / "a.svg")
    show(found, console=Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 6}, "alpha_pattern": {"^model.layers.0.mlp.up_proj": 3}},
    ],
)
def test_scalings_are_those_of_peft(tmp_path, settings):
    model = get_peft_model(
        pico.build("llama")[0],
        LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **settings),
    )
    model.save_pretrained(tmp_path)
    for pair in read_adapter(tmp_path).pairs:
        expected = model.get_submodule(f"base_model.model.{pair.name}").get_delta_weight("default")
        torch.testing.assert_close(pair.scaling * pair.B @ pair.A, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_and_importance_agree_with_the_dense_computation(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("lorasculpt.inspect.lora.BLOCK", 100)  # several blocks of rows
    B, A, W = torch.randn(20, 3), torch.randn(3, 15), torch.randn(20, 15).to(dtype)
    folder = write_lora(tmp_path / "a", {Q: (B, A)})
    m = inspect(folder, write_base(tmp_path / "base", {Q: W})).total
    W, energy = W.double(), (B @ A).double().square()
    M = torch.tanh((1 / torch.log(W.abs() / W.norm() + 1e-15)).abs())
    assert m.m_plain == pytest.approx(float(M.mean()), rel=1e-5)
    assert m.m_update == pytest.approx(float((M * energy).sum() / energy.sum()), rel=1e-5)
    if dtype == torch.float32:
        largest = W.abs().flatten().topk(int(LARGE * W.numel())).indices
        assert m.overlap == pytest.approx(float(energy.flatten()[largest].sum() / energy.sum()), rel=1e-5)


def test_tied_weights_count_in_proportion(tmp_path):
    folder = write_lora(tmp_path / "a", {Q: (torch.ones(8, 2), torch.ones(2, 10))})
    found = inspect(folder, write_base(tmp_path / "base", {Q: torch.ones(8, 10)}))
    assert found.total.overlap == pytest.approx(LARGE)


def test_an_update_on_the_large_weights_is_seen(tmp_path):
    W = 0.01 * torch.randn(10, 10)
    W[3] = 1.0
    B = torch.zeros(10, 1)
    B[3] = 1.0
    folder = write_lora(tmp_path / "a", {Q: (B, torch.randn(1, 10))})
    m = inspect(folder, write_base(tmp_path / "base", {Q: W})).total
    assert m.overlap == pytest.approx(1)
    assert m.m_update > m.m_plain


@pytest.mark.parametrize("family", ["llava", "gemma3", "idefics3"])
def test_modules_are_found_in_a_checkpoint_whatever_its_prefixes(pico_folder, family):
    # Llava and Gemma 3 are saved under other prefixes than they have in memory, and both towers have layers.0...q_proj
    model = pico.build(family)[0]
    linears = {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and "lm_head" not in name}
    base = BaseWeights.open(pico_folder(family))
    for name, key in base.match(linears).items():
        torch.testing.assert_close(base.read(key), linears[name].weight.data)


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path):
    base = write_base(tmp_path / "base", {Q: torch.randn(6, 4)})
    (base / "model.safetensors").rename(base / "one.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"{Q}.weight": "one.safetensors"}}))
    folder = write_lora(tmp_path / "a", {Q: (torch.randn(6, 2), torch.randn(2, 4))})
    assert inspect(folder, base).total.overlap is not None


def hub(cache: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The folder of ``me/base`` in a cache of the Hub."""
    repo = cache / "models--me--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    return write_base(repo / "snapshots" / ("a" * 40), weights)


def test_a_base_may_be_a_name_on_the_hub(tmp_path, monkeypatch):
    base = hub(tmp_path / "cache", {Q: torch.randn(6, 4)})
    folder = write_lora(tmp_path / "a", {Q: (torch.randn(6, 2), torch.randn(2, 4))})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    found = inspect(folder, "me/base", fetch=False)
    assert (found.base, found.total) == ("me/base", inspect(folder, base).total)
    with pytest.raises(UserError, match="me/gone is no folder here, and nothing of it is in the Hub's cache"):
        inspect(folder, "me/gone", fetch=False)
    with pytest.raises(UserError, match=r"me/gone is no folder here, and the Hub does not give it"):
        inspect(folder, "me/gone")


def test_what_the_cache_lacks_of_a_base_is_fetched(tmp_path, monkeypatch):
    here, there = (hub(tmp_path / name, {Q: torch.randn(6, 4)}) for name in ("here", "there"))
    (here / "model.safetensors").unlink()
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"{Q}.weight": "gone.safetensors"}}))
    folder = write_lora(tmp_path / "a", {Q: (torch.randn(6, 2), torch.randn(2, 4))})

    def download(name, local_files_only=False, **_):
        return here if local_files_only else there

    monkeypatch.setattr("lorasculpt.adapters.folder.snapshot_download", download)
    assert inspect(folder, "me/base").total == inspect(folder, there).total
    with pytest.raises(UserError, match=r"gone\.safetensors is not there, which model\.safetensors\.index\.json names"):
        inspect(folder, "me/base", fetch=False)


def test_parts_and_kinds(tmp_path):
    pair = (torch.randn(6, 2), torch.randn(2, 4))
    names = [
        "model.language_model.layers.10.self_attn.q_proj",
        "model.language_model.layers.2.self_attn.q_proj",
        "model.multi_modal_projector.linear_1",
        "model.visual.merger.mlp.0",
    ]
    found = inspect(write_lora(tmp_path / "a", dict.fromkeys(names, pair)))
    assert [(layer.kind, layer.block) for layer in found.layers] == [
        ("language_model.q_proj", 2),
        ("language_model.q_proj", 10),
        ("multi_modal_projector.linear_1", None),
        ("visual.mlp.0", None),
    ]


def test_writers(tmp_path, pico_folder):
    model = get_peft_model(
        pico.build("llava")[0], LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "lorasculpt.json").write_text(
        '{"schema": 1, "method": "lorasculpt", "settings": {}, "state": {}}'
    )
    found = inspect(tmp_path / "a", pico_folder("llava"))
    for name in ("a.png", "a.svg"):
        plots.of_lora(found, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    write_json(found, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["total"]["share"] == pytest.approx(1)
    assert len(content["layers"]) == len(found.layers) == 28
    for layers, wanted in ((False, "vision_tower.q_proj"), (True, "model.language_model.layers.1.mlp.up_proj")):
        console = Console(file=io.StringIO(), width=250)
        show(found, layers=layers, console=console)
        text = console.file.getvalue()
        assert wanted in text
        assert "lorasculpt" in text
        assert "on large |W|" in text
    console = Console(file=io.StringIO(), width=80)
    show(found, console=console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["all", "100.0", *3 * ["100.0"]] in [line[:5] for line in lines]  # no number is cut, nor a column left out
    assert [len(line) for line in lines if line[:1] == ["all"]] == [10, 4]


def change(folder: Path, **settings) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def retouch(folder: Path, edit) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


KEY = f"base_model.model.{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "no readable JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "JSON object"),
        (lambda f: change(f, peft_type="LOHA"), "'LOHA'"),
        (lambda f: change(f, use_dora=True), "use_dora"),
        (lambda f: change(f, r=8), "has rank 2"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 20), "cannot be read"),
        (lambda f: retouch(f, lambda t: t[KEY].fill_(float("nan"))), "not finite"),
        (lambda f: retouch(f, lambda t: t.pop(KEY)), "no lora_A for"),
        (lambda f: retouch(f, lambda t: t.update({KEY: torch.ones(3, 4)})), "no factors of a linear"),
        (lambda f: retouch(f, lambda t: (t.clear(), t.update(x=torch.ones(1)))), "no lora_A and lora_B"),
        (lambda f: change(f, r=None), "tells no r and lora_alpha of"),
        (lambda f: change(f, lora_alpha="x"), "tells no r and lora_alpha of"),
        (lambda f: change(f, rank_pattern=[1]), "tells no r and lora_alpha of"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_sentence(tmp_path, spoil, message):
    folder = write_lora(tmp_path / "a", {Q: (torch.randn(6, 2), torch.randn(2, 4))})
    spoil(folder)
    with pytest.raises(UserError, match=message):
        inspect(folder)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({Q: torch.ones(5, 4)}, r"\(5, 4\), but"),
        ({Q: torch.full((6, 4), float("inf"))}, "not finite"),
        ({Q: torch.ones(6, 4, dtype=torch.uint8)}, "before quantisation"),
        ({Q: torch.ones(6, 4).to(torch.float8_e4m3fn)}, "before quantisation"),
        ({"model.layers.1.self_attn.q_proj": torch.ones(6, 4)}, "no weight"),
        ({"x.layers.0.self_attn.q_proj": torch.ones(6, 4), "y.layers.0.self_attn.q_proj": torch.ones(6, 4)}, "both"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(tmp_path, weights, message):
    folder = write_lora(tmp_path / "a", {Q: (torch.randn(6, 2), torch.randn(2, 4))})
    with pytest.raises(UserError, match=message):
        inspect(folder, write_base(tmp_path / "base", weights))


def test_no_two_modules_share_a_base_weight(tmp_path):
    pair = (torch.randn(6, 2), torch.randn(2, 4))
    folder = write_lora(tmp_path / "a", {"one.layers.0.q_proj": pair, "two.layers.0.q_proj": pair})
    base = write_base(tmp_path / "base", {"layers.0.q_proj": torch.randn(6, 4)})
    with pytest.raises(UserError, match="another module"):
        inspect(folder, base)
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        inspect(folder, tmp_path)


def test_other_tensors_are_named(tmp_path):
    folder = write_lora(tmp_path / "a", {Q: (torch.randn(6, 2), torch.randn(2, 4))})
    retouch(folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2)}))
    found = inspect(folder)
    assert found.other == ("base_model.model.lm_head.weight",)
    console = Console(file=io.StringIO(), width=200)
    show(found, console=console)
    assert "Not measured: base_model.model.lm_head.weight" in console.file.getvalue()
