"""What Prometheus sees: counters and last findings, fed by events; what describes state is :mod:`.state_series`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from kvmsnapd.events import (
    DeleteFailed,
    DomainExamined,
    GuestFrozen,
    PruneBlocked,
    RunEvent,
    RunFinished,
    RunSkipped,
    RunStuck,
    SnapshotDeleted,
    SnapshotFailed,
    SnapshotTaken,
    SnapshotUnchanged,
)
from kvmsnapd.model import Consistency
from kvmsnapd.prune import BlockReason
from kvmsnapd.state_series import StateCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmsnapd.events import Event
    from kvmsnapd.state_series import Observation

_UNPRUNABLE = frozenset({BlockReason.BRANCH, BlockReason.FOREIGN_LAYER, BlockReason.UNSUPPORTED})
"""Snapshots are still taken then, but none can go before a person, or a backup program, has changed something."""

_PAIR = ("domain", "policy")
_BUCKETS = (0.05, 0.2, 1, 5, 20, 60, 300)


class Metrics:
    """The registry of one daemon: :meth:`consume` feeds the counters, ``observe`` gives the state at each scrape."""

    def __init__(self, observe: Callable[[], Observation]) -> None:
        """Create all series that need no label."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else every series comes twice
        self.registry = CollectorRegistry()
        self._taken = self._counter(
            "snapshots_taken",
            "Snapshots taken. Worry when consistency is worse than promised.",
            "consistency",
        )
        self._failed = self._counter(
            "snapshot_failures", "Snapshots that were due and failed. Worry when it keeps growing.", "reason"
        )
        self._skipped = self._counter(
            "runs_skipped", "Runs that left a domain alone. Worry when one reason lasts.", "reason"
        )
        self._deleted = self._counter("snapshots_deleted", "Snapshots deleted because no keep rule claimed them.")
        self._delete_failed = self._counter(
            "delete_failures",
            "Released snapshots libvirt did not delete. Worry when it keeps growing.",
            "reason",
        )
        self._blocked = Gauge(
            "kvmsnapd_prune_blocked",
            "Released snapshots that wait to be deleted. Worry when it stays above 0.",
            (*_PAIR, "reason"),
            registry=self.registry,
        )
        self._quarantined = Gauge(
            "kvmsnapd_quarantined",
            "1 while a domain is left alone for a reason that only a person can change. Worry at 1.",
            (*_PAIR, "reason"),
            registry=self.registry,
        )
        self._stuck = Gauge(
            "kvmsnapd_run_stuck",
            "1 while a run takes so long that others got its place. Worry at 1: a hung QEMU, or a very large merge.",
            _PAIR,
            registry=self.registry,
        )
        self._frozen = Gauge(
            "kvmsnapd_guest_frozen",
            "1 for a guest that the last run found frozen, and not by us. Worry when it stays at 1.",
            ("domain",),
            registry=self.registry,
        )
        self._chain_depth = Gauge(
            "kvmsnapd_backing_chain_depth",
            "Layers on top of a disk's base image, at the last run. Worry near max_chain_depth.",
            ("domain", "target"),
            registry=self.registry,
        )
        self._free = Gauge(
            "kvmsnapd_storage_free_bytes",
            "Free space of a folder of images, at the last run that looked. Worry when it falls.",
            ("storage",),
            registry=self.registry,
        )
        self._unchanged = self._counter(
            "snapshots_unchanged", "Runs that needed no snapshot: a shut-off domain is as its newest one."
        )
        self._freeze_seconds = self._histogram(
            "freeze_duration", "Time of a quiesced take, for no longer than which the guest's file systems stood still."
        )
        self._take_seconds = self._histogram("snapshot_duration", "Time libvirt took for one snapshot.")
        self._delete_seconds = self._histogram("delete_duration", "Time libvirt took to delete one snapshot.")
        self.registry.register(StateCollector(observe))
        self._lock = threading.Lock()  # of what writes; a scrape does not wait for it
        self._pairs: set[tuple[str, str]] = set()
        self._folders: dict[str, set[str]] = {}
        self._unprunable: dict[tuple[str, str], frozenset[str]] = {}

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"kvmsnapd_{name}", help_text, (*_PAIR, *labels), registry=self.registry)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(f"kvmsnapd_{name}_seconds", help_text, ("policy",), buckets=_BUCKETS, registry=self.registry)

    def consume(self, event: Event) -> None:
        """Count one event; those of no run, and of a pair that went while its run went on, are ignored."""
        with self._lock:
            if isinstance(event, RunEvent) and (event.pair.domain, event.pair.policy) in self._pairs:
                self._count(event, event.pair.domain, event.pair.policy)
                self._note(event, event.pair.domain, event.pair.policy)

    def _count(self, event: RunEvent, domain: str, policy: str) -> None:
        """Add to the series that only grow."""
        match event:
            case SnapshotTaken():
                self._taken.labels(domain, policy, event.consistency).inc()
                self._take_seconds.labels(policy).observe(event.duration_seconds)
                if event.consistency == Consistency.FILESYSTEM:
                    self._freeze_seconds.labels(policy).observe(event.duration_seconds)
            case SnapshotUnchanged():
                self._unchanged.labels(domain, policy).inc()
            case SnapshotFailed():
                self._failed.labels(domain, policy, event.reason).inc()
            case RunSkipped():
                self._skipped.labels(domain, policy, event.reason).inc()
            case SnapshotDeleted():
                self._deleted.labels(domain, policy).inc()
                self._delete_seconds.labels(policy).observe(event.duration_seconds)
            case DeleteFailed():
                self._delete_failed.labels(domain, policy, event.reason).inc()

    def _note(self, event: RunEvent, domain: str, policy: str) -> None:
        """Set the series that say what the last run found."""
        match event:
            case SnapshotTaken(consistency=Consistency.FILESYSTEM | Consistency.OFFLINE):
                self._frozen.labels(domain).set(0)
            case RunStuck():
                self._stuck.labels(domain, policy).set(1)
            case GuestFrozen():
                self._frozen.labels(domain).set(1)
            case DomainExamined():
                self._examine(event, domain)
            case PruneBlocked():
                self._unprunable[domain, policy] = _UNPRUNABLE & event.blocked.keys()
                self._forget(self._blocked, domain, policy)
                for reason, count in event.blocked.items():
                    self._blocked.labels(domain, policy, reason).set(count)
            case RunSkipped():
                self._forget(self._quarantined, domain, policy)
                if event.quarantined:
                    self._quarantined.labels(domain, policy, event.reason).set(1)
            case RunFinished():
                self._finish(event, domain, policy)

    def _finish(self, event: RunFinished, domain: str, policy: str) -> None:
        self._forget(self._stuck, domain, policy)
        if event.result != "skipped":  # else the skip has said why
            self._forget(self._quarantined, domain, policy)
            for reason in self._unprunable.pop((domain, policy), ()):
                self._quarantined.labels(domain, policy, reason).set(1)
        if event.result in {"taken", "unchanged"} and not event.blocked:
            self._forget(self._blocked, domain, policy)

    def _examine(self, event: DomainExamined, domain: str) -> None:
        self._chain_depth.remove_by_labels({"domain": domain})
        for target, depth in event.chain_depth.items():
            self._chain_depth.labels(domain, target).set(depth)
        self._folders.setdefault(domain, set()).update(event.free_bytes)
        for folder, free in event.free_bytes.items():
            self._free.labels(folder).set(free)

    def keep_only(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop the series of all (domain, policy) that are not among ``pairs``, and begin counting the new ones."""
        with self._lock:
            self._keep_only(set(pairs))

    def _keep_only(self, wanted: set[tuple[str, str]]) -> None:
        for domain, policy in self._pairs - wanted:
            for metric in (
                *(self._taken, self._unchanged, self._failed, self._skipped, self._deleted, self._delete_failed),
                *(self._blocked, self._quarantined, self._stuck),
            ):
                self._forget(metric, domain, policy)
        for domain in {domain for domain, _ in self._pairs} - {domain for domain, _ in wanted}:
            for gauge in (self._frozen, self._chain_depth):
                gauge.remove_by_labels({"domain": domain})
            for folder in self._folders.pop(domain, set()).difference(*self._folders.values()):
                self._free.remove_by_labels({"storage": folder})
        for domain, policy in wanted - self._pairs:
            self._deleted.labels(domain, policy)
            self._unchanged.labels(domain, policy)
        self._pairs = wanted

    @staticmethod
    def _forget(metric: Counter | Gauge, domain: str, policy: str) -> None:
        metric.remove_by_labels({"domain": domain, "policy": policy})
