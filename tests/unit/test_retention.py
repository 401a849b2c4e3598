"""Retention in worked examples: plain times in, what stays and why out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from kvmsnapd.errors import InvalidValueError
from kvmsnapd.retention import ALL, KeepRules, Point, Verdict, parse_keep, plan_retention
from tests.builders import BERLIN, NOW, at, kept, point

UTC_ZONE = ZoneInfo("UTC")


def judge(
    times: list[str], keep: str, *, zone: ZoneInfo = UTC_ZONE, now: datetime = NOW, held: dict[str, str] | None = None
) -> tuple[Verdict, ...]:
    points = [point(text, held=(held or {}).get(text)) for text in times]
    return plan_retention(points, parse_keep(keep), timezone=zone, now=now)


def reasons(verdicts: tuple[Verdict, ...]) -> dict[str, list[str]]:
    return {verdict.point.name: list(verdict.reasons) for verdict in verdicts}


def test_a_worked_week() -> None:
    """Three snapshots a day from Monday 16 to Sunday 22 November; last: 2, daily: 3, weekly: 2."""
    week = [f"2026-11-{day}T{hour}:00" for day in range(16, 23) for hour in ("00", "06", "12")]
    assert reasons(judge(week, "last=2 daily=3 weekly=2")) == {
        "2026-11-22T12:00": ["last #1", "daily #1", "weekly #1"],
        "2026-11-22T06:00": ["last #2"],
        "2026-11-22T00:00": ["last=2 used up", "not the newest of its day", "not the newest of its week"],
        "2026-11-21T12:00": ["daily #2"],
        "2026-11-21T06:00": ["last=2 used up", "not the newest of its day", "not the newest of its week"],
        "2026-11-21T00:00": ["last=2 used up", "not the newest of its day", "not the newest of its week"],
        "2026-11-20T12:00": ["daily #3"],
        **{
            text: ["last=2 used up", "daily=3 used up", "not the newest of its week"]
            for text in sorted(week)[1:14]
            if text < "2026-11-20T12:00"
        },
        # One weekly claim is left and there is no other week, so it goes to the oldest.
        "2026-11-16T00:00": ["oldest weekly"],
    }


def test_verdicts_come_newest_first_whatever_the_order_given() -> None:
    verdicts = judge(["2026-11-20T00:00", "2026-11-22T00:00", "2026-11-21T00:00"], "last=1")
    assert [v.point.name for v in verdicts] == ["2026-11-22T00:00", "2026-11-21T00:00", "2026-11-20T00:00"]


def test_no_points_give_no_verdicts() -> None:
    assert judge([], "last=1") == ()


def test_one_iso_week_reaches_over_new_year() -> None:
    """29 December 2025 to 4 January 2026 are all of week 2026-W01."""
    times = ["2025-12-28T12:00", "2025-12-29T12:00", "2025-12-31T12:00", "2026-01-01T12:00", "2026-01-05T12:00"]
    assert kept(judge(times, "weekly=3")) == ["2026-01-05T12:00", "2026-01-01T12:00", "2025-12-28T12:00"]


def test_week_53_is_a_week_of_its_own() -> None:
    """2026 has 53 ISO weeks; the last one ends on 3 January 2027."""
    times = ["2026-12-27T12:00", "2027-01-02T12:00", "2027-01-03T12:00", "2027-01-04T12:00"]
    verdicts = judge(times, "weekly=3", now=at("2027-01-10T00:00"))
    assert kept(verdicts) == ["2027-01-04T12:00", "2027-01-03T12:00", "2026-12-27T12:00"]


def test_the_repeated_hour_of_a_clock_change_is_two_hours() -> None:
    """On 25 October 2026 two o'clock comes twice in Berlin: at 00:00 and at 01:00 UTC."""
    times = ["2026-10-25T00:05", "2026-10-25T00:55", "2026-10-25T01:05", "2026-10-25T01:55"]
    verdicts = judge(times, "hourly=2", zone=BERLIN)
    assert reasons(verdicts) == {
        "2026-10-25T01:55": ["hourly #1"],
        "2026-10-25T01:05": ["not the newest of its hour"],
        "2026-10-25T00:55": ["hourly #2"],
        "2026-10-25T00:05": ["hourly=2 used up"],
    }


def test_days_are_those_of_the_time_zone() -> None:
    """23:30 UTC on the 20th is 00:30 on the 21st in Berlin."""
    times = ["2026-11-20T22:30", "2026-11-20T23:30", "2026-11-21T10:00"]
    assert kept(judge(times, "daily=2", zone=BERLIN)) == ["2026-11-21T10:00", "2026-11-20T22:30"]
    assert kept(judge(times, "daily=2")) == ["2026-11-21T10:00", "2026-11-20T23:30"]


def test_days_without_a_snapshot_are_not_counted() -> None:
    times = ["2026-08-01T12:00", "2026-09-15T12:00", "2026-11-22T12:00"]
    assert kept(judge(times, "daily=2")) == ["2026-11-22T12:00", "2026-09-15T12:00"]


def test_a_rule_with_claims_left_also_claims_the_oldest() -> None:
    times = ["2026-11-22T06:00", "2026-11-22T07:00", "2026-11-22T08:00"]
    assert reasons(judge(times, "daily=2")) == {
        "2026-11-22T08:00": ["daily #1"],
        "2026-11-22T07:00": ["not the newest of its day"],
        "2026-11-22T06:00": ["oldest daily"],
    }


def test_a_rule_without_claims_left_does_not_claim_the_oldest() -> None:
    times = ["2026-11-22T06:00", "2026-11-22T07:00"]
    assert reasons(judge(times, "daily=1"))["2026-11-22T06:00"] == ["daily=1 used up"]


def test_the_only_snapshot_is_not_called_the_oldest_too() -> None:
    assert reasons(judge(["2026-11-22T06:00"], "daily=5")) == {"2026-11-22T06:00": ["daily #1"]}


def test_rules_share_one_snapshot() -> None:
    every = "last=1 hourly=1 daily=1 weekly=1 monthly=1 yearly=1 within=1h"
    assert reasons(judge(["2026-11-22T12:00"], every)) == {
        "2026-11-22T12:00": [
            "last #1",
            "hourly #1",
            "daily #1",
            "weekly #1",
            "monthly #1",
            "yearly #1",
            "within 1h",
        ]
    }


def test_months_and_years_are_calendar_periods() -> None:
    times = ["2024-12-31T12:00", "2025-12-31T12:00", "2026-01-31T12:00", "2026-02-01T12:00"]
    assert kept(judge(times, "monthly=2")) == ["2026-02-01T12:00", "2026-01-31T12:00"]
    assert kept(judge(times, "yearly=3")) == ["2026-02-01T12:00", "2025-12-31T12:00", "2024-12-31T12:00"]


def test_within_is_measured_from_the_newest_point_and_not_from_now() -> None:
    times = ["2026-01-01T00:00", "2026-01-06T00:00", "2026-01-07T00:00"]
    verdicts = judge(times, "within=3d", now=at("2026-11-22T00:00"))
    assert reasons(verdicts) == {
        "2026-01-07T00:00": ["within 3d"],
        "2026-01-06T00:00": ["within 3d"],
        "2026-01-01T00:00": ["not within 3d"],
    }


def test_a_point_exactly_as_old_as_within_is_not_within() -> None:
    assert kept(judge(["2026-11-19T00:00", "2026-11-22T00:00"], "within=3d")) == ["2026-11-22T00:00"]


def test_all_has_no_limit() -> None:
    days = [f"2026-{month:02}-01T12:00" for month in range(1, 12)]
    assert kept(judge(days, "monthly=all")) == sorted(days, reverse=True)


def test_all_of_last_keeps_everything() -> None:
    times = [f"2026-11-22T{hour:02}:00" for hour in range(12)]
    assert len(kept(judge(times, "last=all"))) == 12


def test_a_point_from_the_future_stays_and_is_counted_by_no_rule() -> None:
    times = ["2026-11-22T10:00", "2026-11-22T11:00", "2031-01-01T00:00"]
    assert reasons(judge(times, "last=1 within=30m")) == {
        "2031-01-01T00:00": ["dated in the future"],
        "2026-11-22T11:00": ["last #1", "within 30m"],
        "2026-11-22T10:00": ["last=1 used up", "not within 30m"],
    }


def test_a_point_dated_exactly_now_is_not_in_the_future() -> None:
    assert reasons(judge(["2026-11-22T12:30"], "last=1")) == {"2026-11-22T12:30": ["last #1"]}


def test_a_held_point_stays_and_is_counted_by_no_rule() -> None:
    times = ["2026-11-22T09:00", "2026-11-22T10:00", "2026-11-22T11:00"]
    verdicts = judge(times, "last=1", held={"2026-11-22T11:00": "before the upgrade"})
    assert reasons(verdicts) == {
        "2026-11-22T11:00": ["held: before the upgrade"],
        "2026-11-22T10:00": ["last #1"],
        "2026-11-22T09:00": ["last=1 used up"],
    }


def test_a_hold_with_an_empty_reason_is_a_hold() -> None:
    verdicts = judge(["2026-11-22T10:00", "2026-11-22T11:00"], "last=1", held={"2026-11-22T10:00": ""})
    assert len(kept(verdicts)) == 2


def test_each_rule_says_why_it_does_not_keep_a_deleted_point() -> None:
    times = ["2026-11-22T09:00", "2026-11-22T09:30", "2026-11-22T09:45", "2026-11-22T10:00"]
    assert reasons(judge(times, "last=1 hourly=all within=10m"))["2026-11-22T09:30"] == [
        "last=1 used up",
        "not the newest of its hour",
        "not within 10m",
    ]


def test_of_two_points_at_one_instant_the_first_given_counts_as_newer() -> None:
    points = [Point("first", NOW), Point("second", NOW)]
    assert kept(plan_retention(points, parse_keep("last=1"), timezone=UTC, now=NOW)) == ["first"]


def test_rules_that_keep_nothing_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"^keep has no rule, so nothing would be kept"):
        KeepRules()


def test_zeros_alone_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"^keep has no rule"):
        KeepRules(last=0, daily=0)


@pytest.mark.parametrize("rules", [{"last": -1}, {"daily": -3, "last": 2}, {"within": timedelta(hours=-1)}])
def test_a_negative_rule_is_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=r"^a keep rule cannot be negative$"):
        KeepRules(**rules)


def test_keep_rules_are_read_as_they_are_written_on_the_command_line() -> None:
    rules = parse_keep("last=2 daily=7,weekly=all within=36h")
    assert rules == KeepRules(last=2, daily=7, weekly=ALL, within=timedelta(hours=36))
    assert str(rules) == "last=2 daily=7 weekly=all within=36h"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "keep has no rule, so nothing would be kept: give at least one, such as last: 7"),
        (
            "daily",
            (
                "'daily' is no keep rule: write RULE=COUNT, with RULE one of "
                "last, hourly, daily, weekly, monthly, yearly, within"
            ),
        ),
        (
            "dayly=7",
            (
                "'dayly=7' is no keep rule: write RULE=COUNT, with RULE one of "
                "last, hourly, daily, weekly, monthly, yearly, within"
            ),
        ),
        ("last=1 last=2", "keep rule 'last' is given twice"),
        (
            "last=0",
            "0 keeps nothing: write a whole number from 1, or all, or leave the rule out",
        ),
        (
            "last=-1",
            "'-1' is no count: write a whole number from 1, or all",
        ),
        (
            "last=",
            "'' is no count: write a whole number from 1, or all",
        ),
        (
            "last=1000000000",
            "'1000000000' is no count: write a whole number from 1, or all",
        ),
        (
            "within=0s",
            "'0s' keeps nothing: write a duration above zero, such as 36h, or leave the rule out",
        ),
        (
            "within=7",
            "'7' is not a duration: write a number with a unit, such as 90s, 15m, 36h, 7d or 1h30m",
        ),
    ],
)
def test_wrong_keep_rules_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidValueError) as refusal:
        parse_keep(text)
    assert str(refusal.value) == complaint


@pytest.mark.parametrize(
    ("keep", "most"),
    [
        ("last=3", 3),
        ("last=2 hourly=6 daily=5 weekly=3", 13),
        ("within=24h", 24),
        ("last=1 within=90m", 2),
        ("last=2 yearly=all", None),
    ],
)
def test_the_most_that_can_be_kept_counts_the_newest_once(keep: str, most: int | None) -> None:
    assert parse_keep(keep).most(timedelta(hours=1)) == most
