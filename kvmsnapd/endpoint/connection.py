"""One client of the HTTP endpoint, from accept to close, with a deadline for everything it may be slow at."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING

import h11

from kvmsnapd.endpoint.answers import Answer, in_words
from kvmsnapd.endpoint.stream import open_stream

if TYPE_CHECKING:
    import socket

    from kvmsnapd.config.web_config import WebConfig
    from kvmsnapd.endpoint.access import Access
    from kvmsnapd.endpoint.answers import Answers, Limits

_CHUNK = 65536
_READ = 2048  # h11 looks at the length of a head only while some of it is missing, so not much must come at once
_LONGEST_HEAD = 4096  # Prometheus' own is below 1000
_REASONS = {
    HTTPStatus.BAD_REQUEST: "this is no HTTP request",
    HTTPStatus.UNAUTHORIZED: "a user and password are needed",
    HTTPStatus.FORBIDDEN: "the certificate is none of those that are let in",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "the headers are too long",
    HTTPStatus.NOT_IMPLEMENTED: "this transfer encoding is not understood",
    HTTPStatus.SERVICE_UNAVAILABLE: "too many passwords are being compared; try again",
}
_MORE_HEADERS = {
    HTTPStatus.UNAUTHORIZED: ("WWW-Authenticate", 'Basic realm="kvmsnapd", charset="UTF-8"'),
    HTTPStatus.SERVICE_UNAVAILABLE: ("Retry-After", "1"),
}


class Places:
    """Who is connected, and who has to go first when all places are taken."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all: set[Connection] = set()
        # Since when, the longest first. Who is in neither is being given an answer.
        self._waiting: dict[Connection, float] = {}
        self._writing: dict[Connection, float] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def full(self) -> bool:
        """Whether another connection would be one too many."""
        return len(self._all) >= self._limits.connections

    def note(self, connection: Connection, *, waiting: bool = False, writing: bool = False) -> None:
        """Note what a connection does from now on."""
        self._waiting.pop(connection, None)
        self._writing.pop(connection, None)
        if waiting or writing:
            (self._waiting if waiting else self._writing)[connection] = time.monotonic()

    def enter(self, connection: Connection) -> None:
        """Take a place, waiting for a request."""
        self._all.add(connection)
        self.note(connection, waiting=True)

    def leave(self, connection: Connection) -> None:
        """Give the place back."""
        self._all.discard(connection)
        self.note(connection)

    def make_room(self, *, at_once: bool = False) -> bool:
        """Close the connection that has been waiting longest without a request, or else has been taking an answer in.

        Of those clients, by address, that have most places. Return False if none has done so long enough.
        """
        held = Counter(connection.peer for connection in self._all)
        crowd = {peer for peer, count in held.items() if count == max(held.values())}
        for table, patience in ((self._waiting, self._limits.grace), (self._writing, self._limits.stall)):
            oldest = next((connection for connection in table if connection.peer in crowd), None)
            if oldest and (at_once or time.monotonic() - table[oldest] >= patience):
                oldest.drop()
                return True
        return False

    def drop_all(self) -> list[asyncio.Task[None]]:
        """Close all connections; return what ends then."""
        tasks = [connection.task for connection in self._all if connection.task]
        for connection in list(self._all):
            connection.drop()
        return tasks


class Connection:
    """Reads requests and writes the responses, one after the other."""

    def __init__(self, sock: socket.socket, places: Places, limits: Limits, answers: Answers, access: Access) -> None:
        self._sock, self._places, self._limits = sock, places, limits
        self.peer = _address_of(sock)
        self._answers, self._access = answers, access
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_LONGEST_HEAD)
        self._begun = self._opened = False
        self._idle = False  # nothing has come of the next request, and one was answered before
        self._ends = math.inf  # when the client must have taken all of the response
        self.task: asyncio.Task[None] | None = None

    def drop(self) -> None:
        """Close without another word; the place is free at once."""
        self._places.leave(self)
        if self.task:
            self.task.cancel()

    def finish(self) -> None:
        """Close what is still open. To be called when the task has ended, even if it was never begun."""
        self._places.leave(self)
        if self._opened:
            self._stream.abort()
        elif not self._begun:  # else asyncio owns the socket
            self._sock.close()
        # Both lead back to us, and what is closed should not wait for the garbage collector.
        self.task = None
        vars(self).pop("_deadline", None)

    async def serve(self, config: WebConfig) -> None:
        """Answer requests until the client or we have had enough; raises OSError, TimeoutError included, at trouble."""
        self._begun = True
        async with asyncio.timeout(self._limits.head) as self._deadline:
            self._stream = await open_stream(self._sock, config.context)
            self._opened = True
            await self._stream.shake_hands()
            while await self._exchange(config):
                self._idle, self._ends = True, math.inf
                await asyncio.sleep(0)  # a client that sends many requests at once must not hold up others
            self._places.note(self, waiting=True)
            self._allow(self._limits.linger)
            await self._stream.close()

    async def _exchange(self, config: WebConfig) -> bool:
        """Answer one request; return whether there may be another."""
        try:
            request = await self._receive()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                await self._send(_refusal(status), last=True)
            return False
        if request is None:
            return False
        if self._access.current().context is not config.context:
            return False  # who was let in by a handshake of other times has to shake hands again
        self._places.note(self)
        self._allow(self._limits.answer)
        answer = await self._answer(request)
        # Where places are short nobody keeps one by asking again and again.
        last = self._places.full or self._http.their_state is not h11.DONE
        await self._send(answer, last=last, bodiless=request.method == b"HEAD")
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _receive(self) -> h11.Request | None:
        """Return the next request once its head is here, None if the client has closed. No body is ever read."""
        self._places.note(self, waiting=True)
        if self._idle:
            self._allow(self._limits.head if self._http.trailing_data[0] else self._limits.idle)
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._stream.read(_READ)
            if self._idle:
                self._idle = False
                self._allow(self._limits.head)
            self._http.receive_data(data)
        if not isinstance(event, h11.Request):
            return None
        if not any(name in {b"content-length", b"transfer-encoding"} for name, _ in event.headers):
            self._http.next_event()  # the end of the request; else there is more to come, and it is the last one
        return event

    async def _answer(self, request: h11.Request) -> Answer:
        found: dict[bytes, list[str]] = {}
        for name, value in request.headers:
            found.setdefault(bytes(name), []).append(value.decode("latin-1"))
        refused = await self._access.refusal(found.get(b"authorization", []), self._stream.certificate, self.peer)
        if refused:
            return _refusal(refused)
        return await self._answers.to(
            request.method.decode("latin-1"),
            request.target.decode("latin-1"),
            accept=",".join(found.get(b"accept", [])),
            encodings=",".join(found.get(b"accept-encoding", [])),
        )

    async def _send(self, answer: Answer, *, last: bool, bodiless: bool = False) -> None:
        headers = [*answer.headers, ("Content-Length", str(len(answer.body))), ("Date", formatdate(usegmt=True))]
        headers += self._access.current().headers
        if last:
            headers.append(("Connection", "close"))
        response = h11.Response(status_code=answer.status, headers=headers, reason=answer.status.phrase)
        ready = self._http.send(response) or b""
        self._ends = asyncio.get_running_loop().time() + self._limits.response
        for start in range(0, 0 if bodiless else len(answer.body), _CHUNK):
            ready += self._http.send(h11.Data(data=answer.body[start : start + _CHUNK])) or b""
            await self._write(ready)
            ready = b""
        await self._write(ready + (self._http.send(h11.EndOfMessage()) or b""))

    async def _write(self, data: bytes | None) -> None:
        if data:
            self._places.note(self, writing=True)
            self._allow(self._limits.chunk)
            await self._stream.write(data)

    def _allow(self, seconds: float) -> None:
        """Give the client so much time for what it does next."""
        self._deadline.reschedule(min(asyncio.get_running_loop().time() + seconds, self._ends))


def _address_of(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername()[0])
    except (OSError, IndexError):  # gone already; or a unix socket, whose clients have no address
        return ""


def _refusal(status: HTTPStatus) -> Answer:
    more = _MORE_HEADERS.get(status)
    return in_words(status, _REASONS.get(status, status.phrase), *([more] if more else []))
