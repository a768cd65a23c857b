"""A dataset of the Hugging Face Hub, or a table on this machine, as a data file with its pictures beside it.

    source → rows → question and answer, in one of the layouts of `records` → folder/<split>.jsonl, folder/images

Rows are read one by one, so that of a large dataset no more is fetched than is asked for.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..errors import UserError, gist
from ..files import whole
from .images import check_image
from .records import COMMON, LAYOUTS, image_in, record_of

TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
OWN = (*LAYOUTS, *sorted(COMMON - {"id", "model", "meta"}))
"""What a column may be: a part of one of the layouts, or what goes with all of them."""
TEXTS = "texts"  # a layout that becomes rows of questions and answers
PICTURES = "images"
FEW = 20  # classes that a row can list as choices


@dataclass(frozen=True)
class Fetched:
    """What was written."""

    file: Path
    rows: int
    pictures: int
    skipped: int
    """Rows that could not be used."""
    left_out: tuple[str, ...]
    """Columns that are none of ours."""


def fetch(
    source: str | Path,
    out: str | Path,
    *,
    subset: str | None = None,
    split: str = "train",
    limit: int | None = None,
    shuffle: bool = False,
    columns: Mapping[str, str] | None = None,
    ask: str | None = None,
    every_answer: bool = False,
    skip: bool = False,
    progress: bool = True,
) -> Fetched:
    """Write the rows of ``source`` as ``out/<split>.jsonl`` and their pictures into ``out/images``.

    Beside the layouts of `records`, rows may have ``texts``, a list of ``{"user": ..., "assistant": ...}`` about the
    same pictures: each is a row of its own. A column of pictures is taken for ``image`` if there is one and no other,
    and in a table a picture may be a path from there. Classes are told by their names, and up to 20 of them are the
    ``choices`` of their rows. Of several answers the commonest is taken. What is no column of ours is left out.
    Everything in a csv file is text, as it is written there; an empty cell is none.

    Args:
        source: a dataset's name on the Hub, a folder that ``datasets`` reads (its own, or pictures in folders called as
            their classes), or a file: .parquet, .csv, .arrow, .json or .jsonl.
        out: the folder.
        subset: of a dataset that has several.
        split: which part of it.
        limit: at most so many rows of the source. Default: all.
        shuffle: take them in a random order, always the same; of what is read on the way, a thousand at a time.
        columns: what theirs are called, by what ours are: ``{"question": "query", "answer": "label"}``.
        ask: the question of every row, where there is no column of questions.
        every_answer: keep all answers of a row, in the form that the metric ``vqa`` reads: ``red|dark red``.
        skip: leave out rows that cannot be used, instead of stopping at the first.
        progress: whether to show a progress bar.

    Raises:
        UserError: the source cannot be read, the file is there already, a column is not, or a row cannot be used.
    """
    out, columns = Path(out), dict(columns or {})
    file = out / f"{split}.jsonl"
    if file.exists():
        raise UserError(f"{file} is there already; remove it, or name another folder.")
    data, features = _opened(str(source), subset, split, shuffle)
    taken = _columns(source, features, columns, ask)
    classes = {ours: features[theirs].names for ours, theirs in taken.items() if hasattr(features[theirs], "names")}
    written, skipped, folder = 0, 0, out.resolve()
    beside = Path(source).parent.resolve() if Path(source).is_file() else None
    kept: set[str] = set()
    with whole(file) as partial, partial.open("w", encoding="utf-8") as lines:
        bar = tqdm(islice(_read_rows(data, source), limit), total=limit, desc="rows", disable=not progress)
        for number, found in enumerate(bar, start=1):
            where = f"row {number} of {source}"
            try:
                given = {ours: found[theirs] for ours, theirs in taken.items() if found[theirs] is not None}
                for key in ("image", "images"):
                    if key in given:
                        given[key] = _saved(given[key], out, beside)
                        kept.update([given[key]] if isinstance(given[key], str) else given[key])
                rows = [_answered(row, classes, ask, every_answer) for row in _apart(given)]
                for row in rows:
                    record_of(row, folder, where)
            except UserError as error:
                if not skip:
                    raise UserError(f"{where}: {error} (or leave such rows out: skip, --skip)") from None
                skipped += 1
                continue
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            written += len(rows)
        if not written:
            raise UserError(f"{source} has no rows that can be used in {split!r}; name another split.")
    left_out = tuple(name for name in features if name not in taken.values())
    return Fetched(file, written, len(kept), skipped, left_out)


def _opened(
    source: str, subset: str | None, split: str, shuffle: bool
) -> tuple[Iterable[dict[str, Any]], Mapping[str, Any]]:
    """The rows of ``source``, pictures as the bytes of their files, and what its columns hold."""
    import datasets  # slow to import, and not needed for what is here already

    path = Path(source)
    try:
        if path.is_file() or path.suffix in TABLES:
            if path.suffix not in TABLES:
                raise UserError(f"{path} is no table that can be read: such end in {', '.join(TABLES)}.")
            if not path.is_file():
                raise UserError(f"{path} does not exist; correct the path.")
            kind, files = TABLES[path.suffix], {split: str(path)}
            if kind == "csv":
                texts = datasets.Features({name: datasets.Value("string") for name in _header(path)})
                data = datasets.IterableDataset.from_generator(_csv_rows, texts, gen_kwargs={"path": path})
            else:
                data = datasets.load_dataset(kind, data_files=files, split=split, streaming=True)
        elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            data = datasets.load_from_disk(source)
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise UserError(f"{source} has no split {split!r}; it has {', '.join(data)}.")
                data = data[split]
        else:
            data = datasets.load_dataset(source, subset, split=split, streaming=True)
        if isinstance(data, datasets.IterableDataset) and data.features is None:
            data = data._resolve_features()
        for name, feature in data.features.items():
            if _is_picture(feature):
                raw = datasets.Image(decode=False)
                data = data.cast_column(name, raw if _is_one(feature) else datasets.List(raw))
        features = data.features
        if shuffle:
            data = data.shuffle(seed=0)
    except UserError:
        raise
    except Exception as error:  # whatever datasets, the Hub and the way there may say
        raise UserError(
            f"{source} cannot be read as a dataset ({gist(error, 2)}); correct the name, subset or split."
        ) from error
    return data, features


def _header(path: Path) -> list[str]:
    """The names of a csv file's columns."""
    _, names = next(_csv_lines(path), (1, []))
    if not names:
        raise UserError(f"{path} is empty; its first line names the columns.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path} has two columns {twice!r}; rename one.")
    return names


def _csv_rows(path: Path) -> Iterator[dict[str, str | None]]:
    """Every cell as it is written, an empty one as none: what guesses types makes 123 of 00123, and nothing of NA."""
    lines = _csv_lines(path)
    _, names = next(lines)
    for number, cells in lines:
        if len(cells) > len(names):
            raise UserError(
                f"{path}:{number}: has {len(cells)} cells for {len(names)} columns; put double quotes around a text "
                "that has the separator in it."
            )
        yield {name: cell or None for name, cell in zip_longest(names, cells)}


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of all that is not blank, and the line where they end."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=True)
            yield from ((reader.line_num, cells) for cells in reader if cells)
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8.") from None
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: is no row of a csv file ({error}); correct it.") from None


def _read_rows(data: Iterable[dict[str, Any]], source: str | Path) -> Iterator[dict[str, Any]]:
    try:
        yield from data
    except UserError:
        raise
    except Exception as error:  # a file that was cut short, or a connection
        raise UserError(f"{source} cannot be read to its end ({gist(error, 2)}); try again, or --limit it.") from error


def _is_one(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _is_picture(feature: Any) -> bool:
    """Whether a column holds pictures, one or several a row."""
    return _is_one(feature) or _is_one(getattr(feature, "feature", None))


def _columns(
    source: str | Path, features: Mapping[str, Any], columns: Mapping[str, str], ask: str | None
) -> dict[str, str]:
    """Which of their columns are taken, by what they are called here: those of one layout, and what goes with all."""
    for ours, theirs in columns.items():
        if ours not in OWN:
            raise UserError(f"{ours!r} is no column of ours; use {', '.join(OWN)}.")
        if theirs not in features:
            raise UserError(f"{source} has no column {theirs!r}; it has {', '.join(features)}.")
    names = {ours: columns.get(ours, ours) for ours in (*OWN, TEXTS)}
    there = {ours for ours, theirs in names.items() if theirs in features} | (
        {"question"} if ask is not None else set()
    )
    named = [
        layout for layout in LAYOUTS.values() if layout & columns.keys() or (ask is not None and "question" in layout)
    ]
    layouts = [*named, {TEXTS}, *LAYOUTS.values()]  # what is told goes before what is found
    layout = next((keys for keys in layouts if keys <= there), None)
    if layout is None:
        raise UserError(
            f"{source} has the columns {', '.join(features)}; say which are the question and the answer, such as "
            "question=query,answer=label (--columns), or what is asked everywhere (--ask)."
        )
    taken = {ours: theirs for ours, theirs in names.items() if theirs in features and ours in COMMON | layout}
    pictures = [name for name, feature in features.items() if _is_picture(feature)]
    if not {"image", "images"} & taken.keys() and len(pictures) == 1:
        taken["image" if _is_one(features[pictures[0]]) else "images"] = pictures[0]
    if ask is not None:
        taken.pop("question", None)
    return taken


def _apart(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows in one: each of several ``texts`` about the same pictures is one."""
    texts = given.pop(TEXTS, None)
    if texts is None:
        yield given
        return
    for text in texts:
        if not isinstance(text, dict) or not {"user", "assistant"} <= text.keys():
            raise UserError('\'texts\' must be a list of {"user": ..., "assistant": ...}')
        yield {**given, "question": text["user"], "answer": text["assistant"]}


def _answered(
    row: dict[str, Any], classes: Mapping[str, Sequence[str]], ask: str | None, every_answer: bool
) -> dict[str, Any]:
    """``row`` with one answer, in words, and its question."""
    for key in classes.keys() & row.keys():
        if not 0 <= row[key] < len(classes[key]):
            raise UserError(f"has the class {row[key]} for its {key}, of {len(classes[key])}: -1 stands for none")
    row = {key: classes[key][value] if key in classes else value for key, value in row.items()}
    if "answer" in classes and len(classes["answer"]) <= FEW:
        row.setdefault("choices", list(classes["answer"]))
    if isinstance(answers := row.get("answer"), list):
        told = [answer.get("answer", "") if isinstance(answer, dict) else answer for answer in answers]
        told = [text for text in map(str, told) if text.strip()]
        if not told:
            raise UserError("has no answer; add one")
        row["answer"] = "|".join(told) if every_answer else Counter(told).most_common(1)[0][0]
    return row if ask is None else {"question": ask, **row}


def _saved(value: Any, out: Path, beside: Path | None) -> Any:
    """The path in ``out`` of a picture that was written there, or of several.

    Args:
        value: what a row has: a picture's file or its bytes, or a path.
        out: the folder.
        beside: the folder that paths are relative to and may not leave; None where there is none.
    """
    if isinstance(value, list):
        return [_saved(one, out, beside) for one in value]
    if isinstance(value, str) and beside is not None:
        data = _read(str(image_in(beside, value)))
    elif isinstance(value, dict) and value.get("bytes") is not None:
        data = value["bytes"]
    elif isinstance(value, dict) and isinstance(value.get("path"), str):
        data = _read(value["path"] if beside is None else str(image_in(beside, value["path"])))
    else:
        raise UserError(f"its picture is {value!r:.60}, neither a file nor the bytes of one")
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "png").lower().replace("jpeg", "jpg")
    except Exception as error:  # what Pillow raises, and a picture that is a bomb
        raise UserError(f"its picture is damaged or none ({error})") from None
    name = f"{PICTURES}/{hashlib.sha256(data).hexdigest()[:24]}.{kind}"
    if not (out / name).is_file():
        with whole(out / name) as partial:
            partial.write_bytes(data)
    check_image(out / name)
    return name


def _read(path: str) -> bytes:
    import fsspec  # what datasets opens files with

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:
        raise UserError(f"its picture {path} cannot be read ({error})") from None
