"""Forecast: the future of a policy, day by day."""

from __future__ import annotations

from datetime import date

from kvmsnapd.forecast import ForecastSpan, Release, forecast, release_dates
from kvmsnapd.model import Hold
from tests.builders import NOW, a_policy, a_snapshot, an_inventory, at, half_deleted, hourly_snapshots


def test_a_daily_policy_builds_up_and_then_replaces_one_a_day() -> None:
    policy = a_policy(schedule="0 12 * * *", keep="last=2")
    days = list(forecast(policy, start=at("2026-11-22T00:00"), days=3))
    noon = [at(f"2026-11-{day}T12:00") for day in (22, 23, 24)]
    assert days == [
        ForecastSpan(date(2026, 11, 22), date(2026, 11, 22), (noon[0],), taken=1, deleted=0),
        ForecastSpan(date(2026, 11, 23), date(2026, 11, 23), (noon[1], noon[0]), taken=1, deleted=0),
        ForecastSpan(date(2026, 11, 24), date(2026, 11, 24), (noon[2], noon[1]), taken=1, deleted=1),
    ]


def test_days_are_those_of_the_policys_zone() -> None:
    policy = a_policy(timezone="Europe/Berlin")
    first = next(forecast(policy, start=at("2026-11-22T23:30"), days=1))
    assert first.first == date(2026, 11, 23)
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


def test_a_span_of_several_days_ends_with_its_last_and_the_rest_is_shorter() -> None:
    policy = a_policy(schedule="0 12 * * *", keep="last=2")
    first, second = forecast(policy, start=at("2026-11-22T00:00"), days=5, step=3)
    assert (first.first, first.last, first.taken, first.deleted) == (date(2026, 11, 22), date(2026, 11, 24), 3, 1)
    assert (second.first, second.last, second.taken, second.deleted) == (date(2026, 11, 25), date(2026, 11, 26), 2, 2)
    assert second.slots == (at("2026-11-26T12:00"), at("2026-11-25T12:00"))


# Releases; NOW is 12:30 on Sunday 22 November


def releases(keep: str, *snapshots: str, hold: Hold | None = None, schedule: str = "hourly") -> list[Release]:
    """Return the releases of these snapshots in the order given; the first one has the hold."""
    own = [a_snapshot(slot, hold=hold if slot == snapshots[0] else None) for slot in snapshots]
    found = release_dates(an_inventory(*own), a_policy(keep=keep, schedule=schedule), now=NOW)
    return [found[snapshot.name] for snapshot in own]


def test_the_last_rule_releases_one_with_each_run() -> None:
    assert releases("last=2", "2026-11-22T12:00", "2026-11-22T11:00") == [
        Release(at("2026-11-22T14:00")),
        Release(at("2026-11-22T13:00")),
    ]


def test_the_next_run_is_the_one_that_is_due() -> None:
    assert releases("last=1", "2026-11-22T11:00") == [Release(NOW)]


def test_the_splay_is_part_of_a_runs_time() -> None:
    policy = a_policy(keep="last=1", splay="30m")
    snapshot = a_snapshot("2026-11-22T12:00")
    inventory = an_inventory(snapshot)
    expected = at("2026-11-22T13:00") + policy.splay_of(inventory.uuid)
    assert release_dates(inventory, policy, now=NOW)[snapshot.name] == Release(expected)


def test_a_day_is_released_when_enough_newer_days_have_one() -> None:
    assert releases("daily=2", "2026-11-21T23:00", "2026-11-22T12:00") == [
        Release(at("2026-11-23T00:00")),
        Release(at("2026-11-22T13:00")),  # a newer one of the same day
    ]


def test_a_year_is_found_without_going_there_hour_by_hour() -> None:
    assert releases("hourly=24 yearly=5", "2025-12-31T23:00") == [Release(at("2030-01-01T00:00"))]


def test_a_hold_without_end_and_a_rule_without_limit_keep_for_good() -> None:
    assert releases("last=1", "2026-11-22T11:00", hold=Hold("why")) == [Release(None)]
    assert releases("last=1 monthly=all", "2026-10-31T23:00", "2026-10-30T23:00") == [
        Release(None),
        Release(None),  # the oldest of all
    ]


def test_a_hold_with_an_end_keeps_until_the_run_after_it() -> None:
    hold = Hold("why", at("2026-12-01T10:20"))
    assert releases("last=1", "2026-11-22T11:00", hold=hold) == [Release(at("2026-12-01T11:00"))]


def test_beyond_ten_years_only_that_is_known() -> None:
    (release,) = releases("yearly=20", "2025-12-31T23:00")
    assert not release.certain
    assert release.at
    assert release.at >= at("2036-01-01T00:00")


def test_one_dated_in_the_future_is_judged_once_it_has_come() -> None:
    assert releases("last=2", "2026-11-30T10:30") == [Release(at("2026-11-30T12:00"))]


def test_within_is_measured_from_the_newest() -> None:
    assert releases("within=10h", "2026-11-22T12:00") == [Release(at("2026-11-22T22:00"))]


def test_half_deleted_and_foreign_policies_have_no_date() -> None:
    half, other = half_deleted(a_snapshot("2026-11-22T11:00")), a_snapshot("2026-11-22T11:00", policy="other")
    assert release_dates(an_inventory(half, other), a_policy(), now=NOW) == {}


def test_no_snapshots_have_no_dates() -> None:
    assert release_dates(an_inventory(), a_policy(), now=NOW) == {}


def test_every_snapshot_has_a_release() -> None:
    inventory = an_inventory(*hourly_snapshots(30))
    found = release_dates(inventory, a_policy(keep="last=3 hourly=10 daily=3 weekly=2 monthly=3"), now=NOW)
    assert found.keys() == {snapshot.name for snapshot in inventory.snapshots}
