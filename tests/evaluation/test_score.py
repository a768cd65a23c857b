"""Scores and intervals, against numbers worked by hand or printed elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorasculpt.data.records import Record
from lorasculpt.errors import UserError
from lorasculpt.evaluation import Task, interval, score, tasks
from lorasculpt.evaluation.score import majority, normalise, worth


def record(answer: str, **fields) -> Record:
    return Record(({"role": "user", "content": "?"},), answer, **fields)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Cat!", "cat"),
        ("a sea-animal.", "sea animal"),
        ("3.5", "3.5"),
        ("It costs 1,000 dollars.", "it costs 1,000 dollars"),
        ("-4", "-4"),
        ("12:30", "12:30"),
        ("+", "+"),
        ("The", "the"),
        ("", ""),
        ("ＡＢＣ", "abc"),
        ("दिन।", "दिन"),
        ("−4", "-4"),
        ("(-4)", "-4"),
        ("−$ 4", "-4"),
        ("$-.50", "-0.50"),
        ("It costs $4.", "it costs 4"),
        ("$10-$20", "10 20"),
        ("10–20", "10 20"),
        ("50%-60%", "50 60"),
        ("+5", "5"),
        ("2+2", "2 + 2"),
        ("x>-5", "x > -5"),
        ("1½", "1 1/2"),
        ("C++.", "c++"),
        ("wait--no, **cat**", "wait no cat"),
        ("Côte d'Ivoire", "côte d ivoire"),
        ("apple ❤️", "apple"),
        ("A.", "a"),
        ("(A)", "a"),
        ("**A**", "a"),
        ("A) a cat", "a cat"),
        ("A: the cat", "a cat"),
        ("A - the cat", "a cat"),
        ("A\nThe cat", "a cat"),
        ("The 'cat' and an €5 note", "cat and 5 note"),
        ("the U.S.A is a state", "u s a is state"),
        ("a + b", "a + b"),
        ("A = 3", "a = 3"),
        ("...a cat", "cat"),
        ("1.a cat", "1 cat"),
        ("Vitamin A", "vitamin a"),
        ("The answer is A.", "answer is a"),
    ],
)
def test_normalise(text, plain):
    assert normalise(text) == plain


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        ("exact", "A cat.", "cat", 1.0),
        ("exact", "a cat and a dog", "cat", 0.0),
        ("exact", "", "cat", 0.0),
        ("exact", "4", "-4", 0.0),
        ("exact", ".5", "0.5", 1.0),
        ("exact", "½", "1/2", 1.0),
        ("contains", "It is a cat, I think.", "cat", 1.0),
        ("contains", "这是一只猫", "猫", 1.0),
        ("contains", "这是一只狗", "猫", 0.0),
        ("contains", "มันคือแมว", "แมว", 1.0),
        ("contains", "一共15个。", "15", 1.0),
        ("contains", "一共15个。", "5", 0.0),
        ("contains", "I write C++.", "C", 0.0),
        ("contains", "It is a category.", "cat", 0.0),
        *(
            ("exact", form.format(option), option, 1.0)
            for option in "ABCD"
            for form in ("{}.", "({})", "{})", "**{}**")
        ),
        *(("contains", f"The answer is {option}.", option, 1.0) for option in "ABCD"),
        *(("contains", f"{option}: a cat", option, 1.0) for option in "ABCD"),
        ("contains", "vitamin C", "vitamin A", 0.0),
        ("vqa", "red", "red", 1.0),
        ("vqa", "red", "red|red|blue", 2 / 3),
        ("vqa", "red", "red|red|red|red|blue", 1.0),
        ("vqa", "Blue", "red|red|red|red|blue", 1 / 3),
        ("vqa", "red", "red|blue", 0.5),
        ("choice", "red", "red", 1.0),
        ("choice", "Red", "red ", 1.0),
        ("choice", "C", "C++", 0.0),
    ],
)
def test_score(metric, answer, reference, expected):
    assert score([answer], [record(reference)], metric) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("दिन", "दान"),
        ("กิน", "กัน"),
        ("−4", "4"),
        ("-$4", "4"),
        ("$-4", "4"),
        (".5", "5"),
        ("C++", "C#"),
        ("C#", "C"),
        ("B-", "B+"),
        ("x > 5", "x < 5"),
        ("2 + 2", "2 2"),
        ("10²", "102"),
        ("vitamin", "vitamin A"),
    ],
)
def test_what_means_another_thing_is_another_answer(one, other):
    assert score([one, other], [record(other), record(one)]) == [0, 0]


def test_score_refuses():
    with pytest.raises(UserError, match=r"'f1' is not one of exact, contains, vqa, choice"):
        score([], [], "f1")
    with pytest.raises(ValueError, match="longer"):
        score(["x"], [record("x"), record("y")])


def test_wilson():
    # 81 of 263: a textbook example (Newcombe 1998, table I, method 3)
    assert interval([1] * 81 + [0] * 182) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval([0] * 20) == pytest.approx((0, 0.1611), abs=5e-5)
    low, high = interval([1] * 10)
    assert (low, high) == (pytest.approx(0.7225, abs=5e-5), 1.0)


def test_soft_scores_are_no_surer_than_right_and_wrong_of_the_same_mean():
    assert interval([2 / 3] * 3) == pytest.approx(interval([1, 1, 0]))  # and not without a width, as drawn anew
    low, high = interval([0] * 99 + [1 / 3])
    assert low == pytest.approx(0, abs=0.001)
    assert high > interval([0] * 100)[1]  # of which more are lost
    # as often as it says, and more
    rng, values, shares = np.random.default_rng(0), (0, 1 / 3, 2 / 3, 1), (0.2, 0.15, 0.15, 0.5)
    found = [interval(rng.choice(values, 80, p=shares)) for _ in range(500)]
    assert sum(low <= 0.65 <= high for low, high in found) > 0.95 * 500


def test_what_stands_or_falls_together_is_worth_less():
    rng = np.random.default_rng(0)
    values = rng.random(40) < 0.6
    alone = interval(values)
    assert interval(values, groups=range(40)) == alone
    assert (worth(values), worth(values, [7] * 40), worth([1.0])) == (40, 1, 1)
    # each group five times the same: worth its groups, as Student's t has them
    fives = np.repeat(values, 5)
    assert worth(fives, np.repeat(range(40), 5)) == pytest.approx(39 * (1.959964 / 2.022691) ** 2, rel=1e-5)
    low, high = interval(fives, groups=np.repeat(range(40), 5))
    assert low < alone[0] < alone[1] < high < alone[1] + 0.01
    # groups that have nothing to do with the values cost what t does, and groups that balance them gain nothing
    assert 0.6 * 4000 < worth(rng.random(4000) < 0.5, rng.permutation(np.repeat(range(1000), 4))) <= 4000
    assert worth([0, 1] * 50, np.repeat(range(50), 2)) == pytest.approx(100 * (1.959964 / 2.009575) ** 2, rel=1e-5)
    # where all are equal nobody knows how much they go together
    assert worth([0.0] * 100, np.repeat(range(50), 2)) == pytest.approx(50 * (1.959964 / 2.009575) ** 2, rel=1e-5)


def test_the_spread_of_groups_is_that_of_groups_drawn_anew():
    rng = np.random.default_rng(3)
    which = np.repeat(np.arange(200), rng.integers(1, 9, 200))
    values = (rng.random(200) < 0.5)[which] & (rng.random(which.size) < 0.9)
    sums, sizes = np.bincount(which, values), np.bincount(which)
    rows = rng.integers(200, size=(4000, 200))
    spread = np.std(sums[rows].sum(axis=1) / sizes[rows].sum(axis=1))
    p = values.mean()
    assert np.sqrt(p * (1 - p) / worth(values, which)) == pytest.approx(spread, rel=0.05)


def test_an_interval_refuses():
    with pytest.raises(ValueError, match="at least one"):
        interval([])
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            interval([0.5, value])


def test_the_commonest_answer_is_scored_as_any_other():
    flags = [record("Mali"), record("the Mali."), record("Chad"), record("Chad, north"), record("Peru")]
    assert majority(flags) == 2 / 5  # written in two ways
    assert majority([record("Chad"), *flags]) == pytest.approx(2 / 6)  # the first of equals
    assert majority([record("red"), record("red"), record("red or blue"), record("blue")], "contains") == 0.5
    people = [record("red|red|blue"), record("blue|blue|red"), record("blue|green|green")]
    assert majority(people, "vqa") == pytest.approx((1 + 2 + 1) / 9)
    assert majority([record("A", choices=("A", "B")), record("B", choices=("A", "B"))], "choice") == 0.5


def test_tasks():
    records = [record("x", task="b"), record("y", task="a"), record("z", task="b")]
    found = tasks(records, {"a": "contains"})
    assert [(task.name, len(task.records), task.metric) for task in found] == [("b", 2, "exact"), ("a", 1, "contains")]


def test_questions_about_the_same_pictures_or_of_one_group_belong_together():
    a, b = Path("/d/a.png"), Path("/d/b.png")
    one = Task(
        "t", (record("x", images=(a,)), record("y"), record("z", images=(a,)), record("y"), record("y", images=(a, b)))
    )
    assert one.groups == [0, 1, 0, 3, 4]
    named = Task("t", (record("x", images=(a,), group="p"), record("y", group="p"), record("z", images=(a,))))
    assert named.groups == [0, 0, 2]


def test_task_refuses():
    with pytest.raises(UserError, match="'t' has no questions"):
        Task("t", ())
    with pytest.raises(UserError, match="metric 'bleu'"):
        Task("t", (record("x"),), "bleu")
    with pytest.raises(UserError, match=r"d\.jsonl:3: .*'choices'"):
        Task("t", (record("x", where="d.jsonl:3"),), "choice")
