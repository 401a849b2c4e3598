"""Deletes as they are carried out: what is looked at just before each, and just after."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.errors import HypervisorUnreachableError
from kvmsnapd.events import DeleteFailed, PruneBlocked, SnapshotDeleted
from kvmsnapd.model import DomainState, Kind, Layer, Storage
from kvmsnapd.naming import format_name
from kvmsnapd.prune import check_deleted
from tests.builders import a_chain, a_domain, a_foreign_snapshot, a_policy, hourly_snapshots
from tests.fakes import raising
from tests.unit.test_execute import HOUR, NOON, Bench, void

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MIB = 2**20


def a_bench(directory: Path, **fields: object) -> Bench:
    """Return a running domain with two snapshots, of which the next run releases the first."""
    bench = Bench(directory, a_policy(keep="last=2", **fields))  # type: ignore[arg-type]
    bench.run_hourly(2)
    bench.events.clear()
    bench.fake.calls.clear()
    return bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return a_bench(tmp_path)


def changes(bench: Bench) -> list[str]:
    """Return what was done to others than the newest, into which debts are written."""
    made = {format_name("standard", NOON + hour * HOUR) for hour in range(2)}
    return [c[0] for c in bench.fake.calls if c[0] in {"describe_snapshot", "delete_snapshot"} and c[-1] in made]


def why(bench: Bench) -> dict[str, int]:
    (event,) = bench.said(PruneBlocked)
    return dict(event.blocked)


# Space for the merge


def stored(bench: Bench, *, overlay: int, free: int) -> Storage:
    """Return a storage on which the first snapshot's overlay takes so much."""
    ((_, path),) = bench.fake.domains[bench.uuid].snapshots[0].overlays
    return Storage({"/images": free}, {path: Layer(path, allocated=overlay)})


def test_nothing_is_merged_into_a_folder_without_room_for_what_the_overlay_has(bench: Bench) -> None:
    bench.fake.stored = stored(bench, overlay=9 * MIB, free=9 * MIB - 1)
    assert bench.run().result == "taken"
    (event,) = bench.said(PruneBlocked)
    assert event.blocked == {"space": 1}
    assert event.detail == (
        "merging it may need 9 MiB in /images, and 9 MiB are free; a merge that meets a full disk may lose data"
    )
    assert changes(bench) == []


def test_room_for_just_that_is_enough(bench: Bench) -> None:
    bench.fake.stored = stored(bench, overlay=9 * MIB, free=9 * MIB)
    assert bench.run().deleted == 1


def test_what_waited_for_space_goes_when_there_is_some(bench: Bench) -> None:
    bench.fake.stored = stored(bench, overlay=9 * MIB, free=3 * MIB)
    bench.run_hourly(1)
    bench.fake.stored = stored(bench, overlay=9 * MIB, free=30 * MIB)
    assert bench.run().deleted == 2


def test_overlays_that_are_merged_into_one_folder_need_room_together(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=1"))
    chain = hourly_snapshots(1, last="2026-11-22T11:00")
    targets = ("vda", "vdb")
    overlays = tuple((target, f"/images/{target}.1") for target in targets)
    covers = tuple((target, f"/small/{target}.0") for target in targets)
    disks = tuple(
        replace(bench.fake.domains[bench.uuid].disks[0], target=target, path=path, backing=(f"/small/{target}.0",))
        for target, path in overlays
    )
    bench.change(snapshots=(replace(chain[0], overlays=overlays, covers=covers),), disks=disks)
    layers = {path: Layer(path, allocated=6 * MIB) for _, path in overlays}
    bench.fake.stored = Storage({"/images": 0, "/small": 11 * MIB}, layers)
    bench.run()
    assert bench.said(PruneBlocked)[0].detail.startswith("merging it may need 12 MiB in /small, and 11 MiB are free")


@pytest.mark.parametrize("unknown", ["free", "allocated"])
def test_where_nothing_is_known_of_the_storage_it_is_merged(bench: Bench, unknown: str) -> None:
    known = stored(bench, overlay=9 * MIB, free=0)
    bench.fake.stored = replace(known, free_bytes={}) if unknown == "free" else replace(known, layers={})
    assert bench.run().deleted == 1


def test_an_internal_snapshot_needs_no_room(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, kind=Kind.INTERNAL)
    bench.fake.stored = Storage({"/images": 0})
    assert bench.run().deleted == 1


# Other merges


def test_a_delete_does_not_wait_long_for_another_merge_on_its_storage(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmsnapd.pruner.MERGE_WAIT", timedelta(seconds=0.05))
    with bench.executor.gates.hold(["/images"], heavy=True):
        outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, 1)
    assert (why(bench), changes(bench), bench.said(DeleteFailed)) == ({"busy": 1}, [], [])
    bench.now += HOUR
    assert bench.run().deleted == 2


# A configuration that changed meanwhile


@pytest.mark.parametrize("change", ["another policy", "gone"])
def test_a_configuration_that_changed_after_the_take_stops_all_deletes(bench: Bench, change: str) -> None:
    policy = replace(bench.policy, keep=a_policy(keep="last=9").keep)

    def reload() -> None:
        bench.current = lambda pair: replace(pair, policy=policy) if change == "another policy" else None

    bench.fake.before["take_snapshot"] = [reload]
    outcome = bench.run()
    assert (outcome.result, outcome.deleted, outcome.blocked) == ("taken", 0, 1)
    assert (why(bench), changes(bench)) == ({"changed": 1}, [])


def test_a_stop_between_two_deletes_stops_the_second(tmp_path: Path) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=4"))
    bench.run_hourly(4)
    bench.policy = a_policy(keep="last=2")

    def stop() -> None:
        bench.current = lambda _pair: None

    bench.fake.before["delete_snapshot"] = [stop]
    outcome = bench.run()
    assert (outcome.deleted, outcome.blocked, why(bench)) == (1, 2, {"changed": 2})


# What a delete has left


def reading(bench: Bench, number: int, *steps: Callable[[], object]) -> None:
    """Have something done at the so manieth reading of the domain in a run, and at those that follow.

    1 is the plan's, 2 the fake's own in the take, 3 just before the delete, 4 the fake's own in the delete, 5 and 6
    those after it.
    """
    bench.fake.before["domain"] = [*[lambda: None] * (number - 1), *(lambda step=step: void(step()) for step in steps)]  # type: ignore[misc]


def lose_the_newest(bench: Bench) -> Callable[[], object]:
    return lambda: bench.change(snapshots=bench.fake.domains[bench.uuid].snapshots[:-1])


def test_what_is_right_again_at_the_second_look_was_somebody_at_work(bench: Bench) -> None:
    found: list[object] = []

    def lose() -> None:
        found.append(bench.fake.domains[bench.uuid].snapshots)
        lose_the_newest(bench)()

    reading(bench, 5, lose, lambda: bench.change(snapshots=found[0]))
    assert bench.run().deleted == 1
    assert (len(found), bench.said(DeleteFailed)) == (1, [])
    bench.now += HOUR
    assert bench.run().deleted == 1


def test_a_snapshot_of_ours_that_is_gone_stops_all_deletes_of_its_domain(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, kind=Kind.INTERNAL)
    reading(bench, 5, lose_the_newest(bench))
    assert bench.run().deleted == 0
    assert "is gone as well" in bench.said(DeleteFailed)[0].error
    bench.events.clear()
    bench.fake.calls.clear()
    bench.fake.before.clear()
    for _ in range(3):
        bench.now += HOUR
        outcome = bench.run()
        assert (outcome.result, outcome.deleted) == ("taken", 0)
    assert {reason for event in bench.said(PruneBlocked) for reason in event.blocked} == {"changed"}
    assert changes(bench) == []
    bench.restart()
    bench.now += HOUR
    assert bench.run().deleted > 0


def test_the_snapshots_of_another_policy_of_that_domain_are_not_deleted_either(tmp_path: Path) -> None:
    bench = a_bench(tmp_path, kind=Kind.INTERNAL)
    other = a_policy("other", keep="last=1", kind=Kind.INTERNAL)
    bench.run(other)
    reading(bench, 5, lose_the_newest(bench))
    bench.run()
    bench.now += HOUR
    bench.events.clear()
    outcome = bench.run(other)
    assert (outcome.deleted, outcome.blocked, why(bench)) == (0, 1, {"changed": 1})


def test_a_look_that_fails_is_no_distrust(bench: Bench) -> None:
    lost = HypervisorUnreachableError("connection lost", operation="read_domain")
    reading(bench, 5, raising(lost))
    assert bench.run().deleted == 0
    assert bench.said(DeleteFailed)[0].reason == "connection"
    bench.now += HOUR
    assert bench.run().deleted == 1


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (Kind.INTERNAL, DomainState.RUNNING),
        (Kind.EXTERNAL, DomainState.SHUT_OFF),
        (Kind.EXTERNAL, DomainState.RUNNING),
    ],
)
def test_a_person_who_deletes_a_snapshot_of_theirs_meanwhile_rouses_no_distrust(
    tmp_path: Path, kind: Kind, state: DomainState
) -> None:
    bench = Bench(tmp_path, a_policy(keep="last=2", kind=kind), state=state)
    bench.fake.make_foreign(bench.uuid, "by-hand", kind)
    bench.run_hourly(2)
    bench.fake.before["delete_snapshot"] = [lambda: bench.fake.delete_snapshot(bench.uuid, "by-hand")]
    assert bench.run().deleted == 1
    assert "by-hand" not in bench.names
    assert (len(bench.said(SnapshotDeleted)), bench.said(DeleteFailed)) == (1, [])
    bench.now += HOUR
    assert bench.run().deleted == 1


def test_the_children_of_what_a_person_deleted_have_another_parent_rightly() -> None:
    older, *newer = hourly_snapshots(3)
    first, foreign, second, third = a_chain(older, a_foreign_snapshot(), *newer)
    before = a_domain(first, foreign, second, third)
    after = a_domain(replace(second, parent=None), third)
    assert check_deleted(before, after, first.name) is None
