"""What the file of a comparison holds already: runs of another machine, or whose folders are gone.

They are taken as they are where they are the same runs by what the file says of them. Trials are there with their
scores alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..measure import shape
from ..report.results import NEAR_BASE
from .runs import Run


@dataclass(frozen=True)
class Known:
    """The ``tests`` and ``trials`` of the file ``path``, as they are in it; none of either where there is no file.

    ``base`` is what the base of these is called, where the file says that.
    """

    path: Path | None = None
    tests: list[dict[str, Any]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    base: str | None = None

    def find(self, run: Run, validation: str) -> dict[str, Any] | None:
        """The entry of ``run``, which of a trial is one by which rates were chosen on ``validation``."""
        entries, wanted = self.trials if run.trial else self.tests, _known_by(run, validation)
        return next((one for one in entries if all(one.get(key) == value for key, value in wanted.items())), None)

    def check(self, number: str, before: float | None, here: float | None) -> None:
        """See that the base does on the source what it did when the entries that are taken were made.

        Args:
            number: ``"source_before"``, or where there is no source ``"target_before"``.
            before: That score of the base then; None where it was not measured.
            here: The same in a run of today.

        Raises:
            UserError: they differ.
        """
        side = number.removesuffix("_before")
        if before is not None and here is not None and abs(before - here) > NEAR_BASE:
            raise UserError(
                f"{self.path} holds runs of another base or other questions: the {side} was at {before:.3f} before "
                f"training there and is at {here:.3f} here; name another file with --out, or remove it."
            )


def trial(run: Run, result: dict[str, Any], validation: str) -> dict[str, Any]:
    """The entry of a trial whose rate is chosen on ``validation``."""
    kept = ("scores", "versions", "data", "general", "questions", "evaluate")
    told = {key: result[key] for key in kept if key in result}
    return _known_by(run, validation) | told


def _known_by(run: Run, validation: str) -> dict[str, Any]:
    """The part of an entry by which it is that of ``run``."""
    return {
        "label": run.label,
        "seed": run.config.seed,
        **({"validation": validation} if run.trial else {}),
        "settings": shape(run.config),
        **({"edit": run.edit.made(run.config)} if run.edit else {}),
    }


def read(path: Path, rows: str) -> Known:
    """What ``path`` holds, which may not exist.

    Args:
        path: The file.
        rows: Where its tests are: ``"runs"``, or ``"sequences"`` of a comparison of these.

    Raises:
        UserError: it is no file of a comparison, or of one of the other kind.
    """
    if not path.is_file() and not path.is_dir():  # a device, such as /dev/stdout, is written and not read
        return Known()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tests, trials = found[rows], found.get("trials", [])
        assert "table" in found  # other files have runs too
        assert all(isinstance(one, dict) and "label" in one for one in (*tests, *trials))
    except (OSError, ValueError, LookupError, TypeError, AssertionError):
        words = "comparison of sequences" if rows == "sequences" else "comparison of single tasks"
        raise UserError(f"{path} is there and is not the file of a {words}; name another one with --out.") from None
    return Known(path, tests, trials, found.get("base"))
