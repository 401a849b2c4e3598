"""``kvmsnapd list``: all snapshots as the tree they are, with why each stays and until when."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmsnapd.cli.look import config_in_force, look
from kvmsnapd.cli.render import format_size, format_time, print_lines
from kvmsnapd.durations import rough_duration
from kvmsnapd.errors import HypervisorError
from kvmsnapd.forecast import release_dates
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.model import Kind
from kvmsnapd.plan import judge

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence
    from datetime import datetime, tzinfo

    from kvmsnapd.cli.look import Sight
    from kvmsnapd.forecast import Release
    from kvmsnapd.model import Inventory, Mark, Snapshot
    from kvmsnapd.policy import Policy


@dataclass(frozen=True)
class Entry:
    """One snapshot with all that is shown of it."""

    domain: Inventory
    snapshot: Snapshot
    branch: str
    """What is drawn before its name."""
    reasons: tuple[str, ...]
    release: Release | None
    """None where retention has no say: a foreign one, or one of a policy that does not apply."""
    size: int | None
    policy: Policy | None


def show_list(arguments: argparse.Namespace) -> int:
    """Print every snapshot of every domain asked for, each below its parent."""
    force = config_in_force(arguments.config)
    host = LibvirtHost(arguments.connect or force.config.settings.connect)
    try:
        sight = look(force.config, host, arguments.domains)
        entries = [entry for domain in sight.domains for entry in _entries(domain, sight, host)]
    finally:
        host.close()
    if arguments.json:
        print(json.dumps([_object(entry, sight.now) for entry in entries], indent=2))
        return 0
    zone = force.config.settings.timezone
    lines = list(force.said)
    if any(entry.release and entry.release.at for entry in entries):
        lines.append("RELEASED is the run that deletes it if every run succeeds.")
    print_lines([_row(entry, sight.now, zone) for entry in entries], lines)
    return 0


def _entries(domain: Inventory, sight: Sight, host: LibvirtHost) -> Iterator[Entry]:
    pairs = [pair for pair in sight.pairs if pair.name.domain_uuid == domain.uuid]
    policies = {pair.name.policy: pair.policy for pair in pairs}
    verdicts = {v.point.name: v for pair in pairs for v in judge(domain, pair.policy, now=sight.now)}
    releases = {
        name: release for pair in pairs for name, release in release_dates(domain, pair.policy, now=sight.now).items()
    }
    for branch, snapshot in draw_tree(domain.snapshots):
        verdict, mark = verdicts.get(snapshot.name), snapshot.mark
        yield Entry(
            domain,
            snapshot,
            branch,
            tuple(_reasons(snapshot, verdict.reasons if verdict else ())),
            releases.get(snapshot.name),
            _size(host, snapshot),
            policies.get(mark.policy) if mark else None,
        )


def draw_tree(snapshots: Sequence[Snapshot]) -> Iterator[tuple[str, Snapshot]]:
    """Yield the snapshots, parents before children and older ones first, with what is to be drawn before each name.

    An only child stands straight below its parent, so that a chain is a column; only branches are moved to the right.
    """
    names = {snapshot.name for snapshot in snapshots}
    children: dict[str | None, list[Snapshot]] = {}
    for snapshot in sorted(snapshots, key=lambda s: (s.created_at, s.name)):
        # libvirt may list a child whose parent was deleted by somebody meanwhile.
        children.setdefault(snapshot.parent if snapshot.parent in names else None, []).append(snapshot)
    # Not recursive: a chain of internal snapshots may be deeper than python's stack.
    waiting: list[tuple[Snapshot, str, str]] = []
    _push(waiting, children.get(None, []), "")
    while waiting:
        snapshot, branch, below = waiting.pop()
        yield branch, snapshot
        _push(waiting, children.get(snapshot.name, []), below)


def _push(waiting: list[tuple[Snapshot, str, str]], siblings: Sequence[Snapshot], indent: str) -> None:
    """Put siblings on the stack, each with what is drawn before it and before what is below it."""
    if len(siblings) == 1:
        waiting.append((siblings[0], indent, indent))
        return
    for number, snapshot in reversed(list(enumerate(siblings, start=1))):
        last = number == len(siblings)
        waiting.append((snapshot, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  ")))


def _reasons(snapshot: Snapshot, claims: Sequence[str]) -> Iterator[str]:
    mark = snapshot.mark
    if mark is None:
        yield "of a newer kvmsnapd: not touched by this one" if snapshot.newer else "foreign: never touched"
        return
    if mark.deleting:
        yield "half deleted: no way back, goes with the next run"
    else:
        yield from claims or [f"unmanaged: policy {mark.policy} does not apply here"]
    if mark.restoring:
        yield f"a restore to it was begun at {mark.restoring.begun_at.isoformat()} and is not finished"
    if mark.standalone:
        yield "kept by a restore, in files of its own"
    if mark.linked:
        yield f"{len(mark.linked)} linked copy(s) stand on it"
    if mark.unchanged:
        yield f"unchanged until {mark.unchanged.seen_at.isoformat()}"
    if mark.excluded:
        yield f"without {', '.join(mark.excluded)}"
    if mark.drill:
        result = "restore drill passed" if mark.drill.failure is None else f"restore drill failed: {mark.drill.failure}"
        yield f"{result} ({mark.drill.ended_at.isoformat()})"


def _size(host: LibvirtHost, snapshot: Snapshot) -> int | None:
    """Return the bytes that its overlays take; None for an internal one, and where libvirt cannot say."""
    if snapshot.kind is Kind.INTERNAL or not snapshot.overlays:
        return None
    try:
        sizes = host.allocated(snapshot.overlays)
    except HypervisorError:  # we may only read
        return None
    return sum(sizes.values()) if len(sizes) == len(dict(snapshot.overlays)) else None


def _row(entry: Entry, now: datetime, default_zone: tzinfo) -> dict[str, str]:
    snapshot, mark = entry.snapshot, entry.snapshot.mark
    zone = entry.policy.timezone if entry.policy else default_zone
    return {
        "domain": entry.domain.name,
        "snapshot": _drawable(entry.branch) + snapshot.name,
        "age": rough_duration(now - snapshot.created_at),
        "policy": mark.policy if mark else "-",
        "kind": str(snapshot.kind),
        "consistency": str(mark.consistency) if mark else "-",
        "size": format_size(entry.size) if entry.size is not None else "-",
        "hold": _hold(mark, now, zone) if mark else "-",
        "released": _released(entry.release, zone),
        "reasons": ", ".join(entry.reasons),
    }


def _drawable(branch: str) -> str:
    try:
        branch.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return branch.replace("├─", "|-").replace("└─", "`-").replace("│", "|")
    return branch


def _hold(mark: Mark, now: datetime, zone: tzinfo) -> str:
    reason = mark.held(now)
    if reason is None:
        return "-"
    ends = mark.hold and mark.hold.until and not mark.linked and not mark.restoring
    return (
        f"{reason} (until {format_time(mark.hold.until, zone)})" if ends and mark.hold and mark.hold.until else reason
    )


def _released(release: Release | None, zone: tzinfo) -> str:
    if release is None:
        return "-"
    if release.at is None:
        return "never"
    return ("" if release.certain else "after ") + format_time(release.at, zone)


def _object(entry: Entry, now: datetime) -> dict[str, Any]:
    snapshot, mark, release = entry.snapshot, entry.snapshot.mark, entry.release
    hold = mark.hold if mark else None
    at = release.at if release else None
    return {
        "domain": entry.domain.name,
        "domain_uuid": entry.domain.uuid,
        "snapshot": snapshot.name,
        "parent": snapshot.parent,
        "own": mark is not None,
        "created_at": snapshot.created_at.isoformat(),
        "policy": mark.policy if mark else None,
        "scheduled_at": mark.scheduled_at.isoformat() if mark else None,
        "kind": str(snapshot.kind),
        "consistency": str(mark.consistency) if mark else None,
        "size_bytes": entry.size,
        "held": mark.held(now) if mark else None,
        "held_until": hold.until.isoformat() if hold and hold.until else None,
        "managed": entry.policy is not None,
        "released_at": at.isoformat() if at and release and release.certain else None,
        "released_after": at.isoformat() if at and release and not release.certain else None,
        "never_released": release is not None and at is None,
        "standalone": bool(mark and mark.standalone),
        "linked": list(mark.linked) if mark else [],
        "restoring": bool(mark and mark.restoring),
        "half_deleted": bool(mark and mark.deleting),
        "drill": {"ended_at": mark.drill.ended_at.isoformat(), "failure": mark.drill.failure}
        if mark and mark.drill
        else None,
        "reasons": list(entry.reasons),
    }
