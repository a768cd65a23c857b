"""Every setting of a run's YAML file: its type, its default and what it means, read off `lorasculpt.config`."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .config import RunConfig
from .errors import UserError

WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "object": "map"}
OF_MACHINE = {"report_to"}  # settings whose default depends on the machine; their meaning says it


@dataclass(frozen=True)
class Setting:
    """A setting by its dotted ``key``, such as ``training.lr``; of a task in a list, ``data.sequence[].name``.

    ``kind`` is its type in words, ``default`` as YAML has it: ``required`` where there is none, empty where it is null.
    """

    key: str
    kind: str
    default: str
    meaning: str


def documented(kind: type) -> dict[str, str]:
    """What the ``Args:`` of a class's docstring say of each, in one line."""
    block = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n {4}(?=\w+: )", "\n" + block)[1:]
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


def settings(section: str | None = None) -> list[Setting]:
    """All settings of a run, or those of one ``section``: a part of the file, such as ``training``, or a single one.

    Raises:
        UserError: there is no such section or setting.
    """
    every = list(_of(RunConfig))
    if section is None:
        return every
    found = [one for one in every if one.key == section or re.match(rf"{re.escape(section)}(\[\])?\.", one.key)]
    if not found:
        parts = list(dict.fromkeys(re.split(r"[.\[]", one.key)[0] for one in every))
        close = difflib.get_close_matches(section, [*parts, *(one.key for one in every)], n=1)
        mend = f"did you mean {close[0]}?" if close else f"there are {', '.join(parts)}."
        raise UserError(f"no setting is called {section!r}; {mend}")
    return found


def _of(section: type[BaseModel], before: str = "") -> Iterator[Setting]:
    meanings, types = documented(section), section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        key = f"{before}{name}"
        inner = _sections(field)
        if not inner or "[]" in inner[1]:
            yield Setting(key, _kind(types[name], inner), _default(name, field), meanings[name])
        if inner:
            yield from _of(inner[0], f"{key}{inner[1]}.")


def _sections(field: FieldInfo) -> tuple[type[BaseModel], str] | None:
    """The section that a setting is, or a list of which it is."""
    if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
        return field.annotation, ""
    listed = [kind for kind in get_args(field.annotation) if inspect.isclass(kind) and issubclass(kind, BaseModel)]
    return (listed[0], "[]") if listed else None


def _kind(schema: dict[str, Any], inner: Any = None) -> str:
    """A type of JSON schema in words."""
    if "anyOf" in schema:  # null is told by the default
        return " or ".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return " or ".join([", ".join(schema["enum"][:-1]), schema["enum"][-1]])
    if "const" in schema:
        return str(schema["const"])
    if schema.get("format") == "path":
        return "path"
    if schema.get("type") == "array":
        if inner:
            return "list of tasks"
        what, comma, rest = _kind(schema["items"]).partition(", ")
        return f"list of {what}s{comma}{rest}"
    bounds = [
        f"{word} {schema[bound]:g}"
        for bound, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if bound in schema
    ]
    return ", ".join([WORDS[schema["type"]], *bounds])


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or name in OF_MACHINE:
        return ""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...")
