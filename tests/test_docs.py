"""Pages that are made from the code, and code that is made from a paper: neither may fall behind the other."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from typer.main import get_command

from lorasculpt import METHODS
from lorasculpt.cli import app
from lorasculpt.comparison import labels
from lorasculpt.config import RunConfig
from lorasculpt.run.model import check_method

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def equations():
    return runpy.run_path(str(ROOT / "scripts" / "equations"))


@pytest.fixture(scope="module")
def pages():
    return runpy.run_path(str(ROOT / "scripts" / "pages"))


# --- every equation is cited where it is computed -------------------------------------------------------------------

PAPER = r'''r"""A method.

.. math::
    y &= a x \tag{1} \\
    z &= y + b \tag{2} \\
    w &= z^2 \tag{3}
"""


class Layer:
    """Equations (1) to (3) on one linear."""

    def forward(self, x):
        y = self.a * x  # (1)
        z = self.b + y  # (2): (rows, out)
        return self.square(z)

    def square(self, z):
        """w of equation (3)."""
        return z**2
'''


def test_the_equations_of_all_methods_are_cited(equations, capsys):
    assert equations["main"]([]) == 0, capsys.readouterr().out


def test_a_citation_is_a_comment_or_the_docstring_of_a_function(equations):
    assert list(equations["mistakes"](PAPER)) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("  # (1)", "", ["4: equation (1) is cited by no line that computes it"]),
        ("w of equation (3).", "w.", ["6: equation (3) is cited by no line that computes it"]),
        ("# (2):", "# f(2):", ["5: equation (2) is cited by no line that computes it"]),
        ("# (1)", "# (1), (4)", ["14: there is no equation (4) in the docstring"]),
        ("(1) to (3)", "(2) to (4)", ["11: there is no equation (4) in the docstring"]),
        (
            r"\tag{3}",
            r"\tag{2}",
            [
                "6: equation (2) is there twice",
                "11: there is no equation (3) in the docstring",
                "19: there is no equation (3) in the docstring",
            ],
        ),
    ],
)
def test_what_is_missing_is_told_with_its_line(equations, old, new, found):
    assert old in PAPER
    assert [f"{line}: {what}" for line, what in sorted(equations["mistakes"](PAPER.replace(old, new)))] == found


def test_the_file_is_named_and_the_exit_code_is_1(equations, tmp_path, capsys):
    path = tmp_path / "paper.py"
    path.write_text(PAPER.replace("  # (1)", ""))
    assert equations["main"]([str(path)]) == 1
    assert capsys.readouterr().out == f"{path}:4: equation (1) is cited by no line that computes it\n"
    path.write_text('"""No equations."""\n')
    assert equations["main"]([str(path)]) == 1


# --- docs/methods ---------------------------------------------------------------------------------------------------


def test_the_pages_are_those_that_scripts_methods_docs_writes(pages):
    assert pages["stale"]() == [], "run scripts/pages"


def test_a_page_that_is_changed_missing_or_left_over_is_stale(pages, tmp_path, monkeypatch):
    folder = tmp_path / "docs"
    for name, value in (("ROOT", tmp_path), ("PAGES", folder)):
        monkeypatch.setitem(pages["main"].__globals__, name, value)
    assert pages["main"]([]) == 0
    assert pages["main"](["--check"]) == 0
    (folder / "lorasculpt.md").write_text("by hand")
    (folder / "README.md").unlink()
    (folder / "gone.md").write_text("of a method that is no more")
    assert pages["stale"]() == ["docs/README.md", "docs/gone.md", "docs/lorasculpt.md"]
    assert pages["main"](["--check"]) == 1
    assert pages["main"]([]) == 0
    assert pages["stale"]() == []


@pytest.mark.parametrize("method", METHODS)
def test_a_page_shows_every_equation_and_every_setting(pages, method):
    config, text = METHODS[method], pages["page"](METHODS[method])
    blocks = re.findall(r"```math\n(.*?)```", text, re.DOTALL)
    tags = [int(number) for block in blocks for number in re.findall(r"\\tag\{(\d+)\}", block)]
    assert tags == list(range(1, len(tags) + 1))
    assert tags
    for block in blocks:
        assert block.count("{") == block.count("}")
        begun, ended = (re.findall(rf"\\{word}\{{(.*?)\}}", block) for word in ("begin", "end"))
        assert sorted(begun) == sorted(ended)
        assert (begun[0], ended[-1]) == ("align*", "align*")
        assert "operatorname" not in block  # GitHub refuses it
    own = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(LoraConfig)
    }
    assert all(f"| `{name}` |" in text for name in own - {"tasks"})
    assert f"](https://arxiv.org/abs/{re.search(r'eprint = .(.*?).,', text)[1]})" in text


def test_papers_become_bibtex(pages):
    def entry(text):
        return pages["bibtex"]("some_method", pages["PAPER"].match(text).groupdict())

    published = entry("Li et al., *On: LoRA*, Findings of NAACL 2025, arXiv 2410.22782. It is good.")
    assert published.startswith(
        "@inproceedings{li2025somemethod,\n  title = {{On: LoRA}},\n  author = {Li and others},"
    )
    assert "  booktitle = {Findings of NAACL},\n  year = {2025},\n  eprint = {2410.22782}," in published
    preprint = entry("Li and Wu, *On LoRA*, arXiv 2409.19611.")
    assert preprint.startswith("@misc{li2024somemethod,")
    assert "author = {Li and Wu}" in preprint
    assert "booktitle" not in preprint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("LoRAMoE: ", "LoRAMoE, ", "Name: idea"),
        ("arXiv 2312.09979", "on arXiv", "arXiv NNNN"),
        (".. math::", "math:", "an equation"),
        ("Where the official code", "The official code", "official code"),
    ],
)
def test_a_docstring_that_lacks_something_is_refused(pages, monkeypatch, old, new, message):
    module = sys.modules[METHODS["loramoe"].__module__]
    assert old in module.__doc__
    monkeypatch.setattr(module, "__doc__", module.__doc__.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        pages["page"](METHODS["loramoe"])


def test_restructured_text_becomes_markdown(pages):
    source = "``a < b``, :class:`Context`, :math:`x < |y|`, 1 < 2"
    assert pages["markdown"](source) == "`a < b`, `Context`, $`x < |y|`$, 1 &lt; 2"


# --- what a user types or writes ------------------------------------------------------------------------------------


def fenced(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_every_command_can_be_typed(page, tmp_path):
    (tmp_path / "run.yaml").write_text("base: a/b\noutput: out\ndata: {train: a.jsonl}\n")
    lines = [line for block in fenced(page, "sh") for line in block.splitlines() if line.startswith("lorasculpt ")]
    assert len(lines) > 5
    for line in lines:
        command, words = get_command(app), shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"):
            command, words = command.commands[words[0]], words[1:]
        given = command.make_context(line, words).params  # options that there are, arguments that are needed
        RunConfig.load(tmp_path / "run.yaml", given.get("overrides") or [])


OTHERS = {  # of other programs
    *("--cpu", "--no-deps", "--only-binary", "--dest", "--quiet"),  # accelerate launch and pip download
    *("--enable-lora", "--max-lora-rank", "--lora-modules", "--mm-processor-kwargs"),  # vllm serve
    "--shm-size",  # docker run
}


def options(command) -> set[str]:
    """All options of a command and of those under it."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*map(options, getattr(command, "commands", {}).values()))


def test_every_option_that_the_code_names_is_there():
    known = options(get_command(app)) | OTHERS
    assert {"--dry-run", "--no-deps"} <= known
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} names {option}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for option in re.findall(r"(?<![\w-])(?<!var\()--[a-z](?:[a-z-]*[a-z])?\b", node.value)
        if option not in known and option != "--no"  # the beginning of one
    ]
    assert wrong == []


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_every_file_can_be_read(page, tmp_path):
    blocks = fenced(page, "yaml")
    whole = yaml.safe_load(blocks[0])
    for block in blocks:
        for part in re.split(r"^# or .*$", block, flags=re.MULTILINE):
            settings = whole | yaml.safe_load(part)
            if "sequence" not in settings["data"]:
                settings["data"] = whole["data"] | settings["data"] | {"general": "general.jsonl"}
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
            config = RunConfig.load(tmp_path / "run.yaml")
            check_method(config)
            labels.read(config, list(config.methods), 3, (2e-4, 5e-4))
