"""Schedules: which texts mean what, which slots they have, and the year 2026 with its clock changes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest

from kvmsnapd.errors import InvalidValueError
from kvmsnapd.schedule import Due, Schedule, decide_due, parse_schedule, stable_splay
from tests.builders import BERLIN, OTHER_UUID, UUID, at

UTC_ZONE = ZoneInfo("UTC")
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
JUST_BEFORE = timedelta(microseconds=1)


def slots(text: str, start: str, count: int, zone: ZoneInfo = UTC_ZONE) -> list[str]:
    """Return the first slots after ``start`` without their offset, in UTC."""
    found = islice(parse_schedule(text, zone).slots_after(at(start)), count)
    return [slot.isoformat(timespec="minutes").removesuffix("+00:00") for slot in found]


@pytest.mark.parametrize(
    ("alias", "first_two"),
    [
        ("hourly", ["2026-11-22T13:00", "2026-11-22T14:00"]),
        ("daily", ["2026-11-23T00:00", "2026-11-24T00:00"]),
        ("weekly", ["2026-11-23T00:00", "2026-11-30T00:00"]),  # Mondays
        ("monthly", ["2026-12-01T00:00", "2027-01-01T00:00"]),
        ("yearly", ["2027-01-01T00:00", "2028-01-01T00:00"]),
    ],
)
def test_an_alias_names_the_beginning_of_its_period(alias: str, first_two: list[str]) -> None:
    assert slots(alias, "2026-11-22T12:30", 2) == first_two


def test_an_alias_may_have_the_at_sign_that_cron_gives_it() -> None:
    assert slots("@daily", "2026-11-22T12:30", 1) == ["2026-11-23T00:00"]


def test_a_schedule_shows_what_the_user_wrote() -> None:
    assert str(parse_schedule("  0   4 * *  mon ", UTC_ZONE)) == "0 4 * * mon"


def test_every_counts_from_the_epoch_and_not_from_the_start_of_the_daemon() -> None:
    assert slots("every 15m", "2026-11-22T12:07", 3) == ["2026-11-22T12:15", "2026-11-22T12:30", "2026-11-22T12:45"]


def test_every_seven_hours_is_anchored_at_the_epoch() -> None:
    slot = parse_schedule("every 7h", UTC_ZONE).next_slot(at("2026-11-22T12:00"))
    assert (slot - at("1970-01-01")) % timedelta(hours=7) == timedelta(0)


def test_every_ignores_clock_changes() -> None:
    assert slots("every 1h", "2026-03-29T00:30", 2, BERLIN) == ["2026-03-29T01:00", "2026-03-29T02:00"]


def test_slots_are_strictly_after_the_start() -> None:
    assert slots("hourly", "2026-11-22T12:00", 1) == ["2026-11-22T13:00"]
    assert slots("every 1h", "2026-11-22T12:00", 1) == ["2026-11-22T13:00"]


def test_the_latest_slot_may_be_this_very_instant() -> None:
    assert parse_schedule("hourly", UTC_ZONE).latest_slot(at("2026-11-22T12:00")) == at("2026-11-22T12:00")


def test_the_latest_slot_of_a_rare_schedule_is_found_years_back() -> None:
    rare = parse_schedule("0 0 29 2 *", UTC_ZONE)
    assert rare.latest_slot(at("2026-11-22T12:00")) == at("2024-02-29T00:00")


def test_slots_are_in_utc_whatever_the_zone() -> None:
    assert slots("daily", "2026-11-22T12:00", 1, BERLIN) == ["2026-11-22T23:00"]


@pytest.mark.parametrize("sunday", ["0", "7", "sun", "SUN"])
def test_sunday_is_zero_and_seven(sunday: str) -> None:
    assert slots(f"0 12 * * {sunday}", "2026-11-22T12:30", 2) == ["2026-11-29T12:00", "2026-12-06T12:00"]


def test_day_of_month_or_day_of_week_suffices() -> None:
    """The 25th is a Wednesday; Fridays are the 27th and 4 December."""
    assert slots("0 12 25 * 5", "2026-11-22T12:30", 3) == ["2026-11-25T12:00", "2026-11-27T12:00", "2026-12-04T12:00"]


def test_months_and_days_have_names() -> None:
    assert slots("0 12 * jan mon", "2026-11-22T12:30", 2) == ["2027-01-04T12:00", "2027-01-11T12:00"]


def test_lists_ranges_and_steps_combine() -> None:
    assert slots("0,30 8-16/4 * * *", "2026-11-22T08:00", 4) == [
        "2026-11-22T08:30",
        "2026-11-22T12:00",
        "2026-11-22T12:30",
        "2026-11-22T16:00",
    ]


def test_the_last_day_of_a_month_is_l() -> None:
    assert slots("0 0 L * *", "2026-11-22T12:30", 2) == ["2026-11-30T00:00", "2026-12-31T00:00"]


FORMS = (
    "is none of hourly, daily, weekly, monthly, yearly, 'every 15m', or five cron fields "
    "(minute hour day month weekday) such as '7 * * * *'"
)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0 0 * * * *", f"schedule '0 0 * * * *' {FORMS}"),
        ("", f"schedule '' {FORMS}"),
        ("every", f"schedule 'every' {FORMS}"),
        ("at noon", f"schedule 'at noon' {FORMS}"),
        ("Hourly", f"schedule 'Hourly' {FORMS}"),
        ("@reboot", f"schedule '@reboot' {FORMS}"),
        ("*/90 * * * *", "schedule '*/90 * * * *': step /90 is larger than the field's range of 60"),
        ("0 */25 * * *", "schedule '0 */25 * * *': step /25 is larger than the field's range of 24"),
        ("0 0 1,*/32 * *", "schedule '0 0 1,*/32 * *': step /32 is larger than the field's range of 31"),
        ("0 0 30 2 *", "schedule '0 0 30 2 *' is no cron expression that ever fires: Bad day-of-month"),
        ("0 0 31 4,6 *", "schedule '0 0 31 4,6 *' is no cron expression that ever fires: Bad day-of-month"),
        ("*/0 * * * *", "schedule '*/0 * * * *' is no cron expression that ever fires: Bad minute"),
        ("60 * * * *", "schedule '60 * * * *' is no cron expression that ever fires: Bad minute"),
        ("0 24 * * *", "schedule '0 24 * * *' is no cron expression that ever fires: Bad hour"),
        ("0 0 * * 8", "schedule '0 0 * * 8' is no cron expression that ever fires: Bad day-of-week"),
        ("0 0 * foo *", "schedule '0 0 * foo *' is no cron expression that ever fires: Bad month"),
        ("a b c d e", "schedule 'a b c d e' is no cron expression that ever fires: Bad minute"),
        ("every 0s", "schedule 'every 0s': the interval must be at least one second"),
        (
            "every hour",
            "'hour' is not a duration: write a number with a unit, such as 90s, 15m, 36h, 7d or 1h30m",
        ),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidValueError) as refusal:
        parse_schedule(text, UTC_ZONE)
    assert str(refusal.value) == complaint


@pytest.mark.parametrize("step", ["²", "9" * 5000], ids=["superscript", "5000 digits"])
def test_a_step_that_only_looks_like_a_number_is_refused_like_any_other(step: str) -> None:
    with pytest.raises(InvalidValueError):
        parse_schedule(f"*/{step} * * * *", UTC_ZONE)


# The year 2026. Each zone with its two changes, as the instant in UTC at which the offset becomes another.


@dataclass(frozen=True)
class Zone:
    name: str
    forward: str
    back: str

    @property
    def info(self) -> ZoneInfo:
        return ZoneInfo(self.name)


ZONES = {
    # 02:00 becomes 03:00 on 29 March; 03:00 becomes 02:00 on 25 October.
    "berlin": Zone("Europe/Berlin", "2026-03-29T01:00", "2026-10-25T01:00"),
    # 02:00 becomes 03:00 on 8 March; 02:00 becomes 01:00 on 1 November.
    "new_york": Zone("America/New_York", "2026-03-08T07:00", "2026-11-01T06:00"),
    # 02:00 becomes 02:30 on 4 October; 02:00 becomes 01:30 on 5 April. Half an hour, and summer over New Year.
    "lord_howe": Zone("Australia/Lord_Howe", "2026-10-03T15:30", "2026-04-04T15:00"),
}


def slots_of_2026(schedule: Schedule) -> list[datetime]:
    first = datetime(2026, 1, 1, tzinfo=schedule.timezone)
    end = datetime(2027, 1, 1, tzinfo=schedule.timezone)
    return list(takewhile(lambda slot: slot < end, schedule.slots_after(first - JUST_BEFORE)))


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES)
@pytest.mark.parametrize("change", ["forward", "back"])
def test_the_clock_changes_where_these_tests_say(zone: Zone, change: str) -> None:
    instant = at(getattr(zone, change))
    shift = timedelta(minutes=30) if zone.name == "Australia/Lord_Howe" else HOUR
    before, after = ((instant - JUST_BEFORE).astimezone(zone.info).utcoffset(), instant.astimezone(zone.info))
    assert before is not None
    assert after.utcoffset() == before + (shift if change == "forward" else -shift)


@pytest.mark.parametrize(
    ("zone", "count"),
    [
        # As many hours as the year has: the one that is skipped in spring comes twice in autumn.
        ("berlin", 365 * 24),
        ("new_york", 365 * 24),
        # 02:00 is skipped on 4 October, and on 5 April only 01:30 to 01:59 are repeated, without a full hour in them.
        ("lord_howe", 365 * 24 - 1),
    ],
)
def test_hourly_has_its_exact_number_of_slots_in_2026(zone: str, count: int) -> None:
    schedule = parse_schedule("hourly", ZONES[zone].info)
    assert len(slots_of_2026(schedule)) == count


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES)
@pytest.mark.parametrize("text", ["30 2 * * *", "0 0 * * *"])
def test_a_fixed_daily_time_comes_exactly_once_on_every_day_of_2026(zone: Zone, text: str) -> None:
    days = [slot.astimezone(zone.info).date() for slot in slots_of_2026(parse_schedule(text, zone.info))]
    assert days == [date(2026, 1, 1) + n * DAY for n in range(365)]


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES)
@pytest.mark.parametrize(("text", "wall"), [("30 2 * * *", "02:30"), ("0 0 * * *", "00:00")])
def test_a_fixed_daily_time_keeps_its_wall_clock_time_except_in_the_gap(zone: Zone, text: str, wall: str) -> None:
    times = [slot.astimezone(zone.info) for slot in slots_of_2026(parse_schedule(text, zone.info))]
    moved = [f"{time:%m-%d %H:%M}" for time in times if f"{time:%H:%M}" != wall]
    # 02:30 does not exist in Berlin on 29 March and in New York on 8 March: it fires when the clock jumps, at 03:00.
    expected = {"Europe/Berlin": ["03-29 03:00"], "America/New_York": ["03-08 03:00"], "Australia/Lord_Howe": []}
    assert moved == (expected[zone.name] if wall == "02:30" else [])


AROUND_CHANGES = [
    # Berlin, spring: 01:00, 03:00, 04:00 on the wall; the hours go on without a gap.
    ("berlin", "forward", "hourly", ["03-29T00:00", "03-29T01:00", "03-29T02:00"]),
    # Autumn: 02:00 in summer time, 02:00 in winter time, 03:00.
    ("berlin", "back", "hourly", ["10-25T00:00", "10-25T01:00", "10-25T02:00"]),
    ("berlin", "forward", "30 2 * * *", ["03-28T01:30", "03-29T01:00", "03-30T00:30"]),
    # The first of the two 02:30.
    ("berlin", "back", "30 2 * * *", ["10-24T00:30", "10-25T00:30", "10-26T01:30"]),
    ("berlin", "forward", "0 0 * * *", ["03-27T23:00", "03-28T23:00", "03-29T22:00"]),
    ("berlin", "back", "0 0 * * *", ["10-23T22:00", "10-24T22:00", "10-25T23:00"]),
    ("new_york", "forward", "hourly", ["03-08T06:00", "03-08T07:00", "03-08T08:00"]),
    ("new_york", "back", "hourly", ["11-01T05:00", "11-01T06:00", "11-01T07:00"]),
    ("new_york", "forward", "30 2 * * *", ["03-07T07:30", "03-08T07:00", "03-09T06:30"]),
    # Repeated is 01:00 to 01:59; 02:30 is there once.
    ("new_york", "back", "30 2 * * *", ["10-31T06:30", "11-01T07:30", "11-02T07:30"]),
    ("new_york", "forward", "0 0 * * *", ["03-07T05:00", "03-08T05:00", "03-09T04:00"]),
    ("new_york", "back", "0 0 * * *", ["10-31T04:00", "11-01T04:00", "11-02T05:00"]),
    # 01:00, then 03:00: the wall clock never shows 02:00 on that day.
    ("lord_howe", "forward", "hourly", ["10-03T14:30", "10-03T16:00", "10-03T17:00"]),
    # 01:00, then an hour and a half to 02:00.
    ("lord_howe", "back", "hourly", ["04-04T14:00", "04-04T15:30", "04-04T16:30"]),
    # 02:30 is the first minute after the jump.
    ("lord_howe", "forward", "30 2 * * *", ["10-02T16:00", "10-03T15:30", "10-04T15:30"]),
    ("lord_howe", "back", "30 2 * * *", ["04-03T15:30", "04-04T16:00", "04-05T16:00"]),
    ("lord_howe", "forward", "0 0 * * *", ["10-02T13:30", "10-03T13:30", "10-04T13:00"]),
    ("lord_howe", "back", "0 0 * * *", ["04-03T13:00", "04-04T13:00", "04-05T13:30"]),
]


@pytest.mark.parametrize(("zone", "change", "text", "expected"), AROUND_CHANGES)
def test_the_slots_around_a_clock_change_are_exactly_these(
    zone: str, change: str, text: str, expected: list[str]
) -> None:
    expected = [f"2026-{slot}" for slot in expected]
    start = at(expected[0]) - JUST_BEFORE
    assert at(expected[0]) <= at(getattr(ZONES[zone], change)) <= at(expected[2])
    assert slots(text, start.isoformat(), 3, ZONES[zone].info) == expected


@pytest.mark.parametrize("zone", ZONES.values(), ids=ZONES)
@pytest.mark.parametrize("text", ["hourly", "30 2 * * *", "0 0 * * *", "15,45 1,2,3 * * *"])
def test_slots_begun_in_a_clock_change_are_those_of_the_whole_year(zone: Zone, text: str) -> None:
    schedule = parse_schedule(text, zone.info)
    year = slots_of_2026(schedule)
    for change in (at(zone.forward), at(zone.back)):
        for minutes in range(-150, 151, 10):
            start = change + timedelta(minutes=minutes)
            assert schedule.next_slot(start) == next(slot for slot in year if slot > start)


@pytest.mark.parametrize(
    ("zone", "text", "shortest", "longest"),
    [
        ("berlin", "hourly", HOUR, HOUR),
        ("new_york", "hourly", HOUR, HOUR),
        # 01:00 to 02:00 with half an hour repeated, and 01:00 to 03:00 with half an hour left out.
        ("lord_howe", "hourly", HOUR, 1.5 * HOUR),
        # From 02:30 to the jump, and from the jump to 02:30, are 23.5 hours each; in autumn there are 25.
        ("berlin", "30 2 * * *", 23.5 * HOUR, 25 * HOUR),
        ("new_york", "30 2 * * *", 23.5 * HOUR, 25 * HOUR),
        ("lord_howe", "30 2 * * *", 23.5 * HOUR, 24.5 * HOUR),
        ("berlin", "0 0 * * *", 23 * HOUR, 25 * HOUR),
        ("new_york", "0 0 * * *", 23 * HOUR, 25 * HOUR),
        ("lord_howe", "0 0 * * *", 23.5 * HOUR, 24.5 * HOUR),
    ],
)
def test_the_intervals_of_a_schedule_count_the_clock_changes(
    zone: str, text: str, shortest: timedelta, longest: timedelta
) -> None:
    schedule = parse_schedule(text, ZONES[zone].info)
    year = slots_of_2026(schedule)
    assert {later - earlier for earlier, later in pairwise(year)} >= {shortest, longest}
    assert (schedule.shortest_interval, schedule.longest_interval) == (shortest, longest)


def test_the_longest_interval_of_working_hours_is_the_weekend() -> None:
    """Friday 17:00 to Monday 09:00."""
    assert parse_schedule("0 9-17 * * 1-5", UTC_ZONE).longest_interval == timedelta(hours=64)


def test_the_longest_interval_of_a_month_is_31_days() -> None:
    assert parse_schedule("monthly", UTC_ZONE).longest_interval == 31 * DAY


def test_the_longest_interval_of_every_is_itself() -> None:
    assert parse_schedule("every 15m", BERLIN).longest_interval == timedelta(minutes=15)


def test_the_longest_interval_of_a_dense_schedule_counts_the_months_it_leaves_out() -> None:
    """30 June 23:55 to 1 January 00:00."""
    assert parse_schedule("*/5 * * 1-6 *", UTC_ZONE).longest_interval == 184 * DAY + timedelta(minutes=5)


def test_the_longest_interval_of_a_dense_schedule_counts_the_days_it_leaves_out() -> None:
    """20th 23:59 to the first 00:00, in a month of 31 days."""
    assert parse_schedule("* * 1-20 * *", UTC_ZONE).longest_interval == 11 * DAY + timedelta(minutes=1)


def test_the_longest_interval_of_a_dense_schedule_counts_the_clock_change_late_in_the_year() -> None:
    """17:55 to 08:00, and an hour more in the night in which summer time ends."""
    assert parse_schedule("*/5 8-17 1-31 * *", BERLIN).longest_interval == timedelta(hours=15, minutes=5)


# What is due


def due(
    text: str, done: list[str], now: str, *, splay: timedelta = timedelta(0), catch_up: bool = True, zone: str = "UTC"
) -> Due:
    schedule = parse_schedule(text, ZoneInfo(zone))
    return decide_due(schedule, [at(slot) for slot in done], now=at(now), splay=splay, catch_up=catch_up)


def test_a_done_slot_is_not_due_again() -> None:
    assert due("hourly", ["2026-11-22T12:00"], "2026-11-22T12:30") == Due(None, at("2026-11-22T13:00"))


def test_the_latest_slot_is_due_until_it_is_done() -> None:
    assert due("hourly", ["2026-11-22T11:00"], "2026-11-22T12:30") == Due(
        at("2026-11-22T12:00"), at("2026-11-22T12:00")
    )


def test_without_any_snapshot_the_latest_slot_is_due() -> None:
    assert due("daily", [], "2026-11-22T12:30").slot == at("2026-11-22T00:00")


def test_many_missed_slots_are_caught_up_by_the_latest_one() -> None:
    assert due("hourly", ["2026-11-01T00:00"], "2026-11-22T12:30").slot == at("2026-11-22T12:00")


def test_a_slot_from_the_future_is_not_done() -> None:
    assert due("hourly", ["2031-01-01T00:00"], "2026-11-22T12:30").slot == at("2026-11-22T12:00")


def test_a_slot_is_due_only_after_its_splay() -> None:
    splay = timedelta(minutes=5)
    assert due("hourly", ["2026-11-22T11:00"], "2026-11-22T12:04", splay=splay) == Due(None, at("2026-11-22T12:05"))
    assert due("hourly", ["2026-11-22T11:00"], "2026-11-22T12:05", splay=splay) == Due(
        at("2026-11-22T12:00"), at("2026-11-22T12:05")
    )


def test_skip_takes_a_slot_that_is_late_by_no_more_than_a_tenth() -> None:
    assert due("hourly", [], "2026-11-22T12:06", catch_up=False).slot == at("2026-11-22T12:00")


def test_skip_gives_up_a_slot_that_is_later_and_waits_for_the_next() -> None:
    assert due("hourly", [], "2026-11-22T12:06:01", catch_up=False) == Due(
        None, at("2026-11-22T13:00"), missed=at("2026-11-22T12:00")
    )


def test_skip_grants_a_minute_at_least() -> None:
    assert due("every 5m", [], "2026-11-22T12:01", catch_up=False).slot == at("2026-11-22T12:00")


def test_skip_counts_lateness_from_the_splayed_time() -> None:
    late = due("hourly", [], "2026-11-22T12:10", splay=timedelta(minutes=5), catch_up=False)
    assert late.slot == at("2026-11-22T12:00")


def test_once_takes_a_slot_however_late() -> None:
    assert due("yearly", [], "2026-11-22T12:30").slot == at("2026-01-01T00:00")


def test_both_passes_of_the_repeated_hour_are_slots_of_their_own() -> None:
    assert due("hourly", ["2026-10-25T00:00"], "2026-10-25T01:01", zone="Europe/Berlin").slot == at("2026-10-25T01:00")


# Splay


def test_splay_depends_on_domain_and_policy_alone() -> None:
    limit = timedelta(minutes=5)
    assert stable_splay(UUID, "standard", limit) == stable_splay(UUID, "standard", limit)
    assert len({stable_splay(uuid, policy, limit) for uuid in (UUID, OTHER_UUID) for policy in ("a", "b")}) == 4


def test_splay_is_pinned_so_that_an_upgrade_moves_no_run() -> None:
    assert stable_splay(UUID, "standard", timedelta(minutes=5)) == timedelta(seconds=236)


def test_a_splay_limit_below_a_second_is_none() -> None:
    assert stable_splay(UUID, "standard", timedelta(milliseconds=999)) == timedelta(0)


def test_splay_spreads_many_domains_over_the_whole_limit() -> None:
    splays = {stable_splay(f"domain {n}", "standard", timedelta(minutes=1)).seconds for n in range(1000)}
    assert splays == set(range(60))


def test_slots_carry_utc() -> None:
    assert parse_schedule("daily", BERLIN).next_slot(at("2026-11-22T12:00")).tzinfo is UTC
