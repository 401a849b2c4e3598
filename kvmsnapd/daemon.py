"""The daemon: everything put together, with the clock, the signals and the tick. The composition root."""

from __future__ import annotations

import logging
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from kvmsnapd.audit import publish_audit
from kvmsnapd.changes import compare_fleets, compare_policies, refuse_loss
from kvmsnapd.config import NEEDS_RESTART
from kvmsnapd.daemon_events import (
    ConfigLoaded,
    ConfigRejected,
    DaemonStalled,
    DaemonStarted,
    DaemonStopped,
    JobsChanged,
    LibvirtConnected,
    LibvirtLost,
)
from kvmsnapd.driller import Driller
from kvmsnapd.drills import Drills
from kvmsnapd.errors import ConfigError, HypervisorError, KvmsnapdError
from kvmsnapd.events import RunSkipped
from kvmsnapd.execute import PATIENCE, Executor
from kvmsnapd.fleet import survey, waiting_slots
from kvmsnapd.gates import HostGate, StorageGates
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.live_config import LiveConfig
from kvmsnapd.logs import bound, configure_logging
from kvmsnapd.model import PairName
from kvmsnapd.outlets import Outlets
from kvmsnapd.pulse import Pulse, describe
from kvmsnapd.retries import Retries
from kvmsnapd.scheduler import JobScheduler, Wanted, show_name
from kvmsnapd.series import Observation
from kvmsnapd.service_manager import ServiceManager
from kvmsnapd.state_files import DomainLocks, FreezeIntents

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvmsnapd.config import Config
    from kvmsnapd.daemon_events import DomainPoliciesChanged
    from kvmsnapd.events import Publish
    from kvmsnapd.fleet import Fleet, Pair, WaitingSlot
    from kvmsnapd.model import Inventory

DRAIN = timedelta(seconds=60)
"""How long a stop waits for runs that are going on; a snapshot or merge that takes longer is finished by libvirt."""

_WATCH_SECONDS, _LOOK_SECONDS = 2.0, 30.0
"""How often the files are looked at where edits are put in force by themselves, and elsewhere."""

_SHORTEST_TICK_SECONDS = 1.0
"""Runs that end ask for a tick, so that metrics are fresh; many at once must not cause as many."""

_RECONNECT_SECONDS = 2.0
"""How often a lost libvirt is asked for; the connection itself spaces its attempts out further."""

_FIRST_TICK_SECONDS = 5.0
"""How long the first scrape waits for libvirt at most, so that it finds every domain."""

_PAUSE_SECONDS = 0.05

_CLOSE_SECONDS = 5.0

_STUCK_RUNS = 6
"""How many runs may be stuck while all workers go on. libvirtd serves 20 calls at once, and others call it too."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def read_clock() -> datetime:
    """Return the present instant, in UTC. The only place where the daemon reads the clock."""
    return datetime.now(UTC)


class Daemon:
    """One running kvmsnapd.

    Three kinds of threads: the main thread waits for signals and reloads; the tick thread looks at libvirt and keeps
    the jobs in step with what it sees; APScheduler's threads run the jobs.
    """

    def __init__(self, config_path: Path, *, connect: str | None = None, watch: Publish | None = None) -> None:
        """Read the configuration and build everything; nothing runs yet, and signals wait for :meth:`run`.

        Args:
            connect: libvirt URI to use instead of the configured one.
            watch: receives every event, after logs and metrics.

        Raises:
            ConfigError: the configuration is not valid.
            KvmsnapdError: a directory or the metrics port cannot be used.
        """
        # Blocked before any thread begins, which inherits it, signals stay with run(), which takes them one by one. A
        # handler would run between any two steps of the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._live = LiveConfig(config_path, clock=read_clock)
        config = self._live.current
        settings = config.settings
        self._started_with = settings
        self._uri = connect or settings.connect
        self._stopping = threading.Event()
        self._tick_wanted = threading.Event()
        configure_logging(level=settings.log.level, form=settings.log.format)
        self._swap = threading.Lock()  # of the configuration, with all that was made of it
        self._fleet: Fleet | None = None
        self._libvirt_up = False
        self._last_tick_at: datetime | None = None
        self._host = LibvirtHost(self._uri)
        try:
            self._live.be_the_only_one()
            locks = DomainLocks(config.runtime_directory / "locks")
            self._intents = FreezeIntents(config.state_directory / "frozen")
        except OSError as error:
            msg = f"cannot use {error.filename}: {error.strerror}; set runtime_directory and state_directory"
            raise KvmsnapdError(msg) from error
        self.outlets = Outlets(config, self.observe, ready=lambda: self._fleet is not None, watch=watch)
        self._publish = self.outlets.publish
        self._executor = Executor(
            self._host,
            locks,
            self._intents,
            self._publish,
            clock=read_clock,
            stopwatch=time.monotonic,
            current=self._current,
            host_gate=HostGate(places=settings.workers, patience=PATIENCE),
            gates=StorageGates(takes=settings.takes_per_storage, heavy=settings.merges_per_storage),
        )
        self._scheduler = JobScheduler(self._run_pair, workers=settings.workers + _STUCK_RUNS)
        driller = Driller(
            self._host,
            self._publish,
            read_clock,
            lambda pair: self._executor.locked(pair, "a restore drill"),
            lambda uuid: locks.reading(uuid, wanted=lambda: not self._stopping.is_set()),
            wanted=lambda: not self._stopping.is_set(),
        )
        self._manager = ServiceManager()
        self._round_at = time.monotonic()
        self._stalled: str | None = None
        self._drills = Drills(driller, read_clock, done=self._tick_wanted.set)
        self._pairs: dict[str, Pair] = {}
        self._retries = Retries()
        self._waiting: dict[str, WaitingSlot] = {}
        self._thawing: threading.Thread | None = None
        self._missed: dict[str, datetime] = {}
        self._ticked = threading.Event()
        self._freeze_intents = 0

    def run(self) -> int:
        """Work until SIGTERM or SIGINT; SIGHUP reloads. Return the exit code, 1 if a run did not end in time."""
        self._publish_config(self._live.current)
        self._publish(DaemonStarted(uri=self._uri, metrics=self.outlets.url))
        self._scheduler.start()
        ticking = threading.Thread(target=self._tick_forever, name="tick", daemon=True)
        ticking.start()
        threading.Thread(target=self._look_again_forever, name="look-again", daemon=True).start()
        drills = threading.Thread(target=self._drill_forever, name="drills", daemon=True)
        drills.start()
        deadline = time.monotonic() + _FIRST_TICK_SECONDS
        while not self._ticked.wait(_PAUSE_SECONDS) and time.monotonic() < deadline and not signal.sigpending():
            pass
        self.outlets.serve()
        for thread in threading.enumerate():
            show_name(thread)
        self._manager.ready()
        while True:
            self._show_life()
            settings = self._live.current.settings
            pause = _WATCH_SECONDS if settings.watch else min(settings.tick.total_seconds(), _LOOK_SECONDS)
            if self._manager.watchdog:
                pause = min(pause, self._manager.watchdog.total_seconds() / 4)
            received = signal.sigtimedwait(_SIGNALS, pause)
            if received and received.si_signo != signal.SIGHUP:
                break
            if received or self._live.look():
                self._manager.reloading()
                self._reload(asked=bool(received))
                self._manager.ready()
        self._stopping.set()
        self._tick_wanted.set()
        self._manager.stopping()
        ended = self._scheduler.stop(DRAIN)
        drills.join(_CLOSE_SECONDS)  # it gives its drill up
        self.outlets.close()
        # Takes down what was only made for us; a libvirt that does not answer must not hold up the end.
        closing = threading.Thread(target=self._host.close, name="close", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        self._publish(DaemonStopped(unfinished=tuple(sorted(self._scheduler.active()))))
        return 0 if ended else 1

    def observe(self) -> Observation:
        """Return all state that metrics and people are shown; calls nothing and waits for nothing."""
        return Observation(
            fleet=self._fleet,
            libvirt_up=self._libvirt_up,
            last_tick_at=self._last_tick_at,
            config_ok=not self._live.rejected,
            config_stale=self._live.stale,
            config_loaded_at=self._live.loaded_at,
            freeze_intents=self._freeze_intents,
            tick=self._live.current.settings.tick,
        )

    def _show_life(self) -> None:
        """Tell the service manager how we are, and that we live if all parts of the daemon do."""
        now, settings, fleet, tally = read_clock(), self._live.current.settings, self._fleet, self.outlets.tally
        pulse = Pulse(
            tick_ago=timedelta(seconds=time.monotonic() - self._round_at),
            scheduler_silent=self._scheduler.silent_for,
            stuck=sum(tally.pair(key).stuck for key in self._pairs),
            threads=self._started_with.workers + _STUCK_RUNS,
        )
        stalled, before = pulse.standstill(tick=settings.tick, watchdog=self._manager.watchdog), self._stalled
        self._stalled = stalled
        if stalled and not before:
            self._publish(DaemonStalled(what=stalled))
        text = stalled or describe(
            fleet, tally, libvirt_up=self._libvirt_up, rejected=bool(self._live.rejected), now=now
        )
        self._manager.describe(text, alive=not stalled)

    # The tick

    def _tick_forever(self) -> None:
        while not self._stopping.is_set():
            try:
                self._tick()
                self.outlets.after_tick()
            except Exception:  # an error in one tick must not end all; last_tick stands still and raises the alarm
                if self._stopping.is_set():
                    return  # the scheduler is being taken down meanwhile
                logging.getLogger(__name__).exception("tick ended in an unforeseen error")
            self._ticked.set()
            self._scheduler.probe()
            self._round_at = time.monotonic()
            pause = self._live.current.settings.tick.total_seconds()
            self._tick_wanted.wait(pause if self._libvirt_up else min(pause, _RECONNECT_SECONDS))
            if not self._stopping.is_set():
                time.sleep(_SHORTEST_TICK_SECONDS)
            self._tick_wanted.clear()

    def _look_again_forever(self) -> None:
        while not self._stopping.wait(self._live.current.settings.tick.total_seconds()):
            try:
                if self._fleet:
                    self.outlets.look_again(self._host, self._fleet)
            except Exception:  # the next look may do better
                logging.getLogger(__name__).exception("looking again ended in an unforeseen error")

    def _drill_forever(self) -> None:
        self._drills.run_forever(
            lambda: self._pairs.values() if self._libvirt_up else (),
            self._stopping,
            lambda: self._live.current.settings.tick.total_seconds(),  # noqa: PLW0108  # a reload replaces them
        )

    def _tick(self) -> None:
        """Look at libvirt once and put jobs, retries and metrics in step with what is there."""
        now, intents = read_clock(), self._intents.outstanding()
        self._freeze_intents = len(intents)
        try:
            capabilities = self._host.capabilities()
            inventory = self._host.inventory()
        except HypervisorError as error:
            if self._libvirt_up or self._last_tick_at is None:
                self._publish(LibvirtLost(uri=self._uri, error=str(error)))
            self._libvirt_up, self._last_tick_at = False, now
            return
        with self._swap:
            fleet = self._survey(self._live.current, inventory, now)
            self._take_over(fleet)
        connected, self._libvirt_up, self._last_tick_at = not self._libvirt_up, True, now
        if connected:
            self._publish(LibvirtConnected(uri=self._uri, driver=capabilities.driver, version=capabilities.version))
            # A large host takes seconds to read, so beside the tick; once per connection.
            audit = partial(
                publish_audit,
                self._publish,
                self._host,
                fleet,
                intents=self._intents.outstanding,
                now=now,
                locks=self._executor.locks,
                policies=self._live.current.all_policies,
            )
            threading.Thread(target=audit, name="audit", daemon=True).start()
        # An agent may take long to answer, or never answer; that must not hold up the tick.
        if intents and not (self._thawing and self._thawing.is_alive()):
            self._thawing = threading.Thread(target=self._executor.thawer.thaw_all, name="thaw", daemon=True)
            self._thawing.start()
        for gone in self._missed.keys() - self._pairs.keys():
            self._missed.pop(gone)
        self._retries.forget(self._retries.keys() - self._pairs.keys())
        for pair in fleet.pairs:
            self._report_missed(pair)
        wanted = {
            key: Wanted(pair.policy, pair.policy.splay_of(pair.name.domain_uuid), self._retries.run_at(pair, now=now))
            for key, pair in self._pairs.items()
        }
        changes = self._scheduler.sync(wanted)
        if changes:
            self._publish(JobsChanged(added=changes.added, changed=changes.changed, removed=changes.removed))

    def _report_missed(self, pair: Pair) -> None:
        """Publish a slot that was given up, once."""
        if pair.due.missed and self._missed.get(pair.name.key) != pair.due.missed:
            self._missed[pair.name.key] = pair.due.missed
            detail = f"the slot of {pair.due.missed.isoformat()} was missed and catch_up is skip"
            self._publish(RunSkipped(pair=pair.name, reason="misfire", detail=detail))

    def _current(self, pair: Pair) -> Pair | None:
        """Return what is in force for a pair now; None when it is gone, or when we are stopping."""
        return None if self._stopping.is_set() else self._pairs.get(pair.name.key)

    # A run, on one of APScheduler's threads

    def _run_pair(self, key: str) -> None:
        pair = self._pairs.get(key)
        if pair is None:
            return
        with bound(pair.name):
            outcome = self._executor.run(pair)
        now = self._pairs.get(key)
        if now and now.policy == pair.policy:  # else the failure is one of a policy that is no more
            self._retries.note(key, outcome, now=read_clock())
        self._tick_wanted.set()

    # Configuration

    def _reload(self, *, asked: bool) -> None:
        """Read the configuration anew; on any error the one in force stays, untouched."""
        before, now = self._live.current, read_clock()
        try:
            config = self._live.read(asked=asked)
            if config is None:
                return
            with self._swap:
                changes = self._go_over_to(config, now, asked=asked)
        except Exception as error:  # whatever it is, the daemon goes on with what it has
            if not isinstance(error, ConfigError):
                logging.getLogger(__name__).exception("reload ended in an unforeseen error")
            self._live.reject(error)
            self._publish(ConfigRejected(path=str(self._live.path), problems=self._live.rejected))
            return
        configure_logging(level=config.settings.log.level, form=config.settings.log.format)
        # What was in the way of a run may be what the edit was for.
        changed = [PairName(c.domain, c.domain_uuid, policy).key for c in changes for policy in c.changed]
        self._retries.forget(changed)
        self.outlets.forget_failures(changed)
        self._publish_config(config, before, len(changes))
        for change in changes:
            self._publish(change)
        self._tick_wanted.set()

    def _go_over_to(self, config: Config, now: datetime, *, asked: bool) -> tuple[DomainPoliciesChanged, ...]:
        """Put a configuration in force for the domains as last seen; all of it, or nothing if there is an error.

        At once, not with the next tick: a run that begins before that must not go by the old one.
        """
        if not self._fleet:
            self._live.replace(config)
            return ()
        before, inventory = self._fleet, self._fleet.domains
        after = survey(config.expected_policies, config.selectors, inventory, now=now)
        self._waiting = waiting_slots(before, after, now=now)
        after = self._survey(config, inventory, now)
        changes = compare_fleets(before, after, now=now)
        if not asked:
            refuse_loss(changes, str(self._live.path))
        self._live.replace(config)
        self._take_over(after)
        return changes

    def _survey(self, config: Config, inventory: Iterable[Inventory], now: datetime) -> Fleet:
        return survey(config.expected_policies, config.selectors, inventory, now=now, waiting=self._waiting)

    def _take_over(self, fleet: Fleet) -> None:
        """Let runs, metrics and people see this fleet. To be called with the lock held."""
        self._fleet = fleet
        self._pairs = {pair.name.key: pair for pair in fleet.pairs}
        self.outlets.take_over(fleet)

    def _publish_config(self, config: Config, before: Config | None = None, domains_changed: int = 0) -> None:
        policies = compare_policies(before.policies if before else config.policies, config.policies)
        old, new = self._started_with, config.settings
        self._publish(
            ConfigLoaded(
                files=config.files,
                policies=len(config.policies),
                selectors=len(config.selectors),
                warnings=config.warnings,
                needs_restart=tuple(n for n in NEEDS_RESTART if getattr(old, n) != getattr(new, n)),
                policies_added=policies.added,
                policies_removed=policies.removed,
                policies_changed=policies.changed,
                domains_changed=domains_changed,
            )
        )
