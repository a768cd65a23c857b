"""Full fine-tuning, of halves and of small entries, against a training of dense weights written once more in numpy."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pico
import pytest
import torch
import yaml
from commands import done
from contract import close, equal, sgd, start, texts, train, trained, weights
from dense import LINEARS, by_hand, check, check_plain, check_resumed
from peft import get_peft_model
from torch import nn

import lorasculpt
from lorasculpt import Clock, FullConfig, UserError
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.update import updates
from lorasculpt.comparison.plan import Comparison
from lorasculpt.config import RunConfig
from lorasculpt.methods import full
from lorasculpt.methods.full import Full, half, small
from lorasculpt.models.load import load
from lorasculpt.models.parts import linears
from lorasculpt.run.model import kind_of

# --- the reference --------------------------------------------------------------------------------------------------

SEED, ROUND = 7, 2  # with this seed the second linear stands still in the middle round, when its velocity is not 0
SETTINGS = {
    "all": {},
    "half": {"round_steps": ROUND, "seed": SEED},
    "magnitude": {"share": 0.4},
}


def mask(W0, share):
    """1 where fewer than a ``share`` of the entries are smaller."""
    M = np.zeros_like(W0)
    for i, j in np.ndindex(*W0.shape):
        smaller = sum(abs(w) < abs(W0[i, j]) for w in W0.flatten())
        M[i, j] = smaller < W0.size - int((1 - share) * W0.size)
    return M


def reference(select):
    """What the two weights are after every window, trained as dense weights."""

    def trained_by_hand(W0, windows):
        def kept(i, step, before, proposed, g):
            if select == "magnitude":
                M = mask(W0[i], SETTINGS[select]["share"])
            else:
                M = select == "all" or LINEARS[i] in half(LINEARS, SEED, step // ROUND)
            return M * proposed + (1 - M) * before

        return by_hand(W0, windows, kept)

    return trained_by_hand


def compare(select):
    """Fails unless our training and the reference's give the same weights."""
    return check(FullConfig(target_modules=LINEARS, select=select, **SETTINGS[select]), reference(select))


@pytest.mark.parametrize("select", SETTINGS)
def test_training_is_that_of_dense_weights(select):
    model = compare(select)
    found = np.mean([update.weight().detach().ne(0).double().mean() for update in updates(model).values()])
    assert found == pytest.approx({"all": 1, "half": 1, "magnitude": 0.4}[select], abs=0.02)


def test_the_halves_of_the_reference_are_not_all_alike():
    moving = [half(LINEARS, SEED, number) for number in range(3)]
    assert moving == [{"second"}, {"first"}, {"second"}]


# --- faults that the reference must see -----------------------------------------------------------------------------


class Dropped(Full):
    """Leaves the optimizer to go on by what it remembers."""

    def before_step(self):
        super().before_step()
        for name in self._held:
            self.updates[name].D.grad.zero_()
        self._held = {}


class Rewound(Full):
    """Forgets what a linear learned in an earlier round."""

    def before_step(self):
        super().before_step()
        self._held = {name: 0 * D for name, D in self._held.items()}


class Unprojected(Full):
    def after_step(self, step):
        self.step = step


class Once(Full):
    """Takes the moves of the first step back, and no other."""

    def after_step(self, step):
        if step == 1:
            super().after_step(step)
        self.step = step


class OfUpdate(Full):
    """The mask of D in place of W0's."""

    def _mask(self, name, update):
        return small(update.D, self.config.share)


@pytest.mark.parametrize(
    ("select", "fault"),
    [
        *(("half", fault) for fault in (Dropped, Rewound, Unprojected, Once)),
        *(("magnitude", fault) for fault in (Unprojected, Once, OfUpdate)),
    ],
)
def test_a_faulty_method_does_not_pass(select, fault, monkeypatch):
    monkeypatch.setattr(FullConfig, "implementation", fault)
    with pytest.raises(AssertionError):
        compare(select)


FUNCTIONS = {
    "one round": ("half", "half", lambda names, seed, number: half(names, seed, 0)),
    "another seed": ("half", "half", lambda names, seed, number: half(names, seed + 1, number)),
    "the other half": ("half", "half", lambda names, seed, number: set(names) - half(names, seed, number)),
    "the large ones": ("magnitude", "small", lambda W0, share: ~small(W0, 1 - share)),
    "signed": ("magnitude", "small", lambda W0, share: small(W0 - W0.min(), share)),
    "another share": ("magnitude", "small", lambda W0, share: small(W0, share + 0.05)),
}


@pytest.mark.parametrize("fault", FUNCTIONS)
def test_a_faulty_choice_does_not_pass(fault, monkeypatch):
    select, name, faulty = FUNCTIONS[fault]
    monkeypatch.setattr(full, name, faulty)
    with pytest.raises(AssertionError):
        compare(select)


# --- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"select": "all"}, {"select": "magnitude", "share": 1.0}], ids=str)
def test_it_is_the_training_of_the_bases_own_weights(settings):
    check_plain(start("llama", "full", round_steps=None, **settings)[0])


def test_a_share_of_1_is_all():
    found = []
    for settings in ({"select": "all"}, {"select": "magnitude", "share": 1}):
        model = start("llama", "full", round_steps=None, **settings)[0]
        train(model, [texts()] * 3, torch.optim.AdamW(trained(model), lr=1e-2))
        found.append(weights(model))
    assert equal(*found)


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "llama"])
def test_without_targets_the_language_model_is_trained_whole(family):
    base = pico.build(family)[0]
    expected = set(linears(base, "language"))
    model = get_peft_model(base, FullConfig())
    assert set(updates(model)) == expected
    assert len(expected) == 2 * 7  # of two decoder layers


def test_the_head_is_trained_where_it_is_named():
    model = get_peft_model(pico.build("llama")[0], FullConfig(target_modules=["lm_head"]))
    train(model, [texts()], sgd(model))
    assert updates(model)["lm_head"].D.any()


# --- halves ---------------------------------------------------------------------------------------------------------


def layout(layers, **modules):
    return [f"m.layers.{i}.{module}.{leaf}" for i in range(layers) for module in modules for leaf in modules[module]]


LLAMA = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("seed", range(5))
def test_half_of_each_block_is_drawn_by_kind(seed):
    names = layout(6, **LLAMA)
    chosen = half(names, seed, 0)
    assert chosen < set(names)
    assert len(chosen) == 3.5 * 6
    counts = Counter(name.rpartition(".")[0] for name in chosen)
    assert [counts[f"m.layers.{i}.self_attn"] for i in range(6)] == [2] * 6
    assert sorted(counts[f"m.layers.{i}.mlp"] for i in range(6)) == [1, 1, 1, 2, 2, 2]


def test_every_round_and_seed_draws_anew_and_always_alike():
    names = layout(6, **LLAMA)
    drawn = [half(names, seed, number) for seed in range(3) for number in range(3)]
    assert len({frozenset(chosen) for chosen in drawn}) == 9
    assert drawn == [half(names, seed, number) for seed in range(3) for number in range(3)]
    share = Counter(name for number in range(400) for name in half(names, 0, number))
    assert set(share) == set(names)
    assert 0.4 < min(share.values()) / 400 < max(share.values()) / 400 < 0.6


@pytest.mark.parametrize("layers", [1, 3])
def test_what_is_left_over_goes_by_a_coin(layers):
    names = layout(layers, mlp=("up_proj",))
    found = Counter(len(half(names, 0, number)) for number in range(400))
    assert set(found) == {layers // 2, layers // 2 + 1}
    assert all(150 < count < 250 for count in found.values())


def test_the_draw_is_the_same_on_every_machine():
    """Written down once: a run is resumed with another version of Python, too."""
    chosen = {name.rpartition(".")[2] for name in half(layout(1, **LLAMA), 7, 3)}
    assert chosen == {"k_proj", "o_proj", "down_proj"}


def test_what_stands_still_does_not_move_and_the_rest_does():
    model = start("llama", "full", round_steps=2)[0]
    clock = Clock(model, optimizer := torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1))
    for number in range(3):
        before = weights(model)
        train(model, [texts()] * 2, optimizer, clock=clock)
        moved = {name for name, D in weights(model).items() if not torch.equal(D, before[name])}
        assert moved == {f"{name}.D" for name in half(updates(model), 0, number)}
        assert len(moved) == 7
        assert not methods_of(model)["default"]._held  # a copy lives for one step


# --- the mask -------------------------------------------------------------------------------------------------------


def test_the_mask_is_the_references():
    W0 = torch.randn(7, 9, generator=torch.Generator().manual_seed(5))
    for share in (0.1, 0.5, 0.77):
        M = small(W0, share)
        np.testing.assert_array_equal(M.numpy(), mask(W0.numpy(), share))
    assert small(W0, 0.5).sum() == 63 - 31  # 31 of 63 stay, as the official code counts
    assert small(W0, 0.999).all()
    assert small(W0, 1).all()
    assert small(torch.zeros(4, 5), 0.5).sum() == 10  # of equal entries some


def test_large_entries_are_the_bases_whatever_the_optimizer_does():
    model = start("llama", "full", select="magnitude", round_steps=None)[0]
    train(model, [texts()] * 3, torch.optim.AdamW(trained(model), lr=1e-2))
    for update in updates(model).values():
        size, D = update.base_weight().abs(), update.D.detach()
        large = size > size.median()
        assert not D[large].any()
        assert D[~large].ne(0).float().mean() > 0.9


def test_a_sharded_weight_has_a_sharded_mask():
    """FSDP2 in one process; how two of them train is told by the tests of launched processes."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for sharded in (False, True):
        model = start("llama", "full", select="magnitude", round_steps=None)[0]
        if sharded:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            if sharded:
                fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            train(model, [[batch] for batch in texts(number=3)], sgd(model, momentum=0.9))
            masks = methods_of(model)["default"]._masks.values()
            assert len(masks) == len(updates(model))
            assert all(hasattr(mask, "full_tensor") == sharded for mask in masks)
            assert all(mask.dtype == torch.bool for mask in masks)
            found.append(weights(model))
        finally:
            if sharded:
                dist.destroy_process_group()
    close(*found)


def test_a_quantised_base_is_masked_by_what_it_stands_for(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(nn.Linear(64, 64, bias=False))
    W0 = base[0].weight.detach().clone()
    base[0] = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    base[0].load_state_dict({"weight": W0})
    model = get_peft_model(base.to("cpu"), FullConfig(target_modules=["0"], select="magnitude"))
    (update,) = updates(model).values()
    mask = methods_of(model)["default"]._mask("0", update)
    assert (mask == small(W0, 0.5)).float().mean() > 0.95


# --- stopping and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", SETTINGS)
def test_stopping_and_going_on_equals_never_stopping(select, tmp_path):
    def fresh():
        return start("llama", "full", **{"select": select, "round_steps": None, **SETTINGS[select]})[0]

    check_resumed(fresh, tmp_path)  # in the middle of a round


def test_a_round_that_is_forgotten_is_noticed(tmp_path):
    """The step tells the round: without it a resumed run would train the first half again."""
    windows = [[batch] for batch in texts(number=4)]
    found = []
    for forget in (False, True):
        model = start("llama", "full", round_steps=2)[0]
        train(model, windows[:2])
        if forget:
            methods_of(model)["default"].step = 0
        train(model, windows[2:])
        found.append(weights(model))
    assert not equal(*found)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0.1} for name in ("r", "lora_alpha", "lora_dropout")),
        *({"select": "some"}, {"select": "magnitude", "share": 0}, {"select": "magnitude", "share": 1.1}),
        *({"select": "half", "round_steps": 0}, {"share": 0.4}, {"round_steps": 3}, {"select": "half", "share": 0.4}),
        {"select": "magnitude", "seed": 1},
    ],
    ids=str,
)
def test_config_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        FullConfig(**wrong)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, pico_folder):
    """A run file."""
    data = str(pico.write_data(tmp_path / "data", n=4))
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "full", "select": "half", "round_steps": 1},
        "data": {"train": data},
        "training": {"steps": 2, "batch": 2, "lr": 1e-2, "precision": "fp32", "report_to": []},
        "evaluate": {"source": [data], "target": [data], "limit": 2, "max_new_tokens": 1, "strengths": [0.5]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_from_a_run_file_to_a_merged_model(run, tmp_path, pico_folder):
    base = pico_folder("llava")

    done("train", run)
    done("eval", run)
    record = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    assert [point["strength"] for point in record["curve"]] == [0, 0.5, 1]
    adapter = tmp_path / "out" / "adapter"
    live = lorasculpt.load(pico.build("llava")[0], adapter).eval()
    assert len(updates(live)) == 2 * 7
    assert "100.0%" in done("inspect", adapter, "--base", base)  # of the energy
    assert "round_steps" in done("methods", "full")
    done("export", adapter, "--base", base, "--to", "merged", "--out", tmp_path / "merged")
    assert json.loads((adapter / "lorasculpt.json").read_text())["state"] == {"step": 2}
    ids = {"input_ids": torch.arange(4, 20)[None]}
    with torch.no_grad():
        merged = load(str(tmp_path / "merged"))[0].eval()(**ids).logits
        torch.testing.assert_close(merged, live(**ids).logits, rtol=1e-4, atol=1e-5)


def test_compared_with_a_lora_it_takes_no_rank_from_it(run):
    config = RunConfig.load(run, ["method={name: lora, r: 4, lora_dropout: 0.1}", "methods={part: {name: full}}"])
    trials = Comparison(config, ["lora", "full", "part"], 1, [0.1, 0.2]).trials()
    assert [trial.config.method for trial in trials if trial.label != "lora"] == [{"name": "full"}] * 4
    with pytest.raises(UserError, match=r"method\.r is no setting of full"):
        kind_of(RunConfig.load(run, ["method={name: full, r: 4}"]))
