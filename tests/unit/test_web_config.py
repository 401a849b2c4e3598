"""The web configuration file: what it may say, and how it is told what is wrong."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.cli import main
from kvmsnapd.config import load_config
from kvmsnapd.config.web_config import WebConfig, load_web_config
from kvmsnapd.errors import ConfigError
from tests.unit.http_clients import Authority, hashed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[[str], Path]

HASH = "$2y$10$X0h1gDsPszWURQaxFh.zoubFi6DXncSjhoQNJgRrnGs7EsimhC7zG"  # of the format's own documentation
TLS = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    authority.sign("server", "DNS:localhost")
    authority.sign("other", "DNS:localhost")
    (authority.folder / "empty.crt").touch()
    (authority.folder / "locked.key").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n", encoding="utf-8")
    return authority


@pytest.fixture
def write(authority: Authority) -> Write:
    def write(text: str) -> Path:
        path = authority.folder / "web.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def told(path: Path) -> list[str]:
    """Return all problems, without the folder."""
    with pytest.raises(ConfigError) as refusal:
        load_web_config(path)
    return [str(problem).replace(f"{path.parent}/", "") for problem in refusal.value.problems]


def first_lines(path: Path) -> list[str]:
    return [text.partition("\n")[0] for text in told(path)]


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "tls_server_config:\n", "basic_auth_users: {}\nhttp_server_config: {headers: }\n"]
)
def test_a_file_that_says_nothing_changes_nothing(write: Write, text: str) -> None:
    assert load_web_config(write(text)) == WebConfig()


def test_everything_that_is_supported_is_read(write: Write, authority: Authority) -> None:
    config = load_web_config(
        write(
            "tls_server_config:\n"
            "  cert_file: server.crt\n"
            f"  key_file: {authority.folder}/server.key\n"
            "  client_auth_type: RequireAndVerifyClientCert\n"
            "  client_ca_file: ca.crt\n"
            "  client_allowed_sans: [prometheus.example, '0::1']\n"
            "  min_version: TLS12\n"
            "  max_version: TLS13\n"
            "http_server_config:\n"
            "  headers: {X-Frame-Options: sameorigin, Strict-Transport-Security: max-age=1}\n"
            f"basic_auth_users:\n  prometheus: {HASH}\n"
        )
    )
    assert config.context
    assert config.context.verify_mode is ssl.CERT_REQUIRED
    assert config.context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert config.allowed_sans == {"prometheus.example", "::1"}
    assert config.headers == (("X-Frame-Options", "sameorigin"), ("Strict-Transport-Security", "max-age=1"))
    assert config.users == {"prometheus": HASH}
    assert [file.name for file in config.files] == ["server.crt", "server.key", "ca.crt"]
    assert HASH not in repr(config)


@pytest.mark.parametrize("kind", ["2a", "2b", "2y"])
def test_every_kind_of_bcrypt_hash_is_taken(write: Write, kind: str) -> None:
    load_web_config(write(f"basic_auth_users: {{a: {HASH.replace('2y', kind)}}}"))


def test_a_misspelt_key_is_shown_with_what_was_meant(write: Write) -> None:
    assert told(write(TLS.replace("cert_file", "cert_fil"))) == [
        (
            "web.yaml:2:3: tls_server_config.cert_fil: unknown key `cert_fil`; did you mean `cert_file`? Allowed are "
            "cert_file, key_file, client_auth_type, client_ca_file, client_allowed_sans, min_version, max_version\n"
            "    2 |   cert_fil: server.crt\n"
            "      |   ^^^^^^^^"
        )
    ]


def test_all_problems_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = TLS.replace("server.key", "nowhere.key") + (
        "  min_version: TLS10\n"
        "http_server_config:\n"
        "  http2: true\n"
        "  headers: {X-Frame-Option: deny, X-Content-Type-Options: sniff}\n"
        "basic_auth_users:\n"
        "  alice: secret\n"
        f"  'b:b': {HASH}\n"
        "rate_limit: {burst: 1}\n"
        "min_version: TLS13\n"
    )
    beginnings = [
        "3:13: tls_server_config.key_file: nowhere.key cannot be read: No such file or directory",
        "4:16: tls_server_config.min_version: TLS10 is broken, and not supported; write TLS12 or TLS13",
        "6:3: http_server_config.http2: `http2` is not supported; remove it; HTTP/1.1 is spoken",
        "7:13: http_server_config.headers.X-Frame-Option: header `X-Frame-Option` cannot be set; did you mean `X-",
        "7:59: http_server_config.headers.X-Content-Type-Options: write nosniff",
        "9:10: basic_auth_users.alice: write a bcrypt hash, of 60 characters that begin with $2y$, and not the",
        '10:3: basic_auth_users."b:b": write the name of a user, without a colon',
        "11:1: rate_limit: `rate_limit` is not supported; remove it; however often metrics are asked for",
        "12:1: min_version: unknown key `min_version`; it belongs below tls_server_config. Allowed are",
    ]
    problems = [line.removeprefix("web.yaml:") for line in first_lines(write(text))]
    assert [problem[: len(known)] for problem, known in zip(problems, beginnings, strict=True)] == beginnings


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("cert_file: server.crt", "2:14: tls_server_config.cert_file: `key_file` is missing"),
        ("key_file: server.key", "2:13: tls_server_config.key_file: `cert_file` is missing"),
        ("min_version: TLS13", "1:1: tls_server_config: `cert_file` is missing"),
        (
            "{} cert_file: empty.crt\n  key_file: server.key",
            "tls_server_config.cert_file: empty.crt holds no certificate in PEM form",
        ),
        ("{} cert_file: .\n  key_file: server.key", "cannot be read: it is no regular file"),
        (
            "{} cert_file: server.crt\n  key_file: other.key",
            "key_file: other.key does not belong to the certificate in cert_file",
        ),
        (
            "{} cert_file: server.crt\n  key_file: ca.crt",
            "key_file: ca.crt holds no private key that OpenSSL can read",
        ),
        ("{} cert_file: server.crt\n  key_file: locked.key", "key_file: locked.key is protected by a passphrase"),
        (
            "{TLS}client_auth_type: RequireAndVerifyClientCert",
            "client_auth_type: `client_ca_file` is missing",
        ),
        ("{TLS}client_ca_file: ca.crt", "client_ca_file: nobody is asked for a certificate"),
        (
            "{TLS}client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: server.key",
            "client_ca_file: server.key holds no certificate",
        ),
        (
            "{TLS}client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.crt\n  client_allowed_sans: [a]",
            "client_allowed_sans: clients need not show a certificate; write client_auth_type: Require",
        ),
        (
            "{TLS}client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.crt\n  client_allowed_sans: []",
            "client_allowed_sans: nobody would be let in",
        ),
        ("{TLS}client_auth_type: RequireAnyClientCert", "RequireAnyClientCert would take certificates that nobody has"),
        ("{TLS}client_auth_type: RequestClientCert", "not supported; write RequireAndVerifyClientCert"),
        ("{TLS}client_auth_type: NoClientCerts", "did you mean `NoClientCert`"),
        ("{TLS}min_version: TLS13\n  max_version: TLS12", "max_version: is below min_version, TLS13"),
        ("{TLS}cipher_suites: [a]", "`cipher_suites` is not supported; remove it"),
        ("{TLS}curve_preferences: [a]", "`curve_preferences` is not supported; remove it"),
        ("{TLS}cert: a", "`cert` is not supported; write the certificate into a file of its own"),
        ("{TLS}key: a", "`key` is not supported; write the key into a file of its own"),
    ],
)
def test_what_cannot_be_served_is_refused_at_its_place(write: Write, lines: str, message: str) -> None:
    text = lines.replace("{TLS}", "cert_file: server.crt\n  key_file: server.key\n  ").replace("{} ", "")
    problems = first_lines(write(f"tls_server_config:\n  {text}\n"))
    assert any(message in problem for problem in problems), problems
    assert len(problems) <= 2


@pytest.mark.parametrize("cost", [3, 17, 31])
def test_a_cost_that_nobody_can_wait_for_is_refused(write: Write, cost: int) -> None:
    (problem,) = first_lines(write(f"basic_auth_users: {{a: {HASH.replace('$10$', f'${cost:02}$')}}}"))
    assert f"the cost of this hash is {cost}; use one from 4 to 16" in problem


SECRETS = ["hunter2", HASH[7:], HASH[20:]]


@pytest.mark.parametrize(
    "text",
    [
        "basic_auth_users:\n  alice: hunter2\n",
        f"basic_auth_users:\n  alice: {HASH}x\n",
        f"basic_auth_users:\n  alice: {HASH[:-1]}\n",
        f"basic_auth_users:\n  alice:{HASH}\n",
        "basic_auth_users:\n  alice:hunter2\n",
        "basic_auth_users: hunter2\n",
        "basic_auth_users: [hunter2]\n",
        "basic_auth_users: {alice: [hunter2]}\n",
        "basic_auth_users: {alice: {bob: hunter2}}\n",
        "basic_auth_users:\n  alice: !hunter2 x\n",
        "basic_auth_users:\n  alice: !!str 'hunter2'\n  alice: hunter2\n",
        "basic_auth_users:\n  alice: 'hunter2\n",
        "basic_auth_users:\n  alice: >\n    hunter2\n    hunter2\n",
        f"basic_auth_users:\n  {HASH}: alice\n",
        "basic_auth_user:\n  alice: hunter2\n",
        "basic_auth_user: {alice: hunter2}\n",
        "tls_server_config:\n  basic_auth_users: {alice: hunter2}\n",
        "{tls_server_config: {a: b}, basic_auth_users: {alice: hunter2}}\n",
        "{basic_auth_users: {alice: x,\n  bob: hunter2}, tls_server_config: {a: b}}\n",
        "# hunter2\nbasic_auth_users: {alice: x} # hunter2\n",
        "basic_auth_users:\n\talice: hunter2\n",
        "basic_auth_users:\n  alice: hunter2: x\n",
        "basic_auth_users:\n  alice: *hunter2\n",
        "basic_auth_users:\n  alice: %hunter2\n",
        "basic_auth_users:\n  alice: hunter2\x07\n",
        "basic_auth_users:\n  alice: hunter2\n---\n",
        "hunter2\n",
        "- hunter2\n",
    ],
)
def test_no_password_and_no_hash_is_ever_shown(write: Write, text: str) -> None:
    problems = "\n".join(told(write(text)))
    assert not [secret for secret in SECRETS if secret in problems], problems


def test_the_place_of_a_wrong_hash_is_marked_without_showing_it(write: Write) -> None:
    (problem,) = told(write(f"basic_auth_users:\n  alice: {HASH}\n  bob: hunter2\n"))
    assert problem.splitlines()[1:] == ["    3 |   bob: *******", "      |        ^^^^^^^"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfea\0", "is UTF-16 text"), (b"a: \xff", "is not UTF-8 text"), (b"a: [", "not YAML")],
)
def test_what_is_no_text_or_yaml_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "web.yaml"
    path.write_bytes(content)
    assert message in told(path)[0]


def test_a_file_that_is_missing_or_open_to_everybody_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "web.yaml"
    assert told(path) == ["web.yaml: cannot be read: No such file or directory; nothing was changed"]
    path.touch()
    path.chmod(0o666)
    assert "can be written to by everybody" in told(path)[0]


# Together with the main configuration


def test_its_problems_are_told_together_with_those_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, path = tmp_path / "web.yaml", tmp_path / "kvmsnapd.yaml"
    web.write_text("basic_auth_users: {alice: hunter2}\n", encoding="utf-8")
    path.write_text(f"tick: soon\nmetrics: {{web_config: {web}}}\n", encoding="utf-8")
    assert main(["check-config", "--config", str(path)]) != 0
    output = capsys.readouterr()
    places = re.findall(r"(\w+\.yaml:\d+:\d+): ", output.err + output.out)
    assert places == ["kvmsnapd.yaml:1:7", "web.yaml:1:27"]
    assert "hunter2" not in output.err + output.out


@pytest.mark.parametrize("metrics", ["{enabled: false, web_config: %s}", "{enabled: true}"])
def test_a_file_that_is_not_used_is_not_read(tmp_path: Path, metrics: str) -> None:
    path = tmp_path / "kvmsnapd.yaml"
    path.write_text("domains: {}\nmetrics: " + metrics.replace("%s", str(tmp_path / "none.yaml")), encoding="utf-8")
    load_config(path, check_web=True)


def test_a_good_file_lets_the_configuration_be_loaded(tmp_path: Path) -> None:
    web, path = tmp_path / "web.yaml", tmp_path / "kvmsnapd.yaml"
    web.write_text(f"basic_auth_users: {{alice: {hashed('a')}}}\n", encoding="utf-8")
    path.write_text(f"domains: {{}}\nmetrics: {{web_config: {web}}}\n", encoding="utf-8")
    assert load_config(path, check_web=True).settings.metrics.web_config == str(web)
