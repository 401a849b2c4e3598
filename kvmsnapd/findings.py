"""What the last runs found, kept over a restart, so that one neither hides nor raises an alert.

No record of snapshots: libvirt is that. A note that is lost, or cannot be read, is made anew by the next runs.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kvmsnapd.tally import DomainTally, Failures, PairTally, Tally

if TYPE_CHECKING:
    from pathlib import Path

_NAME, _VERSION = "findings.json", 1


class FindingsNote:
    """One small file in the state directory."""

    def __init__(self, directory: Path) -> None:
        """Keep the note in ``directory``."""
        self._path = directory / _NAME
        self._written: dict[str, Any] = {}
        self._trouble = ""
        self._lock = threading.Lock()

    def read(self) -> Tally:
        """Return what was noted; nothing, if there is no note that can be understood."""
        try:
            note = json.loads(self._path.read_bytes())
            tally = _tally_of(note)
        except FileNotFoundError:
            return Tally()
        except Exception as error:  # noqa: BLE001  # whatever is in it, the daemon works without
            logging.getLogger(__name__).warning("what was found before is not known: %s: %s", self._path, error)
            return Tally()
        self._written = note
        return tally

    def write(self, tally: Tally) -> None:
        """Note what has changed; a disk that is full is no reason to stop."""
        note = _note_of(tally)
        draft = self._path.with_suffix(".new")
        with self._lock:
            if note == self._written:
                return
            try:
                draft.write_text(json.dumps(note))
                draft.replace(self._path)
            except OSError as error:
                if self._trouble != str(error):
                    logging.getLogger(__name__).warning("what was found is not kept over a restart: %s", error)
                self._trouble = str(error)
            else:
                self._written, self._trouble = note, ""


def read_findings(directory: Path) -> tuple[Tally, datetime] | None:
    """Return what the daemon has noted, and when it last noted something else; None if that cannot be read.

    For other processes: it warns of nothing and writes nothing.
    """
    path = directory / _NAME
    try:
        changed_at = datetime.fromtimestamp(int(path.stat().st_mtime), UTC)
        return _tally_of(json.loads(path.read_bytes())), changed_at
    except Exception:  # noqa: BLE001  # whatever is in it, libvirt tells the rest
        return None


def _note_of(tally: Tally) -> dict[str, Any]:
    pairs = {key: found for key, pair in tally.pairs.items() if (found := _pair_note(pair))}
    frozen = {uuid: domain.frozen for uuid, domain in tally.domains.items() if domain.frozen is not None}
    return {"version": _VERSION, "pairs": pairs, "frozen": frozen}


def _pair_note(pair: PairTally) -> dict[str, Any]:
    note: dict[str, Any] = {}
    if pair.failures:
        found = pair.failures
        note["failures"] = [found.count, found.reason, found.first_at.isoformat(), found.last_at.isoformat()]
    if pair.blocked:
        note["blocked"] = dict(pair.blocked)
    if pair.quarantine:
        note["quarantine"] = pair.quarantine
    return note


def _tally_of(note: dict[str, Any]) -> Tally:
    if note["version"] != _VERSION:
        return Tally()
    return Tally(
        pairs={key: _pair_of(found) for key, found in note["pairs"].items()},
        domains={uuid: DomainTally(frozen=bool(frozen)) for uuid, frozen in note["frozen"].items()},
    )


def _pair_of(found: dict[str, Any]) -> PairTally:
    failures = None
    if "failures" in found:
        count, reason, *written = found["failures"]
        first_at, last_at = (datetime.fromisoformat(text) for text in written)
        if first_at.tzinfo is None or last_at.tzinfo is None:
            msg = f"a time without a zone: {written}"
            raise ValueError(msg)
        failures = Failures(int(count), _word(reason), first_at, last_at)
    blocked = {_word(word): int(waiting) for word, waiting in found.get("blocked", {}).items()}
    quarantine = _word(found["quarantine"]) if "quarantine" in found else None
    return PairTally(failures=failures, blocked=blocked, quarantine=quarantine)


def _word(text: Any) -> str:  # noqa: ANN401  # whatever the file has
    if not isinstance(text, str) or not re.fullmatch("[a-z_]+", text):
        msg = f"no word: {text!r}"
        raise ValueError(msg)
    return text
