"""``kvmsnapd simulate``: keep rules on given times, or the future of a policy. Touches neither libvirt nor a host."""

from __future__ import annotations

import json
import re
import sys
from calendar import monthrange
from contextlib import nullcontext
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from kvmsnapd.durations import DURATION_PATTERN, parse_duration
from kvmsnapd.errors import InvalidValueError
from kvmsnapd.retention import Point, parse_keep, plan_retention

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from kvmsnapd.forecast import ForecastSpan
    from kvmsnapd.retention import Verdict

_MOST_COLUMNS = 90
_MOST_ROWS, _ROW_DAYS = 125, (1, 7, 30, 365)
"""How many rows are shown at the most, and the days that one may stand for."""
_MOST_DAYS = 36600
_MOST_SLOTS = 1_000_000


def simulate(arguments: argparse.Namespace) -> int:
    """Answer either form of the command."""
    zone = _zone(arguments.timezone or "UTC")
    now = _time(arguments.now, zone, "--now") if arguments.now else datetime.now(UTC)
    if arguments.policy:
        return _draw_future(arguments, now)
    rules = parse_keep(arguments.keep)
    source = "standard input" if arguments.file == "-" else arguments.file
    try:
        with nullcontext(sys.stdin) if arguments.file == "-" else Path(arguments.file).open(encoding="utf-8") as lines:
            points = list(_read_points(lines, zone, source))
    except OSError as error:
        msg = f"{source}: cannot be read: {error.strerror}"
        raise InvalidValueError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{source}: is not UTF-8 text"
        raise InvalidValueError(msg) from error
    verdicts = plan_retention(points, rules, timezone=zone, now=now)
    print(_as_json(verdicts) if arguments.json else _as_lines(verdicts))
    return 0


def _as_json(verdicts: Sequence[Verdict]) -> str:
    return json.dumps([{"time": v.point.name, "keep": v.keep, "reasons": v.reasons} for v in verdicts], indent=1)


def _as_lines(verdicts: Sequence[Verdict]) -> str:
    width = max((len(v.point.name) for v in verdicts), default=0)
    lines = [f"{'keep  ' if v.keep else 'delete'}  {v.point.name:{width}}  {', '.join(v.reasons)}" for v in verdicts]
    kept = sum(verdict.keep for verdict in verdicts)
    return "\n".join([*lines, f"{kept} kept, {len(verdicts) - kept} deleted"])


def _read_points(lines: Iterable[str], zone: ZoneInfo, source: str) -> Iterator[Point]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text:
            yield Point(text, _time(text, zone, f"{source}:{number}"))


def _time(text: str, zone: ZoneInfo, source: str) -> datetime:
    """Read an ISO 8601 time; one without an offset is meant in ``zone``."""
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        msg = f"{source}: {text!r} is no ISO 8601 time, such as 2026-03-29T02:30:00+01:00"
        raise InvalidValueError(msg) from error


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        msg = f"--timezone: {name!r} is no time zone this host knows"
        raise InvalidValueError(msg) from error


def _draw_future(arguments: argparse.Namespace, now: datetime) -> int:
    from kvmsnapd.config import load_config  # noqa: PLC0415  # a third of a second that --keep need not pay
    from kvmsnapd.forecast import forecast  # noqa: PLC0415

    config = load_config(arguments.config)
    policy = config.policies.get(arguments.policy)
    if policy is None:
        msg = f"no policy {arguments.policy!r} in {arguments.config}; it has {', '.join(config.policies) or 'none'}"
        raise InvalidValueError(msg)
    days = _days(arguments, now, policy.timezone)
    slots = timedelta(days=days) // policy.schedule.shortest_interval
    if slots > _MOST_SLOTS:
        msg = f"{days} days of {policy.schedule} may be {slots} snapshots; ask for a time with {_MOST_SLOTS} at most"
        raise InvalidValueError(msg)
    step = next((step for step in _ROW_DAYS if days <= step * _MOST_ROWS), _ROW_DAYS[-1])
    spans = list(forecast(policy, start=now, days=days, step=step))
    if arguments.json:
        print(json.dumps([_span_object(span) for span in spans], indent=1))
        return 0
    print(f"policy {policy.name}: {policy.schedule}, keep {policy.keep} ({policy.timezone})")
    row = "each day" if step == 1 else f"each {step} days"
    print(f"What exists at the end of {row}: one column per day of taking, oldest left.")
    print("\n".join(draw(spans, policy.timezone)))
    return 0


def _span_object(span: ForecastSpan) -> dict[str, Any]:
    return {
        "day": span.last.isoformat(),
        "days": (span.last - span.first).days + 1,
        "taken": span.taken,
        "deleted": span.deleted,
        "exist": [slot.isoformat() for slot in span.slots],
    }


def _days(arguments: argparse.Namespace, start: datetime, zone: ZoneInfo) -> int:
    """Return how many calendar days are asked for, that of ``start`` being the first."""
    if arguments.until is None:
        if not 1 <= arguments.days <= _MOST_DAYS:
            msg = f"--days must be from 1 to {_MOST_DAYS}"
            raise InvalidValueError(msg)
        return int(arguments.days)
    first = start.astimezone(zone).date()
    last = _last_day(arguments.until, start, zone)
    days = (last - first).days + 1
    if not 1 <= days <= _MOST_DAYS:
        msg = f"--until {arguments.until} is {last}, which must lie from {first} on and within {_MOST_DAYS} days"
        raise InvalidValueError(msg)
    return days


def _last_day(text: str, start: datetime, zone: ZoneInfo) -> date:
    """Return the day that ``--until`` means: that of a time, or the last of a length such as 6mo."""
    first = start.astimezone(zone).date()
    calendar = re.fullmatch(r"([1-9][0-9]{0,3}) *(mo|months?|y|years?)", text)
    try:
        if calendar:
            months = int(calendar[1]) * (12 if calendar[2].startswith("y") else 1)
            year, month = divmod(first.year * 12 + first.month - 1 + months, 12)
            last = min(first.day, monthrange(year, month + 1)[1])
            return date(year, month + 1, last) - timedelta(days=1)
        if re.fullmatch(DURATION_PATTERN, text):
            end = start + parse_duration(text) - timedelta(seconds=1)
            return end.astimezone(zone).date()
        return _time(text, zone, "--until").astimezone(zone).date()
    except InvalidValueError as error:
        msg = f"--until: {text!r} is neither a time, such as 2027-03-01, nor a length, such as 90d, 12w, 6mo or 10y"
        raise InvalidValueError(msg) from error
    except (OverflowError, ValueError) as error:
        msg = f"--until: {text!r} is too far"
        raise InvalidValueError(msg) from error


def draw(spans: Sequence[ForecastSpan], zone: ZoneInfo) -> Iterator[str]:
    """Yield the picture's lines: per span its last day, how many snapshots exist then, and from which days they are.

    A cell is the number of snapshots that are left from a day, ``+`` from ten on, ``·`` when all of them are gone. Long
    futures put several days into one column.
    """
    first = spans[0].first
    length = (spans[-1].last - first).days + 1
    per_column = -(-length // _MOST_COLUMNS)
    if per_column > 1:
        yield f"(a column is {per_column} days)"
    yield f"{'day':<12}{'taken':>6}{'deleted':>8}{'exist':>6}  "
    for span in spans:
        cells = [0] * ((span.last - first).days // per_column + 1)
        for slot in span.slots:
            cells[(slot.astimezone(zone).date() - first) // timedelta(days=per_column)] += 1
        row = "".join("·" if n == 0 else "+" if n > 9 else str(n) for n in cells)  # noqa: PLR2004
        yield f"{span.last.isoformat():<12}{span.taken:>6}{span.deleted:>8}{len(span.slots):>6}  {row}"
