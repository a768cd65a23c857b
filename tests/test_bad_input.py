"""What a user may do wrong: one sentence with its place and the mend, exit code 2, and nothing written or changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch
import yaml
from commands import refused

from lorasculpt import UserError
from lorasculpt.config import RunConfig
from lorasculpt.measure import measure
from lorasculpt.play import _told
from lorasculpt.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pico_folder) -> Path:
    """A folder with a finished run of the tiny llava, ``run.yaml`` beside ``out``. Tests copy what they change."""
    folder = tmp_path_factory.mktemp("trained")
    train(RunConfig.load(written(folder, pico_folder)), progress=False)
    return folder


@pytest.fixture
def fresh(tmp_path, pico_folder) -> Path:
    """A folder with a run that has not begun."""
    written(tmp_path, pico_folder)
    return tmp_path


def written(folder: Path, pico_folder) -> Path:
    """``run.yaml`` and its data in ``folder``: one setting a line, so that each has a line of its own."""
    for name in ("train", "test"):
        pico.write_data(folder / name, n=4)
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "lorasculpt", "r": 4, "density": 0.2, "prune_step": 1},
        "data": {"train": "train/train.jsonl"},
        "training": {"steps": 2, "batch": 2, "precision": "fp32", "report_to": []},
        "evaluate": {"source": ["test/train.jsonl"], "target": ["test/train.jsonl"], "limit": 1, "max_new_tokens": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, byte for byte, and every folder."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def picture(file: Path, row: int) -> Path:
    return file.parent / json.loads(file.read_text().splitlines()[row - 1])["image"]


def without_answer(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    del rows[1]["answer"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("side", ["train", "test"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: picture(file, 2).unlink(), "does not exist; correct the path or put the file there"),
        (lambda file: cut_short(picture(file, 2)), "; replace it"),
        (without_answer, "'answer' is missing; add it"),
    ],
    ids=["missing", "truncated", "no-answer"],
)
def test_data_are_read_before_training_begins(fresh, side, spoil, said, monkeypatch):
    file = fresh / side / "train.jsonl"
    spoil(file)
    before = contents(fresh)
    monkeypatch.setattr("lorasculpt.run.model.load", lambda *_, **__: pytest.fail("the base was loaded"))
    words = refused("train", fresh / "run.yaml")
    assert words.startswith(f"lorasculpt: {file}:2: ")
    assert words.endswith(said)
    assert contents(fresh) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "evaluate.metric={color: contains, colour: choice}",
            "evaluate.metric.colour names a task that no question has; ",
        ),
        ("evaluate.target=[test/train.jsonl, test/../test/train.jsonl]", "/test/../test/train.jsonl twice, whose"),
        (
            "method.prune_step=2",
            "method.prune_step is refused: prune_step=2 is not before the end of training (2 steps)",
        ),
    ],
)
def test_what_the_base_is_not_needed_for_is_told_before_it_is_loaded(fresh, given, said, monkeypatch):
    monkeypatch.setattr("lorasculpt.run.model.load", lambda *_, **__: pytest.fail("the base was loaded"))
    assert said in refused("train", fresh / "run.yaml", given)
    assert not (fresh / "out").exists()


@pytest.mark.parametrize("given", ["target_modules=.*q_proj(", "exclude_modules=(", "rank_pattern={'*q': 3}"])
def test_what_is_no_regular_expression_is_told_before_the_base_is_loaded(fresh, given, monkeypatch):
    monkeypatch.setattr("lorasculpt.run.model.load", lambda *_, **__: pytest.fail("the base was loaded"))
    words = refused("train", fresh / "run.yaml", f"method.{given}")
    assert f"method.{given.partition('=')[0]} has '" in words
    assert ", which is read as a regular expression and is none: " in words


def test_a_pattern_that_fits_no_module_is_told(fresh):
    words = refused("train", fresh / "run.yaml", "method.target_modules=q_proj")
    assert "target_modules is 'q_proj', which is read as a regular expression for whole names of modules" in words
    assert words.endswith("; write [q_proj] for all that are called so.")
    assert "; they are such as model." in refused("train", fresh / "run.yaml", "method.target_modules=.*nothing")


def test_a_row_that_the_base_cannot_read_at_once_is_told_before_training(fresh):
    file = fresh / "train" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["question"] = "what is this? " * 3000
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = refused("train", fresh / "run.yaml")
    assert words.startswith(f"lorasculpt: {file}:3: has ")
    assert words.endswith(" at once; shorten or remove it.")
    assert not (fresh / "out").exists()


STRICT = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- if loop.nextitem and loop.nextitem['role'] == message['role'] -%}
{{ raise_exception('Roles must alternate') }}
{%- endif -%}
{%- endfor -%}
"""


@pytest.mark.parametrize("side", ["train", "test", "more", "fisher"])
@pytest.mark.parametrize(
    ("roles", "said"), [(["system", "user"], "System role not supported"), (["user", "user"], "Roles must alternate")]
)
def test_a_row_that_the_chat_template_refuses_is_told_before_training(fresh, side, roles, said):
    model, processor = pico.build("llava")
    processor.chat_template = STRICT + processor.chat_template
    for part in (model, processor):
        part.save_pretrained(fresh / "strict")
    given = [f"base={fresh / 'strict'}", f"data.general={pico.write_data(fresh / 'more', n=4, tasks=['side'])}"]
    if side == "more":
        given += ["data.replay=0.5", "evaluate={source: []}"]
    if side == "fisher":
        given += ["method={name: regularized, penalty: ewc, weight: 1.0}", "evaluate={source: []}"]
    file = fresh / ("more" if side == "fisher" else side) / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    turns = [{"role": role, "content": "Which?"} for role in roles] + [{"role": "assistant", "content": "red"}]
    rows[-1] = {"messages": turns}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = refused("train", fresh / "run.yaml", *given, "training.steps=20", "evaluate.limit=null")
    assert words == (
        f"lorasculpt: {file}:{len(rows)}: the base's chat template refuses it ({said}); change its turns or remove it."
    )
    assert not (fresh / "out").exists()


@pytest.mark.parametrize("key", ["validation", "validation_source", "target"])
def test_so_are_the_data_of_every_choice(fresh, key):
    pico.write_data(fresh / "more", n=4)
    file = fresh / "more" / "train.jsonl"
    without_answer(file)
    settings = (f"evaluate.{key}={file}", *(["data.validation=0.5"] if key == "target" else []))
    words = refused("train", fresh / "run.yaml", *settings)
    assert words.startswith(f"lorasculpt: {file}:2: 'answer' is missing")
    assert not (fresh / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("  density: 0.2", "  densty: 0.2", 6, "method.densty is no setting of lorasculpt; did you mean density?"),
        ("  steps: 2", "  step: 2", 11, "training.step is no setting; did you mean steps?"),
        ("  density: 0.2", "  density: lots", 6, "method.density must be a number; got 'lots'."),
        ("  steps: 2", "  steps: two", 11, "training.steps must be an integer; got 'two'"),
        ("  density: 0.2", "  density: 1.5", 6, "method.density is refused: "),
        ("  prune_step: 1", "  prune_step: 3", 7, "method.prune_step is refused: "),
        ("  prune_step: 1\n", "", 3, "method.prune_step has a default that is refused here: prune_step=100 is not"),
        (
            "  r: 4\n",
            "  r: 4\n  modules_to_save: [foo]\n",
            6,
            "method.modules_to_save has 'foo', and no module of the base",
        ),
        (
            "  r: 4\n",
            "  r: 4\n  target_modules: [q_proj, fooo]\n",
            6,
            "method.target_modules has 'fooo', and no module",
        ),
        (
            "  prune_step: 1\n",
            "  prune_step: 1\n  target_modules: [q_proj]\nscope: all\n",
            9,
            "scope says nothing beside method.target_mo",
        ),
        (
            "report_to: []",
            "report_to: [tensorbord]",
            14,
            "training.report_to has 'tensorbord', which transformers does not ",
        ),
        (
            "report_to: []",
            "report_to: [neptune]",
            14,
            "training.report_to has neptune, which is not installed; install ",
        ),
    ],
    ids=[
        *(
            "key",
            "key-of-a-section",
            "type",
            "type-of-a-section",
            "density",
            "prune-step",
            "default",
            "module",
            "target",
        ),
        *("scope", "tracker", "tracker-not-there"),
    ],
)
def test_a_setting_is_told_with_its_line(fresh, old, new, line, said, monkeypatch):
    edit(fresh / "run.yaml", old, new)
    before = contents(fresh)
    if "prune" not in said and "no module" not in said:  # what needs no base is told before it is loaded
        monkeypatch.setattr("lorasculpt.run.model.load", lambda *_, **__: pytest.fail("the base was loaded"))
    words = refused("train", fresh / "run.yaml")
    assert words.startswith(f"lorasculpt: {fresh / 'run.yaml'}:{line}: {said}")
    assert contents(fresh) == before


@pytest.mark.parametrize("command", ["train", "report", "export"])
def test_a_place_where_nothing_can_be_is_named(trained, command):
    there = {
        "train": (trained / "run.yaml", "output=/proc/x"),
        "report": (trained / "out" / "results.json", "--out", "/proc/x"),
        "export": (
            trained / "out" / "adapter",
            "--base",
            RunConfig.load(trained / "run.yaml").base,
            "--out",
            "/proc/x",
        ),
    }
    if command == "report":
        measure(RunConfig.load(trained / "run.yaml"), progress=False)
    assert "/proc/" in refused(command, *there[command])


@pytest.mark.parametrize(
    "command",
    [("export", "--to", "lora"), ("export", "--to", "merged"), ("inspect",)],
    ids=["lora", "merged", "inspect"],
)
@pytest.mark.parametrize(("family", "is_"), [("llava_next", "llava_next"), ("llama", "llama")])
def test_a_base_of_another_family_is_refused(trained, tmp_path, pico_folder, command, family, is_):
    before, adapter = contents(trained), trained / "out" / "adapter"
    verb, *options = command
    out = ["--out", tmp_path / "new"] if verb == "export" else []
    command = (verb, adapter, "--base", pico_folder(family), *options, *out)
    words = refused(*command)
    assert f"it was trained on LlavaForConditionalGeneration, and this is {is_}" in words
    assert words.endswith("name the model it was trained on.")
    assert contents(trained) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["train", "eval", "dial"])
@pytest.mark.parametrize("changed", ["base", "method.density"])
def test_a_folder_with_another_run_is_left_alone(trained, pico_folder, command, changed):
    before = contents(trained)
    other = {"base": pico_folder("llava_next"), "method.density": 0.3}[changed]
    override = f"{changed}={other}"
    words = refused(command, trained / "run.yaml", override)
    place = "run.yaml:2: output" if command == "train" else f"override {override!r}: {changed}"
    assert f"{place} is " in words
    assert words.endswith("choose another folder." if command == "train" else "correct it, or name another output.")
    assert contents(trained) == before


def test_it_is_not_shown_either(trained):
    other = trained / "other.yaml"
    other.write_text((trained / "run.yaml").read_text().replace("density: 0.2", "density: 0.3"))
    assert _told([trained / "run.yaml"], None)[0] == RunConfig.load(other).base
    with pytest.raises(UserError, match=r"other.yaml:6: method.density is 0.3, but .* was trained with 0.2"):
        _told([other], None)


def test_no_memory_left_is_told_with_what_takes_less(fresh, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr("lorasculpt.run.model.load", too_large)
    words = refused("train", fresh / "run.yaml")
    assert words.startswith("lorasculpt: out of memory, for 2.00 GiB more; in training, lower training.batch")


def test_what_is_no_mistake_of_the_user_ends_with_1_and_a_traceback():
    script = "\n".join(
        (
            "import sys",
            "import lorasculpt.overview as module",
            "def fail(config): raise RuntimeError('a fault inside')",
            "module.facts = fail",
            "from lorasculpt import cli",
            "sys.argv = ['lorasculpt', 'methods']",
            "cli.main()",
        )
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a fault inside" in done.stderr
