"""Take one snapshot: freeze guarded by an intent, the fallback when the agent fails, and a look at what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvmsnapd.errors import (
    DomainBusyError,
    FreezeRefusedError,
    GuestAgentRefusedError,
    GuestAgentUnavailableError,
    GuestFrozenError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
)
from kvmsnapd.events import GuestFrozen, SnapshotDowngraded, SnapshotFailed, SnapshotTaken
from kvmsnapd.model import Consistency
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.watching import Work, unwatched

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from kvmsnapd.events import Publish
    from kvmsnapd.fleet import Pair
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Snapshot, TakeRequest
    from kvmsnapd.state_files import FreezeIntents
    from kvmsnapd.thaw import Thawer
    from kvmsnapd.watching import Watch


@dataclass
class Taker:
    """Carries out take requests; errors of the hypervisor become events. Safe to call from several threads."""

    hypervisor: Hypervisor
    intents: FreezeIntents
    thawer: Thawer
    publish: Publish
    stopwatch: Callable[[], float]
    watch: Watch = unwatched
    # Per pair, a slot and how many names of it must not be used again: the outcome of a take stayed unknown, or it met
    # a file left behind by one that was cut off.
    _used_up: dict[str, tuple[datetime, int]] = field(default_factory=dict)

    def next_attempt(self, pair: Pair, slot: datetime | None) -> int:
        """Return the first attempt at this slot whose name may be used."""
        used_slot, used = self._used_up.get(pair.name.key, (slot, 0))
        return 1 + (used if used_slot == slot else 0)

    def take(self, pair: Pair, request: TakeRequest) -> str | None:
        """Take the snapshot and return its name; None when it failed, which has been published."""
        try:
            name = self._take_quiesced(pair, request) if request.quiesce else self._take_once(pair, request)
        except HypervisorError as error:
            unknown = isinstance(error, HypervisorUnreachableError)
            asked = isinstance(error, GuestAgentUnavailableError)  # then it was thawed, or tried, already
            if request.quiesce and not unknown and not asked and self.intents.exists(request.domain_uuid):
                self.thawer.thaw(request.domain_uuid)
            if isinstance(error, SnapshotExistsError):
                # libvirtd may have finished a call that was cut off on our side after we had listed the snapshots.
                snapshots = self.hypervisor.domain(request.domain_uuid).snapshots
                existing = next((s for s in snapshots if s.name == request.name), None)
                if existing and existing.mark:  # ours: for a person's snapshot of this name it would be None
                    self._publish_taken(pair, replace(request, mark=existing.mark), existing, None)
                    return existing.name
            if unknown or isinstance(error, SnapshotExistsError):
                self._use_up(pair, request)
            state = "whether it was taken is not known yet and will be looked up" if unknown else "none was taken"
            self._failed(pair, request, error, state)
            return None
        if name:
            self._used_up.pop(pair.name.key, None)
        return name

    def _take_quiesced(self, pair: Pair, request: TakeRequest) -> str | None:
        """Take it with the guest frozen, or without if the agent fails and the policy allows that."""
        try:
            return self._take_once(pair, request, frozen=self._ask_agent(request))
        except GuestFrozenError as error:
            # Somebody is at work in there, or has died on it; to thaw could break a backup.
            self.publish(GuestFrozen(pair=pair.name, error=str(error)))
            problem: GuestAgentUnavailableError = error
        except GuestAgentUnavailableError as error:
            self._after_failed_freeze(pair, request, error)
            problem = error
        if pair.policy.consistency is not ConsistencyRule.FILESYSTEM_PREFERRED:
            raise problem
        self.publish(SnapshotDowngraded(pair=pair.name, snapshot=request.name, error=str(problem)))
        return self._take_once(pair, replace(request, mark=replace(request.mark, consistency=Consistency.CRASH)))

    def _ask_agent(self, request: TakeRequest) -> tuple[str, ...]:
        """Return what will be frozen. A silent agent is found out here, before a freeze is sent to it."""
        try:
            return self.hypervisor.filesystems(request.domain_uuid)
        except (GuestFrozenError, HypervisorUnreachableError):
            raise
        except HypervisorError as error:
            if isinstance(error, GuestAgentUnavailableError) and not isinstance(error, GuestAgentRefusedError):
                raise
            return ()  # it is there, and too old or not allowed to tell

    def _after_failed_freeze(self, pair: Pair, request: TakeRequest, error: GuestAgentUnavailableError) -> None:
        """Thaw after a freeze that failed; raise if libvirt has changed the domain nevertheless."""
        if self.intents.exists(request.domain_uuid):
            self.thawer.thaw(request.domain_uuid)
        active = {disk.path for disk in self.hypervisor.domain(request.domain_uuid).disks}
        left = [overlay for _, overlay in request.overlays if overlay in active]
        if left:
            # An agent that falls silent between freeze and thaw: libvirt 9.0 has switched the disks by then, reports
            # error 86 and forgets the snapshot (measured).
            self._use_up(pair, request)
            msg = f"{error}; libvirt switched to {', '.join(left)} without a snapshot of it"
            raise GuestAgentUnavailableError(msg, operation=error.operation, domain=error.domain, code=error.code)

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

    def _take_once(self, pair: Pair, request: TakeRequest, frozen: tuple[str, ...] = ()) -> str:
        started = self.stopwatch()
        # An intent that was there before stays: somebody may have left this guest frozen, and only a thaw ends that.
        guarding = request.quiesce and self.intents.record(request.domain_uuid)
        try:
            with self.watch(Work(pair.name, f"taking {request.name}")):
                snapshot = self.hypervisor.take_snapshot(request)
        except (GuestFrozenError, FreezeRefusedError):
            if guarding:  # nothing was frozen by us
                self.intents.clear(request.domain_uuid)
            raise
        # After any other error the intent stays until a thaw has ended it. libvirt thaws by itself, but does not tell
        # when that failed; and an agent that did not answer may still carry out the freeze it was sent (measured on
        # libvirt 9.0 and 11.3: error 86 or 112, and the guest was frozen once its agent woke up).
        if guarding:
            self.intents.clear(request.domain_uuid)
        duration = self.stopwatch() - started
        self._check_taken(request, snapshot)
        self._publish_taken(pair, request, snapshot, duration, frozen)
        return snapshot.name

    def _publish_taken(
        self, pair: Pair, request: TakeRequest, snapshot: Snapshot, duration: float | None, frozen: tuple[str, ...] = ()
    ) -> None:
        self.publish(
            SnapshotTaken(
                pair=pair.name,
                snapshot=snapshot.name,
                scheduled_at=request.mark.scheduled_at,
                kind=request.mark.kind,
                consistency=request.mark.consistency,
                duration_seconds=duration,
                frozen=frozen,
                excluded=request.mark.excluded,
                paused_seconds=snapshot.paused_seconds,
            )
        )

    def _check_taken(self, request: TakeRequest, snapshot: Snapshot) -> None:
        """Raise unless libvirt made what was asked for; a snapshot that would lie about itself is deleted again."""
        overlays = dict(snapshot.overlays)
        if snapshot.mark != request.mark:
            problem = "libvirt did not keep the description, so it would not be known as ours"
        elif snapshot.offline != (request.mark.consistency is Consistency.OFFLINE):
            problem = "the domain was started or shut off in this very moment"
        elif any(overlays.get(target) != path for target, path in request.overlays):
            problem = f"libvirt put other overlays on it: {overlays}"
        else:
            return
        self.hypervisor.delete_snapshot(request.domain_uuid, snapshot.name)
        msg = f"{snapshot.name} was taken and deleted again: {problem}"
        raise DomainBusyError(msg, operation="snapshot_create", domain=request.domain_name)
