"""The fuse over many runs: what earlier runs owe does not blow it, what is released anew does."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.errors import HypervisorError, MergeFailedError
from kvmsnapd.events import PruneBlocked
from kvmsnapd.model import DomainState, Storage
from kvmsnapd.plan import plan_run
from kvmsnapd.prune import Blocked, BlockReason, owes
from tests.builders import ANY_LIBVIRT, NOW, a_domain, a_foreign_snapshot, a_policy, hourly_snapshots
from tests.fakes import raising
from tests.unit.test_execute import HOUR, Bench

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOURS = 15


def a_bench(directory: Path, keep: str = "last=2", *, most: int = 3) -> Bench:
    """Return a running domain whose policy deletes at most three at once."""
    bench = Bench(directory, a_policy(keep=keep, max_deletes_per_run=most, max_chain_depth=90), run_id=7)
    bench.fake.limits = replace(bench.fake.limits, delete_external_in_chain_offline=False)
    return bench


def waits(bench: Bench) -> list[dict[str, int]]:
    return [event.blocked for event in bench.said(PruneBlocked)]


# What keeps deletes waiting, for hours


@contextmanager
def needs_running(bench: Bench) -> Iterator[None]:
    bench.change(state=DomainState.SHUT_OFF, run_id=None)
    yield
    bench.change(state=DomainState.RUNNING, run_id=8)


@contextmanager
def branch(bench: Bench) -> Iterator[None]:
    bench.run_hourly(1)
    foreign = a_foreign_snapshot()
    bench.change(snapshots=(foreign, *bench.fake.domains[bench.uuid].snapshots))
    yield
    bench.change(snapshots=tuple(s for s in bench.fake.domains[bench.uuid].snapshots if s.name != foreign.name))


@contextmanager
def foreign_child(bench: Bench) -> Iterator[None]:
    """Have a person take one after each of ours, and delete all in the end."""
    names = iter(range(99))
    take = bench.fake.finish_take
    with pytest.MonkeyPatch.context() as patch:

        def take_two(request: object) -> object:
            snapshot = take(request)  # type: ignore[arg-type]
            bench.fake.make_foreign(bench.uuid, f"by-hand-{next(names)}")
            return snapshot

        patch.setattr(bench.fake, "finish_take", take_two)
        yield
    for name in bench.names:
        if name.startswith("by-hand"):
            bench.fake.delete_snapshot(bench.uuid, name)


@contextmanager
def failed(bench: Bench) -> Iterator[None]:
    refused = raising(HypervisorError("refused", operation="snapshot_delete"))
    bench.fake.before["delete_snapshot"] = [refused] * 99
    yield
    bench.fake.before["delete_snapshot"] = []


@contextmanager
def busy(bench: Bench) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr("kvmsnapd.pruner.MERGE_WAIT", timedelta(0))
        stack.enter_context(bench.executor.gates.hold(["/images"], heavy=True))
        yield


@contextmanager
def space(bench: Bench) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.fake, "allocated", lambda overlays: {target: 100 for target, _ in overlays})
        bench.fake.stored = Storage({"/images": 99})
        yield
        bench.fake.stored = Storage({"/images": 100})


@contextmanager
def merge_failed(bench: Bench) -> Iterator[None]:
    error = MergeFailedError("block commit failed", operation="snapshot_delete")
    bench.fake.before["delete_snapshot"] = [raising(error)]
    yield
    bench.change(run_id=8)


WAITING = [needs_running, branch, foreign_child, failed, busy, space, merge_failed]


@pytest.mark.parametrize("obstacle", WAITING, ids=[w.__name__ for w in WAITING])
def test_debts_of_earlier_runs_do_not_blow_it_however_many(tmp_path: Path, obstacle: object) -> None:
    bench = a_bench(tmp_path)
    with obstacle(bench):  # type: ignore[operator]
        bench.run_hourly(HOURS)
    ours = len([snapshot for snapshot in bench.fake.domains[bench.uuid].snapshots if snapshot.mark])
    assert ours >= HOURS
    assert {reason for blocked in waits(bench) for reason in blocked} <= {obstacle.__name__, "failed"}  # type: ignore[attr-defined]
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", ours - 1, 0)
    assert len(bench.names) == 2


def test_a_new_process_knows_the_debts(tmp_path: Path) -> None:
    bench = a_bench(tmp_path)
    with needs_running(bench):
        bench.run_hourly(HOURS)
    bench.restart()
    assert bench.run().deleted == HOURS - 1


def test_debts_are_known_too_where_the_last_slot_needed_no_snapshot(tmp_path: Path) -> None:
    bench = a_bench(tmp_path)
    bench.fake.written = {}
    with needs_running(bench):
        for _ in range(HOURS):
            bench.fake.write_to(bench.uuid)
            bench.run_hourly(1)
        assert bench.run().result == "unchanged"
        bench.now += HOUR
    outcome = bench.run()
    assert (outcome.result, outcome.blocked) == ("taken", 0)
    assert len(bench.names) == 2


def test_a_shortened_retention_blows_it_and_goes_on_doing_so(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, "last=20")
    bench.run_hourly(HOURS)
    bench.policy = replace(bench.policy, keep=a_policy(keep="last=3").keep)
    for hour in range(5):
        outcome = bench.run()
        assert (outcome.result, outcome.deleted) == ("taken", 0)
        assert waits(bench) == [{"fuse": HOURS - 2 + hour}]
        bench.now += HOUR
    bench.restart()
    assert bench.run().deleted == 0
    bench.policy = replace(bench.policy, max_deletes_per_run=99)
    bench.now += HOUR
    assert bench.run().blocked == 0
    assert len(bench.names) == 3


def test_a_shortened_retention_blows_it_beside_debts_as_well(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, "last=10")
    with needs_running(bench):
        bench.run_hourly(HOURS)
    bench.events.clear()
    bench.policy = replace(bench.policy, keep=a_policy(keep="last=2").keep)
    for _ in range(3):
        outcome = bench.run()
        assert (outcome.deleted, set(waits(bench)[0])) == (0, {"fuse"})
        bench.now += HOUR


def owed(bench: Bench) -> int:
    mark = bench.fake.domains[bench.uuid].snapshots[-1].mark
    assert mark is not None
    return mark.owed


@pytest.mark.parametrize(("most", "reason"), [(3, "fuse"), (99, "long_pause")])
def test_what_a_clock_that_jumped_released_is_no_debt(tmp_path: Path, most: int, reason: str) -> None:
    bench = a_bench(tmp_path, "within=20h", most=most)
    bench.run_hourly(HOURS)
    bench.now += timedelta(days=3650)
    assert bench.run().deleted == 0
    assert (waits(bench), owed(bench)) == ([{reason: HOURS}], 0)


def test_what_a_clock_that_jumped_released_is_beyond_the_fuse_at_the_next_runs_too(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, "within=20h")
    bench.run_hourly(HOURS)
    bench.now += timedelta(days=3650)
    for _ in range(4):
        assert (bench.run().deleted, waits(bench)) == (0, [{"fuse": HOURS}])
        bench.now += HOUR


@pytest.mark.parametrize("lost", ["long pause", "fuse"])
def test_debts_are_not_forgotten_in_a_run_that_deletes_nothing(tmp_path: Path, lost: str) -> None:
    bench = a_bench(tmp_path, "last=6")
    with needs_running(bench):
        bench.run_hourly(HOURS)
    policy = bench.policy
    if lost == "long pause":
        bench.now += 9 * HOUR
    else:
        bench.policy = replace(policy, keep=a_policy(keep="last=2").keep)
    bench.events.clear()
    assert bench.run().deleted == 0
    assert set(waits(bench)[0]) == {lost.replace(" ", "_")}
    bench.now += HOUR
    bench.policy = policy
    assert bench.run().blocked == 0
    assert len(bench.names) == 6


def test_what_was_deleted_is_no_debt_any_more(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, "last=20")
    bench.run_hourly(HOURS)
    bench.policy = replace(bench.policy, keep=a_policy(keep=f"last={HOURS - 2}").keep)
    assert bench.run().deleted == 3
    bench.now += HOUR
    bench.policy = replace(bench.policy, keep=a_policy(keep=f"last={HOURS - 7}").keep)
    assert bench.run().deleted == 0
    assert waits(bench) == [{"fuse": 6}]


def test_what_a_surprise_released_is_owed_as_far_as_it_was_before() -> None:
    blocked = [Blocked(str(reason), reason, "") for reason in BlockReason]
    ordinary = len(BlockReason) - 2
    assert [owes(blocked, before) for before in (0, 1, 2, 99)] == [ordinary, *(ordinary + n for n in (1, 2, 2))]
    assert owes([], 99) == 0


def test_the_limit_and_the_debts_are_told() -> None:
    *older, newest = hourly_snapshots(9)
    assert newest.mark is not None
    newest = replace(newest, mark=replace(newest.mark, owed=2))
    policy = a_policy(keep="last=2", max_deletes_per_run=5)
    found = plan_run(a_domain(*older, newest), policy, ANY_LIBVIRT, now=NOW)
    assert found.deletes == ()
    assert found.blocked[0].detail.startswith(
        "8 deletes at once are more than max_deletes_per_run: 5 and the 2 owed; look at `kvmsnapd plan web1`"
    )


def test_the_newest_snapshot_alone_says_what_is_owed() -> None:
    oldest, *others = hourly_snapshots(9)
    assert oldest.mark is not None
    oldest = replace(oldest, mark=replace(oldest.mark, owed=99))
    found = plan_run(a_domain(oldest, *others), a_policy(keep="last=2", max_deletes_per_run=5), ANY_LIBVIRT, now=NOW)
    assert {wait.reason for wait in found.blocked} == {BlockReason.FUSE}


def test_debts_that_cannot_be_written_down_do_not_spoil_a_run_that_took_its_snapshot(tmp_path: Path) -> None:
    bench = a_bench(tmp_path)
    bench.run_hourly(3)
    full = raising(HypervisorError("No space left on device", operation="snapshot_redefine"))
    bench.fake.before["describe_snapshot"] = [full] * 9
    outcome = bench.run()
    assert (outcome.result, outcome.blocked) == ("taken", 1)
