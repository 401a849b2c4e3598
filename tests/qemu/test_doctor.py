"""`kvmsnapd doctor` on hosts in every kind of trouble: all is found, the commands it names work, nothing changes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libvirt
import pytest

from tests.builders import a_policy
from tests.lab.commands import LabError, run
from tests.lab.daemon import DaemonProcess
from tests.lab.guest import Guest
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

STANDARD = a_policy(keep="last=3")
POLICIES = """\
policies:
  standard: {schedule: hourly, splay: 0s, keep: {last: 3}, min_free: 1MiB}
  greedy: {schedule: hourly, splay: 0s, keep: {last: 30}, min_free: 1MiB}
domains:
"""
SLOT = "20261122T080000Z"


@dataclass(frozen=True)
class Answer:
    """What one run of the program came to."""

    code: int
    out: str
    err: str

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What is to be looked at."""
        found: list[dict[str, Any]] = json.loads(self.out)["findings"]
        return [finding for finding in found if finding["level"] != "note"]

    def about(self, *words: str) -> list[dict[str, Any]]:
        """Return the findings in which all these words are."""
        return [found for found in self.findings if all(word in str(found.values()) for word in words)]


@dataclass
class Host:
    """One libvirt, the configuration for it, and doctor."""

    libvirtd: Libvirtd
    directory: Path
    domains: dict[str, str] = field(default_factory=dict)
    """By selector, the list of policies."""

    def daemon(self, more: str = "") -> DaemonProcess:
        """Write the configuration; the daemon is not started."""
        words = "".join(f"  {name}: [{policies}]\n" for name, policies in self.domains.items())
        daemon = DaemonProcess(self.directory / "daemon", self.libvirtd.uri, POLICIES + words + more)
        daemon.write_config(daemon.policies)
        return daemon

    def doctor(self, *options: str, uri: str | None = None) -> Answer:
        """Run doctor as a process of its own."""
        config = self.directory / "daemon/kvmsnapd.yaml"
        command = [sys.executable, "-m", "kvmsnapd", "doctor", "--config", str(config), *options]
        done = subprocess.run(
            [*command, "--connect", uri or self.libvirtd.uri], capture_output=True, text=True, timeout=60, check=False
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def carry_out(self, command: str) -> None:
        """Run a command that doctor has named, as a person would who works on this libvirt."""
        first, *others = shlex.split(command)
        if first == "virsh":
            print(self.libvirtd.virsh(*others))
        else:
            run(first, *others)

    def all_there_is(self) -> dict[str, Any]:
        """Return definitions, states, snapshots, pools and files: all that doctor could have changed."""
        connection = self.libvirtd.connect()
        domains = {
            domain.name(): (
                domain.state(),
                domain.XMLDesc(0),
                domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
                sorted(snapshot.getXMLDesc(0) for snapshot in domain.listAllSnapshots()),
            )
            for domain in connection.listAllDomains()
        }
        files = {
            path: (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_mode)
            for path in self.directory.rglob("*")
            if path.is_file() and path.name != "console"
        }
        return {"domains": domains, "files": files, "pools": [(p.name(), p.isActive()) for p in pools(connection)]}


def pools(connection: libvirt.virConnect) -> list[libvirt.virStoragePool]:
    return sorted(connection.listAllStoragePools(), key=lambda pool: str(pool.name()))


@pytest.fixture
def host(libvirtd: Libvirtd, tmp_path: Path, make_guest: Callable[..., Guest]) -> Iterator[Host]:  # noqa: ARG001
    """Provide a host whose storage pools are gone before its guests go."""
    yield Host(libvirtd, tmp_path)
    for pool in pools(libvirtd.connect()):
        if pool.isActive():
            pool.destroy()
        if pool.isPersistent():
            pool.undefine()


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "runs", now=datetime(2026, 11, 1, 9, 0, 1, tzinfo=UTC)) as found:
        yield found


@dataclass
class Troubles:
    """A host in every kind of trouble; the guests by the name of theirs."""

    guests: dict[str, Guest]
    files: dict[str, Path]


@pytest.fixture
def troubles(host: Host, make_guest: Callable[..., Guest], runs: Runs) -> Troubles:
    libvirtd = host.libvirtd
    guests: dict[str, Guest] = {}
    files: dict[str, Path] = {}

    def make(trouble: str, policy: str | None = "standard", *, takes: int = 0, running: bool = False) -> Guest:
        guest = guests[trouble] = make_guest(running=running, boots=False, agent=False)
        if policy:
            host.domains[guest.name] = policy
        take(guest, takes)
        return guest

    def take(guest: Guest, times: int) -> None:
        for _ in range(times):
            touch(guest)
            assert runs.run(guest, STANDARD).outcome.result == "taken", runs.events[-3:]

    make("unprotected", None)
    make("greedy", "greedy")
    make("frozen")
    make("healthy", takes=2)

    orphans = make("orphans")
    files["overlay"] = orphans.directory / f"{orphans.name}.vda.kvmsnapd-standard-{SLOT}.qcow2"
    files["memory"] = orphans.directory / f"{orphans.name}.kvmsnapd-standard-{SLOT}.mem"
    below = ("-b", str(orphans.images[0]), "-F", "qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", *below, files["overlay"])
    files["memory"].write_bytes(bytes(100_000))

    handmade = make("handmade", takes=2)
    files["removed"] = handmade.active_image()
    files["removed"].unlink()

    stray = make("stray", takes=1, running=True)
    libvirtd.virsh("snapshot-create-as", stray.name, "backup", "--disk-only", "--no-metadata")
    files["stray"] = stray.active_image()

    mixed = make("mixed", takes=1)
    libvirtd.virsh("snapshot-create-as", mixed.name, "inside")

    make("paused", takes=1, running=True).domain.suspend()

    if runs.host.capabilities().revert_external:
        branch = make("branch", takes=2)
        libvirtd.virsh("snapshot-revert", branch.name, branch.snapshots[0])
        take(branch, 1)

    # In the folder of another, whose image has another name.
    gone = guests["gone"] = Guest(libvirtd, "gone", orphans.directory, image_format="raw", boots=False, agent=False)
    gone.define()
    host.domains[gone.name] = "standard"
    take(gone, 2)
    files["gone upper"], files["gone lower"], _ = overlays_of(gone)
    gone.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)

    runs.close()
    daemon = host.daemon()
    files["intent"] = daemon.directory / f"state/frozen/{guests['frozen'].domain.UUIDString()}.frozen"
    files["intent"].parent.mkdir(parents=True)
    files["intent"].touch()
    (daemon.directory / "run").mkdir()
    return Troubles(guests, files)


def touch(guest: Guest) -> None:
    """Have the active image of a shut-off guest look as if it was written to after its newest snapshot."""
    if guest.state == libvirt.VIR_DOMAIN_SHUTOFF:
        os.utime(guest.active_image(), (0, 0))


def overlays_of(guest: Guest) -> list[Path]:
    """Return the guest's layers, the active one first, whether it runs or not."""
    said = run("qemu-img", "info", "-U", "--backing-chain", "--output=json", guest.active_image())
    return [Path(layer["filename"]) for layer in json.loads(said)]


def test_every_trouble_is_found_and_nothing_is_changed(host: Host, troubles: Troubles) -> None:
    guests, files = {trouble: guest.name for trouble, guest in troubles.guests.items()}, troubles.files
    before = host.all_there_is()
    seen = host.doctor("--json")
    text = host.doctor()
    assert host.all_there_is() == before
    assert (seen.code, text.code) == (1, 1), seen.err + text.err
    for found in seen.findings:
        print(found)

    def told(level: str, *words: str) -> dict[str, Any]:
        """Return the one finding of this level with all these words, which the text has as well."""
        (found,) = [found for found in seen.about(*words) if found["level"] == level]
        assert f"{level}: {found['subject']}: {found['text']}\n" in text.out
        assert not found["command"] or f"    {found['command']}\n" in text.out
        return found

    told("problem", guests["unprotected"], "unprotected")
    told("problem", guests["greedy"], "chain_budget", "30 (greedy)")
    told("problem", guests["frozen"], "frozen")
    told("problem", "gone", "libvirt has no such domain")
    for empty in (files["overlay"], files["memory"]):
        assert told("warning", str(empty), "no domain and no snapshot uses")["command"] == f"rm {empty}"
    unknown = told("warning", str(files["gone upper"]), "may be the disk of an undefined domain or of another host")
    assert unknown["command"] == f"qemu-img info -U --backing-chain {files['gone upper']}"
    told("warning", str(files["gone lower"]), str(files["gone upper"]), "stands on it")
    assert told("problem", guests["handmade"], "is gone", str(files["removed"]))["command"] is None
    told("problem", guests["stray"], str(files["stray"]), "belongs to no snapshot", "backup program")
    told("problem", guests["mixed"], "internal and external")
    assert told("warning", guests["paused"], "is paused")["command"] == f"virsh domstate --reason {guests['paused']}"
    assert len(seen.about("the policies may keep 30")) == 1
    if "branch" in guests:
        told("problem", guests["branch"], "branches")
    # Nothing is said of what is in order.
    assert seen.about(guests["healthy"]) == []
    known = {"configuration", *guests.values(), *map(str, files.values())}
    assert {found["subject"] for found in seen.findings} <= known


def test_the_commands_that_doctor_names_end_what_they_are_named_for(host: Host, troubles: Troubles) -> None:
    guests, files = troubles.guests, troubles.files
    listed = {trouble: g.snapshots for trouble, g in guests.items() if trouble != "gone"}
    done: list[str] = []
    # What stands on another file is to go first; then its own command is named.
    for _ in range(5):
        found_now = host.doctor("--json").findings
        commands = [found["command"] for found in found_now if found["command"]]
        new = [command for command in commands if command not in done]
        if not new:
            break
        for command in new:
            host.carry_out(command)
            done.append(command)
    print("\n".join(done))
    left = host.doctor("--json")
    there = {*host.directory.rglob("*")}
    assert not {files["overlay"], files["memory"]} & there
    # Of a domain that is gone nothing is removed.
    assert {files["gone upper"], files["gone lower"]} <= there
    assert left.about("no domain and no snapshot uses") == []
    assert left.about(guests["stray"].name) == []
    assert guests["paused"].state == libvirt.VIR_DOMAIN_PAUSED
    # Nothing that is in use has gone, nor a record of a snapshot whose data is there.
    for trouble in set(guests) - {"gone", "handmade"}:
        assert all(layer.exists() for layer in overlays_of(guests[trouble]))
        assert guests[trouble].snapshots == listed[trouble]


def test_an_active_layer_that_is_gone_is_told_and_nothing_is_advised_that_would_lose_more(
    host: Host, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(running=False, boots=False, agent=False)
    host.domains[guest.name] = "standard"
    for _ in range(2):
        touch(guest)
        assert runs.run(guest, STANDARD).outcome.result == "taken"
    runs.close()
    removed = guest.active_image()
    removed.unlink()
    host.daemon()
    (found,) = host.doctor("--json").findings
    assert (found["subject"], found["level"], found["command"]) == (guest.name, "problem", None)
    assert str(removed) in found["text"]
    assert "cannot start" in found["text"]
    with pytest.raises(libvirt.libvirtError):
        guest.start()


def test_a_covered_file_that_is_gone_takes_its_snapshot_along(
    host: Host, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(running=False, boots=False, agent=False)
    host.domains[guest.name] = "standard"
    for _ in range(2):
        touch(guest)
        assert runs.run(guest, STANDARD).outcome.result == "taken"
    runs.close()
    covered = overlays_of(guest)[1]
    covered.unlink()
    host.daemon()
    (found,) = host.doctor("--json").findings
    assert (found["subject"], found["level"], found["command"]) == (guest.name, "problem", None)
    assert f"the data of snapshot {guest.snapshots[1]} is gone: there is no {covered}" in found["text"]


def test_who_may_only_read_is_told_all_that_reading_shows(
    host: Host, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(running=False, boots=False, agent=False)
    assert runs.run(guest, STANDARD).outcome.result == "taken"
    runs.close()
    other = make_guest(running=False, boots=False, agent=False)
    host.domains[guest.name] = "standard"
    host.daemon()
    sockets = host.directory / "s"
    sockets.mkdir()
    (sockets / "libvirt-sock-ro").symlink_to(host.libvirtd.readonly_uri.partition("socket=")[2])
    seen = host.doctor("--json", uri=f"qemu+unix:///system?socket={sockets}/libvirt-sock")
    assert seen.code == 1, seen.err
    assert {found["subject"] for found in seen.findings} == {"rights", other.name}
    assert [f["text"] for f in json.loads(seen.out)["findings"] if f["subject"] == str(guest.directory)] != []


def test_a_stray_layer_on_top_is_merged_by_the_command_alone(
    host: Host, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(agent=True)
    policy = a_policy(keep="last=1")
    host.domains[guest.name] = "standard"
    assert runs.run(guest, policy).outcome.result == "taken"
    overlay = guest.active_image()
    guest.write("/mnt/before", b"before")
    for name in ("backup1", "backup2"):
        host.libvirtd.virsh("snapshot-create-as", guest.name, name, "--disk-only", "--no-metadata")
    strays = overlays_of(guest)[:2]
    guest.write("/mnt/after", b"after")
    host.daemon()
    (found,) = host.doctor("--json").about("belongs to no snapshot")
    host.carry_out(found["command"])
    assert overlays_of(guest) == [overlay, *guest.images]
    with pytest.raises(LabError):  # a second time, when all is in order, it does nothing
        host.carry_out(found["command"])
    assert overlays_of(guest) == [overlay, *guest.images]
    for stray in strays:
        stray.unlink()
    assert host.doctor("--json").about(guest.name) == []
    for _ in range(2):
        ran = runs.run(guest, policy)
        assert (ran.outcome.result, ran.outcome.deleted) == ("taken", 1), ran.events
    runs.close()
    guest.execute("sync")
    guest.destroy()
    guest.start()
    guest.wait_up()
    assert guest.execute("grep -q before /mnt/before && grep -q after /mnt/after") is None
    assert len(guest.snapshots) == 1


@pytest.mark.parametrize("libvirtd", ["libvirt11"], indirect=True)
def test_the_other_branch_after_a_revert_is_not_called_broken(
    host: Host, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(running=False, boots=False, agent=False)
    host.domains[guest.name] = "standard"
    for _ in range(2):
        touch(guest)
        assert runs.run(guest, STANDARD).outcome.result == "taken"
    first, second = guest.snapshots
    host.libvirtd.virsh("snapshot-revert", guest.name, first)
    touch(guest)
    assert runs.run(guest, STANDARD).outcome.result == "taken"
    runs.close()
    host.daemon()
    assert [found for found in host.doctor("--json").about("is gone") if second in found["text"]] == []
    host.libvirtd.virsh("snapshot-revert", guest.name, second)
    guest.start()


def test_a_pool_that_is_not_active_is_told(host: Host, make_guest: Callable[..., Guest]) -> None:
    # libvirt refuses another pool on its folder, so what is in there cannot be known.
    guest = make_guest(running=False, boots=False, agent=False)
    host.domains[guest.name] = "standard"
    host.daemon()
    host.libvirtd.virsh("pool-define-as", "images", "dir", "--target", str(guest.directory))
    orphan = guest.directory / f"{guest.name}.vda.kvmsnapd-standard-{SLOT}.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", orphan, "1M")
    before = host.all_there_is()
    seen = host.doctor("--json")
    assert host.all_there_is() == before
    (found,) = seen.about(str(guest.directory))
    assert (seen.code, found["command"]) == (1, "virsh pool-start images")
    host.carry_out(found["command"])
    assert [found["subject"] for found in host.doctor("--json").findings] == [str(orphan)]


def test_the_exit_code_tells_all_well_from_something_to_look_at_and_from_no_libvirt(
    host: Host, make_guest: Callable[..., Guest], runs: Runs
) -> None:
    guest = make_guest(running=False, boots=False, agent=False)
    assert runs.run(guest, STANDARD).outcome.result == "taken"
    runs.close()
    host.domains[guest.name] = "standard"
    host.daemon()
    before = host.all_there_is()
    well = host.doctor()
    assert (well.code, well.out.splitlines()[-1]) == (0, "All is well.")
    assert host.doctor("--json").findings == []
    assert host.all_there_is() == before
    assert before["pools"] == []
    nobody = host.doctor(uri=f"qemu+unix:///system?socket={host.directory}/nobody")
    assert (nobody.code, nobody.out) == (3, "")
    assert "cannot reach libvirt" in nobody.err
    host.domains["no-such-domain"] = "standard"
    host.daemon()
    assert host.doctor().code == 1


@pytest.mark.parametrize("more", ["", ", consistency: memory, memory: live"], ids=["disks", "ram"])
def test_beside_a_busy_daemon_it_finds_nothing_that_is_not_so(
    host: Host, make_guest: Callable[..., Guest], more: str
) -> None:
    guest = make_guest(boots=False, agent=False, disks=2)
    policy = f"{{schedule: every 1s, splay: 0s, keep: {{last: 2}}, min_free: 1MiB{more}}}"
    words = f"policies:\n  fast: {policy}\ndomains:\n  {guest.name}: [fast]\n"
    daemon = DaemonProcess(host.directory / "daemon", host.libvirtd.uri, words)
    daemon.start()
    try:
        daemon.wait_for(lambda: len(daemon.events("snapshot.deleted")) > 2)
        seen = [host.doctor("--json") for _ in range(20)]
        taken, deleted = (len(daemon.events(f"snapshot.{what}")) for what in ("taken", "deleted"))
    finally:
        assert daemon.kill(signal.SIGTERM) == 0
    print(taken, "taken,", deleted, "deleted")
    assert [answer.findings for answer in seen if answer.code != 0] == []
    assert daemon.events("snapshot.failed") + daemon.events("snapshot.delete_failed") == []
    assert min(taken, deleted) > 3  # there was something to be mistaken about
    assert host.doctor().code == 0


def test_the_daemon_tells_the_same_once_per_connection(host: Host, troubles: Troubles) -> None:
    seen = {
        (found["subject"], found["text"], found["command"])
        for found in host.doctor("--json").findings
        if found["subject"] != "configuration" and "frozen" not in found["text"]  # which ends at once
    }
    assert len(seen) > 8
    # Only looking: nothing is due, so that what doctor saw is what the daemon sees.
    daemon = host.daemon()
    daemon.write_config(daemon.policies.replace("hourly", "yearly, catch_up: skip"))
    daemon.start()
    try:
        daemon.wait_for(lambda: seen <= set(told(daemon)))
        assert {times for finding, times in told(daemon).items() if finding in seen} == {1}
        host.libvirtd.kill()
        daemon.wait_for(lambda: daemon.events("libvirt.lost"))
        host.libvirtd.start()
        daemon.wait_for(lambda: {times for finding, times in told(daemon).items() if finding in seen} == {2})
        time.sleep(3)  # some ticks
    finally:
        assert daemon.kill(signal.SIGTERM) == 0
    assert len(daemon.events("libvirt.connected")) == 2
    assert {times for finding, times in told(daemon).items() if finding in seen} == {2}
    assert {finding for finding in told(daemon) if "frozen" not in finding[1]} == seen
    assert troubles.guests["paused"].state == libvirt.VIR_DOMAIN_PAUSED


def told(daemon: DaemonProcess) -> Counter[tuple[str, str, str | None]]:
    """Return the findings that the daemon has logged, and how often."""
    return Counter((e["subject"], e["text"], e["command"]) for e in daemon.events("audit.finding"))
