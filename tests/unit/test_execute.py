"""Runs against the fake hypervisor, with everything that can go wrong in them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.errors import (
    DomainBusyError,
    GuestAgentRefusedError,
    GuestAgentUnavailableError,
    GuestFrozenError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StorageFullError,
)
from kvmsnapd.events import (
    DeleteFailed,
    DomainExamined,
    DomainThawed,
    Event,
    GuestFrozen,
    PruneBlocked,
    RunFinished,
    RunSkipped,
    RunStuck,
    SnapshotDeleted,
    SnapshotDowngraded,
    SnapshotFailed,
    SnapshotTaken,
    SnapshotUnchanged,
    ThawFailed,
)
from kvmsnapd.execute import Executor, Outcome
from kvmsnapd.fleet import survey
from kvmsnapd.gates import HostGate, StorageGates
from kvmsnapd.model import Consistency, DomainState, Hold, Kind, Storage, TakeRequest
from kvmsnapd.naming import format_name
from kvmsnapd.policy import ConsistencyRule, DiskSelection, Policy
from kvmsnapd.state_files import DomainLocks, FreezeIntents
from tests.builders import a_chain, a_disk, a_domain, a_foreign_snapshot, a_policy, a_snapshot, at
from tests.fakes import FakeHypervisor, raising

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmsnapd.fleet import Pair

NOON = at("2026-11-22T12:00")
HOUR = timedelta(hours=1)


class Bench:
    """An executor on the fake, one domain, a clock that tests move."""

    def __init__(self, directory: Path, policy: Policy | None = None, **domain: object) -> None:
        self.now = NOON
        self.fake = FakeHypervisor(clock=lambda: self.now)
        self.policy = policy or a_policy()
        self.uuid = self.fake.add(a_domain(**domain)).uuid  # type: ignore[arg-type]
        self.locks, self.intents = DomainLocks(directory / "locks"), FreezeIntents(directory / "frozen")
        self.events: list[Event] = []
        self.current: Callable[[Pair], Pair | None] = lambda pair: pair
        self.restart()

    def restart(self) -> None:
        """Begin anew, as a new process does: with nothing but what is on disk and in libvirt."""
        ticks = itertools.count()
        self.executor = Executor(
            self.fake,
            self.locks,
            self.intents,
            lambda event: self.events.append(event),  # noqa: PLW0108  # the list is replaced by `said`
            clock=lambda: self.now,
            stopwatch=lambda: float(next(ticks)),
            current=lambda pair: self.current(pair),  # noqa: PLW0108  # tests replace it
        )

    def run(self, policy: Policy | None = None) -> Outcome:
        """Run the pair as the daemon would."""
        policy = policy or self.policy
        fleet = survey([policy.name], {"*": (policy,)}, self.fake.inventory(), now=self.now)
        (pair,) = fleet.pairs
        return self.executor.run(pair)

    def run_hourly(self, hours: int) -> None:
        """Run so many times, an hour after each."""
        for _ in range(hours):
            self.run()
            self.now += HOUR

    def change(self, **fields: Any) -> None:  # noqa: ANN401  # whatever the class takes
        """Have the domain be different from now on."""
        self.fake.add(replace(self.fake.domains[self.uuid], **fields))

    def said(self, kind: type[Event]) -> list[Any]:
        """Return the events of one kind, and forget them."""
        found = [event for event in self.events if type(event) is kind]
        self.events = [event for event in self.events if type(event) is not kind]
        return found

    @property
    def names(self) -> list[str]:
        return self.fake.snapshot_names(self.uuid)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def unreachable() -> HypervisorUnreachableError:
    return HypervisorUnreachableError("connection lost", operation="snapshot_create")


def agent_silent() -> GuestAgentUnavailableError:
    return GuestAgentUnavailableError("agent did not answer", operation="snapshot_create", code=86)


def test_a_due_slot_is_taken_under_its_name(bench: Bench) -> None:
    assert bench.run() == Outcome("taken", NOON, format_name("standard", NOON))
    (event,) = bench.said(SnapshotTaken)
    assert (event.consistency, event.kind, event.scheduled_at) == ("filesystem", "external", NOON)
    assert bench.names == [event.snapshot]


def test_a_slot_that_is_done_is_not_taken_again(bench: Bench) -> None:
    bench.run()
    assert bench.run() == Outcome("nothing_due")
    assert len(bench.names) == 1


def test_snapshots_no_rule_claims_are_deleted_after_the_take(bench: Bench) -> None:
    for _ in range(5):
        bench.run()
        bench.now += HOUR
    assert bench.names == [format_name("standard", NOON + n * HOUR) for n in (2, 3, 4)]
    assert [event.snapshot for event in bench.said(SnapshotDeleted)] == [
        format_name("standard", NOON + n * HOUR) for n in (0, 1)
    ]


def test_a_failed_take_deletes_nothing(bench: Bench) -> None:
    bench.fake.add(
        replace(
            bench.fake.domains[bench.uuid], snapshots=a_chain(*(a_snapshot(NOON - n * HOUR) for n in (5, 4, 3, 2, 1)))
        )
    )
    bench.fake.before["take_snapshot"] = [raising(HypervisorError("no space left", operation="snapshot_create"))]
    before = bench.names
    assert bench.run().result == "failed"
    assert bench.names == before
    (event,) = bench.said(SnapshotFailed)
    assert (event.reason, event.error) == ("libvirt", "no space left; none was taken")


def test_foreign_snapshots_are_never_deleted(bench: Bench) -> None:
    bench.fake.make_foreign(bench.uuid, "before-upgrade")
    bench.fake.make_foreign(bench.uuid, format_name("standard", NOON - 9 * HOUR))
    for _ in range(6):
        bench.run()
        bench.now += HOUR
    assert bench.names[:2] == ["before-upgrade", format_name("standard", NOON - 9 * HOUR)]
    assert len(bench.names) == 5


def test_more_deletes_than_the_fuse_allows_delete_nothing_and_say_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2", max_deletes_per_run=3))
    older = a_chain(*(a_snapshot(NOON - n * HOUR) for n in range(6, 0, -1)))
    bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=older))
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, 5)
    (event,) = bench.said(PruneBlocked)
    assert event.blocked == {"fuse": 5}


def test_a_silent_agent_downgrades_where_the_policy_prefers(bench: Bench) -> None:
    bench.fake.before["take_snapshot"] = [raising(agent_silent())]
    assert bench.run().result == "taken"
    assert len(bench.said(SnapshotDowngraded)) == 1
    mark = bench.fake.domains[bench.uuid].snapshots[0].mark
    assert mark is not None
    assert mark.consistency is Consistency.CRASH


def test_a_silent_agent_fails_where_the_policy_requires(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(consistency=ConsistencyRule.FILESYSTEM))
    bench.fake.before["take_snapshot"] = [raising(agent_silent())]
    assert bench.run().result == "failed"
    assert bench.names == []
    assert bench.said(SnapshotFailed)[0].reason == "agent"


def test_an_agent_that_may_still_freeze_is_thawed_until_it_answers(bench: Bench) -> None:
    def freeze_and_fail() -> None:
        bench.fake.frozen.add(bench.uuid)
        raise agent_silent()

    bench.fake.before["take_snapshot"] = [freeze_and_fail]
    bench.fake.before["thaw"] = [raising(agent_silent()), raising(agent_silent())]
    bench.run()
    assert bench.intents.outstanding() == [bench.uuid]
    for _ in range(2):
        bench.executor.thawer.thaw_all()
    assert bench.intents.outstanding() == []
    assert bench.fake.frozen == set()
    assert [event.error for event in bench.said(ThawFailed)] == ["agent did not answer"]
    assert len(bench.said(DomainThawed)) == 1


def test_a_run_thaws_a_domain_that_an_earlier_one_may_have_left_frozen(bench: Bench) -> None:
    bench.intents.record(bench.uuid)
    bench.fake.frozen.add(bench.uuid)
    bench.run()
    assert bench.fake.frozen == set()
    assert bench.intents.outstanding() == []


def test_a_quiesced_take_leaves_no_intent_and_an_answered_refusal_neither(bench: Bench) -> None:
    bench.fake.before["take_snapshot"] = [raising(HypervisorError("refused", operation="snapshot_create"))]
    bench.run()
    assert bench.intents.outstanding() == []
    bench.run()
    assert bench.intents.outstanding() == []


def test_the_intent_is_on_disk_while_libvirt_works(bench: Bench) -> None:
    seen = []
    bench.fake.before["take_snapshot"] = [lambda: seen.append(bench.intents.outstanding())]
    bench.run()
    assert seen == [[bench.uuid]]


def test_a_guest_that_was_shut_off_meanwhile_needs_no_thaw(bench: Bench) -> None:
    bench.intents.record(bench.uuid)
    bench.fake.add(replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF))
    bench.executor.thawer.thaw_all()
    assert bench.intents.outstanding() == []
    assert ("thaw", bench.uuid) not in bench.fake.calls


def test_intents_of_domains_that_are_gone_are_dropped(bench: Bench) -> None:
    bench.intents.record("00000000-0000-0000-0000-000000000000")
    bench.executor.thawer.thaw_all()
    assert bench.intents.outstanding() == []


def test_a_lost_connection_leaves_the_outcome_open_and_the_retry_takes_another_name(bench: Bench) -> None:
    bench.fake.before["take_snapshot"] = [raising(unreachable())]
    assert bench.run().result == "failed"
    (event,) = bench.said(SnapshotFailed)
    assert event.reason == "connection"
    assert "not known yet" in event.error
    assert bench.intents.outstanding() == [bench.uuid]
    assert bench.run().snapshot == format_name("standard", NOON, 2)


def test_a_take_that_libvirt_finished_after_the_connection_broke_is_not_repeated(bench: Bench) -> None:
    def finish_and_break() -> None:
        bench.fake.finish_take(the_request(bench))
        raise unreachable()

    bench.fake.before["take_snapshot"] = [finish_and_break]
    bench.run()
    assert bench.run().result == "nothing_due"
    assert bench.names == [format_name("standard", NOON)]


def the_request(bench: Bench) -> TakeRequest:
    from kvmsnapd.preflight import plan_take  # noqa: PLC0415

    domain = bench.fake.domains[bench.uuid]
    request = plan_take(domain, bench.policy, bench.fake.limits, slot=NOON, now=NOON)
    assert isinstance(request, TakeRequest)
    return request


def test_a_take_finished_by_an_earlier_process_counts_as_taken(bench: Bench) -> None:
    earlier = the_request(bench)
    bench.now += timedelta(seconds=20)
    bench.fake.before["take_snapshot"] = [lambda: void(bench.fake.finish_take(earlier))]
    assert bench.run() == Outcome("taken", NOON, format_name("standard", NOON))
    assert bench.names == [format_name("standard", NOON)]


def void(_value: object) -> None:
    return None


def test_an_overlay_left_behind_fails_once_and_the_retry_takes_another_name(bench: Bench) -> None:
    left_behind = SnapshotExistsError("external snapshot file already exists", operation="snapshot_create", code=67)
    bench.fake.before["take_snapshot"] = [raising(left_behind)]
    assert bench.run().result == "failed"
    assert bench.run().snapshot == format_name("standard", NOON, 2)


def test_a_refused_domain_is_skipped_with_its_reason_and_untouched(bench: Bench) -> None:
    bench.fake.add(replace(bench.fake.domains[bench.uuid], managed_save=True))
    outcome = bench.run()
    assert (outcome.result, outcome.wants_retry) == ("skipped", True)
    assert bench.said(RunSkipped)[0].reason == "managed_save"
    assert bench.names == []


def test_a_domain_somebody_else_works_on_is_skipped(bench: Bench) -> None:
    bench.executor.lock_wait = timedelta(seconds=0.1)
    with bench.locks.hold(bench.uuid, wait=timedelta(0)):
        assert bench.run().result == "skipped"
    assert bench.said(RunSkipped)[0].reason == "locked"
    assert bench.run().result == "taken"


def test_a_vanished_domain_ends_the_run_without_an_error(bench: Bench) -> None:
    bench.fake.before["domain"] = [lambda: void(bench.fake.domains.pop(bench.uuid))]
    assert bench.run().result == "skipped"
    assert bench.said(RunSkipped)[0].reason == "domain_gone"


def test_a_delete_that_fails_ends_the_pruning_and_keeps_the_take(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    bench.fake.add(
        replace(bench.fake.domains[bench.uuid], snapshots=a_chain(*(a_snapshot(NOON - n * HOUR) for n in (3, 2, 1))))
    )
    bench.fake.before["delete_snapshot"] = [raising(DomainBusyError("block job active", operation="snapshot_delete"))]
    outcome = bench.run()
    assert (outcome.result, outcome.deleted) == ("taken", 0)
    assert bench.said(DeleteFailed)[0].reason == "busy"
    assert len(bench.names) == 4
    bench.now += HOUR
    assert bench.run().deleted == 4


def test_a_delete_libvirt_only_pretended_is_a_failure(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.fake.add(
        replace(bench.fake.domains[bench.uuid], snapshots=a_chain(*(a_snapshot(NOON - n * HOUR) for n in (3, 2, 1))))
    )
    monkeypatch.setattr(bench.fake, "delete_snapshot", lambda *_: None)
    bench.run()
    assert "still lists" in bench.said(DeleteFailed)[0].error


@pytest.mark.parametrize("interference", ["hold", "foreign child", "block job", "mark removed"])
def test_what_a_person_does_between_plan_and_delete_stops_the_delete(tmp_path: Path, interference: str) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    oldest = (a_snapshot(NOON - HOUR),)
    bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=oldest))

    def interfere() -> None:
        domain = bench.fake.domains[bench.uuid]
        first, *rest = domain.snapshots
        assert first.mark is not None
        if interference == "hold":
            first = replace(first, mark=replace(first.mark, hold=Hold("audit")))
        elif interference == "mark removed":
            first = replace(first, mark=None)
        elif interference == "foreign child":
            rest = [replace(s, mark=None) for s in rest]
        else:
            domain = replace(domain, disks=(replace(domain.disks[0], block_job=True),))
        bench.fake.add(replace(domain, snapshots=(first, *rest)))

    # The first read is the plan's; the second is the one just before the delete.
    bench.fake.before["domain"] = [lambda: None, lambda: None, interfere]
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, 1)
    assert bench.names[0] == oldest[0].name
    assert sum(bench.said(PruneBlocked)[0].blocked.values()) == 1


def test_each_run_ends_with_one_event_that_sums_it_up(bench: Bench) -> None:
    bench.run()
    (event,) = bench.said(RunFinished)
    assert (event.result, event.snapshot, event.deleted) == ("taken", format_name("standard", NOON), 0)
    assert event.duration_seconds > 0


def test_internal_snapshots_never_ask_the_agent(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(kind=Kind.INTERNAL))
    bench.run()
    mark = bench.fake.domains[bench.uuid].snapshots[0].mark
    assert mark is not None
    assert (mark.consistency, bench.intents.outstanding()) == (Consistency.MEMORY, [])


def test_a_month_of_hours_with_failures_takes_no_slot_twice(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2 hourly=3 daily=3"))
    taken: list[datetime] = []
    for hour in range(24 * 30):
        if hour % 7 == 0:
            bench.fake.before["take_snapshot"] = [raising(unreachable())]
        if hour % 11 == 0:
            bench.fake.before["delete_snapshot"] = [raising(DomainBusyError("busy", operation="snapshot_delete"))]
        for _ in range(3):
            bench.run()
        taken += [event.scheduled_at for event in bench.said(SnapshotTaken)]
        bench.now += HOUR
    assert len(taken) == len(set(taken)) == 24 * 30
    assert len(bench.names) <= 7


def test_a_guest_left_frozen_by_a_silent_agent_is_thawed_before_anything_else(bench: Bench) -> None:
    def freeze_and_fail() -> None:
        bench.fake.frozen.add(bench.uuid)
        raise agent_silent()

    bench.fake.before["take_snapshot"] = [freeze_and_fail]
    assert bench.run().result == "taken"
    assert bench.fake.frozen == set()
    operations = [call[0] for call in bench.fake.calls if call[0] in {"take_snapshot", "thaw"}]
    assert operations == ["take_snapshot", "thaw", "take_snapshot"]


def test_a_guest_that_may_be_frozen_is_pruned_all_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=(a_snapshot(NOON - HOUR),)))
    bench.fake.before["take_snapshot"] = [raising(agent_silent())]
    bench.fake.before["thaw"] = [raising(agent_silent())]
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 1, 0)  # a merge needs no agent


def test_disks_switched_without_a_snapshot_are_reported_and_not_snapshotted_again(bench: Bench) -> None:
    request = the_request(bench)

    def switch_and_fail() -> None:
        domain = bench.fake.domains[bench.uuid]
        ((_, overlay),) = request.overlays
        bench.fake.add(replace(domain, disks=(replace(domain.disks[0], path=overlay),)))
        raise agent_silent()

    bench.fake.before["take_snapshot"] = [switch_and_fail]
    assert bench.run().result == "failed"
    assert "without a snapshot of it" in bench.said(SnapshotFailed)[0].error
    assert bench.run().snapshot == format_name("standard", NOON, 2)


def test_a_snapshot_a_person_deleted_meanwhile_is_not_missed_by_deleting_the_last_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    older = a_snapshot(NOON - HOUR)
    bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=(older,)))

    def delete_the_new_one() -> None:
        bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=(older,)))

    bench.fake.before["domain"] = [lambda: None, lambda: None, delete_the_new_one]
    bench.run()
    assert bench.names == [older.name]


def test_a_full_chain_is_given_room_by_the_snapshots_that_retention_releases(tmp_path: Path) -> None:
    """A guest on libvirt 9.0 that was off for a day and could not be pruned meanwhile gets out of it by itself."""
    bench = Bench(tmp_path, a_policy(keep="last=2 hourly=8", max_chain_depth=16))
    bench.fake.limits = replace(bench.fake.limits, delete_external_in_chain_offline=False)
    bench.fake.add(replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF))
    for _ in range(24):
        bench.run()
        bench.now += HOUR
    assert len(bench.names) == 16
    assert bench.said(RunSkipped)[-1].reason == "chain_full"
    bench.fake.add(replace(bench.fake.domains[bench.uuid], state=DomainState.RUNNING))
    results = []
    for _ in range(12):
        results.append(bench.run().result)
        bench.now += HOUR
    assert set(results) == {"taken"}
    assert len(bench.names) < 16


def test_room_is_never_made_by_deleting_the_newest(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1", max_chain_depth=2))
    chain = a_chain(a_foreign_snapshot(), a_snapshot(NOON - HOUR))
    bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=chain))
    assert bench.run().result == "skipped"
    assert bench.said(RunSkipped)[0].reason == "chain_full"
    assert bench.names == [snapshot.name for snapshot in chain]


def test_after_a_long_pause_or_a_clock_that_jumped_the_first_run_deletes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="within=6h"))
    for _ in range(5):
        bench.run()
        bench.now += HOUR
    before = bench.names
    bench.now += timedelta(days=3650)
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, 5)
    assert bench.names[:5] == before
    assert bench.said(PruneBlocked)[0].blocked == {"long_pause": 5}


def test_a_guest_started_in_the_moment_of_its_take_gets_no_snapshot_that_lies(bench: Bench) -> None:
    bench.fake.add(replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF))
    running = replace(bench.fake.domains[bench.uuid], state=DomainState.RUNNING)
    bench.fake.before["take_snapshot"] = [lambda: void(bench.fake.add(running))]
    assert bench.run().result == "failed"
    assert "started or shut off in this very moment" in bench.said(SnapshotFailed)[0].error
    assert bench.names == []


def test_notes_that_cannot_be_written_skip_the_run_with_a_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_uuid: str) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.intents, "record", full)
    assert bench.run().result == "skipped"
    assert bench.said(RunSkipped)[0].reason == "state_directory"
    assert bench.names == []


def test_after_all_numbers_of_a_slot_the_first_free_name_is_tried_again(bench: Bench) -> None:
    for _ in range(120):
        bench.fake.before["take_snapshot"] = [raising(unreachable())]
        assert bench.run().result == "failed"
    assert len(bench.executor._taker._used_up) == 1
    assert bench.run().result == "taken"
    assert bench.said(RunSkipped) == []


def test_a_blown_fuse_makes_no_room_either(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2", max_chain_depth=12))
    older = a_chain(*(a_snapshot(NOON - n * HOUR) for n in range(14, 0, -1)))
    bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=older))
    assert bench.run().result == "skipped"
    assert len(bench.names) == 14
    assert bench.said(PruneBlocked)[0].blocked == {"fuse": 12}


def test_no_room_is_made_for_a_take_that_something_else_forbids(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=3", max_chain_depth=4, consistency=ConsistencyRule.FILESYSTEM))
    for _ in range(4):
        bench.run()
        bench.now += HOUR
    bench.fake.add(replace(bench.fake.domains[bench.uuid], agent_connected=False))
    before = bench.names
    assert bench.run().result == "skipped"
    assert bench.said(RunSkipped)[-1].reason == "agent"
    assert bench.names == before


def test_room_that_would_not_shorten_the_chain_is_not_made(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2", max_chain_depth=4))
    for _ in range(2):
        bench.run()
        bench.now += HOUR
    domain = bench.fake.domains[bench.uuid]
    deep = replace(
        domain.disks[0], target="vdb", path="/images/b", backing=("/images/1", "/images/2", "/images/3", "/4")
    )
    bench.fake.add(replace(domain, disks=(*domain.disks, deep)))
    before = bench.names
    assert bench.run().result == "skipped"
    assert bench.names == before


def test_a_future_or_held_snapshot_does_not_stand_in_for_the_newest(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1", max_chain_depth=3))
    held = a_snapshot(NOON - 2 * HOUR, hold=Hold("audit"))
    chain = a_chain(held, a_snapshot(NOON - HOUR), a_snapshot(NOON + 9 * HOUR))
    bench.fake.add(replace(bench.fake.domains[bench.uuid], snapshots=chain))
    bench.fake.before["take_snapshot"] = [raising(HypervisorError("no space left", operation="snapshot_create"))]
    bench.run()
    assert bench.names == [snapshot.name for snapshot in chain]


def test_a_snapshot_that_cannot_be_deleted_does_not_hold_up_the_others(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2"))
    bench.run()
    first = bench.names[0]

    missing = HypervisorError("overlay is missing", operation="snapshot_delete")

    def fail_for_the_first() -> None:
        if bench.fake.calls[-1] == ("delete_snapshot", bench.uuid, first):
            raise missing

    for _ in range(20):
        bench.now += HOUR
        bench.fake.before["delete_snapshot"] = [fail_for_the_first] * 5
        bench.run()
    assert first in bench.names
    assert len(bench.names) <= 4


def test_a_host_that_is_on_only_now_and_then_is_pruned_all_the_same(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=3"))
    for _ in range(12):
        bench.run()
        bench.now += 5 * HOUR
    assert len(bench.names) <= 4


def test_an_agent_that_refuses_to_freeze_and_to_thaw_leaves_nothing_behind(bench: Bench) -> None:
    refused = GuestAgentRefusedError("command disabled", operation="snapshot_create", code=113)
    bench.fake.before["take_snapshot"] = [raising(refused)]
    bench.fake.before["thaw"] = [raising(refused)]
    assert bench.run().result == "taken"
    assert len(bench.said(SnapshotDowngraded)) == 1
    assert bench.intents.outstanding() == []


# Shut-off domains that nothing has changed in


@pytest.fixture
def still(tmp_path: Path) -> Bench:
    """Provide a shut-off domain with one snapshot, an hour later; its files' times are told."""
    bench = Bench(tmp_path, a_policy(keep="last=2"), state=DomainState.SHUT_OFF)
    bench.fake.written = {}
    bench.run()
    bench.events.clear()
    bench.now += HOUR
    return bench


def calls(bench: Bench, *operations: str) -> list[str]:
    return [call[0] for call in bench.fake.calls if call[0] in operations]


def test_a_slot_of_a_domain_that_has_not_changed_is_written_into_its_newest_snapshot(still: Bench) -> None:
    name = format_name("standard", NOON)
    assert still.run() == Outcome("unchanged", NOON + HOUR, name)
    assert still.names == [name]
    (snapshot,) = still.fake.domains[still.uuid].snapshots
    assert snapshot.mark is not None
    assert snapshot.mark.slots == (NOON, NOON + HOUR)
    (event,) = still.said(SnapshotUnchanged)
    assert (event.snapshot, event.scheduled_at) == (name, NOON + HOUR)
    (summary,) = still.said(RunFinished)
    assert (summary.result, summary.snapshot, summary.scheduled_at) == ("unchanged", name, NOON + HOUR)


def test_a_slot_that_was_written_down_is_done_and_the_last_success_moves_with_it(still: Bench) -> None:
    for _ in range(5):
        assert still.run().result == "unchanged"
        assert still.run().result == "nothing_due"
        fleet = survey(["standard"], {"*": (still.policy,)}, still.fake.inventory(), now=still.now)
        assert fleet.pairs[0].last_success_at == still.now
        still.now += HOUR
    assert len(still.names) == 1


def test_a_domain_that_ran_meanwhile_gets_a_snapshot_again(still: Bench) -> None:
    assert still.run().result == "unchanged"
    still.now += HOUR
    still.fake.write_to(still.uuid)
    assert still.run().snapshot == format_name("standard", NOON + 2 * HOUR)


def test_a_run_that_needs_no_snapshot_deletes_what_is_released(still: Bench) -> None:
    for _ in range(2):
        still.fake.write_to(still.uuid)
        still.fake.before["delete_snapshot"] = [raising(DomainBusyError("busy", operation="snapshot_delete"))]
        assert still.run().result == "taken"
        still.now += HOUR
    assert len(still.names) == 3
    outcome = still.run()
    assert (outcome.result, outcome.deleted, len(still.names)) == ("unchanged", 1, 2)
    assert still.run().result == "nothing_due"


def test_pruning_that_writes_into_layers_below_does_not_make_every_slot_a_change(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=3"))
    bench.fake.written = {}
    for _ in range(6):
        bench.run()
        bench.now += HOUR
    bench.fake.add(replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF))
    results = []
    for _ in range(6):
        results.append(bench.run().result)
        bench.now += HOUR
    assert results == ["taken", *["unchanged"] * 5]


def test_a_slot_that_cannot_be_written_down_is_tried_again(still: Bench) -> None:
    gone = SnapshotNotFoundError("it is gone", operation="snapshot_redefine")
    still.fake.before["describe_snapshot"] = [raising(gone)]
    outcome = still.run()
    assert (outcome.result, outcome.wants_retry) == ("skipped", True)
    assert still.said(RunSkipped)[0].reason == "snapshot_gone"
    assert still.run().result == "unchanged"


def test_without_times_of_files_every_slot_is_taken(still: Bench) -> None:
    still.fake.written = None
    assert still.run().result == "taken"


def test_the_slot_that_is_told_is_the_one_that_was_due(tmp_path: Path) -> None:
    bench = Bench(tmp_path, state=DomainState.SHUT_OFF)
    bench.fake.written = {}
    bench.now += 240 * HOUR  # the clock was ahead
    bench.run()
    bench.now -= 240 * HOUR
    outcome = bench.run()
    assert outcome.scheduled_at == NOON


# Quarantine


def skips(bench: Bench) -> list[tuple[str, bool, bool]]:
    return [(event.reason, event.quarantined, event.again) for event in bench.said(RunSkipped)]


def test_a_quarantine_is_told_once(bench: Bench) -> None:
    bench.fake.add(replace(bench.fake.domains[bench.uuid], persistent=False))
    assert [bench.run().quarantined for _ in range(3)] == [True] * 3
    assert skips(bench) == [("transient", True, False), ("transient", True, True), ("transient", True, True)]


def test_a_quarantine_for_another_reason_is_told_again(bench: Bench) -> None:
    domain = bench.fake.domains[bench.uuid]
    bench.fake.add(replace(domain, persistent=False))
    bench.run()
    bench.fake.add(replace(domain, disks=(a_disk(shareable=True),)))
    bench.run()
    assert skips(bench) == [("transient", True, False), ("disk", True, False)]


def test_a_quarantine_that_came_back_is_told_again(bench: Bench) -> None:
    domain = bench.fake.domains[bench.uuid]
    unfit = replace(domain, persistent=False)
    for state in (unfit, replace(unfit, persistent=True, managed_save=True), unfit):
        bench.fake.add(state)
        bench.run()
    assert skips(bench) == [("transient", True, False), ("managed_save", False, False), ("transient", True, False)]
    bench.fake.add(domain)
    assert bench.run().result == "taken"
    bench.now += HOUR
    bench.fake.add(replace(bench.fake.domains[bench.uuid], persistent=False))
    bench.run()
    assert skips(bench) == [("transient", True, False)]


def test_what_heals_is_told_each_time_and_is_no_quarantine(bench: Bench) -> None:
    bench.fake.add(replace(bench.fake.domains[bench.uuid], managed_save=True))
    assert [bench.run().quarantined for _ in range(2)] == [False, False]
    assert skips(bench) == [("managed_save", False, False)] * 2


# What is below the domain


def test_a_run_tells_depth_and_space_while_something_is_due_and_asks_for_nothing_otherwise(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(overlay_directory="/overlays"))
    bench.fake.stored = Storage({"/overlays": 7})
    bench.run()
    before, after = bench.said(DomainExamined)
    assert (before.chain_depth, after.chain_depth) == ({"vda": 0}, {"vda": 1})
    assert before.free_bytes == after.free_bytes == {"/overlays": 7}
    assert ("storage", bench.uuid, "/overlays") in bench.fake.calls
    bench.fake.calls.clear()
    bench.run()
    assert calls(bench, "storage") == []


def test_a_storage_without_space_is_left_alone_until_there_is_some(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(min_free_bytes=10))
    bench.fake.stored = Storage({"/images": 9})
    assert bench.run().wants_retry
    assert skips(bench) == [("space", False, False)]
    bench.fake.stored = Storage({"/images": 10})
    assert bench.run().result == "taken"


def test_a_storage_that_fills_up_during_the_take_is_a_failure_for_want_of_space(bench: Bench) -> None:
    full = StorageFullError("No space left on device", operation="snapshot_create")
    bench.fake.before["take_snapshot"] = [raising(full)]
    assert bench.run().result == "failed"
    assert bench.said(SnapshotFailed)[0].reason == "space"


def test_disks_that_the_policy_leaves_out_are_told_and_noted(tmp_path: Path) -> None:
    policy = a_policy(disks=DiskSelection(exclude=("vdb",)))
    bench = Bench(tmp_path, policy, disks=(a_disk("vda"), a_disk("vdb")))
    bench.run()
    (event,) = bench.said(SnapshotTaken)
    assert event.excluded == ("vdb",)
    (snapshot,) = bench.fake.domains[bench.uuid].snapshots
    assert snapshot.mark is not None
    assert (snapshot.mark.excluded, [target for target, _ in snapshot.overlays]) == (("vdb",), ["vda"])


def test_overlays_that_libvirt_put_elsewhere_are_a_snapshot_that_is_deleted_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = bench.fake.finish_take
    other = (("vda", "/images/other"),)
    monkeypatch.setattr(bench.fake, "finish_take", lambda request: finish(replace(request, overlays=other)))
    assert bench.run().result == "failed"
    assert "put other overlays on it" in bench.said(SnapshotFailed)[0].error
    assert bench.names == []


def test_a_live_snapshot_tells_where_the_ram_is_and_asks_no_agent(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(memory_live=True, consistency=ConsistencyRule.MEMORY))
    bench.run()
    (snapshot,) = bench.fake.domains[bench.uuid].snapshots
    assert snapshot.memory_file == f"/images/web1.{snapshot.name}.mem"
    assert calls(bench, "filesystems", "thaw") == []


# The agent, asked before a freeze


def frozen_by_somebody() -> GuestFrozenError:
    return GuestFrozenError("the agent is in frozen state", operation="snapshot_create", code=1)


def test_what_will_be_frozen_is_asked_before_the_freeze_and_told(bench: Bench) -> None:
    bench.run()
    assert bench.said(SnapshotTaken)[0].frozen == ("/",)
    assert calls(bench, "filesystems", "take_snapshot") == ["filesystems", "take_snapshot"]


@pytest.mark.parametrize("rule", [ConsistencyRule.FILESYSTEM, ConsistencyRule.FILESYSTEM_PREFERRED])
def test_an_agent_that_is_silent_when_asked_is_sent_no_freeze_and_leaves_no_intent(
    tmp_path: Path, rule: ConsistencyRule
) -> None:
    bench = Bench(tmp_path, a_policy(consistency=rule))
    asked: list[bool] = []
    bench.fake.before["filesystems"] = [raising(agent_silent())]
    bench.fake.before["take_snapshot"] = [lambda: asked.append(bench.intents.exists(bench.uuid))]
    outcome = bench.run()
    assert (bench.intents.outstanding(), calls(bench, "thaw")) == ([], [])
    if rule is ConsistencyRule.FILESYSTEM:
        assert (outcome.result, asked, bench.said(SnapshotFailed)[0].reason) == ("failed", [], "agent")
    else:
        assert (outcome.result, asked, len(bench.said(SnapshotDowngraded))) == ("taken", [False], 1)
        assert bench.said(SnapshotTaken)[0].consistency == "crash"


def test_an_agent_too_old_to_tell_what_it_freezes_is_asked_to_freeze_all_the_same(bench: Bench) -> None:
    refused = GuestAgentRefusedError("command not found", operation="filesystems")
    bench.fake.before["filesystems"] = [raising(refused)]
    assert bench.run().result == "taken"
    (event,) = bench.said(SnapshotTaken)
    assert (event.consistency, event.frozen) == ("filesystem", ())


@pytest.mark.parametrize("found", ["when asked", "by the freeze"])
@pytest.mark.parametrize("rule", [ConsistencyRule.FILESYSTEM, ConsistencyRule.FILESYSTEM_PREFERRED])
def test_a_guest_that_somebody_froze_is_told_and_never_thawed(
    tmp_path: Path, rule: ConsistencyRule, found: str
) -> None:
    bench = Bench(tmp_path, a_policy(consistency=rule))
    if found == "when asked":
        bench.fake.frozen.add(bench.uuid)
    else:

        def freeze_first() -> None:
            bench.fake.frozen.add(bench.uuid)
            raise frozen_by_somebody()

        bench.fake.before["take_snapshot"] = [freeze_first]
    outcome = bench.run()
    bench.executor.thawer.thaw_all()
    assert (bench.fake.frozen, calls(bench, "thaw")) == ({bench.uuid}, [])
    assert bench.intents.outstanding() == []
    assert len(bench.said(GuestFrozen)) == 1
    if rule is ConsistencyRule.FILESYSTEM:
        assert (outcome.result, bench.said(SnapshotFailed)[0].reason) == ("failed", "frozen")
    else:
        assert (outcome.result, bench.said(SnapshotTaken)[0].consistency) == ("taken", "crash")
        assert len(bench.said(SnapshotDowngraded)) == 1


def test_a_guest_that_an_earlier_run_of_ours_may_have_frozen_is_thawed_all_the_same(bench: Bench) -> None:
    bench.intents.record(bench.uuid)
    bench.fake.frozen.add(bench.uuid)
    assert bench.run().result == "taken"
    assert (bench.fake.frozen, bench.said(GuestFrozen)) == (set(), [])


# Deletes


def test_after_a_delete_that_left_something_wrong_no_other_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    bench.fake.add(
        replace(bench.fake.domains[bench.uuid], snapshots=a_chain(*(a_snapshot(NOON - n * HOUR) for n in (3, 2, 1))))
    )
    delete = bench.fake.delete_snapshot

    def delete_and_lose_a_branch(uuid: str, name: str) -> None:
        delete(uuid, name)
        domain = bench.fake.domains[uuid]
        bench.fake.add(replace(domain, snapshots=domain.snapshots[1:]))

    monkeypatch.setattr(bench.fake, "delete_snapshot", delete_and_lose_a_branch)
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, 3)
    (event,) = bench.said(DeleteFailed)
    assert "was deleted, and afterwards snapshot" in event.error
    assert "kvmsnapd doctor" in event.error
    assert calls(bench, "delete_snapshot") == ["delete_snapshot"]
    assert bench.said(SnapshotDeleted) == []


# Gates


def in_a_thread(bench: Bench) -> tuple[threading.Thread, list[Outcome]]:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(bench.run()), daemon=True)
    thread.start()
    return thread, outcomes


@pytest.mark.parametrize(
    ("policy", "heavy"),
    [
        (a_policy(), False),
        (a_policy(kind=Kind.INTERNAL), True),
        (a_policy(memory_live=True), True),
    ],
    ids=["disks", "internal", "live"],
)
def test_a_take_waits_for_a_place_on_its_storage(tmp_path: Path, policy: Policy, heavy: bool) -> None:
    bench = Bench(tmp_path, policy)
    bench.executor.gates = gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/elsewhere"], heavy=heavy), gates.hold(["/images"], heavy=not heavy):
        assert bench.run().result == "taken"
    bench.now += HOUR
    with gates.hold(["/images"], heavy=heavy):
        thread, outcomes = in_a_thread(bench)
        thread.join(0.1)
        assert (thread.is_alive(), len(bench.names)) == (True, 1)
    thread.join(30)
    assert [outcome.result for outcome in outcomes] == ["taken"]


def test_a_delete_waits_for_a_place_and_looks_again_then(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    bench.run()
    bench.now += HOUR
    gates = StorageGates(takes=1, heavy=1)
    bench.executor.pruner.gates = gates
    with gates.hold(["/images"], heavy=True):
        thread, outcomes = in_a_thread(bench)
        thread.join(0.1)
        assert (thread.is_alive(), len(bench.names)) == (True, 2)
        domain = bench.fake.domains[bench.uuid]
        held = [replace(s, mark=replace(s.mark, hold=Hold("audit"))) for s in domain.snapshots if s.mark]
        bench.fake.add(replace(domain, snapshots=tuple(held)))
    thread.join(30)
    assert [(outcome.result, outcome.deleted, outcome.blocked) for outcome in outcomes] == [("taken", 0, 1)]
    assert len(bench.names) == 2


def test_deletes_of_internal_snapshots_move_no_data_and_wait_for_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(kind=Kind.INTERNAL, keep="last=1"), state=DomainState.SHUT_OFF)
    bench.run()
    bench.now += HOUR
    with bench.executor.pruner.gates.hold(["/images"], heavy=True):
        assert bench.run().deleted == 1


def test_a_domain_that_became_unfit_while_it_waited_for_its_storage_is_not_taken(tmp_path: Path) -> None:
    """Its next start would go on from the managed save, which writes into the layer that the snapshot freezes."""
    bench = Bench(tmp_path, state=DomainState.SHUT_OFF)
    bench.executor.gates = gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/images"], heavy=False):
        thread, _ = in_a_thread(bench)
        thread.join(0.1)
        bench.fake.add(replace(bench.fake.domains[bench.uuid], managed_save=True))
    thread.join(30)
    assert bench.names == []


# What nobody foresaw


@pytest.mark.parametrize("operation", ["describe_snapshot", "delete_snapshot"])
@pytest.mark.parametrize("error", [KeyError("serial"), OSError("no room")])
def test_an_error_after_the_take_does_not_make_a_failure_of_it(
    tmp_path: Path, operation: str, error: Exception
) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    bench.run_hourly(1)
    bench.events.clear()
    bench.fake.before[operation] = [raising(error)]
    outcome = bench.run()
    assert (outcome.result, outcome.wants_retry) == ("taken", False)
    (finished,) = bench.said(RunFinished)
    assert (finished.result, finished.snapshot) == ("taken", bench.said(SnapshotTaken)[0].snapshot)
    assert bench.said(RunSkipped) == []


def test_a_libvirt_that_is_lost_in_a_delete_does_not_make_a_failure_of_the_take(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    bench.run_hourly(1)
    bench.events.clear()
    gone = HypervisorUnreachableError("connection reset", operation="snapshot_delete")

    def lose_it() -> None:
        bench.fake.before["domain"] = [raising(gone)] * 9
        raise gone

    bench.fake.before["delete_snapshot"] = [lose_it]
    assert bench.run().result == "taken"
    (finished,) = bench.said(RunFinished)
    assert (finished.result, finished.waiting, finished.delete_error) == ("taken", {"failed": 1}, "connection reset")


@pytest.mark.parametrize("operation", ["domain", "storage", "filesystems", "take_snapshot"])
def test_an_error_that_nobody_foresaw_ends_the_run_and_not_the_daemon(tmp_path: Path, operation: str) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    bench.run_hourly(1)
    bench.events.clear()
    bench.fake.before[operation] = [raising(KeyError("serial"))]
    outcome = bench.run()
    assert (outcome.result, outcome.wants_retry) == ("skipped", True)
    (skipped,) = bench.said(RunSkipped)
    assert (skipped.reason, skipped.detail) == ("unforeseen", "KeyError: 'serial'")
    (finished,) = bench.said(RunFinished)
    assert finished.result == "skipped"
    with bench.locks.hold(bench.uuid, wait=timedelta(0)):
        pass
    bench.now += HOUR
    assert bench.run().result == "taken"


def test_an_error_that_nobody_foresaw_is_logged_with_where_it_came_from(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fake.before["take_snapshot"] = [raising(KeyError("serial"))]
    bench.run()
    (record,) = caplog.records
    assert record.getMessage() == f"run of {bench.uuid}/standard"
    assert record.exc_info is not None


def test_a_freeze_that_ended_in_an_unforeseen_error_is_thawed_later(bench: Bench) -> None:
    bench.fake.before["take_snapshot"] = [raising(KeyError("serial"))]
    bench.run()
    assert bench.intents.outstanding() == [bench.uuid]
    assert bench.run().result == "taken"
    assert (calls(bench, "thaw"), bench.intents.outstanding()) == (["thaw"], [])


def test_an_error_in_the_plan_of_a_run_is_no_exception_to_that(bench: Bench) -> None:
    def broken(_pair: Pair) -> Pair | None:
        raise KeyError(0)

    bench.current = broken
    assert bench.run().result == "skipped"
    assert bench.said(RunSkipped)[0].reason == "unforeseen"


# Storage and configuration, while a run waits


def test_a_storage_that_others_work_on_for_too_long_skips_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = bench.executor.gates.hold
    soon = timedelta(seconds=0.05)
    monkeypatch.setattr(bench.executor.gates, "hold", lambda folders, *, heavy: hold(folders, heavy=heavy, wait=soon))
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(hold(["/images"], heavy=False))
        outcome = bench.run()
    assert (outcome.result, outcome.scheduled_at, outcome.wants_retry) == ("skipped", NOON, True)
    assert skips(bench) == [("storage_busy", False, False)]
    assert (bench.names, bench.intents.outstanding()) == ([], [])
    assert bench.run().result == "taken"


def test_a_pair_that_went_while_its_run_waited_is_left_alone(bench: Bench) -> None:
    bench.current = lambda _pair: None
    assert bench.run() == Outcome("nothing_due")
    assert (bench.names, calls(bench, "domain", "storage")) == ([], [])
    assert (bench.said(RunSkipped), len(bench.said(RunFinished))) == ([], 1)


def test_a_run_goes_by_the_policy_that_is_in_force_when_it_has_the_lock(bench: Bench) -> None:
    bench.current = lambda pair: replace(pair, policy=a_policy(consistency=ConsistencyRule.CRASH))
    bench.run()
    assert bench.said(SnapshotTaken)[0].consistency == "crash"


def test_what_is_in_force_is_asked_once_the_domain_is_locked(bench: Bench) -> None:
    thread_ended: list[bool] = []
    with bench.locks.hold(bench.uuid, wait=timedelta(0)):
        thread, outcomes = in_a_thread(bench)
        thread.join(0.1)
        thread_ended.append(not thread.is_alive())
        bench.current = lambda _pair: None
    thread.join(30)
    assert (thread_ended, outcomes, bench.names) == ([False], [Outcome("nothing_due")], [])


def test_a_pair_that_went_while_its_run_waited_for_the_storage_is_not_taken(bench: Bench) -> None:
    bench.executor.gates = gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/images"], heavy=False):
        thread, _ = in_a_thread(bench)
        thread.join(0.1)
        assert thread.is_alive()
        bench.current = lambda _pair: None
    thread.join(30)
    assert bench.names == []


def test_a_run_that_gave_its_place_up_says_that_it_is_stuck(bench: Bench) -> None:
    bench.executor.host_gate = HostGate(places=1, patience=timedelta(seconds=0.05))
    told = threading.Event()
    publish = bench.executor.publish

    def note(event: Event) -> None:
        publish(event)
        if isinstance(event, RunStuck):
            told.set()

    bench.executor.publish = note
    bench.fake.before["take_snapshot"] = [lambda: void(told.wait(30))]
    assert bench.run().result == "taken"
    assert len(bench.said(RunStuck)) == 1
