"""Carry out plans: the run of one policy on one domain, step by step, under the domain's lock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.errors import (
    DomainLockedError,
    DomainNotFoundError,
    GuestAgentUnavailableError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
)
from kvmsnapd.events import (
    DeleteFailed,
    DomainThawed,
    PruneBlocked,
    RunFinished,
    RunSkipped,
    SnapshotDeleted,
    SnapshotDowngraded,
    SnapshotFailed,
    SnapshotTaken,
)
from kvmsnapd.model import Consistency, DomainState
from kvmsnapd.plan import due_for, plan_run
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.prune import Blocked, BlockReason, find_obstacle

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from kvmsnapd.events import Publish
    from kvmsnapd.fleet import Pair
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain, Snapshot, TakeRequest
    from kvmsnapd.plan import Plan
    from kvmsnapd.state_files import DomainLocks, FreezeIntents

LOCK_WAIT = timedelta(seconds=30)
"""How long a run waits for a person's command on the same domain before it is skipped and tried again later."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended. ``result`` is ``taken``, ``nothing_due``, ``skipped`` or ``failed``."""

    result: str
    scheduled_at: datetime | None = None
    snapshot: str | None = None
    deleted: int = 0
    blocked: int = 0

    @property
    def wants_retry(self) -> bool:
        """Whether the same slot should be tried again after a while."""
        return self.result in {"skipped", "failed"}


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
    # How many names of a slot must not be used again, by (pair key, slot): the outcome of a take stayed unknown, or it
    # met a file left behind by one that was cut off.
    _used_up: Counter[tuple[str, datetime]] = field(default_factory=Counter)
    # Why a domain could not be thawed yet, so that the same words are published once.
    _not_thawed: dict[str, str] = field(default_factory=dict)

    def run(self, pair: Pair) -> Outcome:
        """Take what is due for this pair and prune what retention then releases; report all of it as events.

        Nothing is assumed from before: domain, snapshots and the slot that is due are read again under the lock.
        Errors of the hypervisor become events and an outcome; they are not raised.
        """
        started = self.stopwatch()
        try:
            with self.locks.hold(pair.name.domain_uuid, wait=LOCK_WAIT):
                outcome = self._run_locked(pair)
        except DomainLockedError as error:
            outcome = self._skip(pair, "locked", str(error))
        except HypervisorError as error:
            outcome = self._skip(pair, error.reason, f"cannot read the domain: {error}; nothing was done")
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
        policy = pair.policy
        if self.intents.exists(pair.name.domain_uuid):
            self._thaw(pair.name.domain_uuid)
        domain = self.hypervisor.domain(pair.name.domain_uuid)
        now = self.clock()
        slot = due_for(domain, policy, now).slot
        if slot is None:
            return Outcome("nothing_due")
        attempt = 1 + self._used_up[pair.name.key, slot]
        plan = plan_run(domain, policy, self.hypervisor.capabilities(), now=now, attempt=attempt)
        if plan.refusal:
            return self._skip(pair, plan.refusal.reason, plan.refusal.detail)
        if plan.take is None:
            return Outcome("nothing_due")
        taken = self._take(pair, plan.take)
        if taken is None:
            return Outcome("failed", plan.take.mark.scheduled_at)
        self._used_up.pop((pair.name.key, plan.take.mark.scheduled_at), None)
        deleted, blocked = self._prune(pair, plan)
        return Outcome("taken", plan.take.mark.scheduled_at, taken, deleted, blocked)

    def _skip(self, pair: Pair, reason: str, detail: str) -> Outcome:
        self.publish(RunSkipped(pair=pair.name, reason=reason, detail=detail))
        return Outcome("skipped", pair.due.slot)

    def _take(self, pair: Pair, request: TakeRequest) -> str | None:
        """Take the snapshot and return its name; None when it failed, which has been published."""
        try:
            try:
                return self._take_once(pair, request)
            except GuestAgentUnavailableError as error:
                if pair.policy.consistency is not ConsistencyRule.FILESYSTEM_PREFERRED:
                    raise
                self.publish(SnapshotDowngraded(pair=pair.name, snapshot=request.name, error=str(error)))
                crash = replace(request, mark=replace(request.mark, consistency=Consistency.CRASH))
                return self._take_once(pair, crash)
        except HypervisorError as error:
            if isinstance(error, SnapshotExistsError):
                # libvirtd may have finished a call that was cut off on our side after we had listed the snapshots.
                existing = _find(self.hypervisor.domain(pair.name.domain_uuid), request.name)
                if existing and existing.mark:
                    return existing.name
            unknown = isinstance(error, HypervisorUnreachableError)
            if unknown or isinstance(error, SnapshotExistsError):
                self._used_up[pair.name.key, request.mark.scheduled_at] += 1
            state = "whether it was taken is not known yet and will be looked up" if unknown else "none was taken"
            self.publish(
                SnapshotFailed(
                    pair=pair.name,
                    snapshot=request.name,
                    scheduled_at=request.mark.scheduled_at,
                    reason=error.reason,
                    error=f"{error}; {state}",
                )
            )
            return None

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

    def _clear_intent(self, pair: Pair, *, guarding: bool) -> None:
        if guarding:
            self.intents.clear(pair.name.domain_uuid)

    def _prune(self, pair: Pair, plan: Plan) -> tuple[int, int]:
        """Carry out the plan's deletes one by one; return how many were deleted and how many wait."""
        deleted = 0
        blocked = list(plan.blocked)
        for step in plan.deletes:
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
                break  # what is left is the next run's debt; a domain in trouble is not worked on further
            deleted += 1
            self.publish(
                SnapshotDeleted(pair=pair.name, snapshot=step.snapshot, reasons=step.reasons, duration_seconds=duration)
            )
        if blocked:
            counts = Counter(str(wait.reason) for wait in blocked)
            self.publish(PruneBlocked(pair=pair.name, blocked=dict(counts), detail=blocked[0].detail))
        return deleted, len(blocked)

    def _changed(self, pair: Pair, name: str) -> Blocked | None:
        """Re-read the domain just before a delete; return what is in the way now, None if the delete may go on."""
        domain = self.hypervisor.domain(pair.name.domain_uuid)
        snapshot = _find(domain, name)
        if snapshot is None:
            return None  # gone already; deleting it again is success
        if snapshot.mark is None or snapshot.mark.policy != pair.policy.name or snapshot.mark.held(self.clock()):
            return Blocked(name, BlockReason.CHANGED, f"{name} was changed by somebody since the run began")
        busy = [disk.target for disk in domain.disks if disk.block_job]
        if busy:
            return Blocked(name, BlockReason.CHANGED, f"a block job has begun on {', '.join(busy)}")
        return find_obstacle(domain, name, self.hypervisor.capabilities())

    def thaw_leftovers(self) -> None:
        """Thaw every domain with a freeze intent; may take as long as agents take to answer, or not to."""
        for uuid in self.intents.outstanding():
            try:
                with self.locks.hold(uuid, wait=timedelta(0)):
                    self._thaw(uuid)
            except DomainLockedError:
                continue  # a take is in flight there, and its own end clears the intent

    def _thaw(self, uuid: str) -> None:
        """Thaw one domain and clear its intent; an agent that does not answer leaves the intent for later."""
        try:
            # A guest that does not run is not frozen; a later start begins thawed.
            if self.hypervisor.domain(uuid).state is not DomainState.SHUT_OFF:
                self.hypervisor.thaw(uuid)
        except DomainNotFoundError:
            pass
        except HypervisorError as error:
            if self._not_thawed.get(uuid) != str(error):
                self._not_thawed[uuid] = str(error)
                self.publish(DomainThawed(domain_uuid=uuid, error=str(error)))
            return
        self._not_thawed.pop(uuid, None)
        self.intents.clear(uuid)
        self.publish(DomainThawed(domain_uuid=uuid, error=None))


def _find(domain: Domain, name: str) -> Snapshot | None:
    return next((snapshot for snapshot in domain.snapshots if snapshot.name == name), None)
