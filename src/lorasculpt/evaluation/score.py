"""Scores of single answers, and the interval around their mean."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import NormalDist, mean

import numpy as np

from ..data.records import Record
from ..errors import UserError
from .student import quantile

RESAMPLES = 2000  # of a bootstrap
# before a word, no sign: not "(A)", "A: a cat", "vitamin A", "a + b" or "U.S.A is"
ARTICLE = re.compile(r"(?<!\w)(?<![^\W\d]\.)(?:an?|the)(?=[^\S\n]+(?![-+*/=<>×÷^|&]\s)\S)")
MONEY = "[$¢-¥฿₠-⃀]"
ALIKE = str.maketrans({"−": "-", "⁄": "/", "\ufe0f": None})  # minus, the stroke of ½, and what only colours an emoji
SPELLINGS = (  # of a number: -$4 and $-4 are -4, +4 is 4, .5 is 0.5
    (re.compile(rf"-{MONEY}\s?(?=[.\d])|(?<!\d){MONEY}-(?=[.\d])"), "-"),
    (re.compile(r"^\+(?=[.\d])"), ""),
    (re.compile(r"(?<![\w.])\.(?=\d)"), "0."),
)
MARK = re.compile(
    r"""
    (?P<kept>
        (?<=\d)[.,:/](?=\d)               # between digits: 3.5, 1,000, 12:30
        | (?<![^\s(\[{<>=:*"'`])-(?=\d)    # the sign of a number: -4
        | (?<=\w)[+\#]++(?!\w)             # part of a name: C++, C#
        | (?<=\w)(?<!\w{3})-(?![\w-])      # of a grade or a blood group: B-
    )
    | [^\w\s] | _
    """,
    re.VERBOSE,
)
# scripts that are written without spaces: Thai and Lao, Burmese, Khmer, Japanese, Chinese
SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")


def normalise(text: str) -> str:
    """``text`` without case, punctuation, articles and spare spaces: 'The  Cat!' -> 'cat'.

    What tells one answer from another stays: vowel signs and other marks of a word, the sign and the point of a number,
    the signs of arithmetic, ``C++`` and ``B-``. Signs of money, percent and degrees go, as in SQuAD's and VQA's scores.
    An ``A`` that no word follows is no article: it is an option, as ``B`` is, or a vitamin. A text that is nothing but
    punctuation stays as it is.

    References:
        Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016: case, punctuation,
        articles and spaces are what its official script takes away.
    """
    text = re.sub(r"(?<=\d)(?=[²³¹⁰⁴-⁹¼-¾⅐-⅞])", " ", text)  # NFKC makes 102 of 10²
    text = unicodedata.normalize("NFKC", text).translate(ALIKE).casefold().strip()
    plain = text
    for spelling, usual in SPELLINGS:
        plain = spelling.sub(usual, plain)
    return " ".join(MARK.sub(_mark, ARTICLE.sub("", plain)).split()) or text


def _mark(found: re.Match) -> str:
    """What is left of a character that is no letter and no digit."""
    mark = found[0]
    kind = unicodedata.category(mark[0])
    if found["kept"] or kind in ("Mn", "Mc"):
        return mark
    return f" {mark} " if kind == "Sm" else " "


def exact(answer: str, record: Record) -> float:
    """1 if the normalised answer is the normalised reference: case, articles and punctuation do not count."""
    return float(normalise(answer) == normalise(record.answer))


def contains(answer: str, record: Record) -> float:
    """1 if the normalised answer contains the normalised reference as whole words, or, as in Chinese, as a part."""
    return float(f" {_words(record.answer)} " in f" {_words(answer)} ")


def _words(text: str) -> str:
    """``text``, normalised, with every letter of a script without spaces as a word of its own."""
    return " ".join(SPACELESS.sub(r" \g<0> ", normalise(text)).split())


def vqa(answer: str, record: Record) -> float:
    """VQA soft accuracy, min(1, matches / 3), over the references that the row's answer separates by ``|``.

    Three people who agree make an answer right. With fewer than three references all of them have to agree:
    min(1, matches / min(3, references)).

    References:
        Antol et al., "VQA: Visual Question Answering", 2015, section 3. The official script averages the same formula
        over leave-one-out subsets of ten references, which changes a score by at most 0.1.
    """
    references = [normalise(reference) for reference in record.answer.split("|")]
    matches = references.count(normalise(answer))
    return min(1.0, matches / min(3, len(references)))


def choice(answer: str, record: Record) -> float:
    """1 if the likeliest of the row's choices, as ``choose`` takes it, is the reference, upper and lower case alike."""
    return float(answer.strip().lower() == record.answer.strip().lower())


METRICS: dict[str, Callable[[str, Record], float]] = {
    "exact": exact,
    "contains": contains,
    "vqa": vqa,
    "choice": choice,
}


def score(answers: Sequence[str], records: Sequence[Record], metric: str = "exact") -> list[float]:
    """The score in [0, 1] of each answer.

    Raises:
        UserError: ``metric`` is unknown.
    """
    if metric not in METRICS:
        raise UserError(f"metric {metric!r} is not one of {', '.join(METRICS)}.")
    return [METRICS[metric](answer, record) for answer, record in zip(answers, records, strict=True)]


def majority(records: Sequence[Record], metric: str = "exact") -> float:
    """The mean score, in [0, 1], of whoever gives the commonest answer to every question and looks at none of them.

    Of ``vqa`` it is the commonest of all references.

    Raises:
        UserError: ``metric`` is unknown.
    """
    answers = [
        part for record in records for part in (record.answer.split("|") if metric == "vqa" else [record.answer])
    ]
    words = {normalise(answer): answer for answer in answers}
    ((commonest, _),) = Counter(map(normalise, answers)).most_common(1)
    return mean(score([words[commonest]] * len(records), records, metric))


def interval(values: Sequence[float], level: float = 0.95, groups: Sequence[int] | None = None) -> tuple[float, float]:
    """Confidence interval of the mean of ``values`` in [0, 1]: Wilson's.

    Of values that are not all 0 or 1, as VQA's, it is on the safe side: none of the same mean vary more than those. A
    bootstrap would have no width where all are alike.

    Args:
        values: At least one.
        level: How often it is to hold the truth.
        groups: As :func:`worth` takes them.

    Raises:
        ValueError: ``values`` is empty, or one is not in [0, 1].

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    x = np.asarray(values, dtype=float)
    if not x.size:
        raise ValueError("an interval needs at least one value")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("an interval is of values between 0 and 1")
    n, p = worth(values, groups), x.mean()
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def worth(values: Sequence[float], groups: Sequence[int] | None = None) -> float:
    """How many values, each drawn by itself, tell as much of a mean as these: their number, or less.

    Values of a group are more alike than others, so that each tells less. How alike is taken from the values; where all
    are equal nobody knows it, and a group counts once. Few groups tell little of how they vary, for which there is
    Student's t.

    Args:
        values: At least one.
        groups: For each value a number that it shares with those of its group. Default: each is drawn by itself.

    References:
        Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated
        from survey data", Survey Methodology 24, 1998. Why: Miller, "Adding error bars to evals", 2024, section 2.2.
    """
    x = np.asarray(values, dtype=float)
    _, which = np.unique(np.arange(x.size) if groups is None else groups, return_inverse=True)
    count = int(which.max()) + 1
    if count in (1, x.size):
        return count
    rest = x - x.mean()
    alone, together = np.sum(rest**2), np.sum(np.bincount(which, rest) ** 2) * count / (count - 1)
    design = max(1.0, together / alone) if alone > 0 else x.size / count
    return float(x.size / design * (NormalDist().inv_cdf(0.975) / quantile(count - 1)) ** 2)


def bounds(draws: np.ndarray) -> list[float]:
    """[low, high] of 95 % of bootstrap ``draws``, those that are nan left out."""
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return [float("nan")] * 2
    return [float(x) for x in np.quantile(draws, (0.025, 0.975))]
