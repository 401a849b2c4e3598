"""Copies of snapshots: which files hold one, how those of a copy are called, and what is in the way."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsnapd.disks import file_stem
from kvmsnapd.model import DomainState, Kind

if TYPE_CHECKING:
    from kvmsnapd.model import Domain, Snapshot

_UNFINISHED = ".unfinished"


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """By disk target, the file that a snapshot froze, and the one that a copy of it is to be."""

    sources: dict[str, str]
    files: dict[str, str]


def plan_copy(
    domain: Domain, snapshot: Snapshot, *, name: str | None = None, folder: str | None = None, stands: bool = True
) -> CopyPlan | str:
    """Return what a copy of the snapshot's disks consists of, or why there can be none, with what to do about it.

    Args:
        name: that of the domain which the copy is for; None for files that are no domain's.
        folder: where they go to, instead of beside each disk.
        stands: whether the copy is to stand on what the snapshot froze; otherwise it is to have all the data.
    """
    problem = find_unreadable(domain, snapshot, stands=stands)
    if problem:
        return problem
    frozen, active = dict(snapshot.covers), {disk.target: disk.path or "" for disk in domain.disks}
    sources = {target: frozen[target] for target in _taking_part(domain, snapshot)}
    overlays = dict(snapshot.overlays)
    beside = {target: (active.get(target) or overlays[target]).rpartition("/")[0] for target in sources}
    # Never `<domain>.<target>.<snapshot>`, which is what an overlay is called.
    stem = _word(name) if name else f"{file_stem(domain)}.{_word(snapshot.name)}"
    files = {target: f"{(folder or beside[target]).rstrip('/')}/{stem}.{target}.qcow2" for target in sources}
    return CopyPlan(sources, files)


def _taking_part(domain: Domain, snapshot: Snapshot) -> list[str]:
    if snapshot.kind is not Kind.INTERNAL:
        return [target for target, _ in snapshot.overlays]
    covered = dict(snapshot.covers)  # what is in the domain's own images, all of them
    return [disk.target for disk in domain.disks if disk.holds_state and disk.path and covered.get(disk.target)]


def note_of(path: str) -> str:
    """Return the file that is beside a copy from before it is begun until it has its use.

    So what a copy leaves that was cut off can be told from a finished one: libvirt cannot rename a file.
    """
    return path + _UNFINISHED


def noted(path: str) -> str | None:
    """Return the copy that a file of this name is the note of, None if it is none."""
    return path.removesuffix(_UNFINISHED) if path.endswith(f".qcow2{_UNFINISHED}") else None


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]


def find_unreadable(domain: Domain, snapshot: Snapshot, *, stands: bool = True) -> str | None:
    """Return why a copy cannot have the data of this snapshot, with what to do; None if it can.

    Args:
        stands: as of :func:`plan_copy`.
    """
    if snapshot.mark and snapshot.mark.deleting:
        return (
            f"{snapshot.name} is half deleted and no way back any more; `kvmsnapd list {domain.name}` shows the others"
        )
    again = f"kvmsnapd restore {shlex.quote(domain.name)} {shlex.quote(snapshot.name)}"
    if snapshot.kind is Kind.INTERNAL:
        if domain.state is DomainState.SHUT_OFF and not domain.managed_save and not stands:
            return None
        ways = [f"go back in place (`{again}` keeps the present state)"]
        if domain.state is not DomainState.SHUT_OFF:
            ways.append(f"shut {domain.name} off for as long as it is copied")
        elif stands:
            ways.append(f"make a full copy (`{again} --as NAME`)")
        why = f"inside the image that {domain.name} writes to, where nothing beside the domain can read or stand on it"
        return f"{snapshot.name} is internal, {why}: {', or '.join(ways)}"
    frozen = dict(snapshot.covers)
    if snapshot.kind is Kind.MIXED or not snapshot.overlays:
        return f"{snapshot.name} is in parts internal, or its files are not known; it cannot be copied"
    far = [target for target, _ in snapshot.overlays if not frozen.get(target)]
    if far:
        return (
            f"{snapshot.name} has the data of {', '.join(far)} on the network, and only files and devices can be "
            f"copied; `{again}` goes back in place"
        )
    return None
