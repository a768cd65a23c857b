"""Data files: every layout becomes the same record, and every bad row is told by its line with the mend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest

from lorasculpt.data.records import Record, read, replayed, set_aside, shared
from lorasculpt.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three pictures, with a picture beside it that rows may not reach."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        pico.picture(0).save(folder / name)
    pico.picture(0).save(tmp_path / "outside.png")
    return folder


def write(folder: Path, *rows: Any, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def one(folder: Path, row: Any) -> Record:
    (record,) = read(write(folder, row))
    return record


USER = {"role": "user", "content": "What is it?"}
LAYOUTS = {
    "ours": {"question": "What is it?", "answer": "a square", "image": "a.png"},
    "messages": {"messages": [USER, {"role": "assistant", "content": "a square"}], "images": ["a.png"]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a square"}]},
        ],
        "images": ["a.png"],
    },
    "parts with paths": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "a square"},
        ]
    },
    "prompt": {"prompt": "What is it?", "completion": "a square", "images": ["a.png"]},
    "prompt of messages": {
        "prompt": [USER],
        "completion": [{"role": "assistant", "content": "a square"}],
        "images": ["a.png"],
    },
    "llava": {
        "id": "17",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "a square"},
        ],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_the_same_record(folder: Path, layout: str) -> None:
    record = one(folder, LAYOUTS[layout])
    assert record == Record((USER,), "a square", ((folder / "a.png").resolve(),), where=f"{folder / 'd.jsonl'}:1")
    assert record.question == "What is it?"


def test_layouts_may_change_from_row_to_row(folder: Path) -> None:
    records = read(write(folder, *LAYOUTS.values()))
    assert {record.answer for record in records} == {"a square"}


def test_a_list_in_a_json_file_knows_its_lines(folder: Path) -> None:
    rows = list(LAYOUTS.values())
    path = folder / "d.json"
    path.write_text(json.dumps(rows[:2], indent=2))
    starts = [number for number, line in enumerate(path.read_text().split("\n"), 1) if line == "  {"]
    assert [record.where for record in read(path)] == [f"{path}:{line}" for line in starts]


def test_earlier_turns_stay_in_the_prompt(folder: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "a square"}, {"role": "user", "content": "Which color?"}]
    record = one(folder, {"messages": [*turns, {"role": "assistant", "content": "red"}], "system": "Be brief."})
    assert record.prompt == ({"role": "system", "content": "Be brief."}, *turns)
    assert (record.question, record.answer, record.images) == ("Which color?", "red", ())


def test_task_choices_and_numbers(folder: Path) -> None:
    record = one(folder, {"question": "2 + 2?", "answer": 4, "task": "sums", "choices": [3, 4], "meta": {"any": 1}})
    assert (record.answer, record.task, record.choices) == ("4", "sums", ("3", "4"))
    assert one(folder, {"question": "?", "answer": "a"}).task == "default"


def test_several_images_keep_their_order(folder: Path) -> None:
    record = one(folder, {"question": "<image> or <image>?", "answer": "b", "images": ["c.png", "a.png"]})
    assert [path.name for path in record.images] == ["c.png", "a.png"]
    assert record.question == "or ?"


def test_images_may_live_elsewhere(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path, LAYOUTS["ours"])
    (record,) = read(path, images=folder)
    assert record.images == ((folder / "a.png").resolve(),)


def test_blank_lines_a_byte_order_mark_and_a_limit(folder: Path) -> None:
    path = folder / "d.jsonl"
    row = json.dumps(LAYOUTS["ours"])
    path.write_text(f"\n{row}\n\n{row}\n{{broken", encoding="utf-8-sig")
    assert [record.where for record in read(path, limit=2)] == [f"{path}:2", f"{path}:4"]
    with pytest.raises(UserError, match=r":5: not valid JSON"):
        read(path)


def test_a_separator_inside_a_text_does_not_end_the_line(folder: Path) -> None:
    record = one(folder, json.dumps({"question": "line\u2028separator", "answer": "a"}, ensure_ascii=False))
    assert record.question == "line\u2028separator"


def test_each_picture_is_checked_once_and_only_if_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr("lorasculpt.data.records.check_image", lambda path: checked.append(path.name))
    path = write(folder, LAYOUTS["ours"], LAYOUTS["llava"], {**LAYOUTS["ours"], "image": "b.png"})
    read(path)
    assert checked == ["a.png", "b.png"]
    read(path, check_images=False)
    assert checked == ["a.png", "b.png"]


QA = {"question": "q", "answer": "a"}
BAD = {
    "not JSON": ('{"question": "q", answer}', r"not valid JSON \(.* at column 19\)"),
    "one key twice": ('{"question": "q", "question": "r", "answer": "a"}', "has the key 'question' twice; remove one"),
    "half a character": (r'{"question": "\ud83d?", "answer": "a"}', "has half of a character in 'question'"),
    "half a character in a list": (r'{"question": "q", "answer": "a", "choices": ["a", "\ude00"]}', "in 'choices'"),
    "no object": ([1], "must be a JSON object, got list"),
    "no layout": ({"image": "a.png"}, "no question and answer; give"),
    "no question": ({"answer": "a"}, "'question' is missing; add it"),
    "no answer": ({"question": "q"}, "'answer' is missing; add it"),
    "no completion": ({"prompt": "q"}, "'completion' is missing"),
    "empty answer": ({"question": "q", "answer": "  "}, "'answer' is empty"),
    "empty question": ({"question": "<image>", "answer": "a", "image": "a.png"}, "'question' is empty"),
    "answer no text": ({"question": "q", "answer": {"a": 1}}, "'answer' must be text, got"),
    "answer true": ({"question": "q", "answer": True}, "'answer' must be text, got True"),
    "unknown key": ({**QA, "imges": ["a.png"]}, r"unknown key 'imges' \(did you mean 'images'\?\); rename it"),
    "unknown keys": ({**QA, "picture": 1, "Tasks": 2}, r"keys 'picture', 'Tasks' \(did you mean 'task'\?\)"),
    "mistyped layout": ({"conversation": []}, "did you mean 'conversations'"),
    "two layouts": ({**QA, "messages": []}, "unknown key"),
    "no assistant": ({"messages": [USER]}, "no assistant turn"),
    "ends with the user": ({"messages": [USER, {"role": "assistant", "content": "a"}, USER]}, "not the assistant's"),
    "no user": ({"messages": [{"role": "assistant", "content": "a"}]}, "no user turn"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, "message 1 of 'messages' has the role 'tool'"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 of 'messages' has the role ''"),
    "no value": ({"conversations": [{"from": "human"}]}, "give it a 'value'"),
    "messages no list": ({"messages": "hello"}, "'messages' must be a list of messages"),
    "empty turn": (
        {"messages": [{**USER, "content": ""}, {"role": "assistant", "content": "a"}]},
        "message 1 .* empty",
    ),
    "video part": ({"messages": [{**USER, "content": [{"type": "video"}]}]}, "neither text nor image"),
    "marks": ({"question": "<image><image> q", "answer": "a", "image": "a.png"}, "2 <image> marks but 1 images"),
    "missing image": ({**QA, "image": "z.png"}, r"z\.png does not exist"),
    "image no path": ({**QA, "image": ["a.png"]}, "'image' must be one path"),
    "images no list": ({**QA, "images": "a.png"}, "'images' must be a list of texts"),
    "outside": ({**QA, "image": "../outside.png"}, r"'\.\./outside\.png' lies outside"),
    "absolute": ({**QA, "image": "/etc/hostname"}, "lies outside"),
    "task": ({**QA, "task": 3}, "'task' must be a name, got 3"),
    "choices": ({**QA, "choices": ["b", "c"]}, "answer 'a' is not among 'choices'"),
    "choices no list": ({**QA, "choices": "abc"}, "'choices' must be a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_first_bad_row_is_told_by_its_line(folder: Path, case: str) -> None:
    row, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        read(write(folder, QA, row, "{also broken"))
    assert str(error.value).startswith(f"{folder / 'd.jsonl'}:2: ")
    assert "\n" not in str(error.value)


def test_a_link_does_not_lead_out_of_the_folder(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(UserError, match=r"link\.png' lies outside"):
        one(folder, {**QA, "image": "link.png"})


def test_a_truncated_image_is_caught_before_training(folder: Path) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"d\.jsonl:1: image .*a\.png is damaged"):
        one(folder, LAYOUTS["ours"])


FILES = {
    "d.csv": ("a,b", r"d\.csv: data files end in \.jsonl"),
    "d.jsonl": ("\n", r"d\.jsonl: no rows"),
    "empty.json": ("[]", r"no rows"),
    "object.json": ('{"question": "q"}', r"object\.json:1: a \.json data file holds a list"),
    "twice.json": ('[\n{"answer": "b", "question": "q", "answer": "a"}]', r"twice\.json:2: has the key 'answer' twice"),
    "cut.json": ('[\n{"question": "q", "answer": "a"},\n{"question"', r"cut\.json:3: not valid JSON"),
    "joined.json": ('[\n{"question": "q", "answer": "a"}\n]\n[]', r"joined\.json:4: more follows after the list"),
    "nan.json": ('[\n{"question": "q", "answer": NaN}]', r"nan\.json:2: 'answer'"),
    "nan.jsonl": ('{"question": "q", "answer": NaN}', r"nan\.jsonl:1: 'answer'"),
    "comma.json": ('[\n{"question": "q", "answer": "a"}\n{"question": "q"}]', r"comma\.json:3: not valid JSON \(','"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_told(tmp_path: Path, name: str) -> None:
    text, message = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_missing_file_a_folder_and_a_foreign_encoding_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "folder.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"question": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.jsonl:2: not UTF-8"):
        read(tmp_path / "latin.jsonl")


# --- rows to validate with ------------------------------------------------------------------------------------------


def shown(*names, question="what?") -> list[Record]:
    return [
        Record(({"role": "user", "content": f"{question} {number}"},), "a", (Path(f"/d/{name}.png"),), where="d:1")
        for number, name in enumerate(names)
    ]


def test_what_is_set_aside_is_always_the_same_and_no_picture_is_on_both_sides():
    records = shown(*"abcdefghij" * 3)
    kept, aside = set_aside(records, 0.1, "/d")
    assert len(aside) == 3
    assert len({record.images for record in aside}) == 1
    assert not {record.images for record in aside} & {record.images for record in kept}
    assert sorted([*kept, *aside], key=records.index) == records
    assert kept == [record for record in records if record in kept]
    again = set_aside(records[::-1], 0.1, "/d")
    assert {record.images for record in again[1]} == {record.images for record in aside}
    # more is set aside by setting others aside as well
    assert {r.images for r in aside} < {r.images for r in set_aside(records, 0.3, "/d")[1]}


def test_where_the_pictures_lie_decides_nothing():
    here, there = shown(*"abcdefgh"), shown(*"abcdefgh")
    there = [replace(record, images=(Path("/other/x") / record.images[0].name,)) for record in there]
    names = [
        [record.images[0].name for record in set_aside(records, 0.4, folder)[1]]
        for records, folder in ((here, "/d"), (there, "/other/x"))
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 4


def test_without_pictures_words_keep_rows_together():
    records = [replace(record, images=()) for record in [*shown("a", "b", "c"), *shown("a", "b", "c")]]
    kept, aside = set_aside(records, 0.3, ".")
    assert len(aside) == 2
    assert aside[0].prompt == aside[1].prompt
    assert not any(record.prompt == aside[0].prompt for record in kept)


def test_a_group_is_a_name_and_stays_together(tmp_path):
    records = [replace(record, group=record.images[0].name[0]) for record in shown("a1", "a2", "b1", "b2", "c1")]
    for share in (0.2, 0.4):
        kept, aside = set_aside(records, share, "/d")
        assert not {record.group for record in kept} & {record.group for record in aside}
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "What?", "answer": "yes", "group": "page 7"}\n{"question": "Who?", "answer": "he"}\n')
    assert [record.group for record in read(path)] == ["page 7", ""]
    path.write_text('{"question": "What?", "answer": "yes", "group": 7}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 'group' must be a name, got 7"):
        read(path)


def test_too_few_pictures_are_not_split():
    with pytest.raises(UserError, match=r"d:1: nothing would be left to train on if 0.1 of the rows .* add some, or"):
        set_aside(shown("a", "a"), 0.1, "/d")
    with pytest.raises(UserError, match="nothing would be left"):
        set_aside(shown("a", "b"), 0.9, "/d")


# --- rows that are replayed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "share", "wanted"), [(90, 0.1, 10), (8, 0.2, 2), (3, 0.9, 27), (4, 0.01, 1)])
def test_so_many_rows_are_replayed_that_they_are_the_share(count, share, wanted):
    drawn = replayed(shown(*"abcdefghij"), count, share, seed=1)
    assert len(drawn) == wanted
    assert wanted == 1 or wanted / (count + wanted) == pytest.approx(share, abs=0.005)


def test_no_row_is_replayed_twice_before_each_was_once_and_the_seed_draws():
    general = shown(*"abcdefghij")
    drawn = replayed(general, 100, 0.2, seed=1)  # 25 of 10
    for times in (drawn[:10], drawn[10:20]):
        assert sorted(times, key=general.index) == general
    assert drawn[:10] != general
    assert len({record.where + record.question for record in drawn[20:]}) == 5
    assert replayed(general, 100, 0.2, seed=1) == drawn
    assert replayed(general, 100, 0.2, seed=2) != drawn


def test_a_question_that_is_measured_is_found_by_its_words_and_the_bytes_of_its_pictures(tmp_path):
    for name, content in {"a": b"1", "copy": b"1", "b": b"2"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)

    def asked(*names, question="what?", system=""):
        system_message = ({"role": "system", "content": system},) if system else ()
        images = tuple(tmp_path / f"{name}.png" for name in names)
        return Record((*system_message, {"role": "user", "content": question}), "yes", images)

    tests = [asked("b", question="who?"), asked("a"), asked(question="how?")]
    for other in (asked("b"), asked("a", question="who?"), asked(), asked("a", "b"), asked("a", question="how?")):
        assert shared([other], tests) == []
    sames = [asked("a"), asked("copy", system="Be kind."), asked(question="how?")]
    found = shared([asked("b"), *sames], [*tests, asked("copy")])
    assert all(record is same for (record, _), same in zip(found, sames, strict=True))
    assert all(other is tests[i] for (_, other), i in zip(found, (1, 1, 2), strict=True))  # the first that asks it


def test_pictures_of_other_sizes_are_told_apart_unread(tmp_path, monkeypatch):
    for name, size in {"a": 1, "b": 2, "c": 2}.items():
        (tmp_path / name).write_bytes(bytes(size))
    made, read = [Record(({"role": "user", "content": "what?"},), "yes", (tmp_path / name,)) for name in "abc"], []
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), path.name.encode())[1])
    assert shared(made[:1], made[1:]) == []
    assert read == []
    assert shared(made[1:2], made[2:]) == []
    assert sorted(read) == ["b", "c"]
