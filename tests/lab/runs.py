"""Runs of the program's own executor, in this process, on a real libvirtd and on a clock that tests move."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self, TypeVar

from kvmsnapd.execute import Executor
from kvmsnapd.fleet import survey
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.state_files import DomainLocks, FreezeIntents

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from kvmsnapd.events import Event
    from kvmsnapd.execute import Outcome
    from kvmsnapd.fleet import Fleet
    from kvmsnapd.policy import Policy
    from tests.lab.guest import Guest

_Event = TypeVar("_Event", bound="Event")


@dataclass(frozen=True)
class Ran:
    """How one run ended, and what it published."""

    outcome: Outcome
    events: list[Event]

    def of(self, kind: type[_Event]) -> list[_Event]:
        """Return the events of one class."""
        return [event for event in self.events if isinstance(event, kind)]


@dataclass
class Runs:
    """One executor with locks, intents and a clock of its own, as in a daemon; end it with `close` or as a context.

    Several threads may `run` at once; each is told the events of its own domain.
    """

    uri: str
    directory: Path
    """For locks and intents; another instance on the same one is the daemon's next life."""
    now: datetime = datetime(2026, 11, 22, 9, 0, 1, tzinfo=UTC)
    """What the executor takes for the time; set it at will."""
    events: list[Event] = field(default_factory=list)
    """All that was published."""

    def __post_init__(self) -> None:
        """Make the executor; the first call connects."""
        self.host = LibvirtHost(self.uri)
        self.intents = FreezeIntents(self.directory / "frozen")
        locks = DomainLocks(self.directory / "locks")
        self.executor = Executor(
            self.host, locks, self.intents, self.events.append, clock=lambda: self.now, stopwatch=time.monotonic
        )

    def run(self, guest: Guest, *policies: Policy, slots: int = 1) -> Ran:
        """Run the first of the guest's policies once the clock has gone on by that many of its slots.

        With `slots=0` it is a retry. The others are the domain's further policies.
        """
        policy = policies[0]
        for _ in range(slots):
            self.now = policy.schedule.next_slot(self.now) + timedelta(seconds=1)
        uuid = guest.domain.UUIDString()
        pair = next(pair for pair in self.fleet({guest: policies}).pairs if pair.policy is policy)
        before = len(self.events)
        outcome = self.executor.run(pair)
        own = [event for event in self.events[before:] if _uuid(event) == uuid]
        return Ran(outcome, own)

    def fleet(self, policies: dict[Guest, tuple[Policy, ...]]) -> Fleet:
        """Return what a tick of the daemon would see, with these policies for these guests."""
        known = {policy.name for chosen in policies.values() for policy in chosen}
        selectors = {guest.name: chosen for guest, chosen in policies.items()}
        return survey(known, selectors, self.host.inventory(), now=self.now)

    def close(self) -> None:
        """Close the connections."""
        self.host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _uuid(event: Event) -> str | None:
    pair = getattr(event, "pair", None)
    return pair.domain_uuid if pair else getattr(event, "domain_uuid", None)
