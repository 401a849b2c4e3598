"""The two kinds of small files kvmsnapd keeps outside libvirt: a lock and a freeze intent per domain UUID.

Neither is a record of snapshots; both may be deleted while no kvmsnapd process runs.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmsnapd.errors import DomainLockedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta
    from pathlib import Path

_POLL_SECONDS = 0.05


class DomainLocks:
    """One lock per domain, held across threads and processes, so that two never work on one domain at once.

    The kernel releases a lock when its process ends, however it ends.
    """

    def __init__(self, directory: Path) -> None:
        """Use lock files in ``directory``, which is created if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    @contextmanager
    def hold(self, domain_uuid: str, *, wait: timedelta) -> Iterator[None]:
        """Hold the domain's lock; raise DomainLockedError if another holder keeps it for longer than ``wait``."""
        path = self._directory / f"{domain_uuid}.lock"
        # Opened anew each time: a lock of flock(2) belongs to the open file, so threads exclude each other as well.
        with path.open("a+") as file:
            deadline = time.monotonic() + wait.total_seconds()
            while not _try_lock(file.fileno()):
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "somebody else"
                    msg = f"the domain is being worked on by {holder} (this is process {os.getpid()}); nothing was done"
                    raise DomainLockedError(msg)
                time.sleep(_POLL_SECONDS)
            file.truncate(0)
            file.write(f"process {os.getpid()}\n")
            file.flush()
            yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class FreezeIntents:
    """Which domains may have been left frozen by a call that never answered.

    A libvirtd killed inside a quiesced snapshot leaves the guest frozen for good (measured: libvirt 9.0 and 11.3,
    killed 10 to 70 ms into the call). The intent is on disk before the call and removed once libvirt has answered;
    whoever finds one later thaws the domain.
    """

    def __init__(self, directory: Path) -> None:
        """Keep intents in ``directory``, which is created if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    def record(self, domain_uuid: str) -> bool:
        """Put the intent on disk, durably; return whether it is new, so that its maker may clear it."""
        if self.exists(domain_uuid):
            return False
        with self._path(domain_uuid).open("w") as file:
            os.fsync(file.fileno())
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return True

    def exists(self, domain_uuid: str) -> bool:
        """Tell whether the domain has an intent."""
        return self._path(domain_uuid).exists()

    def clear(self, domain_uuid: str) -> None:
        """Remove the intent: libvirt has answered, or the domain was thawed or is gone."""
        self._path(domain_uuid).unlink(missing_ok=True)

    def outstanding(self) -> list[str]:
        """Return the UUIDs of all domains with an intent."""
        return sorted(path.stem for path in self._directory.glob("*.frozen"))

    def _path(self, domain_uuid: str) -> Path:
        return self._directory / f"{domain_uuid}.frozen"
