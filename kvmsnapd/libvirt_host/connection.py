"""Connections to libvirt that come back: one event loop per process, keepalive, reconnection with growing pauses."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import libvirt

from kvmsnapd.errors import HypervisorUnreachableError, without_passwords
from kvmsnapd.libvirt_host.translate import translated_errors

if TYPE_CHECKING:
    from collections.abc import Callable

# A hung libvirtd is noticed after about 20 seconds (measured with SIGSTOP); without keepalive calls block for ever.
_KEEPALIVE_INTERVAL_SECONDS, _KEEPALIVE_COUNT = 5, 3
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0

_OPEN_WITHIN_SECONDS = 10.0

_SOURCES = {
    number: name.removeprefix("VIR_FROM_").lower()
    for name, number in vars(libvirt).items()
    if name.startswith("VIR_FROM_")
}
_GRADES = {libvirt.VIR_ERR_WARNING: "warning", libvirt.VIR_ERR_ERROR: "error"}

_event_loop_lock = threading.Lock()
_event_loop_started = False


def start_event_loop() -> None:
    """Start libvirt's event loop in one daemon thread, once per process.

    It must be registered before the first connection is opened, or keepalive is refused ("the caller doesn't support
    keepalive protocol").
    """
    global _event_loop_started  # noqa: PLW0603  # libvirt's loop is global to the process as well
    with _event_loop_lock:
        if _event_loop_started:
            return
        # libvirt would print every error to stderr; they arrive as exceptions.
        libvirt.registerErrorHandler(_note_message, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _event_loop_started = True


def _note_message(_context: object, error: tuple[Any, ...]) -> None:
    """Log what libvirt says. It is called on any thread, inside of libvirt: it must not raise, nor call libvirt."""
    with suppress(Exception):
        code, source, text, level, *_ = error
        words = {"code": code, "source": _SOURCES.get(source, str(source)), "grade": _GRADES.get(level), "text": text}
        # Not more: lookups of what may be gone fail all day, and what matters is raised as well.
        logging.getLogger(__name__).debug("libvirt.message", extra=words)


def _run_event_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:  # without the loop, keepalive would end for good
            time.sleep(1)


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    """Run ``work`` on a thread that need not end; the process does not wait for it."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # handed to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="libvirt-open", daemon=True).start()
    return future


def _alive(connection: Any) -> bool:  # noqa: ANN401
    try:
        return connection is not None and bool(connection.isAlive())
    except libvirt.libvirtError:  # closed, by another thread
        return False


class Connection:
    """A lasting way to one libvirt: for each thread a connection of its own, opened at first use and after it broke.

    libvirt's client crashes the process when two threads call on one connection and libvirtd stops answering (measured:
    within a minute with Debian 12's 9.0; it fits CVE-2024-4418). ``test:///``, which has no client, is the exception,
    as its state may be private to a connection.

    While libvirt is away each use fails at once, except that from time to time (0.5 s after the loss, then doubling
    up to 30 s) one of them tries to connect.
    """

    def __init__(self, uri: str, *, read_only: bool, stopwatch: Callable[[], float] = time.monotonic) -> None:
        """Remember where to connect to; nothing is opened yet."""
        self.uri = uri
        self._read_only = read_only
        self._stopwatch = stopwatch
        self._lock = threading.Lock()
        self._mine: Any = SimpleNamespace() if uri.startswith("test:") else threading.local()
        self._all: WeakSet[Any] = WeakSet()
        self._opening: Future[Any] | None = None
        self._pause = _FIRST_PAUSE_SECONDS
        self._retry_at = float("-inf")
        self._last_error = "not connected yet"

    def get(self) -> Any:  # noqa: ANN401  # a virConnect; the binding has no types
        """Return this thread's open ``virConnect``, which no other thread may use.

        Raises:
            HypervisorUnreachableError: libvirt does not answer, or did not a moment ago.
        """
        known = getattr(self._mine, "connection", None)
        if _alive(known):
            return known
        with self._lock:
            known = getattr(self._mine, "connection", None)  # another thread's, where all have one
            if not _alive(known):
                self._mine.connection = None
                self._mine.connection = self._connect()
                self._all.add(self._mine.connection)
            return self._mine.connection

    def _connect(self) -> Any:  # noqa: ANN401
        """Open a connection, unless the last attempt failed a moment ago."""
        if self._stopwatch() < self._retry_at:
            raise self._unreachable(self._last_error)
        try:
            # A libvirtd that hangs accepts connections and never answers; keepalive begins only after that.
            self._opening = self._opening or _in_background(self._open)
            opening, self._opening = self._opening, None
            try:
                connection = opening.result(timeout=_OPEN_WITHIN_SECONDS)
            except TimeoutError:
                self._opening = opening  # looked at again next time: a second one would hang as well
                raise
        except (libvirt.libvirtError, TimeoutError) as error:
            self._last_error = str(error) or f"no answer within {_OPEN_WITHIN_SECONDS:g} s"
            self._retry_at = self._stopwatch() + self._pause  # after the wait, which may have been long
            self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
            raise self._unreachable(self._last_error) from error
        self._pause = _FIRST_PAUSE_SECONDS
        self._retry_at = float("-inf")
        return connection

    def _open(self) -> Any:  # noqa: ANN401
        start_event_loop()
        connection = libvirt.openReadOnly(self.uri) if self._read_only else libvirt.open(self.uri)
        try:
            connection.setKeepAlive(_KEEPALIVE_INTERVAL_SECONDS, _KEEPALIVE_COUNT)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:  # test:/// runs in this very process
                raise
        return connection

    def _unreachable(self, words: str) -> HypervisorUnreachableError:
        msg = without_passwords(f"cannot reach libvirt at {self.uri}: {words}")
        return HypervisorUnreachableError(msg, operation="connect")

    def close(self) -> None:
        """Close the connections of all threads; a later use opens a new one."""
        with self._lock:
            connections, self._all = list(self._all), WeakSet()
            self._mine.connection = None
        for connection in connections:
            with translated_errors("close"):
                connection.close()
