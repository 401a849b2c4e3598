"""What others are told of work that may take long, so that they can show how far it is."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from kvmsnapd.model import PairName


@dataclass(frozen=True, slots=True)
class Work:
    """One call to libvirt that may take long, and what it is for."""

    pair: PairName
    text: str
    afterwards: str | None = None
    """What is to be known if nobody waits for its end; None for what is true of snapshots."""


if TYPE_CHECKING:
    Watch = Callable[[Work], AbstractContextManager[object]]


def unwatched(_work: Work) -> AbstractContextManager[object]:
    """Watch nothing, as the daemon does: its events and metrics tell."""
    return nullcontext()
