"""``kvmsnapd prune``: delete what retention releases, once a person has looked at it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmsnapd.by_hand import ByHand
from kvmsnapd.cli.ask import agrees
from kvmsnapd.cli.find import find_domain
from kvmsnapd.cli.work import bench
from kvmsnapd.daemon import read_clock
from kvmsnapd.errors import HypervisorError, HypervisorUnreachableError, KvmsnapdError
from kvmsnapd.events import SnapshotDeleted
from kvmsnapd.links import drop_gone_links
from kvmsnapd.plan import plan_prune

if TYPE_CHECKING:
    import argparse

    from kvmsnapd.by_hand import Done
    from kvmsnapd.cli.work import Bench
    from kvmsnapd.fleet import Pair
    from kvmsnapd.prune import Blocked, Delete


@dataclass(frozen=True)
class _Planned:
    """What one pair's part of it is. ``unread`` is why its domain cannot be read."""

    pair: Pair
    deletes: tuple[Delete, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    unread: str | None = None


def prune(arguments: argparse.Namespace) -> int:
    """Show what goes and what has to wait, ask, and delete; 1 if something of it is still there."""
    with bench(arguments) as work:
        wanted = {find_domain(work.fleet.domains, word).uuid for word in arguments.domains}
        pairs = [pair for pair in work.fleet.pairs if not wanted or pair.name.domain_uuid in wanted]
        planned = [_plan(work, pair) for pair in pairs]
        stream = sys.stderr if arguments.json else sys.stdout
        for plan in planned:
            for line in _lines(plan):
                print(line, file=stream)
        chosen = [plan for plan in planned if plan.deletes]
        count = sum(len(plan.deletes) for plan in chosen)
        unread = any(plan.unread for plan in planned)
        domains = len({plan.pair.name.domain_uuid for plan in chosen})
        if not count:
            print(
                "Nothing can be deleted now." if any(p.blocked for p in planned) else "Nothing to delete.", file=stream
            )
        elif not agrees(f"Delete {count} snapshot(s) of {domains} domain(s)?", yes=arguments.yes):
            print("Nothing was deleted.", file=stream)
            return 1
        done = work.finish(lambda: [_carry_out(work, plan) for plan in chosen if work.wanted()])
        left = [blocked for result in done for blocked in (result.left if result else ())]
        if arguments.json:
            print(json.dumps([_object(work, plan) for plan in planned], indent=2))
        elif count:
            print(f"{sum(r.deleted for r in done if r)} of {count} deleted.")
        failed = unread or bool(left) or any(result is None for result in done)
        return work.exit_code(failed=failed)


def _plan(work: Bench, pair: Pair) -> _Planned:
    try:
        domain = work.host.domain(pair.name.domain_uuid)
        if any(s.mark and s.mark.linked for s in domain.snapshots):
            with work.locked(pair.name, "prune"):
                domain = drop_gone_links(work.host, work.host.domain(pair.name.domain_uuid))
        return _Planned(pair, *plan_prune(domain, pair.policy, work.host.capabilities(), now=read_clock()))
    except HypervisorUnreachableError:
        raise
    except HypervisorError as error:
        return _Planned(pair, unread=str(error))


def _lines(plan: _Planned) -> list[str]:
    if not (plan.deletes or plan.blocked or plan.unread):
        return []
    lines = [f"{plan.pair.name.domain}  policy {plan.pair.name.policy}"]
    lines += [f"  delete  {step.snapshot}  {', '.join(step.reasons)}" for step in plan.deletes]
    lines += [f"  waits   {wait.snapshot}  {wait.reason}: {wait.detail}" for wait in plan.blocked]
    return lines + ([f"  cannot be read: {plan.unread}"] if plan.unread else [])


def _carry_out(work: Bench, plan: _Planned) -> Done | None:
    """Delete what was shown of one pair; None if nothing could be tried, which is said."""
    try:
        done = ByHand(work.executor).prune(plan.pair, {step.snapshot for step in plan.deletes})
    except HypervisorUnreachableError:
        raise
    except KvmsnapdError as error:
        print(f"{plan.pair.name.domain}: {error}", file=sys.stderr)
        return None
    for wait in done.left:
        print(f"{plan.pair.name.domain}: {wait.snapshot} is still there: {wait.reason}: {wait.detail}", file=sys.stderr)
    return done


def _object(work: Bench, plan: _Planned) -> dict[str, Any]:
    name = plan.pair.name
    gone = {event.snapshot for event in work.of(SnapshotDeleted, name.domain_uuid)}
    return {
        "domain": name.domain,
        "domain_uuid": name.domain_uuid,
        "policy": name.policy,
        "deletes": [
            {"snapshot": s.snapshot, "reasons": list(s.reasons), "deleted": s.snapshot in gone} for s in plan.deletes
        ],
        "blocked": [{"snapshot": b.snapshot, "reason": b.reason, "detail": b.detail} for b in plan.blocked],
        "error": plan.unread,
    }
