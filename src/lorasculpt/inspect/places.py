"""Where in a model a module is, by its name, and in which order such places are shown."""

from __future__ import annotations

from collections.abc import Iterable

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def place(name: str) -> tuple[str, str, int | None]:
    """(part, kind, block) of a module, as at `lorasculpt.inspect.lora.Layer`."""
    words = name.split(".")
    first = next((i for i, word in enumerate(words[:-1]) if word.isdigit()), None)
    # without its last word: the list the number counts in ("layers"), or the module itself
    before = [word for word in words[: len(words) if first is None else first][:-1] if word != "model"]
    return (
        before[0] if before else "model",
        ".".join(words[-2:]) if words[-1].isdigit() else words[-1],
        None if first is None else int(words[first]),
    )


def order(part: str, kind: str) -> tuple[str, int, str]:
    """Sort key of kinds of module: as a decoder layer uses them, the others by name after them."""
    word = kind.rpartition(".")[2]
    return part, KINDS.index(word) if word in KINDS else len(KINDS), kind


def in_order(blocks: Iterable[int | None]) -> list[int | None]:
    """Layer numbers, each once; what is outside of all layers comes last."""
    found = set(blocks)
    return [*sorted(block for block in found if block is not None), *([None] if None in found else [])]
