"""Who may see the metrics: the web configuration in force, read anew when it changes, and the passwords."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import bcrypt

from kvmsnapd.config.web_config import WebConfig, load_web_config
from kvmsnapd.errors import KvmsnapdError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_LONGEST_PASSWORD = 72  # bcrypt looks at no more bytes
_MOST_WAITING, _MOST_WAITING_EACH = 16, 4
"""Passwords that wait to be compared, of all clients and of one. Each takes a tenth of a second, so more would wait too
long to be of use."""

_MOST_KNOWN = 1000

_Signature = tuple[tuple[int, int, int] | None, ...]


class Access:
    """The web configuration in force, and the answer to each request for access.

    To be used by one event loop; passwords are compared on a thread of their own, one at a time, so that a flood of
    wrong ones neither takes all cores nor holds up whoever is known already.
    """

    def __init__(self, path: Path | None, *, look_seconds: float = 1.0) -> None:
        """Read the web configuration; without a file everybody may see everything.

        Args:
            look_seconds: how often to look at the files, at most.

        Raises:
            ConfigError: it is not valid.
        """
        self._path, self._look_seconds = path, look_seconds
        self._config = load_web_config(path) if path else WebConfig()
        self._seen, self._looked_at = self._look(), time.monotonic()
        self._trouble = ""
        self._key = secrets.token_bytes(32)
        self._known: set[bytes] = set()
        self._waiting = Counter[str]()
        self._comparing = ThreadPoolExecutor(1, "passwords")

    def current(self) -> WebConfig:
        """Return the configuration in force, after a look at its files, at most so often.

        If what is there now cannot be used, what was in force stays, and one warning says so.
        """
        if self._path and time.monotonic() - self._looked_at >= self._look_seconds:
            self._looked_at = time.monotonic()
            seen = self._look()
            if seen != self._seen or self._trouble:  # what is missing may be a file that was not looked at before
                self._seen = seen
                self._read_again(self._path)
        return self._config

    def _read_again(self, path: Path) -> None:
        try:
            self._config = load_web_config(path)
        except KvmsnapdError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                message = "the web configuration is not taken over, what was read before stays in force: %s"
                logging.getLogger(__name__).warning(message, error)
        else:
            self._trouble = ""

    async def refusal(
        self, authorization: list[str], certificate: dict[str, Any] | None, peer: str = ""
    ) -> HTTPStatus | None:
        """Return with what status a request is refused, None if it is not.

        Args:
            authorization: the request's headers of this name.
            certificate: the client's, as ``getpeercert`` gives it, after the handshake has verified it.
            peer: the client's address.
        """
        config = self._config
        if config.allowed_sans and not _has_name(certificate, config.allowed_sans):
            return HTTPStatus.FORBIDDEN
        if not config.users:
            return None
        given = _credentials(authorization)
        if given is None:
            return HTTPStatus.UNAUTHORIZED
        user, password = given
        known = user in config.users
        hashed = config.users[user] if known else config.nobody
        text = b"\0".join((user.encode(), hashed.encode(), password))
        mark = hmac.digest(self._key, text, hashlib.sha256)
        if mark in self._known:
            return None
        if self._waiting[peer] >= _MOST_WAITING_EACH or self._waiting.total() >= _MOST_WAITING:
            return HTTPStatus.SERVICE_UNAVAILABLE
        self._waiting[peer] += 1
        try:
            right = await asyncio.get_running_loop().run_in_executor(self._comparing, _is_right, password, hashed)
        finally:
            self._waiting[peer] -= 1
            self._waiting += Counter()  # without those at 0
        if not (right and known):
            return HTTPStatus.UNAUTHORIZED
        if self._config is config and len(self._known) < _MOST_KNOWN:
            self._known.add(mark)
        return None

    def close(self) -> None:
        """End the thread after what it is at."""
        self._comparing.shutdown(wait=False, cancel_futures=True)

    def _look(self) -> _Signature:
        """Return what changes when one of the files does."""
        seen: list[tuple[int, int, int] | None] = []
        for file in (self._path, *self._config.files) if self._path else ():
            try:
                status = file.stat()
            except OSError:
                seen.append(None)
            else:
                seen.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(seen)


def _credentials(headers: Iterable[str]) -> tuple[str, bytes] | None:
    """Return user and password of the one ``Authorization`` header, None unless they can be right."""
    found = [re.fullmatch(r"basic +([A-Za-z0-9+/=]+) *", header, re.IGNORECASE) for header in headers]
    if len(found) != 1 or found[0] is None:
        return None
    try:
        user, colon, password = base64.b64decode(found[0][1], validate=True).partition(b":")
        name = user.decode()
    except ValueError:
        return None
    # bcrypt would fail at these, or compare only the beginning.
    fits = colon and b"\0" not in password and len(password) <= _LONGEST_PASSWORD
    return (name, password) if fits else None


def _is_right(password: bytes, hashed: str) -> bool:
    try:
        return bcrypt.checkpw(password, hashed.encode())
    except ValueError:  # a hash that only looks like one
        return False


def _has_name(certificate: dict[str, Any] | None, allowed: frozenset[str]) -> bool:
    """Tell whether a verified certificate is for one of these names, e-mail or IP addresses, or URIs."""
    for kind, value in (certificate or {}).get("subjectAltName", ()):
        name = value
        if kind == "IP Address":
            with suppress(ValueError):
                name = str(ipaddress.ip_address(value.strip()))
        if kind in {"DNS", "email", "IP Address", "URI"} and name in allowed:
            return True
    return False
