"""Every series of kvmsnapd, made at each scrape from one immutable value: nothing is called or waited for."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

from kvmsnapd import __version__
from kvmsnapd.drill import drill_of
from kvmsnapd.fleet import Fleet
from kvmsnapd.matching import Coverage
from kvmsnapd.tally import Tally
from kvmsnapd.tally_series import of_domain, of_pair, tally_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric


_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class Observation:
    """All that metrics describe, at one instant. ``fleet`` is the last one libvirt answered for."""

    fleet: Fleet | None = None
    tally: Tally = field(default_factory=Tally)
    libvirt_up: bool = False
    last_tick_at: datetime | None = None
    tick: timedelta = timedelta(0)
    config_ok: bool = True
    config_stale: bool = False
    config_loaded_at: datetime | None = None
    freeze_intents: int = 0


class Collector:
    """Yields all series; those of gone domains and policies vanish with the fleet they were in."""

    def __init__(self, observe: Callable[[], Observation]) -> None:
        """Ask ``observe`` at each scrape."""
        self._observe = observe

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry would otherwise collect once at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every family, with the observation of this instant."""
        seen = self._observe()
        fleet = seen.fleet or Fleet(_NEVER)
        yield from _daemon_families(seen)
        yield from _pair_families(fleet, seen.tally)
        yield from _domain_families(fleet)
        yield from tally_families(fleet, seen.tally)


def _daemon_families(seen: Observation) -> Iterator[Metric]:
    yield InfoMetricFamily("kvmsnapd_build", "Version of the running daemon.", {"version": __version__})
    yield _one("libvirt_up", "Whether libvirt answered the last time it was asked. Worry at 0.", seen.libvirt_up)
    yield _one(
        "freeze_intents",
        "Guests that a broken call may have left frozen, not thawed yet. Worry when it stays above 0.",
        seen.freeze_intents,
    )
    yield _one(
        "config_last_reload_successful",
        "Whether the last configuration read was accepted. Worry at 0: an old one is in force.",
        seen.config_ok,
    )
    yield _one(
        "config_stale",
        "1 while the files differ from the configuration in force. Worry when it lasts: reload.",
        seen.config_stale,
    )
    yield _one(
        "config_last_reload_success_timestamp_seconds",
        "When the configuration in force was read. Worry when an edit is newer.",
        _seconds(seen.config_loaded_at),
    )
    yield _one(
        "scheduler_last_tick_timestamp_seconds",
        "When the daemon last tried to look at all domains. Worry when it stands still.",
        _seconds(seen.last_tick_at),
    )
    yield _one(
        "scheduler_tick_interval_seconds",
        "How often the daemon looks at all domains, from the configuration. Worry when the last tick is much older.",
        seen.tick.total_seconds(),
    )
    yield _one(
        "clock_suspect",
        "1 while a snapshot is dated in the future: the clock is wrong, or was. Worry at 1.",
        bool(seen.fleet and seen.fleet.clock_suspect()),
    )


def _pair_families(fleet: Fleet, tally: Tally) -> Iterator[Metric]:
    """Yield what follows from libvirt's list and the configuration."""
    last_success = of_pair(
        "last_success_timestamp_seconds",
        "When the newest snapshot was taken; absent before the first. Worry when older than kvmsnapd_max_age_seconds.",
    )
    last_attempt = of_pair(
        "last_attempt_timestamp_seconds",
        "When a run last began; absent before the first. Worry when it is older than the time a run was due.",
    )
    interval = of_pair(
        "expected_interval_seconds",
        "Longest time between two scheduled snapshots. Worry when snapshots are taken much less often.",
    )
    max_age = of_pair("max_age_seconds", "Age of the newest snapshot that means trouble, from the policy.")
    next_run = of_pair(
        "next_run_timestamp_seconds",
        "When the next snapshot is to be taken; in the past while one is overdue. Worry when it stays there.",
    )
    count = of_pair("snapshots", "Snapshots that exist. Worry when it keeps growing: nothing is pruned.")
    oldest = of_pair(
        "oldest_snapshot_timestamp_seconds",
        "Scheduled time of the oldest snapshot; absent without one. Worry when it is newer than the keep rules say.",
    )
    consistency = of_pair(
        "newest_consistency",
        "1 for the consistency of the newest snapshot; absent before the first. Worry when it is worse than promised.",
        "consistency",
    )
    below = of_pair(
        "newest_below_consistency",
        "1 while the newest snapshot is worse than the policy requires, or prefers. Worry at 1.",
        "required",
    )
    verified = of_pair(
        "last_verified_timestamp_seconds",
        "When a copy of a snapshot last came up in a restore drill; absent before. "
        "Worry when older than kvmsnapd_verify_max_age_seconds.",
    )
    failed = of_pair("drill_failed", "1 if the last restore drill failed; absent before the first. Worry at 1.")
    verify_max_age = of_pair(
        "verify_max_age_seconds",
        "Age of the last good restore drill that means trouble; where a policy schedules them.",
    )
    for pair in fleet.pairs:
        labels = [pair.name.domain, pair.name.policy]
        drill = drill_of(pair)
        if drill:
            failed.add_metric(labels, drill.failure is not None)
        if drill and drill.verified_at:
            verified.add_metric(labels, drill.verified_at.timestamp())
        if pair.policy.drill.max_age:
            verify_max_age.add_metric(labels, pair.policy.drill.max_age.total_seconds())
        interval.add_metric(labels, pair.policy.schedule.longest_interval.total_seconds())
        max_age.add_metric(labels, pair.policy.max_age.total_seconds())
        next_run.add_metric(labels, pair.due.run_at.timestamp())
        count.add_metric(labels, len(pair.snapshots))
        below.add_metric([*labels, pair.policy.consistency], pair.below_consistency)
        if pair.consistency:
            consistency.add_metric([*labels, pair.consistency], 1)
        if pair.last_success_at:
            last_success.add_metric(labels, pair.last_success_at.timestamp())
        if pair.snapshots and (mark := pair.snapshots[-1].mark):
            oldest.add_metric(labels, mark.scheduled_at.timestamp())
        # A snapshot tells of an attempt as well, and of those before the start nothing else does.
        attempts = [at for at in (pair.last_success_at, tally.pair(pair.name.key).last_attempt_at) if at]
        if attempts:
            last_attempt.add_metric(labels, max(attempts).timestamp())
    yield from (last_success, last_attempt, interval, max_age, next_run, count, oldest, consistency, below)
    yield from (verified, failed, verify_max_age)


def _domain_families(fleet: Fleet) -> Iterator[Metric]:
    info = of_domain(
        "domain_info", "1 for each domain of libvirt, with its UUID. Worry when a domain has none.", "uuid"
    )
    for domain in fleet.domains:
        info.add_metric([domain.name, domain.uuid], 1)
    unprotected = of_domain(
        "domain_unprotected", "1 for a domain no policy protects without anybody having said so. Worry at 1."
    )
    for assignment in fleet.assignments:
        on_purpose = assignment.coverage in {Coverage.PROTECTED, Coverage.UNPROTECTED_ON_PURPOSE}
        unprotected.add_metric([assignment.domain_name], not on_purpose)
    missing = of_domain(
        "domain_missing", "1 for a domain that the configuration names and libvirt does not know. Worry at 1."
    )
    for name in fleet.missing_domains:
        missing.add_metric([name], 1)
    unmanaged = of_domain(
        "snapshots_unmanaged",
        "Snapshots of ours whose policy no longer applies to the domain. Worry that nothing prunes them.",
    )
    for inventory, snapshots in fleet.unmanaged():
        unmanaged.add_metric([inventory.name], len(snapshots))
    unmatched = GaugeMetricFamily(
        "kvmsnapd_policy_unmatched", "1 for a policy that no domain has. Worry at 1.", labels=["policy"]
    )
    for policy, domains in fleet.domains_per_policy.items():
        unmatched.add_metric([policy], not domains)
    yield from (info, unprotected, missing, unmanaged, unmatched)


def _one(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kvmsnapd_{name}", help_text, value=value)


def _seconds(at: datetime | None) -> float:
    return at.timestamp() if at else 0.0
