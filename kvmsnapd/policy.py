"""Policies as plan and execution see them: complete, without defaults left to fill."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from kvmsnapd.schedule import stable_splay

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from kvmsnapd.model import Disk, Domain, Kind
    from kvmsnapd.retention import KeepRules
    from kvmsnapd.schedule import Schedule


class ConsistencyRule(StrEnum):
    """What a policy demands of a snapshot of a running guest."""

    FILESYSTEM = "filesystem"
    """The guest agent must freeze the file systems, or no snapshot is taken."""
    FILESYSTEM_PREFERRED = "filesystem-preferred"
    """Freeze if the agent answers; otherwise take a crash-consistent snapshot and say so."""
    CRASH = "crash"
    """Never ask the agent."""
    MEMORY = "memory"
    """The guest's RAM is part of the snapshot."""


@dataclass(frozen=True, slots=True)
class DiskSelection:
    """Which disks a policy covers, as names or glob patterns of targets (``vdb``) or of sources."""

    include: tuple[str, ...] = ()
    """Only these, if any are named."""
    exclude: tuple[str, ...] = ()

    def excludes(self, domain: Domain, disk: Disk) -> bool:
        """Tell whether the policy leaves this disk of the domain out."""
        # A snapshot puts another file on top: all files of the disk's own line count as its source. Another disk may
        # have had this target before.
        below = {
            overlay: dict(s.covers).get(target, "")
            for s in domain.snapshots
            for target, overlay in s.overlays
            if target == disk.target
        }
        words = {disk.target, *disk.backing}
        path = disk.path or ""
        while path and path not in words:
            words.add(path)
            path = below.get(path, "")

        def named(patterns: tuple[str, ...]) -> bool:
            return any(fnmatchcase(word, pattern) for word in words for pattern in patterns)

        return named(self.exclude) or bool(self.include and not named(self.include))


@dataclass(frozen=True, slots=True)
class Hook:
    """One program to run beside a take: an argument list, never a shell's line."""

    command: tuple[str, ...]
    timeout: timedelta
    required: bool = False
    """Whether its failure stops the take."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The programs of one policy."""

    before: Hook | None = None
    after: Hook | None = None
    on_failure: Hook | None = None


@dataclass(frozen=True, slots=True)
class DrillRules:
    """When a policy's newest snapshot is tried, and what has to happen."""

    deadline: timedelta = timedelta(minutes=5)
    schedule: Schedule | None = None
    """None: a person tries it."""
    max_age: timedelta | None = None
    """The age of the last drill that did well which means trouble; None without a schedule."""
    console: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy, resolved. Field descriptions for users are in :mod:`kvmsnapd.config.models`."""

    name: str
    schedule: Schedule
    keep: KeepRules
    timezone: ZoneInfo
    kind: Kind
    consistency: ConsistencyRule
    catch_up: bool
    splay: timedelta
    max_age: timedelta
    max_deletes_per_run: int
    max_chain_depth: int
    memory_live: bool = False
    max_pause: timedelta = timedelta(seconds=10)
    min_free_bytes: int = 0
    overlay_directory: str | None = None
    disks: DiskSelection = DiskSelection()
    hooks: Hooks = Hooks()
    drill: DrillRules = DrillRules()

    def splay_of(self, domain_uuid: str) -> timedelta:
        """Return how long after each slot this domain's run begins."""
        return stable_splay(domain_uuid, self.name, self.splay)
