from __future__ import annotations

import copy
import gc
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import numpy as np
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
    plain,
    records,
    sgd,
    start,
    texts,
    train,
    trained,
    weights,
)
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorasculpt import Clock, ClockCallback, LoRASculptConfig, UserError, method_logs
from lorasculpt.adapters.layers import sites
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.update import context_of, updates
from lorasculpt.data.batches import Collator
from lorasculpt.data.batches import rows as contract_rows
from lorasculpt.models.parts import target_regex

SHOWN = {"cmr", "penalty_ratio", "density_a", "density_b", "density_ba"}


def llama(**settings):
    return start("llama", **settings)[0]


# --- by hand --------------------------------------------------------------------------------------------------------


def test_a_forgotten_begin_step_is_an_error():
    model = llama()
    optimizer = sgd(model)
    clock = Clock(model, optimizer)
    loss(model, texts()[0]).backward()
    with pytest.raises(RuntimeError, match=r"call clock\.begin_step\(\) before the first backward pass"):
        optimizer.step()
    clock.begin_step()
    optimizer.step()
    clock.end_step()
    loss(model, texts()[0]).backward()
    with pytest.raises(RuntimeError, match=r"clock\.begin_step\(\)"):
        optimizer.step()


@pytest.mark.parametrize("where", ["before the window", "in the window", "after the step"])
def test_gradients_may_be_zeroed_anywhere_outside_a_window_of_backward_passes(where):
    found = []
    for place in ("in the window", where):
        model = llama()
        optimizer = sgd(model)
        clock = Clock(model, optimizer)
        for _ in range(3):
            if place == "before the window":
                optimizer.zero_grad()
            clock.begin_step()
            if place == "in the window":
                optimizer.zero_grad(set_to_none=False)
            loss(model, texts()[0]).backward()
            optimizer.step()
            if place == "after the step":
                optimizer.zero_grad()
            clock.end_step()
        found.append(weights(model))
        clock.close()
    assert equal(*found)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopping_and_going_on_equals_never_stopping(tmp_path, stop):
    windows = [[batch] for batch in texts(number=5)]

    def begin():
        model = llama(prune_step=0.4)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        return model, optimizer, Clock(model, optimizer, 5)

    whole, optimizer, clock = begin()
    train(whole, windows, optimizer, clock=clock)
    first, optimizer, clock = begin()
    train(first, windows[:stop], optimizer, clock=clock)
    saved = {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "clock": clock.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")

    second, optimizer, clock = begin()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    clock.load_state_dict(saved["clock"])
    assert clock.step == stop
    assert equal(masks(second), masks(first))
    train(second, windows[stop:], optimizer, clock=clock)
    assert equal(weights(second), weights(whole))
    assert equal(masks(second), masks(whole))
    assert method_logs(second) == method_logs(whole)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_fused_optimizer_under_a_loss_scaler_is_no_other(clip):
    """It steps where others are not called at all, and unscales within its step."""
    found = []
    for scaled in (False, True):
        model = start("llama", "spider")[0]
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaled)
        clock = Clock(model, optimizer, scaler=scaler)
        for number, batch in enumerate(texts(number=5)):
            if number == 2 and not scaled:
                continue
            clock.begin_step()
            optimizer.zero_grad()
            scaler.scale(loss(model, batch) * (float("inf") if number == 2 else 1)).backward()
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(trained(model), clip)
            scaler.step(optimizer)
            scaler.update()
            clock.end_step()
        assert clock.step == methods_of(model)["default"].step == 4
        found.append((weights(model), methods_of(model)["default"].sums))
    close(found[1][0], found[0][0], rtol=1e-3, atol=1e-5)
    close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


def test_a_clock_that_is_told_of_no_step_says_so():
    """As where the optimizer was made anew, or the window is opened for each micro-batch."""
    model = llama(cmr_weight=0.1)
    clock = Clock(model, sgd(model))
    other = sgd(model)
    clock.begin_step()
    loss(model, texts()[0]).backward()
    with pytest.raises(RuntimeError, match=r"clock\.begin_step\(\) was called again in the same optimizer step"):
        clock.begin_step()
    other.step()
    with pytest.warns(UserWarning, match="without a step of the optimizer that the clock was given"):
        clock.end_step()
    assert clock.step == 0


def test_an_optimizer_of_something_else_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="the optimizer has no parameter of adapter 'default'"):
        Clock(model, torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))


def test_a_model_has_one_clock():
    """A second one takes over, as of an epoch of its own: the penalty counts once."""
    found = []
    for clocks in (1, 2):
        model = llama(cmr_weight=0.1, omega=2.0)
        optimizer = sgd(model)
        for _ in range(clocks):
            clock = Clock(model, optimizer)
        clock.begin_step()
        loss(model, texts()[0]).backward()
        found.append([p.grad.clone() for p in trained(model)])
        optimizer.step()
        clock.end_step()
        assert clock.step == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("closed", [True, False])
def test_a_clock_that_is_let_go_keeps_no_model(closed):
    model = llama()
    optimizer = sgd(model)
    clock = Clock(model, optimizer)
    clock.begin_step()
    loss(model, texts()[0]).backward()
    optimizer.step()
    clock.end_step()
    if closed:
        clock.close()
    held = ref(model), ref(clock)
    del model, optimizer, clock
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_what_begins_to_train_later_needs_another_clock():
    model = llama()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("default")
    clock = Clock(model, sgd(model))
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="the trained parameters have changed since this clock was made"):
        clock.begin_step()


def test_a_state_of_something_else_is_refused_in_a_sentence():
    model = llama(prune_step=1)
    clock = Clock(model, sgd(model), 3)
    train(model, [texts()] * 2)
    state = clock.state_dict()
    state["methods"]["other"] = state["methods"].pop("default")
    with pytest.raises(ValueError, match="the state is of the adapters 'other', and this clock drives 'default'"):
        clock.load_state_dict(state)
    smaller = llama(prune_step=1, r=2)
    train(smaller, [texts()] * 2)
    with pytest.raises(ValueError, match="adapter 'default' is of another method or of other shapes"):
        Clock(smaller, sgd(smaller), 3).load_state_dict(Clock(model, sgd(model), 3).state_dict())


def test_an_adapter_that_the_model_itself_added_has_no_method():
    base = pico.build("llama")[0]
    base.add_adapter(LoRASculptConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"added by the model itself \(add_adapter\), which leaves its method out"):
        Clock(base, sgd(base))


def test_streamed_data_are_trained_on_under_accumulation(tmp_path):
    rows = Dataset.from_list([{key: value[0].tolist() for key, value in batch.items()} for batch in texts(number=8)])
    model = llama(prune_step=2)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows.to_iterable_dataset(), callbacks=[ClockCallback()]).train()
    assert methods_of(model)["default"].pruned
    assert methods_of(model)["default"].step == 4


def test_training_that_ends_before_it_pruned_says_so(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    model = llama(prune_step=2)
    arguments = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True)
    rows = [{key: value[0] for key, value in batch.items()} for batch in texts(number=8)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ClockCallback(), Stop()])
    with pytest.warns(
        UserWarning,
        match="'default': it is not pruned: training ended, or its .* before prune_step=2",
    ):
        trainer.train()


def test_a_closed_clock_does_nothing():
    model = llama(prune_step=1)
    optimizer = sgd(model)
    Clock(model, optimizer).close()
    loss(model, texts()[0]).backward()
    optimizer.step()
    assert not methods_of(model)["default"].pruned
    assert not any(leaf._post_accumulate_grad_hooks for leaf in trained(model))


def test_training_goes_on_where_it_was():
    model = llama(prune_step=3)
    train(model, [texts()] * 2)
    clock = train(model, [texts()])
    assert clock.step == 3
    assert methods_of(model)["default"].pruned


@pytest.mark.parametrize("method", ["loramoe", "mosld", "malora", "am_lora", "smora"])
def test_a_batch_twice_at_half_its_loss_is_the_batch_once(method):
    """Losses of routing are halved by the clock, which is told of two; SMoRA's bias moves once."""

    def trained_on(copies: int, accumulation: int):
        model, _ = start("llama", method)
        optimizer = sgd(model)
        train(model, [texts() * copies] * 3, optimizer, clock=Clock(model, optimizer, accumulation=accumulation))
        return weights(model), method_logs(model)

    once, shown = trained_on(1, 1)
    twice, shown_of_twice = trained_on(2, 2)
    close(twice, once)
    assert shown_of_twice == pytest.approx(shown, rel=1e-5)
    if method != "smora":  # it has no loss
        assert shown["balance_loss"] > 0
        with pytest.raises(AssertionError):
            close(trained_on(2, 1)[0], once)


PENALISED = {
    "lorasculpt": {"cmr_weight": 0.3, "cmr_connector_weight": 0.4, "cmr_modules": "all", "prune_step": 9},
    "regularized": {"penalty": "l2", "weight": 0.3},
}


@pytest.mark.parametrize("method", PENALISED)
@pytest.mark.parametrize("part", ["vision", "projector", "all"])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_window_without_pictures_has_all_penalties_too(method, part, micro, tmp_path):
    base, processor = pico.build("llava")
    model = adapt(base, method, target_modules=target_regex(base, part), **PENALISED[method])
    for site in sites(model).values():
        nn.init.normal_(site.b.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    asked = [replace(record, images=()) for record in records(tmp_path, 2 * micro)]
    optimizer = sgd(model, lr=0.0)
    clock = Clock(model, optimizer)
    clock.begin_step()
    due = dict(clock._due)
    for batch in batches(processor, asked, 2):
        loss(model, batch).backward()
    found = {parameter: parameter.grad.clone() for parameter in due}
    optimizer.step()
    optimizer.zero_grad()
    clock.end_step()
    clock.close()
    for batch in batches(processor, asked, 2):  # no clock: the task's alone
        value = loss(model, batch)
        if value.requires_grad:
            value.backward()
    task = {parameter: parameter.grad for parameter in due}
    assert sum(bool(penalty.any()) for penalty in due.values()) > 3
    assert any(grad is None for grad in task.values())
    for parameter, penalty in due.items():
        expected = penalty if task[parameter] is None else penalty + task[parameter]
        torch.testing.assert_close(found[parameter], expected, rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_model_has_no_clock(tmp_path):
    base, processor = pico.build("llava")
    model = adapt(base, "regularized", target_modules=target_regex(base, "projector"), **PENALISED["regularized"])
    clock = Clock(model, sgd(model))
    clock.begin_step()
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loss(twin, batches(processor, records(tmp_path / "data", 2), 2)[0]).backward()
    assert all(parameter.grad is None for parameter in trained(model))
    assert all(parameter.grad is not None for parameter in trained(twin))


# --- under a trainer ------------------------------------------------------------------------------------------------

ROWS = [{key: value[0] for key, value in batch.items()} for batch in texts(size=1, number=16)]


def trainer(folder: Path, model=None, callbacks=None, rows=ROWS, **settings) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **settings})
    callbacks = [ClockCallback()] if callbacks is None else callbacks
    return Trainer(model or llama(prune_step=3), arguments, train_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize("pictures", [True, False])
def test_a_trainer_scales_the_loss_that_reaches_other_parts(pictures, tmp_path):
    """In place, as that of transformers does: also where parts outside the language model have penalties."""
    base, processor = pico.build("llava")
    model = adapt(base, "regularized", target_modules=target_regex(base, "all"), **PENALISED["regularized"])
    found = records(tmp_path / "data", 4)
    asked = contract_rows([record if pictures else replace(record, images=()) for record in found])
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    collate = Collator(processor)
    run = Trainer(model, arguments, train_dataset=asked, data_collator=collate, callbacks=[ClockCallback()])
    before = weights(model)
    run.train()
    moved = {name.split(".")[1] for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved >= ({"vision_tower", "multi_modal_projector", "language_model"} if pictures else {"language_model"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Trainer, Path]:
    """A run of five steps that pruned after the third, and its checkpoints after every step."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    return run, folder


def test_the_steps_of_the_trainer_are_the_clocks(whole):
    run, _ = whole
    method = methods_of(run.model)["default"]
    assert (method.step, method.prune_step, method.pruned) == (5, 3, True)


def test_the_numbers_join_the_loss(whole):
    run, _ = whole
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]
    for entry in steps:
        assert entry.keys() >= SHOWN
        assert ("pruned_energy" in entry) == (entry["step"] >= 3)
        assert (entry["density_a"] < 0.26) == (entry["step"] >= 3)
    assert steps[0]["cmr"] == steps[0]["penalty_ratio"] == 0.0  # B was 0
    assert steps[1]["cmr"] > 0
    assert 0 < steps[1]["penalty_ratio"] < 10
    assert not SHOWN & run.state.log_history[-1].keys()  # the summary of the run


def test_losses_of_routing_count_by_the_micro_batches_that_there_are(tmp_path):
    """Five batches by two are windows of 2, 2 and 1, in every epoch."""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            (noted, *_) = (update.noted for update in updates(model).values())
            seen.append((float(context_of(model).weight), int(noted["batches"])))

    model = llama(method="loramoe", tasks=[], knowledge=[])
    trainer(tmp_path, model, [ClockCallback(), Watch()], ROWS[:5], max_steps=6, save_strategy="no").train()
    assert seen == [(0.5, 2), (0.5, 2), (1.0, 1)] * 2


def counted(scores: list[np.ndarray]) -> tuple[np.ndarray, float, float]:
    """(loads, entropy, loss) of one linear with two of four experts, token by token, from the scores of each batch."""
    load, entropy, tokens, loss = np.zeros(4), 0.0, 0, 0.0
    for batch in scores:
        chosen, mean = np.zeros(4), np.zeros(4)
        for score in batch:
            p = np.exp(score) / np.exp(score).sum()
            best = p.argsort()[-2:]
            g = p[best] / p[best].sum()
            load[best] += g
            entropy -= (g * np.log(g)).sum()
            tokens += 1
            chosen[best] += 1 / (2 * len(batch))
            mean += p / len(batch)
        loss += 0.5 * 4 * (chosen * mean).sum() / len(scores)
    return 4 * load / load.sum(), entropy / tokens / np.log(4), loss


def test_what_is_logged_of_routing_is_what_a_count_finds(tmp_path):
    """Over micro-batches and linears, without padding: the load of every expert, the entropy, the loss."""
    mask, seen = [], []
    model = llama(method="malora")

    def masked(module, args, kwargs):
        mask[:] = [kwargs["attention_mask"].bool()]

    @torch.no_grad()
    def scored(update, args):
        seen.append((args[0] @ update.router.T)[mask[0]].double().numpy())

    model.get_base_model().register_forward_pre_hook(masked, with_kwargs=True)
    for update in updates(model).values():
        update.register_forward_pre_hook(scored)
    padded = [{**row, "attention_mask": (torch.arange(8) >= i % 4).long()} for i, row in enumerate(ROWS)]
    run = trainer(tmp_path, model, None, padded, max_steps=3, per_device_train_batch_size=2, save_strategy="no")
    run.train()
    n = len(updates(model))
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(seen) == 3 * 2 * n
    for number, entry in enumerate(steps):
        window = seen[2 * n * number : 2 * n * (number + 1)]
        loads, entropy, loss = zip(*(counted([window[i], window[n + i]]) for i in range(n)), strict=True)
        expected = {f"load_{i}": load for i, load in enumerate(np.mean(loads, 0))}
        expected |= {"load_max": np.mean(np.max(loads, 1)), "load_min": np.mean(np.min(loads, 1))}
        expected |= {"router_entropy": np.mean(entropy), "balance_loss": sum(loss)}
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "settings"), [("smora", {"r": 32, "rank_partition": 1}), ("mosld", {"num_experts": [4, 3]})]
)
def test_of_many_or_unequal_experts_only_the_extreme_loads_are_shown(method, settings):
    model = llama(method=method, **settings)
    train(model, [texts()])
    loads = {key: value for key, value in method_logs(model).items() if key.startswith("load_")}
    assert loads.keys() == {"load_min", "load_max"}
    assert loads["load_min"] < 1 < loads["load_max"]


@pytest.mark.parametrize("lead", [False, True])
def test_tensorboard_has_the_numbers_once(tmp_path, lead):
    clock = ClockCallback()
    run = trainer(tmp_path, callbacks=[] if lead else [clock], report_to=["tensorboard"], save_strategy="no")
    if lead:
        assert clock.lead(run) is clock
    run.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) >= {f"train/{key}" for key in (*SHOWN, "pruned_energy", "loss")}
    for key in SHOWN:
        found = events.Scalars(f"train/{key}")
        assert [event.step for event in found] == [1, 2, 3, 4, 5]
        logged = [entry[key] for entry in run.state.log_history if "loss" in entry]
        assert [event.value for event in found] == pytest.approx(logged, rel=1e-5)


def test_leading_puts_it_before_every_tracker(tmp_path):
    class Tracker(TrainerCallback):
        seen: list[set[str]]

        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(set(logs))

    clock, tracker = ClockCallback(), Tracker()
    run = trainer(tmp_path, callbacks=[tracker, clock], save_strategy="no", max_steps=4)
    clock.lead(run)
    assert run.callback_handler.callbacks[0] is clock
    assert run.callback_handler.callbacks.count(clock) == 1
    run.train()
    assert all(seen >= SHOWN for seen in tracker.seen[:4])


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_resuming_equals_never_stopping(whole, tmp_path, step):
    run, folder = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert equal(weights(again.model), weights(run.model))
    assert equal(masks(again.model), masks(run.model))
    assert method_logs(again.model) == method_logs(run.model)


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("told", [False, True])
def test_resuming_from_elsewhere(whole, tmp_path, step, told):
    run, folder = whole
    checkpoint = folder / f"checkpoint-{step}"
    again = trainer(tmp_path, callbacks=[ClockCallback(checkpoint if told else None)])
    again.train(resume_from_checkpoint=str(checkpoint))
    assert equal(weights(again.model), weights(run.model))
    assert equal(masks(again.model), masks(run.model))
    if told:
        assert method_logs(again.model) == method_logs(run.model)
    elif step == 4:
        assert "pruned_energy" not in method_logs(again.model)  # not known: it is in the state file


@pytest.mark.parametrize("densities", [{"density_a": 1.0}, {"density_b": 1.0}, {"density": 1.0}], ids=str)
@pytest.mark.parametrize("step", [1, 2, 4])
def test_resuming_with_one_factor_dense(tmp_path, densities, step):
    run = trainer(tmp_path, llama(prune_step=3, **densities))
    run.train()
    again = trainer(tmp_path, llama(prune_step=3, **densities))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert equal(weights(again.model), weights(run.model))
    assert equal(masks(again.model), masks(run.model))


def zero_a_kept_entry(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key][tuple(tensors[key].nonzero()[0])] = 0.0
    save_file(tensors, path, {"format": "pt"})


def test_masks_that_cannot_be_read_off_the_weights_need_their_file(whole, tmp_path):
    _, folder = whole
    checkpoint = tmp_path / "elsewhere" / "checkpoint-4"
    shutil.copytree(folder / "checkpoint-4", checkpoint)
    zero_a_kept_entry(checkpoint)
    with pytest.raises(UserError, match=r"give ClockCallback\(resume=\.\.\.\) the checkpoint folder"):
        trainer(tmp_path / "a").train(resume_from_checkpoint=str(checkpoint))
    told = trainer(tmp_path / "b", callbacks=[ClockCallback(checkpoint)])
    told.train(resume_from_checkpoint=str(checkpoint))
    assert equal(masks(told.model), masks(whole[0].model))


def test_the_masks_of_another_run_are_not_taken(whole, tmp_path):
    """The trainer's own folder holds a checkpoint of the same step, but training resumes from elsewhere."""
    run, folder = whole
    other = trainer(tmp_path, llama(prune_step=1), learning_rate=0.3)
    other.train()
    assert not equal(masks(other.model), masks(run.model))
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert equal(masks(again.model), masks(run.model))
    assert equal(weights(again.model), weights(run.model))


def test_the_sums_of_another_run_are_not_taken(tmp_path):
    asked, (mine, other) = records(tmp_path / "asked"), (tmp_path / "mine", tmp_path / "other")
    plain(mine, "spider", "llava", asked, max_steps=2).train()
    plain(other, "spider", "llava", asked, max_steps=2, learning_rate=3e-2).train()
    checkpoint = str(other / "checkpoint-2")
    with pytest.raises(UserError, match=r"the state of adapter 'default' cannot be read off its weights"):
        plain(mine, "spider", "llava", asked, max_steps=3).train(resume_from_checkpoint=checkpoint)
    shutil.rmtree(mine)
    with pytest.raises(UserError, match=r"the state of adapter 'default' cannot be read off its weights"):
        plain(mine, "spider", "llava", asked, max_steps=3).train(resume_from_checkpoint=checkpoint)


def test_a_run_too_short_to_prune_is_refused_by_the_trainer_too(tmp_path):
    with pytest.raises(ValueError, match="is not before the end of training"):
        trainer(tmp_path, llama(prune_step=5), save_strategy="no").train()


def test_training_again_after_an_interruption_has_one_clock(tmp_path):
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    interrupt = Interrupt()
    run = trainer(tmp_path, callbacks=[ClockCallback(), interrupt], save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(interrupt)
    run.model.zero_grad()
    run.train()
    method = methods_of(run.model)["default"]
    assert method.step == 1 + 5  # one was taken before
    assert all(len(leaf._post_accumulate_grad_hooks or {}) == 0 for leaf in trained(run.model))


def test_deepspeed_is_refused():
    with pytest.raises(UserError, match="DeepSpeed takes optimizer steps that no hook sees"):
        # as a launcher's config asks for it; args.deepspeed makes a plugin as well
        ClockCallback().on_train_begin(SimpleNamespace(deepspeed=None, deepspeed_plugin=object()), None, None)


def test_a_callback_without_methods_is_harmless(tmp_path):
    from peft import LoraConfig, get_peft_model
    from pico import build

    model = get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"]))
    run = trainer(tmp_path, model, save_strategy="no", report_to=["tensorboard"])
    run.train()
    assert not SHOWN & set().union(*run.state.log_history)
    assert sites(model)
