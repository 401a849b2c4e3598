"""Running programs for the test ground: an answer in time, or an error that says what happened."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

_MOST_TOLD = 2000
"""Bytes of what a failing command printed: some complain there."""


class LabError(Exception):
    """The test ground itself failed; says nothing about the program under test."""


def run(*command: str | PathLike[str], timeout_s: float = 60.0, stdin: bytes = b"") -> str:
    """Return what a command prints; raise LabError when it fails, is not there or takes too long.

    The error carries the command's own complaint. With a time limit always: a hanging tool must fail one
    test, not the whole run.
    """
    words = " ".join(str(word) for word in command)
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=timeout_s, check=False)
    except FileNotFoundError as error:
        msg = f"{words}: {error.strerror}"
        raise LabError(msg) from error
    except subprocess.TimeoutExpired as error:
        msg = f"{words}: no end after {timeout_s:.0f} s"
        raise LabError(msg) from error
    if done.returncode != 0:
        complaint = (done.stdout[-_MOST_TOLD:] + done.stderr).decode(errors="replace").strip()
        msg = f"{words}: exit status {done.returncode}: {complaint}"
        raise LabError(msg)
    return done.stdout.decode()
