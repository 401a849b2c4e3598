"""Snapshots whose delete was begun and did not end: no way back any more, and deleted first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.errors import DomainBusyError, HypervisorError, HypervisorUnreachableError, MergeFailedError
from kvmsnapd.events import DeleteFailed, PruneBlocked, SnapshotDeleted
from kvmsnapd.fleet import survey
from kvmsnapd.model import Deleting, DomainState, Kind
from kvmsnapd.plan import due_for, judge, plan_run
from kvmsnapd.prune import BlockReason, Delete, find_obstacle, newest_of
from tests.builders import (
    ANY_LIBVIRT,
    NOW,
    a_domain,
    a_policy,
    a_snapshot,
    an_inventory,
    at,
    half_deleted,
    hourly_snapshots,
)
from tests.fakes import raising
from tests.unit.test_execute import HOUR, Bench

if TYPE_CHECKING:
    from pathlib import Path

    from kvmsnapd.model import Snapshot

NEXT_RUN_ID = 8


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Provide a running domain with two snapshots, of which the next run releases the first."""
    bench = Bench(tmp_path, a_policy(keep="last=2"), run_id=7)
    bench.run_hourly(2)
    bench.events.clear()
    bench.fake.calls.clear()
    return bench


def merge_failed() -> MergeFailedError:
    return MergeFailedError("block commit failed: No space left on device", operation="snapshot_delete")


def busy() -> DomainBusyError:
    return DomainBusyError("another job", operation="snapshot_delete")


def half(bench: Bench) -> list[str]:
    return [snapshot.name for snapshot in bench.fake.domains[bench.uuid].half_deleted("standard")]


def the_first(bench: Bench) -> Snapshot:
    return bench.fake.domains[bench.uuid].snapshots[0]


def note(bench: Bench) -> Deleting | None:
    mark = the_first(bench).mark
    assert mark is not None
    return mark.deleting


def written(bench: Bench) -> list[tuple[str, ...]]:
    """Return what was changed in others than the newest, into which debts are written."""
    changes = [call for call in bench.fake.calls if call[0] in {"describe_snapshot", "delete_snapshot"}]
    return [call for call in changes if call[-1] != bench.names[-1]]


# What it counts for: nothing


def test_it_is_none_of_its_policys_snapshots() -> None:
    good, spoilt = a_snapshot("2026-11-22T11:00"), half_deleted(a_snapshot("2026-11-22T12:00"))
    other = half_deleted(a_snapshot(policy="other"))
    inventory = an_inventory(good, spoilt, other)
    assert inventory.of_policy("standard") == (good,)
    assert inventory.half_deleted("standard") == (spoilt,)
    assert inventory.half_deleted("other") == (other,)


def test_it_is_not_the_newest() -> None:
    good, spoilt = a_snapshot("2026-11-22T11:00"), half_deleted(a_snapshot("2026-11-22T12:00"))
    assert newest_of(an_inventory(good, spoilt), a_policy(), now=NOW) == good.name


def test_retention_does_not_count_it() -> None:
    *older, newest = hourly_snapshots(4)
    verdicts = judge(an_inventory(*older, half_deleted(newest)), a_policy(keep="last=3"), now=NOW)
    assert [(verdict.point.name, verdict.keep) for verdict in verdicts] == [(s.name, True) for s in reversed(older)]


def test_the_fleet_does_not_count_it() -> None:
    good, spoilt = a_snapshot("2026-11-22T11:00"), half_deleted(a_snapshot("2026-11-22T12:00"))
    (pair,) = survey(["standard"], {"*": (a_policy(),)}, [an_inventory(good, spoilt)], now=NOW).pairs
    assert (pair.snapshots, pair.newest, pair.last_success_at) == ((good,), good, at("2026-11-22T11:00:03"))


def test_where_there_is_no_other_there_was_no_success() -> None:
    (pair,) = survey(["standard"], {"*": (a_policy(),)}, [an_inventory(half_deleted(a_snapshot()))], now=NOW).pairs
    assert (pair.snapshots, pair.newest, pair.last_success_at, pair.age(NOW)) == ((), None, None, None)


def test_its_slot_is_not_done_and_is_taken_under_another_name() -> None:
    spoilt = half_deleted(a_snapshot("2026-11-22T12:00"))
    assert due_for(an_inventory(spoilt), a_policy(), NOW).slot == at("2026-11-22T12:00")
    found = plan_run(a_domain(spoilt), a_policy(), ANY_LIBVIRT, now=NOW)
    assert found.take is not None
    assert found.take.name == f"{spoilt.name}-2"


# What is planned for it


def test_it_is_the_first_of_the_deletes_however_young_it_is() -> None:
    *older, newest = hourly_snapshots(4)
    domain = a_domain(*older, half_deleted(newest))
    found = plan_run(domain, a_policy(keep="last=2"), ANY_LIBVIRT, now=NOW)
    assert found.deletes == (
        Delete(newest.name, ("half deleted",)),
        Delete(older[0].name, ("last=2 used up",)),
        Delete(older[1].name, ("last=2 used up",)),
    )


def test_one_of_another_policy_is_left_to_that() -> None:
    domain = a_domain(*hourly_snapshots(2), half_deleted(a_snapshot("2026-11-22T11:30", policy="other")))
    assert plan_run(domain, a_policy(), ANY_LIBVIRT, now=NOW).deletes == ()


@pytest.mark.parametrize("run_id", [7, None])
def test_nothing_is_planned_in_the_run_of_the_guest_in_which_a_merge_failed(run_id: int | None) -> None:
    """Of a shut-off domain there is no such run, and its disks are merged by another QEMU."""
    first, second, third = hourly_snapshots(3)
    domain = a_domain(half_deleted(first, failed_in=7), second, third, run_id=run_id)
    reasons = [getattr(find_obstacle(domain, s.name, ANY_LIBVIRT), "reason", None) for s in (first, second, third)]
    assert reasons == [BlockReason.MERGE_FAILED if run_id else None] * 3


def test_a_merge_that_was_cut_off_and_did_not_fail_may_be_tried_again() -> None:
    first, second = hourly_snapshots(2)
    for run_id in (7, None):
        domain = a_domain(half_deleted(first), second, run_id=run_id)
        assert find_obstacle(domain, first.name, ANY_LIBVIRT) is None


def test_who_has_to_wait_for_another_run_of_the_guest_is_told_how_to_get_one() -> None:
    first, second = hourly_snapshots(2)
    found = find_obstacle(a_domain(half_deleted(first, failed_in=7), second, run_id=7), second.name, ANY_LIBVIRT)
    assert found is not None
    assert first.name in found.detail
    assert "shut it down and start it again" in found.detail


# The note in the description


def test_the_note_is_there_before_libvirt_is_asked_to_delete(bench: Bench) -> None:
    first, seen = bench.names[0], []
    bench.fake.before["delete_snapshot"] = [lambda: seen.append(half(bench))]
    assert bench.run().deleted == 1
    assert seen == [[first]]
    assert written(bench) == [("describe_snapshot", bench.uuid, first), ("delete_snapshot", bench.uuid, first)]


def test_where_the_note_cannot_be_written_nothing_is_deleted(bench: Bench) -> None:
    bench.fake.before["describe_snapshot"] = [raising(HypervisorError("disk full", operation="snapshot_redefine"))]
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, 1)
    assert [call[0] for call in written(bench)] == ["describe_snapshot"]
    assert half(bench) == []


def test_an_internal_snapshot_gets_no_note(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1", kind=Kind.INTERNAL))
    bench.run_hourly(2)
    assert [call[0] for call in written(bench)] == ["delete_snapshot"]


def test_a_domain_that_is_busy_has_not_begun_and_the_note_is_taken_back(bench: Bench) -> None:
    before = the_first(bench)
    bench.fake.before["delete_snapshot"] = [raising(busy())]
    assert bench.run().blocked == 1
    assert the_first(bench).mark == before.mark
    assert [call[0] for call in written(bench)] == ["describe_snapshot", "delete_snapshot", "describe_snapshot"]
    assert bench.said(DeleteFailed)[0].reason == "busy"


def test_one_that_was_half_deleted_before_is_so_still_when_the_domain_is_busy(bench: Bench) -> None:
    bench.fake.before["delete_snapshot"] = [raising(HypervisorUnreachableError("lost", operation="snapshot_delete"))]
    bench.run()
    begun = note(bench)
    bench.now += HOUR
    bench.fake.before["delete_snapshot"] = [raising(busy())]
    bench.run()
    assert begun is not None
    assert note(bench) == begun


def test_what_else_the_description_says_stays(bench: Bench) -> None:
    before = the_first(bench)
    bench.fake.before["delete_snapshot"] = [raising(merge_failed())]
    bench.run()
    after = the_first(bench)
    assert before.mark is not None
    assert after == replace(before, mark=replace(before.mark, deleting=Deleting(bench.now, 7)))


# What comes of it


@pytest.mark.parametrize("error", [HypervisorUnreachableError, HypervisorError])
def test_a_delete_whose_end_is_unknown_is_tried_again_at_the_next_run(
    bench: Bench, error: type[HypervisorError]
) -> None:
    first, second = bench.names
    bench.fake.before["delete_snapshot"] = [raising(error("cut off", operation="snapshot_delete"))]
    assert bench.run().blocked == 1
    assert note(bench) == Deleting(bench.now)
    bench.now += HOUR
    bench.restart()
    assert bench.run().deleted == 2
    assert [event.snapshot for event in bench.said(SnapshotDeleted)] == [first, second]


def test_after_a_failed_merge_the_run_of_the_guest_is_noted(bench: Bench) -> None:
    bench.fake.before["delete_snapshot"] = [raising(merge_failed())]
    assert bench.run().deleted == 0
    assert note(bench) == Deleting(bench.now, 7)
    assert bench.said(DeleteFailed)[0].reason == "merge"


@pytest.mark.parametrize("new_process", [False, True])
def test_in_the_same_run_of_the_guest_nothing_is_deleted_any_more(bench: Bench, new_process: bool) -> None:
    other = a_policy("other", keep="last=1")
    bench.run(other)
    bench.fake.before["delete_snapshot"] = [raising(merge_failed())]
    bench.run()
    bench.fake.calls.clear()
    for hour in range(1, 4):
        bench.now += HOUR
        if new_process:
            bench.restart()
        bench.events.clear()
        for policy, waiting in ((bench.policy, hour + 1), (other, hour)):
            outcome = bench.run(policy)
            assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, waiting)
            assert bench.said(PruneBlocked)[0].blocked == {"merge_failed": waiting}
    assert written(bench) == []


@pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.SHUT_OFF])
def test_in_another_run_of_the_guest_all_is_deleted_that_had_to_wait(bench: Bench, state: DomainState) -> None:
    bench.fake.before["delete_snapshot"] = [raising(merge_failed())]
    bench.run_hourly(4)
    assert len(bench.names) == 6
    bench.change(state=state, run_id=NEXT_RUN_ID if state is DomainState.RUNNING else None)
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 5, 0)
    assert half(bench) == []


def test_a_merge_that_fails_in_the_next_run_of_the_guest_as_well_ends_that_one_too(bench: Bench) -> None:
    bench.fake.before["delete_snapshot"] = [raising(merge_failed())]
    bench.run_hourly(1)
    bench.change(run_id=NEXT_RUN_ID)
    bench.fake.before["delete_snapshot"] = [raising(merge_failed())]
    assert bench.run().deleted == 0
    marks = [snapshot.mark for snapshot in bench.fake.domains[bench.uuid].snapshots]
    assert Deleting(bench.now, NEXT_RUN_ID) in [mark.deleting for mark in marks if mark]
    bench.now += HOUR
    assert bench.run().deleted == 0
    bench.change(run_id=NEXT_RUN_ID + 1)
    bench.now += HOUR
    assert bench.run().deleted == 4


def test_a_failed_merge_that_cannot_be_noted_ends_this_run_of_the_guest_all_the_same(bench: Bench) -> None:
    full = HypervisorError("No space left on device", operation="snapshot_redefine")
    bench.fake.before["delete_snapshot"] = [raising(merge_failed())]
    bench.fake.before["describe_snapshot"] = [lambda: None, raising(full)]
    bench.run()
    bench.now += HOUR
    assert bench.run().deleted == 0
