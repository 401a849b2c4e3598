"""Carry out a restore drill: overlays on what a snapshot froze, a throw-away domain on them, nothing left of both."""

from __future__ import annotations

import time
import uuid
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvmsnapd.drill import plan_drill
from kvmsnapd.errors import (
    DrillFailedError,
    DrillRefusedError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    StorageFullError,
)
from kvmsnapd.events import DrillFinished
from kvmsnapd.model import Drill, DrillRequest
from kvmsnapd.naming import DRILL_NAME
from kvmsnapd.plan import newest_drill

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from datetime import datetime

    from kvmsnapd.events import Publish
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain, PairName, Snapshot
    from kvmsnapd.policy import DrillRules


@dataclass
class Driller:
    """Tries snapshots, each beside its domain, which goes on; so do its takes.

    Args:
        locked: holds a domain's lock; it is held for a moment, to write down what came of it.
        reading: keeps what a domain's snapshots froze from being merged.
        wanted: asked again and again while the copy boots; once it says no the drill is given up.
    """

    hypervisor: Hypervisor
    publish: Publish
    clock: Callable[[], datetime]
    locked: Callable[[PairName], AbstractContextManager[None]]
    reading: Callable[[str], AbstractContextManager[None]]
    wanted: Callable[[], bool] = lambda: True
    stopwatch: Callable[[], float] = time.monotonic
    progress: Callable[[str], AbstractContextManager[object]] = field(default=lambda _what: nullcontext())

    def drill(self, pair: PairName, snapshot: str, rules: DrillRules) -> Drill:
        """Boot a copy of the snapshot, and return what came of it; it is noted in the description of the newest one.

        Raises:
            DrillRefusedError: it could not be tried, or was given up; nothing is left, and nothing noted.
            HypervisorError: libvirt does not answer; nothing is noted.
        """
        own = str(uuid.uuid4())
        started = self.stopwatch()
        failure: str | None = None
        reason = ""
        with self.reading(pair.domain_uuid):  # nothing is merged below the copy
            files, policy = self._plan(pair, snapshot, own)
            try:
                made = self._boot(pair, snapshot, own, files, rules)
                failure, reason = made or (None, "")
                ended = self.clock().replace(microsecond=0)
                drill = Drill(ended, failure, None if failure else ended)
            finally:
                for path in files.values():
                    with suppress(HypervisorError):  # doctor names it
                        self.hypervisor.remove_file(path)
        if policy:
            drill = self._note(pair, policy, drill)
        self.publish(
            DrillFinished(
                pair=pair,
                snapshot=snapshot,
                ok=failure is None,
                reason=reason,
                detail=failure or "",
                duration_seconds=self.stopwatch() - started,
            )
        )
        return drill

    def _plan(self, pair: PairName, name: str, own: str) -> tuple[dict[str, str], str | None]:
        """Return the overlays' paths, and the policy whose newest snapshot this is, None if it is nobody's."""
        domain = self.hypervisor.domain(pair.domain_uuid)
        found = next((s for s in domain.snapshots if s.name == name), None)
        if found is None:
            msg = f"{pair.domain} has no snapshot {name} any more; nothing was tried"
            raise SnapshotNotFoundError(msg, operation="drill", domain=pair.domain)
        plan = plan_drill(domain, found, own)
        if isinstance(plan, str):
            raise DrillRefusedError(plan)
        policy = found.mark.policy if found.mark else ""
        return plan.files, policy if found == self._newest(domain, policy) else None

    def _newest(self, domain: Domain, policy: str) -> Snapshot | None:
        """Return a policy's newest snapshot that is not dated in the future."""
        own = [(s.mark.scheduled_at, s.mark.attempt, s) for s in domain.of_policy(policy) if s.mark]
        return max((o for o in own if o[0] <= self.clock()), key=lambda o: o[:2], default=(None, None, None))[2]

    def _boot(
        self, pair: PairName, name: str, own: str, files: dict[str, str], rules: DrillRules
    ) -> tuple[str, str] | None:
        """Return what went wrong and the word for it, None if the copy came up."""
        try:
            self._create_overlays(pair, name, files)
            request = DrillRequest(
                pair.domain_uuid,
                name,
                f"{DRILL_NAME}{own[:8]}",
                own,
                files,
                rules.deadline.total_seconds(),
                rules.console,
                rules.memory_bytes,
            )
            with self.progress(f"{pair.domain}: a copy of {name} boots"):
                self.hypervisor.run_drill(request, wanted=self.wanted)
        except DrillFailedError as error:
            return str(error), error.reason
        return None

    def _create_overlays(self, pair: PairName, name: str, files: dict[str, str]) -> None:
        """Put overlays on the snapshot; QEMU looks at what is below then, and an image that is damaged is refused."""
        try:
            self.hypervisor.create_overlays(pair.domain_uuid, name, files)
        except (HypervisorUnreachableError, SnapshotExistsError, SnapshotNotFoundError, StorageFullError):
            raise
        except HypervisorError as error:
            msg = f"libvirt could put no overlay on it: {error}"
            raise DrillFailedError(msg, reason="start") from error

    def _note(self, pair: PairName, policy: str, drill: Drill) -> Drill:
        """Write down what came of a drill of the policy's newest snapshot; return it with what was before.

        That of an older one says nothing of the newest, by which people and alerts go. One that was taken meanwhile
        carries the note, as each new one does.
        """
        with self.locked(pair):
            domain = self.hypervisor.domain(pair.domain_uuid)
            newest, last = self._newest(domain, policy), newest_drill(domain, policy)
            if drill.failure is not None and last:
                drill = replace(drill, verified_at=last.verified_at)
            if newest and newest.mark:
                marked = replace(newest.mark, drill=drill)
                self.hypervisor.describe_snapshot(pair.domain_uuid, newest.name, marked)
            return drill
