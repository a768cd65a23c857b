"""The README.md of a trained adapter, which the Hub shows as its card: how it is loaded, what it learned and kept.

PEFT's own is a form to be filled in, and names a base that is a folder by its path, which the Hub refuses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .adapters.load import PROJECTOR_FILE
from .adapters.method import MethodConfig, read_record
from .adapters.origin import how_it_sees
from .config import RunConfig
from .files import write_text
from .hub import on_hub, public_name
from .report.results import measured as number
from .report.words import bracket, by_heart, percent

MARK = "<!-- Written by lorasculpt train and eval, which leave it alone where this line is not. -->"
STOCK = ("from peft import PeftModel", "PeftModel.from_pretrained")  # what loads it: the import, and the call
OWN = ("from lorasculpt import load", "load")
TEXT = """\
---
{head}---
{mark}

# {title}

An adapter of `{base}`, trained by the method `{method}` on `{data}`.

```python
{imported}
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{path}")  # AutoModelForCausalLM for a text model
model = {call}(model, "path/to/{title}")
```
{pictures}{further}{measured}
## How it was trained

```yaml
{settings}```

{steps} steps, seed {seed}, in {precision}, {trainable:,} trainable parameters{versions}.
"""
FURTHER = """
To train it further, load it with `lorasculpt.load(model, "path/to/{title}", trainable=True)`, which brings its masks
back: training fills the zeros of a plain LoRA.
"""
MEASURED = """
## What it learned and what it kept

Percent of {number} questions a task, with 95 % intervals over these: *target* is what was to be learned, *source* what
was to be kept.

{table}
{sentence}"""


def write(adapter: Path, config: RunConfig, training: dict[str, Any]) -> Path:
    """Write the card of the adapter in the folder ``adapter``, just trained as ``config`` says.

    Args:
        training: What ``training.json`` says.
    """
    path = adapter / "README.md"
    return write_text(path, _text(adapter, config, training, "", ""))


def measured(config: RunConfig, adapter: Path, training: dict[str, Any], content: dict[str, Any]) -> None:
    """Put what was measured into the card of ``adapter``, unless somebody has written another.

    Args:
        content: What ``results.json`` says.
    """
    path = adapter / "README.md"
    if not path.is_file() or MARK not in path.read_text(encoding="utf-8"):
        return
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    text = _text(adapter, config, training, _measured(content["runs"][0]), f"; {versions}")
    write_text(path, text)


def _text(adapter: Path, config: RunConfig, training: dict[str, Any], numbers: str, versions: str) -> str:
    known = on_hub(config.base)
    imported, call = STOCK if _stock(adapter) else OWN
    head = ModelCardData(
        base_model=config.base if known else None,
        library_name="peft",
        tags=["lorasculpt", config.method["name"], *([f"base_model:adapter:{config.base}"] if known else [])],
    )
    record = read_record(adapter)
    pruned = record is not None and record["state"].get("pruned")
    alone = not (adapter / PROJECTOR_FILE).is_file()  # else it is not trained further (`lorasculpt.adapters.load`)
    settings = config.model_dump(
        mode="json", include={"image_processor", "method", "scope", "projector", "training"}, exclude_defaults=True
    )
    settings.get("training", {}).pop("arguments", None)
    return TEXT.format(
        head=head.to_yaml() + "\n",
        mark=MARK,
        title=config.output.name,
        base=public_name(config.base),
        path=config.base if known else "path/to/the/base/model",
        method=config.method["name"],
        data=Path(str(config.data.train)).name,
        imported=imported,
        call=call,
        pictures=how_it_sees(adapter, config.output.name),
        further=FURTHER.format(title=config.output.name) if pruned and alone else "",
        measured=numbers,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        steps=training["steps"],
        seed=config.seed,
        precision=training["precision"],
        trainable=training["trainable"],
        versions=versions,
    )


def _stock(adapter: Path) -> bool:
    """Whether PEFT alone loads all of the adapter."""
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    own = issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[saved["peft_type"]], MethodConfig)
    return not own and not (adapter / PROJECTOR_FILE).is_file()


def _measured(run: dict[str, Any]) -> str:
    """The numbers of a run as Markdown."""

    def cell(found: dict[str, Any], name: str) -> str:
        value = number(found, name)
        return f"{percent(value.value)} {bracket(value)}".rstrip()

    lines = ["| | base | with this adapter |", "| --- | ---: | ---: |"]
    for side in ("source", "target"):
        for name, task in run[side].items():
            called = " ".join(name.replace("|", "\\|").split())
            lines.append(f"| {called} ({side}) | {cell(task, 'before')} | {cell(task, 'after')} |")
        if len(run[side]) > 1:
            before, after = (cell(run["summary"], f"{side}_{when}") for when in ("before", "after"))
            lines.append(f"| **{side}, mean** | {before} | {after} |")
    said = []
    if run["source"]:
        said.append(f"It keeps {cell(run['summary'], 'retention')} % of what the base scored on the source.")
    if drift := run.get("drift"):
        low, high = drift["interval"]
        said.append(f"Its drift from the base is {drift['value']:.3f} nats a token [{low:.3f}, {high:.3f}].")
    if rehearsed := by_heart(run):
        said.append(rehearsed)
    counts = [task["n"] for side in ("source", "target") for task in run[side].values()]
    least, most = min(counts), max(counts)
    return MEASURED.format(
        number=f"{least}" if least == most else f"{least} to {most}",
        table="\n".join(lines) + "\n",
        sentence=" ".join(said) + "\n" if said else "",
    )
