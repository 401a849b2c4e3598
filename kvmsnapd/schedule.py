"""Schedules: when a policy's snapshots are due, as plain arithmetic on instants.

A fire time of a schedule is a *slot*; it names the snapshot. What is due follows from the newest snapshot that
exists and the slots, not from a timer that happened to fire. Cron expressions are cronsim's, which follows Debian's
cron: day-of-month OR day-of-week, Sunday is 0 and 7, and a fixed daily time fires exactly once on the days of both
clock changes (in the spring gap at the moment the clock jumps to).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Final

from cronsim import CronSim, CronSimError

from kvmsnapd.durations import parse_duration
from kvmsnapd.errors import InvalidValueError, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from zoneinfo import ZoneInfo

ALIASES: Final = {
    "hourly": "0 * * * *",
    "daily": "0 0 * * *",
    "weekly": "0 0 * * 1",  # Monday, where the ISO weeks of retention begin
    "monthly": "0 0 1 * *",
    "yearly": "0 0 1 1 *",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST_GAP = timedelta(days=8 * 366)  # 29 February over a century that is no leap year
_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
_SECOND, _DAY = timedelta(seconds=1), timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A parsed schedule. Exactly one of ``cron`` and ``every`` is set; ``text`` is what the user wrote."""

    text: str
    timezone: ZoneInfo
    cron: str | None = None
    every: timedelta | None = None

    def slots_after(self, at: datetime) -> Iterator[datetime]:
        """Yield the slots strictly after ``at`` in UTC, without end.

        ``every 15m`` counts from 1970-01-01T00:00Z, so its slots do not depend on when the daemon was started.
        """
        if self.every:
            slot = _EPOCH + (at - _EPOCH) // self.every * self.every
            while True:
                slot += self.every
                yield slot
        start = at.astimezone(self.timezone)
        if start.fold:
            # Started within the repeated hour of a clock change, CronSim 2.8 begins with times of its first pass.
            start = (at - timedelta(hours=4)).astimezone(self.timezone)
        for fire_time in CronSim(self.cron or "", start):
            slot = fire_time.astimezone(UTC)
            if slot > at:
                yield slot

    def next_slot(self, at: datetime) -> datetime:
        """Return the first slot strictly after ``at``."""
        return next(self.slots_after(at))

    def latest_slot(self, at: datetime) -> datetime:
        """Return the last slot at or before ``at``."""
        window = self.shortest_interval  # and more only where the schedule pauses, or dense ones would take long
        while True:
            latest = None
            for slot in self.slots_after(at - window - _SECOND):
                if slot > at:
                    break
                latest = slot
            if latest:
                return latest
            window *= 2

    @property
    def shortest_interval(self) -> timedelta:
        """The shortest time between two slots that follow each other, clock changes included."""
        return self.every or _cron_intervals(self.cron or "", self.timezone)[0]

    @property
    def longest_interval(self) -> timedelta:
        """The longest time between two slots that follow each other, clock changes included.

        For an irregular schedule, such as working hours only, this is what an age limit has to allow.
        """
        return self.every or _cron_intervals(self.cron or "", self.timezone)[1]

    def __str__(self) -> str:
        """Return what the user wrote."""
        return self.text


@lru_cache(maxsize=1024)
def _cron_intervals(cron: str, timezone: ZoneInfo) -> tuple[timedelta, timedelta]:
    """Return the shortest and the longest time between neighbouring slots.

    The two first fields decide the times within a day, the others the days; each alone is short enough to be looked at
    whole, which a schedule of every minute of one month is not.
    """
    minute, hour, *rest = cron.split()
    times = list(_sample(f"{minute} {hour} * * *", _YEAR, _DAY))
    dates, pauses = _days(" ".join(rest))
    intervals = {later - earlier for earlier, later in pairwise(times)}
    for change in _clock_changes(timezone):
        around = _sample(f"{minute} {hour} * * *", (change - _DAY).astimezone(timezone), 3 * _DAY)
        intervals |= {
            later.astimezone(UTC) - earlier.astimezone(UTC)
            for earlier, later in pairwise(around)
            if {earlier.date(), later.date()} <= dates
        }
    for earlier, later in pauses:
        # From day to day the clock changes have been looked at; over more days they may fall in between.
        zone = UTC if later - earlier == _DAY else timezone
        last = datetime.combine(earlier, times[-1].time(), zone)
        first = datetime.combine(later, times[0].time(), zone)
        intervals.add(first.astimezone(UTC) - last.astimezone(UTC))
    return min(intervals, default=_LONGEST_GAP), max(intervals, default=_LONGEST_GAP)


@lru_cache
def _days(fields: str) -> tuple[frozenset[date], tuple[tuple[date, date], ...]]:
    """Return the days of ten years that the three last fields allow, and neighbours: one pair of those that adjoin."""
    days = [at.date() for at in _sample(f"0 0 {fields}", _YEAR, timedelta(days=3660))]
    apart = [(earlier, later) for earlier, later in pairwise(days) if later - earlier > _DAY]
    adjoining = next(((earlier, later) for earlier, later in pairwise(days) if later - earlier == _DAY), None)
    return frozenset(days), tuple([adjoining, *apart] if adjoining else apart)


def _sample(cron: str, start: datetime, span: timedelta) -> Iterator[datetime]:
    """Yield the fire times from ``start``, which may be one of them, to before ``start + span``."""
    return takewhile(lambda at: at < start + span, CronSim(cron, start - _SECOND))


@lru_cache
def _clock_changes(timezone: ZoneInfo) -> tuple[datetime, ...]:
    """Return the days of a year, as instants, within which the zone's clock changes."""
    days = [_YEAR + timedelta(days=n) for n in range(367)]
    return tuple(
        day
        for day, following in pairwise(days)
        if day.astimezone(timezone).utcoffset() != following.astimezone(timezone).utcoffset()
    )


def parse_schedule(text: str, timezone: ZoneInfo) -> Schedule:
    """Return the schedule written as an alias, ``every DURATION``, or five cron fields.

    Raises:
        InvalidValueError: it has another form, or names a time that never comes (such as 30 February).
    """
    written = " ".join(text.split())
    if written.startswith("every "):
        every = parse_duration(written.removeprefix("every "))
        if every < _SECOND:
            msg = f"schedule {shown(text)}: the interval must be at least one second"
            raise InvalidValueError(msg)
        return Schedule(written, timezone, every=every)
    cron = ALIASES.get(written.removeprefix("@"), written)
    fields = cron.split()
    # cronsim would read six fields as seconds, and a step beyond the range as one that never steps.
    if len(fields) != 5:  # noqa: PLR2004
        msg = (
            f"schedule {shown(text)} is none of {', '.join(ALIASES)}, 'every 15m', or five cron fields "
            "(minute hour day month weekday) such as '7 * * * *'"
        )
        raise InvalidValueError(msg)
    for field, size in zip(fields, (60, 24, 31, 12, 7), strict=True):
        for part in field.split(","):
            step = part.partition("/")[2]
            if step.isdecimal() and (len(step) > 2 or int(step) > size):  # noqa: PLR2004
                msg = f"schedule {shown(text)}: step /{step} is larger than the field's range of {size}"
                raise InvalidValueError(msg)
    try:
        next(CronSim(cron, _EPOCH.astimezone(timezone)))
    except (CronSimError, StopIteration) as error:
        msg = f"schedule {shown(text)} is no cron expression that ever fires: {str(error) or 'no such date'}"
        raise InvalidValueError(msg) from error
    return Schedule(written, timezone, cron=cron)


def stable_splay(domain_uuid: str, policy: str, limit: timedelta) -> timedelta:
    """Return the delay, in whole seconds from 0 to below ``limit``, that spreads this domain's runs.

    It depends on domain and policy alone, so restarts and reloads do not move a run.
    """
    seconds = int(limit.total_seconds())
    if seconds < 1:
        return timedelta(0)
    digest = hashlib.sha256(f"{domain_uuid}/{policy}".encode()).digest()
    return timedelta(seconds=int.from_bytes(digest[:8], "big") % seconds)


@dataclass(frozen=True, slots=True)
class Due:
    """What a schedule asks for now.

    ``slot`` is to be taken now, None when nothing is due. ``missed`` is a slot given up because catching up is not
    wanted. ``run_at`` is when this slot, or the next one, is to be started, splay included.
    """

    slot: datetime | None
    run_at: datetime
    missed: datetime | None = None


def decide_due(schedule: Schedule, done: Iterable[datetime], *, now: datetime, splay: timedelta, catch_up: bool) -> Due:
    """Decide whether a slot is due, from the slots that are done.

    Only the latest slot can be due: however many were missed, one snapshot catches up, once. Slots dated after
    ``now`` are ignored, so a snapshot from a wrong clock does not keep new ones from being taken. A policy without
    any snapshot is due at once, for its latest slot, if it catches up.

    Args:
        done: slots of which a good snapshot exists, in any order.
        catch_up: whether a slot is still taken when it is late by more than a tenth of the interval (at least a
            minute): true takes it, false gives it up and waits for the next one.
    """
    latest = schedule.latest_slot(now - splay)
    following = schedule.next_slot(latest)
    if max((slot for slot in done if slot <= now), default=_EPOCH) >= latest:
        return Due(None, following + splay)
    grace = min(max((following - latest) / 10, timedelta(minutes=1)), following - latest)
    if not catch_up and now > latest + splay + grace:
        return Due(None, following + splay, missed=latest)
    return Due(latest, latest + splay)
