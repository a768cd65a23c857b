"""What every method promises, for every family: see ``contract.py`` for the rows of the table."""

from __future__ import annotations

from contextlib import nullcontext

import pico
import pytest
import torch
from contract import (
    CASES,
    FAMILIES,
    TASKS,
    adapt,
    batches,
    close,
    equal,
    logits,
    loss,
    masks,
    plain,
    records,
    sft,
    sgd,
    start,
    train,
    trained,
    weights,
)

import lorasculpt
from lorasculpt import METHODS, Clock
from lorasculpt.adapters.method import methods_of
from lorasculpt.adapters.update import context_of, updates
from lorasculpt.models.parts import target_regex

STEPS = 3  # every case prunes, routes or merges something by then
# every method on two families and LoRASculpt on all; test_families.py has all of both
PAIRS = [
    (family, method)
    for number, method in enumerate(CASES)
    for family in (FAMILIES if method == "lorasculpt" else ("llava", FAMILIES[1 + number % 3]))
]
pairs = pytest.mark.parametrize(("family", "method"), PAIRS)


@pytest.fixture(params=CASES)
def method(request) -> str:
    return request.param


@pytest.fixture
def family() -> str:
    """What `pairs` gives."""
    raise NotImplementedError


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Eight questions about eight pictures."""
    return records(tmp_path_factory.mktemp("asked"))


def window(processor, asked, size: int = 2):
    return batches(processor, asked[:2], size)


def test_every_method_has_a_row():
    assert CASES.keys() == METHODS.keys()


# --- one step -------------------------------------------------------------------------------------------------------


@pairs
def test_at_the_start_the_output_is_the_bases(family, method, asked):
    base, processor = pico.build(family)
    batch = window(processor, asked)[0]
    expected = logits(base, batch)
    assert torch.equal(logits(adapt(base, method), batch), expected)


@pairs
def test_gradients_reach_the_adapter_and_nothing_else(family, method, asked):
    model, processor = start(family, method)
    moved = tuple(f"lora_update.default.{name}" for name in CASES[method].moves)
    frozen = {
        name: p.clone() for name, p in model.named_parameters() if not p.requires_grad and not name.endswith(moved)
    }
    clock = Clock(model, sgd(model), 10)
    clock.begin_step()
    loss(model, window(processor, asked)[0]).backward()
    clock.close()
    for name, parameter in model.named_parameters():
        kept = any(name.endswith(f".{key}") for update in updates(model).values() for key in update._kept)
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name and not kept), name
    train(model, [window(processor, asked)] * STEPS)
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)


@pairs
def test_two_batches_of_one_do_what_one_batch_of_two_does(family, method, asked):
    found = []
    for size in (1, 2):
        model, processor = start(family, method, **CASES[method].additive)
        micro = window(processor, asked, size)
        clock = Clock(model, optimizer := sgd(model), 10)
        for _ in range(STEPS):
            clock.begin_step()
            optimizer.zero_grad()
            for batch in micro:
                loss(model, batch).backward()  # a sum over tokens: halves add up
            optimizer.step()
            clock.end_step()
        clock.close()
        found.append(weights(model))
    close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "dtype", "kind"),
    [
        *((*pair, None, kind) for pair in PAIRS for kind in ("reentrant", "not reentrant")),
        *(("llava", method, torch.bfloat16, kind) for method in CASES for kind in ("reentrant", "not reentrant")),
        *(("llava", method, None, "as in a run") for method in CASES),
    ],
    ids=lambda value: {None: "fp32", torch.bfloat16: "bf16"}.get(value, value),
)
def test_checkpointing_changes_nothing(family, dtype, method, asked, kind):
    found, moves = [], []
    for checkpointing in (False, True):
        model, processor = start(family, method)
        before = weights(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            if kind == "as in a run":  # without gradients at the input
                model.disable_input_require_grads()
        train(model, [window(processor, asked)] * STEPS, autocast=dtype)
        found.append(weights(model))
        moves.append(torch.cat([(value - before[key]).flatten() for key, value in found[-1].items()]))
    if dtype is None:
        close(*found)
    else:
        assert moves[0].any()
        assert float((moves[1] - moves[0]).norm() / moves[0].norm()) < 2e-2


@pairs
def test_autocast_stays_near_full_precision(family, method, asked):
    found = []
    for dtype in (None, torch.bfloat16):
        model, processor = start(family, method, **CASES[method].smooth)
        batch = window(processor, asked)[0]
        train(model, [[batch]] * STEPS, autocast=dtype)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found.append(logits(model, batch).float())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 2e-2


# --- a trained adapter ----------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(family, method, asked):
    """A model after ``STEPS`` steps, and a batch on which it differs from its base."""
    model, processor = start(family, method)
    batch = window(processor, asked)[0]
    train(model, [[batch]] * STEPS, torch.optim.AdamW(trained(model), lr=2e-2))
    base = logits(pico.build(family)[0], batch)
    assert float((logits(model, batch) - base).norm() / base.norm()) > 1e-2
    return model, batch, base, processor


@pairs
def test_saved_and_loaded_under_another_name_it_answers_the_same(tuned, family, tmp_path):
    model, batch, _, _ = tuned
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = lorasculpt.load(pico.build(family)[0], tmp_path, trainable=trainable, adapter="again").eval()
        assert torch.equal(logits(loaded, batch), logits(model, batch))
        assert any(p.requires_grad for p in loaded.parameters()) == trainable
    loaded.save_pretrained(tmp_path / "more")
    assert (tmp_path / "more" / "again" / "lorasculpt.json").is_file()
    third = lorasculpt.load(pico.build(family)[0], tmp_path / "more" / "again", trainable=True).eval()
    assert torch.equal(logits(third, batch), logits(model, batch))
    assert equal(masks(third), masks(model))


def mergeable(model) -> bool:
    return getattr(model.peft_config["default"], "merges", "always") == "always"


@pairs
def test_disabled_merged_or_deleted_it_is_what_it_should_be(tuned):
    model, batch, base, _ = tuned
    found = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), found)
    if not mergeable(model):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"cannot be merged|another matrix for each task"):
                merge()
        assert torch.equal(logits(model, batch), found)
        unloaded = model.unload()
        assert torch.equal(logits(unloaded, batch), base)
        assert not any("lora_" in name for name, _ in unloaded.named_parameters())
        return
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), found, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, batch), found, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, batch), found, rtol=1e-4, atol=1e-5)


@pairs
def test_beside_another_it_is_itself_and_deleted_it_leaves_the_base(tuned, method):
    model, batch, base, _ = tuned
    found = logits(model, batch)
    model.add_adapter("fresh", CASES[method](target_modules=target_regex(model, "language")))
    assert torch.equal(logits(model, batch), found)
    model.set_adapter("fresh")
    assert torch.equal(logits(model, batch), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), found)
    model.set_adapter("fresh")
    model.delete_adapter("default")
    assert list(methods_of(model)) == ["fresh"]
    assert torch.equal(logits(model, batch), base)


@pairs
def test_generating_with_a_cache_is_the_full_forward(tuned, asked):
    model, _, _, processor = tuned
    (prompt,) = window(processor, asked[:1], 1)  # one row: nothing is padded
    del prompt["labels"]
    length = prompt["input_ids"].shape[1]
    greedy = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    greedy["suppress_tokens"] = [model.config.image_token_id]  # a picture that nobody gave would be missed
    task = {"task": TASKS[1]} if context_of(model) else {}
    with torch.no_grad():
        out = model.generate(**prompt, **greedy, **task, output_logits=True, return_dict_in_generate=True)
    whole = {key: out.sequences if key == "input_ids" else value for key, value in prompt.items()}
    for key in ("attention_mask", "token_type_ids"):
        if key in whole:
            new = torch.full_like(out.sequences[:, length:], key == "attention_mask")
            whole[key] = torch.cat([whole[key], new], 1)
    if task:  # what was the prompt, for methods that choose by it
        whole |= task | {"labels": torch.where(torch.arange(out.sequences.shape[1]) < length, -100, out.sequences)}
    with torch.no_grad():
        expected = model(**whole).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, rtol=1e-4, atol=1e-4)


# --- trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "family"), [(plain, "llava"), (sft, "gemma3")], ids=["Trainer", "SFTTrainer"])
def test_resumed_it_is_what_it_would_have_been(make, family, method, asked, tmp_path):
    whole = make(tmp_path, method, family, asked)
    whole.train()
    for step in (1, 3):  # before and after the methods' turning point at step 2
        again = make(tmp_path, method, family, asked, save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert equal(weights(again.model), weights(whole.model))
        assert equal(masks(again.model), masks(whole.model))


@pytest.mark.parametrize("best", [1, 3])
def test_the_best_model_comes_back_with_its_masks(method, asked, tmp_path, best):
    run = plain(
        tmp_path,
        method,
        "llava",
        asked,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="chosen",
        greater_is_better=True,
    )
    measured = run.evaluate

    def evaluate(*args, **kwargs):
        numbers = measured(*args, **kwargs)
        numbers["eval_chosen"] = float(run.state.global_step == best)
        return numbers

    run.evaluate = evaluate
    unpruned = method == "lorasculpt" and best == 1
    with pytest.warns(UserWarning, match="it is not pruned: training ended") if unpruned else nullcontext():
        run.train()
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = lorasculpt.load(pico.build("llava")[0], tmp_path / f"checkpoint-{best}", trainable=True)
    assert equal(weights(run.model), weights(saved))
    assert equal(masks(run.model), masks(saved))
    pruned = [methods_of(model)["default"].state()[0].get("pruned") for model in (run.model, saved)]
    assert pruned[0] == pruned[1]


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_sft_trainer_takes_the_config_itself(family, method, asked, tmp_path):
    run = sft(tmp_path, method, family, asked, wrap=True, gradient_checkpointing=True)
    run.train()
    assert list(methods_of(run.model)) == ["default"]
    assert methods_of(run.model)["default"].step == 4
    assert run.model.peft_config["default"].settings() == CASES[method]().settings()
    loaded = lorasculpt.load(pico.build(family)[0], tmp_path / "checkpoint-4", trainable=True)
    assert equal(weights(run.model), weights(loaded))
    assert equal(masks(run.model), masks(loaded))
    assert methods_of(loaded)["default"].state()[0] == methods_of(run.model)["default"].state()[0]
