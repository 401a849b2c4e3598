"""Schedules: due slots follow from what exists, whatever happened before."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from kvmsnapd.durations import format_duration, parse_duration
from kvmsnapd.schedule import Schedule, decide_due, parse_schedule, stable_splay

ZONES = [ZoneInfo(n) for n in ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago")]
TEXTS = [
    "hourly", "daily", "weekly", "monthly", "every 15m", "every 7h", "every 1s", "7 * * * *", "*/5 * * * *",
    "30 2 * * *", "0 0 * * *", "15 1,2,3 * * *", "0 9-17 * * 1-5", "0 4 1 * 1", "59 23 L * *", "0 12 * * mon#2",
]  # fmt: skip

schedules = st.builds(parse_schedule, st.sampled_from(TEXTS), st.sampled_from(ZONES))
# Half of the instants fall near the clock changes of 2026 in the zones above.
changes = [
    datetime.fromisoformat(text)
    for text in (
        "2026-03-08T07",
        "2026-03-29T01",
        "2026-04-04T15",
        "2026-04-05T03",
        "2026-09-06T04",
        "2026-10-03T15",
        "2026-10-25T01",
        "2026-11-01T06",
    )
]
instants = st.one_of(
    st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1)),
    st.builds(lambda at, s: at + timedelta(seconds=s), st.sampled_from(changes), st.integers(-30000, 30000)),
).map(lambda at: at.replace(tzinfo=UTC))
splays = st.integers(0, 300).map(lambda s: timedelta(seconds=s))


@given(schedules, instants)
def test_latest_and_next_slot_enclose_every_instant(schedule: Schedule, at: datetime) -> None:
    latest, following = schedule.latest_slot(at), schedule.next_slot(at)
    assert latest <= at < following
    assert schedule.next_slot(latest) == following
    assert schedule.latest_slot(following - timedelta(microseconds=1)) == latest


@given(schedules, instants, instants)
def test_slots_do_not_depend_on_where_one_starts_to_count(schedule: Schedule, a: datetime, b: datetime) -> None:
    early, late = min(a, b), min(max(a, b), min(a, b) + timedelta(days=2))
    from_early = takewhile(lambda slot: slot <= late + timedelta(days=1), schedule.slots_after(early))
    from_late = takewhile(lambda slot: slot <= late + timedelta(days=1), schedule.slots_after(late))
    if schedule.every != timedelta(seconds=1):
        assert [slot for slot in from_early if slot > late] == list(from_late)


@given(schedules, instants)
def test_no_interval_is_longer_or_shorter_than_the_schedule_says(schedule: Schedule, at: datetime) -> None:
    slots = [slot for slot, _ in zip(schedule.slots_after(at), range(50), strict=False)]
    assert all(later - earlier <= schedule.longest_interval for earlier, later in pairwise(slots))
    assert slots == sorted(set(slots))


@given(schedules, instants, splays)
def test_without_any_snapshot_the_latest_slot_is_due_at_once(
    schedule: Schedule, now: datetime, splay: timedelta
) -> None:
    due = decide_due(schedule, [], now=now, splay=splay, catch_up=True)
    assert due.slot == schedule.latest_slot(now - splay)
    assert due.run_at <= now


@given(schedules, instants, splays, st.integers(0, 40))
def test_many_missed_slots_are_caught_up_by_one(
    schedule: Schedule, now: datetime, splay: timedelta, missed: int
) -> None:
    newest = schedule.latest_slot(now - splay)
    for _ in range(missed):
        newest = schedule.latest_slot(newest - timedelta(seconds=1))
    due = decide_due(schedule, [newest], now=now, splay=splay, catch_up=True)
    assert (due.slot is not None) == (missed > 0)
    after = decide_due(schedule, [newest, schedule.latest_slot(now - splay)], now=now, splay=splay, catch_up=True)
    assert after.slot is None
    assert after.run_at > now


@given(schedules, instants, splays, st.integers(1, 10**8))
def test_a_snapshot_from_the_future_keeps_nothing_from_being_due(
    schedule: Schedule, now: datetime, splay: timedelta, seconds: int
) -> None:
    future = now + timedelta(seconds=seconds)
    with_it = decide_due(schedule, [future], now=now, splay=splay, catch_up=True)
    assert with_it == decide_due(schedule, [], now=now, splay=splay, catch_up=True)


@given(schedules, instants, splays)
def test_a_slot_is_either_taken_or_given_up_never_both(schedule: Schedule, now: datetime, splay: timedelta) -> None:
    due = decide_due(schedule, [], now=now, splay=splay, catch_up=False)
    assert (due.slot is None) != (due.missed is None)
    if due.missed:
        assert due.run_at > now


@given(st.uuids(), st.text(), st.integers(0, 5000))
def test_splay_is_stable_and_below_its_limit(uuid: object, policy: str, seconds: int) -> None:
    limit = timedelta(seconds=seconds)
    splay = stable_splay(str(uuid), policy, limit)
    assert splay == stable_splay(str(uuid), policy, limit)
    assert timedelta(0) <= splay < max(limit, timedelta(seconds=1))


@given(st.integers(0, 3 * 10**9))
def test_durations_read_back_as_they_are_written(seconds: int) -> None:
    assert parse_duration(format_duration(timedelta(seconds=seconds))) == timedelta(seconds=seconds)
