"""An adapter for the world outside: a plain LoRA folder, or the base model with the update merged in.

Whatever is written is loaded again from disk, by the stock classes a user would load it with, and must answer fixed
prompts as the adapter does. Only then does it appear under its name; a failed export leaves nothing behind.
"""

from __future__ import annotations

import gc
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .adapters.layers import full
from .adapters.load import PROJECTOR_FILE, load_projector
from .adapters.load import load as load_adapter
from .adapters.origin import ORIGIN_FILE, how_it_sees, pass_origin_on
from .adapters.plain import Pair, of_rank, read_adapter, read_config, settings_of_rank, write_pairs
from .adapters.update import UpdateConfig, updates
from .errors import UserError
from .hub import on_hub
from .inspect.update import config_of as kind_of
from .kinds import TUNERS
from .models.load import check_mergeable, load, see_as
from .provenance import versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference of the logits that is put down to rounding, by the precision of what was written."""
AGREEMENT = {"float32": 0.98, "float16": 0.95, "bfloat16": 0.85}
"""Smallest share of positions with the same most likely token."""
PROMPTS = (
    "The capital of France is",
    "Question: What is 12 + 30? Answer:",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
IMAGE_PROMPT = "Describe the picture in one sentence."
VISIBLE = 1e-5
"""Relative effect on the logits from which on an adapter must be found again in what was written."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for ``--max-lora-rank``."""
CARD = """\
---
{base_model}library_name: peft
tags:
- lora
---

# {name}

A plain LoRA of rank {r}: two factors for each adapted linear layer, and nothing else.{task}

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")  # AutoModelForCausalLM for a text model
model = PeftModel.from_pretrained(base, "path/to/{name}")
```
{pictures}
With vLLM:

```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=path/to/{name}
```

`export.json` says how closely this adapter's logits agree with those of the adapter it was made from.
"""
WITH_VLLM = """
vLLM takes the base's, unless `--mm-processor-kwargs` tells it what is another in `preprocessor_config.json`.
"""


@dataclass(frozen=True)
class Parity:
    """How far the logits of what was written are from those of the live adapter, over every position of the prompts."""

    positions: int
    max_abs: float  # largest difference of one logit
    relative: float  # ||difference|| / ||logits centred at each position||
    top1: float  # share of positions with the same most likely token
    effect: float  # relative difference that the adapter itself makes to its base
    kept: float | None  # how much of that effect is found again, 1 being all of it; None for an adapter without effect


@dataclass(frozen=True)
class Report:
    """What an export wrote, and how well it agrees with the adapter; ``export.json`` in the folder holds the same."""

    out: str
    to: str
    task: str | None
    dtype: str
    adapter: str
    base: str
    bytes: int
    parity: Parity
    tolerance: float
    agreement: float
    versions: dict[str, str]


def export(
    adapter_folder: str | Path,
    base: str | Path,
    out: str | Path,
    to: Literal["lora", "merged"] = "lora",
    *,
    task: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Write an adapter as a plain LoRA or as a merged model, and check what was written against the adapter.

    The base is loaded in fp32 whatever ``dtype`` says, so that the check sees the rounding of what was written and no
    other: 4 bytes of memory for each of its parameters, and for each position of the prompts its logits.

    Args:
        adapter_folder: an adapter that is a LoRA on disk, of a method whose update is a matrix, or to be merged and of
            one of PEFT's own (`lorasculpt.kinds`).
        base: the model it belongs to, a folder or a name on the Hub.
        out: the folder to write.
        to: ``"lora"``: lora_A and lora_B alone, one scaling for all modules, for PEFT, vLLM and llama.cpp.
            ``"merged"``: W + (alpha/r) BA with processor and generation configuration, for anything that loads models.
        task: of a multi-task adapter, the task to export.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``. None keeps a LoRA's own, and merges in the base's own.
        force: replace an earlier export in ``out``.
        trust_remote_code: run the code that comes with the base.

    Raises:
        UserError: the adapter cannot be exported in this way or does not fit the base, ``out`` is taken, or what was
            written does not agree with the adapter within ``TOLERANCE`` and ``AGREEMENT``.
    """
    folder, out = Path(adapter_folder), Path(out)
    _check_words(to, dtype)
    config = config_of(folder)
    _check_method(folder, config, to, task)
    place = place_of(out)
    _check_out(out, force, folder, Path(base))
    lora = _plain(folder) if config is None and to == "lora" else None

    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    model, processor = load(str(base), **trusted)
    if to == "merged":
        check_mergeable(model, base)
    see_as(processor, folder)
    live = _attach(load_adapter, model, folder)
    inputs = _prompts(processor)
    expected = _logits(live, inputs, task)
    with live.disable_adapter():
        without = _logits(live, inputs)
    if config is not None and (to == "lora" or task is not None):  # a task is merged as the LoRA that it is
        _check_nothing_else(folder, to, _beside_updates(folder))
        lora = _as_lora(live, config, task)

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as temporary:
        written = Path(temporary) / place.name
        written.mkdir()
        if lora and to == "lora":
            dtype = dtype or known_dtype(lora.pairs[0].A.dtype)
            pass_origin_on(folder, written)
            _write_lora(lora, written, str(base), dtype, task)
            del live, model
            gc.collect()  # one base in memory at a time, also where a method's hooks hold it in a ring
            found = _logits(_attach(PeftModel.from_pretrained, load(str(base), **trusted)[0], written), inputs)
        else:
            dtype = dtype or known_dtype(AutoConfig.from_pretrained(str(base), **trusted).dtype)
            if lora:
                plain = Path(temporary) / f"{place.name}-lora"
                plain.mkdir()
                _write_lora(lora, plain, str(base), "float32")
                del live, model
                gc.collect()
                model = load(str(base), **trusted)[0]
                load_projector(model, folder)
                live = _attach(PeftModel.from_pretrained, model, plain)
            save_model(live.merge_and_unload(safe_merge=True), processor, written, dtype)
            del live, model
            gc.collect()
            found = _merged_logits(written, inputs, **trusted)
        report = Report(
            out=str(out),
            to=to,
            task=task,
            dtype=dtype,
            adapter=str(folder),
            base=str(base),
            bytes=sum(file.stat().st_size for file in written.iterdir()),
            parity=_compare(expected, without, found),
            tolerance=TOLERANCE[dtype],
            agreement=AGREEMENT[dtype],
            versions=versions(),
        )
        _check_parity(report)
        content = json.dumps({"schema": 1, **asdict(report)}, indent=1, allow_nan=False)
        (written / "export.json").write_text(content + "\n", encoding="utf-8")
        if place.exists():
            place.rename(Path(temporary) / "replaced")
        written.rename(place)
    return report


# --- what may be exported -------------------------------------------------------------------------------------------


def _check_words(to: str, dtype: str | None) -> None:
    if to not in ("lora", "merged"):
        raise UserError(f"An export is to 'lora' or 'merged', not {to!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"The dtype of an export is one of {', '.join(DTYPES)}, not {dtype!r}.")


def _check_out(out: Path, force: bool, *sources: Path) -> None:
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out} holds {source}, which the export is made from; name another folder.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / "export.json").is_file():
            raise UserError(f"{out} is not empty and holds no export; name another folder.")
        if not force:
            raise UserError(f"{out} holds an earlier export; replace it with force (--force), or name another folder.")


def place_of(out: Path) -> Path:
    """The path of ``out`` without links, where a finished folder is moved to: a link stays one, to the new folder.

    Raises:
        UserError: it is a folder that cannot be replaced: a disk of its own, or the one whose shell would then be in
            a folder that is gone.
    """
    place = out.resolve()
    if place.exists() and (Path.cwd().is_relative_to(place) or place.is_mount()):
        raise UserError(f"{place} is the folder you are in, or a disk of its own; name a folder in it.")
    return place


def config_of(adapter_folder: str | Path) -> UpdateConfig | None:
    """The config of an adapter whose method changes the forward pass; None for every other folder."""
    folder = Path(adapter_folder)
    kind = kind_of(folder) if (folder / "adapter_config.json").is_file() else None
    return None if kind is None else kind.from_pretrained(str(folder))


def _check_method(folder: Path, config: UpdateConfig | None, to: str, task: str | None) -> None:
    """See that what is asked for can be made of the adapter."""
    if config is None:
        if to == "lora" or not _of_peft(folder):
            read_config(folder)  # refuses what is no single product
    elif not config.exports():
        raise UserError(
            f"{folder} is a {config.method} adapter, of which neither a plain LoRA nor a merged model can be made: "
            f"{config.why_not}; deploy it with lorasculpt.load."
        )
    elif to not in config.exports():
        raise UserError(f"{folder} is a {config.method} adapter, whose update has no low rank; export it to merged.")
    elif config.merges == "task" and task not in config.tasks:
        what = "is another LoRA for each task" if task is None else f"knows no task {task!r}"
        raise UserError(
            f"{folder} {what}; say which with task: {', '.join(config.tasks)} (on the command line --task NAME, or "
            "--task all for each)."
        )
    if task is not None and (config is None or config.merges != "task"):
        raise UserError(
            f"{folder} is the same for all tasks, so there is no {task!r} to choose; leave task (--task) out."
        )


def _of_peft(folder: Path) -> bool:
    """Whether the adapter is of one of PEFT's methods that are no LoRA and can be merged."""
    try:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        return PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) in TUNERS.values()
    except (OSError, ValueError, KeyError, TypeError):  # read_config says what is wrong
        return False


def _check_nothing_else(folder: Path, to: str, tensors: Sequence[str]) -> None:
    """See that there is nothing in ``folder`` for which a plain LoRA has no place."""
    more = [*tensors, PROJECTOR_FILE] if to == "lora" and (folder / PROJECTOR_FILE).is_file() else tensors
    if more:
        mend = "; export it as a merged model." if to == "lora" else ", so it cannot be merged for one task."
        raise UserError(f"{folder} also holds {more[0]}, for which a plain LoRA has no place{mend}")


@dataclass(frozen=True)
class _Lora:
    """A plain LoRA: its configuration and its factors."""

    config: LoraConfig
    pairs: tuple[Pair, ...]


def _plain(folder: Path) -> _Lora:
    """The adapter, if lora_A and lora_B are all there is to it."""
    adapter = read_adapter(folder)
    _check_nothing_else(folder, "lora", adapter.other)
    config = LoraConfig.from_pretrained(str(folder))
    if not (config.rank_pattern or config.alpha_pattern or config.use_rslora):
        return _Lora(config, adapter.pairs)
    return _folded(config, adapter.pairs)


def _beside_updates(folder: Path) -> list[str]:
    """The tensors in ``folder`` that belong to no adapted linear."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        keys = file.keys()
    return [key for key in keys if ".lora_update." not in key]


@torch.no_grad()
def _as_lora(live: PeftModel, config: UpdateConfig, task: str | None) -> _Lora:
    """What the adapter amounts to, for one of its tasks where it is another for each."""
    number = None if task is None else config.tasks.index(task)
    stock = {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.init}
    pairs = []
    for name, update in updates(live).items():
        A, B = update.factors(number)
        pairs.append(Pair(name, full(A), full(B), 1.0))
    return _folded(LoraConfig(**stock), pairs)


def _attach(loader: Callable[[nn.Module, str], PeftModel], model: nn.Module, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT only warns, and the modules concerned would silently be those of the base
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return loader(model, str(folder)).eval()
        except UserWarning as error:
            raise UserError(f"The adapter in {folder} does not fit the base: {str(error)[:200]}") from None


def known_dtype(dtype: torch.dtype | str | None) -> str:
    """The name of ``dtype`` if it is one of ``DTYPES``, else float32."""
    name = str(dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


# --- writing --------------------------------------------------------------------------------------------------------


def _folded(config: LoraConfig, pairs: Sequence[Pair]) -> _Lora:
    """The same LoRA with one rank and a scaling of 1 for all modules.

    vLLM takes one rank and one alpha for all modules, llama.cpp one alpha and no rsLoRA: they would scale other
    adapters wrongly without a word. So B takes the scaling in, and smaller ranks are filled up with zeros.
    """
    r = max(pair.A.shape[0] for pair in pairs)
    for name, value in settings_of_rank(r).items():
        setattr(config, name, value)
    return _Lora(config, tuple(of_rank(pair, r) for pair in pairs))


def _write_lora(lora: _Lora, out: Path, base: str, dtype: str, task: str | None = None) -> None:
    """Stock files."""
    config = lora.config
    config.init_lora_weights = True  # another value changes the base when the adapter is loaded
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or base
    config.save_pretrained(str(out))
    rounded = (replace(pair, A=pair.A.to(DTYPES[dtype]), B=pair.B.to(DTYPES[dtype])) for pair in lora.pairs)
    write_pairs(tuple(rounded), out)
    (out / "README.md").write_text(_card(config, out, task), encoding="utf-8")


def _card(config: LoraConfig, out: Path, task: str | None) -> str:
    base = config.base_model_name_or_path
    pictures = how_it_sees(out, out.name)
    known = on_hub(base)
    shown = base if known else "path/to/the/base/model"
    rank = next((rank for rank in VLLM_RANKS if rank >= config.r), config.r)
    return CARD.format(
        base_model=f"base_model: {base}\n" if known else "",
        base=shown,
        name=out.name,
        pictures=pictures + WITH_VLLM if pictures else "",
        r=config.r,
        rank=rank,
        task="" if task is None else f" It is made for the task {task}.",
    )


def save_model(model: nn.Module, processor: Any, out: Path, dtype: str) -> None:
    """Write a model whose weights hold the update, in one of ``DTYPES``, and everything else that loading it needs."""
    model = model.to(DTYPES[dtype])
    generation = getattr(model, "generation_config", None)
    if generation is None:
        model.save_pretrained(out)
    else:
        # some bases state what has no effect, such as a temperature without sampling; transformers saves none of these
        model.generation_config = GenerationConfig()
        model.save_pretrained(out)
        generation.to_json_file(out / GENERATION_CONFIG_NAME)
    processor.save_pretrained(out)


def another_base(adapter_folder: str | Path, base: str | Path) -> str | None:
    """The base that an adapter says it was trained on, where that is not called ``base``.

    None also if it says none, or has kept of its base what tells another one (`lorasculpt.adapters.origin`).
    """
    if (Path(adapter_folder) / ORIGIN_FILE).is_file():
        return None
    said = PeftConfig.from_pretrained(str(adapter_folder)).base_model_name_or_path
    same = not said or said == str(base) or Path(said).resolve() == Path(base).resolve()
    return None if same else said


# --- the parity check -----------------------------------------------------------------------------------------------


def _prompts(processor: Any) -> list[dict[str, Tensor]]:
    """The fixed prompts as model inputs: text, and a picture if the processor takes one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = []
    for text in PROMPTS:
        encoded = tokenizer(text, return_tensors="pt")
        inputs.append({key: encoded[key] for key in ("input_ids", "attention_mask")})
    if getattr(processor, "image_processor", None) is not None:
        inputs.append(_image_prompt(processor))
    return inputs


def _image_prompt(processor: Any) -> dict[str, Tensor]:
    picture = Image.new("RGB", (224, 224), (200, 220, 240))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 40, 130, 140), fill=(220, 40, 40))
    draw.rectangle((110, 120, 200, 200), fill=(40, 90, 200))
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": IMAGE_PROMPT}]
        return dict(
            processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    token = getattr(processor, "image_token", "<image>")
    return dict(processor(images=picture, text=f"{token}\n{IMAGE_PROMPT}", return_tensors="pt"))


@torch.no_grad()
def _logits(model: nn.Module, inputs: Sequence[dict[str, Tensor]], task: str | None = None) -> Tensor:
    """Logits of every position of every prompt, (positions, vocabulary), in fp32 on the CPU."""
    device = next(model.parameters()).device
    told = {} if task is None else {"task": task}
    found = [model(**{key: x.to(device) for key, x in one.items()}, **told).logits[0] for one in inputs]
    return torch.cat(found).float().cpu()


def _merged_logits(folder: Path, inputs: Sequence[dict[str, Tensor]], **trusted: Any) -> Tensor:
    model, processor = load(str(folder), **trusted)
    again = _prompts(processor)
    if any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(inputs, again, strict=True)):
        raise UserError(
            "The processor that was written reads the prompts differently from the base's; nothing is kept."
        )
    return _logits(model.eval(), again)


def _compare(expected: Tensor, without: Tensor, found: Tensor) -> Parity:
    # a constant added to all logits of a position changes no probability, so it is not counted as size
    size = float((expected - expected.mean(-1, keepdim=True)).norm())
    effect, error = expected - without, found - expected
    relative_effect = float(effect.norm()) / size
    # the part of the written model's own effect that points where the adapter's does: 0 if the adapter was lost,
    # however small it is beside the rounding of the base
    kept = 1 + float((error * effect).sum() / effect.square().sum()) if relative_effect > VISIBLE else None
    return Parity(
        positions=expected.shape[0],
        max_abs=float(error.abs().max()),
        relative=float(error.norm()) / size,
        top1=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        effect=relative_effect,
        kept=kept,
    )


def _check_parity(report: Report) -> None:
    parity = report.parity
    present = parity.kept is None or abs(parity.kept - 1) < 0.5
    if parity.relative <= report.tolerance and parity.top1 >= report.agreement and present:
        return
    kept = "" if parity.kept is None else f", with {parity.kept:.0%} of the adapter's effect"
    mend = "" if report.dtype == "float32" else "; try dtype='float32'"
    raise UserError(
        f"The export of {report.adapter} does not agree with the adapter and was not kept: logits differ by "
        f"{parity.relative:.2g} (at most {report.tolerance:g}), by {parity.max_abs:.2g} at the worst, and agree "
        f"on the top token at {parity.top1:.1%} of {parity.positions} positions "
        f"(at least {report.agreement:.0%}){kept}{mend}."
    )
