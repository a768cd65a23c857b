"""Datasets, tables and folders of pictures as data files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import datasets
import pytest
from commands import call, done, refused
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from lorasculpt.data.fetch import fetch
from lorasculpt.data.records import read
from lorasculpt.errors import UserError


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 0, 0))


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def shades(file: Path) -> list[int]:
    """The red of each row's picture, as it is read for training."""
    return [Image.open(record.images[0]).getpixel((0, 0))[0] for record in read(file)]


@pytest.fixture
def charts() -> Dataset:
    """Four questions, with pictures and several answers, in columns of another's."""
    return Dataset.from_dict(
        {
            "picture": [picture(10 * i) for i in range(4)],
            "query": [f"How many {i}?" for i in range(4)],
            "label": [["1", "2", "2"], ["3"], ["4", "4"], ["5", "6"]],
            "source": ["human"] * 4,
        },
        Features(picture=datasets.Image(), query=Value("string"), label=List(Value("string")), source=Value("string")),
    )


COLUMNS = {"question": "query", "answer": "label"}


def test_a_table_becomes_a_file_that_can_be_trained_on(tmp_path, charts):
    charts.to_parquet(tmp_path / "charts.parquet")
    found = fetch(tmp_path / "charts.parquet", tmp_path / "out", columns=COLUMNS, progress=False)
    assert (found.rows, found.pictures, found.skipped, found.left_out) == (4, 4, 0, ("source",))
    assert found.file == tmp_path / "out" / "train.jsonl"
    assert [(row["question"], row["answer"]) for row in rows(found.file)] == [
        ("How many 0?", "2"),  # the commonest
        ("How many 1?", "3"),
        ("How many 2?", "4"),
        ("How many 3?", "5"),
    ]
    assert shades(found.file) == [0, 10, 20, 30]
    assert {path.suffix for path in (tmp_path / "out" / "images").iterdir()} == {".png"}


def test_every_answer_is_kept_as_vqa_reads_it(tmp_path, charts):
    charts.to_parquet(tmp_path / "a.parquet")
    found = fetch(tmp_path / "a.parquet", tmp_path / "out", columns=COLUMNS, every_answer=True, progress=False)
    assert [row["answer"] for row in rows(found.file)] == ["1|2|2", "3", "4|4", "5|6"]


def test_a_split_of_a_saved_dataset(tmp_path, charts):
    DatasetDict({"train": charts, "test": charts.select([1])}).save_to_disk(tmp_path / "all")
    found = fetch(tmp_path / "all", tmp_path / "out", split="test", columns=COLUMNS, progress=False)
    assert (found.file.name, shades(found.file)) == ("test.jsonl", [10])
    again = fetch(tmp_path / "all", tmp_path / "out", limit=3, columns=COLUMNS, progress=False)
    assert shades(again.file) == [0, 10, 20]
    with pytest.raises(UserError, match="has no split 'validation'; it has train, test"):
        fetch(tmp_path / "all", tmp_path / "out", split="validation", progress=False)


def test_a_shuffled_part_is_always_the_same(tmp_path):
    Dataset.from_dict({"question": [str(i) for i in range(50)], "answer": ["a"] * 50}).to_parquet(
        tmp_path / "a.parquet"
    )
    found = [
        [row["question"] for row in rows(fetch(tmp_path / "a.parquet", tmp_path / name, limit=9, **more).file)]
        for name, more in (("one", {}), ("two", {"shuffle": True}), ("three", {"shuffle": True}))
    ]
    assert found[0] == [str(i) for i in range(9)]
    assert found[1] == found[2] != found[0]
    assert len(set(found[1])) == 9


def test_pictures_in_folders_called_as_their_classes(tmp_path):
    for i, name in enumerate(("cat", "dog", "cat")):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True, exist_ok=True)
        picture(50 * i).save(tmp_path / "pets" / "train" / name / f"{i}.png")
    out = tmp_path / "out"
    said = done("fetch", tmp_path / "pets", "--out", out, "--columns", "answer=label", "--ask", "Which animal?")
    assert f"data: {out / 'train.jsonl'} (3 rows, 3 pictures)" in said
    found = {(row["question"], row["answer"], *row["choices"]) for row in rows(out / "train.jsonl")}
    assert found == {("Which animal?", name, "cat", "dog") for name in ("cat", "dog")}
    assert sorted(shades(out / "train.jsonl")) == [0, 50, 100]


def test_several_texts_about_the_same_pictures_are_rows_of_their_own(tmp_path):
    texts = [{"user": "a?", "assistant": "A", "source": "x"}, {"user": "b?", "assistant": "B", "source": "x"}]
    made = Dataset.from_dict(
        {"images": [[picture(10), picture(20)], []], "texts": [texts, texts[:1]]},
        Features(images=List(datasets.Image()), texts=List({key: Value("string") for key in texts[0]})),
    )
    made.to_parquet(tmp_path / "a.parquet")
    found = fetch(tmp_path / "a.parquet", tmp_path / "out", progress=False)
    assert [(row["question"], row["answer"], len(row["images"])) for row in rows(found.file)] == [
        ("a?", "A", 2),
        ("b?", "B", 2),
        ("a?", "A", 0),
    ]
    assert (found.rows, found.pictures) == (3, 2)


def test_messages_and_answers_with_their_people(tmp_path):
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "A"}]
    Dataset.from_dict({"messages": [messages], "image": [picture(10)]}).to_parquet(tmp_path / "m.parquet")
    (record,) = read(fetch(tmp_path / "m.parquet", tmp_path / "m", progress=False).file)
    assert (record.question, record.answer, len(record.images)) == ("a?", "A", 1)
    people = [[{"answer": "red", "answer_id": 1}, {"answer": "", "answer_id": 2}, {"answer": "red", "answer_id": 3}]]
    Dataset.from_dict({"question": ["b?"], "answers": people}).to_parquet(tmp_path / "p.parquet")
    found = fetch(tmp_path / "p.parquet", tmp_path / "p", columns={"answer": "answers"}, progress=False)
    assert rows(found.file) == [{"question": "b?", "answer": "red"}]


def test_one_layout_of_several_is_taken(tmp_path):
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "A"}]
    both = Dataset.from_dict({"prompt": ["a?"], "messages": [messages], "short": ["b?"], "answer": ["B"]})
    both.to_parquet(tmp_path / "a.parquet")
    found = fetch(tmp_path / "a.parquet", tmp_path / "found", progress=False)
    assert (rows(found.file), found.left_out) == ([{"messages": messages}], ("prompt", "short", "answer"))
    told = fetch(tmp_path / "a.parquet", tmp_path / "told", columns={"question": "short"}, progress=False)
    assert rows(told.file) == [{"question": "b?", "answer": "B"}]
    asked = fetch(tmp_path / "a.parquet", tmp_path / "asked", ask="c?", progress=False)
    assert rows(asked.file) == [{"question": "c?", "answer": "B"}]


def test_a_table_may_name_its_pictures(tmp_path):
    (tmp_path / "in" / "scans").mkdir(parents=True)
    picture(70).save(tmp_path / "in" / "scans" / "1.png")
    picture(80).save(tmp_path / "secret.png")
    table = tmp_path / "in" / "rows.csv"
    table.write_text("image,question,answer\nscans/1.png,What?,41.90\n")
    found = fetch(table, tmp_path / "out", progress=False)
    assert shades(found.file) == [70]
    assert rows(found.file)[0]["answer"] == "41.90"
    for path, said in (
        ("../secret.png", r"image '\.\./secret\.png' lies outside"),
        ("scans/2.png", r"its picture .*2\.png cannot be read"),
    ):
        table = tmp_path / "in" / "rows.parquet"
        Dataset.from_dict({"image": [path], "question": ["What?"], "answer": ["a"]}).to_parquet(table)
        with pytest.raises(UserError, match=f"row 1 of .*: {said}"):
            fetch(table, tmp_path / "more", progress=False)


WRITTEN = ["00123", "10.50", "3", "None", "NA", "True", "1e5", "2024-05-01", "a, b;\nand c", 'so "said"', "Größe"]


@pytest.mark.parametrize(
    ("separator", "encoding"), [(",", "utf-8"), (",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-8")]
)
def test_what_is_in_a_csv_is_text_as_it_is_written(tmp_path, separator, encoding):
    table = tmp_path / "a.csv"
    with table.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["question", "answer", "task"], *(["What?", answer, ""] for answer in WRITTEN), []])
    found = fetch(table, tmp_path / "out", progress=False)
    assert rows(found.file) == [{"question": "What?", "answer": answer} for answer in WRITTEN]
    assert [record.answer for record in read(found.file)] == WRITTEN


def test_a_gap_in_a_csv_changes_nothing_else(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nHow many?,3\nHow many?,\nHow many?\nHow many?,12\n")
    with pytest.raises(UserError, match=r"row 2 of .*a\.csv: .*answer"):
        fetch(tmp_path / "a.csv", tmp_path / "out", progress=False)
    found = fetch(tmp_path / "a.csv", tmp_path / "out", skip=True, progress=False)
    assert ([row["answer"] for row in rows(found.file)], found.skipped) == (["3", "12"], 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"question,answer\nWhat?,a\nWhat, then?,b\n", ":3: has 3 cells for 2 columns; put double quotes around "),
        (b'question,answer\nWhat?,"a" b\n', ":2: is no row of a csv file ("),
        ("question,answer\nWhat?,Größe\n".encode("latin-1"), ": not UTF-8 text; save the file as UTF-8."),
        (b"question,answer,answer\nWhat?,a,b\n", " has two columns 'answer'; rename one."),
        (b"", " is empty; its first line names the columns."),
    ],
    ids=["cells", "quotes", "encoding", "twice", "empty"],
)
def test_a_csv_that_is_none(tmp_path, text, said):
    (tmp_path / "a.csv").write_bytes(text)
    assert f"lorasculpt: {tmp_path / 'a.csv'}{said}" in refused("fetch", tmp_path / "a.csv", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_many_classes_are_no_choices(tmp_path):
    label = ClassLabel(names=[f"kind {i}" for i in range(21)])
    made = Dataset.from_dict({"question": ["a?"], "answer": [20]}, Features(question=Value("string"), answer=label))
    made.to_parquet(tmp_path / "a.parquet")
    assert rows(fetch(tmp_path / "a.parquet", tmp_path / "out").file) == [{"question": "a?", "answer": "kind 20"}]


def test_a_row_without_a_class_has_no_answer(tmp_path):
    features = Features(question=Value("string"), answer=ClassLabel(names=["cat", "dog"]))
    Dataset.from_dict({"question": ["a?", "b?"], "answer": [-1, 1]}, features).save_to_disk(tmp_path / "a")
    with pytest.raises(UserError, match=r"row 1 of .*: has the class -1 for its answer"):
        fetch(tmp_path / "a", tmp_path / "out", progress=False)
    found = fetch(tmp_path / "a", tmp_path / "out", skip=True, progress=False)
    assert [row["answer"] for row in rows(found.file)] == ["dog"]


def test_a_picture_that_is_described_stays_in_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    picture(70).save(tmp_path / "in" / "1.png")
    picture(80).save(tmp_path / "secret.png")
    table = tmp_path / "in" / "rows.jsonl"
    for image, said in (
        ({"path": str(tmp_path / "secret.png"), "bytes": None}, "lies outside"),
        ({"src": "https://there.org/a.png", "height": 3}, "neither a file nor the bytes of one"),
    ):
        table.write_text(json.dumps({"image": image, "question": "a?", "answer": "A"}) + "\n")
        with pytest.raises(UserError, match=f"row 1 of .*{said}"):
            fetch(table, tmp_path / "out", progress=False)
    table.write_text(json.dumps({"image": {"path": "1.png"}, "question": "a?", "answer": "A"}) + "\n")
    assert shades(fetch(table, tmp_path / "out", progress=False).file) == [70]


def test_rows_that_cannot_be_used(tmp_path, charts):
    data = io.BytesIO()
    picture(1).save(data, "PNG")
    broken = {"bytes": data.getvalue()[:40], "path": None}
    made = Dataset.from_dict(
        {
            "image": [{"bytes": data.getvalue(), "path": None}, broken, None],
            "question": ["a?", "b?", "c?"],
            "answer": ["A", "B", " "],
        }
    ).cast_column("image", datasets.Image(decode=False))
    made.to_parquet(tmp_path / "a.parquet")
    out, command = tmp_path / "out", ("fetch", tmp_path / "a.parquet", "--out", tmp_path / "out")
    assert "row 2 of " in (said := refused(*command))
    assert "(or leave such rows out: skip, --skip)" in said
    assert not (out / "train.jsonl").exists()
    assert "Rows that were left out: 2.\n" in done(*command, "--skip")
    assert rows(out / "train.jsonl") == [
        {"image": rows(out / "train.jsonl")[0]["image"], "question": "a?", "answer": "A"}
    ]
    assert f"{out / 'train.jsonl'} is there already; remove it" in refused(*command)


def test_a_picture_that_is_a_bomb(tmp_path, charts, monkeypatch):
    charts.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(UserError, match=r"row 1 of .*(pixels|bomb)"):
        fetch(tmp_path / "a.parquet", tmp_path / "out", columns=COLUMNS, progress=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "has the columns picture, query, label, source; say which are the question and the answer, such as "),
        (
            ["--columns", "question=query,answer=labels"],
            "has no column 'labels'; it has picture, query, label",
        ),
        (["--columns", "query=question"], "'query' is no column of ours; use conversations, messages, prompt, "),
        (["--columns", "question"], "--columns has 'question'; write ours=theirs"),
        (["--columns", "question=query,answer=source", "--split", "a b"], "cannot be read as a dataset ("),
    ],
)
def test_mistakes(tmp_path, charts, arguments, said):
    charts.to_parquet(tmp_path / "a.parquet")
    assert said in refused("fetch", tmp_path / "a.parquet", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone.parquet", "gone.parquet does not exist; correct the path."),
        ("notes.txt", "notes.txt is no table that can be read: such end in .parquet, "),
        ("cut.parquet", "cut.parquet cannot be read"),
        ("empty", "cannot be read as a dataset ("),
    ],
)
def test_sources_that_are_none(tmp_path, charts, name, said):
    charts.to_parquet(tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    assert said in refused("fetch", tmp_path / name, "--out", tmp_path / "out")


def test_what_is_not_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    code, _, err = call("fetch", "nobody/nothing", "--out", tmp_path / "out")
    assert code == 2
    assert "nobody/nothing cannot be read as a dataset (" in err
