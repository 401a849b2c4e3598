"""Retention: which snapshots stay, and why.

*A snapshot stays while at least one keep rule claims it.* Nothing here reads a clock or knows libvirt.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from kvmsnapd.durations import format_duration, parse_duration
from kvmsnapd.errors import InvalidValueError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
    from datetime import datetime, tzinfo

ALL: Final = sys.maxsize
"""The count of a rule without limit; written ``all``."""

_PERIODS: dict[str, Callable[[datetime], Hashable]] = {
    # The UTC offset makes the repeated hour of a clock change two hours.
    "hourly": lambda t: (t.year, t.month, t.day, t.hour, t.utcoffset()),
    "daily": lambda t: (t.year, t.month, t.day),
    "weekly": lambda t: t.isocalendar()[:2],
    "monthly": lambda t: (t.year, t.month),
    "yearly": lambda t: t.year,
}
"""Each period rule with the function that names the calendar period of a local time."""
PERIOD_RULES: Final = tuple(_PERIODS)
_PERIOD_WORDS = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}


@dataclass(frozen=True, slots=True)
class KeepRules:
    """The keep rules of one policy. Counts are periods, 0 means the rule is absent, :data:`ALL` has no limit.

    Raises:
        InvalidValueError: there is no rule at all, so that everything would be deleted, or a rule is negative.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: timedelta = timedelta(0)

    def __post_init__(self) -> None:
        if any(count < 0 for _, count in self.counts()) or self.within < timedelta(0):
            msg = "a keep rule cannot be negative"
            raise InvalidValueError(msg)
        if not self.within and not any(count for _, count in self.counts()):
            msg = "keep has no rule, so nothing would be kept: give at least one, such as last: 7"
            raise InvalidValueError(msg)

    def counts(self) -> list[tuple[str, int]]:
        """Return ``last`` and the period rules with their counts, shortest period first."""
        return [(name, getattr(self, name)) for name in ("last", *_PERIODS)]

    def most(self, interval: timedelta) -> int | None:
        """Return how many snapshots the rules can keep at the most; None where that has no limit.

        All rules claim the newest snapshot, so it counts once.

        Args:
            interval: the shortest time between two snapshots, which decides how many ``within`` can claim.
        """
        claims = [count for _, count in self.counts() if count]
        if ALL in claims:
            return None
        if self.within:
            claims.append(-(-self.within // interval))
        return sum(claims) - len(claims) + 1

    def __str__(self) -> str:
        """Return the form that :func:`parse_keep` reads: ``last=2 daily=7 weekly=all within=36h``."""
        words = [f"{name}={format_count(count)}" for name, count in self.counts() if count]
        return " ".join(words + ([f"within={format_duration(self.within)}"] if self.within else []))


def format_count(count: int) -> str:
    """Return a rule's count as people write it: the number, or ``all``."""
    return "all" if count == ALL else str(count)


def parse_count(value: int | str) -> int:
    """Return the count of a keep rule written as a whole number from 1, or ``all``.

    Raises:
        InvalidValueError: anything else; also 0, since a rule that keeps nothing is a mistake, not a rule.
    """
    if value == "all":
        return ALL
    if isinstance(value, int) or re.fullmatch(r"0|[1-9][0-9]{0,8}", value, re.ASCII):
        count = int(value)
        if 0 < count < 10**9:
            return count
        if count == 0:
            msg = "0 keeps nothing: write a whole number from 1, or all, or leave the rule out"
            raise InvalidValueError(msg)
    msg = f"{shown(value)} is no count: write a whole number from 1, or all"
    raise InvalidValueError(msg)


def parse_within(value: str) -> timedelta:
    """Return the length of a ``within`` rule; raise InvalidValueError for none or zero."""
    length = parse_duration(value)
    if not length:
        msg = f"{shown(value)} keeps nothing: write a duration above zero, such as 36h, or leave the rule out"
        raise InvalidValueError(msg)
    return length


def parse_keep(text: str) -> KeepRules:
    """Return the rules written as on the command line: ``last=2 daily=7 weekly=all within=36h``."""
    given: dict[str, int | timedelta] = {}
    known = [field.name for field in fields(KeepRules)]
    for word in text.replace(",", " ").split():
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            msg = f"{shown(word)} is no keep rule: write RULE=COUNT, with RULE one of {', '.join(known)}"
            raise InvalidValueError(msg)
        if name in given:
            msg = f"keep rule {shown(name)} is given twice"
            raise InvalidValueError(msg)
        given[name] = parse_within(value) if name == "within" else parse_count(value)
    return KeepRules(**given)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Point:
    """One restore point as retention sees it: a name for people, the instant it stands for, and holds."""

    name: str
    at: datetime
    held: str | None = None
    """The reason of a person's hold, if there is one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a restore point stays, and the reasons: which rules claim it, or that none does."""

    point: Point
    keep: bool
    reasons: tuple[str, ...]


def plan_retention(
    points: Iterable[Point], rules: KeepRules, *, timezone: tzinfo, now: datetime
) -> tuple[Verdict, ...]:
    """Decide for every restore point of one policy whether it stays, and why.

    ``last`` claims the newest N. Each period rule claims the newest point of the N newest calendar periods *that
    have one*, in ``timezone``; ISO weeks; the repeated hour of a clock change is two hours. A rule with claims left
    also claims the oldest point. ``within`` claims what is younger than that, measured from the newest point and not
    from now, so that nothing expires while snapshots fail. Rules share: one point can satisfy several. A point dated
    after ``now`` (a clock was wrong) and a held one stay and are counted by no rule.

    Args:
        points: in any order; of two at the same instant the one that comes first counts as newer.
        timezone: the zone whose calendar the period rules follow.
        now: the instant to decide for; only tells which points lie in the future.

    Returns:
        One verdict per point, newest first.
    """
    newest_first = sorted(points, key=lambda point: point.at, reverse=True)
    reasons: dict[int, list[str]] = defaultdict(list)
    candidates: list[int] = []
    for index, point in enumerate(newest_first):
        if point.at > now:
            reasons[index].append("dated in the future")
        elif point.held is not None:
            reasons[index].append(f"held: {point.held}")
        else:
            candidates.append(index)
    times = [newest_first[index].at for index in candidates]
    claims = list(_all_claims(rules, times, timezone))
    for claim in claims:
        for position, reason in claim.reasons:
            reasons[candidates[position]].append(reason)
    kept = frozenset(reasons)
    for position, index in enumerate(candidates):
        if index not in kept:
            reasons[index] = [claim.refuse(position) for claim in claims]
    return tuple(
        Verdict(point, keep=index in kept, reasons=tuple(reasons[index])) for index, point in enumerate(newest_first)
    )


@dataclass(frozen=True, slots=True)
class _Claim:
    """What one rule claims, as positions in the list with a reason each, and what it says of the others.

    ``used_up_at`` is the first position that the rule no longer looked at.
    """

    reasons: list[tuple[int, str]]
    used_up_at: int
    used_up: str
    passed_over: str = ""

    def refuse(self, position: int) -> str:
        return self.used_up if position >= self.used_up_at else self.passed_over


def _all_claims(rules: KeepRules, times: Sequence[datetime], timezone: tzinfo) -> Iterator[_Claim]:
    """Yield the claim of each rule that is given, over times sorted newest first."""
    if rules.last:
        count = min(rules.last, len(times))
        newest = [(position, f"last #{position + 1}") for position in range(count)]
        yield _Claim(newest, count, f"last={format_count(rules.last)} used up")
    local_times = [at.astimezone(timezone) for at in times]
    for rule, count in rules.counts():
        if count and rule in _PERIODS:
            yield _claim_periods(rule, count, local_times)
    if rules.within:
        length = format_duration(rules.within)
        young = next((p for p, at in enumerate(times) if at <= times[0] - rules.within), len(times))
        yield _Claim([(position, f"within {length}") for position in range(young)], young, f"not within {length}")


def _claim_periods(rule: str, count: int, local_times: Sequence[datetime]) -> _Claim:
    """Claim the newest time of each of ``count`` periods, and the oldest of all while claims are left."""
    period_of, claimed, newest_period = _PERIODS[rule], 0, None
    reasons: list[tuple[int, str]] = []
    used_up, passed_over = f"{rule}={format_count(count)} used up", f"not the newest of its {_PERIOD_WORDS[rule]}"
    for position, at in enumerate(local_times):
        if claimed == count:
            return _Claim(reasons, position, used_up, passed_over)
        period = period_of(at)
        if period != newest_period:
            claimed, newest_period = claimed + 1, period
            reasons.append((position, f"{rule} #{claimed}"))
        elif position == len(local_times) - 1:
            reasons.append((position, f"oldest {rule}"))
    return _Claim(reasons, len(local_times), used_up, passed_over)
