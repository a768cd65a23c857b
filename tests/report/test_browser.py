"""The page in a real browser: it loads without a complaint, sorts, filters, and fits a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up import lora, run, two, write

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
  document.querySelector(`input[value=${name}]`)?.click();
  found.pictures[name] = shown();
}
found.disabled = document.querySelector("input[value=both]")?.disabled;
const boxes = [...document.querySelectorAll(".scroll")];
found.inside = boxes.every((box) => box.getBoundingClientRect().right <= innerWidth);
found.scrolling = boxes.filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.getAttribute("aria-label"));
found.overlapping = [];
for (const svg of document.querySelectorAll("svg")) {
  const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 2 && down > 5) found.overlapping.push([one, other]);
  }));
}
found.letters = [...document.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect().height);
found.width = [document.documentElement.scrollWidth, innerWidth];
found.paper = getComputedStyle(document.body).backgroundColor;
found.plot = getComputedStyle(document.querySelector("svg text")).fill;
const result = document.createElement("pre");
result.id = "found";
result.textContent = JSON.stringify(found);
parent.document.body.append(result);
</script>"""


def look(page: Path, folder: Path, width: int = 1200, dark: bool = False) -> dict:
    """What the probe found on ``page``, shown ``width`` pixels wide: in a frame, since no window is below 500."""
    text = page.read_text().replace("<head>", "<head>" + ERRORS, 1).replace("</body>", PROBE + "</body>", 1)
    folder.mkdir()
    if width < 500:
        frame = f"<iframe style='width: {width}px; height: 800px; border: 0' srcdoc=\"{html.escape(text)}\"></iframe>"
        text = f"<!doctype html><body>{frame}</body>"
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


@pytest.fixture
def crowded(tmp_path) -> Path:
    """Twelve methods with drift, curves and adapters, two of them with long names."""
    names = [f"m{i}" for i in range(10)] + [
        "a method with quite a long name",
        "another-one-whose-name-does-not-end-soon",
    ]
    paths = []
    for i, name in enumerate(names):
        drift = 0.01 * 2**i
        fields = {"drift": {"value": drift, "interval": [drift, drift], "n": 8}, "memory_bytes": 2e9}
        fields["training"] = [{"step": step, "loss": 3 - step / 40} for step in range(1, 41)]
        fields["curve"] = [
            {"strength": s, "source": 0.7 - s * i / 20, "target": 0.1 + s / 2, "drift": s * drift} for s in (0.0, 0.5)
        ]
        paths.append(write(tmp_path / str(i), run(name, (0.75 - i / 20, 0.5), 0.4 + i / 40, label=name, **fields)))
        lora(tmp_path / str(i), [0.1 + 0.02 * ((i + layer) % 30) for layer in range(30)])
    return report(paths, tmp_path / "out")


def test_many_methods_on_a_phone_and_on_a_desk(crowded, tmp_path):
    phone, desk = look(crowded, tmp_path / "phone", width=360), look(crowded, tmp_path / "desk", width=1100, dark=True)
    assert phone["width"][0] <= phone["width"][1] == 360  # the page itself does not scroll to the side
    assert phone["inside"]
    assert {"table", "heat map"} <= set(phone["scrolling"])  # but what is too wide does, in its box
    assert desk["width"][0] <= desk["width"][1]
    assert phone["overlapping"] == desk["overlapping"] == []
    assert min(phone["letters"]) >= 10  # pixels: maps do not shrink with the page, nor plots with their legends
    assert len(phone["first"]) == 13
    assert desk["gain"][0][-1] == "base model"


def test_light_dark_and_narrow(page, tmp_path):
    light, dark = look(page, tmp_path / "light", width=500), look(page, tmp_path / "dark", width=500, dark=True)
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(22, 23, 26)")
    assert light["plot"] != dark["plot"]
    assert light["width"][0] <= light["width"][1]  # tables scroll in themselves, the page does not
