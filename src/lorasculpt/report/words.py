"""Numbers as text, and the sentences that say what they mean."""

from __future__ import annotations

import math

from .results import REFERENCE, Entry, Number, compared, ends, front

NONE = "–"
MANY = 4  # entries that one sentence can still tell
SPACE = "\u00a0"  # keeps a number and its unit on one line


def percent(value: float, digits: int = 1) -> str:
    """0.8414 -> '84.1', with a true minus sign; a dash for nan."""
    if math.isnan(value):
        return NONE
    return f"{100 * value:z.{digits}f}".replace("-", "−")


def bracket(number: Number) -> str:
    """The interval of ``number``: '[81.2, 86.5]', or nothing."""
    return "" if number.low is None or number.high is None else f"[{percent(number.low)}, {percent(number.high)}]"


def chance(p: float | None) -> str:
    """0.0123 -> 'p 0.012'."""
    if p is None:
        return f"p {NONE}"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def difference(test: dict | None) -> str:
    """A paired test: '+3.1, p 0.012'; nothing for none, and a dash for the p of differences that are all equal."""
    if test is None:
        return ""
    points = percent(test["difference"])
    return f"{'' if points[0] == '−' else '+'}{points}, {chance(test['p'])}"


def duration(seconds: float | None) -> str:
    """75 -> '1 min 15 s'."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def times(value: float | None, reference: float | None) -> str:
    """How often ``reference`` goes into ``value``: '1.27 × lora'; nothing where that is not known."""
    return f"{value / reference:.2f}{SPACE}× {REFERENCE}" if value is not None and reference else ""


def size(count: float | None) -> str:
    """Bytes in the largest decimal unit that leaves at least 1: 1234567 -> '1.2 MB'."""
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def listed(names: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'; underscores become spaces."""
    names = [name.replace("_", " ") for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _learned(entry: Entry, task: str) -> str:
    share = entry.numbers["retention"].value
    kept = "the base model knew none of the source" if math.isnan(share) else f"kept {percent(share, 0)}{SPACE}%"
    return f"{entry.label} learned{task} {percent(entry.numbers['target_after'].value, 0)}{SPACE}% and {kept}"


def _way(a: Number, b: Number) -> str:
    """How ``b`` compares with ``a``: 'more', 'less', or 'noise' where their intervals overlap."""
    if not a.separate(b):
        return "noise"
    return "more" if b.value > a.value else "less"


def _doubt(a: Entry, b: Entry, name: str) -> str:
    """What to call a difference in ``name`` between entries whose intervals overlap.

    Where both were trained with the same seeds these may tell them apart all the same: then it is no tie.
    """
    test = compared(b, a, name)
    if test is None or test["p"] is None or test["p"] >= 0.05:
        return "within the noise"
    return (
        f"unclear: their intervals overlap, but seed by seed {b.label} has {percent(abs(test['difference']))} points "
        f"{'more' if test['difference'] > 0 else 'less'} ({chance(test['p'])})"
    )


def verdict(a: Entry, b: Entry) -> str:
    """What the difference between two entries is worth: a win, a loss, a trade-off, or noise."""
    if any(entry.numbers[name].low is None for entry in (a, b) for name in ("retention", "target_after")):
        return f"Whether {a.label} and {b.label} differ by more than noise is not known: intervals are missing."
    kept, learned = (_way(a.numbers[name], b.numbers[name]) for name in ("retention", "target_after"))
    doubts = [_doubt(a, b, name) for name in ("source_after", "target_after")]
    if kept == learned == "noise" and doubts != ["within the noise"] * 2:
        return (
            f"The difference between {a.label} and {b.label} in what they kept is {doubts[0]}; "
            f"in what they learned it is {doubts[1]}."
        )
    if kept == learned == "noise":
        return f"The differences between {a.label} and {b.label} are within the noise: their intervals overlap."
    if kept == learned:
        return f"{b.label} is {'ahead of' if kept == 'more' else 'behind'} {a.label} on both counts."
    if learned == "noise":
        return f"{b.label} kept {kept} than {a.label}; the difference in what they learned is {doubts[1]}."
    if kept == "noise":
        return f"{b.label} learned {learned} than {a.label}; the difference in what they kept is {doubts[0]}."
    ranks = {"more": "ahead", "less": "behind", "noise": "level, within the noise"}
    rank = ranks[_way(a.numbers["h_mean"], b.numbers["h_mean"])]
    return (
        f"{b.label} kept {kept} than {a.label} but learned {learned}: a trade-off. In the harmonic mean of source and "
        f"target {b.label} is {rank}."
    )


def headline(entries: list[Entry]) -> list[str]:
    """The result in a few sentences: what each entry learned and kept, and which differences are more than noise.

    Every entry is compared with the first. Of more than ``MANY`` the first sentence tells the one with the highest
    harmonic mean and the first, and the second the Pareto front.
    """
    task = listed(list(entries[0].target))
    first, *others = entries
    told, before, after = entries, "", []
    if len(entries) > MANY:
        top = max(entries, key=lambda entry: entry.numbers["h_mean"].value)
        told = [top, first] if top is not first else [top]
        before = f"Highest of {len(entries)} in the harmonic mean of source and target: "
        ahead = "; ".join(front(ends(entries)))
        after = [f"On the Pareto front, where no other equals or beats them on both counts: {ahead}."]
    said = [_learned(told[0], f" {task} to") + " of what the model knew" * (first.numbers["retention"].value >= 0)]
    said += [_learned(entry, "") for entry in told[1:]]
    sentences = [before + "; ".join(said) + ".", *after]
    for entry in entries:
        low = entry.numbers["gain"].low
        if low is not None and low <= 0:
            sentences.append(f"What {entry.label} gained on {task} is within the noise.")
    return sentences + [verdict(first, entry) for entry in others]


def spread(found: dict | None) -> str:
    """A rank correlation of drift with the loss of source accuracy, in words; nothing for none."""
    if found is None or found["runs"]["rho"] is None:
        return ""

    def known(number: dict) -> str:
        text = f"{number['rho']:.2f}".replace("-", "−")
        if number["low"] is not None:
            text += f" [{number['low']:.2f}, {number['high']:.2f}]".replace("-", "−")
        return text

    text = f"Spearman's rank correlation over {found['runs']['n']} runs: {known(found['runs'])}"
    if found["curve"] is not None and found["curve"]["rho"] is not None:
        text += f"; over the {found['curve']['n']} points of their curves: {known(found['curve'])}"
    return text + "."


def about_intervals(entries: list[Entry]) -> str:
    """How the intervals in the tables came about."""
    text = (
        f"In brackets: 95{SPACE}% intervals over the test items (Wilson's for a task, a paired bootstrap for the rest)"
    )
    if all(len(entry.runs) == 1 for entry in entries):
        text += ". They don't show how another seed of training would differ."
    else:
        text += (
            "; of a method with several seeds the mean, and an interval for seeds (Student's) and items together. "
            "Those with one seed don't show how another seed of training would differ."
        )
    return text + " Bold: the best method, where its interval is clear of all others."


def about_tests(reference: str) -> str:
    """What the tests in the tables are."""
    return (
        f"Beneath, as \u201c+3.1, p{SPACE}0.012\u201d: the mean difference from {reference} over the seeds that both "
        "have, and the p of a paired t-test of it, not corrected for the number of tests. With few seeds only large "
        "differences can be told from none."
    )
