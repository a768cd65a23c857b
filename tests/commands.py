"""The command line, as a test types it."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from lorasculpt import cli


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``lorasculpt`` with ``arguments``."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["lorasculpt", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def done(*arguments: object) -> str:
    """Standard output of a command that must do."""
    code, out, err = call(*arguments)
    assert code == 0, err
    return out


def refused(*arguments: object) -> str:
    """The one sentence with which a command ends with 2."""
    code, _, err = call(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("lorasculpt: ")]
    assert (code, len(lines)) == (2, 1), err
    assert "\t" not in lines[0]
    return lines[0]
