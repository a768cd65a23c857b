"""The one exception that means *the user can mend this*, and what others say in a sentence of its."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input, told in one sentence that names the place and the mend.

    The command line prints it without a traceback and exits with code 2; from Python it is an ordinary exception.
    """

    def __init__(self, told: str) -> None:
        # what a DataLoader's worker raised, torch makes anew, with the whole traceback for a sentence
        if told.startswith(f"Caught {type(self).__name__} in DataLoader worker"):
            told = told.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip()
        super().__init__(told)


class Diverged(UserError):
    """The weights that were trained are not finite any more; the run left no adapter."""


def gist(error: Exception, lines: int = 1) -> str:
    """The first ``lines`` of what ``error`` says, to stand within a sentence; its type where it says nothing."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(said[:lines]).rstrip(".")
