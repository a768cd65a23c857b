"""The shape of the house, read from the source without running it: who may import whom, and what nobody may do."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PACKAGE = "lorasculpt"
METHODS = f"{PACKAGE}.methods"


def module_name(path: Path) -> str:
    """``src/lorasculpt/ops/masks.py`` is ``lorasculpt.ops.masks``; a package's ``__init__.py`` is the package."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Every import, wherever it stands, as (absolute name, line). ``from a import b`` is ``a.b``."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def under(name: str, *packages: str) -> bool:
    """Whether ``name`` is one of ``packages`` or lies inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


PATHS = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in PATHS.items()}
IMPORTS = {module: list(imports(tree, module, PATHS[module].stem == "__init__")) for module, tree in TREES.items()}
CONCRETE = [module for module in TREES if module.startswith(f"{METHODS}.")]  # one module per published method


# Who may import whom, as the table in docs/design.md says: each names some of those above it, None is all of them.
SMALL = ("errors", "files", "console")  # which everybody but ops may import
HOUSE: dict[tuple[str, ...], tuple[str, ...] | None] = {
    SMALL: (),
    ("config", "reference", "provenance", "memory"): (),
    ("ops",): (),
    ("data",): (),
    ("models",): ("memory", "data"),
    ("adapters",): ("ops", "models.parts"),
    ("methods",): ("ops", "adapters", "models.parts"),
    ("kinds", "overview", "switch"): ("reference", "adapters", "methods"),
    ("evaluation",): ("adapters", "data", "models"),
    ("inspect",): ("ops", "adapters", "data", "models", "evaluation"),
    ("report",): ("adapters", "data", "evaluation", "inspect"),
    ("hub", "card"): ("config", "adapters", "report"),
    ("export",): ("provenance", "adapters", "models", "kinds", "inspect", "hub"),
    ("posthoc",): ("provenance", "ops", "adapters", "data", "models", "evaluation", "export"),
    ("corda", "run"): (
        *("config", "provenance", "memory", "adapters", "data", "models", "methods", "kinds", "evaluation"),
    ),
    ("train", "asked", "measure", "sequence", "dial", "play"): (
        *("config", "provenance", "adapters", "data", "models", "switch", "evaluation"),
        *("hub", "card", "posthoc", "run"),
    ),
    ("compare", "comparison"): (
        *("config", "provenance", "adapters", "kinds", "evaluation", "report", "posthoc", "run"),
        *("hub", "train", "measure", "sequence"),
    ),
    ("demo",): None,
    ("cli", "cli_posthoc"): None,
}


def place(module: str, line: int) -> str:
    return f"{PATHS[module].relative_to(ROOT)}:{line}"


def offending(modules: str, allowed: tuple[str, ...]) -> list[str]:
    """The imports in ``modules`` that are neither ``allowed`` nor of the standard library."""
    return [
        f"{place(module, line)} imports {name}"
        for module in TREES
        if under(module, modules)
        for name, line in IMPORTS[module]
        if not under(name, *allowed) and name.split(".")[0] not in sys.stdlib_module_names
    ]


# --- arrows ---------------------------------------------------------------------------------------------------------


def test_ops_import_torch_alone():
    assert offending(f"{PACKAGE}.ops", ("torch", f"{PACKAGE}.ops")) == []


def test_methods_import_ops_adapters_errors_and_the_names_of_parts():
    parts = ("ops", "adapters", "errors", "models.parts")
    allowed = ("torch", "peft", METHODS, *(f"{PACKAGE}.{part}" for part in parts))
    assert offending(METHODS, allowed) == []


def test_no_method_imports_another():
    wrong = [
        f"{place(module, line)} imports {name}"
        for module in CONCRETE
        for name, line in IMPORTS[module]
        if under(name, METHODS)
    ]
    assert wrong == []


def test_only_the_registry_and_the_demo_import_a_method_by_name():
    wrong = [
        f"{place(module, line)} imports {name}"
        for module in TREES
        if not under(module, METHODS, f"{PACKAGE}.demo")
        for name, line in IMPORTS[module]
        if under(name, *CONCRETE)
    ]
    assert wrong == []


def test_nobody_asks_which_method_it_is():
    """A method's difference is told by its class; ``if method == "spider"`` outside its file is where flags begin."""
    names = {module.rpartition(".")[2] for module in CONCRETE}
    wrong = []
    for module, tree in TREES.items():
        if under(module, METHODS, f"{PACKAGE}.demo"):
            continue
        for node in ast.walk(tree):
            compared = [*node.comparators, node.left] if isinstance(node, ast.Compare) else []
            compared += [node.value] if isinstance(node, ast.MatchValue) else []
            constants = [leaf.value for item in compared for leaf in ast.walk(item) if isinstance(leaf, ast.Constant)]
            found = [name for name in constants if name in names]
            if "full" in found and "projector" in ast.unparse(node):  # a value of that setting as well
                found.remove("full")
            wrong += [f"{place(module, node.lineno)} compares with {name!r}" for name in found]
    assert wrong == []


@pytest.mark.parametrize("row", HOUSE, ids="-".join)
def test_a_part_of_the_house_imports_what_its_row_names(row):
    above = [name for other in list(HOUSE)[: list(HOUSE).index(row)] for name in other]
    named = HOUSE[row] if HOUSE[row] is not None else above
    assert [name for name in named if name.partition(".")[0] not in above] == []  # so that there is no circle
    allowed = [f"{PACKAGE}.{name}" for name in (*row, *named, *(SMALL if row != ("ops",) else ()))]
    wrong = [
        f"{place(module, line)} imports {name}"
        for module in TREES
        if under(module, *(f"{PACKAGE}.{name}" for name in row))
        for name, line in IMPORTS[module]
        if under(name, PACKAGE) and not under(name, *allowed)
    ]
    assert wrong == []


def test_words_and_numbers_of_a_report_come_without_its_drawing():
    plain = ("", ".results", ".words", ".sequences")
    drawn = {name for module in plain for name, _ in IMPORTS[f"{PACKAGE}.report{module}"]}
    assert not [name for name in drawn if under(name, "matplotlib", "jinja2", f"{PACKAGE}.report.page")]


def test_every_module_is_in_the_house():
    there = {module.split(".")[1] for module in TREES if module not in (PACKAGE, f"{PACKAGE}.__main__")}
    assert there == {name for row in HOUSE for name in row}


def test_the_page_has_the_rows_of_the_house():
    def names(cell: str) -> tuple[str, ...]:
        found = re.findall(r"`([^`]+)`", cell)
        return tuple(name.removesuffix("/").removesuffix(".py").replace("/", ".") for name in found)

    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page.split("| part | holds | imports |")[1].partition("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    told = {names(part): None if allowed.startswith("all above") else names(allowed) for part, _, allowed in cells}
    assert list(told.items()) == list(HOUSE.items())


def test_nothing_imports_the_command_line():
    cli = f"{PACKAGE}.cli"
    wrong = [
        f"{place(module, line)} imports {name}"
        for module in TREES
        if not under(module, cli, f"{PACKAGE}.__main__")
        for name, line in IMPORTS[module]
        if under(name, cli)
    ]
    assert wrong == []


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom . import c\nfrom ..ops import masks\ndef f():\n    from .. import cli\n"
    found = {name for name, _ in imports(ast.parse(source), "lorasculpt.methods.spider")}
    assert found == {"a.b", "lorasculpt.methods.c", "lorasculpt.ops.masks", "lorasculpt.cli"}
    found = {name for name, _ in imports(ast.parse("from .spider import X"), METHODS, is_package=True)}
    assert found == {"lorasculpt.methods.spider.X"}


# --- what nobody may do ---------------------------------------------------------------------------------------------


def test_no_pickle():
    """Weights are safetensors; a foreign .pth is read with ``weights_only=True`` or not at all."""
    wrong = []
    for module, tree in TREES.items():
        wrong += [
            f"{place(module, line)} imports {name}"
            for name, line in IMPORTS[module]
            if under(name, "pickle", "cPickle", "dill", "cloudpickle", "joblib", "torch.load", "torch.save")
        ]
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("torch.load", "torch.save"):
                continue
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if ast.unparse(call.func) == "torch.save" or given.get("weights_only") != "True":
                wrong.append(f"{place(module, call.lineno)} calls {ast.unparse(call)}")
    assert wrong == []


def test_public_functions_and_classes_have_docstrings():
    wrong = [
        f"{place(module, node.lineno)}: {node.name} has no docstring"
        for module, tree in TREES.items()
        for node in ast.iter_child_nodes(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert wrong == []


def test_every_module_says_what_it_is():
    empty = [module for module, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert empty == []


# --- pages ----------------------------------------------------------------------------------------------------------

PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if path.exists()]


def test_readme_is_short():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    assert len(readme.read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_pages_compiles_and_imports_what_exists(page):
    """Every ```python block is Python, and each name that it imports from this library is there."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if block[1].lstrip().startswith(">>>"):
            continue  # a session; `make check` runs it
        where = f"{page.name}:{text.count(chr(10), 0, block.start()) + 1}"
        tree = ast.parse(block[1], filename=where)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if under(alias.name, PACKAGE):
                        importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and under(node.module or "", PACKAGE):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert missing == [], f"{where}: {node.module} has no {missing}"
