"""``kvmsnapd hold`` and ``release``: keep a snapshot whatever retention says, and give it back."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kvmsnapd.cli.find import find_domain, find_snapshot
from kvmsnapd.cli.work import bench
from kvmsnapd.daemon import read_clock
from kvmsnapd.durations import parse_duration
from kvmsnapd.errors import InvalidValueError, KvmsnapdError
from kvmsnapd.links import drop_gone_links
from kvmsnapd.model import Hold, PairName

if TYPE_CHECKING:
    import argparse

    from kvmsnapd.cli.work import Bench
    from kvmsnapd.model import Mark, Snapshot


def hold(arguments: argparse.Namespace) -> int:
    """Write the hold into the snapshot's description; one that is held already gets the new reason and end."""
    if not arguments.reason.strip():
        msg = "a hold needs a reason, for whoever finds it"
        raise InvalidValueError(msg)
    with bench(arguments) as work:
        until = _until(work, arguments.until) if arguments.until else None
        return work.finish(lambda: _change(work, arguments, Hold(arguments.reason.strip(), until)))


def release(arguments: argparse.Namespace) -> int:
    """Take the hold out of the snapshot's description."""
    with bench(arguments) as work:
        return work.finish(lambda: _change(work, arguments, None))


def _change(work: Bench, arguments: argparse.Namespace, wanted: Hold | None) -> int:
    """Find the snapshot under the lock, and give it this hold or none."""
    found = find_domain(work.fleet.domains, arguments.domain)
    verb = "hold" if wanted else "release"
    with work.locked(PairName(found.name, found.uuid, ""), verb):
        domain = drop_gone_links(work.host, work.host.domain(found.uuid))
        snapshot = find_snapshot(domain, arguments.snapshot)
        mark = _own_mark(found.name, snapshot, verb)
        _refuse(found.name, snapshot.name, mark, wanted)
        before = mark.hold
        if before != wanted:
            work.host.describe_snapshot(found.uuid, snapshot.name, replace(mark, hold=wanted))
    if arguments.json:
        answer = {
            "domain": found.name,
            "domain_uuid": found.uuid,
            "snapshot": snapshot.name,
            "hold": _object(wanted),
            "before": _object(before),
        }
        print(json.dumps(answer, indent=2))
    elif wanted:
        was = f" Before: {_words(before)}." if before and before != wanted else ""
        end = "" if wanted.until else f" `kvmsnapd release {found.name} {snapshot.name}` ends it."
        print(f"{found.name}: {snapshot.name} is held: {_words(wanted)}.{end}{was}")
    elif before:
        print(f"{found.name}: {snapshot.name} is released (it was held: {_words(before)}); retention judges it again.")
    else:
        print(f"{found.name}: {snapshot.name} was not held; nothing was changed.")
    return 0


def _own_mark(domain: str, snapshot: Snapshot, verb: str) -> Mark:
    if snapshot.mark:
        return snapshot.mark
    after = (
        f"kvmsnapd never deletes it anyway, `virsh snapshot-delete {domain} {snapshot.name}` does"
        if verb == "hold"
        else f"`virsh snapshot-delete {domain} {snapshot.name}` deletes it"
    )
    msg = f"{domain}: {snapshot.name} was not made by kvmsnapd, so there is nothing to {verb}: {after}"
    raise KvmsnapdError(msg)


def _refuse(domain: str, name: str, mark: Mark, wanted: Hold | None) -> None:
    """Raise KvmsnapdError for a snapshot whose hold is not a person's to change now."""
    if mark.deleting and wanted:
        msg = (
            f"{domain}: {name} is half deleted and no way back any more, so it cannot be held; the next run or "
            f"`kvmsnapd prune {domain}` ends its delete"
        )
        raise KvmsnapdError(msg)
    if wanted or mark.hold:
        return
    if mark.restoring:
        msg = f"{domain}: {name} is being restored; `kvmsnapd restore {domain} {name}` finishes that and frees it"
        raise KvmsnapdError(msg)
    if mark.linked:
        copies = ", ".join(mark.linked)
        msg = f"{domain}: {name} carries the linked copy {copies}; it is free once that is undefined (virsh undefine)"
        raise KvmsnapdError(msg)


def _until(work: Bench, text: str) -> datetime:
    """Read the end of a hold: a time, meant in the configured zone if it names none, or a length from now."""
    now = read_clock().replace(microsecond=0)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        try:
            at = now + parse_duration(text)
        except InvalidValueError as error:
            msg = f"--until: {text!r} is neither an ISO 8601 time, such as 2026-12-31T18:00, nor a duration such as 14d"
            raise InvalidValueError(msg) from error
    if at.tzinfo is None:
        at = at.replace(tzinfo=work.config.settings.timezone)
    if at <= now:
        msg = f"--until: {text!r} is not in the future"
        raise InvalidValueError(msg)
    return at.astimezone(UTC)


def _words(held: Hold | None) -> str:
    if held is None:
        return "not held"
    return f"{held.reason}, until {held.until.isoformat(timespec='seconds')}" if held.until else held.reason


def _object(held: Hold | None) -> dict[str, str | None] | None:
    return {"reason": held.reason, "until": held.until.isoformat() if held.until else None} if held else None
