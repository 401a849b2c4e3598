"""The command line, in this process: exit codes, tables, JSON, and messages."""

from __future__ import annotations

import faulthandler
import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.cli import main
from tests.unit.command_line import (
    CONFIG,
    HOST_CONFIG,
    UNREACHABLE,
    Capture,
    Write,
    answer,
    complaint,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_faulthandler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the real stderr to it: the one that tests capture has no file descriptor."""
    monkeypatch.setattr(faulthandler, "enable", lambda: None)


def usage_error(*arguments: str) -> int:
    """Return the exit code with which the arguments themselves are refused."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


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
        {"day": "2026-11-20", "days": 1, "taken": 0, "deleted": 0, "exist": []},
        {"day": "2026-11-21", "days": 1, "taken": 1, "deleted": 0, "exist": ["2026-11-21T00:00:00+00:00"]},
    ]


def test_a_longer_future_puts_several_days_into_a_column(capsys: Capture, write: Write) -> None:
    config = write(FUTURE_CONFIG)
    text = answer(capsys, "simulate", "--policy", "nightly", "--config", config, *FUTURE[:3], "91")
    lines = text.splitlines()
    assert lines[2] == "(a column is 2 days)"
    # Day 86 is the Sunday of the week before, day 90 the last.
    assert lines[-1] == f"2027-02-18       1       1     2  {'·' * 43}1·1"


def test_ten_years_of_every_hour_fit_on_a_screen_or_three(capsys: Capture, write: Write) -> None:
    config = write("policies: {p: {schedule: hourly, keep: {hourly: 24, daily: 30, monthly: 24, yearly: all}}}\n")
    text = answer(capsys, "simulate", "--policy", "p", "--config", config, *FUTURE[:2], "--until", "10y")
    lines = text.splitlines()
    assert len(lines) < 130
    assert max(map(len, lines)) < 130
    # 24 of the last day, 29 days, 22 months whose end is none of these, the ends of 8 years more, and the oldest.
    assert lines[-1].split()[:4] == ["2036-11-19", "552", "552", "84"]
    assert "a column is" in lines[2]


@pytest.mark.parametrize(
    ("until", "last"),
    [
        ("2026-11-24", "2026-11-24"),
        ("2026-11-24T23:00:00+00:00", "2026-11-24"),
        ("4d", "2026-11-23"),
        ("2w", "2026-12-03"),
        ("1mo", "2026-12-19"),
        ("3 months", "2027-02-19"),
    ],
)
def test_the_end_of_a_future_is_a_day_or_a_length(capsys: Capture, write: Write, until: str, last: str) -> None:
    config = write(FUTURE_CONFIG)
    arguments = ["simulate", "--json", "--policy", "nightly", "--config", config]
    found = json.loads(answer(capsys, *arguments, "--from", "2026-11-20T00:00", "--until", until))
    assert (found[0]["day"], found[-1]["day"]) == ("2026-11-20", last)


@pytest.mark.parametrize(
    ("until", "words"),
    [
        ("soon", "--until: 'soon' is neither a time, such as 2027-03-01, nor a length"),
        ("2026-11-19", "--until 2026-11-19 is 2026-11-19, which must lie from 2026-11-20 on"),
        ("101y", "--until 101y is 2127-11-19, which must lie from 2026-11-20 on and within 36600 days"),
        ("9999y", "--until: '9999y' is too far"),
    ],
)
def test_an_end_that_is_none_ends_with_2(capsys: Capture, write: Write, until: str, words: str) -> None:
    arguments = ["simulate", "--policy", "nightly", "--config", write(FUTURE_CONFIG), *FUTURE[:2], "--until", until]
    assert complaint(capsys, *arguments, code=2).startswith(f"kvmsnapd: {words}")


def test_more_snapshots_than_anybody_waits_for_are_refused(capsys: Capture, write: Write) -> None:
    config = write("policies: {p: {schedule: every 1m, keep: {last: 1}}}\n")
    text = complaint(capsys, "simulate", "--policy", "p", "--config", config, "--until", "10y", code=2)
    assert "days of every 1m may be 52" in text
    assert text.endswith("snapshots; ask for a time with 1000000 at most")


def test_an_unknown_policy_is_told_with_those_there_are(capsys: Capture, write: Write) -> None:
    config = write(FUTURE_CONFIG)
    assert complaint(capsys, "simulate", "--policy", "daily", "--config", config, code=2) == (
        f"kvmsnapd: no policy 'daily' in {config}; it has nightly, often"
    )


@pytest.mark.parametrize("days", ["0", "-1", "36601"])
def test_no_days_and_too_many_are_refused(capsys: Capture, write: Write, days: str) -> None:
    config = write(FUTURE_CONFIG)
    assert complaint(capsys, "simulate", "--policy", "often", "--days", days, "--config", config, code=2) == (
        "kvmsnapd: --days must be from 1 to 36600"
    )
