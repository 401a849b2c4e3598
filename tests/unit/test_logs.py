"""Logs: one event, one line, always the same keys."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from kvmsnapd.daemon_events import ConfigRejected
from kvmsnapd.events import (
    DomainExamined,
    Event,
    GuestFrozen,
    HookFinished,
    PruneBlocked,
    RunFinished,
    RunSkipped,
    SnapshotDeleted,
    SnapshotFailed,
    SnapshotTaken,
    SnapshotUnchanged,
)
from kvmsnapd.logs import configure_logging, event_fields, log_event
from kvmsnapd.model import PairName
from tests.builders import UUID, at

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    return RunFinished(
        pair=PAIR, result=result, scheduled_at=None, snapshot=None, deleted=0, blocked=0, duration_seconds=0.5
    )


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


def test_a_traceback_is_part_of_the_line_and_shows_no_variables(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", form="json")
    secret = "hunter2"  # noqa: S105
    try:
        _ = [0][len(secret)]
    except IndexError:
        logging.getLogger("library").exception("it broke")
    (text,) = capsys.readouterr().err.splitlines()
    assert json.loads(text)["exception"][0]["exc_type"] == "IndexError"
    assert secret not in text


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


def test_fields_begin_with_domain_uuid_and_policy() -> None:
    assert list(event_fields(finished("taken")))[:3] == ["domain", "domain_uuid", "policy"]
