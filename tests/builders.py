"""Values with defaults, for tests that care about one thing of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from kvmsnapd.model import Consistency, Kind, Mark, Snapshot
from kvmsnapd.naming import format_name
from kvmsnapd.policy import ConsistencyRule, Policy
from kvmsnapd.retention import parse_keep
from kvmsnapd.schedule import parse_schedule

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def a_policy(name: str = "standard", *, schedule: str = "hourly", keep: str = "last=3", **changes: object) -> Policy:
    """Return an external hourly policy without splay, changed as asked."""
    zone = ZoneInfo("UTC")
    policy = Policy(
        name=name,
        schedule=parse_schedule(schedule, zone),
        keep=parse_keep(keep),
        timezone=zone,
        kind=Kind.EXTERNAL,
        consistency=ConsistencyRule.FILESYSTEM_PREFERRED,
        catch_up=True,
        splay=timedelta(0),
        max_age=timedelta(hours=2),
        max_deletes_per_run=10,
        max_chain_depth=16,
    )
    return replace(policy, **changes)  # type: ignore[arg-type]


def a_snapshot(
    slot: datetime, *, policy: str = "standard", parent: str | None = None, kind: Kind = Kind.EXTERNAL, attempt: int = 1
) -> Snapshot:
    """Return a snapshot of ours for this slot, taken in the slot's second."""
    mark = Mark(policy, slot, slot, Consistency.FILESYSTEM, kind, attempt)
    return Snapshot(format_name(policy, slot, attempt), slot, kind, parent, mark)


def a_chain(*slots: datetime, policy: str = "standard", kind: Kind = Kind.EXTERNAL) -> tuple[Snapshot, ...]:
    """Return snapshots of ours for these slots, each the parent of the next."""
    chain: list[Snapshot] = []
    for slot in slots:
        chain.append(a_snapshot(slot, policy=policy, kind=kind, parent=chain[-1].name if chain else None))
    return tuple(chain)
