"""Pruning: which of the released snapshots are deleted in this run, in which order, and which have to wait.

Retention says what may go; this module says what can go safely now. Sources of the libvirt limits: measured with
libvirt 9.0 and 11.3, see :class:`kvmsnapd.model.Capabilities`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvmsnapd.model import DomainState, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsnapd.model import Capabilities, Domain
    from kvmsnapd.policy import Policy
    from kvmsnapd.retention import Verdict


class BlockReason(StrEnum):
    """Why a snapshot that retention releases is not deleted now. These words are metric labels."""

    FUSE = "fuse"
    FOREIGN_CHILD = "foreign_child"
    BRANCH = "branch"
    NEEDS_RUNNING = "needs_running"
    UNSUPPORTED = "unsupported"
    CHANGED = "changed"
    """Found just before the delete: the domain is no longer as it was planned for."""


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
    released = [v for v in verdicts if not v.keep]
    released.reverse()
    deletes, blocked = [], []
    for verdict in released:
        obstacle = find_obstacle(domain, verdict.point.name, capabilities)
        if obstacle:
            blocked.append(obstacle)
        else:
            deletes.append(Delete(verdict.point.name, verdict.reasons))
    if len(deletes) > policy.max_deletes_per_run:
        detail = (
            f"{len(deletes)} deletes at once are more than max_deletes_per_run: {policy.max_deletes_per_run}; "
            f"look at `kvmsnapd plan {domain.name}` and raise the limit if this is meant"
        )
        blocked += [Blocked(delete.snapshot, BlockReason.FUSE, detail) for delete in deletes]
        deletes = []
    return tuple(deletes), tuple(blocked)


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
    if children and domain.state is DomainState.SHUT_OFF and not capabilities.delete_external_in_chain_offline:
        detail = (
            f"libvirt {capabilities.version} deletes only the newest external snapshot of a shut-off domain; "
            "the others go when it runs"
        )
        return Blocked(name, BlockReason.NEEDS_RUNNING, detail)
    return None
