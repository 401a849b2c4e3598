"""``kvmsnapd simulate``: keep rules on given times, or the future of a policy. Touches neither libvirt nor a host."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from kvmsnapd.errors import InvalidValueError
from kvmsnapd.retention import Point, parse_keep, plan_retention

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from kvmsnapd.forecast import ForecastDay
    from kvmsnapd.retention import Verdict

_MOST_COLUMNS = 90


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
    if not 1 <= arguments.days <= 3660:  # noqa: PLR2004  # ten years
        msg = "--days must be from 1 to 3660"
        raise InvalidValueError(msg)
    days = list(forecast(policy, start=now, days=arguments.days))
    if arguments.json:
        print(
            json.dumps(
                [
                    {
                        "day": d.day.isoformat(),
                        "taken": d.taken,
                        "deleted": d.deleted,
                        "exist": [s.isoformat() for s in d.slots],
                    }
                    for d in days
                ],
                indent=1,
            )
        )
        return 0
    print(f"policy {policy.name}: {policy.schedule}, keep {policy.keep} ({policy.timezone})")
    print("What exists at the end of each day: one column per day of taking, oldest left.")
    print("\n".join(draw(days, policy.timezone)))
    return 0


def draw(days: Sequence[ForecastDay], zone: ZoneInfo) -> Iterator[str]:
    """Yield the picture's lines: per day its date, how many snapshots exist, and from which days they are.

    A cell is the number of snapshots that are left from a day, ``+`` from ten on, ``·`` when all of them are gone. Long
    futures put several days into one column.
    """
    per_column = -(-len(days) // _MOST_COLUMNS)
    first = days[0].day
    if per_column > 1:
        yield f"(a column is {per_column} days)"
    yield f"{'day':<12}{'taken':>6}{'deleted':>8}{'exist':>6}  "
    for offset, day in enumerate(days):
        cells = [0] * (offset // per_column + 1)
        for slot in day.slots:
            cells[(slot.astimezone(zone).date() - first) // timedelta(days=per_column)] += 1
        row = "".join("·" if n == 0 else "+" if n > 9 else str(n) for n in cells)  # noqa: PLR2004
        yield f"{day.day.isoformat():<12}{day.taken:>6}{day.deleted:>8}{len(day.slots):>6}  {row}"
