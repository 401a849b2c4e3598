"""The XML of a second domain, made from a snapshot's: a copy to keep, or one that lives for a drill only.

A copy must not meet its original: it has another UUID, no network unless that is asked for, no passed-through devices,
and no file or socket of the original's.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsnapd.domain_xml import put_file, read_xml

if TYPE_CHECKING:
    from collections.abc import Mapping

_PASSED_THROUGH = {
    "hostdev": "passed-through device",
    "filesystem": "shared folder",
    "shmem": "shared memory",
    "memory[@model='nvdimm']": "NVDIMM",
    "memory[@model='virtio-pmem']": "NVDIMM",
    "input[@type='passthrough']": "passed-through input device",
    "input[@type='evdev']": "passed-through input device",
}
_NETWORK_OF_THE_HOST = {"hostdev", "vdpa", "vhostuser"}
"""Types of network interfaces that are one device or socket of the host, which the original has."""
_NOT_FOR_A_DRILL = ("graphics", "sound", "audio", "redirdev", "smartcard", "channel[@type='spicevmc']", "watchdog")
_CHARACTER = ("serial", "console", "parallel", "channel")
_OF_THE_HOST = {"file", "dev", "pipe", "tcp", "udp", "unix", "pty"}
"""Types of character devices whose source belongs to the original alone."""


@dataclass(frozen=True, slots=True)
class DomainCopy:
    """The XML to define, and in words what is not in the copy."""

    xml: str
    left_out: tuple[str, ...]


def format_copy(
    snapshot_xml: str, *, name: str, uuid: str, disks: Mapping[str, str], origin: str, network: bool = False
) -> DomainCopy:
    """Write the definition of a domain that is as the snapshot's was, on these qcow2 files by disk target.

    Args:
        origin: what is written into its description, which says where it comes from.
        network: keep its network interfaces, with new MAC addresses.
    """
    root, devices, left_out = _begin(snapshot_xml, name, uuid, disks)
    for interface in devices.findall("interface"):
        if not network or interface.get("type") in _NETWORK_OF_THE_HOST:
            devices.remove(interface)
            left_out.append("network interface")
        else:
            _renew_interface(interface)
    for graphics in devices.findall("graphics"):
        if graphics.get("type") in {"vnc", "spice", "rdp"}:
            for attribute in ("port", "tlsPort", "websocket", "socket"):
                graphics.attrib.pop(attribute, None)
            graphics.set("autoport", "yes")
            for listener in graphics.findall("listen[@type='socket']"):
                listener.attrib.pop("socket", None)
    _set_text(root, "description", origin)
    return DomainCopy(ET.tostring(root, encoding="unicode"), tuple(left_out))


def format_drill(
    snapshot_xml: str, *, name: str, uuid: str, disks: Mapping[str, str], memory_bytes: int | None = None
) -> str:
    """Write a throw-away domain on these overlays: no network, one serial console on a pty, gone when it ends.

    Args:
        memory_bytes: its RAM, if it is not to have as much as the original.
    """
    root, devices, _ = _begin(snapshot_xml, name, uuid, disks)
    for path in ("interface", *_NOT_FOR_A_DRILL):
        for device in devices.findall(path):
            devices.remove(device)
    for element in ("metadata", "memoryBacking"):
        _drop(root, element)
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _set_text(root, event, "destroy")
    if memory_bytes is not None:
        _drop(root, "memory", "currentMemory", "maxMemory", "numatune")
        _drop(devices, "memory")
        for cpu in root.findall("cpu"):
            _drop(cpu, "numa")  # its cells would decide, and not what is said here
        for element in ("memory", "currentMemory"):
            ET.SubElement(root, element, unit="b").text = str(memory_bytes)
    if devices.find("serial") is None and devices.find("console") is None:
        ET.SubElement(devices, "serial", type="pty")
    return ET.tostring(root, encoding="unicode")


def _begin(
    snapshot_xml: str, name: str, uuid: str, disks: Mapping[str, str]
) -> tuple[ET.Element, ET.Element, list[str]]:
    """Return the snapshot's domain under another name, its devices, and what was left out already."""
    snapshot = read_xml(snapshot_xml)
    left_out: list[str] = []
    # That of a guest which ran is as it was started, with what only that run had.
    inactive = snapshot.find("inactiveDomain")
    root = inactive if inactive is not None else snapshot.find("domain")
    if root is None:
        msg = "the snapshot has no domain"
        raise ValueError(msg)
    root.tag = "domain"
    root.attrib.pop("id", None)
    _set_text(root, "name", name)
    _set_text(root, "uuid", uuid)
    _drop(root, "seclabel", "resource")
    if root.find("os/nvram") is not None:
        _forget_firmware(root)
        left_out.append("variables of its firmware, which begin anew")
    _renew_identity(root)
    for arguments in root.findall("{http://libvirt.org/schemas/domain/qemu/1.0}commandline"):
        root.remove(arguments)  # they may name any file, port or device of the original's
        left_out.append("arguments for QEMU")
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    left_out += [*_replace_disks(devices, disks), *_drop_shared(devices)]
    for device in [device for tag in _CHARACTER for device in devices.findall(tag)]:
        _unbind(device)
    for vsock in devices.findall("vsock"):
        _drop(vsock, "cid")
        ET.SubElement(vsock, "cid", auto="yes")
    for device in devices.iter():
        _drop(device, "alias")
    return root, devices, left_out


def _drop_shared(devices: ET.Element) -> list[str]:
    """Take out what two domains cannot both have, and return it in words."""
    left_out = []
    for tag, words in _PASSED_THROUGH.items():
        left_out += [words] * len(devices.findall(tag))
        _drop(devices, tag)
    _drop(devices, "lease")
    for tpm in devices.findall("tpm"):
        if tpm.find("backend[@type='emulator']") is None:
            devices.remove(tpm)
            left_out.append("passed-through TPM")
        else:
            _drop(tpm, "backend/source")
            left_out.append("state of its TPM, which begins anew")
    return left_out


def _forget_firmware(root: ET.Element) -> None:
    """Let libvirt make the firmware's variables anew, from the template."""
    for nvram in root.findall("os/nvram"):
        nvram.text = None
        nvram.attrib.pop("type", None)
        _drop(nvram, "source")


def _renew_identity(root: ET.Element) -> None:
    """Let it have another identity where its guest can see it; that of the firmware must be the domain's own UUID."""
    for sysinfo in root.findall("sysinfo/system"):
        for entry in sysinfo.findall("entry[@name='uuid']"):
            sysinfo.remove(entry)
    for generation in root.findall("genid"):
        generation.text = None


def _renew_interface(interface: ET.Element) -> None:
    """Let libvirt choose anew what no two interfaces may share."""
    _drop(interface, "mac", "target")
    for source in interface.findall("source"):
        source.attrib.pop("portid", None)
    for parameters in interface.findall("virtualport/parameters"):
        for attribute in ("interfaceid", "instanceid"):
            parameters.attrib.pop(attribute, None)


def _replace_disks(devices: ET.Element, disks: Mapping[str, str]) -> list[str]:
    left_out = []
    for disk in devices.findall("disk"):
        target = disk.find("target")
        name = target.get("dev", "") if target is not None else ""
        if name in disks:
            put_file(disk, disks[name])
            driver = disk.find("driver")
            if driver is not None:
                driver.set("type", "qcow2")
            _drop(disk, "mirror", "auth")
            for source in disk.findall("source"):
                _drop(source, "seclabel", "host", "auth")
        elif disk.get("device") in {"cdrom", "floppy"}:
            if disk.find("source") is not None:
                left_out.append(f"medium in {name}")
            disk.set("type", "file")
            _drop(disk, "source", "backingStore")
        else:
            devices.remove(disk)
            left_out.append(f"disk {name}")
    return left_out


def _unbind(device: ET.Element) -> None:
    """Take a character device off the files, sockets and ports of the original."""
    if device.get("type") not in _OF_THE_HOST:
        return
    _drop(device, "source", "protocol", "log")
    device.attrib.pop("tty", None)
    virtio = device.find("target[@type='virtio']")
    if device.tag == "channel" and virtio is not None:
        virtio.attrib.pop("state", None)
        device.set("type", "unix")
    else:
        device.set("type", "pty")


def _drop(parent: ET.Element, *tags: str) -> None:
    for tag in tags:
        holder, _, last = tag.rpartition("/")
        for place in parent.findall(holder) if holder else [parent]:
            for element in place.findall(last):
                place.remove(element)


def _set_text(root: ET.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ET.Element(tag)
        root.insert(0, element)
    element.text = text
