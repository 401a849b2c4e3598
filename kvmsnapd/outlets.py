"""Where the outside sees the daemon: the log, and the metrics with their endpoint and file."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsnapd.endpoint.exposition import Exposition
from kvmsnapd.endpoint.server import MetricsServer
from kvmsnapd.errors import HypervisorError
from kvmsnapd.events import GuestUnfrozen
from kvmsnapd.findings import FindingsNote
from kvmsnapd.logs import log_event
from kvmsnapd.metrics import Metrics
from kvmsnapd.model import DomainState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from kvmsnapd.config import Config
    from kvmsnapd.events import Event, Publish
    from kvmsnapd.fleet import Fleet
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.series import Observation
    from kvmsnapd.tally import Tally


class Outlets:
    """All of them, for one daemon."""

    def __init__(
        self, config: Config, observe: Callable[[], Observation], *, ready: Callable[[], bool], watch: Publish | None
    ) -> None:
        """Read what was found before the last stop, and bind the endpoint; :meth:`serve` begins to answer.

        Args:
            ready: whether libvirt has answered at least once.
            watch: receives every event, after logs and metrics.

        Raises:
            KvmsnapdError: the endpoint's address cannot be used.
        """
        settings = config.settings.metrics
        self._note = FindingsNote(config.state_directory)
        self._metrics = Metrics(observe, self._note.read())
        self._watch = watch
        self._textfile = Path(settings.textfile) if settings.textfile else None
        self._trouble: str | None = None
        self._server = (
            MetricsServer(
                Exposition(self._metrics.registry, process=True),
                listen=settings.listen,
                port=settings.port,
                ready=ready,
                web_config=Path(settings.web_config) if settings.web_config else None,
            )
            if settings.enabled
            else None
        )

    @property
    def url(self) -> str | None:
        """Where Prometheus finds the metrics; None if nothing listens."""
        return self._server.url if self._server else None

    @property
    def tally(self) -> Tally:
        """What all events add up to."""
        return self._metrics.tally

    def publish(self, event: Event) -> None:
        """Hand one event to everybody who wants it."""
        log_event(event)
        self._metrics.consume(event)
        if self._watch:
            self._watch(event)

    def serve(self) -> None:
        """Answer scrapes from now on; those that came before have waited."""
        if self._server:
            self._server.start()

    def take_over(self, fleet: Fleet) -> None:
        """Let the metrics be those of this fleet."""
        self._metrics.take_over(fleet)

    def forget_failures(self, keys: Collection[str]) -> None:
        """Begin to count failures in a row anew for these pairs."""
        self._metrics.forget_failures(keys)

    def look_again(self, hypervisor: Hypervisor, fleet: Fleet) -> None:
        """Look again at what runs have found and what may have changed since: free space, and guests that were frozen.

        For a thread of its own: a storage or a guest agent that hangs must hold up nothing else.
        """
        for folder in self._metrics.tally.storages:
            with suppress(HypervisorError):  # libvirt is away; that is told elsewhere
                free = hypervisor.free_bytes(folder)
                if free is not None:
                    self._metrics.sample({folder: free})
        for domain in fleet.domains:
            found = self._metrics.tally.domains.get(domain.uuid)
            # One that is still frozen, or does not answer, raises.
            with suppress(HypervisorError):
                if found and found.frozen and _is_off_or_answers(hypervisor, domain.uuid):
                    self.publish(GuestUnfrozen(domain=domain.name, domain_uuid=domain.uuid))

    def after_tick(self) -> None:
        """Write what has to be in files; one that cannot be written is logged once and stops nothing."""
        self._note.write(self._metrics.tally)
        if self._textfile is None:
            return
        try:
            self._metrics.write_textfile(self._textfile)
            self._trouble = None
        except OSError as error:
            if self._trouble != error.strerror:
                self._trouble = error.strerror
                logging.getLogger(__name__).error(  # noqa: TRY400
                    "metrics.textfile %s cannot be written: %s", self._textfile, error.strerror
                )

    def close(self) -> None:
        """Give the endpoint up, and note what is known for the next start."""
        if self._server:
            self._server.close()
        self._note.write(self._metrics.tally)


def _is_off_or_answers(hypervisor: Hypervisor, uuid: str) -> bool:
    if hypervisor.domain(uuid).state is not DomainState.SHUT_OFF:
        hypervisor.filesystems(uuid)
    return True
