"""The audit: read everything and say what is wrong. For `kvmsnapd doctor`, and for the daemon when it connects.

What is only so for a moment, because a run or a person is at work, must not be called wrong: whatever is found is
looked at once more while the locks of the domains concerned are held, or after a while where there are no locks.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from kvmsnapd.daemon_events import AuditFinding
from kvmsnapd.diagnosis import Finding, Level, diagnose_domain, diagnose_files, paths_of
from kvmsnapd.disks import data_folders
from kvmsnapd.errors import DomainLockedError, DomainNotFoundError, HypervisorError, HypervisorUnreachableError
from kvmsnapd.fleet import examine, explain_unprotected, plan_next
from kvmsnapd.model import Kind, Storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from datetime import datetime

    from kvmsnapd.events import Publish
    from kvmsnapd.fleet import Fleet
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Capabilities, Domain, Inventory, Layer
    from kvmsnapd.policy import Policy
    from kvmsnapd.state_files import DomainLocks

LOCK_WAIT = timedelta(seconds=5)
_PAUSE_SECONDS = 2.0
"""Between two looks without locks."""

_NUMBER = re.compile(r"(?<!\S)\d[\d.]*(?!\S)")


@dataclass(frozen=True, slots=True)
class Audit:
    """What one look at everything came to; problems first."""

    capabilities: Capabilities
    domains: tuple[Domain, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One domain at one look; ``domain`` is None for one that is gone or cannot be read."""

    inventory: Inventory
    domain: Domain | None = None
    findings: tuple[Finding, ...] = ()
    whole: bool = True
    """Whether all could be read that says which files are its."""

    @property
    def suspicious(self) -> bool:
        return any(finding.level is not Level.NOTE for finding in self.findings)


def audit(
    hypervisor: Hypervisor,
    fleet: Fleet,
    *,
    intents: Iterable[str] | Callable[[], Iterable[str]],
    now: datetime,
    locks: DomainLocks | None = None,
    policies: Iterable[Policy] = (),
    examined: Publish = lambda _event: None,
    pause: Callable[[float], None] = time.sleep,
) -> Audit:
    """Read every domain, its snapshots and the folders of its disks, and judge them; changes nothing.

    Args:
        intents: the UUIDs of the domains that may be frozen, or what returns them.
        locks: those that runs hold; None if they cannot be used.
        policies: all that are configured; files are looked for in the folders they name as well.
        examined: gets a DomainExamined for each pair.
        pause: waits for that many seconds.

    Raises:
        HypervisorUnreachableError: libvirt went away meanwhile.
    """
    frozen = intents if callable(intents) else lambda: intents
    looks = _Looks(hypervisor, fleet, frozen, now, locks, tuple(policies), examined, pause)
    return looks.judge()


def publish_audit(
    publish: Publish,
    hypervisor: Hypervisor,
    fleet: Fleet,
    *,
    intents: Callable[[], Iterable[str]],
    now: datetime,
    locks: DomainLocks,
    policies: Iterable[Policy],
) -> None:
    """Audit, and publish what is wrong and what each domain stands on. For a thread of its own: nothing is raised."""
    try:
        seen = audit(hypervisor, fleet, intents=intents, now=now, locks=locks, policies=policies, examined=publish)
    except HypervisorError as error:
        logging.getLogger(__name__).warning("the audit was cut off: %s", error)
        return
    except Exception:  # a thread would write it on stderr as it is
        logging.getLogger(__name__).exception("the audit ended in an unforeseen error")
        return
    for finding in seen.findings:
        if finding.level is not Level.NOTE:
            publish(
                AuditFinding(grade=finding.level, subject=finding.subject, text=finding.text, command=finding.command)
            )


@dataclass(slots=True)
class _Looks:
    """All that is asked of libvirt in one audit."""

    hypervisor: Hypervisor
    fleet: Fleet
    intents: Callable[[], Iterable[str]]
    now: datetime
    locks: DomainLocks | None
    policies: tuple[Policy, ...]
    examined: Publish
    pause: Callable[[float], None]
    paused: bool = False

    def judge(self) -> Audit:
        capabilities = self.hypervisor.capabilities()
        seen = [self._domain(inventory) for inventory in self.fleet.domains]
        of_files = self._files(seen)
        seen = [self._confirm(one) if one.suspicious else one for one in seen]
        known = {inventory.uuid for inventory in self.fleet.domains}
        findings = [_frozen(uuid) for uuid in self.intents() if uuid not in known]
        findings += _coverage(self.fleet)
        findings += (finding for one in seen for finding in one.findings)
        findings += self._confirm_files(of_files)
        order = list(Level)
        unique = sorted(dict.fromkeys(findings), key=lambda finding: order.index(finding.level))
        return Audit(capabilities, tuple(one.domain for one in seen if one.domain), tuple(unique))

    # Domains

    def _domain(self, inventory: Inventory) -> _Seen:
        try:
            domain = self.hypervisor.domain(inventory.uuid)
            frozen = [_frozen(domain.name)] if domain.uuid in self.intents() else []
            return _Seen(inventory, domain, (*frozen, *self._diagnose(domain)), _read_whole(domain))
        except DomainNotFoundError:
            return _Seen(inventory)
        except HypervisorUnreachableError:
            raise
        except HypervisorError as error:
            finding = Finding(Level.PROBLEM, inventory.name, f"cannot be read: {error}")
            return _Seen(inventory, None, (finding,), whole=False)

    def _diagnose(self, domain: Domain) -> Iterator[Finding]:
        capabilities = self.hypervisor.capabilities()
        pairs = [pair for pair in self.fleet.pairs if pair.name.domain_uuid == domain.uuid]
        plans = []
        for pair in pairs:
            storage = self._storage(domain, pair.policy)
            self.examined(examine(pair, domain, storage, capabilities))
            plans.append(plan_next(pair, domain, capabilities, storage, now=self.now))
        return diagnose_domain(domain, [pair.policy for pair in pairs], plans, capabilities)

    def _storage(self, domain: Domain, policy: Policy) -> Storage:
        """Return what is known of the storage: nothing, if libvirt lets us read only."""
        try:
            return self.hypervisor.storage(domain, data_folders(domain, policy))
        except HypervisorError:
            self.hypervisor.capabilities()  # raises if it is not only that
            return Storage()

    def _confirm(self, first: _Seen) -> _Seen:
        with ExitStack() as held:
            if self._hold(held, [first.inventory]):
                return _Seen(first.inventory, first.domain, (_at_work(first.inventory),), first.whole)
            second = self._domain(first.inventory)
        findings = _in_both(first.findings, second.findings)
        return _Seen(second.inventory, second.domain, tuple(findings), second.whole)

    # Files

    def _files(self, seen: Sequence[_Seen]) -> list[Finding]:
        if not self.hypervisor.capabilities().storage_api:
            return []
        unread = [one.inventory.name for one in seen if not one.whole]
        if unread:
            text = f"files were not compared: {', '.join(unread)} cannot be read"
            return [Finding(Level.NOTE, "files", text)]
        domains = [one.domain for one in seen if one.domain]
        listed = self._list(domains)
        found = [self._closed(folder) for folder, layers in listed.items() if layers is None]
        is_made = self.locks.is_made if self.locks else lambda _path: False
        found += diagnose_files(domains, {f: layers for f, layers in listed.items() if layers is not None}, is_made)
        return found

    def _list(self, domains: Sequence[Domain]) -> dict[str, tuple[Layer, ...] | None]:
        """Return what is in the folders of all files that the domains stand on, and of those that policies name."""
        listed: dict[str, tuple[Layer, ...] | None] = {}
        known: dict[str, Layer] = {}

        def list_folder(folder: str) -> None:
            if folder in listed or not folder or f"{folder}/".startswith("/dev/"):
                return
            try:
                listed[folder] = self.hypervisor.files(folder)
            except HypervisorUnreachableError:
                raise
            except HypervisorError:
                listed[folder] = None
            known.update((layer.path, layer) for layer in listed[folder] or ())

        pending = [path for domain in domains for path in paths_of(domain)]
        followed: set[str] = set()
        while pending:
            path = pending.pop(0)
            if path.startswith("/") and path not in followed:
                followed.add(path)
                list_folder(path.rpartition("/")[0])
                pending += [known[path].backing or ""] if path in known else []
        for policy in self.policies:
            list_folder((policy.overlay_directory or "").rstrip("/"))
        return listed

    def _closed(self, folder: str) -> Finding:
        pool = self.hypervisor.sleeping_pool(folder)
        if pool:
            text = f"cannot be looked into: its storage pool {pool} is not active"
            return Finding(Level.WARNING, folder, text, f"virsh pool-start {pool}")
        return Finding(Level.NOTE, folder, "cannot be listed by libvirt now; nothing is said of its files")

    def _confirm_files(self, first: list[Finding]) -> list[Finding]:
        if not first or first[0].subject == "files":
            return first
        inventories = self.hypervisor.inventory()  # one defined since the first look has files as well
        with ExitStack() as held:
            busy = self._hold(held, inventories)
            if busy:
                return [_at_work(busy)]
            second = self._files([self._domain(inventory) for inventory in inventories])
        return second if second and second[0].subject == "files" else _in_both(first, second)

    # Locks

    def _hold(self, held: ExitStack, inventories: Iterable[Inventory]) -> Inventory | None:
        """Take the locks of these domains, or wait a while where there are none; return one that cannot be had."""
        deadline = time.monotonic() + LOCK_WAIT.total_seconds()
        for inventory in sorted(inventories, key=lambda inventory: inventory.uuid):
            if self.locks is None:
                break
            try:
                left = timedelta(seconds=max(0.0, deadline - time.monotonic()))
                held.enter_context(self.locks.hold(inventory.uuid, wait=left, doing="a look at everything"))
            except DomainLockedError:
                return inventory
            except OSError:
                self.locks = None
        if self.locks is None and not self.paused:
            self.pause(_PAUSE_SECONDS)
            self.paused = True
        return None


def _in_both(first: Iterable[Finding], second: Iterable[Finding]) -> list[Finding]:
    """Return the second look's findings that were there before, if only with other figures."""

    def words(finding: Finding) -> tuple[object, ...]:
        return finding.level, finding.subject, _NUMBER.sub("", finding.text), finding.command

    before = {words(finding) for finding in first}
    return [finding for finding in second if words(finding) in before]


def _read_whole(domain: Domain) -> bool:
    """Tell whether all snapshots could be understood; one that could not is mixed, and says nothing of files."""
    return not any(s.kind is Kind.MIXED and not s.overlays and not s.covers for s in domain.snapshots)


def _at_work(inventory: Inventory) -> Finding:
    return Finding(Level.NOTE, inventory.name, "is being worked on; look again")


def _frozen(subject: str) -> Finding:
    text = "may have been left frozen by a call that broke; it is thawed as soon as its guest agent answers"
    return Finding(Level.PROBLEM, subject, text)


def _coverage(fleet: Fleet) -> Iterator[Finding]:
    for assignment in fleet.unprotected():
        yield Finding(Level.PROBLEM, assignment.domain_name, f"is {explain_unprotected(assignment)}")
    for name in fleet.missing_domains:
        yield Finding(Level.PROBLEM, name, "is configured, and libvirt has no such domain")
    for domain, snapshots in fleet.unmanaged():
        policies = ", ".join(sorted({s.mark.policy for s in snapshots if s.mark}))
        text = f"has {len(snapshots)} snapshot(s) of {policies}, which no longer applies to it; nothing prunes them"
        yield Finding(Level.WARNING, domain.name, text)
    if fleet.clock_suspect():
        text = "there are snapshots dated in the future: the clock is wrong, or was; they are kept and not counted"
        yield Finding(Level.PROBLEM, "clock", text, "timedatectl status")
