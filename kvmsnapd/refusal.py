"""Refusals: the answer for a domain that must not be touched now."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RefusalReason(StrEnum):
    """Why a snapshot that is due is not taken. These words are metric labels."""

    STATE = "state"
    TRANSIENT = "transient"
    MANAGED_SAVE = "managed_save"
    BLOCK_JOB = "block_job"
    MIXED_KINDS = "mixed_kinds"
    UNSUPPORTED = "unsupported"
    DISK = "disk"
    CHAIN_BUDGET = "chain_budget"
    """The policies may keep more external snapshots than a backing chain may hold."""
    CHAIN_FULL = "chain_full"
    SPACE = "space"
    PAUSE = "pause"
    """Saving the guest's RAM would stop it for longer than the policy allows."""
    AGENT = "agent"
    ATTEMPTS = "attempts"
    RESTORING = "restoring"
    """A restore of the domain was interrupted; only a person can finish it."""

    @property
    def heals(self) -> bool:
        """Whether it may go away by itself; if not, the domain is in quarantine until a person changes something."""
        return self not in _QUARANTINE


_QUARANTINE = {
    RefusalReason.TRANSIENT,
    RefusalReason.MIXED_KINDS,
    RefusalReason.UNSUPPORTED,
    RefusalReason.DISK,
    RefusalReason.CHAIN_BUDGET,
    RefusalReason.PAUSE,
    RefusalReason.RESTORING,
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is in the way, and what to do about it."""

    reason: RefusalReason
    detail: str
