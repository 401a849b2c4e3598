"""What Prometheus sees: events go into one immutable tally, which every scrape reads as it is at that instant."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from kvmsnapd.series import Collector
from kvmsnapd.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from kvmsnapd.events import Event
    from kvmsnapd.series import Observation

_READABLE_BY_ALL = 0o644


class Metrics:
    """The registry of one daemon: :meth:`consume` feeds the tally, ``observe`` gives all else at each scrape."""

    def __init__(self, observe: Callable[[], Observation], tally: Tally | None = None) -> None:
        """Begin with what is known already."""
        self.tally = tally or Tally()
        self.registry = CollectorRegistry()
        self.registry.register(Collector(lambda: replace(observe(), tally=self.tally)))
        self._writing = threading.Lock()  # for those that change the tally; a scrape does not wait for it

    def consume(self, event: Event) -> None:
        """Take one event in."""
        with self._writing:
            self.tally = self.tally.after(event)

    def sample(self, free_bytes: Mapping[str, int]) -> None:
        """Take in what is free now in these folders."""
        with self._writing:
            self.tally = self.tally.with_free(free_bytes)

    def keep_only(self, keys: Collection[str]) -> None:
        """Forget everything of other pairs than these."""
        with self._writing:
            self.tally = self.tally.only(keys)

    def write_textfile(self, path: Path) -> None:
        """Write all series into a file for node_exporter, at once; raise OSError if that cannot be done."""
        draft = path.with_suffix(".new")  # its collector reads *.prom only
        draft.write_bytes(generate_latest(self.registry))
        draft.chmod(_READABLE_BY_ALL)  # node_exporter runs as another user
        draft.replace(path)
