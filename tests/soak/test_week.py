"""A week in minutes: fifty domains, five policies, clock changes and a leap day; nothing is lost, doubled or leaked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from statistics import median
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest

from kvmsnapd.demo import write_test_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DOMAINS = {"busy": 4, "hourly": 10, "berlin": 12, "sydney": 12, "newyork": 12}
CONFIG = """\
policies:
  busy: {schedule: every 15m, keep: {last: 2, within: 1h}, splay: 0s}
  hourly: {schedule: hourly, timezone: Australia/Sydney, keep: {last: 3, daily: 2}, splay: 2m}
  berlin: {schedule: "30 2 * * *", timezone: Europe/Berlin, keep: {daily: 3}}
  sydney: {schedule: "30 2 * * *", timezone: Australia/Sydney, keep: {last: 2}}
  newyork: {schedule: "0 */6 * * *", timezone: America/New_York, keep: {last: 1, weekly: 2}, splay: 5m}
defaults: {kind: internal}
domains: {busy-*: [busy], hourly-*: [hourly], berlin-*: [berlin], sydney-*: [sydney], newyork-*: [newyork]}
tick: 5m
log: {level: info, format: json}
"""
HOURS = float(os.environ.get("SOAK_HOURS", "168"))
"""Of the week; more by hand."""


def every(step: timedelta) -> Callable[[datetime, datetime], Iterator[datetime]]:
    """Return what yields each full multiple of a step, which divides a day."""

    def slots(start: datetime, end: datetime) -> Iterator[datetime]:
        at = datetime(start.year, start.month, start.day, tzinfo=UTC) - timedelta(days=1)
        while at <= end:
            yield at
            at += step

    return slots


def local(zone: str, *times: time, moved: dict[date, datetime] | None = None) -> Callable[..., Iterator[datetime]]:
    """Return what yields these times of each day in a zone; `moved` are those that a clock change leaves out."""

    def slots(start: datetime, end: datetime) -> Iterator[datetime]:
        day = start.date() - timedelta(days=2)
        while day <= end.date() + timedelta(days=2):
            for at in times:
                yield (moved or {}).get(day, datetime.combine(day, at, ZoneInfo(zone)).astimezone(UTC))
            day += timedelta(days=1)

    return slots


# Said again, by hand: on 26 March 2028 Berlin has no 02:30, the clock goes from 02:00 to 03:00 at 01:00 UTC. On 2 April
# Sydney has it twice.
SLOTS = {
    "busy": every(timedelta(minutes=15)),
    "hourly": every(timedelta(hours=1)),
    "berlin": local("Europe/Berlin", time(2, 30), moved={date(2028, 3, 26): datetime(2028, 3, 26, 1, tzinfo=UTC)}),
    "sydney": local("Australia/Sydney", time(2, 30)),
    "newyork": local("America/New_York", time(0), time(6), time(12), time(18)),
}


def newest_of(slots: list[datetime], zone: str, period: Callable[[datetime], object]) -> list[datetime]:
    """Return the newest slot of each period of a zone's calendar, oldest first."""
    return list({period(slot.astimezone(ZoneInfo(zone))): slot for slot in slots}.values())


# What `keep` leaves of slots, oldest first, after a week or more.
KEPT: dict[str, Callable[[list[datetime]], set[datetime]]] = {
    "busy": lambda slots: {slot for slot in slots if slot > slots[-1] - timedelta(hours=1)},
    "hourly": lambda slots: {*slots[-3:], *newest_of(slots, "Australia/Sydney", lambda at: at.date())[-2:]},
    "berlin": lambda slots: set(slots[-3:]),
    "sydney": lambda slots: set(slots[-2:]),
    "newyork": lambda slots: set(newest_of(slots, "America/New_York", lambda at: at.isocalendar()[:2])[-2:]),
}


@dataclass(frozen=True)
class Soak:
    """What a daemon has logged and taken in a span of virtual time, and the metrics at its end."""

    start: datetime
    end: datetime
    events: list[dict[str, object]]
    report: list[dict[str, float]]
    metrics: str

    def taken(self) -> Counter[tuple[str, datetime]]:
        """Return how often each slot of each domain was taken."""
        return Counter(
            (str(event["domain"]), datetime.fromisoformat(str(event["scheduled_at"])))
            for event in self.events
            if event["event"] == "run.finished" and event["result"] == "taken"
        )

    def left(self) -> dict[str, set[datetime]]:
        """Return the slots of each domain that were taken and not deleted."""
        slots: dict[str, set[datetime]] = {}
        for event in self.events:
            if event["event"] in {"snapshot.taken", "snapshot.deleted"}:
                written = str(event["snapshot"]).rpartition("-")[2]
                slot = datetime.strptime(written, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                change = set.add if event["event"] == "snapshot.taken" else set.remove
                change(slots.setdefault(str(event["domain"]), set()), slot)
        return slots

    def series(self, name: str) -> dict[str, float]:
        """Return a series' value for each domain, as last scraped."""
        return {
            domain: float(value)
            for domain, value in re.findall(
                rf'^kvmsnapd_{name}\{{domain="([^"]+)".*\}} (\S+)$', self.metrics, re.MULTILINE
            )
        }

    def expected(self) -> set[tuple[str, datetime]]:
        """Return the slots of the span, and for each domain the one before it, which is caught up."""
        found = set()
        for policy, count in DOMAINS.items():
            slots = sorted(set(SLOTS[policy](self.start, self.end)))
            before = max(slot for slot in slots if slot <= self.start)
            # A run that is due at the very end, or spread to after it, may or may not be seen.
            wanted = [before, *(slot for slot in slots if self.start < slot <= self.end - timedelta(minutes=10))]
            found |= {(f"{policy}-{number}", slot) for number in range(count) for slot in wanted}
        return found


def soak(directory: Path, start: str, hours: float) -> Soak:
    uri = write_test_host(directory, {f"{name}-{n}": True for name, count in DOMAINS.items() for n in range(count)})
    socket = directory / "metrics.sock"
    own = f"state_directory: {directory}/state\nruntime_directory: {directory}/run\nmetrics: {{listen: {socket}}}\n"
    config, log, report = directory / "kvmsnapd.yaml", directory / "log", directory / "report"
    config.write_text(CONFIG + own)
    command = [sys.executable, "-m", "tests.soak.daemon", start, str(hours), str(report), str(socket)]
    with log.open("wb") as output:
        done = subprocess.run(
            [*command, "run", "--config", str(config), "--connect", uri], stderr=output, timeout=1100, check=False
        )
    assert done.returncode == 0, log.read_text()[-5000:]
    begun = datetime.fromisoformat(start)
    return Soak(
        begun,
        begun + timedelta(hours=hours),
        [json.loads(line) for line in log.read_text().splitlines()],
        [json.loads(line) for line in report.read_text().splitlines()],
        (directory / "report.metrics").read_text().replace("\r\n", "\n"),
    )


def assert_all_went_well(found: Soak) -> None:
    unexpected = [event for event in found.events if event["level"] not in {"info", "debug"}]
    assert unexpected == []
    taken, expected = found.taken(), found.expected()
    assert expected - taken.keys() == set()  # none is lost
    assert {slot: count for slot, count in taken.items() if count > 1} == {}  # none is doubled
    last = found.end - timedelta(minutes=10)
    assert {(domain, slot) for domain, slot in taken.keys() - expected if slot <= last} == set()
    print(f"{len(taken)} runs of {sum(DOMAINS.values())} domains, none lost, none doubled")


def assert_the_right_ones_are_left(found: Soak) -> None:
    by_domain: dict[str, list[datetime]] = {}
    for domain, slot in sorted(found.taken()):
        by_domain.setdefault(domain, []).append(slot)
    wanted = {domain: KEPT[domain.partition("-")[0]](slots) for domain, slots in by_domain.items()}
    assert found.left() == wanted
    # The log says what the daemon did, the metrics what it then read from libvirt.
    assert found.series("snapshots") == {domain: len(slots) for domain, slots in wanted.items()}
    assert found.series("oldest_snapshot_timestamp_seconds") == {
        domain: min(slots).timestamp() for domain, slots in wanted.items()
    }


def test_a_week_with_two_clock_changes(tmp_path: Path) -> None:
    found = soak(tmp_path, "2028-03-25T23:50:00+00:00", HOURS)
    assert_all_went_well(found)
    assert_the_right_ones_are_left(found)
    days = [sample for sample in found.report if sample["hours"] >= 24]  # the first day fills what is kept
    first, last = days[: len(days) // 3], days[-len(days) // 3 :]
    print("resident MiB by day:", *(f"{sample['resident_mib']:.1f}" for sample in found.report[::4]))
    # One more descriptor or thread may be there just then; a leak would be one a day at least.
    for what, most in (("resident_mib", 4), ("threads", 1), ("descriptors", 1), ("scrape", 2000)):
        before, after = (median(sample[what] for sample in part) for part in (first, last))
        print(f"{what}: {before:.1f} on the second and third day, {after:.1f} on the last two")
        assert after <= before + most, found.report


def test_a_leap_day(tmp_path: Path) -> None:
    found = soak(tmp_path, "2028-02-28T11:50:00+00:00", 48)
    assert_all_went_well(found)
    of_the_day = [slot for _, slot in found.taken() if slot.date() == date(2028, 2, 29)]
    assert len(of_the_day) == 4 * 96 + 10 * 24 + 12 + 12 + 12 * 4
