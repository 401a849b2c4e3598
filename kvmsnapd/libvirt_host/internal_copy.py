"""Take an internal snapshot of a shut-off domain out of its images, by way of a domain that never runs.

libvirt's storage API reads the present state of an image only. So the images are copied byte by byte, a second domain
is defined on the copies, with a record of the snapshot as one of a domain that is off, and reverted: then their state
is that of then. The images of the original are only read. Source of all that is said about libvirt here: measured with
9.0 and 11.3.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import libvirt

from kvmsnapd.domain_xml import parse_domain, read_xml
from kvmsnapd.errors import CopyRefusedError, DomainBusyError
from kvmsnapd.libvirt_host.take import resolve_volume
from kvmsnapd.naming import DRILL_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmsnapd.libvirt_host.storage import StoragePools


def take_out(  # noqa: PLR0917  # the adapter's own, then the port's
    connection: Any,  # noqa: ANN401
    pools: StoragePools,
    handle: Any,  # noqa: ANN401
    snapshot: str,
    images: Mapping[str, str],
    wanted: Callable[[], bool],
) -> None:
    """Make these empty files images of the snapshot's disks, by target; each has its other snapshots still.

    Raises:
        DomainBusyError: the domain is not off, or its images were changed meanwhile; the files are of no use.
        CopyRefusedError: it is no longer wanted; likewise.
    """
    before = _seen(connection, pools, handle, images)
    for target, (path, _) in before.items():
        if not pools.duplicate(path, images[target], wanted=wanted):
            msg = "stopped; nothing is left of the copy"
            raise CopyRefusedError(msg)
    if _seen(connection, pools, handle, images) != before:
        msg = f"the images of {handle.name()} were changed while they were copied; nothing is left of the copy"
        raise DomainBusyError(msg, operation="file_duplicate", domain=handle.name())
    text = handle.snapshotLookupByName(snapshot, 0).getXMLDesc(0)
    with _workbench(connection, text, images) as (bench, domain_xml):
        record = bench.snapshotCreateXML(
            _format_record(snapshot, domain_xml, images), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        )
        bench.revertToSnapshot(record, 0)


def _seen(
    connection: Any,  # noqa: ANN401
    pools: StoragePools,
    handle: Any,  # noqa: ANN401
    images: Mapping[str, str],
) -> dict[str, tuple[str, object]]:
    """Return, by target, the domain's image and when it was last changed; DomainBusyError if the domain is not off."""
    if handle.isActive():
        msg = f"{handle.name()} is not shut off, and its images cannot be read; nothing is left of the copy"
        raise DomainBusyError(msg, operation="file_duplicate", domain=handle.name())
    disks = [resolve_volume(connection, disk) for disk in parse_domain(handle.XMLDesc(0)).disks]
    paths = {disk.target: disk.path or "" for disk in disks if disk.target in images}
    layers = {target: pools.layer(path) for target, path in paths.items()}
    return {target: (paths[target], layer and layer.changed_at) for target, layer in layers.items()}


@contextmanager
def _workbench(connection: Any, snapshot_xml: str, images: Mapping[str, str]) -> Iterator[tuple[Any, str]]:  # noqa: ANN401
    """Define a domain of nothing but these images while the block runs, and one that was left before replaced."""
    digest = hashlib.sha256("".join(images.values()).encode()).hexdigest()
    name = f"{DRILL_NAME}{digest[:8]}"
    with suppress(libvirt.libvirtError):
        _take_away(connection.lookupByName(name))
    bench = connection.defineXML(_format_workbench(snapshot_xml, name, images))
    try:
        yield bench, bench.XMLDesc(0)
    finally:
        _take_away(bench)


def _take_away(bench: Any) -> None:  # noqa: ANN401
    bench.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)


def _format_workbench(snapshot_xml: str, name: str, images: Mapping[str, str]) -> str:
    """Write the smallest domain that this libvirt accepts beside the snapshot's: never started."""
    original = read_xml(snapshot_xml).find("domain")
    root = ET.Element("domain", type=original.get("type", "kvm") if original is not None else "kvm")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "memory", unit="MiB").text = "1"
    kind = ET.SubElement(ET.SubElement(root, "os"), "type")
    kind.text = "hvm"
    found = original.find("os/type") if original is not None else None
    if found is not None:
        kind.attrib.update({key: value for key, value in found.attrib.items() if key == "arch"})
    devices = ET.SubElement(root, "devices")
    for number, path in enumerate(images.values()):
        disk = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(disk, "driver", name="qemu", type="qcow2")
        ET.SubElement(disk, "source", file=path)
        ET.SubElement(disk, "target", dev=_target(number), bus="scsi")
    return ET.tostring(root, encoding="unicode")


def _format_record(snapshot: str, domain_xml: str, images: Mapping[str, str]) -> str:
    root = ET.Element("domainsnapshot")
    for tag, text in (("name", snapshot), ("state", "shutoff"), ("creationTime", "1")):
        ET.SubElement(root, tag).text = text
    ET.SubElement(root, "memory", snapshot="no")
    disks = ET.SubElement(root, "disks")
    for number, _ in enumerate(images):
        ET.SubElement(disks, "disk", name=_target(number), snapshot="internal")
    root.append(read_xml(domain_xml))
    return ET.tostring(root, encoding="unicode")


def _target(number: int) -> str:
    first, last = divmod(number, 26)
    return f"sd{chr(ord('a') + first - 1) if first else ''}{chr(ord('a') + last)}"
