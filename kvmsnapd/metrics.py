"""What Prometheus sees: events go into one immutable tally, which every scrape reads as it is at that instant."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest

from kvmsnapd.series import Collector
from kvmsnapd.tally import Tally
from kvmsnapd.whole_file import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from kvmsnapd.events import Event
    from kvmsnapd.fleet import Fleet, Pair
    from kvmsnapd.series import Observation


class Metrics:
    """The registry of one daemon: :meth:`consume` feeds the tally, ``observe`` gives all else at each scrape."""

    def __init__(self, observe: Callable[[], Observation], tally: Tally | None = None) -> None:
        """Begin with what is known already."""
        self.tally = tally or Tally()
        self.registry = CollectorRegistry()
        self._observe = observe
        self.registry.register(Collector(self._look))
        self._writing = threading.Lock()  # for those that change the tally; a scrape does not wait for it

    def _look(self) -> Observation:
        tally = self.tally  # before the rest: of a pair that goes meanwhile nothing is told any more
        return replace(self._observe(), tally=tally)

    def consume(self, event: Event) -> None:
        """Take one event in."""
        with self._writing:
            self.tally = self.tally.after(event)

    def sample(self, free_bytes: Mapping[str, int]) -> None:
        """Take in what is free now in these folders."""
        with self._writing:
            self.tally = self.tally.with_free(free_bytes)

    def take_over(self, fleet: Fleet) -> None:
        """Forget everything of other pairs than this fleet's, and failures before its newest snapshots."""
        with self._writing:
            tally = self.tally.only([pair.name.key for pair in fleet.pairs])
            ended = [pair.name.key for pair in fleet.pairs if _has_recovered(pair, tally)]
            self.tally = tally.without_failures(ended) if ended else tally

    def forget_failures(self, keys: Collection[str]) -> None:
        """Begin to count failures in a row anew for these pairs: what applies to them has changed."""
        with self._writing:
            self.tally = self.tally.without_failures(keys)

    def write_textfile(self, path: Path) -> None:
        """Write all series into a file for node_exporter, at once; raise OSError if that cannot be done.

        Its collector runs as another user, and reads `*.prom` only.
        """
        replace_file(path, generate_latest(self.registry))


def _has_recovered(pair: Pair, tally: Tally) -> bool:
    failures = tally.pair(pair.name.key).failures
    return bool(failures and pair.last_success_at and pair.last_success_at >= failures.last_at)
