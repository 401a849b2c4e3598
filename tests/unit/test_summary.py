"""The line that sums a run up is made of the run's own events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsnapd.events import (
    DeleteFailed,
    DomainExamined,
    HookFinished,
    PruneBlocked,
    RunFinished,
    RunSkipped,
    SnapshotDeleted,
    SnapshotDowngraded,
    SnapshotFailed,
    SnapshotTaken,
)
from kvmsnapd.model import PairName
from kvmsnapd.summary import sum_up
from tests.builders import NOW, UUID

if TYPE_CHECKING:
    from kvmsnapd.events import RunEvent

PAIR = PairName("web1", UUID, "standard")


def a_run(result: str, *events: RunEvent) -> RunFinished:
    return sum_up(RunFinished(pair=PAIR, result=result, started_at=NOW, ended_at=NOW, duration_seconds=9), events)


def deleted(name: str, seconds: float) -> SnapshotDeleted:
    return SnapshotDeleted(pair=PAIR, snapshot=name, reasons=("why",), duration_seconds=seconds)


def test_a_run_that_took_and_pruned_says_all_of_it() -> None:
    run = a_run(
        "taken",
        DomainExamined(pair=PAIR, chain_depth={"vda": 3}, free_bytes={"/images": 7}),
        HookFinished(pair=PAIR, hook="before", ok=True, detail="", output="", duration_seconds=1),
        SnapshotDowngraded(pair=PAIR, snapshot="new", error="the agent is silent"),
        SnapshotTaken(
            pair=PAIR,
            snapshot="new",
            scheduled_at=NOW,
            kind="external",
            consistency="crash",
            duration_seconds=0.5,
            excluded=("vdb",),
        ),
        deleted("old-1", 2),
        deleted("old-2", 3),
        DeleteFailed(pair=PAIR, snapshot="old-3", reason="libvirt", error="no"),
        PruneBlocked(pair=PAIR, blocked={"failed": 1, "busy": 2}, detail="why"),
    )
    assert (run.snapshot, run.kind, run.consistency, run.excluded) == ("new", "external", "crash", ("vdb",))
    assert (run.take_seconds, run.delete_seconds, run.duration_seconds) == (0.5, 5, 9)
    assert (run.deleted, run.deleted_snapshots) == (2, ("old-1", "old-2"))
    assert (run.blocked, run.waiting, run.delete_error) == (3, {"failed": 1, "busy": 2}, "no")
    assert run.downgraded == "the agent is silent"
    assert (run.hooks, run.chain_depth, run.free_bytes) == ({"before": True}, {"vda": 3}, {"/images": 7})
    assert (run.reason, run.detail) == (None, None)


def test_a_run_that_failed_or_was_refused_says_why() -> None:
    failed = a_run("failed", SnapshotFailed(pair=PAIR, snapshot="x", scheduled_at=NOW, reason="busy", error="words"))
    assert (failed.reason, failed.detail) == ("busy", "words")
    refused = a_run("skipped", RunSkipped(pair=PAIR, reason="disk", detail="words", quarantined=True))
    assert (refused.reason, refused.detail, refused.quarantined) == ("disk", "words", True)
