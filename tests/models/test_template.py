"""Templates that leave out tokens are completed, once and in the same way for training and asking; others are left."""

from __future__ import annotations

import pico
import pytest
import transformers as hf
from tokenizers import processors

from lorasculpt.data.batches import Collator, prompt_text, rows
from lorasculpt.data.images import open_image
from lorasculpt.data.records import Record, read
from lorasculpt.evaluation.prompts import chat, encode
from lorasculpt.models.load import load
from lorasculpt.models.template import complete

# that of llava-hf/llava-1.5-7b-hf
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def asked(tmp_path) -> list[Record]:
    return read(pico.write_data(tmp_path / "data", n=2))


def bare(tokenizer) -> None:
    """Let ``tokenizer`` put its first token before a text, as Llama's does."""
    first = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, tokenizer.bos_token_id)]
    )


def test_llava_learns_to_stop_and_is_asked_as_transformers_asks_it(asked, tmp_path, capsys):
    model, processor = pico.build("llava")
    bare(processor.tokenizer)
    processor.chat_template = LLAVA
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model, processor = load(folder)
    assert "leaves out <bos> before a text and <eos> after an answer" in capsys.readouterr().out
    first, end = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    table = rows(asked)
    batch = Collator(processor)([table[0], table[1]])
    for line, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert (line == first).sum() == 1
        assert labels[labels != -100].tolist().count(end) == 1
        assert labels[labels != -100][-1] == end
    text = chat(processor, asked[0])
    found = encode(model, processor, asked[:1], [text])["input_ids"]
    whole = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert found[0].tolist() == whole[: found.shape[1]].tolist()
    theirs = pico.build("llava")[1]
    bare(theirs.tokenizer)
    theirs.chat_template = LLAVA
    text = prompt_text(theirs, asked[0].prompt, 1)
    picture = open_image(asked[0].images[0])
    assert theirs(text=text, images=picture)["input_ids"][0] == found[0].tolist()  # its first token is the tokenizer's
    processor.save_pretrained(tmp_path / "again")  # of a merged model: what is complete is not added to
    again = hf.AutoProcessor.from_pretrained(tmp_path / "again")
    complete(model, again)
    assert again.chat_template == processor.chat_template


@pytest.mark.parametrize("family", [*pico.FAMILIES, "llama", "paligemma"])
def test_a_template_that_says_all_is_left(family):
    model, processor = pico.build(family)
    before = processor.chat_template
    complete(model, processor)
    assert processor.chat_template == before


def test_a_template_that_refuses_the_question_is_left():
    model, processor = pico.build("llava")
    processor.chat_template = "{{ raise_exception('no') }}"
    complete(model, processor)
    assert processor.chat_template == "{{ raise_exception('no') }}"
