"""Data files to records: four common layouts of a row, read and checked, told apart row by row.

- ``{"question": ..., "answer": ..., "image": ...}``, this library's own
- ``{"messages": [{"role": ..., "content": ...}, ...], "images": [...]}``
- ``{"prompt": ..., "completion": ..., "images": [...]}``, each a text or a list of messages
- ``{"conversations": [{"from": "human", "value": ...}, ...], "image": ...}`` of LLaVA and ShareGPT

In every layout ``image`` names one picture and ``images`` lists several, ``task`` names the task (questions without one
are measured as a task of their file, called as its folder and itself: ``general/test``), ``choices`` lists what may be
answered, ``system`` is a system message, ``group`` names what a question shares with others, so that they are not
counted as if each were one of its own (by itself those about the same pictures are), and ``id``, ``model`` and ``meta``
are ignored. ``<image>`` marks
are removed from the text: pictures come first in the prompt. A ``.jsonl`` file holds one row per line, a ``.json`` file
a list of rows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import Any

from ..errors import UserError
from .images import check_image

MARK = "<image>"
HALF = re.compile("[\ud800-\udfff]")  # of a character that JSON writes as two
UNNAMED = "default"  # the task of a row that names none
LAYOUTS = {
    "conversations": {"conversations"},
    "messages": {"messages"},
    "prompt": {"prompt", "completion"},
    "completion": {"prompt", "completion"},
    "question": {"question", "answer"},
    "answer": {"question", "answer"},
}
COMMON = {"image", "images", "task", "choices", "system", "group", "id", "model", "meta"}
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Record:
    """One question and its answer.

    Args:
        prompt: Chat messages ``{"role": ..., "content": text}`` in order; the last one is the user's.
        answer: What the model is to say. Never empty.
        images: Absolute paths of the pictures, in the order in which the prompt speaks of them.
        task: Name of the task the question belongs to.
        choices: What may be answered, if the row says so; the answer is among them.
        group: Name of what it shares with others, such as the page that they are about; empty where it names none.
        where: File and line the record came from, for messages: ``data/train.jsonl:17``.
    """

    prompt: tuple[dict[str, str], ...]
    answer: str
    images: tuple[Path, ...] = ()
    task: str = UNNAMED
    choices: tuple[str, ...] = ()
    group: str = ""
    where: str = ""

    @property
    def question(self) -> str:
        """Text of the last user message."""
        return self.prompt[-1]["content"]


def read(
    path: str | Path, *, images: str | Path | None = None, limit: int | None = None, check_images: bool = True
) -> list[Record]:
    """Read a data file, checking every row.

    Args:
        path: A ``.jsonl`` or ``.json`` file.
        images: Folder that image paths are relative to and may not leave. Default: the folder of ``path``.
        limit: Read the first ``limit`` rows only. Default: all.
        check_images: Also check that every picture is whole (`images.check_image`), each file once.

    Raises:
        UserError: for the first bad row, naming file, line and the mend.
    """
    path = Path(path)
    folder = (path.parent if images is None else Path(images)).resolve()
    records: list[Record] = []
    checked: set[Path] = set()
    for line, row in islice(_rows(path), limit):
        where = f"{path}:{line}"
        try:
            record = record_of(row, folder, where)
            for image in record.images:
                if check_images and image not in checked:
                    check_image(image)
                    checked.add(image)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        records.append(record)
    if not records:
        raise UserError(f"{path}: no rows to read; each line should hold one JSON object with a question and an answer")
    return records


def fingerprint(records: Sequence[Record], folder: str | Path) -> str:
    """16 hexadecimal digits that are others where questions, answers, tasks, their order or the pictures' names are.

    Args:
        records: What was read.
        folder: The folder of the pictures; their names in it are what counts, not where it lies.
    """
    folder, found = Path(folder).resolve(), hashlib.sha256()
    for record in records:
        images = [str(image.relative_to(folder)) for image in record.images]
        found.update(json.dumps([record.prompt, record.answer, record.task, images]).encode())
    return found.hexdigest()[:16]


def set_aside(records: Sequence[Record], share: float, folder: str | Path) -> tuple[list[Record], list[Record]]:
    """``records`` to train on, and about ``share`` of them to validate with, always the same ones.

    Questions of a group stay together, as do those about the same pictures, and those with the same words and no
    picture: a model has not seen what it is validated with.

    Args:
        records: What was read.
        share: In (0, 1); at least one record is set aside.
        folder: The folder of the pictures; their names in it are what counts, not where it lies.

    Raises:
        UserError: if there are too few different pictures to keep some of them.
    """
    folder = Path(folder).resolve()
    keys = [
        json.dumps(record.group or [str(image.relative_to(folder)) for image in record.images] or record.prompt)
        for record in records
    ]
    sizes = Counter(keys)
    order = sorted(sizes, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    before = accumulate((sizes[key] for key in order), initial=0)
    aside = {key for key, count in zip(order, before, strict=False) if count < share * len(records)}
    if len(aside) == len(order):
        raise UserError(
            f"{records[0].where}: nothing would be left to train on if {share:g} of the rows were set aside, because "
            "too few are about different pictures; add some, or name a file under evaluate.validation."
        )
    split: tuple[list[Record], list[Record]] = ([], [])
    for record, key in zip(records, keys, strict=True):
        split[key in aside].append(record)
    return split


def replayed(general: Sequence[Record], count: int, share: float, seed: int) -> list[Record]:
    """What of ``general`` is trained on beside ``count`` other records, so that it is about ``share`` of all.

    Args:
        general: What may be taken; none is taken twice before each was taken once.
        count: Number of the others.
        share: In (0, 1); at least one record is taken.
        seed: Of the draw.
    """
    wanted, order, random = max(1, round(count * share / (1 - share))), list(general), Random(seed)
    drawn: list[Record] = []
    while len(drawn) < wanted:
        random.shuffle(order)
        drawn += order[: wanted - len(drawn)]
    return drawn


def shared(records: Sequence[Record], others: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Those of ``records`` that ask what one of ``others`` asks, each with that other one.

    The same are questions with the same words (whatever the system message) about pictures whose files hold the same
    bytes. A picture that was stored anew, in another size or format, is not recognised.
    """
    digests: dict[Path, str] = {}

    def words(record: Record) -> str:
        return json.dumps([message for message in record.prompt if message["role"] != "system"])

    def at_a_glance(record: Record) -> tuple:
        return (words(record), *(image.stat().st_size for image in record.images))

    def read_through(record: Record) -> tuple:
        for image in record.images:
            if image not in digests:
                digests[image] = hashlib.sha256(image.read_bytes()).hexdigest()
        return (words(record), *(digests[image] for image in record.images))

    # most pictures are told apart by their sizes, and need not be read
    both = {at_a_glance(record) for record in records} & {at_a_glance(other) for other in others}
    asked = {read_through(other): other for other in reversed(others) if at_a_glance(other) in both}
    found = ((record, asked.get(read_through(record))) for record in records if at_a_glance(record) in both)
    return [(record, other) for record, other in found if other is not None]


# --- files to rows ------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, parsed row) of each row of ``path``."""
    if path.suffix not in {".jsonl", ".json"}:
        raise UserError(f"{path}: data files end in .jsonl (one JSON object a line) or .json (a list of objects)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    yield from _listed_rows(path, text) if path.suffix == ".json" else _line_rows(path, text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key's two values one would be lost, and no tokenizer takes half a character."""
    found = dict(pairs)
    for key, value in pairs:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and HALF.search(text):
                raise UserError(f"has half of a character in {key!r} (a surrogate without its other); correct the text")
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"has the key {twice!r} twice; remove one")
    return found


def _none(constant: str) -> None:
    """What NaN and Infinity stand for, which are no JSON: a gap, as pandas writes it."""


def _line_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_once, parse_constant=_none)
            except json.JSONDecodeError as error:
                message = f"not valid JSON ({error.msg} at column {error.colno}); put one whole object on the line"
                raise UserError(f"{path}:{number}: {message}") from None
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None


def _listed_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list one by one, because ``json.loads`` forgets on which line an item began."""
    decoder, position, line, counted = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_none), 0, 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        return position

    position = skip(position)
    if text[position : position + 1] != "[":
        raise UserError(f"{path}:1: a .json data file holds a list; put the objects in [...] or use .jsonl")
    position = skip(position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            message = f"not valid JSON ({error.msg} at column {error.colno}); correct the syntax"
            raise UserError(f"{path}:{error.lineno}: {message}") from None
        except UserError as error:
            raise UserError(f"{path}:{line}: {error}") from None
        yield line, row
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            here = text.count("\n", 0, position) + 1
            raise UserError(f"{path}:{here}: not valid JSON (',' or ']' expected after a row); correct the syntax")
    if (end := skip(position + 1)) < len(text):
        here = text.count("\n", 0, end) + 1
        raise UserError(f"{path}:{here}: more follows after the list; put all rows into one, or use .jsonl")


# --- rows to records ----------------------------------------------------------------------------------------------


def record_of(row: Any, folder: Path, where: str) -> Record:
    """One checked row. Its errors do not name the place: `read` adds it."""
    if not isinstance(row, dict):
        raise UserError(f"a row must be a JSON object, got {type(row).__name__}; write {{...}}")
    layout = _layout(row)
    paths = _strings(row, "images") + ([row["image"]] if isinstance(row.get("image"), str) else [])
    if row.get("image") is not None and not isinstance(row["image"], str):
        raise UserError("'image' must be one path; list several paths under 'images'")
    turns, marks, inner = _turns(row, layout)
    paths += inner
    if marks > len(paths):
        raise UserError(f"{marks} {MARK} marks but {len(paths)} images; add the images or remove the marks")
    answer = _answer(turns)
    choices = tuple(_strings(row, "choices"))
    if choices and answer.strip().lower() not in {choice.strip().lower() for choice in choices}:
        raise UserError(f"answer {answer!r} is not among 'choices'; add it there or correct it")
    task = row.get("task", UNNAMED)
    if not isinstance(task, str) or not task:
        raise UserError(f"'task' must be a name, got {task!r}")
    group = row.get("group", "")
    if not isinstance(group, str):
        raise UserError(f"'group' must be a name, got {group!r}")
    return Record(
        prompt=tuple(turns[:-1]),
        answer=answer,
        images=tuple(image_in(folder, path) for path in paths),
        task=task,
        choices=choices,
        group=group,
        where=where,
    )


def _layout(row: dict[str, Any]) -> set[str]:
    """The keys that hold the text of ``row``, which tell its layout; also checks that it has no key we don't know."""
    layout = next((keys for key, keys in LAYOUTS.items() if key in row), None)
    known = sorted(COMMON | (layout if layout else set(LAYOUTS)))
    unknown = [key for key in row if key not in known]
    if unknown:
        guesses = {key: difflib.get_close_matches(key.lower(), known, n=1) for key in unknown}
        listed = ", ".join(
            f"{key!r} (did you mean {guess[0]!r}?)" if guess else repr(key) for key, guess in guesses.items()
        )
        mend = "rename it or put it under 'meta'" if len(unknown) == 1 else "rename them or put them under 'meta'"
        raise UserError(f"unknown key{'s' if len(unknown) > 1 else ''} {listed}; {mend}")
    if layout is None:
        raise UserError("no question and answer; give 'question' and 'answer', 'messages', 'conversations' or 'prompt'")
    for key in sorted(layout, reverse=True):
        if row.get(key) is None:
            raise UserError(f"{key!r} is missing; add it")
    return layout


def _turns(row: dict[str, Any], layout: set[str]) -> tuple[list[dict[str, str]], int, list[str]]:
    """The chat messages of a row with plain text contents, the number of image marks, and image paths found inside."""
    if "question" in layout:
        turns = [("user", row["question"], "'question'"), ("assistant", row["answer"], "'answer'")]
    elif "prompt" in layout:
        turns = _listed(row, "prompt", "user") + _listed(row, "completion", "assistant")
    else:
        turns = _listed(row, "messages" if "messages" in layout else "conversations", "")
    if row.get("system"):
        turns.insert(0, ("system", row["system"], "'system'"))
    marks = 0
    messages: list[dict[str, str]] = []
    paths: list[str] = []
    for role, content, name in turns:
        if role not in ROLES:
            raise UserError(f"{name} has the role {role!r}; use one of {', '.join(ROLES)}")
        text, more, found = _content(content, name)
        if ROLES[role] != "assistant":  # an answer may well be about the mark itself
            more, text = more + text.count(MARK), text.replace(MARK, "")
        if not text.strip():
            raise UserError(f"{name} is empty; write its text or remove the row")
        messages.append({"role": ROLES[role], "content": text.strip()})
        marks, paths = marks + more, paths + found
    return messages, marks, paths


def _listed(row: dict[str, Any], key: str, role: str) -> list[tuple[str, Any, str]]:
    """(role, content, name for messages) of each message under ``key``; a bare text is a message of ``role``."""
    value = row[key]
    if isinstance(value, str) and role:
        return [(role, value, f"{key!r}")]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{key!r} must be a list of messages, got {value!r:.60}")
    turns = []
    for number, message in enumerate(value, start=1):
        name = f"message {number} of {key!r}"
        content = message.get("content", message.get("value"))
        if content is None:
            raise UserError(f"{name} has no text; give it a {'value' if key == 'conversations' else 'content'!r}")
        turns.append((str(message.get("role", message.get("from", role))), content, name))
    return turns


def _content(content: Any, name: str) -> tuple[str, int, list[str]]:
    """Text, number of image parts and image paths of a message's content: a text, a number or a list of parts."""
    if isinstance(content, int | float) and not isinstance(content, bool):
        content = str(content)
    if isinstance(content, str):
        return content, 0, []
    if not isinstance(content, list):
        raise UserError(f"{name} must be text, got {content!r:.60}")
    texts, marks, paths = [], 0, []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            marks += 1
            paths += [part[key] for key in ("image", "path") if isinstance(part.get(key), str)]
        else:
            raise UserError(f"{name} has a part that is neither text nor image: {part!r:.60}; remove it")
    return "\n".join(texts), marks, paths


def _answer(turns: list[dict[str, str]]) -> str:
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError("no assistant turn; add the answer that the model is to give")
    if turns[-1]["role"] != "assistant":
        raise UserError("the last turn is not the assistant's; remove it or add its answer")
    if len(turns) < 2 or turns[-2]["role"] != "user":
        raise UserError("no user turn before the last assistant turn; add the question")
    return turns[-1]["content"]


def _strings(row: dict[str, Any], key: str) -> list[str]:
    values = row.get(key)
    values = [] if values is None else values
    if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
        raise UserError(f"{key!r} must be a list of texts, got {values!r:.60}")
    return [str(value) for value in values]


def image_in(folder: Path, path: str) -> Path:
    """The absolute path of an image, links followed, which lies inside ``folder``."""
    full = (folder / path).resolve()
    if not full.is_relative_to(folder):
        raise UserError(f"image {path!r} lies outside {folder}; move it there or name another images folder")
    return full
