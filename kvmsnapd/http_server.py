"""The HTTP endpoint: ``/metrics``, ``/-/healthy`` and ``/-/ready``, each request on a thread of its own."""

from __future__ import annotations

import socket
import threading
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from kvmsnapd.errors import KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking the name service who we are, as the base class would: it may not answer."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds a client may take; an idle one must not keep a thread

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it
        """Scrapes are not logged."""


class MetricsServer:
    """Serves one registry until closed."""

    def __init__(self, registry: CollectorRegistry, *, listen: str, port: int, ready: Callable[[], bool]) -> None:
        """Bind and begin to serve.

        Args:
            port: 0 chooses a free one; :attr:`url` names it.
            ready: whether the daemon has seen libvirt's domains at least once.

        Raises:
            KvmsnapdError: the address cannot be listened on.
        """
        metrics = make_wsgi_app(registry)

        def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            path, method = environ.get("PATH_INFO", ""), environ.get("REQUEST_METHOD")
            if path not in {"/metrics", "/-/healthy", "/-/ready"}:
                return _answer(start_response, HTTPStatus.NOT_FOUND, "not found; metrics are at /metrics")
            if method not in {"GET", "HEAD"}:
                return _answer(start_response, HTTPStatus.METHOD_NOT_ALLOWED, "only GET", ("Allow", "GET, HEAD"))
            if path == "/metrics":
                body: list[bytes] = metrics(environ | {"REQUEST_METHOD": "GET"}, start_response)
                return body if method == "GET" else []
            if path == "/-/ready" and not ready():
                return _answer(start_response, HTTPStatus.SERVICE_UNAVAILABLE, "libvirt has not answered yet")
            return _answer(start_response, HTTPStatus.OK, "ok")

        family = _Server6 if ":" in listen else _Server
        try:
            self._server = make_server(listen, port, app, server_class=family, handler_class=_Handler)
        except (OSError, OverflowError) as error:
            msg = f"cannot listen on {listen} port {port}: {error}; set metrics.listen and metrics.port to free ones"
            raise KvmsnapdError(msg) from error
        host = f"[{listen}]" if ":" in listen else listen
        self.url = f"http://{host}:{self._server.server_port}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop serving and give the port back."""
        self._server.shutdown()
        self._server.server_close()


def _answer(start_response: StartResponse, status: HTTPStatus, text: str, *headers: tuple[str, str]) -> list[bytes]:
    start_response(f"{status.value} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [f"{text}\n".encode()]
