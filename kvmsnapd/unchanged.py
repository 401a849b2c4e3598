"""Is a shut-off domain still exactly what its newest snapshot holds? Then another one would add nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.disks import covered
from kvmsnapd.model import DomainState, Kind

if TYPE_CHECKING:
    from kvmsnapd.model import Disk, Domain, Snapshot, Storage
    from kvmsnapd.policy import Policy


_MADE_WITHIN = timedelta(seconds=5)
"""An overlay is made, and a qcow2 file written, this shortly before libvirt notes the snapshot's time, or sooner."""


def find_unchanged(domain: Domain, policy: Policy, storage: Storage) -> Snapshot | None:
    """Return the policy's newest snapshot if the disks are known not to have changed since; None in any doubt.

    Known means: the domain is and was shut off, the same disks are covered, and no layer that a snapshot since then put
    on a disk was written to after it was made. A merge into one of them looks like a change; the price is a snapshot
    more than needed.
    """
    if domain.state is not DomainState.SHUT_OFF or domain.managed_save:
        return None
    own = [(s.mark.scheduled_at, s.mark.attempt, s) for s in domain.of_policy(policy.name) if s.mark]
    newest = max(own, key=lambda entry: entry[:2], default=(None, 0, None))[2]
    if newest is None or not newest.offline or newest.kind is not policy.kind:
        return None
    if newest.mark and newest.mark.standalone:
        return None  # the state that was left by a restore, and not what the disks are now
    disks = covered(domain, policy)
    if policy.kind is Kind.INTERNAL:
        same = dict(newest.covers) == {disk.target: disk.path for disk in domain.disks if disk.path}
        untouched = all(_untouched(disk.path, newest, storage) for disk in disks)
        return newest if disks and same and untouched else None
    if not disks or {target for target, _ in newest.overlays} != {disk.target for disk in disks}:
        return None
    return newest if all(_same(domain, disk, newest, storage) for disk in disks) else None


def _same(domain: Domain, disk: Disk, newest: Snapshot, storage: Storage) -> bool:
    """Walk down from the active layer: each must be the untouched overlay of a snapshot, until that of ``newest``."""
    overlays = {path: s for s in domain.snapshots for target, path in s.overlays if target == disk.target}
    path = disk.path
    for _ in range(len(overlays)):
        snapshot = overlays.get(path or "")
        if snapshot is None or not snapshot.offline or not _untouched(path, snapshot, storage):
            return False
        if snapshot is newest:
            return True
        path = storage.layers[path or ""].backing
    return False


def _untouched(path: str | None, since: Snapshot, storage: Storage) -> bool:
    """Tell whether the file is as it was when the snapshot was made.

    Its time must be that of the snapshot, and not only older: a clock that was ahead dates snapshots into the future,
    and then changes look older than they are. libvirt tells a snapshot's time in whole seconds.
    """
    layer = storage.layers.get(path or "")
    if layer is None or layer.changed_at is None:
        return False
    return since.created_at - _MADE_WITHIN <= layer.changed_at.replace(microsecond=0) <= since.created_at
