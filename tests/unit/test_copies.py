"""Copies: what one consists of, what is in the way, and what is left of one that was stopped, failed or cut off."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.copier import Copier
from kvmsnapd.copies import CopyPlan, note_of, noted, plan_copy
from kvmsnapd.diagnosis import diagnose_domain, diagnose_files
from kvmsnapd.disks import overlay_path
from kvmsnapd.errors import (
    CopyRefusedError,
    DomainLockedError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StorageFullError,
)
from kvmsnapd.model import DomainState, Kind, Layer, Storage
from kvmsnapd.state_files import DomainLocks
from tests.builders import (
    ANY_LIBVIRT,
    OTHER_UUID,
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
from tests.unit.test_restore import taken_on, with_mark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmsnapd.model import Domain, Snapshot

BASE = "/images/web1-vda.qcow2"
COPY = "/images/new.vda.qcow2"
LOST = HypervisorUnreachableError("End of file while reading data", operation="any")
REFUSED = HypervisorError("no", operation="any")


def files(domain: Domain, snapshot: Snapshot, name: str | None = None, folder: str | None = None) -> dict[str, str]:
    plan = plan_copy(domain, snapshot, name=name, folder=folder, stands=False)
    assert isinstance(plan, CopyPlan), plan
    return plan.files


# What it consists of


def test_a_copy_has_what_the_snapshot_froze_of_the_disks_that_took_part() -> None:
    (taken,) = taken_on(a_snapshot()).snapshots
    covers = (("vda", BASE), ("vdb", "/images/left-out.qcow2"), ("sda", "/iso/a.iso"))
    plan = plan_copy(taken_on(a_snapshot()), replace(taken, covers=covers))
    assert isinstance(plan, CopyPlan)
    assert plan.sources == {"vda": BASE}


def test_files_are_beside_the_active_layer_or_where_that_is_wanted() -> None:
    domain = taken_on(*hourly_snapshots(2))
    old = domain.snapshots[0]
    domain = replace(domain, disks=(replace(domain.disks[0], path="/fast/web1.vda.qcow2"),))
    assert files(domain, old, "new") == {"vda": "/fast/new.vda.qcow2"}
    assert files(domain, old, "new one/2") == {"vda": "/fast/new_one_2.vda.qcow2"}
    assert files(domain, old, folder="/out/") == {"vda": f"/out/web1.{old.name}.vda.qcow2"}
    # A disk that the domain has no more: beside the overlay that it had.
    assert files(replace(domain, disks=()), old, "new") == {"vda": "/images/new.vda.qcow2"}


def test_no_copy_is_called_what_an_overlay_is_called() -> None:
    domain = taken_on(a_snapshot())
    (snapshot,) = domain.snapshots
    for name in (None, "web1", "new"):  # doctor would take it for one, and a take of the new domain for its own
        called = replace(a_domain(), name=name or "web1")
        overlay = overlay_path(called, domain.disks[0], a_policy(), snapshot.name)
        assert overlay not in files(domain, snapshot, name, "/images").values()


def test_a_foreign_one_can_be_copied_whatever_it_is_called() -> None:
    foreign = replace(a_foreign_snapshot("before the upgrade"), covers=(("vda", BASE),), overlays=(("vda", "/o"),))
    assert files(taken_on(), foreign, folder="/out") == {"vda": "/out/web1.before_the_upgrade.vda.qcow2"}


def test_notes_and_files_are_told_apart() -> None:
    assert noted(note_of(COPY)) == COPY
    assert noted(COPY) is None
    assert noted("/images/somebody-s.unfinished") is None


@pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.PAUSED, DomainState.UNSETTLED])
def test_an_internal_one_is_read_only_while_the_domain_is_off(state: DomainState) -> None:
    snapshot = a_snapshot(kind=Kind.INTERNAL, covers=(("vda", BASE), ("sda", "/iso/a.iso")))
    disks = (a_disk(path=BASE), a_disk("sda", device="cdrom", readonly=True, path="/iso/a.iso"))
    domain = a_domain(snapshot, disks=disks, state=DomainState.SHUT_OFF)
    assert files(domain, snapshot, "new") == {"vda": COPY}
    assert "--as NAME" in str(plan_copy(domain, snapshot, name="new"))  # no overlay can stand on it
    for other in (replace(domain, state=state), replace(domain, managed_save=True)):
        plan = plan_copy(other, snapshot, name="new", stands=False)
        assert isinstance(plan, str)
        assert f"`kvmsnapd restore web1 {snapshot.name}` keeps the present state" in plan


@pytest.mark.parametrize("path", ["/dev/vg/web1", "volume-of-a-pool"])
def test_a_device_is_copied_into_the_folder_of_what_stands_on_it(path: str) -> None:
    domain = taken_on(a_snapshot())
    snapshot = replace(domain.snapshots[0], covers=(("vda", path),))
    assert files(domain, snapshot, "new") == {"vda": COPY}


def test_data_on_the_network_parts_that_are_internal_and_half_deleted_ones_are_refused() -> None:
    domain = taken_on(a_snapshot())
    (snapshot,) = domain.snapshots
    for unfit, words in (
        (replace(snapshot, covers=()), "the data of vda on the network"),
        (replace(snapshot, kind=Kind.MIXED), "in parts internal"),
        (replace(snapshot, overlays=()), "in parts internal"),
        (half_deleted(snapshot), "half deleted"),
    ):
        for stands in (True, False):
            assert words in str(plan_copy(domain, unfit, name="new", stands=stands))


# Carrying it out


def test_what_is_copied_is_an_overlay_so_that_no_guest_says_what_is_below(ground: Ground) -> None:
    ground.clone()
    done = [call[0] for call in ground.fake.calls if call[0] in {"create_overlays", "copy_file", "create_empty"}]
    assert done == ["create_overlays", "copy_file"]
    assert ("copy_file", note_of(COPY), COPY) in ground.fake.calls


@dataclass
class Ground:
    """A domain of two snapshots, and who copies them."""

    fake: FakeHypervisor
    directory: Path
    wanted: bool = True
    locked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        @contextmanager
        def hold(domain: Domain) -> Iterator[None]:
            self.locked.append(domain.uuid)
            yield

        self.copier = Copier(self.fake, DomainLocks(self.directory), hold, wanted=lambda: self.wanted)

    @property
    def domain(self) -> Domain:
        return self.fake.domains[UUID]

    @property
    def name(self) -> str:
        return self.domain.snapshots[0].name

    @property
    def linked(self) -> tuple[str, ...]:
        mark = self.domain.snapshots[0].mark
        assert mark
        return mark.linked

    @property
    def second(self) -> Domain | None:
        return next((d for d in self.fake.domains.values() if d.name == "new"), None)

    def clone(self) -> tuple[dict[str, str], tuple[str, ...]]:
        return self.copier.clone(UUID, self.name, "new")

    def link(self) -> tuple[dict[str, str], tuple[str, ...]]:
        return self.copier.link(UUID, self.name, "new")

    def export(self) -> dict[str, str]:
        return self.copier.export(UUID, self.name, "/out")

    def findings(self) -> list[tuple[str, str | None]]:
        """Return subject and command of what doctor says of the files."""
        found = {path: Layer(path, allocated=0) for path in (*self.fake.copies, BASE, self.domain.disks[0].path or "")}
        folders: dict[str, tuple[Layer, ...]] = {}
        for path, layer in found.items():
            folder = path.rpartition("/")[0]
            folders[folder] = (*folders.get(folder, ()), layer)
        seen = diagnose_files(list(self.fake.domains.values()), folders, self.copier.locks.is_made)
        return [(finding.subject, finding.command) for finding in seen if "data of snapshot" not in finding.text]


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    fake = FakeHypervisor()
    fake.add(taken_on(*hourly_snapshots(2)))
    return Ground(fake, tmp_path)


def make_internal(ground: Ground, *, offline: bool = True) -> None:
    snapshot = a_snapshot(kind=Kind.INTERNAL, covers=(("vda", BASE),), offline=offline)
    ground.fake.add(a_domain(snapshot, disks=(a_disk(path=BASE),), state=DomainState.SHUT_OFF))


def test_a_second_domain_is_defined_on_its_own_file_and_nothing_else_is_left(ground: Ground) -> None:
    assert ground.clone() == ({"vda": COPY}, ("network interface",))
    assert ground.second
    assert [disk.path for disk in ground.second.disks] == [COPY]
    assert ground.fake.copies == {COPY: BASE}
    assert ground.linked == ()
    assert ground.locked == []  # takes go on
    assert ground.findings() == []


def test_nothing_is_deleted_while_it_is_copied_and_doctor_says_nothing_of_it(ground: Ground) -> None:
    seen: list[object] = []

    def look() -> None:
        with ground.copier.locks.changing(UUID) as alone:
            seen.append(alone)
        seen.append(ground.findings())
        seen.extend(sorted(ground.fake.copies))

    ground.fake.before["copy_file"].append(look)
    ground.clone()
    assert seen == [False, [], note_of(COPY)]
    with ground.copier.locks.changing(UUID) as alone:
        assert alone


def test_two_never_make_the_same_file(ground: Ground) -> None:
    def second() -> None:
        with pytest.raises(DomainLockedError, match=f"{COPY} is being made by process"):
            ground.link()
        assert ground.linked == ()

    ground.fake.before["copy_file"].append(second)
    ground.clone()
    assert ground.second


@pytest.mark.parametrize("operation", ["create_overlays", "copy_file", "define_copy"])
def test_refused_by_libvirt_nothing_is_left(ground: Ground, operation: str) -> None:
    ground.fake.before[operation].append(raising(REFUSED))
    with pytest.raises(HypervisorError):
        ground.clone()
    assert (ground.second, ground.fake.copies) == (None, {})
    ground.clone()


@pytest.mark.parametrize("operation", ["create_empty", "create_overlays", "define_copy"])
def test_a_link_that_is_refused_leaves_no_hold(ground: Ground, operation: str) -> None:
    ground.fake.before[operation].append(raising(REFUSED))
    with pytest.raises(HypervisorError):
        ground.link()
    assert (ground.second, ground.fake.copies, ground.linked) == (None, {}, ())


@pytest.mark.parametrize("what", ["clone", "link", "export"])
def test_what_is_cut_off_is_named_and_made_anew_by_the_same_call(ground: Ground, what: str) -> None:
    operation = {"clone": "define_copy", "link": "define_copy", "export": "copy_file"}[what]
    path = f"/out/web1.{ground.name}.vda.qcow2" if what == "export" else COPY

    def lose() -> None:
        ground.fake.copies.setdefault(path, "half")  # libvirt goes on by itself
        raise LOST

    ground.fake.before[operation].append(lose)
    with pytest.raises(HypervisorUnreachableError):
        getattr(ground, what)()
    assert set(ground.fake.copies) == {path, note_of(path)}
    assert ground.findings() == [(path, f"rm {path} {note_of(path)}")]
    getattr(ground, what)()
    assert ground.fake.copies == {path: BASE}
    assert ground.findings() == []
    if what == "link":
        assert len(ground.linked) == 2  # the first is dropped by the next run: libvirt has no such domain
        assert ground.second
        assert ground.second.uuid == ground.linked[-1]


def test_cut_off_after_the_domain_was_defined_only_the_note_goes(ground: Ground) -> None:
    ground.fake.before["remove_file"].append(raising(LOST))
    ground.clone()
    assert ground.findings() == [(note_of(COPY), f"rm {note_of(COPY)}")]
    assert ground.second
    ground.fake.domains[OTHER_UUID] = replace(ground.second, name="renamed", uuid=OTHER_UUID)
    del ground.fake.domains[ground.second.uuid]
    with pytest.raises(CopyRefusedError, match=f"{COPY} is a disk of renamed; choose another name"):
        ground.clone()
    assert COPY in ground.fake.copies


def test_cut_off_before_it_began_only_the_note_is_there(ground: Ground) -> None:
    ground.fake.copies[note_of(COPY)] = ""
    assert ground.findings() == [(note_of(COPY), f"rm {note_of(COPY)}")]
    ground.clone()
    assert ground.fake.copies == {COPY: BASE}


def test_while_libvirt_still_copies_for_a_call_that_was_killed_it_is_said(ground: Ground) -> None:
    ground.fake.copies.update({COPY: "half", note_of(COPY): ""})
    ground.fake.before["remove_file"].append(raising(HypervisorError("still being allocated", operation="file_delete")))
    with pytest.raises(CopyRefusedError, match=r"still being allocated\. libvirt may still be copying for it"):
        ground.clone()
    assert set(ground.fake.copies) == {COPY, note_of(COPY)}


@pytest.mark.parametrize("what", ["clone", "link"])
def test_a_file_that_is_somebody_s_is_never_touched(ground: Ground, what: str) -> None:
    ground.fake.copies[COPY] = "somebody's"
    with pytest.raises(CopyRefusedError, match=f"{COPY} exists already, and is not left of a copy"):
        getattr(ground, what)()
    assert ground.fake.copies == {COPY: "somebody's"}
    assert ground.linked == ()


def test_a_file_that_somebody_makes_in_this_very_moment_is_never_touched(ground: Ground) -> None:
    ground.fake.before["copy_file"].append(lambda: ground.fake.copies.update({COPY: "somebody's"}))
    with pytest.raises(CopyRefusedError, match="exists already") as caught:
        ground.clone()
    assert isinstance(caught.value.__cause__, SnapshotExistsError)
    assert ground.fake.copies == {COPY: "somebody's"}


def test_stopped_nothing_is_left(ground: Ground) -> None:
    def stop() -> None:
        ground.wanted = False

    ground.fake.before["copy_file"].append(stop)
    with pytest.raises(CopyRefusedError, match="stopped; nothing is left of the copy"):
        ground.clone()
    assert (ground.second, ground.fake.copies) == (None, {})


def test_a_name_that_is_taken_a_snapshot_that_is_gone_and_one_that_cannot_be_held_are_refused(ground: Ground) -> None:
    name = ground.name
    ground.fake.make_foreign(UUID, "mine")
    with pytest.raises(CopyRefusedError, match="mine was not made by kvmsnapd, which cannot hold it"):
        ground.copier.link(UUID, "mine", "new")
    with pytest.raises(CopyRefusedError, match=r"there is a domain web1 already\. Nothing was changed"):
        ground.copier.clone(UUID, name, "web1")
    with pytest.raises(SnapshotNotFoundError, match="nothing was changed"):
        ground.copier.clone(UUID, "gone", "new")
    assert ground.fake.copies == {}


def test_the_room_for_all_layers_is_asked_for_and_min_free_stays_free(ground: Ground) -> None:
    overlay = ground.domain.snapshots[0].overlays[0][1]
    layers = {BASE: Layer(BASE, allocated=600), overlay: Layer(overlay, backing=BASE, allocated=500)}
    newest = ground.domain.snapshots[1].name  # froze the overlay, which stands on the base
    ground.fake.stored = Storage({"/images": 1099, "/out": 1099}, layers)
    with pytest.raises(StorageFullError, match="Nothing was changed"):
        ground.copier.clone(UUID, newest, "new")
    assert ground.fake.copies == {}
    ground.copier.clone(UUID, ground.name, "other")
    ground.copier.spared = 600
    with pytest.raises(StorageFullError, match="min_free keeps"):
        ground.copier.clone(UUID, ground.name, "new")
    ground.copier.export(UUID, ground.name, "/out")  # min_free is of the disks' folder
    ground.copier.spared = 1100
    with pytest.raises(StorageFullError):
        ground.link()
    assert ground.linked == ()


def test_a_linked_copy_is_held_before_anything_stands_on_the_snapshot(ground: Ground) -> None:
    held: list[int] = []
    ground.fake.before["create_overlays"].append(lambda: held.append(len(ground.linked)))
    ground.link()
    assert held == [1]
    assert ground.second
    assert ground.linked == (ground.second.uuid,)
    assert ground.locked == [UUID]
    assert ground.fake.copies == {COPY: BASE}


@pytest.mark.parametrize("offline", [True, False])
def test_an_internal_one_is_copied_twice_under_the_domain_s_own_lock(ground: Ground, offline: bool) -> None:
    make_internal(ground, offline=offline)
    files_of, left_out = ground.clone()
    assert files_of == {"vda": COPY}
    assert left_out == (*(() if offline else ("the guest's RAM of then",)), "network interface")
    assert ground.fake.copies == {COPY: BASE}
    assert ("copy_file", note_of(COPY), COPY) in ground.fake.calls  # out of the image that was beside it
    assert ground.locked == [UUID]
    ground.fake.stored = Storage({"/images": 1999}, {BASE: Layer(BASE, allocated=1000)})
    with pytest.raises(StorageFullError):
        ground.copier.clone(UUID, ground.name, "third")


def test_an_internal_one_whose_domain_is_started_meanwhile_leaves_nothing(ground: Ground) -> None:
    make_internal(ground)
    ground.fake.before["take_out"].append(lambda: ground.fake.start(UUID))
    with pytest.raises(HypervisorError):
        ground.clone()
    assert (ground.second, ground.fake.copies) == (None, {})


def test_with_ram_it_is_said_that_the_copy_has_none(ground: Ground) -> None:
    old, new = ground.domain.snapshots
    ground.fake.domains[UUID] = replace(ground.domain, snapshots=(replace(old, memory_file="/images/m.mem"), new))
    assert ground.clone()[1] == ("the guest's RAM of then", "network interface")


def test_what_is_left_of_a_throw_away_domain_is_named() -> None:
    left = a_domain(name="kvmsnapd-drill-1234abcd", state=DomainState.SHUT_OFF)
    (finding,) = diagnose_domain(left, [], [], ANY_LIBVIRT)
    assert finding.command == "virsh undefine kvmsnapd-drill-1234abcd --snapshots-metadata"
    overlay = "/images/kvmsnapd-drill-1234abcd.vda.qcow2"
    (found,) = diagnose_files([], {"/images": (Layer(overlay),)})
    assert (found.subject, found.command) == (overlay, f"rm {overlay}")


def test_a_restoring_one_can_be_looked_into(ground: Ground) -> None:
    old, new = ground.domain.snapshots
    ground.fake.domains[UUID] = replace(ground.domain, snapshots=(with_mark(old, standalone=True), new))
    assert ground.clone()[0] == {"vda": COPY}
