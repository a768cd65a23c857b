"""The page in a real browser: it loads without a complaint, sorts, filters, and fits a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_up import lora, run, two, write
from PIL import Image

from lorasculpt.report.page import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser; install the system package chromium")

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
for (const name of ["forgotten", "learned", "both", "all"]) {
  document.querySelector(`input[value=${name}]`)?.click();
  found.pictures[name] = shown();
}
const [, second] = document.querySelectorAll(".legend button");
const pale = () => [...new Set([...document.querySelectorAll(".of")].filter((each) => each.matches(".pale")).map(
  (each) => each.classList[1]))].sort();
const did = (does) => (does(), pale());
found.alone = [
  did(() => second.dispatchEvent(new Event("pointerenter"))),
  did(() => second.dispatchEvent(new Event("pointerleave"))),
  did(() => second.click()),
  did(() => second.dispatchEvent(new Event("pointerleave"))),
  did(() => second.click()),
];
found.told = [...document.querySelectorAll(".of.s1 > title")].map((title) => title.textContent);
found.disabled = [...document.querySelectorAll(".filters input")].filter((each) => each.disabled).length;
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
const folds = () => [...document.querySelectorAll("details")].map((each) => each.open);
const around = (event) => (dispatchEvent(new Event(event)), folds());
document.querySelector("details").open = true;
found.folds = [folds(), around("beforeprint"), around("afterprint")];
found.letters = [...document.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect().height);
found.width = [document.documentElement.scrollWidth, innerWidth];
found.paper = getComputedStyle(document.body).backgroundColor;
found.plot = getComputedStyle(document.querySelector("svg text")).fill;
const result = document.createElement("pre");
result.id = "found";
result.textContent = JSON.stringify(found);
parent.document.body.append(result);
</script>"""


def browse(text: str, folder: Path, width: int, dark: bool, what: str) -> str:
    """What Chromium says, told to do ``what`` with a page ``width`` pixels wide: in a frame, below a window's 500."""
    folder.mkdir()
    if width < 500:
        frame = f"<iframe style='width: {width}px; height: 900px; border: 0' srcdoc=\"{html.escape(text)}\"></iframe>"
        text = f"<!doctype html><body style='margin: 0'>{frame}</body>"
    (folder / "inner.html").write_text(text)
    options = [f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},900"]
    options += ["--virtual-time-budget=2000", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr", what]
    command = [BROWSER, *options, (folder / "inner.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def look(page: Path, folder: Path, width: int = 1200, dark: bool = False) -> dict:
    """What the probe found on ``page``."""
    text = page.read_text().replace("<head>", "<head>" + ERRORS, 1).replace("</body>", PROBE + "</body>", 1)
    dump = browse(text, folder, width, dark, "--dump-dom")
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', dump, re.DOTALL).group(1))
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
    shown = {"forgotten": [False, True, False], "learned": [True, False, False], "both": [False, False, True]}
    assert found["pictures"] == shown | {"all": [True, True, True]}
    assert found["disabled"] == 0


def test_numbers_in_names_are_sorted_by_their_size(tmp_path):
    names = ["m-10", "d-0.5", "d-0.2", "m-9", "d-0.05", "d-2e-05", "d-0.02", "d"]
    runs = [run(name, (0.5, 0.4), 0.2 + i / 20) for i, name in enumerate(names)]
    found = look(report(write(tmp_path, *runs), tmp_path / "out"), tmp_path / "look")
    in_order = ["base model", "d", "d-2e-05", "d-0.02", "d-0.05", "d-0.2", "d-0.5", "m-9", "m-10"]
    assert found["name"] == [in_order, "ascending"]


def test_a_name_in_the_legend_is_seen_alone(page, tmp_path):
    found = look(page, tmp_path / "look")
    assert found["alone"] == [["s0", "s2"], [], ["s0", "s2"], ["s0", "s2"], []]
    assert set(found["told"]) == {"sparse: target 55.0 %, source 60.0 %", "sparse, seed 0"}


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
    phone, desk = look(crowded, tmp_path / "phone", width=360), look(crowded, tmp_path / "desk", width=1200, dark=True)
    assert phone["width"][0] <= phone["width"][1] == 360  # the page itself does not scroll to the side
    assert phone["inside"]
    assert {"table", "heat map"} <= set(phone["scrolling"])  # but what is too wide does, in its box
    assert desk["width"][0] <= desk["width"][1]
    assert set(desk["scrolling"]) <= {"heat map"}  # and on a desk every table shows its last column
    assert phone["overlapping"] == desk["overlapping"] == []
    assert min(phone["letters"]) > 9.9  # pixels: maps do not shrink with the page, nor plots with their legends
    assert len(phone["first"]) == 13
    assert desk["gain"][0][-1] == "base model"


def test_on_paper_every_column_is_seen_and_nothing_is_folded(crowded, tmp_path):
    text = crowded.read_text()
    assert text.count("@media print") == 1
    crowded.write_text(text.replace("@media print", "@media all"))
    paper = look(crowded, tmp_path / "look", width=718)  # A4 and Letter within their margins
    assert paper["width"][0] <= paper["width"][1]
    assert paper["scrolling"] == []
    first, printed, afterwards = paper["folds"]
    assert first[0]
    assert not all(first)
    assert all(printed)
    assert afterwards == first


def test_light_dark_and_narrow(page, tmp_path):
    light, dark = look(page, tmp_path / "light", width=500), look(page, tmp_path / "dark", width=500, dark=True)
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(22, 23, 26)")
    assert light["plot"] != dark["plot"]
    assert light["width"][0] <= light["width"][1]  # tables scroll in themselves, the page does not


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1200, False)])
def test_a_picture_of_the_page(page, tmp_path, width, dark):
    picture = tmp_path / "page.png"
    browse(page.read_text(), tmp_path / "look", width, dark, f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (max(width, 500), 900))
        shown = np.asarray(image.convert("L").crop((0, 0, width, 900)), int)
    paper = int(np.bincount(shown.ravel()).argmax())
    assert (paper < 40) == dark  # most of it is paper
    ink = abs(shown - paper) > 100
    assert 0.01 < ink.mean() < 0.3
    assert all(ink[top : top + 300].any() for top in (0, 300, 600))  # down to its end
