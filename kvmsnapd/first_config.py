"""A first configuration for the domains of a host: the text that `kvmsnapd init` proposes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvmsnapd.matching import fits, is_pattern, is_uuid
from kvmsnapd.model import Consistency, DomainState
from kvmsnapd.preflight import plan_take
from kvmsnapd.refusal import Refusal, RefusalReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Domain, TakeRequest
    from kvmsnapd.policy import Policy

POLICIES = {
    "standard": """\
  # Overlays on top of each disk: a running guest is not stopped for them. Each makes the backing chain one file longer
  # until it is merged again, so this policy keeps 13 at the most.
  standard:
    schedule: hourly
    keep: {last: 2, hourly: 6, daily: 5, weekly: 3}
    # The file systems are frozen where the guest agent answers; else it is as after a power cut, and said so.
    consistency: filesystem-preferred
    # Once a week a copy of the newest one is booted, without a network: is there a way back? It takes the guest's RAM.
    #verify: {schedule: weekly}
""",
    "inside": """\
  # Inside the qcow2 files, for domains that have such snapshots already, since the two kinds do not mix, or can have no
  # others. A running guest stands still while its RAM is written, so this is for the night.
  inside:
    schedule: "30 3 * * *"
    keep: {last: 2, daily: 7, weekly: 3}
    kind: internal
""",
}
"""What can be proposed, in the order in which it is tried."""

_FROZEN = "The guest agent answers: the file systems are frozen for each snapshot."
_CRASH = (
    "No guest agent answers, so their snapshots are as after a power cut. Better: install qemu-guest-agent in the "
    "guest, and give the domain its channel (virt-manager: Add Hardware, Channel)."
)
_OFF = "Shut off now. One snapshot is enough until they have run again."
_WITH_RAM = "Their RAM is part of the snapshot."
_NOTES = {
    Consistency.FILESYSTEM: _FROZEN,
    Consistency.CRASH: _CRASH,
    Consistency.OFFLINE: _OFF,
    Consistency.MEMORY: _WITH_RAM,
}
_NOTHING = (
    "Nothing can be taken of these. [] says that this is on purpose, so nothing alerts; `kvmsnapd doctor` knows more."
)
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""YAML, in one version or another, takes these for something else than text."""
_NUMBERED = re.compile(r"(.*[^0-9])[0-9]+", re.DOTALL)
_WIDTH, _MOST_NAMES = 116, 4


@dataclass(frozen=True, slots=True)
class Choice:
    """What one domain should get: the name of a policy, or None, and why, in a sentence."""

    domain: Domain
    policy: str | None
    note: str


def choose(domain: Domain, policies: Mapping[str, Policy], capabilities: Capabilities, *, now: datetime) -> Choice:
    """Return the first of these policies by which this domain can be protected, as the daemon itself would decide.

    What passes must not hide what stays: a crashed domain with internal snapshots still needs a policy of their kind.
    """

    def ask(subject: Domain, policy: Policy) -> TakeRequest | Refusal:
        return plan_take(subject, policy, capabilities, slot=now, now=now, policies=(policy,))

    settled, lasting = _settled(domain), ""
    for name, policy in policies.items():
        later, today = ask(settled, policy), ask(domain, policy)
        if isinstance(later, Refusal) and not later.reason.heals and later.reason is not RefusalReason.RESTORING:
            lasting = lasting or later.detail
        elif isinstance(today, Refusal):
            return Choice(domain, name, f"Not now: {today.detail}.")
        else:
            return Choice(domain, name, _NOTES[today.mark.consistency])
    return Choice(domain, None, f"{lasting}.")


def _settled(domain: Domain) -> Domain:
    """Return the domain without what may go away by itself."""
    return replace(
        domain,
        state=DomainState.RUNNING if domain.state is DomainState.UNSETTLED else domain.state,
        managed_save=False,
        disks=tuple(replace(disk, block_job=False) for disk in domain.disks),
    )


def render(choices: Sequence[Choice], *, timezone: str | None, connect: str | None) -> str:
    """Return the whole file.

    Args:
        choices: of all domains of the host.
        timezone: of the schedules; None if the host's has no name, which makes it UTC, with a comment.
        connect: the libvirt to work on, None for the usual one.
    """
    used = [name for name in POLICIES if any(choice.policy == name for choice in choices)] or ["standard"]
    return "\n".join(
        [
            "# Proposed by `kvmsnapd init` for the domains that were here. Read it, change it, and see what it does:",
            "#   kvmsnapd check-config && kvmsnapd plan",
            "# All settings: /etc/kvmsnapd/kvmsnapd.schema.json, and config/README.md of the project.",
            "",
            *([f"connect: {_quoted(connect)}"] if connect else []),
            *([] if timezone else ["# This host's time zone has no name that is known here; change this if need be."]),
            f"timezone: {_quoted(timezone or 'UTC')}",
            "",
            "policies:",
            *(POLICIES[name].rstrip("\n") for name in used),
            "",
            *_domains(choices),
            "",
        ]
    )


def _domains(choices: Sequence[Choice]) -> Iterator[str]:
    if not choices:
        yield "# libvirt has no domain yet. For example, as soon as there are some (* and ? as in a shell):"
        yield "domains: {}"
        yield "#  db01: [standard]"
        yield '#  "web-*": [standard]'
        yield '#  "scratch-*": []'
        return
    yield "# A domain that stands nowhere here is unprotected, and Prometheus is told; [] is unprotected on purpose."
    yield "domains:"
    groups: defaultdict[tuple[str, str], list[Domain]] = defaultdict(list)
    lost = []
    for choice in choices:
        if choice.policy is None:
            lost.append(choice)
        else:
            groups[choice.policy, choice.note].append(choice.domain)
    everybody = [choice.domain for choice in choices]
    for (policy, note), members in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield from _comment(note)
        for key, remark in _entries(members, everybody):
            yield f"  {key}: [{policy}]{remark}"
    if lost:
        yield from _comment(_NOTHING)
    for choice in sorted(lost, key=lambda choice: choice.domain.name):
        yield from _comment(choice.note)
        ((key, remark),) = _entries([choice.domain], everybody)
        yield f"  {key}: []{remark}"


def _entries(members: Sequence[Domain], everybody: Sequence[Domain]) -> Iterator[tuple[str, str]]:
    """Yield keys for these domains, each with a remark, in the order of names."""
    families: defaultdict[str, list[Domain]] = defaultdict(list)
    for domain in sorted(members, key=lambda domain: domain.name):
        families[_family(domain.name)].append(domain)
    for pattern, family in families.items():
        if len(family) > 1 and is_pattern(pattern) and _fitting(pattern, everybody) == len(family):
            names = [domain.name for domain in family]
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            yield _quoted(pattern), f"  # {', '.join(names[:_MOST_NAMES])}{more}"
        else:
            yield from map(_entry, family)


def _fitting(pattern: str, domains: Sequence[Domain]) -> int:
    """Return how many domains the pattern fits."""
    return sum(fits(pattern, domain.name) for domain in domains)


def _family(name: str) -> str:
    """Return the pattern for names that differ in their number alone, or the name itself."""
    numbered = _NUMBERED.fullmatch(name)
    if numbered is None or is_pattern(name) or not name.isprintable():
        return name
    return f"{numbered[1]}*"


def _entry(domain: Domain) -> tuple[str, str]:
    name = domain.name
    if is_pattern(name) or is_uuid(name) or "/" in name or not name.isprintable():
        return _quoted(domain.uuid), f"  # {name!a}, which would be read as something else"
    return _quoted(name), ""


def _quoted(text: str) -> str:
    """Return printable text as YAML reads it back."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)


def _comment(text: str) -> Iterable[str]:
    line = "  #"
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        if len(line) + len(word) >= _WIDTH:
            yield line
            line = "  #"
        line += f" {word}"
    yield line
