"""A guest to take snapshots of: a small emulated Linux that can be written to and shows that it runs."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import libvirt
import libvirt_qemu

from tests.lab import ingredients
from tests.lab.commands import LabError, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.libvirtd import Libvirtd

_UP_WITHIN_S = 60.0
"""Twelve times what it takes: a machine may be busy, and a guest that died is noticed at once anyway."""

_AGENT_TIMEOUT_S = 10
_AGENT_CHUNK = 48 * 1024
"""Bytes per agent message; one message must stay well below what libvirt lets through."""


# QEMU 7.2 emulates cmpxchg16b wrongly: it leaves garbage in the flags, and Debian 13's kernel, which allocates memory
# with it, dies of that in one boot of five (measured: 8 of 40, and 0 of 40 without that instruction).
_CPU = """<cpu mode='custom' match='exact' check='none'>
  <model fallback='forbid'>qemu64</model><feature policy='disable' name='cx16'/>
</cpu>"""

_FIRMWARE_CODE, _FIRMWARE_VARIABLES = "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"

_numbers = itertools.count(1)


@contextlib.contextmanager
def guests_on(libvirtd: Libvirtd, directory: Path) -> Iterator[Callable[..., Guest]]:
    """Make guests with the options of `Guest`, plus `running`: up when returned (the default) or shut off.

    Each has a name of its own and is gone afterwards, with its snapshots and files. So are storage pools,
    which the program under test makes.
    """
    with contextlib.ExitStack() as clean_up:

        def make(*, running: bool = True, **options: Any) -> Guest:  # noqa: ANN401
            name = f"guest{next(_numbers)}"
            guest = Guest(libvirtd, name, directory / name, **options)
            clean_up.callback(guest.remove)
            guest.define()
            if running:
                guest.start()
                guest.wait_up()
            return guest

        yield make
        libvirtd.start()  # a failed test may have left it dead
        for pool in libvirtd.connect().listAllStoragePools():
            pool.destroy()


class HasLibvirt(Protocol):
    """Where a guest can live: a private libvirtd, or a whole machine."""

    def connect(self) -> libvirt.virConnect:
        """Open a new raw connection with all rights."""

    def pid_from_file(self, name: str) -> int | None:
        """Translate the process id in a file below `/run/libvirt` to the caller's; None when it does not run."""

    def qemu_log(self, name: str) -> Path:
        """Return where libvirt logs what this domain's QEMU says."""


@dataclass(frozen=True)
class Guest:
    """One domain and its files, which are all in `directory`.

    The object holds no connection and no state: everything is asked of libvirt anew, so it stays valid while
    the daemon dies and returns, and while the program under test changes the domain.
    """

    libvirtd: HasLibvirt
    name: str
    directory: Path
    disks: int = 1
    """The first carries a file system, mounted on `/mnt` in the guest; the others are empty."""
    image_format: str = "qcow2"
    """Of every disk: `qcow2` or `raw`."""
    size_mib: int = 64
    agent: bool = True
    """False: a domain without the agent's channel, as most are after a default installation."""
    writer: bool = False
    """Whether the guest keeps writing to its first disk, 64 KiB about ten times a second."""
    memory_mib: int = 112
    boots: bool = True
    """False: it stays in its firmware, which is up at once, takes no processor time and touches no disk."""
    firmware: bool = False
    """UEFI, with a flash memory of its own for its variables, instead of a BIOS."""
    extra: str = ""
    """The XML of more devices; `{directory}` in it stands for the guest's own. Files are for the caller to make."""

    def define(self) -> None:
        """Make the disks and let libvirt know the domain."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.firmware:
            for name in (_FIRMWARE_CODE, _FIRMWARE_VARIABLES):
                shutil.copyfile(_firmware(name), self.directory / name)
        first, *others = self.images
        ingredients.copy_of_disk(first, self.image_format, self.size_mib)
        for image in others:
            run("qemu-img", "create", "-q", "-f", self.image_format, image, f"{self.size_mib}M")
        self.libvirtd.connect().defineXML(self.xml())

    def start(self) -> None:
        """Switch the guest on; `wait_up` waits until it can be used."""
        self.console.unlink(missing_ok=True)
        self.domain.create()

    def wait_up(self) -> None:
        """Return once the guest has booted and its agent, if it has one, answers.

        Raises LabError with the end of console and QEMU log when it died or takes too long.
        """
        if not self.boots:
            return
        deadline = time.monotonic() + _UP_WITHIN_S
        while not ("GUEST-UP" in self._console_text() and (not self.agent or self.agent_answers())):
            if time.monotonic() > deadline or self.state == libvirt.VIR_DOMAIN_SHUTOFF:
                msg = f"guest {self.name} is not up (state {self.state})\n{self._what_was_said()}"
                raise LabError(msg)
            time.sleep(0.1)
        if "GUEST-FAILED" in self._console_text():
            msg = f"guest {self.name} has no disk\n{self._what_was_said()}"
            raise LabError(msg)

    def destroy(self) -> None:
        """Pull the plug; does nothing to a guest that is off."""
        if self.state != libvirt.VIR_DOMAIN_SHUTOFF:
            try:
                self.domain.destroy()
            except libvirt.libvirtError:
                if self.state != libvirt.VIR_DOMAIN_SHUTOFF:  # else it went off by itself, in between
                    raise

    def remove(self) -> None:
        """Destroy the guest and delete all that there is of it: definition, snapshot records, files."""
        try:
            self.destroy()
            self.domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            )
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def domain(self) -> libvirt.virDomain:
        """The raw libvirt object, on a new connection."""
        return self.libvirtd.connect().lookupByName(self.name)

    @property
    def snapshots(self) -> list[str]:
        """The names of its snapshots, sorted: those of one policy oldest first.

        In one call: `snapshotListNames` asks for their number first, and where another one is made in between,
        libvirt 9.0 and 11.3 answer with more names than they have room for ("Unable to encode message payload")
        or end.
        """
        return sorted(snapshot.getName() for snapshot in self.domain.listAllSnapshots())

    @property
    def state(self) -> int:
        """One of `libvirt.VIR_DOMAIN_*`; frozen file systems do not show in it, see `frozen`."""
        return int(self.domain.state()[0])

    @property
    def pid(self) -> int | None:
        """QEMU's process id as seen by the caller (to stop or kill it), None when the guest is off."""
        return self.libvirtd.pid_from_file(f"qemu/{self.name}.pid")

    @property
    def images(self) -> list[Path]:
        """The disk images the guest was defined with; snapshots put others on top, see `active_image`."""
        return [self.directory / f"{target}.{self.image_format}" for target in self.targets]

    @property
    def targets(self) -> list[str]:
        """The names of the disks in libvirt: vda, vdb and so on."""
        return [f"vd{chr(ord('a') + number)}" for number in range(self.disks)]

    @property
    def console(self) -> Path:
        """What the guest prints on its serial line."""
        return self.directory / "console"

    def active_image(self, target: str = "vda") -> Path:
        """Return the image that the guest writes to now: the top of the chain."""
        for disk in ET.fromstring(self.domain.XMLDesc()).iter("disk"):  # noqa: S314 (libvirt's own)
            if disk.find(f"target[@dev='{target}']") is not None:
                return Path(disk.find("source").attrib["file"])  # type: ignore[union-attr]
        msg = f"guest {self.name} has no disk {target}"
        raise LabError(msg)

    def ask_qemu(self, command: str) -> str:
        """Return the answer of QEMU's human monitor to one of its commands, as for `info status`."""
        human = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        return str(libvirt_qemu.qemuMonitorCommand(self.domain, command, human))

    def beats(self) -> int:
        """Return how often the guest's heart has beaten since it booted: five times a second."""
        counts = re.findall(r"BEAT (\d+)\r?\n", self._console_text())
        return int(counts[-1]) if counts else 0

    def alive(self, within_s: float = 5.0) -> bool:
        """Tell whether the guest runs, seen from inside: its heart beats again within this time."""
        before, deadline = self.beats(), time.monotonic() + within_s
        while time.monotonic() < deadline:
            if self.beats() > before:
                return True
            time.sleep(0.05)
        return False

    def ask_agent(self, command: str, timeout_s: int = _AGENT_TIMEOUT_S, /, **arguments: object) -> Any:  # noqa: ANN401
        """Return the guest agent's answer to one of its commands (`guest-…`); libvirt's error without one.

        An underscore in an argument's name stands for the hyphen that the agent's protocol has.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = json.dumps({"execute": command, "arguments": named})
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain, request, timeout_s, 0))["return"]

    def agent_answers(self) -> bool:
        """Tell whether the guest agent responds. A hanging one stays 'connected', so only asking tells."""
        try:
            self.ask_agent("guest-ping", 2)
        except libvirt.libvirtError:
            return False
        return True

    def frozen(self) -> bool:
        """Tell whether the guest's file systems are frozen."""
        return bool(self.ask_agent("guest-fsfreeze-status") == "frozen")

    def execute(self, script: str) -> None:
        """Run a shell script in the guest through its agent; LabError when it fails."""
        started = self._ask_thawed("guest-exec", path="/bin/sh", arg=["-c", script])
        while not (status := self._ask_thawed("guest-exec-status", pid=started["pid"]))["exited"]:
            time.sleep(0.02)
        if status.get("exitcode") != 0:
            msg = f"guest {self.name}: {script!r} failed: {status}"
            raise LabError(msg)

    def _ask_thawed(self, command: str, /, **arguments: object) -> Any:  # noqa: ANN401
        """Ask the agent something that it does not do while the file systems are frozen: a snapshot may be taken."""
        deadline = time.monotonic() + _AGENT_TIMEOUT_S
        while True:
            try:
                return self.ask_agent(command, **arguments)
            except libvirt.libvirtError as error:
                if "frozen" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def write(self, path: str, data: bytes) -> None:
        """Make this the content of a file in the guest (`/mnt/…` is its first disk), safely on the disk."""
        handle = self._ask_thawed("guest-file-open", path=path, mode="w")
        for start in range(0, len(data), _AGENT_CHUNK):
            chunk = base64.b64encode(data[start : start + _AGENT_CHUNK]).decode()
            self._ask_thawed("guest-file-write", handle=handle, buf_b64=chunk)
        self._ask_thawed("guest-file-close", handle=handle)
        self.execute("sync")

    def read(self, path: str) -> bytes:
        """Return the content of a file in the guest."""
        handle = self._ask_thawed("guest-file-open", path=path, mode="r")
        data = b""
        while True:
            answer = self._ask_thawed("guest-file-read", handle=handle, count=_AGENT_CHUNK)
            data += base64.b64decode(answer["buf-b64"])
            if answer["eof"]:
                self._ask_thawed("guest-file-close", handle=handle)
                return data

    def hang_agent(self, seconds: float) -> None:
        """Stop the guest agent for that long: still connected, it answers nobody, as in an overloaded guest.

        For a time set in advance, since a guest whose agent hangs cannot be told anything. Returns once it
        hangs, without having asked it: libvirt treats an agent that failed to answer differently afterwards.
        """
        hung = self._console_text().count("AGENT-STOPPED")
        agent = "$(pidof qemu-ga)"
        stop = f"sleep 0.3; kill -STOP {agent}; echo AGENT-STOPPED >/dev/console"
        self.execute(f"({stop}; sleep {seconds}; kill -CONT {agent}) >/dev/null 2>&1 &")
        deadline = time.monotonic() + _AGENT_TIMEOUT_S
        while self._console_text().count("AGENT-STOPPED") == hung:
            if time.monotonic() > deadline:
                msg = f"guest {self.name}: the agent does not stop\n{self._what_was_said()}"
                raise LabError(msg)
            time.sleep(0.05)

    def _console_text(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def _what_was_said(self, lines: int = 20) -> str:
        log = self.libvirtd.qemu_log(self.name)
        said = log.read_text(errors="replace") if log.exists() else ""
        console = self._console_text().splitlines()[-lines:]
        return "\n".join(["--- console", *console, "--- QEMU", *said.splitlines()[-lines:]])

    def xml(self) -> str:
        """Return the definition for libvirt."""
        options = " agent" * self.agent + " writer" * self.writer
        start = ""
        if self.firmware:  # in the guest's directory, which every root sees
            start = f"""
                <loader readonly='yes' type='pflash'>{self.directory / _FIRMWARE_CODE}</loader>
                <nvram>{self.directory / _FIRMWARE_VARIABLES}</nvram>"""
        if self.boots:
            boot = ingredients.boot()
            start += f"""
                <kernel>{boot.kernel}</kernel><initrd>{boot.initramfs}</initrd>
                <cmdline>console=ttyS0 quiet panic=1{options}</cmdline>"""
        disks = "".join(
            f"""<disk type='file' device='disk'>
                  <driver name='qemu' type='{self.image_format}' discard='unmap'/>
                  <source file='{image}'/><target dev='{target}' bus='virtio'/>
                </disk>"""
            for target, image in zip(self.targets, self.images, strict=True)
        )
        channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        return f"""
            <domain type='qemu'>
              <name>{self.name}</name><memory unit='MiB'>{self.memory_mib}</memory><vcpu>1</vcpu>
              <os>
                <type arch='x86_64' machine='pc'>hvm</type>{start}
              </os>
              <features><acpi/></features>
              {_CPU}
              <on_reboot>destroy</on_reboot>
              <devices>
                {disks}
                {self.extra.replace("{directory}", str(self.directory))}
                {channel if self.agent else ""}
                <serial type='file'><source path='{self.console}'/></serial>
                <controller type='usb' model='none'/><memballoon model='none'/>
              </devices>
            </domain>"""


def _firmware(name: str) -> Path:
    """Return a file of UEFI firmware from the unpacked package; one serves QEMU of both generations."""
    place = Path(os.environ.get(ingredients.UNPACKED_VARIABLE, "/nonexistent")) / "ovmf/usr/share/OVMF" / name
    if not place.exists():
        msg = f"{place}: no such file"
        raise LabError(msg)
    return place
