"""The keys of the web configuration file, validated: those of Prometheus' exporters, as far as we have them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from kvmsnapd.config.fields import OrEmpty
from kvmsnapd.errors import InvalidValueError

HEADERS: dict[str, tuple[str, ...]] = {
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
}
"""The headers that may be given, and their values where these are few."""

VERIFIED = "RequireAndVerifyClientCert"

UNSUPPORTED = {
    "cert": "write the certificate into a file of its own, and the path of that under cert_file",
    "key": "write the key into a file of its own, and the path of that under key_file",
    "client_ca": "write the certificates into a file of their own, and the path of that under client_ca_file",
    "cipher_suites": "remove it; OpenSSL's own choice applies, which its openssl.cnf can narrow",
    "prefer_server_cipher_suites": "remove it; OpenSSL's own choice applies",
    "curve_preferences": "remove it; OpenSSL's own choice applies",
    "http2": "remove it; HTTP/1.1 is spoken, which Prometheus takes as well",
    "rate_limit": "remove it; however often metrics are asked for, rendering them takes a fifth of a core at most",
}
"""What other exporters know and we do not, and what to do about it."""

_HASH = re.compile(r"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}")
_LOWEST_COST, _HIGHEST_COST = 4, 16  # beyond it a comparison takes longer than Prometheus waits
_MAKE_ONE = "`htpasswd -nBC 10 USER` makes one"


def cost_of(hashed: str) -> int:
    """Return how expensive it is to compare a password with this hash; each step doubles it."""
    return int(hashed[4:6])


def _client_auth(value: Any) -> Any:  # noqa: ANN401  # before validation anything may come
    if value in ("RequestClientCert", "RequireAnyClientCert", "RequireClientCert"):
        msg = f"{value} would take certificates that nobody has verified, which is not supported; write {VERIFIED}"
        raise InvalidValueError(msg)
    return "NoClientCert" if value in ("", None) else value


def _version(value: Any) -> Any:  # noqa: ANN401
    if value in ("TLS10", "TLS11"):
        msg = f"{value} is broken, and not supported; write TLS12 or TLS13"
        raise InvalidValueError(msg)
    return value


def _file(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str) or not value or "\0" in value:
        msg = "write the path of a file"
        raise InvalidValueError(msg)
    return value


def _users(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):  # never shown: it may be a password
        msg = f"write `user: hash` lines below it; {_MAKE_ONE}"
        raise InvalidValueError(msg)
    return value


def _user(value: str) -> str:
    if not value or ":" in value or not value.isprintable():
        msg = "write the name of a user, without a colon"
        raise InvalidValueError(msg)
    return value


def _hash(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        msg = f"write a bcrypt hash, of 60 characters that begin with $2y$, and not the password itself; {_MAKE_ONE}"
        raise InvalidValueError(msg)
    if not _LOWEST_COST <= cost_of(value) <= _HIGHEST_COST:
        msg = f"the cost of this hash is {cost_of(value)}; use one from {_LOWEST_COST} to {_HIGHEST_COST}, {_MAKE_ONE}"
        raise InvalidValueError(msg)
    return value


def _header(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?|", value):
        msg = "write the header's text, in ASCII and in one line"
        raise InvalidValueError(msg)
    return value


_Path = Annotated[str, BeforeValidator(_file)]
_Version = Annotated[Literal["TLS12", "TLS13"], BeforeValidator(_version)]
_ClientAuth = Annotated[
    Literal["NoClientCert", "VerifyClientCertIfGiven", "RequireAndVerifyClientCert"], BeforeValidator(_client_auth)
]
_User = Annotated[str, BeforeValidator(_user)]
_Hash = Annotated[str, BeforeValidator(_hash)]
_Header = Annotated[str, BeforeValidator(_header)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsSettings(_Section):
    """``tls_server_config``."""

    cert_file: _Path | None = None
    key_file: _Path | None = None
    client_auth_type: _ClientAuth = "NoClientCert"
    client_ca_file: _Path | None = None
    client_allowed_sans: list[str] | None = None
    min_version: _Version = "TLS12"
    max_version: _Version = "TLS13"


class HttpSettings(_Section):
    """``http_server_config``."""

    headers: Annotated[dict[str, _Header], OrEmpty()] = {}


class WebSettings(_Section):
    """The whole file."""

    tls_server_config: Annotated[TlsSettings, OrEmpty()] = TlsSettings()
    http_server_config: Annotated[HttpSettings, OrEmpty()] = HttpSettings()
    basic_auth_users: Annotated[dict[_User, _Hash], BeforeValidator(_users), OrEmpty()] = {}
