"""The nouns of kvmsnapd as frozen values: domains, disks, snapshots, and what can be done with them.

Words are libvirt's: *domain* is a virtual machine, *target* the disk's name in the guest (``vda``), *overlay* the
qcow2 file that receives writes after an external snapshot, *backing chain* the files below it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime


CHAIN_CEILING = 150
"""The deepest backing chain that any libvirt starts a domain with, with room to spare (measured: 120, not 200)."""


class DomainState(StrEnum):
    """The states of a domain in which a snapshot can be judged."""

    RUNNING = "running"
    PAUSED = "paused"
    """Paused by a person; every other cause of a pause is :attr:`UNSETTLED`."""
    SHUT_OFF = "shut off"
    UNSETTLED = "unsettled"
    """Anything between: crashed, shutting down, suspended, paused by an I/O error or by an unfinished save."""


class Kind(StrEnum):
    """How a snapshot is stored. A domain has one kind for ever; mixing them has cost people their data."""

    EXTERNAL = "external"
    INTERNAL = "internal"
    MIXED = "mixed"
    """Only ever observed, never made: part of the disks internal, part external."""


class Consistency(StrEnum):
    """What a guest would find after going back to a snapshot."""

    MEMORY = "memory"
    """The running guest, with its RAM."""
    FILESYSTEM = "filesystem"
    """File systems frozen by the guest agent: clean."""
    CRASH = "crash"
    """The disks as after a power cut."""
    OFFLINE = "offline"
    """The guest was shut off."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A person's wish that a snapshot stay, with the reason and, optionally, an end."""

    reason: str
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A later slot that needed no snapshot: the shut-off domain had not changed when it was seen."""

    scheduled_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class Deleting:
    """A delete was begun, so the snapshot may be half merged and is no way back any more.

    ``failed_in`` is the domain's ``run_id`` in which the merge failed. After a merge that met a full disk QEMU keeps
    what it merged later in memory until it ends, and a power cut loses it (measured, QEMU 7.2 and 10.0).
    """

    begun_at: datetime
    failed_in: int | None = None


@dataclass(frozen=True, slots=True)
class Restoring:
    """A restore in place to this snapshot has begun and is not finished; to begin it again finishes it.

    ``leaves`` are the files that are of no use once it is finished, ``ran`` is whether the guest ran before.
    """

    begun_at: datetime
    leaves: tuple[str, ...] = ()
    ran: bool = False


@dataclass(frozen=True, slots=True)
class Drill:
    """The policy's last restore drill on the domain: when it ended, and what was wrong, None if the copy came up.

    Written into the snapshot that was tried, and carried on by each one that is taken after it, so that it outlives
    that one. ``verified_at`` is when a copy last came up.
    """

    ended_at: datetime
    failure: str | None = None
    verified_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """What kvmsnapd writes about a snapshot of its own, in its name and its description.

    ``scheduled_at`` is the slot: the fire time of the schedule this snapshot stands for, in whole seconds UTC.
    ``attempt`` counts from 1; a higher one means that the outcome of an earlier attempt was unknown. ``excluded`` are
    the disks that the policy left out.
    """

    policy: str
    scheduled_at: datetime
    taken_at: datetime
    consistency: Consistency
    kind: Kind
    attempt: int = 1
    hold: Hold | None = None
    excluded: tuple[str, ...] = ()
    unchanged: Unchanged | None = None
    deleting: Deleting | None = None
    owed: int = 0
    """How many released snapshots were to be deleted when it was taken; the fuse does not count them again."""
    standalone: bool = False
    """Whether its data is in files of its own, outside of the domain's backing chain: a state that a restore kept."""
    linked: tuple[str, ...] = ()
    """The UUIDs of the domains whose disks stand on its data; while there are any it is no one's to delete."""
    restoring: Restoring | None = None
    drill: Drill | None = None

    @property
    def slots(self) -> tuple[datetime, ...]:
        """The slots that this snapshot serves, in whole or until its domain changes."""
        return (self.scheduled_at, self.unchanged.scheduled_at) if self.unchanged else (self.scheduled_at,)

    def good_at(self, now: datetime) -> datetime:
        """Return the latest instant, up to ``now``, whose state this snapshot is known to hold."""
        if self.unchanged and self.taken_at <= self.unchanged.seen_at <= now:
            return self.unchanged.seen_at
        return self.taken_at

    def held(self, now: datetime) -> str | None:
        """Return the reason of a hold that is in force, None without one."""
        if self.linked:
            return f"{len(self.linked)} linked copy(s) of it"
        if self.restoring:
            return "being restored"
        if self.hold and (self.hold.until is None or self.hold.until > now):
            return self.hold.reason
        return None


@dataclass(frozen=True, slots=True)
class PairName:
    """The words by which logs and metrics call one domain under one policy."""

    domain: str
    domain_uuid: str
    policy: str

    @property
    def key(self) -> str:
        """The stable identity of the pair: a renamed domain keeps it."""
        return f"{self.domain_uuid}/{self.policy}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One libvirt snapshot of one domain. ``mark`` is None for a foreign one, which kvmsnapd never deletes."""

    name: str
    created_at: datetime
    kind: Kind
    parent: str | None = None
    mark: Mark | None = None
    offline: bool = False
    """Whether libvirt says that the domain was shut off."""
    overlays: tuple[tuple[str, str], ...] = ()
    """For an external one, by disk target, the file that received the writes from then on."""
    covers: tuple[tuple[str, str], ...] = ()
    """By disk target, the file that was active when it was taken: an external snapshot freezes it."""
    memory_file: str | None = None
    """Where the guest's RAM is, for an external snapshot that has it."""
    newer: bool = False
    """Whether a newer kvmsnapd than this one wrote it; to this one it is foreign."""
    paused_seconds: float | None = field(default=None, compare=False)
    """How long the guest stood still while its RAM was saved; known of one that has just been taken."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files that were made for it."""
        return (*(path for _, path in self.overlays), *((self.memory_file,) if self.memory_file else ()))


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of a domain as its XML states it; ``path`` is the active layer."""

    target: str
    device: str = "disk"
    source_type: str = "file"
    path: str | None = None
    format: str = "qcow2"
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    backing: tuple[str, ...] = ()
    """The files below the active layer, topmost first; of a shut-off domain libvirt lists some or none."""
    block_job: bool = False
    left_out: bool = False
    """The domain's own XML says ``snapshot='no'``."""
    pool: str | None = None
    """For a disk of type ``volume``, the storage pool that has it."""

    @property
    def holds_state(self) -> bool:
        """Whether a snapshot has to cover it: not media, read-only disks, and what its owner left out."""
        return self.device in {"disk", "lun"} and not self.readonly and not self.left_out


@dataclass(frozen=True, slots=True)
class Inventory:
    """One domain and its snapshots: what every tick reads of every domain."""

    uuid: str
    name: str
    snapshots: tuple[Snapshot, ...] = ()

    def of_policy(self, policy: str) -> tuple[Snapshot, ...]:
        """Return the domain's own snapshots of this policy that are a way back, in libvirt's order."""
        return tuple(s for s in self.snapshots if s.mark and s.mark.policy == policy and not s.mark.deleting)

    def half_deleted(self, policy: str) -> tuple[Snapshot, ...]:
        """Return those of the policy whose delete was begun and did not end."""
        return tuple(s for s in self.snapshots if s.mark and s.mark.policy == policy and s.mark.deleting)


@dataclass(frozen=True, slots=True)
class Domain(Inventory):
    """Everything about one domain that decides whether and how a snapshot can be taken now."""

    state: DomainState = DomainState.RUNNING
    state_detail: str = "running"
    persistent: bool = True
    disks: tuple[Disk, ...] = ()
    pflash: bool = False
    managed_save: bool = False
    agent_connected: bool = False
    memory_bytes: int = 0
    run_id: int | None = None
    """libvirt's number of this run of the domain, None while it is shut off."""
    resumable: bool = False
    """An I/O error or a save that did not finish has paused it: a person may let it go on."""
    busy: bool = False
    """libvirt works on it right now: a save, a snapshot, a migration."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One image file as libvirt's storage API describes it; ``backing`` is the file below it."""

    path: str
    changed_at: datetime | None = None
    """When its content last changed, as the file system says."""
    backing: str | None = None
    allocated: int | None = None
    """Bytes it takes on the disk."""


@dataclass(frozen=True, slots=True)
class Storage:
    """What libvirt's storage API says of the folders and layers of a domain; empty where it cannot say."""

    free_bytes: Mapping[str, int] = field(default_factory=dict)
    """By folder."""
    layers: Mapping[str, Layer] = field(default_factory=dict)
    """By path: the active layer of each disk and all below it."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this libvirt can do, decided once from driver and version, never by trying and seeing.

    Sources of the limits are stated where they are derived, in :mod:`kvmsnapd.libvirt_host.capabilities`.
    """

    driver: str
    version: str
    external_snapshots: bool = True
    revert_external: bool = True
    delete_external: bool = True
    delete_external_in_chain_offline: bool = True
    """Delete an external snapshot of a shut-off domain when its XML does not list the layers."""
    internal_needs_qcow2: bool = True
    internal_with_pflash_offline: bool = True
    internal_stops_guest: bool = True
    """Whether a running guest stands still while its RAM is written."""
    storage_api: bool = True
    """Whether storage pools tell of real files."""
    chain_ceiling: int = CHAIN_CEILING
    """The deepest backing chain with which a domain can still be started."""


@dataclass(frozen=True, slots=True)
class TakeRequest:
    """All that libvirt is told to take one snapshot, computed before the first call.

    ``overlays`` maps disk targets to the file an external snapshot will create; ``excluded`` are the targets that
    are told to take no part; ``memory_file`` is where an external snapshot puts the RAM of a running guest.
    """

    domain_uuid: str
    domain_name: str
    name: str
    mark: Mark
    overlays: tuple[tuple[str, str], ...] = ()
    excluded: tuple[str, ...] = ()
    memory_file: str | None = None
    max_pause_seconds: float = 0
    min_free_bytes: int = 0

    @property
    def quiesce(self) -> bool:
        """Whether the guest agent must freeze the file systems around the snapshot."""
        return self.mark.consistency is Consistency.FILESYSTEM


@dataclass(frozen=True, slots=True)
class DrillRequest:
    """A throw-away domain to boot from a snapshot's XML, on overlays by disk target, and how it shows that it is up.

    ``console`` is a text on its serial console; without it the guest agent has to answer.
    """

    domain_uuid: str
    snapshot: str
    name: str
    uuid: str
    disks: Mapping[str, str]
    deadline_seconds: float
    console: str | None = None
    memory_bytes: int | None = None
