"""``kvmsnapd status``, ``list`` and ``plan``: read libvirt and the configuration, and change nothing."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from kvmsnapd.cli.render import print_table
from kvmsnapd.config import fingerprint, load_config, load_contents, runtime_directory_of
from kvmsnapd.daemon import read_clock
from kvmsnapd.disks import data_folders
from kvmsnapd.durations import format_duration, rough_duration
from kvmsnapd.errors import ConfigError, DomainNotFoundError
from kvmsnapd.fleet import explain_unprotected, plan_next, survey
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.live_config import contents_of, read_note
from kvmsnapd.plan import judge

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from pathlib import Path

    from kvmsnapd.config import Config
    from kvmsnapd.fleet import Fleet, Pair
    from kvmsnapd.model import Inventory, Snapshot
    from kvmsnapd.plan import Plan


@dataclass(frozen=True)
class _Sight:
    """What the three commands look at."""

    host: LibvirtHost
    fleet: Fleet
    domains: tuple[Inventory, ...]
    pairs: tuple[Pair, ...]
    now: datetime
    said: list[str]
    """What is to be said of the configuration that it goes by."""


def _look(arguments: argparse.Namespace, *, as_daemon: bool = False) -> _Sight:
    """Look at all domains by the configuration of the files, or by that which a running daemon goes by."""
    config, said = _config_in_force(arguments.config) if as_daemon else (load_config(arguments.config), [])
    host = LibvirtHost(arguments.connect or config.settings.connect)
    now = read_clock()
    fleet = survey(config.expected_policies, config.selectors, host.inventory(), now=now)
    wanted = {find_domain(fleet.domains, word).uuid for word in arguments.domains} or {d.uuid for d in fleet.domains}
    domains = tuple(domain for domain in fleet.domains if domain.uuid in wanted)
    pairs = tuple(pair for pair in fleet.pairs if pair.name.domain_uuid in wanted)
    return _Sight(host, fleet, domains, pairs, now, said)


def _config_in_force(path: Path) -> tuple[Config, list[str]]:
    """Return the configuration of the running daemon and what is to be said of it; without one that of the files."""
    config: Config | None = None
    try:
        config = load_config(path)
    except ConfigError:
        note = read_note(path, runtime_directory_of(path))
        if note is None:
            raise
    else:
        note = read_note(path, config.runtime_directory)
        if note is None:
            return config, []
    said = []
    if note["rejected"]:
        said = [f"The daemon refused an edit, and goes on with what it read at {note['loaded_at']}:", *note["rejected"]]
    elif config is None or fingerprint(config.contents) != fingerprint(contents_of(note)):
        said = [f"The files were edited since the daemon read them at {note['loaded_at']}; it is to be reloaded."]
    for name in [name for name in os.environ if name.upper().startswith("KVMSNAPD_")]:
        del os.environ[name]
    os.environ.update(note["environment"])
    return load_contents(contents_of(note)), said


def find_domain(domains: Iterable[Inventory], word: str) -> Inventory:
    """Return the domain of this name or UUID; raise DomainNotFoundError, which names the nearest one, if none is."""
    known = list(domains)
    for domain in known:
        if word == domain.name or word.lower() == domain.uuid:
            return domain
    close = get_close_matches(word, [domain.name for domain in known], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; `kvmsnapd status` lists all"
    msg = f"libvirt has no domain {word!r}{hint}"
    raise DomainNotFoundError(msg, operation="lookup", domain=word)


def show_status(arguments: argparse.Namespace) -> int:
    """Print one line per (domain, policy), the worst first, then what no policy protects or prunes."""
    sight = _look(arguments, as_daemon=True)
    fleet = sight.fleet
    pairs = sorted(sight.pairs, key=lambda pair: (-_badness(pair, sight.now), pair.name.domain, pair.name.policy))
    unprotected = [a for a in fleet.unprotected() if a.domain_uuid in {d.uuid for d in sight.domains}]
    unmanaged = {d.name: len(snapshots) for d, snapshots in fleet.unmanaged() if d in sight.domains}
    if arguments.json:
        answer = {
            "pairs": [_status_object(pair, sight.now) for pair in pairs],
            "unprotected": [assignment.domain_name for assignment in unprotected],
            "missing": list(fleet.missing_domains),
            "unmanaged": unmanaged,
            "configuration": sight.said,
        }
        print(json.dumps(answer, indent=2))
        return 0
    print_table([_status_row(pair, sight.now) for pair in pairs])
    for line in sight.said:
        print(line)
    for assignment in unprotected:
        print(f"{assignment.domain_name}: {explain_unprotected(assignment)}")
    for name, count in unmanaged.items():
        print(f"{name}: {count} snapshot(s) of a policy that no longer applies; nothing prunes them")
    for name in () if arguments.domains else fleet.missing_domains:
        print(f"{name}: is configured, and libvirt has no such domain")
    return 0


def _badness(pair: Pair, now: datetime) -> float:
    """Return the age of the newest snapshot as a share of its limit; never having one is the worst."""
    age = pair.age(now)
    return age / pair.policy.max_age if age is not None else float("inf")


def _state(pair: Pair, now: datetime) -> str:
    age = pair.age(now)
    if age is None:
        return "never"
    if age > pair.policy.max_age:
        return "overdue"
    return "due" if pair.due.slot else "ok"


def _status_object(pair: Pair, now: datetime) -> dict[str, Any]:
    age, mark = pair.age(now), pair.newest.mark if pair.newest else None
    return {
        "domain": pair.name.domain,
        "domain_uuid": pair.name.domain_uuid,
        "policy": pair.name.policy,
        "state": _state(pair, now),
        "age_seconds": round(age.total_seconds()) if age is not None else None,
        "max_age_seconds": round(pair.policy.max_age.total_seconds()),
        "consistency": str(mark.consistency) if mark else None,
        "snapshots": len(pair.snapshots),
        "next_run_at": pair.due.run_at.isoformat(),
        "newest": pair.newest.name if pair.newest else None,
    }


def _status_row(pair: Pair, now: datetime) -> dict[str, str]:
    age, mark = pair.age(now), pair.newest.mark if pair.newest else None
    return {
        "domain": pair.name.domain,
        "policy": pair.name.policy,
        "state": _state(pair, now),
        "age": rough_duration(age) if age is not None else "-",
        "limit": format_duration(pair.policy.max_age),
        "consistency": str(mark.consistency) if mark else "-",
        "snapshots": str(len(pair.snapshots)),
        "next": pair.due.run_at.astimezone(pair.policy.timezone).isoformat(timespec="seconds"),
        "newest": pair.newest.name if pair.newest else "-",
    }


def show_list(arguments: argparse.Namespace) -> int:
    """Print every snapshot of every domain asked for, oldest first, with the reasons it stays."""
    sight = _look(arguments)
    rows = []
    for domain in sight.domains:
        verdicts = {
            verdict.point.name: verdict
            for pair in sight.pairs
            if pair.name.domain_uuid == domain.uuid
            for verdict in judge(domain, pair.policy, now=sight.now)
        }
        for snapshot in sorted(domain.snapshots, key=lambda s: (s.created_at, s.name)):
            verdict = verdicts.get(snapshot.name)
            rows.append(_list_row(domain, snapshot, verdict.reasons if verdict else (), sight.now))
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            row["reasons"] = ", ".join(row["reasons"])
        print_table(rows)
    return 0


def _list_row(domain: Inventory, snapshot: Snapshot, reasons: Sequence[str], now: datetime) -> dict[str, Any]:
    mark = snapshot.mark
    if mark is None:
        reasons = ["foreign: never touched"]
    elif mark.deleting:
        reasons = ["half deleted: no way back, goes with the next run"]
    else:
        reasons = list(reasons) or [f"unmanaged: policy {mark.policy} does not apply here"]
        reasons += [f"unchanged until {mark.unchanged.seen_at.isoformat()}"] if mark.unchanged else []
        reasons += [f"without {', '.join(mark.excluded)}"] if mark.excluded else []
    return {
        "domain": domain.name,
        "snapshot": snapshot.name,
        "age": rough_duration(now - snapshot.created_at),
        "policy": mark.policy if mark else "-",
        "kind": str(snapshot.kind),
        "consistency": str(mark.consistency) if mark else "-",
        "reasons": list(reasons),
    }


def show_plan(arguments: argparse.Namespace) -> int:
    """Print what a run of each pair would do now."""
    sight = _look(arguments)
    capabilities = sight.host.capabilities()
    domains = {domain.uuid: sight.host.domain(domain.uuid) for domain in sight.domains}
    plans = []
    for pair in sight.pairs:
        domain = domains[pair.name.domain_uuid]
        storage = sight.host.storage(domain, data_folders(domain, pair.policy))
        plans.append(plan_next(pair, domain, capabilities, storage, now=sight.now))
    sight.host.close()
    if arguments.json:
        print(json.dumps([_plan_object(plan) for plan in plans], indent=2))
        return 0
    for plan in plans:
        print("\n".join(_plan_lines(plan)))
    print("Nothing was changed.")
    return 0


def _plan_lines(plan: Plan) -> list[str]:
    lines = [f"{plan.domain_name}  policy {plan.policy}, next run {plan.due.run_at.isoformat(timespec='seconds')}"]
    lines += [f"  delete  {step.snapshot}  to make room in the backing chain" for step in plan.room]
    if plan.take:
        lines.append(f"  take    {plan.take.name}  {plan.take.mark.kind}, {plan.take.mark.consistency}")
    if plan.unchanged:
        lines.append(f"  none    {plan.unchanged.snapshot}  still holds it: shut off, and not changed since")
    if plan.refusal and not plan.room:
        lines.append(f"  refuse  {plan.refusal.reason}: {plan.refusal.detail}")
    deletes = {step.snapshot for step in plan.deletes}
    waits = {wait.snapshot: wait for wait in plan.blocked}
    for verdict in plan.verdicts:
        name = verdict.point.name
        if verdict.keep:
            lines.append(f"  keep    {name}  {', '.join(verdict.reasons)}")
        elif name in deletes:
            word = "delete" if plan.take else "later "  # only a successful take is followed by deletes
            lines.append(f"  {word}  {name}  {', '.join(verdict.reasons)}")
        elif name in waits:
            lines.append(f"  waits   {name}  {waits[name].reason}: {waits[name].detail}")
    return lines


def _plan_object(plan: Plan) -> dict[str, Any]:
    return {
        "domain": plan.domain_name,
        "domain_uuid": plan.domain_uuid,
        "policy": plan.policy,
        "run_at": plan.due.run_at.isoformat(),
        "take": plan.take.name if plan.take else None,
        "consistency": str(plan.take.mark.consistency) if plan.take else None,
        "unchanged": plan.unchanged.snapshot if plan.unchanged else None,
        "refusal": {"reason": plan.refusal.reason, "detail": plan.refusal.detail} if plan.refusal else None,
        "verdicts": [{"snapshot": v.point.name, "keep": v.keep, "reasons": list(v.reasons)} for v in plan.verdicts],
        "room": [step.snapshot for step in plan.room],
        "deletes": [step.snapshot for step in plan.deletes],
        "blocked": [{"snapshot": b.snapshot, "reason": b.reason, "detail": b.detail} for b in plan.blocked],
    }
