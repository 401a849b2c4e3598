"""Copies of snapshots beside guests that go on: files, second domains, and thin ones that stand on a snapshot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import libvirt
import pytest

from kvmsnapd.audit import audit
from kvmsnapd.cli import main
from kvmsnapd.copier import Copier
from kvmsnapd.diagnosis import Level
from kvmsnapd.execute import Result
from kvmsnapd.libvirt_host.connection import start_event_loop
from kvmsnapd.model import Kind
from tests.builders import a_policy
from tests.lab.commands import run
from tests.lab.images import backing_chain, check_image, read_file_in_image
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsnapd.diagnosis import Finding
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.libvirt_host import LibvirtHost
    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

    Command = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.qemu

A, B = (bytes([letter]) * 200_000 for letter in b"AB")
POLICY = a_policy(keep="last=2")


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "run") as made:
        yield made


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a configuration with the same locks as the runs have."""
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text(
        "policies: {standard: {schedule: hourly, keep: {last: 2}}}\ndomains: {}\n"
        f"runtime_directory: {tmp_path}/run\nstate_directory: {tmp_path}/state\n"
    )
    return path


@pytest.fixture
def command(libvirtd: Libvirtd, config: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command; returns its exit code and what it said."""

    def run_it(word: str, *words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([word, "--config", str(config), "--connect", libvirtd.uri, *words])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run_it


@pytest.fixture
def second(libvirtd: Libvirtd) -> Iterator[Callable[[str], libvirt.virDomain]]:
    """Find the domains that a test has made, and take them away in the end."""
    known: list[str] = []

    def find(name: str) -> libvirt.virDomain:
        known.append(name)
        return libvirtd.connect().lookupByName(name)

    yield find
    for name in known:
        domain = libvirtd.connect().lookupByName(name)
        if domain.isActive():
            domain.destroy()
        domain.undefine()


def take(runs: Runs, guest: Guest) -> str:
    outcome = runs.run(guest, POLICY).outcome
    assert outcome.result is Result.TAKEN
    assert outcome.snapshot
    return outcome.snapshot


def boots(domain: libvirt.virDomain) -> None:
    """Start it and wait until it is up, seen on its console."""
    stream = domain.connect().newStream(libvirt.VIR_STREAM_NONBLOCK)
    domain.create()
    domain.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
    said, deadline = b"", time.monotonic() + 60
    while b"GUEST-UP" not in said:
        assert time.monotonic() < deadline, said
        got = stream.recv(4096)
        said += got if isinstance(got, bytes) else b""
        time.sleep(0.05)
    assert b"GUEST-FAILED" not in said
    stream.abort()


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def stands_still(guest: Guest) -> Iterator[list[int]]:
    """Collect how often the guest is paused, for however short a time, in the block."""
    pauses: list[int] = []

    def note(_connection: object, _domain: object, event: int, detail: int, _opaque: object) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            pauses.append(detail)

    start_event_loop()
    connection = guest.libvirtd.connect()
    kind = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
    domain = connection.lookupByName(guest.name)
    callback = connection.domainEventRegisterAny(domain, kind, note, None)
    yield pauses
    connection.domainEventDeregisterAny(callback)


def test_a_copy_boots_and_holds_its_moment_while_the_original_writes_on(
    make_guest: Callable[..., Guest],
    runs: Runs,
    command: Command,
    second: Callable[[str], libvirt.virDomain],
) -> None:
    guest = make_guest(
        writer=True, disks=2, extra="<interface type='user'><mac address='52:54:00:00:00:01'/></interface>"
    )
    guest.write("/mnt/pattern", A)
    name = take(runs, guest)
    guest.write("/mnt/pattern", B)
    with stands_still(guest) as pauses:
        code, said, _ = command("restore", guest.name, name, "--as", f"{guest.name}-copy", "--json")
        assert code == 0
        assert pauses == []
        guest.domain.suspend()
        guest.domain.resume()
        wait_for(lambda: len(pauses) == 1)  # it would have been noticed
    answer = json.loads(said)
    copy = second(f"{guest.name}-copy")
    assert answer["left_out"] == ["network interface"]
    assert not copy.isActive()
    for target, path in answer["files"].items():
        assert backing_chain(Path(path)) == [Path(path)], target
        assert Path(path).stat().st_mode & 0o777 == 0o600
        check_image(Path(path))
    assert read_file_in_image(Path(answer["files"]["vda"]), "/pattern") == A
    boots(copy)
    assert guest.alive()
    assert guest.read("/mnt/pattern") == B
    take(runs, guest)
    take(runs, guest)
    assert name not in guest.snapshots  # nothing holds it
    copy.destroy()
    assert read_file_in_image(Path(answer["files"]["vda"]), "/pattern") == A

    code, _, error = command("restore", guest.name, "newest", "--as", f"{guest.name}-copy")
    assert (code, error) == (
        1,
        f"kvmsnapd: there is a domain {guest.name}-copy already. Nothing was changed: choose another name\n",
    )


@pytest.fixture
def process(libvirtd: Libvirtd, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a command as a person does, on the same locks as the runs have."""
    config = tmp_path / "kvmsnapd.yaml"
    config.write_text(
        "policies: {standard: {schedule: hourly, keep: {last: 2}}}\ndomains: {}\n"
        f"runtime_directory: {tmp_path}/run\nstate_directory: {tmp_path}/state\n"
    )

    def start(word: str, *words: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-m", "kvmsnapd", word, "--config", str(config), "--connect", libvirtd.uri, *words]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def findings(runs: Runs, guest: Guest) -> list[Finding]:
    seen = audit(runs.host, runs.fleet({guest: (POLICY,)}), intents=[], now=runs.now, locks=runs.executor.locks)
    own = [f for f in seen.findings if f.subject.startswith(str(guest.directory))]
    return [f for f in own if f.level is not Level.NOTE]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_stopped_in_a_copy_nothing_is_defined_and_the_same_call_makes_it_anew(
    how: signal.Signals,
    make_guest: Callable[..., Guest],
    runs: Runs,
    process: Callable[..., subprocess.Popen[str]],
) -> None:
    guest = make_guest(boots=False, running=False, agent=False, size_mib=600)
    run("qemu-io", "-c", "write -q -P 0x55 1M 500M", guest.active_image())
    name = take(runs, guest)
    guest.start()
    copy = guest.directory / f"{guest.name}-copy.vda.qcow2"
    note = copy.with_name(f"{copy.name}.unfinished")
    words = ("restore", guest.name, name, "--as", f"{guest.name}-copy")
    with process(*words) as begun:
        while not copy.exists():
            assert begun.poll() is None
            time.sleep(0.001)
        begun.send_signal(how)
        said = begun.communicate(timeout=60)[0]
    assert f"{guest.name}-copy" not in [d.name() for d in guest.libvirtd.connect().listAllDomains()]
    if how is signal.SIGINT:
        assert begun.returncode == 130
        assert f"{guest.name}: the copy of its disks goes on" in said
        assert "nothing is left of the copy" in said
        assert not copy.exists()
        assert not note.exists()
    else:
        wait_for(lambda: findings(runs, guest))  # nothing can be seen of a folder while libvirt still copies in it
        assert [(f.subject, f.command) for f in findings(runs, guest)] == [(str(copy), f"rm {copy} {note}")]
    assert guest.state == libvirt.VIR_DOMAIN_RUNNING
    code, said = ended(process(*words))
    assert code == 0, said
    assert not note.exists()
    check_image(copy)
    run("qemu-img", "compare", "-U", copy, guest.images[0])
    assert findings(runs, guest) == []
    # The way to be rid of it that was told.
    told = said.split("To be rid of it:")[1].strip()
    assert told == f"virsh undefine {guest.name}-copy --nvram && rm {copy}"
    run("virsh", "-c", guest.libvirtd.uri, "undefine", f"{guest.name}-copy", "--nvram")
    take(runs, guest)
    take(runs, guest)
    assert name not in guest.snapshots


class Killed(BaseException):
    pass


class Mortal:
    """The libvirt of one who is killed as a copy is to be defined: nothing is called from then on."""

    def __init__(self, host: LibvirtHost) -> None:
        self._host, self._dead = host, False

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            self._dead = self._dead or name == "define_copy"
            if self._dead:
                raise Killed
            answer: object = getattr(self._host, name)(*arguments, **named)
            return answer

        return call


def test_a_link_that_was_cut_off_holds_nothing_and_its_overlay_is_named(
    make_guest: Callable[..., Guest], runs: Runs, second: Callable[[str], libvirt.virDomain]
) -> None:
    guest = make_guest(boots=False, agent=False)
    uuid, name = guest.domain.UUIDString(), take(runs, guest)
    thin = f"{guest.name}-thin"

    def link(hypervisor: Hypervisor) -> dict[str, str]:
        copier = Copier(hypervisor, runs.executor.locks, lambda _domain: nullcontext())
        return copier.link(uuid, name, thin)[0]

    with pytest.raises(Killed):
        link(cast("Hypervisor", Mortal(runs.host)))
    overlay = guest.directory / f"{thin}.vda.qcow2"
    assert [(f.subject, f.command) for f in findings(runs, guest)] == [
        (str(overlay), f"rm {overlay} {overlay}.unfinished")
    ]
    assert link(runs.host) == {"vda": str(overlay)}
    copy = second(thin)
    assert findings(runs, guest) == []
    (mark,) = (s.mark for s in runs.host.domain(uuid).snapshots)
    assert mark
    assert mark.linked[-1] == copy.UUIDString()
    names = [take(runs, guest) for _ in range(3)]
    assert {name, *names[1:]} == set(guest.snapshots)
    (mark,) = (s.mark for s in runs.host.domain(uuid).snapshots if s.name == name)
    assert mark
    assert mark.linked == (copy.UUIDString(),)  # that of the first attempt is dropped


def test_a_copy_of_a_guest_with_uefi_begins_with_new_variables(
    make_guest: Callable[..., Guest], runs: Runs, command: Command
) -> None:
    guest = make_guest(boots=False, agent=False, firmware=True)
    name = take(runs, guest)
    code, said, _ = command("restore", guest.name, name, "--as", f"{guest.name}-uefi")
    assert code == 0
    assert "not in it: variables of its firmware, which begin anew" in said
    copy = guest.libvirtd.connect().lookupByName(f"{guest.name}-uefi")
    assert str(guest.directory / "OVMF_VARS") not in copy.XMLDesc(0)
    copy.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        said = process.communicate(timeout=120)[0]
        return process.returncode, said


def test_the_network_is_kept_where_that_is_asked_with_an_address_of_its_own(
    make_guest: Callable[..., Guest], runs: Runs, command: Command, second: Callable[[str], libvirt.virDomain]
) -> None:
    mac = "52:54:00:00:00:02"
    guest = make_guest(boots=False, extra=f"<interface type='user'><mac address='{mac}'/></interface>")
    name = take(runs, guest)
    code, _, _ = command("restore", guest.name, name, "--as", f"{guest.name}-net", "--network")
    assert code == 0
    copy = second(f"{guest.name}-net")
    (found,) = ET.fromstring(copy.XMLDesc(0)).findall("devices/interface/mac")  # noqa: S314  # libvirt's own
    assert found.get("address") != mac
    assert copy.UUIDString() != guest.domain.UUIDString()


def test_a_linked_copy_holds_its_snapshot_for_as_long_as_it_exists(
    make_guest: Callable[..., Guest],
    runs: Runs,
    command: Command,
    second: Callable[[str], libvirt.virDomain],
) -> None:
    guest = make_guest()
    guest.write("/mnt/pattern", A)
    below = take(runs, guest)
    name = take(runs, guest)
    guest.write("/mnt/pattern", B)
    code, said, _ = command("restore", guest.name, name, "--as", f"{guest.name}-thin", "--linked", "--json")
    assert code == 0
    copy = second(f"{guest.name}-thin")
    (file,) = json.loads(said)["files"].values()
    assert Path(file).stat().st_size < 300 * 1024
    for _ in range(3):
        take(runs, guest)
    assert {below, name} <= set(guest.snapshots)
    boots(copy)
    copy.destroy()
    assert read_file_in_image(Path(file), "/pattern") == A
    assert guest.read("/mnt/pattern") == B
    code, _, error = command("release", guest.name, name)
    assert code != 0 or "linked" in error
    copy.undefine()
    Path(file).unlink()
    guest.libvirtd.connect().defineXML(
        guest.domain.XMLDesc(0)
        .replace(guest.name, f"{guest.name}-thin")
        .replace(guest.domain.UUIDString(), "00000000-0000-4000-8000-000000000001")
    )  # of the same name, and another
    take(runs, guest)
    take(runs, guest)
    assert not {below, name} & set(guest.snapshots)
    assert guest.read("/mnt/pattern") == B


def test_export_makes_files_that_stand_alone(
    make_guest: Callable[..., Guest], runs: Runs, command: Command, tmp_path: Path
) -> None:
    guest = make_guest(writer=True, disks=2)
    guest.write("/mnt/pattern", A)
    take(runs, guest)
    name = take(runs, guest)
    guest.write("/mnt/pattern", B)
    folder = tmp_path / "out"
    folder.mkdir()
    code, said, _ = command("export", guest.name, name, "--files", str(folder))
    assert code == 0
    files = sorted(folder.iterdir())
    assert len(files) == 2
    assert all(str(file) in said for file in files)
    assert read_file_in_image(files[0], "/pattern") == A
    run("qemu-img", "compare", "-U", files[1], guest.images[1])
    code, _, error = command("export", guest.name, name, "--files", str(folder))
    assert code == 1
    assert "exists already" in error
    assert sorted(folder.iterdir()) == files
    code, _, error = command("export", guest.name, name, "--files", str(tmp_path / "nowhere"))
    assert code == 1
    assert str(tmp_path / "nowhere") in error


def test_a_raw_disk_is_copied_as_it_is_whatever_its_guest_has_made_it_look_like(
    make_guest: Callable[..., Guest], runs: Runs, command: Command, tmp_path: Path
) -> None:
    guest = make_guest(boots=False, running=False, image_format="raw")
    secret = guest.directory / "secret"
    secret.write_bytes(b"of the host" * 100_000)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", tmp_path / "disguise")
    with guest.images[0].open("r+b") as image:
        image.write((tmp_path / "disguise").read_bytes())
    folder = tmp_path / "out"
    folder.mkdir()
    kept = folder / "kept.qcow2"
    runs.host.copy_file(str(guest.images[0]), str(kept), source_format="raw")  # as a restore keeps the present state
    assert list(folder.iterdir()) == [kept]
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", kept, guest.images[0])
    kept.unlink()
    name = take(runs, guest)
    code, _, error = command("export", guest.name, name, "--files", str(folder))
    assert code == 0, error
    (file,) = folder.iterdir()
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, guest.images[0])
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", file, tmp_path / "raw")
    assert b"of the host" not in (tmp_path / "raw").read_bytes()


def test_nothing_is_deleted_while_a_copy_is_made_and_takes_go_on(make_guest: Callable[..., Guest], runs: Runs) -> None:
    guest = make_guest(boots=False, agent=False)
    uuid = guest.domain.UUIDString()
    names = [take(runs, guest) for _ in range(2)]
    with runs.executor.locks.reading(uuid):
        ran = runs.run(guest, POLICY)
        assert (ran.outcome.result, ran.outcome.deleted, ran.outcome.blocked) == (Result.TAKEN, 0, 1)
        assert set(names) <= set(guest.snapshots)
    take(runs, guest)
    assert not set(names) & set(guest.snapshots)


@pytest.mark.parametrize("running", [True, False], ids=["with RAM", "off"])
def test_an_internal_one_of_a_domain_that_is_off_is_taken_out_of_its_images(  # noqa: PLR0917
    running: bool,
    make_guest: Callable[..., Guest],
    runs: Runs,
    command: Command,
    second: Callable[[str], libvirt.virDomain],
    tmp_path: Path,
) -> None:
    policy = a_policy(kind=Kind.INTERNAL)
    guest = make_guest(disks=2, running=running)
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "empty", "64M")
    if running:
        guest.write("/mnt/pattern", A)
    name = runs.run(guest, policy).outcome.snapshot or ""
    code, _, error = command("restore", guest.name, name, "--as", "other", *(["--linked"] if not running else []))
    assert (code, "is internal" in error) == (1, True)
    guest.destroy()
    for image in guest.images:
        run("qemu-io", "-c", "write -q -P 0x42 20M 1M", image)
    runs.run(guest, policy)
    before = {image: image.read_bytes() for image in guest.images}
    code, said, error = command("restore", guest.name, name, "--as", f"{guest.name}-copy")
    assert code == 0, error
    assert ("not in it: the guest's RAM of then" in said) == running
    copy = second(f"{guest.name}-copy")
    files = [guest.directory / f"{guest.name}-copy.{target}.qcow2" for target in guest.targets]
    for file in files:
        assert backing_chain(file) == [file]
        assert file.stat().st_mode & 0o777 == 0o600
        assert b"kvmsnapd" not in run("qemu-img", "snapshot", "-l", file).encode()
    if running:
        assert read_file_in_image(files[0], "/pattern") == A
    run("qemu-img", "compare", files[1], tmp_path / "empty")
    boots(copy)
    folder = tmp_path / "out"
    folder.mkdir()
    code, _, error = command("export", guest.name, name, "--files", str(folder))
    assert code == 0, error
    assert [file.name for file in sorted(folder.iterdir())] == [
        f"{guest.name}.{name}.{target}.qcow2" for target in guest.targets
    ]
    run("qemu-img", "compare", folder / f"{guest.name}.{name}.vdb.qcow2", tmp_path / "empty")
    assert {image: image.read_bytes() for image in guest.images} == before
    assert [d.name() for d in guest.libvirtd.connect().listAllDomains() if "drill" in d.name()] == []
    assert findings(runs, guest) == []


def test_an_internal_snapshot_cannot_be_copied_and_that_is_said(
    make_guest: Callable[..., Guest], runs: Runs, command: Command
) -> None:
    guest = make_guest(boots=False)
    outcome = runs.run(guest, a_policy(kind=Kind.INTERNAL)).outcome
    code, _, error = command("restore", guest.name, outcome.snapshot or "", "--as", "other")
    assert code == 1
    assert "is internal" in error
    assert f"kvmsnapd restore {guest.name} {outcome.snapshot}" in error


def test_the_original_is_not_paused_by_a_copy_of_it(
    make_guest: Callable[..., Guest], runs: Runs, command: Command, tmp_path: Path
) -> None:
    guest = make_guest(writer=True)
    name = take(runs, guest)
    with pauses_of(guest) as pauses:
        for words in (("restore", guest.name, name, "--as", f"{guest.name}-a"), ("verify", guest.name, name)):
            code, _, error = command(*words)
            assert code == 0, error
    assert pauses == []
    guest.libvirtd.connect().lookupByName(f"{guest.name}-a").undefine()
    with pauses_of(guest) as pauses:  # so that the test would see one
        guest.domain.suspend()
        guest.domain.resume()
        time.sleep(0.5)
    assert len(pauses) == 1
    assert tmp_path


@contextmanager
def pauses_of(guest: Guest) -> Iterator[list[float]]:
    """Collect the instants at which libvirt says that the guest was paused."""
    start_event_loop()
    connection = libvirt.open(guest.libvirtd.uri)
    seen: list[float] = []

    def note(_connection: object, _domain: object, event: int, _detail: int, _opaque: object) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            seen.append(time.monotonic())

    domain = connection.lookupByName(guest.name)
    callback = connection.domainEventRegisterAny(domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, note, None)
    yield seen
    connection.domainEventDeregisterAny(callback)
    connection.close()
