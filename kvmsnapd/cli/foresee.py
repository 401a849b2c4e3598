"""``kvmsnapd plan``: what the next runs would do, and what an edit of the configuration would change in that."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvmsnapd.changes import compare_fleets, compare_policies
from kvmsnapd.cli.look import config_beside_daemon, look
from kvmsnapd.config import NEEDS_RESTART
from kvmsnapd.disks import data_folders
from kvmsnapd.errors import DomainNotFoundError
from kvmsnapd.fleet import plan_next, survey
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.live_config import may_look

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from datetime import tzinfo

    from kvmsnapd.changes import PolicyChanges
    from kvmsnapd.cli.look import InForce, Sight
    from kvmsnapd.config import Config
    from kvmsnapd.daemon_events import DomainPoliciesChanged
    from kvmsnapd.plan import Plan


@dataclass(frozen=True)
class Edit:
    """What the files would change of that which the running daemon has in force."""

    force: InForce
    policies: PolicyChanges
    domains: tuple[DomainPoliciesChanged, ...]
    needs_restart: tuple[str, ...]
    files_missing: tuple[str, ...]
    """Files beside the daemon's main one that have no counterpart here."""

    @property
    def changes_something(self) -> bool:
        """Whether anything that is compared is not the same."""
        policies = self.policies
        return bool(policies.added or policies.removed or policies.changed or self.domains or self.needs_restart)


@dataclass(frozen=True)
class _Step:
    """One pair's plan, with the snapshots that only the edit makes it delete."""

    plan: Plan
    timezone: tzinfo
    by_edit: frozenset[str] = field(default_factory=frozenset)


def show_plan(arguments: argparse.Namespace) -> int:
    """Print what a run of each pair would do now; before that, what the files would change for a running daemon."""
    config, force = config_beside_daemon(arguments.config)
    host = LibvirtHost(arguments.connect or config.settings.connect)
    try:
        sight = look(config, host, arguments.domains)
        edit = _compare(config, force, sight) if force else None
        steps = list(_plan(host, sight, edit))
    finally:
        host.close()
    shown = edit if edit and edit.changes_something else None
    if arguments.json:
        answer = {"edit": _edit_object(shown) if shown else None, "plans": [_plan_object(step) for step in steps]}
        print(json.dumps(answer, indent=2))
        return 0
    if shown:
        print("\n".join([*_edit_lines(shown, config), ""]))
    elif edit and edit.force.note and edit.force.note["path"] != os.path.realpath(config.path):
        print(f"{config.path} changes nothing of what the daemon has in force ({edit.force.note['path']}).\n")
    elif force is None and not may_look(config.runtime_directory):
        print(
            f"Whether a daemon runs cannot be told, so nothing is compared: {config.runtime_directory} is closed to us."
        )
    for step in steps:
        print("\n".join(_plan_lines(step)))
    print("Nothing was changed.")
    return 0


def _compare(config: Config, force: InForce, sight: Sight) -> Edit:
    before = force.config
    old = survey(before.expected_policies, before.selectors, sight.fleet.domains, now=sight.now)
    asked_for = {domain.uuid for domain in sight.domains}
    parts = {path.name for path, _ in config.contents[1:]}
    return Edit(
        force,
        compare_policies(before.policies, config.policies),
        tuple(c for c in compare_fleets(old, sight.fleet, now=sight.now) if c.domain_uuid in asked_for),
        tuple(name for name in NEEDS_RESTART if getattr(before.settings, name) != getattr(config.settings, name)),
        tuple(str(path) for path, _ in before.contents[1:] if path.name not in parts),
    )


def _plan(host: LibvirtHost, sight: Sight, edit: Edit | None) -> Iterator[_Step]:
    capabilities = host.capabilities()
    before = {}
    if edit:
        config = edit.force.config
        fleet = survey(config.expected_policies, config.selectors, sight.fleet.domains, now=sight.now)
        before = {pair.name.key: pair for pair in fleet.pairs}
    domains = {}
    for domain in sight.domains:
        try:
            domains[domain.uuid] = host.domain(domain.uuid)
        except DomainNotFoundError:  # undefined since it was listed
            continue
    for pair in sight.pairs:
        if pair.name.domain_uuid not in domains:
            continue
        domain = domains[pair.name.domain_uuid]
        storage = host.storage(domain, data_folders(domain, pair.policy))
        plan = plan_next(pair, domain, capabilities, storage, now=sight.now)
        by_edit: frozenset[str] = frozenset()
        if edit:
            was = before.get(pair.name.key)
            kept = _gone(plan_next(was, domain, capabilities, storage, now=sight.now)) if was else frozenset()
            by_edit = _gone(plan) - kept
        yield _Step(plan, pair.policy.timezone, by_edit)


def _gone(plan: Plan) -> frozenset[str]:
    """Return what a plan deletes, or would if nothing were in the way."""
    return frozenset(
        [*(step.snapshot for step in (*plan.room, *plan.deletes)), *(wait.snapshot for wait in plan.blocked)]
    )


# What an edit would change


def _edit_lines(edit: Edit, config: Config) -> Iterator[str]:
    note = edit.force.note or {}
    yield f"What {config.path} would change of what the daemon has had in force since {note['loaded_at']}:"
    for path in edit.files_missing:
        yield f"  file     {path} is read by the daemon, and has no counterpart in conf.d beside {config.path}"
    if edit.needs_restart:
        yield f"  restart  needed for {', '.join(edit.needs_restart)}"
    yield from (f"  policy   {name} is new" for name in edit.policies.added)
    yield from (f"  policy   {name} is gone" for name in edit.policies.removed)
    yield from (f"  policy   {name}: {', '.join(keys)} changed" for name, keys in edit.policies.changed.items())
    for change in edit.domains:
        for text in _change_words(change):
            yield f"  domain   {change.domain}: {text}"
    if any(change.unprotected for change in edit.domains):
        yield "An edit that takes a domain's protection is put in force only by a reload by hand, not by watch."


def _change_words(change: DomainPoliciesChanged) -> Iterator[str]:
    if change.unprotected:
        yield f"LOSES ITS PROTECTION: {change.coverage}"
    if change.gained:
        yield f"gains {', '.join(change.gained)} ({change.coverage})"
    if change.lost:
        left = f"; {change.leaves} snapshot(s) stay, and nothing prunes them any more" if change.leaves else ""
        yield f"loses {', '.join(change.lost)}{left}"
    for policy, keys in change.changed.items():
        yield f"{policy}: {', '.join(keys)} changed"
    for policy, count in change.releases.items():
        if count:
            fuse = policy in change.fuse
            wait = "; they wait, since that is more than max_deletes_per_run" if fuse else ""
            yield f"{policy}: releases {count} snapshot(s) that stay now{wait}"


def _edit_object(edit: Edit) -> dict[str, Any]:
    note = edit.force.note or {}
    policies = edit.policies
    return {
        "in_force": {"path": note.get("path"), "loaded_at": note.get("loaded_at"), "pid": note.get("pid")},
        "needs_restart": list(edit.needs_restart),
        "files_missing": list(edit.files_missing),
        "policies": {
            "added": list(policies.added),
            "removed": list(policies.removed),
            "changed": {name: list(keys) for name, keys in policies.changed.items()},
        },
        "domains": [asdict(change) for change in edit.domains],
    }


# The plans


def _plan_lines(step: _Step) -> Iterator[str]:
    plan = step.plan
    run_at = plan.due.run_at.astimezone(step.timezone).isoformat(timespec="seconds")
    yield f"{plan.domain_name}  policy {plan.policy}, next run {run_at}"
    for room in plan.room:
        yield f"  delete  {room.snapshot}  to make room in the backing chain{_by_edit(step, room.snapshot)}"
    if plan.take:
        yield f"  take    {plan.take.name}  {plan.take.mark.kind}, {plan.take.mark.consistency}"
    if plan.unchanged:
        yield f"  none    {plan.unchanged.snapshot}  still holds it: shut off, and not changed since"
    if plan.refusal and not plan.room:
        yield f"  refuse  {plan.refusal.reason}: {plan.refusal.detail}"
    yield from _fates(step)


def _fates(step: _Step) -> Iterator[str]:
    """Yield what becomes of each snapshot."""
    plan = step.plan
    word = "delete" if plan.take else "later "  # only a successful take is followed by deletes
    goes = {delete.snapshot: f"  {word}  {delete.snapshot}  {', '.join(delete.reasons)}" for delete in plan.deletes}
    goes |= {wait.snapshot: f"  waits   {wait.snapshot}  {wait.reason}: {wait.detail}" for wait in plan.blocked}
    for verdict in plan.verdicts:
        name = verdict.point.name
        if verdict.keep:
            yield f"  keep    {name}  {', '.join(verdict.reasons)}"
        elif name in goes:
            yield goes.pop(name) + _by_edit(step, name)
    yield from goes.values()  # half deleted ones, on which there is no verdict


def _by_edit(step: _Step, name: str) -> str:
    return "  <- only by the edit" if name in step.by_edit else ""


def _plan_object(step: _Step) -> dict[str, Any]:
    plan = step.plan
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
        "room": [room.snapshot for room in plan.room],
        "deletes": [delete.snapshot for delete in plan.deletes],
        "blocked": [{"snapshot": b.snapshot, "reason": b.reason, "detail": b.detail} for b in plan.blocked],
        "by_edit": sorted(step.by_edit),
    }
