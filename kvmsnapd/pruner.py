"""Delete what a plan releases: one snapshot a call, each looked at just before and just after."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.errors import DomainBusyError, HypervisorError, MergeFailedError, StorageBusyError
from kvmsnapd.events import DeleteFailed, PruneBlocked, SnapshotDeleted
from kvmsnapd.model import Deleting, DomainState, Kind
from kvmsnapd.plan import due_for, judge
from kvmsnapd.preflight import in_chain
from kvmsnapd.prune import Blocked, BlockReason, check_deleted, find_obstacle, newest_of
from kvmsnapd.watching import Work, unwatched

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from kvmsnapd.events import Publish
    from kvmsnapd.fleet import Pair
    from kvmsnapd.gates import StorageGates
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain, PairName
    from kvmsnapd.prune import Delete
    from kvmsnapd.watching import Watch

    MayGo = Callable[[Domain, str], Blocked | None]
    """Judges one snapshot of the domain as it is just before the delete: None if it is still meant to go."""


MERGE_WAIT = timedelta(minutes=1)
"""How long a delete waits for other merges on its storage; then it is the next run's debt."""


@dataclass
class Pruner:
    """Carries out deletes; errors of the hypervisor become events. Safe to call from several threads."""

    hypervisor: Hypervisor
    gates: StorageGates
    current: Callable[[Pair], Pair | None]
    """Returns the policy as it is now configured, None if the pair is gone."""
    publish: Publish
    clock: Callable[[], datetime]
    stopwatch: Callable[[], float]
    watch: Watch = unwatched
    changing: Callable[[str], AbstractContextManager[bool]] = lambda _domain_uuid: nullcontext(enter_result=True)
    """Gives whether nobody copies what the domain's snapshots froze."""
    # Per pair, the snapshot that libvirt failed to delete the last time.
    _unwilling: dict[str, str] = field(default_factory=dict)
    # Domains that a delete left in another state than it should have: nothing more is deleted there by this process.
    _distrusted: set[str] = field(default_factory=set)
    # Runs of domains in which a merge failed.
    _failed_runs: set[tuple[str, int | None]] = field(default_factory=set)
    # Per pair, what had to wait in the run before.
    _reported: dict[str, dict[str, int]] = field(default_factory=dict)

    def unwilling(self, pair: Pair) -> str | None:
        """Return the snapshot that libvirt failed to delete the last time."""
        return self._unwilling.get(pair.name.key)

    def prune(self, pair: Pair, deletes: Sequence[Delete], blocked: Sequence[Blocked]) -> tuple[int, int]:
        """Carry out a plan's deletes after its take; return how many were deleted and how many wait."""
        done, left = self.delete(pair, deletes)
        return done, self.report(pair, [*blocked, *left])

    def report(self, pair: Pair, blocked: Sequence[Blocked]) -> int:
        """Publish what has to wait, and return how many that are."""
        counts = dict(Counter(str(wait.reason) for wait in blocked))
        again = self._reported.get(pair.name.key) == counts
        self._reported[pair.name.key] = counts
        if blocked:
            self.publish(PruneBlocked(pair=pair.name, blocked=counts, detail=blocked[0].detail, again=again))
        return len(blocked)

    def delete(
        self, pair: Pair, deletes: Sequence[Delete], *, upcoming: datetime | None = None
    ) -> tuple[int, list[Blocked]]:
        """Delete what retention releases, one by one; return how many, and what has to wait.

        Args:
            upcoming: the slot for which room is made, if it is not one of the schedule.
        """

        def may_go(domain: Domain, name: str) -> Blocked | None:
            # With the slot that is due now, if it still is: then room is made for it.
            return self._unreleased(pair, domain, name, upcoming or due_for(domain, pair.policy, self.clock()).slot)

        return self.delete_each(pair.name, deletes, may_go)

    def delete_released(self, pair: Pair, deletes: Sequence[Delete]) -> tuple[int, list[Blocked]]:
        """Delete what a person has been shown, as far as retention releases it without another take."""
        return self.delete_each(pair.name, deletes, lambda domain, name: self._unreleased(pair, domain, name, None))

    def delete_each(self, pair: PairName, deletes: Sequence[Delete], may_go: MayGo) -> tuple[int, list[Blocked]]:
        """Delete one by one what may go, looking before and after each; return how many, and what has to wait."""
        blocked: list[Blocked] = []
        deleted = 0
        for position, step in enumerate(deletes):
            try:
                obstacle = self._delete_one(pair, step, may_go)
            except HypervisorError as error:
                self.publish(DeleteFailed(pair=pair, snapshot=step.snapshot, reason=error.reason, error=str(error)))
                # A domain in trouble is not worked on further; the next run begins with the others.
                self._unwilling[pair.key] = step.snapshot
                blocked += [Blocked(left.snapshot, BlockReason.FAILED, str(error)) for left in deletes[position:]]
                break
            if obstacle:
                blocked.append(obstacle)
            else:
                deleted += 1
        return deleted, blocked

    def _delete_one(self, pair: PairName, step: Delete, may_go: MayGo) -> Blocked | None:
        """Delete one snapshot, if it still may go; return what is in the way now."""
        domain = self.hypervisor.domain(pair.domain_uuid)
        try:
            with self.gates.hold(merge_folders(domain), heavy=True, wait=MERGE_WAIT) as waited:
                if waited:
                    domain = self.hypervisor.domain(domain.uuid)
                obstacle = self._changed(domain, step.snapshot, may_go) or self._no_space(domain, step.snapshot)
                if obstacle:
                    return obstacle
                started = self.stopwatch()
                with self.changing(domain.uuid) as alone, self.watch(Work(pair, f"deleting {step.snapshot}")):
                    if not alone:
                        return Blocked(step.snapshot, BlockReason.BUSY, "a copy of the domain is being made")
                    self._merge(domain, step.snapshot)
                duration = self.stopwatch() - started
        except StorageBusyError as error:
            return Blocked(step.snapshot, BlockReason.BUSY, str(error))
        self._check(domain, step.snapshot)
        self.publish(
            SnapshotDeleted(pair=pair, snapshot=step.snapshot, reasons=step.reasons, duration_seconds=duration)
        )
        return None

    def _merge(self, domain: Domain, name: str) -> None:
        """Delete, with a note in the snapshot's own description for as long as it may be half merged.

        Whatever is killed meanwhile, it is then known to be no way back any more.
        """
        snapshot = next((s for s in domain.snapshots if s.name == name), None)
        mark = snapshot.mark if snapshot and snapshot.kind is not Kind.INTERNAL else None
        if mark is None:
            self.hypervisor.delete_snapshot(domain.uuid, name)
            return
        deleting = Deleting(self.clock().replace(microsecond=0))
        self.hypervisor.describe_snapshot(domain.uuid, name, replace(mark, deleting=deleting))
        try:
            self.hypervisor.delete_snapshot(domain.uuid, name)
        except MergeFailedError:
            self._failed_runs.add((domain.uuid, domain.run_id))  # the note may not find room on the full disk either
            with suppress(HypervisorError):
                failed = replace(deleting, failed_in=domain.run_id)
                self.hypervisor.describe_snapshot(domain.uuid, name, replace(mark, deleting=failed))
            raise
        except DomainBusyError:
            self.hypervisor.describe_snapshot(domain.uuid, name, mark)  # not begun: as good as before
            raise

    def _check(self, domain: Domain, name: str) -> None:
        """Raise unless the domain is as it was but for this snapshot; a person may be at work, so look twice."""
        if not check_deleted(domain, self.hypervisor.domain(domain.uuid), name):
            return
        problem = check_deleted(domain, self.hypervisor.domain(domain.uuid), name)
        if problem:
            self._distrusted.add(domain.uuid)
            msg = f"{name} was deleted, and afterwards {problem}; look at the domain with `kvmsnapd doctor`"
            raise HypervisorError(msg, operation="snapshot_delete", domain=domain.name)

    def _no_space(self, domain: Domain, name: str) -> Blocked | None:
        """Return that a merge would meet a full disk, None if what it moves has room where it goes."""
        snapshot = next((s for s in domain.snapshots if s.name == name), None)
        if snapshot is None or not snapshot.overlays or not in_chain(snapshot):
            return None
        lower = dict(snapshot.covers)
        need: Counter[str] = Counter()
        for target, allocated in self.hypervisor.allocated(snapshot.overlays).items():
            need[lower.get(target, "").rpartition("/")[0]] += allocated
        free = self.hypervisor.storage(domain, [folder for folder in need if folder]).free_bytes
        for folder, count in need.items():
            if folder in free and count > free[folder]:
                detail = (
                    f"merging it may need {count / 2**20:.0f} MiB in {folder}, and {free[folder] / 2**20:.0f} MiB are "
                    "free; a merge that meets a full disk may lose data"
                )
                return Blocked(name, BlockReason.SPACE, detail)
        return None

    def _changed(self, domain: Domain, name: str, may_go: MayGo) -> Blocked | None:
        """Return what is in the way in the domain as it is now, None if the delete may go on."""
        if not any(snapshot.name == name for snapshot in domain.snapshots):
            return None  # gone already; deleting it again is success
        if domain.uuid in self._distrusted:
            detail = "an earlier delete left the domain in an unforeseen state; see `kvmsnapd doctor`, then restart us"
            return Blocked(name, BlockReason.CHANGED, detail)
        if domain.run_id is not None and (domain.uuid, domain.run_id) in self._failed_runs:
            detail = "a merge failed in this run of the guest; shut it down and start it again"
            return Blocked(name, BlockReason.MERGE_FAILED, detail)
        unwanted = may_go(domain, name)
        if unwanted:
            return unwanted
        if domain.state is DomainState.UNSETTLED:
            return Blocked(name, BlockReason.CHANGED, f"the domain is {domain.state_detail} now")
        if domain.managed_save:
            return Blocked(name, BlockReason.CHANGED, "the domain has a managed-save image now")
        busy = [disk.target for disk in domain.disks if disk.block_job]
        if busy:
            return Blocked(name, BlockReason.CHANGED, f"a block job has begun on {', '.join(busy)}")
        if len({snapshot.kind for snapshot in domain.snapshots}) > 1:
            return Blocked(name, BlockReason.CHANGED, "the domain has snapshots of both kinds now")
        return find_obstacle(domain, name, self.hypervisor.capabilities())

    def _unreleased(self, pair: Pair, domain: Domain, name: str, upcoming: datetime | None) -> Blocked | None:
        """Return why retention does not release a snapshot any more, None if it does."""
        now = self.clock()
        released = {v.point.name for v in judge(domain, pair.policy, now=now, upcoming=upcoming) if not v.keep}
        half = {snapshot.name for snapshot in domain.half_deleted(pair.policy.name)}
        in_force = self.current(pair)
        if in_force is None:
            return Blocked(name, BlockReason.CHANGED, "nothing more was to be begun, or the policy is gone")
        if in_force.policy != pair.policy:
            return Blocked(name, BlockReason.CHANGED, "the policy was changed meanwhile")
        if name not in released | half or name == newest_of(domain, pair.policy, now=now):
            return Blocked(name, BlockReason.CHANGED, f"somebody changed the snapshots meanwhile, and {name} is wanted")
        return None


def merge_folders(domain: Domain) -> list[str]:
    """Return the folders in which a delete moves data; none if all snapshots are internal."""
    if not any(map(in_chain, domain.snapshots)):
        return []
    files = [disk.path for disk in domain.disks if disk.holds_state and disk.path]
    chain = (snapshot for snapshot in domain.snapshots if in_chain(snapshot))
    files += [path for snapshot in chain for _, path in snapshot.covers if path.startswith("/")]
    return list(dict.fromkeys(path.rpartition("/")[0] for path in files))
