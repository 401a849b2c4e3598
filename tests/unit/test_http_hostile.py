"""Clients that are idle, slow, many or rude: a scrape must be answered all the same, within a second."""

from __future__ import annotations

import os
import resource
import socket
import ssl
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.endpoint.server import Limits, MetricsServer
from tests.unit.http_clients import TEXT, Authority, ask, basic, client_of, connect, hashed, port_of, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = b"answer 42\n" * 800_000
"""More than the kernel takes from us for a client that does not read."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    authority.sign("server", "IP:127.0.0.1")
    (authority.folder / "web.yaml").write_text(
        f"tls_server_config: {{cert_file: server.crt, key_file: server.key}}\n"
        f"basic_auth_users: {{prometheus: {hashed('right')}}}\n",
        encoding="utf-8",
    )
    return authority


@contextmanager
def crowd(
    server: MetricsServer, count: int, first: bytes = b"", *, read_buffer: int = 0
) -> Iterator[list[socket.socket]]:
    """Open connections that say something, or nothing, and then stay."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            if read_buffer:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
            client.connect(("127.0.0.1", port_of(server)))
            clients.append(client)
            if first:
                try:
                    client.sendall(first)
                except OSError:  # it had to make room already
                    continue
        yield clients


def seconds_of_a_scrape(server: MetricsServer, tls: ssl.SSLContext | None = None, **headers: str) -> float:
    began = time.monotonic()
    status, _, _ = ask(server, tls=tls, **headers)
    assert status == 200
    return time.monotonic() - began


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("said", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-A"])
def test_500_clients_that_never_finish_a_request_hold_up_nobody(said: bytes) -> None:
    with serving() as server:
        before = descriptors()
        with crowd(server, 500, said):
            assert seconds_of_a_scrape(server) < 1
            assert descriptors() - before < 500 + Limits.connections + 10


def test_500_clients_that_never_finish_the_handshake_hold_up_nobody(authority: Authority) -> None:
    web_config = authority.folder / "web.yaml"
    with serving(web_config=web_config) as server, crowd(server, 250), crowd(server, 250, client_hello()):
        taken = seconds_of_a_scrape(server, authority.client(), Authorization=basic("prometheus", "right"))
        assert taken < 1


def test_2000_connections_in_a_burst_hold_up_nobody() -> None:
    with serving() as server, ExitStack() as stack:
        for _ in range(2000):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port_of(server)))
        assert seconds_of_a_scrape(server) < 1


def test_500_clients_that_never_read_their_answer_hold_up_nobody() -> None:
    with serving(lambda _accept: (LONG, TEXT)) as server:
        request = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
        with crowd(server, 500, request, read_buffer=4096):
            assert seconds_of_a_scrape(server) < 1


def ask_often(server: MetricsServer, stop: threading.Event, request: bytes) -> None:
    with crowd(server, 256, request) as clients:
        while not stop.wait(0.005):
            for client in clients:
                with suppress(OSError):
                    client.send(request, socket.MSG_NOSIGNAL)


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 500,
    ],
    ids=["small", "chunked"],
)
def test_256_clients_that_ask_all_the_time_hold_up_nobody(request_text: bytes) -> None:
    stop = threading.Event()
    with serving() as server:
        thread = threading.Thread(target=ask_often, args=[server, stop, request_text])
        thread.start()
        try:
            time.sleep(0.2)
            assert min(seconds_of_a_scrape(server) for _ in range(3)) < 1  # this process makes the noise as well
        finally:
            stop.set()
            thread.join()


def trickle(server: MetricsServer, stop: threading.Event) -> None:
    with crowd(server, 300) as clients:
        while not stop.wait(0.05):
            for client in clients:
                try:
                    client.send(b"G", socket.MSG_NOSIGNAL)
                except OSError:
                    continue


def test_clients_that_send_a_byte_at_a_time_hold_up_nobody() -> None:
    stop = threading.Event()
    with serving() as server:
        thread = threading.Thread(target=trickle, args=[server, stop])
        thread.start()
        try:
            time.sleep(0.2)
            assert max(seconds_of_a_scrape(server) for _ in range(5)) < 1
        finally:
            stop.set()
            thread.join()


def ended_after(client: socket.socket) -> float:
    """Return after how many seconds the server closes."""
    began = time.monotonic()
    client.settimeout(5)
    with suppress(ConnectionResetError):
        while client.recv(65536):
            pass
    return time.monotonic() - began


def test_a_request_must_be_complete_in_time_however_much_of_it_comes() -> None:
    with serving(limits=Limits(head=0.3)) as server, connect(server) as client:
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < 5:
                client.send(b"X")
                time.sleep(0.02)
        assert 0.2 < time.monotonic() - began < 2


def test_a_handshake_must_end_in_time(authority: Authority) -> None:
    with (
        serving(web_config=authority.folder / "web.yaml", limits=Limits(head=0.3)) as server,
        connect(server) as client,
    ):
        client.sendall(client_hello())
        assert 0.2 < ended_after(client) < 2


def test_a_kept_connection_is_closed_when_nothing_comes_for_long() -> None:
    with serving(limits=Limits(idle=0.3, head=5)) as server, connect(server) as client:
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n")
        assert 0.2 < ended_after(client) < 2


def test_a_further_request_must_be_complete_in_time_from_its_first_byte_on() -> None:
    with serving(limits=Limits(idle=5, head=0.3)) as server, connect(server) as client:
        client.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(1000)
        client.sendall(b"GET")
        assert 0.2 < ended_after(client) < 2


@pytest.mark.parametrize("limits", [Limits(chunk=0.3), Limits(chunk=5, response=0.3)])
def test_an_answer_must_be_taken_in_time(limits: Limits) -> None:
    request = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
    with (
        serving(lambda _accept: (LONG, TEXT), limits=limits) as server,
        crowd(server, 1, request, read_buffer=4096) as (client,),
    ):
        time.sleep(0.8)
        got = 0
        with suppress(ConnectionResetError):
            while data := client.recv(65536):
                got += len(data)
        assert got < len(LONG)


def test_who_is_answered_is_not_closed_for_those_who_wait() -> None:
    entered, leave = threading.Event(), threading.Event()

    def render(_accept: str) -> tuple[bytes, str]:
        entered.set()
        assert leave.wait(5)
        return b"answer 42\n", TEXT

    with serving(render, limits=Limits(connections=10)) as server:
        client = client_of(server)
        try:
            client.request("GET", "/metrics")
            assert entered.wait(5)
            with crowd(server, 100):
                time.sleep(0.2)
                leave.set()
                assert client.getresponse().read() == b"answer 42\n"
        finally:
            leave.set()
            client.close()


def test_without_descriptors_the_server_waits_and_then_goes_on() -> None:
    with serving() as server, ExitStack() as stack:
        assert ask(server)[0] == 200
        before = time.process_time()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        waiting = [stack.enter_context(socket.socket()) for _ in range(5)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 2, hard))
        taken = []
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            for client in waiting:
                client.connect(("127.0.0.1", port_of(server)))
            time.sleep(0.5)
            assert time.process_time() - before < 0.25
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert seconds_of_a_scrape(server) < 1


def test_a_flood_of_wrong_passwords_does_not_hold_up_a_right_one_that_is_known(authority: Authority) -> None:
    stop = threading.Event()
    statuses: set[int] = set()
    with serving(web_config=authority.folder / "web.yaml") as server:
        tls = authority.client()
        right = basic("prometheus", "right")

        def flood(number: int) -> None:
            client = client_of(server, tls)
            try:
                for count in range(10_000):
                    client.request(
                        "GET", "/metrics", headers={"Authorization": basic("prometheus", f"{number} {count}")}
                    )
                    response = client.getresponse()
                    response.read()
                    statuses.add(response.status)
                    if stop.is_set():
                        return
            finally:
                client.close()

        assert seconds_of_a_scrape(server, tls, Authorization=right) < 1
        threads = [threading.Thread(target=flood, args=[number]) for number in range(30)]
        for thread in threads:
            thread.start()
        try:
            assert max(seconds_of_a_scrape(server, tls, Authorization=right) for _ in range(5)) < 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert statuses <= {401, 503}
