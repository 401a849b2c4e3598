"""Going back in place on real guests: the right state, what was to be kept is there, and the schedule goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.audit import audit
from kvmsnapd.diagnosis import Level
from kvmsnapd.execute import Result
from kvmsnapd.model import Hold, Kind
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.restorer import Restorer
from tests.builders import a_policy
from tests.lab.commands import LabError, run
from tests.lab.images import check_image, read_file_in_image
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsnapd.libvirt_host import LibvirtHost
    from kvmsnapd.model import Snapshot
    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

A, B, C = (bytes([letter]) * 200_000 for letter in b"ABC")
POLICIES = {
    "external": a_policy(keep="last=4"),
    "internal": a_policy(keep="last=4", kind=Kind.INTERNAL),
    "memory": a_policy(keep="last=4", consistency=ConsistencyRule.MEMORY, memory_live=True),
}


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "state") as made:
        yield made


def restorer(runs: Runs, said: list[str] | None = None) -> Restorer:
    runs.now += timedelta(minutes=1)
    lines = said if said is not None else []
    return Restorer(runs.host, lambda: runs.now, lines.append, shutdown_wait=timedelta(seconds=20))


def change(guest: Guest) -> None:
    """Let the disks of a shut-off guest look changed, or no further snapshot would be needed."""
    for target in guest.targets:
        os.utime(guest.active_image(target), (1, 1))


def snapshots(runs: Runs, guest: Guest) -> dict[str, Snapshot]:
    return {s.name: s for s in runs.host.domain(guest.domain.UUIDString()).snapshots}


def findings(runs: Runs, guest: Guest) -> list[str]:
    policy = POLICIES["external"]
    seen = audit(runs.host, runs.fleet({guest: (policy,)}), intents=[], now=runs.now)
    own = [f for f in seen.findings if f.subject == guest.name or f.subject.startswith(str(guest.directory))]
    return [f.text for f in own if f.level is not Level.NOTE]


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_guest_reads_a_the_kept_state_reads_b_and_the_schedule_goes_on(
    name: str, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    policy = POLICIES[name]
    guest = make_guest(disks=1 if name == "internal" else 2, size_mib=64)
    uuid = guest.domain.UUIDString()
    guest.write("/mnt/pattern", A)
    first = runs.run(guest, policy).outcome.snapshot
    taken = runs.run(guest, policy).outcome.snapshot
    assert first
    assert taken
    guest.write("/mnt/pattern", B)
    newer = runs.run(guest, policy).outcome.snapshot
    guest.write("/mnt/pattern", C)
    said: list[str] = []
    kept = restorer(runs, said).restore(uuid, taken, power_off=True)

    assert kept
    guest_is_up(guest)
    assert guest.read("/mnt/pattern") == A
    left = snapshots(runs, guest)
    assert set(left) == ({first, taken, kept} if name != "internal" else {first, taken, newer, kept})
    assert left[kept].mark
    assert left[kept].mark.hold == Hold(f"the state before the restore to {taken}")
    assert left[taken].mark
    assert left[taken].mark.restoring is None
    if name != "internal":
        assert read_file_in_image(runs_file(left[kept]), "/pattern") == C

    for number in range(10):
        ran = runs.run(guest, policy)
        assert ran.outcome.result is Result.TAKEN, (number, ran.events)
        assert ran.outcome.blocked == 0, (number, ran.events)
    assert kept in guest.snapshots
    assert len(guest.snapshots) == 5
    assert guest.read("/mnt/pattern") == A
    if name == "external":
        assert findings(runs, guest) == []
    guest.execute("sync")
    guest.destroy()
    for target in guest.targets:
        check_image(guest.active_image(target))

    back = restorer(runs).restore(uuid, kept, power_off=True, start=True)
    guest_is_up(guest)
    assert guest.read("/mnt/pattern") == C
    assert back
    for _ in range(2):
        assert runs.run(guest, policy).outcome.result is Result.TAKEN
    for held in (kept, back):
        runs.host.delete_snapshot(uuid, held)
    assert guest.read("/mnt/pattern") == C
    assert [path.name for path in guest.directory.iterdir() if back in path.name] == []
    if name == "external":
        assert findings(runs, guest) == []


class Killed(BaseException):
    """The end of the process, at a step of the test's choice."""


class Mortal:
    """A hypervisor whose user is killed before the n-th call that changes something."""

    CHANGES = frozenset(
        {
            "copy_file",
            "describe_snapshot",
            "forget_snapshot",
            "go_on_from",
            "power_off",
            "record_standalone",
            "remove_file",
            "revert_snapshot",
            "shut_down",
            "start",
            "take_snapshot",
        }
    )

    def __init__(self, host: LibvirtHost, step: int) -> None:
        self._host, self._left = host, step
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        call = getattr(self._host, name)
        if name not in self.CHANGES:
            return call

        def mortal(*arguments: object, **named: object) -> object:
            self._left -= 1
            self.called.append(name)
            if self._left == 0:
                raise Killed
            return call(*arguments, **named)

        return mortal


def write_from_outside(guest: Guest, letter: str) -> None:
    """Write a pattern to each disk of a guest that is off."""
    for target in guest.targets:
        run("qemu-io", "-c", f"write -q -P {ord(letter):#x} 0 256k", guest.active_image(target))


def holds(image: Path, letter: str) -> bool:
    try:
        run("qemu-io", "-U", "-r", "-c", f"read -P {ord(letter):#x} 0 256k", image)
    except LabError:
        return False
    return True


@pytest.mark.parametrize("kind", ["external", "internal"])
def test_killed_at_any_step_the_domain_is_whole_and_a_second_call_finishes_it(
    kind: str, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    """Each step is visited. To be killed after one is to be killed before the next."""
    policy = POLICIES[kind]
    visited: list[str] = []
    for step in range(1, 40):
        guest = make_guest(disks=2, boots=False, running=False, agent=False, size_mib=4)
        uuid = guest.domain.UUIDString()
        names = []
        for letter in "ABC":
            write_from_outside(guest, letter)
            change(guest)
            names.append(runs.run(guest, policy).outcome.snapshot or "")
        write_from_outside(guest, "D")
        change(guest)
        mortal = Mortal(runs.host, step)
        doomed = restorer(runs)
        doomed.hypervisor = mortal  # type: ignore[assignment]
        try:
            doomed.restore(uuid, names[1], start=False)
        except Killed:
            visited.append(mortal.called[-1])
        else:
            assert mortal.called[-1] == "describe_snapshot"
            break

        restoring = [s for s in snapshots(runs, guest).values() if s.mark and s.mark.restoring]
        assert [s.name for s in restoring] in ([], [names[1]])
        images = [guest.active_image(target) for target in guest.targets]
        assert all(holds(image, "D") for image in images) or all(holds(image, "B") for image in images)
        if restoring:
            assert any(f"`kvmsnapd restore {guest.name} {names[1]}`" in text for text in findings(runs, guest))
            assert runs.run(guest, policy).outcome.result is Result.SKIPPED  # the schedule builds on no half of it
        guest.domain.create()
        guest.domain.destroy()

        restorer(runs).restore(uuid, names[1], start=False)
        assert all(holds(guest.active_image(target), "B") for target in guest.targets), mortal.called
        kept = [s for s in snapshots(runs, guest).values() if s.mark and s.mark.hold]
        assert kept
        if kind == "external":
            assert any(holds(Path(path), "D") for s in kept for _, path in s.covers), mortal.called
            assert findings(runs, guest) == [], mortal.called
        write_from_outside(guest, "E")
        change(guest)
        assert runs.run(guest, policy).outcome.result is Result.TAKEN, mortal.called
        guest.remove()
    assert set(visited) >= (
        {"describe_snapshot", "copy_file", "record_standalone", "go_on_from", "forget_snapshot", "remove_file"}
        if kind == "external"
        else {"describe_snapshot", "take_snapshot", "revert_snapshot"}
    )


def guest_is_up(guest: Guest) -> None:
    for _ in range(600):
        if guest.agent_answers():
            return
        time.sleep(0.1)
    raise AssertionError(guest.state)


def runs_file(snapshot: Snapshot) -> Path:
    return Path(dict(snapshot.covers)["vda"])


# The command, killed and stopped


@pytest.fixture
def command(libvirtd: Libvirtd, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the program as a person does, on the same locks as the runs have."""
    config = tmp_path / "kvmsnapd.yaml"
    config.write_text(
        "policies: {standard: {schedule: hourly, keep: {last: 4}}}\ndomains: {}\n"
        f"runtime_directory: {tmp_path}/state\nstate_directory: {tmp_path}/state\n"
    )

    def start(word: str, *words: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-m", "kvmsnapd", word, "--config", str(config), "--connect", libvirtd.uri, *words]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_stopped_in_the_copy_the_domain_starts_and_a_second_call_goes_back(
    how: signal.Signals, make_guest: Callable[..., Guest], runs: Runs, command: Callable[..., subprocess.Popen[str]]
) -> None:
    guest = make_guest(boots=False, running=False, agent=False, size_mib=600)
    write_from_outside(guest, "A")
    change(guest)
    name = runs.run(guest, POLICIES["external"]).outcome.snapshot or ""
    write_from_outside(guest, "B")
    run("qemu-io", "-c", "write -q -P 0x55 1M 500M", guest.active_image())
    images = set(guest.directory.iterdir())
    words = ("restore", guest.name, name, "--yes", "--no-start")
    with command(*words) as process:
        while set(guest.directory.iterdir()) == images:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(how)
        said = process.communicate(timeout=60)[0]
    again = f"kvmsnapd restore {guest.name} {name}"
    if how is signal.SIGINT:
        assert process.returncode in {1, 130}
        assert f"`{again}` has finished it" in said
    assert any(again in text for text in findings(runs, guest))
    assert holds(guest.active_image(), "B")
    guest.domain.create()
    guest.domain.destroy()

    deadline = time.monotonic() + 60
    while True:  # libvirt may still be copying for the one that was killed
        with command(*words) as process:
            said = process.communicate(timeout=60)[0]
        if process.returncode == 0:
            break
        assert time.monotonic() < deadline, said
    assert holds(guest.active_image(), "A")
    kept = [s for s in snapshots(runs, guest).values() if s.mark and s.mark.standalone]
    assert all(holds(Path(path), "B") for s in kept for _, path in s.covers)
    assert kept
    assert findings(runs, guest) == []


def test_what_will_happen_is_shown_and_a_no_changes_nothing(
    make_guest: Callable[..., Guest], runs: Runs, command: Callable[..., subprocess.Popen[str]]
) -> None:
    guest = make_guest(boots=False, agent=False)
    names = [runs.run(guest, POLICIES["external"]).outcome.snapshot or "" for _ in range(3)]
    before = runs.host.domain(guest.domain.UUIDString())
    with command("restore", guest.name, names[0]) as process:
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    for line in (
        "stop    the guest, which runs, is shut down first",
        "keep    the present state as kvmsnapd-standard-",
        f"lose    {names[1]}, which is newer",
        f"lose    {names[2]}, which is newer",
        "start   the guest",
        "add --yes if it is meant",
    ):
        assert line in said
    assert runs.host.domain(guest.domain.UUIDString()) == before
