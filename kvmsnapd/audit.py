"""The audit: read everything and say what is wrong. For `kvmsnapd doctor`, and for the daemon when it connects."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsnapd.diagnosis import Finding, Level, diagnose_domain, diagnose_files
from kvmsnapd.disks import data_folders
from kvmsnapd.errors import DomainNotFoundError, HypervisorError, HypervisorUnreachableError
from kvmsnapd.fleet import explain_unprotected
from kvmsnapd.plan import plan_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime

    from kvmsnapd.fleet import Fleet
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Capabilities, Domain


@dataclass(frozen=True, slots=True)
class Audit:
    """What one look at everything came to; problems first."""

    capabilities: Capabilities
    domains: tuple[Domain, ...]
    findings: tuple[Finding, ...]


def audit(hypervisor: Hypervisor, fleet: Fleet, *, intents: Iterable[str], now: datetime) -> Audit:
    """Read every domain, its snapshots and the folders of its disks, and judge them; changes nothing.

    Raises:
        HypervisorUnreachableError: libvirt went away meanwhile.
    """
    capabilities = hypervisor.capabilities()
    domains: list[Domain] = []
    findings: list[Finding] = []
    for inventory in fleet.domains:
        try:
            domains.append(hypervisor.domain(inventory.uuid))
        except DomainNotFoundError:
            continue
        except HypervisorUnreachableError:
            raise
        except HypervisorError as error:
            findings.append(Finding(Level.PROBLEM, inventory.name, f"cannot be read: {error}"))
    names = {domain.uuid: domain.name for domain in domains}
    for uuid in intents:
        text = "may have been left frozen by a call that broke; it is thawed as soon as its guest agent answers"
        findings.append(Finding(Level.PROBLEM, names.get(uuid, uuid), text))
    findings += _coverage(fleet)
    for domain in domains:
        findings += _domain(hypervisor, fleet, domain, capabilities, now)
    findings += _files(hypervisor, domains)
    order = list(Level)
    findings.sort(key=lambda finding: order.index(finding.level))
    return Audit(capabilities, tuple(domains), tuple(findings))


def _domain(
    hypervisor: Hypervisor, fleet: Fleet, domain: Domain, capabilities: Capabilities, now: datetime
) -> Iterator[Finding]:
    pairs = [pair for pair in fleet.pairs if pair.name.domain_uuid == domain.uuid]
    plans = [
        plan_run(
            domain,
            pair.policy,
            capabilities,
            now=max(now, pair.due.run_at),  # of a pair with nothing due now, the run of its next slot
            storage=hypervisor.storage(domain, data_folders(domain, pair.policy)),
            policies=pair.policies,
        )
        for pair in pairs
    ]
    return diagnose_domain(domain, [pair.policy for pair in pairs], plans, capabilities)


def _files(hypervisor: Hypervisor, domains: Sequence[Domain]) -> list[Finding]:
    """Compare records and files. What is only so for a moment, since a run goes on beside us, is not so twice."""

    def look(domains: Sequence[Domain]) -> list[Finding]:
        paths = [disk.path for domain in domains for disk in domain.disks if disk.path]
        paths += [path for domain in domains for s in domain.snapshots for _, path in s.overlays]
        listed = {folder: hypervisor.files(folder) for folder in sorted({path.rpartition("/")[0] for path in paths})}
        return list(diagnose_files(domains, {folder: files for folder, files in listed.items() if files}))

    found = look(domains)
    if found:
        again = []
        for domain in domains:
            with contextlib.suppress(DomainNotFoundError):
                again.append(hypervisor.domain(domain.uuid))
        confirmed = look(again)
        found = [finding for finding in found if finding in confirmed]
    return found


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
