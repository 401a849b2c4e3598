"""Every error kvmsnapd raises on purpose.

    KvmsnapdError
    ├── InvalidValueError            a duration, keep rule, schedule or name that cannot mean anything
    ├── ConfigError                  one or more problems in the configuration, each with its place
    ├── DomainLockedError            another process works on this domain
    ├── StorageBusyError             others work on this storage
    ├── RestoreRefusedError          a domain cannot go back to a snapshot, and why
    ├── CopyRefusedError             a snapshot cannot be copied, and why
    ├── DrillRefusedError            a snapshot cannot be tried, and why
    ├── DrillFailedError             it was tried, and its copy did not come up
    └── HypervisorError              libvirt refused; ``operation``, ``domain`` and libvirt's ``code`` say what
        ├── HypervisorUnreachableError   no connection; what a call in flight did is unknown
        ├── DomainNotFoundError
        ├── DomainBusyError              another job holds the domain; heals by itself
        ├── SnapshotNotFoundError
        ├── SnapshotExistsError
        ├── StorageFullError             no space; nothing was changed
        ├── MergeFailedError             a delete began and did not end; the snapshot may be half merged
        └── GuestAgentUnavailableError   asked to quiesce, and the guest agent did not do it
            └── GuestAgentRefusedError   it answered, with an error
                ├── FreezeRefusedError       to the freeze, so nothing is frozen
                └── GuestFrozenError         that somebody else has frozen the guest

A refusal to touch a domain is not an error but an answer: see :class:`kvmsnapd.refusal.Refusal`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

_LONGEST_TEXT, _LONGEST_SHOWN = 1000, 60
_PASSWORD = re.compile(r"(://[^/\s:@]*:)([^\s]+)@")  # of a URI; it may have slashes and more of @


def without_passwords(text: str, *, same_length: bool = False) -> str:
    """Return the text with the passwords of URIs made unreadable, if need be without moving what comes after."""
    return _PASSWORD.sub(lambda match: match[1] + "*" * (len(match[2]) if same_length else 3) + "@", text)


def shown(value: object) -> str:
    """Return what somebody wrote, for a message: in quotes if it is text, cut if it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and len(value) > _LONGEST_SHOWN:
        return f"{value[:_LONGEST_SHOWN]!r}…"
    text = repr(value)
    return text if len(text) <= 2 * _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


class KvmsnapdError(Exception):
    """Base of all errors below; its text is fit to be shown to the admin as it is."""


class InvalidValueError(KvmsnapdError, ValueError):
    """A value the user wrote cannot mean anything; the text says what is allowed instead.

    Also a ``ValueError``, so that a pydantic validator may let it pass through.
    """


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in the configuration, as a compiler would show it."""

    message: str
    """What is wrong, and what is allowed."""
    file: str
    """Its path, or ``environment NAME`` for a variable."""
    line: int = 0
    """From 1; 0 if it is about no line."""
    column: int = 0
    key: str = ""
    """The path of the key, such as ``policies.standard.keep.last``."""
    excerpt: str = ""
    """The line of the file, with a caret below."""

    def __post_init__(self) -> None:
        """Keep every text short, fit to be printed, and without passwords, whatever was in the file."""
        for name in ("message", "file", "key", "excerpt"):
            text = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            text = without_passwords(text, same_length=True)
            object.__setattr__(self, name, text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…")

    @property
    def place(self) -> str:
        """``file:line:column``, as editors jump to it."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def __str__(self) -> str:
        """Return the one text that check-config, the start, a reload and the log all show."""
        first = ": ".join(part for part in (self.place, self.key, self.message) if part)
        return f"{first}\n{self.excerpt}" if self.excerpt else first


class ConfigError(KvmsnapdError):
    """The configuration was refused as a whole; nothing of it is in force. ``problems`` is all that is wrong."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class DomainLockedError(KvmsnapdError):
    """Another process (the daemon, or a person's command) holds the lock of this domain."""


class StorageBusyError(KvmsnapdError):
    """As many takes or merges as one storage bears go on, and did not end within the time to wait."""


class RestoreRefusedError(KvmsnapdError):
    """A domain cannot go back to a snapshot as it was asked; the text says why, and in what state things are."""


class CopyRefusedError(KvmsnapdError):
    """A snapshot cannot be copied as it was asked; the text says why, and that nothing is left of it."""


class DrillRefusedError(KvmsnapdError):
    """A snapshot cannot be tried; the text says why, and what to do. It says nothing of the snapshot."""


class DrillFailedError(KvmsnapdError):
    """A snapshot was tried, and its copy did not come up.

    Args:
        reason: the bounded word: ``start`` libvirt or QEMU could not begin, ``ended`` the copy ended by itself,
            ``deadline`` it did not show in time that it is up.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class HypervisorError(KvmsnapdError):
    """libvirt refused an operation; ``reason`` is the bounded word used in metrics and logs.

    Args:
        message: libvirt's own words, prefixed with the object.
        operation: what was asked, e.g. ``snapshot_create``.
        domain: name or UUID of the domain, if one was meant.
        code: libvirt's ``virErrorNumber``, None where there was no libvirt error.
    """

    reason: ClassVar[str] = "libvirt"

    def __init__(self, message: str, *, operation: str, domain: str | None = None, code: int | None = None) -> None:
        super().__init__(message)
        self.operation = operation
        self.domain = domain
        self.code = code


class HypervisorUnreachableError(HypervisorError):
    """There is no connection to libvirt. A call that was in flight may or may not have been carried out."""

    reason = "connection"


class DomainNotFoundError(HypervisorError):
    """The domain is no longer defined."""

    reason = "domain_gone"


class DomainBusyError(HypervisorError):
    """Another job (a migration, a block job, a person's snapshot) holds the domain."""

    reason = "busy"


class SnapshotNotFoundError(HypervisorError):
    """The snapshot does not exist (any more)."""

    reason = "snapshot_gone"


class SnapshotExistsError(HypervisorError):
    """A snapshot of this name, or the overlay it would create, exists already; nothing was changed."""

    reason = "snapshot_exists"


class StorageFullError(HypervisorError):
    """There was no space for what was asked; libvirt has undone what it had begun."""

    reason = "space"


class MergeFailedError(HypervisorError):
    """A block commit met an error on the way: the snapshot is still listed, and may hold part of what came after it."""

    reason = "merge"


class GuestAgentUnavailableError(HypervisorError):
    """The guest agent was asked to freeze the file systems and did not; no snapshot was taken."""

    reason = "agent"


class GuestAgentRefusedError(GuestAgentUnavailableError):
    """The guest agent answered with an error, for example because the command is disabled in the guest."""


class FreezeRefusedError(GuestAgentRefusedError):
    """The guest agent answered the freeze itself with an error: it is not frozen."""


class GuestFrozenError(GuestAgentRefusedError):
    """The guest's file systems are frozen already, and not by us: a backup program at work, or one that died."""

    reason = "frozen"
