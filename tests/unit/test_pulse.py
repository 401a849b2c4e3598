"""Whether the daemon is alive, and its state in one line."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from kvmsnapd.fleet import Fleet, survey
from kvmsnapd.pulse import Pulse, describe
from kvmsnapd.tally import Failures, PairTally, Tally
from tests.builders import NOW, OTHER_UUID, UUID, a_policy, a_snapshot, an_inventory, at

SECOND = timedelta(seconds=1)
ALIVE = Pulse(tick_ago=SECOND, scheduler_silent=timedelta(0), stuck=9, threads=10)
FRESH = a_snapshot("2026-11-22T12:00")
KEY = f"{UUID}/standard"


def stands(pulse: Pulse) -> str | None:
    return pulse.standstill(tick=60 * SECOND, watchdog=180 * SECOND)


def test_a_daemon_whose_parts_all_show_themselves_lives() -> None:
    assert stands(ALIVE) is None
    assert stands(replace(ALIVE, tick_ago=150 * SECOND, scheduler_silent=90 * SECOND)) is None


@pytest.mark.parametrize(
    ("pulse", "words"),
    [
        (replace(ALIVE, tick_ago=151 * SECOND), "libvirt was last looked at 151 s ago"),
        (replace(ALIVE, scheduler_silent=91 * SECOND), "the scheduler has not answered for 91 s"),
        (replace(ALIVE, stuck=10), "all 10 threads for runs are stuck"),
    ],
)
def test_one_part_that_stands_still_is_enough(pulse: Pulse, words: str) -> None:
    assert str(stands(pulse)).startswith(words)


def test_without_a_watchdog_a_part_has_two_minutes() -> None:
    late = replace(ALIVE, scheduler_silent=119 * SECOND)
    assert late.standstill(tick=SECOND, watchdog=None) is None
    assert replace(late, scheduler_silent=121 * SECOND).standstill(tick=SECOND, watchdog=None)


def a_fleet(*, unprotected: bool = False) -> Fleet:
    inventories = [an_inventory(FRESH, name="db01")]
    inventories += [an_inventory(name="web1", uuid=OTHER_UUID)] if unprotected else []
    policy = a_policy(schedule="hourly")
    return survey([policy.name], {"db01": (policy,)}, inventories, now=NOW)


def said(fleet: Fleet | None, tally: Tally | None = None, *, up: bool = True, rejected: bool = False) -> list[str]:
    return describe(fleet, tally or Tally(), libvirt_up=up, rejected=rejected, now=NOW).split("; ")


def test_where_all_is_well_it_says_what_comes_next() -> None:
    (line,) = said(a_fleet())
    assert line == "1 domain(s) protected, next db01/standard at 13:00:00 UTC"


def test_a_run_that_is_due_is_next_now() -> None:
    fleet = survey(["standard"], {"db01": (a_policy(),)}, [an_inventory(name="db01")], now=NOW)
    assert said(fleet) == ["db01/standard: no good snapshot exists", "1 domain(s) protected, next db01/standard now"]


def test_a_run_of_another_day_has_its_date() -> None:
    policy = a_policy(schedule="monthly")
    fleet = survey(["standard"], {"db01": (policy,)}, [an_inventory(FRESH, name="db01")], now=NOW)
    assert said(fleet)[-1].endswith("next db01/standard at 2026-12-01 00:00 UTC")


def test_what_is_wrong_comes_first() -> None:
    failures = Failures(3, "busy", at("2026-11-22T12:01"), at("2026-11-22T12:02"))
    tally = Tally(pairs={KEY: PairTally(stuck=True, failures=failures)})
    lines = said(a_fleet(unprotected=True), tally, up=False, rejected=True)
    assert lines[:5] == [
        "libvirt does not answer",
        "the edited configuration is refused and the one before in force, see `kvmsnapd check-config`",
        "stuck: the run of db01/standard",
        "db01/standard: 3 run(s) in a row took nothing: busy",
        "1 domain(s) unprotected",
    ]


def test_before_libvirt_has_answered_there_is_nothing_else_to_say() -> None:
    assert said(None, up=False) == ["libvirt does not answer"]


def test_without_policies_it_says_what_to_do() -> None:
    fleet = survey([], {}, [an_inventory(name="db01")], now=NOW)
    assert said(fleet)[0] == "1 domain(s) unprotected"
    assert said(fleet)[1].startswith("no domain has a policy yet: ")
