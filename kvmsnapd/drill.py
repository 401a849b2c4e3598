"""Restore drills: which pairs are due for one, and what keeps a snapshot from being tried; all from values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsnapd.copies import plan_copy
from kvmsnapd.naming import DRILL_NAME
from kvmsnapd.schedule import decide_due

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from kvmsnapd.copies import CopyPlan
    from kvmsnapd.fleet import Pair
    from kvmsnapd.model import Domain, Drill, Snapshot


def drill_of(pair: Pair) -> Drill | None:
    """Return what the pair's last drill came to, None before the first."""
    drills = [s.mark.drill for s in pair.snapshots if s.mark and s.mark.drill]
    return max(drills, key=lambda drill: drill.ended_at, default=None)


def due_drills(pairs: Iterable[Pair], *, now: datetime) -> list[Pair]:
    """Return the pairs whose newest snapshot is to be tried now, the one that waits longest first.

    State-derived, as takes are: a drill is due when none has ended since the latest slot of its schedule.
    """
    due = []
    for pair in pairs:
        schedule, last = pair.policy.drill.schedule, drill_of(pair)
        if schedule is None or pair.newest is None:
            continue
        done = [last.ended_at] if last else []
        splay = pair.policy.splay_of(pair.name.domain_uuid)
        slot = decide_due(schedule, done, now=now, splay=splay, catch_up=True).slot
        if slot:
            due.append((slot, pair.name.key, pair))
    return [pair for _, _, pair in sorted(due, key=lambda entry: entry[:2])]


def plan_drill(domain: Domain, snapshot: Snapshot, uuid: str) -> CopyPlan | str:
    """Return the overlays that a throw-away domain of this UUID boots from, or why there can be none."""
    return plan_copy(domain, snapshot, name=f"{DRILL_NAME}{uuid[:8]}")
