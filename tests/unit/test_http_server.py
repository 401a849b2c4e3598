"""The HTTP endpoint: routes, readiness, ports, and HTTP as clients speak it."""

from __future__ import annotations

import gzip
import logging
import os
import socket
import stat
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, Gauge

from kvmsnapd.endpoint.answers import accepts_gzip
from kvmsnapd.endpoint.exposition import Exposition, understood
from kvmsnapd.endpoint.server import Limits, MetricsServer
from kvmsnapd.errors import KvmsnapdError
from tests.unit.http_clients import (
    TEXT,
    ask,
    client_of,
    connect,
    exposition,
    port_of,
    read_all,
    readiness,
    say,
    serving,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATHS = ["/metrics", "/-/healthy", "/-/ready"]


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsServer]:
    with serving(limits=Limits(linger=0.1)) as server:
        yield server


@pytest.fixture(autouse=True)
def _ready() -> None:
    readiness.ready = True


# Routes


def test_metrics_are_at_slash_metrics(server: MetricsServer) -> None:
    status, text, headers = ask(server)
    assert status == 200
    assert b"answer 42.0\n" in text
    assert headers["Content-Type"] == TEXT


def test_a_query_does_not_matter(server: MetricsServer) -> None:
    assert ask(server, "/metrics?x=1")[0] == 200


def test_a_living_daemon_is_healthy_before_it_is_ready(server: MetricsServer) -> None:
    readiness.ready = False
    assert ask(server, "/-/healthy")[:2] == (200, b"ok\n")


def test_ready_says_so_once_libvirt_has_answered(server: MetricsServer) -> None:
    assert ask(server, "/-/ready")[:2] == (200, b"ok\n")


def test_not_ready_is_503_with_the_reason(server: MetricsServer) -> None:
    readiness.ready = False
    assert ask(server, "/-/ready")[:2] == (503, b"libvirt has not answered yet\n")


def test_readiness_is_asked_anew_each_time(server: MetricsServer) -> None:
    readiness.ready = False
    assert ask(server, "/-/ready")[0] == 503
    readiness.ready = True
    assert ask(server, "/-/ready")[0] == 200


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "/-/reload", "/favicon.ico"])
def test_any_other_path_is_404_and_tells_where_metrics_are(server: MetricsServer, path: str) -> None:
    assert ask(server, path)[:2] == (404, b"not found; metrics are at /metrics\n")


@pytest.mark.parametrize("target", [b"*", b"http://[/metrics", b"//metrics", b"metrics", b"/%6detrics", b"/\xff"])
def test_an_odd_target_is_404_as_well(server: MetricsServer, target: bytes) -> None:
    assert say(server, b"GET " + target + b" HTTP/1.0\r\n\r\n").startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))


def test_a_target_with_the_host_in_it_is_understood(server: MetricsServer) -> None:
    assert ask(server, f"http://localhost:{port_of(server)}/-/healthy?x")[:2] == (200, b"ok\n")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_any_method_that_would_change_something_is_405(server: MetricsServer, method: str, path: str) -> None:
    assert ask(server, path, method)[0] == 405


def test_405_names_the_allowed_methods(server: MetricsServer) -> None:
    assert ask(server, "/metrics", "POST")[2]["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", PATHS)
def test_head_is_answered_like_get_without_the_text(server: MetricsServer, path: str) -> None:
    status, text, headers = ask(server, path, "HEAD")
    assert (status, text) == (200, b"")
    assert headers["Content-Length"] == ask(server, path)[2]["Content-Length"]


def test_no_version_of_any_software_is_told(server: MetricsServer) -> None:
    assert "Server" not in ask(server)[2]


def test_scrapes_are_not_logged(
    server: MetricsServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ask(server)
    ask(server, "/nowhere")
    say(server, b"nonsense\r\n\r\n")
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


# HTTP


def test_a_connection_is_kept_for_further_requests(server: MetricsServer) -> None:
    client = client_of(server)
    try:
        client.connect()
        first = client.sock
        for path in (*PATHS, "/nowhere", "/metrics"):
            client.request("GET", path)
            client.getresponse().read()
            assert client.sock is first
    finally:
        client.close()


def test_requests_sent_at_once_are_answered_in_their_order(server: MetricsServer) -> None:
    one = b"GET %s HTTP/1.1\r\nHost: a\r\n%s\r\n"
    sent = one % (b"/-/healthy", b"") + one % (b"/nowhere", b"") + one % (b"/-/ready", b"Connection: close\r\n")
    answer = say(server, sent)
    assert [line.split()[1] for line in answer.splitlines() if line.startswith(b"HTTP/1.1")] == [b"200", b"404", b"200"]


def test_http_1_0_is_answered_and_closed(server: MetricsServer) -> None:
    answer = say(server, b"GET /-/healthy HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nok\n")


def test_a_client_that_has_said_all_is_still_answered(server: MetricsServer) -> None:
    assert say(server, b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n", end=True).endswith(b"ok\n")


def test_a_header_block_that_is_too_long_is_431(server: MetricsServer) -> None:
    answer = say(server, b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "request_",
    [b"nonsense\r\n\r\n", b"GET /metrics HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /m"],
)
def test_what_is_no_request_is_400_and_closed(server: MetricsServer, request_: bytes) -> None:
    answer = say(server, request_, end=True)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\nthis is no HTTP request\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"GET /-/healthy", b"200"), (b"POST /metrics", b"405"), (b"PUT /nowhere", b"404"), (b"HEAD /metrics", b"200")],
)
@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5",
        b"Content-Length: 99999999",
        b"Content-Length: 99999999\r\nExpect: 100-continue",
        b"Transfer-Encoding: chunked",
    ],
)
def test_a_request_with_a_body_is_answered_unread_and_is_the_last_of_its_connection(
    server: MetricsServer, request_line: bytes, status: bytes, framing: bytes
) -> None:
    body = b"1\r\nx\r\n" * 2000 if b"chunked" in framing else b"hello"
    other = b"GET /-/ready HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = say(server, request_line + b" HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n" + body + other)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


def test_what_renders_wrongly_is_500_logged_once_and_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    def render(_accept: str) -> tuple[bytes, str]:
        msg = "a secret"
        raise ValueError(msg)

    with serving(render) as server:
        for _ in range(3):
            status, text, _ = ask(server)
            assert (status, text) == (500, b"this could not be answered; the log says why\n")
        assert ask(server, "/-/healthy")[0] == 200
    (record,) = caplog.records
    assert record.getMessage() == "/metrics could not be answered"
    assert record.exc_info


def test_a_render_that_hangs_leaves_the_rest_alone_and_does_not_hold_up_the_end() -> None:
    going = threading.Event()

    def render(_accept: str) -> tuple[bytes, str]:
        going.wait(10)
        return b"", TEXT

    try:
        with serving(render, limits=Limits(answer=0.2)) as server:
            assert say(server, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n") == b""
            assert ask(server, "/-/healthy")[0] == 200
            began = time.monotonic()
        assert time.monotonic() - began < 1
    finally:
        going.set()


# What is rendered


@pytest.mark.parametrize(
    ("header", "zipped"),
    [
        ("gzip", True),
        ("GZIP;q=0.5, deflate", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000, *", False),
        ("*", True),
        ("*;q=0", False),
        ("identity", False),
        ("gzip;q=soon", False),
        ("", False),
        ("x-gzip", True),
    ],
)
def test_compression_is_what_the_client_accepts(header: str, zipped: bool) -> None:
    assert accepts_gzip(header) is zipped


def test_a_long_text_is_compressed_once() -> None:
    text = b"answer 42\n" * 1000
    with serving(lambda _accept: (text, TEXT)) as server:
        _, first, headers = ask(server, Accept_Encoding="gzip")
        assert headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(first) == text
        assert len(first) < len(text) / 10
        assert ask(server, Accept_Encoding="gzip")[1] == first
        assert ask(server, Accept_Encoding="gzip;q=0")[1] == text


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("text/html, nonsense;;=;q", "text/plain"),
        (
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics",
        ),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8", "application/openmetrics"),
        ("application/openmetrics-text;version=soon", "text/plain"),
        ("application/openmetrics-text;version=1.0.0;q=0, text/plain", "text/plain"),
    ],
)
def test_openmetrics_is_for_who_asks_for_it(server: MetricsServer, accept: str, kind: str) -> None:
    status, text, headers = ask(server, Accept=accept)
    assert status == 200
    assert headers["Content-Type"].startswith(kind)
    assert text.endswith(b"# EOF\n") is (kind != "text/plain")


def test_the_most_wanted_type_comes_first() -> None:
    header = "text/plain;version=0.0.4;q=0.5, application/openmetrics-text; version=1.0.0; q=0.9; x=y"
    assert understood(header) == "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4"


class Counting:
    """A collector that counts, and takes its time."""

    def __init__(self, seconds: float = 0) -> None:
        self.registry = CollectorRegistry()
        self.now, self.count, self.seconds = 0.0, 0, seconds
        gauge = Gauge("renderings", "How many.", registry=self.registry)
        gauge.set_function(self._count)
        self.exposition = Exposition(self.registry, stopwatch=lambda: self.now)

    def _count(self) -> float:
        self.count += 1
        self.now += 1
        time.sleep(self.seconds)
        return self.count


def test_a_text_is_given_out_again_for_four_times_as_long_as_it_took() -> None:
    counting = Counting()
    texts = [counting.exposition("")[0]]
    counting.now += 3.9
    texts.append(counting.exposition("")[0])
    counting.now += 0.2
    texts.append(counting.exposition("")[0])
    assert texts[0] is texts[1]
    assert b"renderings 2.0" in texts[2]


def test_texts_of_many_types_cost_no_more_than_a_fifth_together() -> None:
    counting = Counting()
    kinds = ["", "text/plain;version=1.0.0", "application/openmetrics-text;version=1.0.0"]
    began = counting.now
    for turn in range(300):
        counting.exposition(kinds[turn % 3])
        counting.now += 0.1
    assert counting.count <= (counting.now - began) / 5 + 3


def test_who_asks_while_a_text_is_made_is_given_the_same_one() -> None:
    counting = Counting(seconds=0.1)
    with serving(counting.exposition) as server:
        answers: list[bytes] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server)[1])) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 20
    assert counting.count == 1


def test_the_process_is_told_where_it_is_asked_for() -> None:
    text = Exposition(CollectorRegistry(), process=True)("")[0]
    assert b"process_resident_memory_bytes " in text
    assert b"process_" not in exposition()("")[0]


# Addresses


def test_port_0_chooses_a_free_one_and_the_url_names_it(server: MetricsServer) -> None:
    assert port_of(server) >= 1024
    assert server.url == f"http://127.0.0.1:{port_of(server)}/metrics"


@pytest.mark.parametrize(("listen", "host"), [("::1", "[::1]"), ("localhost", "localhost")])
def test_ipv6_and_names_are_listened_on(listen: str, host: str) -> None:
    with serving(listen=listen) as server:
        assert server.url == f"http://{host}:{port_of(server)}/metrics"
        with socket.create_connection((listen, port_of(server)), timeout=5) as client:
            client.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            assert read_all(client).endswith(b"ok\n")


def test_who_connects_before_the_start_waits() -> None:
    server = MetricsServer(exposition(), listen="127.0.0.1", port=0, ready=bool)
    try:
        with connect(server) as client:
            client.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            server.start()
            assert read_all(client).endswith(b"ok\n")
    finally:
        server.close()


def test_a_server_that_was_never_started_can_be_closed() -> None:
    server = MetricsServer(exposition(), listen="127.0.0.1", port=0, ready=bool)
    server.close()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_a_closed_server_gives_its_port_back_at_once_and_closes_its_connections() -> None:
    with serving() as first:
        idle = connect(first)
        ask(first)
        began = time.monotonic()
    with idle:
        assert time.monotonic() - began < 1
        with suppress(ConnectionResetError):
            assert idle.recv(1) == b""
    with serving(port=port_of(first)) as second:
        assert ask(second)[0] == 200


def test_a_port_in_use_is_told_with_the_settings_that_help(server: MetricsServer) -> None:
    with pytest.raises(KvmsnapdError) as refusal:
        MetricsServer(exposition(), listen="127.0.0.1", port=port_of(server), ready=bool)
    assert str(refusal.value) == (
        f"cannot listen on 127.0.0.1 port {port_of(server)}: [Errno 98] Address already in use; set metrics.listen and "
        "metrics.port to free ones"
    )


@pytest.mark.parametrize(
    ("listen", "port"), [("127.0.0.1", 70000), ("192.0.2.1", 0), ("no.such.host.invalid", 0), ("a" * 300, 0)]
)
def test_an_address_that_cannot_be_is_told_the_same_way(listen: str, port: int) -> None:
    with pytest.raises(KvmsnapdError, match=r"^cannot listen on .* set metrics.listen and metrics.port"):
        MetricsServer(exposition(), listen=listen, port=port, ready=bool)


# Unix sockets


def ask_at(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return read_all(client)


def test_a_path_is_a_unix_socket_for_owner_and_group_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with serving(listen=str(path)) as server:
        assert server.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert b"answer 42.0\n" in ask_at(path)
    assert not path.exists()


def test_a_socket_that_nobody_answers_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(listen=str(path)):
        assert b"answer 42.0\n" in ask_at(path)


def test_a_socket_that_somebody_answers_on_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with serving(listen=str(path)):
        with pytest.raises(KvmsnapdError, match=r"in use; set metrics\.listen to a path"):
            MetricsServer(exposition(), listen=str(path), port=0, ready=bool)
        assert b"answer 42.0\n" in ask_at(path)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "metrics.sock"
    make = {
        "file": path.touch,
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("x"),
        "pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    before = path.lstat()
    with pytest.raises(KvmsnapdError, match=r"^cannot listen on"):
        MetricsServer(exposition(), listen=str(path), port=0, ready=bool)
    assert path.lstat().st_ino == before.st_ino


def test_a_socket_that_took_our_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with serving(listen=str(path)):
        path.rename(tmp_path / "old")  # still there, so that its number is not given to another file
        path.touch()
    assert path.exists()
