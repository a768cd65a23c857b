from __future__ import annotations

import copy
import math
import re
from collections import Counter

import pico
import pytest
import torch
from contract import (
    adapt,
    batches,
    close,
    equal,
    loss,
    masks,
    records,
    sgd,
    start,
    texts,
    train,
    trained,
    weights,
)
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from lorasculpt import Clock, ClockCallback, LoRASculptConfig, UserError, method_logs
from lorasculpt.adapters.layers import sites
from lorasculpt.adapters.method import methods_of

PENALISED = ("q_proj", "k_proj", "v_proj")


def llama(**settings):
    return start("llama", **settings)[0]


def penalty(model: nn.Module, wanted=PENALISED) -> torch.Tensor:
    """Equation (4) as it is written, through autograd."""
    norms = []
    for name, site in sites(model).items():
        if wanted == "all" or name.split(".")[-1] in wanted:
            W = site.base.weight.detach()
            M = torch.tanh((1 / torch.log((W / W.norm()).abs() + 1e-15)).abs())
            update = M * ((site.b.weight * site.b.mask) @ (site.a.weight * site.a.mask))
            norms.append(torch.sqrt(update.square().sum() + 1e-30))  # the derivative of a norm at 0 is not a number
    return torch.stack(norms).mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def moved(**settings):
    """A model whose B is not 0, so that there is something to penalise."""
    model = llama(**settings)
    train(model, [texts()] * 1)
    return model


# --- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density is the share of entries kept"),
        ({"density": 1.5}, "got 1.5"),
        ({"density_a": -0.1}, "density_a is the share"),
        ({"density_b": 2}, "density_b is the share"),
        ({"density": math.nan}, "density is the share"),
        ({"delta_density": 0.0}, "delta_density is the share of B A"),
        ({"delta_density": 1.0}, "delta_density is the share of B A"),
        ({"delta_density": 0.1, "density": 0.3}, "delta_density stands in for density: give one of the two"),
        ({"delta_density": 0.1, "density_a": 0.1}, "delta_density stands in for density_a"),
        ({"prune_step": 0}, "got 0"),
        ({"prune_step": -3}, "got -3"),
        ({"prune_step": 0.0}, "a share of training"),
        ({"prune_step": 1.0}, "a share of training"),
        ({"prune_step": 100.0}, "a whole number from 1"),
        ({"prune_step": True}, "got True"),
        ({"cmr_weight": -1e-3}, "cmr_weight is a weight"),
        ({"cmr_weight": math.nan}, "cmr_weight is a weight"),
        ({"cmr_connector_weight": -1.0}, "cmr_connector_weight is a weight"),
        ({"omega": 0.0}, "omega is above 0"),
        ({"omega": math.nan}, "omega is above 0"),
        ({"cmr_memory": "disk"}, "'recompute' or 'cache'; got 'disk'"),
        ({"cmr_modules": "q_proj"}, "cmr_modules"),
        ({"cmr_modules": []}, "cmr_modules"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        LoRASculptConfig(**settings)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


def test_the_defaults_are_those_of_the_released_code():
    config = LoRASculptConfig()
    assert (config.density, config.prune_step, config.cmr_weight, config.omega) == (0.1, 100, 1e-3, 1.0)
    assert config.cmr_modules == list(PENALISED)
    assert (config.cmr_connector_weight, config.rescale) == (0.0, False)


def test_weights_that_were_pruned_are_not_trained_without_their_masks():
    """As of a loop that keeps the model and the optimizer, and not the clock."""
    model = llama(prune_step=1)
    clock = Clock(model, optimizer := sgd(model))
    train(model, [texts()] * 2, optimizer, clock=clock)
    weights, state = copy.deepcopy(model.state_dict()), clock.state_dict()
    again = llama(prune_step=1)
    again.load_state_dict(weights)
    with pytest.raises(UserError, match=r"register_for_checkpointing\(clock\)"):
        Clock(again, sgd(again)).begin_step()
    clock = Clock(again, sgd(again))
    clock.load_state_dict(state)
    clock.begin_step()
    assert methods_of(again)["default"].pruned


def test_what_was_stopped_before_it_was_pruned_goes_on():
    model = llama(prune_step=6)
    train(model, [texts()] * 4, total_steps=8)
    with pytest.raises(ValueError, match=r"prune_step=6 is not before the end of training \(6 steps\)"):
        Clock(model, sgd(model), total_steps=2)
    train(model, [texts()] * 2, total_steps=5)
    assert methods_of(model)["default"].pruned


def test_an_impossible_density_is_refused_before_training():
    model = llama(density=0.001)
    with pytest.raises(ValueError, match=r"self_attn\.\w+: a density of \S+ keeps no entry"):
        Clock(model, sgd(model))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"density": 0.3}, (0.3, 0.3)),
        ({"density": 0.3, "density_a": 0.5}, (0.5, 0.3)),
        ({"density": 0.3, "density_b": 0.5}, (0.3, 0.5)),
        ({"density_a": 0.2, "density_b": 0.4}, (0.2, 0.4)),
        ({"delta_density": 0.05, "density": 0.1}, (0.11287, 0.11287)),  # sqrt(1 - 0.95 ** (1 / 4))
    ],
)
def test_each_factor_gets_its_density(settings, expected):
    config = LoRASculptConfig(r=4, **settings)
    assert config.densities(4) == pytest.approx(expected, rel=1e-3)
    model = llama(**{"prune_step": 1, **settings})
    train(model, [texts()])
    for site in sites(model).values():
        for leaf, density in zip((site.a, site.b), config.densities(4), strict=True):
            assert int(torch.count_nonzero(leaf.weight)) == int(density * leaf.weight.numel())


def test_delta_density_counts_each_module_with_its_own_rank():
    model = llama(delta_density=0.05, density=0.1, prune_step=1, rank_pattern={"q_proj": 16})
    train(model, [texts()])
    for name, site in sites(model).items():
        share = math.sqrt(1 - 0.95 ** (1 / (16 if name.endswith("q_proj") else 4)))
        assert int(site.a.mask.sum()) == int(share * site.a.weight.numel())


# --- when it prunes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prune_step", "total", "step"), [(1, None, 1), (3, None, 3), (3, 10, 3), (0.3, 10, 3), (0.01, 10, 1), (0.5, 5, 2)]
)
def test_it_prunes_right_after_the_step_asked_for(prune_step, total, step):
    model = llama(prune_step=prune_step)
    optimizer = sgd(model)
    clock = Clock(model, optimizer, total)
    method = methods_of(model)["default"]
    for taken in range(1, 5):
        train(model, [texts()], optimizer, clock=clock)
        assert method.pruned == (taken >= step)
        dense = all(bool((site.a.weight != 0).all()) for site in method.sites.values())
        assert dense == (taken < step)
    clock.close()


def test_a_prune_step_that_never_comes_is_refused():
    for prune_step, total in ((5, 5), (100, 5), (0.95, 5)):
        model = llama(prune_step=prune_step)
        with pytest.raises(ValueError, match=r"is not before the end of training \(5 steps\)"):
            Clock(model, sgd(model), total)


def test_a_share_of_training_needs_its_length():
    model = llama(prune_step=0.5)
    with pytest.raises(ValueError, match="give the clock total_steps"):
        Clock(model, sgd(model))


def test_what_is_kept_is_what_was_largest_after_the_step():
    model, twin = llama(prune_step=1), llama(prune_step=50)
    train(model, [texts()])
    train(twin, [texts()])
    dense = weights(twin)
    for key, sparse in weights(model).items():
        mask = sparse != 0
        assert dense[key][mask].abs().min() >= dense[key][~mask].abs().max()
        assert torch.equal(sparse[mask], dense[key][mask])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: sgd(model, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda model: torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1),
        lambda model: torch.optim.AdamW(trained(model), lr=1e-2, foreach=False),
    ],
    ids=["SGD with momentum and decay", "AdamW with decay", "AdamW, one by one"],
)
def test_the_weights_stay_sparse_and_the_masks_the_same(optimizer):
    model = llama(prune_step=2)
    optimizer = optimizer(model)
    clock = train(model, [texts()] * 2, optimizer)
    clock = Clock(model, optimizer)
    found = masks(model)
    for _ in range(4):
        train(model, [texts()], optimizer, clock=clock)
        for key, weight in weights(model).items():
            assert int(torch.count_nonzero(weight)) == int(0.25 * weight.numel()), key
    assert equal(masks(model), found)


def test_rescaling_keeps_the_norm_of_every_factor():
    dense, model = llama(prune_step=50), llama(prune_step=1, rescale=True)
    for each in (dense, model):
        train(each, [texts()])
    before = weights(dense)
    for key, weight in weights(model).items():
        assert float(weight.norm()) == pytest.approx(float(before[key].norm()), rel=1e-5)
        assert int(torch.count_nonzero(weight)) == int(0.25 * weight.numel())


def test_the_share_of_the_update_that_pruning_took_is_told():
    """Of the products B A, not of their factors, and before any rescaling."""
    dense, model, rescaled = llama(prune_step=50), llama(prune_step=1), llama(prune_step=1, rescale=True)
    energy = []
    for each in (dense, model, rescaled):
        train(each, [texts()])
        found = weights(each)
        pairs = [(found[key], found[f"{key.removesuffix('.B')}.A"]) for key in found if key.endswith(".B")]
        energy.append(sum(float((B.double() @ A.double()).square().sum()) for B, A in pairs))
    for each in (model, rescaled):
        assert method_logs(each)["pruned_energy"] == pytest.approx(1 - energy[1] / energy[0], rel=1e-4)


# --- the penalty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"cmr_modules": "all"}, {"cmr_modules": ["down_proj"]}], ids=str)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("pruned", [False, True])
def test_exactly_one_penalty_is_in_the_gradient(settings, micro, pruned):
    """What is in ``.grad``, less what is there without a penalty, is the gradient of the penalty as it is written."""
    found = {}
    for weight in (0.1, 0.0, None):  # None: the penalty added to the loss by hand
        model = llama(prune_step=1 if pruned else 50, cmr_weight=weight or 0.0, **settings)
        train(model, [texts()])
        with torch.no_grad():
            for leaf in (leaf for site in sites(model).values() for leaf in (site.a, site.b)):
                leaf.weight.copy_(
                    torch.randn(leaf.weight.shape, generator=torch.Generator().manual_seed(3)) * leaf.mask
                )
        clock = Clock(model, sgd(model))
        clock.begin_step()
        if weight is None:
            (0.1 * penalty(model, settings.get("cmr_modules", PENALISED))).backward()
        for batch in texts(number=micro):
            loss(model, batch).backward()
        found[weight] = gradients(model)
        clock.close()
    close(found[0.1], found[None], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(found[0.1][key], found[0.0][key], rtol=1e-2) for key in found[0.1])


def test_a_short_window_has_one_penalty_too():
    """Windows of three, three and one micro-batches: each step has the penalty once."""
    windows = [texts(number=3), texts(number=3), texts(number=1)]
    model, twin = llama(prune_step=50), llama(prune_step=50, cmr_weight=0.0)
    train(model, windows)
    by_hand(twin, windows)
    close(weights(model), weights(twin), rtol=1e-4)


def by_hand(model, windows, weight: float = 0.1, clip: float | None = None) -> None:
    """The penalty added to the loss, once per window."""
    optimizer = sgd(model)
    for window in windows:
        optimizer.zero_grad()
        (weight * penalty(model) + sum(loss(model, batch) / len(window) for batch in window)).backward()
        if clip:
            nn.utils.clip_grad_norm_(trained(model), clip)
        optimizer.step()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro", [1, 2])
def test_checkpointing_counts_it_once(reentrant, micro):
    found = []
    for checkpointing in (False, True):
        model = moved(prune_step=50)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        clock = Clock(model, sgd(model))
        model.train()
        clock.begin_step()
        for batch in texts(number=micro):
            loss(model, batch).backward()
        found.append(gradients(model))
        clock.close()
    close(*found)


def test_clipping_sees_the_penalty():
    windows = [texts()] * 3
    model, twin = llama(prune_step=50), llama(prune_step=50, cmr_weight=0.0)
    train(model, windows, clip=0.05)
    by_hand(twin, windows, clip=0.05)
    close(weights(model), weights(twin), rtol=1e-4)


@pytest.mark.parametrize("micro", [1, 3])
def test_a_loss_scaler_scales_the_penalty_with_the_loss(micro):
    windows = [texts(number=micro)] * 3
    model, twin = llama(prune_step=2), llama(prune_step=2)
    train(model, windows, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    train(twin, windows)
    close(weights(model), weights(twin), rtol=1e-4)
    assert method_logs(model)["penalty_ratio"] == pytest.approx(method_logs(twin)["penalty_ratio"], rel=1e-4)


def test_a_loss_scaler_is_asked_for_its_scale_once_a_step(monkeypatch):
    """It reads it off the device, which has to finish for that what it is at."""
    scaler, asked = torch.amp.GradScaler("cpu"), []
    monkeypatch.setattr(scaler, "get_scale", lambda right=scaler.get_scale: asked.append(right()) or asked[-1])
    train(start("llama")[0], [texts()] * 2, scaler=scaler)
    assert len(asked) == 2


def test_a_disabled_loss_scaler_changes_nothing():
    model, twin = llama(), llama()
    train(model, [texts()] * 3, scaler=torch.amp.GradScaler("cpu", enabled=False))
    train(twin, [texts()] * 3)
    assert equal(weights(model), weights(twin))


def test_a_skipped_step_changes_nothing_and_is_not_counted():
    model = moved(prune_step=2)
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    clock = Clock(model, optimizer, scaler=scaler)
    before = weights(model)
    clock.begin_step()
    optimizer.zero_grad()
    scaler.scale(loss(model, texts()[0])).backward()
    trained(model)[0].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    clock.end_step()
    assert equal(weights(model), before)
    assert clock.step == 1
    assert not methods_of(model)["default"].pruned
    train(model, [texts()], optimizer, scaler=scaler, clock=clock)  # and the next one has its penalty and is counted
    assert clock.step == 2
    assert methods_of(model)["default"].pruned
    clock.close()


def test_the_penalty_is_whole_under_autocast():
    """The task's gradient is rounded under bf16; the penalty is not: it is the same to fp32 precision."""
    found = []
    for weight in (0.1, 0.0):
        model = moved(prune_step=50)
        methods_of(model)["default"].config.cmr_weight = weight
        clock = Clock(model, sgd(model))
        clock.begin_step()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, texts()[0])
        value.backward()
        found.append(gradients(model))
        clock.close()
    model.zero_grad()
    (0.1 * penalty(model)).backward()
    for key, expected in gradients(model).items():
        torch.testing.assert_close(found[0][key] - found[1][key], expected, rtol=1e-3, atol=1e-6)


def test_a_training_run_equals_the_penalty_added_to_the_loss(tmp_path):
    """One epoch of five batches in windows of three and two, clipped, under ``Trainer``."""

    class Naive(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
            value = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
            # a window's losses are added up here: a penalty per window is its share in each
            window = 3 if self.state.global_step == 0 else 2
            return value + 0.1 * penalty(model) / window

    rows = [{key: value[0] for key, value in batch.items()} for batch in texts(number=10)]
    found = []
    for trainer, settings, callbacks in ((Trainer, {}, [ClockCallback()]), (Naive, {"cmr_weight": 0.0}, [])):
        model = moved(prune_step=1, density=1.0, **settings)
        arguments = quiet(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            num_train_epochs=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.05,
        )
        trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
        found.append(weights(model))
    close(*found, rtol=1e-4)


def quiet(folder, **settings) -> TrainingArguments:
    defaults = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(str(folder), **{**defaults, **settings})


def test_keeping_m_in_memory_changes_nothing():
    model, twin = llama(cmr_memory="cache"), llama()
    for each in (model, twin):
        train(each, [texts()] * 3)
    close(weights(model), weights(twin))
    assert method_logs(model)["cmr"] == pytest.approx(method_logs(twin)["cmr"], rel=1e-5)


def test_only_the_modules_asked_for_are_penalised():
    for wanted, count in ((PENALISED, 6), (["down_proj"], 2), ("all", 14)):
        model = llama(cmr_modules=wanted)
        found = methods_of(model)["default"].penalties()
        assert len(found) == 2 * count  # A and B of each
    assert methods_of(llama(cmr_weight=0.0))["default"].penalties() == {}


def test_a_vision_tower_has_no_part_in_the_sum_over_the_language_model():
    """Its linears are called the same. They count where all are asked for, or where there are no others."""

    def counted(**settings):
        model = get_peft_model(pico.build("llava")[0], LoRASculptConfig(r=4, density=0.5, **settings))
        found = methods_of(model)["default"]._penalised()
        assert sum(weight for _, weight in found) == pytest.approx(1e-3)
        return Counter("vision_tower" in site.name for site, _ in found)

    names = [*PENALISED, "o_proj"]
    assert counted(target_modules=names) == {False: 6}
    assert counted(target_modules=names, cmr_modules="all") == {False: 8, True: 6}
    assert counted(target_modules=r".*vision_tower.*\.[qkv]_proj") == {True: 6}
    with pytest.raises(ValueError, match=r"names none of the adapted linears \(o_proj\)"):
        counted(target_modules=r".*(vision_tower.*\.q_proj|language_model.*\.o_proj)")


@pytest.mark.parametrize("connector", [0.0, 0.1, 0.3])
def test_the_connector_is_a_group_of_its_own(connector):
    """Mean over the language model times lambda plus mean over the connector times beta, even where both are equal."""
    base, _ = pico.build("llava")
    model = adapt(
        base, target_modules=[*PENALISED, "linear_1", "linear_2"], cmr_connector_weight=connector, prune_step=9
    )
    with torch.no_grad():
        for site in sites(model).values():
            site.b.weight.normal_()
    found = methods_of(model)["default"].penalties()
    language = [site for name, site in sites(model).items() if re.search(r"language_model.*\.[qkv]_proj$", name)]
    bridge = [site for name, site in sites(model).items() if "multi_modal_projector" in name]
    assert len(bridge) == 2
    value = 0.0
    for group, weight in ((language, 0.1), (bridge, connector)):
        for site in group:
            W = site.base.weight
            M = torch.tanh((1 / torch.log((W / W.norm()).abs() + 1e-15)).abs())
            value = value + weight / len(group) * (M * (site.b.weight @ site.a.weight)).norm()
    value.backward()
    for site in language + (bridge if connector else []):
        torch.testing.assert_close(found[site.b.weight], site.b.weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[site.a.weight], site.a.weight.grad, rtol=1e-4, atol=1e-7)
    assert len(found) == 2 * len(language + (bridge if connector else []))


# --- what is shown --------------------------------------------------------------------------------------------------


def test_the_numbers_shown():
    model = llama(prune_step=2)
    assert method_logs(model) == {"density_a": 1.0, "density_b": 1.0, "density_ba": 1.0}
    train(model, [texts()])
    assert set(method_logs(model)) == {"cmr", "penalty_ratio", "density_a", "density_b", "density_ba"}
    expected = float(penalty(model).detach())
    train(model, [texts()])
    numbers = method_logs(model)
    assert set(numbers) == {"cmr", "penalty_ratio", "density_a", "density_b", "density_ba", "pruned_energy"}
    assert numbers["cmr"] == pytest.approx(expected, rel=1e-4)
    found = list(sites(model).values())
    for key, tensors in (
        ("density_a", [site.A for site in found]),
        ("density_b", [site.B for site in found]),
        ("density_ba", [site.B @ site.A for site in found]),
    ):
        nonzero, total = sum(int(torch.count_nonzero(t)) for t in tensors), sum(t.numel() for t in tensors)
        assert numbers[key] == pytest.approx(nonzero / total, rel=1e-5)


@pytest.mark.parametrize("micro", [1, 3])
def test_the_ratio_is_the_penaltys_gradient_over_the_tasks(micro):
    model, twin = moved(prune_step=50), moved(prune_step=50)
    expected = {}
    for key, value in (
        ("penalty", 0.1 * penalty(twin)),
        ("task", sum(loss(twin, b) / micro for b in texts(number=micro))),
    ):
        twin.zero_grad()
        value.backward()
        grads = [
            site_leaf.weight.grad
            for name, s in sites(twin).items()
            if name.endswith(PENALISED)
            for site_leaf in (s.a, s.b)
        ]
        expected[key] = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    train(model, [texts(number=micro)])
    assert method_logs(model)["penalty_ratio"] == pytest.approx(expected["penalty"] / expected["task"], rel=1e-4)


def test_a_forward_pass_without_a_step_changes_no_state(tmp_path):
    model, processor = start("llava", prune_step=2)
    window = batches(processor, records(tmp_path, 2), 2)
    train(model, [window] * 3)
    method = methods_of(model)["default"]

    def everything():
        values, tensors = method.state()
        return values, method_logs(model), {**weights(model), **masks(model), **tensors}

    before = everything()
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            loss(model, window[0])
        loss(model, window[0])
    after = everything()
    assert after[:2] == before[:2]
    assert equal(after[2], before[2])


def test_a_penalty_on_none_of_the_adapted_linears_is_refused():
    model, _ = pico.build("llama")
    config = LoRASculptConfig(r=4, target_modules=["gate_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"gate_proj, up_proj"):
        _ = get_peft_model(model, config).base_model.methods
