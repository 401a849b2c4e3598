"""``kvmsnapd status``: one line per domain and policy, the worst first, once or again and again."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from kvmsnapd.cli.look import Sight, config_in_force, look
from kvmsnapd.cli.render import format_time, make_console, make_table, print_lines
from kvmsnapd.daemon import read_clock
from kvmsnapd.disks import data_folders
from kvmsnapd.durations import format_duration, rough_duration
from kvmsnapd.errors import DomainNotFoundError, HypervisorError, InvalidValueError, KvmsnapdError
from kvmsnapd.findings import read_findings
from kvmsnapd.fleet import explain_unprotected, plan_next
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.model import Storage
from kvmsnapd.standing import Standing, stand, worst_first
from kvmsnapd.tally import Tally

if TYPE_CHECKING:
    import argparse
    from datetime import datetime

    from kvmsnapd.cli.look import InForce
    from kvmsnapd.model import Domain
    from kvmsnapd.refusal import Refusal


@dataclass(frozen=True)
class Status:
    """The answer, before it is a table or JSON."""

    force: InForce
    sight: Sight
    standings: list[Standing]
    noted_at: datetime | None
    """When the daemon last noted what its runs found; None if that is not known."""


@dataclass
class _Watcher:
    """Looks at libvirt as often as it is asked to, through one connection."""

    arguments: argparse.Namespace
    _hosts: dict[str, LibvirtHost] = field(default_factory=dict)

    def look(self) -> Status:
        force = config_in_force(self.arguments.config)
        uri = self.arguments.connect or force.config.settings.connect
        if uri not in self._hosts:
            self.close()
            self._hosts[uri] = LibvirtHost(uri)
        return _look(force, self._hosts[uri], self.arguments.domains)

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()


def show_status(arguments: argparse.Namespace) -> int:
    """Print one line per (domain, policy), the worst first, then what no policy protects or prunes.

    With ``--watch`` again and again until Ctrl-C.
    """
    watcher = _Watcher(arguments)
    try:
        if arguments.watch is None:
            _print(watcher.look(), arguments)
        elif arguments.watch < 1:
            msg = f"--watch must be 1 or more seconds, not {arguments.watch}"
            raise InvalidValueError(msg)
        else:
            _watch(watcher, arguments)
    finally:
        watcher.close()
    return 0


def _watch(watcher: _Watcher, arguments: argparse.Namespace) -> None:
    """Show it until Ctrl-C, which is how a person ends it. What goes wrong after the first look is said, no more."""
    try:
        seen: Status | None = watcher.look()
        trouble = ""
        console = make_console()
        if console.is_terminal and not arguments.json:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(_screen(seen, trouble, arguments), refresh=True)
                    time.sleep(arguments.watch)
                    seen, trouble = _look_again(watcher, seen)
        while True:
            if seen and not trouble:
                if not arguments.json:
                    print(_heading())
                _print(seen, arguments)
            else:
                print(json.dumps({"at": _now(), "error": trouble}) if arguments.json else f"{_heading()}\n{trouble}")
            print("" if arguments.json else "\n", end="", flush=True)
            time.sleep(arguments.watch)
            seen, trouble = _look_again(watcher, seen)
    except KeyboardInterrupt:
        return


def _look_again(watcher: _Watcher, before: Status | None) -> tuple[Status | None, str]:
    try:
        return watcher.look(), ""
    except KvmsnapdError as error:
        return before, f"{error}; looking again"


def _screen(seen: Status | None, trouble: str, arguments: argparse.Namespace) -> Group:
    parts: list[Any] = [Text(_heading() + (f"  {trouble}" if trouble else ""), style="bold red" if trouble else "dim")]
    if seen:
        rows = [_row(standing, seen.sight.now) for standing in seen.standings]
        parts += [make_table(rows)] if rows else []
        parts += [Text(line) for line in _lines(seen, arguments)]
    return Group(*parts)


def _heading() -> str:
    return f"{_now()}  kvmsnapd status, Ctrl-C to end"


def _now() -> str:
    return read_clock().astimezone().isoformat(timespec="seconds")


def _look(force: InForce, host: LibvirtHost, words: list[str]) -> Status:
    sight = look(force.config, host, words)
    found = read_findings(force.config.state_directory)
    tally, noted_at = found or (Tally(), None)
    refusals = _refusals(host, sight)
    inventories = {domain.uuid: domain for domain in sight.domains}
    standings = [
        stand(
            pair,
            inventories[pair.name.domain_uuid],
            now=sight.now,
            found=tally.pair(pair.name.key),
            refusal=refusals.get(pair.name.key),
        )
        for pair in sight.pairs
    ]
    return Status(force, sight, worst_first(standings, now=sight.now), noted_at)


def _refusals(host: LibvirtHost, sight: Sight) -> dict[str, Refusal]:
    """Return, by pair key, why a next run would take nothing as the domain is now."""
    capabilities, found = host.capabilities(), {}
    domains: dict[str, Domain] = {}
    for pair in sight.pairs:
        uuid = pair.name.domain_uuid
        try:
            domains[uuid] = domain = domains.get(uuid) or host.domain(uuid)
        except DomainNotFoundError:
            continue  # undefined since it was listed
        refusal = plan_next(pair, domain, capabilities, Storage(), now=sight.now).refusal
        if refusal:  # what the storage says may tell otherwise, and is asked only then
            with suppress(HypervisorError):  # we may only read
                storage = host.storage(domain, data_folders(domain, pair.policy))
                plan = plan_next(pair, domain, capabilities, storage, now=sight.now)
                refusal = None if plan.room else plan.refusal
        if refusal:
            found[pair.name.key] = refusal
    return found


def _print(seen: Status, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(_object(seen), indent=None if arguments.watch else 2), flush=True)
        return
    print_lines([_row(standing, seen.sight.now) for standing in seen.standings], _lines(seen, arguments))


def _lines(seen: Status, arguments: argparse.Namespace) -> list[str]:
    """Return what is to be said below the table."""
    fleet, domains = seen.sight.fleet, seen.sight.domains
    asked_for = {domain.uuid for domain in domains}
    lines = [f"{a.domain_name}: {explain_unprotected(a)}" for a in fleet.unprotected() if a.domain_uuid in asked_for]
    lines += [
        f"{domain.name}: {len(snapshots)} snapshot(s) of a policy that no longer applies; nothing prunes them"
        for domain, snapshots in fleet.unmanaged()
        if domain in domains
    ]
    if not arguments.domains:
        lines += [f"{name}: is configured, and libvirt has no such domain" for name in fleet.missing_domains]
    lines += [seen.force.describe(), *seen.force.said]
    if not seen.force.note and seen.noted_at:
        lines.append(f"What its last runs found is of {seen.noted_at.astimezone().isoformat(timespec='seconds')}.")
    return lines


def _row(standing: Standing, now: datetime) -> dict[str, str]:
    pair = standing.pair
    age, zone = pair.age(now), pair.policy.timezone
    wrong = [t.text + (f" (since {format_time(t.since, zone)})" if t.since else "") for t in standing.troubles]
    return {
        "domain": pair.name.domain,
        "policy": pair.name.policy,
        "state": str(standing.state),
        "age": rough_duration(age) if age is not None else "-",
        "limit": format_duration(pair.policy.max_age),
        "consistency": str(pair.consistency or "-"),
        "count": str(len(pair.snapshots)),
        "next": format_time(pair.due.run_at, zone),
        "newest": pair.newest.name if pair.newest else "-",
        "wrong": "; ".join(wrong) or "-",
    }


def _object(seen: Status) -> dict[str, Any]:
    fleet, domains, note = seen.sight.fleet, seen.sight.domains, seen.force.note
    asked_for = {domain.uuid for domain in domains}
    return {
        "at": seen.sight.now.isoformat(),
        "daemon": {
            "running": None if seen.force.hidden else bool(note or seen.force.other),
            "pid": note["pid"] if note else None,
            "loaded_at": note["loaded_at"] if note else None,
            "noted_at": seen.noted_at.isoformat() if seen.noted_at else None,
            "text": seen.force.describe(),
        },
        "pairs": [_pair_object(standing, seen.sight.now) for standing in seen.standings],
        "unprotected": [a.domain_name for a in fleet.unprotected() if a.domain_uuid in asked_for],
        "missing": list(fleet.missing_domains),
        "unmanaged": {d.name: len(snapshots) for d, snapshots in fleet.unmanaged() if d in domains},
        "configuration": seen.force.said,
    }


def _pair_object(standing: Standing, now: datetime) -> dict[str, Any]:
    pair = standing.pair
    age, last = pair.age(now), pair.last_success_at
    return {
        "domain": pair.name.domain,
        "domain_uuid": pair.name.domain_uuid,
        "policy": pair.name.policy,
        "state": str(standing.state),
        "age_seconds": round(age.total_seconds()) if age is not None else None,
        "max_age_seconds": round(pair.policy.max_age.total_seconds()),
        "last_success_at": last.isoformat() if last else None,
        "consistency": str(pair.consistency) if pair.consistency else None,
        "snapshots": len(pair.snapshots),
        "next_run_at": pair.due.run_at.isoformat(),
        "newest": pair.newest.name if pair.newest else None,
        "troubles": [
            {"what": t.what, "text": t.text, "since": t.since.isoformat() if t.since else None}
            for t in standing.troubles
        ],
    }
