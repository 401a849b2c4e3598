"""Forecast: the future of one policy if every run succeeds; the same schedule and retention as the real thing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import TYPE_CHECKING

from kvmsnapd.naming import format_name
from kvmsnapd.retention import Point, plan_retention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmsnapd.policy import Policy


@dataclass(frozen=True, slots=True)
class ForecastDay:
    """What exists at the end of one calendar day: the slots of all snapshots that are left, newest first."""

    day: date
    slots: tuple[datetime, ...]
    taken: int
    deleted: int


def forecast(policy: Policy, *, start: datetime, days: int) -> Iterator[ForecastDay]:
    """Yield one day after the other, beginning with the calendar day of ``start``, from no snapshots at all."""
    points: list[Point] = []
    first_day = start.astimezone(policy.timezone).date()
    slots = policy.schedule.slots_after(start)
    upcoming = next(slots)
    for offset in range(days):
        day = first_day + timedelta(days=offset)
        midnight = datetime.combine(day + timedelta(days=1), time(0), policy.timezone)
        taken = deleted = 0
        while upcoming < midnight:
            points.insert(0, Point(format_name(policy.name, upcoming), upcoming))
            verdicts = plan_retention(points, policy.keep, timezone=policy.timezone, now=upcoming)
            kept = [verdict.point for verdict in verdicts if verdict.keep]
            taken, deleted = taken + 1, deleted + len(points) - len(kept)
            points = kept
            upcoming = next(slots)
        yield ForecastDay(day, tuple(point.at for point in points), taken, deleted)
