"""What another configuration would change: which policies, for which domains, and how many snapshots it releases."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from kvmsnapd.daemon_events import DomainPoliciesChanged
from kvmsnapd.errors import ConfigError, Problem
from kvmsnapd.fleet import explain_coverage
from kvmsnapd.plan import due_for, judge, owed_by

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from kvmsnapd.fleet import Fleet, Pair
    from kvmsnapd.model import Inventory
    from kvmsnapd.policy import Policy

_MOST_NAMED = 10
_WRITTEN = {"memory_live": "memory", "min_free_bytes": "min_free"}
"""Settings that have another name in the configuration."""


@dataclass(frozen=True, slots=True)
class PolicyChanges:
    """The names that stand for something else now; ``changed`` says which settings differ."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]


def compare_policies(before: Mapping[str, Policy], after: Mapping[str, Policy]) -> PolicyChanges:
    """Compare what the names of policies stand for."""
    return PolicyChanges(
        tuple(name for name in after if name not in before),
        tuple(name for name in before if name not in after),
        {
            name: _differing(before[name], policy)
            for name, policy in after.items()
            if before.get(name, policy) != policy
        },
    )


def compare_fleets(before: Fleet, after: Fleet, *, now: datetime) -> tuple[DomainPoliciesChanged, ...]:
    """Return what changes for each domain to which something else applies, both fleets being of the same domains."""
    old, new = _by_domain(before), _by_domain(after)
    unprotected = {a.domain_uuid for a in after.unprotected()}
    coverages = {a.domain_uuid: explain_coverage(a) for a in after.assignments}
    changes = []
    for domain in after.domains:
        was, becomes = old.get(domain.uuid, {}), new.get(domain.uuid, {})
        both = [name for name in becomes if name in was and was[name].policy != becomes[name].policy]
        lost = tuple(name for name in was if name not in becomes)
        gained = tuple(name for name in becomes if name not in was)
        change = DomainPoliciesChanged(
            domain=domain.name,
            domain_uuid=domain.uuid,
            coverage=coverages[domain.uuid],
            unprotected=bool(was) and domain.uuid in unprotected,
            gained=gained,
            lost=lost,
            changed={name: _differing(was[name].policy, becomes[name].policy) for name in both},
            releases={
                name: len(_newly_released(domain, was.get(name), pair, now))
                for name, pair in becomes.items()
                if name in both or name not in was
            },
            fuse=tuple(name for name in (*gained, *both) if _blows_fuse(domain, becomes[name].policy, now)),
            leaves=sum(len(was[name].snapshots) for name in lost),
        )
        if change.gained or change.lost or change.changed:
            changes.append(change)
    return tuple(changes)


def refuse_loss(changes: Iterable[DomainPoliciesChanged], path: str) -> None:
    """Refuse a configuration that nobody asked for and that leaves domains without protection.

    A file that is being written, or was cut off by a full disk, looks like that.

    Raises:
        ConfigError: it does.
    """
    lost = [change.domain for change in changes if change.unprotected]
    if lost:
        named = ", ".join(lost[:_MOST_NAMED]) + (f" and {len(lost) - _MOST_NAMED} more" if lost[_MOST_NAMED:] else "")
        message = f"leaves {named} without protection; reload by hand if this is meant (systemctl reload kvmsnapd)"
        raise ConfigError([Problem(message, path)])


def _newly_released(domain: Inventory, before: Pair | None, after: Pair, now: datetime) -> set[str]:
    # Snapshots of a policy that did not apply were released by nothing.
    released = _released(domain, after.policy, now)
    return released - _released(domain, before.policy, now) if before else released


def _blows_fuse(domain: Inventory, policy: Policy, now: datetime) -> bool:
    """Tell whether the next run, with the snapshot that it takes, would delete more than may go at once."""
    upcoming = due_for(domain, policy, now).slot or policy.schedule.next_slot(now)
    deletes = len(_released(domain, policy, max(now, upcoming), upcoming)) + len(domain.half_deleted(policy.name))
    return deletes > policy.max_deletes_per_run + owed_by(domain, policy)


def _released(domain: Inventory, policy: Policy, now: datetime, upcoming: datetime | None = None) -> set[str]:
    return {verdict.point.name for verdict in judge(domain, policy, now=now, upcoming=upcoming) if not verdict.keep}


def _differing(before: Policy, after: Policy) -> tuple[str, ...]:
    """Return the settings, as they are called in the configuration, in which two policies differ."""
    names = [f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)]
    return tuple(_WRITTEN.get(name, name) for name in names)


def _by_domain(fleet: Fleet) -> dict[str, dict[str, Pair]]:
    found: dict[str, dict[str, Pair]] = {}
    for pair in fleet.pairs:
        found.setdefault(pair.name.domain_uuid, {})[pair.name.policy] = pair
    return found
