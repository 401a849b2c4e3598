"""libvirt's XML: domain and snapshot documents read into values, and the request for a snapshot written."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from kvmsnapd.model import Disk, Kind, Snapshot, TakeRequest
from kvmsnapd.naming import format_description, is_newer, parse_mark

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmsnapd.model import Mark

AGENT_CHANNEL = "org.qemu.guest_agent.0"
_PFLASH = ("os[@firmware='efi']", "os/loader[@type='pflash']", "os/nvram")


@dataclass(frozen=True, slots=True)
class DomainDocument:
    """What a domain's XML says that matters for snapshots."""

    disks: tuple[Disk, ...]
    pflash: bool
    agent_connected: bool
    memory_bytes: int


def parse_domain(text: str) -> DomainDocument:
    """Read a domain's XML, active or inactive.

    ``agent_connected`` is true when the guest agent's channel is connected; a hung agent stays connected (measured,
    libvirt 9.0 and 11.3), so this is a reason to try, not a promise.
    """
    root = ET.fromstring(text)  # noqa: S314  # from libvirt, which wrote it itself
    channel = root.find(f"devices/channel/target[@name='{AGENT_CHANNEL}']")
    return DomainDocument(
        disks=tuple(_parse_disk(element) for element in root.iterfind("devices/disk")),
        pflash=any(root.find(path) is not None for path in _PFLASH),
        agent_connected=channel is not None and channel.get("state") == "connected",
        memory_bytes=int(root.findtext("memory", "0")) * 1024,  # libvirt states it in KiB, whatever unit was given
    )


def _parse_disk(element: ET.Element) -> Disk:
    driver, source, target = element.find("driver"), element.find("source"), element.find("target")
    return Disk(
        target=target.get("dev", "") if target is not None else "",
        device=element.get("device", "disk"),
        source_type=element.get("type", "file"),
        path=_path(source) or None if source is not None else None,
        pool=source.get("pool") if source is not None else None,
        format=driver.get("type", "raw") if driver is not None else "raw",
        readonly=element.find("readonly") is not None or element.get("device") == "cdrom",
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        # An empty <backingStore/> ends a chain; it stands for no layer.
        backing=tuple(_path(layer) for layer in element.iterfind(".//backingStore/source")),
        block_job=element.find("mirror") is not None,
        left_out=element.get("snapshot") == "no",
    )


def _path(source: ET.Element) -> str:
    return source.get("file") or source.get("dev") or source.get("volume") or ""


def parse_snapshot(text: str) -> Snapshot:
    """Read a snapshot's XML, as libvirt returns it; raise ValueError if it cannot be understood."""
    try:
        root = ET.fromstring(text)  # noqa: S314  # from libvirt, which wrote it itself
        created_at = datetime.fromtimestamp(int(root.findtext("creationTime", "0")), UTC)
    except (ET.ParseError, OverflowError, OSError) as error:
        raise ValueError(str(error)) from error
    name, description = root.findtext("name", ""), root.findtext("description", "")
    modes = {disk.get("snapshot", "no") for disk in root.iterfind("disks/disk")}
    memory = root.find("memory")
    if memory is not None:
        modes.add(memory.get("snapshot", "no"))
    modes.discard("no")
    # libvirt's test driver lists no disks for its snapshots, all of which are internal. "manual" (since libvirt 8.2) is
    # neither.
    kind = Kind.INTERNAL if modes <= {"internal"} else Kind.EXTERNAL if modes == {"external"} else Kind.MIXED
    return Snapshot(
        name=name,
        created_at=created_at,
        kind=kind,
        parent=root.findtext("parent/name"),
        mark=parse_mark(name, description),
        newer=is_newer(name, description),
        offline=root.findtext("state") == "shutoff",
        overlays=tuple(
            (disk.get("name", ""), _path(source))
            for disk in root.iterfind("disks/disk[@snapshot='external']")
            for source in disk.iterfind("source")
        ),
        covers=tuple(_covered(root)),
        memory_file=memory.get("file") if memory is not None else None,
    )


def _covered(root: ET.Element) -> Iterator[tuple[str, str]]:
    """Yield target and active file of each disk of the domain as it was when the snapshot was taken."""
    for disk in root.iterfind("domain/devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is not None and source is not None:
            yield target.get("dev", ""), _path(source)


def with_description(text: str, mark: Mark) -> str:
    """Return the XML of a snapshot of ours with this mark as its description, every other byte as it was."""
    element = f"<description>{escape(format_description(mark))}</description>"
    # The snapshot's own is the first; its domain may have another.
    return re.sub(r"<description>.*?</description>", lambda _: element, text, count=1, flags=re.DOTALL)


def with_files_for_volumes(text: str, files: Mapping[str, str]) -> str:
    """Return a snapshot's XML in which the covered disks with these targets are files, not volumes of a pool."""
    root = read_xml(text)
    for disk in root.iterfind(".//devices/disk[@type='volume']"):
        path = files.get(_target(disk))
        if path:
            put_file(disk, path)
    return ET.tostring(root, encoding="unicode")


def with_disk_files(text: str, files: Mapping[str, str]) -> str:
    """Return a domain's XML in which the disks with these targets are these qcow2 files, whatever is below them."""
    root = read_xml(text)
    for disk in root.iterfind("devices/disk"):
        path = files.get(_target(disk))
        if path:
            put_file(disk, path)
            driver = disk.find("driver")
            if driver is not None:
                driver.set("type", "qcow2")
    return ET.tostring(root, encoding="unicode")


def with_overlays(text: str, overlays: Mapping[str, str]) -> str:
    """Return a snapshot's XML in which these files receive the writes since, by disk target."""
    root = read_xml(text)
    for disk in root.iterfind("disks/disk[@snapshot='external']"):
        source = disk.find("source")
        if source is not None and disk.get("name") in overlays:
            source.set("file", overlays[disk.get("name", "")])
    return ET.tostring(root, encoding="unicode")


def formats_of(snapshot_xml: str) -> tuple[Disk, ...]:
    """Return the disks of the domain as they were when the snapshot was taken: its covered files and their formats."""
    root = ET.fromstring(snapshot_xml)  # noqa: S314  # from libvirt, which wrote it itself
    return tuple(_parse_disk(element) for element in root.iterfind("domain/devices/disk"))


def format_standalone(request: TakeRequest, domain_xml: str, created: int) -> str:
    """Write the record of a snapshot of a shut-off domain whose data is in files of its own: the request's overlays."""
    root = read_xml(format_request(request))
    for disk in root.iterfind("disks/disk[@snapshot='external']/source"):
        disk.set("file", f"{disk.get('file')}.next")
    for name, value in (("state", "shutoff"), ("creationTime", str(created))):
        ET.SubElement(root, name).text = value
    ET.SubElement(root, "memory", snapshot="no")
    root.append(ET.fromstring(with_disk_files(domain_xml, dict(request.overlays))))  # noqa: S314  # libvirt's own
    return ET.tostring(root, encoding="unicode")


def read_xml(text: str) -> ET.Element:
    """Read XML of libvirt's so that it is written with the prefixes that it has."""
    for _, (prefix, uri) in ET.iterparse(StringIO(text), events=["start-ns"]):  # noqa: S314  # libvirt's own
        if not re.fullmatch(r"ns\d+", prefix):  # reserved by ElementTree
            ET.register_namespace(prefix, uri)
    return ET.fromstring(text)  # noqa: S314  # from libvirt, which wrote it itself


def _target(disk: ET.Element) -> str:
    target = disk.find("target")
    return target.get("dev", "") if target is not None else ""


def put_file(disk: ET.Element, path: str) -> None:
    """Make the disk one of this file, instead of whatever it was of."""
    disk.set("type", "file")
    for layer in disk.findall("backingStore"):
        disk.remove(layer)
    source = disk.find("source")
    if source is None:
        source = ET.SubElement(disk, "source")
    for attribute in ("pool", "volume", "mode", "index", "dev", "protocol", "name"):
        source.attrib.pop(attribute, None)
    source.set("file", path)


def format_request(request: TakeRequest) -> str:
    """Write the ``<domainsnapshot>`` document that asks libvirt for this snapshot."""
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = request.name
    ET.SubElement(root, "description").text = format_description(request.mark)
    if request.memory_file:
        ET.SubElement(root, "memory", snapshot="external", file=request.memory_file)
    if request.overlays or request.excluded:
        disks = ET.SubElement(root, "disks")
        for target, overlay in request.overlays:
            disk = ET.SubElement(disks, "disk", name=target, snapshot="external", type="file")
            ET.SubElement(disk, "driver", type="qcow2")
            ET.SubElement(disk, "source", file=overlay)
        for target in request.excluded:
            ET.SubElement(disks, "disk", name=target, snapshot="no")
    return ET.tostring(root, encoding="unicode")
