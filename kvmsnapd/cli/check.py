"""``kvmsnapd check-config``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kvmsnapd.config import load_config
from kvmsnapd.daemon import read_clock
from kvmsnapd.fleet import explain_unprotected, survey
from kvmsnapd.libvirt_host import LibvirtHost

if TYPE_CHECKING:
    import argparse


def check_config(arguments: argparse.Namespace) -> int:
    """Print what the configuration says, or raise ConfigError; with ``--connect`` also what fits no domain."""
    config = load_config(arguments.config)
    findings: list[str] = []
    if arguments.connect:
        domains = LibvirtHost(arguments.connect).inventory()
        fleet = survey(config.policies, config.selectors, domains, now=read_clock())
        findings += [
            f"domain {name!r} is configured, and libvirt has none of this name" for name in fleet.missing_domains
        ]
        findings += [f"policy {name!r} applies to no domain" for name, n in fleet.domains_per_policy.items() if not n]
        findings += [f"domain {a.domain_name!r} is {explain_unprotected(a)}" for a in fleet.unprotected()]
    if arguments.json:
        answer = {"policies": list(config.policies), "warnings": list(config.warnings), "findings": findings}
        print(json.dumps(answer, indent=2))
    else:
        for warning in config.warnings:
            print(f"warning: {warning}")
        for finding in findings:
            print(f"finding: {finding}")
        policies, entries = len(config.policies), len(config.selectors)
        counted = f"{policies} polic{'y' if policies == 1 else 'ies'}, {entries} entr{'y' if entries == 1 else 'ies'}"
        print(f"{config.path}: valid; {counted} under domains")
        for policy in config.policies.values():
            print(f"  {policy.name}: {policy.schedule}, keep {policy.keep}, {policy.kind}, {policy.timezone}")
    return 1 if findings else 0
