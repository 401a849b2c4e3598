"""The configuration in force: read, compared with its files, replaced, and told to other processes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from kvmsnapd.config import fingerprint, load_config
from kvmsnapd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from kvmsnapd.config import Config

_NOTE = "config.json"


class LiveConfig:
    """The configuration of a running daemon. Read by all threads; replaced by the main thread only."""

    def __init__(self, path: Path, *, clock: Callable[[], datetime]) -> None:
        """Read the configuration.

        Raises:
            ConfigError: it is not valid.
        """
        self.path, self._clock = path, clock
        self.current = load_config(path)
        self.loaded_at = clock()
        self.rejected: tuple[str, ...] = ()
        """What was wrong with the last one, if it was refused."""
        self.stale = False
        """Whether the files differ from what is in force."""
        self._tried = self._seen = self.current.fingerprint
        # The same place until the end, whatever a later configuration says.
        self._note = self.current.runtime_directory / _NOTE

    def read(self) -> Config:
        """Return the configuration as the files have it now; it is not yet in force.

        Raises:
            ConfigError: it is not valid; the one before stays in force, and the refusal is noted.
        """
        self._tried = fingerprint(self.path)
        try:
            return load_config(self.path)
        except ConfigError as error:
            self.rejected, self.stale = tuple(map(str, error.problems)), True
            self.write_note()
            raise

    def replace(self, config: Config) -> None:
        """Put a configuration in force."""
        self.current, self.loaded_at, self.rejected, self.stale = config, self._clock(), (), False
        self._tried = self._seen = config.fingerprint
        self.write_note()

    def look(self) -> bool:
        """Compare the files with what is in force; return whether an edit is to be put in force by itself.

        That is one that ``watch`` asks for, which was not tried yet, and looks as it did the last time: it has settled.
        """
        seen = fingerprint(self.path)
        settled, self._seen = seen == self._seen, seen
        self.stale = seen != self.current.fingerprint
        return self.current.settings.watch and settled and seen != self._tried

    def write_note(self) -> None:
        """Tell other processes what this one runs; a disk that is full is no reason to stop."""
        note = {
            "pid": os.getpid(),
            "path": str(self.path.absolute()),
            "loaded_at": self.loaded_at.isoformat(),
            "rejected": list(self.rejected),
        }
        with suppress(OSError):
            draft = self._note.with_suffix(".new")
            draft.write_text(json.dumps(note))
            draft.replace(self._note)

    def remove_note(self) -> None:
        """End what other processes are told."""
        with suppress(OSError):
            self._note.unlink()


def read_note(path: Path, runtime_directory: Path) -> dict[str, Any] | None:
    """Return what a running daemon has noted of this configuration file, None if there is none."""
    try:
        note: dict[str, Any] = json.loads((runtime_directory / _NOTE).read_text())
        with suppress(PermissionError):  # it runs as another user
            os.kill(note["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    return note if note.get("path") == str(path.absolute()) else None
