"""Forecast: the future if every run succeeds; the same schedule and retention as the real thing.

Retention has no memory: what a run deletes would not be claimed later either, and counts for no other point. So one
look at all points up to an instant says what is left then, as runs at each slot would have left it, and the slots in
between need not be gone through. A property test holds this to the plain way.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from kvmsnapd.naming import format_name
from kvmsnapd.plan import due_for, own_points
from kvmsnapd.retention import ALL, PERIOD_RULES, Point, parse_keep, plan_retention

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from kvmsnapd.model import Inventory
    from kvmsnapd.policy import Policy

HORIZON = timedelta(days=3653)
"""How far a release is looked for."""

_MOST_SLOTS = 2000
"""Of one rule; one that needs more is looked at no further."""


@dataclass(frozen=True, slots=True)
class ForecastSpan:
    """What exists at the end of the calendar day ``last``: the slots of all snapshots that are left, newest first.

    ``taken`` and ``deleted`` count from the day ``first`` on.
    """

    first: date
    last: date
    slots: tuple[datetime, ...]
    taken: int
    deleted: int


@dataclass(frozen=True, slots=True)
class Release:
    """When retention lets a snapshot go: the run that deletes it begins ``at``.

    ``at`` is None for one that stays for good. If not ``certain``, it is still there then, and no more is
    known.
    """

    at: datetime | None
    certain: bool = True


def forecast(policy: Policy, *, start: datetime, days: int, step: int = 1) -> Iterator[ForecastSpan]:
    """Yield spans of ``step`` days, beginning with the calendar day of ``start``, from no snapshots at all.

    The last one is shorter where the days do not come out even.
    """
    points: list[Point] = []
    first_day = start.astimezone(policy.timezone).date()
    slots = policy.schedule.slots_after(start)
    upcoming = next(slots)
    for offset in range(0, days, step):
        first, last = first_day + timedelta(days=offset), first_day + timedelta(days=min(offset + step, days) - 1)
        midnight = datetime.combine(last + timedelta(days=1), time(0), policy.timezone).astimezone(UTC)
        new: list[Point] = []
        while upcoming < midnight:
            new.append(Point(format_name(policy.name, upcoming), upcoming))
            upcoming = next(slots)
        verdicts = plan_retention([*reversed(new), *points], policy.keep, timezone=policy.timezone, now=midnight)
        kept = [verdict.point for verdict in verdicts if verdict.keep] if new else points
        yield ForecastSpan(first, last, tuple(p.at for p in kept), len(new), len(points) + len(new) - len(kept))
        points = kept


def release_dates(inventory: Inventory, policy: Policy, *, now: datetime) -> Mapping[str, Release]:
    """Return when each of the policy's snapshots of a domain is released, by name.

    Half-deleted ones are left out. A hold counts until it ends; one without end keeps its snapshot for good.
    """
    splay = policy.splay_of(inventory.uuid)
    horizon = now + HORIZON
    slots = _telling_slots(inventory, policy, now, horizon)
    names = {point.name for point in own_points(inventory, policy, now=now)}

    def points_at(slot: datetime) -> list[Point]:
        upcoming = [Point("", other) for other in slots if other <= slot]
        return [*upcoming, *own_points(inventory, policy, now=max(now, slot))]

    def left_at(slot: datetime) -> set[str]:
        verdicts = plan_retention(points_at(slot), policy.keep, timezone=policy.timezone, now=max(now, slot))
        return {verdict.point.name for verdict in verdicts if verdict.keep} & names

    found: dict[str, Release] = {}

    def search(waiting: set[str], begin: int, end: int) -> None:
        """Find the first slot, of those from begin to before end, at which each of those waiting is gone."""
        if not waiting:
            return
        if end - begin == 1:
            found.update(dict.fromkeys(waiting, Release(max(now, slots[begin] + splay))))
            return
        middle = (begin + end) // 2
        still = left_at(slots[middle - 1]) & waiting
        search(waiting - still, begin, middle)
        search(still, middle, end)

    left = left_at(slots[-1])
    search(names - left, 0, len(slots))
    staying = _staying(inventory, policy, points_at(slots[-1]), max(now, slots[-1]))
    found.update({name: Release(None) if name in staying else Release(slots[-1], certain=False) for name in left})
    return found


def _telling_slots(inventory: Inventory, policy: Policy, now: datetime, horizon: datetime) -> list[datetime]:
    """Return the coming slots at which a rule may let go of a snapshot that exists: the first one of each period."""
    marks = [s.mark for s in inventory.of_policy(policy.name) if s.mark]
    due = due_for(inventory, policy, now).slot
    slots = {due} if due else set()
    for start in (now, *(mark.scheduled_at for mark in marks if now < mark.scheduled_at < horizon)):
        slots |= _first_slots(policy, start, horizon)
    ends = [mark.hold.until for mark in marks if mark.hold and mark.hold.until]
    if policy.keep.within:
        ends += [mark.scheduled_at + policy.keep.within for mark in marks]
    second = timedelta(seconds=1)
    slots |= {policy.schedule.next_slot(end - second) for end in ends if now < end < horizon}
    slots.add(policy.schedule.next_slot(now))  # the next run in any case
    return sorted(slots)


def _first_slots(policy: Policy, start: datetime, horizon: datetime) -> set[datetime]:
    count = 1 if policy.keep.last == ALL else min(policy.keep.last + 1, _MOST_SLOTS)
    slots = set(takewhile(lambda slot: slot < horizon, islice(policy.schedule.slots_after(start), count)))
    for rule, periods in policy.keep.counts():
        if not periods or rule not in PERIOD_RULES:
            continue
        at = start
        for _ in range(2 if periods == ALL else min(periods + 2, _MOST_SLOTS)):
            slot = policy.schedule.next_slot(at)
            if slot >= horizon:
                break
            slots.add(slot)
            at = _end_of_period(rule, slot.astimezone(policy.timezone)) - timedelta(seconds=1)
    return slots


def _end_of_period(rule: str, local: datetime) -> datetime:
    """Return the instant at which the calendar period of a local time is over."""
    if rule == "hourly":
        begun = local.astimezone(UTC) - timedelta(minutes=local.minute, seconds=local.second)
        return begun + timedelta(hours=1)
    day = local.date()
    match rule:
        case "daily":
            following = day + timedelta(days=1)
        case "weekly":
            following = day + timedelta(days=8 - day.isoweekday())
        case "monthly":
            following = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
        case _:
            following = date(day.year + 1, 1, 1)
    return datetime.combine(following, time(0), local.tzinfo).astimezone(UTC)


def _staying(inventory: Inventory, policy: Policy, points: Sequence[Point], now: datetime) -> set[str]:
    """Return what is there for good: held without end, or claimed by a rule without limit."""
    names = {
        s.name
        for s in inventory.of_policy(policy.name)
        if s.mark and s.mark.held(now) is not None and (s.mark.hold is None or s.mark.hold.until is None)
    }
    endless = [f"{rule}=all" for rule, count in policy.keep.counts() if count == ALL]
    if endless:
        verdicts = plan_retention(points, parse_keep(" ".join(endless)), timezone=policy.timezone, now=now)
        names |= {verdict.point.name for verdict in verdicts if verdict.keep and verdict.point.held is None}
    return names
