"""Logs: one event, one line, always the same keys."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libvirt
import pytest
import structlog

from kvmsnapd.daemon_events import ConfigRejected, LibvirtLost
from kvmsnapd.errors import HypervisorUnreachableError
from kvmsnapd.events import (
    DomainExamined,
    Event,
    GuestFrozen,
    HookFinished,
    PruneBlocked,
    RunEvent,
    RunFinished,
    RunSkipped,
    SnapshotDeleted,
    SnapshotFailed,
    SnapshotTaken,
    SnapshotUnchanged,
)
from kvmsnapd.libvirt_host.connection import Connection, _note_message
from kvmsnapd.logs import bound, configure_logging, event_fields, log_event
from kvmsnapd.model import PairName
from tests.builders import UUID, at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
PAIR = PairName("web1", UUID, "standard")
PAIR_FIELDS = {"domain": "web1", "domain_uuid": UUID, "policy": "standard"}
NAME = "kvmsnapd-standard-20261122T120000Z"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def logged(capsys: pytest.CaptureFixture[str], *events: Event, level: str = "info") -> list[dict[str, Any]]:
    """Return the JSON lines that the events become, without their time."""
    configure_logging(level=level, form="json")
    for event in events:
        log_event(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [json.loads(line) for line in captured.err.splitlines()]
    for line in lines:
        at(line.pop("timestamp").replace("Z", "+00:00"))
    return lines


def finished(result: str) -> RunFinished:
    begun = at("2026-11-22T12:00")
    return RunFinished(pair=PAIR, result=result, started_at=begun, ended_at=begun, duration_seconds=0.5)


def test_a_snapshot_taken_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    event = SnapshotTaken(
        pair=PAIR,
        snapshot=NAME,
        scheduled_at=at("2026-11-22T12:00"),
        kind="external",
        consistency="filesystem",
        duration_seconds=0.25,
        frozen=("/", "/srv"),
        excluded=("vdb",),
    )
    assert logged(capsys, event) == [
        {
            "event": "snapshot.taken",
            "level": "info",
            **PAIR_FIELDS,
            "snapshot": NAME,
            "scheduled_at": "2026-11-22T12:00:00+00:00",
            "kind": "external",
            "consistency": "filesystem",
            "duration_seconds": 0.25,
            "frozen": ["/", "/srv"],
            "excluded": ["vdb"],
            "paused_seconds": None,
        }
    ]


def test_a_failure_is_an_error_with_reason_and_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    event = SnapshotFailed(
        pair=PAIR, snapshot=NAME, scheduled_at=at("2026-11-22T12:00"), reason="busy", error="it is\nbusy"
    )
    (line,) = logged(capsys, event)
    assert (line["event"], line["level"]) == ("snapshot.failed", "error")
    assert (line["reason"], line["error"]) == ("busy", "it is\nbusy")


def test_lists_and_counts_stay_structured(capsys: pytest.CaptureFixture[str]) -> None:
    deleted = SnapshotDeleted(pair=PAIR, snapshot=NAME, reasons=("last=1 used up",), duration_seconds=1)
    blocked = PruneBlocked(pair=PAIR, blocked={"fuse": 12}, detail="why")
    first, second = logged(capsys, deleted, blocked)
    assert first["reasons"] == ["last=1 used up"]
    assert (second["blocked"], second["level"]) == ({"fuse": 12}, "warning")


def test_an_event_of_no_run_has_no_domain(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, ConfigRejected(path="/etc/x.yaml", problems=("a", "b"))) == [
        {"event": "config.rejected", "level": "error", "path": "/etc/x.yaml", "problems": ["a", "b"]}
    ]


def test_a_run_that_found_nothing_due_is_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, finished("nothing_due")) == []
    (line,) = logged(capsys, finished("nothing_due"), level="debug")
    assert (line["event"], line["level"], line["result"]) == ("run.finished", "debug", "nothing_due")


@pytest.mark.parametrize("result", ["taken", "unchanged", "skipped", "failed"])
def test_any_other_run_is_logged_when_it_ends(capsys: pytest.CaptureFixture[str], result: str) -> None:
    (line,) = logged(capsys, finished(result))
    assert (line["event"], line["level"], line["result"]) == ("run.finished", "info", result)


def test_a_quarantine_is_a_warning_once_and_then_debug(capsys: pytest.CaptureFixture[str]) -> None:
    first = RunSkipped(pair=PAIR, reason="transient", detail="why", quarantined=True)
    again = replace(first, again=True)
    (line,) = logged(capsys, first, again)
    assert (line["event"], line["level"], line["quarantined"]) == ("run.skipped", "warning", True)
    assert [line["level"] for line in logged(capsys, first, again, level="debug")] == ["warning", "debug"]


@pytest.mark.parametrize(("ok", "level"), [(True, "info"), (False, "warning")])
def test_a_hook_that_failed_is_a_warning(capsys: pytest.CaptureFixture[str], ok: bool, level: str) -> None:
    ended = HookFinished(pair=PAIR, hook="before", ok=ok, detail="why", output="a\nb", duration_seconds=1.5)
    assert logged(capsys, ended) == [
        {
            "event": "hook.finished",
            "level": level,
            **PAIR_FIELDS,
            "hook": "before",
            "ok": ok,
            "detail": "why",
            "output": "a\nb",
            "duration_seconds": 1.5,
        }
    ]


def test_what_a_run_found_is_for_those_who_debug(capsys: pytest.CaptureFixture[str]) -> None:
    found = DomainExamined(pair=PAIR, chain_depth={"vda": 2}, free_bytes={"/images": 7})
    assert logged(capsys, found) == []
    (line,) = logged(capsys, found, level="debug")
    assert (line["chain_depth"], line["free_bytes"]) == ({"vda": 2}, {"/images": 7})


def test_a_guest_that_somebody_froze_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = logged(capsys, GuestFrozen(pair=PAIR, error="the agent is in frozen state"))
    assert (line["event"], line["level"]) == ("guest.frozen", "warning")


def test_a_slot_that_needed_no_snapshot_names_the_one_that_serves_it(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = logged(capsys, SnapshotUnchanged(pair=PAIR, snapshot=NAME, scheduled_at=at("2026-11-22T13:00")))
    assert (line["event"], line["level"]) == ("snapshot.unchanged", "info")
    assert (line["snapshot"], line["scheduled_at"]) == (NAME, "2026-11-22T13:00:00+00:00")


def test_the_level_holds_back_what_is_less_severe(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, finished("taken"), level="warning") == []


def test_records_of_libraries_have_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="json")
    logging.getLogger("library").warning("it took %s seconds", 3)
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"]) == ("it took 3 seconds", "warning")


def test_a_traceback_is_part_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="json")
    try:
        _ = [0].index(1)
    except ValueError:
        logging.getLogger("library").exception("it broke")
    (text,) = capsys.readouterr().err.splitlines()
    assert json.loads(text)["exception"][0]["exc_type"] == "ValueError"


def break_with(secret: str) -> None:
    """Raise an error that was caused by another, with a secret in a local variable of each frame."""
    try:
        _ = [0][len(secret)]
    except IndexError as error:
        told = {"token": secret}
        msg = f"broken {len(told)}"
        raise ValueError(msg) from error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("form", ["json", "console", "journal"])
def test_tracebacks_show_errors_and_their_causes_but_no_variables(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "socket"))
        configure_logging(level="info", form=form, journal_socket=tmp_path / "socket")
        try:
            break_with("2retnuh"[::-1])  # tracebacks show this very line
        except ValueError:
            logging.getLogger("library").exception("it broke")
            structlog.stdlib.get_logger("ours").exception("it broke")
        shown = capsys.readouterr().err
        if form == "journal":
            shown = (receiver.recv(1 << 20) + receiver.recv(1 << 20)).decode("latin-1")
    assert shown.count("broken 1") >= 2
    assert shown.count("IndexError") >= 2
    assert "hunter2" not in shown


def test_configuring_again_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="json")
    assert len(logged(capsys, finished("taken"))) == 1


def test_people_get_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="console")
    log_event(finished("taken"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.finished" in line
    assert "domain=web1" in line
    assert "\x1b" not in line  # no colours where there is no terminal


def test_auto_is_json_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="auto")
    log_event(finished("taken"))
    assert json.loads(capsys.readouterr().err)["event"] == "run.finished"


def test_apscheduler_is_quiet_about_every_run(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="debug", form="json")
    logging.getLogger("apscheduler.executors.default").info("Running job")
    assert capsys.readouterr().err == ""


def test_warnings_of_python_are_records(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="json")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = logging._showwarning  # type: ignore[attr-defined]  # catch_warnings has put its own here
        warnings.warn("this goes away", DeprecationWarning, stacklevel=1)
    line = json.loads(capsys.readouterr().err)
    assert (line["logger"], line["level"]) == ("py.warnings", "warning")
    assert "this goes away" in line["event"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_passwords_of_uris_are_never_shown(capsys: pytest.CaptureFixture[str], form: str) -> None:
    configure_logging(level="info", form=form)
    uri = "qemu+ssh://me:hun/t@er2@host/system"
    log_event(LibvirtLost(uri=uri, error=f"cannot reach libvirt at {uri}: no"))
    error = HypervisorUnreachableError(uri, operation="connect")
    logging.getLogger("library").error("%s", uri, exc_info=error, extra={"deep": {"list": [uri]}, "error": error})
    shown = capsys.readouterr().err
    assert "er2" not in shown
    assert shown.count("qemu+ssh://me:***@host/system") >= 6


def test_addresses_without_a_password_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = "http://[::1]:9783/metrics and qemu+ssh://me@host:22/system and a@b"
    logged(capsys)
    logging.getLogger("library").warning(words)
    assert json.loads(capsys.readouterr().err)["event"] == words


# Other libraries' records during a run


def test_records_of_other_libraries_know_the_run_they_belong_to(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="json")
    with bound(PAIR):
        logging.getLogger("library").warning("words")
    line = json.loads(capsys.readouterr().err)
    assert {key: line[key] for key in PAIR_FIELDS} == PAIR_FIELDS


@pytest.mark.parametrize("broken", [False, True])
def test_the_next_job_of_the_same_thread_knows_nothing_of_the_run(
    capsys: pytest.CaptureFixture[str], broken: bool
) -> None:
    configure_logging(level="info", form="json")

    def run() -> None:
        with bound(PAIR), bound(replace(PAIR, policy="inner")):
            if broken:
                raise ValueError

    with ThreadPoolExecutor(1) as pool:
        assert isinstance(pool.submit(run).exception(), ValueError) is broken
        pool.submit(logging.getLogger("library").warning, "next").result()
    assert not set(PAIR_FIELDS) & set(json.loads(capsys.readouterr().err))


def test_an_event_says_itself_which_run_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    with bound(replace(PAIR, domain="other", policy="other")):
        (line,) = logged(capsys, finished("taken"))
    assert {key: line[key] for key in PAIR_FIELDS} == PAIR_FIELDS


# What libvirt says


def test_what_libvirt_says_is_for_those_who_debug(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="debug", form="json")
    connection = Connection("test:///default", read_only=False).get()
    capfd.readouterr()
    with bound(PAIR), pytest.raises(libvirt.libvirtError):
        connection.lookupByName("gone")
    line = json.loads(capfd.readouterr().err)
    assert (line["event"], line["level"], line["domain"]) == ("libvirt.message", "debug", "web1")
    assert (line["code"], line["source"], line["grade"]) == (libvirt.VIR_ERR_NO_DOMAIN, "test", "error")
    assert "not found" in line["text"]
    configure_logging(level="info", form="json")
    with pytest.raises(libvirt.libvirtError):
        connection.lookupByName("gone")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [(), None, (object(), {}, b"\xff", None), (1, 10**6, None, 7, "more")], ids=repr)
def test_whatever_libvirt_hands_over_does_not_raise(capsys: pytest.CaptureFixture[str], error: Any) -> None:  # noqa: ANN401
    configure_logging(level="debug", form="json")
    _note_message(None, error)
    assert all(json.loads(line)["event"] == "libvirt.message" for line in capsys.readouterr().err.splitlines())


# Under systemd, where stderr is the journal


class Stream:
    """A file that stands in for stderr, which systemd says is its journal."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._monkeypatch = path, monkeypatch

    @contextmanager
    def configured(self, form: str = "json", stream: str = "") -> Iterator[list[str]]:
        """Yield a list that has the lines at the end. Not in the fixture: pytest changes stderr after that."""
        lines: list[str] = []
        with self._path.open("w", errors="backslashreplace") as file, self._monkeypatch.context() as patch:
            status = os.fstat(file.fileno())
            patch.setattr("sys.stderr", file)
            patch.setenv("JOURNAL_STREAM", stream or f"{status.st_dev}:{status.st_ino}")
            configure_logging(level="debug", form=form)
            yield lines
        lines += self._path.read_text().splitlines()


@pytest.fixture
def journal_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    return Stream(tmp_path / "stderr", monkeypatch)


@pytest.mark.parametrize(
    ("level", "prefix"),
    [(logging.DEBUG, "<7>{"), (logging.INFO, "<6>{"), (logging.WARNING, "<4>{"), (logging.ERROR, "<3>{"), (50, "<2>{")],
)
def test_lines_for_the_journal_begin_with_their_priority(journal_stream: Stream, level: int, prefix: str) -> None:
    with journal_stream.configured() as lines:
        logging.getLogger("library").log(level, "words")
    (line,) = lines
    assert line.startswith(prefix)
    assert json.loads(line[3:])["event"] == "words"


def test_where_stderr_is_not_what_systemd_connected_lines_are_json_and_whole(journal_stream: Stream) -> None:
    with journal_stream.configured(stream="1:2") as lines:
        logging.getLogger("library").warning("x" * 100_000)
    (line,) = lines
    assert json.loads(line)["event"] == "x" * 100_000


def test_people_see_no_priorities(journal_stream: Stream) -> None:
    with journal_stream.configured("console") as lines:
        log_event(finished("taken"))
    assert not lines[0].startswith("<")


def test_a_line_the_journal_would_break_apart_is_cut_and_says_so(journal_stream: Stream) -> None:
    with journal_stream.configured() as lines:
        log_event(ConfigRejected(path="/etc/x.yaml", problems=("short", "p" * 60_000)))
        log_event(ConfigRejected(path="/etc/x.yaml", problems=tuple(f"problem {number}" for number in range(9000))))
    long, many = (json.loads(line[3:]) for line in lines)
    assert long["problems"] == ["short", "p" * 8192 + f"… [{60_000 - 8192} more characters]"]
    assert many["problems"][511:] == ["problem 511", f"… [{9000 - 512} more]"]
    assert (long["cut"], long["path"], many["cut"]) == (True, "/etc/x.yaml", True)


@pytest.mark.parametrize(
    "extra",
    [
        {"a": "\n" * 48_000},
        {"a": "\0" * 100_000},
        {"a": ["😀" * 500] * 500},
        {"a": {"ü" * 3000 + str(number): [[["\1" * 900] * 9] * 9] for number in range(9)}},
        {f"k{number}": "\0" * 300 for number in range(900)},
    ],
    ids=["breaks", "zeros", "list", "nested", "keys"],
)
def test_no_line_is_longer_than_the_journal_takes(journal_stream: Stream, extra: dict[str, Any]) -> None:
    with journal_stream.configured() as lines:
        logging.getLogger("library").warning("\0" * 9000, extra=extra)
    assert [len(line.encode()) < 48 * 1024 for line in lines] == [True]
    record = json.loads(lines[0][3:])
    assert (record["cut"], record["level"]) == (True, "warning")


def test_a_line_just_short_enough_is_whole(journal_stream: Stream) -> None:
    with journal_stream.configured() as lines:
        logging.getLogger("library").warning("x" * 48_900)
    assert "cut" not in json.loads(lines[0][3:])


# Changes while it runs, and streams that break


def test_a_reload_changes_level_and_format(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="json")
    log_event(finished("nothing_due"))
    assert capsys.readouterr().err == ""
    configure_logging(level="debug", form="console")
    log_event(finished("nothing_due"))
    assert "run.finished" in (shown := capsys.readouterr().err)
    assert not shown.startswith("{")
    configure_logging(level="error", form="json")
    log_event(finished("taken"))
    logging.getLogger("library").warning("words")
    assert capsys.readouterr().err == ""


def test_nothing_is_lost_or_doubled_while_it_is_configured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = []
    done = threading.Event()
    each = 1500

    def write(name: str) -> None:
        try:
            for number in range(each):
                logging.getLogger("library").warning("record %s.%d", name, number)
                log_event(RunSkipped(pair=PAIR, reason=f"event-{name}-{number}.", detail=""))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    def change() -> None:
        while not done.is_set():
            for form, level in (("json", "info"), ("console", "debug"), ("journal", "warning")):
                configure_logging(level=level, form=form, journal_socket=tmp_path / "nobody")

    with (tmp_path / "stderr").open("w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        configure_logging(level="info", form="json")
        writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        changer = threading.Thread(target=change)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in (*writers, changer):
                thread.start()
            for thread in writers:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
            done.set()
        changer.join()
    text = (tmp_path / "stderr").read_text()
    assert errors == []
    assert sorted(re.findall(r"record ([ab]\.\d+)", text)) == sorted(f"{n}.{i}" for n in "ab" for i in range(each))
    assert sorted(re.findall(r"event-([ab]-\d+)\.", text)) == sorted(f"{n}-{i}" for n in "ab" for i in range(each))


def write_to_a_closed_file(stream: Any) -> None:  # noqa: ANN401
    stream.close()


def write_to_nobody(stream: Any) -> None:  # noqa: ANN401
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.dup2(write_end, stream.fileno())
    os.close(write_end)


def write_to_a_descriptor_that_is_gone(stream: Any) -> None:  # noqa: ANN401
    os.close(stream.fileno())


@pytest.mark.parametrize(
    "spoil", [write_to_a_closed_file, write_to_nobody, write_to_a_descriptor_that_is_gone], ids=lambda f: f.__name__
)
def test_a_stderr_that_is_broken_never_raises(tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    """In a process of its own, since its stderr is what is broken."""
    marker = tmp_path / "marker"
    code = f"""
import os, sys, logging
from pathlib import Path
from tests.unit.test_logs import PAIR, {spoil.__name__}, finished
from kvmsnapd.logs import configure_logging, log_event
configure_logging(level="info", form="json")
{spoil.__name__}(sys.stderr)
for form in ("json", "journal", "console", "auto"):
    log_event(finished("taken"))
    logging.getLogger("library").warning("words")
    configure_logging(level="info", form=form, journal_socket=Path({str(tmp_path / "nobody")!r}))
    log_event(finished("taken"))
Path({str(marker)!r}).touch()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert marker.exists()


def test_a_process_begun_without_stderr_may_log() -> None:
    code = "from kvmsnapd.logs import *; configure_logging(level='info', form='auto'); logging.warning('words')"
    subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "{code}" 2>&-'], cwd=ROOT, check=True)


class Spiteful:
    """A value that cannot be shown."""

    def __repr__(self) -> str:
        msg = "no"
        raise ValueError(msg)


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_record_that_cannot_be_shown_is_told_of(capsys: pytest.CaptureFixture[str], form: str) -> None:
    configure_logging(level="info", form=form)
    logging.getLogger("library").warning("%d", "text")
    logging.getLogger("library").warning("words", extra={"value": Spiteful()})
    first, second = capsys.readouterr().err.splitlines()
    assert "a record of library, " in first
    assert "TypeError" in first
    assert "ValueError: no" in second


# Names and keys


def all_events(base: type[Event] = Event) -> list[type[Event]]:
    """Return every event that can be published; dataclasses with slots leave a second class behind."""
    found = {}
    for kind in base.__subclasses__():
        if hasattr(kind, "NAME"):
            found[kind.__name__] = kind
        found |= {below.__name__: below for below in all_events(kind)}
    return list(found.values())


def test_every_event_has_a_constant_name_of_its_own() -> None:
    names = [kind.NAME for kind in all_events()]
    assert len(names) == len(set(names)) > 10
    assert [name for name in names if not re.fullmatch(r"[a-z]+\.[a-z_]+", name)] == []


@pytest.mark.parametrize("event", all_events(), ids=lambda event: event.__name__)
def test_no_field_of_an_event_collides_with_a_key_of_the_log(event: type[Event]) -> None:
    fields = set(getattr(event, "__dataclass_fields__", {}))
    assert not fields & {"event", "level", "timestamp", "exception", "exc_info", "domain" if "pair" in fields else ""}


KEYS = """
audit.finding: grade subject text command
config.domain_changed: domain domain_uuid coverage unprotected gained lost changed releases fuse leaves
config.loaded: files policies selectors warnings needs_restart policies_added policies_removed policies_changed
    domains_changed
config.rejected: path problems
daemon.stalled: what
daemon.started: uri metrics
daemon.stopped: unfinished
domain.examined: domain domain_uuid policy chain_depth free_bytes chain_limit folders
domain.thaw_failed: domain domain_uuid error
domain.thawed: domain domain_uuid
drill.finished: domain domain_uuid policy snapshot ok reason detail duration_seconds
drill.skipped: domain domain_uuid policy snapshot detail
guest.frozen: domain domain_uuid policy error
guest.unfrozen: domain domain_uuid
hook.finished: domain domain_uuid policy hook ok detail output duration_seconds
jobs.changed: added changed removed
libvirt.connected: uri driver version
libvirt.lost: uri error
prune.blocked: domain domain_uuid policy blocked detail again
run.finished: domain domain_uuid policy result started_at ended_at duration_seconds scheduled_at snapshot kind
    consistency frozen excluded paused_seconds take_seconds downgraded reason detail quarantined deleted
    deleted_snapshots delete_seconds delete_error blocked waiting hooks chain_depth free_bytes
run.skipped: domain domain_uuid policy reason detail refused quarantined again
run.started: domain domain_uuid policy started_at
run.stuck: domain domain_uuid policy after_seconds
snapshot.delete_failed: domain domain_uuid policy snapshot reason error
snapshot.deleted: domain domain_uuid policy snapshot reasons duration_seconds
snapshot.downgraded: domain domain_uuid policy snapshot error
snapshot.failed: domain domain_uuid policy snapshot scheduled_at reason error
snapshot.taken: domain domain_uuid policy snapshot scheduled_at kind consistency duration_seconds frozen excluded
    paused_seconds
snapshot.unchanged: domain domain_uuid policy snapshot scheduled_at
"""


def test_names_and_keys_of_events_change_only_on_purpose() -> None:
    """People search, parse and alert by them: a change of this text belongs into CHANGELOG.md."""
    assert keys_of_events() == KEYS.strip()


def keys_of_events() -> str:
    """Return all names with their keys; ``./dev exec python -m tests.unit.test_logs`` prints it."""
    fields = {
        kind.NAME: (
            *(("domain", "domain_uuid", "policy") if issubclass(kind, RunEvent) else ()),
            *(field.name for field in dataclasses.fields(kind) if field.name != "pair"),
        )
        for kind in all_events()
    }
    lines = (f"{name}: {' '.join(keys)}" for name, keys in sorted(fields.items()))
    return "\n".join(textwrap.fill(line, 116, subsequent_indent="    ") for line in lines)


def test_every_event_is_in_the_document_of_the_logs() -> None:
    text = (ROOT / "config/LOGGING.md").read_text()
    assert [name for name in (kind.NAME for kind in all_events()) if f"| `{name}` |" not in text] == []


def test_fields_begin_with_domain_uuid_and_policy() -> None:
    assert list(event_fields(finished("taken")))[:3] == ["domain", "domain_uuid", "policy"]


if __name__ == "__main__":
    print(keys_of_events())
