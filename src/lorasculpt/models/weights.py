"""The weights of a base in a folder, one by one, without the model: which belongs to which module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..files import read_json


@dataclass(frozen=True)
class BaseWeights:
    """The tensors of a Hugging Face model folder, read one by one from its safetensors shards."""

    folder: Path
    shards: dict[str, Path]  # tensor name -> the shard it is in

    @classmethod
    def open(cls, folder: str | Path) -> BaseWeights:
        """List the tensors of ``folder``; none is read yet.

        Raises:
            UserError: no such folder, or no safetensors weights in it, or not all of them.
        """
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = {key: folder / name for key, name in read_json(index).get("weight_map", {}).items()}
            if missing := next((shard for shard in shards.values() if not shard.is_file()), None):
                raise UserError(f"{missing} is not there, which {index.name} names; copy or download the model again.")
        elif (folder / "model.safetensors").is_file():
            with _opened(folder / "model.safetensors") as file:
                shards = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise UserError(
                f"{folder} has no model.safetensors; the base must be a model with such weights, by its folder or its "
                "name on the Hub."
            )
        return cls(folder, shards)

    def match(self, names: Iterable[str]) -> dict[str, str]:
        """The weight that belongs to each module, though prefixes may differ between versions of transformers.

        A candidate has the same layer numbers in the same order. Among the candidates the longest common end of the
        dotted names wins, then the larger number of words shared by what stands before it (``language_model`` or
        ``vision_tower``, say).

        Raises:
            UserError: a module has no weight here, several that fit equally well, or shares one with another module.
        """
        weights = [(key, _words(key)) for key in self.shards if key.endswith(".weight")]
        by_numbers: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
        for key, words in weights:
            by_numbers.setdefault((words[-1], *filter(str.isdigit, words)), []).append((key, words))
        found: dict[str, str] = {}
        for name in names:
            own = name.split(".")
            best: list[str] = []
            high = (0, 0)
            for key, words in by_numbers.get((own[-1], *filter(str.isdigit, own)), []):
                score = _likeness(own, words)
                if score > high:
                    best, high = [key], score
                elif score == high:
                    best.append(key)
            if len(best) != 1:
                what = f"both {best[0]} and {best[1]}" if best else "no weight"
                raise UserError(f"{self.folder} has {what} for the adapter's {name}; is it the base of this adapter?")
            if best[0] in found.values():
                raise UserError(f"{self.folder} has one weight {best[0]} for {name} and another module of the adapter.")
            found[name] = best[0]
        return found

    def read(self, key: str) -> Tensor:
        """One tensor, as it is stored."""
        with _opened(self.shards[key]) as file:
            return file.get_tensor(key)


def _words(key: str) -> list[str]:
    return key.removesuffix(".weight").split(".")


def _likeness(a: list[str], b: list[str]) -> tuple[int, int]:
    """Length of the common end, and how many different words what stands before it has in common."""
    end = next(
        (i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y), min(len(a), len(b))
    )
    return end, len({*a[: len(a) - end]} & {*b[: len(b) - end]})


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); it may be missing or cut short.") from None
