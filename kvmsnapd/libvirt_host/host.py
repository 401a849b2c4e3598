"""The libvirt adapter: the port's calls in terms of libvirt's."""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import libvirt

from kvmsnapd.domain_xml import format_request, parse_domain, parse_snapshot
from kvmsnapd.errors import DomainNotFoundError, HypervisorError, HypervisorUnreachableError, SnapshotNotFoundError
from kvmsnapd.libvirt_host.capabilities import derive_capabilities
from kvmsnapd.libvirt_host.connection import Connection
from kvmsnapd.libvirt_host.translate import translated_errors
from kvmsnapd.model import Domain, DomainState, Inventory, Kind, Snapshot

if TYPE_CHECKING:
    from kvmsnapd.model import Capabilities, TakeRequest

# libvirtd serves five calls of one connection at a time; a sixth waits (measured), and so would keepalive.
CALLS_IN_FLIGHT = 4

# Without it a freeze sent to a hung agent with which libvirt was in sync blocks for as long as the agent hangs
# (measured, libvirt 9.0 and 11.3). Long enough for a busy file system to be flushed.
_AGENT_DEADLINE_SECONDS = 30

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTOFF: DomainState.SHUT_OFF,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
}
_BETWEEN = {
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended by its guest",
}
_PAUSES = {
    libvirt.VIR_DOMAIN_PAUSED_IOERROR: "paused by an I/O error (is the storage full?)",
    libvirt.VIR_DOMAIN_PAUSED_SAVE: "paused by a save that did not finish",
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION: "paused by a migration",
    libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT: "paused by a snapshot in progress",
}


class LibvirtHost:
    """One libvirt, by URI. Implements :class:`kvmsnapd.hypervisor.Hypervisor`.

    Inventory has a read-only connection of its own, so that it answers while slow calls fill the other one. With
    ``test:///`` one connection serves all, since a custom test file is private to each.
    """

    def __init__(self, uri: str) -> None:
        """Remember the URI; the first call connects."""
        self._writing = Connection(uri, read_only=False)
        self._reading = self._writing if uri.startswith("test:") else Connection(read_only_uri(uri), read_only=True)
        self._in_flight = threading.BoundedSemaphore(CALLS_IN_FLIGHT)
        self._capabilities: tuple[Any, Capabilities] | None = None
        self._known: dict[tuple[str, str], Snapshot] = {}

    def capabilities(self) -> Capabilities:
        """See the port. Read once per connection."""
        connection = self._reading.get()
        if self._capabilities is None or self._capabilities[0] is not connection:
            with translated_errors("capabilities"):
                derived = derive_capabilities(connection.getType(), connection.getLibVersion())
            self._capabilities = (connection, derived)
        return self._capabilities[1]

    def inventory(self) -> tuple[Inventory, ...]:
        """See the port.

        Names are listed anew each time, the XML of a snapshot is read when its name is first seen. What it says can
        change later (``virsh snapshot-edit``); :meth:`domain`, which each run begins with, reads it again.
        """
        connection = self._reading.get()
        found: list[Inventory] = []
        known: dict[tuple[str, str], Snapshot] = {}
        with translated_errors("list_domains"):
            handles = connection.listAllDomains(0)
        for handle in handles:
            uuid, name = handle.UUIDString(), handle.name()
            try:
                with translated_errors("list_snapshots", domain=name):
                    snapshots = tuple(self._cheap_snapshots(uuid, handle))
            except DomainNotFoundError:
                continue
            except HypervisorUnreachableError:
                raise
            except HypervisorError:
                # One domain in trouble must not hide all others; its own run meets the error again and reports it.
                snapshots = tuple(s for (owner, _), s in list(self._known.items()) if owner == uuid)
            known.update({(uuid, snapshot.name): snapshot for snapshot in snapshots})
            found.append(Inventory(uuid, name, snapshots))
        self._known = known
        return tuple(sorted(found, key=lambda inventory: inventory.name))

    def _cheap_snapshots(self, uuid: str, handle: Any) -> list[Snapshot]:  # noqa: ANN401
        snapshots = []
        for snapshot in handle.listAllSnapshots(0):
            known = self._known.get((uuid, snapshot.getName()))
            read = known or _read_snapshot(snapshot)
            if read:
                snapshots.append(read)
        return snapshots

    def domain(self, uuid: str) -> Domain:
        """See the port."""
        connection = self._reading.get()
        with translated_errors("read_domain", domain=uuid):
            handle = connection.lookupByUUIDString(uuid)
            state, detail = _describe_state(*handle.state())
            document = parse_domain(handle.XMLDesc(0))
            snapshots = tuple(s for s in map(_read_snapshot, handle.listAllSnapshots(0)) if s)
            self._known.update({(uuid, snapshot.name): snapshot for snapshot in snapshots})
            return Domain(
                uuid=uuid,
                name=handle.name(),
                snapshots=snapshots,
                state=state,
                state_detail=detail,
                persistent=bool(handle.isPersistent()),
                disks=document.disks,
                pflash=document.pflash,
                managed_save=bool(handle.hasManagedSaveImage(0)),
                agent_connected=document.agent_connected,
            )

    def take_snapshot(self, request: TakeRequest) -> Snapshot:
        """See the port.

        Source: virDomainSnapshotCreateXML. ATOMIC: all disks or none. DISK_ONLY is always said for external ones:
        without it libvirt 9.0 demands an internal snapshot of a shut-off domain. QUIESCE requires DISK_ONLY.
        """
        flags = 0
        if request.mark.kind is Kind.EXTERNAL:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        if request.quiesce:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
        with self._in_flight, translated_errors("snapshot_create", domain=request.domain_name):
            handle = self._writing.get().lookupByUUIDString(request.domain_uuid)
            if request.quiesce:
                handle.agentSetResponseTimeout(_AGENT_DEADLINE_SECONDS, 0)
            return parse_snapshot(handle.snapshotCreateXML(format_request(request), flags).getXMLDesc(0))

    def delete_snapshot(self, domain_uuid: str, name: str) -> None:
        """See the port. One snapshot a call: CHILDREN would hold the domain for as long as all of them take."""
        try:
            with self._in_flight, translated_errors("snapshot_delete", domain=domain_uuid):
                handle = self._writing.get().lookupByUUIDString(domain_uuid)
                handle.snapshotLookupByName(name, 0).delete(0)
        except SnapshotNotFoundError:
            return

    def thaw(self, domain_uuid: str) -> None:
        """See the port. fsThaw is idempotent."""
        with self._in_flight, translated_errors("thaw", domain=domain_uuid):
            handle = self._writing.get().lookupByUUIDString(domain_uuid)
            handle.agentSetResponseTimeout(_AGENT_DEADLINE_SECONDS, 0)
            handle.fsThaw()

    def close(self) -> None:
        """Close the connections."""
        self._reading.close()
        self._writing.close()


def read_only_uri(uri: str) -> str:
    """Return the URI for the read-only connection: an explicit ``?socket=`` must name the read-only socket."""
    return re.sub(r"([?&]socket=[^&]*-sock)(?=&|$)", r"\1-ro", uri)


def _read_snapshot(snapshot: Any) -> Snapshot | None:  # noqa: ANN401
    """Read one snapshot; None if it vanished since it was listed. One we do not understand is foreign and mixed."""
    try:
        with translated_errors("read_snapshot"):
            return parse_snapshot(snapshot.getXMLDesc(0))
    except SnapshotNotFoundError:
        return None
    except ValueError:
        return Snapshot(snapshot.getName(), datetime.fromtimestamp(0, UTC), Kind.MIXED)


def _describe_state(state: int, reason: int) -> tuple[DomainState, str]:
    if state == libvirt.VIR_DOMAIN_PAUSED and reason != libvirt.VIR_DOMAIN_PAUSED_USER:
        return DomainState.UNSETTLED, _PAUSES.get(reason, f"paused for reason {reason}")
    settled = _STATES.get(state)
    return (settled, settled) if settled else (DomainState.UNSETTLED, _BETWEEN.get(state, f"in state {state}"))
