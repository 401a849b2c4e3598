"""The command line, in this process: exit codes, tables, JSON, and messages."""

from __future__ import annotations

import faulthandler
import io
import json
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import libvirt
import pytest

from kvmsnapd.cli import main
from kvmsnapd.demo import write_test_host
from kvmsnapd.domain_xml import format_request
from kvmsnapd.model import Consistency, Hold, Kind, Mark, TakeRequest
from kvmsnapd.naming import format_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Write = Callable[[str], str]
    Capture = pytest.CaptureFixture[str]

DEFAULT_HOST = "test:///default"
DEFAULT_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"  # of its one domain, `test`
UNREACHABLE = "qemu+unix:///system?socket=/nonexistent"
THIS_YEAR = datetime(datetime.now(UTC).year, 1, 1, tzinfo=UTC)
LAST_YEAR = datetime(THIS_YEAR.year - 1, 1, 1, tzinfo=UTC)

CONFIG = """\
policies:
  standard: {schedule: yearly, keep: {last: 2}, kind: internal, splay: 0s, max_age: 400d}
domains:
  test: [standard]
"""
HOST_CONFIG = """\
policies:
  standard: {schedule: yearly, keep: {last: 2}, kind: internal, splay: 0s}
domains:
  db01: [standard]
  "web-*": [standard]
  lab: []
"""


@pytest.fixture(autouse=True)
def _no_faulthandler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the real stderr to it: the one that tests capture has no file descriptor."""
    monkeypatch.setattr(faulthandler, "enable", lambda: None)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "kvmsnapd.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def host(tmp_path: Path) -> str:
    """Provide the URI of a host with three domains and without any snapshot."""
    return write_test_host(tmp_path, {"db01": True, "web-1": True, "lab": False})


class SharedHost:
    """libvirt's default test host, which all connections of this process share while one is open."""

    def __init__(self, connection: Any) -> None:  # noqa: ANN401  # the binding has no types
        self.domain = connection.lookupByName("test")

    def take(
        self,
        slot: datetime,
        *,
        policy: str = "standard",
        taken_at: datetime | None = None,
        hold: Hold | None = None,
    ) -> str:
        """Make a snapshot of ours and return its name."""
        mark = Mark(policy, slot, taken_at or datetime.now(UTC), Consistency.MEMORY, Kind.INTERNAL, hold=hold)
        name = format_name(policy, slot)
        self.domain.snapshotCreateXML(format_request(TakeRequest(DEFAULT_UUID, "test", name, mark)), 0)
        return name

    def take_by_hand(self, name: str) -> None:
        self.domain.snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>", 0)


@contextmanager
def _open_shared_host() -> Iterator[SharedHost]:
    connection = libvirt.open(DEFAULT_HOST)
    shared = SharedHost(connection)
    try:
        yield shared
    finally:
        for snapshot in shared.domain.listAllSnapshots(0):
            snapshot.delete(0)
        connection.close()


@pytest.fixture
def shared_host() -> Iterator[SharedHost]:
    """Provide the default test host, without snapshots."""
    with _open_shared_host() as shared:
        yield shared


def usage_error(*arguments: str) -> int:
    """Return the exit code with which the arguments themselves are refused."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def answer(capsys: Capture, *arguments: str, code: int = 0) -> str:
    """Return what a command prints; it must end with this code and complain of nothing."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def complaint(capsys: Capture, *arguments: str, code: int) -> str:
    """Return the complaint of a command that prints nothing else."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *rest = captured.err.removesuffix("\n").split("\n")
    assert [line for line in rest if line[5:8] != " | "] == []  # the line of the file it is about
    return first


# Exit codes

READERS = [["status"], ["list"], ["plan"]]


@pytest.mark.parametrize("command", [*READERS, ["check-config"]], ids=lambda words: words[0])
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_what_could_be_answered_ends_with_0(
    capsys: Capture, write: Write, host: str, command: list[str], form: list[str]
) -> None:
    assert answer(capsys, *command, *form, "--config", write(HOST_CONFIG), "--connect", host)


@pytest.mark.parametrize("command", READERS, ids=lambda words: words[0])
def test_an_unknown_domain_ends_with_1_and_a_suggestion(
    capsys: Capture, write: Write, host: str, command: list[str]
) -> None:
    config = write(HOST_CONFIG)
    assert complaint(capsys, *command, "web-l", "--config", config, "--connect", host, code=1) == (
        "kvmsnapd: libvirt has no domain 'web-l'; did you mean 'web-1'?"
    )


def test_an_unknown_domain_unlike_any_is_told_where_all_are_listed(capsys: Capture, write: Write, host: str) -> None:
    assert complaint(capsys, "status", "zzz", "--config", write(HOST_CONFIG), "--connect", host, code=1) == (
        "kvmsnapd: libvirt has no domain 'zzz'; `kvmsnapd status` lists all"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["snapshot"],
        ["status", "--jsn"],
        ["simulate"],
        ["simulate", "--keep", "last=1", "--policy", "standard"],
        ["simulate", "--policy", "standard", "--days", "many"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert usage_error(*arguments) == 2


@pytest.mark.parametrize("command", [*READERS, ["check-config"]], ids=lambda words: words[0])
def test_an_unreachable_libvirt_ends_with_3(capsys: Capture, write: Write, command: list[str]) -> None:
    assert complaint(capsys, *command, "--config", write(CONFIG), "--connect", UNREACHABLE, code=3) == (
        f"kvmsnapd: cannot reach libvirt at {UNREACHABLE}: Failed to connect socket to '/nonexistent': No such file or "
        "directory; is libvirtd running? Nothing was changed."
    )


NEEDS_CONFIG = [*READERS, ["check-config"], ["simulate", "--policy", "standard"], ["run"]]


@pytest.mark.parametrize("command", NEEDS_CONFIG, ids=lambda words: words[0])
def test_a_missing_configuration_ends_with_78(capsys: Capture, tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "missing.yaml"
    assert complaint(capsys, *command, "--config", str(path), code=78) == (
        f"{path}: cannot be read: No such file or directory; nothing was changed"
    )


@pytest.mark.parametrize("command", NEEDS_CONFIG, ids=lambda words: words[0])
def test_a_bad_configuration_ends_with_78_and_its_place(capsys: Capture, write: Write, command: list[str]) -> None:
    path = write("tick: soon\n")
    assert complaint(capsys, *command, "--config", path, code=78) == (
        f"{path}:1:7: tick: 'soon' is not a duration: write a number with a unit, such as 90s, 15m, 36h, 7d or 1h30m"
    )


def test_every_problem_of_a_configuration_is_shown_with_its_line(capsys: Capture, write: Write) -> None:
    assert main(["check-config", "--config", write("tick: soon\nworkers: 9\n")]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line[5:8] == " | "] == [
        "    1 | tick: soon",
        "      |       ^^^^",
        "    2 | workers: 9",
        "      |          ^",
    ]
    assert len(lines) == 6


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __iter__(self) -> Iterator[str]:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert main(["simulate", "--keep", "last=1"]) == 130


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = [sys.executable, "-m", "kvmsnapd", "simulate", "--keep", "last=1"]
    lines = "".join(f"{line}\n" for line in hours(5000))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(lines)
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 1


@pytest.mark.parametrize("command", ["", "run", "check-config", "status", "list", "plan", "simulate"])
def test_help_names_the_exit_codes(capsys: Capture, command: str) -> None:
    assert usage_error(*command.split(), "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 done, 1 a domain failed or a check found something, 2 usage, 3 libvirt unreachable, 78 bad" in text


def test_the_version_is_told(capsys: Capture) -> None:
    assert usage_error("--version") == 0
    assert capsys.readouterr().out.startswith("kvmsnapd 0.")


# check-config


def test_a_valid_configuration_is_summed_up(capsys: Capture, write: Write) -> None:
    path = write(HOST_CONFIG)
    assert answer(capsys, "check-config", "--config", path) == (
        f"{path}: valid; 1 policy, 3 entries under domains\n  standard: yearly, keep last=2, internal, UTC\n"
    )


def test_without_connect_no_libvirt_is_asked(capsys: Capture, write: Write) -> None:
    assert answer(capsys, "check-config", "--config", write(f"connect: {UNREACHABLE}\n"))


def test_a_warning_is_no_failure(capsys: Capture, write: Write) -> None:
    config = write("policies: {p: {schedule: daily, keep: {last: 99}}}\ndomains: {a: [p]}\n")
    assert answer(capsys, "check-config", "--config", config).startswith("warning: ")


FINDINGS_CONFIG = """\
policies:
  standard: {schedule: yearly, keep: {last: 2}, kind: internal}
  other: {schedule: yearly, keep: {last: 2}, kind: internal}
  idle: {schedule: yearly, keep: {last: 2}, kind: internal}
domains:
  gone: [standard]
  "web-*": [standard]
  "*eb-1": [other]
  db01: [other]
"""


def test_connect_finds_what_fits_no_domain_and_ends_with_1(capsys: Capture, write: Write, host: str) -> None:
    config = write(FINDINGS_CONFIG)
    text = answer(capsys, "check-config", "--config", config, "--connect", host, code=1).replace(config, "FILE")
    findings = [line.removeprefix("finding: ") for line in text.splitlines() if line.startswith("finding: ")]
    assert findings == [
        "FILE:6:3: domain 'gone' is configured, and libvirt has none of this name",
        "policy 'standard' applies to no domain",
        "policy 'idle' applies to no domain",
        ("domain 'lab' is unprotected: no entry under domains fits it; give it policies, or [] if that is meant"),
        (
            "domain 'web-1' is unprotected: *eb-1 and web-* fit it equally well and disagree; name it on a line "
            "of its own (FILE:8:3, FILE:7:3)"
        ),
    ]


def test_check_config_as_json(capsys: Capture, write: Write, host: str) -> None:
    config = write(FINDINGS_CONFIG)
    found = json.loads(answer(capsys, "check-config", "--json", "--config", config, "--connect", host, code=1))
    assert list(found) == ["files", "policies", "warnings", "findings", "problems"]
    assert found["policies"] == ["standard", "other", "idle"]
    assert found["warnings"] == []
    assert len(found["findings"]) == 5


# status


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_status_of_pairs_without_snapshots(capsys: Capture, write: Write, host: str) -> None:
    text = answer(capsys, "status", "--config", write(HOST_CONFIG), "--connect", host)
    due = THIS_YEAR.isoformat(timespec="seconds")
    assert rows(text) == [
        ["DOMAIN", "POLICY", "STATE", "AGE", "LIMIT", "CONSISTENCY", "SNAPSHOTS", "NEXT", "NEWEST"],
        ["db01", "standard", "never", "-", "732d", "-", "0", due, "-"],
        ["web-1", "standard", "never", "-", "732d", "-", "0", due, "-"],
    ]


STATUS_KEYS = [
    *("domain", "domain_uuid", "policy", "state", "age_seconds", "max_age_seconds"),
    *("consistency", "snapshots", "next_run_at", "newest"),
]


def status(capsys: Capture, config: str, *domains: str) -> dict[str, Any]:
    found = json.loads(answer(capsys, "status", *domains, "--json", "--config", config, "--connect", DEFAULT_HOST))
    assert isinstance(found, dict)
    return found


def test_status_as_json(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    name = shared_host.take(THIS_YEAR, taken_at=datetime.now(UTC) - timedelta(hours=5, minutes=30))
    found = status(capsys, write(CONFIG))
    assert list(found) == ["pairs", "unprotected", "missing", "unmanaged", "configuration"]
    (pair,) = found["pairs"]
    assert list(pair) == STATUS_KEYS
    assert pair == {
        "domain": "test",
        "domain_uuid": DEFAULT_UUID,
        "policy": "standard",
        "state": "ok",
        "age_seconds": pair["age_seconds"],
        "max_age_seconds": 400 * 86400,
        "consistency": "memory",
        "snapshots": 1,
        "next_run_at": f"{THIS_YEAR.year + 1}-01-01T00:00:00+00:00",
        "newest": name,
    }
    assert 19800 <= pair["age_seconds"] < 19830
    assert (found["unprotected"], found["unmanaged"]) == ([], {})


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
    )
    found = status(capsys, config)
    assert (found["unprotected"], found["unmanaged"]) == (["test"], {"test": 1})


def test_status_as_json_names_missing_domains_too(capsys: Capture, write: Write) -> None:
    assert status(capsys, write("domains: {gone: []}\n"))["missing"] == ["gone"]


def test_a_domain_is_asked_for_by_name_or_uuid(capsys: Capture, write: Write, host: str) -> None:
    config = write(HOST_CONFIG)
    by_name = json.loads(answer(capsys, "status", "web-1", "--json", "--config", config, "--connect", host))
    assert [pair["domain"] for pair in by_name["pairs"]] == ["web-1"]
    assert status(capsys, write(CONFIG), DEFAULT_UUID)["pairs"][0]["domain"] == "test"


def test_several_domains_are_asked_for_at_once(capsys: Capture, write: Write, host: str) -> None:
    arguments = ["status", "web-1", "db01", "web-1", "--json", "--config", write(HOST_CONFIG), "--connect", host]
    assert [pair["domain"] for pair in json.loads(answer(capsys, *arguments))["pairs"]] == ["db01", "web-1"]


# list


def test_a_list_of_no_snapshots_says_so(capsys: Capture, write: Write, host: str) -> None:
    assert answer(capsys, "list", "--config", write(HOST_CONFIG), "--connect", host) == "(nothing)\n"


def test_list_shows_own_held_foreign_and_unmanaged_with_reasons(
    capsys: Capture, write: Write, shared_host: SharedHost
) -> None:
    own = shared_host.take(THIS_YEAR)
    held = shared_host.take(LAST_YEAR, hold=Hold("before the [big] upgrade"))
    left = shared_host.take(THIS_YEAR, policy="dropped")
    shared_host.take_by_hand("by-hand")
    found = json.loads(answer(capsys, "list", "--json", "--config", write(CONFIG), "--connect", DEFAULT_HOST))
    keys = ["domain", "snapshot", "age", "policy", "kind", "consistency", "reasons"]
    assert [list(row) for row in found] == [keys] * 4
    assert {row["snapshot"]: (row["policy"], row["consistency"], row["reasons"]) for row in found} == {
        own: ("standard", "memory", ["last #1"]),
        held: ("standard", "memory", ["held: before the [big] upgrade"]),
        left: ("dropped", "memory", ["unmanaged: policy dropped does not apply here"]),
        "by-hand": ("-", "-", ["foreign: never touched"]),
    }
    text = answer(capsys, "list", "--config", write(CONFIG), "--connect", DEFAULT_HOST)
    assert "held: before the [big] upgrade" in text


# plan


def test_plan_shows_take_keep_and_delete(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    names = [shared_host.take(datetime(THIS_YEAR.year - ago, 1, 1, tzinfo=UTC)) for ago in (2, 1)]
    new = format_name("standard", THIS_YEAR)
    assert answer(capsys, "plan", "--config", write(CONFIG), "--connect", DEFAULT_HOST) == (
        f"test  policy standard, next run {THIS_YEAR.isoformat()}\n"
        f"  take    {new}  internal, memory\n"
        f"  keep    {new}  last #1\n"
        f"  keep    {names[1]}  last #2\n"
        f"  delete  {names[0]}  last=2 used up\n"
        "Nothing was changed.\n"
    )
    assert len(shared_host.domain.listAllSnapshots(0)) == 2


def test_of_a_pair_with_nothing_due_the_next_run_is_planned(
    capsys: Capture, write: Write, shared_host: SharedHost
) -> None:
    names = [shared_host.take(at) for at in (LAST_YEAR, THIS_YEAR)]
    next_year = datetime(THIS_YEAR.year + 1, 1, 1, tzinfo=UTC)
    assert answer(capsys, "plan", "--config", write(CONFIG), "--connect", DEFAULT_HOST) == (
        f"test  policy standard, next run {next_year.isoformat()}\n"
        f"  take    {format_name('standard', next_year)}  internal, memory\n"
        f"  keep    {format_name('standard', next_year)}  last #1\n"
        f"  keep    {names[1]}  last #2\n"
        f"  delete  {names[0]}  last=2 used up\n"
        "Nothing was changed.\n"
    )


def test_plan_does_not_show_deletes_of_a_run_that_takes_nothing(
    capsys: Capture, write: Write, shared_host: SharedHost
) -> None:
    for year in (2000, 2001, 2002):
        shared_host.take(datetime(year, 1, 1, tzinfo=UTC))
    config = write(CONFIG.replace("kind: internal", "kind: external"))
    text = answer(capsys, "plan", "--config", config, "--connect", DEFAULT_HOST)
    assert "  delete  " not in text


def test_plan_shows_a_refusal_with_its_reason(capsys: Capture, write: Write) -> None:
    config = write(CONFIG.replace("kind: internal", "kind: external"))
    assert answer(capsys, "plan", "--config", config, "--connect", DEFAULT_HOST) == (
        f"test  policy standard, next run {THIS_YEAR.isoformat()}\n"
        "  refuse  unsupported: libvirt's test driver has no external snapshots; set kind: internal in the policy\n"
        "Nothing was changed.\n"
    )


def test_plan_shows_what_waits(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    names = [shared_host.take(datetime(2000 + n, 1, 1, tzinfo=UTC)) for n in range(4)]
    config = write(CONFIG.replace("splay", "max_deletes_per_run: 2, splay"))
    text = answer(capsys, "plan", "--config", config, "--connect", DEFAULT_HOST)
    assert f"  waits   {names[0]}  fuse: 3 deletes at once are more than max_deletes_per_run: 2;" in text


def test_plan_as_json(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    names = [shared_host.take(datetime(THIS_YEAR.year - ago, 1, 1, tzinfo=UTC)) for ago in (2, 1)]
    new = format_name("standard", THIS_YEAR)
    arguments = ["plan", "--json", "--config", write(CONFIG), "--connect", DEFAULT_HOST]
    assert json.loads(answer(capsys, *arguments)) == [
        {
            "domain": "test",
            "domain_uuid": DEFAULT_UUID,
            "policy": "standard",
            "run_at": THIS_YEAR.isoformat(),
            "take": new,
            "consistency": "memory",
            "unchanged": None,
            "refusal": None,
            "verdicts": [
                {"snapshot": new, "keep": True, "reasons": ["last #1"]},
                {"snapshot": names[1], "keep": True, "reasons": ["last #2"]},
                {"snapshot": names[0], "keep": False, "reasons": ["last=2 used up"]},
            ],
            "room": [],
            "deletes": [names[0]],
            "blocked": [],
        }
    ]


def test_a_refusal_as_json(capsys: Capture, write: Write) -> None:
    config = write(CONFIG.replace("kind: internal", "kind: external"))
    (plan,) = json.loads(answer(capsys, "plan", "--json", "--config", config, "--connect", DEFAULT_HOST))
    assert (plan["take"], plan["consistency"]) == (None, None)
    assert list(plan["refusal"]) == ["reason", "detail"]
    assert plan["refusal"]["reason"] == "unsupported"


# simulate --keep

TIMES = "2026-11-22T10:00:00+01:00\n\n  2026-11-21\n2026-11-22T08:30\n2030-01-01T00:00Z\n"
NOON = ("--now", "2026-11-22T12:00")


def hours(count: int) -> list[str]:
    first = datetime(2025, 1, 1, tzinfo=UTC)
    return [(first + timedelta(hours=n)).isoformat() for n in range(count)]


def given(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_simulate_prints_a_verdict_for_each_time_as_given_newest_first(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch, TIMES)
    assert answer(capsys, "simulate", "--keep", "last=1 daily=1", *NOON) == (
        "keep    2030-01-01T00:00Z          dated in the future\n"
        "keep    2026-11-22T10:00:00+01:00  last #1, daily #1\n"
        "delete  2026-11-22T08:30           last=1 used up, daily=1 used up\n"
        "delete  2026-11-21                 last=1 used up, daily=1 used up\n"
        "2 kept, 2 deleted\n"
    )


def test_simulate_as_json(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, TIMES)
    assert json.loads(answer(capsys, "simulate", "--json", "--keep", "last=1 daily=1", *NOON)) == [
        {"time": "2030-01-01T00:00Z", "keep": True, "reasons": ["dated in the future"]},
        {"time": "2026-11-22T10:00:00+01:00", "keep": True, "reasons": ["last #1", "daily #1"]},
        {"time": "2026-11-22T08:30", "keep": False, "reasons": ["last=1 used up", "daily=1 used up"]},
        {"time": "2026-11-21", "keep": False, "reasons": ["last=1 used up", "daily=1 used up"]},
    ]


def test_a_dash_is_standard_input(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "2026-11-21\n")
    assert answer(capsys, "simulate", "--keep", "last=1", "-", *NOON).endswith("1 kept, 0 deleted\n")


def test_times_come_from_a_file(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "times").write_text(TIMES)
    text = answer(capsys, "simulate", "--keep", "last=1", str(tmp_path / "times"), *NOON)
    assert text.endswith("2 kept, 2 deleted\n")


def test_no_times_are_no_error(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "\n\n")
    assert answer(capsys, "simulate", "--keep", "last=1") == "0 kept, 0 deleted\n"


def test_times_and_periods_are_in_the_given_zone(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "2026-11-22T00:30\n2026-11-21T23:30Z\n2026-11-21T22:30Z\n")
    text = answer(capsys, "simulate", "--keep", "daily=all", "--timezone", "Europe/Berlin", *NOON)
    # 00:30 in Berlin is 23:30 UTC, both on the 22nd; of two at one instant the first given counts as newer.
    assert text == (
        "keep    2026-11-22T00:30   daily #1\n"
        "delete  2026-11-21T23:30Z  not the newest of its day\n"
        "keep    2026-11-21T22:30Z  daily #2\n"
        "2 kept, 1 deleted\n"
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("2026-11-22\nyesterday\n", "standard input:2: 'yesterday'"),
        ("\n\n2026-13-01\n", "standard input:3: '2026-13-01'"),
    ],
)
def test_a_time_that_is_none_is_told_with_its_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, text: str, place: str
) -> None:
    given(monkeypatch, text)
    assert complaint(capsys, "simulate", "--keep", "last=1", code=2) == (
        f"kvmsnapd: {place} is no ISO 8601 time, such as 2026-03-29T02:30:00+01:00"
    )


def test_a_time_in_a_file_that_is_none_is_told_with_file_and_line(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "times"
    path.write_text("2026-11-22\nsoon\n")
    assert complaint(capsys, "simulate", "--keep", "last=1", str(path), code=2).startswith(
        f"kvmsnapd: {path}:2: 'soon'"
    )


def test_a_file_that_cannot_be_read_is_told(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "missing"
    assert complaint(capsys, "simulate", "--keep", "last=1", str(path), code=2) == (
        f"kvmsnapd: {path}: cannot be read: No such file or directory"
    )


def test_a_file_that_is_no_text_is_told(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"2026-11-22\n\xff\xfe\n")
    assert complaint(capsys, "simulate", "--keep", "last=1", str(path), code=2).startswith(f"kvmsnapd: {path}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--keep", "dayly=1"], "'dayly=1' is no keep rule"),
        (["--keep", "last=0"], "0 keeps nothing"),
        (["--keep", ""], "keep has no rule, so nothing would be kept"),
        (["--keep", "last=1", "--timezone", "Mars"], "--timezone: 'Mars' is no time zone this host knows"),
        (["--keep", "last=1", "--now", "soon"], "--now: 'soon' is no ISO 8601 time"),
    ],
)
def test_a_wrong_value_of_simulate_ends_with_2(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    given(monkeypatch, "")
    assert complaint(capsys, "simulate", *arguments, code=2).startswith(f"kvmsnapd: {words}")


def test_ten_thousand_times_are_judged(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "\n".join(hours(10_000)))
    keep = "last=24 daily=30 weekly=20 monthly=all yearly=all within=2d"
    found = json.loads(answer(capsys, "simulate", "--json", "--keep", keep, *NOON))
    assert len(found) == 10_000
    assert [row["time"] for row in found] == hours(10_000)[::-1]


# simulate --policy

FUTURE_CONFIG = """\
policies:
  nightly: {schedule: daily, keep: {last: 1, weekly: 2}}
  often: {schedule: every 2h, keep: {last: 10}}
"""
FUTURE = ("--now", "2026-11-20T00:00", "--days", "5")


def test_the_future_of_a_policy_is_drawn(capsys: Capture, write: Write) -> None:
    """From Friday 20 November on; the first snapshot is Saturday's, and Sunday's is the last of its week."""
    config = write(FUTURE_CONFIG)
    assert answer(capsys, "simulate", "--policy", "nightly", "--config", config, *FUTURE) == (
        "policy nightly: daily, keep last=1 weekly=2 (UTC)\n"
        "What exists at the end of each day: one column per day of taking, oldest left.\n"
        "day          taken deleted exist  \n"
        "2026-11-20       0       0     0  ·\n"
        "2026-11-21       1       0     1  ·1\n"
        "2026-11-22       1       0     2  ·11\n"
        "2026-11-23       1       1     2  ··11\n"
        "2026-11-24       1       1     2  ··1·1\n"
    )


def test_ten_and_more_of_a_day_are_a_plus(capsys: Capture, write: Write) -> None:
    nine = write(FUTURE_CONFIG.replace("last: 10", "last: 9"))
    assert answer(capsys, "simulate", "--policy", "often", "--config", nine, *FUTURE).endswith("  ····9\n")
    text = answer(capsys, "simulate", "--policy", "often", "--config", write(FUTURE_CONFIG), *FUTURE)
    assert text.splitlines()[-1] == "2026-11-24      12      12    10  ····+"


def test_the_future_as_json(capsys: Capture, write: Write) -> None:
    config = write(FUTURE_CONFIG)
    arguments = ["simulate", "--json", "--policy", "nightly", "--config", config, *FUTURE[:3], "2"]
    assert json.loads(answer(capsys, *arguments)) == [
        {"day": "2026-11-20", "taken": 0, "deleted": 0, "exist": []},
        {"day": "2026-11-21", "taken": 1, "deleted": 0, "exist": ["2026-11-21T00:00:00+00:00"]},
    ]


def test_a_long_future_puts_several_days_into_a_column(capsys: Capture, write: Write) -> None:
    config = write(FUTURE_CONFIG)
    text = answer(capsys, "simulate", "--policy", "nightly", "--config", config, *FUTURE[:3], "91")
    lines = text.splitlines()
    assert lines[2] == "(a column is 2 days)"
    # Day 86 is the Sunday of the week before, day 90 the last.
    assert lines[-1] == f"2027-02-18       1       1     2  {'·' * 43}1·1"


def test_an_unknown_policy_is_told_with_those_there_are(capsys: Capture, write: Write) -> None:
    config = write(FUTURE_CONFIG)
    assert complaint(capsys, "simulate", "--policy", "daily", "--config", config, code=2) == (
        f"kvmsnapd: no policy 'daily' in {config}; it has nightly, often"
    )


@pytest.mark.parametrize("days", ["0", "-1", "3661"])
def test_no_days_and_too_many_are_refused(capsys: Capture, write: Write, days: str) -> None:
    config = write(FUTURE_CONFIG)
    assert complaint(capsys, "simulate", "--policy", "often", "--days", days, "--config", config, code=2) == (
        "kvmsnapd: --days must be from 1 to 3660"
    )
