"""A hypervisor in memory, behind the port. The contract suite holds it to what libvirt does."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from kvmsnapd.errors import (
    CopyRefusedError,
    DomainBusyError,
    DomainNotFoundError,
    DrillRefusedError,
    GuestFrozenError,
    HypervisorError,
    SnapshotExistsError,
    SnapshotNotFoundError,
)
from kvmsnapd.model import Capabilities, Disk, DomainState, Inventory, Kind, Layer, Snapshot, Storage
from kvmsnapd.naming import format_description, parse_mark

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from kvmsnapd.model import Domain, DrillRequest, Mark, TakeRequest


@dataclass
class FakeHypervisor:
    """Domains in memory. ``before`` holds, per operation, what is to go wrong at its next calls.

    A function in ``before["take_snapshot"]`` runs at the beginning of that call: it may raise, to fail the call, or
    change the fake, to have a person interfere. Each is used once.
    """

    domains: dict[str, Domain] = field(default_factory=dict)
    limits: Capabilities = field(default_factory=lambda: Capabilities("fake", "1.0.0"))
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    before: dict[str, list[Callable[..., None]]] = field(default_factory=lambda: defaultdict(list))
    calls: list[tuple[str, ...]] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)
    stored: Storage = field(default_factory=Storage)
    """What :meth:`storage` answers."""
    written: dict[str, datetime] | None = None
    """When files were last written to; set to ``{}``, :meth:`storage` tells the layers of shut-off domains."""
    closed: dict[str, str | None] = field(default_factory=dict)
    """Folders that cannot be listed, with the pool that would have to be started."""
    copies: dict[str, str] = field(default_factory=dict)
    """Stand-alone copies by their path, with what they were made of."""
    deaf: set[str] = field(default_factory=set)
    """Domains whose guests do not shut down when they are asked to."""
    under_way: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What :meth:`progress` answers, by domain."""
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, domain: Domain) -> Domain:
        """Define a domain."""
        self.domains[domain.uuid] = domain
        return domain

    def capabilities(self) -> Capabilities:
        """See the port."""
        return self.limits

    def inventory(self) -> tuple[Inventory, ...]:
        """See the port."""
        self._begin("inventory")
        with self._lock:
            found = [Inventory(d.uuid, d.name, d.snapshots) for d in self.domains.values()]
        return tuple(sorted(found, key=lambda inventory: inventory.name))

    def domain(self, domain_uuid: str) -> Domain:
        """See the port."""
        self._begin("domain", domain_uuid)
        if domain_uuid not in self.domains:
            msg = f"no domain {domain_uuid}"
            raise DomainNotFoundError(msg, operation="read_domain", domain=domain_uuid)
        domain = self.domains[domain_uuid]
        if domain.state is not DomainState.SHUT_OFF:
            return domain
        # As libvirt does, which names the layers below the active one of running domains only.
        return replace(domain, disks=tuple(replace(disk, backing=()) for disk in domain.disks))

    def storage(self, domain: Domain, folders: Collection[str]) -> Storage:
        """See the port."""
        self._begin("storage", domain.uuid, *folders)
        layers = dict(self.stored.layers)
        if self.written is not None and domain.state is DomainState.SHUT_OFF:
            for disk in self.domains[domain.uuid].disks:
                chain = (disk.path or "", *disk.backing)
                for path, below in zip(chain, (*chain[1:], None), strict=True):
                    layers[path] = Layer(path, self.written.get(path), below)
        return Storage(self.stored.free_bytes, layers)

    def free_bytes(self, folder: str) -> int | None:
        """See the port."""
        self._begin("free_bytes", folder)
        return self.stored.free_bytes.get(folder)

    def files(self, folder: str) -> tuple[Layer, ...] | None:
        """See the port."""
        self._begin("files", folder)
        if folder in self.closed:
            return None
        return tuple(layer for path, layer in self.stored.layers.items() if path.rpartition("/")[0] == folder)

    def allocated(self, overlays: Iterable[tuple[str, str]]) -> dict[str, int]:
        """See the port."""
        made = {path: Layer(path, allocated=0) for path in self.copies} | dict(self.stored.layers)
        found = {target: made.get(path) for target, path in overlays}
        return {target: layer.allocated for target, layer in found.items() if layer and layer.allocated is not None}

    def sleeping_pool(self, folder: str) -> str | None:
        """See the port."""
        return self.closed.get(folder)

    def filesystems(self, domain_uuid: str) -> tuple[str, ...]:
        """See the port."""
        self._begin("filesystems", domain_uuid)
        if domain_uuid in self.frozen:
            msg = "the agent is in frozen state"
            raise GuestFrozenError(msg, operation="filesystems", domain=domain_uuid)
        return ("/",)

    def describe_snapshot(self, domain_uuid: str, name: str, mark: Mark) -> None:
        """See the port."""
        self._begin("describe_snapshot", domain_uuid, name)
        with self._lock:
            domain = self.domains[domain_uuid]
            if not any(snapshot.name == name for snapshot in domain.snapshots):
                msg = f"no snapshot {name}"
                raise SnapshotNotFoundError(msg, operation="snapshot_redefine", domain=domain.name)
            written = parse_mark(name, format_description(mark))
            marked = (replace(s, mark=written) if s.name == name else s for s in domain.snapshots)
            self._set_snapshots(domain, tuple(marked))

    def take_snapshot(self, request: TakeRequest) -> Snapshot:
        """See the port."""
        self._begin("take_snapshot", request.domain_uuid, request.name)
        return self.finish_take(request)

    def finish_take(self, request: TakeRequest) -> Snapshot:
        """Do what a take does, as libvirtd also does when its client has gone away."""
        with self._lock:
            self.domain(request.domain_uuid)
            domain = self.domains[request.domain_uuid]
            if any(snapshot.name == request.name for snapshot in domain.snapshots):
                msg = f"domain moment {request.name} already exists"
                raise SnapshotExistsError(msg, operation="snapshot_create", domain=domain.name)
            snapshot = Snapshot(
                request.name,
                self.clock().replace(microsecond=0),
                request.mark.kind,
                _leaf(domain),
                parse_mark(request.name, format_description(request.mark)),
                offline=domain.state is DomainState.SHUT_OFF,
                overlays=request.overlays,
                covers=tuple((disk.target, disk.path or "") for disk in domain.disks),
                memory_file=request.memory_file,
            )
            self._set_snapshots(domain, (*domain.snapshots, snapshot))
            self._set_disks(domain, [_covered(disk, dict(request.overlays).get(disk.target)) for disk in domain.disks])
            self._write(*dict(request.overlays).values())
            return snapshot

    def write_to(self, domain_uuid: str) -> None:
        """Write to all disks, as a guest does that runs."""
        self._write(*(disk.path or "" for disk in self.domains[domain_uuid].disks))

    def make_foreign(self, domain_uuid: str, name: str, kind: Kind = Kind.EXTERNAL) -> None:
        """Take a snapshot as a person would with virsh."""
        domain = self.domains[domain_uuid]
        overlays = {d.target: f"/images/{d.target}.{name}" for d in domain.disks} if kind is Kind.EXTERNAL else {}
        snapshot = Snapshot(
            name,
            self.clock().replace(microsecond=0),
            kind,
            _leaf(domain),
            offline=domain.state is DomainState.SHUT_OFF,
            overlays=tuple(overlays.items()),
            covers=tuple((disk.target, disk.path or "") for disk in domain.disks),
        )
        self._set_snapshots(domain, (*domain.snapshots, snapshot))
        self._set_disks(domain, [_covered(disk, overlays.get(disk.target)) for disk in domain.disks])
        self._write(*overlays.values())

    def delete_snapshot(self, domain_uuid: str, name: str) -> None:
        """See the port."""
        self._begin("delete_snapshot", domain_uuid, name)
        with self._lock:
            self.domain(domain_uuid)
            domain = self.domains[domain_uuid]
            gone = next((s for s in domain.snapshots if s.name == name), None)
            if gone is None:
                return
            if gone.mark and gone.mark.standalone:
                self._set_snapshots(domain, tuple(s for s in domain.snapshots if s is not gone))
                for _, path in gone.covers:
                    self.copies.pop(path, None)
                return
            merged = {path: dict(gone.covers).get(target, path) for target, path in gone.overlays}
            left = (s for s in domain.snapshots if s is not gone)
            moved = (replace(s, parent=gone.parent) if s.parent == name else s for s in left)
            # libvirt corrects what the others say they cover.
            self._set_snapshots(
                domain, tuple(replace(s, covers=tuple((t, merged.get(p, p)) for t, p in s.covers)) for s in moved)
            )
            for disk in domain.disks:
                for above, path, below in _neighbours(disk):
                    if path in merged:
                        self._write(below, *above)  # the data of one, and the name of the layer below in the other
            self._set_disks(domain, [_without(disk, set(merged)) for disk in domain.disks])

    def copy_file(self, source: str, destination: str, *, source_format: str = "qcow2") -> None:
        """See the port."""
        self._begin("copy_file", source, destination, *([source_format] if source_format != "qcow2" else []))
        if destination in self.copies:
            msg = f"{destination} already exists"
            raise SnapshotExistsError(msg, operation="file_copy")
        self.copies[destination] = self.copies.get(source) or source

    def take_out(
        self, domain_uuid: str, snapshot: str, images: Mapping[str, str], *, wanted: Callable[[], bool]
    ) -> None:
        """See the port."""
        self._begin("take_out", domain_uuid, snapshot)
        frozen = dict(self._snapshot(domain_uuid, snapshot).covers)
        if self.domain(domain_uuid).state is not DomainState.SHUT_OFF:
            msg = "the domain is not shut off"
            raise DomainBusyError(msg, operation="file_duplicate", domain=domain_uuid)
        if not wanted():
            msg = "stopped"
            raise CopyRefusedError(msg)
        self.copies.update({path: frozen[target] for target, path in images.items()})

    def create_empty(self, path: str) -> None:
        """See the port."""
        self._begin("create_empty", path)
        if path in self.copies:
            msg = f"{path} already exists"
            raise SnapshotExistsError(msg, operation="file_create")
        self.copies[path] = ""

    def remove_file(self, path: str) -> None:
        """See the port."""
        self._begin("remove_file", path)
        self.copies.pop(path, None)

    def create_overlays(self, domain_uuid: str, snapshot: str, files: Mapping[str, str]) -> None:
        """See the port."""
        self._begin("create_overlays", domain_uuid, snapshot)
        frozen = dict(self._snapshot(domain_uuid, snapshot).covers)
        for target, path in files.items():
            if path in self.copies:
                msg = f"{path} already exists"
                raise SnapshotExistsError(msg, operation="overlay_create")
            self.copies[path] = frozen[target]

    def define_copy(
        self, domain_uuid: str, snapshot: str, *, name: str, uuid: str, disks: Mapping[str, str], network: bool
    ) -> tuple[str, ...]:
        """See the port."""
        self._begin("define_copy", domain_uuid, snapshot, name)
        self._snapshot(domain_uuid, snapshot)
        if uuid in self.domains or any(domain.name == name for domain in self.domains.values()):
            msg = f"domain {name} already exists"
            raise HypervisorError(msg, operation="define_copy", domain=name)
        original = self.domains[domain_uuid]
        own = tuple(replace(d, path=disks[d.target], backing=()) for d in original.disks if d.target in disks)
        self.add(replace(original, uuid=uuid, name=name, snapshots=(), disks=own, state=DomainState.SHUT_OFF))
        return () if network else ("network interface",)

    def run_drill(self, request: DrillRequest, *, wanted: Callable[[], bool]) -> None:
        """See the port. The copy comes up at once; what is to go wrong is in ``before``."""
        self._begin("run_drill", request.domain_uuid, request.snapshot)
        if not wanted():
            msg = "given up"
            raise DrillRefusedError(msg)

    def shut_down(self, domain_uuid: str) -> None:
        """See the port. The guest does as it is told, at once; one in ``deaf`` does not."""
        self._begin("shut_down", domain_uuid)
        if domain_uuid not in self.deaf:
            self._set_state(domain_uuid, DomainState.SHUT_OFF)

    def power_off(self, domain_uuid: str) -> None:
        """See the port."""
        self._begin("power_off", domain_uuid)
        self._set_state(domain_uuid, DomainState.SHUT_OFF)

    def start(self, domain_uuid: str, *, memory_file: str | None = None) -> None:
        """See the port."""
        self._begin("start", domain_uuid, memory_file or "")
        self._set_state(domain_uuid, DomainState.RUNNING)

    def revert_snapshot(self, domain_uuid: str, name: str) -> None:
        """See the port."""
        self._begin("revert_snapshot", domain_uuid, name)
        snapshot = self._snapshot(domain_uuid, name)
        self._set_state(domain_uuid, DomainState.SHUT_OFF if snapshot.offline else DomainState.RUNNING)

    def record_standalone(self, request: TakeRequest) -> None:
        """See the port."""
        self._begin("record_standalone", request.domain_uuid, request.name)
        domain = self.domains[request.domain_uuid]
        files = dict(request.overlays)
        snapshot = Snapshot(
            request.name,
            self.clock().replace(microsecond=0),
            Kind.EXTERNAL,
            None,
            parse_mark(request.name, format_description(request.mark)),
            offline=True,
            overlays=tuple((target, f"{path}.next") for target, path in request.overlays),
            covers=tuple((disk.target, files.get(disk.target, disk.path or "")) for disk in domain.disks),
        )
        # Before the others, so that the last one stays the newest of the chain.
        self._set_snapshots(domain, (snapshot, *domain.snapshots))

    def go_on_from(self, domain_uuid: str, name: str, overlays: Mapping[str, str]) -> None:
        """See the port."""
        self._begin("go_on_from", domain_uuid, name)
        with self._lock:
            domain, snapshot = self.domains[domain_uuid], self._snapshot(domain_uuid, name)
            if any(overlays.get(disk.target, disk.path) != disk.path for disk in domain.disks):
                if domain.state is not DomainState.SHUT_OFF:
                    msg = f"{domain.name} runs"
                    raise DomainBusyError(msg, operation="snapshot_go_on", domain=domain.name)
                frozen = dict(snapshot.covers)
                below = {disk.target: (disk.path or "", *disk.backing) for disk in domain.disks}
                moved = []
                for disk in domain.disks:
                    if disk.target in overlays:
                        chain = below[disk.target]
                        at = frozen[disk.target]
                        rest = chain[chain.index(at) :] if at in chain else (at,)
                        moved.append(replace(disk, path=overlays[disk.target], backing=rest))
                    else:
                        moved.append(disk)
                self._set_disks(domain, moved)
                self._write(*overlays.values())
            changed = replace(snapshot, overlays=tuple((t, overlays.get(t, path)) for t, path in snapshot.overlays))
            self._set_snapshots(domain, tuple(changed if s is snapshot else s for s in domain.snapshots))

    def forget_snapshot(self, domain_uuid: str, name: str) -> None:
        """See the port."""
        self._begin("forget_snapshot", domain_uuid, name)
        domain = self.domains[domain_uuid]
        gone = next((s for s in domain.snapshots if s.name == name), None)
        if gone:
            left = (s for s in domain.snapshots if s is not gone)
            self._set_snapshots(domain, tuple(replace(s, parent=gone.parent) if s.parent == name else s for s in left))

    def progress(self, domain_uuid: str) -> tuple[int, int] | None:
        """See the port."""
        return self.under_way.get(domain_uuid)

    def thaw(self, domain_uuid: str) -> None:
        """See the port."""
        self._begin("thaw", domain_uuid)
        if self.domain(domain_uuid).state is not DomainState.RUNNING:
            msg = "domain is not running"
            raise HypervisorError(msg, operation="thaw", domain=domain_uuid)
        self.frozen.discard(domain_uuid)

    def snapshot_names(self, domain_uuid: str) -> list[str]:
        """Return the names of a domain's snapshots, oldest first."""
        return [snapshot.name for snapshot in self.domains[domain_uuid].snapshots]

    def _write(self, *paths: str) -> None:
        if self.written is not None:
            self.written.update(dict.fromkeys(paths, self.clock()))

    def _begin(self, operation: str, *arguments: str) -> None:
        self.calls.append((operation, *arguments))
        if self.before[operation]:
            self.before[operation].pop(0)()

    def _snapshot(self, domain_uuid: str, name: str) -> Snapshot:
        domain = self.domain(domain_uuid)
        for snapshot in domain.snapshots:
            if snapshot.name == name:
                return snapshot
        msg = f"no snapshot {name}"
        raise SnapshotNotFoundError(msg, operation="snapshot_lookup", domain=domain.name)

    def _set_state(self, domain_uuid: str, state: DomainState) -> None:
        run_id = None if state is DomainState.SHUT_OFF else 1
        self.domains[domain_uuid] = replace(self.domains[domain_uuid], state=state, run_id=run_id)

    def _set_disks(self, domain: Domain, disks: list[Disk]) -> None:
        self.domains[domain.uuid] = replace(self.domains[domain.uuid], disks=tuple(disks))

    def _set_snapshots(self, domain: Domain, snapshots: tuple[Snapshot, ...]) -> None:
        self.domains[domain.uuid] = replace(self.domains[domain.uuid], snapshots=snapshots)


def _leaf(domain: Domain) -> str | None:
    """Return the newest snapshot's name, which becomes the parent of the next."""
    return domain.snapshots[-1].name if domain.snapshots else None


def _covered(disk: Disk, overlay: str | None) -> Disk:
    return replace(disk, path=overlay, backing=(disk.path or "", *disk.backing)) if overlay else disk


def _without(disk: Disk, merged: set[str]) -> Disk:
    active, *backing = [path for path in (disk.path or "", *disk.backing) if path not in merged] or [""]
    return replace(disk, path=active, backing=tuple(backing))


def _neighbours(disk: Disk) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield each layer that has one below it, with the one above if there is one, and that below."""
    chain = (disk.path or "", *disk.backing)
    for position, (path, below) in enumerate(pairwise(chain)):
        yield chain[:position][-1:], path, below


def raising(error: Exception) -> Callable[[], None]:
    """Return a function that raises ``error``, for :attr:`FakeHypervisor.before`."""

    def fail() -> None:
        raise error

    return fail
