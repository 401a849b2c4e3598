"""Structured logs: every event as one record; other libraries' records in the same form."""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import sys
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import structlog

from kvmsnapd import journal
from kvmsnapd.errors import without_passwords
from kvmsnapd.events import RunEvent
from kvmsnapd.model import PairName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from structlog.typing import EventDict, Processor

    from kvmsnapd.events import Event

_log = structlog.stdlib.get_logger("kvmsnapd")

_LONGEST_LINE = 48 * 1024
"""journald breaks longer lines of stderr apart (LineMax=), and none of the parts is JSON then."""
_CUTS = ((8192, 512), (1024, 64), (128, 8))
"""What is tried, one after the other, to get a line below that: characters of each text, entries of each list."""


def configure_logging(*, level: str, form: str, journal_socket: Path = journal.SOCKET) -> None:
    """Send all records to stderr, as JSON lines or for people, or to the journal; may be called again to change it.

    No record is lost while it changes. What cannot be written never raises.

    Args:
        level: the least severe records to show.
        form: ``json``, ``console``, ``journal``, or ``auto``: console on a terminal, JSON elsewhere.
    """
    people = form == "console" or (form == "auto" and _on_terminal())
    handler = (
        _JournalHandler(journal_socket)
        if form == "journal"
        else _StderrHandler(_for_people() if people else _as_json())
    )
    shared: list[Processor] = [structlog.stdlib.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    foreign: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.add_logger_name,
        *shared,
    ]
    handler.configure(foreign)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]  # in one step: a record of another thread finds either the old one or this one
    root.setLevel(level.upper())
    logging.getLogger("apscheduler").setLevel(logging.WARNING)  # it logs every run twice at INFO
    logging.captureWarnings(capture=True)


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


@contextmanager
def bound(pair: PairName) -> Iterator[None]:
    """Give all records of this thread, whoever writes them, the domain and policy of a run while it goes on."""
    with structlog.contextvars.bound_contextvars(**dataclasses.asdict(pair)):
        yield


# How records are written


def _for_people() -> list[Processor]:
    colors = "NO_COLOR" not in os.environ and _on_terminal()
    # Its own default shows local variables, which could hold secrets, as soon as rich is installed.
    plain = structlog.dev.plain_traceback
    return [
        structlog.processors.format_exc_info,
        _make_plain,
        _unfold,
        structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain),
    ]


def _as_json() -> list[Processor]:
    frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
    render = _render_for_journald if _stderr_is_the_journal() else structlog.processors.JSONRenderer()
    return [structlog.processors.ExceptionRenderer(frames), _make_plain, render]


def _as_datagram() -> list[Processor]:
    return [structlog.processors.format_exc_info, _make_plain, _render_datagram]


def _make_plain(_logger: object, _method: str, record: EventDict) -> EventDict:
    """Leave nothing but texts, numbers, lists and mappings, and no password of a URI in any of them."""
    return {key: _plain(value) for key, value in record.items()}


def _plain(value: object) -> Any:  # noqa: ANN401  # plain values of any kind
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return without_passwords(str(value))


def _unfold(_logger: object, _method: str, record: EventDict) -> EventDict:
    """Show lists of texts with line breaks, such as problems of the configuration, as people read them."""
    for key, value in record.items():
        if isinstance(value, tuple) and any(isinstance(text, str) and "\n" in text for text in value):
            record[key] = "\n" + "\n".join(value)
    return record


def _render_datagram(_logger: object, _method: str, record: EventDict) -> str:
    """Return the datagram; as text, since a formatter has to, in which each character is one byte."""
    return journal.encode(journal.fields_of(record)).decode("latin-1")


def _render_for_journald(logger: object, method: str, record: EventDict) -> str:
    """Return JSON that journald takes from stderr as one record, of our level."""
    priority = journal.PRIORITIES.get(record["level"], journal.PRIORITIES["info"])
    return f"<{priority}>{_fit(record, lambda fitting: str(_render_json(logger, method, fitting)))}"


_render_json = structlog.processors.JSONRenderer()


def _fit(record: EventDict, render: Callable[[EventDict], str]) -> str:
    """Cut what is long until a line is short enough; ``cut`` then says so, and each cut text ends in how much."""
    text, room = render(record), _LONGEST_LINE - 8
    for longest, most in _CUTS:
        if len(text) > room:
            text = render({key: _cut(value, longest, most) for key, value in record.items()} | {"cut": True})
    if len(text) > room:
        text = render({key: _cut(record[key], *_CUTS[-1]) for key in ("event", "level", "timestamp")} | {"cut": True})
    return text


def _cut(value: Any, longest: int, most: int) -> Any:  # noqa: ANN401  # plain values of any kind
    more = len(value) - (longest if isinstance(value, str) else most) if isinstance(value, str | tuple | dict) else 0
    if isinstance(value, str):
        return value if more <= 0 else f"{value[:longest]}… [{more} more characters]"
    if isinstance(value, tuple):
        kept = [_cut(entry, longest, most) for entry in value[:most]]
        return kept if more <= 0 else [*kept, f"… [{more} more]"]
    if isinstance(value, dict):
        first = {key[:longest]: _cut(entry, longest, most) for key, entry in list(value.items())[:most]}
        return first if more <= 0 else first | {"…": f"[{more} more]"}
    return value


# Where they go


class _Handler(logging.Handler):
    """Base of both: whatever happens to a record, the program that logs goes on."""

    def __init__(self, rendering: list[Processor]) -> None:
        super().__init__()
        self._rendering = rendering

    def configure(self, foreign: list[Processor]) -> None:
        """Say what is added to the records of other libraries."""
        self.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=foreign,
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *self._rendering],
            )
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; one that cannot be shown is told of."""
        with suppress(Exception):
            try:
                text = self.format(record)
            except Exception as error:  # noqa: BLE001  # a library's own words and values may do anything
                place = f"{record.name}, {record.pathname}:{record.lineno}"
                words = f"a record of {place} cannot be shown: {type(error).__name__}: {error}"
                text = self.format(_record(logging.ERROR, words))
            self.deliver(text, record)

    def deliver(self, text: str, record: logging.LogRecord) -> None:
        """Write what a record has become."""
        raise NotImplementedError


class _StderrHandler(_Handler):
    """Lines on stderr. One that is closed, or that nobody reads any more, loses them."""

    def __init__(self, rendering: list[Processor]) -> None:
        super().__init__(rendering)
        self._stream = sys.stderr  # None if there was none from the beginning

    def deliver(self, text: str, record: logging.LogRecord) -> None:  # noqa: ARG002
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def has_room(self) -> bool:
        """Whether a line can be written now, without waiting for whoever reads."""
        try:
            look = select.poll()
            look.register(self._stream.fileno(), select.POLLOUT)
            return bool(look.poll(0))
        except (OSError, ValueError):
            return True  # no file at all, so nobody to wait for


class _JournalHandler(_Handler):
    """Datagrams to the journal. While it takes none, lines of JSON on stderr, and never a wait."""

    def __init__(self, path: Path) -> None:
        super().__init__(_as_datagram())
        self._path = path
        self._instead = _StderrHandler(_as_json())
        self._told = False
        self._lost = 0

    def configure(self, foreign: list[Processor]) -> None:
        super().configure(foreign)
        self._instead.configure(foreign)

    def deliver(self, text: str, record: logging.LogRecord) -> None:
        try:
            journal.send(text.encode("latin-1"), self._path)
        except OSError as error:
            self._write_instead(record, error)
            return
        self._told = False
        if self._lost:
            words, self._lost = f"{self._lost} log records were lost: neither journal nor stderr took them", 0
            self.emit(_record(logging.WARNING, words))

    def _write_instead(self, record: logging.LogRecord, error: OSError) -> None:
        if not self._instead.has_room():
            self._lost += 1
            return
        if not self._told:
            words = f"the journal at {self._path} takes no records ({error.strerror}); until it does, they are here"
            self._instead.handle(_record(logging.WARNING, words))
            self._told = True
        self._instead.handle(record)


def _record(level: int, words: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, level, __file__, 0, words, None, None)


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (ValueError, AttributeError):  # closed, or never there
        return False


def _stderr_is_the_journal() -> bool:
    """Whether systemd has connected stderr to its journal; it then reads a level at the beginning of each line."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
