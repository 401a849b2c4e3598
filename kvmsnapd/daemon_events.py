"""Events of the daemon as a whole; those of single runs are in :mod:`kvmsnapd.events`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvmsnapd.events import Event, Severity

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStarted(Event):
    """The daemon begins to work; ``metrics`` is where Prometheus finds it, empty when that is switched off."""

    NAME: ClassVar[str] = "daemon.started"
    uri: str
    metrics: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStopped(Event):
    """The daemon ends; ``unfinished`` are the runs that did not end in time. libvirt finishes their calls."""

    NAME: ClassVar[str] = "daemon.stopped"
    unfinished: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStalled(Event):
    """A part of the daemon stands still, and only a new start can help; systemd's watchdog sees to that."""

    NAME: ClassVar[str] = "daemon.stalled"
    SEVERITY: ClassVar[Severity] = Severity.ERROR
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigLoaded(Event):
    """A configuration is in force; settings in ``needs_restart`` only after the next start.

    What the policies' names stand for, and for how many domains, is compared with the configuration before.
    """

    NAME: ClassVar[str] = "config.loaded"
    files: tuple[str, ...]
    policies: int
    selectors: int
    warnings: tuple[str, ...]
    needs_restart: tuple[str, ...] = ()
    policies_added: tuple[str, ...] = ()
    policies_removed: tuple[str, ...] = ()
    policies_changed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    domains_changed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPoliciesChanged(Event):
    """A reload changed what applies to one domain; ``coverage`` says by which entry, or why nothing does.

    ``unprotected`` tells that it had policies and has none now, without anybody having said so. ``changed`` names the
    settings that differ, by policy. ``releases`` is how many more snapshots the new keep rules
    release, by policy; those of ``fuse`` wait, since they are more than may go at once. ``leaves`` is how many
    snapshots of policies that it no longer has stay where they are.
    """

    NAME: ClassVar[str] = "config.domain_changed"
    domain: str
    domain_uuid: str
    coverage: str
    unprotected: bool
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    releases: Mapping[str, int]
    fuse: tuple[str, ...]
    leaves: int

    @property
    def severity(self) -> Severity:
        """What needs a person's eye is a warning."""
        return Severity.WARNING if self.fuse or self.leaves or self.unprotected else Severity.INFO


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRejected(Event):
    """A configuration was refused; the one before stays in force."""

    NAME: ClassVar[str] = "config.rejected"
    SEVERITY: ClassVar[Severity] = Severity.ERROR
    path: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtConnected(Event):
    """libvirt answers (again)."""

    NAME: ClassVar[str] = "libvirt.connected"
    uri: str
    driver: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LibvirtLost(Event):
    """libvirt does not answer; it is tried again with growing pauses."""

    NAME: ClassVar[str] = "libvirt.lost"
    SEVERITY: ClassVar[Severity] = Severity.ERROR
    uri: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFinding(Event):
    """Something the daemon found wrong when it connected to libvirt, and the command that ends it."""

    NAME: ClassVar[str] = "audit.finding"
    SEVERITY: ClassVar[Severity] = Severity.WARNING
    grade: str
    subject: str
    text: str
    command: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsChanged(Event):
    """The set of scheduled (domain, policy) pairs changed."""

    NAME: ClassVar[str] = "jobs.changed"
    added: int
    changed: int
    removed: int
