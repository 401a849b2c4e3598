"""Where the outside sees the daemon: the log, and the metrics with their endpoint and file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsnapd.endpoint.exposition import Exposition
from kvmsnapd.endpoint.server import MetricsServer
from kvmsnapd.errors import HypervisorError
from kvmsnapd.findings import FindingsNote
from kvmsnapd.logs import log_event
from kvmsnapd.metrics import Metrics

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection

    from kvmsnapd.config import Config
    from kvmsnapd.events import Event, Publish
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.series import Observation


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

    def keep_only(self, keys: Collection[str]) -> None:
        """Forget what is known of other pairs than these."""
        self._metrics.keep_only(keys)

    def sample_storage(self, hypervisor: Hypervisor, stopping: threading.Event, pause_seconds: float) -> None:
        """Keep the free space of all folders fresh until told to stop; a storage that hangs holds up nothing else."""
        while not stopping.wait(pause_seconds):
            for folder in list(self._metrics.tally.storages):
                try:
                    free = hypervisor.free_bytes(folder)
                except HypervisorError:
                    continue  # libvirt is away; that is told elsewhere
                if free is not None:
                    self._metrics.sample({folder: free})

    def after_tick(self) -> None:
        """Write what has to be in files; one that cannot be written is logged once and stops nothing."""
        self._note.write(self._metrics.tally)
        if self._textfile is None:
            return
        try:
            self._metrics.write_textfile(self._textfile)
            self._trouble = None
        except OSError as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                logging.getLogger(__name__).error("metrics.textfile cannot be written: %s", error)  # noqa: TRY400

    def close(self) -> None:
        """Give the endpoint up, and note what is known for the next start."""
        if self._server:
            self._server.close()
        self._note.write(self._metrics.tally)
