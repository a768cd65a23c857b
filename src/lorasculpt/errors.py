"""The one exception that means *the user can mend this*."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input, told in one sentence that names the place and the mend.

    The command line prints it without a traceback and exits with code 2; from Python it is an ordinary exception.
    """


class Diverged(UserError):
    """The weights that were trained are not finite any more; the run left no adapter."""
