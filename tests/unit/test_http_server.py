"""The HTTP endpoint: routes, readiness and ports."""

from __future__ import annotations

import http.client
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry, Gauge

from kvmsnapd.errors import KvmsnapdError
from kvmsnapd.http_server import MetricsServer

if TYPE_CHECKING:
    from collections.abc import Iterator


class Readiness:
    """What the daemon would answer when it is asked whether it is ready."""

    ready = True

    def __call__(self) -> bool:
        return self.ready


readiness = Readiness()


def start(port: int = 0) -> MetricsServer:
    registry = CollectorRegistry()
    Gauge("answer", "The answer.", registry=registry).set(42)
    return MetricsServer(registry, listen="127.0.0.1", port=port, ready=readiness)


@pytest.fixture(scope="module")
def server() -> Iterator[MetricsServer]:
    """Provide one server for all tests, since each takes half a second to close."""
    server = start()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _ready() -> None:
    readiness.ready = True


def port_of(server: MetricsServer) -> int:
    port = urlsplit(server.url).port
    assert port
    return port


def ask(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers
    finally:
        connection.close()


def test_metrics_are_at_slash_metrics(server: MetricsServer) -> None:
    status, text, headers = ask(server, "/metrics")
    assert status == 200
    assert "answer 42.0\n" in text
    assert headers["Content-Type"].startswith("text/plain")


def test_a_query_does_not_matter(server: MetricsServer) -> None:
    assert ask(server, "/metrics?x=1")[0] == 200


def test_a_living_daemon_is_healthy_before_it_is_ready(server: MetricsServer) -> None:
    readiness.ready = False
    assert ask(server, "/-/healthy")[:2] == (200, "ok\n")


def test_ready_says_so_once_libvirt_has_answered(server: MetricsServer) -> None:
    assert ask(server, "/-/ready")[:2] == (200, "ok\n")


def test_not_ready_is_503_with_the_reason(server: MetricsServer) -> None:
    readiness.ready = False
    assert ask(server, "/-/ready")[:2] == (503, "libvirt has not answered yet\n")


def test_readiness_is_asked_anew_each_time(server: MetricsServer) -> None:
    readiness.ready = False
    assert ask(server, "/-/ready")[0] == 503
    readiness.ready = True
    assert ask(server, "/-/ready")[0] == 200


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/", "/-/reload", "/favicon.ico"])
def test_any_other_path_is_404_and_tells_where_metrics_are(server: MetricsServer, path: str) -> None:
    assert ask(server, path)[:2] == (404, "not found; metrics are at /metrics\n")


@pytest.mark.parametrize("path", ["/metrics", "/-/healthy", "/-/ready"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_any_method_that_would_change_something_is_405(server: MetricsServer, method: str, path: str) -> None:
    assert ask(server, path, method)[0] == 405


def test_405_names_the_allowed_methods(server: MetricsServer) -> None:
    assert "GET" in (ask(server, "/metrics", "POST")[2]["Allow"] or "")


@pytest.mark.parametrize("path", ["/metrics", "/-/healthy", "/-/ready"])
def test_head_is_answered_like_get_without_the_text(server: MetricsServer, path: str) -> None:
    assert ask(server, path, "HEAD")[:2] == (200, "")


def test_a_client_that_says_nothing_does_not_hold_up_others(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", port_of(server))):
        assert ask(server, "/metrics")[0] == 200


def test_scrapes_are_not_logged(server: MetricsServer, capfd: pytest.CaptureFixture[str]) -> None:
    ask(server, "/metrics")
    ask(server, "/nowhere")
    assert capfd.readouterr() == ("", "")


def test_port_0_chooses_a_free_one_and_the_url_names_it(server: MetricsServer) -> None:
    assert port_of(server) >= 1024
    assert server.url == f"http://127.0.0.1:{port_of(server)}/metrics"


def test_a_closed_server_gives_its_port_back() -> None:
    first = start()
    first.close()
    second = start(port_of(first))
    try:
        assert ask(second, "/metrics")[0] == 200
    finally:
        second.close()


def test_a_port_in_use_is_told_with_the_settings_that_help(server: MetricsServer) -> None:
    with pytest.raises(KvmsnapdError) as refusal:
        start(port_of(server))
    assert str(refusal.value) == (
        f"cannot listen on 127.0.0.1 port {port_of(server)}: [Errno 98] Address already in use; set metrics.listen and "
        "metrics.port to free ones"
    )


@pytest.mark.parametrize(("listen", "port"), [("127.0.0.1", 70000), ("192.0.2.1", 0)])
def test_an_address_that_cannot_be_is_told_the_same_way(listen: str, port: int) -> None:
    with pytest.raises(KvmsnapdError, match=r"^cannot listen on .* set metrics.listen and metrics.port"):
        MetricsServer(CollectorRegistry(), listen=listen, port=port, ready=bool)
