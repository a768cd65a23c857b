"""Tasks learned in turn, on the page: the accuracy matrix of every method, and what it comes to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_up import run, write

from lorasculpt.comparison.sequences import table
from lorasculpt.errors import UserError
from lorasculpt.report.page import report
from lorasculpt.report.sequences import headline, matrix_table, read, split
from lorasculpt.sequence import transfer


def matrix(folder: Path, method: str, shares: list[list[float]], seed: int = 0, **fields) -> Path:
    """``matrix.json`` of the tasks charts and flags, of a base and what was learned, in the last column the source."""
    folder.mkdir()
    after = [None, "charts", "flags"]
    rows = [{"after": a, "accuracy": row[:2], "source": row[2]} for a, row in zip(after, shares, strict=False)]
    record = {"schema": 1, "versions": {}, "method": method, "seed": seed, "tasks": ["charts", "flags"], "rows": rows}
    path = folder / "matrix.json"
    path.write_text(json.dumps(record | {"switches": []} | fields))
    return path


SHARES = [[0.1, 0.2, 0.8], [0.9, 0.25, 0.7], [0.5, 0.75, 0.6]]


def test_a_page_of_matrices_alone(tmp_path):
    one = matrix(tmp_path / "a", "lora", SHARES, average=0.7, backward=-0.4)
    matrix(tmp_path / "b", "am_lora", SHARES[:2])
    text = report([one, tmp_path / "b"], tmp_path / "out").read_text()
    assert "<title>Learned in turn: charts and flags</title>" in text
    assert "lora has 62\u00a0% on average (−40.0 points since each was learned)" in text  # (.5 + .75) / 2
    assert "Not everything is learned yet: am_lora has learned 1 of 2 tasks." in text
    assert "am_lora has 90" not in text
    assert "The numbers" not in text
    rows = re.findall(r'<tr><th scope="row">after flags</th>(.*?)</tr>', text)
    assert [re.findall(r">([\d.]+)<", row) for row in rows] == [["50.0", "75.0", "60.0"]]
    assert "color-mix(in srgb, var(--series-0) 34%, transparent)" in rows[0]  # .75 of the strongest tint, 45 %
    table = (tmp_path / "out" / "report.md").read_text()
    assert "| after flags | 50.0 | 75.0 | 60.0 |" in table
    assert re.search(r"\| lora \|.* 80\.0 \| 60\.0 \|\n\| am_lora \|.* 80\.0 \| – \|\n", table)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [found["label"] for found in content["sequences"]] == ["lora", "am_lora"]


def test_nothing_is_said_of_the_last_task_before_it_is_learned(tmp_path):
    one = matrix(tmp_path / "a", "lora", SHARES[:2])
    assert headline(read([one])) == ["Not everything is learned yet: lora has learned 1 of 2 tasks."]


def test_beside_results(tmp_path):
    results = write(tmp_path / "r", run("A", (0.3, 0.2), 0.6))
    text = report([results, matrix(tmp_path / "a", "lora", SHARES)], tmp_path / "out").read_text()
    assert "The numbers" in text
    assert "Tasks learned in turn" in text
    assert "<title>Learned and kept: digits</title>" in text


def test_a_comparison_of_sequences(tmp_path):
    runs = [
        {"label": "a", "method": "lora", "seed": seed, "lr": 1e-3, "steps": [1, 1]}
        | {"matrix": [row[:2] for row in rows], "source": [row[2] for row in rows]}
        | transfer([row[:2] for row in rows])
        | {"source_before": 0.8, "source_after": 0.6, "seconds": 1.0, "trainable": 1, "adapter_bytes": 1}
        for seed, rows in enumerate((SHARES, [*SHARES[:2], [0.7, 0.95, 0.6]]))
    ]
    record = {"schema": 1, "complete": True, "versions": {}, "tasks": ["charts", "flags"], "sequences": runs}
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(record | {"table": table(runs)}))
    report(path, tmp_path / "out")
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert not any("missing" in line for line in lines)
    assert "| after flags | 60.0 | 85.0 | 60.0 |" in lines
    whole = next(line for line in lines if line.startswith("| a (2 seeds)")).split(" | ")
    assert whole[1].startswith("72.5 [")  # of .625 and .825
    assert whole[3].startswith("−30.0 [")  # charts from .9 to .5 and to .7
    path.write_text(json.dumps(record | {"table": table(runs), "complete": False}))
    assert headline(read([path]))[1:] == [
        "Before the first, the base had 15\u00a0%.",
        "Some sequences of the comparison are still missing: these numbers may change.",
    ]


def test_of_many_the_best_and_the_first_beside_it_are_told(tmp_path):
    ends = {"lora": [0.5, 0.75], "olora": [0.3, 0.3], "am_lora": [0.6, 0.75]}
    paths = [matrix(tmp_path / m, m, [*SHARES[:2], [*end, 0.6]], backward=end[0] - 0.9) for m, end in ends.items()]
    told = "am_lora has 68\u00a0% on average (−30.0 points since each was learned); lora has 62\u00a0% on average"
    assert headline(read(paths)) == [
        f"Highest of 3 after charts and flags, learned in turn: {told} (−40.0 points since each was learned).",
        "Before the first, the base had 15\u00a0%.",
    ]
    assert "; olora has 30\u00a0% on average" in headline(read(paths[:2]))[0]  # two are both told
    paths.append(matrix(tmp_path / "d", "mosld", SHARES[:2]))
    assert headline(read(paths))[2] == "Not everything is learned yet: mosld has learned 1 of 2 tasks."


def test_labels_tell_runs_apart(tmp_path):
    paths = [matrix(tmp_path / name, "lora", SHARES, seed) for name, seed in (("a", 0), ("b", 1), ("c", 1))]
    assert [found["label"] for found in read(paths)] == ["lora, seed 0", "lora, seed 1 (b)", "lora, seed 1 (c)"]


def test_without_source(tmp_path):
    (found,) = read([matrix(tmp_path / "a", "lora", [[0.1, 0.2, None], [0.9, 0.2, None]])])
    assert matrix_table(found)["rows"][1]["cells"][2]["text"] == "–"


def test_a_folder_of_results_is_not_one_of_a_matrix(tmp_path):
    path = matrix(tmp_path / "a", "lora", SHARES)
    assert split([tmp_path / "a"]) == ([], [path])
    write(tmp_path / "a", run("A", (0.3, 0.2), 0.6))
    assert split([tmp_path / "a"]) == ([tmp_path / "a"], [])


def test_another_base_is_told(tmp_path):
    other = [[share + 0.1 for share in SHARES[0]], *SHARES[1:]]
    files = [matrix(tmp_path / name, "lora", shares) for name, shares in (("a", SHARES), ("b", SHARES), ("c", other))]
    said = "That of lora, seed 0 (c) had another share: another base, or other questions."
    assert said in report(files, tmp_path / "out").read_text()
    assert "another share" not in report(files[:2], tmp_path / "out").read_text()


@pytest.mark.parametrize("part", ["seed", "method", "rows"])
def test_a_matrix_that_is_not_whole_is_refused(tmp_path, part):
    path = matrix(tmp_path / "a", "lora", SHARES)
    content = json.loads(path.read_text())
    content[part] = None
    if part != "rows":
        del content[part]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"matrix\.json: is not whole"):
        report(path, tmp_path / "out")


def test_refuses(tmp_path):
    with pytest.raises(UserError, match="no task has been learned yet"):
        report(matrix(tmp_path / "a", "lora", SHARES[:1]), tmp_path / "out")
    other = matrix(tmp_path / "b", "lora", SHARES, tasks=["charts", "maps"])
    with pytest.raises(UserError, match="its tasks are not those of"):
        report([matrix(tmp_path / "c", "lora", SHARES), other], tmp_path / "out")
