"""The operator's commands on real guests: beside a daemon, past the fuse, interrupted, and before a domain leaves."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.libvirt_host import LibvirtHost
from tests.lab.commands import run
from tests.lab.daemon import DaemonProcess
from tests.lab.images import backing_chain, check_image, read_file_in_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

MIB = 2**20
BIG_MIB = 1200
"""So much takes QEMU seconds to merge."""
DISK_ONLY = 16


@dataclass
class Desk:
    """A person's terminal on the host, with a configuration of its own, and a daemon if it is started."""

    daemon: DaemonProcess
    uri: str
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    def configure(self, guest: Guest, *, keep: str, every: str = "1h", more: str = "") -> None:
        self.daemon.write_config(
            f"policies:\n  standard: {{schedule: every {every}, splay: 0s, keep: {{{keep}}}{more}}}\n"
            f"domains:\n  {guest.name}: [standard]\n"
        )

    def begin(self, command: str, *words: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        options = ["--config", str(self.daemon.config), "--connect", self.uri]
        # Of a background job SIGINT is ignored, and its children inherit that.
        line = ["env", "--default-signal=INT", sys.executable, "-m", "kvmsnapd", command, *options, *words]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True)
        self.begun.append(process)
        return process

    def run(self, command: str, *words: str, code: int = 0) -> tuple[str, str]:
        """Return what a command says on stdout and stderr; it must end with this code."""
        process = self.begin(command, *words)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return out, err

    def take(self, guest: Guest, *words: str) -> str:
        """Take a snapshot and return its name."""
        (answer,) = json.loads(self.run("take", guest.name, "--json", *words)[0])
        assert answer["result"] == "taken", answer
        return str(answer["snapshot"])


@pytest.fixture
def desk(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Desk]:
    daemon = DaemonProcess(tmp_path / "desk", libvirtd.uri, "")
    desk = Desk(daemon, libvirtd.uri)
    yield desk
    daemon.kill()
    for process in desk.begun:
        process.kill()  # does nothing to one that has ended
        if process.stdout and not process.stdout.closed:
            process.communicate()


def wait_for(condition: Callable[[], object], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def undefine(guest: Guest) -> None:
    """Let the domain go as `virsh undefine` does, which refuses one that has snapshots."""
    guest.destroy()
    guest.domain.undefine()


def test_a_take_beside_the_daemon_is_held_through_its_retention(make_guest: Callable[..., Guest], desk: Desk) -> None:
    guest = make_guest()
    guest.write("/mnt/pattern", b"before the upgrade")
    desk.configure(guest, every="2s", keep="last: 2")
    desk.daemon.start()
    desk.daemon.wait_for(lambda: len(guest.snapshots) >= 2)
    held = desk.take(guest, "--hold", "upgrade")
    guest.write("/mnt/pattern", b"after it")
    later = desk.daemon.wait_for(lambda: [n for n in guest.snapshots if n > held][1:])[-1]
    desk.daemon.wait_for(lambda: min(n for n in guest.snapshots if n != held) > later)
    assert held in guest.snapshots
    assert guest.alive()
    assert [e for e in desk.daemon.events() if e["event"] in {"snapshot.failed", "snapshot.delete_failed"}] == []
    document = ET.fromstring(guest.domain.snapshotLookupByName(held).getXMLDesc())  # noqa: S314  # libvirt's own
    source = document.find("domain/devices/disk/source")
    assert source is not None
    assert read_file_in_image(Path(source.attrib["file"]), "/pattern") == b"before the upgrade"
    out, _ = desk.run("release", guest.name, held)
    assert "it was held: upgrade" in out
    desk.daemon.wait_for(lambda: held not in guest.snapshots)
    assert guest.read("/mnt/pattern") == b"after it"


def test_prune_goes_past_the_fuse_and_the_guest_runs_on(make_guest: Callable[..., Guest], desk: Desk) -> None:
    guest = make_guest()
    desk.configure(guest, keep="last: 9")
    taken = []
    for number in range(5):
        guest.write("/mnt/pattern", str(number).encode())
        taken.append(desk.take(guest))
    guest.write("/mnt/pattern", b"now")
    desk.configure(guest, keep="last: 2", more=", max_deletes_per_run: 1")
    _, err = desk.run("prune", code=2)
    assert "add --yes" in err
    assert guest.snapshots == sorted(taken)
    out, _ = desk.run("prune", "--yes")
    assert out.splitlines()[-1] == "3 of 3 deleted."
    assert guest.snapshots == sorted(taken)[-2:]
    assert guest.read("/mnt/pattern") == b"now"
    assert guest.alive()
    chain = backing_chain(guest.active_image())
    assert len(chain) == 3
    guest.destroy()
    assert [read_file_in_image(layer, "/pattern") for layer in chain] == [b"now", b"4", b"3"]
    check_image(chain[0])


@pytest.mark.parametrize("running", [True, False], ids=["running", "shut off"])
def test_after_forget_libvirt_lets_the_domain_go_with_its_data(
    make_guest: Callable[..., Guest], desk: Desk, *, running: bool
) -> None:
    guest = make_guest()
    desk.configure(guest, keep="last: 9")
    for number in range(3):
        guest.write("/mnt/pattern", str(number).encode())
        desk.take(guest, *(["--hold", "audit"] if number == 1 else []))
    guest.write("/mnt/pattern", b"now")
    if not running:
        guest.destroy()
    out, _ = desk.run("forget", guest.name, "--yes")
    assert "which is held: audit" in out
    assert f"vda: {guest.images[0]}" in out
    assert "virsh undefine and migrate accept it" in out
    assert guest.snapshots == []
    assert sorted(guest.directory.glob("*.qcow2")) == guest.images
    assert not running or (guest.alive() and guest.read("/mnt/pattern") == b"now")
    undefine(guest)
    assert read_file_in_image(guest.images[0], "/pattern") == b"now"
    check_image(guest.images[0])


def test_forget_stops_at_a_foreign_snapshot_and_says_so(make_guest: Callable[..., Guest], desk: Desk) -> None:
    guest = make_guest(boots=False)
    desk.configure(guest, keep="last: 9")
    below = desk.take(guest)
    guest.domain.snapshotCreateXML("<domainsnapshot><name>mine</name></domainsnapshot>", DISK_ONLY)
    above = desk.take(guest)
    out, _ = desk.run("forget", guest.name, "--yes", code=1)
    assert f"  delete  {above}" in out
    assert f"  stays   {below}  foreign_child: " in out
    assert "  stays   mine  foreign: never touched" in out
    assert guest.snapshots == [below, "mine"]
    guest.domain.snapshotLookupByName("mine").delete(0)
    desk.run("forget", guest.name, "--yes")
    undefine(guest)


# Interrupted


@dataclass
class Merging:
    """A prune of two snapshots, in the middle of the first one's merge."""

    guest: Guest
    process: subprocess.Popen[str]
    first: str
    second: str
    newest: str

    def is_right(self) -> None:
        """Assert that the guest starts, and reads what was written before and between its snapshots."""
        self.guest.destroy()
        self.guest.start()
        wait_for(lambda: self.guest.state == 1)
        self.guest.destroy()
        top = self.guest.active_image()
        run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P 7 0 {BIG_MIB}M", "-c", f"read -P 9 {BIG_MIB}M 1M", str(top))
        check_image(top)


def begin_merge(guest: Guest, desk: Desk, stderr: int = subprocess.PIPE) -> Merging:
    """Begin to prune, and return while libvirt merges the first snapshot."""
    desk.configure(guest, keep="last: 9")
    first = desk.take(guest)
    overlay = str(guest.active_image())
    for start in range(0, BIG_MIB, 200):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {start}M 200M", overlay)
    second = desk.take(guest)
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 9 {BIG_MIB}M 1M", str(guest.active_image()))
    guest.start()
    newest = desk.take(guest)
    desk.configure(guest, keep="last: 1")
    process = desk.begin("prune", "--yes", stderr=stderr)
    wait_for(lambda: process.poll() is not None or guest.domain.blockJobInfo("vda", 0).get("cur"))
    assert process.poll() is None, process.communicate()
    return Merging(guest, process, first, second, newest)


@pytest.fixture
def big_guest(make_guest: Callable[..., Guest]) -> Guest:
    guest: Guest = make_guest(boots=False, running=False, size_mib=BIG_MIB + 100)
    return guest


@pytest.fixture
def merging(big_guest: Guest, desk: Desk) -> Merging:
    return begin_merge(big_guest, desk)


def test_ctrl_c_ends_what_goes_on_and_begins_nothing_more(merging: Merging, desk: Desk) -> None:
    merging.process.send_signal(signal.SIGINT)
    out, err = merging.process.communicate(timeout=60)
    assert merging.process.returncode == 130, out + err
    assert f"Stopping: {merging.guest.name}: deleting {merging.first} goes on, and nothing more is begun." in err
    assert f"{merging.second} is still there: changed: nothing more was to be begun" in err
    assert out.splitlines()[-1] == "1 of 2 deleted."
    assert merging.guest.snapshots == [merging.second, merging.newest]
    desk.run("prune", "--yes")
    assert merging.guest.snapshots == [merging.newest]
    merging.is_right()


@pytest.mark.parametrize("how", ["Ctrl-C twice", "SIGKILL"])
def test_one_who_leaves_at_once_loses_nothing(merging: Merging, desk: Desk, how: str) -> None:
    guest = merging.guest
    if how == "SIGKILL":
        merging.process.kill()
    else:
        merging.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        merging.process.send_signal(signal.SIGINT)
    _, err = merging.process.communicate(timeout=60)
    assert merging.process.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130)
    assert how == "SIGKILL" or f"Left: libvirt ends deleting {merging.first} by itself" in err
    wait_for(lambda: merging.first not in guest.snapshots)
    assert guest.snapshots == [merging.second, merging.newest]
    out, _ = desk.run("doctor", "--json")
    assert "cut off" not in out
    desk.run("prune", "--yes")
    assert guest.snapshots == [merging.newest]
    merging.is_right()


def test_killed_with_libvirtd_in_a_merge_doctor_names_what_is_left_and_prune_ends_it(
    merging: Merging, desk: Desk, libvirtd: Libvirtd
) -> None:
    merging.process.kill()
    libvirtd.kill()
    merging.process.communicate(timeout=60)
    libvirtd.start()
    guest = merging.guest
    wait_for(lambda: not guest.domain.blockJobInfo("vda", 0))
    if merging.first in guest.snapshots:  # unless QEMU was just done with it
        out, _ = desk.run("doctor", code=1)
        assert merging.first in out
    desk.run("prune", "--yes")
    assert guest.snapshots == [merging.newest]
    merging.is_right()


def test_others_wait_for_a_merge_and_are_told_for_whom(merging: Merging, desk: Desk) -> None:
    guest = merging.guest
    qemu = guest.pid
    assert qemu is not None
    os.kill(qemu, signal.SIGSTOP)  # so that the merge lasts
    try:
        waiting = desk.begin("hold", guest.name, merging.newest, "precious")
        assert waiting.stderr is not None
        told = waiting.stderr.readline()
    finally:
        os.kill(qemu, signal.SIGCONT)
    assert told == f"{guest.name}: waiting for process {merging.process.pid}: prune of standard; Ctrl-C to give up\n"
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (0, "")
    assert "is held: precious" in out
    merging.process.communicate(timeout=60)
    assert merging.process.returncode == 0
    assert merging.guest.snapshots == [merging.newest]


# Progress


def test_a_person_at_a_terminal_sees_a_bar_with_bytes(big_guest: Guest, desk: Desk) -> None:
    ours, theirs = pty.openpty()
    merging = begin_merge(big_guest, desk, stderr=theirs)
    qemu = big_guest.pid
    assert qemu is not None
    os.kill(qemu, signal.SIGSTOP)  # until a bar is shown, which the rest of the merge then moves
    time.sleep(2)
    os.kill(qemu, signal.SIGCONT)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal that nobody has open any more
        while more := os.read(ours, 4096):
            seen += more
    os.close(ours)
    merging.process.communicate(timeout=60)
    assert merging.process.returncode == 0
    assert f"{big_guest.name}: deleting kvmsnapd-".encode() in seen
    assert re.search(rb"\d+(\.\d)?/[\d.]+ [MG]iB", seen), seen


def test_how_far_a_merge_is_can_be_asked_while_it_goes_on(merging: Merging, libvirtd: Libvirtd) -> None:
    host = LibvirtHost(libvirtd.uri)
    uuid = merging.guest.domain.UUIDString()
    seen: list[tuple[int, int]] = []
    slowest = 0.0
    while merging.process.poll() is None:
        began = time.monotonic()
        found = host.progress(uuid)
        slowest = max(slowest, time.monotonic() - began)
        seen += [found] if found else []
        time.sleep(0.05)
    assert merging.process.returncode == 0
    assert slowest < 5
    first = [done for done, total in seen if total == max(total for _, total in seen)]
    assert len(set(first)) > 2
    assert first[0] < first[1] < first[2]
    assert host.progress(uuid) is None
    host.close()


def test_how_far_a_save_of_ram_is_can_be_asked_while_it_goes_on(
    make_guest: Callable[..., Guest], desk: Desk, libvirtd: Libvirtd
) -> None:
    guest = make_guest(memory_mib=600)
    guest.execute("mkdir -p /ram; mount -t tmpfs -o size=500m none /ram; head -c 300000000 /dev/urandom >/ram/x")
    desk.configure(guest, keep="last: 2", more=", memory: live, consistency: memory, max_pause: 60s")
    host = LibvirtHost(libvirtd.uri)
    seen: list[tuple[int, int]] = []
    ended = threading.Event()

    def follow() -> None:
        while not ended.is_set():
            found = host.progress(guest.domain.UUIDString())
            seen.extend([found] if found else [])
            time.sleep(0.02)

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        desk.take(guest)
    finally:
        ended.set()
        follower.join()
        host.close()
    assert seen
    assert all(0 <= done <= total for done, total in seen)
    assert max(total for _, total in seen) > 300 * MIB
    assert next(guest.directory.glob("*.mem")).stat().st_size > 300_000_000
