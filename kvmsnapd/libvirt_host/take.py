"""The ways to take a snapshot with libvirt: running, shut off on overlays of our own making, with RAM.

Source of all that is said about libvirt here: measured with 9.0 and 11.3.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import libvirt

from kvmsnapd.domain_xml import format_request, parse_domain, parse_snapshot, with_files_for_volumes
from kvmsnapd.errors import DomainBusyError, HypervisorError, SnapshotExistsError, StorageFullError
from kvmsnapd.libvirt_host.translate import broken_connection
from kvmsnapd.model import Consistency, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsnapd.libvirt_host.connection import Connection
    from kvmsnapd.libvirt_host.storage import StoragePools
    from kvmsnapd.model import Disk, Snapshot, TakeRequest

AGENT_DEADLINE_SECONDS = 30
"""How long the agent may take to freeze or thaw; enough for a busy file system to be flushed.

Without it a freeze sent to a hung agent with which libvirt was in sync blocks for as long as the agent hangs.
"""

_REUSE = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT

_RAM_BYTES_PER_SECOND = 50e6
"""A live save of RAM slower than this, over all, does not come to an end: the guest writes faster than it is saved."""

_EVENT_LATE_SECONDS = 0.5
"""The event of the guest's awakening may come after the call's answer (measured: 85 ms)."""

_FIRST_DOWNTIME_MS = 300
"""What QEMU takes by itself."""

_PATIENT_SECONDS = 10.0
_LOOK_SECONDS = 1.0

_LONGEST_DOWNTIME_MS = 2_000_000
"""QEMU takes no more."""


def take_snapshot(writing: Connection, pools: StoragePools, request: TakeRequest) -> Snapshot:
    """Take one snapshot; raises libvirt's own errors, which the caller translates.

    Source of the flags: virDomainSnapshotCreateXML. ATOMIC: all disks or none. DISK_ONLY is always said for external
    ones without RAM: otherwise libvirt 9.0 demands an internal snapshot of a shut-off domain. QUIESCE requires
    DISK_ONLY. LIVE: the guest runs on while its RAM is saved.
    """
    connection = writing.get()
    handle = connection.lookupByUUIDString(request.domain_uuid)
    if request.mark.kind is Kind.INTERNAL:
        return _create(handle, request, 0)
    if request.memory_file:
        return _take_with_memory(writing, handle, pools, request)
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    if request.mark.consistency is Consistency.OFFLINE:
        return _take_offline(connection, handle, pools, request, flags)
    if request.quiesce:
        handle.agentSetResponseTimeout(AGENT_DEADLINE_SECONDS, 0)
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
    return _create(handle, request, flags)


def resolve_volume(connection: Any, disk: Disk) -> Disk:  # noqa: ANN401
    """Return the disk with the file that its pool and volume stand for, if they can be found."""
    if disk.source_type != "volume" or not disk.pool:
        return disk
    try:
        volume = connection.storagePoolLookupByName(disk.pool).storageVolLookupByName(disk.path)
        return replace(disk, path=volume.path())
    except libvirt.libvirtError:
        return replace(disk, path=None)


def _create(handle: Any, request: TakeRequest, flags: int) -> Snapshot:  # noqa: ANN401
    return parse_snapshot(handle.snapshotCreateXML(format_request(request), flags).getXMLDesc(0))


def _take_offline(
    connection: Any,  # noqa: ANN401
    handle: Any,  # noqa: ANN401
    pools: StoragePools,
    request: TakeRequest,
    flags: int,
) -> Snapshot:
    """Take an external snapshot of a shut-off domain on overlays of our own making.

    libvirt would make them readable by everybody (9.0.0 and others before 11.10: CVE-2025-13193). Those of a running
    domain it makes itself, for root alone, and has to: a layer that somebody puts in between would go unnoticed, and
    the overlay name a wrong backing file.
    """
    disks = {disk.target: resolve_volume(connection, disk) for disk in parse_domain(handle.XMLDesc(0)).disks}
    made: dict[str, str] = {}
    try:
        for target, path in request.overlays:
            below = disks[target]
            if below.path and pools.create_overlay(path, below=below.path, below_format=below.format):
                made[target] = path
        if len(made) == len(request.overlays):
            return _repair(handle, pools, disks, made, _create(handle, request, flags | _REUSE))
        _discard(handle, pools, made)  # the flag is for all disks or none
        made = {}
        return _repair(handle, pools, disks, made, _create(handle, request, flags))
    except BaseException as error:
        if not broken_connection(error):  # else libvirt may have gone on, and uses them
            _discard(handle, pools, made)
        raise


def _repair(
    handle: Any,  # noqa: ANN401
    pools: StoragePools,
    disks: dict[str, Disk],
    made: dict[str, str],
    snapshot: Snapshot,
) -> Snapshot:
    """Put right what would spoil a later start or delete."""
    volumes = {target: disks[target] for target, _ in snapshot.overlays if disks[target].source_type == "volume"}
    covered = dict(snapshot.covers)
    for target, path in made.items():
        now = covered.get(target)
        if target not in volumes and now and now != disks[target].path and not handle.isActive():
            # Somebody took a snapshot since we looked, and ours, still empty, names the file below that one's overlay.
            pools.remove(path)
            if not pools.create_overlay(path, below=now, below_format="qcow2"):
                msg = f"the overlay {path} could not be made anew on {now}, and the domain needs it to start"
                raise HypervisorError(msg, operation="snapshot_create", domain=handle.name())
    if not volumes:
        return snapshot
    # libvirt compares a covered disk of type volume with the file that it has become, and would never delete the
    # snapshot: "snapshot VM disk source and parent disk source are not the same".
    record = handle.snapshotLookupByName(snapshot.name, 0)
    text = record.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
    files = {target: disk.path or "" for target, disk in volumes.items()}
    return parse_snapshot(redefine(handle, record, with_files_for_volumes(text, files)).getXMLDesc(0))


def redefine(handle: Any, record: Any, text: str) -> Any:  # noqa: ANN401
    """Replace what libvirt keeps of a snapshot; `current` stays where it was. ``text`` must have the secrets, too."""
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
    if record.isCurrent(0):
        flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
    return handle.snapshotCreateXML(text, flags)


def _discard(handle: Any, pools: StoragePools, made: dict[str, str]) -> None:  # noqa: ANN401
    """Delete overlays that were made for a snapshot that came to nothing, if the domain does not use them."""
    used = {path for disk in parse_domain(handle.XMLDesc(0)).disks for path in (disk.path, *disk.backing)}
    for path in made.values():
        if path not in used:
            pools.remove(path)


def _take_with_memory(writing: Connection, handle: Any, pools: StoragePools, request: TakeRequest) -> Snapshot:  # noqa: ANN401
    """Take an external snapshot with RAM while the guest runs on, and tell how long it stood still in the end.

    QEMU stops the guest as soon as it expects to write the rest within the downtime it is given, and keeps that only
    roughly (300 ms given: 0.2 to 1.7 s). So it is given little at first, and the request's longest pause when the guest
    writes too fast for that. A save that comes to no end, or would fill the storage, is given up; libvirt then leaves
    nothing behind.
    """
    path = request.memory_file or ""
    # libvirt writes over an existing memory file without a word.
    if pools.layer(path) is not None:
        msg = f"the file for the guest's RAM, {path}, already exists"
        raise SnapshotExistsError(msg, operation="snapshot_create", domain=request.domain_name)
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    before = handle.migrateGetMaxDowntime(0)
    longest = max(1, min(round(request.max_pause_seconds * 1000), _LONGEST_DOWNTIME_MS))
    handle.migrateSetMaxDowntime(min(longest, _FIRST_DOWNTIME_MS), 0)
    watch = _SaveWatch(writing, pools, request, handle.info()[2] * 1024, longest)
    try:
        with _pauses(writing.get(), handle) as paused, watch:
            snapshot = _create(handle, request, flags)
    except libvirt.libvirtError as error:
        if watch.given_up is None:
            raise
        kind = StorageFullError if watch.full else DomainBusyError
        raise kind(watch.given_up, operation="snapshot_create", domain=request.domain_name) from error
    finally:
        with suppress(libvirt.libvirtError):  # the setting outlives the call; the domain may have been shut off since
            handle.migrateSetMaxDowntime(before, 0)
    return replace(snapshot, paused_seconds=sum(paused))


class _SaveWatch:
    """Watches a save of RAM from a thread of its own, which uses a connection of its own."""

    def __init__(self, writing: Connection, pools: StoragePools, request: TakeRequest, ram: int, longest: int) -> None:
        self._writing, self._pools, self._request, self._longest = writing, pools, request, longest
        self._deadline = 30 + ram / _RAM_BYTES_PER_SECOND
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ram-save", daemon=True)
        self.given_up: str | None = None
        self.full = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        started = time.monotonic()
        raised = False
        folder = (self._request.memory_file or "").rpartition("/")[0]
        while not self._ended.wait(_LOOK_SECONDS):
            with suppress(libvirt.libvirtError, HypervisorError):  # it has ended in this very moment, or is lost
                handle = self._writing.get().lookupByUUIDString(self._request.domain_uuid)
                free, took = self._pools.free_bytes(folder), time.monotonic() - started
                self.full = free is not None and free < self._request.min_free_bytes
                if self.full:
                    self.given_up = f"given up: the RAM would leave less than min_free in {folder}"
                elif took > self._deadline:
                    self.given_up = f"given up after {took:.0f} s: the guest writes to its RAM faster than it is saved"
                if self.given_up:
                    handle.abortJob()
                    return
                if not raised and took > _PATIENT_SECONDS:
                    handle.migrateSetMaxDowntime(self._longest, 0)
                    raised = True


@contextmanager
def _pauses(connection: Any, handle: Any) -> Iterator[list[float]]:  # noqa: ANN401
    """Collect the seconds that the domain stands still within the block, from libvirt's events."""
    paused: list[float] = []
    since: list[float] = []
    awake = threading.Event()
    awake.set()

    def note(_connection: Any, _domain: Any, event: int, _detail: int, _opaque: Any) -> None:  # noqa: ANN401
        if event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            since.append(time.monotonic())
            awake.clear()
        elif event == libvirt.VIR_DOMAIN_EVENT_RESUMED and since:
            paused.append(time.monotonic() - since.pop())
            awake.set()

    callback = connection.domainEventRegisterAny(handle, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, note, None)
    try:
        yield paused
        awake.wait(_EVENT_LATE_SECONDS)
    finally:
        connection.domainEventDeregisterAny(callback)
