"""The page in a real browser: it loads without a complaint, sorts by click and by key, and filters its pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up import run, two, write

from lorasculpt.report import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

ERRORS = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)), true);
</script>"""
PROBE = """<script>
const found = { errors };
const names = (table) => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
const heads = document.querySelector("table").tHead.rows[0].cells;
const buttons = [...heads].map((head) => head.querySelector("button"));
const table = document.querySelector("table");
const click = (column) => (buttons[column].click(), [names(table), heads[column].getAttribute("aria-sort")]);
found.first = names(table);
found.source = [click(1), click(1)];
found.gain = click(4);
found.name = click(0);
found.sorted = [...heads].filter((head) => head.hasAttribute("aria-sort")).length;
buttons[2].focus();
found.focused = document.activeElement === buttons[2] && buttons[2].tabIndex === 0;
const visible = (item) => getComputedStyle(item).display !== "none";
const shown = () => [...document.querySelectorAll(".gallery li")].map(visible);
found.pictures = {};
for (const name of ["forgotten", "learned", "all"]) {
  document.querySelector(`input[value=${name}]`).click();
  found.pictures[name] = shown();
}
found.disabled = document.querySelector("input[value=both]").disabled;
found.width = [document.documentElement.scrollWidth, innerWidth];
found.paper = getComputedStyle(document.body).backgroundColor;
found.plot = getComputedStyle(document.querySelector("svg text")).fill;
const result = document.createElement("pre");
result.id = "found";
result.textContent = JSON.stringify(found);
document.body.append(result);
</script>"""


def look(page: Path, folder: Path, width: int = 1200, dark: bool = False) -> dict:
    """What the probe found on ``page``, shown ``width`` pixels wide."""
    text = page.read_text().replace("<head>", "<head>" + ERRORS, 1).replace("</body>", PROBE + "</body>", 1)
    folder.mkdir()
    (folder / "inner.html").write_text(text)
    options = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=2000"]
    options += ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    options.append(f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    command = [BROWSER, *options, (folder / "inner.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL).group(1))
    assert found["errors"] == []
    return found


@pytest.fixture
def page(tmp_path) -> Path:
    return report(write(tmp_path, *two(), run("Another", (0.5, 0.4), 0.2)), tmp_path / "out")


def test_sorts_and_filters(page, tmp_path):
    found = look(page, tmp_path / "look")
    assert found["first"] == ["base model", "LoRA", "sparse", "Another"]
    assert found["source"] == [
        [["base model", "sparse", "Another", "LoRA"], "descending"],
        [["LoRA", "Another", "sparse", "base model"], "ascending"],
    ]
    # the base has no gain: it stays last
    assert found["gain"] == [["LoRA", "sparse", "Another", "base model"], "descending"]
    assert found["name"] == [["Another", "base model", "LoRA", "sparse"], "ascending"]
    assert found["sorted"] == 1
    assert found["focused"]
    assert found["pictures"] == {"forgotten": [False, True], "learned": [True, False], "all": [True, True]}
    assert found["disabled"]


def test_light_dark_and_narrow(page, tmp_path):
    light, dark = look(page, tmp_path / "light", width=500), look(page, tmp_path / "dark", width=500, dark=True)
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(22, 23, 26)")
    assert light["plot"] != dark["plot"]
    assert light["width"][0] <= light["width"][1]  # tables scroll in themselves, the page does not
