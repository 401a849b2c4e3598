"""One run in one line, from the events that it published: so the line and the counters cannot disagree."""

from __future__ import annotations

from dataclasses import replace
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

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsnapd.events import RunEvent


def sum_up(run: RunFinished, events: Iterable[RunEvent]) -> RunFinished:
    """Return the end of a run with all that its events said, in the order they came."""
    for event in events:
        run = _with(run, event)
    return run


def _with(run: RunFinished, event: RunEvent) -> RunFinished:
    match event:
        case SnapshotTaken():
            return replace(
                run,
                snapshot=event.snapshot,
                kind=event.kind,
                consistency=event.consistency,
                frozen=event.frozen,
                excluded=event.excluded,
                paused_seconds=event.paused_seconds,
                take_seconds=event.duration_seconds,
            )
        case SnapshotDowngraded():
            return replace(run, downgraded=event.error)
        case SnapshotFailed():
            return replace(run, reason=event.reason, detail=event.error)
        case RunSkipped():
            return replace(run, reason=event.reason, detail=event.detail, quarantined=event.quarantined)
        case SnapshotDeleted():
            return replace(
                run,
                deleted=run.deleted + 1,
                deleted_snapshots=(*run.deleted_snapshots, event.snapshot),
                delete_seconds=run.delete_seconds + event.duration_seconds,
            )
        case DeleteFailed():
            return replace(run, delete_error=event.error)
        case PruneBlocked():
            return replace(run, waiting=event.blocked, blocked=sum(event.blocked.values()))
        case HookFinished():
            return replace(run, hooks={**run.hooks, event.hook: event.ok})
        case DomainExamined():
            return replace(run, chain_depth=event.chain_depth, free_bytes=event.free_bytes)
    return run
