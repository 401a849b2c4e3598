"""Which disks a snapshot covers, which it leaves out, and where its files go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsnapd.disks import Cover, cover_disks, data_folders, memory_path, overlay_path
from kvmsnapd.model import Capabilities, Disk, Domain, DomainState, Kind, TakeRequest
from kvmsnapd.naming import format_description, parse_mark
from kvmsnapd.policy import DiskSelection, Policy
from kvmsnapd.preflight import plan_take
from kvmsnapd.refusal import Refusal, RefusalReason
from tests.builders import ANY_LIBVIRT, NOW, a_disk, a_domain, a_policy, a_snapshot, at
from tests.fakes import FakeHypervisor

EXTERNAL, INTERNAL = a_policy(), a_policy(kind=Kind.INTERNAL)
ELSEWHERE = a_policy(overlay_directory="/overlays")
TEST_DRIVER = Capabilities("test", "9.0.0", external_snapshots=False, internal_needs_qcow2=False)
NAME = "kvmsnapd-standard-20261122T120000Z"
OFF = DomainState.SHUT_OFF

CDROM = a_disk("sda", device="cdrom", readonly=True, format="raw")
EMPTY_CDROM = a_disk("sda", device="cdrom", readonly=True, path=None, format="raw")
NETWORK_CDROM = a_disk("sda", device="cdrom", readonly=True, source_type="network", path=None, format="raw")
FLOPPY = a_disk("fda", device="floppy", format="raw")
READ_ONLY_FLOPPY = replace(FLOPPY, readonly=True)
READ_ONLY = a_disk("vdb", readonly=True, shareable=True, transient=True)
LEFT_OUT = a_disk("vdb", left_out=True)
RAW = a_disk("vdb", format="raw")
BLOCK = a_disk("vdb", source_type="block", path="/dev/vg/lv")
NETWORK = a_disk("vdb", source_type="network", path=None)
VOLUME = a_disk("vdb", source_type="volume", path="/pool/web1.qcow2", pool="default")
DEVICE_VOLUME = a_disk("vdb", source_type="volume", path="/dev/vg/lv", pool="vg")
LOST_VOLUME = a_disk("vdb", source_type="volume", path=None, pool="gone")
SHARED = a_disk("vdb", shareable=True)
TRANSIENT = a_disk("vdb", transient=True)
NVME = a_disk("vdb", source_type="nvme", path=None)


def cover(
    *disks: Disk,
    policy: Policy = EXTERNAL,
    capabilities: Capabilities = ANY_LIBVIRT,
    state: DomainState = DomainState.RUNNING,
) -> Cover | Refusal:
    return cover_disks(a_domain(disks=disks, state=state), policy, capabilities)


def targets(found: Cover | Refusal) -> tuple[list[str], tuple[str, ...], tuple[str, ...]]:
    """Return what is covered, what the policy leaves out, and all that libvirt is told to leave out."""
    assert isinstance(found, Cover), found
    return [disk.target for disk in found.disks], found.left_out_by_policy, found.excluded


# External snapshots, by the shape of a second disk


@pytest.mark.parametrize(
    ("disk", "policy", "state"),
    [
        (RAW, EXTERNAL, DomainState.RUNNING),
        (RAW, EXTERNAL, OFF),
        (VOLUME, EXTERNAL, DomainState.RUNNING),
        (VOLUME, EXTERNAL, OFF),
        (BLOCK, ELSEWHERE, DomainState.RUNNING),
        (BLOCK, ELSEWHERE, OFF),
        (DEVICE_VOLUME, ELSEWHERE, OFF),
        (NETWORK, ELSEWHERE, DomainState.RUNNING),
        (NETWORK, ELSEWHERE, DomainState.PAUSED),
    ],
    ids=lambda value: value.source_type if isinstance(value, Disk) else "",
)
def test_an_external_snapshot_covers_it(disk: Disk, policy: Policy, state: DomainState) -> None:
    assert targets(cover(a_disk(), disk, policy=policy, state=state)) == (["vda", "vdb"], (), ())


@pytest.mark.parametrize("disk", [CDROM, EMPTY_CDROM, NETWORK_CDROM, FLOPPY, READ_ONLY_FLOPPY, READ_ONLY, LEFT_OUT])
def test_an_external_snapshot_is_told_to_leave_it_out(disk: Disk) -> None:
    """Each is named: libvirt leaves some of them out by itself and puts an overlay on others."""
    assert targets(cover(disk, a_disk())) == (["vda"], (), (disk.target,))


@pytest.mark.parametrize(
    ("disk", "policy", "state", "fault"),
    [
        (TRANSIENT, ELSEWHERE, DomainState.RUNNING, "is transient"),
        (SHARED, ELSEWHERE, DomainState.RUNNING, "is shared with other domains"),
        (BLOCK, EXTERNAL, DomainState.RUNNING, "is of type block: set overlay_directory in the policy"),
        (DEVICE_VOLUME, EXTERNAL, OFF, "is of type volume: set overlay_directory in the policy"),
        (NETWORK, EXTERNAL, DomainState.RUNNING, "is of type network: set overlay_directory in the policy"),
        (NETWORK, ELSEWHERE, OFF, "is of type network, which libvirt covers while the domain runs"),
        (LOST_VOLUME, ELSEWHERE, DomainState.RUNNING, "is of type volume, not a file or block device"),
        (NVME, ELSEWHERE, DomainState.RUNNING, "is of type nvme, not a file or block device"),
        (a_disk("vdb", path=None), EXTERNAL, OFF, "is of type file, not a file or block device"),
    ],
    ids=lambda value: value.source_type if isinstance(value, Disk) else "",
)
def test_no_external_snapshot_can_hold_it(disk: Disk, policy: Policy, state: DomainState, fault: str) -> None:
    assert cover(a_disk(), disk, policy=policy, state=state) == Refusal(
        RefusalReason.DISK, f"vdb {fault}; no external snapshot can hold it"
    )


def test_a_file_below_dev_is_a_device() -> None:
    found = cover(a_disk(path="/dev/mapper/vda"))
    assert isinstance(found, Refusal)
    assert "set overlay_directory" in found.detail


def test_all_unfit_disks_are_named_at_once() -> None:
    found = cover(a_disk("vda", transient=True), a_disk("vdb", shareable=True))
    assert isinstance(found, Refusal)
    assert found.detail.startswith("vda is transient; vdb is shared with other domains; ")


def test_what_a_policy_excludes_may_be_of_any_shape() -> None:
    policy = a_policy(disks=DiskSelection(exclude=("vdb",)))
    for disk in (TRANSIENT, SHARED, BLOCK, NETWORK, LOST_VOLUME, NVME):
        assert targets(cover(a_disk(), disk, policy=policy)) == (["vda"], ("vdb",), ("vdb",))


def test_an_external_snapshot_of_a_domain_with_uefi_is_fine() -> None:
    for state in (DomainState.RUNNING, OFF):
        assert isinstance(cover_disks(a_domain(pflash=True, state=state), EXTERNAL, ANY_LIBVIRT), Cover)


def test_a_driver_without_external_snapshots_is_refused_with_the_setting_that_helps() -> None:
    assert cover(a_disk(), capabilities=TEST_DRIVER) == Refusal(
        RefusalReason.UNSUPPORTED,
        "libvirt's test driver has no external snapshots; set kind: internal in the policy",
    )


# Internal snapshots, by the shape of a second disk


@pytest.mark.parametrize("disk", [CDROM, EMPTY_CDROM, NETWORK_CDROM, READ_ONLY_FLOPPY, READ_ONLY])
def test_an_internal_snapshot_passes_it_by_without_being_told(disk: Disk) -> None:
    assert targets(cover(disk, a_disk(), policy=INTERNAL)) == (["vda"], (), ())


@pytest.mark.parametrize("disk", [a_disk("vdb"), VOLUME, replace(BLOCK, format="qcow2"), DEVICE_VOLUME])
@pytest.mark.parametrize("state", [DomainState.RUNNING, OFF])
def test_an_internal_snapshot_covers_it(disk: Disk, state: DomainState) -> None:
    assert targets(cover(a_disk(), disk, policy=INTERNAL, state=state)) == (["vda", "vdb"], (), ())


@pytest.mark.parametrize(
    ("disk", "fault"),
    [
        (TRANSIENT, "vdb is transient"),
        (SHARED, "vdb is shared with other domains"),
        (LEFT_OUT, "vdb is left out by snapshot='no' in the domain's XML"),
        (NETWORK, "vdb is of type network"),
        (FLOPPY, "fda is a floppy: take it out, or make it read-only"),
        (replace(FLOPPY, format="qcow2"), "fda is a floppy: take it out, or make it read-only"),
        (RAW, "vdb has format raw, not qcow2"),
    ],
)
def test_no_internal_snapshot_can_hold_it(disk: Disk, fault: str) -> None:
    assert cover(a_disk(), disk, policy=INTERNAL) == Refusal(
        RefusalReason.DISK, f"{fault}; no internal snapshot can hold it"
    )


def test_the_test_driver_needs_no_qcow2() -> None:
    assert isinstance(cover(a_disk(format="raw"), policy=INTERNAL, capabilities=TEST_DRIVER), Cover)


def test_an_internal_snapshot_of_a_running_domain_with_uefi_is_refused() -> None:
    assert cover_disks(a_domain(pflash=True), INTERNAL, ANY_LIBVIRT) == Refusal(
        RefusalReason.UNSUPPORTED,
        "libvirt 11.3.0 takes no internal snapshot of a running domain with UEFI firmware; set kind: external in the "
        "policy",
    )


def test_an_internal_snapshot_of_a_shut_off_domain_with_uefi_depends_on_libvirt() -> None:
    domain = a_domain(pflash=True, state=OFF)
    old = Capabilities("qemu", "9.0.0", internal_with_pflash_offline=False)
    assert isinstance(cover_disks(domain, INTERNAL, old), Refusal)
    assert isinstance(cover_disks(domain, INTERNAL, ANY_LIBVIRT), Cover)


# Nothing to cover


@pytest.mark.parametrize("policy", [EXTERNAL, INTERNAL], ids=["external", "internal"])
@pytest.mark.parametrize("disks", [(), (CDROM, FLOPPY, READ_ONLY), (LEFT_OUT,)], ids=["none", "media", "left out"])
def test_a_domain_without_a_writable_disk_is_refused(policy: Policy, disks: tuple[Disk, ...]) -> None:
    assert cover(*disks, policy=policy) == Refusal(
        RefusalReason.DISK, "the domain has no writable disk, so there is nothing to snapshot"
    )


def test_a_policy_that_excludes_every_disk_is_refused() -> None:
    assert cover(CDROM, a_disk(), policy=a_policy(disks=DiskSelection(include=("sd?",)))) == Refusal(
        RefusalReason.DISK, "its policy excludes every disk, so there is nothing to snapshot"
    )


# What a policy chooses

THREE = (
    a_disk("vda", path="/images/web1.qcow2"),
    a_disk("vdb", path="/scratch/web1.img", format="raw"),
    a_disk("sda", path="/images/web1-log.qcow2"),
)


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (DiskSelection(), ["vda", "vdb", "sda"]),
        (DiskSelection(include=("vda",)), ["vda"]),
        (DiskSelection(include=("vd*",)), ["vda", "vdb"]),
        (DiskSelection(include=("/images/*",)), ["vda", "sda"]),
        (DiskSelection(include=("vdb", "/images/*-log.*")), ["vdb", "sda"]),
        (DiskSelection(exclude=("vdb",)), ["vda", "sda"]),
        (DiskSelection(exclude=("?da",)), ["vdb"]),
        (DiskSelection(exclude=("/scratch/*",)), ["vda", "sda"]),
        (DiskSelection(exclude=("*.img", "sda")), ["vda"]),
        (DiskSelection(include=("vd*",), exclude=("/scratch/*",)), ["vda"]),
        (DiskSelection(exclude=("vd", "VDA", "/images")), ["vda", "vdb", "sda"]),
    ],
)
def test_a_policy_chooses_by_target_and_by_source(selection: DiskSelection, chosen: list[str]) -> None:
    left_out = tuple(disk.target for disk in THREE if disk.target not in chosen)
    found = cover(*THREE, policy=a_policy(disks=selection))
    assert targets(found) == (chosen, left_out, left_out)


def test_what_would_take_no_part_anyway_is_not_told_as_left_out_by_the_policy() -> None:
    policy = a_policy(disks=DiskSelection(exclude=("sda", "vdb", "vdc")))
    assert targets(cover(CDROM, a_disk(), a_disk("vdb"), replace(LEFT_OUT, target="vdc"), policy=policy)) == (
        ["vda"],
        ("vdb",),
        ("sda", "vdb", "vdc"),
    )


@pytest.mark.parametrize(
    "selection",
    [
        DiskSelection(include=("/images/*",)),
        DiskSelection(exclude=("/scratch/*",)),
        DiskSelection(include=("/images/web1.qcow2", "/images/web1-log.qcow2")),
        DiskSelection(exclude=("/scratch/web1.img",)),
    ],
)
@pytest.mark.parametrize("directory", [None, "/overlays"])
@pytest.mark.parametrize("state", [DomainState.RUNNING, OFF])
def test_the_choice_stays_when_overlays_lie_on_the_disks_and_old_ones_are_deleted(
    selection: DiskSelection, directory: str | None, state: DomainState
) -> None:
    """Of a shut-off domain the XML names the active layer alone; the snapshots say what is below."""
    fake = FakeHypervisor()
    uuid = fake.add(a_domain(disks=THREE, state=state, agent_connected=False)).uuid
    policy = a_policy(disks=selection, overlay_directory=directory)
    everything = a_policy("all", overlay_directory="/elsewhere")
    for hour in range(6):
        for each in (policy, everything):
            slot = at(f"2026-11-22T{hour:02}:00")
            request = plan_take(fake.domain(uuid), each, fake.limits, slot=slot, now=slot)
            assert isinstance(request, TakeRequest)
            expected = ["vda", "sda"] if each is policy else ["vda", "vdb", "sda"]
            assert [target for target, _ in request.overlays] == expected
            fake.take_snapshot(request)
        if hour > 2:
            for name in fake.snapshot_names(uuid)[:2]:
                fake.delete_snapshot(uuid, name)


def test_what_a_policy_leaves_out_is_noted_in_the_mark_and_its_description() -> None:
    domain = a_domain(disks=(*THREE, replace(CDROM, target="sdb")))
    policy = a_policy(disks=DiskSelection(include=("vda",)))
    request = plan_take(domain, policy, ANY_LIBVIRT, slot=at("2026-11-22T12:00"), now=NOW)
    assert isinstance(request, TakeRequest)
    assert request.excluded == ("vdb", "sda", "sdb")
    assert request.mark.excluded == ("vdb", "sda")
    assert parse_mark(request.name, format_description(request.mark)) == request.mark


# Where files go


def an_overlay(domain: Domain, disk: Disk, policy: Policy = EXTERNAL, name: str = NAME) -> str:
    return overlay_path(domain, disk, policy, name)


def test_an_overlay_lies_beside_the_layer_it_covers() -> None:
    path = an_overlay(a_domain(), a_disk(path="/pool/a.b/web1.vda.older.qcow2"), name="newer")
    assert path == "/pool/a.b/web1.vda.newer.qcow2"


@pytest.mark.parametrize("directory", ["/overlays", "/overlays/"])
def test_with_an_overlay_directory_all_overlays_lie_there(directory: str) -> None:
    policy = a_policy(overlay_directory=directory)
    for disk in (a_disk("vdb"), BLOCK, NETWORK, VOLUME):
        assert an_overlay(a_domain(), disk, policy) == f"/overlays/web1.vdb.{NAME}.qcow2"


def test_two_disks_with_one_stem_get_different_overlays() -> None:
    a, b = a_disk("vda", path="/images/web1.img"), a_disk("vdb", path="/images/web1.qcow2")
    assert an_overlay(a_domain(), a) != an_overlay(a_domain(), b)


def test_characters_that_do_not_belong_in_file_names_become_underscores() -> None:
    domain = a_domain(name="a b/c:ä", uuid="12345678-0")
    assert an_overlay(domain, a_disk(path="/images/x"), name="s") == "/images/a_b_c__-12345678.vda.s.qcow2"
    assert memory_path(domain, a_disk(path="/images/x"), EXTERNAL, "s") == "/images/a_b_c__-12345678.s.mem"


def test_a_long_domain_name_still_gives_a_file_name_the_file_system_takes() -> None:
    longest = "kvmsnapd-" + "p" * 32 + "-20261122T120000Z-99"
    path = an_overlay(a_domain(name="x" * 300), a_disk(), name=longest)
    assert len(path.rsplit("/", 1)[1]) <= 255


@pytest.mark.parametrize(("one", "other"), [("web 1", "web_1"), ("x" * 100 + "a", "x" * 100 + "b"), ("a b", "a/b")])
def test_two_domains_in_one_folder_get_different_files(one: str, other: str) -> None:
    domains = a_domain(name=one, uuid="1111"), a_domain(name=other, uuid="2222")
    assert an_overlay(domains[0], a_disk()) != an_overlay(domains[1], a_disk())
    assert len({memory_path(domain, a_disk(), EXTERNAL, NAME) for domain in domains}) == 2


def test_overlays_and_memory_never_have_the_name_of_another_file() -> None:
    """All domains share one folder, and their names are made to be mistaken for parts of a path."""
    names = ["web1", "web1.vda", "web1.vdb", f"web1.{NAME}", "web1.mem", "vda", "web 1", "web1.vda.qcow2"]
    domains = [a_domain(name=name, uuid=f"{number}" * 8) for number, name in enumerate(names)]
    snapshots = [NAME, f"{NAME}-2", "kvmsnapd-vda-20261122T120000Z", "kvmsnapd-standard.vda-20261122T120000Z"]
    paths = [
        path
        for domain in domains
        for snapshot in snapshots
        for path in (
            memory_path(domain, a_disk("vda"), ELSEWHERE, snapshot),
            *(overlay_path(domain, a_disk(target), ELSEWHERE, snapshot) for target in ("vda", "vdb", "mem")),
        )
    ]
    assert len(set(paths)) == len(paths)


# The folders whose space and load count


def test_folders_are_told_once_and_that_of_the_ram_first() -> None:
    disks = (CDROM, a_disk("vdb", path="/fast/b"), a_disk("vda"), a_disk("vdc"), replace(LEFT_OUT, path="/no/x"))
    domain = a_domain(disks=disks)
    assert data_folders(domain, EXTERNAL) == ("/fast", "/images")
    assert data_folders(domain, INTERNAL) == ("/fast", "/images")
    assert data_folders(domain, ELSEWHERE) == ("/overlays",)
    assert data_folders(domain, a_policy(disks=DiskSelection(exclude=("vdb",)))) == ("/images",)


def test_devices_are_in_no_folder() -> None:
    assert data_folders(a_domain(disks=(BLOCK, a_disk("vdc", path="/dev/sdx"))), INTERNAL) == ()
    assert data_folders(a_domain(disks=(BLOCK,)), ELSEWHERE) == ("/overlays",)


def test_a_folder_whose_name_begins_like_that_of_devices_is_a_folder() -> None:
    assert data_folders(a_domain(disks=(a_disk(path="/development/web1.qcow2"),)), EXTERNAL) == ("/development",)


def test_the_overlays_of_a_network_disk_are_in_the_overlay_directory() -> None:
    assert data_folders(a_domain(disks=(NETWORK,)), ELSEWHERE) == ("/overlays",)


def test_a_snapshot_of_another_disk_says_nothing_about_this_ones_source() -> None:
    older = replace(a_snapshot(), covers=(("vdb", "/scratch/x"),), overlays=(("vdb", a_disk("vdb").path or ""),))
    domain = a_domain(older, disks=(a_disk("vda"), a_disk("vdb")))
    selection = DiskSelection(exclude=("/scratch/*",))
    assert [selection.excludes(domain, disk) for disk in domain.disks] == [False, True]


def test_another_disk_that_takes_the_name_of_an_excluded_one_is_covered() -> None:
    older = replace(a_snapshot(), covers=(("vdb", "/scratch/x"),), overlays=(("vdb", "/scratch/x.1"),))
    domain = a_domain(older, disks=(a_disk("vda"), a_disk("vdb", path="/images/database.qcow2")))
    assert not DiskSelection(exclude=("/scratch/*",)).excludes(domain, domain.disks[1])
