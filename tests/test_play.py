"""The local page: what its panel answers, that the base stays what it was, and the page itself over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import urllib.request
import zlib
from pathlib import Path

import pico
import pytest
import torch
import yaml
from commands import refused
from peft import get_peft_model
from safetensors.torch import save_file

from lorasculpt import UserError
from lorasculpt.adapters.load import PROJECTOR_FILE
from lorasculpt.config import RunConfig
from lorasculpt.data.records import read
from lorasculpt.evaluation import answer
from lorasculpt.kinds import KINDS
from lorasculpt.models.load import load
from lorasculpt.models.parts import target_regex
from lorasculpt.play import Panel, examples, play

ONLY = Path(sys.prefix) / "only-play"  # where scripts/setup puts Gradio
QUESTION = "What color is the shape?"


def save(folder: Path, base: Path, method: str = "lora", **settings) -> Path:
    """An adapter that visibly changes what the tiny model says."""
    model, _ = load(base)
    settings = {"r": 4, "lora_alpha": 8, **settings}
    model = get_peft_model(model, KINDS[method](target_modules=target_regex(model, "language"), **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def base(pico_folder) -> Path:
    return pico_folder("llava")


def test_each_answers_for_itself(base, tmp_path, data):
    adapters = {"lora": save(tmp_path / "a", base), "tasks": save(tmp_path / "b", base, "mtl_lora", tasks=["x", "y"])}
    record = read(data)[0]
    model, processor = load(base)
    known = answer(model, processor, [record], max_new_tokens=8)[0]
    panel = Panel(str(base), adapters)
    plain, lora, tasks = panel.answerers

    def said(answerer, **options):
        return panel.answer(answerer, QUESTION, record.images[0], max_new_tokens=8, **options)

    assert panel.sees
    assert (lora.tasks, lora.adjustable, tasks.tasks, tasks.adjustable) == ((), True, ("x", "y"), True)
    assert said(plain) == known != said(lora)
    assert said(lora, by=0) == known == said(tasks, by=0, task="x")
    assert said(tasks, task="y") != known
    assert said(plain) == known  # and is none of the others' business
    with pytest.raises(UserError, match=r"evaluate[.]as_task"):
        said(tasks)
    with pytest.raises(UserError, match="write a question"):
        panel.answer(plain, " ")
    weights = dict(plain.model.named_parameters())
    shared = {id(weight) for weight in weights.values()} & {id(weight) for weight in lora.model.parameters()}
    assert len(shared) == len(weights)  # one base in memory


@pytest.mark.parametrize("moved", ["projector", "pissa"])
def test_what_changes_the_base_changes_a_copy(base, tmp_path, moved):
    folder = save(tmp_path / "a", base, **({"init_lora_weights": "pissa"} if moved == "pissa" else {}))
    before = {name: weight.clone() for name, weight in load(base)[0].named_parameters()}
    if moved == "projector":
        projector = {name: torch.randn_like(weight) for name, weight in before.items() if "projector" in name}
        save_file(projector, folder / PROJECTOR_FILE)
    plain, tuned = Panel(str(base), {"a": folder}).answerers
    assert not tuned.adjustable
    for name, weight in plain.model.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_adapters_see_pictures_as_they_were_trained_to_or_are_not_shown_together(base, tmp_path):
    adapters = {name: save(tmp_path / name, base) for name in ("as base", "plainly")}
    load(base, image_processor={"do_normalize": False})[1].image_processor.save_pretrained(adapters["plainly"])
    panel = Panel(str(base), {"plainly": adapters["plainly"]})
    assert not panel._processor.image_processor.do_normalize
    with pytest.raises(UserError, match="as base and plainly were trained with other settings of image_processor"):
        Panel(str(base), adapters)


def run_file(folder: Path, base: Path, data: Path) -> Path:
    settings = {"base": str(base), "output": "out", "method": {"name": "lora"}, "data": {"train": str(data)}}
    settings["evaluate"] = {"target": [str(data)], "source": [str(data)]}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    save(folder / "out" / "adapter", base)
    return path


def test_examples_are_of_both_sides(base, tmp_path, data):
    config = RunConfig.load(run_file(tmp_path, base, data))
    drawn = examples(config, 6)
    assert len(drawn) == 6
    assert len({record.images for record in drawn[:3]}) == 3  # of the target
    assert drawn == examples(config, 6)


def test_mistakes(base, tmp_path, data, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    run = run_file(tmp_path, base, data)
    with pytest.raises(UserError, match="name it with --base"):
        play([tmp_path / "out" / "adapter"])
    with pytest.raises(UserError, match="not of other"):
        play([run], "other")
    with pytest.raises(UserError, match="holds no adapter"):
        play([tmp_path], str(base))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lorasculpt[play]'" in refused("play", run)


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes that says it has ``side`` x ``side`` pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def listening(port: int) -> set[str]:
    """The addresses that are listened to at ``port``, as the kernel has them: in hexadecimal, the last byte first."""
    tables = [path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.is_file()]
    lines = [line.split() for table in tables for line in table.splitlines()]
    places = [line[1].split(":") for line in lines if line[3] == "0A"]  # TCP_LISTEN
    return {address for address, at in places if int(at, 16) == port}


def post(url: str, body: bytes, kind: str = "application/json"):
    return json.load(urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind}), timeout=60))


def asked(address: str, picture: Path, *settings) -> str:
    """What the page's server sends about a question, to its end."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{picture.name}"\r\n\r\n'
    body = head.encode() + picture.read_bytes() + b"\r\n--x--\r\n"
    path = post(f"{address}gradio_api/upload", body, "multipart/form-data; boundary=x")[0]
    image = {"path": path, "orig_name": picture.name, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [image, QUESTION, *settings]}).encode()
    event = post(f"{address}gradio_api/call/ask", body)["event_id"]
    return urllib.request.urlopen(f"{address}gradio_api/call/ask/{event}", timeout=60).read().decode()


def test_the_page(base, tmp_path, data):
    run, place = run_file(tmp_path, base, data), tmp_path / "uploads"
    place.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ONLY), "TMPDIR": str(place), "GRADIO_SHARE": "True"}
    environment["GRADIO_SERVER_NAME"] = "0.0.0.0"
    command = [sys.executable, "-c", "from lorasculpt.cli import main; main()", "play", str(run), "--no-browse"]
    server = subprocess.Popen([*command, "--max-new-tokens=8"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        address, port = re.search(r"page: (http://127\.0\.0\.1:(\d+)/)", server.stdout.readline()).groups()
        if Path("/proc/net/tcp").is_file():
            assert listening(int(port)) == {"0100007F"}  # this machine alone, whatever the environment says
        picture, settings = tmp_path / "data" / "images" / "0.png", [1, None, 1, None]
        panel = Panel(str(base), {"out": tmp_path / "out" / "adapter"})
        right = [panel.answer(answerer, QUESTION, picture, max_new_tokens=8) for answerer in panel.answerers]
        last = re.findall(r"event: complete\ndata: (.*)", asked(address, picture, *settings))
        assert json.loads(last[0]) == right
        settings[2] = 0
        last = re.findall(r"event: complete\ndata: (.*)", asked(address, picture, *settings))
        assert json.loads(last[0]) == [right[0], right[0]]
        assert "scale it down" in asked(address, bomb(tmp_path / "bomb.png", 10_000), *settings)
        assert "event: error" in asked(address, bomb(tmp_path / "bomb.png", 14_000), *settings)  # Gradio's own refusal
        assert list(place.glob("lorasculpt-play-*"))
        page = urllib.request.urlopen(address, timeout=60).read().decode()
        assert "lorasculpt play" in page
        assert '"analytics_enabled":false' in page.replace(" ", "").replace("\\", "")
        assert pico.QUESTIONS["color"] in page  # an example
    finally:
        server.terminate()  # Ctrl-C is ignored by whatever a script has put into the background
        server.communicate(timeout=60)
    assert server.returncode == 0
    assert list(place.glob("lorasculpt-play-*")) == []  # what was given to it is gone
