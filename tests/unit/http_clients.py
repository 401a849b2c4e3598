"""What the tests of the HTTP endpoint share: servers, certificates and clients that behave, or do not."""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import bcrypt
from prometheus_client import CollectorRegistry, Gauge

from kvmsnapd.endpoint.exposition import Exposition
from kvmsnapd.endpoint.server import MetricsServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Readiness:
    """What the daemon would answer when it is asked whether it is ready."""

    ready = True

    def __call__(self) -> bool:
        return self.ready


readiness = Readiness()


def exposition() -> Exposition:
    registry = CollectorRegistry()
    Gauge("answer", "The answer.", registry=registry).set(42)
    return Exposition(registry)


@contextmanager
def serving(
    render: Callable[[str], tuple[bytes, str]] | None = None,
    *,
    listen: str = "127.0.0.1",
    port: int = 0,
    **more: Any,  # noqa: ANN401  # the server's own
) -> Iterator[MetricsServer]:
    server = MetricsServer(render or exposition(), listen=listen, port=port, ready=readiness, **more)
    try:
        server.start()
        yield server
    finally:
        server.close()


def port_of(server: MetricsServer) -> int:
    port = urlsplit(server.url).port
    assert port
    return port


def ask(
    server: MetricsServer,
    path: str = "/metrics",
    method: str = "GET",
    *,
    tls: ssl.SSLContext | None = None,
    **headers: str,
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = client_of(server, tls)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def client_of(server: MetricsServer, tls: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
    if tls:
        return http.client.HTTPSConnection("127.0.0.1", port_of(server), timeout=5, context=tls)
    return http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=5)


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(server)), timeout=5)


def say(server: MetricsServer, text: bytes, *, end: bool = False) -> bytes:
    """Return all that comes back until the server closes."""
    with connect(server) as client:
        client.sendall(text)
        if end:
            client.shutdown(socket.SHUT_WR)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    answer = b""
    while data := client.recv(65536):
        answer += data
    return answer


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def hashed(password: str) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()


class Authority:
    """A certificate authority in a folder, and what it signs."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder, self.name = folder, name
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # without it Python 3.13 trusts none
        key = self._new_key(name)
        self._openssl("req", "-x509", *key, "-subj", f"/CN={name}", "-days", "1", "-out", f"{name}.crt", *usage)

    def sign(self, name: str, sans: str) -> None:
        """Write NAME.crt and NAME.key."""
        self._openssl("req", *self._new_key(name), "-subj", f"/CN={name}", "-out", f"{name}.csr")
        (self.folder / f"{name}.ext").write_text(
            f"subjectAltName={sans}\nauthorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n", encoding="utf-8"
        )
        self._openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", f"{self.name}.crt", "-CAkey", f"{self.name}.key"),
            *("-CAcreateserial", "-days", "1", "-extfile", f"{name}.ext", "-out", f"{name}.crt"),
        )

    def client(self, name: str = "") -> ssl.SSLContext:
        """Return the context of a client that trusts this authority, with a certificate or without."""
        context = ssl.create_default_context(cafile=str(self.folder / f"{self.name}.crt"))
        if name:
            context.load_cert_chain(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        return context

    @staticmethod
    def _new_key(name: str) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)
