"""Carry out plans: the run of one policy on one domain, step by step, under the domain's lock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from kvmsnapd.errors import (
    DomainBusyError,
    DomainLockedError,
    GuestAgentUnavailableError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
)
from kvmsnapd.events import (
    DeleteFailed,
    PruneBlocked,
    RunFinished,
    RunSkipped,
    SnapshotDeleted,
    SnapshotDowngraded,
    SnapshotFailed,
    SnapshotTaken,
)
from kvmsnapd.model import Consistency
from kvmsnapd.plan import due_for, judge, plan_run
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.prune import Blocked, BlockReason, find_obstacle, newest_of
from kvmsnapd.thaw import Thawer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from kvmsnapd.events import Publish
    from kvmsnapd.fleet import Pair
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain, Snapshot, TakeRequest
    from kvmsnapd.plan import Plan
    from kvmsnapd.prune import Delete
    from kvmsnapd.state_files import DomainLocks, FreezeIntents

LOCK_WAIT = timedelta(seconds=30)
"""How long a run waits for a person's command on the same domain before it is skipped and tried again later."""


class Result(StrEnum):
    """How one run ended."""

    TAKEN = "taken"
    NOTHING_DUE = "nothing_due"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run came to."""

    result: Result
    scheduled_at: datetime | None = None
    snapshot: str | None = None
    deleted: int = 0
    blocked: int = 0

    @property
    def wants_retry(self) -> bool:
        """Whether the same slot should be tried again after a while."""
        return self.result in {Result.SKIPPED, Result.FAILED}


@dataclass
class Executor:
    """Runs plans against one hypervisor; safe to call from several threads.

    Args:
        clock: returns the present instant, timezone-aware.
        stopwatch: returns monotonic seconds, for durations.
    """

    hypervisor: Hypervisor
    locks: DomainLocks
    intents: FreezeIntents
    publish: Publish
    clock: Callable[[], datetime]
    stopwatch: Callable[[], float]
    # Per pair, a slot and how many names of it must not be used again: the outcome of a take stayed unknown, or it met
    # a file left behind by one that was cut off.
    _used_up: dict[str, tuple[datetime, int]] = field(default_factory=dict)
    # Per pair, the snapshot that libvirt failed to delete the last time.
    _unwilling: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.thawer = Thawer(self.hypervisor, self.locks, self.intents, self.publish)

    def run(self, pair: Pair) -> Outcome:
        """Take what is due for this pair and prune what retention then releases; report all of it as events.

        Nothing is assumed from before: domain, snapshots and the slot that is due are read again under the lock.
        Errors of the hypervisor and of the files we keep become events and an outcome; they are not raised.
        """
        started = self.stopwatch()
        try:
            with self.locks.hold(pair.name.domain_uuid, wait=LOCK_WAIT):
                outcome = self._run_locked(pair)
        except DomainLockedError as error:
            outcome = self._skip(pair, "locked", str(error))
        except HypervisorError as error:
            outcome = self._skip(pair, error.reason, f"the domain cannot be read: {error}")
        except OSError as error:
            outcome = self._skip(pair, "state_directory", f"our own notes cannot be kept: {error}")
        self.publish(
            RunFinished(
                pair=pair.name,
                result=outcome.result,
                scheduled_at=outcome.scheduled_at,
                snapshot=outcome.snapshot,
                deleted=outcome.deleted,
                blocked=outcome.blocked,
                duration_seconds=self.stopwatch() - started,
            )
        )
        return outcome

    def _run_locked(self, pair: Pair) -> Outcome:
        uuid = pair.name.domain_uuid
        if self.intents.exists(uuid):
            self.thawer.thaw(uuid)
        plan = self._plan(pair)
        made_room = 0
        if plan.room and not self.intents.exists(uuid):
            made_room, _ = self._delete(pair, plan.room)
            plan = self._plan(pair)
        if plan.refusal:
            self._report_blocked(pair, plan.blocked)
            return replace(self._skip(pair, plan.refusal.reason, plan.refusal.detail), deleted=made_room)
        if plan.take is None:
            return Outcome(Result.NOTHING_DUE, deleted=made_room)
        taken = self._take(pair, plan.take)
        if taken is None:
            return Outcome(Result.FAILED, plan.take.mark.scheduled_at, deleted=made_room)
        self._used_up.pop(pair.name.key, None)
        deleted, blocked = self._prune(pair, plan)
        return Outcome(Result.TAKEN, plan.take.mark.scheduled_at, taken, made_room + deleted, blocked)

    def _plan(self, pair: Pair) -> Plan:
        """Read the domain and plan its run."""
        domain = self.hypervisor.domain(pair.name.domain_uuid)
        if self.intents.exists(domain.uuid):
            # It may be frozen and its agent does not answer: to ask it for another freeze would only take time.
            domain = replace(domain, agent_connected=False)
        now = self.clock()
        slot = due_for(domain, pair.policy, now).slot
        used_slot, used = self._used_up.get(pair.name.key, (slot, 0))
        attempt = 1 + (used if used_slot == slot else 0)
        return plan_run(
            domain,
            pair.policy,
            self.hypervisor.capabilities(),
            now=now,
            attempt=attempt,
            unwilling=self._unwilling.get(pair.name.key),
        )

    def _skip(self, pair: Pair, reason: str, detail: str) -> Outcome:
        self.publish(RunSkipped(pair=pair.name, reason=reason, detail=detail))
        return Outcome(Result.SKIPPED, pair.due.slot)

    def _take(self, pair: Pair, request: TakeRequest) -> str | None:
        """Take the snapshot and return its name; None when it failed, which has been published."""
        try:
            return self._take_once(pair, request)
        except HypervisorError as error:
            if isinstance(error, GuestAgentUnavailableError) and request.quiesce:
                return self._after_agent_error(pair, request, error)
            if isinstance(error, SnapshotExistsError):
                # libvirtd may have finished a call that was cut off on our side after we had listed the snapshots.
                existing = _find(self.hypervisor.domain(pair.name.domain_uuid), request.name)
                if existing and existing.mark:  # ours: for a person's snapshot of this name it would be None
                    return existing.name
            unknown = isinstance(error, HypervisorUnreachableError)
            if unknown or isinstance(error, SnapshotExistsError):
                self._use_up(pair, request)
            state = "whether it was taken is not known yet and will be looked up" if unknown else "none was taken"
            self._failed(pair, request, error, state)
            return None

    def _after_agent_error(self, pair: Pair, request: TakeRequest, error: GuestAgentUnavailableError) -> str | None:
        """Thaw; then take a crash-consistent snapshot if the policy allows one and nothing was changed."""
        uuid = pair.name.domain_uuid
        self.thawer.thaw(uuid)
        active = {disk.path for disk in self.hypervisor.domain(uuid).disks}
        left = [overlay for _, overlay in request.overlays if overlay in active]
        if left:
            # An agent that falls silent between freeze and thaw: libvirt 9.0 has switched the disks by then, reports
            # error 86 and forgets the snapshot (measured).
            self._use_up(pair, request)
            self._failed(pair, request, error, f"libvirt switched to {', '.join(left)} without a snapshot of it")
            return None
        if pair.policy.consistency is not ConsistencyRule.FILESYSTEM_PREFERRED:
            self._failed(pair, request, error, "none was taken")
            return None
        self.publish(SnapshotDowngraded(pair=pair.name, snapshot=request.name, error=str(error)))
        try:
            return self._take_once(pair, replace(request, mark=replace(request.mark, consistency=Consistency.CRASH)))
        except HypervisorError as second:
            if isinstance(second, (HypervisorUnreachableError, SnapshotExistsError)):
                self._use_up(pair, request)
            self._failed(pair, request, second, "whether it was taken will be looked up")
            return None

    def _failed(self, pair: Pair, request: TakeRequest, error: HypervisorError, state: str) -> None:
        self.publish(
            SnapshotFailed(
                pair=pair.name,
                snapshot=request.name,
                scheduled_at=request.mark.scheduled_at,
                reason=error.reason,
                error=f"{error}; {state}",
            )
        )

    def _use_up(self, pair: Pair, request: TakeRequest) -> None:
        self._used_up[pair.name.key] = (request.mark.scheduled_at, request.mark.attempt)

    def _take_once(self, pair: Pair, request: TakeRequest) -> str:
        started = self.stopwatch()
        # An intent that was there before stays: somebody may have left this guest frozen, and only a thaw ends that.
        guarding = request.quiesce and self.intents.record(pair.name.domain_uuid)
        try:
            snapshot = self.hypervisor.take_snapshot(request)
        except (HypervisorUnreachableError, GuestAgentUnavailableError):
            # No answer from libvirt, or none from the agent, which may still carry out the freeze it was sent (measured
            # on libvirt 9.0 and 11.3: error 86 or 112, and the guest was frozen once its agent woke up).
            raise
        except HypervisorError:
            self._clear_intent(pair, guarding=guarding)
            raise
        self._clear_intent(pair, guarding=guarding)
        self._check_taken(request, snapshot)
        self.publish(
            SnapshotTaken(
                pair=pair.name,
                snapshot=snapshot.name,
                scheduled_at=request.mark.scheduled_at,
                kind=request.mark.kind,
                consistency=request.mark.consistency,
                duration_seconds=self.stopwatch() - started,
            )
        )
        return snapshot.name

    def _check_taken(self, request: TakeRequest, snapshot: Snapshot) -> None:
        """Raise unless libvirt made what was asked for; a snapshot that would lie about itself is deleted again."""
        if snapshot.mark != request.mark:
            problem = "libvirt did not keep the description, so it would not be known as ours"
        elif snapshot.offline != (request.mark.consistency is Consistency.OFFLINE):
            problem = "the domain was started or shut off in this very moment"
        else:
            return
        self.hypervisor.delete_snapshot(request.domain_uuid, snapshot.name)
        msg = f"{snapshot.name} was taken and deleted again: {problem}"
        raise DomainBusyError(msg, operation="snapshot_create", domain=request.domain_name)

    def _clear_intent(self, pair: Pair, *, guarding: bool) -> None:
        if guarding:
            self.intents.clear(pair.name.domain_uuid)

    def _prune(self, pair: Pair, plan: Plan) -> tuple[int, int]:
        """Carry out the plan's deletes after its take; return how many were deleted and how many wait."""
        if self.intents.exists(pair.name.domain_uuid):
            # A guest that may be frozen is not worked on further; what was to be deleted is the next run's debt.
            done, left = 0, [Blocked(d.snapshot, BlockReason.FAILED, "the guest may be frozen") for d in plan.deletes]
        else:
            done, left = self._delete(pair, plan.deletes)
        blocked = [*plan.blocked, *left]
        self._report_blocked(pair, blocked)
        return done, len(blocked)

    def _report_blocked(self, pair: Pair, blocked: Sequence[Blocked]) -> None:
        if blocked:
            counts = Counter(str(wait.reason) for wait in blocked)
            self.publish(PruneBlocked(pair=pair.name, blocked=dict(counts), detail=blocked[0].detail))

    def _delete(self, pair: Pair, deletes: Sequence[Delete]) -> tuple[int, list[Blocked]]:
        """Delete one by one, each checked just before and after; return how many, and what has to wait."""
        blocked: list[Blocked] = []
        deleted = 0
        for position, step in enumerate(deletes):
            try:
                obstacle = self._changed(pair, step.snapshot)
                if obstacle:
                    blocked.append(obstacle)
                    continue
                started = self.stopwatch()
                self.hypervisor.delete_snapshot(pair.name.domain_uuid, step.snapshot)
                duration = self.stopwatch() - started
                if _find(self.hypervisor.domain(pair.name.domain_uuid), step.snapshot):
                    msg = "libvirt reported success but still lists the snapshot"
                    raise HypervisorError(msg, operation="snapshot_delete", domain=pair.name.domain)  # noqa: TRY301
            except HypervisorError as error:
                self.publish(
                    DeleteFailed(pair=pair.name, snapshot=step.snapshot, reason=error.reason, error=str(error))
                )
                # A domain in trouble is not worked on further; the next run begins with the others.
                self._unwilling[pair.name.key] = step.snapshot
                blocked += [Blocked(left.snapshot, BlockReason.FAILED, str(error)) for left in deletes[position:]]
                break
            deleted += 1
            self.publish(
                SnapshotDeleted(pair=pair.name, snapshot=step.snapshot, reasons=step.reasons, duration_seconds=duration)
            )
        return deleted, blocked

    def _changed(self, pair: Pair, name: str) -> Blocked | None:
        """Re-read the domain just before a delete; return what is in the way now, None if the delete may go on."""
        domain = self.hypervisor.domain(pair.name.domain_uuid)
        snapshot = _find(domain, name)
        if snapshot is None:
            return None  # gone already; deleting it again is success
        now = self.clock()
        # With the slot that is due now, if it still is: then room is made for it.
        upcoming = due_for(domain, pair.policy, now).slot
        released = {v.point.name for v in judge(domain, pair.policy, now=now, upcoming=upcoming) if not v.keep}
        if name not in released or name == newest_of(domain, pair.policy, now=now):
            return Blocked(name, BlockReason.CHANGED, f"somebody changed the snapshots meanwhile, and {name} is wanted")
        busy = [disk.target for disk in domain.disks if disk.block_job]
        if busy:
            return Blocked(name, BlockReason.CHANGED, f"a block job has begun on {', '.join(busy)}")
        return find_obstacle(domain, name, self.hypervisor.capabilities())


def _find(domain: Domain, name: str) -> Snapshot | None:
    return next((snapshot for snapshot in domain.snapshots if snapshot.name == name), None)
