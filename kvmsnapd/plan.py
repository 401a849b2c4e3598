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


def plan_run(
    domain: Domain,
    policy: Policy,
    capabilities: Capabilities,
    *,
    now: datetime,
    attempt: int = 1,
    unwilling: str | None = None,
) -> Plan:
    """Plan the run that would begin now.

    Args:
        domain: the whole domain, freshly read.
        now: the instant to plan for, timezone-aware.
        attempt: above 1 when the outcome of an earlier attempt at this slot is unknown: the old name may survive as
            an orphan inside a qcow2 file, so it is not used again.
        unwilling: a snapshot that libvirt failed to delete the last time.
    """
    due = due_for(domain, policy, now)
    answer = plan_take(domain, policy, capabilities, slot=due.slot, now=now, attempt=attempt) if due.slot else None
    take = answer if isinstance(answer, TakeRequest) else None
    refusal = answer if isinstance(answer, Refusal) else None
    verdicts = judge(domain, policy, now=now, upcoming=due.slot)
    deletes, blocked = plan_deletes(domain, policy, capabilities, verdicts, unwilling=unwilling)
    room: tuple[Delete, ...] = ()
    if refusal and refusal.reason is RefusalReason.CHAIN_FULL:
        room = plan_room(domain, policy, capabilities, deletes, now=now)
    pause = _long_pause(domain, policy, due.slot) if due.slot else None
    if pause:
        blocked += tuple(Blocked(delete.snapshot, BlockReason.LONG_PAUSE, pause) for delete in deletes)
        deletes = ()
        room = room if len(room) == 1 else ()  # without any, a full chain would make the pause last for ever
    if refusal and not room:  # nothing will be taken: the verdicts are those on what exists
        verdicts = judge(domain, policy, now=now)
        released = {verdict.point.name for verdict in verdicts if not verdict.keep}
        deletes = tuple(delete for delete in deletes if delete.snapshot in released)
        blocked = tuple(wait for wait in blocked if wait.snapshot in released)
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
    limit = _LONG_PAUSE * policy.schedule.longest_interval
    marks = (s.mark for s in inventory.of_policy(policy.name))
    slots = sorted((m.scheduled_at for m in marks if m and m.scheduled_at < slot), reverse=True)
    if not slots or slot - slots[0] <= limit:
        return None
    if len(slots) > 1 and slots[0] - slots[1] > limit:
        return None  # a host that is on only now and then: every run would be one after a pause
    return f"the snapshot before is of {slots[0].isoformat()}; after such a pause the next run prunes"
