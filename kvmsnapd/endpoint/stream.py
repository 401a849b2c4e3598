"""The bytes of one connection, plain or by TLS.

TLS is done here and not by asyncio's transport, which holds half a megabyte for each client until the garbage
collector comes by; a flood of handshakes would take all memory.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_CHUNK = 16384
_MOST_LINGERED = 2**20

_T = TypeVar("_T")


class Stream:
    """A connection in plain."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.certificate: dict[str, Any] | None = None
        """The client's, once :meth:`shake_hands` has verified it."""

    async def shake_hands(self) -> None:
        """Do what comes before the first byte."""

    async def read(self, most: int) -> bytes:
        """Return what has come, nothing at the end."""
        return await self._reader.read(most)

    async def write(self, data: bytes) -> None:
        """Hand all of it to the kernel."""
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """Let the client take what is under way: a socket closed with something unread makes the other side forget."""
        self._writer.write_eof()
        left = _MOST_LINGERED
        while left > 0 and (data := await self._reader.read(_CHUNK)):
            left -= len(data)

    def abort(self) -> None:
        """Close at once."""
        self._writer.transport.abort()


class TlsStream(Stream):
    """A connection by TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext) -> None:
        super().__init__(reader, writer)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    async def shake_hands(self) -> None:
        """Shake hands; raise OSError if the client does not please."""
        await self._do(self._tls.do_handshake)
        self.certificate = self._tls.getpeercert()

    async def read(self, most: int) -> bytes:
        """Return what has come, nothing at the end."""
        try:
            return await self._do(lambda: self._tls.read(most))
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    async def write(self, data: bytes) -> None:
        """Hand all of it to the kernel."""
        await self._do(lambda: self._tls.write(data))

    async def close(self) -> None:
        """Say that this is all."""
        with suppress(ssl.SSLError):  # it wants the client's answer
            self._tls.unwrap()
        await self._flush()
        await super().close()

    async def _do(self, act: Callable[[], _T]) -> _T:
        while True:
            try:
                done = act()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._reader.read(_CHUNK)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                with suppress(OSError):
                    await self._flush()  # what tells the client why
                raise
            else:
                await self._flush()
                return done

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await super().write(self._outgoing.read())


async def open_stream(sock: socket.socket, context: ssl.SSLContext | None) -> Stream:
    """Return the stream of a socket that was accepted, and that belongs to it from now on."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_CHUNK, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
    transport.set_write_buffer_limits(high=0)  # what is not sent yet is not held twice
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    return TlsStream(reader, writer, context) if context else Stream(reader, writer)
