"""`list`: the tree as it is, with kind, consistency, size, reasons, hold, and when each goes."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from kvmsnapd.cli.listing import draw_tree
from kvmsnapd.domain_xml import format_request
from kvmsnapd.model import Consistency, Deleting, Drill, Hold, Kind, Mark, Restoring, TakeRequest
from kvmsnapd.naming import format_name
from tests.builders import a_chain, a_foreign_snapshot, a_snapshot
from tests.unit.command_line import (
    CONFIG,
    DEFAULT_HOST,
    DEFAULT_UUID,
    HOST_CONFIG,
    LAST_YEAR,
    THIS_YEAR,
    Capture,
    SharedHost,
    Write,
    answer,
)

if TYPE_CHECKING:
    from typing import Any

    from kvmsnapd.model import Snapshot


def listed(capsys: Capture, config: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        answer(capsys, "list", "--json", "--config", config, "--connect", DEFAULT_HOST)
    )
    return found


def test_a_list_of_no_snapshots_says_so(capsys: Capture, write: Write, host: str) -> None:
    assert answer(capsys, "list", "--config", write(HOST_CONFIG), "--connect", host) == "(nothing)\n"


# The tree


def drawn(*snapshots: Snapshot) -> list[str]:
    return [branch + snapshot.name for branch, snapshot in draw_tree(snapshots)]


def foreign(name: str, parent: str | None = None) -> Snapshot:
    return a_foreign_snapshot(name, parent=parent)


def test_a_chain_is_a_column() -> None:
    chain = a_chain(*(a_snapshot(f"2026-11-22T{hour}:00") for hour in ("09", "10", "11")))
    assert drawn(*reversed(chain)) == [snapshot.name for snapshot in chain]


def test_branches_are_moved_to_the_right_and_what_is_below_them_as_well() -> None:
    tree = [foreign("a"), foreign("b", "a"), foreign("c", "a"), foreign("d", "b"), foreign("e", "d"), foreign("f", "d")]
    assert drawn(*tree) == ["a", "├─ b", "│  d", "│  ├─ e", "│  └─ f", "└─ c"]


def test_several_roots_are_branches_of_the_domain() -> None:
    assert drawn(foreign("a"), foreign("b"), foreign("c", "a")) == ["├─ a", "│  c", "└─ b"]


def test_a_child_whose_parent_is_gone_is_a_root() -> None:
    assert drawn(foreign("b", "a")) == ["b"]


def test_a_chain_deeper_than_pythons_stack_is_drawn() -> None:
    chain = a_chain(*(foreign(f"s{n}") for n in range(3000)))
    assert len(drawn(*chain)) == 3000


def test_a_foreign_one_stands_where_it_is(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    first = shared_host.take(LAST_YEAR)
    shared_host.take_by_hand("by-hand")
    last = shared_host.take(THIS_YEAR)
    text = answer(capsys, "list", "--config", write(CONFIG), "--connect", DEFAULT_HOST)
    assert [line.split()[1] for line in text.splitlines()[1:-1]] == [first, "by-hand", last]
    found = listed(capsys, write(CONFIG))
    assert [(row["snapshot"], row["parent"], row["own"]) for row in found] == [
        (first, None, True),
        ("by-hand", first, False),
        (last, "by-hand", True),
    ]


# What is told of each

KEYS = [
    *("domain", "domain_uuid", "snapshot", "parent", "own", "created_at", "policy", "scheduled_at", "kind"),
    *("consistency", "size_bytes", "held", "held_until", "managed", "released_at", "released_after"),
    *("never_released", "standalone", "linked", "restoring", "half_deleted", "drill", "reasons"),
]


def test_own_held_foreign_and_unmanaged_with_reasons_and_releases(
    capsys: Capture, write: Write, shared_host: SharedHost
) -> None:
    own = shared_host.take(THIS_YEAR)
    held = shared_host.take(LAST_YEAR, hold=Hold("before the [big] upgrade"))
    until = datetime(THIS_YEAR.year + 3, 5, 1, tzinfo=UTC)
    older = shared_host.take(LAST_YEAR.replace(year=2010), hold=Hold("audit", until))
    left = shared_host.take(THIS_YEAR, policy="dropped")
    shared_host.take_by_hand("by-hand")
    found = listed(capsys, write(CONFIG))
    assert [list(row) for row in found] == [KEYS] * 5
    two_years, after_hold = (datetime(THIS_YEAR.year + n, 1, 1, tzinfo=UTC).isoformat() for n in (2, 4))
    assert {
        row["snapshot"]: (row["policy"], row["reasons"], row["released_at"], row["never_released"]) for row in found
    } == {
        own: ("standard", ["last #1"], two_years, False),
        held: ("standard", ["held: before the [big] upgrade"], None, True),
        older: ("standard", ["held: audit"], after_hold, False),
        left: ("dropped", ["unmanaged: policy dropped does not apply here"], None, False),
        "by-hand": (None, ["foreign: never touched"], None, False),
    }
    text = answer(capsys, "list", "--config", write(CONFIG), "--connect", DEFAULT_HOST)
    assert "held: before the [big] upgrade" in text
    assert f"audit (until {until.isoformat(timespec='minutes')})" in text
    assert text.endswith("\nRELEASED is the run that deletes it if every run succeeds.\n")


def test_one_of_a_newer_kvmsnapd_is_not_called_a_persons(
    capsys: Capture, write: Write, shared_host: SharedHost
) -> None:
    name, text = f"kvmsnapd-standard-{THIS_YEAR:%Y%m%d}T000000Z", '{"kvmsnapd": 2}'
    shared_host.take_by_hand(name, text)
    (row,) = listed(capsys, write(CONFIG))
    assert (row["own"], row["reasons"]) == (False, ["of a newer kvmsnapd: not touched by this one"])


def test_a_pipe_gets_whole_lines(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    reason = "a reason as long as people write them, " * 20
    shared_host.take(THIS_YEAR, hold=Hold(reason))
    lines = answer(capsys, "list", "--config", write(CONFIG), "--connect", DEFAULT_HOST).splitlines()
    assert len(lines) == 2
    assert lines[1].count(reason.strip()) == 2
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in "".join(lines)


def test_times_are_in_the_policys_zone(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    shared_host.take(THIS_YEAR)
    config = write("timezone: Asia/Kolkata\n" + CONFIG)
    (line,) = answer(capsys, "list", "--config", config, "--connect", DEFAULT_HOST).splitlines()[1:-1]
    assert f" {THIS_YEAR.year + 1}-01-01T00:00+05:30 " in line or f" {THIS_YEAR.year + 2}-01-01T00:00+05:30 " in line


def test_what_is_special_is_told_in_words(capsys: Capture, write: Write, shared_host: SharedHost) -> None:
    when = datetime(2026, 11, 22, 10, tzinfo=UTC)
    plain = Mark("standard", THIS_YEAR, THIS_YEAR, Consistency.MEMORY, Kind.INTERNAL)
    marks = {
        "kept by a restore, in files of its own": replace(plain, standalone=True),
        "2 linked copy(s) stand on it": replace(plain, linked=("a", "b")),
        "a restore to it was begun at 2026-11-22T10:00:00+00:00 and is not finished": replace(
            plain, restoring=Restoring(when)
        ),
        "restore drill passed (2026-11-22T10:00:00+00:00)": replace(plain, drill=Drill(when)),
        "restore drill failed: no login (2026-11-22T10:00:00+00:00)": replace(plain, drill=Drill(when, "no login")),
        "half deleted: no way back, goes with the next run": replace(plain, deleting=Deleting(when)),
        "without vdb": replace(plain, excluded=("vdb",)),
    }
    names = {}
    for n, (words, mark) in enumerate(marks.items()):
        slot = THIS_YEAR - timedelta(days=n)
        names[format_name("standard", slot)] = words
        request = TakeRequest(
            DEFAULT_UUID, "test", format_name("standard", slot), replace(mark, scheduled_at=slot, taken_at=slot)
        )
        shared_host.domain.snapshotCreateXML(format_request(request), 0)
    for row in listed(capsys, write(CONFIG)):
        assert names[row["snapshot"]] in row["reasons"], row
