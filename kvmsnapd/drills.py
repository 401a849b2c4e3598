"""The drills that policies ask for: one at a time, on a thread of its own."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.drill import due_drills
from kvmsnapd.errors import KvmsnapdError
from kvmsnapd.events import DrillSkipped

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from kvmsnapd.driller import Driller
    from kvmsnapd.fleet import Pair

_TRIED_AGAIN_AFTER = timedelta(hours=1)
"""A drill that could not be made: the host may have more memory then."""


@dataclass
class Drills:
    """Makes the drills that are due. What is due follows from the snapshots, so nothing is kept here that matters."""

    driller: Driller
    clock: Callable[[], datetime]
    done: Callable[[], None]
    """Is called after each."""
    _not_before: dict[str, datetime] = field(default_factory=dict)

    def run_forever(
        self, pairs: Callable[[], Iterable[Pair]], stopping: threading.Event, pause: Callable[[], float]
    ) -> None:
        """Look after each pause whether a drill is due, until we are stopping."""
        while not stopping.wait(pause()):
            try:
                self.run_next(pairs())
            except Exception:  # the next one may do better
                logging.getLogger(__name__).exception("a drill ended in an unforeseen error")

    def run_next(self, pairs: Iterable[Pair]) -> bool:
        """Make the drill that waits longest; return whether there was one."""
        now = self.clock()
        for pair in due_drills(pairs, now=now):
            if now < self._not_before.get(pair.name.key, now) or pair.newest is None:
                continue
            self._not_before[pair.name.key] = now + _TRIED_AGAIN_AFTER
            try:
                self.driller.drill(pair.name, pair.newest.name, pair.policy.drill)
                del self._not_before[pair.name.key]
            except KvmsnapdError as error:
                self.driller.publish(DrillSkipped(pair=pair.name, snapshot=pair.newest.name, detail=str(error)))
            self.done()
            return True
        return False
