"""The full names of all series that the daemon exports, for the tests of what is built on them."""

from __future__ import annotations

_GAUGES = """
    build_info libvirt_up config_last_reload_successful config_last_reload_success_timestamp_seconds config_stale
    scheduler_last_tick_timestamp_seconds scheduler_tick_interval_seconds clock_suspect freeze_intents
    domain_info domain_unprotected domain_missing policy_unmatched snapshots_unmanaged
    last_success_timestamp_seconds last_attempt_timestamp_seconds expected_interval_seconds max_age_seconds
    next_run_timestamp_seconds snapshots oldest_snapshot_timestamp_seconds newest_consistency
    newest_below_consistency failures_in_a_row quarantined run_stuck prune_blocked guest_frozen
    backing_chain_depth max_chain_depth storage_free_bytes min_free_bytes
"""
_COUNTERS = "snapshots_taken snapshots_unchanged snapshot_failures runs_skipped snapshots_deleted delete_failures"
_HISTOGRAMS = "snapshot_duration_seconds freeze_duration_seconds delete_duration_seconds"


def exported_series() -> set[str]:
    """Return names such as kvmsnapd_snapshots_taken_total, those of histograms with their endings."""
    return {
        *(f"kvmsnapd_{name}" for name in _GAUGES.split()),
        *(f"kvmsnapd_{name}_total" for name in _COUNTERS.split()),
        *(f"kvmsnapd_{name}_{end}" for name in _HISTOGRAMS.split() for end in ("bucket", "count", "sum")),
    }
