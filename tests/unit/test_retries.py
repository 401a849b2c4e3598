"""When the daemon tries again what was refused or failed; no thread and no libvirt is needed to say that."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd import daemon as daemon_module
from kvmsnapd.daemon import Daemon, _Failures
from kvmsnapd.execute import Outcome, Result
from kvmsnapd.fleet import survey
from tests.builders import NOW, a_policy, an_inventory, at

if TYPE_CHECKING:
    from pathlib import Path

    from kvmsnapd.fleet import Pair

MINUTE = timedelta(minutes=1)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    monkeypatch.setattr(daemon_module.signal, "pthread_sigmask", lambda *_: set())
    monkeypatch.setattr(daemon_module, "configure_logging", lambda **_: None)
    monkeypatch.setattr(daemon_module, "log_event", lambda _event: None)
    monkeypatch.setattr(daemon_module, "read_clock", lambda: NOW)
    config = tmp_path / "kvmsnapd.yaml"
    config.write_text(
        f"metrics: {{enabled: false}}\nstate_directory: {tmp_path}/state\nruntime_directory: {tmp_path}/run\n"
    )
    return Daemon(config, connect="test:///default")


def a_pair(schedule: str = "hourly") -> Pair:
    (pair,) = survey(["standard"], {"*": (a_policy(schedule=schedule),)}, [an_inventory()], now=NOW).pairs
    return pair


def retried_after(daemon: Daemon, pair: Pair, *outcomes: Outcome) -> timedelta:
    """Return how long the daemon waits after runs that ended so, all of them now."""
    results = iter(outcomes)
    daemon._executor.run = lambda _pair: next(results)  # type: ignore[method-assign]
    daemon._pairs = {pair.name.key: pair}
    for _ in outcomes:
        daemon._run_pair(pair.name.key)
    return daemon._wanted(pair, NOW).run_at - NOW


FAILED = Outcome(Result.FAILED, at("2026-11-22T12:00"))
QUARANTINED = Outcome(Result.SKIPPED, at("2026-11-22T12:00"), quarantined=True)


def test_what_failed_is_tried_again_after_growing_pauses(daemon: Daemon) -> None:
    assert retried_after(daemon, a_pair(), FAILED) == MINUTE
    assert retried_after(daemon, a_pair(), FAILED) == 2 * MINUTE


def test_a_quarantine_is_looked_at_after_the_longest_pause_from_the_first_time_on(daemon: Daemon) -> None:
    assert retried_after(daemon, a_pair(), QUARANTINED) == 15 * MINUTE


def test_a_fast_schedule_is_looked_at_as_fast_as_it_fails(daemon: Daemon) -> None:
    assert retried_after(daemon, a_pair("every 10m"), QUARANTINED) == 5 * MINUTE


def test_after_a_quarantine_a_failure_is_one_of_many(daemon: Daemon) -> None:
    assert retried_after(daemon, a_pair(), QUARANTINED, FAILED) == 2 * MINUTE


@pytest.mark.parametrize("result", [Result.TAKEN, Result.UNCHANGED, Result.NOTHING_DUE])
def test_a_run_that_ended_well_forgets_what_was_before(daemon: Daemon, result: Result) -> None:
    retried_after(daemon, a_pair(), FAILED, QUARANTINED, Outcome(result))
    assert daemon._failures == {}


def test_a_quarantine_of_a_clock_that_was_ahead_holds_nothing_up(daemon: Daemon) -> None:
    pair = a_pair()
    daemon._failures[pair.name.key] = _Failures(1, NOW + timedelta(days=9), quarantined=True)
    assert daemon._wanted(pair, NOW).run_at == pair.due.run_at
