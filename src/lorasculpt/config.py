"""One YAML file is one run: read, checked, and every mistake told with its line.

```yaml
base: HuggingFaceTB/SmolVLM-256M-Instruct
output: runs/invoices
method: {name: lorasculpt, r: 32, density: 0.1}
data: {train: invoices/train.jsonl}
training: {epochs: 3}
evaluate: {source: [general/test.jsonl], target: [invoices/test.jsonl]}
```

Relative paths are relative to the file. What stands under ``method`` beside its name are the method's own settings.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import UserError

Key = tuple[Hashable, ...]


def _resolve(value: Any, info: ValidationInfo) -> Any:
    """A path as written, taken relative to the folder of the YAML file, or to that of today where there is no file."""
    if isinstance(value, str) and value:
        folder = (info.context or {}).get("folder") or Path.cwd()
        try:
            return folder / Path(value).expanduser()
        except RuntimeError:
            raise ValueError("names a home that is not known here; write the path out") from None
    return value


def _name_or_folder(value: Any, info: ValidationInfo) -> Any:
    """The name of a model, or the path of a folder that exists."""
    path = _resolve(value, info)
    return str(path) if isinstance(path, Path) and path.exists() else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _once(paths: list[Path]) -> list[Path]:
    if twice := next(
        (path for i, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:i]}), None
    ):
        raise ValueError(f"names {twice} twice, whose questions would count twice; remove one")
    return paths


RelativePath = Annotated[Path, BeforeValidator(_resolve), PlainSerializer(str)]
Paths = Annotated[list[RelativePath], BeforeValidator(_listed), AfterValidator(_once)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    """Unknown keys are errors, a setting has the type it says (``batch: true`` is not 1), and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Stage(_Section):
    """One task of a sequence.

    Args:
        name: Of the task.
        train: Data file.
        test: Data file of what is asked after this task and after every other.
        validation: Data file like ``test``, with other questions: by these ``lorasculpt compare`` chooses learning
            rates. All tasks of a sequence have one, or none. Default: none.
    """

    name: Annotated[str, Field(min_length=1)]
    train: RelativePath
    test: RelativePath
    validation: RelativePath | None = None


class Data(_Section):
    """What is trained on: ``train``, or one task after the other.

    Args:
        train: Data file (`lorasculpt.data.records`).
        sequence: Tasks to learn in turn (`lorasculpt.sequence`).
        general: Data file of what the model is to keep; none of its questions may be one of ``evaluate``. It is trained
            on as ``replay`` says, and read by CorDA. Default: none.
        replay: Share of the rows of a pass over the data, in (0, 1), that comes from ``general``. All rows of ``train``
            stay; as many are added as meet the share to the nearest row, at least one. The seed draws them; none is
            repeated until all have been used. They are the same in every pass and for every method, and their tasks
            are tasks like those of ``train``. In a comparison ``methods.<label>.replay`` takes its place (null:
            none). Default: none.
        images: Folder of the pictures. Default: each data file's.
        limit: Use the first so many rows of ``train``. Default: all.
        validation: Share of these rows, in (0, 1), that is not trained on but measured in place of
            ``evaluate.target``, to choose settings by (`lorasculpt.data.records.set_aside`). Default: none.
    """

    train: RelativePath | None = None
    sequence: list[Stage] = Field(default_factory=list)
    general: RelativePath | None = None
    replay: Annotated[float, Field(gt=0, lt=1)] | None = None
    images: RelativePath | None = None
    limit: Positive | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Data:
        if self.train is None and not self.sequence:
            raise ValueError("needs train, or a sequence of tasks; add it")
        if self.train is not None and self.sequence:
            raise ValueError("has both train and sequence; remove one")
        for name in ("validation", "replay"):
            if self.sequence and getattr(self, name) is not None:
                raise ValueError(f"has {name}, which a sequence does not know; remove it")
        if self.replay is not None and self.general is None:
            raise ValueError("has replay, but no general to take it from; name the data file")
        names = [stage.name for stage in self.sequence]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"has a sequence with two tasks {twice!r}; rename one")
        bare = [stage.name for stage in self.sequence if stage.validation is None]
        if 0 < len(bare) < len(names):
            raise ValueError(
                f"has a sequence with validation, but none for {bare[0]!r}; give it to all tasks or to none"
            )
        return self


# How a run is watched, kept and fed, by which what it learns does not change.
WATCHING = frozenset({"save_every", "keep", "log_every", "report_to", "workers"})


class Training(_Section):
    """How it is trained.

    Args:
        steps: Optimizer steps; or else ``epochs``.
        epochs: Passes over the data. Default: 1, unless ``steps`` is given.
        batch: Rows per device and micro-batch.
        accumulation: Micro-batches per optimizer step.
        lr: Peak learning rate of the adapter.
        projector_lr: Peak learning rate of the projector, where it is trained.
        warmup: Share of the steps in which the learning rate rises, in [0, 1).
        schedule: How the learning rate falls after that.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm; 0 does not clip.
        precision: Of the computation; weights of the adapter stay in fp32. ``auto``: bf16 where it is faster.
        checkpointing: Compute activations twice to save memory.
        save_every: Steps between checkpoints, from which a run that was stopped goes on; null makes none.
        keep: Newest checkpoints to keep.
        log_every: Steps between log entries.
        report_to: Trackers by transformers' names; TensorBoard's events lie in ``logs`` of ``output``. Default:
            ``[tensorboard]`` where it is installed.
        workers: Processes that prepare batches, beside each one that trains; 0 prepares them in the training process.
            Default: 0 on a CPU; where an accelerator trains, one for each processor but one, four at most, and none
            where /dev/shm, through which they hand batches over, has less than a gigabyte: give a container more by
            ``--shm-size``.
        arguments: Further arguments of TRL's ``SFTConfig``, such as ``run_name`` or ``neftune_noise_alpha``; those that
            the settings above stand for, or of which nothing would come here, are refused. With ``push_to_hub: true``
            and a ``hub_model_id`` the finished adapter is uploaded (``hub_private_repo``, ``hub_revision``). Default:
            none.
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch: Positive = 8
    accumulation: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 2e-4
    projector_lr: Annotated[float, Field(gt=0)] = 2e-5
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    checkpointing: bool = False
    save_every: Positive | None = 500
    keep: Positive = 2
    log_every: Positive = 10
    report_to: list[str] = Field(
        default_factory=lambda: ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    )
    workers: Annotated[int, Field(ge=0)] | None = None
    # left out where there are none: runs from before there were any are equal to runs without
    arguments: Annotated[dict[str, Any], Field(exclude_if=lambda given: not given)] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        if isinstance(values, dict):
            given = [key for key in ("steps", "epochs") if values.get(key) is not None]
            if len(given) == 2:
                raise ValueError("has both steps and epochs; remove one, or set it to null")
            if not given:
                return {**values, "epochs": 1.0}
        return values


class Evaluate(_Section):
    """What is measured before and after training.

    Args:
        source: Data files of what the model knew.
        target: Data files of what it is taught.
        validation: Data files like ``target``, with other questions: by these ``lorasculpt compare`` chooses learning
            rates. Default: a tenth of the training rows, set aside.
        validation_source: Data files like ``source``, with other questions, that are measured with these. Default:
            those of ``source``.
        images: Folder of their pictures. Default: each data file's.
        limit: Questions per task. Default: all.
        every: Steps between measurements during training. Default: none.
        during: Questions per task of such a measurement.
        batch: Questions at a time.
        max_new_tokens: Longest answer.
        strengths: Where the curve of source against target is taken, between 0 (base) and 1 (adapter).
        refine: Most extra strengths to measure. Each is the middle of the interval in which source and target change
            most, until no interval changes much. A LoRA that loses all it knew between two strengths would else be
            judged by a straight line there. With ``retain``, and in ``lorasculpt dial``, up to as many again lie
            between the strength that keeps enough and the next, which does not. Default: 3; none where ``strengths`` is
            empty.
        curve: Questions asked at each point of the curve: the first this many of the source, split evenly over its
            tasks, and as many of the target. Default: ``limit`` questions of each task.
        as_task: For an adapter that knows tasks: which of its tasks to use for a question of a task it does not know,
            as most ``source`` questions are.
        metric: Metric of a task by its name: ``exact``, ``contains``, ``vqa`` or ``choice``; under ``default`` that of
            all questions that name no task. Default of a task: ``exact``.
        drift: How many texts, sampled from the base, the drift is measured on (`lorasculpt.evaluation.drift`), half of
            them about pictures of ``source``, or else ``target``; during training on the first ``during`` of them. Not
            measured where the base's own weights move (``projector: full``, and while PiSSA and its like are trained).
            ``lorasculpt eval`` measures it at each of ``strengths`` as well: every time two forward passes over these
            texts, one of them the base's. Default: none.
        retain: Share of the source to keep, in (0, 1], or of exp(-drift) where no source is given: ``lorasculpt eval``
            leaves the adapter at the strength that learns the most among those that do. It is chosen on ``validation``
            where that is given, whose questions are then asked at every strength too. Default: none.
    """

    source: Paths = Field(default_factory=list)
    target: Paths = Field(default_factory=list)
    validation: Paths = Field(default_factory=list)
    validation_source: Paths = Field(default_factory=list)
    images: RelativePath | None = None
    limit: Positive | None = None
    every: Positive | None = None
    during: Positive = 50
    batch: Positive = 32
    max_new_tokens: Positive = 16
    strengths: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.25, 0.5, 0.75])
    refine: Annotated[int, Field(ge=0)] = 3
    curve: Positive | None = None
    as_task: Annotated[str, Field(min_length=1)] | None = None
    metric: dict[str, Literal["exact", "contains", "vqa", "choice"]] = Field(default_factory=dict)
    drift: Positive | None = None
    retain: Annotated[float, Field(gt=0, le=1)] | None = None

    @property
    def files(self) -> list[Path]:
        """The data files of all that is asked."""
        return [*self.source, *self.target, *self.validation, *self.validation_source]


@dataclass(frozen=True)
class _Origin:
    """Where each key was written. Two runs are equal wherever they were written, so nothing here is compared."""

    file: str = field(default="the run", compare=False)
    lines: dict[Key, int] = field(default_factory=dict, compare=False)
    overrides: dict[Key, str] = field(default_factory=dict, compare=False)

    def place(self, key: Key) -> str:
        """``run.yaml:12`` or the override that gave ``key``, or else what encloses it."""
        for outer in _outward(key):
            if outer in self.overrides:
                return f"override {self.overrides[outer]!r}"
        line = self.line(key)
        return self.file if line is None else f"{self.file}:{line}"

    def known(self, dotted: str) -> Key:
        """What a dotted key stands for that was written, or else what encloses it; a name may have dots of its own."""
        enclosing = [key for key in (*self.lines, *self.overrides) if f"{dotted}.".startswith(f"{_dotted(key)}.")]
        return max(enclosing, key=len, default=())

    def line(self, key: Key) -> int | None:
        """The line of ``key``, or else of what encloses it."""
        return next((self.lines[outer] for outer in _outward(key) if outer in self.lines), None)


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def _outward(key: Key) -> list[Key]:
    """``key`` and everything that encloses it, from the inside."""
    return [key[:length] for length in range(len(key), 0, -1)]


class RunConfig(_Section):
    """Everything about one run.

    Args:
        base: Folder or Hub name of the base model.
        dtype: Of its weights in memory: ``bfloat16`` halves them, ``auto`` is what the files hold.
        quantization: Hold them in ``4bit`` (NF4) or ``8bit`` through bitsandbytes, as QLoRA does. Default: not,
            unless the files do.
        trust_remote_code: Run the code that comes with the base. Only for a base whose code was read.
        attention: How transformers is to compute it, such as ``sdpa`` or ``flash_attention_2``, which a Qwen2.5-VL's
            tower gains most from. Default: eager on a CPU, else transformers' own choice.
        image_processor: Settings of the base's image processor to replace, such as ``{max_pixels: 1000000}`` of a
            Qwen-VL or ``{do_image_splitting: false}`` of a SmolVLM: pictures are most of what they read.
        output: Folder for everything the run writes.
        seed: Of data order and initial adapter.
        method: ``name`` of the method, one of ours (``lorasculpt methods``) or of PEFT's, and its settings.
        methods: Settings of each method that ``lorasculpt compare`` is to compare; a single run leaves them aside.
        scope: Which part of the model gets the adapter. Default: the layers that the method names, or else language;
            ``target_modules`` of a method are taken wherever they are, in the vision tower too, as PEFT does.
        projector: Whether the projector is left alone, gets an adapter too, or is trained whole.
        data: What is trained on.
        training: How.
        evaluate: What is measured.
    """

    base: Annotated[str, Field(min_length=1), BeforeValidator(_name_or_folder)]
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    quantization: Literal["4bit", "8bit"] | None = None
    trust_remote_code: bool = False
    attention: str | None = None
    image_processor: dict[str, Any] = Field(default_factory=dict)
    output: RelativePath
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "lorasculpt"})
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    scope: Literal["language", "vision", "projector", "all"] | None = None
    projector: Literal["frozen", "lora", "full"] = "frozen"
    data: Data
    training: Training = Field(default_factory=lambda: Training(epochs=1.0))
    evaluate: Evaluate = Field(default_factory=Evaluate)
    _origin: _Origin = PrivateAttr(default_factory=_Origin)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """A section without keys (all of them commented out) is one that was not given."""
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @field_validator("method")
    @classmethod
    def _named(cls, method: dict[str, Any]) -> dict[str, Any]:
        named = {"name": "lorasculpt", **method}
        if not isinstance(named["name"], str):
            raise ValueError(f"has the name {named['name']!r}, which is no text; name a method")
        return named

    @field_validator("projector")
    @classmethod
    def _one_treatment(cls, projector: str, info: ValidationInfo) -> str:
        scope = info.data.get("scope")
        if projector == "full" and scope in ("projector", "all"):
            raise ValueError(f"must not be full with scope: {scope}, which gives the projector an adapter; change one")
        if projector == "full" and info.data.get("quantization"):
            raise ValueError("must not be full with quantization, under which no weight is trained; use lora")
        return projector

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Read and check a YAML file.

        Args:
            path: The file.
            overrides: ``key=value`` with a dotted key, such as ``training.lr=1e-4``. Values are read as YAML.

        Raises:
            UserError: for the first mistake, naming its line or its override and the mend.
        """
        path = Path(path)
        values, lines = _read(path)
        origin = _Origin(str(path), lines)
        for override in overrides:
            _override(values, override, origin)
        try:
            config = cls.model_validate(values, context={"folder": path.parent.resolve()})
        except ValidationError as error:
            raise UserError(_explain(error, origin)) from None
        config._origin = origin
        return config

    def single(self, label: str, method: dict[str, Any], **changes: Any) -> RunConfig:
        """The run of ``method`` alone. Its mistakes are placed where ``methods.<label>`` was written, if it was.

        Args:
            label: What it is called under ``methods``.
            method: Its ``name`` and settings.
            changes: Checked values of other keys.

        Raises:
            UserError: where the runs would all be pushed to one place.
        """
        if self.training.arguments.get("push_to_hub"):
            raise self.error("training.arguments.push_to_hub", "is of one run, not of a comparison; remove it.")
        made, origin = self.model_copy(update={"method": method, "methods": {}, **changes}), self._origin
        moved = {
            key: ("method", *key[2:]) for key in (*origin.lines, *origin.overrides) if key[:2] == ("methods", label)
        }
        lines = {moved[key]: line for key, line in origin.lines.items() if key in moved}
        overrides = {moved[key]: text for key, text in origin.overrides.items() if key in moved}
        made._origin = _Origin(origin.file, {**origin.lines, **lines}, {**origin.overrides, **overrides})
        return made

    @property
    def loading(self) -> dict[str, Any]:
        """How the base is loaded: arguments of `lorasculpt.models.load.load`."""
        told = self.model_dump(include={"attention", "image_processor"}, exclude_defaults=True)
        return self.model_dump(include={"dtype", "quantization", "trust_remote_code"}) | told

    def to_yaml(self) -> str:
        """The whole run as YAML, every default written out; `load` reads it back as an equal run."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def error(self, key: str, message: str) -> UserError:
        """The error to raise about a dotted key: ``run.yaml:7: method.density <message>``."""
        return UserError(f"{self._origin.place(self._origin.known(key))}: {key} {message}")


# --- YAML with line numbers -----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads ``5e-4`` as the number it is; YAML 1.1 takes it for text."""


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {key: list(value) for key, value in _kind.yaml_implicit_resolvers.items()}
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[Key, int]]:
    """The value of a YAML text, and the line of every key in it. ``place`` names a line in messages."""
    loader = _Loader(text)
    lines: dict[Key, int] = {}
    try:
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, (), lines, place)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place(mark.line + 1 if mark else 1)
        raise UserError(f"{where}: not valid YAML ({error.problem}); correct the syntax") from None
    except RecursionError:
        raise UserError(f"{place(1)}: not valid YAML (an anchor refers to itself); correct the syntax") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{place(1)}: not valid YAML ({str(error).splitlines()[0]}); correct the syntax") from None
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node, key: Key, lines: dict[Key, int], place: Callable[[int], str]) -> Any:
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            lines[(*key, number)] = item.start_mark.line + 1
            items.append(_value(loader, item, (*key, number), lines, place))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    values: dict[Any, Any] = {}
    for name_node, item in node.value:
        name, line = loader.construct_object(name_node), name_node.start_mark.line + 1
        if not isinstance(name, Hashable):
            raise UserError(f"{place(line)}: a key must be a name; correct it")
        if name in values:
            dotted = ".".join(map(str, (*key, name)))
            raise UserError(f"{place(line)}: {dotted} is given twice (first on line {lines[(*key, name)]}); remove one")
        lines[(*key, name)] = line
        values[name] = _value(loader, item, (*key, name), lines, place)
    return values


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    values, lines = _parse(text, lambda line: f"{path}:{line}")
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: a run must be a mapping of keys such as base, output and data; got {values!r:.40}")
    return values, lines


def _override(values: dict[str, Any], override: str, origin: _Origin) -> None:
    """Write ``key=value`` into ``values`` and note it in ``origin``."""
    dotted, equals, text = override.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise UserError(f"override {override!r} must have the form key=value, such as training.lr=1e-4")
    section = values
    for depth, name in enumerate(key[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {'.'.join(key[:depth])} is no section; override it as a whole")
    section[key[-1]], _ = _parse(text, lambda line: f"override {override!r}")
    origin.overrides[key] = override


# --- messages -------------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, origin: _Origin) -> str:
    """The first mistake in one sentence: its place, its key, what it must be and what it is."""
    mistakes = error.errors(include_url=False)
    first = min(mistakes, key=lambda mistake: origin.line(_key(mistake["loc"])) or float("inf"))
    key = _key(first["loc"])
    dotted, got = ".".join(map(str, key)) or "the run", f"got {first['input']!r:.80}"
    match first["type"]:
        case "missing":
            return f"{origin.place(key[:-1])}: {dotted} is missing; add it"
        case "extra_forbidden":
            known = _keys(key[:-1])
            close = _called(key[-1]) or difflib.get_close_matches(str(key[-1]), known, n=1)
            mend = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(known)}"
            return f"{origin.place(key)}: {dotted} is no setting; {mend}"
        case "value_error":
            return f"{origin.place(key)}: {dotted} {first['ctx']['error']}"
        case "model_type" | "dict_type":
            return f"{origin.place(key)}: {dotted} must be a section of keys; {got}"
        case "is_instance_of":
            return f"{origin.place(key)}: {dotted} must be a path; {got}"
    must = re.sub(r"^\w+ should (be|have)", r"must \1", first["msg"])
    must = must.replace("a valid integer", "an integer").replace("valid ", "")
    return f"{origin.place(key)}: {dotted} {must}; {got}"


def _key(location: tuple[int | str, ...]) -> Key:
    """A pydantic location without the marks that it adds for dictionary keys."""
    return tuple(name for name in location if name != "[key]")


def _called(name: Hashable) -> list[str]:
    """The settings of this name, in whatever section."""
    fields = RunConfig.model_fields
    within = {f"{section}.": field.annotation for section, field in fields.items()} | {"": RunConfig}
    return [
        f"{before}{name}"
        for before, model in within.items()
        if isinstance(model, type) and issubclass(model, _Section) and name in model.model_fields
    ]


def _keys(section: Key) -> list[str]:
    """The settings of a section."""
    model: Any = RunConfig
    for name in section:
        model = model.model_fields[name].annotation if isinstance(name, str) else get_args(model)[0]
    return list(model.model_fields)
