"""Durations as people write them in the configuration: ``15m``, ``1h30m``, ``36h``, ``7d``."""

from __future__ import annotations

import re
from datetime import timedelta

from kvmsnapd.errors import InvalidValueError, shown

# No months and years: how long they are depends on where one starts. Calendar retention counts periods.
_SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
DURATION_PATTERN = r"^ *([0-9]{1,9} *[wdhms] *)+$"
"""The accepted form, for the JSON schema as well."""

_LONGEST = timedelta(days=36500)


def parse_duration(text: str) -> timedelta:
    """Return the length of time that ``text`` names; units are w, d, h, m and s, and may be combined.

    Raises:
        InvalidValueError: the text is of another form, or names more than a hundred years.
    """
    if not re.fullmatch(DURATION_PATTERN, text):
        msg = f"{shown(text)} is not a duration: write a number with a unit, such as 90s, 15m, 36h, 7d or 1h30m"
        raise InvalidValueError(msg)
    seconds = sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"([0-9]+) *([wdhms])", text))
    if seconds > _LONGEST.total_seconds():
        msg = f"{shown(text)} is longer than a hundred years"
        raise InvalidValueError(msg)
    return timedelta(seconds=seconds)


def format_duration(length: timedelta) -> str:
    """Return a text that :func:`parse_duration` reads back as ``length`` in whole seconds, as people say it.

    One unit where that is short (``36h``, ``90m``, ``365d``), several where it is not (``2h5m``).
    """
    rest = int(length.total_seconds())
    units = [(unit, size) for unit, size in _SECONDS.items() if unit != "w"]
    for unit, size in units:
        if rest % size == 0 and (unit == "d" or rest // size < 100):  # noqa: PLR2004  # two digits are short
            return f"{rest // size}{unit}"
    parts = []
    for unit, size in units:
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def rough_duration(length: timedelta) -> str:
    """Return ``length`` to its largest sensible unit, for people: ``42s``, ``12m``, ``3h``, ``5d``."""
    seconds = int(length.total_seconds())
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", seconds)
    for unit, size, limit in (("s", 1, 120), ("m", 60, 120), ("h", 3600, 72)):
        if seconds < size * limit:
            return f"{sign}{seconds // size}{unit}"
    return f"{sign}{seconds // 86400}d"
