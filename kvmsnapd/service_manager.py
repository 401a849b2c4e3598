"""What systemd is told of the daemon, and asks of it (sd_notify(3)); nothing where something else started us."""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_LONGEST_STATUS = 400
"""Bytes of a status text; systemd would take more, and `systemctl status` show it on one line."""


class ServiceManager:
    """The way to the service manager that has started this process."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Take from the environment what the manager says, so that hooks do not inherit it."""
        self._address = environment.pop("NOTIFY_SOCKET", "")
        microseconds, meant = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        self.watchdog: timedelta | None = None
        """How long it waits for a sign of life before it ends us; None if it does not."""
        if microseconds.isdecimal() and meant in {"", str(os.getpid())}:
            self.watchdog = timedelta(microseconds=int(microseconds))

    def ready(self) -> None:
        """Tell that start or reload is done."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """Tell that the configuration is read anew; :meth:`ready` has to follow, whatever comes of it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Tell that the daemon ends."""
        self._tell("STOPPING=1", "STATUS=ending; runs that are going on may finish")

    def describe(self, text: str, *, alive: bool) -> None:
        """Give the text that `systemctl status` shows, and the sign of life that the watchdog waits for."""
        line = " ".join(text.split()).encode()[:_LONGEST_STATUS].decode(errors="ignore")
        self._tell(f"STATUS={line}", *(["WATCHDOG=1"] if alive else []))

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        # "@" stands for the NUL of an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as way:
                way.settimeout(1)
                way.sendto("\n".join(lines).encode(), address)
        except OSError as error:  # a manager that is being restarted is no reason to stop
            logging.getLogger(__name__).warning("the service manager cannot be told %s: %s", lines[0], error)
