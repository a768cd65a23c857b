"""One YAML file is one run: what it may say, and how each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from lorasculpt.config import RunConfig
from lorasculpt.errors import UserError

GOOD = "base: org/model\noutput: out\ndata:\n  train: train.jsonl\n"
SEQUENCE = "base: a\noutput: b\ndata:\n  sequence:\n    - {name: one, train: c, test: d}\n"


def run(folder: Path, text: str = "", *overrides: str) -> RunConfig:
    """A run whose own lines begin at line 5."""
    (folder / "run.yaml").write_text(GOOD + text)
    return RunConfig.load(folder / "run.yaml", overrides)


def message(folder: Path, text: str, *overrides: str) -> str:
    (folder / "run.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        RunConfig.load(folder / "run.yaml", overrides)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")


def test_four_lines_are_enough(tmp_path: Path) -> None:
    config = run(tmp_path)
    assert (config.base, config.seed, config.scope, config.projector) == ("org/model", 0, None, "frozen")
    assert (config.training.steps, config.training.epochs, config.training.batch) == (None, 1.0, 8)
    assert config.method.keys() == {"name"}
    assert config.evaluate.source == config.evaluate.target == []


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("runs/run.yaml").write_text(
        "base: ../model\noutput: out\ndata: {train: /abs/train.jsonl, images: ~/pictures}\n"
        "evaluate: {source: [a.jsonl, ../b.jsonl], target: c.jsonl}\n"
    )
    config = RunConfig.load("runs/run.yaml")
    here = tmp_path / "runs"
    assert Path(config.base).samefile(tmp_path / "model")
    assert config.output == here / "out"
    assert (config.data.train, config.data.images) == (Path("/abs/train.jsonl"), Path.home() / "pictures")
    assert config.evaluate.source == [here / "a.jsonl", here / "../b.jsonl"]
    assert config.evaluate.target == [here / "c.jsonl"]
    assert run(tmp_path).base == "org/model"  # no folder of that name: a name on the Hub


@pytest.mark.parametrize("number", ["5e-4", "5E-4", "0.0005", "5.0e-4", ".5e-3", "+5e-4"])
def test_numbers_may_be_written_as_people_write_them(tmp_path: Path, number: str) -> None:
    config = run(tmp_path, f"training: {{lr: {number}}}\nmethod: {{density: {number}, name_like: 5e, code: e5}}\n")
    assert config.training.lr == config.method["density"] == 5e-4
    assert (config.method["name_like"], config.method["code"]) == ("5e", "e5")


def test_an_empty_section_is_none(tmp_path: Path) -> None:
    assert run(tmp_path, "training:\n  # lr: 1\nevaluate:\n", "training.batch=2").training.batch == 2


def test_steps_or_epochs(tmp_path: Path) -> None:
    assert run(tmp_path, "training: {steps: 7}\n").training.epochs is None
    assert run(tmp_path, "training: {epochs: 0.5}\n").training.steps is None
    assert run(tmp_path, "training: {epochs: 2}\n", "training.epochs=null", "training.steps=7").training.steps == 7


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    overrides = (
        "training.lr=1e-3",
        "method.r=8",
        "evaluate.target=[a.jsonl]",
        "base=other/model",
        "evaluate.metric.x=vqa",
    )
    config = run(tmp_path, "training: {lr: 1}\n", *overrides)
    assert (config.training.lr, config.method["r"], config.base) == (1e-3, 8, "other/model")
    assert config.evaluate.target == [tmp_path / "a.jsonl"]
    assert config.evaluate.metric == {"x": "vqa"}


def test_it_can_be_written_and_read_back(tmp_path: Path) -> None:
    text = "method: {r: 4, density: 1e-1, note: null, names: [a]}\nevaluate: {source: s.jsonl, metric: {ä: choice}}\n"
    config = run(tmp_path, text, "training.steps=3")
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / "again.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.load(again) == config
    assert RunConfig.load(again, ["seed=1"]) != config


def test_a_home_that_nobody_has_is_told(tmp_path: Path) -> None:
    assert message(tmp_path, GOOD.replace("output: ", "output: ~nobody-at-all/")) == (
        "run.yaml:2: output names a home that is not known here; write the path out"
    )


def test_a_run_without_further_arguments_is_written_as_before_there_were_any(tmp_path: Path) -> None:
    assert "arguments" not in run(tmp_path).to_yaml()
    config = run(tmp_path, "training: {arguments: {run_name: '1e-4', optim_args: {x: 1}}}\n")
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert RunConfig.load(tmp_path / "again.yaml") == config
    assert config.training.arguments == {"run_name": "1e-4", "optim_args": {"x": 1}}


def test_nothing_changes_later(tmp_path: Path) -> None:
    config = run(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.training.lr = 3.0


def test_later_stages_can_point_at_a_line(tmp_path: Path) -> None:
    config = run(tmp_path, "method:\n  r: 4\n  density: 3\n", "method.r=9")
    place = f"{tmp_path / 'run.yaml'}"
    assert str(config.error("method.density", "must be at most 1")) == f"{place}:7: method.density must be at most 1"
    assert str(config.error("method.alpha", "is missing")) == f"{place}:5: method.alpha is missing"
    assert str(config.error("method.r", "is odd")) == "override 'method.r=9': method.r is odd"
    written = RunConfig(base="a", output=Path("b"), data={"train": Path("c")})
    assert str(written.error("method.r", "is odd")) == "the run: method.r is odd"


MISTAKES = {
    "training: {lr: 0}": "run.yaml:5: training.lr must be greater than 0; got 0",
    "training:\n  batch: 4\n  lr: fast": "run.yaml:7: training.lr must be a number; got 'fast'",
    "training:\n  bacth: 3": "run.yaml:6: training.bacth is no setting; did you mean batch?",
    "training: {batch: true}": "run.yaml:5: training.batch must be an integer; got True",
    "training: {batch: 2.5}": "run.yaml:5: training.batch must be an integer; got 2.5",
    "training: {warmup: 1.0}": "run.yaml:5: training.warmup must be less than 1; got 1.0",
    "training: {lr: .inf}": "run.yaml:5: training.lr must be a finite number; got inf",
    "training: {checkpointing: 1}": "run.yaml:5: training.checkpointing must be a boolean; got 1",
    "training: {report_to: wandb}": "run.yaml:5: training.report_to must be a list; got 'wandb'",
    "training: {steps: 3, epochs: 2}": "run.yaml:5: training has both steps and epochs; remove one, or set it to null",
    "training: {arguments: [run_name]}": "run.yaml:5: training.arguments must be a section of keys; got ['run_name']",
    "training: {arguments: {1: 2}}": "run.yaml:5: training.arguments.1 must be a string; got 1",
    "training: 3": "run.yaml:5: training must be a section of keys; got 3",
    "training: {schedule: cos}": "run.yaml:5: training.schedule must be 'cosine', 'linear' or 'constant'; got 'cos'",
    "scope: words": "run.yaml:5: scope must be 'language', 'vision', 'projector' or 'all'; got 'words'",
    "scope: all\nprojector: full": "run.yaml:6: projector must not be full with scope: all, "
    "which gives the projector an adapter; change one",
    "quantization: 4bit\nprojector: full": "run.yaml:6: projector must not be full with quantization, under which "
    "no weight is trained; use lora",
    "quantization: 3bit": "run.yaml:5: quantization must be '4bit' or '8bit'; got '3bit'",
    "dtype: int8": "run.yaml:5: dtype must be 'float32', 'bfloat16', 'float16' or 'auto'; got 'int8'",
    "method: spider": "run.yaml:5: method must be a section of keys; got 'spider'",
    "method: {name: [lora]}": "run.yaml:5: method has the name ['lora'], which is no text; name a method",
    "projektor: full": "run.yaml:5: projektor is no setting; did you mean projector?",
    "retain: 0.97": "run.yaml:5: retain is no setting; did you mean evaluate.retain?",
    "limit: 3": "run.yaml:5: limit is no setting; did you mean data.limit or evaluate.limit?",
    "evaluate: {seed: 3}": "run.yaml:5: evaluate.seed is no setting; did you mean seed?",
    "xyz: 1": "run.yaml:5: xyz is no setting; use one of base, dtype, quantization, trust_remote_code, attention, "
    "image_processor, output, seed, method, methods, scope, projector, data, training, evaluate",
    "evaluate: {source: [a, 3]}": "run.yaml:5: evaluate.source.1 must be a path; got 3",
    "evaluate:\n  metric:\n    a: exact\n    b: f1": "run.yaml:8: evaluate.metric.b must be 'exact', 'contains', 'vqa' "
    "or 'choice'; got 'f1'",
    "seed: 202611302220": "run.yaml:5: seed must be less than 4294967296; got 202611302220",
    "seed: 1\nseed: 2": "run.yaml:6: seed is given twice (first on line 5); remove one",
    "training:\n  lr: 1\n  lr: 1": "run.yaml:7: training.lr is given twice (first on line 6); remove one",
    "x: [1, 2": "run.yaml:5: not valid YAML (expected ',' or ']', but got '<stream end>'); correct the syntax",
    "? [a]\n: 3": "run.yaml:5: a key must be a name; correct it",
    "seed: 1\nscope: up\nxyz: 3": "run.yaml:6: scope must be 'language', 'vision', 'projector' or 'all'; got 'up'",
    "seed: !!python/object/apply:os.getcwd []": "run.yaml:5: seed must be an integer; got []",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, text: str) -> None:
    assert message(tmp_path, GOOD + text) == MISTAKES[text]


OVERRIDES = {
    "training.lr=fast": "override 'training.lr=fast': training.lr must be a number; got 'fast'",
    "training.bacth=3": "override 'training.bacth=3': training.bacth is no setting; did you mean batch?",
    "training={lr: x}": "override 'training={lr: x}': training.lr must be a number; got 'x'",
    "training.lr": "override 'training.lr' must have the form key=value, such as training.lr=1e-4",
    "=3": "override '=3' must have the form key=value, such as training.lr=1e-4",
    "base.name=3": "override 'base.name=3': base is no section; override it as a whole",
    "training.steps=[": "override 'training.steps=[': not valid YAML (expected the node content, "
    "but found '<stream end>'); correct the syntax",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_mistake_in_an_override_names_it(tmp_path: Path, override: str) -> None:
    assert message(tmp_path, GOOD + "training: {lr: 1}\n", override) == OVERRIDES[override]


FILES = {
    "": "run.yaml:1: a run must be a mapping of keys such as base, output and data; got None",
    "- a": "run.yaml:1: a run must be a mapping of keys such as base, output and data; got ['a']",
    "base: a": "run.yaml: output is missing; add it",
    "base: a\noutput: b\ndata: {}": "run.yaml:3: data needs train, or a sequence of tasks; add it",
    GOOD + "  sequence: [{name: a, train: b, test: c}]": "run.yaml:3: data has both train and sequence; remove one",
    SEQUENCE
    + "    - {name: one, train: c, test: d}": "run.yaml:3: data has a sequence with two tasks 'one'; rename one",
    SEQUENCE + "    - {name: two, train: c}": "run.yaml:6: data.sequence.1.test is missing; add it",
    SEQUENCE + "    - {name: two, train: c, test: d, tset: e}": (
        "run.yaml:6: data.sequence.1.tset is no setting; did you mean test?"
    ),
    "base: ''\noutput: b\ndata: {train: c}": "run.yaml:1: base must have at least 1 character; got ''",
    "a: &a\n  b: *a": "run.yaml:1: not valid YAML (an anchor refers to itself); correct the syntax",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_no_run_is_told(tmp_path: Path, text: str) -> None:
    assert message(tmp_path, text) == FILES[text]


def test_a_missing_or_foreign_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read \(No such file"):
        RunConfig.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"base: \xe9")
    with pytest.raises(UserError, match="not UTF-8 text"):
        RunConfig.load(tmp_path / "latin.yaml")


def test_tensorboard_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, expected in ((object(), ["tensorboard"]), (None, [])):
        monkeypatch.setattr("lorasculpt.config.importlib.util.find_spec", lambda name, spec=spec: spec)
        assert run(tmp_path).training.report_to == expected


def test_a_single_run_of_several_methods_keeps_the_lines_of_its_own(tmp_path: Path) -> None:
    text = "method: {name: x, density: 1}\nmethods:\n  sparse:\n    density: 2\n  other: {density: 3}\n"
    config = run(tmp_path, text, "methods.other.r=4")
    made = config.single("sparse", {"name": "x", "density": 2}, seed=7)
    assert (made.method, made.methods, made.seed, config.seed) == ({"name": "x", "density": 2}, {}, 7, 0)
    place = f"{tmp_path / 'run.yaml'}:"
    assert str(made.error("method.density", "is wrong")) == f"{place}8: method.density is wrong"
    assert str(config.single("new", {}).error("method.density", "is wrong")).startswith(f"{place}5:")
    assert "'methods.other.r=4'" in str(config.single("other", {}).error("method.r", "is wrong"))
    (tmp_path / "made.yaml").write_text(made.to_yaml())
    assert RunConfig.load(tmp_path / "made.yaml") == made


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (GOOD + "evaluate: {strengths: [0.5, 1.5]}\n", "run.yaml:5: evaluate.strengths.1 must be less than 1; got 1.5"),
        (GOOD + "methods: {lora: 3}\n", "run.yaml:5: methods.lora must be a section of keys; got 3"),
        (GOOD + "  validation: 1\n", "run.yaml:5: data.validation must be less than 1; got 1"),
        (SEQUENCE + "  validation: 0.1\n", "data has validation, which a sequence does not know; remove it"),
        (SEQUENCE + "  replay: 0.1\n", "data has replay, which a sequence does not know; remove it"),
        (GOOD + "  general: g.jsonl\n  replay: 1\n", "run.yaml:6: data.replay must be less than 1; got 1"),
        (GOOD + "  replay: 0.1\n", "run.yaml:3: data has replay, but no general to take it from; name the data file"),
    ],
)
def test_mistakes_about_comparing(tmp_path: Path, text: str, part: str) -> None:
    assert part in message(tmp_path, text)


def test_without_a_file_paths_are_those_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate({"base": "model", "output": "out", "data": {"train": "rows.jsonl"}})
    assert (config.base, config.output, config.data.train) == (
        str(tmp_path / "model"),
        tmp_path / "out",
        tmp_path / "rows.jsonl",
    )
    monkeypatch.chdir("/")
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config
