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

ARTICLES = {"a", "an", "the"}
# punctuation, except a separator between digits (3.5, 1,000, 12:30) and the sign of a number (-4)
PUNCTUATION = re.compile(r"(?!(?<=\d)[.,:/]\d)(?!(?<!\S)-\d)[^\w\s]|_")


def normalise(text: str) -> str:
    """``text`` without case, punctuation, articles and spare spaces: 'The  Cat!' -> 'cat'.

    A text that is nothing but punctuation or articles stays as it is, in lower case.
    """
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    words = [word for word in PUNCTUATION.sub(" ", text).split() if word not in ARTICLES]
    return " ".join(words) or text


def exact(answer: str, record: Record) -> float:
    """1 if the normalised answer is the normalised reference."""
    return float(normalise(answer) == normalise(record.answer))


def contains(answer: str, record: Record) -> float:
    """1 if the normalised answer contains the normalised reference as whole words."""
    return float(f" {normalise(record.answer)} " in f" {normalise(answer)} ")


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


def interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Confidence interval of the mean: Wilson's for values that are all 0 or 1, a seeded bootstrap otherwise.

    Raises:
        ValueError: ``values`` is empty.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    x = np.asarray(values, dtype=float)
    if not x.size:
        raise ValueError("an interval needs at least one value")
    n, p = x.size, x.mean()
    if np.isin(x, (0, 1)).all():
        z = NormalDist().inv_cdf((1 + level) / 2)
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return max(0.0, float(centre - half)), min(1.0, float(centre + half))
    rng = np.random.default_rng(seed)
    means = [x[rng.integers(n, size=n)].mean() for _ in range(2000)]
    low, high = bounds(np.array(means), level)
    return low, high


def bounds(draws: np.ndarray, level: float = 0.95) -> list[float]:
    """[low, high] percentiles of bootstrap ``draws``, those that are nan left out."""
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return [float("nan")] * 2
    return [float(x) for x in np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))]
