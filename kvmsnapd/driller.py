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

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from datetime import datetime

    from kvmsnapd.events import Publish
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Mark, PairName
    from kvmsnapd.policy import DrillRules


@dataclass
class Driller:
    """Tries snapshots, each beside its domain, which goes on; so do its takes.

    Args:
        locked: holds a domain's lock; it is held for moments only.
        wanted: asked again and again while the copy boots; once it says no the drill is given up.
    """

    hypervisor: Hypervisor
    publish: Publish
    clock: Callable[[], datetime]
    locked: Callable[[PairName], AbstractContextManager[None]]
    wanted: Callable[[], bool] = lambda: True
    stopwatch: Callable[[], float] = time.monotonic
    progress: Callable[[str], AbstractContextManager[object]] = field(default=lambda _what: nullcontext())

    def drill(self, pair: PairName, snapshot: str, rules: DrillRules) -> Drill:
        """Boot a copy of the snapshot, note in its description what came of it, and return that.

        Raises:
            DrillRefusedError: it could not be tried, or was given up; nothing is left, and nothing noted.
            HypervisorError: libvirt does not answer; nothing is noted.
        """
        own = str(uuid.uuid4())
        started = self.stopwatch()
        failure: str | None = None
        reason = ""
        files = self._prepare(pair, snapshot, own)
        noted: Drill | None = None
        try:
            made = self._boot(pair, snapshot, own, files, rules)
            failure, reason = made or (None, "")
            ended = self.clock().replace(microsecond=0)
            noted = Drill(ended, failure, None if failure else ended)
        finally:
            for path in files.values():
                with suppress(HypervisorError):  # doctor names it
                    self.hypervisor.remove_file(path)
            drill = self._note(pair, snapshot, own, noted)
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
        return drill or noted  # the snapshot may have been deleted by hand meanwhile

    def _prepare(self, pair: PairName, name: str, own: str) -> dict[str, str]:
        """Hold the snapshot for the drill, and return the overlays' paths."""
        with self.locked(pair):
            domain = self.hypervisor.domain(pair.domain_uuid)
            found = next((s for s in domain.snapshots if s.name == name), None)
            if found is None:
                msg = f"{pair.domain} has no snapshot {name} any more; nothing was tried"
                raise SnapshotNotFoundError(msg, operation="drill", domain=pair.domain)
            plan = plan_drill(domain, found, own)
            if isinstance(plan, str):
                raise DrillRefusedError(plan)
            if found.mark:
                self._describe(pair, name, replace(found.mark, linked=(*found.mark.linked, own)))
            return plan.files

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

    def _note(self, pair: PairName, name: str, own: str, drill: Drill | None) -> Drill | None:
        """Take the hold back, and write down what came of the drill."""
        with self.locked(pair):
            snapshots = self.hypervisor.domain(pair.domain_uuid).snapshots
            mark = next((s.mark for s in snapshots if s.name == name), None)
            if mark is None:
                return None
            if drill and drill.failure is not None:
                known = [s.mark.drill for s in snapshots if s.mark and s.mark.policy == mark.policy and s.mark.drill]
                drill = replace(drill, verified_at=max((d.verified_at for d in known if d.verified_at), default=None))
            linked = tuple(other for other in mark.linked if other != own)
            self._describe(pair, name, replace(mark, linked=linked, drill=drill or mark.drill))
            return drill

    def _describe(self, pair: PairName, name: str, mark: Mark) -> None:
        self.hypervisor.describe_snapshot(pair.domain_uuid, name, mark)
