"""The fleet at one instant: every (domain, policy) pair with its newest snapshot, its limit and its next run.

Computed from libvirt's list and the configuration alone; status, metrics and the scheduler all read this one value,
so they cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmsnapd.disks import data_folders
from kvmsnapd.events import DomainExamined
from kvmsnapd.matching import Coverage, assign, missing_domains
from kvmsnapd.model import Consistency, PairName
from kvmsnapd.plan import due_for, plan_run
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.preflight import chain_depths, tightest_chain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from kvmsnapd.matching import Assignment
    from kvmsnapd.model import Capabilities, Domain, Inventory, Snapshot, Storage
    from kvmsnapd.plan import Plan
    from kvmsnapd.policy import Policy
    from kvmsnapd.schedule import Due


WaitingSlot = tuple["datetime", timedelta]
"""A slot, and the splay that it waits for."""

_TOLERANCE = timedelta(seconds=30)
"""A run may end between the reading of the clock and that of libvirt."""


_WORSE = {
    ConsistencyRule.FILESYSTEM: {Consistency.CRASH},
    ConsistencyRule.FILESYSTEM_PREFERRED: {Consistency.CRASH},
    ConsistencyRule.MEMORY: {Consistency.CRASH, Consistency.FILESYSTEM},
}


@dataclass(frozen=True, slots=True)
class Pair:
    """One domain under one policy. ``snapshots`` are the policy's own ones, newest slot first.

    ``newest`` is the newest good one, None before the first. One dated in the future is not good: it would keep the age
    low, and the alarm silent, until its date has come.
    """

    name: PairName
    policy: Policy
    snapshots: tuple[Snapshot, ...]
    newest: Snapshot | None
    last_success_at: datetime | None
    """The latest instant whose state the newest good snapshot holds: when it was taken, or last seen unchanged."""
    due: Due
    policies: tuple[Policy, ...] = ()
    """All policies of the domain, which share one backing chain."""

    @property
    def consistency(self) -> Consistency | None:
        """What a guest would find after going back to the newest good snapshot; None before the first."""
        return self.newest.mark.consistency if self.newest and self.newest.mark else None

    @property
    def below_consistency(self) -> bool:
        """Whether the newest good snapshot is worse than the policy asks, or prefers."""
        return self.consistency is not None and is_below(self.consistency, self.policy)

    def age(self, now: datetime) -> timedelta | None:
        """Return how old the newest good snapshot is, or None before the first."""
        last = self.last_success_at
        return now - last if last else None


@dataclass(frozen=True, slots=True)
class Fleet:
    """All domains of one libvirt as seen at ``at``."""

    at: datetime
    domains: tuple[Inventory, ...] = ()
    assignments: tuple[Assignment, ...] = ()
    pairs: tuple[Pair, ...] = ()
    missing_domains: tuple[str, ...] = ()
    domains_per_policy: Mapping[str, int] = field(default_factory=dict)

    def clock_suspect(self) -> bool:
        """Tell whether a snapshot of ours is dated in the future: this host's clock is wrong now, or was then."""
        marks = (s.mark for pair in self.pairs for s in pair.snapshots)
        return any(
            max(mark.taken_at, *mark.slots, *([mark.unchanged.seen_at] if mark.unchanged else []))
            > self.at + _TOLERANCE
            for mark in marks
            if mark
        )

    def unmanaged(self) -> list[tuple[Inventory, tuple[Snapshot, ...]]]:
        """Return, per domain, our snapshots of policies that do not apply to it any more; they are never pruned."""
        applied = {a.domain_uuid: {p.name for p in a.policies} for a in self.assignments}
        left = [
            (d, tuple(s for s in d.snapshots if s.mark and s.mark.policy not in applied.get(d.uuid, ())))
            for d in self.domains
        ]
        return [(domain, snapshots) for domain, snapshots in left if snapshots]

    def unprotected(self) -> list[Assignment]:
        """Return the domains that have no policy without somebody having said so."""
        return [a for a in self.assignments if a.coverage in {Coverage.UNMATCHED, Coverage.AMBIGUOUS}]


def is_below(consistency: Consistency, policy: Policy) -> bool:
    """Tell whether a snapshot of this consistency is worse than the policy asks, or prefers."""
    return consistency in _WORSE.get(policy.consistency, ())


def plan_next(pair: Pair, domain: Domain, capabilities: Capabilities, storage: Storage, *, now: datetime) -> Plan:
    """Return the plan of the pair's next run: the one that is due, or else that of its next slot."""
    at = max(now, pair.due.run_at)
    return plan_run(domain, pair.policy, capabilities, now=at, storage=storage, policies=pair.policies)


def examine(pair: Pair, domain: Domain, storage: Storage, capabilities: Capabilities) -> DomainExamined:
    """Return what was found below a domain, as an event of this pair."""
    return DomainExamined(
        pair=pair.name,
        chain_depth=chain_depths(domain),
        free_bytes=dict(storage.free_bytes),
        chain_limit=tightest_chain(pair.policies, ceiling=capabilities.chain_ceiling),
        folders=tuple(data_folders(domain, pair.policy)),
    )


def survey(
    policies: Iterable[str],
    selectors: Mapping[str, tuple[Policy, ...]],
    domains: Iterable[Inventory],
    *,
    now: datetime,
    waiting: Mapping[str, WaitingSlot] = MappingProxyType({}),
) -> Fleet:
    """Return the state of all pairs, from what libvirt lists and what the configuration says.

    Args:
        waiting: slots that keep another splay than the policy's, by pair key: see :func:`waiting_slots`.
    """
    inventories = tuple(domains)
    assignments = assign(selectors, inventories)
    pairs = tuple(
        _pair(domain, policy, assignment.policies, now, waiting)
        for domain, assignment in zip(inventories, assignments, strict=True)
        for policy in assignment.policies
    )
    per_policy = Counter(pair.name.policy for pair in pairs)
    return Fleet(
        now,
        inventories,
        assignments,
        pairs,
        missing_domains(selectors, inventories),
        {policy: per_policy[policy] for policy in policies},
    )


def waiting_slots(before: Fleet, after: Fleet, *, now: datetime) -> dict[str, WaitingSlot]:
    """Return, by pair key, the slots that wait for their splay and that a shorter one would call missed.

    An edit must not cost a snapshot: such a slot keeps the splay that it had.
    """
    known = {pair.name.key: pair for pair in before.pairs}
    found = {}
    for pair in after.pairs:
        was = known.get(pair.name.key)
        if was and pair.due.missed and was.due.run_at > now:
            slot = was.due.run_at - was.policy.splay_of(pair.name.domain_uuid)
            if slot == pair.due.missed:
                found[pair.name.key] = (slot, was.policy.splay)
    return found


def explain_coverage(assignment: Assignment) -> str:
    """Return why a domain has the policies it has, and the entries that decide."""
    if assignment.coverage in {Coverage.UNMATCHED, Coverage.AMBIGUOUS}:
        return explain_unprotected(assignment)
    return f"{assignment.coverage}, by {assignment.patterns[0]}"


def explain_unprotected(assignment: Assignment) -> str:
    """Return why a domain has no policy, and what to do about it."""
    if assignment.patterns:
        both = " and ".join(assignment.patterns)
        return f"unprotected: {both} fit it equally well and disagree; name it on a line of its own"
    return "unprotected: no entry under domains fits it; give it policies, or [] if that is meant"


def _pair(
    domain: Inventory,
    policy: Policy,
    policies: tuple[Policy, ...],
    now: datetime,
    waiting: Mapping[str, WaitingSlot],
) -> Pair:
    name = PairName(domain.name, domain.uuid, policy.name)
    due = due_for(domain, policy, now)
    slot, splay = waiting.get(name.key, (None, policy.splay))
    if slot and due.missed == slot:
        policy = replace(policy, splay=splay)
        due = due_for(domain, policy, now)
    own = [(s.mark, s) for s in domain.of_policy(policy.name) if s.mark]
    own.sort(key=lambda entry: (entry[0].scheduled_at, entry[0].attempt), reverse=True)
    good = ((mark, s) for mark, s in own if max(mark.scheduled_at, mark.taken_at) <= now)
    mark, newest = next(good, (None, None))
    last = mark.good_at(now) if mark else None
    return Pair(name, policy, tuple(s for _, s in own), newest, last, due, policies)
