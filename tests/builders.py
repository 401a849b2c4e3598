"""Builders with defaults, so that a test states only what it is about."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from kvmsnapd.durations import parse_duration
from kvmsnapd.model import (
    Capabilities,
    Consistency,
    Deleting,
    Disk,
    Domain,
    Hold,
    Inventory,
    Kind,
    Mark,
    Snapshot,
    Unchanged,
)
from kvmsnapd.naming import format_name
from kvmsnapd.policy import ConsistencyRule, Policy
from kvmsnapd.retention import Point, parse_keep
from kvmsnapd.schedule import parse_schedule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsnapd.retention import Verdict

UUID = "11111111-2222-3333-4444-555555555555"
OTHER_UUID = "99999999-8888-7777-6666-555555555555"
BERLIN = ZoneInfo("Europe/Berlin")
ANY_LIBVIRT = Capabilities("qemu", "11.3.0")


def at(text: str) -> datetime:
    """Return the instant that an ISO 8601 text names; UTC where it says no offset."""
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


NOW = at("2026-11-22T12:30")


def point(text: str, *, held: str | None = None) -> Point:
    """Return a restore point named as its time."""
    return Point(text, at(text), held)


def kept(verdicts: Iterable[Verdict]) -> list[str]:
    """Return the names of what stays, newest first."""
    return [verdict.point.name for verdict in verdicts if verdict.keep]


def a_policy(
    name: str = "standard",
    *,
    schedule: str = "hourly",
    keep: str = "last=3",
    timezone: str = "UTC",
    splay: str = "0s",
    max_age: str = "2h",
    **fields: Any,  # noqa: ANN401  # whatever the class takes
) -> Policy:
    """Return an hourly policy that keeps three external snapshots."""
    zone = ZoneInfo(timezone)
    values: dict[str, Any] = {
        "kind": Kind.EXTERNAL,
        "consistency": ConsistencyRule.FILESYSTEM_PREFERRED,
        "catch_up": True,
        "max_deletes_per_run": 10,
        "max_chain_depth": 16,
    }
    return Policy(
        name=name,
        schedule=parse_schedule(schedule, zone),
        keep=parse_keep(keep),
        timezone=zone,
        splay=parse_duration(splay),
        max_age=parse_duration(max_age),
        **(values | fields),
    )


def a_snapshot(
    slot: datetime | str = "2026-11-22T12:00",
    *,
    policy: str = "standard",
    parent: str | None = None,
    kind: Kind = Kind.EXTERNAL,
    taken_at: datetime | None = None,
    consistency: Consistency = Consistency.FILESYSTEM,
    attempt: int = 1,
    hold: Hold | None = None,
    unchanged: str | None = None,
    **fields: Any,  # noqa: ANN401  # whatever the class takes
) -> Snapshot:
    """Return a snapshot of ours, taken a few seconds after its slot; ``unchanged`` is a later slot, and when seen."""
    scheduled_at = at(slot) if isinstance(slot, str) else slot
    taken_at = taken_at or scheduled_at + timedelta(seconds=3)
    seen = Unchanged(at(unchanged), at(unchanged)) if unchanged else None
    mark = Mark(policy, scheduled_at, taken_at, consistency, kind, attempt, hold, unchanged=seen)
    return Snapshot(format_name(policy, scheduled_at, attempt), taken_at, kind, parent, mark, **fields)


def half_deleted(snapshot: Snapshot, *, failed_in: int | None = None) -> Snapshot:
    """Return this snapshot of ours with the note that its delete was begun, and in which run its merge failed."""
    assert snapshot.mark is not None
    return replace(snapshot, mark=replace(snapshot.mark, deleting=Deleting(NOW, failed_in)))


def a_foreign_snapshot(
    name: str = "before-upgrade", *, kind: Kind = Kind.EXTERNAL, parent: str | None = None
) -> Snapshot:
    """Return a snapshot that a person made."""
    return Snapshot(name, at("2026-11-20T08:00"), kind, parent)


def a_chain(*snapshots: Snapshot) -> tuple[Snapshot, ...]:
    """Return the snapshots as one line: each the child of the one before."""
    parents = [None, *(snapshot.name for snapshot in snapshots)]
    return tuple(replace(snapshot, parent=parent) for snapshot, parent in zip(snapshots, parents, strict=False))


def hourly_snapshots(
    count: int,
    *,
    last: str = "2026-11-22T11:00",
    **fields: Any,  # noqa: ANN401  # whatever the class takes
) -> tuple[Snapshot, ...]:
    """Return a line of snapshots of ours, one an hour, oldest first."""
    newest = at(last)
    return a_chain(*(a_snapshot(newest - timedelta(hours=count - 1 - n), **fields) for n in range(count)))


def a_disk(target: str = "vda", **fields: Any) -> Disk:  # noqa: ANN401  # whatever the class takes
    """Return a qcow2 file of the domain."""
    return Disk(target, **({"path": f"/images/web1-{target}.qcow2"} | fields))


def a_domain(
    *snapshots: Snapshot,
    name: str = "web1",
    uuid: str = UUID,
    **fields: Any,  # noqa: ANN401  # whatever the class takes
) -> Domain:
    """Return a running domain with one disk and a connected guest agent."""
    values: dict[str, Any] = {"disks": (a_disk(),), "agent_connected": True}
    return Domain(uuid, name, snapshots, **(values | fields))


def an_inventory(*snapshots: Snapshot, name: str = "web1", uuid: str = UUID) -> Inventory:
    """Return what a tick reads of a domain."""
    return Inventory(uuid, name, snapshots)
