"""Going back in place: what is in the way, what is lost and kept, and where a call that was cut off goes on."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.diagnosis import diagnose_domain, diagnose_files
from kvmsnapd.errors import RestoreRefusedError, StorageFullError
from kvmsnapd.model import DomainState, Hold, Kind, Layer, Restoring, Storage
from kvmsnapd.plan import judge
from kvmsnapd.preflight import chain_depth, plan_take
from kvmsnapd.prune import find_branch, find_obstacle
from kvmsnapd.refusal import Refusal, RefusalReason
from kvmsnapd.restore import RestorePlan, plan_restore
from kvmsnapd.restorer import Restorer
from tests.builders import (
    ANY_LIBVIRT,
    NOW,
    UUID,
    a_disk,
    a_domain,
    a_foreign_snapshot,
    a_policy,
    a_snapshot,
    half_deleted,
    hourly_snapshots,
)
from tests.fakes import FakeHypervisor, raising

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsnapd.model import Domain, Snapshot

FOLDER = "/images"


def taken_on(*snapshots: Snapshot) -> Domain:
    """Return a domain whose external snapshots have the files that taking them one after the other makes."""
    active = f"{FOLDER}/web1-vda.qcow2"
    line: list[Snapshot] = []
    for snapshot in snapshots:
        overlay = f"{FOLDER}/web1.vda.{snapshot.name}.qcow2"
        line.append(replace(snapshot, covers=(("vda", active),), overlays=(("vda", overlay),)))
        active = overlay
    return a_domain(*line, disks=(a_disk(path=active),), state=DomainState.SHUT_OFF)


def with_mark(snapshot: Snapshot, **fields: object) -> Snapshot:
    assert snapshot.mark
    return replace(snapshot, mark=replace(snapshot.mark, **fields))  # type: ignore[arg-type]


def planned(domain: Domain, number: int, **named: object) -> RestorePlan:
    plan = plan_restore(domain, domain.snapshots[number], now=NOW, **named)  # type: ignore[arg-type]
    assert isinstance(plan, RestorePlan), plan
    return plan


def test_what_is_newer_is_lost_leaf_first_and_the_present_state_is_kept_beside() -> None:
    domain = taken_on(*hourly_snapshots(4))
    oldest, target, newer, newest = domain.snapshots
    plan = planned(domain, 1)
    assert plan.lost == (newest, newer)
    assert plan.keep
    assert plan.keep.mark.standalone
    assert plan.keep.mark.hold == Hold(f"the state before the restore to {target.name}")
    new, copy = plan.overlays[0][1], plan.keep.overlays[0][1]
    assert len({new, copy, *(path for s in domain.snapshots for _, path in (*s.overlays, *s.covers))}) == 7
    assert set(plan.leaves) == {path for s in (target, newer, newest) for _, path in s.overlays}
    assert not {path for s in (oldest, target) for _, path in s.covers} & set(plan.leaves)
    assert planned(domain, 1, discard=True).keep is None


def test_disks_that_are_not_part_of_it_stay_and_are_named() -> None:
    domain = taken_on(*hourly_snapshots(1))
    domain = replace(domain, disks=(*domain.disks, a_disk("vdb"), a_disk("sda", device="cdrom")))
    assert planned(domain, 0).others == ("vdb",)


def a_branched(domain: Domain) -> Domain:
    kept = with_mark(a_snapshot("2026-11-22T11:30"), standalone=True)
    files = {"covers": (("vda", f"{FOLDER}/kept.qcow2"),), "overlays": (("vda", f"{FOLDER}/kept.qcow2.next"),)}
    return replace(domain, snapshots=(*domain.snapshots, replace(kept, parent=None, **files)))  # type: ignore[arg-type]


def test_a_state_that_was_kept_is_beside_the_chain_for_all_that_looks_at_it() -> None:
    domain = a_branched(taken_on(*hourly_snapshots(3)))
    kept = domain.snapshots[-1]
    assert find_branch(domain) is None
    assert chain_depth(domain) == 3
    assert find_obstacle(domain, kept.name, ANY_LIBVIRT) is None
    assert kept not in planned(domain, 0).lost
    assert kept.name in {verdict.point.name for verdict in judge(domain, a_policy(), now=NOW)}


def test_going_back_to_a_kept_state_ends_the_chain_and_leaves_its_first_image() -> None:
    domain = a_branched(taken_on(*hourly_snapshots(2)))
    plan = planned(domain, 2)
    assert [s.name for s in plan.lost] == [domain.snapshots[1].name, domain.snapshots[0].name]
    assert plan.unused == (f"{FOLDER}/web1-vda.qcow2",)
    assert f"{FOLDER}/kept.qcow2" not in plan.leaves
    assert f"{FOLDER}/web1-vda.qcow2" not in plan.leaves


REFUSED: dict[str, tuple[Callable[[Domain], Domain], str]] = {
    "transient": (lambda d: replace(d, persistent=False), "transient"),
    "managed save": (lambda d: replace(d, managed_save=True), "virsh managedsave-remove web1"),
    "crashed": (lambda d: replace(d, state=DomainState.UNSETTLED, state_detail="crashed"), "is crashed; `kvmsnapd"),
    "block job": (lambda d: replace(d, disks=(replace(d.disks[0], block_job=True),)), "virsh blockjob web1 vda"),
    "disk gone": (lambda d: replace(d, disks=(a_disk("vdx"),)), "no longer has vda"),
    "mixed": (
        lambda d: replace(d, snapshots=(*d.snapshots, a_foreign_snapshot(kind=Kind.INTERNAL))),
        "snapshots of both kinds",
    ),
    "foreign newer": (
        lambda d: replace(d, snapshots=(*d.snapshots, a_foreign_snapshot(parent=d.snapshots[-1].name))),
        "virsh snapshot-delete",
    ),
    "held newer": (
        lambda d: replace(d, snapshots=(*d.snapshots[:-1], with_mark(d.snapshots[-1], hold=Hold("audit")))),
        "is held (audit): `kvmsnapd release web1",
    ),
    "linked newer": (
        lambda d: replace(d, snapshots=(*d.snapshots[:-1], with_mark(d.snapshots[-1], linked=("x",)))),
        "a linked copy stands on it",
    ),
    "other restore": (
        lambda d: replace(d, snapshots=(*d.snapshots[:-1], with_mark(d.snapshots[-1], restoring=Restoring(NOW)))),
        "finish it first, by `kvmsnapd restore web1",
    ),
    "half deleted": (
        lambda d: replace(d, snapshots=(half_deleted(d.snapshots[0]), *d.snapshots[1:])),
        "no way back any more",
    ),
    "foreign": (lambda d: replace(d, snapshots=(a_foreign_snapshot(), *d.snapshots[1:])), "--as NAME` makes a second"),
}


@pytest.mark.parametrize("change", list(REFUSED))
def test_what_is_in_the_way_is_told_with_what_to_do(change: str) -> None:
    alter, words = REFUSED[change]
    domain = alter(taken_on(*hourly_snapshots(3)))
    answer = plan_restore(domain, domain.snapshots[0], now=NOW)
    assert isinstance(answer, str)
    assert words in answer


# The steps, on the fake


@pytest.fixture
def fake() -> FakeHypervisor:
    hypervisor = FakeHypervisor(clock=lambda: NOW)
    hypervisor.add(taken_on(*hourly_snapshots(3)))
    return hypervisor


def restorer(fake: FakeHypervisor, **fields: object) -> Restorer:
    return Restorer(fake, lambda: NOW, lambda _text: None, sleep=lambda _seconds: None, **fields)  # type: ignore[arg-type]


def set_state(fake: FakeHypervisor, state: DomainState) -> None:
    fake.domains[UUID] = replace(fake.domains[UUID], state=state)


def oldest(fake: FakeHypervisor) -> str:
    return min(fake.snapshot_names(UUID))


@pytest.mark.parametrize(("state", "runs"), [(DomainState.RUNNING, True), (DomainState.SHUT_OFF, False)])
def test_the_guest_runs_afterwards_if_it_ran_before(fake: FakeHypervisor, state: DomainState, runs: bool) -> None:
    set_state(fake, state)
    restorer(fake).restore(UUID, oldest(fake))
    assert (fake.domain(UUID).state is DomainState.RUNNING) == runs


@pytest.mark.parametrize("start", [True, False])
def test_or_as_it_was_asked(fake: FakeHypervisor, start: bool) -> None:
    restorer(fake).restore(UUID, oldest(fake), start=start)
    assert (fake.domain(UUID).state is DomainState.RUNNING) == start


def test_a_guest_that_does_not_shut_down_goes_on_and_no_note_is_left(fake: FakeHypervisor) -> None:
    set_state(fake, DomainState.RUNNING)
    fake.deaf.add(UUID)
    before = fake.domains[UUID]
    with pytest.raises(RestoreRefusedError, match="did not shut down within 180 s, and goes on as it was"):
        restorer(fake).restore(UUID, oldest(fake))
    assert fake.domains[UUID] == before
    restorer(fake).restore(UUID, oldest(fake), power_off=True)
    assert fake.domain(UUID).state is DomainState.RUNNING
    assert len(fake.snapshot_names(UUID)) == 2


def test_a_paused_guest_is_not_powered_off_unless_that_is_asked(fake: FakeHypervisor) -> None:
    set_state(fake, DomainState.PAUSED)
    with pytest.raises(RestoreRefusedError, match="is paused"):
        restorer(fake).restore(UUID, oldest(fake))
    assert fake.domain(UUID).state is DomainState.PAUSED


def test_one_that_was_taken_since_a_person_agreed_is_not_lost(fake: FakeHypervisor) -> None:
    names = sorted(fake.snapshot_names(UUID))
    with pytest.raises(RestoreRefusedError, match=f"{names[2]} was taken meanwhile"):
        restorer(fake).restore(UUID, names[0], agreed=[names[1]])
    assert sorted(fake.snapshot_names(UUID)) == names


def test_without_room_for_the_copy_nothing_is_changed_and_the_guest_runs_on(fake: FakeHypervisor) -> None:
    set_state(fake, DomainState.RUNNING)
    active = fake.domains[UUID].disks[0].path or ""
    fake.stored = Storage({FOLDER: 10 * 2**20}, {active: Layer(active, allocated=11 * 2**20)})
    with pytest.raises(StorageFullError, match="takes up to 11 MiB in /images, which has 10 MiB free"):
        restorer(fake).restore(UUID, oldest(fake))
    assert fake.domain(UUID).state is DomainState.RUNNING
    assert not fake.copies
    restorer(fake).restore(UUID, oldest(fake), discard=True)
    assert not fake.copies


def test_a_state_that_cannot_be_kept_ends_the_restore_and_nothing_is_left(fake: FakeHypervisor) -> None:
    set_state(fake, DomainState.RUNNING)
    before = fake.domains[UUID].snapshots
    fake.before["record_standalone"].append(raising(StorageFullError("No space left", operation="x")))
    with pytest.raises(RestoreRefusedError, match=r"No space left\. web1 has not gone back, and is shut off now"):
        restorer(fake).restore(UUID, oldest(fake))
    assert fake.domains[UUID].snapshots == before
    assert not fake.copies


def test_the_present_state_is_copied_as_what_the_domain_says_that_its_disk_is(fake: FakeHypervisor) -> None:
    domain = fake.domains[UUID]
    fake.domains[UUID] = replace(domain, disks=(replace(domain.disks[0], format="raw"),))
    restorer(fake).restore(UUID, oldest(fake))
    ((_, source, _, *source_format),) = (call for call in fake.calls if call[0] == "copy_file")
    assert (source, source_format) == (domain.disks[0].path, ["raw"])


class _CutError(Exception):
    pass


def cut_before(fake: FakeHypervisor, operation: str) -> None:
    def cut() -> None:
        raise _CutError

    fake.before[operation].append(cut)
    with pytest.raises(_CutError):
        restorer(fake).restore(UUID, oldest(fake))


@pytest.mark.parametrize("operation", ["copy_file", "record_standalone", "go_on_from", "forget_snapshot"])
def test_until_it_is_finished_nothing_is_taken_or_pruned_and_doctor_names_the_command(
    fake: FakeHypervisor, operation: str
) -> None:
    target = oldest(fake)
    fake.written = {fake.domains[UUID].disks[0].path or "": NOW - timedelta(hours=1)}
    cut_before(fake, operation)
    domain = fake.domain(UUID)
    answer = plan_take(domain, a_policy(), ANY_LIBVIRT, slot=NOW, now=NOW)
    assert isinstance(answer, Refusal)
    assert answer.reason is RefusalReason.RESTORING
    assert all(find_obstacle(domain, name, ANY_LIBVIRT) for name in fake.snapshot_names(UUID))
    commands = [f.command for f in diagnose_domain(domain, [a_policy()], [], ANY_LIBVIRT)]
    assert f"kvmsnapd restore web1 {target}" in commands
    known = {FOLDER: tuple(Layer(path, allocated=10**9) for path in fake.copies)}
    assert [f for f in diagnose_files([domain], known) if f.subject in fake.copies] == []
    restorer(fake).restore(UUID, target)
    assert [s.mark.restoring for s in fake.domain(UUID).snapshots if s.mark] == [None, None]


def test_a_copy_of_a_guest_that_ran_again_is_not_the_present_state(fake: FakeHypervisor) -> None:
    target = oldest(fake)
    fake.written = {}
    active = fake.domains[UUID].disks[0].path or ""
    fake.written[active] = NOW - timedelta(hours=1)
    cut_before(fake, "go_on_from")
    (kept,) = [s.name for s in fake.domain(UUID).snapshots if s.mark and s.mark.standalone]
    later = Restorer(fake, lambda: NOW + timedelta(minutes=5), lambda _text: None)
    assert later.plan(UUID, target, discard=False)[1].kept == kept
    fake.written[active] = NOW + timedelta(minutes=2)
    again = later.restore(UUID, target)
    assert again not in {None, kept}
    assert {kept, again} <= set(fake.snapshot_names(UUID))


def test_a_snapshot_of_the_very_second_is_not_taken_for_the_kept_state(fake: FakeHypervisor) -> None:
    newest = a_snapshot(NOW, parent=max(fake.snapshot_names(UUID)))
    domain = fake.domains[UUID]
    fake.add(replace(domain, snapshots=taken_on(*domain.snapshots, newest).snapshots))
    kept = restorer(fake).restore(UUID, max(fake.snapshot_names(UUID)))
    assert kept not in {None, newest.name}
    assert newest.name in fake.snapshot_names(UUID)
    assert [s.name for s in fake.domain(UUID).snapshots if s.mark and s.mark.standalone] == [kept]


def test_one_that_was_cut_off_early_can_be_taken_back(fake: FakeHypervisor) -> None:
    before = fake.domain(UUID)
    cut_before(fake, "record_standalone")
    assert fake.copies
    restorer(fake).abandon(UUID, oldest(fake))
    assert fake.domain(UUID) == before
    assert not fake.copies
    with pytest.raises(RestoreRefusedError, match="is not on the way back"):
        restorer(fake).abandon(UUID, oldest(fake))


def test_one_that_went_back_already_can_only_be_finished(fake: FakeHypervisor) -> None:
    cut_before(fake, "forget_snapshot")
    with pytest.raises(RestoreRefusedError, match="has gone back to it"):
        restorer(fake).abandon(UUID, oldest(fake))


def test_a_person_can_stop_it_before_the_domain_has_gone_back(fake: FakeHypervisor) -> None:
    answers = iter([True, False])
    with pytest.raises(RestoreRefusedError, match="has taken it back"):
        restorer(fake, wanted=lambda: next(answers)).restore(UUID, oldest(fake))
    assert fake.domain(UUID).disks[0].path == fake.domains[UUID].snapshots[-1].overlays[0][1]
    restorer(fake).restore(UUID, oldest(fake))
