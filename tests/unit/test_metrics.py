"""Metrics: which series there are, from the first minute to the end of a pair."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client import generate_latest

from kvmsnapd.daemon_events import DaemonStopped
from kvmsnapd.events import (
    DeleteFailed,
    DomainExamined,
    Event,
    GuestFrozen,
    HookFinished,
    PruneBlocked,
    RunFinished,
    RunSkipped,
    RunStarted,
    RunStuck,
    SnapshotDeleted,
    SnapshotFailed,
    SnapshotTaken,
    SnapshotUnchanged,
)
from kvmsnapd.fleet import Fleet, survey
from kvmsnapd.metrics import Metrics
from kvmsnapd.model import Consistency, PairName
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.series import Observation
from kvmsnapd.tally import Tally
from tests.builders import (
    NOW,
    OTHER_UUID,
    UUID,
    a_foreign_snapshot,
    a_policy,
    a_snapshot,
    an_inventory,
    at,
    hourly_snapshots,
)

if TYPE_CHECKING:
    from kvmsnapd.model import Inventory
    from kvmsnapd.policy import Policy

PAIR = PairName("web1", UUID, "standard")
LABELS = {"domain": "web1", "policy": "standard"}
NAME = "kvmsnapd-standard-20261122T120000Z"


def a_fleet(*domains: Inventory, selectors: dict[str, tuple[Policy, ...]] | None = None) -> Fleet:
    selectors = {"web1": (a_policy(),)} if selectors is None else selectors
    return survey(["standard"], selectors, domains, now=NOW)


class Bench:
    """Metrics over an observation that a test may change."""

    def __init__(self, *domains: Inventory, selectors: dict[str, tuple[Policy, ...]] | None = None) -> None:
        self.seen = Observation(fleet=a_fleet(*domains, selectors=selectors), libvirt_up=True, last_tick_at=NOW)
        self.metrics = Metrics(lambda: self.seen)

    def feed(self, *events: Event) -> None:
        for event in events:
            self.metrics.consume(event)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"kvmsnapd_{name}", labels)

    def series(self, **labels: str) -> set[str]:
        """Return the names of all series that have these labels, without histograms."""
        return {
            sample.name.removeprefix("kvmsnapd_")
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if labels.items() <= sample.labels.items()
        }

    @property
    def text(self) -> str:
        return generate_latest(self.metrics.registry).decode()


def taken(*, consistency: str = "filesystem", pair: PairName = PAIR) -> SnapshotTaken:
    return SnapshotTaken(
        pair=pair,
        snapshot=NAME,
        scheduled_at=at("2026-11-22T12:00"),
        kind="external",
        consistency=consistency,
        duration_seconds=0.3,
    )


def deleted() -> SnapshotDeleted:
    return SnapshotDeleted(pair=PAIR, snapshot=NAME, reasons=("last=1 used up",), duration_seconds=2)


def failed(reason: str = "busy") -> SnapshotFailed:
    return SnapshotFailed(
        pair=PAIR, snapshot=NAME, scheduled_at=at("2026-11-22T12:00"), reason=reason, error="a sentence"
    )


def finished(
    result: str = "taken", *, reason: str = "busy", waiting: dict[str, int] | None = None, ended_at: datetime = NOW
) -> RunFinished:
    return RunFinished(
        pair=PAIR,
        result=result,
        reason=reason if result in {"skipped", "failed"} else None,
        started_at=ended_at,
        ended_at=ended_at,
        waiting=waiting or {},
        duration_seconds=1,
    )


def refused(reason: str = "disk", *, quarantined: bool = True, again: bool = False) -> RunSkipped:
    return RunSkipped(pair=PAIR, reason=reason, detail="a sentence", refused=True, quarantined=quarantined, again=again)


def every_event() -> list[Event]:
    return [
        RunStarted(pair=PAIR, started_at=NOW),
        taken(),
        deleted(),
        failed(),
        DeleteFailed(pair=PAIR, snapshot=NAME, reason="libvirt", error="a sentence"),
        RunSkipped(pair=PAIR, reason="locked", detail="a sentence"),
        PruneBlocked(pair=PAIR, blocked={"fuse": 11}, detail="a sentence"),
        SnapshotUnchanged(pair=PAIR, snapshot=NAME, scheduled_at=at("2026-11-22T12:00")),
        refused(),
        GuestFrozen(pair=PAIR, error="a sentence"),
        DomainExamined(pair=PAIR, chain_depth={"vda": 2, "vdb": 1}, free_bytes={"/images": 7}, chain_limit=16),
        RunStuck(pair=PAIR, after_seconds=600),
        HookFinished(pair=PAIR, hook="before", ok=False, detail="exit code 1", output="", duration_seconds=1),
    ]


# State


def test_a_pair_has_its_series_and_its_limit_before_its_first_success() -> None:
    bench = Bench(an_inventory())
    assert bench.series(**LABELS) == {
        "expected_interval_seconds",
        "failures_in_a_row",
        "max_age_seconds",
        "newest_below_consistency",
        "next_run_timestamp_seconds",
        "snapshots",
        "snapshots_deleted_total",
        "snapshots_taken_total",
        "snapshots_unchanged_total",
    }
    assert bench.value("max_age_seconds", **LABELS) == 7200
    assert bench.value("expected_interval_seconds", **LABELS) == 3600
    assert bench.value("snapshots", **LABELS) == 0
    assert bench.value("snapshots_deleted_total", **LABELS) == 0
    assert bench.value("snapshots_unchanged_total", **LABELS) == 0
    assert bench.value("snapshots_taken_total", **LABELS, consistency="filesystem") == 0
    assert bench.value("failures_in_a_row", **LABELS, reason="") == 0


def test_a_snapshot_that_was_seen_unchanged_is_a_success_of_that_time() -> None:
    bench = Bench(an_inventory(a_snapshot("2026-11-20T11:00", unchanged="2026-11-22T12:00")))
    assert bench.value("last_success_timestamp_seconds", **LABELS) == at("2026-11-22T12:00").timestamp()
    assert bench.value("oldest_snapshot_timestamp_seconds", **LABELS) == at("2026-11-20T11:00").timestamp()


def test_the_last_success_is_rebuilt_from_libvirt() -> None:
    bench = Bench(an_inventory(*hourly_snapshots(3), a_foreign_snapshot()))
    assert bench.value("last_success_timestamp_seconds", **LABELS) == at("2026-11-22T11:00:03").timestamp()
    assert bench.value("oldest_snapshot_timestamp_seconds", **LABELS) == at("2026-11-22T09:00").timestamp()
    assert bench.value("snapshots", **LABELS) == 3


def test_the_next_run_is_in_the_past_while_one_is_overdue() -> None:
    overdue, done = Bench(an_inventory()), Bench(an_inventory(a_snapshot("2026-11-22T12:00")))
    assert overdue.value("next_run_timestamp_seconds", **LABELS) == at("2026-11-22T12:00").timestamp()
    assert done.value("next_run_timestamp_seconds", **LABELS) == at("2026-11-22T13:00").timestamp()


def test_the_last_attempt_is_there_once_one_was_made() -> None:
    bench = Bench(an_inventory())
    assert bench.value("last_attempt_timestamp_seconds", **LABELS) is None
    bench.feed(RunStarted(pair=PAIR, started_at=NOW))
    assert bench.value("last_attempt_timestamp_seconds", **LABELS) == NOW.timestamp()


def test_after_a_restart_the_last_attempt_is_at_least_that_of_the_newest_snapshot() -> None:
    bench = Bench(an_inventory(*hourly_snapshots(1)))
    assert bench.value("last_attempt_timestamp_seconds", **LABELS) == at("2026-11-22T11:00:03").timestamp()
    bench.feed(RunStarted(pair=PAIR, started_at=at("2026-11-22T10:00")))
    assert bench.value("last_attempt_timestamp_seconds", **LABELS) == at("2026-11-22T11:00:03").timestamp()


def test_every_domain_has_its_uuid_protected_or_not() -> None:
    bench = Bench(an_inventory(), an_inventory(name="lost", uuid=OTHER_UUID))
    assert bench.value("domain_info", domain="web1", uuid=UUID) == 1
    assert bench.value("domain_info", domain="lost", uuid=OTHER_UUID) == 1


@pytest.mark.parametrize(
    ("rule", "better", "worse"),
    [
        (ConsistencyRule.FILESYSTEM, ["filesystem", "offline", "memory"], ["crash"]),
        (ConsistencyRule.FILESYSTEM_PREFERRED, ["filesystem", "offline", "memory"], ["crash"]),
        (ConsistencyRule.MEMORY, ["memory", "offline"], ["filesystem", "crash"]),
        (ConsistencyRule.CRASH, ["crash", "filesystem", "offline", "memory"], []),
    ],
)
def test_a_newest_snapshot_worse_than_the_policy_asks_is_seen(
    rule: ConsistencyRule, better: list[str], worse: list[str]
) -> None:
    for word in better + worse:
        snapshot = a_snapshot(consistency=Consistency(word))
        bench = Bench(an_inventory(snapshot), selectors={"web1": (a_policy(consistency=rule),)})
        assert bench.value("newest_below_consistency", **LABELS, required=rule) == (word in worse)
        assert bench.value("newest_consistency", **LABELS, consistency=word) == 1


def test_before_the_first_snapshot_none_is_worse_than_asked() -> None:
    bench = Bench(an_inventory())
    assert bench.value("newest_below_consistency", **LABELS, required="filesystem-preferred") == 0


def test_a_daemon_that_has_seen_nothing_yet_says_so() -> None:
    metrics = Metrics(Observation)
    value = metrics.registry.get_sample_value
    assert value("kvmsnapd_libvirt_up") == 0
    assert value("kvmsnapd_scheduler_last_tick_timestamp_seconds") == 0
    assert value("kvmsnapd_config_last_reload_successful") == 1


def test_while_libvirt_is_away_the_series_of_pairs_stay() -> None:
    bench = Bench(an_inventory(*hourly_snapshots(1)))
    before = bench.series(**LABELS)
    bench.seen = Observation(fleet=bench.seen.fleet, libvirt_up=False)
    assert bench.value("libvirt_up") == 0
    assert bench.series(**LABELS) == before


def test_a_refused_configuration_is_seen() -> None:
    bench = Bench()
    bench.seen = Observation(config_ok=False, config_loaded_at=NOW)
    assert bench.value("config_last_reload_successful") == 0
    assert bench.value("config_last_reload_success_timestamp_seconds") == NOW.timestamp()


def test_a_domain_is_unprotected_unless_somebody_said_so() -> None:
    selectors = {"web1": (a_policy(),), "scratch": (), "a*": (a_policy(),), "*b": ()}
    domains = [an_inventory(name=name) for name in ("web1", "scratch", "lost", "ab")]
    bench = Bench(*domains, selectors=selectors)
    values = {domain.name: bench.value("domain_unprotected", domain=domain.name) for domain in domains}
    assert values == {"web1": 0, "scratch": 0, "lost": 1, "ab": 1}


def test_a_configured_domain_that_libvirt_does_not_have_is_missing() -> None:
    assert Bench().value("domain_missing", domain="web1") == 1
    assert Bench(an_inventory()).value("domain_missing", domain="web1") is None


def test_a_policy_that_no_domain_has_is_unmatched() -> None:
    assert Bench(selectors={}).value("policy_unmatched", policy="standard") == 1
    assert Bench(an_inventory()).value("policy_unmatched", policy="standard") == 0


def test_snapshots_of_a_policy_that_no_longer_applies_are_unmanaged() -> None:
    bench = Bench(an_inventory(a_snapshot(policy="dropped"), a_foreign_snapshot(), a_snapshot()))
    assert bench.value("snapshots_unmanaged", domain="web1") == 1
    assert Bench(an_inventory(a_snapshot())).value("snapshots_unmanaged", domain="web1") is None


# Counters


def test_events_are_counted_with_their_bounded_words() -> None:
    bench = Bench(an_inventory())
    bench.feed(taken(), taken(), taken(consistency="crash"), failed("busy"), *every_event())
    assert bench.value("snapshots_taken_total", **LABELS, consistency="filesystem") == 3
    assert bench.value("snapshots_taken_total", **LABELS, consistency="crash") == 1
    assert bench.value("snapshot_failures_total", **LABELS, reason="busy") == 2
    assert bench.value("delete_failures_total", **LABELS, reason="libvirt") == 1
    assert bench.value("runs_skipped_total", **LABELS, reason="locked") == 1
    assert bench.value("snapshots_deleted_total", **LABELS) == 1


def test_durations_are_counted_per_policy() -> None:
    bench = Bench(an_inventory())
    bench.feed(taken(), deleted())
    assert bench.value("snapshot_duration_seconds_sum", policy="standard") == 0.3
    assert bench.value("delete_duration_seconds_count", policy="standard") == 1


def test_an_event_of_no_run_is_ignored() -> None:
    bench = Bench()
    before = bench.text
    bench.feed(DaemonStopped(unfinished=()))
    assert bench.text == before


def test_what_waits_to_be_deleted_is_set_by_reason() -> None:
    bench = Bench(an_inventory())
    bench.feed(PruneBlocked(pair=PAIR, blocked={"fuse": 11, "branch": 1}, detail="why"))
    assert bench.value("prune_blocked", **LABELS, reason="fuse") == 11
    assert bench.value("prune_blocked", **LABELS, reason="branch") == 1


def test_a_reason_that_is_gone_is_not_left_behind() -> None:
    bench = Bench(an_inventory())
    bench.feed(PruneBlocked(pair=PAIR, blocked={"fuse": 11, "branch": 1}, detail="why"))
    bench.feed(PruneBlocked(pair=PAIR, blocked={"branch": 2}, detail="why"), finished(waiting={"branch": 2}))
    assert bench.value("prune_blocked", **LABELS, reason="fuse") is None
    assert bench.value("prune_blocked", **LABELS, reason="branch") == 2


def test_nothing_waits_any_more_after_a_run_that_blocked_nothing() -> None:
    bench = Bench(an_inventory())
    bench.feed(PruneBlocked(pair=PAIR, blocked={"fuse": 11}, detail="why"), finished())
    assert "prune_blocked" not in bench.series(**LABELS)


@pytest.mark.parametrize("result", ["nothing_due", "skipped", "failed"])
def test_a_run_that_did_not_prune_says_nothing_about_what_waits(result: str) -> None:
    bench = Bench(an_inventory())
    bench.feed(PruneBlocked(pair=PAIR, blocked={"fuse": 11}, detail="why"), finished(result))
    assert bench.value("prune_blocked", **LABELS, reason="fuse") == 11


def test_what_waits_elsewhere_is_left_alone() -> None:
    other = PairName("db01", OTHER_UUID, "standard")
    domains = an_inventory(), an_inventory(name="db01", uuid=OTHER_UUID)
    bench = Bench(*domains, selectors={"web1": (a_policy(),), "db01": (a_policy(),)})
    bench.feed(PruneBlocked(pair=other, blocked={"fuse": 11}, detail="why"), finished())
    assert bench.value("prune_blocked", domain="db01", policy="standard", reason="fuse") == 11


# What the last run found


def test_runs_that_needed_no_snapshot_are_counted() -> None:
    bench = Bench(an_inventory())
    bench.feed(*[SnapshotUnchanged(pair=PAIR, snapshot=NAME, scheduled_at=NOW)] * 3)
    assert bench.value("snapshots_unchanged_total", **LABELS) == 3
    assert bench.value("snapshot_duration_seconds_count", policy="standard") is None


def test_only_a_take_that_froze_the_guest_counts_as_a_freeze() -> None:
    bench = Bench(an_inventory())
    bench.feed(taken(consistency="crash"), taken(consistency="memory"), taken(consistency="offline"))
    assert bench.value("freeze_duration_seconds_count", policy="standard") is None
    bench.feed(taken())
    assert bench.value("freeze_duration_seconds_count", policy="standard") == 1
    assert bench.value("freeze_duration_seconds_sum", policy="standard") == 0.3
    assert bench.value("snapshot_duration_seconds_count", policy="standard") == 4


def test_a_quarantine_is_there_from_its_first_run_with_its_reason_and_changes_with_it() -> None:
    bench = Bench(an_inventory())
    bench.feed(refused("disk"), finished("skipped"), refused("disk", again=True), finished("skipped"))
    assert bench.value("quarantined", **LABELS, reason="disk") == 1
    assert bench.value("runs_skipped_total", **LABELS, reason="disk") == 2
    bench.feed(refused("transient"), finished("skipped"))
    assert bench.value("quarantined", **LABELS, reason="disk") is None
    assert bench.value("quarantined", **LABELS, reason="transient") == 1


@pytest.mark.parametrize("reason", ["misfire", "locked", "connection", "unforeseen"])
def test_a_quarantine_lasts_through_runs_that_could_not_look(reason: str) -> None:
    bench = Bench(an_inventory())
    bench.feed(refused(), finished("skipped"), finished("nothing_due"))
    bench.feed(RunSkipped(pair=PAIR, reason=reason, detail="a sentence"), finished("skipped", reason=reason))
    assert bench.value("quarantined", **LABELS, reason="disk") == 1


@pytest.mark.parametrize("result", ["failed", "skipped", "nothing_due"])
def test_what_keeps_a_domain_from_being_pruned_lasts_until_a_run_has_pruned(result: str) -> None:
    bench = Bench(an_inventory())
    blocked = PruneBlocked(pair=PAIR, blocked={"branch": 2}, detail="a sentence")
    bench.feed(blocked, finished(waiting={"branch": 2}), finished(result))
    assert bench.value("quarantined", **LABELS, reason="branch") == 1
    bench.feed(blocked, refused("space", quarantined=False), finished("skipped", waiting={"branch": 2}))
    assert bench.value("quarantined", **LABELS, reason="branch") == 1
    bench.feed(finished("taken"))
    assert "quarantined" not in bench.series(**LABELS)


@pytest.mark.parametrize("result", ["taken", "unchanged"])
def test_a_quarantine_ends_with_a_snapshot(result: str) -> None:
    bench = Bench(an_inventory())
    bench.feed(refused(), finished("skipped"), finished(result))
    assert "quarantined" not in bench.series(**LABELS)


def test_a_quarantine_ends_where_the_reason_heals() -> None:
    bench = Bench(an_inventory())
    bench.feed(refused(), refused("space", quarantined=False))
    assert "quarantined" not in bench.series(**LABELS)


def test_a_quarantine_ends_when_a_snapshot_was_tried_again() -> None:
    bench = Bench(an_inventory())
    bench.feed(refused(), finished("skipped"), failed(), finished("failed"))
    assert "quarantined" not in bench.series(**LABELS)


def test_a_guest_that_somebody_froze_is_seen_until_one_of_our_freezes_succeeds() -> None:
    bench = Bench(an_inventory())
    bench.feed(GuestFrozen(pair=PAIR, error="a sentence"), taken(consistency="crash"), finished())
    assert bench.value("guest_frozen", domain="web1") == 1
    bench.feed(taken())
    assert bench.value("guest_frozen", domain="web1") == 0


def test_a_guest_that_was_shut_off_is_not_frozen_any_more() -> None:
    bench = Bench(an_inventory())
    bench.feed(GuestFrozen(pair=PAIR, error="a sentence"), taken(consistency="offline"), finished())
    assert bench.value("guest_frozen", domain="web1") == 0


def test_the_depth_of_each_chain_is_that_of_the_last_run_and_gone_disks_go() -> None:
    bench = Bench(an_inventory())
    bench.feed(DomainExamined(pair=PAIR, chain_depth={"vda": 2, "vdb": 1}, free_bytes={}))
    bench.feed(DomainExamined(pair=PAIR, chain_depth={"vda": 3}, free_bytes={}))
    assert bench.value("backing_chain_depth", domain="web1", target="vda") == 3
    assert bench.value("backing_chain_depth", domain="web1", target="vdb") is None


def test_free_space_is_told_by_folder_and_what_cannot_be_told_stays_as_it_was() -> None:
    bench = Bench(an_inventory())
    both = "/a", "/b"
    bench.feed(DomainExamined(pair=PAIR, chain_depth={}, free_bytes={"/a": 10, "/b": 20}, folders=both))
    bench.feed(DomainExamined(pair=PAIR, chain_depth={}, free_bytes={"/a": 5}, folders=both))
    assert bench.value("storage_free_bytes", storage="/a") == 5
    assert bench.value("storage_free_bytes", storage="/b") == 20


def test_a_folder_that_the_policy_has_left_goes() -> None:
    bench = Bench(an_inventory())
    bench.feed(DomainExamined(pair=PAIR, chain_depth={}, free_bytes={"/old": 10}, folders=("/old",)))
    bench.feed(DomainExamined(pair=PAIR, chain_depth={}, free_bytes={"/new": 20}, folders=("/new",)))
    assert bench.value("storage_free_bytes", storage="/old") is None
    assert bench.value("storage_free_bytes", storage="/new") == 20


def test_the_space_of_a_folder_that_no_domain_uses_any_more_goes() -> None:
    bench = Bench(an_inventory())
    bench.feed(DomainExamined(pair=PAIR, chain_depth={}, free_bytes={"/a": 10}))
    bench.metrics.take_over(Fleet(NOW))
    assert bench.value("storage_free_bytes", storage="/a") is None
    assert bench.metrics.tally.storages == {}


def test_a_folder_has_the_strictest_limit_of_the_policies_that_use_it() -> None:
    policies = a_policy(min_free_bytes=10), a_policy("other", min_free_bytes=20)
    bench = Bench(an_inventory(), selectors={"web1": policies})
    for policy in policies:
        pair = replace(PAIR, policy=policy.name)
        bench.feed(DomainExamined(pair=pair, chain_depth={}, free_bytes={"/a": 100}))
    assert bench.value("min_free_bytes", storage="/a") == 20
    bench.metrics.take_over(a_fleet(an_inventory(), selectors={"web1": policies[:1]}))
    assert bench.value("min_free_bytes", storage="/a") == 10


def test_free_space_is_fresh_between_runs_for_the_folders_that_runs_have_named() -> None:
    bench = Bench(an_inventory())
    bench.feed(DomainExamined(pair=PAIR, chain_depth={}, free_bytes={"/a": 100}))
    bench.metrics.sample({"/a": 50, "/b": 1})
    assert bench.value("storage_free_bytes", storage="/a") == 50
    assert bench.value("storage_free_bytes", storage="/b") is None


# Failures in a row


def test_runs_that_fail_or_are_refused_are_counted_until_one_does_well() -> None:
    bench = Bench(an_inventory())
    later = NOW + timedelta(minutes=1)
    bench.feed(finished("failed", reason="busy"), finished("skipped", reason="agent", ended_at=later))
    assert bench.value("failures_in_a_row", **LABELS, reason="agent") == 2
    assert bench.value("failing_since_timestamp_seconds", **LABELS) == NOW.timestamp()
    assert bench.value("failures_in_a_row", **LABELS, reason="busy") is None
    bench.feed(finished("taken"))
    assert bench.value("failures_in_a_row", **LABELS, reason="") == 0
    assert bench.value("failing_since_timestamp_seconds", **LABELS) is None


def test_a_run_that_found_nothing_due_neither_ends_a_row_of_failures_nor_is_one() -> None:
    bench = Bench(an_inventory())
    bench.feed(finished("failed"), finished("nothing_due"))
    assert bench.value("failures_in_a_row", **LABELS, reason="busy") == 1


def test_a_snapshot_that_somebody_else_has_taken_since_ends_a_row_of_failures() -> None:
    fleet = a_fleet(an_inventory(a_snapshot("2026-11-22T12:00")))
    bench = Bench(an_inventory(a_snapshot("2026-11-22T12:00")))
    bench.feed(*[finished("failed", ended_at=at("2026-11-22T11:00"))] * 30)
    bench.metrics.take_over(fleet)
    assert bench.value("failures_in_a_row", **LABELS, reason="") == 0
    bench.feed(finished("failed", ended_at=at("2026-11-22T12:15")))
    bench.metrics.take_over(fleet)
    assert bench.value("failures_in_a_row", **LABELS, reason="busy") == 1


def test_a_take_that_was_said_to_fail_and_did_not_ends_the_row_as_well() -> None:
    taken_at = at("2026-11-22T12:00:03")
    snapshot = a_snapshot("2026-11-22T12:00", taken_at=taken_at)
    bench = Bench(an_inventory(snapshot))
    bench.feed(finished("failed", ended_at=taken_at.replace(microsecond=700_000)))
    bench.metrics.take_over(a_fleet(an_inventory(snapshot)))
    assert bench.value("failures_in_a_row", **LABELS, reason="") == 0


def test_when_what_applies_to_a_pair_changes_its_failures_are_counted_anew() -> None:
    bench = Bench(an_inventory())
    bench.feed(finished("failed"), finished("failed"))
    bench.metrics.forget_failures([PAIR.key])
    assert bench.value("failures_in_a_row", **LABELS, reason="") == 0


# The end of a pair


def test_when_one_policy_of_a_domain_goes_what_is_known_of_the_domain_stays() -> None:
    bench = Bench(an_inventory())
    bench.feed(*every_event())
    bench.metrics.take_over(a_fleet(an_inventory(), selectors={"web1": (a_policy("other"),)}))
    assert bench.value("backing_chain_depth", domain="web1", target="vda") == 2
    assert bench.value("guest_frozen", domain="web1") == 1
    assert "quarantined" not in bench.series(**LABELS)


def test_when_a_pair_goes_all_its_series_go() -> None:
    bench = Bench(an_inventory(*hourly_snapshots(2)))
    bench.feed(*every_event())
    bench.seen = Observation(fleet=Fleet(NOW))
    assert bench.series(domain="web1") == set()
    bench.metrics.take_over(bench.seen.fleet or Fleet(NOW))
    assert bench.metrics.tally == Tally()


def test_when_a_pair_goes_the_others_stay() -> None:
    bench = Bench(an_inventory())
    bench.feed(*every_event())
    bench.metrics.take_over(a_fleet(an_inventory()))
    assert bench.value("snapshots_taken_total", **LABELS, consistency="filesystem") == 1


def test_a_run_that_ends_after_its_pair_is_gone_leaves_no_series() -> None:
    bench = Bench(an_inventory())
    bench.metrics.take_over(Fleet(NOW))
    bench.seen = Observation(fleet=Fleet(NOW))
    bench.feed(*every_event())
    assert bench.series(domain="web1") == set()


def test_a_renamed_domain_keeps_what_is_known_of_it_under_its_new_name() -> None:
    bench = Bench(an_inventory())
    bench.feed(*every_event())
    bench.seen = Observation(fleet=a_fleet(an_inventory(name="web2"), selectors={"web2": (a_policy(),)}))
    assert bench.series(domain="web1") == set()
    labels = {"domain": "web2", "policy": "standard"}
    assert bench.value("snapshots_taken_total", **labels, consistency="filesystem") == 1
    assert bench.value("guest_frozen", domain="web2") == 1


# The form


@pytest.fixture
def full() -> Bench:
    """Provide metrics with every series there is."""
    domains = [
        an_inventory(*hourly_snapshots(2), a_snapshot(policy="dropped")),
        an_inventory(name="lost", uuid=OTHER_UUID),
    ]
    bench = Bench(*domains, selectors={"web1": (a_policy(),), "gone": ()})
    bench.seen = Observation(
        fleet=bench.seen.fleet, libvirt_up=True, last_tick_at=NOW, config_loaded_at=NOW, tick=timedelta(seconds=30)
    )
    bench.feed(*every_event())
    return bench


def test_names_are_as_prometheus_wants_them(full: Bench) -> None:
    for family in full.metrics.registry.collect():
        assert re.fullmatch(r"kvmsnapd(_[a-z]+)+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}
        else:
            assert not family.name.endswith(("_total", "_count")), family.name
        if family.type == "histogram":
            assert family.name.endswith("_duration_seconds")
        assert not re.search(r"_(ms|minutes|hours|days|milliseconds)$", family.name)
        if "timestamp" in family.name:
            assert family.name.endswith("_timestamp_seconds")


def test_labels_are_of_bounded_sets_and_never_name_a_snapshot(full: Bench) -> None:
    allowed = {"domain", "policy", "reason", "consistency", "required", "target", "storage", "uuid", "version", "le"}
    labels = {label for family in full.metrics.registry.collect() for s in family.samples for label in s.labels}
    assert labels <= allowed
    assert NAME not in full.text


def test_no_series_of_creation_times_is_exported(full: Bench) -> None:
    assert "_created" not in full.text


def test_every_family_comes_once(full: Bench) -> None:
    names = [line.split()[2] for line in full.text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 20


def test_a_strange_domain_name_is_escaped() -> None:
    name = 'we"b\\1\n'
    bench = Bench(an_inventory(name=name), selectors={"*": (a_policy(),)})
    assert 'domain="we\\"b\\\\1\\n"' in bench.text


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_complain_of(full: Bench) -> None:
    promtool = Path(os.environ.get("LAB_UNPACKED", "/nowhere"), "prometheus/usr/bin/promtool")
    if not promtool.exists():
        if os.environ.get("CI"):
            pytest.fail("promtool is not there; ./dev test unpacks it")
        pytest.skip("promtool is not there; ./dev test unpacks it")
    answer = subprocess.run(
        [promtool, "check", "metrics"], input=full.text, capture_output=True, text=True, check=False, timeout=60
    )
    assert (answer.returncode, answer.stdout + answer.stderr) == (0, "")


@pytest.mark.parametrize("reason", ["branch", "foreign_layer"])
def test_what_keeps_a_domain_from_being_pruned_for_good_is_a_quarantine_too(reason: str) -> None:
    bench = Bench(an_inventory())
    bench.feed(
        PruneBlocked(pair=PAIR, blocked={reason: 2, "needs_running": 1}, detail="a sentence"),
        finished(waiting={reason: 2, "needs_running": 1}),
    )
    assert bench.value("quarantined", **LABELS, reason=reason) == 1
    bench.feed(taken(), finished())
    assert "quarantined" not in bench.series(**LABELS)
