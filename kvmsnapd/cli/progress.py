"""How far work is that takes longer than a second: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from kvmsnapd.durations import rough_duration
from kvmsnapd.errors import KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Measure = Callable[[], tuple[int, int] | None]

SHOWN_AFTER_SECONDS = 1.0
"""Work that is done sooner shows nothing."""
_MEASURED_EVERY_SECONDS = 0.5
_TOLD_EVERY_SECONDS = 10.0
_ENDS_WITHIN_SECONDS = 2.0
_MIB = 2**20


@contextmanager
def progress(what: str, measure: Measure | None = None, *, quiet: bool = False) -> Iterator[None]:
    """Show on stderr how far the work of the block is, once it has taken a second.

    On a terminal a bar; where bytes are not known, a bar that only moves, with the time that has passed. Elsewhere a
    plain line every ten seconds.

    Args:
        what: the work, such as ``deleting kvmsnapd-standard-20261122T090000Z``.
        measure: returns the bytes that are done and all there are, or None if that is not known now. It is called on
            a thread of its own, again and again, and may block; what it raises of our errors means that it is not
            known.
        quiet: show nothing, as with ``--json``.
    """
    if quiet:
        yield
        return
    ended = threading.Event()
    gauge = _Gauge(measure)
    shower = threading.Thread(target=_show, args=(what, gauge, ended), name="progress", daemon=True)
    shower.start()
    try:
        yield
    finally:
        ended.set()
        shower.join(_ENDS_WITHIN_SECONDS)


class _Gauge:
    """The latest measure, taken on a thread that nobody waits for: a call to a hung domain may not return."""

    def __init__(self, measure: Measure | None) -> None:
        self._measure = measure
        self.latest: tuple[int, int] | None = None

    def start(self, ended: threading.Event) -> None:
        if self._measure:
            threading.Thread(target=self._follow, args=(self._measure, ended), name="measure", daemon=True).start()

    def _follow(self, measure: Measure, ended: threading.Event) -> None:
        while not ended.wait(_MEASURED_EVERY_SECONDS if self.latest else 0):
            try:
                found = measure()
            except KvmsnapdError:
                found = None
            if found and found[1] > 0:
                self.latest = (min(found), found[1])
            elif ended.wait(_MEASURED_EVERY_SECONDS):
                return


def _show(what: str, gauge: _Gauge, ended: threading.Event) -> None:
    began = time.monotonic()
    if ended.wait(SHOWN_AFTER_SECONDS):
        return
    gauge.start(ended)
    if sys.stderr.isatty():
        _show_bar(what, gauge, ended)
    else:
        while not ended.wait(_TOLD_EVERY_SECONDS):
            print(_line(what, gauge.latest, time.monotonic() - began), file=sys.stderr, flush=True)


def _show_bar(what: str, gauge: _Gauge, ended: threading.Event) -> None:
    whole = Column(no_wrap=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        DownloadColumn(binary_units=True, table_column=whole),
        TimeElapsedColumn(table_column=whole),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bars:
        task = bars.add_task(what.replace("[", r"\["), total=None)
        while not ended.wait(_MEASURED_EVERY_SECONDS / 2):
            if gauge.latest:
                done, total = gauge.latest
                bars.update(task, completed=done, total=total)


def _line(what: str, latest: tuple[int, int] | None, seconds: float) -> str:
    passed = rough_duration(timedelta(seconds=seconds))
    if latest is None:
        return f"{what}: {passed} so far"
    done, total = latest
    return f"{what}: {done * 100 // total} % ({done // _MIB} of {total // _MIB} MiB), {passed} so far"
