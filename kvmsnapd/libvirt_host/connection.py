"""Connections to libvirt that come back: one event loop per process, keepalive, reconnection with growing pauses."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import libvirt

from kvmsnapd.errors import HypervisorUnreachableError
from kvmsnapd.libvirt_host.translate import translated_errors

if TYPE_CHECKING:
    from collections.abc import Callable

# A hung libvirtd is noticed after about 20 seconds (measured with SIGSTOP); without keepalive calls block for ever.
_KEEPALIVE_INTERVAL_SECONDS, _KEEPALIVE_COUNT = 5, 3
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0

_OPEN_WITHIN_SECONDS = 10.0

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
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()
        _event_loop_started = True


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


class Connection:
    """A lasting connection to one libvirt URI; opened at first use and again after it broke. Thread-safe.

    While libvirt is away each use fails at once, except that from time to time (0.5 s after the loss, then doubling
    up to 30 s) one of them tries to connect.
    """

    def __init__(self, uri: str, *, read_only: bool, stopwatch: Callable[[], float] = time.monotonic) -> None:
        """Remember where to connect to; nothing is opened yet."""
        self.uri = uri
        self._read_only = read_only
        self._stopwatch = stopwatch
        self._lock = threading.Lock()
        self._connection: Any = None
        self._opening: Future[Any] | None = None
        self._pause = _FIRST_PAUSE_SECONDS
        self._retry_at = float("-inf")
        self._last_error = "not connected yet"

    def get(self) -> Any:  # noqa: ANN401  # a virConnect; the binding has no types
        """Return the open ``virConnect``.

        Raises:
            HypervisorUnreachableError: libvirt does not answer, or did not a moment ago.
        """
        with self._lock:
            if self._connection is not None and self._connection.isAlive():
                return self._connection
            if self._stopwatch() < self._retry_at:
                raise self._unreachable(self._last_error)
            self._connection = None
            try:
                # A libvirtd that hangs accepts connections and never answers; keepalive begins only after that.
                self._opening = self._opening or _in_background(self._open)
                opening, self._opening = self._opening, None
                try:
                    self._connection = opening.result(timeout=_OPEN_WITHIN_SECONDS)
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
            return self._connection

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
        return HypervisorUnreachableError(f"cannot reach libvirt at {self.uri}: {words}", operation="connect")

    def close(self) -> None:
        """Close the connection; a later use opens it again."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            with translated_errors("close"):
                connection.close()
