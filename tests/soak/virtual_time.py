"""A clock that stands still while a daemon works and jumps to the next thing to do when it waits.

The daemon, APScheduler and libvirt's test driver run unchanged, in one process, and see one time: that of day from
`time_machine`, and a monotonic one and waits that are replaced here. Unlike a clock that merely runs faster, it loses
nothing to a slow machine: however long a run takes, in the daemon's time it takes none.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import time_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime, timedelta

_SLICE = 0.001
"""Seconds of real time within which a waiting thread sees that the clock has moved."""
_NEEDED = {"MainThread", "tick", "APScheduler"}
"""The threads of the daemon that always wait for a time."""

_sleep, _monotonic, _wait, _sigtimedwait = time.sleep, time.monotonic, threading.Event.wait, signal.sigtimedwait


class VirtualTime:
    """The time of one process, from `start` on; made before the program under test is imported."""

    def __init__(self, start: datetime) -> None:
        self._traveller = time_machine.travel(start, tick=False).start()
        self._began = _monotonic()
        self.elapsed = 0.0
        """Virtual seconds since the start."""
        self._waits: dict[threading.Thread, tuple[float, threading.Event | None]] = {}
        virtual = self

        def wait(event: threading.Event, timeout: float | None = None) -> bool:
            if timeout is None:
                return _wait(event)
            with virtual._waiting(timeout, event) as over:
                while not _wait(event, _SLICE):
                    if over():
                        return event.is_set()
            return True

        def sleep(seconds: Any) -> None:  # noqa: ANN401
            with virtual._waiting(seconds) as over:
                while not over():
                    _sleep(_SLICE)

        def sigtimedwait(signals: Any, timeout: float) -> Any:  # noqa: ANN401
            with virtual._waiting(timeout) as over:
                while (found := _sigtimedwait(signals, _SLICE)) is None and not over():
                    pass
            return found

        time.monotonic = lambda: virtual._began + virtual.elapsed
        time.sleep = sleep
        threading.Event.wait = wait  # type: ignore[method-assign, assignment]
        signal.sigtimedwait = sigtimedwait

    @contextmanager
    def _waiting(self, seconds: float, event: threading.Event | None = None) -> Iterator[Callable[[], bool]]:
        thread, deadline = threading.current_thread(), self.elapsed + seconds
        self._waits[thread] = deadline, event
        try:
            yield lambda: self.elapsed >= deadline
        finally:
            del self._waits[thread]

    def drive(self, span: timedelta, *, busy: Callable[[], bool], every: timedelta, look: Callable[[], None]) -> None:
        """Move the clock in a thread of its own until the span is over, then send this process SIGTERM.

        Args:
            busy: whether anything goes on that does not wait for a time.
            every: how often `look` is called, while the clock stands.
        """

        def run() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it is for the main thread, which waits for it
            next_look = 0.0
            while self.elapsed < span.total_seconds():
                _sleep(_SLICE / 4)
                waits = dict(self._waits)
                if busy() or not self._all_wait(waits):
                    continue
                if self.elapsed >= next_look:
                    look()
                    next_look += every.total_seconds()
                soonest = min(deadline for deadline, _ in waits.values())
                self._move_to(min(soonest, next_look, span.total_seconds()))
            look()
            os.kill(os.getpid(), signal.SIGTERM)
            while True:  # what waits for an end still needs a time that goes on
                _sleep(_SLICE)
                self._move_to(self.elapsed + _SLICE)

        threading.Thread(target=run, name="virtual time", daemon=True).start()

    def _all_wait(self, waits: dict[threading.Thread, tuple[float, threading.Event | None]]) -> bool:
        """Tell whether every thread has seen the present time, and waits for a later one."""
        return {thread.name for thread in waits} >= _NEEDED and not any(
            deadline <= self.elapsed or (event is not None and event.is_set()) for deadline, event in waits.values()
        )

    def _move_to(self, elapsed: float) -> None:
        self._traveller.shift(elapsed - self.elapsed)
        self.elapsed = elapsed
