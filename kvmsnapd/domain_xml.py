"""libvirt's XML: domain and snapshot documents read into values, and the request for a snapshot written."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from datetime import UTC, datetime

from kvmsnapd.model import Disk, Kind, Snapshot, TakeRequest
from kvmsnapd.naming import format_description, parse_mark

AGENT_CHANNEL = "org.qemu.guest_agent.0"
_PFLASH = ("os[@firmware='efi']", "os/loader[@type='pflash']", "os/nvram")


@dataclass(frozen=True, slots=True)
class DomainDocument:
    """What a domain's XML says that matters for snapshots."""

    disks: tuple[Disk, ...]
    pflash: bool
    agent_connected: bool


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
    )


def _parse_disk(element: ET.Element) -> Disk:
    driver, source, target = element.find("driver"), element.find("source"), element.find("target")
    return Disk(
        target=target.get("dev", "") if target is not None else "",
        device=element.get("device", "disk"),
        source_type=element.get("type", "file"),
        path=_path(source) or None if source is not None else None,
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
    return source.get("file") or source.get("dev") or ""


def parse_snapshot(text: str) -> Snapshot:
    """Read a snapshot's XML, as libvirt returns it; raise ValueError if it cannot be understood."""
    try:
        root = ET.fromstring(text)  # noqa: S314  # from libvirt, which wrote it itself
        created_at = datetime.fromtimestamp(int(root.findtext("creationTime", "0")), UTC)
    except (ET.ParseError, OverflowError, OSError) as error:
        raise ValueError(str(error)) from error
    name = root.findtext("name", "")
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
        mark=parse_mark(name, root.findtext("description", "")),
        offline=root.findtext("state") == "shutoff",
        overlays=tuple(
            (disk.get("name", ""), _path(source))
            for disk in root.iterfind("disks/disk[@snapshot='external']")
            for source in disk.iterfind("source")
        ),
    )


def format_request(request: TakeRequest) -> str:
    """Write the ``<domainsnapshot>`` document that asks libvirt for this snapshot."""
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = request.name
    ET.SubElement(root, "description").text = format_description(request.mark)
    if request.overlays or request.excluded:
        disks = ET.SubElement(root, "disks")
        for target, overlay in request.overlays:
            disk = ET.SubElement(disks, "disk", name=target, snapshot="external", type="file")
            ET.SubElement(disk, "driver", type="qcow2")
            ET.SubElement(disk, "source", file=overlay)
        for target in request.excluded:
            ET.SubElement(disks, "disk", name=target, snapshot="no")
    return ET.tostring(root, encoding="unicode")
