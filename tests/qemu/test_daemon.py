"""The whole way, for real: policies in, snapshots of guests taken and pruned, metrics out, whatever is killed."""

from __future__ import annotations

import os
import random
import signal
import time
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.naming import parse_name
from tests.lab.daemon import DaemonProcess
from tests.lab.images import backing_chain, check_image, read_file_in_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

FOREIGN = "<domainsnapshot><name>before-upgrade</name></domainsnapshot>"
DISK_ONLY, NO_METADATA = 16, 4


@pytest.fixture
def start_daemon(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Callable[[str], DaemonProcess]]:
    """Start daemons on the session's libvirtd with these policies; they are ended after the test."""
    started: list[DaemonProcess] = []

    def start(policies: str) -> DaemonProcess:
        daemon = DaemonProcess(tmp_path / f"daemon{len(started)}", libvirtd.uri, policies)
        started.append(daemon)
        daemon.start()
        return daemon

    yield start
    for daemon in started:
        daemon.kill()


def policy(guest: Guest, *, every: str, keep: str, more: str = "") -> str:
    return (
        f"policies:\n  standard: {{schedule: every {every}, splay: 0s, keep: {{{keep}}}{more}}}\n"
        f"domains:\n  {guest.name}: [standard]\n"
    )


def slots(guest: Guest) -> list[datetime]:
    """Return the slots of our snapshots, with repetitions if there are any."""
    return [parsed[1] for name in guest.snapshots if (parsed := parse_name(name))]


def frozen_layer(guest: Guest, snapshot: str) -> Path:
    """Return the image that holds the guest's first disk as it was at this snapshot."""
    document = ET.fromstring(guest.domain.snapshotLookupByName(snapshot).getXMLDesc())  # noqa: S314
    source = document.find("domain/devices/disk/source")
    assert source is not None
    return Path(source.attrib["file"])


def test_quiesced_snapshots_hold_the_pattern_of_their_moment_byte_for_byte(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess]
) -> None:
    guest = make_guest(writer=True)
    patterns: list[bytes] = [os.urandom(200_000)]
    guest.write("/mnt/pattern", patterns[0])
    time.sleep(5.5 - time.time() % 5)  # the first snapshot catches up at once; the second must not follow on its heels
    daemon = start_daemon(policy(guest, every="5s", keep="last: 3", more=", consistency: filesystem"))
    held: dict[str, bytes] = {}
    for count in range(1, 7):
        # As soon as a snapshot is there the next pattern is written, seconds before the next slot.
        taken = daemon.wait_for(lambda count=count: (t := daemon.events("snapshot.taken"))[count - 1 :] and t)
        held[taken[-1]["snapshot"]] = patterns[-1]
        patterns.append(os.urandom(200_000))
        guest.write("/mnt/pattern", patterns[-1])
    daemon.wait_for(lambda: len(guest.snapshots) == 3)
    assert daemon.kill(signal.SIGTERM) == 0
    survivors = guest.snapshots
    assert set(survivors) <= set(held)
    assert survivors == sorted(held)[-3:]
    for name in survivors:
        layer = frozen_layer(guest, name)
        assert read_file_in_image(layer, "/pattern") == held[name]
        check_image(layer)
    assert guest.read("/mnt/pattern") == patterns[-1]
    assert guest.alive()
    assert len(backing_chain(guest.active_image())) == 4
    # No file is left of the snapshots that were deleted.
    left = {path.name for path in guest.directory.glob("*.kvmsnapd-*")}
    assert left == {path.name for path in backing_chain(guest.active_image())[:-1]}
    assert {event["consistency"] for event in daemon.events("snapshot.taken")} == {"filesystem"}
    assert guest.libvirtd.virsh("snapshot-list", guest.name).count("kvmsnapd-standard-") == 3


def test_killed_between_and_during_takes_it_takes_nothing_twice_and_catches_up_once(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess]
) -> None:
    guest = make_guest(writer=True)
    guest.domain.snapshotCreateXML(FOREIGN, DISK_ONLY)
    daemon = start_daemon(policy(guest, every="2s", keep="last: 23", more=", max_chain_depth: 60"))
    dice = random.Random(2026)  # noqa: S311  # repeatable
    intents = daemon.directory / "state/frozen"
    during = 0
    # Six rounds take fewer than `last: 23` on the slowest machine: nothing may be deleted here.
    for round_number in range(6):
        daemon.wait_for(lambda: daemon.new_events("snapshot.taken"))
        if round_number % 2:
            # The intent is on disk exactly while libvirt works on a quiesced take.
            daemon.wait_for(lambda: list(intents.iterdir()))
            daemon.kill()
            during += bool(list(intents.iterdir()))
        else:
            time.sleep(dice.uniform(0, 2))
            daemon.kill()
        daemon.start()
    assert during  # a take may end between the look and the kill, but not each time
    daemon.wait_for(lambda: daemon.new_events("snapshot.taken"))
    daemon.kill()

    before = set(slots(guest))
    down_at = datetime.now(UTC)
    time.sleep(9)
    daemon.start()
    first = daemon.wait_for(lambda: daemon.new_events("snapshot.taken"))[0]
    up_at = datetime.fromisoformat(first["timestamp"])
    daemon.kill(signal.SIGTERM)

    assert daemon.events("snapshot.deleted") == []  # so that a slot taken twice would still be seen
    assert [slot for slot, count in Counter(slots(guest)).items() if count > 1] == []
    taken = [event["scheduled_at"] for event in daemon.events("snapshot.taken")]
    assert len(taken) == len(set(taken))
    assert up_at - datetime.fromisoformat(first["scheduled_at"]) < timedelta(seconds=6)
    missed = [slot for slot in set(slots(guest)) - before if down_at < slot < up_at - timedelta(seconds=6)]
    assert missed == []
    assert "before-upgrade" in guest.snapshots
    assert not guest.frozen()
    assert guest.alive()
    assert list(intents.iterdir()) == []


def test_libvirtd_restarted_under_the_daemon_is_found_again(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess], libvirtd: Libvirtd
) -> None:
    guest = make_guest()
    daemon = start_daemon(policy(guest, every="3s", keep="last: 3"))
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_libvirt_up",] == 1)
    daemon.wait_for(lambda: guest.snapshots)
    libvirtd.kill()
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_libvirt_up",] == 0)
    libvirtd.start()
    back_at = datetime.now(UTC)
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_libvirt_up",] == 1)
    daemon.wait_for(lambda: [slot for slot in slots(guest) if slot > back_at])
    assert len(daemon.events("daemon.started")) == 1
    assert daemon.kill(signal.SIGTERM) == 0
    assert guest.alive()


def test_libvirtd_killed_inside_a_quiesced_take_leaves_no_guest_frozen(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess], libvirtd: Libvirtd
) -> None:
    guest = make_guest(writer=True)
    daemon = start_daemon(policy(guest, every="2s", keep="last: 23", more=", max_chain_depth: 60"))
    intents = daemon.directory / "state/frozen"
    for delay in (0.0, 0.02, 0.04, 0.06):
        daemon.wait_for(lambda: list(intents.iterdir()))
        time.sleep(delay)
        libvirtd.kill()
        libvirtd.start()
        daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_libvirt_up",] == 1)
        daemon.wait_for(lambda: not list(intents.iterdir()), within_s=40)
    daemon.kill(signal.SIGTERM)
    # A kill may come a moment too late for one freeze or another.
    assert len(daemon.events("domain.thawed")) >= 2
    assert not guest.frozen()
    guest.write("/mnt/after", b"still writable")
    assert len(slots(guest)) == len(set(slots(guest)))


def test_a_shut_off_guest_is_taken_once_and_again_when_it_runs(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess]
) -> None:
    guest = make_guest(running=False, agent=False)
    daemon = start_daemon(policy(guest, every="2s", keep="last: 2"))
    daemon.wait_for(lambda: len(daemon.events("snapshot.unchanged")) >= 4)
    assert [event["consistency"] for event in daemon.events("snapshot.taken")] == ["offline"]
    guest.start()
    guest.wait_up()
    daemon.wait_for(lambda: len(daemon.events("snapshot.deleted")) >= 2 and len(guest.snapshots) == 2)
    daemon.kill(signal.SIGTERM)
    assert not [event for event in daemon.events("snapshot.taken")[1:] if event["consistency"] == "offline"]
    check_image(guest.active_image())
    assert guest.alive()


def test_a_full_metrics_scrape_tells_what_virsh_tells(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess]
) -> None:
    guest = make_guest()
    daemon = start_daemon(policy(guest, every="1h", keep="last: 3") + "  no-such-domain: [standard]\n")
    key = (guest.name, "standard")
    scrape = daemon.wait_for(lambda: (m := daemon.metrics())["kvmsnapd_snapshots", *key] == 1 and m)
    created_at = int(
        ET.fromstring(guest.domain.snapshotLookupByName(guest.snapshots[0]).getXMLDesc()).findtext("creationTime", "")  # noqa: S314
    )
    assert abs(scrape["kvmsnapd_last_success_timestamp_seconds", *key] - created_at) < 3
    assert scrape["kvmsnapd_expected_interval_seconds", *key] == 3600
    assert scrape["kvmsnapd_max_age_seconds", *key] == 7200
    assert scrape["kvmsnapd_next_run_timestamp_seconds", *key] == slots(guest)[0].timestamp() + 3600
    assert scrape["kvmsnapd_snapshots_taken_total", "filesystem", *key] == 1
    assert scrape["kvmsnapd_domain_unprotected", guest.name] == 0
    assert scrape["kvmsnapd_domain_missing", "no-such-domain"] == 1
    assert scrape["kvmsnapd_policy_unmatched", "standard"] == 0


def test_a_layer_that_a_backup_program_stands_on_is_not_merged(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess]
) -> None:
    guest = make_guest()
    daemon = start_daemon(policy(guest, every="2s", keep="last: 2"))
    daemon.wait_for(lambda: len(daemon.events("snapshot.deleted")) == 1)
    below = guest.active_image()
    backup = f"""<domainsnapshot><name>backup</name><disks><disk name='vda' snapshot='external' type='file'>
        <source file='{guest.directory}/backup.qcow2'/></disk></disks></domainsnapshot>"""
    guest.domain.snapshotCreateXML(backup, DISK_ONLY | NO_METADATA)
    daemon.wait_for(lambda: any("foreign_layer" in e["blocked"] for e in daemon.events("prune.blocked")))
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_prune_blocked", guest.name, "standard", "foreign_layer"] == 1)
    daemon.kill(signal.SIGTERM)
    chain = backing_chain(guest.active_image())
    assert chain.index(guest.directory / "backup.qcow2") + 1 == chain.index(below)
    assert guest.alive()


def test_a_transient_guest_is_left_alone_with_a_reason(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess]
) -> None:
    guest = make_guest()
    guest.domain.undefine()
    daemon = start_daemon(policy(guest, every="2s", keep="last: 2"))
    (skipped, *_) = daemon.wait_for(lambda: daemon.events("run.skipped"))
    assert skipped["reason"] == "transient"
    assert guest.active_image() == guest.images[0]


def test_a_hung_libvirtd_is_noticed_and_found_again(
    make_guest: Callable[..., Guest], start_daemon: Callable[[str], DaemonProcess], libvirtd: Libvirtd
) -> None:
    guest = make_guest()
    daemon = start_daemon(policy(guest, every="2s", keep="last: 2"))
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_libvirt_up",] == 1)
    assert libvirtd.pid is not None
    os.kill(libvirtd.pid, signal.SIGSTOP)
    try:
        daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_libvirt_up",] == 0)
    finally:
        os.kill(libvirtd.pid, signal.SIGCONT)
    back_at = datetime.now(UTC)
    daemon.wait_for(lambda: [slot for slot in slots(guest) if slot > back_at])
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_libvirt_up",] == 1)
    assert daemon.kill(signal.SIGTERM) == 0
