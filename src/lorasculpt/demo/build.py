"""How the base was aligned: projector and a rank-16 LoRA, trained on drawings and words that no test ever shows.

Run once by ``lorasculpt demo build``; what it trained ships as ``alignment.safetensors``, its log as
``docs/alignment.jsonl``. The tower is frozen, so its output for every picture (and for some shifted, scaled, mirrored
and tinted copies of it) is computed first and the training itself never sees a pixel.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import UserError
from ..files import whole
from . import artwork, base, world
from .world import Emoji, Item

LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
DEFINITIONS = 400  # whose likelihood is measured


@dataclass(frozen=True)
class Recipe:
    """The settings of one alignment.

    ``text``: share of text-only batches; ``copies``: altered copies a picture; ``drawings``: a folder with the other
    hands' drawings (:mod:`~lorasculpt.demo.artwork`), of which each is shown as it is and altered.
    """

    minutes: float = 60
    batch: int = 32
    r: int = 16
    lora_lr: float = 6e-4
    projector_lr: float = 1e-3
    warmup: float = 0.04
    weight_decay: float = 0.05
    dropout: float = 0.0  # on a CPU its random numbers took more than a third of a step
    text: float = 0.12
    copies: int = 8
    seed: int = 0
    bf16: bool = True
    drawings: str | None = None


def recipe_of(changes: Sequence[str]) -> Recipe:
    """The recipe with ``changes``, each ``key=value``.

    Raises:
        UserError: for a key that a recipe does not have, or a value of another type.
    """
    given = dict(change.partition("=")[::2] for change in changes)
    known = [field.name for field in fields(Recipe)]
    for key, value in given.items():
        if key not in known or not value:
            raise UserError(f"{key}={value} is no setting of a recipe; give key=value, of {', '.join(known)}.")
    try:
        return TypeAdapter(Recipe).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}={first['input']} is refused: {first['msg']}.") from error


@torch.no_grad()
def features(model, processor, pictures: list[Image.Image]) -> Tensor:
    """(pictures, 9, 1280) of the frozen tower, in half precision."""
    tower, parts = model.model.vision_tower.to(memory_format=torch.channels_last), []
    for i in tqdm(range(0, len(pictures), 64), desc="pictures", unit="batch"):
        pixels = processor.image_processor(pictures[i : i + 64], return_tensors="pt")["pixel_values"]
        parts.append(tower(pixels.to(memory_format=torch.channels_last)).last_hidden_state.half())
    return torch.cat(parts)


class Questions:
    """Draws a batch of training questions: a random drawing, one of its altered copies, a random way to ask."""

    def __init__(self, recipe: Recipe, rng: random.Random):
        self.rng, self.text = rng, recipe.text
        self.things = [thing for thing in world.emoji() if thing.split == "train"]
        self.names = sorted({thing.name for thing in self.things if thing.named})
        self.entries = world.words("train")
        self.words = [word for word, _ in self.entries]

    def picture(self, thing: Emoji, image: str) -> Item:
        ways = ["category"] * 2 + (["kind", "what"] if thing.kind else [])
        ways += ["name"] * 3 + ["yesno"] * 2 + ["called"] if thing.named else []
        way = self.rng.choice(ways)
        if way == "category":
            return world.category(thing, image)
        if way == "kind":
            return world.pick_kind(thing, image, self.rng)
        if way == "name":
            return world.pick_name(thing, image, self.names, self.rng)
        if way == "yesno":
            return world.yes_no(thing, image, self.names, self.rng)
        if way == "what" and thing.kind:
            return Item("what", "Name its kind.", thing.kind, image)
        return Item("called", "What is it called?", thing.name, image)

    def words_only(self) -> Item:
        word, gloss = self.rng.choice(self.entries)
        if self.rng.random() < 0.5:
            return world.pick_word(word, gloss, self.words, self.rng)
        return Item("meaning", f"What does '{word}' mean?", gloss)

    def draw(self, n: int, copies: dict[str, list[int]]) -> list[tuple[Item, int | None]]:
        """``n`` questions, all about pictures or all about words: mixed lengths would be mostly padding."""
        if self.rng.random() < self.text:
            return [(self.words_only(), None) for _ in range(n)]
        batch: list[tuple[Item, int | None]] = []
        for _ in range(n):
            thing = self.rng.choice(self.things)
            file = thing.files[0] if self.rng.random() < 0.7 else self.rng.choice(thing.files)
            batch.append((self.picture(thing, file), self.rng.choice(copies[file])))
        return batch


def encode(tokenizer, batch: Sequence[tuple[Item, int | None]]) -> dict[str, Tensor]:
    """Token ids and labels (answer and end token only), padded on the right."""
    texts = []
    for item, feature in batch:
        image = base.IMAGE_TOKEN * 9 if feature is not None else ""
        prompt = f"<|im_start|>user\n{image}{item.question}<|im_end|>\n<|im_start|>assistant\n"
        texts.append((prompt, f"{item.answer}<|im_end|>"))
    return padded(tokenizer, texts)


def padded(tokenizer, texts: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Token ids of prompts and their answers, and labels for the latter, padded on the right."""
    rows = [tuple(tokenizer(text)["input_ids"] for text in both) for both in texts]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of_answers(model, batch: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(answer tokens, vocabulary) and their labels: the head is applied where there is something to predict."""
    llava = model.model
    embeds = llava.get_input_embeddings()(batch["input_ids"])
    if len(tokens):
        seen = llava.multi_modal_projector(tokens).to(embeds.dtype)
        embeds = embeds.masked_scatter((batch["input_ids"] == llava.config.image_token_id)[..., None], seen)
    hidden = llava.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False)[0]
    wanted = batch["labels"][:, 1:] != -100
    return model.lm_head(hidden[:, :-1][wanted]).float(), batch["labels"][:, 1:][wanted]


@torch.no_grad()
def accuracy(model, tokenizer, pairs: list[tuple[Item, Tensor | None]], bf16: bool) -> dict[str, float]:
    """Share of items whose greedy answer is exactly right, by task.

    The greedy answer equals the right one if and only if every right token is the most likely one after the right
    tokens before it, which one forward pass shows.
    """
    right: dict[str, list[bool]] = {}
    pairs = sorted(pairs, key=lambda pair: len(pair[0].question))
    for i in range(0, len(pairs), 48):
        chunk = pairs[i : i + 48]
        batch = encode(tokenizer, [(item, None if tokens is None else 0) for item, tokens in chunk])
        seen = [tokens.float() for _, tokens in chunk if tokens is not None]
        shown = torch.stack(seen) if seen else torch.empty(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, labels = logits_of_answers(model, batch, shown)
        hit = logits.argmax(-1) == labels
        row = (batch["labels"][:, 1:] != -100).nonzero()[:, 0]
        for j, (item, _) in enumerate(chunk):
            right.setdefault(item.task, []).append(bool(hit[row == j].all()))
    return {task: sum(found) / len(found) for task, found in sorted(right.items())}


@torch.no_grad()
def definition_nll(model, tokenizer, split: str, bf16: bool, *, plain: bool = False) -> float:
    """Mean negative log-likelihood, in nats a token, of ``DEFINITIONS`` WordNet definitions given their words.

    They are asked for in a question of the form that the alignment trained on, or ``plain``, as a text that goes on.
    """
    entries = world.words(split)[:DEFINITIONS]
    total, count = 0.0, 0
    for i in range(0, len(entries), 48):
        part = entries[i : i + 48]
        asked = [(Item("meaning", f"What does '{word}' mean?", gloss), None) for word, gloss in part]
        texts = [(f"The word {word} means", f" {gloss}") for word, gloss in part]
        batch = padded(tokenizer, texts) if plain else encode(tokenizer, asked)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, labels = logits_of_answers(model, batch, torch.empty(0))
        text = labels != tokenizer.eos_token_id  # the untouched model ends its definitions differently
        total += F.cross_entropy(logits[text], labels[text], reduction="sum").item()
        count += int(text.sum())
    return total / count


def held_out(model, processor, split: str) -> list[tuple[Item, Tensor | None]]:
    """The source questions of ``split`` with the tokens of their pictures."""
    items = world.source_items(split)
    names = sorted({item.image for item in items if item.image})
    pictures = dict(world.pictures(set(names)))
    tokens = dict(zip(names, features(model, processor, [pictures[name] for name in names]), strict=True))
    return [(item, tokens[item.image] if item.image else None) for item in items]


def build(
    target: Path = base.ALIGNMENT, log: Path | None = None, recipe: Recipe | None = None, start: Path | None = None
) -> dict:
    """Train the alignment, write it to ``target`` and every measurement to ``log``; returns the final measurement.

    ``start`` is an earlier alignment to go on from.
    """
    recipe = recipe or Recipe()
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model, processor = base.unaligned()
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"
    model.requires_grad_(False)

    def note(**row) -> dict:
        print(json.dumps(row), flush=True)
        if log:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    note(recipe=asdict(recipe), untouched_nll=definition_nll(model, tokenizer, "test", recipe.bf16))
    questions = Questions(recipe, rng)
    files = [file for thing in questions.things for file in thing.files]
    pictures = dict(world.pictures({f"emoji/{file}.png" for file in files}))
    copies: dict[str, list[int]] = {}
    shown: list[Image.Image] = []
    for thing in questions.things:
        for k, file in enumerate(thing.files):
            many = recipe.copies if k == 0 else 2
            picture = pictures[f"emoji/{file}.png"]
            copies[file] = list(range(len(shown), len(shown) + many))
            shown += [picture, *(artwork.altered(picture, rng) for _ in range(many - 1))]
    if recipe.drawings:
        others = artwork.drawings(Path(recipe.drawings), {thing.files[0] for thing in questions.things})
        for file, drawn in sorted(others.items()):
            for svg in drawn:
                picture = world.on_white(artwork.rasterise(svg, 160))
                copies[file] += [len(shown), len(shown) + 1]
                shown += [picture, artwork.altered(picture, rng)]
    known = features(model, processor, shown)
    validation = held_out(model, processor, "validation")

    config = LoraConfig(r=recipe.r, lora_alpha=2 * recipe.r, lora_dropout=recipe.dropout, target_modules=LINEARS)
    tuned = get_peft_model(model, config)
    if start is not None:
        _continue(tuned, load_file(start), config)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    lora = [p for name, p in tuned.named_parameters() if "lora_" in name]
    groups = [
        {"params": lora, "lr": recipe.lora_lr},
        {"params": list(projector.parameters()), "lr": recipe.projector_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in optimizer.param_groups]
    began, step, losses, share = time.time(), 0, [], 0.0
    bar = tqdm(total=round(recipe.minutes * 60), desc="aligning", unit="s")
    while share < 1:
        model.train()
        batch = questions.draw(recipe.batch, copies)
        tokens = known[[feature for _, feature in batch if feature is not None]].float()
        tokens = tokens * (1 + 0.1 * torch.randn_like(tokens[:, :1]))  # a little noise on every channel
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits, labels = logits_of_answers(model, encode(tokenizer, batch), tokens)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*lora, *projector.parameters()], 1.0)
        rise = min(1.0, (share + 1e-3) / recipe.warmup)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        share = (time.time() - began) / (60 * recipe.minutes)
        bar.update(min(round(share * bar.total), bar.total) - bar.n)
        if step % 250 == 0 or share >= 1:
            model.eval()
            scores = accuracy(model, tokenizer, validation, recipe.bf16)
            mean = sum(losses) / len(losses)
            note(step=step, minutes=round(60 * share * recipe.minutes / 60, 1), loss=mean, validation=scores)
            losses.clear()
            _save(tuned, projector, config, target)
    bar.close()
    model.eval()
    test = held_out(model, processor, "test")
    seen = [tokens for _, tokens in test if tokens is not None]
    shuffled = iter(random.Random(0).sample(seen, len(seen)))
    blind = [(item, None if tokens is None else next(shuffled)) for item, tokens in test]
    return note(
        steps=step,
        test=accuracy(model, tokenizer, test, recipe.bf16),
        test_with_shuffled_pictures=accuracy(model, tokenizer, blind, recipe.bf16),
        definition_nll=definition_nll(model, tokenizer, "test", recipe.bf16),
        n={task: sum(item.task == task for item, _ in test) for task in world.SOURCE_TASKS},
    )


def _save(tuned, projector, config: LoraConfig, target: Path) -> None:
    """Projector and LoRA factors in half precision, the scale alpha/r folded into B."""
    kept = {f"model.multi_modal_projector.{name}": value.half() for name, value in projector.state_dict().items()}
    for name, value in tuned.state_dict().items():
        if ".lora_" in name:
            stem, factor = name.removeprefix("base_model.model.").split(".lora_")
            scale = config.lora_alpha / config.r if factor.startswith("B") else 1.0
            kept[f"{stem}.lora_{factor[0]}"] = (value * scale).half()
    with whole(target) as partial:
        save_file({name: value.contiguous() for name, value in kept.items()}, partial)


@torch.no_grad()
def _continue(tuned, alignment: dict[str, Tensor], config: LoraConfig) -> None:
    """Put an earlier alignment, as :func:`_save` wrote it, into the model that is about to be trained."""
    names = {}
    for name, value in tuned.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".default.weight", "")
        names[plain] = value
    for name, value in alignment.items():
        scale = config.r / config.lora_alpha if name.endswith(".lora_B") else 1.0
        names[name].copy_(value.float() * scale)
