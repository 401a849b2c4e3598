"""The journal: what arrives at its socket, and what becomes of records while nobody is there to take them."""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd import journal
from kvmsnapd.daemon_events import ConfigRejected, LibvirtLost
from kvmsnapd.events import HookFinished, PruneBlocked, SnapshotDeleted
from kvmsnapd.logs import bound, configure_logging, log_event
from tests.unit.test_logs import PAIR, _logging_as_before, finished

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["_logging_as_before"]

Fields = dict[bytes, list[bytes]]


class Receiver:
    """Takes datagrams as journald does."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))

    def take(self) -> Fields | None:
        """Return the fields of the next record, None if none has arrived."""
        try:
            data, rights, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        except BlockingIOError:
            return None
        if rights:
            assert data == b""
            (descriptor,) = array.array("i", rights[0][2])
            with os.fdopen(descriptor, "rb") as file:
                seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
                assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
                file.seek(0)
                data = file.read()
        return decode(data)

    def record(self) -> Fields:
        """Return the fields of the one record that has arrived."""
        fields = self.take()
        assert fields is not None
        assert self.take() is None
        return fields


def decode(data: bytes) -> Fields:
    """Read the journal's protocol, as its documentation gives it."""
    fields: Fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, end, data = data[8 : 8 + length], data[8 + length : 9 + length], data[9 + length :]
            assert end == b"\n"
        fields.setdefault(name, []).append(value)
    return fields


@contextmanager
def receiver_at(path: Path) -> Iterator[Receiver]:
    there = Receiver(path)
    try:
        yield there
    finally:
        there.socket.close()
        path.unlink()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with receiver_at(tmp_path / "socket") as there:
        configure_logging(level="debug", form="journal", journal_socket=there.path)
        yield there


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_record_has_the_fields_that_journalctl_knows_and_each_key_in_capitals(
    receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    log_event(finished("taken"))
    fields = receiver.record()
    assert fields[b"MESSAGE"][0].startswith(b"run.finished web1/standard result=taken ")
    assert (fields[b"PRIORITY"], fields[b"SYSLOG_IDENTIFIER"]) == ([b"6"], [b"kvmsnapd"])
    assert fields[b"KVMSNAPD_EVENT"] == [b"run.finished"]
    assert fields[b"KVMSNAPD_DOMAIN"] == [b"web1"]
    assert fields[b"KVMSNAPD_DOMAIN_UUID"] == [PAIR.domain_uuid.encode()]
    assert fields[b"KVMSNAPD_POLICY"] == [b"standard"]
    assert not {b"KVMSNAPD_LEVEL", b"KVMSNAPD_TIMESTAMP", b"KVMSNAPD_REASON"} & set(fields)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, b"7"), (logging.INFO, b"6"), (logging.WARNING, b"4"), (logging.ERROR, b"3"), (50, b"2")],
)
def test_priorities_are_those_of_syslog(receiver: Receiver, level: int, priority: bytes) -> None:
    logging.getLogger("library").log(level, "words")
    assert receiver.record()[b"PRIORITY"] == [priority]


def test_a_list_is_a_field_for_each_entry_and_a_mapping_is_json(receiver: Receiver) -> None:
    log_event(SnapshotDeleted(pair=PAIR, snapshot="s", reasons=("one", "two"), duration_seconds=1))
    assert receiver.record()[b"KVMSNAPD_REASONS"] == [b"one", b"two"]
    log_event(PruneBlocked(pair=PAIR, blocked={"fuse": 12}, detail="why"))
    assert receiver.record()[b"KVMSNAPD_BLOCKED"] == [b'{"fuse": 12}']


@pytest.mark.parametrize("output", ["a\nb", "\n", "a=b\nMESSAGE=forged\n", "\0\x1b[31m", "ä\ud83d", "x\r\ny"], ids=repr)
def test_texts_of_any_content_arrive_as_they_are_and_forge_nothing(receiver: Receiver, output: str) -> None:
    log_event(HookFinished(pair=PAIR, hook="before", ok=True, detail="", output=output, duration_seconds=1.5))
    fields = receiver.record()
    assert fields[b"KVMSNAPD_OUTPUT"] == [output.encode(errors="backslashreplace")]
    (message,) = fields[b"MESSAGE"]
    assert message.decode().isprintable()


def test_the_message_of_a_refused_configuration_is_one_line_that_tells_why(receiver: Receiver) -> None:
    log_event(ConfigRejected(path="/etc/x.yaml", problems=("x.yaml:1: a\n  ^", "b")))
    fields = receiver.record()
    assert fields[b"MESSAGE"] == [rb'config.rejected path=/etc/x.yaml problems="x.yaml:1: a\n  ^, b"']
    assert fields[b"KVMSNAPD_PROBLEMS"] == [b"x.yaml:1: a\n  ^", b"b"]


def test_a_message_stays_short_whatever_it_tells(receiver: Receiver) -> None:
    log_event(ConfigRejected(path="/" * 1000, problems=("b" * 100,) * 100))
    assert len(receiver.record()[b"MESSAGE"][0].decode()) <= 501


def test_a_record_too_large_for_a_datagram_arrives_in_a_sealed_file(receiver: Receiver) -> None:
    text = "line\n" * 500_000
    log_event(HookFinished(pair=PAIR, hook="before", ok=True, detail="", output=text, duration_seconds=1.5))
    assert receiver.record()[b"KVMSNAPD_OUTPUT"] == [text.encode()]


def test_other_libraries_records_have_a_logger_and_no_event(receiver: Receiver) -> None:
    with bound(PAIR):
        logging.getLogger("library").warning("it took\n%s seconds", 3, extra={"odd key!": {1: (2,)}, "_x": object()})
    fields = receiver.record()
    assert fields[b"MESSAGE"][0].startswith(b"it took 3 seconds web1/standard ")
    assert (fields[b"KVMSNAPD_LOGGER"], fields[b"KVMSNAPD_DOMAIN"]) == ([b"library"], [b"web1"])
    assert fields[b"KVMSNAPD_ODD_KEY_"] == [b'{"1": [2]}']
    assert b"KVMSNAPD_X" in fields
    assert b"KVMSNAPD_EVENT" not in fields


def test_names_are_such_as_the_journal_takes() -> None:
    names = [journal.field_name(text) for text in ("__protected", "9lives", "ümlaut", "", "_", "x" * 100)]
    assert names == ["PROTECTED", "LIVES", "MLAUT", "FIELD", "FIELD", "X" * 64]


def test_a_traceback_has_a_field_of_its_own_and_the_message_names_the_error(receiver: Receiver) -> None:
    try:
        _ = {}["gone"]
    except KeyError:
        logging.getLogger("library").exception("it broke")
    fields = receiver.record()
    assert fields[b"MESSAGE"] == [b"it broke KeyError: 'gone'"]
    assert fields[b"KVMSNAPD_EXCEPTION"][0].startswith(b"Traceback (most recent call last):\n")


def test_without_a_journal_records_are_json_on_stderr_after_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(level="info", form="journal", journal_socket=tmp_path / "socket")
    log_event(finished("taken"))
    logging.getLogger("library").warning("words")
    warning, *others = lines_of(capsys)
    assert "No such file" in warning["event"]
    assert warning["level"] == "warning"
    assert [line["event"] for line in others] == ["run.finished", "words"]
    assert others[0]["domain"] == "web1"


def test_a_journal_that_comes_back_is_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "socket"
    configure_logging(level="info", form="journal", journal_socket=path)
    for _ in range(2):
        with receiver_at(path) as receiver:
            log_event(finished("taken"))
            receiver.record()
            assert capsys.readouterr().err == ""
        log_event(finished("taken"))
        assert [line["event"] for line in lines_of(capsys)][1:] == ["run.finished"]


def test_a_socket_that_nobody_listens_at_any_more_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver = Receiver(tmp_path / "socket")
    configure_logging(level="info", form="journal", journal_socket=receiver.path)
    receiver.socket.close()
    log_event(finished("taken"))
    assert [line["event"] for line in lines_of(capsys)][1:] == ["run.finished"]


def test_a_journal_that_is_full_holds_nobody_up(receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="journal", journal_socket=receiver.path)
    begun = time.monotonic()
    for number in range(2000):
        logging.getLogger("library").warning("record %d", number)
    assert time.monotonic() - begun < 20
    taken = []
    while fields := receiver.take():
        taken.append(fields[b"MESSAGE"][0].decode())
    lines = [line["event"] for line in lines_of(capsys)]
    assert "takes no records" in lines[0]
    assert taken + lines[1:] == [f"record {number}" for number in range(2000)]


def test_what_neither_takes_is_counted_and_told_of_later(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    os.set_blocking(write_end, True)  # a write would now wait for ever
    with os.fdopen(write_end, "w") as nobody_reads, os.fdopen(read_end):
        monkeypatch.setattr("sys.stderr", nobody_reads)
        configure_logging(level="info", form="journal", journal_socket=receiver.path)
        sent = 2000
        for number in range(sent):
            logging.getLogger("library").warning("record %d", number)
        kept = 0
        while receiver.take():
            kept += 1
        logging.getLogger("library").warning("again")
        assert (receiver.take() or {})[b"MESSAGE"] == [b"again"]
        told = receiver.record()
    assert told[b"PRIORITY"] == [b"4"]
    assert told[b"MESSAGE"][0].startswith(f"{sent - kept} log records were lost".encode())


def test_passwords_of_uris_reach_no_field(receiver: Receiver) -> None:
    uri = "qemu+ssh://me:hun/t@er2@host/system"
    log_event(LibvirtLost(uri=uri, error=f"cannot reach libvirt at {uri}: no"))
    fields = receiver.record()
    assert fields[b"KVMSNAPD_URI"] == [b"qemu+ssh://me:***@host/system"]
    assert b"er2" not in b"".join(value for values in fields.values() for value in values)
