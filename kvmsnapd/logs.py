"""Structured logs: every event as one record; other libraries' records in the same form."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

import structlog

from kvmsnapd.events import RunEvent
from kvmsnapd.model import PairName

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor

    from kvmsnapd.events import Event

_log = structlog.stdlib.get_logger("kvmsnapd")


def configure_logging(*, level: str, form: str) -> None:
    """Send all records to stderr, as JSON lines or for people; may be called again to change it.

    Args:
        level: the least severe records to show.
        form: ``json``, ``console``, or ``auto``: console on a terminal, JSON elsewhere.
    """
    people = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor] = (
        [_unfold, structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ and sys.stderr.isatty())]
        if people
        else [
            # Local variables in tracebacks could hold secrets.
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
            ),
            structlog.processors.JSONRenderer(),
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("apscheduler").setLevel(logging.WARNING)  # it logs every run twice at INFO
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _unfold(_logger: object, _method: str, record: EventDict) -> EventDict:
    """Show lists of texts with line breaks, such as problems of the configuration, as people read them."""
    for key, value in record.items():
        if isinstance(value, tuple) and any(isinstance(text, str) and "\n" in text for text in value):
            record[key] = "\n" + "\n".join(value)
    return record


def log_event(event: Event) -> None:
    """Write one event; its fields become keys."""
    _log.log(getattr(logging, event.severity.upper()), event.NAME, **event_fields(event))


def event_fields(event: Event) -> dict[str, Any]:
    """Return the event's fields as plain values; a run's domain, UUID and policy come first."""
    fields: dict[str, Any] = {}
    if isinstance(event, RunEvent):
        fields = dataclasses.asdict(event.pair)
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        if isinstance(value, PairName):
            continue
        fields[field.name] = value.isoformat() if isinstance(value, datetime) else value
    return fields
