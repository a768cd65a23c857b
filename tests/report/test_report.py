"""The page, the table and the JSON of made-up results: they stand alone, agree, and say what the numbers say."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_up import details, run, seeds, two, write

from lorasculpt.comparison.plan import Comparison
from lorasculpt.config import RunConfig
from lorasculpt.console import duration, size
from lorasculpt.errors import UserError
from lorasculpt.evaluation.correlation import drift_and_loss
from lorasculpt.report.page import gallery, report
from lorasculpt.report.plots import closer, drawn, fewer, legend, near, tradeoff
from lorasculpt.report.results import Number, against, best, entries, front, ours, over_seeds, read, reference
from lorasculpt.report.words import bracket, difference, headline, listed, one_by_one, percent, verdict

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are nested, and keeps the text and the addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.addresses = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [
            value for name, value in attributes if name in {"src", "href", "xlink:href", "srcset", "data"}
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.texts))


def test_the_page_stands_alone(tmp_path):
    path = report(write(tmp_path, *two()), tmp_path / "out")
    text = path.read_text()
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert page.addresses
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(ids)
    assert len(ids) == len(set(ids))
    assert '<meta name="viewport"' in text
    assert text.count("<figure>") == 2
    assert "#0102" not in text  # every place-holder has become a variable
    for variable in set(re.findall(r"var\((--[\w-]+)\)", text)):
        assert text.count(f"{variable}: ") == 2, f"{variable} is not defined for light and dark"


def test_a_remark_stands_beside_the_headline_everywhere(tmp_path):
    path = report(write(tmp_path, *two()), tmp_path / "out", "A slower one forgets less.")
    for name in ("report.html", "report.md", "report.json"):
        assert "A slower one forgets less." in path.with_name(name).read_text()


def test_the_same_results_give_the_same_bytes(tmp_path):
    results = write(tmp_path, *two())
    one, other = report(results, tmp_path / "one"), report(tmp_path, tmp_path / "other")
    for name in ("report.html", "report.md", "report.json"):
        assert (one.parent / name).read_bytes() == (other.parent / name).read_bytes()


def test_page_table_and_json_agree(tmp_path):
    path = report(write(tmp_path, *two()), tmp_path / "out")
    shown = Page(path.read_text()).text()
    table = path.with_suffix(".md").read_text()
    content = json.loads(path.with_suffix(".json").read_text())
    assert [method["label"] for method in content["methods"]] == ["LoRA", "sparse"]
    numbers = [n for method in content["methods"] for n in method["summary"].values()]
    numbers += [
        n
        for method in content["methods"]
        for task in method["source"].values()
        for n in (task["before"], task["after"])
    ]
    for number in numbers:
        if number not in [method["summary"]["gain"] for method in content["methods"]]:
            assert 0 <= number["low"] <= number["value"] <= number["high"]
        found = Number(**number)
        assert f"{percent(found.value)} {bracket(found)}" in shown
        assert bracket(found) in table
    for sentence in content["headline"]:
        assert sentence in shown
        assert sentence in table
    assert content["methods"][0]["summary"]["source_after"]["value"] == pytest.approx(0.25)
    assert content["methods"][0]["curve"][1]["source"] == {"value": 0.6, "low": 0.5, "high": 0.7}
    assert [point["strength"] for point in content["methods"][0]["curve"]] == [0, 0.5, 1]


def test_gallery(tmp_path):
    text = report(write(tmp_path, *two()), tmp_path / "out").read_text()
    assert "<b>Which</b>" not in text
    assert "&lt;b&gt;Which&lt;/b&gt; &amp; why?" in text
    assert "picture not found" in text
    shown = Page(text).text()
    assert "base model ✗ nine (wrong) LoRA ✓ 7 (right) sparse ✗ 1 (wrong)" in shown
    assert "base model ✓ Yes. (right) LoRA ✗ (nothing) (wrong)" in shown
    assert re.findall(r'<li class="([^"]*)"', text) == ["learned", "forgotten", "both"]
    assert "all (3) forgotten (1) learned (1) both right (1)" in shown


def test_only_the_source_is_forgotten(tmp_path):
    one = run("A", (0.3, 0.2), 0.6)
    answers = [("a_b", "1", "2"), ("digits", "1", "2"), ("digits", "1", "1"), ("a_b", "2", "1"), ("a_b", "2", "2")]
    one["gallery"] = [
        {"image": "0.png", "question": str(i), "answer": "1", "task": task, "base": base, "tuned": tuned}
        for i, (task, base, tuned) in enumerate(answers)
    ]
    text = report(write(tmp_path, one), tmp_path / "out").read_text()
    assert re.findall(r'<li class="([^"]*)"', text) == ["forgotten", "", "both", "learned", ""]


def test_markdown(tmp_path):
    table = report(write(tmp_path, *two()), tmp_path / "out").with_suffix(".md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines[:5]} == {8}
    assert lines[2].startswith("| base model | 70.0 [")
    assert "| LoRA | 25.0 [" in lines[3]
    assert any(line.startswith("| LoRA | 1 min 15 s |") and line.endswith("| 1.2 MB |") for line in lines)
    assert "| **60.0** [" in lines[4]  # source averages are far apart
    assert "**55.0**" not in lines[4]  # targets are not
    assert "**60.0**" not in lines[3]


def made(*runs: dict) -> list:
    return entries([one | {"folder": Path(), "versions": {}} for one in runs])


def test_headline():
    found = made(*two())
    assert headline(found) + one_by_one(found) == [
        "LoRA learned digits to 60\u00a0% and kept 36\u00a0% of what the model knew; "
        "sparse learned 55\u00a0% and kept 86\u00a0%.",
        "sparse kept more than LoRA; the difference in what they learned is within the noise (one seed each).",
    ]


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ((0.7, 0.5), 0.9, "B is ahead of A in what it kept and in what it learned (one seed each)."),
        ((0.1, 0.1), 0.2, "B is behind A in what it kept and in what it learned (one seed each)."),
        ((0.7, 0.5), 0.3, "B kept more than A but learned less: a trade-off (one seed each). In the harmonic mean"),
        ((0.1, 0.1), 0.9, "B kept less than A but learned more: a trade-off (one seed each)."),
        ((0.31, 0.21), 0.61, "within the noise, in what they kept and in what they learned (one seed each)."),
        (
            (0.1, 0.1),
            0.61,
            "B kept less than A; the difference in what they learned is within the noise (one seed each).",
        ),
        (
            (0.31, 0.21),
            0.2,
            "B learned less than A; the difference in what they kept is within the noise (one seed each).",
        ),
    ],
)
def test_verdict(source, target, words):
    a, b = made(run("A", (0.3, 0.2), 0.6), run("B", source, target))
    assert words in verdict(a, b)


def test_honest_when_nothing_is_known():
    plain = run("A", (0.3, 0.2), 0.6), run("B", (0.7, 0.5), 0.9)
    for one in plain:
        one["summary"] = {k: v for k, v in one["summary"].items() if not k.endswith("_interval")}
    assert "not known: intervals are missing" in one_by_one(made(*plain))[-1]
    assert "What A gained on digits is within the noise." in one_by_one(made(run("A", (0.8, 0.6), 0.11)))


def test_what_was_not_learned_is_not_said_to_be():
    nothing = run("A", (0.8, 0.6), 0.05)
    words = " ".join(headline(made(nothing, run("B", (0.8, 0.6), 0.6)))).replace("\u00a0", " ")
    assert words.startswith("A learned nothing of digits (5 %) and kept ")
    assert "; B learned 60 % and kept " in words


def test_nothing_to_keep(tmp_path):
    one = run("A", (0.3, 0.2), 0.6)
    one["summary"] |= {"retention": None, "retention_interval": None}
    path = report(write(tmp_path, one), tmp_path / "out")
    assert "A learned digits to 60\u00a0% and the base model knew none of the source." in path.read_text()
    assert json.loads(path.with_suffix(".json").read_text())["methods"][0]["summary"]["retention"]["value"] is None


def test_seeds(tmp_path):
    runs = [run("A", (0.3, 0.2), share, seed=seed, **details(0)) for seed, share in enumerate((0.5, 0.6, 0.7))]
    path = report(write(tmp_path, *runs, run("B", (0.7, 0.5), 0.6)), tmp_path / "out")
    first, second = json.loads(path.with_suffix(".json").read_text())["methods"]
    assert (first["seeds"], second["seeds"]) == ([0, 1, 2], [0])
    assert [one["target_after"]["value"] for one in first["by_seed"]] == [0.5, 0.6, 0.7]
    assert first["summary"]["target_after"]["value"] == pytest.approx(0.6)
    assert "A (3 seeds)" in path.read_text()
    assert "A, seed 2" in path.read_text()


def test_over_seeds():
    # mean 0.6, standard error 0.1 / sqrt(3), Student's t of two degrees of freedom 4.302653; items add 0.1 below
    number = over_seeds([Number(0.5, 0.4, 0.5), Number(0.6, 0.5, 0.6), Number(0.7, 0.6, 0.7)])
    half = 4.302653 * 0.1 / 3**0.5
    assert number.value == pytest.approx(0.6)
    assert (number.low, number.high) == pytest.approx((0.6 - (half**2 + 0.01) ** 0.5, 0.6 + half), abs=1e-6)
    many = over_seeds([Number(x) for x in np.linspace(0, 1, 12)])
    assert many.high - many.value == pytest.approx(2.201 * np.std(np.linspace(0, 1, 12), ddof=1) / 12**0.5, rel=1e-3)
    # no share lies outside 0 and 1, whatever two seeds say
    assert (over_seeds([Number(0.02), Number(0.9)]).low, over_seeds([Number(0.02), Number(0.9)]).high) == (0, 1)
    assert over_seeds([Number(0.02), Number(0.9)], -1.0, np.inf).high > 1


def test_settings_set_entries_apart():
    runs = [run("A", (0.3, 0.2), 0.6), run("A", (0.3, 0.2), 0.6), run("B", (0.3, 0.2), 0.6)]
    runs[1]["settings"] = {"r": 16, "seed": 0}
    assert [entry.label for entry in made(*runs)] == ["A r=8", "A r=16", "B"]


def test_what_sets_entries_apart_is_named_alone():
    runs = [run("A", (0.3, 0.2), 0.6), run("A", (0.3, 0.2), 0.6)]
    for one, rate in zip(runs, (1e-4, 2e-4), strict=True):
        one["settings"] = {"seed": 0, "training": {"lr": rate, "steps": 10}}
    assert [entry.label for entry in made(*runs)] == ["A training.lr=0.0001", "A training.lr=0.0002"]


def drifted(method: str, drift: float, target: float, seed: int = 0, **fields) -> dict:
    """A made-up run without source tasks, its drift known within a tenth, with a point of its curve."""
    one = run(method, (0.3, 0.2), target, seed, **details(0) | fields)
    for name in ("source_before", "source_after", "retention", "h_mean", "average"):
        one["summary"] |= {name: None, f"{name}_interval": None}
    half = {"strength": 0.5, "target": 0.4, "target_interval": [0.3, 0.5], "drift": 0.1, "drift_interval": [0.0, 0.2]}
    told = {"value": drift, "interval": [drift - 0.1, drift + 0.1], "n": 8}
    return one | {"source": {}, "curve": [half], "drift": told, "training": [{"step": 1, "loss": 3.0, "target": 0.2}]}


def test_without_source_what_is_kept_goes_by_drift(tmp_path):
    runs = [drifted("lora", drift, 0.6, seed) for seed, drift in enumerate((1.2, 1.4, 1.3))]
    runs += [drifted("lorasculpt", drift, 0.55, seed) for seed, drift in enumerate((0.3, 0.35, 0.4))]
    path = report(write(tmp_path, *runs), tmp_path / "out")
    content, markdown = (path.with_suffix(suffix).read_text() for suffix in (".json", ".md"))
    page = Page(path.read_text()).text()
    lora, sparse = json.loads(content)["methods"]
    kept = [math.exp(-drift) for drift in (1.2, 1.4, 1.3)]
    assert lora["summary"].keys() == {"kept", "target_before", "target_after", "gain"}
    assert [one["kept"]["value"] for one in lora["by_seed"]] == pytest.approx(kept)
    assert lora["by_seed"][0]["kept"]["low"] == pytest.approx(math.exp(-1.3))
    assert lora["curve"][0]["kept"] == {"value": 1.0, "low": None, "high": None}
    assert lora["curve"][1]["kept"] == pytest.approx({"value": math.exp(-0.1), "low": math.exp(-0.2), "high": 1.0})
    assert sparse["against"].keys() == {"kept", "target_after"}
    assert json.loads(content)["pareto"] == ["lora", "lorasculpt"]
    first = json.loads(content)["headline"][0].replace("\u00a0", " ")
    assert first == (
        "lora learned digits to 60 % and kept 27 % of the base's probability of its own texts; "
        "lorasculpt learned 55 % and kept 71 %."
    )
    assert "| Method | Kept (%) | Target (%) | Gain (points) | Drift (nats) |" in markdown
    assert "| base model | 100.0 | 10.0" in markdown
    assert "kept: probability of the base's own texts (%)" in page
    assert "source" not in (markdown + content + page).lower().replace('"source": {}', "")
    many = write(tmp_path, *(drifted(name, 0.5, 0.6) for name in "abcde"))
    assert len(headline(entries(read([many])))) == 2
    report(many, tmp_path / "many")
    bullets = [line for line in (tmp_path / "many" / "report.md").read_text().splitlines() if line[:2] == "- "]
    assert [line[2:] for line in bullets] == one_by_one(entries(read([many])))


def test_runs_with_and_without_source_are_reported_apart(tmp_path):
    mixed = write(tmp_path, drifted("lora", 0.5, 0.6), run("lorasculpt", (0.7, 0.5), 0.6))
    with pytest.raises(UserError, match=r"its tasks are not those of .*; report them apart"):
        read([mixed])
    nothing = drifted("lora", 0.5, 0.6)
    del nothing["drift"]
    with pytest.raises(UserError, match="run 1 has neither source tasks nor a drift"):
        read([write(tmp_path, nothing)])


def test_what_the_others_are_held_against_may_be_called_otherwise(tmp_path):
    runs = seeds("lora", [0.4, 0.45, 0.5], [0.6, 0.6, 0.6], label="baseline", **details(0))
    runs += seeds("lorasculpt", [0.5, 0.6, 0.7], [0.5, 0.5, 0.5], label="mine", **details(1))
    found = entries(read([write(tmp_path, *runs)]))
    assert (reference(found).label, ours(found).label) == ("baseline", "mine")
    told = report(write(tmp_path, *runs), tmp_path / "out").with_suffix(".md").read_text()
    assert "× baseline" in told
    assert "the mean difference from baseline" in told
    told = report(write(tmp_path, *runs[3:], run("dora", (0.3, 0.2), 0.6)), tmp_path / "none")
    for text in (told.read_text(), told.with_suffix(".md").read_text()):
        assert "None of these is trained by lora" in text


def test_front():
    assert front({"a": (0.1, 0.9), "b": (0.5, 0.5), "c": (0.5, 0.4), "d": (0.4, 0.4), "e": (0.9, 0.1)}) == [
        "a",
        "b",
        "e",
    ]
    assert front({"a": (0.5, 0.5), "b": (0.5, 0.5)}) == ["a", "b"]  # equals: neither beats the other


def test_tested_against_lora(tmp_path):
    runs = seeds("x", [0.5, 0.6, 0.7], [0.5, 0.5, 0.5]) + seeds("LoRA", [0.4, 0.45, 0.5], [0.6, 0.6, 0.6])
    tests = against(made(*runs, run("once", (0.7, 0.5), 0.5)))
    assert list(tests) == ["x"]  # not LoRA against itself, nor one seed
    found = tests["x"]["source_after"]
    differences = np.array([0.1, 0.15, 0.2])
    t = differences.mean() / (differences.std(ddof=1) / 3**0.5)
    # the distribution of t for two degrees of freedom has a closed form
    assert found["p"] == pytest.approx(1 - t / (2 + t**2) ** 0.5)
    assert found["difference"] == pytest.approx(0.15)
    assert difference(found) == "+15.0, p 0.035"
    assert difference(tests["x"]["target_after"]).startswith("−10.0, p ")
    assert difference({"difference": -0.1, "p": None}) == "−10.0, p –"
    assert difference({"difference": 0.1, "p": 1e-5}) == "+10.0, p < 0.001"
    path = report(write(tmp_path, *runs), tmp_path / "out")
    assert "+15.0, p 0.035" in Page(path.read_text()).text()
    assert "(+15.0, p 0.035)" in path.with_suffix(".md").read_text()
    assert "paired t-test" in path.with_suffix(".md").read_text()
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["methods"][0]["against"]["source_after"]["p"] == pytest.approx(found["p"])
    assert content["pareto"] == ["x", "LoRA"]
    assert against(made(*seeds("x", [0.5, 0.6], [0.5, 0.6]))) == {}


def test_the_paired_test_decides_where_there_is_one():
    """Wide intervals overlap, though every seed says the same."""
    a, b = made(*seeds("A", [0.3, 0.3], [0.4, 0.6]), *seeds("B", [0.3, 0.3], [0.3, 0.495]))
    assert not a.numbers["target_after"].separate(b.numbers["target_after"])
    assert verdict(a, b) == "B learned less than A (p 0.016); the difference in what they kept is within the noise."
    a, b = made(*seeds("A", [0.3, 0.3], [0.2, 0.2]), *seeds("B", [0.3, 0.3], [0.2, 0.3]))
    assert "within the noise, in what they kept and in what they learned (p 0.5" in verdict(a, b)
    a, b = made(*seeds("A", [0.3, 0.3], [0.2, 0.22]), run("B", (0.7, 0.5), 0.9))
    assert verdict(a, b).endswith("in what it kept and in what it learned (B: one seed).")


def test_what_too_few_seeds_cannot_tell_apart_is_not_called_noise():
    """Two seeds that agree on sixty points have p > 0.05; that is no sign that the difference is none."""
    a = seeds("A", [0.3, 0.3], [0.2, 0.2])
    a, b = made(*a, *seeds("B", [0.3, 0.3], [0.7, 0.95]))
    assert verdict(a, b) == (
        "Of A and B the difference in what they kept is within the noise; in what they learned they are not told apart "
        "by 2 seeds (p 0.126)."
    )
    a, b = made(a.runs[0], a.runs[1], *seeds("B", [0.7, 0.9], [0.7, 0.95]))
    assert verdict(a, b).startswith("A and B are not told apart by 2 seeds, in what they kept (p 0.126) and in what")
    a, b = made(*a.runs, *seeds("B", [0.5, 0.505], [0.7, 0.95]))
    assert verdict(a, b) == (
        "B kept more than A (p 0.008); in what they learned they are not told apart by 2 seeds (p 0.126)."
    )
    few, many = made(*seeds("few", [0.7, 0.7], [0.6, 0.95]), *seeds("many", [0.7, 0.7], [0.6, 0.65]))
    assert one_by_one([few])[0] == "What few gained on digits is not told from none by 2 seeds (p 0.161)."
    assert not any("gained" in sentence for sentence in one_by_one([many]))
    assert "within the noise" in one_by_one(made(*seeds("none", [0.7, 0.7], [0.1, 0.12])))[0]


def test_a_careful_lora_is_told_in_the_headline(tmp_path):
    """What somebody who looks at both numbers would have had instead."""
    runs = seeds("lora", [0.2, 0.21, 0.2], [0.8, 0.81, 0.82])
    careful = [one | {"label": "careful"} for one in seeds("lora", [0.7, 0.71, 0.7], [0.6, 0.61, 0.62])]
    runs += careful + seeds("lorasculpt", [0.7, 0.69, 0.7], [0.5, 0.52, 0.5])
    others = [one for name in "abcd" for one in seeds(name, [0.3, 0.31], [0.5, 0.52])]
    path = write(tmp_path, *runs, *others, name="compare.json")
    rates = {"lora": {"chosen": 1e-3}, "careful": {"chosen": 1e-4, "like": "lora", "by": "h_mean"}}
    about = {"table": [], "rates": rates, "validation": "evaluate.validation"}
    path.write_text(json.dumps(json.loads(path.read_text()) | about))
    found = entries(read([path]))
    told = headline(found)[-1]
    assert told.startswith(
        "Against a LoRA whose learning rate was chosen by both numbers: lorasculpt learned less than"
    )
    assert told.count("careful") == 1
    text = report(path, tmp_path / "out").read_text()
    assert text.index("Against a LoRA") < text.index("One by one against lora")
    assert "<dt>rate chosen by</dt><dd><code>h mean</code>" in text
    assert "<dt>rate chosen on</dt><dd><code>evaluate.validation</code>" in text
    assert not any("Against a LoRA" in sentence for sentence in headline(made(*runs)))


def test_many_are_told_by_the_best():
    sources = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.6, "e": 0.4}
    found = made(*(run(name, (source, source), 0.5) for name, source in sources.items()))
    words = headline(found)
    assert words[0].startswith("Highest of 5 in the harmonic mean of source and target: d learned digits to 50\u00a0%")
    assert "; a learned 50\u00a0%" in words[0]
    assert "b learned" not in words[0]
    assert words[1].endswith("on both counts: d.")
    assert len(words) == 2
    assert len(one_by_one(found)) == 4  # a against each other


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, each by its heads."""
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_curve_is_the_mean_of_those_that_there_are():
    """At every strength of any, along lines; a run without one, as of an adapter with one strength alone, adds none."""
    curves = [{0: 0.8, 0.5: 0.7, 1: 0.2}, {1: 0.0, 0: 0.8, 0.25: 0.6}, {}]
    runs = [
        run("a", (0.3, 0.2), 0.6, seed=seed)
        | {"curve": [{"strength": at, "source": kept, "target": at} for at, kept in curve.items()]}
        for seed, curve in enumerate(curves)
    ]
    (found,) = made(*runs)
    assert [point["strength"] for point in found.curve] == [0, 0.25, 0.5, 1]
    assert [point["source"].value for point in found.curve[1:3]] == pytest.approx([(0.75 + 0.6) / 2, (0.7 + 0.4) / 2])
    # its ends are the curves' own, of the questions that they are measured on; the base's and its own are of all
    assert [found.curve[i]["source"].value for i in (0, -1)] == pytest.approx([0.8, 0.1])
    assert [point["source"].value for point in (found.base, found.tuned)] == pytest.approx([0.7, 0.25])
    runs[1]["curve"].pop(0)  # of strengths beyond what it tells nothing is made up
    (found,) = made(*runs)
    assert [point["strength"] for point in found.curve] == [0, 0.25, 1]
    assert found.curve[-1] == found.tuned


def test_a_curve_of_fewer_questions_lies_beside_its_marks(tmp_path):
    curve = [
        {"strength": at, "source": source, "target": at / 2, "drift": at}
        for at, source in ((0, 0.5), (0.5, 0.45), (1, 0.2))
    ]
    told = {"curve": curve, "drift": {"value": 1.0, "interval": [0.9, 1.1], "n": 8}}
    one = run("A", (0.3, 0.2), 0.6, **told, evaluate={"curve": 100})
    path = report(write(tmp_path, one), tmp_path / "out")
    assert "| base model | 70.0 [" in path.with_suffix(".md").read_text()
    assert "<title>A: target 60.0 %, source 25.0 %</title>" in path.read_text()
    assert "A line is of fewer questions than" in path.read_text()
    assert "a mark for each run, small hollow ones along its curve" in path.read_text()
    plain = report(write(tmp_path / "plain", one | {"curve": []}), tmp_path / "plain" / "out").read_text()
    assert "Each line turns" not in plain
    assert "a mark for each run. " in plain
    content = json.loads(path.with_suffix(".json").read_text())
    assert [point["source"]["value"] for point in content["methods"][0]["curve"]] == [0.5, 0.45, 0.2]
    # the large one, and on the line all three, of which none is under the star; in the legend of the plot there is none
    assert len(marks(tradeoff(made(one)), "series-0")) == 4
    curve[0] |= {"source": 0.7, "target": 0.1}
    assert len(marks(tradeoff(made(one)), "series-0")) == 3
    assert not fewer(made(one | {"evaluate": {"curve": 400}}))  # there are no more
    assert not fewer(made(one | {"evaluate": {"curve": None}}))


def test_costs_and_drift(tmp_path):
    def drifted(value: float, **fields) -> dict:
        return {"drift": {"value": value, "interval": [value - 0.1, value + 0.1], "n": 8}, **fields}

    runs = [
        run("lora", (0.3, 0.2), 0.6, seconds=100.0, memory_bytes=2e9, memory_of="host", **drifted(0.9)),
        run("b", (0.5, 0.4), 0.6, seconds=150.0, memory_bytes=3e9, memory_of="host", trainable=12345, **drifted(0.5)),
        run("c", (0.7, 0.5), 0.6, seconds=50.0),
    ]
    runs[0]["curve"] = [{"strength": s, "source": 0.5, "target": 0.4, "drift": s} for s in (0.0, 0.5)]
    path = report(write(tmp_path, *runs), tmp_path / "out")
    blocks = path.with_suffix(".md").read_text().split("\n\n")
    numbers, costs = (
        {row["Method"]: row for row in cells(next(block for block in blocks if name in block))}
        for name in ("Drift (nats)", "Training time")
    )
    assert numbers["b"]["Drift (nats)"] == "0.500 [0.400, 0.600]"
    assert costs["b"]["Training time"] == "2 min 30 s (1.50\u00a0× lora)"
    assert costs["b"]["Peak memory"] == "3.0 GB"  # c's memory is unknown, so that they may not be alike
    assert costs["b"]["Weights trained"] == "12,345"
    assert (numbers["c"]["Drift (nats)"], costs["c"]["Peak memory"], costs["c"]["Weights trained"]) == ("–", "–", "–")
    text = path.read_text()
    assert "Spearman's rank correlation over 2 runs: 1.00" in Page(text).text()
    assert text.count("<figure>") == 2
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["drift"]["runs"]["rho"] == pytest.approx(1)
    assert content["methods"][1]["drift"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    path = report(write(tmp_path, *runs[:2]), tmp_path / "two")
    assert "3.0 GB (1.50\u00a0× lora)" in path.with_suffix(".md").read_text()
    assert "Compare times" not in path.read_text() + path.with_suffix(".md").read_text()
    # on another machine, neither time nor memory is in those of lora
    runs[1]["machine"] = "another"
    path = report(write(tmp_path, *runs[:2]), tmp_path / "apart")
    told = path.with_suffix(".md").read_text()
    assert "2 min 30 s |" in told
    assert "(1.50\u00a0× lora" not in told
    assert all("Compare times and peaks of memory only where" in text for text in (told, path.read_text()))
    # nor is there a time of one label over several precisions
    (mixed,) = made(
        *(run("b", (0.5, 0.4), 0.6, seed=n, seconds=9.0, precision=p) for n, p in enumerate(("bf16", "fp32")))
    )
    assert mixed.seconds is None


def test_the_order_of_runs_changes_no_interval(tmp_path):
    """The file of a comparison has them seed by seed, the page method by method."""
    runs = [
        run(label, (0.7 - i / 20, 0.5), 0.6, seed=seed, label=label, drift={"value": x, "interval": [x, x], "n": 8})
        for i, (seed, label, x) in enumerate(
            [(n // 3, "abc"[n % 3], x) for n, x in enumerate((0.1, 0.5, 0.2, 0.3, 0.9, 0.7, 0.4, 0.8, 0.6))]
        )
    ]
    known = drift_and_loss([one | {"curve": []} for one in runs])
    report(write(tmp_path, *runs), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["drift"] == known
    assert known["runs"]["low"] < known["runs"]["rho"] < 1


def compared(folder: Path, *labels: str, pictures: bool = True) -> Path:
    """A comparison as its command leaves it: the runs in the file without pictures, and with them in their folders."""
    settings = {
        "base": "x",
        "output": str(folder),
        "seed": 3,
        "method": {"name": "lora"},
        "methods": {label: {"name": "lora"} for label in labels},
        "data": {"train": "x.jsonl"},
        "evaluate": {"source": ["x.jsonl"], "target": ["x.jsonl"]},
    }
    folder.mkdir()
    (folder / "x.jsonl").touch()
    (folder / "x.yaml").write_text(json.dumps(settings))
    runs = []
    for i, planned in enumerate(Comparison(RunConfig.load(folder / "x.yaml"), None, 1, [2e-4]).tests()):
        about = {"label": planned.label, "settings": {"training": {"lr": planned.rate}}}
        runs.append(run("lora", (0.3, 0.2), 0.6, seed=3) | about)
        shown = [item | {"image": f"../../{item['image']}"} for item in details(i)["gallery"]]
        if pictures:
            write(planned.config.output, runs[-1] | {"gallery": shown})
    path = write(folder, *runs, name="compare.json")
    equal = {
        "target": 0.5,
        "source": {label: {"mean": 0.4 + i / 10, "low": None, "high": None} for i, label in enumerate(labels)},
        "left_out": ["weak"],
        "coarse": {"steep": [0], labels[0]: [1]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"table": [], "equal_target": equal}))
    return path


def test_pictures_of_a_comparison_are_in_its_runs_folders(tmp_path):
    text = report(compared(tmp_path / "c", "lora", "sparse"), tmp_path / "out").read_text()
    shown = Page(text).text()
    assert "base model ✗ nine (wrong) lora ✓ 7 (right) sparse ✗ 1 (wrong)" in shown
    assert "all (3) forgotten (1) learned (1) both right (1)" in shown
    assert 'src="data:image/png' in text
    assert "target score 50.0 %, which all of these reach" in shown.replace("\u00a0", " ")
    assert "of the most that is gained on the target: weak; for curves that have no points" in shown
    assert "close enough to this score: steep, lora (seed 1)." in shown
    assert re.search(r"lora 40\.0 sparse 50\.0", shown)


def test_a_comparison_without_its_folders(tmp_path):
    text = report(compared(tmp_path / "c", "lora", pictures=False), tmp_path / "out").read_text()
    assert "drawn by chance" not in text
    assert "No pictures are shown: the folders of the runs are not beside" in text


def test_pictures_of_another_run_are_not_shown(tmp_path):
    path = compared(tmp_path / "c", "lora")
    own = next((tmp_path / "c" / "test").rglob("results.json"))
    content = json.loads(own.read_text())
    content["runs"][0]["summary"]["source_after"] = 0.9
    own.write_text(json.dumps(content))
    assert "No pictures are shown" in report(path, tmp_path / "out").read_text()


def test_what_was_measured_on_the_way(tmp_path):
    way = [{"step": step, "drift": step / 10} for step in (0, 10, 20)]
    runs = two()
    text = report(write(tmp_path / "a", *runs), tmp_path / "out").read_text()
    assert "windows of steps; beneath it source average and target average, measured on the way." in text
    assert "drift (nats a token)" not in text
    runs[0]["training"] = runs[0]["training"] + way
    text = report(write(tmp_path / "b", *runs), tmp_path / "out").read_text()
    assert "beneath it source average and target average and drift, measured on the way." in text
    assert text.count(">drift (nats a token)<") == 1
    for one in runs:
        one["training"] = [row for row in one["training"] if "loss" in row]
    text = report(write(tmp_path / "c", *runs), tmp_path / "out").read_text()
    assert "as means over windows of steps." in text


def test_settings_are_those_of_the_run_and_of_its_file(tmp_path):
    settings = {"base": "org/base", "data": {"train": "/home/me/digits.jsonl", "limit": None}}
    settings["evaluate"] = {"source": ["/home/me/general.jsonl"], "limit": 60, "max_new_tokens": 12, "metric": {}}
    paths = [write(tmp_path / method, run(method, (0.3, 0.2), 0.6)) for method in ("a", "b")]
    for path in paths:
        (path.parent / "run.yaml").write_text(json.dumps(settings))
    text = report(paths, tmp_path / "out").read_text()
    assert text.count("<code>org/base</code>") == 1  # what all have in common is told once
    shown = Page(text).text()
    assert 'data {"train": "digits.jsonl"}' in shown
    assert 'evaluate {"source": ["general.jsonl"], "limit": 60, "max_new_tokens": 12}' in shown
    assert 'questions {"a_b": 200, "c": 200, "digits": 200}' in shown
    assert "/home/me" not in text
    paths[0].with_name("run.yaml").write_text("base: [")
    assert report(paths[:1], tmp_path / "out").read_text().count("<dt>base</dt>") == 0


def test_tasks_lie_across_for_many(tmp_path):
    runs = [run(name, (0.3 + i / 20, 0.5), 0.4, label=name) for i, name in enumerate("abcde")]
    text = report(write(tmp_path, *runs), tmp_path / "out").with_suffix(".md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| Method (%)"))
    assert "a b (source), 200\u00a0questions | c (source)" in head
    assert "| c | 40.0 [" in text
    assert "| base model | 80.0 [" in text


def test_questions_that_stand_or_fall_together_are_told(tmp_path):
    for number in (2, 5):
        runs = [run(name, (0.5, 0.5), 0.4, label=name) for name in "abcde"[:number]]
        alone = report(write(tmp_path, *runs), tmp_path / f"alone{number}").with_suffix(".md").read_text()
        for one in runs:
            one["target"]["digits"]["groups"] = 40
        text = report(write(tmp_path, *runs), tmp_path / f"out{number}").with_suffix(".md").read_text()
        assert ("digits (target), 200\u00a0questions in 40 groups" if number == 5 else "| 200 in 40 groups |") in text
        assert "where those of one picture, or one group, stand or fall together" in text
        assert "groups" not in alone
        assert "one group" not in alone


def marks(svg: str, series: str) -> list[tuple[float, float]]:
    """Where the marks of a series are: across and down."""
    places = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="[^"]*var\(--' + series + r"\)", svg)
    return [(float(x), float(y)) for x, y in places]


def test_every_point_of_the_trade_off_has_a_mark():
    runs = two()
    runs[0]["curve"] = [
        runs[0]["curve"][0] | {"strength": s, "target": 0.1 + s / 2, "source": 0.65} for s in (0.4, 0.8)
    ]
    svg = tradeoff(made(*runs))
    lora, sparse, base = marks(svg, "series-0"), marks(svg, "series-1"), marks(svg, "ink")
    assert (len(lora), len(set(lora)), len(sparse), len(base)) == (
        4,
        3,
        3,
        2,
    )  # ends have a second, large one; the base is in the legend too
    (x0, y0), (x1, y1) = max(base, key=lambda place: place[1]), max(lora)  # 10 and 70 %, 60 and 25 %
    middle = sorted(set(lora))[1]
    assert (middle[0] - x0) / (x1 - x0) == pytest.approx((0.5 - 0.1) / (0.6 - 0.1), abs=0.01)
    assert (middle[1] - y0) / (y1 - y0) == pytest.approx((0.65 - 0.7) / (0.25 - 0.7), abs=0.01)


def test_bars_are_within_the_axes():
    """The largest numbers have the widest bars: they are part of what the axes must show."""
    high = run("A", (0.5, 0.5), 0.5)
    high["summary"] |= {"source_after_interval": [0.2, 0.99], "target_after_interval": [0.3, 0.98]}
    svg = tradeoff(made(high))
    (down, up) = next(
        (float(a), float(b))
        for x, a, other, b in re.findall(r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) "[^>]*opacity: 0.45', svg)
        if x == other
    )
    box = re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', svg)[0]
    assert float(box[0]) < up < down < float(box[0]) + float(box[1])


def test_many_have_marks_and_one_legend_and_few_have_curves():
    shares = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
    found = made(*(one for x in shares for one in seeds(f"m{x}", [x, x - 0.02], [x, x - 0.02])))
    assert [found[i].label for i in drawn(found)] == ["m0.1", "m0.95"]  # the first, and the front
    svg = tradeoff(found)
    assert len(marks(svg, "series-5")) == 1
    # the first, of which only the ends are known: a large mark and two seeds, and no line; and the tenth
    assert len(marks(svg, "series-0")) == 3 + 1
    for entry in found:
        middle = {"strength": 0.5, "source": entry.curve[1]["source"], "target": entry.curve[1]["target"]}
        entry.curve.insert(1, middle)
    assert len(marks(tradeoff(found), "series-0")) == 5 + 1  # and two on the line
    assert (svg.count(">m0.1<"), svg.count(">m0.95<"), svg.count(">m0.5<")) == (1, 0, 0)
    assert closer(found).count(">m0.95<") == 1  # where there is room for it
    looks = [
        (item["colour"], item["mark"]) for item in legend(made(*(run(str(i), (0.3, 0.2), 0.6) for i in range(40))))
    ]
    assert len(set(looks)) == 40


def test_those_that_learned_and_kept_are_seen_closer():
    kept = [run(f"k{i}", (0.75 - i / 100, 0.7), 0.5 + i / 100) for i in range(4)]
    lost = [run(f"l{i}", (0.1, 0.1), 0.6) for i in range(4)]
    found = made(*kept, *lost)
    assert near(found) == [0, 1, 2, 3]
    svg = closer(found)
    assert [len(marks(svg, f"series-{i}")) for i in range(8)] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert re.findall(r">([kl]\d)</text>", svg) == ["k0", "k1", "k2", "k3"]
    assert "<title>k1: target 51.0 %, source 72.0 %</title>" in svg
    assert closer(made(*kept)) is None  # few are told apart without it
    assert closer(made(*kept[:2], *lost, *lost)) is None


def test_names_are_never_markup():
    svg = tradeoff(made(run('<b>"of s9', (0.5, 0.5), 0.5)))
    assert '<g class="of s0"><title>&lt;b&gt;&quot;of s9: target 50.0 %, source 50.0 %</title>' in svg
    assert "<b>" not in svg


def test_best():
    assert best([Number(0.2, 0.1, 0.3), Number(0.5, 0.4, 0.6)]) == 1
    assert best([Number(0.2, 0.1, 0.45), Number(0.5, 0.4, 0.6)]) is None
    assert best([Number(0.2), Number(0.5)]) is None
    assert best([Number(0.2, 0.1, 0.3)]) is None


def test_what_is_unknown_in_one_seed_is_unknown_over_all():
    """A base that knows nothing of the source has no retention."""
    found = over_seeds([Number(float("nan")), Number(float("nan"))])
    assert math.isnan(found.value)
    assert (found.low, found.high) == (None, None)


def test_a_run_too_short_for_a_log_entry_has_no_empty_plot(tmp_path):
    short = run("A", (0.3, 0.2), 0.6)
    short["training"] = [{"step": 8, "train_loss": 5.9}]
    assert "Training: the loss" not in report(write(tmp_path / "a", short), tmp_path / "out").read_text()
    short["training"].insert(0, {"step": 4, "loss": 6.0})
    assert "Training: the loss" in report(write(tmp_path / "a", short), tmp_path / "out").read_text()


def test_several_files_and_another_base(tmp_path):
    other = run("B", (0.3, 0.2), 0.6)
    other["summary"]["source_before"] = 0.5
    files = [write(tmp_path / "a", run("A", (0.3, 0.2), 0.6)), write(tmp_path / "b", other)]
    text = report(files, tmp_path / "out").read_text()
    assert "B starts from another base (source 50.0\u00a0% before training)" in text
    other["precision"] = "fp32"
    text = report([files[0], write(tmp_path / "b", other)], tmp_path / "out").read_text()
    assert "B ran in fp32 precision, A in another: the base answers a little differently there (source 50.0" in text
    files.append(write(tmp_path / "c", {**other, "method": "C", "label": "C"}))
    text = report(files, tmp_path / "out").read_text()
    assert text.count("B and C ran in fp32 precision, A in another") == text.count("precision, A in another") == 1
    assert "pictures, drawn by chance" not in text
    assert text.count("<figure>") == 1


def test_seeds_in_several_precisions_are_of_one_base(tmp_path):
    runs = [*seeds("A", [0.3, 0.3, 0.3], [0.5, 0.5, 0.5]), *seeds("B", [0.3, 0.3, 0.3], [0.6, 0.6, 0.6])]
    for one, precision in zip(runs, ("fp32", "fp32", "bf16", "bf16", "bf16", "fp32"), strict=True):
        one["precision"] = precision
        one["summary"]["source_before"] = 0.5 if precision == "bf16" else 0.6
    text = report(write(tmp_path / "a", *runs), tmp_path / "out").read_text()
    assert (
        "B ran in bf16 (2 of 3) and fp32 (1 of 3) precision, A in bf16 (1 of 3) and fp32 (2 of 3): the base answers a "
        "little differently there"
    ) in text
    runs[-1]["summary"]["source_before"] = 0.55
    text = report(write(tmp_path / "a", *runs), tmp_path / "out").read_text()
    assert "B starts from another base" in text


def test_refuses(tmp_path):
    with pytest.raises(UserError, match=r"results\.json: cannot be read"):
        report(tmp_path, tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        report(tmp_path / "bad.json", tmp_path)
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(UserError, match="schema 1"):
        report(tmp_path / "old.json", tmp_path)
    with pytest.raises(UserError, match="no runs"):
        read([write(tmp_path, name="empty.json")])
    lacking = run("A", (0.3, 0.2), 0.6)
    del lacking["summary"]["gain"]
    with pytest.raises(UserError, match="run 1 has no 'gain'"):
        read([write(tmp_path, lacking)])
    other = run("A", (0.3, 0.2), 0.6)
    other["target"] = {"flags": other["target"]["digits"]}
    with pytest.raises(UserError, match="tasks are not those"):
        read([write(tmp_path, run("A", (0.3, 0.2), 0.6), other)])


@pytest.mark.parametrize(
    ("part", "value"),
    [("source", None), ("target", []), ("summary", None), ("summary", 1), ("curve", [{"strength": 0.5}]), ("curve", 3)],
)
def test_a_run_that_is_not_whole_is_refused(tmp_path, part, value):
    with pytest.raises(UserError, match=f"run 1 has no '{part}'"):
        report(write(tmp_path, run("A", (0.3, 0.2), 0.6, **details(0)) | {part: value}), tmp_path / "out")


@pytest.mark.parametrize("runs", [[1], None, {"a": 1}, "runs"])
def test_runs_that_are_none_are_refused(tmp_path, runs):
    path = write(tmp_path)
    path.write_text(json.dumps({"schema": 1, "versions": {}, "runs": runs}))
    with pytest.raises(UserError, match=r"results\.json: (run 1 has no|its runs are no list)"):
        report(path, tmp_path / "out")


# --- which runs are one method --------------------------------------------------------------------------------------


def shown(*files: Path) -> dict[str, list[int]]:
    return {entry.label: entry.seeds for entry in entries(read(files))}


def test_a_run_that_is_in_two_files_counts_once(tmp_path):
    kinds = ("lora", [0.3, 0.5, 0.4], [0.6, 0.7, 0.8]), ("sparse", [0.7, 0.6, 0.6], [0.5, 0.5, 0.6])
    runs = [one for kind in kinds for one in seeds(*kind)]
    whole, half = write(tmp_path / "a", *runs), write(tmp_path / "b", *runs[:2])
    once, twice = entries(read([whole])), entries(read([whole, half]))
    assert [entry.numbers for entry in twice] == [entry.numbers for entry in once]
    assert against(twice) == against(once)


def test_other_data_questions_and_edits_are_other_methods(tmp_path):
    def at(name: str, **fields) -> Path:
        return write(tmp_path / name, run("lora", (0.3, 0.2), 0.6, **fields))

    assert shown(at("a", data="x"), at("b", data="y", seed=1)) == {"lora (a)": [0], "lora (b)": [1]}
    assert shown(at("a", questions="x"), at("b", questions="y", seed=1)) == {"lora (a)": [0], "lora (b)": [1]}
    assert shown(at("a", data="x"), at("b", seed=1), at("c", data="x", seed=2)) == {"lora": [0, 1, 2]}
    half, more = ({"edit": "dare", "p": p, "seed": seed} for seed, p in enumerate((0.5, 0.9)))
    files = at("a", edit=half), at("b", edit=half | {"seed": 1}, seed=1), at("c", edit=more, seed=2)
    assert shown(*files) == {"lora (a)": [0, 1], "lora (c)": [2]}


def test_the_runs_of_a_file_stay_together(tmp_path):
    few = write(tmp_path / "a", *seeds("lora", [0.3, 0.4], [0.6, 0.7]))
    many = write(tmp_path / "b", *seeds("lora", [0.5, 0.5, 0.3, 0.2], [0.6, 0.7, 0.8, 0.9]))
    assert shown(few, many) == {"lora (a)": [0, 1], "lora (b)": [0, 1, 2, 3]}
    assert shown(many, few) == {"lora (b)": [0, 1, 2, 3], "lora (a)": [0, 1]}
    called = write(tmp_path / "c", *seeds("lora", [0.3, 0.4], [0.6, 0.7], label="mine"))
    assert shown(called, few) == {"mine": [0, 1]}  # a comparison, and the folders of its runs


def test_another_run_of_the_same_seed_is_set_apart(tmp_path):
    files = [write(tmp_path / name, *seeds("lora", [0.3, s], [0.6, 0.7])) for name, s in (("a", 0.4), ("b", 0.5))]
    assert shown(*files) == {"lora (a)": [0, 1], "lora (b)": [1]}


def test_no_two_entries_have_one_name(tmp_path):
    called = write(tmp_path / "a", run("lora", (0.7, 0.5), 0.9, label="lora"))
    alone = write(tmp_path / "b", run("lora", (0.3, 0.2), 0.2))
    content = json.loads(called.read_text())
    both = tmp_path / "b" / "compare.json"
    both.write_text(json.dumps(content))
    assert list(shown(called, alone)) == ["lora (a)", "lora (b)"]
    assert list(shown(both, alone)) == ["lora (compare)", "lora (b)"]
    other = write(tmp_path / "c" / "a", run("lora", (0.6, 0.5), 0.8))
    third = write(tmp_path / "d" / "a", run("lora", (0.6, 0.5), 0.7))
    assert list(shown(called, other, third)) == ["lora (a)", "lora (a) 2", "lora (a) 3"]


def test_seeds_of_another_base_are_told(tmp_path):
    runs = seeds("A", [0.3, 0.3], [0.6, 0.6])
    runs[1]["summary"]["source_before"] -= 0.002  # of another machine
    assert "different bases" not in report(write(tmp_path, *runs), tmp_path / "out").read_text()
    runs[1]["summary"]["source_before"] = 0.2
    text = report(write(tmp_path, *runs), tmp_path / "out").read_text()
    assert "The runs of A start from different bases (source 70.0\u00a0% and 20.0\u00a0% before training)" in text


@pytest.mark.parametrize("labels", [2, 5])
def test_other_questions_are_told(tmp_path, labels):
    names = "ABCDE"[:labels]
    runs = [run(name, (0.3, 0.2), 0.6, questions="x") for name in names]
    assert "other questions" not in report(write(tmp_path, *runs), tmp_path / "out").read_text()
    runs[-1]["questions"] = "y"
    text = report(write(tmp_path, *runs), tmp_path / "out").read_text()
    assert f"{names[-1]} was asked other questions than A: compare with care." in text
    del runs[-1]["questions"]
    runs[-1]["target"]["digits"]["n"] = 20
    text = report(write(tmp_path, *runs), tmp_path / "out").read_text()
    assert f"{names[-1]} was asked other questions than A: compare with care." in text
    assert "20 or 200" in text


def test_a_loss_is_no_noise(tmp_path):
    bad = run("A", (0.3, 0.2), 0.0)
    bad["summary"] |= {"gain": -0.1, "gain_interval": [-0.16, -0.05]}
    text = report(write(tmp_path, bad), tmp_path / "out").read_text()
    assert "A lost on digits, where it was to learn." in text
    assert "noise" not in text.partition("</header>")[0]


def test_a_picture_of_the_target_is_not_forgotten(tmp_path):
    one = run("A", (0.3, 0.2), 0.6)
    one["target"] = {"a_b": one["target"]["digits"]}
    picture = {"image": "0.png", "question": "q", "answer": "7", "task": "a_b", "base": "7", "tuned": "8"}
    for side, groups in (("target", []), ("source", ["forgotten"])):
        one["gallery"] = [picture | {"side": side}]
        assert [item["groups"] for item in gallery(entries(read([write(tmp_path, one)])))] == [groups]


def test_words():
    assert percent(0.8414) == "84.1"
    assert percent(-0.032) == "−3.2"
    assert percent(float("nan")) == "–"
    assert percent(-0.0001) == "0.0"
    assert bracket(Number(0.5, 0.4, 0.6)) == "[40.0, 60.0]"
    assert [duration(s) for s in (9.6, 75, 3700, None)] == ["10 s", "1 min 15 s", "1 h 01 min", "–"]
    assert [size(n) for n in (12, 1234, 2.5e6, 3e9, None)] == ["12 B", "1.2 kB", "2.5 MB", "3.0 GB", "–"]
    assert listed(["a_b", "c", "d"]) == "a b, c and d"
