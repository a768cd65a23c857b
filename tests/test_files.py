"""What is written is whole or not there, and a full disk is told as one whatever was being written."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pickle import UnpicklingError

import pico
import pytest
import torch
import yaml
from commands import refused
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorasculpt import UserError, files
from lorasculpt.adapters.clock import ClockCallback
from lorasculpt.config import RunConfig
from lorasculpt.run.folder import HEAD, check_trained
from lorasculpt.train import train

resource = pytest.importorskip("resource")  # Windows has none
BYTES = 100_000


@contextmanager
def no_room(limit: int = BYTES):
    """No file grows beyond ``limit``: the system refuses the write itself, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = files.write_json(tmp_path / "new" / "a.json", {"a": 1})
    with suppress(KeyboardInterrupt), files.whole(path) as partial:
        partial.write_text("half of")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="large"), no_room():
        files.write_text(path, "x" * 2 * BYTES)
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_link_stays_one_and_a_pipe_is_no_file(tmp_path):
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "elsewhere")
    for text in ("a", "b"):
        files.write_text(link, text)
        assert link.is_symlink()
        assert (tmp_path / "elsewhere").read_text() == text
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "c")
    assert os.read(end, 9) == b"c"
    os.close(end)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError):
        files.write_text(tmp_path, "d")


def long_text(path):
    path.write_text("x" * 2 * BYTES)


WRITERS = {
    "text": (OSError, long_text),
    "safetensors": (SafetensorError, lambda path: save_file({"a": torch.zeros(BYTES)}, path)),
    "torch": (RuntimeError, lambda path: torch.save({"a": torch.zeros(BYTES)}, path)),
}


@pytest.mark.parametrize(("kind", "write"), WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_known_by_what_each_writer_says_of_it(kind, write, tmp_path):
    with pytest.raises(kind) as found, no_room():
        write(tmp_path / "file")
    assert files.disk_full(found.value)
    later = ValueError("something else")
    later.__cause__ = found.value
    assert files.disk_full(later)


def test_other_faults_are_no_full_disk(tmp_path):
    (tmp_path / "broken").write_bytes(b"x" * 100)
    readers = {
        UnpicklingError: torch.load,
        SafetensorError: load_file,
        NotADirectoryError: os.listdir,
    }
    for kind, read in readers.items():
        with pytest.raises(kind) as found:
            read(tmp_path / "broken")
        assert not files.disk_full(found.value)


@pytest.fixture
def run(tmp_path, pico_folder):
    """``run.yaml`` of a tiny llava with four steps and a checkpoint at each."""
    data = str(pico.write_data(tmp_path / "data", n=8))
    settings = {
        "base": str(pico_folder("llava")),
        "output": "out",
        "method": {"name": "lorasculpt", "r": 8, "density": 0.2, "prune_step": 2},
        "data": {"train": data},
        "training": {"steps": 4, "batch": 2, "save_every": 1, "keep": 1, "precision": "fp32", "report_to": []},
        "evaluate": {"source": [data], "target": [data], "limit": 2, "max_new_tokens": 2, "strengths": []},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_that_has_no_room_does_not_begin(run, monkeypatch):
    monkeypatch.setattr("lorasculpt.run.callbacks.free", lambda folder: 1000)
    line = refused("train", run)
    assert ": output is" in line
    assert "1.0 kB left, and the adapter and 2 checkpoints take" in line
    assert not (run.parent / "out").exists()
    line = refused("train", run, "training.save_every=null")
    assert "and the adapter takes" in line


def test_a_disk_that_runs_full_costs_no_checkpoint(run, monkeypatch):
    """It ends in one sentence, and the next call goes on to the same bits as one that never stopped."""
    begin, soft = ClockCallback.on_step_begin, resource.getrlimit(resource.RLIMIT_FSIZE)
    out = run.parent / "out"

    def fill(self, args, state, control, **kwargs):
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, soft[1]))
        return begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ClockCallback, "on_step_begin", fill)
        try:
            line = refused("train", run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert line.endswith("out has no room left; make some and run it again: it goes on from checkpoint-2.")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "run.yaml"]
    with no_room(10):  # what is there already is not written over by half
        assert "no room" in refused("train", run, "training.keep=2")
    adapter = train(RunConfig.load(run), progress=False)
    whole = train(RunConfig.load(run, ["output=whole", "training.save_every=null"]), progress=False)
    resumed, never = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, whole))
    assert resumed.keys() == never.keys()
    assert all(torch.equal(resumed[name], never[name]) for name in never)
    with no_room(10):
        assert "no room" in refused("eval", run)
    assert not (out / "results.json").exists()


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit])  # by hand, and by what ends a job
def test_a_run_that_is_stopped_says_where_it_will_go_on(run, monkeypatch, capsys, how):
    begin = ClockCallback.on_step_begin

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise how
        return begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(ClockCallback, "on_step_begin", stop)
    with pytest.raises(how):
        train(RunConfig.load(run), progress=False)
    assert "lorasculpt: stopped; run it again, and it goes on from checkpoint-3." in capsys.readouterr().err


def test_how_a_run_is_watched_may_change_while_it_stands(run):
    """Where it is saved and told changes nothing in it; what it learns does, and is refused."""
    adapter = train(RunConfig.load(run), progress=False)
    assert sorted(path.name for path in adapter.parent.glob("checkpoint-*")) == ["checkpoint-4"]
    assert train(RunConfig.load(run, ["training.save_every=3", "training.log_every=2"]), progress=False) == adapter
    with pytest.raises(UserError, match=r"holds another run \(training\.lr is another in .*run\.yaml\)"):
        train(RunConfig.load(run, ["training.lr=1e-3"]), progress=False)


@pytest.mark.parametrize("settings", [("method.prune_step=400",), ("training.lr=1e36", "training.max_grad_norm=0")])
def test_nothing_is_removed_that_no_run_has_written(run, settings):
    """A file called as a run's own record, in the folder where its owner keeps everything."""
    home = run.parent
    (home / "notes.txt").write_text("mine")
    run.write_text("# my run\n" + run.read_text().replace("output: out", "output: ."))
    before = sorted(home.rglob("*")), run.read_text()
    assert "run.yaml no run has written; choose an empty folder, such as" in refused("train", run, *settings)
    assert (sorted(home.rglob("*")), run.read_text()) == before
    # and beside a run of its own, which it may be
    out = home / "runs"
    train(RunConfig.load(run, ["output=runs", "training.save_every=null"]), progress=False)
    (out / "notes.txt").write_text("mine")
    for path in (out / "adapter").iterdir():
        path.unlink()
    (out / "adapter").rmdir()
    (out / "run.yaml").write_text(HEAD + RunConfig.load(run, ["output=runs", *settings]).to_yaml())
    refused("train", run, "output=runs", *settings)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_run_that_was_killed_before_it_wrote_anything_begins(run):
    out = run.parent / "out"
    out.mkdir()
    (out / ".run.yaml.ab12cd34").write_text("base: ha")
    (out / "mine").write_text("")
    assert "holds something else" in refused("train", run)
    (out / "mine").unlink()
    train(RunConfig.load(run), progress=False)
    assert not list(out.glob(".run.yaml*"))


def test_a_run_may_be_moved_with_its_data(run, tmp_path):
    here, there = tmp_path / "here", tmp_path / "further" / "there"
    here.mkdir()
    shutil.move(run.parent / "data", here / "data")
    text = run.read_text().replace(str(run.parent / "data"), "data")
    (here / "run.yaml").write_text(text)
    train(RunConfig.load(here / "run.yaml", ["training.steps=3"]), progress=False)
    there.parent.mkdir()
    here.rename(there)
    moved = RunConfig.load(there / "run.yaml", ["training.steps=3"])
    assert train(moved, progress=False) == there / "out" / "adapter"
    check_trained(moved)
    shutil.copytree(there / "data", there / "other")
    other = RunConfig.load(there / "run.yaml", ["training.steps=3", "data.train=other/train.jsonl"])
    with pytest.raises(UserError, match=r"holds another run \(data\.train is another in"):
        train(other, progress=False)
    with pytest.raises(UserError, match=r"data\.train is .*other.*, but .* was trained with"):
        check_trained(other)


def test_other_rows_are_another_run(run, monkeypatch):
    """Under the same name: what is finished is not theirs, and what was interrupted does not go on with them."""
    begin = ClockCallback.on_step_begin

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt
        return begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ClockCallback, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            train(RunConfig.load(run), progress=False)
    file = run.parent / "data" / "train.jsonl"
    rows = file.read_text()
    file.write_text(rows.replace('"red"', '"green"'))
    assert "data.train has other rows than" in refused("train", run)
    file.write_text(rows)
    train(RunConfig.load(run), progress=False)
    file.write_text(rows.replace('"red"', '"green"'))
    assert "data.train has other rows than" in refused("train", run)
    file.unlink()
    train(RunConfig.load(run), progress=False)


def test_the_end_is_no_checkpoint(run):
    """A trainer makes one there, three times as large as the adapter that is written next."""
    adapter = train(RunConfig.load(run, ["training.save_every=3", "training.keep=9"]), progress=False)
    assert [path.name for path in adapter.parent.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_run_that_comes_to_nan_leaves_no_adapter(run, monkeypatch):
    """Without a checkpoint only word of it is left, and the mended file can take the same folder."""
    wild = ("training.lr=1e30", "training.log_every=2", "training.save_every=null")
    line = refused("train", run, *wild)
    assert "training.lr is 1e+30, and at step" in line
    assert line.endswith("the weights of the adapter are not finite any more; lower it, or training.max_grad_norm.")
    assert sorted(path.name for path in (run.parent / "out").iterdir()) == ["diverged.json", "run.yaml"]
    begin = ClockCallback.on_step_begin

    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        return begin(self, args, state, control, model=model, **kwargs)

    monkeypatch.setattr(ClockCallback, "on_step_begin", spoil)
    line = refused("train", run, "training.log_every=4")
    assert line.endswith(f"max_grad_norm, and name another output than {run.parent / 'out'}.")
    assert [path.name for path in (run.parent / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    line = refused("train", run, "training.lr=1e-3")
    assert "holds another run" in line
    monkeypatch.undo()
    train(RunConfig.load(run, ["training.log_every=4"]), progress=False)
    assert not (run.parent / "out" / "diverged.json").exists()


def test_a_place_that_cannot_be_written_to_is_named(run):
    (run.parent / "file").write_text("")
    line = refused("train", run, "output=file/run")
    assert "file/run: a part of this path is a file, not a folder" in line
