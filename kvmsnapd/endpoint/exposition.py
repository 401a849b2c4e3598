"""The registry as text: as Prometheus asks for it, and never at the cost of more than a fifth of a core."""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

_REUSED = 4
"""How many times as long as it took to make is a text given out again."""

_TYPES = ("application/openmetrics-text", "text/plain")
_VERSIONS = ("", "0.0.1", "0.0.4", "1.0.0")
_ESCAPINGS = ("allow-utf-8", "underscores", "dots", "values")
_LONGEST_ACCEPT = 1000


class _Made(NamedTuple):
    text: bytes
    at: float
    took: float


class Exposition:
    """Renders one registry; to be called from any thread.

    A text is made by one thread at a time. Whoever asks meanwhile, or soon after, is given the same one.
    """

    def __init__(
        self, registry: CollectorRegistry, *, process: bool = False, stopwatch: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin without any text.

        Args:
            process: whether to tell of this process as well: its memory, descriptors, start.
        """
        self._registry = CollectorRegistry()
        self._registry.register(registry)
        if process:
            ProcessCollector(registry=self._registry)
        self._stopwatch = stopwatch
        self._made: dict[str, _Made] = {}
        self._making = threading.Lock()

    def __call__(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type for a request's ``Accept`` header."""
        encode, content_type = choose_encoder(understood(accept))
        with self._making:
            made, now = self._made.get(content_type), self._stopwatch()
            if made is None or not self._is_fresh(made, now):
                self._made = {kind: other for kind, other in self._made.items() if self._is_fresh(other, now)}
                text = encode(self._registry)
                ended = self._stopwatch()
                made = self._made[content_type] = _Made(text, ended, ended - now)
        return made.text, content_type

    def _is_fresh(self, made: _Made, now: float) -> bool:
        # Texts of several types cost as much as all of them together.
        return now - made.at < _REUSED * sum(each.took for each in self._made.values())


def understood(accept: str) -> str:
    """Return an ``Accept`` header with only what there are encoders for, the most wanted first.

    The library takes any version for one it can write, fails at what is none, and does not look at ``q``.
    """
    wanted: list[tuple[float, str]] = []
    for entry in accept[:_LONGEST_ACCEPT].split(","):
        kind, *rest = (part.strip() for part in entry.split(";"))
        values = {key.strip().lower(): value.strip() for key, _, value in (part.partition("=") for part in rest)}
        version, escaping, weight = values.get("version", ""), values.get("escaping", ""), quality(values.get("q"))
        if kind.lower() in _TYPES and version in _VERSIONS and weight > 0:
            text = kind.lower() + (f";version={version}" if version else "")
            wanted.append((weight, text + (f";escaping={escaping}" if escaping in _ESCAPINGS else "")))
    return ",".join(text for _, text in sorted(wanted, key=lambda each: -each[0]))


def quality(written: str | None) -> float:
    """Return how much something is wanted: 1 where nothing is said, 0 if it is not, or is not said well."""
    if written is None:
        return 1.0
    return float(written) if re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", written) else 0.0
