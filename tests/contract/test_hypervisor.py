"""What every hypervisor behind the port does: the fake, libvirt's test driver, and libvirt with QEMU guests."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.demo import write_test_host
from kvmsnapd.errors import (
    CopyRefusedError,
    DomainBusyError,
    DomainNotFoundError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
    SnapshotNotFoundError,
)
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.model import Capabilities, Consistency, Domain, DomainState, Kind, TakeRequest, Unchanged
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.preflight import plan_take
from tests.builders import a_domain, a_policy
from tests.fakes import FakeHypervisor
from tests.lab.generations import roots as generation_roots
from tests.lab.guest import guests_on

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmsnapd.hypervisor import Hypervisor

NOWHERE = "00000000-0000-0000-0000-000000000000"
SLOT = datetime(2026, 11, 22, 9, tzinfo=UTC)


@dataclass
class Ground:
    """One hypervisor with one domain, without snapshots."""

    hypervisor: Hypervisor
    uuid: str
    kind: Kind
    make_foreign: Callable[[str], object]
    runs: bool = True
    undefine: Callable[[str], object] = lambda _uuid: None

    def request(self, number: int = 0) -> TakeRequest:
        """Return the request that the daemon would make for the n-th slot."""
        policy = a_policy(kind=self.kind, consistency=ConsistencyRule.FILESYSTEM_PREFERRED)
        slot = SLOT + timedelta(hours=number)
        request = plan_take(self.domain, policy, self.hypervisor.capabilities(), slot=slot, now=slot)
        assert isinstance(request, TakeRequest), request
        return request

    def take(self, number: int) -> str:
        """Take the n-th slot's snapshot and return its name."""
        return self.hypervisor.take_snapshot(self.request(number)).name

    @property
    def domain(self) -> Domain:
        """The domain, freshly read."""
        return self.hypervisor.domain(self.uuid)

    @property
    def names(self) -> list[str]:
        """The snapshots' names, in their order in the tree."""
        parents = {snapshot.parent: snapshot.name for snapshot in self.domain.snapshots}
        chain, name = [], parents.get(None)
        while name:
            chain.append(name)
            name = parents.get(name)
        assert len(chain) == len(self.domain.snapshots)
        return chain


def fake_ground(_request: pytest.FixtureRequest) -> Ground:
    fake = FakeHypervisor()
    domain = fake.add(a_domain())
    return Ground(
        fake,
        domain.uuid,
        Kind.EXTERNAL,
        lambda name: fake.make_foreign(domain.uuid, name),
        undefine=fake.domains.pop,
    )


def driver_ground(request: pytest.FixtureRequest, *, runs: bool) -> Ground:
    host = LibvirtHost(write_test_host(request.getfixturevalue("tmp_path"), {"web1": runs}))
    request.addfinalizer(host.close)
    (inventory,) = host.inventory()
    raw = host._writing.get().lookupByUUIDString(inventory.uuid)  # the driver's state is private to its connection
    return Ground(host, inventory.uuid, Kind.INTERNAL, lambda name: raw.snapshotCreateXML(_foreign(name), 0), runs)


def qemu_ground(request: pytest.FixtureRequest, generation: str, kind: Kind, **options: object) -> Ground:
    libvirtd = request.getfixturevalue("generations")(generation)
    guests = contextlib.ExitStack()
    request.addfinalizer(guests.close)
    guest = guests.enter_context(guests_on(libvirtd, request.getfixturevalue("tmp_path")))(**options)
    host = LibvirtHost(libvirtd.uri)
    request.addfinalizer(host.close)
    disk_only = 16 if kind is Kind.EXTERNAL else 0
    return Ground(
        host,
        guest.domain.UUIDString(),
        kind,
        lambda name: guest.domain.snapshotCreateXML(_foreign(name), disk_only),
        bool(options.get("running", True)),
        lambda uuid: libvirtd.connect().lookupByUUIDString(uuid).undefine(),
    )


def _foreign(name: str) -> str:
    return f"<domainsnapshot><name>{name}</name><description>before the upgrade</description></domainsnapshot>"


GROUNDS = {
    "fake": fake_ground,
    "test-driver": partial(driver_ground, runs=True),
    "test-driver-off": partial(driver_ground, runs=False),
}
QEMU_GROUNDS = {
    "qemu-external": partial(qemu_ground, kind=Kind.EXTERNAL),
    "qemu-external-raw-two-disks": partial(qemu_ground, kind=Kind.EXTERNAL, image_format="raw", disks=2, agent=False),
    "qemu-external-off": partial(qemu_ground, kind=Kind.EXTERNAL, running=False),
    "qemu-internal": partial(qemu_ground, kind=Kind.INTERNAL, agent=False),
    "qemu-internal-off": partial(qemu_ground, kind=Kind.INTERNAL, running=False),
}


@pytest.fixture(
    params=[pytest.param(make, id=name) for name, make in GROUNDS.items()]
    + [
        pytest.param(partial(make, generation=generation), id=f"{name}-{generation}", marks=pytest.mark.qemu)
        for name, make in QEMU_GROUNDS.items()
        for generation in generation_roots()
    ]
)
def ground(request: pytest.FixtureRequest) -> Ground:
    return request.param(request)  # type: ignore[no-any-return]


def test_a_new_domain_is_listed_without_snapshots(ground: Ground) -> None:
    (inventory,) = (d for d in ground.hypervisor.inventory() if d.uuid == ground.uuid)
    assert (inventory.name, inventory.snapshots) == (ground.domain.name, ())
    assert ground.domain.state is (DomainState.RUNNING if ground.runs else DomainState.SHUT_OFF)


def test_the_driver_can_take_the_kind_that_is_asked_of_it(ground: Ground) -> None:
    capabilities = ground.hypervisor.capabilities()
    assert isinstance(capabilities, Capabilities)
    assert capabilities.external_snapshots or ground.kind is Kind.INTERNAL


def test_a_taken_snapshot_is_found_again_with_its_mark(ground: Ground) -> None:
    request = ground.request()
    taken = ground.hypervisor.take_snapshot(request)
    assert (taken.name, taken.mark, taken.kind) == (request.name, request.mark, ground.kind)
    assert ground.domain.snapshots == (taken,)
    (inventory,) = (d for d in ground.hypervisor.inventory() if d.uuid == ground.uuid)
    assert inventory.snapshots == (taken,)


def test_consistency_is_what_the_guest_allows(ground: Ground) -> None:
    if not ground.runs:
        expected = Consistency.OFFLINE
    elif ground.kind is Kind.INTERNAL:
        expected = Consistency.MEMORY
    else:
        expected = Consistency.FILESYSTEM if ground.domain.agent_connected else Consistency.CRASH
    mark = ground.hypervisor.take_snapshot(ground.request()).mark
    assert mark is not None
    assert mark.consistency is expected


def test_a_name_is_taken_once_and_the_second_time_changes_nothing(ground: Ground) -> None:
    request = ground.request()
    ground.hypervisor.take_snapshot(request)
    before = ground.domain.snapshots
    with pytest.raises(SnapshotExistsError):
        ground.hypervisor.take_snapshot(request)
    assert ground.domain.snapshots == before


def test_snapshots_form_a_chain_and_a_deleted_one_leaves_it_whole(ground: Ground) -> None:
    names = [ground.take(number) for number in range(4)]
    assert ground.names == names
    newest_first = not ground.runs and not ground.hypervisor.capabilities().delete_external_in_chain_offline
    order = [names[3], names[2]] if newest_first and ground.kind is Kind.EXTERNAL else [names[1], names[0]]
    for name in order:
        ground.hypervisor.delete_snapshot(ground.uuid, name)
        names.remove(name)
        assert ground.names == names


def test_deleting_what_is_gone_is_success_and_touches_nothing_else(ground: Ground) -> None:
    kept, gone = ground.take(0), ground.take(1)
    ground.hypervisor.delete_snapshot(ground.uuid, gone)
    ground.hypervisor.delete_snapshot(ground.uuid, gone)
    assert ground.names == [kept]


def test_a_snapshot_of_a_person_is_foreign(ground: Ground) -> None:
    ground.make_foreign("before-upgrade")
    (snapshot,) = ground.domain.snapshots
    assert (snapshot.name, snapshot.mark, snapshot.kind) == ("before-upgrade", None, ground.kind)


def test_our_name_without_our_description_is_foreign(ground: Ground) -> None:
    name = ground.request().name
    ground.make_foreign(name)
    assert ground.domain.snapshots[0].mark is None
    assert ground.request().name == f"{name}-2"


def test_a_domain_that_does_not_exist_is_not_found(ground: Ground) -> None:
    for call in (
        lambda: ground.hypervisor.domain(NOWHERE),
        lambda: ground.hypervisor.delete_snapshot(NOWHERE, "any"),
        lambda: ground.hypervisor.thaw(NOWHERE),
    ):
        with pytest.raises(DomainNotFoundError):
            call()


def test_thawing_a_guest_that_is_not_frozen_does_nothing(ground: Ground) -> None:
    if ground.runs and ground.domain.agent_connected:
        ground.hypervisor.thaw(ground.uuid)
        ground.hypervisor.thaw(ground.uuid)


def test_a_libvirt_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    host = LibvirtHost(f"qemu+unix:///system?socket={tmp_path}/libvirt-sock")
    for call in (host.capabilities, host.inventory, lambda: host.domain(NOWHERE), lambda: host.thaw(NOWHERE)):
        with pytest.raises(HypervisorUnreachableError, match="cannot reach libvirt at"):
            call()


def test_a_description_is_rewritten_and_nothing_else_changes(ground: Ground) -> None:
    names = [ground.take(number) for number in range(3)]
    before = ground.domain.snapshots
    (middle,) = (s for s in before if s.name == names[1])
    assert middle.mark is not None
    mark = replace(middle.mark, unchanged=Unchanged(SLOT + timedelta(hours=5), SLOT + timedelta(hours=5, minutes=1)))
    ground.hypervisor.describe_snapshot(ground.uuid, middle.name, mark)
    expected = {s.name: replace(s, mark=mark) if s.name == middle.name else s for s in before}
    assert {s.name: s for s in ground.domain.snapshots} == expected
    (inventory,) = (d for d in ground.hypervisor.inventory() if d.uuid == ground.uuid)
    assert {s.name: s for s in inventory.snapshots} == expected
    assert ground.names == names
    # What follows goes on from there as if nothing had been.
    names.append(ground.take(3))
    assert ground.names == names


def test_a_snapshot_that_is_gone_cannot_be_described(ground: Ground) -> None:
    request = ground.request()
    with pytest.raises(SnapshotNotFoundError):
        ground.hypervisor.describe_snapshot(ground.uuid, request.name, request.mark)


def test_the_file_below_an_overlay_is_told_right_after_a_delete_as_well(ground: Ground) -> None:
    if ground.kind is Kind.INTERNAL:
        return
    (base,) = {disk.path for disk in ground.domain.disks[:1]}
    first, second = ground.take(0), ground.take(1)
    if ground.runs or ground.hypervisor.capabilities().delete_external_in_chain_offline:
        ground.hypervisor.delete_snapshot(ground.uuid, first)
        (left,) = (s for s in ground.domain.snapshots if s.name == second)
        assert dict(left.covers)["vda"] == base


def test_free_space_is_told_of_folders_and_layers_of_a_shut_off_domain(ground: Ground) -> None:
    ground.take(0)
    folder = str(PurePosixPath(ground.domain.disks[0].path or "").parent)
    seen = ground.hypervisor.storage(ground.domain, [folder])
    if not ground.hypervisor.capabilities().storage_api or isinstance(ground.hypervisor, FakeHypervisor):
        return
    assert seen.free_bytes[folder] > 0
    assert (ground.hypervisor.free_bytes(folder) or 0) > 0
    if ground.runs:
        assert seen.layers == {}
    elif ground.kind is Kind.EXTERNAL:
        active = seen.layers[ground.domain.disks[0].path or ""]
        assert active.backing in seen.layers


def test_of_a_domain_at_rest_no_progress_is_told(ground: Ground) -> None:
    ground.take(0)
    assert ground.hypervisor.progress(ground.uuid) is None
    assert ground.hypervisor.progress(NOWHERE) is None


def test_an_agent_says_what_it_would_freeze(ground: Ground) -> None:
    if ground.domain.agent_connected:
        assert ground.hypervisor.filesystems(ground.uuid)


def test_power_is_switched_off_and_on_and_off_twice_is_no_error(ground: Ground) -> None:
    for _ in range(2):
        ground.hypervisor.power_off(ground.uuid)
        assert ground.domain.state is DomainState.SHUT_OFF
    ground.hypervisor.start(ground.uuid)
    assert ground.domain.state is DomainState.RUNNING


def test_going_back_to_an_internal_snapshot_brings_its_state_of_power(ground: Ground) -> None:
    if ground.kind is not Kind.INTERNAL:
        return
    name = ground.take(0)
    ground.hypervisor.power_off(ground.uuid)
    ground.hypervisor.revert_snapshot(ground.uuid, name)
    assert ground.domain.state is (DomainState.RUNNING if ground.runs else DomainState.SHUT_OFF)
    with pytest.raises(SnapshotNotFoundError):
        ground.hypervisor.revert_snapshot(ground.uuid, "gone")


def test_a_domain_goes_on_from_an_older_snapshot_along_one_line(ground: Ground) -> None:
    if ground.kind is Kind.INTERNAL:
        return
    names = [ground.take(number) for number in range(3)]
    (target,) = (s for s in ground.domain.snapshots if s.name == names[1])
    overlays = {disk: f"{path}.new" for disk, path in target.overlays}
    if ground.runs:
        with pytest.raises(DomainBusyError):
            ground.hypervisor.go_on_from(ground.uuid, names[1], overlays)
        ground.hypervisor.power_off(ground.uuid)
    for _ in range(2):
        ground.hypervisor.go_on_from(ground.uuid, names[1], overlays)
        assert {disk.target: disk.path for disk in ground.domain.disks} == overlays
        (now,) = (s for s in ground.domain.snapshots if s.name == names[1])
        assert dict(now.overlays) == overlays
        assert replace(now, overlays=target.overlays) == target
    for _ in range(2):
        ground.hypervisor.forget_snapshot(ground.uuid, names[2])
    assert ground.names == names[:2]
    ground.hypervisor.start(ground.uuid)
    assert ground.names[:2] == names[:2]
    later = ground.take(3)
    assert ground.names == [*names[:2], later]
    for name in (names[0], later, names[1]):
        ground.hypervisor.delete_snapshot(ground.uuid, name)
    assert ground.names == []


def test_a_standalone_snapshot_is_beside_the_chain_and_goes_without_touching_it(ground: Ground) -> None:
    if ground.kind is Kind.INTERNAL:
        return
    ground.hypervisor.power_off(ground.uuid)
    names = [ground.take(number) for number in range(2)]
    before = ground.domain
    active = {disk.target: disk.path or "" for disk in before.disks}
    request = ground.request(2)
    request = replace(request, mark=replace(request.mark, standalone=True))
    for target, path in request.overlays:
        ground.hypervisor.copy_file(active[target], path)
    ground.hypervisor.record_standalone(request)
    (kept,) = (s for s in ground.domain.snapshots if s.name == request.name)
    assert (kept.mark, kept.parent, kept.kind, kept.offline) == (request.mark, None, Kind.EXTERNAL, True)
    assert {target: dict(kept.covers)[target] for target in active} == dict(request.overlays)
    assert replace(ground.domain, snapshots=before.snapshots) == before
    ground.hypervisor.delete_snapshot(ground.uuid, request.name)
    assert ground.domain == before
    assert ground.names == names
    for target, path in request.overlays:  # they are gone, or the copy would be refused
        ground.hypervisor.copy_file(active[target], path)
        ground.hypervisor.remove_file(path)
        ground.hypervisor.remove_file(path)


def test_a_second_domain_is_defined_on_overlays_and_the_original_stays_as_it_is(ground: Ground) -> None:
    if ground.kind is Kind.INTERNAL:
        return
    name = ground.take(0)
    (taken,) = before = ground.domain.snapshots
    thin = {target: f"{dict(taken.covers)[target]}.thin" for target, _ in taken.overlays}
    ground.hypervisor.create_overlays(ground.uuid, name, thin)
    with pytest.raises(SnapshotExistsError):
        ground.hypervisor.create_overlays(ground.uuid, name, thin)
    define = partial(ground.hypervisor.define_copy, ground.uuid, disks=thin, network=True)
    with pytest.raises(SnapshotNotFoundError):
        define("gone", name="second", uuid=NOWHERE)
    assert define(name, name="second", uuid=NOWHERE.replace("0-", "1-")) == ()
    second = ground.hypervisor.domain(NOWHERE.replace("0-", "1-"))
    assert (second.name, second.state, second.snapshots) == ("second", DomainState.SHUT_OFF, ())
    assert {disk.target: (disk.path, disk.format) for disk in second.disks} == {
        t: (p, "qcow2") for t, p in thin.items()
    }
    with pytest.raises(HypervisorError):
        define(name, name="second", uuid=NOWHERE.replace("0-", "2-"))
    assert ground.domain.snapshots == before
    ground.undefine(second.uuid)
    for path in thin.values():
        ground.hypervisor.remove_file(path)
    ground.hypervisor.delete_snapshot(ground.uuid, name)


def test_an_empty_file_is_made_once(ground: Ground) -> None:
    if not ground.hypervisor.capabilities().storage_api:
        return
    path = f"{ground.domain.disks[0].path}.unfinished"
    ground.hypervisor.create_empty(path)
    with pytest.raises(SnapshotExistsError):
        ground.hypervisor.create_empty(path)
    assert set(ground.hypervisor.allocated([("note", path), ("other", f"{path}.other")])) == {"note"}
    ground.hypervisor.remove_file(path)
    assert ground.hypervisor.allocated([("note", path)]) == {}


def test_an_internal_snapshot_is_taken_out_of_the_images_of_a_domain_that_is_off(ground: Ground) -> None:
    capabilities = ground.hypervisor.capabilities()
    if not capabilities.storage_api or (ground.kind is Kind.EXTERNAL and capabilities.driver != "fake"):
        return
    name = ground.take(0)
    images = {disk.target: f"{disk.path}.image" for disk in ground.domain.disks}
    for path in images.values():
        ground.hypervisor.create_empty(path)
    take_out = partial(ground.hypervisor.take_out, ground.uuid, images=images, wanted=lambda: True)
    if ground.runs:
        with pytest.raises(DomainBusyError):
            take_out(name)
        ground.hypervisor.power_off(ground.uuid)
    with pytest.raises(CopyRefusedError):
        ground.hypervisor.take_out(ground.uuid, name, images, wanted=lambda: False)
    with pytest.raises(SnapshotNotFoundError):
        take_out("gone")
    before = ground.domain
    take_out(name)
    assert ground.domain == before
    assert {inventory.uuid for inventory in ground.hypervisor.inventory()} == {ground.uuid}
    for path in images.values():
        ground.hypervisor.copy_file(path, f"{path}.whole")
        ground.hypervisor.remove_file(f"{path}.whole")
        ground.hypervisor.remove_file(path)
