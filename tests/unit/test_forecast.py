"""Forecast: the future of a policy, day by day."""

from __future__ import annotations

from datetime import date

from kvmsnapd.forecast import ForecastDay, forecast
from tests.builders import a_policy, at


def test_a_daily_policy_builds_up_and_then_replaces_one_a_day() -> None:
    policy = a_policy(schedule="0 12 * * *", keep="last=2")
    days = list(forecast(policy, start=at("2026-11-22T00:00"), days=3))
    noon = [at(f"2026-11-{day}T12:00") for day in (22, 23, 24)]
    assert days == [
        ForecastDay(date(2026, 11, 22), (noon[0],), taken=1, deleted=0),
        ForecastDay(date(2026, 11, 23), (noon[1], noon[0]), taken=1, deleted=0),
        ForecastDay(date(2026, 11, 24), (noon[2], noon[1]), taken=1, deleted=1),
    ]


def test_days_are_those_of_the_policys_zone() -> None:
    policy = a_policy(timezone="Europe/Berlin")
    first = next(forecast(policy, start=at("2026-11-22T23:30"), days=1))
    assert first.day == date(2026, 11, 23)
    assert first.taken == 23  # from 01:00 on


def test_a_day_of_a_clock_change_has_23_or_25_hours() -> None:
    policy = a_policy(timezone="Europe/Berlin", keep="last=30")
    assert [d.taken for d in forecast(policy, start=at("2026-03-28T22:59"), days=2)] == [0, 23]
    assert [d.taken for d in forecast(policy, start=at("2026-10-24T21:59"), days=2)] == [0, 25]


def test_nothing_is_taken_before_the_first_slot() -> None:
    policy = a_policy(schedule="weekly")
    days = list(forecast(policy, start=at("2026-11-22T12:00"), days=2))
    assert [day.taken for day in days] == [0, 1]
    assert days[0].slots == ()


def test_the_future_keeps_what_retention_says() -> None:
    policy = a_policy(schedule="every 6h", keep="last=1 daily=3 weekly=2")
    last = list(forecast(policy, start=at("2026-11-01T00:00"), days=20))[-1]
    assert last.slots == (
        at("2026-11-20T18:00"),
        at("2026-11-19T18:00"),
        at("2026-11-18T18:00"),
        at("2026-11-15T18:00"),
    )


def test_no_days_are_no_forecast() -> None:
    assert list(forecast(a_policy(), start=at("2026-11-22T00:00"), days=0)) == []
