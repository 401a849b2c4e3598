"""Go back to a snapshot in place, step by step under the domain's lock; each step may be the last, and done again."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.copier import copy_bytes
from kvmsnapd.errors import HypervisorError, HypervisorUnreachableError, RestoreRefusedError, StorageFullError
from kvmsnapd.links import drop_gone_links
from kvmsnapd.model import DomainState, Kind, Restoring
from kvmsnapd.restore import needs_power_off, plan_restore, unfinished_files

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import AbstractContextManager
    from datetime import datetime

    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain
    from kvmsnapd.restore import RestorePlan

    Measure = Callable[[], tuple[int, int] | None]

SHUTDOWN_WAIT = timedelta(minutes=3)
"""How long a guest may take to shut down when it is asked to."""

_LOOK_SECONDS = 0.5
_WHOLE_SECOND = 1.1


@dataclass
class Restorer:
    """Carries out restores in place. The caller holds the lock of the domain.

    Args:
        say: is told in a few words what has just been done.
        progress: is told what takes long, and how to ask how much of it is done.
    """

    hypervisor: Hypervisor
    clock: Callable[[], datetime]
    say: Callable[[str], None]
    progress: Callable[[str, Measure], AbstractContextManager[object]] = field(
        default=lambda _what, _measure: nullcontext()
    )
    sleep: Callable[[float], None] = time.sleep
    wanted: Callable[[], bool] = lambda: True
    """Whether a further step is to be begun."""
    shutdown_wait: timedelta = SHUTDOWN_WAIT

    def plan(self, domain_uuid: str, name: str, *, discard: bool) -> tuple[Domain, RestorePlan]:
        """Return the domain as it is now, and what going back means for it.

        Raises:
            RestoreRefusedError: it must not be, with the reason and what to do.
        """
        domain = self.hypervisor.domain(domain_uuid)
        target = next((s for s in domain.snapshots if s.name == name), None)
        if target is None:
            msg = f"{domain.name} has no snapshot {name} any more; nothing was changed"
            raise RestoreRefusedError(msg)
        storage = self.hypervisor.storage(domain, ())
        plan = plan_restore(domain, target, now=self.clock(), discard=discard, storage=storage)
        if isinstance(plan, str):
            msg = f"{plan}. Nothing was changed"
            raise RestoreRefusedError(msg)
        return domain, plan

    def copy_size(self, domain: Domain, plan: RestorePlan) -> dict[str, int]:
        """Return by folder how many bytes the copy of the present state takes at the most; empty without a copy.

        Raises:
            StorageFullError: a folder has no room for it.
        """
        if plan.target.kind is Kind.INTERNAL:
            return {}
        active = {disk.target: disk.path or "" for disk in domain.disks if disk.target in plan.copies}
        try:
            return copy_bytes(self.hypervisor, domain, active.items(), plan.copies)
        except StorageFullError as error:
            msg = f"the present state of {domain.name} cannot be kept, or only given up with --discard-current: {error}"
            raise StorageFullError(msg, operation="restore", domain=domain.name) from error

    def restore(
        self,
        domain_uuid: str,
        name: str,
        *,
        agreed: Collection[str] | None = None,
        discard: bool = False,
        power_off: bool = False,
        start: bool | None = None,
    ) -> str | None:
        """Go back to the snapshot, or finish what an earlier call began; return the name of the state that was kept.

        Args:
            agreed: the snapshots that may be lost; None for whichever the plan names.
            discard: give the present state up.
            power_off: pull the plug of a guest that does not shut down.
            start: whether the guest is to run afterwards; None if it ran before, or the snapshot has its RAM.

        Raises:
            RestoreRefusedError: it cannot be; in which state the domain is then is said.
            HypervisorError: libvirt refused a step. The domain is then as it was or as it is to be, and a second call
                goes on.
        """
        drop_gone_links(self.hypervisor, self.hypervisor.domain(domain_uuid))
        domain, plan = self.plan(domain_uuid, name, discard=discard)
        surprising = [s.name for s in plan.lost if agreed is not None and s.name not in agreed]
        if surprising:
            msg = f"{', '.join(surprising)} was taken meanwhile and would be lost too. Nothing was changed: look again"
            raise RestoreRefusedError(msg)
        self.copy_size(domain, plan)
        ran = domain.state is not DomainState.SHUT_OFF or bool(plan.mark.restoring and plan.mark.restoring.ran)
        self._note(domain, plan, ran=ran)
        if needs_power_off(domain, plan):
            try:
                self._stop(domain, power_off=power_off)
            except RestoreRefusedError:
                self.hypervisor.describe_snapshot(domain_uuid, name, plan.mark)
                raise
            domain, plan = self.plan(domain_uuid, name, discard=discard)  # it wrote until now
            self._note(domain, plan, ran=ran)
        run = start if start is not None else ran or _has_ram(plan)
        self._go_on(domain, plan)
        try:
            kept = self._keep(domain, plan)
        except HypervisorUnreachableError:
            raise
        except HypervisorError as error:
            self._take_back(domain, plan)
            now = ", and is shut off now" if ran and plan.target.kind is not Kind.INTERNAL else ""
            msg = (
                f"the present state could not be kept: {error}. {domain.name} has not gone back{now}; "
                "--discard-current gives the present state up"
            )
            raise RestoreRefusedError(msg) from error
        self._go_on(domain, plan)
        if plan.target.kind is Kind.INTERNAL:
            self.hypervisor.revert_snapshot(domain_uuid, name)
            if not run:
                self.hypervisor.power_off(domain_uuid)
        else:
            self._change_line(domain, plan)
        self.hypervisor.describe_snapshot(domain_uuid, name, replace(plan.mark, restoring=None, standalone=False))
        self.say(f"{domain.name} has gone back to {name}")
        if run and self.hypervisor.domain(domain_uuid).state is DomainState.SHUT_OFF:
            self.hypervisor.start(domain_uuid, memory_file=plan.target.memory_file)
        self.say(f"{domain.name} {'runs' if run else 'is shut off'}")
        return kept

    def abandon(self, domain_uuid: str, name: str) -> None:
        """Take back a restore that was cut off before the domain had gone back: it stays as it is.

        Raises:
            RestoreRefusedError: none has begun, or the domain has gone back already.
        """
        domain, plan = self.plan(domain_uuid, name, discard=True)
        if not plan.resumed or plan.switched:
            state = "has gone back to it: call restore to finish it" if plan.resumed else "is not on the way back to it"
            msg = f"{domain.name} {state}; nothing was changed"
            raise RestoreRefusedError(msg)
        self._take_back(domain, plan)

    def _take_back(self, domain: Domain, plan: RestorePlan) -> None:
        for path in unfinished_files(domain, plan):
            self.hypervisor.remove_file(path)
        self.hypervisor.describe_snapshot(domain.uuid, plan.target.name, replace(plan.mark, restoring=None))

    def _go_on(self, domain: Domain, plan: RestorePlan) -> None:
        """Raise RestoreRefusedError if the next step is not to be begun."""
        if not self.wanted():
            again = f"kvmsnapd restore {domain.name} {plan.target.name}"
            msg = (
                f"stopped: the disks of {domain.name} are as they were, and nothing is taken or pruned until `{again}` "
                f"has finished it, or `{again} --abandon` has taken it back"
            )
            raise RestoreRefusedError(msg)

    def _note(self, domain: Domain, plan: RestorePlan, *, ran: bool) -> None:
        """Write into the snapshot's description that a restore to it is on its way."""
        note = Restoring(plan.begun_at, plan.leaves, ran)
        self.hypervisor.describe_snapshot(domain.uuid, plan.target.name, replace(plan.mark, restoring=note))

    def _stop(self, domain: Domain, *, power_off: bool) -> None:
        why = "is paused"
        if domain.state is DomainState.RUNNING:
            self.hypervisor.shut_down(domain.uuid)
            why = f"did not shut down within {self.shutdown_wait.total_seconds():.0f} s"
            with self.progress(f"{domain.name} shuts down", lambda: None):
                if self._is_off_within(domain, self.shutdown_wait):
                    self.say(f"{domain.name} is shut down")
                    return
        if not power_off or not self.wanted():
            msg = (
                f"{domain.name} {why}, and goes on as it was: shut it down and call this again, or give --power-off. "
                "Nothing was changed"
            )
            raise RestoreRefusedError(msg)
        self.hypervisor.power_off(domain.uuid)
        self.say(f"{domain.name} was powered off")

    def _is_off_within(self, domain: Domain, wait: timedelta) -> bool:
        for _ in range(int(wait.total_seconds() / _LOOK_SECONDS)):
            if self.hypervisor.domain(domain.uuid).state is DomainState.SHUT_OFF:
                return True
            if not self.wanted():
                return False
            self.sleep(_LOOK_SECONDS)
        return False

    def _keep(self, domain: Domain, plan: RestorePlan) -> str | None:
        """Keep the present state as the plan has it, and return its name; that of an earlier call's, too."""
        request = plan.keep
        if request is None:
            return plan.kept
        if plan.target.kind is Kind.INTERNAL:
            with self.progress("the present state is saved", lambda: None):
                self.hypervisor.take_snapshot(request)
            # libvirt tells a snapshot's time in whole seconds: the revert must not look as if nothing had been written.
            self.sleep(_WHOLE_SECOND)
        else:
            total = sum(self.copy_size(domain, plan).values())

            def measure() -> tuple[int, int]:
                return sum(self.hypervisor.allocated(request.overlays).values()), total

            active = {disk.target: disk for disk in domain.disks}
            with self.progress("the present state is copied", measure):
                for target, path in request.overlays:
                    self.hypervisor.remove_file(path)  # part of a copy that was cut off
                    disk = active[target]
                    self.hypervisor.copy_file(disk.path or "", path, source_format=disk.format)
            self.hypervisor.record_standalone(request)
        self.say(f"the present state is kept as {request.name}, and held")
        return request.name

    def _change_line(self, domain: Domain, plan: RestorePlan) -> None:
        """Put the domain on the snapshot's data, then take what is newer out of libvirt's records and off the disk."""
        self.hypervisor.go_on_from(domain.uuid, plan.target.name, dict(plan.overlays))
        for snapshot in plan.lost:
            self.hypervisor.forget_snapshot(domain.uuid, snapshot.name)
        for path in plan.leaves:
            self.hypervisor.remove_file(path)


def _has_ram(plan: RestorePlan) -> bool:
    return plan.target.memory_file is not None or (plan.target.kind is Kind.INTERNAL and not plan.target.offline)
