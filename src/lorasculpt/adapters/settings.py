"""What a setting of a config takes, by its annotation: of a run file and of Python alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from enum import Enum
from functools import cache, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

NUMBERS = ("lora_alpha",)
"""Settings that PEFT annotates as integers and that any number will do for."""
TAKEN = {bool: "true or false", float: "a number", int: "a whole number", str: "text", dict: "a mapping"}
TAKEN |= {list: "a list", list[str]: "a list of texts", list[int]: "a list of whole numbers"}


def check_types(config: Any) -> None:
    """See that what the dataclass ``config`` was made with is of the types that it says.

    Raises:
        ValueError: for the first setting that is not.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.init and (taken := must_be(type(config), field.name, value, "None")) is not None:
            raise ValueError(f"{field.name} must be {taken}; got {value!r:.80}.")


def must_be(kind: type, name: str, value: Any, nothing: str = "null") -> str | None:
    """What the setting ``name`` of the dataclass ``kind`` takes, in words, where ``value`` is of another type.

    Only the type is judged. Which of several texts it may be, or which numbers, the method says itself.

    Args:
        nothing: what the words call None.

    Returns:
        The words; None where ``value`` fits.
    """
    parts, adapter = _taken(kind, name)
    try:
        # as JSON, where an integer is a number too, and text that looks like one is none
        adapter.validate_json(to_json([value], fallback=str), strict=True)
    except ValidationError:
        told = {
            TAKEN.get(part) or TAKEN[get_origin(part) or part]
            for part in parts
            if part is not NoneType and (part is not int or float not in parts)
        }
        return " or ".join([text for text in TAKEN.values() if text in told] + [nothing] * (NoneType in parts))
    return None


@cache
def _taken(kind: type, name: str) -> tuple[list[Any], TypeAdapter]:
    """The types that a setting allows, and what checks a list of one value."""
    parts = [*_parts(_hints(kind)[name]), *([float] if name in NUMBERS else [])]
    allowed: Any = reduce(or_, parts)
    return parts, TypeAdapter(list[allowed])


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _parts(hint: Any) -> Iterator[Any]:
    """The types that an annotation allows, as YAML has them."""
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from _parts(part)
    elif get_origin(hint) is Literal:
        yield from (type(value) for value in get_args(hint))
    elif dataclasses.is_dataclass(hint):
        yield dict
    elif isinstance(hint, type) and issubclass(hint, Enum):
        yield str
    else:
        yield hint
