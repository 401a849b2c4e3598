"""A host for libvirt's test driver whose domain has a past: snapshots of ours from before the daemon's start."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from kvmsnapd.model import Consistency, Kind, Mark
from kvmsnapd.naming import format_description, format_name
from tests.builders import UUID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

_DOMAIN = """<domain type='test' {namespace}><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>512</memory>
<os><type>hvm</type></os>{more}<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='/images/{name}.qcow2'/><target dev='vda' bus='virtio'/></disk></devices>{snapshots}</domain>"""
_SNAPSHOT = """<test:domainsnapshot><name>{name}</name><description>{description}</description><state>running</state>
{parent}<creationTime>{time}</creationTime><memory snapshot='internal'/>
<disks><disk name='vda' snapshot='internal'/></disks>{domain}<active>{active}</active></test:domainsnapshot>"""


def write_host_with_history(directory: Path, policy: str, slots: Sequence[datetime]) -> str:
    """Write a test host whose one domain db01 has these snapshots of a policy, oldest first; return its URI."""
    snapshots, parent = "", ""
    plain = _DOMAIN.format(namespace="", name="db01", uuid=UUID, more="", snapshots="")
    for slot in slots:
        mark = Mark(policy, slot, slot, Consistency.MEMORY, Kind.INTERNAL)
        name = format_name(policy, slot)
        snapshots += _SNAPSHOT.format(
            name=name,
            description=escape(format_description(mark)),
            parent=parent,
            time=int(slot.timestamp()),
            domain=plain,
            active=int(slot == slots[-1]),
        )
        parent = f"<parent><name>{name}</name></parent>"
    namespace = "xmlns:test='http://libvirt.org/schemas/domain/test/1.0'"
    state = "<test:runstate>1</test:runstate>"
    domain = _DOMAIN.format(namespace=namespace, name="db01", uuid=UUID, more=state, snapshots=snapshots)
    path = directory / "host.xml"
    path.write_text(f"<node>{domain}<cpu><mhz>1000</mhz><model>demo</model></cpu><memory>8000000</memory></node>")
    return f"test://{path}"
