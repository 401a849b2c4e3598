"""The series that describe state, rebuilt from one immutable value at each scrape: nothing is called or waited for."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

from kvmsnapd import __version__
from kvmsnapd.fleet import Fleet
from kvmsnapd.matching import Coverage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.core import Metric

_NEVER = datetime.fromtimestamp(0, UTC)
_PAIR = ("domain", "policy")


@dataclass(frozen=True, slots=True)
class Observation:
    """All state that metrics describe, at one instant. ``fleet`` is the last one libvirt answered for."""

    fleet: Fleet | None = None
    libvirt_up: bool = False
    last_tick_at: datetime | None = None
    config_ok: bool = True
    config_stale: bool = False
    config_loaded_at: datetime | None = None
    freeze_intents: int = 0
    attempts: dict[str, datetime] = field(default_factory=dict)
    """When a snapshot was last tried, by pair key; in this process's lifetime."""


class StateCollector:
    """Yields the series that describe state; gone domains and policies vanish with the fleet they were in."""

    def __init__(self, observe: Callable[[], Observation]) -> None:
        """Ask ``observe`` at each scrape."""
        self._observe = observe

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry would otherwise collect once at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every family, with the observation of this instant."""
        seen = self._observe()
        yield InfoMetricFamily("kvmsnapd_build", "Version of the running daemon.", {"version": __version__})
        yield _gauge("libvirt_up", "Whether libvirt answered the last time it was asked. Worry at 0.", seen.libvirt_up)
        yield _gauge(
            "freeze_intents",
            "Guests that a broken call may have left frozen, not thawed yet. Worry when it stays above 0.",
            seen.freeze_intents,
        )
        yield _gauge(
            "config_last_reload_successful",
            "Whether the last configuration read was accepted. Worry at 0: an old one is in force.",
            seen.config_ok,
        )
        yield _gauge(
            "config_stale",
            "1 while the files differ from the configuration in force. Worry when it lasts: reload.",
            seen.config_stale,
        )
        yield _gauge(
            "config_last_reload_success_timestamp_seconds",
            "When the configuration in force was read.",
            _seconds(seen.config_loaded_at),
        )
        yield _gauge(
            "scheduler_last_tick_timestamp_seconds",
            "When the daemon last tried to look at all domains. Worry when it stands still.",
            _seconds(seen.last_tick_at),
        )
        yield from _fleet_families(seen.fleet or Fleet(_NEVER), seen.attempts)


def _fleet_families(fleet: Fleet, attempts: dict[str, datetime]) -> Iterator[Metric]:
    last_success = _pair_gauge(
        "last_success_timestamp_seconds",
        "When the newest snapshot was taken; absent before the first. Worry when older than kvmsnapd_max_age_seconds.",
    )
    last_attempt = _pair_gauge(
        "last_attempt_timestamp_seconds",
        "When a run last worked on the domain; absent before the first since start.",
    )
    interval = _pair_gauge("expected_interval_seconds", "Longest time between two scheduled snapshots.")
    max_age = _pair_gauge("max_age_seconds", "Age of the newest snapshot that means trouble, from the policy.")
    next_run = _pair_gauge(
        "next_run_timestamp_seconds",
        "When the next snapshot is to be taken; in the past while one is overdue.",
    )
    count = _pair_gauge("snapshots", "Snapshots that exist.")
    oldest = _pair_gauge(
        "oldest_snapshot_timestamp_seconds", "Scheduled time of the oldest snapshot; absent without one."
    )
    for pair in fleet.pairs:
        labels = [pair.name.domain, pair.name.policy]
        interval.add_metric(labels, pair.policy.schedule.longest_interval.total_seconds())
        max_age.add_metric(labels, pair.policy.max_age.total_seconds())
        next_run.add_metric(labels, pair.due.run_at.timestamp())
        count.add_metric(labels, len(pair.snapshots))
        if pair.last_success_at:
            last_success.add_metric(labels, pair.last_success_at.timestamp())
        if pair.snapshots and (mark := pair.snapshots[-1].mark):
            oldest.add_metric(labels, mark.scheduled_at.timestamp())
        if pair.name.key in attempts:
            last_attempt.add_metric(labels, attempts[pair.name.key].timestamp())
    yield from (last_success, last_attempt, interval, max_age, next_run, count, oldest)

    yield _gauge(
        "clock_suspect",
        "1 while a snapshot is dated in the future: the clock is wrong, or was. Worry at 1.",
        fleet.clock_suspect(),
    )
    unprotected = GaugeMetricFamily(
        "kvmsnapd_domain_unprotected",
        "1 for a domain no policy protects without anybody having said so. Worry at 1.",
        labels=["domain"],
    )
    for assignment in fleet.assignments:
        on_purpose = assignment.coverage in {Coverage.PROTECTED, Coverage.UNPROTECTED_ON_PURPOSE}
        unprotected.add_metric([assignment.domain_name], not on_purpose)
    yield unprotected
    missing = GaugeMetricFamily(
        "kvmsnapd_domain_missing",
        "1 for a domain that the configuration names and libvirt does not know. Worry at 1.",
        labels=["domain"],
    )
    for name in fleet.missing_domains:
        missing.add_metric([name], 1)
    yield missing
    unmatched = GaugeMetricFamily(
        "kvmsnapd_policy_unmatched", "1 for a policy that no domain has. Worry at 1.", labels=["policy"]
    )
    for policy, domains in fleet.domains_per_policy.items():
        unmatched.add_metric([policy], not domains)
    yield unmatched
    unmanaged = GaugeMetricFamily(
        "kvmsnapd_snapshots_unmanaged",
        "Snapshots of ours whose policy no longer applies to the domain; nothing prunes them.",
        labels=["domain"],
    )
    for domain, snapshots in fleet.unmanaged():
        unmanaged.add_metric([domain.name], len(snapshots))
    yield unmanaged


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kvmsnapd_{name}", help_text, value=value)


def _pair_gauge(name: str, help_text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kvmsnapd_{name}", help_text, labels=_PAIR)


def _seconds(at: datetime | None) -> float:
    return at.timestamp() if at else 0.0
