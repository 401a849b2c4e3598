"""Names and descriptions of our snapshots, and the one answer to "is this snapshot ours?".

A name is a function of policy and slot, ``kvmsnapd-standard-20261122T090000Z``, so that "is this slot done?" is a
look at the names and a crash or retry takes nothing twice. The description carries one line of JSON. A snapshot is
ours when its name parses *and* its description says the same; everything else is foreign.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

from kvmsnapd.errors import InvalidValueError, shown
from kvmsnapd.model import Consistency, Deleting, Drill, Hold, Kind, Mark, Restoring, Unchanged

FORMAT_VERSION = 1
_KEYS = frozenset(
    [
        "kvmsnapd",
        "policy",
        "scheduled",
        "taken",
        "consistency",
        "kind",
        "excluded",
        "unchanged",
        "deleting",
        "owed",
        "hold",
        "standalone",
        "linked",
        "restoring",
        "drill",
    ]
)
MOST_ATTEMPTS = 99
POLICY_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$"
"""Policy names, short enough for a snapshot name of at most 64 characters.

libvirt 10.9 and later build a QEMU job id from the snapshot's name and refuse anything outside ``[A-Za-z0-9._-]``
(measured with 11.3: "Invalid job ID"), so names with ``:`` or spaces are out.
"""

DRILL_NAME = "kvmsnapd-drill-"
"""What the names of throw-away domains, and of their files, begin with."""

NAME_PATTERN = (
    r"kvmsnapd-(?P<policy>[A-Za-z0-9][A-Za-z0-9._-]{0,31})-(?P<slot>[0-9]{8}T[0-9]{6}Z)"
    r"(?:-(?P<attempt>[1-9][0-9]?))?"
)
"""A snapshot's name, not anchored: our files carry it as well."""

_NAME = re.compile(NAME_PATTERN)
_SLOT = "%Y%m%dT%H%M%SZ"


def is_policy_name(name: str) -> bool:
    """Tell whether ``name`` can be a policy's name."""
    return bool(re.fullmatch(POLICY_NAME_PATTERN, name, re.ASCII))


def check_policy_name(name: str) -> str:
    """Return ``name`` unchanged if it can be a policy's name; raise InvalidValueError if it cannot."""
    if not is_policy_name(name):
        allowed = "use 1 to 32 letters, digits, '.', '_' or '-', the first a letter or digit"
        msg = f"{shown(name)} cannot name a policy: {allowed}"
        raise InvalidValueError(msg)
    return name


def format_name(policy: str, scheduled_at: datetime, attempt: int = 1) -> str:
    """Return the snapshot name of this policy and slot; ``attempt`` above 1 is appended."""
    slot = scheduled_at.astimezone(UTC)
    # strftime does not pad years below 1000; the format must.
    stamp = f"{slot.year:04d}{slot:%m%dT%H%M%SZ}"
    return f"kvmsnapd-{policy}-{stamp}" + (f"-{attempt}" if attempt > 1 else "")


def parse_name(name: str) -> tuple[str, datetime, int] | None:
    """Return policy, slot and attempt of a name in our form; None for any other."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    try:
        slot = datetime.strptime(match["slot"], _SLOT).replace(tzinfo=UTC)
    except ValueError:
        return None
    attempt = int(match["attempt"] or 1)
    parsed = (match["policy"], slot, attempt)
    return parsed if format_name(*parsed) == name else None


def _time(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def format_description(mark: Mark) -> str:
    """Return the one line of JSON that goes into the snapshot's description."""
    fields: dict[str, object] = {
        "kvmsnapd": FORMAT_VERSION,
        "policy": mark.policy,
        "scheduled": _time(mark.scheduled_at),
        "taken": _time(mark.taken_at),
        "consistency": mark.consistency.value,
        "kind": mark.kind.value,
    }
    if mark.excluded:
        fields["excluded"] = list(mark.excluded)
    if mark.unchanged:
        seen = mark.unchanged
        fields["unchanged"] = {"scheduled": _time(seen.scheduled_at), "seen": _time(seen.seen_at)}
    if mark.deleting:
        failed = {"failed_in": mark.deleting.failed_in} if mark.deleting.failed_in is not None else {}
        fields["deleting"] = {"begun": _time(mark.deleting.begun_at)} | failed
    if mark.owed:
        fields["owed"] = mark.owed
    if mark.hold:
        fields["hold"] = {"reason": mark.hold.reason} | ({"until": _time(mark.hold.until)} if mark.hold.until else {})
    if mark.standalone:
        fields["standalone"] = True
    if mark.linked:
        fields["linked"] = list(mark.linked)
    if mark.restoring:
        begun = mark.restoring
        fields["restoring"] = {"begun": _time(begun.begun_at), "leaves": list(begun.leaves), "ran": begun.ran}
    if mark.drill:
        failure = {"failure": mark.drill.failure} if mark.drill.failure is not None else {}
        verified = {"verified": _time(mark.drill.verified_at)} if mark.drill.verified_at else {}
        fields["drill"] = {"ended": _time(mark.drill.ended_at)} | failure | verified
    return json.dumps(fields)


def parse_mark(name: str, description: str) -> Mark | None:
    """Return what we wrote about a snapshot of ours; None when name or description say that it is foreign.

    One of a newer kvmsnapd, which has another format version or more keys, counts as foreign: what is not understood,
    such as who needs the snapshot, must not be deleted or written anew. See :func:`is_newer`.
    """
    named = parse_name(name)
    if named is None:
        return None
    policy, scheduled_at, attempt = named
    try:
        fields = json.loads(description)
        if fields["kvmsnapd"] != FORMAT_VERSION or fields["policy"] != policy or fields.keys() - _KEYS:
            return None
        if datetime.fromisoformat(fields["scheduled"]) != scheduled_at:
            return None
        hold, unchanged, deleting = (fields.get(key) for key in ("hold", "unchanged", "deleting"))
        restoring, drill = fields.get("restoring"), fields.get("drill")
        return Mark(
            policy=policy,
            scheduled_at=scheduled_at,
            attempt=attempt,
            taken_at=_aware(fields["taken"]),
            consistency=Consistency(fields["consistency"]),
            kind=Kind(fields["kind"]),
            hold=Hold(str(hold["reason"]), _aware(hold["until"]) if "until" in hold else None) if hold else None,
            excluded=tuple(map(str, fields.get("excluded", ()))),
            deleting=Deleting(_aware(deleting["begun"]), deleting.get("failed_in")) if deleting else None,
            owed=int(fields.get("owed", 0)),
            unchanged=Unchanged(_aware(unchanged["scheduled"]), _aware(unchanged["seen"])) if unchanged else None,
            standalone=bool(fields.get("standalone", False)),
            linked=tuple(map(str, fields.get("linked", ()))),
            restoring=_parse_restoring(restoring) if restoring else None,
            drill=_parse_drill(drill) if drill else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def is_newer(name: str, description: str) -> bool:
    """Tell whether a newer kvmsnapd wrote this; see :func:`parse_mark`."""
    try:
        fields = json.loads(description)
        version = int(fields["kvmsnapd"])
        return parse_name(name) is not None and (version > FORMAT_VERSION or bool(fields.keys() - _KEYS))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False


def _parse_restoring(fields: dict[str, Any]) -> Restoring:
    return Restoring(_aware(fields["begun"]), tuple(map(str, fields["leaves"])), bool(fields.get("ran", False)))


def _parse_drill(fields: dict[str, Any]) -> Drill:
    verified = fields.get("verified")
    return Drill(_aware(fields["ended"]), fields.get("failure"), _aware(verified) if verified else None)


def _aware(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        msg = "time without zone"
        raise ValueError(msg)
    return at.astimezone(UTC)
