"""Pruning: which of the released snapshots are deleted in this run, in which order, and which have to wait.

Retention says what may go; this module says what can go safely now. Sources of the libvirt limits: measured with
libvirt 9.0 and 11.3, see :class:`kvmsnapd.model.Capabilities`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

from kvmsnapd.model import DomainState, Kind
from kvmsnapd.preflight import chain_depth, chain_limit, find_restoring, in_chain

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Deleting, Domain, Inventory, Snapshot
    from kvmsnapd.policy import Policy
    from kvmsnapd.retention import Verdict


class BlockReason(StrEnum):
    """Why a snapshot that retention releases is not deleted now. These words are metric labels."""

    FUSE = "fuse"
    BUSY = "busy"
    """Another merge goes on on the same storage."""
    SPACE = "space"
    MERGE_FAILED = "merge_failed"
    """A merge failed in this run of the guest: its QEMU must not be trusted with another one."""
    FOREIGN_CHILD = "foreign_child"
    BRANCH = "branch"
    FOREIGN_LAYER = "foreign_layer"
    NEEDS_RUNNING = "needs_running"
    LONG_PAUSE = "long_pause"
    UNSUPPORTED = "unsupported"
    CHANGED = "changed"
    """Found just before the delete: the domain is no longer as it was planned for."""
    LINKED = "linked"
    """A linked copy stands on files that the delete would change."""
    RESTORING = "restoring"
    """A restore of the domain was interrupted."""
    FAILED = "failed"
    """libvirt did not delete it or one before it; tried again after the next take."""


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
    domain: Domain,
    policy: Policy,
    capabilities: Capabilities,
    verdicts: Iterable[Verdict],
    *,
    take_first: bool = False,
    unwilling: str | None = None,
    owed: int = 0,
    fuse: bool = True,
) -> tuple[tuple[Delete, ...], tuple[Blocked, ...]]:
    """Split what the verdicts release into deletes, oldest first, and what has to wait.

    If a run releases more than ``max_deletes_per_run``, beyond what runs before it owed, nothing is deleted at all (the
    fuse): a shortened retention or a wrong clock must not empty a history at once.

    Args:
        take_first: whether a take comes before the deletes.
        owed: how many were released already when the newest snapshot was taken, and waited for something else.
        unwilling: a snapshot that libvirt failed to delete; it comes last, so that it does not hold up the others.
        fuse: False if a person has looked at the plan.
    """
    deletes: list[Delete] = []
    blocked: list[Blocked] = []
    half = [Delete(s.name, ("half deleted",)) for s in domain.half_deleted(policy.name)]
    released = [Delete(v.point.name, v.reasons) for v in verdicts if not v.keep]
    for delete in (*half, *reversed(released)):
        obstacle = find_obstacle(domain, delete.snapshot, capabilities, take_first=take_first)
        if obstacle:
            blocked.append(obstacle)
        else:
            deletes.append(delete)
    if fuse and len(deletes) > policy.max_deletes_per_run + owed:
        owing = f" and the {owed} owed" if owed else ""
        detail = (
            f"{len(deletes)} deletes at once are more than max_deletes_per_run: {policy.max_deletes_per_run}{owing}; "
            f"look at `kvmsnapd plan {domain.name}`, and if this is meant, `kvmsnapd prune {domain.name}` does it"
        )
        blocked += [Blocked(delete.snapshot, BlockReason.FUSE, detail) for delete in deletes]
        deletes = []
    deletes.sort(key=lambda delete: delete.snapshot == unwilling)
    return tuple(deletes), tuple(blocked)


def plan_room(
    domain: Domain, policy: Policy, capabilities: Capabilities, deletes: Iterable[Delete], *, now: datetime
) -> tuple[Delete, ...]:
    """Return those of the planned deletes that make room in a full backing chain before a take; none if they do not.

    As few as are needed, and never the policy's newest snapshot: the take may still fail.
    """
    limit = chain_limit(policy, capabilities)
    newest = newest_of(domain, policy, now=now)
    shortening = {s.name for s in domain.snapshots if in_chain(s)} - {newest}
    chosen = [delete for delete in deletes if delete.snapshot in shortening][: chain_depth(domain) - limit + 1]
    shortened = Counter(
        target
        for snapshot in domain.snapshots
        if snapshot.name in {delete.snapshot for delete in chosen}
        for target, _ in snapshot.overlays
    )
    enough = chain_depth(domain) - len(chosen) < limit and all(
        len(disk.backing) - shortened[disk.target] < limit for disk in domain.disks if disk.holds_state
    )
    return tuple(chosen) if enough else ()


def newest_of(inventory: Inventory, policy: Policy, *, now: datetime) -> str | None:
    """Return the name of the policy's newest snapshot that retention counts: not held, not dated in the future."""
    marks = {
        s.name: (s.mark.scheduled_at, s.mark.attempt)
        for s in inventory.of_policy(policy.name)
        if s.mark and s.mark.scheduled_at <= now and not s.mark.held(now)
    }
    return max(marks, key=marks.__getitem__, default=None)


def find_obstacle(domain: Domain, name: str, capabilities: Capabilities, *, take_first: bool = False) -> Blocked | None:
    """Return what keeps this snapshot from being deleted in the domain as it is now, None if nothing does.

    An internal snapshot is independent of all others, and so is one whose data is in files of its own. Deleting any
    other merges the overlay above it downwards, so the tree around it decides.

    Args:
        take_first: whether another snapshot will be the newest by then.
    """
    snapshot = next((s for s in domain.snapshots if s.name == name), None)
    if snapshot is None:
        return None
    restoring = find_restoring(domain)
    if restoring:
        again = f"`kvmsnapd restore {domain.name} {restoring.name}`"
        detail = f"a restore to {restoring.name} was interrupted; {again} finishes it"
        return Blocked(name, BlockReason.RESTORING, detail)
    linked = _linked_on(domain, snapshot)
    if linked:
        return Blocked(name, BlockReason.LINKED, linked)
    return _find_in_chain(domain, snapshot, capabilities, take_first=take_first) if in_chain(snapshot) else None


def _find_in_chain(
    domain: Domain, snapshot: Snapshot, capabilities: Capabilities, *, take_first: bool
) -> Blocked | None:
    """Return what keeps a snapshot from being merged into the layer below it."""
    name = snapshot.name
    if not capabilities.delete_external or snapshot.kind is Kind.MIXED:
        detail = f"libvirt {capabilities.version} cannot delete {snapshot.kind} snapshots"
        return Blocked(name, BlockReason.UNSUPPORTED, detail)
    branch = find_branch(domain)
    if branch:
        return Blocked(name, BlockReason.BRANCH, branch)
    failed = [s.name for s in domain.snapshots if s.mark and s.mark.deleting and _failed_now(domain, s.mark.deleting)]
    if failed:
        detail = (
            f"the merge of {failed[0]} failed in this run of the guest, and a power cut could lose what is merged now; "
            f"shut it down and start it again (virsh shutdown, virsh start; a reboot is not enough)"
        )
        return Blocked(name, BlockReason.MERGE_FAILED, detail)
    tree = [s for s in domain.snapshots if not (s.mark and s.mark.standalone)]
    children = [s for s in tree if s.parent == name]
    foreign = [s.name for s in children if s.mark is None]
    if foreign:
        detail = f"deleting it would merge into {foreign[0]!r}, a snapshot that kvmsnapd did not make"
        return Blocked(name, BlockReason.FOREIGN_CHILD, detail)
    layer = _foreign_layer(domain, snapshot)
    if layer:
        cause = "a backup in progress, a revert or an interrupted take"
        detail = f"its overlay carries {layer}, which belongs to no snapshot ({cause})"
        return Blocked(name, BlockReason.FOREIGN_LAYER, detail)
    if children and domain.state is DomainState.SHUT_OFF:
        if not capabilities.delete_external_in_chain_offline and not _listed(domain, snapshot):
            detail = (
                f"libvirt {capabilities.version} cannot delete it while the domain is shut off, since a snapshot was "
                "taken above it while it was; it goes when the domain runs"
            )
            return Blocked(name, BlockReason.NEEDS_RUNNING, detail)
        if not take_first and not any(s.parent == children[0].name for s in tree):
            detail = (
                "its merge would write into the newest snapshot's overlay, and so hide that the domain has not changed "
                "since; it goes after the next snapshot, or when the domain runs"
            )
            return Blocked(name, BlockReason.NEEDS_RUNNING, detail)
    return None


def _linked_on(domain: Domain, snapshot: Snapshot) -> str | None:
    """Return which linked copy stands on files that the delete of this snapshot would change, None if none does.

    A copy stands on the file that its snapshot freezes and on all layers below: to merge any of them QEMU wants to
    write to what the copy, if it runs, has open ("Failed to get "write" lock", measured with libvirt 9.0 and 11.3).
    """
    parents = {s.name: s.parent for s in domain.snapshots}
    for other in domain.snapshots:
        if other.mark is None or not other.mark.linked:
            continue
        line = {other.name}
        below = parents[other.name]
        while in_chain(other) and below and below not in line:
            line.add(below)
            below = parents.get(below)
        if snapshot is other or (snapshot.name in line and in_chain(snapshot)):
            copies = ", ".join(other.mark.linked)
            return f"the linked copy {copies} stands on {other.name}; it goes once that domain is undefined"
    return None


def _failed_now(domain: Domain, deleting: Deleting) -> bool:
    return deleting.failed_in is not None and deleting.failed_in == domain.run_id


def owes(blocked: Iterable[Blocked], before: int) -> int:
    """Return how many released snapshots the next run's fuse does not count again.

    Those that wait for something else than the fuse or the end of a pause, and of those that wait for these as many as
    were owed ``before``.
    """
    surprising = {BlockReason.FUSE, BlockReason.LONG_PAUSE}
    surprises = [wait.reason in surprising for wait in blocked]
    return surprises.count(False) + min(before, surprises.count(True))


def _listed(domain: Domain, snapshot: Snapshot) -> bool:
    """Tell whether the domain's XML names all overlays of the snapshot.

    Of a shut-off domain libvirt writes down the layers that were there when a snapshot was last taken while it ran, and
    9.0 looks for the one to delete among them alone (measured).
    """
    layers = {disk.target: (disk.path, *disk.backing) for disk in domain.disks}
    return bool(snapshot.overlays) and all(path in layers.get(target, ()) for target, path in snapshot.overlays)


def find_branch(domain: Domain) -> str | None:
    """Return where the tree of external snapshots branches, None if it is one line.

    libvirt lets one delete below a branch and then rewrites the backing file of the active branch alone, which breaks
    the other one without a word (measured, libvirt 9.0 and 11.3). So a domain with a branch is left to a person.
    """
    parents = Counter(s.parent for s in domain.snapshots if in_chain(s))
    for parent, children in parents.items():
        if children > 1:
            place = f"above {parent!r}" if parent else "at the root"
            return f"the snapshot tree branches {place}; delete one branch by hand (virsh snapshot-list --tree)"
    return None


def check_deleted(before: Domain, after: Domain, name: str) -> str | None:
    """Return what is not as it has to be after the delete of one snapshot, None if all is.

    Tree, active layers and backing chains: the snapshot and at most its own overlays are gone, nothing else is.
    """
    gone = next((s for s in before.snapshots if s.name == name), None)
    if gone is None:
        return None
    if any(s.name == name for s in after.snapshots):
        return "libvirt reported success but still lists the snapshot"
    left = {s.name: s.parent for s in after.snapshots}
    for snapshot in before.snapshots:
        parent = gone.parent if snapshot.parent == name else snapshot.parent
        # What a person deleted meanwhile, or the children of that, is not our doing.
        if snapshot.name not in left and snapshot.mark and snapshot.name != name:
            return f"snapshot {snapshot.name!r} is gone as well"
        if snapshot.name in left and (parent is None or parent in left) and left[snapshot.name] != parent:
            return f"snapshot {snapshot.name!r} has another parent than before"
    if not in_chain(gone):
        return None
    own = dict(gone.overlays)
    # A person may have deleted one of theirs at the same time.
    merged = {path for s in before.snapshots if s.name not in left for _, path in s.overlays}
    for disk in before.disks:
        now = next((d for d in after.disks if d.target == disk.target), None)
        if now is None:
            return f"disk {disk.target} is gone"
        # The XML of a shut-off domain names no backing chain.
        before_layers, layers = {disk.path, *disk.backing}, {now.path, *now.backing}
        if disk.backing and now.backing and (own.get(disk.target) in layers or before_layers - layers - merged):
            return f"disk {disk.target} now has the layers {', '.join(map(str, (now.path, *now.backing)))}"
    return None


def _foreign_layer(domain: Domain, snapshot: Snapshot) -> str | None:
    """Return the layer that stands directly on one of the snapshot's overlays without being a known overlay itself.

    Backup programs put such layers on for a while, without a record in libvirt, and copy what is below. The XML of a
    shut-off domain names the active layer only.
    """
    known = {path for other in domain.snapshots for _, path in other.overlays}
    own = {path for _, path in snapshot.overlays}
    others = (s for s in domain.snapshots if not (s.mark and s.mark.standalone))
    newest = not any(other.parent == snapshot.name for other in others)
    for disk in domain.disks:
        active = disk.path or ""
        if not disk.backing and newest and own and active not in known and disk.target in dict(snapshot.overlays):
            return active
        for above, below in pairwise((active, *disk.backing)):
            if below in own and above not in known:
                return above
    return None
