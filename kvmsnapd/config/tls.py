"""Certificates and keys, as OpenSSL takes them; and in plain words why it does not."""

from __future__ import annotations

import ssl
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MOST_BYTES = 2**22

VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
CLIENTS = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}

_REASONS = {
    "KEY_VALUES_MISMATCH": ("key_file", "{key} does not belong to the certificate in cert_file"),
    "EE_KEY_TOO_SMALL": ("cert_file", "the key of the certificate in {cert} is too short for OpenSSL's settings"),
    "CA_MD_TOO_WEAK": ("cert_file", "the certificate in {cert} is signed by a method too weak for OpenSSL's settings"),
}


def make_context(
    cert: Path, key: Path, *, ca: Path | None, clients: str, lowest: str, highest: str
) -> tuple[ssl.SSLContext, dict[str, str]]:
    """Return the context of a server, and what is wrong by key; only without a problem can it be used.

    Args:
        ca: the certificates that those of clients must be signed by.
        clients: which certificates clients must show, a word of the web configuration.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.maximum_version = VERSIONS[lowest], VERSIONS[highest]
    # Scrapers keep connections, so TLS 1.3 hands out no tickets to come back with.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    problems = _read_all({"cert_file": cert, "key_file": key, **({"client_ca_file": ca} if ca else {})})
    if problems:
        return context, problems
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")
        if ca:
            context.verify_mode = CLIENTS[clients]
            context.load_verify_locations(ca)
    except ssl.SSLError as error:
        name, text = _REASONS.get(error.reason or "", ("key_file", "{key} holds no private key that OpenSSL can read"))
        problems[name] = text.format(cert=cert, key=key)
    except OSError as error:  # changed since we read it
        problems["cert_file"] = f"{cert} cannot be read: {error.strerror}"
    return context, problems


def _read_all(files: dict[str, Path]) -> dict[str, str]:
    """Return what is wrong with single files, by key."""
    problems: dict[str, str] = {}
    for name, path in files.items():
        try:
            text = _read(path)
        except (OSError, ValueError) as error:
            problems[name] = f"{path} cannot be read: {(isinstance(error, OSError) and error.strerror) or error}"
            continue
        if name != "key_file" and not _has_certificate(text):
            problems[name] = f"{path} holds no certificate in PEM form"
        if name == "key_file" and "ENCRYPTED" in text:
            problems[name] = f"{path} is protected by a passphrase, which nobody could type; store it without one"
    return problems


def _read(path: Path) -> str:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        msg = "it is no regular file"
        raise ValueError(msg)
    if status.st_size > _MOST_BYTES:
        msg = f"it is larger than {_MOST_BYTES} bytes"
        raise ValueError(msg)
    return path.read_bytes().decode("ascii", "replace")


def _has_certificate(text: str) -> bool:
    with suppress(ssl.SSLError, ValueError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=text)
        return True
    return False
