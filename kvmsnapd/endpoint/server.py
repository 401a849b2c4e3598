"""The HTTP endpoint: one thread that serves metrics, and bears clients that are idle, slow or many.

Every connection counts from its accept on, so that handshakes that never end have their limit as well. When all places
are taken, who has been waiting longest without a request makes room: a scraper asks at once.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import stat
import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmsnapd.endpoint.access import Access
from kvmsnapd.endpoint.answers import Answers, Complaints, Limits
from kvmsnapd.endpoint.connection import Connection, Places
from kvmsnapd.errors import KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsnapd.endpoint.answers import Render

__all__ = ["Limits", "MetricsServer"]

_BACKLOG = 4096  # Linux' own limit; whoever does not fit in asks again a second later
_SEND_BUFFER = 131072  # the kernel would hold megabytes for each client that does not read
_SOCKET_MODE = 0o660
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_SHORTAGE_PAUSE, _ROOM_PAUSE = 0.1, 0.005
_CLOSE_SECONDS = 5.0
_SHARE_OF_DESCRIPTORS = 4


class MetricsServer:
    """Serves one text until closed."""

    def __init__(
        self,
        render: Render,
        *,
        listen: str,
        port: int,
        ready: Callable[[], bool],
        web_config: Path | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Bind; who connects waits until :meth:`start`.

        Args:
            render: returns the text and its content type for a request's ``Accept``; runs on a thread of its own.
            listen: an address, a host name, or the absolute path of a unix socket.
            port: 0 chooses a free one; :attr:`url` names it.
            ready: whether the daemon has seen libvirt's domains at least once.
            web_config: file with TLS and users; it is read anew when it changes.

        Raises:
            ConfigError: the web configuration is not valid.
            KvmsnapdError: the address cannot be listened on.
        """
        limits = limits or Limits()
        # Most descriptors are for locks and libvirt.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SHARE_OF_DESCRIPTORS
        self._limits = replace(limits, connections=max(1, min(limits.connections, most)))
        self._complaints = Complaints()
        self._access = Access(web_config, look_seconds=self._limits.look)
        self._answers = Answers(render, ready, self._complaints)
        self._path = Path(listen) if listen.startswith("/") else None
        if self._path:
            self._listener = _listen_at(self._path)
            self._made = self._path.lstat()
            self.url = f"unix:{listen}"
        else:
            self._listener = _listen_on(listen, port)
            scheme, host = (
                "https" if self._access.current().context else "http",
                f"[{listen}]" if ":" in listen else listen,
            )
            self.url = f"{scheme}://{host}:{self._listener.getsockname()[1]}/metrics"
        self._listener.settimeout(0)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # of those it accepts as well
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Begin to serve."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=[self._loop], name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving at once and give the address back."""
        if self._thread and self._loop:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(_CLOSE_SECONDS)
        self._answers.close()
        self._access.close()
        self._listener.close()
        if self._path:
            with suppress(OSError):
                if os.path.samestat(self._path.lstat(), self._made):
                    self._path.unlink()
            self._path = None

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.set_exception_handler(self._on_trouble)
        try:
            loop.run_until_complete(self._serve(loop))
        finally:
            loop.close()

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        places = Places(self._limits)
        accepting = loop.create_task(self._accept_forever(loop, places))
        await self._stopping.wait()
        accepting.cancel()
        await asyncio.gather(accepting, *places.drop_all(), return_exceptions=True)
        for _ in range(3):  # transports close a step later
            await asyncio.sleep(0)

    async def _accept_forever(self, loop: asyncio.AbstractEventLoop, places: Places) -> None:
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # also that of a client that has gone already
                if error.errno in _SHORTAGES:
                    self._complaints.tell(f"no connection can be accepted: {error}")
                    places.make_room(at_once=True)
                await asyncio.sleep(_SHORTAGE_PAUSE if error.errno in _SHORTAGES else 0)
                continue
            try:
                while places.full and not places.make_room():  # noqa: ASYNC110  # time alone makes room
                    await asyncio.sleep(_ROOM_PAUSE)
            except BaseException:
                client.close()
                raise
            try:
                self._welcome(loop, places, client)
            except Exception as error:  # noqa: BLE001  # whatever it is, others can be let in
                client.close()
                self._complaints.tell("a connection could not be begun", error)
            await asyncio.sleep(0)  # those that are connected have their turn between any two that come

    def _welcome(self, loop: asyncio.AbstractEventLoop, places: Places, client: socket.socket) -> None:
        connection = Connection(client, places, self._limits, self._answers, self._access)
        connection.task = loop.create_task(connection.serve(self._access.current()))
        connection.task.add_done_callback(partial(self._on_end, connection))
        places.enter(connection)

    def _on_end(self, connection: Connection, task: asyncio.Task[None]) -> None:
        connection.finish()
        error = None if task.cancelled() else task.exception()
        if error and not isinstance(error, OSError):  # of which each is the client's or the network's
            self._complaints.tell("a connection ended in an unforeseen error", error)

    def _on_trouble(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError):
            self._complaints.tell(f"unforeseen on a connection: {context.get('message')}", error)


def _listen_on(listen: str, port: int) -> socket.socket:
    made: socket.socket | None = None
    try:
        found = socket.getaddrinfo(listen or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address[0], port, *address[2:]))
        made.listen(_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        if made:
            made.close()
        msg = f"cannot listen on {listen} port {port}: {error}; set metrics.listen and metrics.port to free ones"
        raise KvmsnapdError(msg) from error
    return made


def _listen_at(path: Path) -> socket.socket:
    """Listen on a unix socket, instead of one that nobody answers on; anything else there stays."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            path.unlink()
        made.bind(str(path))
        path.chmod(_SOCKET_MODE)  # until it listens nobody can connect
        made.listen(_BACKLOG)
    except (OSError, ValueError) as error:
        made.close()
        msg = f"cannot listen on {path}: {error}; set metrics.listen to a path that is free"
        raise KvmsnapdError(msg) from error
    return made


def _is_stale(path: Path) -> bool:
    if not path.exists() or not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(0)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # such as EAGAIN, of one that has much to do
            return False
    return False
