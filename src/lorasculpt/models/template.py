"""What a chat template leaves out, put in: the token that begins a text, and one that ends an answer.

LLaVA 1.5's writes ``USER: <image>\\nquestion ASSISTANT:`` and ``answer`` and a space. It leaves the first token to the
tokenizer, which must not add it to a rendered text anywhere else, and has no last one: trained on its texts, a model
never learns to stop.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError
from torch import nn
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from ..console import say_once

END = "{%% if messages and messages[-1]['role'] == 'assistant' %%}{{ %s }}{%% endif %%}"


def stops(model: nn.Module, processor: Any) -> list[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's end of text."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    end = getattr(processor, "tokenizer", processor).eos_token_id
    return sorted({token for token in (*own, end) if token is not None})


def complete(model: nn.Module, processor: Any) -> None:
    """Put into the chat template of ``processor`` what it leaves out, and say so.

    The first token is that which the tokenizer puts before a text, where a rendered text does not begin with it. The
    last is the tokenizer's end of text, where none of `stops` follows an answer.
    """
    tokenizer, template = getattr(processor, "tokenizer", processor), getattr(processor, "chat_template", None)
    if not isinstance(template, str):
        return
    try:
        prompt, whole = _text(processor), _text(processor, "answer")
    except (TemplateError, KeyError, TypeError, ValueError):  # one that takes no such question
        return

    def ids(text: str, **options: bool) -> list[int]:
        return tokenizer(text, **options)["input_ids"]

    added = []
    first, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if first is not None and ids("a")[:1] == [first] != ids(prompt, add_special_tokens=False)[:1]:
        template = f"{{{{ {json.dumps(tokenizer.bos_token)} }}}}{template}"
        added.append(f"{tokenizer.bos_token} before a text")
    after = ids(whole.rpartition("answer")[2], add_special_tokens=False)
    if end is not None and not set(after) & set(stops(model, processor)):
        template = template.removesuffix("\n") + END % json.dumps(tokenizer.eos_token)
        added.append(f"{tokenizer.eos_token} after an answer")
    if added:
        processor.chat_template = template
        say_once(f"The base's chat template leaves out {' and '.join(added)}; put in, as its tokenizer would have it.")


def _text(processor: Any, answer: str | None = None) -> str:
    messages = [{"role": "user", "content": "question"}]
    messages += [{"role": "assistant", "content": answer}] if answer else []
    if isinstance(processor, ProcessorMixin):
        messages = prepare_multimodal_messages(messages, images=[])
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
