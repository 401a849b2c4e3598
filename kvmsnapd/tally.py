"""What events add up to, as one immutable value: counters since the start, and what the last runs found.

Keyed by the UUIDs of domains, so a renamed one keeps what is known of it. :mod:`.series` makes metrics of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from kvmsnapd.events import (
    DeleteFailed,
    DomainExamined,
    DrillFinished,
    DrillSkipped,
    GuestFrozen,
    GuestUnfrozen,
    PruneBlocked,
    RunEvent,
    RunFinished,
    RunSkipped,
    RunStarted,
    RunStuck,
    SnapshotDeleted,
    SnapshotFailed,
    SnapshotTaken,
    SnapshotUnchanged,
)
from kvmsnapd.model import Consistency
from kvmsnapd.prune import BlockReason

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime

    from kvmsnapd.events import Event

BUCKETS = (0.05, 0.2, 1.0, 5.0, 20.0, 60.0, 300.0)
"""Upper ends, in seconds, of what durations are sorted into; longer ones are above all."""

_UNPRUNABLE = frozenset({BlockReason.BRANCH, BlockReason.FOREIGN_LAYER, BlockReason.UNSUPPORTED})
"""Snapshots are still taken then, but none can go before a person, or a backup program, has changed something."""

_CLEAN = (Consistency.FILESYSTEM, Consistency.OFFLINE)

_Key = TypeVar("_Key", bound=str)
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Failures:
    """Runs of one pair that failed or were refused in a row; ``reason`` is the last one's."""

    count: int
    reason: str
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True, slots=True)
class PairTally:
    """One domain under one policy: counts since the start by reason or consistency, and what the last run found."""

    taken: Mapping[str, int] = field(default_factory=dict)
    unchanged: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    deleted: int = 0
    delete_failed: Mapping[str, int] = field(default_factory=dict)
    drills: Mapping[str, int] = field(default_factory=dict)
    """Restore drills by how they ended."""
    last_attempt_at: datetime | None = None
    failures: Failures | None = None
    blocked: Mapping[str, int] = field(default_factory=dict)
    """How many released snapshots wait, by what they wait for."""
    quarantine: str | None = None
    """Why no snapshot is taken until a person has changed something."""
    stuck: bool = False

    @property
    def quarantined(self) -> frozenset[str]:
        """Why it is left alone, or not pruned, until a person has changed something."""
        return (_UNPRUNABLE & self.blocked.keys()) | ({self.quarantine} if self.quarantine else set())


@dataclass(frozen=True, slots=True)
class DomainTally:
    """One domain as its last run found it."""

    frozen: bool | None = None
    """Whether it was frozen, and not by us; None if it never was."""
    chain_depth: Mapping[str, int] = field(default_factory=dict)
    chain_limit: int | None = None


@dataclass(frozen=True, slots=True)
class StorageTally:
    """A folder of images: its free bytes, and the keys of the pairs that need them."""

    free_bytes: int
    pairs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Durations:
    """Lengths of time, sorted into :data:`BUCKETS` and above."""

    counts: tuple[int, ...] = (0,) * (len(BUCKETS) + 1)
    sum_seconds: float = 0.0

    def and_one(self, seconds: float) -> Durations:
        """Return these and one more."""
        place = sum(seconds > end for end in BUCKETS)
        counts = (*self.counts[:place], self.counts[place] + 1, *self.counts[place + 1 :])
        return Durations(counts, self.sum_seconds + seconds)


@dataclass(frozen=True, slots=True)
class PolicyTally:
    """Durations under one policy."""

    takes: Durations | None = None
    freezes: Durations | None = None
    deletes: Durations | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """Everything, by pair key, domain UUID, folder and policy name."""

    pairs: Mapping[str, PairTally] = field(default_factory=dict)
    domains: Mapping[str, DomainTally] = field(default_factory=dict)
    storages: Mapping[str, StorageTally] = field(default_factory=dict)
    policies: Mapping[str, PolicyTally] = field(default_factory=dict)

    def pair(self, key: str) -> PairTally:
        """Return what is known of one pair."""
        return self.pairs.get(key, _NEW_PAIR)

    def after(self, event: Event) -> Tally:
        """Return the tally with this event in it; those that are of no run, or guest, change nothing."""
        if isinstance(event, GuestUnfrozen) and (known := self.domains.get(event.domain_uuid)):
            return replace(self, domains={**self.domains, event.domain_uuid: replace(known, frozen=False)})
        if not isinstance(event, RunEvent):
            return self
        key, uuid, policy = event.pair.key, event.pair.domain_uuid, event.pair.policy
        pair, domain = self.pair(key), self.domains.get(uuid, _NEW_DOMAIN)
        durations = self.policies.get(policy, _NEW_POLICY)
        storages = self._storages_after(event) if isinstance(event, DomainExamined) else self.storages
        return Tally(
            _with(self.pairs, key, _pair_after(pair, event), pair),
            _with(self.domains, uuid, _domain_after(domain, event), domain),
            storages,
            _with(self.policies, policy, _policy_after(durations, event), durations),
        )

    def _storages_after(self, event: DomainExamined) -> Mapping[str, StorageTally]:
        key, left = event.pair.key, {}
        for folder, known in self.storages.items():
            used = known if folder in event.folders else replace(known, pairs=known.pairs - {key})
            if used.pairs:
                left[folder] = used
        for folder, free in event.free_bytes.items():
            known_pairs = left[folder].pairs if folder in left else frozenset()
            left[folder] = StorageTally(free, known_pairs | {key})
        return left

    def with_free(self, free_bytes: Mapping[str, int]) -> Tally:
        """Return the tally with these folders' free bytes as they are now; unknown folders are left out."""
        known = {
            folder: replace(self.storages[folder], free_bytes=n)
            for folder, n in free_bytes.items()
            if folder in self.storages
        }
        return replace(self, storages={**self.storages, **known})

    def without_failures(self, keys: Collection[str]) -> Tally:
        """Return the tally in which these pairs have no failures: a snapshot was taken since, or the policy changed."""
        return replace(
            self, pairs={k: replace(pair, failures=None) if k in keys else pair for k, pair in self.pairs.items()}
        )

    def only(self, keys: Collection[str]) -> Tally:
        """Return what is known of these pairs, and of their domains, folders and policies; the rest has gone."""
        wanted = set(keys)
        uuids, policies = {key.partition("/")[0] for key in wanted}, {key.partition("/")[2] for key in wanted}
        storages = {path: replace(s, pairs=s.pairs & wanted) for path, s in self.storages.items() if s.pairs & wanted}
        return Tally(
            _only(self.pairs, wanted),
            _only(self.domains, uuids),
            storages,
            _only(self.policies, policies),
        )


_NEW_PAIR, _NEW_DOMAIN, _NEW_POLICY = PairTally(), DomainTally(), PolicyTally()


def _pair_after(pair: PairTally, event: RunEvent) -> PairTally:
    """Return what is known of a pair after one of its events."""
    match event:
        case RunStarted():
            return replace(pair, last_attempt_at=event.started_at)
        case PruneBlocked():
            return replace(pair, blocked=dict(event.blocked))
        case RunSkipped():
            found = (event.reason if event.quarantined else None) if event.refused else pair.quarantine
            return replace(pair, skipped=_more(pair.skipped, event.reason), quarantine=found)
        case RunStuck():
            return replace(pair, stuck=True)
        case RunFinished():
            return _pair_finished(pair, event)
    return _counted(pair, event)


def _counted(pair: PairTally, event: RunEvent) -> PairTally:
    match event:
        case DrillFinished():
            return replace(pair, drills=_more(pair.drills, event.reason or "ok"))
        case DrillSkipped():
            return replace(pair, drills=_more(pair.drills, "skipped"))
        case SnapshotTaken():
            return replace(pair, taken=_more(pair.taken, event.consistency))
        case SnapshotUnchanged():
            return replace(pair, unchanged=pair.unchanged + 1)
        case SnapshotFailed():
            return replace(pair, failed=_more(pair.failed, event.reason))
        case SnapshotDeleted():
            return replace(pair, deleted=pair.deleted + 1)
        case DeleteFailed():
            return replace(pair, delete_failed=_more(pair.delete_failed, event.reason))
    return pair


def _pair_finished(pair: PairTally, event: RunFinished) -> PairTally:
    failures, quarantine, blocked = pair.failures, pair.quarantine, pair.blocked
    if event.result in {"skipped", "failed"}:
        # In whole seconds, as the times of snapshots are.
        at = event.started_at.replace(microsecond=0)
        count, first_at = (failures.count + 1, failures.first_at) if failures else (1, at)
        failures = Failures(count, event.reason or "unknown", first_at, at)
    elif event.result in {"taken", "unchanged"}:
        failures = None
        blocked = blocked if event.waiting else {}
    if event.result in {"taken", "unchanged", "failed"}:  # it was not refused
        quarantine = None
    return replace(pair, failures=failures, quarantine=quarantine, blocked=blocked, stuck=False)


def _domain_after(domain: DomainTally, event: RunEvent) -> DomainTally:
    match event:
        case SnapshotTaken(consistency=consistency) if domain.frozen and consistency in _CLEAN:
            return replace(domain, frozen=False)
        case GuestFrozen():
            return replace(domain, frozen=True)
        case DomainExamined():
            return replace(domain, chain_depth=dict(event.chain_depth), chain_limit=event.chain_limit)
    return domain


def _policy_after(policy: PolicyTally, event: RunEvent) -> PolicyTally:
    match event:
        case SnapshotTaken():
            if event.duration_seconds is None:
                return policy
            takes = (policy.takes or Durations()).and_one(event.duration_seconds)
            freezes = policy.freezes
            if event.consistency == Consistency.FILESYSTEM:
                freezes = (freezes or Durations()).and_one(event.duration_seconds)
            return replace(policy, takes=takes, freezes=freezes)
        case SnapshotDeleted():
            return replace(policy, deletes=(policy.deletes or Durations()).and_one(event.duration_seconds))
    return policy


def _more(counts: Mapping[str, int], word: str) -> Mapping[str, int]:
    return {**counts, str(word): counts.get(word, 0) + 1}


def _with(known: Mapping[_Key, _Value], key: _Key, value: _Value, before: _Value) -> Mapping[_Key, _Value]:
    """Return the mapping with one value changed: the very same one, if it is not."""
    return known if value is before else {**known, key: value}


def _only(known: Mapping[_Key, _Value], keys: Collection[str]) -> Mapping[_Key, _Value]:
    return {key: value for key, value in known.items() if key in keys}
