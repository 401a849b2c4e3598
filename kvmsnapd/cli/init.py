"""``kvmsnapd init``: propose a configuration for the domains that are here, and write it when told."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from kvmsnapd import first_config
from kvmsnapd.config import load_contents
from kvmsnapd.config.files import MOST_BYTES, list_parts, owner_of, parse_contents, read_file
from kvmsnapd.config.models import Settings
from kvmsnapd.config.reference import render_default_file
from kvmsnapd.daemon import read_clock
from kvmsnapd.errors import ConfigError, DomainNotFoundError, InvalidValueError
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.naming import DRILL_NAME
from kvmsnapd.whole_file import replace_file

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Domain

_LOCALTIME = Path("/etc/localtime")
_SAID = ("connect", "timezone", "defaults", "policies", "domains")
"""Keys that the proposal has, or that change what it means."""


def init(arguments: argparse.Namespace) -> int:
    """Print the proposal, or write it to the configuration file."""
    path: Path = arguments.config
    if arguments.write:
        _refuse(path)
    host = LibvirtHost(arguments.connect or Settings.model_fields["connect"].default)
    proposal = propose(
        _domains(host), host.capabilities(), now=read_clock(), timezone=_timezone(), connect=arguments.connect
    )
    if not arguments.write:
        sys.stdout.write(proposal.text)
        print(
            f"kvmsnapd: {proposal.counted}; nothing was written. To have this in {path}: the same with --write",
            file=sys.stderr,
        )
        return 0
    try:
        replace_file(path, proposal.text.encode(), durable=True)
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}; what was there is as it was"
        raise InvalidValueError(msg) from error
    print(
        f"{path}: written, {proposal.counted}. Now: kvmsnapd plan, then systemctl enable --now kvmsnapd, or reload it "
        "where it runs"
    )
    return 0


@dataclass(frozen=True)
class Proposal:
    """A whole file, and in a few words what it comes to."""

    text: str
    counted: str


def propose(
    domains: Iterable[Domain], capabilities: Capabilities, *, now: datetime, timezone: str | None, connect: str | None
) -> Proposal:
    """Return what fits these domains; it is valid, or ConfigError says so."""
    offered = f"policies:\n{''.join(first_config.POLICIES.values())}"
    policies = load_contents([(Path("init"), offered.encode())]).policies
    choices = [first_config.choose(domain, policies, capabilities, now=now) for domain in domains]
    text = first_config.render(choices, timezone=timezone, connect=connect)
    load_contents([(Path("init"), text.encode())])
    protected = sum(choice.policy is not None for choice in choices)
    return Proposal(text, f"{protected} of {len(choices)} domain(s) protected")


def _domains(host: LibvirtHost) -> Iterator[Domain]:
    for inventory in host.inventory():
        if not inventory.name.startswith(DRILL_NAME):  # ours, and gone in a moment
            with suppress(DomainNotFoundError):  # went away meanwhile
                yield host.domain(inventory.uuid)


def _refuse(path: Path) -> None:
    """Raise InvalidValueError where something of the administrator's would be lost."""
    try:
        shipped = path.read_text(encoding="utf-8", errors="replace") == render_default_file()
    except FileNotFoundError:
        shipped = True
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        msg = f"{path}: cannot be read: {why}; nothing was written"
        raise InvalidValueError(msg) from error
    if not shipped:
        msg = (
            f"{path} exists and is not the file that is shipped; nothing was written. To see what would be "
            f"different: kvmsnapd init | diff {path} -"
        )
        raise InvalidValueError(msg)
    _refuse_parts(path)


def _refuse_parts(path: Path) -> None:
    """Raise InvalidValueError if a file of conf.d protects domains already: the proposal would contradict it."""
    parts, _ = list_parts(path)
    if not parts:
        return
    sources = parse_contents([(part, read_file(part, owner_of(path), MOST_BYTES)) for part in parts])
    if sources.problems:
        raise ConfigError(sources.problems)
    said = next((key for key in _SAID if sources.data.get(key)), None)
    if said:
        msg = (
            f"{sources.place((said,))}: `{said}` is given already; nothing was written. Print the proposal with "
            "kvmsnapd init, and take over by hand what you want of it"
        )
        raise InvalidValueError(msg)


def _timezone() -> str | None:
    """Return the host's time zone by its name, None where it has none that is known here."""
    with suppress(OSError, ValueError, ZoneInfoNotFoundError):
        name = str(_LOCALTIME.readlink()).partition("zoneinfo/")[2]
        return str(ZoneInfo(name)) if name else None
    return None
