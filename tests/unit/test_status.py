"""`status`: one line per domain and policy, what is wrong and since when, with and without a daemon, once and again."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.findings import FindingsNote
from kvmsnapd.fleet import survey
from kvmsnapd.model import Consistency, Drill, Kind, Restoring
from kvmsnapd.prune import BlockReason
from kvmsnapd.refusal import Refusal, RefusalReason
from kvmsnapd.standing import Standing, State, Trouble, stand, worst_first
from kvmsnapd.tally import Failures, PairTally, Tally
from tests.builders import NOW, a_policy, a_snapshot, an_inventory, at, half_deleted
from tests.unit.command_line import (
    CONFIG,
    DEFAULT_HOST,
    DEFAULT_UUID,
    HOST_CONFIG,
    LAST_YEAR,
    THIS_YEAR,
    UNREACHABLE,
    Capture,
    SharedHost,
    Write,
    answer,
    complaint,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmsnapd.live_config import LiveConfig
    from kvmsnapd.model import Snapshot

KEY = f"{DEFAULT_UUID}/standard"


# What is wrong


def standing(
    *snapshots: Snapshot,
    found: PairTally | None = None,
    refusal: Refusal | None = None,
    **fields: Any,  # noqa: ANN401  # whatever the class takes
) -> Standing:
    """Return how the one pair of a domain with these snapshots stands at NOW."""
    policy, inventory = a_policy(**fields), an_inventory(*snapshots)
    (pair,) = survey([policy.name], {inventory.name: (policy,)}, [inventory], now=NOW).pairs
    return stand(pair, inventory, now=NOW, found=found, refusal=refusal)


def troubles(
    *snapshots: Snapshot,
    **fields: Any,  # noqa: ANN401  # as above
) -> list[tuple[str, datetime | None]]:
    return [(trouble.what, trouble.since) for trouble in standing(*snapshots, **fields).troubles]


FRESH = a_snapshot("2026-11-22T12:00")
FAILED = Failures(3, "busy", at("2026-11-22T09:00"), at("2026-11-22T12:01"))


def test_nothing_is_wrong_with_a_fresh_one() -> None:
    assert standing(FRESH) == Standing(standing(FRESH).pair, State.OK, ())


def test_without_a_snapshot_nobody_knows_since_when() -> None:
    assert troubles() == [("never", None)]
    assert standing().state is State.NEVER


def test_overdue_begins_when_the_limit_is_reached() -> None:
    old = a_snapshot("2026-11-22T09:00", taken_at=at("2026-11-22T09:00:03"))
    assert troubles(old) == [("overdue", at("2026-11-22T11:00:03"))]
    assert standing(old).state is State.OVERDUE


def test_failures_in_a_row_have_the_first_ones_time() -> None:
    old = a_snapshot("2026-11-22T11:00")
    (trouble,) = standing(old, found=PairTally(failures=FAILED)).troubles
    assert trouble == Trouble("failing", "3 run(s) in a row took nothing: busy", FAILED.first_at)


def test_failures_before_the_newest_snapshot_are_over() -> None:
    fresh = a_snapshot("2026-11-22T12:00", taken_at=at("2026-11-22T12:02"))
    assert troubles(fresh, found=PairTally(failures=FAILED)) == []


def test_a_refusal_that_lasts_is_told_once_with_its_words() -> None:
    failed = replace(FAILED, reason="chain_full")
    refusal = Refusal(RefusalReason.CHAIN_FULL, "16 overlays")
    (trouble,) = standing(a_snapshot("2026-11-22T11:00"), found=PairTally(failures=failed), refusal=refusal).troubles
    assert trouble == Trouble("failing", "3 run(s) in a row took nothing: chain_full: 16 overlays", failed.first_at)
    found = troubles(a_snapshot("2026-11-22T11:00"), found=PairTally(failures=FAILED), refusal=refusal)
    assert found == [("failing", FAILED.first_at), ("refused", None)]


def test_what_waits_and_what_is_left_alone() -> None:
    found = PairTally(blocked={BlockReason.FUSE: 12, BlockReason.BRANCH: 1}, quarantine="disk")
    texts = [trouble.text for trouble in standing(FRESH, found=found).troubles]
    assert texts == [
        "left alone until a person has changed something: disk",
        "12 released snapshot(s) wait: fuse; `kvmsnapd prune web1` shows them and asks",
        "1 released snapshot(s) wait: branch",
    ]


def test_consistency_below_what_is_asked_for_began_with_the_first_such_in_a_row() -> None:
    bad = [a_snapshot(f"2026-11-22T{hour}:00", consistency=Consistency.CRASH) for hour in ("12", "11")]
    good, older = a_snapshot("2026-11-22T10:00"), a_snapshot("2026-11-22T09:00", consistency=Consistency.CRASH)
    assert troubles(*bad, good, older) == [("consistency", at("2026-11-22T11:00:03"))]
    assert troubles(good, a_snapshot("2026-11-22T12:00"), older) == []


def test_snapshots_that_are_no_way_back_or_of_a_wrong_clock() -> None:
    assert troubles(FRESH, half_deleted(a_snapshot("2026-11-22T11:00"))) == [("half_deleted", NOW)]
    assert troubles(FRESH, a_snapshot("2026-11-25T11:00")) == [("future", None)]


def marked(snapshot: Snapshot, **fields: Any) -> Snapshot:  # noqa: ANN401  # whatever the class takes
    assert snapshot.mark
    return replace(snapshot, mark=replace(snapshot.mark, **fields))


def test_the_last_drill_counts() -> None:
    old = marked(a_snapshot("2026-11-22T11:00"), drill=Drill(at("2026-11-22T11:30"), "no login prompt"))
    assert troubles(FRESH, old) == [("drill", at("2026-11-22T11:30"))]
    passed = marked(FRESH, drill=Drill(at("2026-11-22T12:10")))
    assert troubles(passed, old) == []


def test_a_restore_that_was_cut_off_and_mixed_kinds() -> None:
    assert troubles(marked(FRESH, restoring=Restoring(NOW))) == [("restoring", NOW)]
    inside = a_snapshot("2026-11-22T10:00", kind=Kind.INTERNAL)
    assert [what for what, _ in troubles(FRESH, inside)] == ["mixed"]


def test_the_worst_come_first() -> None:
    never, overdue = standing(), standing(a_snapshot("2026-11-22T09:00"))
    failing = standing(FRESH, found=PairTally(blocked={"fuse": 1}))
    older, fine = standing(a_snapshot("2026-11-22T11:30"), max_age="3h"), standing(FRESH)
    assert worst_first([fine, older, failing, overdue, never], now=NOW) == [never, overdue, failing, older, fine]


# The command


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def stopped(config: str) -> str:
    return (
        f"The daemon does not run: this is by {config} and libvirt, and the next runs begin only once it is started "
        "(systemctl start kvmsnapd)."
    )


def test_status_of_pairs_without_snapshots(capsys: Capture, write: Write, host: str) -> None:
    config = write(HOST_CONFIG)
    text = answer(capsys, "status", "--config", config, "--connect", host)
    due = THIS_YEAR.isoformat(timespec="minutes")
    wrong = ["no", "good", "snapshot", "exists"]
    assert rows(text) == [
        ["DOMAIN", "POLICY", "STATE", "AGE", "LIMIT", "CONSISTENCY", "COUNT", "NEXT", "NEWEST", "WRONG"],
        ["db01", "standard", "never", "-", "732d", "-", "0", due, "-", *wrong],
        ["web-1", "standard", "never", "-", "732d", "-", "0", due, "-", *wrong],
        stopped(config).split(),
    ]


PAIR_KEYS = [
    *("domain", "domain_uuid", "policy", "state", "age_seconds", "max_age_seconds", "last_success_at"),
    *("consistency", "snapshots", "next_run_at", "newest", "troubles"),
]


def status(capsys: Capture, config: str, *domains: str) -> dict[str, Any]:
    found = json.loads(answer(capsys, "status", *domains, "--json", "--config", config, "--connect", DEFAULT_HOST))
    assert isinstance(found, dict)
    return found


def test_status_as_json(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    name = shared_host.take(THIS_YEAR, taken_at=datetime.now(UTC) - timedelta(hours=5, minutes=30))
    found = status(capsys, write(CONFIG))
    assert list(found) == ["at", "daemon", "pairs", "unprotected", "missing", "unmanaged", "configuration"]
    (pair,) = found["pairs"]
    assert list(pair) == PAIR_KEYS
    assert pair == {
        "domain": "test",
        "domain_uuid": DEFAULT_UUID,
        "policy": "standard",
        "state": "ok",
        "age_seconds": pair["age_seconds"],
        "max_age_seconds": 400 * 86400,
        "last_success_at": pair["last_success_at"],
        "consistency": "memory",
        "snapshots": 1,
        "next_run_at": f"{THIS_YEAR.year + 1}-01-01T00:00:00+00:00",
        "newest": name,
        "troubles": [],
    }
    assert 19800 <= pair["age_seconds"] < 19830
    assert (found["unprotected"], found["unmanaged"]) == ([], {})
    assert (found["daemon"]["running"], found["daemon"]["pid"]) == (False, None)


@pytest.mark.parametrize(
    ("newest", "state"),
    [((THIS_YEAR, 1), "ok"), ((LAST_YEAR, 1), "due"), ((THIS_YEAR, 401), "overdue"), ((LAST_YEAR, 401), "overdue")],
    ids=["done", "not done", "done and old", "not done and old"],
)
def test_state_follows_from_slot_and_age(
    capsys: Capture, write: Write, shared_host: SharedHost, newest: tuple[datetime, int], state: str
) -> None:
    slot, days = newest
    shared_host.take(slot, taken_at=datetime.now(UTC) - timedelta(days=days))
    assert status(capsys, write(CONFIG))["pairs"][0]["state"] == state


def test_status_shows_the_worst_first(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    for policy, days in (("aa", 1), ("bb", 401), ("cc", 5)):
        shared_host.take(THIS_YEAR, policy=policy, taken_at=datetime.now(UTC) - timedelta(days=days))
    policies = "".join(
        f"  {name}: {{schedule: yearly, keep: {{last: 1}}, kind: internal, max_age: 400d}}\n"
        for name in ("aa", "bb", "cc", "dd")
    )
    found = status(capsys, write(f"policies:\n{policies}domains:\n  test: [aa, bb, cc, dd]\n"))
    assert [pair["policy"] for pair in found["pairs"]] == ["dd", "bb", "cc", "aa"]


def test_status_names_unprotected_unmanaged_and_missing(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    shared_host.take(THIS_YEAR)
    config = write("policies: {}\ndomains: {gone: []}\n")
    assert answer(capsys, "status", "--config", config, "--connect", DEFAULT_HOST) == (
        "(nothing)\n"
        "test: unprotected: no entry under domains fits it; give it policies, or [] if that is meant\n"
        "test: 1 snapshot(s) of a policy that no longer applies; nothing prunes them\n"
        "gone: is configured, and libvirt has no such domain\n"
        f"{stopped(config)}\n"
    )
    found = status(capsys, config)
    assert (found["unprotected"], found["unmanaged"], found["missing"]) == (["test"], {"test": 1}, ["gone"])


def test_a_domain_is_asked_for_by_name_or_uuid(capsys: Capture, write: Write, host: str) -> None:
    config = write(HOST_CONFIG)
    by_name = json.loads(answer(capsys, "status", "web-1", "--json", "--config", config, "--connect", host))
    assert [pair["domain"] for pair in by_name["pairs"]] == ["web-1"]
    assert status(capsys, write(CONFIG), DEFAULT_UUID)["pairs"][0]["domain"] == "test"


def test_a_refusal_of_the_next_run_is_told(capsys: Capture, write: Write) -> None:
    (pair,) = status(capsys, write(CONFIG.replace("kind: internal", "kind: external")))["pairs"]
    assert [trouble["what"] for trouble in pair["troubles"]] == ["never", "refused"]
    assert "set kind: internal in the policy" in pair["troubles"][1]["text"]


# What the daemon has found, and whether it runs


def note_failures(directory: Path, first_at: datetime, last_at: datetime) -> None:
    (directory / "state").mkdir(exist_ok=True)
    pair = PairTally(failures=Failures(2, "agent", first_at, last_at), blocked={"fuse": 11})
    FindingsNote(directory / "state").write(Tally(pairs={KEY: pair}))


def test_what_the_last_runs_found_is_told_with_its_beginning_and_of_when_it_is(
    capsys: Capture, write: Write, shared_host: SharedHost, own_directories: str, tmp_path: Path
) -> None:
    taken_at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=9)
    shared_host.take(THIS_YEAR, taken_at=taken_at)
    first_at = taken_at + timedelta(hours=1)
    note_failures(tmp_path, first_at, first_at + timedelta(hours=1))
    config = write(CONFIG + own_directories)
    found = status(capsys, config)
    assert [(t["what"], t["since"]) for t in found["pairs"][0]["troubles"]] == [
        ("failing", first_at.isoformat()),
        ("waiting", None),
    ]
    assert datetime.fromisoformat(found["daemon"]["noted_at"]) > taken_at
    text = answer(capsys, "status", "--config", config, "--connect", DEFAULT_HOST)
    since = first_at.isoformat(timespec="minutes")
    assert f"2 run(s) in a row took nothing: agent (since {since}); 11 released snapshot(s) wait: fuse" in text
    assert "\nWhat its last runs found is of 20" in text


def test_a_note_that_cannot_be_understood_is_none(
    capsys: Capture, write: Write, shared_host: SharedHost, own_directories: str, tmp_path: Path
) -> None:
    shared_host.take(THIS_YEAR)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "findings.json").write_text("{")
    found = status(capsys, write(CONFIG + own_directories))
    assert (found["pairs"][0]["troubles"], found["daemon"]["noted_at"]) == ([], None)


def test_a_running_daemon_is_told_with_what_it_goes_by(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost
) -> None:
    shared_host.take(THIS_YEAR)
    path = str(running.path)
    text = answer(capsys, "status", "--config", path, "--connect", DEFAULT_HOST)
    assert text.splitlines()[-1] == (
        f"The daemon runs (process {os.getpid()}) by {path}, as read at {NOW.isoformat()}."
    )
    running.path.write_text(running.path.read_text().replace("400d", "1d"))
    found = status(capsys, path)
    assert found["daemon"]["running"] is True
    assert found["pairs"][0]["max_age_seconds"] == 400 * 86400
    assert found["configuration"] == [
        f"The files were edited since the daemon read them at {NOW.isoformat()}; it is to be reloaded."
    ]


def test_a_daemon_that_goes_by_another_file_is_told(
    capsys: Capture, running: LiveConfig, shared_host: SharedHost, tmp_path: Path
) -> None:
    shared_host.take(THIS_YEAR)
    other = tmp_path / "other.yaml"
    other.write_text(running.path.read_text())
    text = answer(capsys, "status", "--config", str(other), "--connect", DEFAULT_HOST)
    assert text.splitlines()[-1] == (f"A daemon runs by {running.path}; this is by {other}, which it does not read.")


# Again and again


@pytest.fixture(autouse=True)
def _signals_arrive() -> Iterator[None]:
    """Let processes of this test be ended: a daemon in this process, of another test, blocks signals for good."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("seconds", ["0", "-3"])
def test_watching_without_a_pause_ends_with_2(capsys: Capture, write: Write, seconds: str) -> None:
    assert complaint(capsys, "status", "--watch", seconds, "--config", write(CONFIG), code=2) == (
        f"kvmsnapd: --watch must be 1 or more seconds, not {seconds}"
    )


def test_watching_what_cannot_be_reached_from_the_start_ends_with_3(capsys: Capture, write: Write) -> None:
    arguments = ["status", "--watch", "--config", write(CONFIG), "--connect", UNREACHABLE]
    assert complaint(capsys, *arguments, code=3).startswith("kvmsnapd: cannot reach libvirt")


def watch(config: str, uri: str, *more: str, **streams: Any) -> subprocess.Popen[str]:  # noqa: ANN401
    command = [sys.executable, "-m", "kvmsnapd", "status", "--watch", "1", "--config", config, "--connect", uri, *more]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **streams)


def test_to_a_pipe_a_new_table_comes_each_time_and_ctrl_c_is_its_end(write: Write, host: str) -> None:
    with watch(write(HOST_CONFIG), host, stdout=subprocess.PIPE) as process:
        assert process.stdout
        lines: list[str] = []
        while sum(line.startswith("DOMAIN") for line in lines) < 2:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr and process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "\x1b" not in "".join(lines) + out


def test_as_json_each_line_is_a_document_and_what_goes_wrong_is_one_too(write: Write, host: str) -> None:
    config = write(HOST_CONFIG)
    with watch(config, host, "--json", stdout=subprocess.PIPE) as process:
        assert process.stdout
        first = json.loads(process.stdout.readline())
        with open(config, "w") as file:  # noqa: PTH123
            file.write("tick: soon\n")
        found: dict[str, Any] = {}
        deadline = time.monotonic() + 30
        while "error" not in found and time.monotonic() < deadline:
            found = json.loads(process.stdout.readline())
        write(HOST_CONFIG)
        while "error" in found and time.monotonic() < deadline:
            found = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert [pair["domain"] for pair in first["pairs"]] == ["db01", "web-1"]
    assert [pair["domain"] for pair in found["pairs"]] == ["db01", "web-1"]
    assert (process.returncode, err) == (0, "")


def on_terminal(config: str, uri: str, seconds: float, **environment: str) -> tuple[str, int, str]:
    """Return what a terminal gets within some seconds until Ctrl-C, the exit code, and the errors."""
    ours, theirs = pty.openpty()
    with watch(config, uri, stdout=theirs, env=os.environ | {"TERM": "xterm"} | environment) as process:
        os.close(theirs)
        seen, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # closed on the other side
                break
            seen += more
        assert process.stderr
        err = process.stderr.read()
        code = process.wait(30)
    os.close(ours)
    return seen.decode(), code, err


def test_a_terminal_is_cleared_and_given_back(write: Write, host: str) -> None:
    text, code, err = on_terminal(write(HOST_CONFIG), host, 5)
    assert (code, err) == (0, "")
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1  # the other screen, and back
    assert text.count("kvmsnapd status, Ctrl-C to end") >= 2
    assert "\x1b[1;31m" in text  # never: bold and red


def test_no_color_is_honoured(write: Write, host: str) -> None:
    text, _, _ = on_terminal(write(HOST_CONFIG), host, 3, NO_COLOR="1")
    assert "never" in text
    assert "\x1b[1;31m" not in text
    assert "\x1b[3" not in text
