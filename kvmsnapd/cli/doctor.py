"""``kvmsnapd doctor``: look at everything and say what is wrong; repairs nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import TYPE_CHECKING, Any

from kvmsnapd.audit import audit
from kvmsnapd.cli.render import print_table
from kvmsnapd.config import load_config
from kvmsnapd.daemon import read_clock
from kvmsnapd.diagnosis import Finding, Level, explain_capabilities
from kvmsnapd.errors import HypervisorError
from kvmsnapd.fleet import survey
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.preflight import chain_depth
from kvmsnapd.state_files import DomainLocks, FreezeIntents

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from kvmsnapd.config import Config
    from kvmsnapd.fleet import Fleet
    from kvmsnapd.model import Domain

_BUDGET = re.compile(r"the policies may keep .+? snapshots")


def doctor(arguments: argparse.Namespace) -> int:
    """Print what this libvirt can do, every domain, and all findings with the commands that would end them."""
    config = load_config(arguments.config)
    uri = arguments.connect or config.settings.connect
    host = LibvirtHost(uri)
    now = read_clock()
    try:
        fleet = survey(config.expected_policies, config.selectors, host.inventory(), now=now)
        rights = list(_rights(host, config))
        seen = audit(
            host,
            fleet,
            intents=lambda: _intents(config),
            now=now,
            locks=_locks(config),
            policies=config.all_policies,
        )
    finally:
        host.close()
    told = {words for finding in seen.findings for words in _BUDGET.findall(finding.text)}
    warnings = [text for text in config.warnings if not told.intersection(_BUDGET.findall(text))]
    findings = (*rights, *(Finding(Level.WARNING, "configuration", text) for text in warnings), *seen.findings)
    limits = explain_capabilities(seen.capabilities)
    if arguments.json:
        answer = {
            "libvirt": {"uri": uri, "driver": seen.capabilities.driver, "version": seen.capabilities.version},
            "limits": limits,
            "domains": [_row(domain, fleet) for domain in seen.domains],
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        print(json.dumps(answer, indent=2))
    else:
        print(f"libvirt {seen.capabilities.version} ({seen.capabilities.driver}) at {uri}")
        for limit in limits:
            print(f"  {limit}")
        print()
        print_table([_row(domain, fleet) for domain in seen.domains])
        print()
        for finding in findings:
            print(f"{finding.level}: {finding.subject}: {finding.text}")
            if finding.command:
                print(f"    {finding.command}")
        serious = sum(finding.level is not Level.NOTE for finding in findings)
        print(f"{serious} finding(s) to look at. Nothing was changed." if serious else "All is well.")
    return 1 if any(finding.level is not Level.NOTE for finding in findings) else 0


def _row(domain: Domain, fleet: Fleet) -> dict[str, Any]:
    policies = [pair.policy for pair in fleet.pairs if pair.name.domain_uuid == domain.uuid]
    kinds = sorted({s.kind for s in domain.snapshots} or {policy.kind for policy in policies})
    disks = (f"{d.target}:{d.format if d.holds_state else d.device}" for d in domain.disks)
    return {
        "domain": domain.name,
        "state": domain.state_detail,
        "kind": ", ".join(kinds) or "-",
        "disks": " ".join(disks),
        "agent": "connected" if domain.agent_connected else "-",
        "chain": str(chain_depth(domain)),
        "snapshots": str(len(domain.snapshots)),
        "policies": ", ".join(policy.name for policy in policies) or "-",
    }


def _rights(host: LibvirtHost, config: Config) -> list[Finding]:
    findings = []
    try:
        host.check_rights()
    except HypervisorError as error:
        text = f"may read but not change domains: {error}; run the daemon as root or as a member of group libvirt"
        findings.append(Finding(Level.PROBLEM, "rights", text))
    for directory in (config.state_directory, config.runtime_directory):
        problem = _cannot_write(directory)
        if problem:
            findings.append(Finding(Level.PROBLEM, "rights", f"{directory} {problem}"))
    return findings


def _cannot_write(directory: Path) -> str | None:
    """Say why files cannot be made in a directory, or in the nearest one above that exists; None if they can."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return None if os.access(existing, os.W_OK | os.X_OK) else f"cannot be written to by this user ({os.geteuid()})"


def _locks(config: Config) -> DomainLocks | None:
    """Return the locks of the daemon on this host; None if none was ever made, or they are not for this user."""
    folder = config.runtime_directory / "locks"
    return DomainLocks(folder) if os.access(folder, os.W_OK | os.X_OK) else None


def _intents(config: Config) -> list[str]:
    folder = config.state_directory / "frozen"
    return FreezeIntents(folder).outstanding() if folder.exists() else []
