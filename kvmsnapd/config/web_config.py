"""The web configuration file, in the format that Prometheus' exporters share: TLS, client certificates, users.

Its problems are told like those of the configuration, except that passwords and their hashes are never shown.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kvmsnapd.config.fields import suggest
from kvmsnapd.config.files import MOST_BYTES, decode, owner_of, read_file
from kvmsnapd.config.problems import MOST_TOLD, Complaint, complaint_of
from kvmsnapd.config.tls import make_context
from kvmsnapd.config.web_models import (
    HEADERS,
    UNSUPPORTED,
    VERIFIED,
    HttpSettings,
    TlsSettings,
    WebSettings,
    cost_of,
)
from kvmsnapd.config.yaml_document import Document, Span, parse_yaml, printable
from kvmsnapd.errors import ConfigError, Problem

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pydantic import BaseModel

    from kvmsnapd.config.yaml_document import Location

_TLS = "tls_server_config"
_OPEN = (_TLS, "http_server_config", "rate_limit")
"""The sections of which the lines may be shown, unless they look as if a user or password were there."""

_SECRET = re.compile(r"user|pass|\$2", re.IGNORECASE)
_LIKE_A_HASH = re.compile(r"\$2[a-z]?\$[0-9][^\s\"'`]*")
_KEY = re.compile(r"\s*(\"[^\"]*\"|'[^']*'|[^\s\"'{}\[\],:#]+)\s*:(?=\s|$)")
_SECTIONS: dict[Location, type[BaseModel]] = {
    (): WebSettings,
    (_TLS,): TlsSettings,
    ("http_server_config",): HttpSettings,
}


@dataclass(frozen=True)
class WebConfig:
    """How the metrics are served: without a file in plain HTTP, to everybody."""

    context: ssl.SSLContext | None = None
    """For TLS, if that is to be spoken."""
    allowed_sans: frozenset[str] = frozenset()
    """One of these the certificate of a client must name; empty: any that is verified will do."""
    users: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The hash of each one's password."""
    headers: tuple[tuple[str, str], ...] = ()
    """To be added to each response."""
    files: tuple[Path, ...] = ()
    """What else was read; a change of one asks for reading all anew."""

    @property
    def nobody(self) -> str:
        """A hash for users that do not exist, which takes as long to compare with as the others'."""
        return f"$2b${max(map(cost_of, self.users.values()), default=10):02}${'.' * 53}"


def load_web_config(path: Path) -> WebConfig:
    """Read the file, and the certificates that it names, relative to its own folder.

    Raises:
        ConfigError: with every problem found.
    """
    text = decode(path, read_file(path, owner_of(path), MOST_BYTES))
    try:
        document = parse_yaml(str(path), text)
    except ConfigError as error:
        lines = text.removeprefix("\ufeff").splitlines()
        masked = Document(str(path), [_masked(line) for line in lines])
        raise ConfigError([_without_secrets(problem, masked) for problem in error.problems]) from None
    shown = Document(str(path), list(_shown_lines(document)), keys=document.keys, values=document.values)
    settings, complaints = _validate(document.data)
    if settings is None:
        settings, _ = _validate(_without(document.data, complaints))
    config = WebConfig()
    if settings:
        config, more = _check(settings, path, whole=not any(c.location[0] == _TLS for c in complaints))
        complaints += more
    complaints += _wrong_headers(document.data)
    wrong = [shown.problem(shown.span(c.location, of_key=c.of_key), c.message, c.location) for c in complaints]
    if document.problems or wrong:
        problems = [_without_secrets(problem, shown) for problem in (*document.problems, *wrong)]
        raise ConfigError(sorted(problems, key=lambda p: (p.line, p.column, p.message))[:MOST_TOLD])
    return config


def _validate(data: dict[str, Any]) -> tuple[WebSettings | None, list[Complaint]]:
    try:
        return WebSettings.model_validate(data), []
    except ValidationError as error:
        return None, [complaint_of(details, _unknown_key) for details in error.errors(include_url=False)]


def _without(data: dict[str, Any], wrong: Iterable[Complaint]) -> dict[str, Any]:
    """Return the data without the keys that are wrong, so that problems of the others are told as well."""
    rest = deepcopy(data)
    for complaint in wrong:
        holder: Any = rest
        for part in complaint.location[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict):
            holder.pop(complaint.location[-1], None)
    return rest


def _check(settings: WebSettings, path: Path, *, whole: bool) -> tuple[WebConfig, list[Complaint]]:
    """Return the configuration, and what is wrong in the files it names and, if it is whole, between its keys."""
    tls = settings.tls_server_config
    config = WebConfig(
        users=settings.basic_auth_users,
        headers=tuple((name, text) for name, text in settings.http_server_config.headers.items() if text),
        allowed_sans=frozenset(map(_san, tls.client_allowed_sans or ())),
    )
    wrong = list(_between(tls)) if whole else []
    if tls.cert_file and tls.key_file:
        cert, key = path.parent / tls.cert_file, path.parent / tls.key_file
        ca = path.parent / tls.client_ca_file if tls.client_ca_file else None
        context, unfit = make_context(
            cert, key, ca=ca, clients=tls.client_auth_type, lowest=tls.min_version, highest=tls.max_version
        )
        config = replace(config, context=context, files=(cert, key, ca) if ca else (cert, key))
        wrong += unfit.items()
    return config, [Complaint((_TLS, key) if key else (_TLS,), message, of_key=not key) for key, message in wrong]


def _between(tls: TlsSettings) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the keys of a section together, at the key that is to be changed."""
    if not tls.model_fields_set:
        return
    for key, other in (("cert_file", "key_file"), ("key_file", "cert_file")):
        if not getattr(tls, key):
            yield (other if getattr(tls, other) else ""), f"`{key}` is missing; TLS needs a certificate and its key"
    if tls.client_auth_type != "NoClientCert" and not tls.client_ca_file:
        yield "client_auth_type", "`client_ca_file` is missing; name the certificates that clients' are signed by"
    if tls.client_ca_file and tls.client_auth_type == "NoClientCert":
        yield "client_ca_file", f"nobody is asked for a certificate; write client_auth_type: {VERIFIED}"
    if tls.client_allowed_sans is not None and tls.client_auth_type != VERIFIED:
        yield "client_allowed_sans", f"clients need not show a certificate; write client_auth_type: {VERIFIED}"
    elif tls.client_allowed_sans == []:
        yield "client_allowed_sans", "nobody would be let in; write the names of clients, or remove it"
    if tls.min_version > tls.max_version:
        yield "max_version", f"is below min_version, {tls.min_version}"


def _wrong_headers(data: Mapping[str, object]) -> Iterator[Complaint]:
    section = data.get("http_server_config")
    headers = section.get("headers") if isinstance(section, dict) else None
    for name, text in headers.items() if isinstance(headers, dict) else ():
        location = ("http_server_config", "headers", name)
        if name not in HEADERS:
            near = suggest(name, list(HEADERS))
            message = f"header `{printable(name[:60])}` cannot be set{near} Allowed are {', '.join(HEADERS)}"
            yield Complaint(location, message, of_key=True)
        elif text and isinstance(text, str) and HEADERS[name] and text not in HEADERS[name]:
            yield Complaint(location, f"write {' or '.join(HEADERS[name])}")


def _unknown_key(key: str, section: Location) -> str:
    if key in UNSUPPORTED:
        return f"`{key}` is not supported; {UNSUPPORTED[key]}"
    names = list(_SECTIONS[section].model_fields)
    near = suggest(key, names)
    if near == ".":
        homes = [at for at, model in _SECTIONS.items() if key in model.model_fields]
        near = f"; it belongs {f'below {homes[0][0]}' if homes[0] else 'to the top of the file'}." if homes else near
    return f"unknown key `{printable(key[:60])}`{near} Allowed are {', '.join(names)}"


def _san(name: str) -> str:
    with suppress(ValueError):
        return str(ipaddress.ip_address(name))
    return name


def _masked(line: str) -> str:
    """Return a line with all but its key made unreadable."""
    key = _KEY.match(line)
    at = key.end() if key else 0
    return line[:at] + re.sub(r"\S", "*", line[at:])


def _shown_lines(document: Document) -> Iterable[str]:
    """Yield the lines; of those that are not all in a section without secrets the keys only."""
    begins = {span.line: location[0] for location, span in document.keys.items() if len(location) == 1}
    places = {(span.line, span.column) for location, span in document.keys.items() if len(location) == 1}
    lines_of_sections = Counter(line for line, _ in places)
    section: str | int = ""
    for number, line in enumerate(document.lines, 1):
        section = begins.get(number, section)
        # In flow style a line may begin within another section.
        alone = number not in begins or (
            lines_of_sections[number] == 1 and (number, len(line) - len(line.lstrip()) + 1) in places
        )
        yield line if section in _OPEN and alone and not _SECRET.search(line) else _masked(line)


def _without_secrets(problem: Problem, document: Document) -> Problem:
    """Return a problem with the document's lines instead of the file's, and without anything that may be a hash."""
    span = Span(problem.line, problem.column, problem.excerpt.rpartition("\n")[2].count("^"))
    excerpt = document.problem(span, "").excerpt if problem.line else ""
    message = re.sub(r"^tag \S+ is", "a tag is", problem.message)
    message, key, excerpt = (
        _LIKE_A_HASH.sub(lambda found: "*" * len(found[0]), text) for text in (message, problem.key, excerpt)
    )
    return replace(problem, message=message, key=key, excerpt=excerpt)
