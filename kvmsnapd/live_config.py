"""The configuration in force: read, compared with its files, replaced, and told to other processes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmsnapd.config import fingerprint, load_config, read_contents
from kvmsnapd.errors import ConfigError, KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from kvmsnapd.config import Config
    from kvmsnapd.config.files import Contents

_NOTE, _LOCK = "config.json", "daemon.lock"
_NOTE_VERSION = 1
_LOOKS_TO_SETTLE = 2
_LOCK_SECONDS = 1.0


class LiveConfig:
    """The configuration of a running daemon. Read by all threads; replaced by the main thread only."""

    def __init__(self, path: Path, *, clock: Callable[[], datetime]) -> None:
        """Read the configuration.

        Raises:
            ConfigError: it is not valid.
        """
        self.path, self._clock = path, clock
        self.current = load_config(path, check_web=True)
        self.loaded_at = clock()
        self.rejected: tuple[str, ...] = ()
        """What was wrong with the last one, if it was refused."""
        self.stale = False
        """Whether the files differ from what is in force."""
        self._in_force = self._tried = self._seen = fingerprint(self.current.contents)
        self._looks = 0
        # The same place until the end, whatever a later configuration says.
        self._directory = self.current.runtime_directory
        self._lock: int | None = None

    def be_the_only_one(self) -> None:
        """Keep other daemons from this runtime directory until this process ends.

        Raises:
            KvmsnapdError: another one is at work.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_SECONDS
        while not self._take_lock():
            if time.monotonic() > deadline:
                msg = f"another kvmsnapd uses {self._directory}; stop it, or set runtime_directory and state_directory"
                raise KvmsnapdError(msg)
            time.sleep(_LOCK_SECONDS / 20)  # a reader of the note has it for a moment
        self._write_note()

    def _take_lock(self) -> bool:
        try:
            fcntl.flock(self._lock or 0, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def read(self, *, asked: bool = True) -> Config | None:
        """Return the configuration as the files have it now; it is not yet in force. None if they are being edited.

        Args:
            asked: whether a person asked for it, and it is not just the files that have changed.

        Raises:
            ConfigError: it is not valid; the one before stays in force, and the refusal is noted.
        """
        self._tried = self._fingerprint()
        try:
            config = load_config(self.path, check_web=True)
            if not asked and fingerprint(config.contents) != self._seen:
                self._tried = ""
                return None
        except ConfigError as error:
            self.reject(error)
            raise
        return config

    def reject(self, error: Exception) -> None:
        """Note that a configuration was refused, and why."""
        problems = error.problems if isinstance(error, ConfigError) else [f"{type(error).__name__}: {error}"]
        self.rejected, self.stale = tuple(map(str, problems)), True
        self._write_note()

    def replace(self, config: Config) -> None:
        """Put a configuration in force."""
        self.current, self.loaded_at, self.rejected, self.stale = config, self._clock(), (), False
        self._in_force = self._tried = self._seen = fingerprint(config.contents)
        self._write_note()

    def look(self) -> bool:
        """Compare the files with what is in force; return whether an edit is to be put in force by itself.

        That is one that ``watch`` asks for, which was not tried yet and has settled: it looks as it did the last times.
        """
        seen = self._fingerprint()
        self._looks = self._looks + 1 if seen == self._seen else 0
        self._seen, self.stale = seen, seen != self._in_force
        settled = self._looks >= _LOOKS_TO_SETTLE
        new = (self.stale or bool(self.rejected)) and seen != self._tried
        return self.current.settings.watch and settled and new

    def _fingerprint(self) -> str:
        try:
            return fingerprint(read_contents(self.path)[0])
        except Exception as error:  # noqa: BLE001  # whatever it is, the daemon goes on with what it has
            return f"unreadable: {error}"

    def _write_note(self) -> None:
        """Tell other processes what this one runs; a disk that is full is no reason to stop."""
        try:
            note = {
                "version": _NOTE_VERSION,
                "pid": os.getpid(),
                "path": os.path.realpath(self.path),
                "loaded_at": self.loaded_at.isoformat(),
                "rejected": list(self.rejected),
                "files": [[str(path), content.decode()] for path, content in self.current.contents],
                "environment": {name: os.environ.get(name, "") for name in self.current.environment.variables.values()},
            }
            draft = self._directory / f"{_NOTE}.new"
            draft.touch(mode=0o600)  # hooks and their arguments may be in it
            draft.write_text(json.dumps(note))
            draft.replace(self._directory / _NOTE)
        except Exception as error:  # noqa: BLE001  # not worth a reload, whatever it is
            logging.getLogger(__name__).warning("other processes cannot be told what is in force: %s", error)


def read_note(path: Path | None, runtime_directory: Path) -> dict[str, Any] | None:
    """Return what a running daemon has noted of this configuration file, None if there is none or we may not look.

    Args:
        path: the file that it must go by; None for any.
        runtime_directory: the daemon's.

    Raises:
        KvmsnapdError: a daemon of another version runs, whose note may mean something else.
    """
    try:
        note: dict[str, Any] = json.loads((runtime_directory / _NOTE).read_text())
        with (runtime_directory / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None  # nobody holds it: the daemon is dead
    except BlockingIOError:
        ours = isinstance(note, dict) and (path is None or note.get("path") == os.path.realpath(path))
        if ours and note.get("version") != _NOTE_VERSION:
            msg = "the daemon that runs is of another version than this command: systemctl restart kvmsnapd"
            raise KvmsnapdError(msg) from None
        return note if ours else None
    except (OSError, ValueError):
        return None


def may_look(runtime_directory: Path) -> bool:
    """Tell whether we may see if a daemon runs: its files are its own."""
    try:
        (runtime_directory / _LOCK).open().close()
    except PermissionError:
        return False
    except OSError:
        return True  # there is none
    return os.access(runtime_directory / _NOTE, os.R_OK)


def contents_of(note: dict[str, Any]) -> Contents:
    """Return the files of the configuration in force, as :func:`read_note` gave them."""
    return [(Path(path), text.encode()) for path, text in note["files"]]
