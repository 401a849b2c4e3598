"""Carry out plans: the run of one policy on one domain, step by step, under the domain's lock."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from kvmsnapd.disks import data_folders
from kvmsnapd.errors import DomainLockedError, HypervisorError, StorageBusyError
from kvmsnapd.events import (
    HookFinished,
    RunEvent,
    RunFinished,
    RunSkipped,
    RunStarted,
    RunStuck,
    SnapshotTaken,
    SnapshotUnchanged,
)
from kvmsnapd.fleet import examine
from kvmsnapd.gates import HostGate, StorageGates
from kvmsnapd.hooks import run_hook
from kvmsnapd.links import drop_gone_links
from kvmsnapd.model import Consistency
from kvmsnapd.plan import Order, due_for, plan_run
from kvmsnapd.prune import Blocked
from kvmsnapd.pruner import Pruner
from kvmsnapd.summary import sum_up
from kvmsnapd.take import Taker
from kvmsnapd.thaw import Thawer
from kvmsnapd.watching import unwatched

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from datetime import datetime

    from kvmsnapd.events import Event, Publish
    from kvmsnapd.fleet import Pair
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain, Hold, PairName, TakeRequest
    from kvmsnapd.plan import Confirm, Plan
    from kvmsnapd.policy import Hook
    from kvmsnapd.refusal import Refusal
    from kvmsnapd.state_files import DomainLocks, FreezeIntents
    from kvmsnapd.watching import Watch

LOCK_WAIT = timedelta(seconds=30)
"""How long a run waits for a person's command on the same domain before it is skipped and tried again later."""


PATIENCE = timedelta(minutes=10)
"""How long a run may take before others get its place; a merge of much data takes longer and goes on beside them."""


class Result(StrEnum):
    """How one run ended."""

    TAKEN = "taken"
    UNCHANGED = "unchanged"
    """The newest snapshot still holds all there is: as good as a new one."""
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
    quarantined: bool = False
    """Skipped for a reason that only a person can change."""

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
        lock_wait: how long another holder of a domain's lock is waited for; None is without end.
        on_wait: is told which domain is waited for, and who has it.
        watch: is told of calls that may take long.
    """

    hypervisor: Hypervisor
    locks: DomainLocks
    intents: FreezeIntents
    publish: Publish
    clock: Callable[[], datetime]
    stopwatch: Callable[[], float]
    host_gate: HostGate = field(default_factory=lambda: HostGate(places=4, patience=PATIENCE))
    gates: StorageGates = field(default_factory=lambda: StorageGates(takes=4, heavy=1))
    current: Callable[[Pair], Pair | None] = field(default=lambda pair: pair)
    """Returns the pair as it is now configured, None if the pair is gone or nothing more is to be begun."""
    wanted: Callable[[], bool] = field(default=lambda: True)
    """Tells whether anything more is to be begun, or waited for."""
    lock_wait: timedelta | None = LOCK_WAIT
    on_wait: Callable[[str, str], None] = field(default=lambda _domain, _holder: None)
    watch: Watch = unwatched
    # Per pair, why it is in quarantine, so that it is told once.
    _quarantine: dict[str, str] = field(default_factory=dict)
    # Per pair whose run goes on, what it has published.
    _said: dict[str, list[RunEvent]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.thawer = Thawer(self.hypervisor, self.locks, self.intents, self.publish)
        self._taker = Taker(self.hypervisor, self.intents, self.thawer, self._say, self.stopwatch, self.watch)
        self.pruner = Pruner(
            self.hypervisor,
            self.gates,
            self.current,
            self._say,
            self.clock,
            self.stopwatch,
            self.watch,
            self.locks.changing,
        )

    def _say(self, event: Event) -> None:
        """Publish an event, and keep it for the line that sums its run up."""
        if isinstance(event, RunEvent) and event.pair.key in self._said:
            self._said[event.pair.key].append(event)
        self.publish(event)

    def run(self, pair: Pair) -> Outcome:
        """Take what is due for this pair and prune what retention then releases; report all of it as events.

        Nothing is assumed from before: policy, domain, snapshots and the slot that is due are read again under the
        lock. What goes wrong becomes events and an outcome; nothing is raised.
        """
        return self._reported(pair, f"the daemon's run of {pair.name.policy}", self._run_locked)

    def take(self, pair: Pair, *, hold: Hold | None = None) -> Outcome:
        """Take a snapshot now, because a person wants it; as :meth:`run`, and nothing is deleted but for room.

        Its slot is the second in which the lock was had. A shut-off domain that has not changed gets no other snapshot
        of the same state: the outcome is ``unchanged``, with the one that holds it.
        """

        def take_now(pair: Pair) -> Outcome:
            return self._run_locked(pair, Order(self.clock().replace(microsecond=0), hold))

        return self._reported(pair, f"take of {pair.name.policy}", take_now)

    def locked(self, name: PairName, doing: str) -> AbstractContextManager[None]:
        """Hold a domain's lock, in these words for others; DomainLockedError if it is not to be had."""
        return self.locks.hold(
            name.domain_uuid,
            wait=self.lock_wait,
            doing=doing,
            on_wait=partial(self.on_wait, name.domain),
            wanted=self.wanted,
        )

    def _reported(self, pair: Pair, doing: str, work: Callable[[Pair], Outcome]) -> Outcome:
        """Do one pair's work under the domain's lock, and sum it up; whatever goes wrong becomes events."""
        started, started_at = self.stopwatch(), self.clock()
        self._said[pair.name.key] = []
        self.publish(RunStarted(pair=pair.name, started_at=started_at))
        stuck = RunStuck(pair=pair.name, after_seconds=PATIENCE.total_seconds())
        try:
            with (
                self.host_gate.hold(on_stuck=partial(self.publish, stuck)),
                self.locked(pair.name, doing),
            ):
                outcome = work(pair)
        except DomainLockedError as error:
            outcome = self._skip(pair, "locked", str(error))
        except StorageBusyError as error:
            outcome = self._skip(pair, "storage_busy", str(error))
        except HypervisorError as error:
            outcome = self._cut_short(pair, error.reason, f"the run was cut short: {error}")
        except OSError as error:
            outcome = self._cut_short(pair, "state_directory", f"our own notes cannot be kept: {error}")
        except Exception as error:
            logging.getLogger(__name__).exception("run of %s", pair.name.key)
            outcome = self._cut_short(pair, "unforeseen", f"{type(error).__name__}: {error}")
        ended = RunFinished(
            pair=pair.name,
            result=outcome.result,
            started_at=started_at,
            ended_at=self.clock(),
            duration_seconds=self.stopwatch() - started,
            scheduled_at=outcome.scheduled_at,
            snapshot=outcome.snapshot,
        )
        self.publish(sum_up(ended, self._said.pop(pair.name.key, ())))
        return outcome

    def _run_locked(self, pair: Pair, order: Order | None = None) -> Outcome:
        uuid = pair.name.domain_uuid
        in_force = self.current(pair)
        if in_force is None:
            return Outcome(Result.NOTHING_DUE)  # the pair went, or we are told to stop, while this run waited
        pair = in_force
        if self.intents.exists(uuid):
            self.thawer.thaw(uuid)
        domain, plan = self._plan(pair, order)
        made_room, no_room = 0, list[Blocked]()
        if plan.room and not self.intents.exists(uuid):
            made_room, no_room = self.pruner.delete(pair, plan.room, upcoming=order.slot if order else None)
            domain, plan = self._plan(pair, order)
        if plan.take:
            outcome, plan = self._take(pair, domain, plan, plan.take, order)
        else:
            outcome = self._without_take(pair, plan)
        if order:
            self.pruner.report(pair, no_room)
            return replace(outcome, deleted=made_room)
        deleted = blocked = 0
        if outcome.result in {Result.TAKEN, Result.UNCHANGED}:
            deleted, blocked = self.pruner.prune(pair, plan.deletes, plan.blocked)
            now = self.current(pair)
            # What waits because the policy was changed is nothing that the new one owes.
            if blocked > len(plan.blocked) and now and now.policy == pair.policy:
                self._note_debt(pair, outcome.snapshot, blocked - len(plan.blocked))
        elif plan.refusal:
            known = {wait.snapshot for wait in plan.blocked}
            self.pruner.report(pair, [*plan.blocked, *(wait for wait in no_room if wait.snapshot not in known)])
        if outcome.result is Result.TAKEN or made_room or deleted:
            self._look_again(pair)
        return replace(outcome, deleted=made_room + deleted, blocked=blocked)

    def _look_again(self, pair: Pair) -> None:
        """Publish what the domain stands on after all that was done to it."""
        with suppress(HypervisorError):  # the run did well nevertheless
            domain = self.hypervisor.domain(pair.name.domain_uuid)
            storage = self.hypervisor.storage(domain, data_folders(domain, pair.policy))
            self._say(examine(pair, domain, storage, self.hypervisor.capabilities()))

    def _note_debt(self, pair: Pair, name: str | None, more: int) -> None:
        """Write into the newest snapshot's description that more has to wait than was planned."""
        with suppress(HypervisorError):  # the disk may be full; then the fuse may be too careful one day
            snapshots = self.hypervisor.domain(pair.name.domain_uuid).snapshots
            newest = next((s for s in snapshots if s.name == name), None)
            if newest and newest.mark:
                mark = replace(newest.mark, owed=newest.mark.owed + more)
                self.hypervisor.describe_snapshot(pair.name.domain_uuid, newest.name, mark)

    def _take(
        self, pair: Pair, domain: Domain, plan: Plan, request: TakeRequest, order: Order | None
    ) -> tuple[Outcome, Plan]:
        """Wait for the storage, then take between the hooks; return how it went and the plan in the end."""
        ram = request.mark.consistency is Consistency.MEMORY
        with self.gates.hold(data_folders(domain, pair.policy), heavy=ram) as waited:
            if waited:
                now = self.current(pair)
                if now is None:
                    return Outcome(Result.NOTHING_DUE), plan
                pair = now
                _, plan = self._plan(pair, order)
            if plan.take is None:
                return self._without_take(pair, plan), plan
            return self._between_hooks(pair, plan, plan.take, order)

    def _between_hooks(self, pair: Pair, plan: Plan, request: TakeRequest, order: Order | None) -> tuple[Outcome, Plan]:
        hooks, before = pair.policy.hooks, pair
        try:
            if hooks.before and not self._run_hook(pair, request, "before", "due") and hooks.before.required:
                outcome = self._skip(pair, "hook", "the required hook `before` failed, so nothing was taken")
            else:
                now: Pair | None = pair
                if hooks.before and (now := self.current(pair)):
                    _, plan = self._plan(now, order)  # time has passed, and a hook may well shut a guest off
                    request = plan.take or request
                pair = now or pair
                if now is None:
                    outcome = Outcome(Result.NOTHING_DUE)
                elif plan.take is None:
                    outcome = self._without_take(pair, plan)
                else:
                    taken = self._taker.take(pair, plan.take)
                    self._quarantine.pop(pair.name.key, None)
                    result = Result.TAKEN if taken else Result.FAILED
                    outcome = Outcome(result, request.mark.scheduled_at, taken)
        except BaseException:
            self._run_hook(before, request, "on_failure", Result.FAILED)
            raise
        self._run_hook(before, request, "on_failure" if outcome.wants_retry else "after", outcome.result)
        return outcome, plan

    def _without_take(self, pair: Pair, plan: Plan) -> Outcome:
        if plan.refusal:
            return self._refuse(pair, plan.refusal, plan.due.slot)
        return self._confirm(pair, plan.unchanged) if plan.unchanged else Outcome(Result.NOTHING_DUE)

    def _plan(self, pair: Pair, order: Order | None = None) -> tuple[Domain, Plan]:
        """Read the domain and what is below it, and plan its run."""
        domain = drop_gone_links(self.hypervisor, self.hypervisor.domain(pair.name.domain_uuid))
        if self.intents.exists(domain.uuid):
            # It may be frozen and its agent does not answer: to ask it for another freeze would only take time.
            domain = replace(domain, agent_connected=False)
        now, capabilities = self.clock(), self.hypervisor.capabilities()
        slot = order.slot if order else due_for(domain, pair.policy, now).slot
        storage = self.hypervisor.storage(domain, data_folders(domain, pair.policy)) if slot else None
        if storage:
            self._say(examine(pair, domain, storage, capabilities))
        plan = plan_run(
            domain,
            pair.policy,
            capabilities,
            now=now,
            attempt=self._taker.next_attempt(pair, slot),
            unwilling=self.pruner.unwilling(pair),
            storage=storage,
            policies=pair.policies,
            order=order,
        )
        return domain, plan

    def _refuse(self, pair: Pair, refusal: Refusal, slot: datetime | None) -> Outcome:
        key, quarantined = pair.name.key, not refusal.reason.heals
        again = quarantined and self._quarantine.get(key) == refusal.detail
        if quarantined:
            self._quarantine[key] = refusal.detail
        else:
            self._quarantine.pop(key, None)
        self._say(
            RunSkipped(
                pair=pair.name,
                reason=refusal.reason,
                detail=refusal.detail,
                refused=True,
                quarantined=quarantined,
                again=again,
            )
        )
        return Outcome(Result.SKIPPED, slot, quarantined=quarantined)

    def _cut_short(self, pair: Pair, reason: str, detail: str) -> Outcome:
        """Return how a run ended that an error broke off: it did well if it had its snapshot by then."""
        for event in self._said[pair.name.key]:
            if isinstance(event, SnapshotTaken | SnapshotUnchanged):
                logging.getLogger(__name__).warning("after %s: %s", event.snapshot, detail)
                result = Result.TAKEN if isinstance(event, SnapshotTaken) else Result.UNCHANGED
                return Outcome(result, event.scheduled_at, event.snapshot)
        return self._skip(pair, reason, detail)

    def _skip(self, pair: Pair, reason: str, detail: str) -> Outcome:
        self._say(RunSkipped(pair=pair.name, reason=reason, detail=detail))
        return Outcome(Result.SKIPPED, pair.due.slot)

    def _confirm(self, pair: Pair, confirm: Confirm) -> Outcome:
        """Write into the newest snapshot's description that it holds the state of now."""
        self._quarantine.pop(pair.name.key, None)
        self.hypervisor.describe_snapshot(pair.name.domain_uuid, confirm.snapshot, confirm.mark)
        self._say(SnapshotUnchanged(pair=pair.name, snapshot=confirm.snapshot, scheduled_at=confirm.slot))
        return Outcome(Result.UNCHANGED, confirm.slot, confirm.snapshot)

    def _run_hook(self, pair: Pair, request: TakeRequest, word: str, result: str) -> bool:
        """Run one of the policy's hooks, if it has it, publish how it ended, and return whether it did well."""
        hook: Hook | None = getattr(pair.policy.hooks, word)
        if hook is None:
            return True
        variables = {
            "SNAPSHOT_HOOK": word,
            "SNAPSHOT_DOMAIN": pair.name.domain,
            "SNAPSHOT_DOMAIN_UUID": pair.name.domain_uuid,
            "SNAPSHOT_POLICY": pair.name.policy,
            "SNAPSHOT_NAME": request.name,
            "SNAPSHOT_CONSISTENCY": request.mark.consistency,
            "SNAPSHOT_RESULT": result,
        }
        ended = run_hook(hook.command, variables, timeout=hook.timeout)
        self._say(
            HookFinished(
                pair=pair.name,
                hook=word,
                ok=ended.ok,
                detail=ended.detail,
                output=ended.output,
                duration_seconds=ended.duration_seconds,
            )
        )
        return ended.ok
