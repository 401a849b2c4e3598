"""Who is let in: users and passwords, TLS, certificates of clients, and all of them as they change."""

from __future__ import annotations

import base64
import http.client
import shutil
import ssl
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.endpoint.access import _MOST_WAITING_EACH
from kvmsnapd.endpoint.server import Limits
from tests.unit.http_clients import (
    Authority,
    ask,
    basic,
    client_of,
    connect,
    hashed,
    port_of,
    read_all,
    say,
    serving,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmsnapd.endpoint.server import MetricsServer

TLS = "tls_server_config: {cert_file: server.crt, key_file: server.key"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    authority.sign("server", "IP:127.0.0.1,DNS:localhost")
    authority.sign("other", "IP:127.0.0.1")
    authority.sign("client", "DNS:prometheus.example,IP:::1,email:a@example.org,URI:spiffe://example/prometheus")
    return authority


@pytest.fixture
def authority(made: Authority, tmp_path: Path) -> Authority:
    """Provide a copy that a test may change."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    copied = Authority.__new__(Authority)
    copied.folder, copied.name = tmp_path, made.name
    return copied


@contextmanager
def guarded(folder: Path, text: str) -> Iterator[MetricsServer]:
    (folder / "web.yaml").write_text(text, encoding="utf-8")
    with serving(web_config=folder / "web.yaml", limits=Limits(look=0)) as server:
        yield server


def change(path: Path, text: str) -> None:
    """Write a file as editors do."""
    draft = path.with_suffix(".new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


# Users and passwords


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetricsServer]:
    users = f"basic_auth_users: {{prometheus: {hashed('right')}, jürgen: {hashed('grün')}, long: {hashed('x' * 72)}}}"
    with guarded(tmp_path_factory.mktemp("users"), users) as server:
        yield server


@pytest.mark.parametrize(("user", "password"), [("prometheus", "right"), ("jürgen", "grün"), ("long", "x" * 72)])
def test_who_knows_the_password_is_let_in(server: MetricsServer, user: str, password: str) -> None:
    for _ in range(2):
        assert ask(server, Authorization=basic(user, password))[0] == 200


def b64(text: bytes) -> str:
    return base64.b64encode(text).decode()


@pytest.mark.parametrize(
    "header",
    [
        basic("prometheus", "wrong"),
        basic("prometheus", ""),
        basic("nobody", "right"),
        basic("", ""),
        basic("long", "x" * 73),
        basic("prometheus", "x" * 2000),
        "Basic " + b64(b"prometheus"),
        "Basic " + b64(b"prometheus:\xff\xfe"),
        "Basic " + b64(b"\xff\xfe:right"),
        "Basic " + b64(b"prometheus:right\0"),
        "Basic " + b64(b"prometheus\0:right"),
        "Basic " + b64(b"prometheus:right")[:-1] + "!",
        "Basic " + b64(b"prometheus:right")[:-2],
        "Basic",
        "Basic \xe4\xf6",
        "Bearer " + b64(b"prometheus:right"),
        "",
    ],
)
def test_anything_else_is_401(server: MetricsServer, header: str) -> None:
    status, text, headers = ask(server, Authorization=header)
    assert (status, text) == (401, b"a user and password are needed\n")
    assert headers["WWW-Authenticate"].startswith('Basic realm="')


def test_without_the_header_it_is_401(server: MetricsServer) -> None:
    assert ask(server)[0] == 401


def test_two_headers_are_401(server: MetricsServer) -> None:
    line = f"Authorization: {basic('prometheus', 'right')}\r\n".encode()
    assert say(server, b"GET /metrics HTTP/1.0\r\n" + line + line + b"\r\n").startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(("path", "method"), [("/nowhere", "GET"), ("/metrics", "POST"), ("/-/healthy", "GET")])
def test_strangers_are_told_neither_paths_nor_methods(server: MetricsServer, path: str, method: str) -> None:
    assert ask(server, path, method)[0] == 401
    assert ask(server, path, method, Authorization=basic("prometheus", "right"))[0] != 401


def test_the_word_basic_may_be_written_in_capitals(server: MetricsServer) -> None:
    assert ask(server, Authorization=basic("prometheus", "right").replace("Basic", "BASIC"))[0] == 200


def test_an_unknown_user_takes_as_long_as_a_wrong_password(tmp_path: Path) -> None:
    import bcrypt  # noqa: PLC0415

    slow = bcrypt.hashpw(b"right", bcrypt.gensalt(9)).decode()

    def seconds(user: str) -> float:
        began = time.monotonic()
        assert ask(server, Authorization=basic(user, "wrong"))[0] == 401
        return time.monotonic() - began

    with guarded(tmp_path, f"basic_auth_users: {{prometheus: {slow}}}") as server:
        known = min(seconds("prometheus") for _ in range(4))
        unknown = min(seconds("nobody") for _ in range(4))
    assert 0.5 < unknown / known < 2


def test_who_was_known_before_a_certificate_is_renewed_is_known_after_it(tmp_path: Path) -> None:
    import bcrypt  # noqa: PLC0415

    slow = bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode()
    text = f"basic_auth_users: {{prometheus: {slow}}}"

    def status(client: http.client.HTTPConnection) -> int:
        client.request("GET", "/metrics", headers={"Authorization": basic("prometheus", "right")})
        answer = client.getresponse()
        answer.read()
        return answer.status

    with guarded(tmp_path, text) as server, ExitStack() as opened:
        client = client_of(server)
        opened.callback(client.close)
        assert status(client) == 200
        change(tmp_path / "web.yaml", text + "\n")
        line = f"Authorization: {basic('prometheus', 'wrong')}\r\n".encode()
        for _ in range(_MOST_WAITING_EACH + 4):
            opened.enter_context(connect(server)).sendall(b"GET /metrics HTTP/1.0\r\n" + line + b"\r\n")
        assert status(client) == 200


def test_too_many_passwords_at_once_are_503(tmp_path: Path) -> None:
    import bcrypt  # noqa: PLC0415

    slow = bcrypt.hashpw(b"right", bcrypt.gensalt(10)).decode()
    with guarded(tmp_path, f"basic_auth_users: {{prometheus: {slow}}}") as server:
        clients = [connect(server) for _ in range(_MOST_WAITING_EACH + 4)]
        line = f"Authorization: {basic('prometheus', 'wrong')}\r\n".encode()
        for client in clients:
            client.sendall(b"GET /metrics HTTP/1.0\r\n" + line + b"\r\n")
        answers = []
        for client in clients:
            with client:
                answers.append(read_all(client)[9:12])
    assert answers.count(b"503") >= 3
    assert answers.count(b"401") >= _MOST_WAITING_EACH - 1


def test_a_changed_password_holds_for_kept_connections_as_well(tmp_path: Path) -> None:
    with guarded(tmp_path, f"basic_auth_users: {{prometheus: {hashed('old')}}}") as server:
        client = client_of(server)

        def status(password: str) -> int:
            client.request("GET", "/metrics", headers={"Authorization": basic("prometheus", password)})
            response = client.getresponse()
            response.read()
            return response.status

        try:
            assert (status("old"), status("new")) == (200, 401)
            change(tmp_path / "web.yaml", f"basic_auth_users: {{prometheus: {hashed('new')}}}")
            assert (status("old"), status("new")) == (401, 200)
        finally:
            client.close()


def test_headers_of_the_file_are_in_every_response(tmp_path: Path) -> None:
    with guarded(tmp_path, "http_server_config: {headers: {X-Frame-Options: deny, X-XSS-Protection: ''}}") as server:
        for path in ("/metrics", "/nowhere"):
            headers = ask(server, path)[2]
            assert headers["X-Frame-Options"] == "deny"
            assert "X-XSS-Protection" not in headers


# TLS


def test_metrics_are_served_by_tls(authority: Authority) -> None:
    with guarded(authority.folder, TLS + "}") as server:
        assert server.url == f"https://127.0.0.1:{port_of(server)}/metrics"
        status, text, _ = ask(server, tls=authority.client())
        assert status == 200
        assert b"answer 42.0\n" in text


def test_plain_http_on_a_tls_port_is_a_closed_connection(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with guarded(authority.folder, TLS + "}") as server:
        with connect(server) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            with suppress(ConnectionResetError):
                assert b"HTTP" not in read_all(client)
        assert ask(server, tls=authority.client())[0] == 200
    assert caplog.text == ""


@pytest.mark.parametrize(("limits", "spoken"), [("", "TLSv1.3"), (", max_version: TLS12", "TLSv1.2")])
def test_the_newest_version_that_is_allowed_is_spoken(authority: Authority, limits: str, spoken: str) -> None:
    with (
        guarded(authority.folder, TLS + limits + "}") as server,
        connect(server) as plain,
        authority.client().wrap_socket(plain, server_hostname="127.0.0.1") as client,
    ):
        assert client.version() == spoken


def test_an_older_version_than_allowed_is_not_spoken(authority: Authority) -> None:
    old = authority.client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with guarded(authority.folder, TLS + ", min_version: TLS13}") as server:
        with pytest.raises(ssl.SSLError):
            ask(server, tls=old)
        assert ask(server, tls=authority.client())[0] == 200


VERIFY = TLS + ", client_ca_file: ca.crt, client_auth_type: "


def refused(server: MetricsServer, tls: ssl.SSLContext) -> bool:
    try:
        ask(server, tls=tls)
    except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected):
        return True
    return False


def test_a_certificate_can_be_required_of_clients(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stranger = Authority(tmp_path_factory.mktemp("stranger"), "stranger")
    stranger.sign("client", "DNS:prometheus.example")
    wrong = authority.client()
    wrong.load_cert_chain(stranger.folder / "client.crt", stranger.folder / "client.key")
    with guarded(authority.folder, VERIFY + "RequireAndVerifyClientCert}") as server:
        assert ask(server, tls=authority.client("client"))[0] == 200
        assert refused(server, authority.client())
        assert refused(server, wrong)


def test_a_certificate_can_be_left_to_clients(authority: Authority) -> None:
    with guarded(authority.folder, VERIFY + "VerifyClientCertIfGiven}") as server:
        assert ask(server, tls=authority.client("client"))[0] == 200
        assert ask(server, tls=authority.client())[0] == 200


@pytest.mark.parametrize(
    ("sans", "status"),
    [
        ("[prometheus.example]", 200),
        ("['0:0:0:0:0:0:0:1']", 200),
        ("['::1']", 200),
        ("[a@example.org]", 200),
        ("['spiffe://example/prometheus']", 200),
        ("[other.example, prometheus.example]", 200),
        ("[other.example, client]", 403),
    ],
)
def test_only_certificates_of_the_names_given_are_let_in(authority: Authority, sans: str, status: int) -> None:
    text = VERIFY + f"RequireAndVerifyClientCert, client_allowed_sans: {sans}}}"
    with guarded(authority.folder, text) as server:
        assert ask(server, tls=authority.client("client"))[0] == status


def name_of_server(server: MetricsServer, authority: Authority) -> str:
    with connect(server) as plain, authority.client().wrap_socket(plain, server_hostname="127.0.0.1") as client:
        certificate = client.getpeercert()
        assert certificate
        return dict(pair for part in certificate["subject"] for pair in part)["commonName"]


def test_a_renewed_certificate_is_shown_and_a_broken_one_is_not(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    folder = authority.folder
    with guarded(folder, TLS + "}") as server:
        assert name_of_server(server, authority) == "server"
        change(folder / "server.crt", (folder / "other.crt").read_text())  # the key is still the old one
        assert name_of_server(server, authority) == "server"
        assert name_of_server(server, authority) == "server"
        (warning,) = caplog.records
        assert warning.getMessage().startswith("the web configuration is not taken over, what was read before stays")
        assert "does not belong to the certificate" in warning.getMessage()
        change(folder / "server.key", (folder / "other.key").read_text())
        assert name_of_server(server, authority) == "other"
    assert len(caplog.records) == 1


def test_a_missing_file_that_comes_later_is_taken(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    folder = authority.folder
    with guarded(folder, TLS + "}") as server:
        change(folder / "web.yaml", TLS.replace("server.", "later.") + "}")
        assert name_of_server(server, authority) == "server"
        assert "later.crt cannot be read: No such file or directory" in caplog.text
        (folder / "other.key").rename(folder / "later.key")
        (folder / "other.crt").rename(folder / "later.crt")
        assert name_of_server(server, authority) == "other"


def test_who_was_let_in_by_an_older_handshake_has_to_shake_hands_again(authority: Authority) -> None:
    with guarded(authority.folder, TLS + "}") as server:
        client = client_of(server, authority.client())
        try:
            client.request("GET", "/-/healthy")
            assert client.getresponse().read() == b"ok\n"
            change(authority.folder / "web.yaml", VERIFY + "RequireAndVerifyClientCert}")
            client.request("GET", "/-/healthy")
            with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
                client.getresponse()
        finally:
            client.close()
        assert refused(server, authority.client())
