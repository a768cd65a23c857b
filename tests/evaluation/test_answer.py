"""Answers of tiny models: a batch says what one question at a time says, and what Hugging Face's own generate says."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import suppress

import pico
import pytest
import torch
from contract import adapt
from PIL import Image
from trl import apply_chat_template
from trl.data_utils import prepare_multimodal_messages

from lorasculpt.adapters.update import updates
from lorasculpt.data.records import Record
from lorasculpt.errors import UserError
from lorasculpt.evaluation import Task, answer, comparison, evaluate, gallery, prompts, tasks
from lorasculpt.evaluation.answer import choose
from lorasculpt.evaluation.prompts import batches, chat, encode, evaluating


def ask(text: str, *images, answer: str = "red", task: str = "color", system: str = "") -> Record:
    system_turn = ({"role": "system", "content": system},) if system else ()
    messages = (*system_turn, {"role": "user", "content": text})
    return Record(messages, answer, images, task=task, choices=("red", "green", "a square on the left"))


def test_paligemma_is_not_asked_without_a_picture():
    _, processor = pico.build("paligemma")
    record = dataclasses.replace(ask("What?"), where="a.jsonl:3")
    with pytest.raises(UserError, match=r"a\.jsonl:3: has no picture, which PaliGemma needs with every question; add "):
        chat(processor, record)


@pytest.fixture
def records(tmp_path) -> list[Record]:
    """Pictures and none, long questions and short, a system turn."""
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        pico.picture(i).save(paths[-1])
    return [
        ask("What color is the shape?", paths[0]),
        ask("Is it?", paths[1]),
        ask("What?"),
        ask("Is the shape on the left or on the right, what would you say?", paths[2], system="yes"),
        ask("Is it a square or a circle or a square or a circle?", task="shape"),
    ]


def sharpened(name: str):
    """A random model whose logits are far enough apart that rounding decides nothing."""
    model, processor = pico.build(name)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision" not in part and "projector" not in part:
                parameter.mul_(6)
    return model, processor


def text_only(records: list[Record]) -> list[Record]:
    return [Record(record.prompt, record.answer, (), record.task, record.choices) for record in records]


@pytest.mark.parametrize("family", [*pico.FAMILIES, "llama"])
def test_a_batch_answers_as_one_by_one(family, records):
    model, processor = sharpened(family)
    records = text_only(records) if family == "llama" else records
    together = answer(model, processor, records, max_new_tokens=5)
    apart = [answer(model, processor, [record], max_new_tokens=5)[0] for record in records]
    assert together == apart
    assert answer(model, processor, records, max_new_tokens=5, batch=2) == together
    assert len(set(together)) > 1


@pytest.mark.parametrize("family", [*pico.FAMILIES, "llama"])
def test_a_batch_chooses_as_one_by_one(family, records):
    model, processor = sharpened(family)
    records = text_only(records) if family == "llama" else records
    together = choose(model, processor, records, batch=4)
    assert together == [choose(model, processor, [record], batch=1)[0] for record in records]


@pytest.fixture
def routed():
    """A model whose adapter answers every task in another way."""
    model, processor = sharpened("llava")
    model = adapt(model, "mtl_lora", tasks=["color", "shape"])
    with torch.no_grad():
        for update in updates(model).values():
            update.B.add_(torch.randn(update.B.shape, generator=torch.Generator().manual_seed(1)))
            update.Lambda[1] *= -1
    return model, processor


def retold(records: list[Record], task: str) -> list[Record]:
    return [dataclasses.replace(record, task=task) for record in records]


def test_every_question_is_asked_as_its_task(routed, records):
    model, processor = routed
    for ask in (answer, choose):
        mixed = ask(model, processor, records, batch=3)
        apart = [ask(model, processor, retold(records, task)) for task in ("color", "shape")]
        assert mixed == [*apart[0][:4], apart[1][4]]
        assert apart[0] != apart[1]
        with model.disable_adapter():
            base = ask(model, processor, retold(records, "size"))
        assert base == ask(sharpened("llava")[0], processor, records)
        assert base != mixed


def test_a_strange_task_is_answered_as_one_that_is_known(routed, records):
    model, processor = routed
    strange = [*records[:2], *retold(records[2:4], "size")]
    for ask in (answer, choose):
        found = ask(model, processor, strange, as_task="shape")
        assert found == ask(model, processor, [*records[:2], *retold(records[2:4], "shape")])
        assert ask(model, processor, records, as_task="shape") == ask(model, processor, records)
        with pytest.raises(UserError, match=r"'What\?': the adapter does not know the task 'size'.*\(color, shape\)"):
            ask(model, processor, strange)
    measured = evaluate(model, processor, tasks(strange[2:]), tasks(strange[:2]), as_task="shape")
    assert measured["source"]["size"]["answers"] == answer(model, processor, strange[2:], as_task="shape")


def test_greedy_is_argmax(records):
    """Against a loop without cache, padding or generate."""
    model, processor = sharpened("llava")
    for record in records[:2]:
        image = Image.open(record.images[0])
        inputs = processor(text=chat(processor, record), images=image, return_tensors="pt", add_special_tokens=False)
        ids, said = inputs["input_ids"], []
        for _ in range(6):
            with torch.no_grad():
                token = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1].argmax(-1)
            if token.item() == processor.tokenizer.eos_token_id:
                break
            said.append(token.item())
            ids = torch.cat([ids, token[None]], 1)
        expected = processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert answer(model, processor, [record], max_new_tokens=6) == [expected]


def test_greedy_in_spite_of_a_sampling_config(records):
    model, processor = sharpened("llava")
    plain = answer(model, processor, records, max_new_tokens=5)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert answer(model, processor, records, max_new_tokens=5) == plain


def test_choice_is_the_mean_log_likelihood(records):
    """Against one forward pass for each choice, without padding."""
    model, processor = sharpened("llava")
    record = records[0]
    inputs = processor(text=chat(processor, record), images=Image.open(record.images[0]), return_tensors="pt")
    prompt = inputs["input_ids"]
    means = {}
    for choice in record.choices:
        tokens = processor.tokenizer(choice, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, tokens], 1), pixel_values=inputs["pixel_values"]).logits
        said = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        means[choice] = said.gather(1, tokens[0][:, None]).mean().item()
    assert choose(model, processor, [record]) == [max(means, key=means.get)]


def test_the_prompt_is_that_of_training(records):
    """Character for character what TRL's collator makes of prompt and completion."""
    _, processor = pico.build("llava")
    for record in records:
        messages = prepare_multimodal_messages(list(record.prompt), list(record.images))
        completion = prepare_multimodal_messages([{"role": "assistant", "content": record.answer}])
        expected = apply_chat_template({"prompt": messages, "completion": completion}, processor)
        assert chat(processor, record) == expected["prompt"]


def test_longest_first_and_no_mixture(records):
    texts = [record.question for record in records]
    parts = batches(pico.build("llava")[1], records, texts, 2)
    assert sorted(i for part in parts for i in part) == list(range(len(records)))
    for part in parts:
        assert len({len(records[i].images) for i in part}) == 1
        assert [len(texts[i]) for i in part] == sorted((len(texts[i]) for i in part), reverse=True)
    assert parts[0] == [3, 0]


def test_the_largest_batch_comes_first(records):
    """Rows times length: more pictures to a question do not make a batch larger that has fewer questions."""
    two = dataclasses.replace(records[1], images=records[1].images * 2)
    few = [two, records[0], records[1], records[3]]
    assert batches(pico.build("llava")[1], few, ["?"] * 4, 3) == [[1, 2, 3], [0]]


@pytest.fixture
def mixed(tmp_path) -> list[Record]:
    """The same question of small pictures and of large ones, in turn."""
    found = []
    for i in range(6):
        found.append(ask("What color is the shape?", tmp_path / f"{i}.png"))
        pico.picture(i).resize((280, 196) if i % 2 else (56, 28)).save(found[-1].images[0])
    return found


class Silent:
    """A processor that does not say how many tokens a picture becomes."""

    def __init__(self, processor):
        self.tokenizer, self.processor = processor.tokenizer, processor

    def __call__(self, **given):
        return self.processor(**given)


@pytest.mark.skipif("qwen2_vl" not in pico.FAMILIES, reason="needs torchvision")
@pytest.mark.parametrize("silent", [False, True])
def test_large_pictures_are_not_asked_among_small_ones(mixed, silent):
    """Where a picture has as many tokens as its size asks for, and its mark is one in all texts."""
    model, processor = sharpened("qwen2_vl")
    processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": 100 * 28**2}
    texts = [chat(processor, record) for record in mixed]
    parts = batches(Silent(processor) if silent else processor, mixed, texts, 3)
    assert parts == [[1, 3, 5], [0, 2, 4]]
    inputs = [encode(model, processor, [mixed[i] for i in part], [texts[i] for i in part]) for part in parts]
    lengths = [each["attention_mask"].shape[1] for each in inputs]
    assert lengths[0] == lengths[1] + 70 - 2
    assert all(each["attention_mask"].all() for each in inputs)
    apart = [answer(model, processor, [record], max_new_tokens=4)[0] for record in mixed]
    assert answer(model, processor, mixed, max_new_tokens=4, batch=3) == apart


def test_texts_decide_where_all_pictures_are_equally_long(mixed):
    texts = ["?" * n for n in (3, 1, 4, 1, 5, 9)]
    assert batches(pico.build("llava")[1], mixed, texts, 2) == [[5, 4], [2, 0], [1, 3]]


@pytest.fixture
def opened(monkeypatch) -> list[tuple[str, threading.Thread]]:
    """Pictures as they are opened, and the thread that does."""
    found = []
    look = prompts.open_image
    monkeypatch.setattr(
        prompts, "open_image", lambda path: found.append((path.name, threading.current_thread())) or look(path)
    )
    return found


def test_a_picture_is_opened_once_for_all_its_choices(records, opened):
    model, processor = sharpened("llava")
    choose(model, processor, records[:2], batch=6)
    assert sorted(name for name, _ in opened) == ["0.png", "1.png"]
    assert {thread for _, thread in opened} == {threading.current_thread()}


def ended() -> bool:
    """Whether the threads that prepare batches have ended, or do so by themselves."""
    preparing = [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
    for thread in preparing:
        thread.join(10)
    return not any(thread.is_alive() for thread in preparing)


def test_a_batch_is_prepared_while_the_one_before_it_is_answered():
    begun = threading.Event()

    def items():
        yield 0
        begun.set()
        yield 1
        raise UserError("broken")

    ahead = prompts._ahead(items())
    assert next(ahead) == 0
    assert begun.wait(10)
    assert next(ahead) == 1
    with pytest.raises(UserError, match="broken"):
        next(ahead)
    assert list(prompts._ahead(iter("abc"))) == ["a", "b", "c"]
    assert ended()


def test_nothing_goes_on_where_answering_stops():
    made: list[int] = []
    ahead = prompts._ahead(map(made.append, range(9)))
    next(ahead)
    assert ended()
    assert made == [0, 1]


def test_modes_are_restored():
    model, _ = pico.build("llava")
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    with suppress(KeyboardInterrupt), evaluating(model, None):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("adapted", [False, True])
def test_the_head_gets_its_rows_in_one_piece(records, adapted):
    """The last token of each prompt, cut out of all, is not; a product for each row is what torch makes of that."""
    model, processor = sharpened("llava")
    head, whole = model.lm_head, []
    head.register_forward_hook(lambda module, inputs, output: whole.append(inputs[0].is_contiguous()))
    answer(adapt(model) if adapted else model, processor, records[:2], max_new_tokens=2)
    assert len(whole) >= 2
    assert all(whole)
    assert not head._forward_pre_hooks


def test_precision(records):
    model, processor = sharpened("llava")
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    answer(model, processor, records[:1], max_new_tokens=1, precision=torch.bfloat16)
    answer(model, processor, records[:1], max_new_tokens=1)
    assert seen == [torch.bfloat16, torch.float32]


def test_evaluate_and_gallery(records):
    model, processor = sharpened("llava")
    target = [Task("color", (records[0], records[1], records[3]))]
    source = [Task("shape", (records[4], records[1]), "choice")]
    measured = evaluate(model, processor, source, target, max_new_tokens=3)
    entry = measured["target"]["color"]
    assert entry["n"] == len(entry["scores"]) == len(entry["answers"]) == 3
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert measured["source"]["shape"]["answers"] == choose(model, processor, source[0].records)
    shown = gallery(source, target, measured, measured, n=4)
    assert [item["side"] for item in shown] == ["target"] * 3 + ["source"]
    assert shown == gallery(source, target, measured, measured, n=4)
    assert comparison(measured, measured)["summary"]["gain"] == 0
    with pytest.raises(ValueError, match="of the same tasks"):
        comparison(measured, measured | {"target": {}})
    first = shown[0]
    assert (
        first["base"]
        == first["tuned"]
        == entry["answers"][[str(r.images[0]) for r in target[0].records].index(first["image"])]
    )


def test_tasks_of_few_questions_share_a_batch(records, monkeypatch):
    model, processor = sharpened("llava")
    seen = [record for record in records if record.images]
    one, two, three = seen[:1], seen[1:2], seen[2:]
    answered, chosen = answer(model, processor, [*one, *three], max_new_tokens=5), choose(model, processor, two)
    generate, sizes = model.generate, []
    monkeypatch.setattr(
        model, "generate", lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    source = [Task("one", tuple(one)), Task("two", tuple(two), "choice")]
    found = evaluate(model, processor, source, [Task("three", tuple(three))], max_new_tokens=5)
    assert sizes == [len(one) + len(three)]
    assert found["source"]["one"]["answers"] + found["target"]["three"]["answers"] == answered
    assert found["source"]["two"]["answers"] == chosen


def test_evaluate_reads_what_was_written(tmp_path):
    from lorasculpt.data.records import read

    model, processor = pico.build("llava")
    found = tasks(read(pico.write_data(tmp_path, 4, ("color", "side"))))
    assert [task.name for task in found] == ["color", "side"]
    assert evaluate(model, processor, found[:1], found[1:], max_new_tokens=2)["source"]["color"]["n"] == 4
