"""Planning: what one run of one policy on one domain would take and delete, and why.

A plan is plain data. Printing it is the dry run, executing it is the daemon; there is no other dry-run switch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvmsnapd.model import DomainState, TakeRequest, Unchanged
from kvmsnapd.naming import format_name
from kvmsnapd.preflight import find_restoring, plan_take
from kvmsnapd.prune import Blocked, BlockReason, Delete, find_obstacle, newest_of, owes, plan_deletes, plan_room
from kvmsnapd.refusal import Refusal, RefusalReason
from kvmsnapd.retention import Point, Verdict, plan_retention
from kvmsnapd.schedule import decide_due
from kvmsnapd.unchanged import find_unchanged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Domain, Drill, Hold, Inventory, Mark, Snapshot, Storage
    from kvmsnapd.policy import Policy
    from kvmsnapd.schedule import Due


_LONG_PAUSE = 3
"""Intervals of the schedule without a snapshot after which one run only takes."""


@dataclass(frozen=True, slots=True)
class Confirm:
    """The snapshot that already holds what a new one would, and what is to be written into its description."""

    snapshot: str
    slot: datetime
    mark: Mark


@dataclass(frozen=True, slots=True)
class Order:
    """A snapshot that a person asks for: its slot is the present second. ``hold`` keeps it until it is released."""

    slot: datetime
    hold: Hold | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What the run of one policy on one domain does.

    ``take`` is None when nothing is due, the domain is refused, or ``unchanged`` names the snapshot that already holds
    what a new one would. ``room`` are deletes that a full backing chain needs before the take; after them the run is
    planned anew. ``verdicts`` judge the policy's snapshots as they will be once
    the slot's one is taken; ``deletes`` follow from them in the order they are carried out, only after a successful
    take.
    """

    domain_uuid: str
    domain_name: str
    policy: str
    due: Due
    take: TakeRequest | None
    unchanged: Confirm | None
    refusal: Refusal | None
    room: tuple[Delete, ...]
    verdicts: tuple[Verdict, ...]
    deletes: tuple[Delete, ...]
    blocked: tuple[Blocked, ...]


def due_for(inventory: Inventory, policy: Policy, now: datetime) -> Due:
    """Return what the policy's schedule asks of this domain now; snapshots' names and marks suffice for that."""
    return decide_due(
        policy.schedule,
        (slot for snapshot in inventory.of_policy(policy.name) if snapshot.mark for slot in snapshot.mark.slots),
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
    storage: Storage | None = None,
    policies: Sequence[Policy] = (),
    order: Order | None = None,
) -> Plan:
    """Plan the run that would begin now.

    Args:
        domain: the whole domain, freshly read.
        now: the instant to plan for, timezone-aware.
        attempt: above 1 when the outcome of an earlier attempt at this slot is unknown: the old name may survive as
            an orphan inside a qcow2 file, so it is not used again.
        unwilling: a snapshot that libvirt failed to delete the last time.
        storage: what is known of the storage below the domain; without it free space and changes are not looked at.
        policies: all policies of the domain; by default this one alone.
        order: what a person wants, whatever the schedule says. Nothing is deleted after such a take.
    """
    due = due_for(domain, policy, now)
    if order:
        due = replace(due, slot=order.slot)
    unchanged = None
    if due.slot and storage and not find_restoring(domain):
        unchanged = _confirm(domain, policy, storage, due.slot, now)
    answer = None
    if due.slot and not unchanged:
        answer = plan_take(
            domain, policy, capabilities, slot=due.slot, now=now, attempt=attempt, storage=storage, policies=policies
        )
    take = answer if isinstance(answer, TakeRequest) else None
    refusal = answer if isinstance(answer, Refusal) else None
    # One that is held is counted by no rule, so it takes nobody's place.
    upcoming = None if unchanged or (order and order.hold) else due.slot
    verdicts = judge(domain, policy, now=now, upcoming=upcoming)
    owed_before = owed_by(domain, policy)
    deletes, blocked = plan_deletes(
        domain,
        policy,
        capabilities,
        verdicts,
        take_first=upcoming is not None,
        unwilling=unwilling,
        owed=owed_before,
    )
    room: tuple[Delete, ...] = ()
    if refusal and refusal.reason is RefusalReason.CHAIN_FULL:
        room = plan_room(domain, policy, capabilities, deletes, now=now)
    pause = _long_pause(domain, policy, upcoming) if upcoming else None
    if pause:
        blocked += tuple(Blocked(delete.snapshot, BlockReason.LONG_PAUSE, pause) for delete in deletes)
        deletes = ()
        room = room if len(room) == 1 else ()  # without any, a full chain would make the pause last for ever
    owed = owes(blocked, owed_before)
    if order:
        owed += len(deletes)  # they wait for the next run, whose fuse they must not blow
        deletes = ()
    if take:
        hold = order.hold if order else None
        take = replace(take, mark=replace(take.mark, owed=owed, hold=hold, drill=newest_drill(domain, policy.name)))
    if unchanged:
        hold = order.hold if order and order.hold else unchanged.mark.hold
        unchanged = replace(unchanged, mark=replace(unchanged.mark, owed=owed, hold=hold))
    if refusal and not room:  # nothing will be taken: the verdicts are those on what exists
        verdicts = judge(domain, policy, now=now)
        released = {verdict.point.name for verdict in verdicts if not verdict.keep}
        released |= {snapshot.name for snapshot in domain.half_deleted(policy.name)}
        deletes = tuple(delete for delete in deletes if delete.snapshot in released)
        blocked = tuple(wait for wait in blocked if wait.snapshot in released)
    return Plan(domain.uuid, domain.name, policy.name, due, take, unchanged, refusal, room, verdicts, deletes, blocked)


def plan_prune(
    domain: Domain, policy: Policy, capabilities: Capabilities, *, now: datetime
) -> tuple[tuple[Delete, ...], tuple[Blocked, ...]]:
    """Split what retention releases now into deletes, oldest first, and what has to wait, for a person who looks at it.

    So neither the fuse nor a long pause keeps anything. No take comes before it.
    """
    verdicts = judge(domain, policy, now=now)
    newest = newest_of(domain, policy, now=now)
    deletes, blocked = plan_deletes(domain, policy, capabilities, verdicts, fuse=False)
    return tuple(delete for delete in deletes if delete.snapshot != newest), blocked


def plan_forget(
    domain: Domain, capabilities: Capabilities, *, policy: str | None = None
) -> tuple[tuple[Delete, ...], tuple[Blocked, ...]]:
    """Split all own snapshots of a domain, or those of one policy, into deletes in their order, and what cannot go.

    Held ones and the newest go as well. While the domain runs the oldest goes first, so that data is moved once only.
    Of a shut-off domain the newest does: libvirt 9.0 deletes no other (measured).
    """
    own = [s for s in domain.snapshots if s.mark and policy in {None, s.mark.policy}]
    steps = [Delete(s.name, ("forgotten",)) for s in in_tree_order(domain) if s in own]
    if domain.state is DomainState.SHUT_OFF:
        steps.reverse()
    left = domain
    deletes: list[Delete] = []
    blocked: list[Blocked] = []
    for step in steps:
        obstacle = find_obstacle(left, step.snapshot, capabilities)
        if obstacle:
            blocked.append(obstacle)
        else:
            deletes.append(step)
            left = _without(left, step.snapshot)
    return tuple(deletes), tuple(blocked)


def in_tree_order(inventory: Inventory) -> list[Snapshot]:
    """Return a domain's snapshots, each after its parent."""
    names = {s.name for s in inventory.snapshots}
    ordered: list[Snapshot] = []
    waiting = sorted(inventory.snapshots, key=lambda s: (s.created_at, s.name))
    while waiting:
        placed = {s.name for s in ordered}
        ready = [s for s in waiting if s.parent not in names or s.parent in placed]
        if not ready:  # no tree at all; libvirt would not have it
            return [*ordered, *waiting]
        ordered += ready
        waiting = [s for s in waiting if s not in ready]
    return ordered


def _without(domain: Domain, name: str) -> Domain:
    """Return the domain as it will be once this snapshot is deleted, as far as trees go."""
    gone = next(s for s in domain.snapshots if s.name == name)
    merged = {path for _, path in gone.overlays}
    left = (s for s in domain.snapshots if s is not gone)
    moved = tuple(replace(s, parent=gone.parent) if s.parent == name else s for s in left)
    below = dict(gone.covers)
    disks = []
    for disk in domain.disks:
        backing = tuple(path for path in disk.backing if path not in merged)
        path = disk.path
        if path in merged:
            path, backing = (backing[0], backing[1:]) if backing else (below.get(disk.target), ())
        disks.append(replace(disk, path=path, backing=backing))
    return replace(domain, snapshots=moved, disks=tuple(disks))


def newest_drill(inventory: Inventory, policy: str) -> Drill | None:
    """Return what the policy's last restore drill on this domain came to, None before the first."""
    drills = [s.mark.drill for s in inventory.of_policy(policy) if s.mark and s.mark.drill]
    return max(drills, key=lambda drill: drill.ended_at, default=None)


def owed_by(inventory: Inventory, policy: Policy) -> int:
    """Return how many deletes were owed, for another reason than the fuse, when the newest snapshot was taken."""
    marks = [(s.mark.scheduled_at, s.mark.attempt, s.mark.owed) for s in inventory.of_policy(policy.name) if s.mark]
    return max(marks, default=(None, None, 0))[2]


def _confirm(domain: Domain, policy: Policy, storage: Storage, slot: datetime, now: datetime) -> Confirm | None:
    snapshot = find_unchanged(domain, policy, storage)
    if snapshot is None or snapshot.mark is None or max(snapshot.mark.scheduled_at, snapshot.mark.taken_at) > now:
        return None  # one dated in the future counts as no success
    mark = replace(snapshot.mark, unchanged=Unchanged(slot, now.replace(microsecond=0)))
    return Confirm(snapshot.name, slot, mark)


def judge(
    inventory: Inventory, policy: Policy, *, now: datetime, upcoming: datetime | None = None
) -> tuple[Verdict, ...]:
    """Return retention's verdicts on the policy's snapshots of this domain, and on the one of an upcoming slot."""
    points = [Point(format_name(policy.name, upcoming), upcoming)] if upcoming else []
    points += own_points(inventory, policy, now=now)
    return plan_retention(points, policy.keep, timezone=policy.timezone, now=now)


def own_points(inventory: Inventory, policy: Policy, *, now: datetime) -> list[Point]:
    """Return the policy's snapshots of this domain as retention sees them; of one slot the newest attempt first."""
    own = [(snapshot.mark, snapshot.name) for snapshot in inventory.of_policy(policy.name) if snapshot.mark]
    own.sort(key=lambda entry: entry[0].attempt, reverse=True)  # of one slot the later attempt counts as newer
    return [Point(name, mark.scheduled_at, mark.held(now)) for mark, name in own]


def _long_pause(inventory: Inventory, policy: Policy, slot: datetime) -> str | None:
    """Return why nothing is to be deleted in the first run after a long pause, None when there was none.

    The host was off, or the clock has jumped ahead: then the first snapshot would make all others look old. If it was
    the pause, the next run prunes; if it was the clock, somebody has until then.
    """
    limit = _LONG_PAUSE * policy.schedule.longest_interval
    marks = sorted(
        (s.mark for s in inventory.of_policy(policy.name) if s.mark and s.mark.scheduled_at < slot),
        key=lambda mark: mark.scheduled_at,
    )
    if not marks:
        return None
    newest = max(done for done in marks[-1].slots if done < slot)
    if slot - newest <= limit:
        return None
    if len(marks) > 1 and marks[-1].scheduled_at - max(marks[-2].slots) > limit:
        return None  # a host that is on only now and then: every run would be one after a pause
    return f"the snapshot before is of {newest.isoformat()}; after such a pause the next run prunes"
