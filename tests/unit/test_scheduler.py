"""The scheduler: jobs follow what is wanted, run when due, never twice at once, and stop in order."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from apscheduler.events import EVENT_JOB_SUBMITTED

from kvmsnapd.schedule import Schedule
from kvmsnapd.scheduler import JobChanges, JobScheduler, Wanted
from tests.builders import a_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsnapd.policy import Policy

SOON_ENOUGH = 10  # seconds until a test gives up
PAST = datetime(2026, 1, 1, tzinfo=UTC)
FUTURE = datetime(2126, 1, 1, tzinfo=UTC)
YEARLY = a_policy(schedule="yearly")


def wanted(run_at: datetime = FUTURE, policy: Policy = YEARLY, splay: timedelta = timedelta(0)) -> Wanted:
    return Wanted(policy, splay, run_at)


class Bench:
    """A scheduler whose runs block until they are released, and which tells what it does."""

    def __init__(self, *, workers: int = 1) -> None:
        self.started: dict[str, threading.Event] = {key: threading.Event() for key in "abc"}
        self.queued: dict[str, threading.Event] = {key: threading.Event() for key in "abc"}
        self.release = threading.Event()
        self.runs: list[str] = []
        self.scheduler = JobScheduler(self._run, workers=workers)
        self.scheduler._scheduler.add_listener(lambda event: self.queued[event.job_id].set(), EVENT_JOB_SUBMITTED)

    def _run(self, key: str) -> None:
        self.runs.append(key)
        self.started[key].set()
        assert self.release.wait(SOON_ENOUGH)

    def start(self, key: str, **others: Wanted) -> None:
        """Make one job due and wait until its run goes on."""
        self.scheduler.sync({key: wanted(PAST), **others})
        assert self.started[key].wait(SOON_ENOUGH)

    def job(self, key: str) -> Any:  # noqa: ANN401  # APScheduler has no types
        """Return APScheduler's own job, once it is done with those that were due."""
        return self.scheduler._scheduler.get_job(key)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Provide a started scheduler with one worker."""
    bench = Bench()
    bench.scheduler.start()
    yield bench
    bench.release.set()
    if bench.scheduler._scheduler.running:
        bench.scheduler.stop(timedelta(seconds=SOON_ENOUGH))


# Signs of life


def become(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + SOON_ENOUGH
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stop_while_a_probe_is_handled_leaves_no_thread_dead_of_an_error(bench: Bench) -> None:
    # pytest lets the test fail where a thread ends in an error.
    apscheduler = bench.scheduler._scheduler
    executor = apscheduler._executors["probe"]
    submit, stopped = executor.submit_job, threading.Event()

    def submit_in_a_stop(*arguments: object) -> None:
        threading.Thread(target=bench.scheduler.stop, args=(timedelta(seconds=SOON_ENOUGH),)).start()
        become(lambda: not apscheduler.running)
        submit(*arguments)
        stopped.set()

    executor.submit_job = submit_in_a_stop
    thread = apscheduler._thread
    bench.scheduler.probe()
    assert stopped.wait(SOON_ENOUGH)
    thread.join(SOON_ENOUGH)
    assert not thread.is_alive()


def test_a_probe_is_answered_at_once_though_no_worker_is_free(bench: Bench) -> None:
    bench.start("a")
    bench.scheduler.probe()
    become(lambda: not bench.scheduler.silent_for)


def test_a_scheduler_whose_thread_is_held_up_owes_the_answer(bench: Bench) -> None:
    bench.scheduler.probe()
    become(lambda: not bench.scheduler.silent_for)
    with bench.scheduler._scheduler._jobstores_lock:
        bench.scheduler.probe()
        time.sleep(0.05)
        bench.scheduler.probe()
        assert bench.scheduler.silent_for >= timedelta(seconds=0.05)
    become(lambda: not bench.scheduler.silent_for)


# Sync


def test_jobs_follow_what_is_wanted(bench: Bench) -> None:
    assert bench.scheduler.sync({"a": wanted(), "b": wanted()}) == JobChanges(added=2)
    assert bench.scheduler.sync({"a": wanted(), "c": wanted()}) == JobChanges(added=1, removed=1)
    assert {job.id for job in bench.scheduler._scheduler.get_jobs()} == {"a", "c", "probe"}


def test_a_job_that_is_as_wanted_is_not_touched(bench: Bench) -> None:
    bench.scheduler.sync({"a": wanted(), "b": wanted()})
    job = bench.job("a")
    changes = bench.scheduler.sync({"a": wanted(policy=a_policy(schedule="yearly")), "b": wanted()})
    assert not changes
    assert bench.job("a") is job
    assert job.next_run_time == FUTURE


@pytest.mark.parametrize(
    "change",
    [
        wanted(policy=a_policy(schedule="monthly")),
        wanted(policy=a_policy(schedule="yearly", keep="last=4")),
        wanted(splay=timedelta(seconds=1)),
    ],
    ids=["schedule", "keep", "splay"],
)
def test_only_a_job_that_differs_is_replaced(bench: Bench, change: Wanted) -> None:
    bench.scheduler.sync({"a": wanted(), "b": wanted()})
    other = bench.job("b")
    assert bench.scheduler.sync({"a": change, "b": wanted()}) == JobChanges(changed=1)
    assert bench.job("b") is other
    assert bench.scheduler._jobs["a"][:2] == (change.policy, change.splay)


def test_a_job_that_is_only_retimed_counts_as_unchanged(bench: Bench) -> None:
    bench.scheduler.sync({"a": wanted()})
    later = FUTURE + timedelta(hours=1)
    assert not bench.scheduler.sync({"a": wanted(later)})
    assert bench.job("a").next_run_time == later


def test_nothing_changed_is_false() -> None:
    assert not JobChanges()
    assert JobChanges(changed=1)


# Runs


def test_a_job_that_is_due_runs(bench: Bench) -> None:
    bench.start("a")
    assert bench.runs == ["a"]
    assert bench.scheduler.active() == {"a"}


def test_a_job_that_is_not_due_does_not_run(bench: Bench) -> None:
    bench.start("a", b=wanted())
    assert bench.runs == ["a"]
    assert bench.scheduler.active() == {"a"}


def test_after_a_run_the_job_waits_for_its_next_slot_and_splay(bench: Bench) -> None:
    splay = timedelta(minutes=7)
    bench.scheduler.sync({"a": wanted(PAST, splay=splay)})
    assert bench.started["a"].wait(SOON_ENOUGH)
    assert bench.job("a").next_run_time == YEARLY.schedule.next_slot(datetime.now(UTC)) + splay


def test_a_due_job_runs_once_though_it_is_wanted_again_while_queued(bench: Bench) -> None:
    bench.start("a")
    both = {"a": wanted(PAST), "b": wanted(PAST)}
    bench.scheduler.sync(both)
    assert bench.queued["b"].wait(SOON_ENOUGH)
    assert bench.scheduler.active() == {"a", "b"}
    for _ in range(3):
        assert not bench.scheduler.sync(both)
    assert bench.job("b").next_run_time > PAST
    bench.release.set()
    assert bench.started["b"].wait(SOON_ENOUGH)
    assert bench.scheduler.stop(timedelta(seconds=SOON_ENOUGH))
    assert bench.runs == ["a", "b"]


def test_a_run_that_goes_on_is_not_begun_a_second_time() -> None:
    bench = Bench(workers=2)
    bench.scheduler.start()
    bench.start("a")
    bench.scheduler.sync({"a": wanted(PAST)})
    bench.scheduler.sync({"a": wanted(PAST), "b": wanted(PAST)})
    # The second worker was free all the time, and b comes after any second run of a.
    assert bench.started["b"].wait(SOON_ENOUGH)
    assert bench.runs == ["a", "b"]
    bench.release.set()
    assert bench.scheduler.stop(timedelta(seconds=SOON_ENOUGH))


def test_a_job_that_fails_is_logged_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    first_ran, second_ran = threading.Event(), threading.Event()

    def run(key: str) -> None:
        if key == "a":
            first_ran.set()
            raise RuntimeError(key)
        second_ran.set()

    scheduler = JobScheduler(run, workers=1)
    scheduler.start()
    scheduler.sync({"a": wanted(PAST)})
    assert first_ran.wait(SOON_ENOUGH)
    scheduler.sync({"a": wanted(), "b": wanted(PAST)})
    assert second_ran.wait(SOON_ENOUGH)
    assert scheduler.stop(timedelta(seconds=SOON_ENOUGH))
    assert "run of a ended in an unforeseen error" in caplog.messages
    assert scheduler.active() == frozenset()


def test_a_schedule_that_fails_is_logged_and_tried_again_in_an_hour(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    broken = replace(YEARLY, schedule=Schedule("broken", YEARLY.timezone, cron="not cron"))
    before = datetime.now(UTC)
    bench.scheduler.sync({"a": wanted(PAST, policy=broken)})
    assert bench.started["a"].wait(SOON_ENOUGH)
    assert bench.job("a").next_run_time >= before + timedelta(hours=1)
    assert "next slot of policy standard" in caplog.messages


def test_apscheduler_logs_no_missed_or_doubled_run(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="apscheduler"):
        bench.start("a")
        for _ in range(3):
            bench.scheduler.sync({"a": wanted(PAST), "b": wanted(PAST)})
        assert bench.queued["b"].wait(SOON_ENOUGH)
    assert caplog.messages == []


# Stop


def stop_in_order(bench: Bench, *, release: Callable[[], None]) -> bool:
    """Stop, and release the running job once nothing new can be started."""
    shut = threading.Event()
    original = bench.scheduler._scheduler.shutdown

    def shutdown(*, wait: bool) -> None:
        original(wait=wait)
        shut.set()

    bench.scheduler._scheduler.shutdown = shutdown
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(bench.scheduler.stop, timedelta(seconds=SOON_ENOUGH))
        assert shut.wait(SOON_ENOUGH)
        assert not answer.done()
        release()
        return answer.result(SOON_ENOUGH)


def test_stop_waits_for_a_run_that_goes_on(bench: Bench) -> None:
    bench.start("a")
    assert stop_in_order(bench, release=bench.release.set) is True
    assert bench.scheduler.active() == frozenset()


def test_stop_starts_nothing_more_not_even_what_is_queued(bench: Bench) -> None:
    bench.start("a")
    bench.scheduler.sync({"a": wanted(PAST), "b": wanted(PAST)})
    assert bench.queued["b"].wait(SOON_ENOUGH)
    assert stop_in_order(bench, release=bench.release.set) is True
    assert bench.runs == ["a"]


def test_stop_gives_up_waiting_and_says_so(bench: Bench) -> None:
    bench.start("a")
    assert bench.scheduler.stop(timedelta(0)) is False
    assert bench.scheduler.active() == {"a"}


def test_stop_with_nothing_going_on_is_immediate(bench: Bench) -> None:
    bench.scheduler.sync({"a": wanted()})
    assert bench.scheduler.stop(timedelta(0)) is True
