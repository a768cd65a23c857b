"""Numbers as text, and the sentences that say what they mean."""

from __future__ import annotations

import math
from collections import Counter

from ..console import NONE
from .results import (
    NEAR,
    REFERENCE,
    Entry,
    Number,
    compared,
    ends,
    equalled,
    front,
    gained,
    made_on,
    ours,
    reference,
    way,
)

TEXTS = "the base's probability of its own texts"  # what is kept where no source is known
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
    """0.0123 -> 'p 0.012', 0.0001 -> 'p < 0.001'."""
    if p is None:
        return f"p {NONE}"
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}"


def difference(test: dict | None) -> str:
    """A paired test: '+3.1, p 0.012'; nothing for none, and a dash for the p of differences that are all equal."""
    if test is None:
        return ""
    points = percent(test["difference"])
    return f"{'' if points[0] == '−' else '+'}{points}, {chance(test['p'])}"


def times(value: float | None, other: float | None, label: str) -> str:
    """How often the ``other``, of ``label``, goes into ``value``: '1.27 × lora'; nothing where it is not known."""
    return f"{value / other:.2f}{SPACE}× {label}" if value is not None and other else ""


def listed(names: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'; underscores become spaces."""
    names = [name.replace("_", " ") for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _learned(entry: Entry, task: str = "") -> str:
    """What an entry learned of ``task``, which goes without saying where it is not given, and kept."""
    reached = f"{percent(entry.numbers['target_after'].value, 0)}{SPACE}%"
    if entry.numbers["gain"].value <= 0:
        said = f"learned nothing{' of ' * bool(task)}{task} ({reached})"
    else:
        said = f"learned {task}{' to ' * bool(task)}{reached}"
    share = entry.numbers[entry.share].value
    kept = "the base model knew none of the source" if math.isnan(share) else f"kept {percent(share, 0)}{SPACE}%"
    return f"{entry.label} {said} and {kept}"


def _tested(a: Entry, b: Entry, name: str) -> str:
    """The p of the paired test of ``name`` in parentheses; nothing where there is none."""
    test = compared(b, a, name)
    return "" if test is None or test["p"] is None else f" ({chance(test['p'])})"


def _seeds(a: Entry, b: Entry) -> str:
    """Which of the two has one seed alone, in parentheses: what is said of them is of these runs."""
    once = [entry.label for entry in (a, b) if len(entry.runs) == 1]
    if not once:
        return ""
    return " (one seed each)" if len(once) == 2 else f" ({once[0]}: one seed)"


def verdict(a: Entry, b: Entry) -> str:
    """What the difference between two entries is worth: a win, a loss, a trade-off, noise, or more than can be told.

    One rule for all of them (`lorasculpt.report.results.way`): the paired test over the seeds that both have, and
    without it their intervals.
    """
    ways = {"kept": way(a, b, a.share), "learned": way(a, b, "target_after")}
    kept, learned = ways.values()
    if kept is None or learned is None:
        return f"Whether {a.label} and {b.label} differ by more than noise is not known: intervals are missing."
    tests = {"kept": _tested(a, b, a.share), "learned": _tested(a, b, "target_after")}
    once, apart = _seeds(a, b), f"not told apart by {len(set(a.seeds) & set(b.seeds))} seeds"
    noise, unsure = ([what for what in ways if ways[what] == worth] for worth in ("noise", "unsure"))
    within = [f"the difference in what they {what} is within the noise{tests[what]}" for what in noise]
    within += [f"in what they {what} they are {apart}{tests[what]}" for what in unsure]
    in_both = f"in what they kept{tests['kept']} and in what they learned{tests['learned']}{once}."
    if len(noise) == 2:
        return f"The differences between {a.label} and {b.label} are within the noise, {in_both}"
    if len(unsure) == 2:
        return f"{a.label} and {b.label} are {apart}, {in_both}"
    if len(within) == 2:
        return f"Of {a.label} and {b.label} {'; '.join(within)}{once}."
    if learned in ("noise", "unsure"):
        return f"{b.label} kept {kept} than {a.label}{tests['kept']}; {within[0]}{once}."
    if kept in ("noise", "unsure"):
        return f"{b.label} learned {learned} than {a.label}{tests['learned']}; {within[0]}{once}."
    if kept == learned:
        rank = "ahead of" if kept == "more" else "behind"
        told = f"in what it kept{tests['kept']} and in what it learned{tests['learned']}"
        return f"{b.label} is {rank} {a.label} {told}{once}."
    trade = f"{b.label} kept {kept} than {a.label}{tests['kept']} but learned {learned}{tests['learned']}: a trade-off"
    if not a.source:
        return f"{trade}{once}."
    ranks = {"more": "ahead", "less": "behind", "noise": "level, within the noise", "unsure": apart}
    rank = ranks.get(way(a, b, "h_mean") or "", "of unknown rank")
    both = f"In the harmonic mean of source and target {b.label} is {rank}{_tested(a, b, 'h_mean')}"
    return f"{trade}{once}. {both}."


def headline(entries: list[Entry]) -> list[str]:
    """The result in a few sentences: what each entry learned and kept, and what matters most of how they differ.

    Of more than ``MANY`` the first sentence tells the one with the highest harmonic mean, if there is a source, and the
    first, and the second the Pareto front. Where the learning rate of a LoRA was chosen by source and target together,
    what stands for ``OURS`` is held against it: what a method is worth shows beside someone who looks at both numbers.
    """
    task = listed(list(entries[0].target))
    first = entries[0]
    told, before, after = entries, "", []
    if len(entries) > MANY:
        told, before = [first], f"Of {len(entries)}: "
        if first.source:
            top = max(entries, key=lambda entry: entry.numbers["h_mean"].value)
            told = [top, first] if top is not first else [top]
            before = f"Highest of {len(entries)} in the harmonic mean of source and target: "
        ahead = "; ".join(front(ends(entries)))
        after = [f"On the Pareto front, where no other equals or beats them on both counts: {ahead}."]
    known = "what the model knew" if first.source else TEXTS
    said = [_learned(told[0], task) + f" of {known}" * (first.numbers[first.share].value >= 0)]
    said += [_learned(entry) for entry in told[1:]]
    own = ours(entries)
    for entry in entries:
        if own is not None and entry.runs[0].get("chosen_by") == "h_mean" and entry.runs[0]["method"] == REFERENCE:
            after.append(f"Against a LoRA whose learning rate was chosen by both numbers: {verdict(entry, own)}")
    return [before + "; ".join(said) + ".", *after]


def one_by_one(entries: list[Entry]) -> list[str]:
    """Which gains are within the noise or not told from none, and every entry against the first."""
    task = listed(list(entries[0].target))
    sentences = []
    for entry in entries:
        worth = gained(entry)
        if worth == "noise":
            sentences.append(f"What {entry.label} gained on {task} is within the noise.")
        elif worth == "loss":
            sentences.append(f"{entry.label} lost on {task}, where it was to learn.")
        elif isinstance(worth, dict):
            told = f"not told from none by {worth['n']} seeds ({chance(worth['p'])})"
            sentences.append(f"What {entry.label} gained on {task} is {told}.")
    return sentences + [verdict(entries[0], entry) for entry in entries[1:]]


def by_heart(run: dict) -> str:
    """Which questions of a run it was trained on, where there are any and the run says so."""
    asked: Counter[str] = Counter()
    for side in ("source", "target"):
        asked.update({task: entry["n"] for task, entry in run[side].items()})
    told = [f"{count} of {asked[task]} questions of {task}" for task, count in (run.get("trained_on") or {}).items()]
    return f"Also in the training data, and so perhaps memorised: {listed(told)}." if told else ""


def unread(equal: dict) -> str:
    """Whose curves are not known well enough to be read at equal target, of a results file; nothing for none.

    A label of which other runs are read has its seeds beside it.
    """
    return ", ".join(
        f"{label} (seed {', '.join(map(str, seeds))})" if label in equalled(equal) else label
        for label, seeds in equal.get("coarse", {}).items()
    )


def not_compared(equal: dict) -> str:
    """Who is not compared at equal target, and why, of a results file; nothing where all are."""
    few, coarse = ", ".join(equal.get("left_out", ())), unread(equal)
    told = [f"for gaining less than {100 * NEAR:.0f} % of the most that is gained on the target: {few}"] if few else []
    told += [f"for curves that have no points close enough to this score: {coarse}"] if coarse else []
    return f"Left out there {'; '.join(told)}." if told else ""


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
    text = f"In brackets: 95{SPACE}% intervals over the test items (Wilson's for a task; the others follow from those)"
    tasks = [task for entry in entries for side in (entry.source, entry.target) for task in side.values()]
    if any(task["groups"] for task in tasks):
        text += ", where those of one picture, or one group, stand or fall together as far as they do here"
    if all(len(entry.runs) == 1 for entry in entries):
        text += ". They don't show how another seed of training would differ."
    else:
        text += (
            "; of a method with several seeds the mean, and an interval for seeds (Student's) and items together. "
            "Those with one seed don't show how another seed of training would differ."
        )
    return text + " Bold: the best method, where its interval is clear of all others."


def about_costs(entries: list[Entry]) -> str:
    """What times and peaks of several can be held against, and which compare; nothing where that needs no words."""
    known = reference(entries)
    if known is None:
        alone = f"None of these is trained by {REFERENCE}: nothing is tested against it, no time or memory told in its."
        return alone if len(entries) > 1 else ""
    if len({made_on(run) for entry in entries for run in entry.runs}) == 1:
        return ""
    return (
        f"Compare times and peaks of memory only where one is told in {known.label}'s, as \u201c1.12{SPACE}× "
        f"{known.label}\u201d: the others are of another machine or precision, and no time is told over runs of "
        "several."
    )


def about_tests(reference: str) -> str:
    """What the tests in the tables are."""
    return (
        f"Beneath, as \u201c+3.1, p{SPACE}0.012\u201d: the mean difference from {reference} over the seeds that both "
        "have, and the p of a paired t-test of it, not corrected for the number of tests. With few seeds only large "
        "differences can be told from none."
    )
