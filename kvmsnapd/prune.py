"""Pruning: which of the released snapshots are deleted in this run, in which order, and which have to wait.

Retention says what may go; this module says what can go safely now. Sources of the libvirt limits: measured with
libvirt 9.0 and 11.3, see :class:`kvmsnapd.model.Capabilities`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

from kvmsnapd.model import DomainState, Kind
from kvmsnapd.preflight import chain_depth, chain_limit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsnapd.model import Capabilities, Domain, Inventory, Snapshot
    from kvmsnapd.policy import Policy
    from kvmsnapd.retention import Verdict


class BlockReason(StrEnum):
    """Why a snapshot that retention releases is not deleted now. These words are metric labels."""

    FUSE = "fuse"
    FOREIGN_CHILD = "foreign_child"
    BRANCH = "branch"
    FOREIGN_LAYER = "foreign_layer"
    NEEDS_RUNNING = "needs_running"
    LONG_PAUSE = "long_pause"
    UNSUPPORTED = "unsupported"
    CHANGED = "changed"
    """Found just before the delete: the domain is no longer as it was planned for."""
    FAILED = "failed"
    """libvirt did not delete it, or one before it; tried again after the next take."""


@dataclass(frozen=True, slots=True)
class Delete:
    """One snapshot to delete, with the verdict's reasons."""

    snapshot: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blocked:
    """One snapshot that retention releases but that has to wait, and what it waits for."""

    snapshot: str
    reason: BlockReason
    detail: str


def plan_deletes(
    domain: Domain, policy: Policy, capabilities: Capabilities, verdicts: Iterable[Verdict]
) -> tuple[tuple[Delete, ...], tuple[Blocked, ...]]:
    """Split what the verdicts release into deletes, oldest first, and what has to wait.

    More than ``max_deletes_per_run`` deletes are not carried out at all (the fuse): a shortened retention or a
    wrong clock must not empty a history at once.
    """
    deletes, blocked = _split(domain, capabilities, verdicts)
    if len(deletes) > policy.max_deletes_per_run:
        detail = (
            f"{len(deletes)} deletes at once are more than max_deletes_per_run: {policy.max_deletes_per_run}; "
            f"look at `kvmsnapd plan {domain.name}` and raise the limit if this is meant"
        )
        blocked += [Blocked(delete.snapshot, BlockReason.FUSE, detail) for delete in deletes]
        deletes = []
    return tuple(deletes), tuple(blocked)


def _split(
    domain: Domain, capabilities: Capabilities, verdicts: Iterable[Verdict]
) -> tuple[list[Delete], list[Blocked]]:
    """Return what retention releases, oldest first, as what can go now and what cannot."""
    deletes, blocked = [], []
    for verdict in reversed([verdict for verdict in verdicts if not verdict.keep]):
        obstacle = find_obstacle(domain, verdict.point.name, capabilities)
        if obstacle:
            blocked.append(obstacle)
        else:
            deletes.append(Delete(verdict.point.name, verdict.reasons))
    return deletes, blocked


def plan_room(
    domain: Domain, policy: Policy, capabilities: Capabilities, verdicts: Iterable[Verdict]
) -> tuple[Delete, ...]:
    """Return the deletes that make room in a full backing chain before a take, oldest first; none if they would not do.

    As few as are needed, and never the policy's newest snapshot: the take may still fail.

    Args:
        verdicts: as they will be once the take has succeeded.
    """
    needed = chain_depth(domain) - chain_limit(policy, capabilities) + 1
    deletes, _ = _split(domain, capabilities, verdicts)
    newest = newest_of(domain, policy)
    possible = [delete for delete in deletes if delete.snapshot != newest][:needed]
    return tuple(possible) if needed <= len(possible) <= policy.max_deletes_per_run else ()


def newest_of(inventory: Inventory, policy: Policy) -> str | None:
    """Return the name of the policy's newest snapshot of this domain."""
    marks = {s.name: (s.mark.scheduled_at, s.mark.attempt) for s in inventory.of_policy(policy.name) if s.mark}
    return max(marks, key=marks.__getitem__, default=None)


def find_obstacle(domain: Domain, name: str, capabilities: Capabilities) -> Blocked | None:
    """Return what keeps this snapshot from being deleted in the domain as it is now, None if nothing does.

    An internal snapshot is independent of all others. Deleting an external one merges the overlay above it
    downwards, so the tree around it decides.
    """
    snapshot = next((s for s in domain.snapshots if s.name == name), None)
    if snapshot is None or snapshot.kind is Kind.INTERNAL:
        return None
    if not capabilities.delete_external or snapshot.kind is Kind.MIXED:
        detail = f"libvirt {capabilities.version} cannot delete {snapshot.kind} snapshots"
        return Blocked(name, BlockReason.UNSUPPORTED, detail)
    children = [s for s in domain.snapshots if s.parent == name]
    if len(children) > 1:
        return Blocked(name, BlockReason.BRANCH, f"{len(children)} branches of the snapshot tree begin here")
    foreign = [s.name for s in children if s.mark is None]
    if foreign:
        detail = f"deleting it would merge into {foreign[0]!r}, a snapshot that kvmsnapd did not make"
        return Blocked(name, BlockReason.FOREIGN_CHILD, detail)
    layer = _foreign_layer(domain, snapshot)
    if layer:
        detail = f"its overlay carries {layer}, which belongs to no snapshot libvirt knows (is a backup running?)"
        return Blocked(name, BlockReason.FOREIGN_LAYER, detail)
    if children and domain.state is DomainState.SHUT_OFF and not capabilities.delete_external_in_chain_offline:
        detail = (
            f"libvirt {capabilities.version} deletes only the newest external snapshot of a shut-off domain; "
            "the others go when it runs"
        )
        return Blocked(name, BlockReason.NEEDS_RUNNING, detail)
    return None


def _foreign_layer(domain: Domain, snapshot: Snapshot) -> str | None:
    """Return the layer that stands directly on one of the snapshot's overlays without being a known overlay itself.

    Backup programs put such layers on for a while, without a record in libvirt, and copy what is below.
    """
    known = {path for other in domain.snapshots for _, path in other.overlays}
    for disk in domain.disks:
        chain = (disk.path or "", *disk.backing)
        for above, below in pairwise(chain):
            if (disk.target, below) in snapshot.overlays and above not in known:
                return above
    return None
