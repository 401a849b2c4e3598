"""What has happened, as one line for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsnapd.events import (
    DeleteFailed,
    DomainThawed,
    GuestFrozen,
    HookFinished,
    PruneBlocked,
    RunSkipped,
    SnapshotDeleted,
    SnapshotDowngraded,
    SnapshotFailed,
    SnapshotTaken,
    ThawFailed,
)

if TYPE_CHECKING:
    from kvmsnapd.events import Event


def describe_event(event: Event) -> str | None:  # noqa: C901  # a table
    """Return the line that a person at the terminal reads, None for what is of no interest there."""
    match event:
        case SnapshotTaken():
            took = f", {event.duration_seconds:.1f} s" if event.duration_seconds is not None else ""
            paused = f", the guest stood still for {event.paused_seconds:.1f} s" if event.paused_seconds else ""
            left = f", without {', '.join(event.excluded)}" if event.excluded else ""
            words = f"{event.kind}, {event.consistency}{left}{took}{paused}"
            return f"{event.pair.domain}: took {event.snapshot} ({words})"
        case SnapshotDowngraded():
            why = f"the guest agent did not freeze it: {event.error}"
            return f"{event.pair.domain}: the snapshot will be only crash-consistent, {why}"
        case SnapshotFailed():
            return f"{event.pair.domain}: {event.snapshot} was not taken: {event.error}"
        case SnapshotDeleted():
            why = ", ".join(event.reasons)
            return f"{event.pair.domain}: deleted {event.snapshot} ({why}; {event.duration_seconds:.1f} s)"
        case DeleteFailed():
            look = f"`kvmsnapd doctor` says what state {event.pair.domain} is in"
            return f"{event.pair.domain}: {event.snapshot} was not deleted: {event.error}; {look}"
        case PruneBlocked():
            return f"{event.pair.domain}: {sum(event.blocked.values())} snapshot(s) have to wait: {event.detail}"
        case RunSkipped():
            return f"{event.pair.domain}: nothing was taken: {event.detail}"
        case GuestFrozen():
            return f"{event.pair.domain}: somebody has frozen this guest, and it was left so: {event.error}"
        case HookFinished():
            return None if event.ok else f"{event.pair.domain}: the hook `{event.hook}` failed: {event.detail}"
        case DomainThawed():
            return f"{event.domain or event.domain_uuid}: thawed; an earlier call may have left it frozen"
        case ThawFailed():
            return f"{event.domain or event.domain_uuid}: may be frozen, and could not be thawed: {event.error}"
    return None
