"""What the commands that change something share: libvirt, the daemon's locks and notes, an executor, and Ctrl-C."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from kvmsnapd.cli.look import config_in_force
from kvmsnapd.cli.progress import progress
from kvmsnapd.cli.tell import describe_event
from kvmsnapd.daemon import read_clock
from kvmsnapd.errors import KvmsnapdError
from kvmsnapd.events import RunEvent, Severity
from kvmsnapd.execute import PATIENCE, Executor
from kvmsnapd.fleet import survey
from kvmsnapd.gates import HostGate, StorageGates
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.state_files import DomainLocks, FreezeIntents

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from kvmsnapd.config import Config
    from kvmsnapd.events import Event
    from kvmsnapd.fleet import Fleet, Pair
    from kvmsnapd.model import PairName
    from kvmsnapd.watching import Work

T = TypeVar("T")

INTERRUPTED = 130
_LOOK_SECONDS = 0.1
_SCRIPT_WAITS = timedelta(minutes=10)
"""How long a command that nobody watches waits for a domain's lock; a person can press Ctrl-C."""


class Worker:
    """A thread that does one piece of work after another, on one connection to libvirt.

    It lasts as long as the process: libvirt's client complains when a connection is closed because its thread has ended
    (measured, 9.0, two times out of three: "g_object_unref: assertion 'old_ref > 0' failed").
    """

    def __init__(self, name: str) -> None:
        """Begin to wait for work."""
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Have this done once the work before it is; the future has its result or what it raised."""
        future: Future[T] = Future()
        self._tasks.put((work, future))
        return future

    def _work(self) -> None:
        while True:
            work, future = self._tasks.get()
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # raised where the result is wanted
                future.set_exception(error)


@dataclass
class Bench:
    """All that a command needs which takes, deletes or marks snapshots beside a running daemon."""

    config: Config
    host: LibvirtHost
    fleet: Fleet
    locks: DomainLocks
    json: bool
    events: list[Event] = field(default_factory=list)
    """What has happened."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _doing: Work | None = None

    def __post_init__(self) -> None:
        self._worker, self._gauge = Worker("work"), Worker("gauge")
        settings = self.config.settings
        self.executor = Executor(
            self.host,
            self.locks,
            FreezeIntents(self.config.state_directory / "frozen"),
            self._publish,
            clock=read_clock,
            stopwatch=time.monotonic,
            current=self._current,
            host_gate=HostGate(places=1, patience=PATIENCE),
            gates=StorageGates(takes=settings.takes_per_storage, heavy=settings.merges_per_storage),
            wanted=self.wanted,
            lock_wait=self.lock_wait,
            on_wait=self.tell_wait,
            watch=self._watch,
        )

    @property
    def lock_wait(self) -> timedelta | None:
        """How long a lock is waited for: without end on a terminal, ten minutes elsewhere."""
        return None if sys.stderr.isatty() else _SCRIPT_WAITS

    def wanted(self) -> bool:
        """Tell whether anything more is to be begun."""
        return not self._stopping.is_set()

    def locked(self, name: PairName, doing: str) -> AbstractContextManager[None]:
        """Hold a domain's lock; see :meth:`Executor.locked`."""
        return self.executor.locked(name, doing)

    def tell_wait(self, domain: str, holder: str) -> None:
        """Say for whom a domain is waited for."""
        if not self.json:
            print(f"{domain}: waiting for {holder}; Ctrl-C to give up", file=sys.stderr, flush=True)

    def of(self, kind: type[Event], domain_uuid: str) -> list[Any]:
        """Return the events of one class about one domain."""
        return [event for event in self._about(domain_uuid) if type(event) is kind]

    def lines(self, domain_uuid: str) -> list[str]:
        """Return in words what has happened to one domain."""
        return [line for line in map(describe_event, self._about(domain_uuid)) if line]

    def _about(self, domain_uuid: str) -> list[RunEvent]:
        return [e for e in self.events if isinstance(e, RunEvent) and e.pair.domain_uuid == domain_uuid]

    def finish(self, work: Callable[[], T]) -> T:
        """Do the work on a thread of its own and return its result.

        A call to libvirt cannot be cancelled. So the first Ctrl-C lets what goes on come to its end and begins nothing
        more; the second leaves at once, and libvirt ends it by itself.
        """
        future = self._worker.begin(work)
        while not future.done():
            try:
                with suppress(TimeoutError):
                    future.exception(_LOOK_SECONDS)
            except KeyboardInterrupt:
                self._interrupt()
        return future.result()

    def exit_code(self, *, failed: bool) -> int:
        """Return the code that the command ends with."""
        if self._stopping.is_set():
            return INTERRUPTED
        return 1 if failed else 0

    def _interrupt(self) -> None:
        doing = self._doing
        if not self._stopping.is_set():
            self._stopping.set()
            rest = f"{doing.pair.domain}: {doing.text} goes on" if doing else "nothing goes on"
            print(
                f"\nStopping: {rest}, and nothing more is begun. Ctrl-C again leaves at once.",
                file=sys.stderr,
                flush=True,
            )
            return
        if doing:
            name = doing.pair.domain
            afterwards = doing.afterwards or (
                "A snapshot may be half deleted until then, which its description says: "
                f"`kvmsnapd list {name}` shows it, and the next run or `kvmsnapd prune {name}` ends what is left."
            )
            print(
                f"\nLeft: libvirt ends {doing.text} by itself, and no data is lost. {afterwards}",
                file=sys.stderr,
                flush=True,
            )
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # python would wait for the thread

    def _current(self, pair: Pair) -> Pair | None:
        return pair if self.wanted() else None

    @contextmanager
    def watching(self, work: Work, measure: Callable[[], tuple[int, int] | None]) -> Iterator[None]:
        """Show how far this work is while the block does it, and name it if it is interrupted."""
        self._doing = work
        try:
            with progress(f"{work.pair.domain}: {work.text}", measure, quiet=self.json):
                yield
        finally:
            self._doing = None

    def _watch(self, work: Work) -> AbstractContextManager[None]:
        return self.watching(work, partial(self._measure, work))

    def _measure(self, work: Work) -> tuple[int, int] | None:
        return self._gauge.begin(lambda: self.host.progress(work.pair.domain_uuid)).result()

    def _publish(self, event: Event) -> None:
        self.events.append(event)
        line = None if self.json else describe_event(event)
        if line:
            stream = sys.stdout if event.severity in {Severity.INFO, Severity.DEBUG} else sys.stderr
            print(line, file=stream, flush=True)


@contextmanager
def bench(arguments: argparse.Namespace) -> Iterator[Bench]:
    """Build the bench by the configuration of a running daemon, or by the files if none runs.

    Raises:
        ConfigError: the configuration is not valid.
        KvmsnapdError: a directory cannot be used.
        HypervisorUnreachableError: libvirt does not answer, or not to us.
    """
    force = config_in_force(arguments.config)
    config = force.config
    if not arguments.json:
        for line in force.said:
            print(line, file=sys.stderr)
    host = LibvirtHost(arguments.connect or config.settings.connect)
    try:
        host.check_rights()
        fleet = survey(config.expected_policies, config.selectors, host.inventory(), now=read_clock())
        try:
            locks = config.runtime_directory / "locks"
            made = Bench(config, host, fleet, DomainLocks(locks), arguments.json)
            if not os.access(locks, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(locks))  # noqa: TRY301
            yield made
        except PermissionError as error:
            msg = f"cannot use {error.filename}: {error.strerror}; run this as the daemon's user. Nothing was changed"
            raise KvmsnapdError(msg) from error
    finally:
        host.close()
