"""Planning: what one run of one policy on one domain would take and delete, and why.

A plan is plain data. Printing it is the dry run, executing it is the daemon; there is no other dry-run switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsnapd.model import TakeRequest
from kvmsnapd.naming import format_name
from kvmsnapd.preflight import Refusal, RefusalReason, plan_take
from kvmsnapd.prune import Blocked, BlockReason, Delete, plan_deletes, plan_room
from kvmsnapd.retention import Point, Verdict, plan_retention
from kvmsnapd.schedule import decide_due

if TYPE_CHECKING:
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Domain, Inventory
    from kvmsnapd.policy import Policy
    from kvmsnapd.schedule import Due


_LONG_PAUSE = 3
"""Intervals of the schedule without a snapshot after which one run only takes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the run of one policy on one domain does.

    ``take`` is None when nothing is due or the domain is refused. ``room`` are deletes that a full backing chain needs
    before the take; after them the run is planned anew. ``verdicts`` judge the policy's snapshots as they will be once
    the slot's one is taken; ``deletes`` follow from them in the order they are carried out, only after a successful
    take.
    """

    domain_uuid: str
    domain_name: str
    policy: str
    due: Due
    take: TakeRequest | None
    refusal: Refusal | None
    room: tuple[Delete, ...]
    verdicts: tuple[Verdict, ...]
    deletes: tuple[Delete, ...]
    blocked: tuple[Blocked, ...]


def due_for(inventory: Inventory, policy: Policy, now: datetime) -> Due:
    """Return what the policy's schedule asks of this domain now; snapshots' names and marks suffice for that."""
    return decide_due(
        policy.schedule,
        (snapshot.mark.scheduled_at for snapshot in inventory.of_policy(policy.name) if snapshot.mark),
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
    refusal = answer if isinstance(answer, Refusal) else None
    verdicts = judge(domain, policy, now=now, upcoming=due.slot)
    room: tuple[Delete, ...] = ()
    if refusal and refusal.reason is RefusalReason.CHAIN_FULL:
        room = plan_room(domain, policy, capabilities, verdicts)
    if refusal and not room:
        verdicts = judge(domain, policy, now=now)  # of what exists, since nothing will be taken
    deletes, blocked = plan_deletes(domain, policy, capabilities, verdicts)
    pause = _long_pause(domain, policy, due.slot) if due.slot else None
    if pause:
        blocked += tuple(Blocked(delete.snapshot, BlockReason.LONG_PAUSE, pause) for delete in deletes)
        deletes = ()
    return Plan(domain.uuid, domain.name, policy.name, due, take, refusal, room, verdicts, deletes, blocked)


def judge(
    inventory: Inventory, policy: Policy, *, now: datetime, upcoming: datetime | None = None
) -> tuple[Verdict, ...]:
    """Return retention's verdicts on the policy's snapshots of this domain, and on the one of an upcoming slot."""
    points = [Point(format_name(policy.name, upcoming), upcoming)] if upcoming else []
    own = [(snapshot.mark, snapshot.name) for snapshot in inventory.of_policy(policy.name) if snapshot.mark]
    own.sort(key=lambda entry: entry[0].attempt, reverse=True)  # of one slot the later attempt counts as newer
    points += [Point(name, mark.scheduled_at, mark.held(now)) for mark, name in own]
    return plan_retention(points, policy.keep, timezone=policy.timezone, now=now)


def _long_pause(inventory: Inventory, policy: Policy, slot: datetime) -> str | None:
    """Return why nothing is to be deleted in the first run after a long pause, None when there was none.

    The host was off, or the clock has jumped ahead: then the first snapshot would make all others look old. If it was
    the pause, the next run prunes; if it was the clock, somebody has until then.
    """
    slots = [s.mark.scheduled_at for s in inventory.of_policy(policy.name) if s.mark and s.mark.scheduled_at < slot]
    if slots and slot - max(slots) > _LONG_PAUSE * policy.schedule.longest_interval:
        return f"the snapshot before is of {max(slots).isoformat()}; after such a pause the next run prunes"
    return None
