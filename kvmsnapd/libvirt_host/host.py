"""The libvirt adapter: the port's calls in terms of libvirt's."""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import libvirt

from kvmsnapd.domain_xml import parse_domain, parse_snapshot, with_description
from kvmsnapd.errors import (
    DomainNotFoundError,
    GuestAgentRefusedError,
    GuestFrozenError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotNotFoundError,
)
from kvmsnapd.libvirt_host.agent import is_frozen
from kvmsnapd.libvirt_host.capabilities import derive_capabilities
from kvmsnapd.libvirt_host.connection import Connection
from kvmsnapd.libvirt_host.storage import StoragePools, target_of
from kvmsnapd.libvirt_host.take import AGENT_DEADLINE_SECONDS, redefine, resolve_volume, take_snapshot
from kvmsnapd.libvirt_host.translate import broken_connection, translated_errors
from kvmsnapd.libvirt_host.ways_back import WaysBack, delete_standalone
from kvmsnapd.model import Domain, DomainState, Inventory, Kind, Snapshot, Storage

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from kvmsnapd.model import Capabilities, Layer, Mark, TakeRequest

# An agent that is there answers a question that moves nothing at once.
_AGENT_ANSWERS_WITHIN_SECONDS = 5

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
_RESUMABLE = {
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR),
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SAVE),
}


class LibvirtHost(WaysBack):
    """One libvirt, by URI. Implements :class:`kvmsnapd.hypervisor.Hypervisor`.

    What only reads does so on read-only connections. With ``test:///`` one connection serves all, since a custom test
    file is private to each.
    """

    def __init__(self, uri: str) -> None:
        """Remember the URI; the first call connects."""
        self._writing = Connection(uri, read_only=False)
        self._reading = self._writing if uri.startswith("test:") else Connection(read_only_uri(uri), read_only=True)
        self._pools = StoragePools(self._writing)
        self._capabilities: WeakKeyDictionary[Any, Capabilities] = WeakKeyDictionary()
        self._known: dict[tuple[str, str], Snapshot] = {}

    def capabilities(self) -> Capabilities:
        """See the port. Read once per connection."""
        connection = self._reading.get()
        known = self._capabilities.get(connection)
        if known is None:
            with translated_errors("capabilities"):
                known = derive_capabilities(connection.getType(), connection.getLibVersion())
            self._capabilities[connection] = known
        return known

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
            state, detail = _describe_state(*(state_and_reason := handle.state()))
            document = parse_domain(handle.XMLDesc(0))
            disks = tuple(resolve_volume(connection, disk) for disk in document.disks)
            snapshots = tuple(s for s in map(_read_snapshot, handle.listAllSnapshots(0)) if s)
            self._known.update({(uuid, snapshot.name): snapshot for snapshot in snapshots})
            return Domain(
                uuid=uuid,
                name=handle.name(),
                snapshots=snapshots,
                state=state,
                state_detail=detail,
                persistent=bool(handle.isPersistent()),
                disks=disks,
                pflash=document.pflash,
                managed_save=bool(handle.hasManagedSaveImage(0)),
                agent_connected=document.agent_connected,
                memory_bytes=document.memory_bytes,
                run_id=None if state is DomainState.SHUT_OFF else handle.ID(),
                resumable=tuple(state_and_reason) in _RESUMABLE,
                busy=state is not DomainState.SHUT_OFF and _has_job(handle),
            )

    def storage(self, domain: Domain, folders: Collection[str]) -> Storage:
        """See the port. Layers are told of shut-off domains only: of a running one they change all the time."""
        if not self.capabilities().storage_api:
            return Storage()
        free = {folder: self._pools.free_bytes(folder) for folder in folders}
        layers: dict[str, Layer] = {}
        if domain.state is DomainState.SHUT_OFF:
            for disk in domain.disks:
                if disk.holds_state and disk.path:
                    layers.update((layer.path, layer) for layer in self._pools.chain(disk.path))
        return Storage({folder: count for folder, count in free.items() if count is not None}, layers)

    def free_bytes(self, folder: str) -> int | None:
        """See the port."""
        return self._pools.free_bytes(folder) if self.capabilities().storage_api else None

    def allocated(self, overlays: Iterable[tuple[str, str]]) -> Mapping[str, int]:
        """See the port."""
        if not self.capabilities().storage_api:
            return {}
        found = {target: self._pools.layer(path) for target, path in overlays}
        return {target: layer.allocated for target, layer in found.items() if layer and layer.allocated is not None}

    def files(self, folder: str) -> tuple[Layer, ...] | None:
        """See the port."""
        if not self.capabilities().storage_api:
            return None
        try:
            return self._pools.files(folder)
        except HypervisorUnreachableError:
            self._reading.get()  # which raises in its turn, unless we may read and not write
            return None

    def sleeping_pool(self, folder: str) -> str | None:
        """See the port."""
        connection = self._reading.get()
        with translated_errors("list_pools"):
            for pool in connection.listAllStoragePools(libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_INACTIVE):
                if target_of(pool) == folder:
                    return str(pool.name())
        return None

    def filesystems(self, domain_uuid: str) -> tuple[str, ...]:
        """See the port."""
        with self._telling_frozen(domain_uuid), translated_errors("filesystems", domain=domain_uuid):
            handle = self._writing.get().lookupByUUIDString(domain_uuid)
            handle.agentSetResponseTimeout(_AGENT_ANSWERS_WITHIN_SECONDS, 0)
            return tuple(sorted({mountpoint for mountpoint, *_ in handle.fsInfo(0)}))

    def take_snapshot(self, request: TakeRequest) -> Snapshot:
        """See the port; the ways to take one are in :mod:`.take`."""
        uuid = request.domain_uuid
        with self._telling_frozen(uuid), translated_errors("snapshot_create", domain=request.domain_name):
            return take_snapshot(self._writing, self._pools, request)

    @contextmanager
    def _telling_frozen(self, domain_uuid: str) -> Iterator[None]:
        """Raise GuestFrozenError for what the agent refuses because the guest is frozen, if it does not say so."""
        try:
            yield
        except GuestAgentRefusedError as error:
            if isinstance(error, GuestFrozenError) or "has been disabled" not in str(error):
                raise
            with translated_errors("lookup", domain=domain_uuid):
                frozen = is_frozen(self._writing.get().lookupByUUIDString(domain_uuid))
            if not frozen:
                raise
            words = f"the guest's file systems are frozen already: {error}"
            raise GuestFrozenError(words, operation=error.operation, domain=error.domain, code=error.code) from error

    def describe_snapshot(self, domain_uuid: str, name: str, mark: Mark) -> None:
        """See the port. REDEFINE keeps parent, children and `current`; without SECURE passwords would be lost."""
        with translated_errors("snapshot_redefine", domain=domain_uuid):
            handle = self._writing.get().lookupByUUIDString(domain_uuid)
            snapshot = handle.snapshotLookupByName(name, 0)
            text = snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
            redefine(handle, snapshot, with_description(text, mark))
        self._known.pop((domain_uuid, name), None)

    def delete_snapshot(self, domain_uuid: str, name: str) -> None:
        """See the port. One snapshot a call: CHILDREN would hold the domain for as long as all of them take."""
        try:
            with translated_errors("snapshot_delete", domain=domain_uuid):
                handle = self._writing.get().lookupByUUIDString(domain_uuid)
                snapshot = handle.snapshotLookupByName(name, 0)
                record = parse_snapshot(snapshot.getXMLDesc(0))
                if record.mark and record.mark.standalone:
                    delete_standalone(self._pools, snapshot, record)
                    return
                memory_file = record.memory_file
                snapshot.delete(0)
                if memory_file:  # libvirt 9.0 leaves it behind (measured); 11.3 does not
                    with suppress(HypervisorError):  # the snapshot is gone all the same; doctor names the file
                        self._pools.remove(memory_file)
        except SnapshotNotFoundError:
            return

    def progress(self, domain_uuid: str) -> tuple[int, int] | None:
        """See the port.

        Measured with libvirt 9.0 and 11.3: while snapshotDelete merges, of a running domain or of one that is shut off,
        blockJobInfo answers from another connection within milliseconds (cur, end), and jobStats fails; while RAM is
        saved beside the running guest jobStats tells. During an internal snapshot both wait for its end.
        """
        connection = self._reading.get()
        if not self.capabilities().storage_api:
            return None
        try:
            handle = connection.lookupByUUIDString(domain_uuid)
            targets = [disk.target for disk in parse_domain(handle.XMLDesc(0)).disks if disk.holds_state]
            jobs = [job for job in (handle.blockJobInfo(target, 0) for target in targets) if job and job["end"]]
            if jobs:
                return sum(int(job["cur"]) for job in jobs), sum(int(job["end"]) for job in jobs)
            stats = handle.jobStats(0)
            total = int(stats.get("data_total", 0))
            return (total - int(stats.get("data_remaining", 0)), total) if total else None
        except libvirt.libvirtError as error:
            if broken_connection(error):
                msg = f"cannot reach libvirt: {error}"
                raise HypervisorUnreachableError(msg, operation="progress", domain=domain_uuid) from error
            return None

    def thaw(self, domain_uuid: str) -> None:
        """See the port. fsThaw is idempotent."""
        with translated_errors("thaw", domain=domain_uuid):
            handle = self._writing.get().lookupByUUIDString(domain_uuid)
            handle.agentSetResponseTimeout(AGENT_DEADLINE_SECONDS, 0)
            handle.fsThaw()

    def check_rights(self) -> None:
        """Open the connection that changes domains, which a user may be refused who may read them.

        Raises:
            HypervisorUnreachableError: libvirt does not let us.
        """
        self._writing.get()

    def close(self) -> None:
        """Close the connections; one that is broken is closed already."""
        self._pools.close()
        for connection in (self._reading, self._writing):
            with suppress(HypervisorError):
                connection.close()


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


def _has_job(handle: Any) -> bool:  # noqa: ANN401
    """Tell whether libvirt has a job on the domain; to ask that takes no job of its own."""
    try:
        return int(handle.controlInfo(0)[0]) in {libvirt.VIR_DOMAIN_CONTROL_JOB, libvirt.VIR_DOMAIN_CONTROL_OCCUPIED}
    except libvirt.libvirtError:  # the test driver cannot say; of a broken connection the next call tells
        return False


def _describe_state(state: int, reason: int) -> tuple[DomainState, str]:
    if state == libvirt.VIR_DOMAIN_PAUSED and reason != libvirt.VIR_DOMAIN_PAUSED_USER:
        return DomainState.UNSETTLED, _PAUSES.get(reason, f"paused for reason {reason}")
    settled = _STATES.get(state)
    return (settled, settled) if settled else (DomainState.UNSETTLED, _BETWEEN.get(state, f"in state {state}"))
