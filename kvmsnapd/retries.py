"""When a run that failed, or was refused, is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from kvmsnapd.execute import Outcome
    from kvmsnapd.fleet import Pair

_FIRST_RETRY, _LATEST_RETRY = timedelta(minutes=1), timedelta(minutes=15)
_CLOCK_TOLERANCE = timedelta(minutes=1)
_QUARANTINED = 10
"""As many failures a quarantine counts for: it ends when a person has changed something, and a look is cheap."""


def retry_delay(failures: int, interval: timedelta) -> timedelta:
    """Return how long to wait after this many failures in a row: a minute, doubling to a quarter of an hour.

    Never longer than half the schedule's interval, so that fast schedules retry fast.
    """
    # The exponent is capped well above where the delay is.
    delay: timedelta = min(_FIRST_RETRY * 2 ** min(failures - 1, 10), _LATEST_RETRY, interval / 2)
    return max(delay, timedelta(seconds=1))


@dataclass(frozen=True, slots=True)
class _Failures:
    """Runs of one pair that failed in a row, and the last one's time."""

    count: int
    last_at: datetime
    quarantined: bool


class Retries:
    """The failures in a row of all pairs, by key. In memory only: after a restart everything is tried at once."""

    def __init__(self) -> None:
        self._failures: dict[str, _Failures] = {}

    def note(self, key: str, outcome: Outcome, *, now: datetime) -> None:
        """Take in how a run ended."""
        if outcome.wants_retry:
            before = self._failures.get(key)
            self._failures[key] = _Failures(before.count + 1 if before else 1, now, outcome.quarantined)
        else:
            self._failures.pop(key, None)

    def run_at(self, pair: Pair, *, now: datetime) -> datetime:
        """Return when the pair's next run is to begin."""
        failures = self._failures.get(pair.name.key)
        # A failure dated in the future, under a clock that was wrong, holds nothing up.
        if not failures or not pair.due.slot or failures.last_at > now + _CLOCK_TOLERANCE:
            return pair.due.run_at
        count = _QUARANTINED if failures.quarantined else failures.count
        return max(pair.due.run_at, failures.last_at + retry_delay(count, pair.policy.schedule.longest_interval))

    def keys(self) -> set[str]:
        """Return the pairs that failed the last time."""
        return set(self._failures)

    def forget(self, keys: Iterable[str]) -> None:
        """Let these pairs be as new: they are gone, or what was in their way may be."""
        for key in keys:
            self._failures.pop(key, None)
