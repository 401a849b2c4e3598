"""The test ground itself: what the other tests with guests build on must hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt
import pytest

from tests.lab.images import backing_chain, check_image, read_file_in_image
from tests.lab.libvirtd import Libvirtd

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.guest import Guest

pytestmark = pytest.mark.qemu

_QUIESCED = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
)


def test_each_generation_is_what_its_name_says(libvirtd: Libvirtd, request: pytest.FixtureRequest) -> None:
    version = libvirtd.connect().getLibVersion()
    assert request.node.callspec.params["libvirtd"] == f"libvirt{version // 1_000_000}"


def test_the_generations_are_two_of_libvirt_and_of_qemu(generations: Callable[[str], Libvirtd]) -> None:
    old, new = (generations(name).connect() for name in ("libvirt9", "libvirt11"))
    assert old.getLibVersion() // 1_000_000 == 9
    assert new.getLibVersion() // 1_000_000 >= 11
    assert old.getVersion() < new.getVersion()  # QEMU's


def test_a_guest_is_up_within_seconds(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(running=False)
    started = time.monotonic()
    guest.start()
    guest.wait_up()
    assert time.monotonic() - started < 15
    assert guest.alive()


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_frozen_layer_holds_what_the_guest_had_written(make_guest: Callable[..., Guest], image_format: str) -> None:
    guest = make_guest(image_format=image_format, writer=True)
    before, after = os.urandom(100_000), os.urandom(100_000)
    guest.write("/mnt/pattern", before)
    guest.domain.snapshotCreateXML("<domainsnapshot><name>first</name></domainsnapshot>", _QUIESCED)
    guest.write("/mnt/pattern", after)

    frozen, active = guest.images[0], guest.active_image()
    assert backing_chain(active) == [active, frozen]
    assert read_file_in_image(frozen, "/pattern") == before
    assert guest.read("/mnt/pattern") == after
    guest.destroy()
    assert read_file_in_image(active, "/pattern") == after
    check_image(frozen)
    check_image(active)


def test_a_shut_off_guest_without_agent_has_all_its_disks(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(running=False, agent=False, disks=2)
    assert guest.state == libvirt.VIR_DOMAIN_SHUTOFF
    assert guest.pid is None
    assert guest.active_image("vdb") == guest.images[1]
    assert guest.images[1].exists()


def test_a_stopped_qemu_is_not_alive(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest(agent=False)
    assert guest.pid is not None
    os.kill(guest.pid, signal.SIGSTOP)
    assert not guest.alive(within_s=1)
    os.kill(guest.pid, signal.SIGCONT)
    assert guest.alive()


def test_a_hanging_agent_comes_back(make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    guest.hang_agent(5)
    assert not guest.agent_answers()
    assert guest.alive()
    guest.wait_up()
    assert guest.agent_answers()


def test_a_guest_survives_its_libvirtd(libvirtd: Libvirtd, make_guest: Callable[..., Guest]) -> None:
    guest = make_guest()
    qemu, boot = guest.pid, guest.beats()
    libvirtd.kill()
    assert guest.alive()
    with pytest.raises(libvirt.libvirtError):
        libvirtd.connect()
    libvirtd.start()
    assert guest.state == libvirt.VIR_DOMAIN_RUNNING
    assert guest.pid == qemu
    assert guest.beats() > boot
    guest.wait_up()  # a new daemon takes a moment to find the agent again


def test_two_daemons_do_not_disturb_each_other(
    libvirtd: Libvirtd, make_guest: Callable[..., Guest], tmp_path_factory: pytest.TempPathFactory
) -> None:
    guest = make_guest(agent=False)
    other_directory = tmp_path_factory.mktemp("other")
    with Libvirtd(other_directory, libvirtd.root, libvirtd.shared) as other:
        assert other.virsh("list", "--all", "--name").split() == []
        other.connect().defineXML(guest.domain.XMLDesc())  # the same name and identity, another host
        assert other.virsh("list", "--all", "--name").split() == [guest.name]
        other.kill()
        assert guest.state == libvirt.VIR_DOMAIN_RUNNING
        other.start()
        processes = other.processes().values()
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    assert str(other_directory) not in Path("/proc/self/mountinfo").read_text()
    assert guest.alive()


def test_a_killed_test_run_leaves_nothing_behind(libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("orphan")
    script = f"""
from pathlib import Path
from tests.lab.libvirtd import Libvirtd
daemon = Libvirtd(Path({str(directory)!r}), Path({str(libvirtd.root)!r}))
daemon.start()
print(*daemon.processes().values(), flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as run:
        assert run.stdout is not None
        processes = run.stdout.readline().split()
        assert len(processes) >= 2
        run.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{int(process)}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
