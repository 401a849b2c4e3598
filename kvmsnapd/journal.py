"""systemd's journal, spoken to in its own protocol: one record, one datagram, with fields of any content."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SOCKET = Path("/run/systemd/journal/socket")
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog's number of each level."""

_NOT_IN_A_NAME = re.compile(r"[^A-Z0-9_]")
_EVENT_NAME = re.compile(r"[a-z]+\.[a-z_]+")
_LONGEST_NAME, _LONGEST_SHOWN, _LONGEST_MESSAGE = 64, 200, 500
_SAID_OTHERWISE = {"event", "level", "timestamp"}
_NOT_IN_THE_MESSAGE = _SAID_OTHERWISE | {"domain", "domain_uuid", "policy", "logger", "exception", "stack_info"}
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def fields_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields of a record of plain values: what the journal itself knows, then ``KVMSNAPD_`` and each key.

    A list becomes a field for each entry, so that each can be searched for; what maps one to another is JSON. What is
    not known is left out.
    """
    name = str(record["event"])
    yield "MESSAGE", message_of(record)
    yield "PRIORITY", str(PRIORITIES.get(record["level"], PRIORITIES["info"]))
    yield "SYSLOG_IDENTIFIER", "kvmsnapd"
    if _EVENT_NAME.fullmatch(name):
        yield "KVMSNAPD_EVENT", name
    for key, value in record.items():
        if key not in _SAID_OTHERWISE:
            for entry in value if isinstance(value, list | tuple) else [value]:
                if entry is not None:
                    yield f"KVMSNAPD_{field_name(key)}"[:_LONGEST_NAME], _text(entry)


def message_of(record: Mapping[str, Any]) -> str:
    """Return a record in one line for people: its name, whom it is about, and what is worth telling."""
    name = " ".join(str(record["event"]).split())
    about = "/".join(str(record[key]) for key in ("domain", "policy") if record.get(key))
    told = (
        f"{key}={_shown(value)}"
        for key, value in record.items()
        if value and key not in _NOT_IN_THE_MESSAGE and not key.endswith("_at")
    )
    raised = _cut(str(record.get("exception", "")).strip().rpartition("\n")[2], _LONGEST_SHOWN)
    return _cut(" ".join(filter(None, (name, about, *told, raised))), _LONGEST_MESSAGE)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _shown(value: object) -> str:
    """Return a value without line breaks, in quotes if it would be mistaken for several."""
    if isinstance(value, list | tuple):
        return _shown(", ".join(map(_text, value)))
    if isinstance(value, Mapping):
        return _shown(", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()))
    text = _cut(_text(value), _LONGEST_SHOWN)
    return text if text.isprintable() and " " not in text else json.dumps(text, ensure_ascii=False)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def field_name(text: str) -> str:
    """Return a name that the journal accepts; it leaves out, without a word, fields whose names it does not."""
    return _NOT_IN_A_NAME.sub("_", text.upper()).lstrip("_0123456789")[:_LONGEST_NAME] or "FIELD"


def encode(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return one record on the wire; a name may come several times, and values may hold anything."""
    return b"".join(_encode_field(name.encode(), text.encode(errors="backslashreplace")) for name, text in fields)


def _encode_field(name: bytes, value: bytes) -> bytes:
    if b"\n" not in value:
        return b"%b=%b\n" % (name, value)
    return b"%b\n%b%b\n" % (name, len(value).to_bytes(8, "little"), value)


def send(record: bytes, path: Path = SOCKET) -> None:
    """Hand one record over, without waiting.

    Each time by a socket of its own: nothing to keep in step with a journald that was restarted, and nothing that
    threads or processes share.

    Raises:
        OSError: nobody is there to take it, or they are not in time: ``BlockingIOError``.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as outlet:
        try:
            outlet.sendto(record, os.fspath(path))
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            _send_in_a_file(outlet, record, path)


def _send_in_a_file(outlet: socket.socket, record: bytes, path: Path) -> None:
    """Hand over a file in memory that holds the record; journald takes only such as nobody can change any more."""
    descriptor = os.memfd_create("kvmsnapd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(descriptor, "wb") as file:
        file.write(record)
        file.flush()
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))
        outlet.sendmsg([b""], [rights], 0, os.fspath(path))
