"""A year of one guest in a few minutes: what retention names survives, and every survivor holds its moment's data."""

from __future__ import annotations

import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import date, datetime, timedelta
from datetime import time as clock_time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.audit import audit
from kvmsnapd.diagnosis import Level
from kvmsnapd.events import (
    DeleteFailed,
    PruneBlocked,
    SnapshotDeleted,
    SnapshotFailed,
    SnapshotTaken,
)
from kvmsnapd.execute import Result
from kvmsnapd.forecast import forecast
from kvmsnapd.naming import format_name
from kvmsnapd.retention import parse_keep
from tests.builders import a_policy
from tests.lab.commands import run
from tests.lab.images import backing_chain, check_image, read_file_in_image
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsnapd.policy import Policy
    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

KIB = 1024
RECORD = 64 * KIB  # a cluster of qcow2: each record is in exactly one layer

# A year of weekdays, in a zone whose clock changes.
YEAR = a_policy(
    schedule="7 2 * * 1-5", timezone="Europe/Berlin", keep="last=2 daily=4 weekly=3 monthly=3", max_age="5d"
)
MIDNIGHT = datetime.combine(date(2026, 12, 31), clock_time(), YEAR.timezone) + timedelta(days=1)
PERSONS = {20: "before-upgrade", 130: "before-migration"}
"""After which of our takes a person takes one, and how it is called."""


def line(step: int) -> str:
    return f"step {step:04d} of the year\n"


def small_file(step: int) -> bytes:
    """Return what `/mnt/pattern` holds at a step: 24 kB."""
    text = line(step).encode()
    return (text * (24000 // len(text) + 1))[:24000]


def record(step: int) -> bytes:
    """Return what a step leaves on the second disk: 4 KiB."""
    text = line(step).encode()
    return (text * (4 * KIB // len(text) + 1))[: 4 * KIB]


def write_step(guest: Guest, step: int) -> None:
    """Write the numbered pattern: over the file on the first disk, and behind all earlier ones on the second."""
    words = line(step).strip()
    guest.execute(
        f"yes '{words}' | head -c 24000 >/mnt/pattern\n"
        f"yes '{words}' | head -c {4 * KIB} | dd of=/dev/vdb bs={4 * KIB} seek={step * RECORD // (4 * KIB)}\n"
        "sync"
    )


def write_file(guest: Guest, step: int) -> None:
    """Write the numbered pattern on the first disk alone."""
    guest.execute(f"yes '{line(step).strip()}' | head -c 24000 >/mnt/pattern; sync")


def expected_second_disk(step: int, size: int) -> bytes:
    """Return all bytes of the second disk at a step: a record of each step so far, and nothing else."""
    content = bytearray(size)
    for earlier in range(1, step + 1):
        content[earlier * RECORD : earlier * RECORD + 4 * KIB] = record(earlier)
    return bytes(content)


def whole_content(image: Path) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        raw = Path(directory, "raw")
        run("qemu-img", "convert", "-U", "-O", "raw", image, raw)
        return raw.read_bytes()


def record_of(guest: Guest, snapshot: str) -> bytes:
    """Return all that libvirt has written down about a snapshot but the layers below the ones it froze."""
    document = ET.fromstring(guest.libvirtd.virsh("snapshot-dumpxml", guest.name, snapshot))  # noqa: S314
    for disk in document.iter("disk"):
        for layers in disk.findall("backingStore"):
            disk.remove(layers)
    return ET.tostring(document)


def frozen_layers(guest: Guest, snapshot: str) -> list[Path]:
    """Return the images that hold the guest's disks as they were at this snapshot, by the record in libvirt."""
    document = ET.fromstring(guest.libvirtd.virsh("snapshot-dumpxml", guest.name, snapshot))  # noqa: S314
    return [Path(source.attrib["file"]) for source in document.iterfind("domain/devices/disk/source")]


def assert_holds(guest: Guest, snapshot: str, step: int) -> None:
    first, second = frozen_layers(guest, snapshot)
    assert read_file_in_image(first, "/pattern") == small_file(step), snapshot
    assert whole_content(second) == expected_second_disk(step, guest.size_mib << 20), snapshot


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "runs") as found:
        yield found


@pytest.mark.timeout(900)
def test_after_a_year_each_snapshot_that_is_left_holds_its_moment_byte_for_byte(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(disks=2)
    runs.now = MIDNIGHT
    began = time.monotonic()
    step_of: dict[str, int] = {}
    records: dict[str, bytes] = {}
    deepest = 0
    for step in range(1, 262):
        write_step(guest, step)
        ran = runs.run(guest, YEAR)
        assert ran.outcome.result is Result.TAKEN, ran.events
        step_of[str(ran.outcome.snapshot)] = step
        if step in PERSONS:
            name = PERSONS[step]
            guest.libvirtd.virsh("snapshot-create-as", guest.name, name, "--disk-only")
            step_of[name] = step
            records[name] = record_of(guest, name)
        deepest = max(deepest, len(guest.snapshots))
    end = datetime.combine(date(2028, 1, 1), clock_time(), YEAR.timezone)
    assert MIDNIGHT < runs.now < end <= YEAR.schedule.next_slot(runs.now)
    taken, deleted = ([e for e in runs.events if isinstance(e, kind)] for kind in (SnapshotTaken, SnapshotDeleted))
    took = time.monotonic() - began
    print(f"{len(taken)} taken and {len(deleted)} deleted in {took:.0f} s, {deepest} layers at the most")
    assert len(taken) == 261
    assert {event.consistency for event in taken} == {"filesystem"}
    assert [event for event in runs.events if isinstance(event, (SnapshotFailed, DeleteFailed))] == []

    # What stays is what the forecast says, and below each of the person's the one that it stands on.
    *_, last_day = forecast(YEAR, start=MIDNIGHT, days=365)
    wanted = {format_name(YEAR.name, slot) for slot in last_day.slots}
    waiting = {name for name, step in step_of.items() if step in PERSONS and name not in records}
    assert len(waiting) == 2
    assert not wanted & waiting
    assert set(guest.snapshots) == wanted | waiting | set(records)
    assert len(deleted) == 261 - len(wanted) - len(waiting)
    reasons = {reason for event in runs.events if isinstance(event, PruneBlocked) for reason in event.blocked}
    assert reasons == {"foreign_child"}
    for name in guest.snapshots:
        assert_holds(guest, name, step_of[name])
    assert {name: record_of(guest, name) for name in records} == records
    assert deepest < YEAR.max_chain_depth
    assert_in_order(guest, layers=len(guest.snapshots) + 1)
    # The guest goes on, with the data of its last step.
    assert guest.alive()
    assert not guest.frozen()
    assert guest.read("/mnt/pattern") == small_file(261)
    seen = audit(runs.host, runs.fleet({guest: (YEAR,)}), intents=runs.intents.outstanding(), now=runs.now)
    assert [finding for finding in seen.findings if finding.level is not Level.NOTE] == []


def assert_in_order(guest: Guest, *, layers: int) -> None:
    """Assert that each disk has so many layers, each in order, and that the folder has no other file."""
    chains = [backing_chain(guest.active_image(target)) for target in guest.targets]
    assert [len(chain) for chain in chains] == [layers] * guest.disks
    files = {layer for chain in chains for layer in chain}
    assert {*guest.directory.iterdir()} == {guest.console, *files}
    for layer in files:
        check_image(layer)


DAILY = a_policy(schedule="7 2 * * *", keep="last=3", max_age="3d")


def test_a_guest_shut_down_for_a_while_costs_one_snapshot_and_goes_on(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(disks=2)
    step_of: dict[str, int] = {}

    def taken_at(step: int) -> None:
        write_step(guest, step)
        ran = runs.run(guest, DAILY)
        assert ran.outcome.result is Result.TAKEN
        step_of[str(ran.outcome.snapshot)] = step

    taken_at(1)
    taken_at(2)
    write_step(guest, 3)
    guest.destroy()
    results = [runs.run(guest, DAILY).outcome for _ in range(5)]
    step_of[str(results[0].snapshot)] = 3
    assert [outcome.result for outcome in results] == [Result.TAKEN] + [Result.UNCHANGED] * 4
    assert {outcome.snapshot for outcome in results} == {results[0].snapshot}
    guest.start()
    guest.wait_up()
    for step in (4, 5, 6):
        taken_at(step)
    assert [step_of[name] for name in guest.snapshots] == [4, 5, 6]
    for name in guest.snapshots:
        assert_holds(guest, name, step_of[name])
    assert guest.alive()


def test_a_guest_that_is_always_off_has_one_snapshot_that_serves_all_slots(
    make_guest: Callable[..., Guest], runs: Runs, tmp_path: Path
) -> None:
    guest = make_guest(running=False)

    def served(runs: Runs) -> tuple[datetime | None, datetime | None]:
        """Return the slot that is due, and the time of the last success."""
        (pair,) = runs.fleet({guest: (DAILY,)}).pairs
        return pair.due.slot, pair.last_success_at

    results = []
    for _ in range(30):
        results.append(runs.run(guest, DAILY).outcome.result)
        assert served(runs) == (None, runs.now)
    assert results == [Result.TAKEN] + [Result.UNCHANGED] * 29
    (first,) = guest.snapshots
    # A new process, without the old one's files, knows all of it from libvirt alone.
    with Runs(runs.uri, tmp_path / "elsewhere", now=runs.now + timedelta(hours=1)) as again:
        assert served(again) == (None, runs.now)
        assert again.run(guest, DAILY, slots=0).outcome.result is Result.NOTHING_DUE
        assert again.run(guest, DAILY).outcome.result is Result.UNCHANGED
        assert served(again) == (None, again.now)
        runs.now = again.now
    assert guest.snapshots == [first]
    for step in range(1, 5):
        assert results_after_a_write(guest, runs, DAILY, step) == [Result.TAKEN] + [Result.UNCHANGED] * 4
        (layer,) = frozen_layers(guest, guest.snapshots[-1])
        assert read_file_in_image(layer, "/pattern") == small_file(step)
    for layer in backing_chain(guest.active_image()):
        check_image(layer)


def results_after_a_write(guest: Guest, runs: Runs, policy: Policy, step: int) -> list[Result]:
    """Return how five runs end after the guest was on for a while."""
    guest.start()
    guest.wait_up()
    write_file(guest, step)
    guest.destroy()
    return [runs.run(guest, policy).outcome.result for _ in range(5)]


def test_a_merge_just_below_the_newest_one_does_not_look_like_a_change_for_ever(
    make_guest: Callable[..., Guest], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make_guest(running=False)
    policy = replace(DAILY, keep=parse_keep("last=1"))
    real = runs.host.delete_snapshot

    def slow(domain_uuid: str, name: str) -> None:
        time.sleep(2)  # as on hosts where libvirt needs as long to start a QEMU, or much is to be merged
        real(domain_uuid, name)

    monkeypatch.setattr(runs.host, "delete_snapshot", slow)
    for step in (1, 2, 3):
        results = results_after_a_write(guest, runs, policy, step)
        assert results[0] is Result.TAKEN
        assert results[2:] == [Result.UNCHANGED] * 3
    assert len(guest.snapshots) <= (2 if runs.host.capabilities().delete_external_in_chain_offline else 3)
