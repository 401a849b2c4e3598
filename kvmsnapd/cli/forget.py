"""``kvmsnapd forget``: take all that is ours off a domain that leaves."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from kvmsnapd.by_hand import ByHand, Done
from kvmsnapd.cli.ask import agrees
from kvmsnapd.cli.find import find_domain
from kvmsnapd.cli.work import bench
from kvmsnapd.daemon import read_clock
from kvmsnapd.errors import KvmsnapdError
from kvmsnapd.events import SnapshotDeleted
from kvmsnapd.links import drop_gone_links
from kvmsnapd.model import PairName
from kvmsnapd.plan import plan_forget
from kvmsnapd.prune import BlockReason

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from kvmsnapd.cli.work import Bench
    from kvmsnapd.model import Domain
    from kvmsnapd.prune import Blocked, Delete


def forget(arguments: argparse.Namespace) -> int:
    """Show what goes, ask, delete it, and say what the domain stands on; 1 if something of ours is still there."""
    with bench(arguments) as work:
        found = find_domain(work.fleet.domains, arguments.domain)
        name = PairName(found.name, found.uuid, arguments.policy or "-")
        return _forget(work, arguments, name)


def _forget(work: Bench, arguments: argparse.Namespace, name: PairName) -> int:
    domain = work.finish(lambda: _read(work, name))
    deletes, blocked = plan_forget(domain, work.host.capabilities(), policy=arguments.policy)
    _refuse(name.domain, blocked)
    stream = sys.stderr if arguments.json else sys.stdout
    for line in _lines(domain, deletes, blocked):
        print(line, file=stream)
    done = Done(0, ())
    if not deletes:
        what = "None of them can be deleted now." if blocked else f"{name.domain} has nothing of ours."
        print(what, file=stream)
    elif not agrees(f"Delete {len(deletes)} snapshot(s) of {name.domain} for good?", yes=arguments.yes):
        print("Nothing was deleted.", file=stream)
        return 1
    else:
        shown = {step.snapshot for step in deletes}
        done = work.finish(lambda: ByHand(work.executor).forget(name, shown, policy=arguments.policy))
    for wait in done.left:
        print(f"{name.domain}: {wait.snapshot} is still there: {wait.reason}: {wait.detail}", file=sys.stderr)
    after = work.host.domain(name.domain_uuid)
    if arguments.json:
        print(json.dumps(_object(work, after, deletes, [*blocked, *done.left]), indent=2))
    else:
        for line in _afterwards(work, after, again=bool(done.left or blocked)):
            print(line)
    return work.exit_code(failed=bool(done.left or blocked))


def _read(work: Bench, name: PairName) -> Domain:
    domain = work.host.domain(name.domain_uuid)
    if not any(s.mark and s.mark.linked for s in domain.snapshots):
        return domain
    with work.locked(name, "forget"):
        return drop_gone_links(work.host, work.host.domain(name.domain_uuid))


def _refuse(domain: str, blocked: Sequence[Blocked]) -> None:
    """Raise KvmsnapdError if others stand on the domain's snapshots, or it is in the middle of a restore."""
    hard = next((wait for wait in blocked if wait.reason in {BlockReason.LINKED, BlockReason.RESTORING}), None)
    if hard:
        msg = f"{domain}: {hard.snapshot} cannot be deleted: {hard.detail}. Nothing was changed; then forget it again"
        raise KvmsnapdError(msg)


def _lines(domain: Domain, deletes: Sequence[Delete], blocked: Sequence[Blocked]) -> list[str]:
    now = read_clock()
    own = {s.name: s.mark for s in domain.snapshots if s.mark}
    held = {name: reason for name, mark in own.items() if (reason := mark.held(now))}
    lines = [domain.name] if deletes or blocked else []
    lines += [f"  delete  {d.snapshot}" for d in deletes if d.snapshot not in held]
    lines += [f"  delete  {d.snapshot}  which is held: {held[d.snapshot]}" for d in deletes if d.snapshot in held]
    lines += [f"  stays   {wait.snapshot}  {wait.reason}: {wait.detail}" for wait in blocked]
    lines += [f"  stays   {s.name}  foreign: never touched" for s in domain.snapshots if s.mark is None]
    return lines


def _afterwards(work: Bench, domain: Domain, *, again: bool) -> list[str]:
    """Say whether libvirt would now let the domain go, where its disks are, and what would begin anew."""
    lines = [f"{d.target}: {d.path}" for d in domain.disks if d.holds_state and d.path]
    if domain.snapshots:
        names = ", ".join(s.name for s in domain.snapshots)
        own = any(s.mark for s in domain.snapshots)
        step = f"call `kvmsnapd forget {domain.name}` again" if again and own else "see `kvmsnapd list`"
        lines.append(
            f"{domain.name} has {len(domain.snapshots)} snapshot(s) left ({names}): virsh undefine and migrate refuse "
            f"it; {step}"
        )
    elif domain.managed_save:
        lines.append(
            f"{domain.name} has a managed-save image: `virsh managedsave-remove {domain.name}` before undefine"
        )
    else:
        lines.append(f"{domain.name} has no snapshots left: virsh undefine and migrate accept it")
    pairs = [pair for pair in work.fleet.pairs if pair.name.domain_uuid == domain.uuid]
    if pairs:
        policies = ", ".join(pair.name.policy for pair in pairs)
        lines.append(
            f"Policy {policies} still applies to {domain.name}, and the next run takes a snapshot: undefine it before, "
            f"or write `{domain.name}: []` under domains and reload"
        )
    return lines


def _object(work: Bench, domain: Domain, deletes: Sequence[Delete], left: Sequence[Blocked]) -> dict[str, Any]:
    gone = {event.snapshot for event in work.of(SnapshotDeleted, domain.uuid)}
    return {
        "domain": domain.name,
        "domain_uuid": domain.uuid,
        "deleted": [step.snapshot for step in deletes if step.snapshot in gone],
        "left": [{"snapshot": w.snapshot, "reason": w.reason, "detail": w.detail} for w in left],
        "snapshots": [s.name for s in domain.snapshots],
        "disks": {d.target: d.path for d in domain.disks if d.holds_state},
        "may_be_undefined": not domain.snapshots and not domain.managed_save,
        "policies": [pair.name.policy for pair in work.fleet.pairs if pair.name.domain_uuid == domain.uuid],
    }
