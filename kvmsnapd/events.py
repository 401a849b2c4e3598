"""What happened, as frozen values. Logs, metrics and the demo's table are fed from the same event, so they agree.

``NAME`` is the event's constant name in the log; the fields are its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from kvmsnapd.model import PairName


class Severity(StrEnum):
    """How an event is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events."""

    NAME: ClassVar[str]
    SEVERITY: ClassVar[Severity] = Severity.INFO

    @property
    def severity(self) -> Severity:
        """How this very event is logged."""
        return self.SEVERITY


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent(Event):
    """An event of the run of one policy on one domain."""

    pair: PairName


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(RunEvent):
    """A run begins; it may have to wait for others."""

    NAME: ClassVar[str] = "run.started"
    SEVERITY: ClassVar[Severity] = Severity.DEBUG
    started_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken(RunEvent):
    """A snapshot exists that did not before; ``duration_seconds`` is libvirt's call alone, unless its answer was lost.

    ``frozen`` are the mount points that the guest agent froze, for no longer than the call took: libvirt does not tell
    how much of it. ``paused_seconds`` is how long a guest stood still whose RAM was saved. ``excluded`` are the disks
    that the policy leaves out.
    """

    NAME: ClassVar[str] = "snapshot.taken"
    snapshot: str
    scheduled_at: datetime
    kind: str
    consistency: str
    duration_seconds: float | None
    frozen: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    paused_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotUnchanged(RunEvent):
    """No snapshot was needed: the domain is shut off and its disks are still those of ``snapshot``."""

    NAME: ClassVar[str] = "snapshot.unchanged"
    snapshot: str
    scheduled_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDowngraded(RunEvent):
    """The guest agent failed although it was connected; the policy allows a crash-consistent snapshot instead."""

    NAME: ClassVar[str] = "snapshot.downgraded"
    SEVERITY: ClassVar[Severity] = Severity.WARNING
    snapshot: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestFrozen(RunEvent):
    """A guest was found frozen, and not by us: it was left so; its own writes wait until somebody thaws it."""

    NAME: ClassVar[str] = "guest.frozen"
    SEVERITY: ClassVar[Severity] = Severity.WARNING
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestUnfrozen(Event):
    """A guest that a run had found frozen answers as one that is not, or is gone: whoever froze it has thawed it."""

    NAME: ClassVar[str] = "guest.unfrozen"
    domain: str
    domain_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainExamined(RunEvent):
    """What was found below the domain: overlays by disk, free bytes by folder, where libvirt can say.

    ``folders`` are all that its policy needs space in. ``chain_limit`` is the depth at which no further overlay fits;
    None for a domain whose policies need none.
    """

    NAME: ClassVar[str] = "domain.examined"
    SEVERITY: ClassVar[Severity] = Severity.DEBUG
    chain_depth: Mapping[str, int]
    free_bytes: Mapping[str, int]
    chain_limit: int | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFinished(RunEvent):
    """A program of the policy's hooks has ended, or was not let go on; ``output`` is cut."""

    NAME: ClassVar[str] = "hook.finished"
    hook: str
    ok: bool
    detail: str
    output: str
    duration_seconds: float

    @property
    def severity(self) -> Severity:
        """A failure is worth a look."""
        return Severity.INFO if self.ok else Severity.WARNING


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillFinished(RunEvent):
    """A copy of a snapshot was booted, and came up or did not; ``reason`` is a bounded word, ``detail`` a sentence."""

    NAME: ClassVar[str] = "drill.finished"
    snapshot: str
    ok: bool
    reason: str
    detail: str
    duration_seconds: float

    @property
    def severity(self) -> Severity:
        """A snapshot that does not boot is no way back."""
        return Severity.INFO if self.ok else Severity.ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillSkipped(RunEvent):
    """A drill that was due could not be made, which says nothing of the snapshot; it is tried again in an hour."""

    NAME: ClassVar[str] = "drill.skipped"
    SEVERITY: ClassVar[Severity] = Severity.WARNING
    snapshot: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFailed(RunEvent):
    """A snapshot that was due was not taken; ``reason`` is a bounded word, ``error`` the whole sentence."""

    NAME: ClassVar[str] = "snapshot.failed"
    SEVERITY: ClassVar[Severity] = Severity.ERROR
    snapshot: str
    scheduled_at: datetime
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotDeleted(RunEvent):
    """A snapshot of ours was deleted, for the reasons retention gave."""

    NAME: ClassVar[str] = "snapshot.deleted"
    snapshot: str
    reasons: tuple[str, ...]
    duration_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteFailed(RunEvent):
    """libvirt did not delete a released snapshot; it is tried again after the next take."""

    NAME: ClassVar[str] = "snapshot.delete_failed"
    SEVERITY: ClassVar[Severity] = Severity.ERROR
    snapshot: str
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneBlocked(RunEvent):
    """Released snapshots have to wait; ``blocked`` maps each reason to how many wait for it.

    ``again``: it is as it was in the run before.
    """

    NAME: ClassVar[str] = "prune.blocked"
    blocked: dict[str, int]
    detail: str
    again: bool = False

    @property
    def severity(self) -> Severity:
        """What lasts is told once."""
        return Severity.DEBUG if self.again else Severity.WARNING


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSkipped(RunEvent):
    """Nothing was tried: the domain was refused or locked, or its slot was given up.

    ``refused``: the domain was looked at, and must not be touched; ``quarantined``: for a reason that only a person can
    change; ``again``: and the run before had the same.
    """

    NAME: ClassVar[str] = "run.skipped"
    reason: str
    detail: str
    refused: bool = False
    quarantined: bool = False
    again: bool = False

    @property
    def severity(self) -> Severity:
        """A quarantine is told once."""
        return Severity.DEBUG if self.again else Severity.WARNING


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStuck(RunEvent):
    """A run takes so long that its place was given to others; its domain is left alone until it ends."""

    NAME: ClassVar[str] = "run.stuck"
    SEVERITY: ClassVar[Severity] = Severity.ERROR
    after_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(RunEvent):
    """The one line that sums a run up, with everything known of it; :mod:`.summary` makes it of the run's other events.

    ``result`` is taken, unchanged, nothing_due, skipped or failed; ``reason`` and ``detail`` say why of the last two.
    ``downgraded`` is why the guest was not frozen although its policy asks for it. ``deleted_snapshots`` are in the
    order they went; ``waiting`` counts released ones by what they wait for. ``hooks`` are the words of those that ran,
    with whether they did well.
    """

    NAME: ClassVar[str] = "run.finished"
    result: str
    started_at: datetime
    ended_at: datetime
    duration_seconds: float
    scheduled_at: datetime | None = None
    snapshot: str | None = None
    kind: str | None = None
    consistency: str | None = None
    frozen: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    paused_seconds: float | None = None
    take_seconds: float | None = None
    downgraded: str | None = None
    reason: str | None = None
    detail: str | None = None
    quarantined: bool = False
    deleted: int = 0
    deleted_snapshots: tuple[str, ...] = ()
    delete_seconds: float = 0.0
    delete_error: str | None = None
    blocked: int = 0
    waiting: Mapping[str, int] = field(default_factory=dict)
    hooks: Mapping[str, bool] = field(default_factory=dict)
    chain_depth: Mapping[str, int] = field(default_factory=dict)
    free_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def severity(self) -> Severity:
        """A run that found nothing to do is of no interest in a log."""
        return Severity.DEBUG if self.result == "nothing_due" else Severity.INFO


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainThawed(Event):
    """A guest that a broken call may have left frozen was thawed, or is gone, so that its name is not known, or off."""

    NAME: ClassVar[str] = "domain.thawed"
    SEVERITY: ClassVar[Severity] = Severity.WARNING
    domain: str | None
    domain_uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ThawFailed(Event):
    """A guest that a broken call may have left frozen could not be thawed; it is tried again at every tick."""

    NAME: ClassVar[str] = "domain.thaw_failed"
    SEVERITY: ClassVar[Severity] = Severity.ERROR
    domain: str | None
    domain_uuid: str
    error: str


Publish = Callable[[Event], None]
"""Where events go; must not raise and must not block."""
