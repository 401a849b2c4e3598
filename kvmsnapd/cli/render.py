"""Tables for terminals and pipes."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime, tzinfo

_PIPE_WIDTH = 100_000
_STYLES = {"never": "bold red", "overdue": "bold red", "due": "yellow", "ok": "green"}
_WIDE = {"reasons", "newest", "snapshot", "wrong", "next", "hold", "released"}
"""Columns that a narrow terminal may fold."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows with the same keys as a table headed by the keys; to a pipe without cutting or wrapping anything."""
    print_lines(rows, [])


def print_lines(rows: Sequence[dict[str, Any]], lines: Iterable[str]) -> None:
    """Print a table, and below it lines of text; see :func:`print_table`."""
    if rows and sys.stdout.isatty():
        make_console().print(make_table(rows))
    elif rows:
        console = Console(file=io.StringIO(), width=_PIPE_WIDTH, color_system=None, highlight=False)
        with console.capture() as captured:
            console.print(make_table(rows))
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    else:
        print("(nothing)")
    for line in lines:
        print(line)


def make_console() -> Console:
    """Return the terminal; with NO_COLOR in the environment it gets text alone."""
    return Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return rows with the same keys as a table headed by the keys."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0]:
        table.add_column(key.upper(), overflow="fold", no_wrap=key not in _WIDE)
    for row in rows:
        # As it is: names of people's snapshots may look like markup.
        table.add_row(*(Text(str(value), style=_STYLES.get(str(value), "")) for value in row.values()))
    return table


def format_time(at: datetime, zone: tzinfo) -> str:
    """Return a time for people, in this zone and with its offset."""
    return at.astimezone(zone).isoformat(timespec="minutes")


def format_size(count: int) -> str:
    """Return bytes in the largest unit of which there are at least one."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:  # noqa: PLR2004
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{count} B"
