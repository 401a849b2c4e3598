"""What the HTTP endpoint answers: ``/metrics``, ``/-/healthy`` and ``/-/ready``."""

from __future__ import annotations

import asyncio
import gzip
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from kvmsnapd.endpoint.exposition import quality

if TYPE_CHECKING:
    from collections.abc import Callable

    Render = Callable[[str], tuple[bytes, str]]

_PATHS = ("/metrics", "/-/healthy", "/-/ready")
_MOST_ZIPPED = 20
_LEAST_ZIPPED = 1000  # bytes; less goes into one packet anyway
_SELDOM_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """How much the endpoint bears; times are seconds."""

    connections: int = 256
    """Open at once, those that shake hands included."""
    head: float = 10.0
    """From the accept, or the first byte of a further request, to the end of a request."""
    idle: float = 120.0
    """Between two requests; Prometheus asks every minute at the latest."""
    answer: float = 10.0
    """To find the answer; Prometheus waits no longer."""
    chunk: float = 10.0
    """For a client to take 64 KiB of it."""
    response: float = 60.0
    """For a client to take all of it."""
    linger: float = 1.0
    """For a client to close, after we did."""
    grace: float = 0.03
    """How long each may wait for a request, at least, however many others come."""
    stall: float = 0.25
    """The same, for taking 64 KiB of an answer."""
    look: float = 1.0
    """Between two looks at the web configuration and its certificates."""


class Answer(NamedTuple):
    """A response, before it has to do with a connection."""

    status: HTTPStatus
    body: bytes
    headers: tuple[tuple[str, str], ...]


def in_words(status: HTTPStatus, text: str, *headers: tuple[str, str]) -> Answer:
    """Return an answer of one line."""
    return Answer(status, f"{text}\n".encode(), (("Content-Type", "text/plain; charset=utf-8"), *headers))


class Complaints:
    """The log of what clients can cause: once a minute at most, so that they cannot fill it."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def tell(self, message: str, error: BaseException | None = None) -> None:
        """Log an error with its traceback, unless these words were told within the last minute."""
        if time.monotonic() - self._last.get(message, -_SELDOM_SECONDS) >= _SELDOM_SECONDS:
            self._last[message] = time.monotonic()
            logging.getLogger(__name__).error(message, exc_info=error)


class Answers:
    """Knows the paths; metrics are rendered on a thread of their own, one at a time."""

    def __init__(self, render: Render, ready: Callable[[], bool], complaints: Complaints) -> None:
        self._render, self._ready, self._complaints = render, ready, complaints
        self._zipped: dict[str, tuple[bytes, bytes]] = {}
        self._rendering = ThreadPoolExecutor(1, "render")

    async def to(self, method: str, target: str, *, accept: str, encodings: str) -> Answer:
        """Return the answer to a request, given its headers ``Accept`` and ``Accept-Encoding``."""
        path = _path(target)
        if path not in _PATHS:
            return in_words(HTTPStatus.NOT_FOUND, "not found; metrics are at /metrics")
        if method not in {"GET", "HEAD"}:
            return in_words(HTTPStatus.METHOD_NOT_ALLOWED, "only GET", ("Allow", "GET, HEAD"))
        try:
            if path == "/metrics":
                work = asyncio.get_running_loop().run_in_executor
                return await work(self._rendering, self._metrics, accept, accepts_gzip(encodings))
            if path == "/-/ready" and not self._ready():
                return in_words(HTTPStatus.SERVICE_UNAVAILABLE, "libvirt has not answered yet")
        except Exception as error:  # noqa: BLE001  # whatever it is, the next request may go well
            self._complaints.tell(f"{path} could not be answered", error)
            return in_words(HTTPStatus.INTERNAL_SERVER_ERROR, "this could not be answered; the log says why")
        return in_words(HTTPStatus.OK, "ok")

    def close(self) -> None:
        """End the thread after what it is at."""
        self._rendering.shutdown(wait=False, cancel_futures=True)

    def _metrics(self, accept: str, zipped: bool) -> Answer:  # noqa: FBT001
        body, kind = self._render(accept)
        headers = (("Content-Type", kind), ("Vary", "Accept, Accept-Encoding"))
        if not zipped or len(body) < _LEAST_ZIPPED:
            return Answer(HTTPStatus.OK, body, headers)
        text, small = self._zipped.get(kind, (b"", b""))
        if text is not body:
            small = gzip.compress(body, compresslevel=1)  # a tenth of the size in a tenth of the time
            if len(self._zipped) >= _MOST_ZIPPED:
                self._zipped.clear()
            self._zipped[kind] = (body, small)
        return Answer(HTTPStatus.OK, small, (*headers, ("Content-Encoding", "gzip")))


def _path(target: str) -> str:
    """Return the path of a request's target, which a proxy may give with the host."""
    if target.startswith(("http://", "https://")):
        try:
            target = urlsplit(target).path
        except ValueError:
            return ""
    return target.partition("?")[0]


def accepts_gzip(encodings: str) -> bool:
    """Tell whether an ``Accept-Encoding`` header lets us compress."""
    weights: dict[str, float] = {}
    for entry in encodings.lower().split(","):
        name, _, rest = entry.partition(";")
        key, _, value = rest.partition("=")
        weights[name.strip()] = quality(value.strip() if key.strip() == "q" else None)
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0))) > 0
