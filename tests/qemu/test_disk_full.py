"""The disk is full: nothing is lost, the reason is told, nothing is left behind, and it goes on once there is space."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libvirt
import pytest

from kvmsnapd.audit import audit
from kvmsnapd.diagnosis import Level
from kvmsnapd.events import DeleteFailed, DomainExamined, PruneBlocked, RunSkipped, SnapshotFailed
from kvmsnapd.execute import Result
from kvmsnapd.model import Kind
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.retention import parse_keep
from tests.builders import a_policy
from tests.lab.commands import run
from tests.lab.guest import Guest
from tests.lab.images import backing_chain, read_file_in_image
from tests.lab.runs import Runs
from tests.lab.small_disk import ext4_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsnapd.diagnosis import Finding
    from kvmsnapd.policy import Policy
    from tests.lab.libvirtd import Libvirtd
    from tests.lab.small_disk import SmallDisk

pytestmark = pytest.mark.qemu

MIB = 1 << 20
FIRST, SECOND, THIRD = (os.urandom(30_000) for _ in range(3))
EXTERNAL = a_policy(keep="last=4")
INTERNAL = a_policy(keep="last=4", kind=Kind.INTERNAL)
WITH_RAM = a_policy(keep="last=4", consistency=ConsistencyRule.MEMORY, memory_live=True)


@dataclass(frozen=True)
class GuestWithAVoice(Guest):
    """A guest that is still heard when the disk with its images is full."""

    @property
    def console(self) -> Path:
        """Its serial line, on another disk."""
        return self.directory.parent.parent / f"{self.name}-console"


@pytest.fixture
def make_small_guest(libvirtd: Libvirtd, small_disk: SmallDisk) -> Iterator[Callable[..., Guest]]:
    """Make running guests on the small disk, which is empty again afterwards."""
    made: list[Guest] = []

    def make(*, running: bool = True, **options: Any) -> Guest:  # noqa: ANN401
        name = f"full{len(made)}"
        guest = GuestWithAVoice(libvirtd, name, small_disk.path / name, **options)
        made.append(guest)
        guest.define()
        guest.start()
        guest.wait_up()
        guest.write("/mnt/pattern", FIRST)
        if not running:
            guest.destroy()
        return guest

    yield make
    small_disk.relieve()
    libvirtd.start()
    for guest in made:
        guest.remove()
        guest.console.unlink(missing_ok=True)
    for pool in libvirtd.connect().listAllStoragePools():
        pool.destroy()
    assert list(small_disk.path.iterdir()) == []


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "runs") as found:
        yield found


@contextmanager
def meanwhile(runs: Runs, call: str, do: Callable[[], object]) -> Iterator[None]:
    """Have something happen just before each such call of the hypervisor."""
    real = getattr(runs.host, call)

    def first_that(*arguments: Any) -> Any:  # noqa: ANN401
        do()
        return real(*arguments)

    setattr(runs.host, call, first_that)
    try:
        yield
    finally:
        setattr(runs.host, call, real)


def state_of(guest: Guest) -> dict[str, Any]:
    """Return all that a failed call could have changed: records, definition, files, what is inside the images."""
    snapshots = {name: guest.libvirtd.virsh("snapshot-dumpxml", guest.name, name) for name in guest.snapshots}
    chains = [backing_chain(guest.active_image(target)) for target in guest.targets]
    inside = [
        json.loads(run("qemu-img", "info", "-U", "--output=json", layer)).get("snapshots", [])
        for chain in chains
        for layer in chain
    ]
    return {
        "snapshots": snapshots,
        "chains": chains,
        "inside": inside,
        "files": sorted(guest.directory.iterdir()),
        "definition": guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
        "state": guest.state,
    }


def frozen_layer(guest: Guest, snapshot: str) -> Path:
    record = ET.fromstring(guest.libvirtd.virsh("snapshot-dumpxml", guest.name, snapshot))  # noqa: S314
    source = record.find("domain/devices/disk/source")
    assert source is not None
    return Path(source.attrib["file"])


def assert_holds(guest: Guest, *patterns: bytes, but: int = 0) -> None:
    """Assert that all external snapshots but the oldest ones hold these, and that no layer is damaged."""
    layers = [frozen_layer(guest, name) for name in guest.snapshots[but:]]
    assert [read_file_in_image(layer, "/pattern") for layer in layers] == [*patterns]
    for layer in backing_chain(guest.active_image()):
        assert_undamaged(layer)


def assert_undamaged(image: Path) -> None:
    """Assert that an image is in order but for clusters that QEMU has lost count of, as it does on a full disk."""
    said = subprocess.run(["qemu-img", "check", "-U", image], capture_output=True, check=False)
    assert said.returncode in {0, 3}, said


def taken(runs: Runs, guest: Guest, policy: Policy, **options: int) -> None:
    ran = runs.run(guest, policy, **options)
    assert ran.outcome.result is Result.TAKEN, ran.events


def reason_of_failure(runs: Runs, guest: Guest, policy: Policy) -> str:
    ran = runs.run(guest, policy)
    assert ran.outcome.result is Result.FAILED, ran.events
    (failed,) = ran.of(SnapshotFailed)
    print(failed.reason, failed.error)
    return failed.reason


def findings(runs: Runs, guest: Guest, policy: Policy) -> list[Finding]:
    fleet = runs.fleet({guest: (policy,)})
    seen = audit(runs.host, fleet, intents=runs.intents.outstanding(), now=runs.now)
    return [finding for finding in seen.findings if finding.level is not Level.NOTE]


@pytest.mark.parametrize("running", [True, False], ids=["running", "off"])
def test_full_when_an_overlay_is_made(
    make_small_guest: Callable[..., Guest], runs: Runs, small_disk: SmallDisk, running: bool
) -> None:
    guest = make_small_guest(disks=2)
    taken(runs, guest, EXTERNAL)
    guest.write("/mnt/pattern", SECOND)
    if not running:
        guest.destroy()
    before = state_of(guest)
    # An empty overlay takes 192 KiB: no room at all, for a part of the first, for the first but not for the second.
    for leave in (0, 100 * 1024, 256 * 1024):
        small_disk.fill(leave)
        assert reason_of_failure(runs, guest, EXTERNAL) == "space"
        assert state_of(guest) == before
        small_disk.relieve()
    if running:
        assert guest.alive()
        assert not guest.frozen()
    assert runs.intents.outstanding() == []
    assert findings(runs, guest, EXTERNAL) == []
    taken(runs, guest, EXTERNAL, slots=0)
    assert_holds(guest, FIRST, SECOND)


@pytest.mark.parametrize("running", [True, False], ids=["running", "off"])
def test_full_in_a_merge(
    make_small_guest: Callable[..., Guest], runs: Runs, small_disk: SmallDisk, running: bool
) -> None:
    guest = make_small_guest()
    taken(runs, guest, EXTERNAL)
    big = os.urandom(8 * MIB)
    guest.write("/mnt/pattern", SECOND)
    guest.write("/mnt/big", big)  # to be merged into the oldest layer
    taken(runs, guest, EXTERNAL)
    guest.write("/mnt/pattern", THIRD)
    if not running:
        guest.destroy()
    two = replace(EXTERNAL, keep=parse_keep("last=2"))
    with meanwhile(runs, "delete_snapshot", lambda: small_disk.fill(MIB)):
        ran = runs.run(guest, two)
    assert ran.outcome.result is Result.TAKEN, ran.events
    assert ran.outcome.deleted == 0
    if running or runs.host.capabilities().delete_external_in_chain_offline:
        (failed,) = ran.of(DeleteFailed)
        assert (failed.reason, "No space left" in failed.error) == ("merge", True)
    else:
        assert [dict(event.blocked) for event in ran.of(PruneBlocked)] == [{"needs_running": 1}]
    # Chain and data of all others are as they were; the one to be deleted is still there, with part of the newer data.
    assert len(guest.snapshots) == 3
    assert guest.state == (libvirt.VIR_DOMAIN_RUNNING if running else libvirt.VIR_DOMAIN_SHUTOFF)
    assert_holds(guest, SECOND, THIRD, but=1)
    assert {*guest.directory.iterdir()} == {*backing_chain(guest.active_image())}
    if running:
        assert guest.alive()
        assert guest.read("/mnt/pattern") == THIRD
    small_disk.relieve()
    # By another QEMU than the one whose merge failed, see the next test.
    guest.destroy()
    guest.start()
    guest.wait_up()
    ran = runs.run(guest, two)
    assert (ran.outcome.result, ran.outcome.deleted) == (Result.TAKEN, 2), ran.events
    assert_holds(guest, THIRD, THIRD)
    assert {*guest.directory.iterdir()} == {*backing_chain(guest.active_image())}
    assert guest.read("/mnt/big") == big
    assert findings(runs, guest, EXTERNAL) == []


def test_after_a_merge_that_failed_a_power_cut_loses_nothing(
    make_small_guest: Callable[..., Guest], runs: Runs, small_disk: SmallDisk
) -> None:
    # QEMU (7.2 and 10.0) writes the base's tables no more once a merge into it has met a full disk. The next merge
    # succeeds, libvirt deletes the overlay, and its data can be found by this one QEMU alone, until it ends properly.
    guest = make_small_guest()
    taken(runs, guest, EXTERNAL)
    guest.write("/mnt/pattern", SECOND)
    guest.write("/mnt/big", os.urandom(8 * MIB))
    taken(runs, guest, EXTERNAL)
    guest.write("/mnt/pattern", THIRD)
    two = replace(EXTERNAL, keep=parse_keep("last=2"))
    with meanwhile(runs, "delete_snapshot", lambda: small_disk.fill(MIB)):
        assert [event.reason for event in runs.run(guest, two).of(DeleteFailed)] == ["merge"]
    small_disk.relieve()
    taken(runs, guest, two)
    assert guest.pid
    os.kill(guest.pid, signal.SIGKILL)
    while guest.state != libvirt.VIR_DOMAIN_SHUTOFF:
        time.sleep(0.1)
    assert_holds(guest, THIRD, THIRD, but=len(guest.snapshots) - 2)
    assert read_file_in_image(guest.active_image(), "/pattern") == THIRD


def test_full_while_the_ram_is_saved_beside_a_running_guest(
    make_small_guest: Callable[..., Guest], runs: Runs, small_disk: SmallDisk
) -> None:
    guest = make_small_guest()
    taken(runs, guest, WITH_RAM)
    guest.write("/mnt/pattern", SECOND)
    before = state_of(guest)
    with meanwhile(runs, "take_snapshot", lambda: small_disk.fill(20 * MIB)):
        assert reason_of_failure(runs, guest, WITH_RAM) == "space"
    assert state_of(guest) == before
    assert guest.alive()
    small_disk.relieve()
    assert findings(runs, guest, WITH_RAM) == []
    taken(runs, guest, WITH_RAM)
    assert_holds(guest, FIRST, SECOND)
    assert len([*guest.directory.glob("*.mem")]) == 2


@pytest.mark.parametrize("running", [True, False], ids=["running", "off"])
def test_full_when_an_internal_snapshot_is_taken(
    make_small_guest: Callable[..., Guest], runs: Runs, small_disk: SmallDisk, running: bool
) -> None:
    guest = make_small_guest()
    taken(runs, guest, INTERNAL)
    guest.write("/mnt/pattern", SECOND)
    if not running:
        guest.destroy()
    before = state_of(guest)
    with meanwhile(runs, "take_snapshot", lambda: small_disk.fill(20 * MIB if running else 0)):
        # Of a running guest's RAM QEMU says "Input/output error", and libvirt does not know why either.
        assert reason_of_failure(runs, guest, INTERNAL) == ("libvirt" if running else "space")
    assert state_of(guest) == before
    assert not running or guest.alive()
    small_disk.relieve()
    assert findings(runs, guest, INTERNAL) == []
    taken(runs, guest, INTERNAL)
    guest.destroy()
    image = guest.active_image()
    assert_undamaged(image)
    for name, pattern in zip(guest.snapshots, (FIRST, SECOND), strict=True):
        copy = guest.console.with_name("copy")
        run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-O", "qcow2", image, copy)
        assert read_file_in_image(copy, "/pattern") == pattern


def test_a_guest_that_qemu_paused_on_a_full_disk_is_told_of_and_left_alone(
    make_small_guest: Callable[..., Guest], runs: Runs, small_disk: SmallDisk
) -> None:
    guest = make_small_guest()
    taken(runs, guest, EXTERNAL)
    small_disk.fill()
    guest.ask_agent("guest-exec", path="/bin/sh", arg=["-c", "head -c 8000000 /dev/urandom >/mnt/more; sync"])
    deadline = time.monotonic() + 30
    while guest.state != libvirt.VIR_DOMAIN_PAUSED and time.monotonic() < deadline:
        time.sleep(0.1)
    paused = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
    assert guest.domain.state() == paused
    before = state_of(guest)
    ran = runs.run(guest, EXTERNAL)
    (skipped,) = ran.of(RunSkipped)
    assert (ran.outcome.result, skipped.reason, skipped.quarantined) == (Result.SKIPPED, "state", False)
    assert "I/O error" in skipped.detail
    assert state_of(guest) == before
    told = [finding for finding in findings(runs, guest, EXTERNAL) if finding.command]
    assert [finding.command for finding in told] == [f"virsh resume {guest.name}"]
    assert guest.domain.state() == paused

    small_disk.relieve()
    assert runs.run(guest, EXTERNAL).outcome.result is Result.SKIPPED
    assert guest.domain.state() == paused
    guest.libvirtd.virsh(*shlex.split(str(told[0].command))[1:])
    assert guest.alive()
    taken(runs, guest, EXTERNAL)
    assert_holds(guest, FIRST, FIRST)
    assert findings(runs, guest, EXTERNAL) == []


@pytest.mark.parametrize("running", [True, False], ids=["running", "off"])
@pytest.mark.parametrize(
    ("policy", "ram"), [(EXTERNAL, False), (WITH_RAM, True), (INTERNAL, True)], ids=["external", "ram", "internal"]
)
def test_with_less_than_min_free_nothing_is_touched(
    make_small_guest: Callable[..., Guest],
    runs: Runs,
    small_disk: SmallDisk,
    *,
    policy: Policy,
    ram: bool,
    running: bool,
) -> None:
    guest = make_small_guest(running=running)
    before = state_of(guest)
    policy = replace(policy, min_free_bytes=50 * MIB)
    need = 50 + (123 if ram and running else 0)  # 112 MiB of RAM and a tenth
    small_disk.fill((need - 10) * MIB)
    with meanwhile(runs, "take_snapshot", lambda: pytest.fail("asked for a snapshot")):
        ran = runs.run(guest, policy)
    (skipped,) = ran.of(RunSkipped)
    assert (ran.outcome.result, skipped.reason, skipped.quarantined) == (Result.SKIPPED, "space", False)
    assert f"{guest.directory} has {need - 10} MiB free and {need} MiB are needed" in skipped.detail
    assert ("123 MiB for the guest's RAM" in skipped.detail) == (ram and running)
    assert state_of(guest) == before
    assert [finding.subject for finding in findings(runs, guest, policy)] == [guest.name]
    small_disk.relieve()
    small_disk.fill((need + 10) * MIB)
    taken(runs, guest, policy, slots=0)


def test_free_is_what_others_than_root_may_use(make_guest: Callable[..., Guest], runs: Runs, tmp_path: Path) -> None:
    guest = make_guest(running=False)
    with ext4_at(tmp_path / "ext4", size_mib=64, reserved_percent=40):
        seen = os.statvfs(tmp_path / "ext4")
        for_root, for_others = seen.f_bfree * seen.f_frsize, seen.f_bavail * seen.f_frsize
        assert for_root > for_others + 16 * MIB
        between = replace(EXTERNAL, overlay_directory=str(tmp_path / "ext4"), min_free_bytes=for_others + 8 * MIB)
        ran = runs.run(guest, between)
        (skipped,) = ran.of(RunSkipped)
        assert skipped.reason == "space"
        (examined, *_) = ran.of(DomainExamined)
        assert examined.free_bytes == {str(tmp_path / "ext4"): for_others}
        assert f"{for_others / MIB:.0f} MiB free" in skipped.detail
        assert guest.active_image() == guest.images[0]
