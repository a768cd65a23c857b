"""Adapters that change the forward pass, as a model wears them: tasks on every way in, and no trace afterwards."""

from __future__ import annotations

import copy
import dataclasses
import json

import pico
import pytest
import torch
import transformers as hf
from accelerate.utils import slice_tensors
from contract import CASES, adapt, equal, sft, start, texts, weights
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from lorasculpt import FullConfig, LoRAMoEConfig, LoRASculptConfig, MTLLoRAConfig, SpiderConfig, UserError, load
from lorasculpt.adapters.context import TASK_IDS
from lorasculpt.adapters.tasks import TaskCollator
from lorasculpt.adapters.update import UpdateConfig, context_of, known_tasks, updates
from lorasculpt.data.batches import Collator, rows
from lorasculpt.data.records import Record, read
from lorasculpt.evaluation.prompts import chat, encode
from lorasculpt.models.parts import target_regex

TASKS = ["even", "odd"]
IDS = texts(size=4)[0]["input_ids"]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def stirred(model: nn.Module, adapter: str = "default", seed: int = 3) -> nn.Module:
    """``model`` whose adapter does something, for every task something else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in updates(model, adapter).values():
            for parameter in update.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture
def model():
    """The pico Llama with an adapter that is another matrix for each of two tasks."""
    return stirred(start("llama", "mtl_lora")[0])


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Record]:
    """Eight questions of two tasks, in turn."""
    return read(pico.write_data(tmp_path_factory.mktemp("asked"), n=4, tasks=["color", "shape"]))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **task) -> torch.Tensor:
    return model(input_ids=ids, **task).logits


@torch.no_grad()
def generate(model: nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


# --- the ways in ----------------------------------------------------------------------------------------------------


def test_every_sample_gets_the_matrix_of_its_task(model):
    mixed = ["odd", "even", "even", "odd"]
    found = logits(model, task=mixed)
    for row, task in enumerate(mixed):
        torch.testing.assert_close(found[row], logits(model, IDS[row : row + 1], task=task)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model, task="odd"), logits(model, task="even"), atol=1e-2)
    assert torch.equal(found, logits(model, **{TASK_IDS: torch.tensor([1, 0, 0, 1])}))
    assert torch.equal(logits(model, task="odd"), logits(model, task=["odd"]))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (
            {},
            "needs the task of every sample: pass task=..., or in a trainer use lorasculpt.TaskCollator; it knows even",
        ),
        ({"task": "prime"}, "no task 'prime'; this adapter knows the names even, odd."),
        ({"task": 0}, "no task 0; this adapter knows the names even, odd."),
        ({"task": [0, 1, 0, 1]}, "no task 0; this adapter knows the names even, odd."),
        ({"task": ["odd", "even", "odd", "prime"]}, "no task 'prime'; this adapter knows the names even, odd."),
        ({TASK_IDS: torch.tensor([0, 1, 0, 2])}, "from 0 to 1: this adapter knows even, odd."),
        ({"task": ["odd", "even", "odd"]}, "3 tasks were given for 4 rows"),
    ],
)
def test_a_wrong_task_is_one_sentence_and_the_next_pass_is_right_again(model, given, part):
    expected = logits(model, task="odd")
    for ask, options in ((logits, {}), (generate, GREEDY)):
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            ask(model, IDS, **given, **options)
        assert part in str(error.value)
    assert context_of(model)._held is None
    assert torch.equal(logits(model, task="odd"), expected)


@pytest.mark.parametrize(("family", "alike"), [("llava", True), ("llava_next", False), ("idefics3", True)])
def test_rows_that_are_no_samples_take_one_task(family, alike, asked):
    """A vision tower gets tiles of pictures, and nobody tells which tile is of which sample."""
    base, processor = pico.build(family)
    model = stirred(adapt(base, "mtl_lora", target_modules=target_regex(base, "vision")))
    table, collate = rows(asked), Collator(processor)
    batch = collate([table[i] for i in range(2)])
    with torch.no_grad():
        odd, even = (model(**batch, task=task).logits for task in ("odd", "even"))
        assert not torch.allclose(odd, even, atol=1e-4)
        if alike:
            found = model(**batch, task=["odd", "even"]).logits
            torch.testing.assert_close(found, torch.stack([odd[0], even[1]]), rtol=1e-4, atol=1e-5)
            return
        with pytest.raises(UserError, match="there use one task in a batch, or scope: language"):
            model(**batch, task=["odd", "even"])


def test_a_tower_with_as_many_pictures_as_samples_knows_whose_they_are(asked):
    """Of two samples one has both pictures: the first picture is not the first sample's."""
    base, processor = pico.build("llava")
    model = stirred(adapt(base, "mtl_lora", target_modules=target_regex(base, "all")))
    with_two = dataclasses.replace(asked[0], images=asked[0].images * 2)
    table, collate = rows([dataclasses.replace(asked[0], images=()), with_two]), Collator(processor)
    batch = collate([table[0], table[1]])
    with torch.no_grad(), pytest.raises(UserError, match="there use one task in a batch, or scope: language"):
        model(**batch, task=["odd", "even"])


@pytest.fixture
def flattened() -> nn.Module:
    """A mixture of experts whose shared expert takes the tokens of all rows as one row."""
    torch.manual_seed(0)
    config = hf.Qwen2MoeConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
    )
    return hf.Qwen2MoeForCausalLM(config)


SHARED = r".*\.shared_expert\.\w+_proj"


def test_rows_that_come_as_one_are_told_apart(flattened):
    model = stirred(adapt(flattened, "mtl_lora", target_modules=SHARED))
    found = logits(model, task=["odd", "even"] * 2)
    for row, task in enumerate(["odd", "even"] * 2):
        torch.testing.assert_close(found[row : row + 1], logits(model, IDS[row : row + 1], task=task))
    assert not torch.allclose(logits(model, task="odd"), logits(model, task="even"), atol=1e-4)
    expected = generate(model, IDS[1:2], task="even", **GREEDY)
    assert torch.equal(generate(model, IDS, task=["odd", "even"] * 2, **GREEDY)[1:2], expected)


@pytest.mark.parametrize("method", ["mosld", "malora", "smora", "loramoe"])
def test_padding_of_rows_that_come_as_one_is_not_routed(method, flattened):
    """What is noted of a batch does not depend on how far it is padded."""
    model = stirred(adapt(flattened, method, target_modules=SHARED)).train()
    ids = IDS[:2]
    padded = {"input_ids": F.pad(ids, (5, 0)), "attention_mask": F.pad(torch.ones_like(ids), (5, 0))}
    noted = []
    for given in ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, padded):
        model.zero_grad()
        for update in updates(model).values():
            update.noted = {}
        model(**given, task=["odd", "even"] if method == "loramoe" else None).logits.sum().backward()
        noted.append([update.noted for update in updates(model).values()])
    for plain, more in zip(*noted, strict=True):
        assert plain["tokens"] == more["tokens"] == ids.numel()
        torch.testing.assert_close(plain["loss"], more["loss"], rtol=1e-4, atol=1e-6)


def test_an_adapter_for_each_row_is_refused(model):
    with pytest.raises(UserError, match="adapter_names, an adapter for each row, is for LoRA alone"):
        model(input_ids=IDS, task="odd", adapter_names=["default"] * 4)


def test_tasks_of_an_earlier_pass_are_forgotten(model):
    logits(model, task="odd")
    generate(model, IDS, task="odd", **GREEDY)
    with pytest.raises(UserError, match="needs the task"):
        logits(model)


def test_without_the_adapter_nobody_needs_a_task(model):
    assert known_tasks(model) == TASKS
    with model.disable_adapter():
        assert known_tasks(model) is None
        base = logits(model)
        assert torch.equal(base, logits(model, task="prime"))
    assert torch.equal(base, logits(pico.build("llama")[0]))
    assert known_tasks(pico.build("llama")[0]) is None
    assert known_tasks(start("llama", "mixlora")[0]) is None


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("returned", [1, 2])
@pytest.mark.parametrize("cache", [True, False])
def test_beams_and_returned_sequences_follow_their_sample(model, beams, returned, cache):
    mixed = ["odd", "even", "even", "odd"]
    options = {**GREEDY, "num_beams": beams, "num_return_sequences": returned, "use_cache": cache}
    if beams < returned:
        options |= {"do_sample": True, "top_k": 1}  # the likeliest token, several times
    together = generate(model, IDS, task=mixed, **options)
    assert len(together) == returned * len(IDS)
    apart = [generate(model, IDS[row : row + 1], task=task, **options) for row, task in enumerate(mixed)]
    assert torch.equal(together, torch.cat(apart))
    alike = generate(model, IDS, task="odd", **options)
    assert not torch.equal(together, alike)


@pytest.mark.parametrize("family", ["llava", "idefics3"])
@pytest.mark.parametrize("method", ["mtl_lora", "mixlora"])
def test_pictures_are_seen_for_the_question_that_is_asked(method, family, asked):
    """Generation has them seen before its first pass: by a tower that must not go by the pass before."""
    base, processor = pico.build(family)
    model = stirred(adapt(base, method, target_modules=["q_proj", "v_proj"]))
    for size, task in ((2, "odd"), (2, "even"), (3, "odd")):
        given = encode(model, processor, asked[:size], [chat(processor, record) for record in asked[:size]])
        told = {"task": task} if method == "mtl_lora" else {}
        options = GREEDY | {"max_new_tokens": 1, "min_new_tokens": 1, "output_logits": True}
        with torch.no_grad():
            said = model.generate(**given, **told, **options, return_dict_in_generate=True, pad_token_id=1).logits[0]
            found = model(**given, **told).logits
        torch.testing.assert_close(said, found[:, -1], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_no_answer(model):
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    padded = torch.where(mask.bool(), IDS, 0)
    with torch.no_grad():
        found = model.generate(
            input_ids=padded, attention_mask=mask, pad_token_id=0, task=["odd", "even"] * 2, **GREEDY
        )
    alone = generate(model, IDS[1:2, 3:], task="even", **GREEDY)
    assert torch.equal(found[1, IDS.shape[1] :], alone[0, IDS.shape[1] - 3 :])


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "gemma3", "llama"])
def test_a_batch_that_is_cut_for_the_processes_keeps_its_tasks(family, asked):
    """As accelerate does it with ``dispatch_batches``: one process collates, the others get slices."""
    found = [Record(record.prompt, record.answer, task=record.task) for record in asked] if family == "llama" else asked
    table, collate = rows(found), TaskCollator(Collator(pico.build(family)[1]), ["shape", "color"])
    whole = collate([table[i] for i in range(8)])
    for at in (0, 4):
        part = slice_tensors(whole, slice(at, at + 4))
        assert part[TASK_IDS].tolist() == [["shape", "color"].index(record.task) for record in found[at : at + 4]]
        expected = collate([table[i] for i in range(at, at + 4)])
        width = expected["input_ids"].shape[1]
        assert torch.equal(part["input_ids"][:, :width], expected["input_ids"])


@pytest.mark.parametrize("dispatch", [False, True])
def test_a_trainer_hands_every_sample_its_task(dispatch, asked, tmp_path, monkeypatch):
    seen: list[tuple[list[int], torch.Tensor]] = []
    run = sft(tmp_path, "mtl_lora", "llava", asked, max_steps=2, accelerator_config={"dispatch_batches": dispatch})
    run.data_collator = TaskCollator(Collator(run.processing_class), ["color", "shape"])
    context = context_of(run.model)
    enter = context._enter

    def watched(module, args, kwargs):
        out = enter(module, args, kwargs)
        seen.append((context.tasks.tolist(), kwargs["input_ids"]))
        return out

    context.detach()
    monkeypatch.setattr(context, "_enter", watched)
    context.attach(run.model.get_base_model())
    run.train()
    asks = {"color": "What color", "shape": "a square or a circle"}
    words = run.processing_class.tokenizer
    assert len(seen) == 2
    for ids, batch in seen:
        texts = words.batch_decode(batch)
        told = [["color", "shape"][number] for number in ids]
        assert all(asks[task].lower() in text.lower() for task, text in zip(told, texts, strict=True)), texts


def test_a_trainer_evaluates_with_tasks(asked, tmp_path):
    run = sft(tmp_path, "mtl_lora", "llava", asked, max_steps=1)
    run.data_collator = TaskCollator(Collator(run.processing_class), ["color", "shape"])
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    run.data_collator = Collator(run.processing_class)
    with pytest.raises(UserError, match="needs the task of every sample"):
        run.evaluate()


# --- what PEFT does with an adapter ---------------------------------------------------------------------------------


def test_a_copy_is_another_model(model):
    twin = copy.deepcopy(model)
    expected = logits(model, task="odd")
    assert torch.equal(logits(twin, task="odd"), expected)
    assert torch.equal(generate(twin, IDS, task="odd", **GREEDY), generate(model, IDS, task="odd", **GREEDY))
    assert context_of(twin) is not context_of(model)
    stirred(twin, seed=4)
    assert not torch.equal(logits(twin, task="odd"), expected)
    assert not torch.equal(generate(twin, IDS, task="odd", **GREEDY), generate(model, IDS, task="odd", **GREEDY))
    assert torch.equal(logits(model, task="odd"), expected)


def test_several_adapters_have_their_own_tasks(model):
    targets = target_regex(model, "language")
    one = logits(model, task="odd")
    model.add_adapter("more", MTLLoRAConfig(r=2, tasks=["odd", "prime"], target_modules=targets))
    stirred(model, "more", seed=5)
    assert torch.equal(logits(model, task="odd"), one)
    model.set_adapter("more")
    assert known_tasks(model) == ["odd", "prime"]
    other = logits(model, task="odd")
    assert not torch.allclose(other, one, atol=1e-3)
    with pytest.raises(UserError, match="no task 'even'; this adapter knows the names odd, prime"):
        logits(model, task="even")
    assert torch.equal(
        generate(model, IDS, task=["odd", "prime"] * 2, **GREEDY)[::2], generate(model, IDS[::2], task="odd", **GREEDY)
    )
    model.base_model.set_adapter(["default", "more"])
    assert known_tasks(model) == ["odd"]
    both = logits(model, task="odd")
    assert not torch.allclose(both, one, atol=1e-3)
    assert not torch.allclose(both, other, atol=1e-3)
    model.set_adapter("default")
    model.delete_adapter("more")
    assert torch.equal(logits(model, task="odd"), one)


@pytest.mark.parametrize("method", [name for name, row in CASES.items() if issubclass(row.config, UpdateConfig)])
def test_unloaded_the_base_is_as_it_was(method):
    base = pico.build("llama")[0]
    before = set(vars(base))
    model = start("llama", method)[0]
    model.add_adapter("more", CASES[method](target_modules=target_regex(model, "language")))
    left = model.unload()
    assert set(vars(left)) == before
    assert not left._forward_pre_hooks
    assert torch.equal(logits(left), logits(base))
    with pytest.raises((TypeError, ValueError), match="task"):
        left.generate(input_ids=IDS, task="odd", max_new_tokens=1)


def test_tasks_are_saved_and_come_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tasks"] == TASKS
    again = load(pico.build("llama")[0], tmp_path, adapter="other").eval()
    assert torch.equal(logits(again, task=["odd", "even"] * 2), logits(model, task=["odd", "even"] * 2))
    assert equal(weights(again, "other"), weights(model))


@pytest.mark.parametrize(
    ("tasks", "part"),
    [
        ([], r"needs tasks=\[...\]"),
        (["a", "a"], "different names"),
        (["a", ""], "different names"),
        (["a", 1], r"tasks must be a list of texts; got \['a', 1\]"),
        ("color", "tasks must be a list of texts; got 'color'"),
        (None, "tasks must be a list of texts; got None"),
        ({"a"}, "tasks is a list of names; got {'a'}"),
    ],
)
def test_tasks_are_names(tasks, part):
    with pytest.raises(ValueError, match=part):
        MTLLoRAConfig(tasks=tasks)


@pytest.mark.parametrize("method", [name for name, row in CASES.items() if issubclass(row.config, UpdateConfig)])
def test_tasks_are_refused_where_they_mean_nothing(method):
    kind = CASES[method].config
    if kind.multitask or kind.of_tasks or kind.sequence:
        assert kind(tasks=["a", "b"]).tasks == ["a", "b"]
        return
    with pytest.raises(ValueError, match=f"tasks means nothing to {kind.__name__}, which treats all samples alike"):
        kind(tasks=["a", "b"])


OWN_LAYERS = [FullConfig, SpiderConfig, LoRAMoEConfig, LoRASculptConfig]  # they name layers, or else PEFT does not


@pytest.mark.parametrize("config", OWN_LAYERS)
@pytest.mark.parametrize(
    ("settings", "layers", "count"),
    [
        ({}, {"0", "1"}, 14),
        ({"layers_to_transform": [1]}, {"1"}, 7),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, {"0"}, 7),
        ({"layers_to_transform": [0], "exclude_modules": ["q_proj"]}, {"0"}, 6),
        ({"exclude_modules": r".*\.1\..*"}, {"0"}, 7),
    ],
)
def test_the_layers_of_a_methods_own_are_chosen_among_as_pefts(config, settings, layers, count):
    found = get_peft_model(pico.build("llama")[0], config(**settings)).targeted_module_names
    assert {name.split(".")[2] for name in found} == layers
    assert len(found) == count
    named = config(
        **settings, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert set(get_peft_model(pico.build("llama")[0], named).targeted_module_names) == set(found)


@pytest.mark.parametrize("config", OWN_LAYERS)
def test_where_no_layer_is_left_it_is_told(config):
    with pytest.raises(
        ValueError, match=r"layers_to_transform=\[7\] and exclude_modules=None leave none of the layers"
    ):
        get_peft_model(pico.build("llama")[0], config(layers_to_transform=[7]))
