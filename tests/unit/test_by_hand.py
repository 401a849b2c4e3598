"""What a person takes, prunes and forgets, against the fake: planned anew under the lock, and never more than shown."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.by_hand import ByHand
from kvmsnapd.errors import DomainBusyError
from kvmsnapd.events import DeleteFailed, PruneBlocked, RunSkipped, SnapshotDeleted, SnapshotTaken
from kvmsnapd.execute import Outcome
from kvmsnapd.fleet import survey
from kvmsnapd.model import DomainState, Hold
from kvmsnapd.naming import format_name
from kvmsnapd.plan import in_tree_order, plan_forget, plan_prune
from kvmsnapd.prune import BlockReason
from tests.builders import ANY_LIBVIRT, NOW, a_domain, a_policy, hourly_snapshots
from tests.fakes import raising
from tests.unit.test_execute import HOUR, NOON, Bench

if TYPE_CHECKING:
    from pathlib import Path

    from kvmsnapd.fleet import Pair


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, a_policy(keep="last=2"))


def the_pair(bench: Bench) -> Pair:
    fleet = survey([bench.policy.name], {"*": (bench.policy,)}, bench.fake.inventory(), now=bench.now)
    (pair,) = fleet.pairs
    return pair


# Takes


def test_a_persons_take_has_the_present_second_for_its_slot_and_deletes_nothing(bench: Bench) -> None:
    bench.run_hourly(2)
    bench.now += HOUR / 60
    outcome = bench.executor.take(the_pair(bench))
    assert outcome == Outcome("taken", bench.now, format_name("standard", bench.now))
    assert len(bench.names) == 3
    assert bench.said(SnapshotDeleted) == []
    assert bench.said(PruneBlocked) == []


def test_the_run_after_it_deletes_what_it_released_without_blowing_the_fuse(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2", max_deletes_per_run=1))
    bench.run_hourly(2)
    for _ in range(4):
        bench.now += HOUR / 60
        bench.executor.take(the_pair(bench))
    bench.now += HOUR
    assert bench.run().deleted == 5


def test_a_hold_is_written_at_the_take_and_takes_nobodys_place(bench: Bench) -> None:
    bench.run_hourly(2)
    bench.executor.take(the_pair(bench), hold=Hold("upgrade"))
    held = bench.fake.domains[bench.uuid].snapshots[-1]
    assert held.mark is not None
    assert (held.mark.hold, held.mark.owed) == (Hold("upgrade"), 0)


def test_an_unchanged_domain_gets_no_second_snapshot_but_the_hold(tmp_path: Path) -> None:
    bench = Bench(tmp_path, state=DomainState.SHUT_OFF)
    bench.fake.written = {}
    bench.run()
    (name,) = bench.names
    bench.now += HOUR / 60
    outcome = bench.executor.take(the_pair(bench), hold=Hold("upgrade"))
    assert (outcome.result, outcome.snapshot) == ("unchanged", name)
    mark = bench.fake.domains[bench.uuid].snapshots[0].mark
    assert mark is not None
    assert mark.hold == Hold("upgrade")
    bench.now += HOUR / 60
    bench.executor.take(the_pair(bench))  # without a hold of its own it leaves that one
    mark = bench.fake.domains[bench.uuid].snapshots[0].mark
    assert mark is not None
    assert mark.hold == Hold("upgrade")


def test_a_full_chain_is_made_room_in_by_what_the_take_releases(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=3", max_chain_depth=4))
    bench.change(snapshots=hourly_snapshots(4, last="2026-11-22T11:00"))
    oldest = bench.names[0]
    outcome = bench.executor.take(the_pair(bench))
    assert (outcome.result, outcome.deleted) == ("taken", 1)
    assert oldest not in bench.names
    assert len(bench.names) == 4


def test_a_full_chain_of_held_ones_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2", max_chain_depth=3))
    bench.change(snapshots=hourly_snapshots(3, last="2026-11-22T11:00", hold=Hold("audit")))
    assert bench.executor.take(the_pair(bench)).result == "skipped"
    (skipped,) = bench.said(RunSkipped)
    assert skipped.reason == "chain_full"
    assert bench.said(SnapshotTaken) == []


# Prunes


def test_a_prune_knows_neither_fuse_nor_pause_and_keeps_the_newest() -> None:
    domain = a_domain(*hourly_snapshots(9))
    deletes, blocked = plan_prune(domain, a_policy(keep="last=2", max_deletes_per_run=1), ANY_LIBVIRT, now=NOW)
    assert [step.snapshot for step in deletes] == [s.name for s in domain.snapshots[:7]]
    assert blocked == ()


def test_only_what_was_shown_is_deleted(bench: Bench) -> None:
    bench.change(snapshots=hourly_snapshots(6))
    shown = bench.names[1:3]
    done = ByHand(bench.executor).prune(the_pair(bench), shown)
    assert (done.deleted, done.left) == (2, ())
    assert len(bench.names) == 4
    assert not set(shown) & set(bench.names)


def test_what_is_held_meanwhile_stays_and_is_told(bench: Bench) -> None:
    bench.change(snapshots=hourly_snapshots(4))
    shown = bench.names[:2]
    first, *others = bench.fake.domains[bench.uuid].snapshots
    assert first.mark is not None
    bench.change(snapshots=(replace(first, mark=replace(first.mark, hold=Hold("audit"))), *others))
    done = ByHand(bench.executor).prune(the_pair(bench), shown)
    assert done.deleted == 1
    assert [(wait.snapshot, wait.reason) for wait in done.left] == [(shown[0], BlockReason.CHANGED)]


def test_a_delete_that_fails_is_told_and_ends_it(bench: Bench) -> None:
    bench.change(snapshots=hourly_snapshots(5))
    shown = bench.names[:3]
    busy = DomainBusyError("a backup runs", operation="snapshot_delete")
    bench.fake.before["delete_snapshot"].append(raising(busy))
    done = ByHand(bench.executor).prune(the_pair(bench), shown)
    assert (done.deleted, len(done.left)) == (0, 3)
    assert [event.reason for event in bench.said(DeleteFailed)] == ["busy"]
    assert ByHand(bench.executor).prune(the_pair(bench), shown).deleted == 3


def test_nothing_more_is_begun_once_that_is_wanted(bench: Bench) -> None:
    bench.change(snapshots=hourly_snapshots(5))
    bench.fake.before["delete_snapshot"].append(lambda: setattr(bench, "current", lambda _pair: None))
    done = ByHand(bench.executor).prune(the_pair(bench), bench.names[:3])
    assert (done.deleted, len(done.left)) == (1, 2)


# Forgetting


@pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.SHUT_OFF])
def test_all_goes_held_ones_and_the_newest_too(bench: Bench, state: DomainState) -> None:
    bench.fake.limits = replace(bench.fake.limits, delete_external_in_chain_offline=False)
    bench.run_hourly(2)
    bench.executor.take(the_pair(bench), hold=Hold("audit"))
    (disk,) = {d.path for d in a_domain().disks}
    bench.change(state=state)
    names = list(bench.names)
    done = ByHand(bench.executor).forget(the_pair(bench).name, names)
    assert (done.deleted, done.left, bench.names) == (3, (), [])
    assert [d.path for d in bench.fake.domains[bench.uuid].disks] == [disk]
    order = [event.snapshot for event in bench.said(SnapshotDeleted)]
    assert order == (names if state is DomainState.RUNNING else names[::-1])


def test_what_stands_below_a_foreign_one_stays(bench: Bench) -> None:
    bench.run()
    bench.fake.make_foreign(bench.uuid, "mine")
    bench.now += HOUR
    bench.run()
    below, _, above = bench.names
    deletes, blocked = plan_forget(bench.fake.domains[bench.uuid], ANY_LIBVIRT)
    assert [step.snapshot for step in deletes] == [above]
    assert [(wait.snapshot, wait.reason) for wait in blocked] == [(below, BlockReason.FOREIGN_CHILD)]


def test_called_again_it_goes_on_with_what_is_left_half_deleted(bench: Bench) -> None:
    bench.run_hourly(3)
    names = list(bench.names)
    broken = RuntimeError("killed")
    bench.fake.before["delete_snapshot"].append(raising(broken))
    with pytest.raises(RuntimeError):
        ByHand(bench.executor).forget(the_pair(bench).name, names)
    left = list(bench.names)
    assert ByHand(bench.executor).forget(the_pair(bench).name, left).deleted == len(left)
    assert bench.names == []


def test_the_tree_is_walked_from_its_root() -> None:
    snapshots = hourly_snapshots(4)
    assert in_tree_order(a_domain(*reversed(snapshots))) == list(snapshots)


def test_a_take_by_hand_in_the_middle_of_an_hour_leaves_the_next_slot_due(bench: Bench) -> None:
    bench.now = NOON + HOUR / 2
    bench.executor.take(the_pair(bench))
    assert bench.run().result == "nothing_due"
    bench.now = NOON + HOUR
    assert bench.run().result == "taken"
