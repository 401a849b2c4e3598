"""APScheduler as timer and thread pool: one job per (domain, policy). Only this module imports it.

When a job should run is derived from what exists (:mod:`kvmsnapd.fleet`), never from what fired before: a timer only
wakes a run early enough, and the run looks again whether its slot is due. So a missed, doubled or lost timer is
harmless, and every tick puts right what a clock step or a failed run left wrong.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmsnapd.policy import Policy


_PROBE = "probe"  # no pair's key: those have a slash
_NEVER = datetime(9999, 1, 1, tzinfo=UTC)


class _SlotTrigger(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """Fires at every slot of a schedule, delayed by the pair's splay."""

    def __init__(self, policy: Policy, splay: timedelta) -> None:
        self._policy = policy
        self._splay = splay

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
        # An exception here would end APScheduler's thread for good, without a word. After a long sleep only the latest
        # slot matters, so the search never begins further back than now.
        try:
            return self._policy.schedule.next_slot(max(previous or now, now) - self._splay) + self._splay
        except Exception:
            logging.getLogger(__name__).exception("next slot of policy %s", self._policy.name)
            return now + timedelta(hours=1)

    def __str__(self) -> str:
        return f"{self._policy.schedule} + {self._splay}"


class _WhenAsked(BaseTrigger):  # type: ignore[misc]
    """Fires only when its job is given a time.

    One that ends would be no good: APScheduler 3.11 removes it on its own thread, which dies of that in a shutdown.
    """

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:  # noqa: ARG002  # as all
        return _NEVER


def show_name(thread: threading.Thread) -> None:
    """Let `top -H` and debuggers see what a thread is; Python does that itself from 3.14 on."""
    if thread is not threading.main_thread():
        with suppress(OSError):  # not Linux, or just ended
            Path(f"/proc/self/task/{thread.native_id}/comm").write_text(thread.name[:15])


def _named(prefix: str) -> dict[str, Any]:
    """Return the options of a pool whose threads have a name; without one they bear that of APScheduler's thread."""
    return {"thread_name_prefix": prefix, "initializer": lambda: show_name(threading.current_thread())}


class _Pool(ThreadPoolExecutor):  # type: ignore[misc]
    """APScheduler's pool, telling when a job is queued and not only when it begins to run."""

    def __init__(self, workers: int, active: _Active) -> None:
        super().__init__(workers, _named("run"))
        self._active = active

    def _do_submit_job(self, job: Any, run_times: list[datetime]) -> None:  # noqa: ANN401
        self._active.add(job.id)
        try:
            super()._do_submit_job(job, run_times)
        except BaseException:  # the pool is being shut down
            self._active.discard(job.id)
            raise


class _Active:
    """The keys of the pairs whose runs are queued or going on."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._changed = threading.Condition()

    def add(self, key: str) -> None:
        with self._changed:
            self._keys.add(key)

    def discard(self, key: str) -> None:
        with self._changed:
            self._keys.discard(key)
            self._changed.notify_all()

    def keys(self) -> frozenset[str]:
        with self._changed:
            return frozenset(self._keys)

    def wait_until_none(self, timeout: timedelta) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._keys, timeout.total_seconds())


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one pair's job should be: its policy, its splay, and when it runs next."""

    policy: Policy
    splay: timedelta
    run_at: datetime


@dataclass(frozen=True, slots=True)
class JobChanges:
    """How many jobs a :meth:`JobScheduler.sync` added, replaced and removed."""

    added: int = 0
    changed: int = 0
    removed: int = 0

    def __bool__(self) -> bool:
        """Tell whether anything changed."""
        return bool(self.added or self.changed or self.removed)


class JobScheduler:
    """Runs ``run(key)`` for each pair when it is due, never twice at once for one pair, ``workers`` at a time.

    All methods but the jobs themselves are to be called from one thread.
    """

    def __init__(self, run: Callable[[str], None], *, workers: int) -> None:
        """Prepare; nothing runs before :meth:`start`."""
        self._run = run
        self._jobs: dict[str, tuple[Policy, timedelta, Any]] = {}
        self._active = _Active()
        self._stopping = False
        self._owed_since: float | None = None
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            executors={"default": _Pool(workers, self._active), _PROBE: ThreadPoolExecutor(1, _named(_PROBE))},
            # A late run is still wanted (the default drops it after one second), and once is enough.
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )

    def start(self) -> None:
        """Begin to run jobs."""
        self._scheduler.add_job(self._answer, _WhenAsked(), id=_PROBE, executor=_PROBE)
        self._scheduler.start()

    def sync(self, wanted: Mapping[str, Wanted]) -> JobChanges:
        """Make the jobs match ``wanted``; a job that is as wanted already is not touched.

        A job whose time was moved, because its run failed or the clock was stepped, is only re-timed and counts as
        unchanged.
        """
        if self._stopping:
            return JobChanges()
        added = changed = removed = 0
        active = self._active.keys()
        for key in self._jobs.keys() - wanted.keys():
            self._scheduler.remove_job(key)
            del self._jobs[key]
            removed += 1
        for key, want in wanted.items():
            known = self._jobs.get(key)
            if known is None or known[:2] != (want.policy, want.splay):
                # One that is running cannot be started once more; it is timed anew when it has ended.
                timing = {} if key in active else {"next_run_time": want.run_at}
                trigger = _SlotTrigger(want.policy, want.splay)
                job = self._scheduler.add_job(
                    self._guarded, trigger, args=(key,), id=key, replace_existing=True, **timing
                )
                self._jobs[key] = (want.policy, want.splay, job)
                added, changed = added + (known is None), changed + (known is not None)
            elif known[2].next_run_time != want.run_at and key not in active:
                self._scheduler.modify_job(key, next_run_time=want.run_at)
        # APScheduler sleeps by a clock that a step of the wall clock, or a suspended host, does not move.
        self._scheduler.wakeup()
        return JobChanges(added, changed, removed)

    def probe(self) -> None:
        """Ask APScheduler's thread for a sign of life: to run an empty job at once. See :attr:`silent_for`."""
        if self._stopping:
            return
        self._owed_since = self._owed_since or time.monotonic()
        with suppress(JobLookupError):  # it is being stopped just now
            self._scheduler.modify_job(_PROBE, next_run_time=datetime.now(UTC))

    def _answer(self) -> None:
        self._owed_since = None

    @property
    def silent_for(self) -> timedelta:
        """How long a :meth:`probe` has not been answered; zero if all were."""
        since = self._owed_since
        return timedelta(seconds=time.monotonic() - since) if since else timedelta(0)

    def active(self) -> frozenset[str]:
        """Return the keys of the pairs whose runs are queued or going on."""
        return self._active.keys()

    def stop(self, timeout: timedelta) -> bool:
        """Start nothing more and wait for runs that are going on; return whether all of them ended in time."""
        self._stopping = True
        # Never with wait=True: it holds a lock of the scheduler while it joins the pool.
        self._scheduler.shutdown(wait=False)
        return self._active.wait_until_none(timeout)

    def _guarded(self, key: str) -> None:
        """Run one pair on a pool thread, unless we are stopping, and keep account of it."""
        try:
            if not self._stopping:
                self._run(key)
        except Exception:
            logging.getLogger(__name__).exception("run of %s ended in an unforeseen error", key)
        finally:
            self._active.discard(key)
