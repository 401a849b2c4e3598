"""Ask before something is done that cannot be undone."""

from __future__ import annotations

import sys

from kvmsnapd.errors import InvalidValueError


def agrees(question: str, *, yes: bool) -> bool:
    """Ask a person on the terminal, whose plain Enter is a no; ``yes`` is the answer if it was given beforehand.

    Raises:
        InvalidValueError: there is nobody to ask.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        msg = "there is no terminal to ask on; nothing was changed. Read the plan above, and add --yes if it is meant"
        raise InvalidValueError(msg)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
