"""Tables for terminals and pipes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

_PIPE_WIDTH = 400
_STYLES = {"never": "bold red", "overdue": "bold red", "due": "yellow", "ok": "green"}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows with the same keys as a table headed by the keys; to a pipe without cutting or wrapping anything."""
    if not rows:
        print("(nothing)")
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0]:
        table.add_column(key.upper(), overflow="fold", no_wrap=key not in {"reasons", "newest", "snapshot"})
    for row in rows:
        table.add_row(*(_cell(str(value)) for value in row.values()))
    console.print(table)


def _cell(text: str) -> str:
    style = _STYLES.get(text)
    return f"[{style}]{text}[/]" if style else text.replace("[", r"\[")
