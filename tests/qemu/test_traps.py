"""Twelve facts about libvirt that destroy data, freeze guests or stop everything, and that none of them catches us.

Source of each fact: measured with libvirt 9.0 and 11.3.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libvirt
import libvirt_qemu
import pytest

from kvmsnapd.audit import audit
from kvmsnapd.events import (
    DeleteFailed,
    DomainExamined,
    DomainThawed,
    PruneBlocked,
    RunSkipped,
    RunStuck,
    SnapshotFailed,
    SnapshotTaken,
)
from kvmsnapd.execute import Result
from kvmsnapd.gates import HostGate
from kvmsnapd.libvirt_host.storage import StoragePools
from kvmsnapd.model import Consistency, Kind
from kvmsnapd.policy import ConsistencyRule, Hook, Hooks
from kvmsnapd.refusal import RefusalReason
from tests.builders import a_policy
from tests.lab.commands import LabError, run
from tests.lab.daemon import DaemonProcess
from tests.lab.images import backing_chain, check_image, read_file_in_image
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmsnapd.diagnosis import Finding
    from kvmsnapd.model import Snapshot
    from kvmsnapd.policy import Policy
    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

DISK_ONLY, NO_METADATA = 16, 4
WITHIN_S = 60.0


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "state") as made:
        yield made


def foreign(name: str) -> str:
    return f"<domainsnapshot><name>{name}</name></domainsnapshot>"


def change(guest: Guest) -> None:
    """Let the disks of a shut-off guest look changed, or no further snapshot would be needed."""
    for target in guest.targets:
        os.utime(guest.active_image(target), (1, 1))


def newest(runs: Runs, guest: Guest) -> Snapshot:
    """Return our newest snapshot as kvmsnapd reads it."""
    own = [s for s in runs.host.domain(guest.domain.UUIDString()).snapshots if s.mark]
    return max(own, key=lambda s: s.name)


def findings(runs: Runs, guest: Guest, *policies: Policy) -> list[Finding]:
    """Return what the audit says of this guest and its files."""
    seen = audit(runs.host, runs.fleet({guest: policies}), intents=runs.intents.outstanding(), now=runs.now)
    return [f for f in seen.findings if f.subject == guest.name or f.subject.startswith(str(guest.directory))]


def wait_for(condition: Callable[[], Any], within_s: float = WITHIN_S) -> Any:  # noqa: ANN401
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def kill_at_once(process: int, libvirtd: Libvirtd) -> None:
    """Kill libvirtd by its known id: to look it up would take too long for a moment that passes."""
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: libvirtd.pid is None)


def state_and_reason(guest: Guest) -> tuple[int, int]:
    state, reason = guest.domain.state()
    return state, reason


def snapshots_in(image: Path) -> list[str]:
    """Return the names of the internal snapshots that a qcow2 file has, by the file's own word."""
    said = json.loads(run("qemu-img", "info", "-U", "--output=json", image))
    return sorted(snapshot["name"] for snapshot in said.get("snapshots", []))


# 1


def test_trap_1_the_longest_policy_name_is_taken_and_deleted_whatever_a_person_named_theirs(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    """Names outside [A-Za-z0-9._-] are refused for a running guest since libvirt 10.9, to take and to delete."""
    guest = make_guest(running=False, agent=False)
    person = "before: the upgrade @12:30, ä"
    guest.domain.snapshotCreateXML(foreign(person))
    guest.start()
    guest.wait_up()
    policy = a_policy("Az09._-" + "x" * 24 + ".", keep="last=1", kind=Kind.INTERNAL)
    assert len(policy.name) == 32
    taken = [runs.run(guest, policy).outcome for _ in range(3)]
    assert [(t.result, t.deleted) for t in taken] == [(Result.TAKEN, 0), (Result.TAKEN, 1), (Result.TAKEN, 1)]
    assert set(guest.snapshots) == {person, taken[-1].snapshot}
    assert set(snapshots_in(guest.images[0])) == {person, taken[-1].snapshot}
    # The name of a second attempt is one of the longest as well: somebody has the first one.
    slot = policy.schedule.next_slot(runs.now)
    guest.domain.snapshotCreateXML(foreign(f"kvmsnapd-{policy.name}-{slot:%Y%m%dT%H%M%SZ}"))
    ran = runs.run(guest, policy)
    assert ran.outcome.result is Result.TAKEN
    assert ran.outcome.snapshot == f"kvmsnapd-{policy.name}-{slot:%Y%m%dT%H%M%SZ}-2"
    assert ran.outcome.deleted == 1
    assert guest.alive()


# 2


def cut_off_while_ram_is_saved(runs: Runs, guest: Guest, policy: Policy) -> SnapshotFailed:
    """Kill libvirtd in the middle of an internal snapshot and start it; return what the run said of it."""
    libvirtd, domain = guest.libvirtd, guest.domain
    qemu, daemon = guest.pid, libvirtd.pid
    assert qemu is not None
    assert daemon is not None
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(runs.run, guest, policy)
        wait_for(lambda: domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED or running.done())
        os.kill(qemu, signal.SIGSTOP)
        try:
            assert not running.done(), "the snapshot was faster than this test"
            kill_at_once(daemon, libvirtd)
        finally:
            os.kill(qemu, signal.SIGCONT)
        ran = running.result(timeout=WITHIN_S)
    libvirtd.start()
    assert ran.outcome.result is Result.FAILED
    (failed,) = ran.of(SnapshotFailed)
    return failed


def test_trap_2_libvirtd_killed_in_an_internal_snapshot_of_a_running_guest(
    make_guest: Callable[..., Guest], runs: Runs, libvirtd: Libvirtd
) -> None:
    """The guest is then left paused for ever or destroyed half a second later, with an orphan in its qcow2 file.

    Which of the two depends on the moment (measured, libvirt 9.0 and 11.3: both do both).
    """
    guest = make_guest(memory_mib=384)
    guest.execute("dd if=/dev/urandom of=/run/fill bs=1M count=24; for n in 1 2 3 4; do cat /run/fill; done >/run/f")
    policy = a_policy(keep="last=3", kind=Kind.INTERNAL, max_pause=timedelta(minutes=1))
    failed = cut_off_while_ram_is_saved(runs, guest, policy)
    assert failed.reason == "connection"
    assert "not known yet" in failed.error
    deadline = time.monotonic() + 5
    while guest.state != libvirt.VIR_DOMAIN_SHUTOFF and time.monotonic() < deadline:
        time.sleep(0.05)
    before = state_and_reason(guest)
    assert guest.snapshots == []
    if before[0] == libvirt.VIR_DOMAIN_SHUTOFF:
        assert before[1] == libvirt.VIR_DOMAIN_SHUTOFF_DAEMON
        consistency = Consistency.OFFLINE
    else:
        assert before == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SAVE)
        for _ in range(2):
            ran = runs.run(guest, policy, slots=0)
            (skipped,) = ran.of(RunSkipped)
            assert (ran.outcome.result, skipped.reason) == (Result.SKIPPED, RefusalReason.STATE)
            assert "did not finish" in skipped.detail
            assert not ran.outcome.quarantined
        assert state_and_reason(guest) == before  # nobody has healed it by force
        (way_out, *_) = [finding.command for finding in findings(runs, guest, policy) if finding.command]
        assert way_out == f"virsh resume {guest.name}"
        libvirtd.virsh(*shlex.split(way_out)[1:])
        assert guest.alive()
        consistency = Consistency.MEMORY

    ran = runs.run(guest, policy, slots=0)
    assert ran.outcome.result is Result.TAKEN
    # Not the orphan's name: the file would have it twice, and libvirt would delete one of them.
    assert ran.outcome.snapshot == f"{failed.snapshot}-2"
    assert guest.snapshots == [ran.outcome.snapshot]
    inside = snapshots_in(guest.images[0])
    assert (inside.count(ran.outcome.snapshot), inside.count(failed.snapshot)) in {(1, 0), (1, 1)}
    mark = newest(runs, guest).mark
    assert mark is not None
    assert mark.consistency is consistency
    assert runs.run(guest, policy, slots=0).outcome.result is Result.NOTHING_DUE  # the slot is not taken twice
    assert (guest.state == libvirt.VIR_DOMAIN_RUNNING) is (consistency is Consistency.MEMORY)


# 3


def test_trap_3_a_managed_saved_guest_is_left_alone_until_it_is_started(
    make_guest: Callable[..., Guest], runs: Runs, libvirtd: Libvirtd
) -> None:
    """It is 'shut off', each snapshot succeeds, and its next start writes into what the snapshot has frozen."""
    guest = make_guest()
    for _ in range(2):
        assert runs.run(guest, a_policy(keep="last=2")).outcome.result is Result.TAKEN
    names = guest.snapshots
    libvirtd.virsh("managedsave", guest.name)
    disks = {path: path.read_bytes() for path in guest.directory.glob("*.qcow2")}
    policy = a_policy(keep="last=1")  # something is there to be pruned, too
    for _ in range(2):
        ran = runs.run(guest, policy)
        (skipped,) = ran.of(RunSkipped)
        assert (ran.outcome.result, skipped.reason) == (Result.SKIPPED, RefusalReason.MANAGED_SAVE)
        assert f"virsh start {guest.name}" in skipped.detail
    assert any("managed_save" in finding.text for finding in findings(runs, guest, policy))
    assert guest.snapshots == names
    assert {path: path.read_bytes() for path in guest.directory.glob("*.qcow2")} == disks

    libvirtd.virsh("start", guest.name)
    wait_for(guest.agent_answers)  # and not that it boots: it goes on where it was
    ran = runs.run(guest, policy, slots=0)
    assert (ran.outcome.result, ran.outcome.deleted) == (Result.TAKEN, 2)
    assert [event.consistency for event in ran.of(SnapshotTaken)] == [Consistency.FILESYSTEM]
    guest.write("/mnt/after", b"still writable")
    check_image(guest.active_image())


# 4


def test_trap_4_a_tree_of_both_kinds_is_neither_added_to_nor_pruned(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    """An external snapshot in whose overlay an internal one lives is deleted all the same, and that one's data lost."""
    guest = make_guest(agent=False, boots=False)
    external, internal = a_policy("disks", keep="last=2"), a_policy("whole", keep="last=1", kind=Kind.INTERNAL)
    for _ in range(2):
        assert runs.run(guest, external).outcome.result is Result.TAKEN
    guest.domain.snapshotCreateXML(foreign("person"))
    tree = guest.snapshots
    assert len(tree) == 3
    fewer = a_policy("disks", keep="last=1")
    for policy in (fewer, internal):
        ran = runs.run(guest, policy)
        assert (ran.outcome.result, ran.outcome.deleted) == (Result.SKIPPED, 0)
        assert [event.reason for event in ran.of(RunSkipped)] == [RefusalReason.MIXED_KINDS]
        assert ran.outcome.quarantined
    assert guest.snapshots == tree
    assert snapshots_in(guest.active_image()) == ["person"]
    assert any("mixed_kinds" in finding.text for finding in findings(runs, guest, fewer))

    # The other way round: a person's external one above internal ones of ours.
    other = make_guest(running=False, agent=False)
    for _ in range(2):
        assert runs.run(other, a_policy("whole", keep="last=2", kind=Kind.INTERNAL)).outcome.result is Result.TAKEN
        change(other)
    other.domain.snapshotCreateXML(foreign("person"), DISK_ONLY)
    change(other)
    tree = other.snapshots
    for policy in (internal, fewer):
        ran = runs.run(other, policy)
        assert (ran.outcome.result, ran.outcome.deleted) == (Result.SKIPPED, 0)
        assert [event.reason for event in ran.of(RunSkipped)] == [RefusalReason.MIXED_KINDS]
    assert other.snapshots == tree
    assert len(snapshots_in(other.images[0])) == 2


def test_trap_4_a_snapshot_of_the_other_kind_between_take_and_delete_stops_the_deletes(
    make_guest: Callable[..., Guest], runs: Runs, libvirtd: Libvirtd
) -> None:
    """What was planned a moment ago is looked at again just before each delete."""
    guest = make_guest(agent=False, boots=False)
    policy = a_policy(keep="last=1")
    assert runs.run(guest, policy).outcome.result is Result.TAKEN
    command = ("virsh", "--connect", libvirtd.uri, "snapshot-create-as", guest.name, "person")
    meddled = a_policy(keep="last=1", hooks=Hooks(after=Hook(command, timeout=timedelta(seconds=60))))
    ran = runs.run(guest, meddled)
    assert (ran.outcome.result, ran.outcome.deleted, ran.outcome.blocked) == (Result.TAKEN, 0, 1)
    assert [event.blocked for event in ran.of(PruneBlocked)] == [{"changed": 1}]
    assert len(guest.snapshots) == 3
    assert snapshots_in(guest.active_image()) == ["person"]


# 5


def test_trap_5_an_internal_snapshot_that_would_stop_the_guest_for_too_long_is_refused(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    """The guest stands still for as long as its RAM is written, and nothing can cut that short."""
    guest = make_guest(agent=False)
    policy = a_policy(kind=Kind.INTERNAL, max_pause=timedelta(milliseconds=100))
    for _ in range(2):
        ran = runs.run(guest, policy)
        (skipped,) = ran.of(RunSkipped)
        assert (ran.outcome.result, skipped.reason) == (Result.SKIPPED, RefusalReason.PAUSE)
    assert guest.snapshots == []
    assert guest.alive()
    guest.destroy()
    assert runs.run(guest, policy, slots=0).outcome.result is Result.TAKEN


# 6


def hang(guest: Guest) -> int:
    """Start the guest and stop its QEMU, so that each call that needs it blocks; return its process."""
    guest.start()
    assert guest.pid is not None
    os.kill(guest.pid, signal.SIGSTOP)
    return guest.pid


def go_on(processes: Iterable[int]) -> None:
    """Let them run again."""
    for process in processes:
        os.kill(process, signal.SIGCONT)


def test_trap_6_more_calls_that_hang_than_one_connection_bears_hold_up_nobody_else(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    """Five calls of one connection may wait for libvirt to answer; a sixth, whatever it is, is not even read."""
    well = make_guest(running=False, agent=False)
    hung = [make_guest(running=False, agent=False, boots=False) for _ in range(6)]
    policy = a_policy(keep="last=2", consistency=ConsistencyRule.CRASH)
    runs.executor.host_gate = HostGate(places=4, patience=timedelta(seconds=1))
    processes = [hang(guest) for guest in hung]
    with ThreadPoolExecutor(len(hung) + 2) as threads:
        try:
            stuck = [threads.submit(runs.run, guest, policy, slots=0) for guest in hung]
            wait_for(lambda: sum(isinstance(event, RunStuck) for event in runs.events) == len(hung))
            inventory = threads.submit(runs.host.inventory).result(timeout=20)
            assert {guest.name for guest in (well, *hung)} <= {domain.name for domain in inventory}
            ran = threads.submit(runs.run, well, policy, slots=0).result(timeout=20)
            assert ran.outcome.result is Result.TAKEN
            assert not any(run.done() for run in stuck)
        finally:
            go_on(processes)
        assert [run.result(timeout=WITHIN_S).outcome.result for run in stuck] == [Result.TAKEN] * len(hung)


def test_trap_6_a_daemon_all_of_whose_workers_hang_still_sees_and_tells(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, tmp_path: Path
) -> None:
    """Its ticks and its metrics go on, and so do the runs once the guests do."""
    hung = [make_guest(running=False, agent=False, boots=False) for _ in range(6)]
    every = "schedule: every 1h, splay: 0s, keep: {last: 3}, consistency: crash"
    domains = "".join(f"  {guest.name}: [standard]\n" for guest in hung)
    daemon = DaemonProcess(
        tmp_path / "daemon", libvirtd.uri, f"policies:\n  standard: {{{every}}}\ndomains:\n{domains}"
    )
    processes = [hang(guest) for guest in hung]
    tick = ("kvmsnapd_scheduler_last_tick_timestamp_seconds",)
    try:
        daemon.start()
        # The audit has looked at all, and four runs at theirs.
        daemon.wait_for(lambda: len(daemon.events("domain.examined")) == len(hung) + 4)
        seen = daemon.metrics()[tick]
        late = make_guest(running=False, agent=False)
        daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_domain_unprotected", late.name] == 1)
        daemon.wait_for(lambda: daemon.metrics()[tick] > seen + 2)
        assert daemon.metrics()["kvmsnapd_libvirt_up",] == 1
        assert daemon.events("run.finished") == []
        go_on(processes)
        daemon.wait_for(lambda: len(daemon.events("snapshot.taken")) == len(hung))
        assert daemon.kill(signal.SIGTERM) == 0
    finally:
        go_on(processes)
        daemon.kill()
    assert len({event["domain"] for event in daemon.events("snapshot.taken")}) == len(hung)


# 7


def left_frozen(runs: Runs, guest: Guest, libvirtd: Libvirtd) -> None:
    """Kill libvirtd in takes until one leaves the guest frozen; libvirtd runs when this returns."""
    policy = a_policy(keep="last=20", max_chain_depth=60)
    for _ in range(12):
        daemon, domain = libvirtd.pid, guest.domain
        assert daemon is not None
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(runs.run, guest, policy)
            while not running.done():
                if not runs.intents.outstanding():
                    continue
                asked = '{"execute": "guest-fsfreeze-status"}'
                if "frozen" in libvirt_qemu.qemuAgentCommand(domain, asked, 5, 0):
                    break
            kill_at_once(daemon, libvirtd)
            outcome = running.result(timeout=WITHIN_S).outcome
        libvirtd.start()
        wait_for(guest.agent_answers)
        if guest.frozen():
            assert outcome.result is Result.FAILED
            return
        runs.executor.thawer.thaw_all()
    pytest.fail("no take was cut off while the guest was frozen")


def test_trap_7_a_guest_left_frozen_is_thawed_by_the_next_life_of_the_daemon(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A libvirtd killed in a quiesced snapshot leaves the guest frozen for good, and nobody but us knows that."""

    def never(*_: object) -> None:
        pytest.fail("nobody undoes a freeze of ours if we end: libvirt's own flag does")

    monkeypatch.setattr(libvirt.virDomain, "fsFreeze", never)
    guest = make_guest(writer=True)
    uuid = guest.domain.UUIDString()
    with Runs(libvirtd.uri, tmp_path / "state") as first:
        left_frozen(first, guest, libvirtd)
        assert first.intents.outstanding() == [uuid]
        (problem,) = [f for f in findings(first, guest, a_policy()) if "left frozen" in f.text]
        assert problem.subject == guest.name
    with Runs(libvirtd.uri, tmp_path / "state", now=first.now) as second:
        second.executor.thawer.thaw_all()
        assert second.events == [DomainThawed(domain=guest.name, domain_uuid=uuid)]
        assert second.intents.outstanding() == []
        assert not guest.frozen()
        guest.write("/mnt/after", b"still writable")

        # A run that comes before the tick's thaw begins with it.
        left_frozen(second, guest, libvirtd)
        ran = second.run(guest, a_policy(keep="last=20", max_chain_depth=60))
        words = [event.NAME for event in ran.events]
        assert words.index(DomainThawed.NAME) < words.index(DomainExamined.NAME)
        assert not guest.frozen()

        # One that is shut off is not frozen any more.
        left_frozen(second, guest, libvirtd)
        guest.destroy()
        second.executor.thawer.thaw_all()
        assert second.intents.outstanding() == []


def test_trap_7_an_overlay_that_qemu_has_and_libvirt_does_not_know_is_not_called_rubbish(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    """A libvirtd killed in an external snapshot may not have noted that QEMU writes to the overlay by now.

    Done here with QEMU's own command, as the moment is short (measured: 1 of about 10 kills within a take).
    """
    guest = make_guest()
    policy = a_policy()
    slot = policy.schedule.next_slot(runs.now)
    overlay = guest.directory / f"{guest.name}.vda.kvmsnapd-standard-{slot:%Y%m%dT%H%M%SZ}.qcow2"
    monitor = partial(libvirt_qemu.qemuMonitorCommand, guest.domain)
    (block,) = json.loads(monitor('{"execute": "query-block"}', 0))["return"]
    arguments = {
        "node-name": block["inserted"]["node-name"],
        "snapshot-file": str(overlay),
        "snapshot-node-name": "unknown",
        "format": "qcow2",
    }
    said = json.loads(monitor(json.dumps({"execute": "blockdev-snapshot-sync", "arguments": arguments}), 0))
    assert "error" not in said, said
    guest.write("/mnt/precious", b"only in the overlay")
    assert guest.active_image() == guest.images[0]
    found = [finding for finding in findings(runs, guest, policy) if str(overlay) in (finding.subject, finding.text)]
    assert found
    assert [finding.command for finding in found if finding.command and finding.command.startswith("rm ")] == []


# 8


def test_trap_8_no_file_is_written_over_and_none_is_left_behind(make_guest: Callable[..., Guest], runs: Runs) -> None:
    """An existing memory file is written over without a word, and libvirt 9 leaves ours behind on delete."""
    guest = make_guest()
    policy = a_policy("ram", keep="last=1", consistency=ConsistencyRule.MEMORY, memory_live=True)
    slot = policy.schedule.next_slot(runs.now)
    name = f"kvmsnapd-ram-{slot:%Y%m%dT%H%M%SZ}"
    precious = guest.directory / f"{guest.name}.{name}.mem"
    precious.write_bytes(b"precious")
    ran = runs.run(guest, policy)
    (failed,) = ran.of(SnapshotFailed)
    assert (ran.outcome.result, failed.reason) == (Result.FAILED, "snapshot_exists")
    assert str(precious) in failed.error
    assert guest.snapshots == []
    assert guest.active_image() == guest.images[0]
    # An overlay is in the way of the second name.
    overlay = guest.directory / f"{guest.name}.vda.{name}-2.qcow2"
    overlay.write_bytes(b"precious as well")
    ran = runs.run(guest, policy, slots=0)
    assert (ran.outcome.result, [e.reason for e in ran.of(SnapshotFailed)]) == (Result.FAILED, ["snapshot_exists"])
    ran = runs.run(guest, policy, slots=0)
    assert (ran.outcome.result, ran.outcome.snapshot) == (Result.TAKEN, f"{name}-3")
    first = newest(runs, guest)
    assert first.memory_file is not None
    assert Path(first.memory_file).stat().st_size > 1_000_000
    assert sorted(precious.parent.glob("*.mem")) == sorted([precious, Path(first.memory_file)])

    ran = runs.run(guest, policy)
    assert (ran.outcome.result, ran.outcome.deleted) == (Result.TAKEN, 1)
    left = {precious, overlay, *map(Path, newest(runs, guest).files)}
    assert set(guest.directory.glob("*kvmsnapd*")) == left
    assert (precious.read_bytes(), overlay.read_bytes()) == (b"precious", b"precious as well")
    assert guest.alive()

    # Shut off, the overlays are of our own making.
    guest.destroy()
    slot = policy.schedule.next_slot(runs.now)
    third = guest.directory / f"{guest.name}.vda.kvmsnapd-ram-{slot:%Y%m%dT%H%M%SZ}.qcow2"
    third.write_bytes(b"precious in the end")
    ran = runs.run(guest, policy)
    assert (ran.outcome.result, [e.reason for e in ran.of(SnapshotFailed)]) == (Result.FAILED, ["snapshot_exists"])
    assert runs.run(guest, policy, slots=0).outcome.result is Result.TAKEN
    assert third.read_bytes() == b"precious in the end"


# 9


def test_trap_9_what_cannot_be_deleted_while_the_guest_is_off_waits_and_does_not_fail(
    make_guest: Callable[..., Guest], runs: Runs
) -> None:
    """Of a shut-off domain libvirt 9 deletes only the newest external snapshot: 'could not find base disk source'.

    With a newer libvirt it is the one below the newest that waits, as a merge would make the newest look changed.
    """
    guest = make_guest(running=False, agent=False)
    policy = a_policy(keep="last=1")
    old = runs.host.capabilities().version.startswith("9.")
    for number in range(3):
        change(guest)
        ran = runs.run(guest, policy)
        waiting = number if old else min(number, 1)
        assert ran.outcome.result is Result.TAKEN
        assert ran.outcome.blocked == waiting
        assert [event.blocked for event in ran.of(PruneBlocked)] == ([{"needs_running": waiting}] if waiting else [])
    left = 3 if old else 2
    assert len(guest.snapshots) == left
    guest.start()
    guest.wait_up()
    ran = runs.run(guest, policy)
    assert (ran.outcome.result, ran.outcome.deleted, ran.outcome.blocked) == (Result.TAKEN, left, 0)
    assert len(backing_chain(guest.active_image())) == 2
    assert [event for event in runs.events if isinstance(event, DeleteFailed)] == []
    check_image(guest.active_image())
    assert guest.alive()


# 10


@pytest.mark.parametrize("libvirtd", ["libvirt11"], indirect=True)
def test_trap_10_no_chain_becomes_deeper_than_libvirt_can_start(make_guest: Callable[..., Guest], runs: Runs) -> None:
    """With 26 external snapshots, which libvirt 11 takes, it cannot start the domain: 'nesting too deep'."""
    guest = make_guest(running=False, agent=False)
    greedy = a_policy(keep="last=100", max_chain_depth=150)
    ran = runs.run(guest, greedy)
    assert [event.reason for event in ran.of(RunSkipped)] == [RefusalReason.CHAIN_BUDGET]
    domain = guest.domain
    for number in range(23):
        domain.snapshotCreateXML(foreign(f"person{number}"), DISK_ONLY)
    policy = a_policy(keep="last=3", max_chain_depth=150)
    assert runs.run(guest, policy).outcome.result is Result.TAKEN
    for _ in range(2):
        change(guest)
        ran = runs.run(guest, policy)
        assert ran.outcome.result is Result.SKIPPED
        assert [event.reason for event in ran.of(RunSkipped)] == [RefusalReason.CHAIN_FULL]
    assert len(backing_chain(guest.active_image())) == 25
    assert any("is 24 deep and the limit is 24" in finding.text for finding in findings(runs, guest, policy))
    guest.start()
    guest.wait_up()
    assert guest.alive()


# 11


def test_trap_11_nobody_else_may_read_an_overlay(make_guest: Callable[..., Guest], runs: Runs) -> None:
    """Overlays of a shut-off domain that libvirt makes, before 11.10, are readable by everybody (CVE-2025-13193)."""
    guest = make_guest(running=False, agent=False, disks=2)
    policy = a_policy(keep="last=5", consistency=ConsistencyRule.FILESYSTEM_PREFERRED)
    umask = os.umask(0)
    try:
        assert runs.run(guest, policy).outcome.result is Result.TAKEN
    finally:
        os.umask(umask)
    guest.start()
    assert runs.run(guest, policy).outcome.result is Result.TAKEN
    overlays = list(guest.directory.glob("*.kvmsnapd-*"))
    assert len(overlays) == 4
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in overlays} == {"0o600"}


# 12


def ask(directory: Path, uri: str, policies: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the program with this configuration."""
    daemon = DaemonProcess(directory, uri, policies)
    daemon.write_config(policies)
    command = [sys.executable, "-m", "kvmsnapd", words[0], "--config", str(daemon.config), "--connect", uri, *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)


def doctor(directory: Path, uri: str, policies: str) -> tuple[int, dict[str, Any]]:
    """Return exit code and answer of `kvmsnapd doctor --json` with this configuration."""
    done = ask(directory, uri, policies, "doctor", "--json")
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_trap_12_a_domain_with_snapshots_can_be_let_go(
    make_guest: Callable[..., Guest], runs: Runs, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    """A domain with snapshots is neither migrated nor undefined; doctor says so, and names the way out."""
    guest = make_guest(disks=2)
    policy = a_policy(keep="last=5")
    patterns = [os.urandom(100_000) for _ in range(4)]
    for number, pattern in enumerate(patterns):
        guest.write(f"/mnt/pattern{number}", pattern)
        guest.execute(f"dd if=/mnt/pattern{number} of=/dev/vdb bs=1M seek={number} conv=notrunc,fsync")
        if number < 2:
            assert runs.run(guest, policy).outcome.result is Result.TAKEN
    guest.execute("sync")
    guest.destroy()
    assert runs.run(guest, policy).outcome.result is Result.TAKEN
    with pytest.raises(LabError, match="cannot delete inactive domain with 3 snapshots"):
        libvirtd.virsh("undefine", guest.name)
    one = "policies:\n  standard: {schedule: hourly, keep: {last: 5}}\n"
    _, answer = doctor(tmp_path / "doctor", libvirtd.uri, f"{one}domains:\n  {guest.name}: [standard]\n")
    said = [finding["text"] for finding in answer["findings"] if finding["subject"] == guest.name]
    assert any("3 snapshot(s)" in text and "migrate" in text and "`kvmsnapd forget`" in text for text in said), said

    done = ask(tmp_path / "doctor", libvirtd.uri, f"{one}domains:\n  {guest.name}: []\n", "forget", guest.name, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    _, answer = doctor(tmp_path / "doctor", libvirtd.uri, f"{one}domains:\n  {guest.name}: []\n")
    assert [f for f in answer["findings"] if guest.name in f["subject"]] == []
    libvirtd.virsh("undefine", guest.name)
    assert sorted(path.name for path in guest.directory.iterdir() if path.name != "console") == [
        "vda.qcow2",
        "vdb.qcow2",
    ]
    for image in guest.images:
        assert backing_chain(image) == [image]
        check_image(image)
    for number, pattern in enumerate(patterns):
        assert read_file_in_image(guest.images[0], f"/pattern{number}") == pattern
    raw = tmp_path / "vdb.raw"
    run("qemu-img", "convert", "-O", "raw", guest.images[1], raw)
    content = raw.read_bytes()
    assert [content[n << 20 : (n << 20) + 100_000] for n in range(4)] == patterns


# What libvirt does not even notice


@pytest.mark.parametrize("flags", [DISK_ONLY, DISK_ONLY | NO_METADATA], ids=["snapshot", "layer"])
def test_a_layer_put_on_in_the_moment_of_an_offline_take_is_not_lost(
    make_guest: Callable[..., Guest], runs: Runs, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    """Our overlay is made before libvirt is told of it: if it names what is below the other layer, that one is lost."""
    guest = make_guest(running=False, agent=False)
    between = guest.directory / "between.qcow2"
    create, meddled = StoragePools.create_overlay, []

    def create_late(pools: StoragePools, path: str, **below: str) -> bool:
        made = create(pools, path, **below)
        if not meddled:
            meddled.append(path)
            disk = f"<disk name='vda' snapshot='external' type='file'><source file='{between}'/></disk>"
            document = f"<domainsnapshot><name>person</name><disks>{disk}</disks></domainsnapshot>"
            guest.domain.snapshotCreateXML(document, flags)
        return made

    monkeypatch.setattr(StoragePools, "create_overlay", create_late)
    ran = runs.run(guest, a_policy(keep="last=3"))
    assert meddled
    assert ran.outcome.result is Result.TAKEN
    active = guest.active_image()
    assert active.name.endswith(f"{ran.outcome.snapshot}.qcow2")
    assert backing_chain(active) == [active, between, guest.images[0]]
    assert stat.S_IMODE(active.stat().st_mode) == 0o600
    guest.start()
    guest.wait_up()


def test_disks_of_a_storage_pool_taken_while_off_can_be_pruned(
    make_guest: Callable[..., Guest], runs: Runs, libvirtd: Libvirtd
) -> None:
    """A covered disk of type volume is compared with the file that it has become, and the delete refused for ever."""
    guest = make_guest(running=False, agent=False)
    connection = libvirtd.connect()
    pool = f"<pool type='dir'><name>{guest.name}</name><target><path>{guest.directory}</path></target></pool>"
    connection.storagePoolCreateXML(pool)
    source = f"<source file='{guest.images[0]}'/>"
    text = guest.domain.XMLDesc().replace('"', "'")
    assert source in text
    text = text.replace("<disk type='file'", "<disk type='volume'")
    connection.defineXML(text.replace(source, f"<source pool='{guest.name}' volume='{guest.images[0].name}'/>"))
    policy = a_policy(keep="last=1")
    for _ in range(2):
        assert runs.run(guest, policy).outcome.result is Result.TAKEN
        change(guest)
    guest.start()
    guest.wait_up()
    ran = runs.run(guest, policy)
    assert (ran.outcome.result, ran.outcome.blocked) == (Result.TAKEN, 0)
    assert [event for event in runs.events if isinstance(event, DeleteFailed)] == []
    assert guest.snapshots == [ran.outcome.snapshot]
    assert backing_chain(guest.active_image()) == [guest.active_image(), guest.images[0]]
    assert guest.alive()
