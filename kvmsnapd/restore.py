"""Going back to a snapshot in place: what that loses and keeps, and the files that it takes; all from values.

An external snapshot is gone back to along one line: new overlays on the files that it froze, the newer snapshots gone.
libvirt's own revert does not exist before 9.9 and leaves a branch after it, which cannot be pruned (measured, 9.0 and
11.3). The present state is kept as a snapshot whose data stands alone, so that nothing ever branches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.disks import file_stem
from kvmsnapd.model import Consistency, DomainState, Hold, Kind, Mark, TakeRequest
from kvmsnapd.naming import format_name
from kvmsnapd.preflight import find_restoring

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from kvmsnapd.model import Domain, Snapshot, Storage

_OVERLAY_ATTEMPT = 2
"""Files of the new line are named as those of a second attempt at the kept state's slot: ours, and nobody else's."""

_WHOLE_SECONDS = timedelta(seconds=1)
"""Our own times have no fractions, those of files have."""


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What going back to ``target`` means for the domain as it is now.

    ``keep`` is the snapshot that the present state becomes, None if it is to be given up or if the domain has gone
    back already; ``overlays`` are, by disk target, the files that receive the writes afterwards; ``lost`` are the
    snapshots that go, leaf first; ``leaves`` the files that are of no use then; ``others`` the disks that stay as they
    are.
    """

    target: Snapshot
    mark: Mark
    begun_at: datetime
    keep: TakeRequest | None = None
    overlays: tuple[tuple[str, str], ...] = ()
    lost: tuple[Snapshot, ...] = ()
    leaves: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    """Files that nobody made for a snapshot and that the domain no longer uses then; they stay."""
    kept: str | None = None
    """The present state as an earlier call, which was cut off, has kept it."""
    switched: bool = False
    """Whether the domain stands on the snapshot's data already: the rest is tidying up."""
    resumed: bool = False
    """Whether an earlier restore to it was cut off."""

    @property
    def copies(self) -> dict[str, str]:
        """By disk target, the stand-alone files of the state that is kept; none for an internal snapshot."""
        return dict(self.keep.overlays) if self.keep else {}


def plan_restore(
    domain: Domain, target: Snapshot, *, now: datetime, discard: bool = False, storage: Storage | None = None
) -> RestorePlan | str:
    """Return the plan for going back to this snapshot now, or why it cannot be, with what to do about it.

    Args:
        discard: the present state is given up.
        storage: when the active layers were last written to; without it a state that an earlier restore kept, and
            after which that was cut off, is not trusted to be the present one.
    """
    problem = _in_the_way(domain, target)
    mark = target.mark
    if problem or mark is None:
        return problem or ""
    now = _free_instant(domain, mark, now.replace(microsecond=0))
    if target.kind is Kind.INTERNAL:
        keep = None if discard else _keep_inside(domain, target, mark, now)
        return RestorePlan(target, mark, now, keep, resumed=mark.restoring is not None)
    return _plan_external(domain, target, mark, now=now, discard=discard, storage=storage)


def _plan_external(
    domain: Domain, target: Snapshot, mark: Mark, *, now: datetime, discard: bool, storage: Storage | None
) -> RestorePlan:
    before, begun_at = mark.restoring, now
    lost = tuple(_leaf_first(domain, target))
    leaves = {path for s in lost for path in s.files} | {path for _, path in target.overlays}
    if before:
        leaves |= set(before.leaves)
        if _stands_on(domain, target, mark, before.begun_at) or _unwritten(domain, target, before.begun_at, storage):
            begun_at = before.begun_at
        else:  # the guest ran again: what was copied is not the present state
            leaves |= set(_all_files(domain, target, mark, before.begun_at))
    switched = _stands_on(domain, target, mark, begun_at)
    standalone = [s for s in domain.snapshots if s.mark and s.mark.standalone]
    kept = next((s.name for s in standalone if s.name == format_name(mark.policy, begun_at)), None)
    overlays = dict(zip(dict(target.overlays), _files(domain, target, mark, begun_at, _OVERLAY_ATTEMPT), strict=True))
    in_use = {path for s in (target, *standalone) for _, path in s.covers}
    in_use.update(_all_files(domain, target, mark, begun_at))
    return RestorePlan(
        target,
        mark,
        begun_at,
        keep=None if discard or switched or kept else _keep_beside(domain, target, mark, begun_at),
        overlays=tuple(overlays.items()),
        lost=lost,
        leaves=tuple(sorted(leaves - in_use)),
        others=tuple(d.target for d in domain.disks if d.holds_state and d.target not in overlays),
        unused=tuple(_below_all(domain, lost)) if mark.standalone else (),
        kept=kept,
        switched=switched,
        resumed=before is not None,
    )


def _free_instant(domain: Domain, mark: Mark, at: datetime) -> datetime:
    """Return the instant, or one just after it, after which no snapshot of the policy is named."""
    taken = {s.name for s in domain.snapshots}
    while format_name(mark.policy, at) in taken:
        at += _WHOLE_SECONDS
    return at


def unfinished_files(domain: Domain, plan: RestorePlan) -> set[str]:
    """Return the files that a restore which was cut off may have left, and that nothing refers to."""
    begun = {plan.begun_at, plan.mark.restoring.begun_at if plan.mark.restoring else plan.begun_at}
    files = {path for at in begun for path in _all_files(domain, plan.target, plan.mark, at)}
    used = {path for s in domain.snapshots for _, path in (*s.covers, *s.overlays)}
    return files - used - {disk.path or "" for disk in domain.disks}


def files_on_the_way(domain: Domain) -> set[str]:
    """Return the files that a restore which was cut off has made, or no longer needs."""
    target = find_restoring(domain)
    if target is None or target.mark is None or target.mark.restoring is None:
        return set()
    begun = target.mark.restoring
    made = _all_files(domain, target, target.mark, begun.begun_at) if target.kind is not Kind.INTERNAL else []
    return {*begun.leaves, *made}


def needs_power_off(domain: Domain, plan: RestorePlan) -> bool:
    """Tell whether the guest has to be off for it: libvirt reverts an internal snapshot of a running one."""
    return domain.state is not DomainState.SHUT_OFF and plan.target.kind is not Kind.INTERNAL and not plan.switched


def _in_the_way(domain: Domain, target: Snapshot) -> str | None:
    name = domain.name
    if target.mark is None:
        return (
            f"{target.name} was not made by kvmsnapd, which changes nothing of others: `kvmsnapd restore {name} "
            f"{target.name} --as NAME` makes a second domain from it, `virsh snapshot-revert` goes back in place"
        )
    if target.mark.deleting:
        return f"{target.name} is half deleted and no way back any more; `kvmsnapd list {name}` shows the others"
    other = find_restoring(domain)
    if other and other is not target:
        return (
            f"a restore of {name} to {other.name} was begun and is not finished: finish it first, by "
            f"`kvmsnapd restore {name} {other.name}`"
        )
    return _unfit(domain) or (_cannot_lose(domain, target) if target.kind is not Kind.INTERNAL else None)


def _unfit(domain: Domain) -> str | None:
    """Return what in the domain stands against any restore."""
    name = domain.name
    if not domain.persistent:
        return f"{name} is transient: libvirt keeps no definition of it that could be changed"
    if domain.managed_save:
        return f"{name} has a managed-save image, a state of its own: start it, or `virsh managedsave-remove {name}`"
    if domain.state is DomainState.UNSETTLED:
        return f"{name} is {domain.state_detail}; `kvmsnapd doctor` says what to do"
    busy = [disk.target for disk in domain.disks if disk.block_job]
    if busy:
        return (
            f"a block job runs on {', '.join(busy)} of {name}; wait for it to end (`virsh blockjob {name} {busy[0]}`)"
        )
    kinds = {s.kind for s in domain.snapshots if not (s.mark and s.mark.standalone)}
    if len(kinds) > 1:
        return f"{name} has snapshots of both kinds, and going back to one may destroy another; use --as NAME"
    return None


def _cannot_lose(domain: Domain, target: Snapshot) -> str | None:
    """Return why an external snapshot cannot be gone back to, or one that would be lost must not be."""
    name = domain.name
    missing = {name for name, _ in target.overlays} - {disk.target for disk in domain.disks}
    if missing or not target.overlays:
        return f"{name} no longer has {', '.join(sorted(missing)) or 'the disks'} of {target.name}; use --as NAME"
    for snapshot in _leaf_first(domain, target):
        found = f"{snapshot.name} is newer than {target.name} and would be lost"
        if snapshot.mark is None:
            return f"{found}, and kvmsnapd did not make it: `virsh snapshot-delete` it first, or use --as NAME"
        if snapshot.mark.linked:
            return f"{found}, and a linked copy stands on it: undefine that one first, or use --as NAME"
        if snapshot.mark.hold:
            return (
                f"{found}, and is held ({snapshot.mark.hold.reason}): `kvmsnapd release {domain.name} "
                f"{snapshot.name}` first, or use --as NAME"
            )
    return None


def _leaf_first(domain: Domain, target: Snapshot) -> Iterator[Snapshot]:
    """Yield the snapshots of the chain that are neither the target nor below it, each before its parent."""
    by_name = {s.name: s for s in domain.snapshots}
    below, at = set[str](), target
    while at:
        below.add(at.name)
        parent = by_name.get(at.parent or "")
        at = parent if parent and parent.name not in below else None  # type: ignore[assignment]
    left = {
        s.name: s
        for s in domain.snapshots
        if s.name not in below and s.kind is not Kind.INTERNAL and not (s.mark and s.mark.standalone)
    }
    while left:
        parents = {s.parent for s in left.values()}
        leaves = [s for s in left.values() if s.name not in parents] or list(left.values())
        for snapshot in leaves:
            yield left.pop(snapshot.name)


def _stands_on(domain: Domain, target: Snapshot, mark: Mark, begun_at: datetime) -> bool:
    """Tell whether the domain has gone back already: its disks are the files of the new line."""
    active = {disk.target: disk.path for disk in domain.disks}
    files = _files(domain, target, mark, begun_at, _OVERLAY_ATTEMPT)
    return [active[name] for name, _ in target.overlays] == files


def _unwritten(domain: Domain, target: Snapshot, since: datetime, storage: Storage | None) -> bool:
    """Tell whether the domain is off and has not written to its disks since then."""
    if domain.state is not DomainState.SHUT_OFF or storage is None:
        return False
    active = {disk.target: disk.path or "" for disk in domain.disks}
    layers = [storage.layers.get(active[name]) for name, _ in target.overlays]
    return all(layer and layer.changed_at and layer.changed_at <= since + _WHOLE_SECONDS for layer in layers)


def _below_all(domain: Domain, lost: tuple[Snapshot, ...]) -> Iterator[str]:
    """Yield the files at the root of a line that goes as a whole."""
    made = {path for s in domain.snapshots for _, path in s.overlays}
    for snapshot in lost:
        if snapshot.parent is None:
            taking_part = dict(snapshot.overlays)
            yield from (path for target, path in snapshot.covers if target in taking_part and path not in made)


def _keep_inside(domain: Domain, target: Snapshot, mark: Mark, now: datetime) -> TakeRequest:
    consistency = Consistency.OFFLINE if domain.state is DomainState.SHUT_OFF else Consistency.MEMORY
    return TakeRequest(
        domain.uuid, domain.name, format_name(mark.policy, now), _kept_mark(target, mark, now, consistency)
    )


def _keep_beside(domain: Domain, target: Snapshot, mark: Mark, begun_at: datetime) -> TakeRequest:
    files = dict(zip(dict(target.overlays), _files(domain, target, mark, begun_at, 1), strict=True))
    return TakeRequest(
        domain.uuid,
        domain.name,
        format_name(mark.policy, begun_at),
        replace(_kept_mark(target, mark, begun_at, Consistency.OFFLINE), standalone=True),
        overlays=tuple(files.items()),
        excluded=tuple(disk.target for disk in domain.disks if disk.target not in files),
    )


def _kept_mark(target: Snapshot, mark: Mark, at: datetime, consistency: Consistency) -> Mark:
    hold = Hold(f"the state before the restore to {target.name}")
    return Mark(mark.policy, at, at, consistency, target.kind, hold=hold, excluded=mark.excluded)


def _all_files(domain: Domain, target: Snapshot, mark: Mark, begun_at: datetime) -> list[str]:
    return [path for attempt in (1, _OVERLAY_ATTEMPT) for path in _files(domain, target, mark, begun_at, attempt)]


def _files(domain: Domain, target: Snapshot, mark: Mark, begun_at: datetime, attempt: int) -> list[str]:
    """Return, for each disk of the snapshot, the file of this restore that is named as one of this attempt."""
    name = format_name(mark.policy, begun_at, attempt)
    folders = {disk.target: (disk.path or "").rpartition("/")[0] for disk in domain.disks}
    return [f"{folders[at]}/{file_stem(domain)}.{at}.{name}.qcow2" for at, _ in target.overlays]
