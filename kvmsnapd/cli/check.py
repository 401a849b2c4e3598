"""``kvmsnapd check-config`` and ``schema``: what the configuration says, and what it can say."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from kvmsnapd.cli.find import find_domain
from kvmsnapd.config import load_config
from kvmsnapd.config.schema import render_schema
from kvmsnapd.config.yaml_document import to_yaml
from kvmsnapd.daemon import read_clock
from kvmsnapd.errors import ConfigError
from kvmsnapd.fleet import explain_unprotected, survey
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.matching import Coverage, assign, fits, is_pattern, is_uuid
from kvmsnapd.model import Inventory

_WIDEST = 60

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from kvmsnapd.config import Config
    from kvmsnapd.matching import Assignment


def schema(arguments: argparse.Namespace) -> int:  # noqa: ARG001  # as all answers
    """Print the JSON Schema of the configuration, for editors."""
    sys.stdout.write(render_schema())
    return 0


def check_config(arguments: argparse.Namespace) -> int:
    """Print what the configuration says, or raise ConfigError; with ``--connect`` also what fits no domain."""
    try:
        config = load_config(arguments.config, check_web=True)
    except ConfigError as error:
        if arguments.json:
            print(json.dumps({"problems": [_problem_object(problem) for problem in error.problems]}, indent=2))
        raise
    domains = LibvirtHost(arguments.connect).inventory() if arguments.connect else None
    if arguments.resolved is not None:
        return _print_resolved(config, arguments.resolved, domains, as_json=arguments.json)
    findings = list(_findings(config, domains)) if domains is not None else []
    if arguments.json:
        answer = {
            "files": list(config.files),
            "policies": list(config.policies),
            "warnings": list(config.warnings),
            "findings": findings,
            "problems": [],
        }
        print(json.dumps(answer, indent=2))
    else:
        for warning in config.warnings:
            print(f"warning: {warning}")
        for finding in findings:
            print(f"finding: {finding}")
        policies, entries, more = len(config.policies), len(config.selectors), len(config.files) - 1
        counted = f"{policies} polic{'y' if policies == 1 else 'ies'}, {entries} entr{'y' if entries == 1 else 'ies'}"
        files = f"{config.path}{f' and {more} in conf.d' if more else ''}"
        print(f"{files}: valid; {counted} under domains")
        for policy in config.policies.values():
            print(f"  {policy.name}: {policy.schedule}, keep {policy.keep}, {policy.kind}, {policy.timezone}")
    return 1 if findings else 0


def _findings(config: Config, domains: Sequence[Inventory]) -> Iterator[str]:
    """Yield what fits no domain, and which domains nothing fits."""
    fleet = survey(config.expected_policies, config.selectors, domains, now=read_clock())
    for name in fleet.missing_domains:
        yield f"{config.place_of(name)}: domain {name!r} is configured, and libvirt has none of this name"
    for pattern in filter(is_pattern, config.selectors):
        if config.selectors[pattern] and not any(fits(pattern, domain.name) for domain in domains):
            yield f"{config.place_of(pattern)}: pattern {pattern!r} fits no domain"
    for name, count in fleet.domains_per_policy.items():
        if not count:
            yield f"policy {name!r} applies to no domain"
    for assignment in fleet.unprotected():
        places = f" ({', '.join(map(config.place_of, assignment.patterns))})" if assignment.patterns else ""
        yield f"domain {assignment.domain_name!r} is {explain_unprotected(assignment)}{places}"


def _print_resolved(config: Config, words: Sequence[str], domains: Sequence[Inventory] | None, *, as_json: bool) -> int:
    """Print what applies to each domain that is named; or to all of libvirt's; or, without libvirt, to each entry."""
    answers = [_resolve(config, *subject) for subject in _subjects(config, words, domains)]
    unclear = any(answer["coverage"] not in {Coverage.PROTECTED, Coverage.UNPROTECTED_ON_PURPOSE} for answer in answers)
    if as_json:
        print(json.dumps(answers, indent=2))
        return 1 if unclear else 0
    if words and domains is None and any(map(is_uuid, config.selectors)):
        print("Without --connect nobody knows which domains the UUIDs among the entries are.\n")
    for answer in answers:
        print(f"{answer['domain']}: {answer['coverage']}")
        for entry, place in answer["entries"].items():
            print(f"  by {place}: {entry}")
        for policy, settings in answer["policies"].items():
            print(f"  {policy}:")
            lines = {f"    {key}: {to_yaml(setting['value'])}": setting["from"] for key, setting in settings.items()}
            width = min(max(map(len, lines)), _WIDEST)
            for line, place in lines.items():
                print(f"{line:{width}}  # {place}")
        print()
    return 1 if unclear else 0


def _resolve(config: Config, domain: str, coverage: str, entries: tuple[str, ...]) -> dict[str, Any]:
    policies = config.selectors[entries[0]] if coverage == Coverage.PROTECTED else ()
    return {
        "domain": domain,
        "coverage": coverage,
        "entries": {entry: config.place_of(entry) for entry in entries},
        "policies": {
            policy.name: {s.key: {"value": s.value, "from": s.place} for s in config.explain(entries[0], policy.name)}
            for policy in policies
        },
    }


def _subjects(
    config: Config, words: Sequence[str], domains: Sequence[Inventory] | None
) -> Iterable[tuple[str, str, tuple[str, ...]]]:
    """Yield what is shown, why it has what it has, and the entries that decide."""
    if not words and domains is None:
        for entry, policies in config.selectors.items():
            yield entry, Coverage.PROTECTED if policies else Coverage.UNPROTECTED_ON_PURPOSE, (entry,)
        return
    known = list(domains or ())
    # Without libvirt nobody knows the UUID to a name, nor the name to a UUID.
    wanted = [Inventory(word.lower(), word) if domains is None else find_domain(known, word) for word in words]
    for assignment in assign(config.selectors, wanted or known):
        yield assignment.domain_name, _explain(assignment), assignment.patterns


def _explain(assignment: Assignment) -> str:
    if assignment.coverage in {Coverage.UNMATCHED, Coverage.AMBIGUOUS}:
        return explain_unprotected(assignment)
    return assignment.coverage


def _problem_object(problem: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "file": problem.file,
        "line": problem.line or None,
        "column": problem.column or None,
        "key": problem.key or None,
        "message": problem.message,
    }
