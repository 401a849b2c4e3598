"""The two kinds of small files kvmsnapd keeps outside libvirt: a lock and a freeze intent per domain UUID.

Neither is a record of snapshots; both may be deleted while no kvmsnapd process runs. The daemon has a user of its own,
and root's commands work beside it: what they make there belongs to the owner of the folder above, and links that this
owner may have put there are not followed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from kvmsnapd.errors import DomainLockedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta
    from pathlib import Path

_POLL_SECONDS = 0.05
_TOLD_AFTER_SECONDS = 1.0
"""A wait that is shorter is not worth a word."""


class DomainLocks:
    """One lock per domain, held across threads and processes, so that two never work on one domain at once.

    The kernel releases a lock when its process ends, however it ends.
    """

    def __init__(self, directory: Path) -> None:
        """Use lock files in ``directory``, which is created if missing."""
        _make_directory(directory)
        self._directory = directory

    @contextmanager
    def hold(
        self,
        domain_uuid: str,
        *,
        wait: timedelta | None,
        doing: str = "",
        on_wait: Callable[[str], None] = lambda _holder: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[None]:
        """Hold the domain's lock while the block runs.

        Args:
            wait: for how long another holder is waited for; None is without end.
            doing: what it is held for, in words for those who have to wait, such as ``run of standard``.
            on_wait: is told once who has it, if it is not to be had within a second.
            wanted: asked again and again while waiting; once it says no there is no more waiting.

        Raises:
            DomainLockedError: another holder kept it for longer than that.
        """
        # Opened anew each time: a lock of flock(2) belongs to the open file, so threads exclude each other as well.
        with _open(self._directory, f"{domain_uuid}.lock") as file:
            began, told = time.monotonic(), False
            while not _try_lock(file.fileno()):
                waited = time.monotonic() - began
                if (wait is not None and waited >= wait.total_seconds()) or not wanted():
                    holder = _holder(file)
                    msg = f"the domain is being worked on by {holder} (this is process {os.getpid()}); nothing was done"
                    raise DomainLockedError(msg)
                if waited >= _TOLD_AFTER_SECONDS and not told:
                    told = True
                    on_wait(_holder(file))
                time.sleep(_POLL_SECONDS)
            file.truncate(0)
            file.write(f"process {os.getpid()}{f': {doing}' if doing else ''}\n")
            file.flush()
            yield

    @contextmanager
    def reading(self, domain_uuid: str, *, wanted: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Keep the files that snapshots froze as they are while the block reads them; takes go on.

        Waits for a delete that goes on, as long as ``wanted`` says so; DomainLockedError afterwards.
        """
        with _open(self._directory, f"{domain_uuid}.files") as file:
            while not _try_lock(file.fileno(), fcntl.LOCK_SH):
                if not wanted():
                    msg = "a snapshot of the domain is being deleted; nothing was copied"
                    raise DomainLockedError(msg)
                time.sleep(_POLL_SECONDS)
            yield

    @contextmanager
    def changing(self, domain_uuid: str) -> Iterator[bool]:
        """Give whether nobody reads what snapshots froze; while the block runs nobody begins to."""
        with _open(self._directory, f"{domain_uuid}.files") as file:
            yield _try_lock(file.fileno())

    @contextmanager
    def making(self, path: str) -> Iterator[None]:
        """Have a file that is to be made for oneself; raise DomainLockedError if somebody else makes it."""
        with _open(self._directory, _lock_of_file(path)) as file:
            if not _try_lock(file.fileno()):
                msg = f"{path} is being made by {_holder(file)} (this is process {os.getpid()}); nothing was done"
                raise DomainLockedError(msg)
            file.truncate(0)
            file.write(f"process {os.getpid()}\n")
            file.flush()
            yield

    def is_made(self, path: str) -> bool:
        """Tell whether somebody makes this file now."""
        try:
            with _open(self._directory, _lock_of_file(path)) as file:
                return not _try_lock(file.fileno())
        except OSError:
            return False


def _lock_of_file(path: str) -> str:
    return f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.copy"


def _holder(file: TextIO) -> str:
    """Return what the holder of a lock wrote about itself."""
    file.seek(0)
    return file.read().strip() or "somebody else"


def _try_lock(descriptor: int, mode: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
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
        _make_directory(directory)
        self._directory = directory

    def record(self, domain_uuid: str) -> bool:
        """Put the intent on disk, durably; return whether it is new, so that its maker may clear it."""
        if self.exists(domain_uuid):
            return False
        with _open(self._directory, self._path(domain_uuid).name) as file:
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


def _make_directory(path: Path) -> None:
    """Make a directory if it is missing; root makes it for the owner of the one above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir()
        above = path.parent.stat()
        if os.geteuid() == 0:
            os.chown(path, above.st_uid, above.st_gid, follow_symlinks=False)


def _open(directory: Path, name: str) -> TextIO:
    """Open a file of a directory for reading and appending; a new one that root makes is the directory's owner's."""
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=folder)
        owner, status = os.fstat(folder), os.fstat(file)
        if status.st_uid != owner.st_uid and os.geteuid() == 0 and status.st_nlink == 1:
            os.fchown(file, owner.st_uid, owner.st_gid)
    finally:
        os.close(folder)
    return os.fdopen(file, "a+")
