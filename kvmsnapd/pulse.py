"""Whether the daemon is alive, and its state in one line: for a watchdog and `systemctl status`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import TYPE_CHECKING

from kvmsnapd.standing import stand, worst_first

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from kvmsnapd.fleet import Fleet
    from kvmsnapd.tally import Tally

_SLACK = timedelta(minutes=2)
"""How much later than it should a part may show itself where no watchdog says so."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """When the daemon's parts last showed themselves, and what of them is used up.

    Attributes:
        tick_ago: time since the thread that looks at libvirt last went round, whatever it found.
        scheduler_silent: how long the scheduler has owed an answer; zero if it owes none.
        stuck: runs that a call to libvirt, or a hook, has held for very long.
        threads: how many runs can be stuck before no other can begin.
    """

    tick_ago: timedelta
    scheduler_silent: timedelta
    stuck: int
    threads: int

    def standstill(self, *, tick: timedelta, watchdog: timedelta | None) -> str | None:
        """Return which part does not work any more, None if all do; only a new start can help then.

        A part may be late by half of the watchdog's time; a libvirt that hangs is given up after half a minute.
        """
        slack = watchdog / 2 if watchdog else _SLACK
        if self.tick_ago > tick + slack:
            return f"libvirt was last looked at {_seconds(self.tick_ago)} ago: a call to it does not return"
        if self.scheduler_silent > slack:
            return f"the scheduler has not answered for {_seconds(self.scheduler_silent)}"
        if self.stuck >= self.threads:
            return f"all {self.threads} threads for runs are stuck"
        return None


def describe(fleet: Fleet | None, tally: Tally, *, libvirt_up: bool, rejected: bool, now: datetime) -> str:
    """Return the daemon's state in one line, what is wrong first.

    Args:
        fleet: as libvirt last answered; None before it did.
        rejected: whether the last configuration was refused.
        now: the present instant.
    """
    return "; ".join(_parts(fleet, tally, libvirt_up=libvirt_up, rejected=rejected, now=now))


def _parts(fleet: Fleet | None, tally: Tally, *, libvirt_up: bool, rejected: bool, now: datetime) -> Iterator[str]:
    if not libvirt_up:
        yield "libvirt does not answer"
    if rejected:
        yield "the edited configuration is refused and the one before in force, see `kvmsnapd check-config`"
    if fleet is None:
        return
    stuck = [pair.name for pair in fleet.pairs if tally.pair(pair.name.key).stuck]
    if stuck:
        yield f"stuck: the run of {stuck[0].domain}/{stuck[0].policy}{_more(stuck)}"
    inventories = {domain.uuid: domain for domain in fleet.domains}
    standings = [
        stand(pair, inventories[pair.name.domain_uuid], now=now, found=tally.pair(pair.name.key))
        for pair in fleet.pairs
    ]
    troubled = [standing for standing in worst_first(standings, now=now) if standing.troubles]
    if troubled:
        name, trouble = troubled[0].pair.name, troubled[0].troubles[0]
        yield f"{name.domain}/{name.policy}: {trouble.text}{_more(troubled)}"
    unprotected = fleet.unprotected()
    if unprotected:
        yield f"{len(unprotected)} domain(s) unprotected"
    if not fleet.pairs:
        yield "no domain has a policy yet: give some in kvmsnapd.yaml, or see what `kvmsnapd init` proposes"
        return
    first = min(fleet.pairs, key=lambda pair: pair.due.run_at)
    domains = {pair.name.domain_uuid for pair in fleet.pairs}
    next_run = f"next {first.name.domain}/{first.name.policy} {_when(first.due.run_at, now)}"
    yield f"{len(domains)} domain(s) protected, {next_run}"


def _when(at: datetime, now: datetime) -> str:
    if at <= now:
        return "now"
    form = "%H:%M:%S UTC" if at - now < timedelta(days=1) else "%Y-%m-%d %H:%M UTC"
    return f"at {at.astimezone(UTC):{form}}"


def _more(names: Sequence[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _seconds(span: timedelta) -> str:
    return f"{span.total_seconds():.0f} s"
