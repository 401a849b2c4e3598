"""The series of what runs found and did: :mod:`.tally` as Prometheus reads it."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from kvmsnapd.model import Consistency
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.tally import BUCKETS, DomainTally

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from kvmsnapd.fleet import Fleet, Pair
    from kvmsnapd.tally import PairTally, Tally

_PAIR = ("domain", "policy")
_BEST = {
    ConsistencyRule.FILESYSTEM: Consistency.FILESYSTEM,
    ConsistencyRule.FILESYSTEM_PREFERRED: Consistency.FILESYSTEM,
    ConsistencyRule.CRASH: Consistency.CRASH,
    ConsistencyRule.MEMORY: Consistency.MEMORY,
}


def tally_families(fleet: Fleet, tally: Tally) -> Iterator[Metric]:
    """Yield what is known of the pairs, domains and folders that there are now."""
    yield from _finding_families(fleet, tally)
    yield from _counter_families(fleet, tally)
    yield from _domain_families(fleet, tally)
    yield from _storage_families(fleet, tally)
    yield from _duration_families(tally)


def _finding_families(fleet: Fleet, tally: Tally) -> Iterator[Metric]:
    """Yield what the last runs found."""
    failures = of_pair(
        "failures_in_a_row",
        "Runs that failed or were refused since the last success. Worry when it keeps growing.",
        "reason",
    )
    blocked = of_pair(
        "prune_blocked", "Released snapshots that wait to be deleted. Worry when it stays above 0.", "reason"
    )
    quarantined = of_pair(
        "quarantined",
        "1 while a domain is left alone, or not pruned, for a reason that only a person can change. Worry at 1.",
        "reason",
    )
    stuck = of_pair(
        "run_stuck",
        "1 while a run takes so long that others got its place. Worry at 1: a hung QEMU, or a very large merge.",
    )
    since = of_pair(
        "failing_since_timestamp_seconds",
        "When the first run of those failed; absent after a success. Worry at an old one.",
    )
    for pair, found in _each(fleet, tally):
        labels = [pair.name.domain, pair.name.policy]
        failing = found.failures
        failures.add_metric([*labels, failing.reason if failing else ""], failing.count if failing else 0)
        if failing:
            since.add_metric(labels, failing.first_at.timestamp())
        for word, waiting in found.blocked.items():
            blocked.add_metric([*labels, word], waiting)
        for word in sorted(found.quarantined):
            quarantined.add_metric([*labels, word], 1)
        if found.stuck:
            stuck.add_metric(labels, 1)
    yield from (failures, since, blocked, quarantined, stuck)


def _counter_families(fleet: Fleet, tally: Tally) -> Iterator[Metric]:
    taken = _of_pair_counted(
        "snapshots_taken", "Snapshots taken. Worry when consistency is worse than promised.", "consistency"
    )
    unchanged = _of_pair_counted(
        "snapshots_unchanged",
        "Runs that needed no snapshot, as a shut-off domain is as its newest one. Worry when it counts for a busy one.",
    )
    failed = _of_pair_counted(
        "snapshot_failures", "Snapshots that were due and failed. Worry when it keeps growing.", "reason"
    )
    skipped = _of_pair_counted("runs_skipped", "Runs that left a domain alone. Worry when one reason lasts.", "reason")
    deleted = _of_pair_counted(
        "snapshots_deleted", "Snapshots deleted because no keep rule claimed them. Worry when it stands still."
    )
    delete_failed = _of_pair_counted(
        "delete_failures", "Released snapshots libvirt did not delete. Worry when it keeps growing.", "reason"
    )
    drills = _of_pair_counted(
        "drills", "Restore drills, by how they ended. Worry about all but ok; a skipped one says nothing.", "result"
    )
    for pair, found in _each(fleet, tally):
        labels = [pair.name.domain, pair.name.policy]
        for word, times in found.drills.items():
            drills.add_metric([*labels, word], times)
        unchanged.add_metric(labels, found.unchanged)
        deleted.add_metric(labels, found.deleted)
        # The best that the policy asks for is there from the start, so that its first increase is seen.
        for word, times in {_BEST[pair.policy.consistency]: 0, **found.taken}.items():
            taken.add_metric([*labels, word], times)
        for family, counts in ((failed, found.failed), (skipped, found.skipped), (delete_failed, found.delete_failed)):
            for word, times in counts.items():
                family.add_metric([*labels, word], times)
    yield from (taken, unchanged, failed, skipped, deleted, delete_failed, drills)


def _domain_families(fleet: Fleet, tally: Tally) -> Iterator[Metric]:
    frozen = of_domain(
        "guest_frozen", "1 for a guest that the last run found frozen, and not by us. Worry when it stays at 1."
    )
    depth = of_domain(
        "backing_chain_depth",
        "Layers on top of a disk's base image, as last looked at. Worry near kvmsnapd_max_chain_depth.",
        "target",
    )
    limit = of_domain("max_chain_depth", "Depth of the backing chain at which no further snapshot is taken.")
    for domain in fleet.domains:
        found = tally.domains.get(domain.uuid, DomainTally())
        if found.frozen is not None:
            frozen.add_metric([domain.name], found.frozen)
        for target, layers in found.chain_depth.items():
            depth.add_metric([domain.name, target], layers)
        if found.chain_limit is not None:
            limit.add_metric([domain.name], found.chain_limit)
    yield from (frozen, depth, limit)


def _storage_families(fleet: Fleet, tally: Tally) -> Iterator[Metric]:
    free = GaugeMetricFamily(
        "kvmsnapd_storage_free_bytes",
        "Free space of a folder of images, at the last tick. Worry when it falls.",
        labels=["storage"],
    )
    limit = GaugeMetricFamily(
        "kvmsnapd_min_free_bytes",
        "Free space of a folder of images below which a policy takes no snapshot.",
        labels=["storage"],
    )
    needed = {pair.name.key: pair.policy.min_free_bytes for pair in fleet.pairs}
    for folder, storage in tally.storages.items():
        limits = [needed[key] for key in storage.pairs if key in needed]
        if limits:
            free.add_metric([folder], storage.free_bytes)
            limit.add_metric([folder], max(limits))
    yield from (free, limit)


def _duration_families(tally: Tally) -> Iterator[Metric]:
    takes = _histogram("snapshot_duration", "Time libvirt took for one snapshot. Worry when it grows.")
    freezes = _histogram(
        "freeze_duration",
        "Time of a quiesced take: the guest's file systems stood still for no longer. Worry above a few seconds.",
    )
    deletes = _histogram("delete_duration", "Time libvirt took to delete one snapshot. Worry when it grows.")
    ends = [*map(str, BUCKETS), "+Inf"]
    for policy, found in tally.policies.items():
        for family, durations in ((takes, found.takes), (freezes, found.freezes), (deletes, found.deletes)):
            if durations:
                buckets = list(zip(ends, accumulate(durations.counts), strict=True))
                family.add_metric([policy], buckets=buckets, sum_value=durations.sum_seconds)
    yield from (takes, freezes, deletes)


def _each(fleet: Fleet, tally: Tally) -> Iterator[tuple[Pair, PairTally]]:
    return ((pair, tally.pair(pair.name.key)) for pair in fleet.pairs)


def of_pair(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
    """Return an empty family with the labels of a pair, and these."""
    return GaugeMetricFamily(f"kvmsnapd_{name}", help_text, labels=(*_PAIR, *labels))


def of_domain(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
    """Return an empty family with the label of a domain, and these."""
    return GaugeMetricFamily(f"kvmsnapd_{name}", help_text, labels=("domain", *labels))


def _of_pair_counted(name: str, help_text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"kvmsnapd_{name}", help_text, labels=(*_PAIR, *labels))


def _histogram(name: str, help_text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"kvmsnapd_{name}_seconds", help_text, labels=["policy"])
