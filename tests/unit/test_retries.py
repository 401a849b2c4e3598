"""When what failed is tried again."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.execute import Outcome, Result
from kvmsnapd.fleet import survey
from kvmsnapd.retries import Retries, retry_delay
from tests.builders import NOW, a_policy, an_inventory, at

if TYPE_CHECKING:
    from kvmsnapd.fleet import Pair

MINUTE = timedelta(minutes=1)
FAILED = Outcome(Result.FAILED, at("2026-11-22T12:00"))
QUARANTINED = Outcome(Result.SKIPPED, at("2026-11-22T12:00"), quarantined=True)


@pytest.mark.parametrize(
    ("failures", "minutes"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 15), (6, 15), (1000, 15), (10**9, 15)]
)
def test_a_retry_waits_a_minute_doubling_to_a_quarter_of_an_hour(failures: int, minutes: int) -> None:
    assert retry_delay(failures, timedelta(days=1)) == minutes * MINUTE


def test_a_retry_never_waits_longer_than_half_the_interval() -> None:
    assert retry_delay(5, 10 * MINUTE) == 5 * MINUTE


def test_a_retry_waits_a_second_at_least() -> None:
    assert retry_delay(1, timedelta(seconds=1)) == timedelta(seconds=1)


def a_pair(schedule: str = "hourly") -> Pair:
    (pair,) = survey(["standard"], {"*": (a_policy(schedule=schedule),)}, [an_inventory()], now=NOW).pairs
    return pair


def retried_after(*outcomes: Outcome, schedule: str = "hourly") -> timedelta:
    """Return how long to wait after runs that ended so, all of them now."""
    retries, pair = Retries(), a_pair(schedule)
    for outcome in outcomes:
        retries.note(pair.name.key, outcome, now=NOW)
    return retries.run_at(pair, now=NOW) - NOW


def test_what_failed_is_tried_again_after_growing_pauses() -> None:
    assert retried_after(FAILED) == MINUTE
    assert retried_after(FAILED, FAILED) == 2 * MINUTE


def test_a_quarantine_is_looked_at_after_the_longest_pause_from_the_first_time_on() -> None:
    assert retried_after(QUARANTINED) == 15 * MINUTE


def test_a_fast_schedule_is_looked_at_as_fast_as_it_fails() -> None:
    assert retried_after(QUARANTINED, schedule="every 10m") == 5 * MINUTE


def test_after_a_quarantine_a_failure_is_one_of_many() -> None:
    assert retried_after(QUARANTINED, FAILED) == 2 * MINUTE


@pytest.mark.parametrize("result", [Result.TAKEN, Result.UNCHANGED, Result.NOTHING_DUE])
def test_a_run_that_ended_well_forgets_what_was_before(result: Result) -> None:
    retries = Retries()
    for outcome in (FAILED, QUARANTINED, Outcome(result)):
        retries.note("key", outcome, now=NOW)
    assert retries.keys() == set()


def test_a_quarantine_of_a_clock_that_was_ahead_holds_nothing_up() -> None:
    retries, pair = Retries(), a_pair()
    retries.note(pair.name.key, QUARANTINED, now=NOW + timedelta(days=9))
    assert retries.run_at(pair, now=NOW) == pair.due.run_at


def test_what_is_forgotten_is_as_new() -> None:
    retries, pair = Retries(), a_pair()
    retries.note(pair.name.key, FAILED, now=NOW)
    retries.forget(["another", pair.name.key])
    assert retries.run_at(pair, now=NOW) == pair.due.run_at
