"""Policies as plan and execution see them: complete, without defaults left to fill; and which domain has which.

A domain is matched by exact name or UUID first, then by the most specific pattern. An empty list of policies means
"unprotected on purpose".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from kvmsnapd.schedule import stable_splay

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from zoneinfo import ZoneInfo

    from kvmsnapd.model import Disk, Domain, Inventory, Kind
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

    def splay_of(self, domain_uuid: str) -> timedelta:
        """Return how long after each slot this domain's run begins."""
        return stable_splay(domain_uuid, self.name, self.splay)


class Coverage(StrEnum):
    """Why a domain has the policies it has, or none."""

    PROTECTED = "protected"
    UNPROTECTED_ON_PURPOSE = "unprotected on purpose"
    UNMATCHED = "unmatched"
    AMBIGUOUS = "ambiguous"


@dataclass(frozen=True, slots=True)
class Assignment:
    """The policies of one domain, and the patterns that decided it (several only when they disagree)."""

    domain_uuid: str
    domain_name: str
    coverage: Coverage
    policies: tuple[Policy, ...] = ()
    patterns: tuple[str, ...] = ()


def assign(selectors: Mapping[str, tuple[Policy, ...]], domains: Iterable[Inventory]) -> tuple[Assignment, ...]:
    """Decide which policies each domain has, in the order given.

    Of several glob patterns that match, the one with the most literal characters wins. If two equally specific ones
    name different policies the domain is ambiguous and gets none: guessing could delete snapshots.
    """
    globs = [selector for selector in selectors if is_pattern(selector)]
    # Most specific first, so that the common case stops early; the name makes the order stable.
    globs.sort(key=lambda glob: (-literal_length(glob), glob))
    return tuple(_assign_one(selectors, globs, domain) for domain in domains)


def _assign_one(selectors: Mapping[str, tuple[Policy, ...]], globs: list[str], domain: Inventory) -> Assignment:
    def assigned(coverage: Coverage, *patterns: str) -> Assignment:
        policies = selectors[patterns[0]] if coverage is Coverage.PROTECTED else ()
        return Assignment(domain.uuid, domain.name, coverage, policies, patterns)

    def decided(pattern: str) -> Assignment:
        purpose = Coverage.PROTECTED if selectors[pattern] else Coverage.UNPROTECTED_ON_PURPOSE
        return assigned(purpose, pattern)

    exact = [selector for selector in (domain.name, domain.uuid) if selector in selectors]
    if exact:
        agree = all(selectors[selector] == selectors[exact[0]] for selector in exact)
        return decided(exact[0]) if agree else assigned(Coverage.AMBIGUOUS, *exact)
    matching = [glob for glob in globs if fnmatchcase(domain.name, glob)]
    if not matching:
        return assigned(Coverage.UNMATCHED)
    best = [glob for glob in matching if literal_length(glob) == literal_length(matching[0])]
    if any(selectors[glob] != selectors[best[0]] for glob in best):
        return assigned(Coverage.AMBIGUOUS, *best)
    return decided(best[0])


def is_pattern(selector: str) -> bool:
    """Tell whether a selector is a glob pattern and not a name."""
    return any(character in selector for character in "*?[")


def literal_length(glob: str) -> int:
    """Return how many characters of a domain's name the pattern fixes; a ``[…]`` class fixes none."""
    without_classes = re.sub(r"\[!?\]?[^\]]*\]", "", glob)
    return sum(character not in "*?" for character in without_classes)


def missing_domains(selectors: Iterable[str], domains: Iterable[Inventory]) -> tuple[str, ...]:
    """Return the selectors that name one domain and fit none: a typing error, or the domain is gone."""
    known = {word for domain in domains for word in (domain.name, domain.uuid)}
    return tuple(selector for selector in selectors if selector not in known and not is_pattern(selector))
