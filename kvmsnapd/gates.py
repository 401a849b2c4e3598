"""How many runs a host, and how many takes and merges one storage, bears at once."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.errors import StorageBusyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


WAIT = timedelta(minutes=5)
"""How long a take waits for others on its storage before it is tried again later."""


class HostGate:
    """Lets ``places`` runs go on at once; one that takes very long gives its place up and goes on beside them.

    A call to libvirt cannot be cancelled, and one to a hung QEMU lasts as long as that hangs (measured, libvirt 9.0 and
    11.3). Such a domain must not keep all others from their snapshots.
    """

    def __init__(self, *, places: int, patience: timedelta) -> None:
        """Open the gate; a run may hold its place for ``patience``."""
        self._places = threading.Semaphore(places)
        self._patience = patience

    @contextmanager
    def hold(self, on_stuck: Callable[[], None]) -> Iterator[None]:
        """Wait for a place and hold it; ``on_stuck`` is called, on another thread, when it is given up."""
        self._places.acquire()
        given_up = threading.Lock()  # who gets it gives the place back

        def give_up() -> None:
            if given_up.acquire(blocking=False):
                self._places.release()
                on_stuck()

        timer = threading.Timer(self._patience.total_seconds(), give_up)
        timer.daemon = True
        try:
            timer.start()
            yield
        finally:
            timer.cancel()
            if given_up.acquire(blocking=False):
                self._places.release()
            else:
                timer.join()  # so that what is said of the end comes after what is said of being stuck


class StorageGates:
    """Lets ``takes`` snapshots and ``heavy`` merges or RAM saves go on at once in each folder. Thread-safe.

    For this process: a person's command beside the daemon is not counted.
    """

    def __init__(self, *, takes: int, heavy: int) -> None:
        """Open all gates."""
        self._takes = defaultdict[str, threading.Semaphore](lambda: threading.Semaphore(takes))
        self._heavy = defaultdict[str, threading.Semaphore](lambda: threading.Semaphore(heavy))
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, folders: Iterable[str], *, heavy: bool, wait: timedelta = WAIT) -> Iterator[bool]:
        """Wait for a place in each of these folders and hold it; in one order everywhere, so that none waits for ever.

        Gives whether there was a wait, during which things may have changed.

        Raises:
            StorageBusyError: there was no place within ``wait``; a merge may take hours.
        """
        deadline = time.monotonic() + wait.total_seconds()
        with self._lock:
            places = [(self._heavy if heavy else self._takes)[folder] for folder in sorted(set(folders))]
        waited = False
        with ExitStack() as held:
            for place in places:
                if not place.acquire(blocking=False):
                    waited = True
                    if not place.acquire(timeout=max(0.0, deadline - time.monotonic())):
                        msg = "other merges or takes go on on the same storage; tried again later"
                        raise StorageBusyError(msg)
                held.callback(place.release)
            yield waited
