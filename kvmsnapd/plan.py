"""Planning: what one run of one policy on one domain would take and delete, and why.

A plan is plain data. Printing it is the dry run, executing it is the daemon; there is no other dry-run switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsnapd.model import TakeRequest
from kvmsnapd.preflight import Refusal, plan_take
from kvmsnapd.prune import Blocked, Delete, plan_deletes
from kvmsnapd.retention import Point, Verdict, plan_retention
from kvmsnapd.schedule import decide_due

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Domain, Inventory, Mark
    from kvmsnapd.policy import Policy
    from kvmsnapd.schedule import Due


@dataclass(frozen=True, slots=True)
class Plan:
    """What the run of one policy on one domain does.

    ``take`` is None when nothing is due or the domain is refused. ``verdicts`` judge the policy's snapshots as they
    will be once ``take`` has succeeded; ``deletes`` follow from them in the order they are carried out, and only
    after a successful take.
    """

    domain_uuid: str
    domain_name: str
    policy: str
    due: Due
    take: TakeRequest | None
    refusal: Refusal | None
    verdicts: tuple[Verdict, ...]
    deletes: tuple[Delete, ...]
    blocked: tuple[Blocked, ...]


def due_for(inventory: Inventory, policy: Policy, now: datetime) -> Due:
    """Return what the policy's schedule asks of this domain now; snapshots' names and marks suffice for that."""
    return decide_due(
        policy.schedule,
        (mark.scheduled_at for mark in _marks(inventory, policy)),
        now=now,
        splay=policy.splay_of(inventory.uuid),
        catch_up=policy.catch_up,
    )


def plan_run(domain: Domain, policy: Policy, capabilities: Capabilities, *, now: datetime, attempt: int = 1) -> Plan:
    """Plan the run that would begin now.

    Args:
        domain: the whole domain, freshly read.
        now: the instant to plan for, timezone-aware.
        attempt: above 1 when the outcome of an earlier attempt at this slot is unknown: the old name may survive as
            an orphan inside a qcow2 file, so it is not used again.
    """
    due = due_for(domain, policy, now)
    answer = plan_take(domain, policy, capabilities, slot=due.slot, now=now, attempt=attempt) if due.slot else None
    take = answer if isinstance(answer, TakeRequest) else None
    verdicts = judge(domain, policy, now=now, taking=take)
    deletes, blocked = plan_deletes(domain, policy, capabilities, verdicts)
    return Plan(
        domain.uuid,
        domain.name,
        policy.name,
        due,
        take,
        answer if isinstance(answer, Refusal) else None,
        verdicts,
        deletes,
        blocked,
    )


def judge(
    inventory: Inventory, policy: Policy, *, now: datetime, taking: TakeRequest | None = None
) -> tuple[Verdict, ...]:
    """Return retention's verdicts on the policy's snapshots of this domain, and on the one about to be taken."""
    points = [Point(taking.name, taking.mark.scheduled_at)] if taking else []
    own = [(snapshot.mark, snapshot.name) for snapshot in inventory.of_policy(policy.name) if snapshot.mark]
    own.sort(key=lambda entry: entry[0].attempt, reverse=True)  # of one slot the later attempt counts as newer
    points += [Point(name, mark.scheduled_at, mark.held(now)) for mark, name in own]
    return plan_retention(points, policy.keep, timezone=policy.timezone, now=now)


def _marks(inventory: Inventory, policy: Policy) -> Iterable[Mark]:
    return (s.mark for s in inventory.of_policy(policy.name) if s.mark)
