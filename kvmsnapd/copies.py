"""Copies of snapshots: which files hold one, how those of a copy are called, and what is in the way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmsnapd.disks import file_stem
from kvmsnapd.model import DomainState, Kind

if TYPE_CHECKING:
    from kvmsnapd.model import Domain, Snapshot


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """By disk target, the file that a snapshot froze, and the one that a copy of it is to be."""

    sources: dict[str, str]
    files: dict[str, str]


def plan_copy(
    domain: Domain, snapshot: Snapshot, *, name: str | None = None, folder: str | None = None
) -> CopyPlan | str:
    """Return what a copy of the snapshot's disks consists of, or why there can be none, with what to do about it.

    Args:
        name: what the files are called after, instead of the domain.
        folder: where they go to, instead of beside each disk.
    """
    problem = find_unreadable(domain, snapshot)
    if problem:
        return problem
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100] if name else file_stem(domain)
    label = f".{snapshot.name}" if snapshot.mark else ""
    taking_part, active = dict(snapshot.overlays), {disk.target: disk.path or "" for disk in domain.disks}
    sources = {target: path for target, path in snapshot.covers if target in taking_part and path}
    beside = {target: (active.get(target) or taking_part[target]).rpartition("/")[0] for target in sources}
    files = {t: f"{(folder or beside[t]).rstrip('/')}/{stem}.{t}{label}.qcow2" for t in sources}
    return CopyPlan(sources, files)


def find_unreadable(domain: Domain, snapshot: Snapshot) -> str | None:
    """Return why the data of this snapshot cannot be read beside its domain, with what to do; None if it can."""
    if snapshot.mark and snapshot.mark.deleting:
        return (
            f"{snapshot.name} is half deleted and no way back any more; `kvmsnapd list {domain.name}` shows the others"
        )
    if snapshot.kind is Kind.INTERNAL:
        beside = "" if domain.state is DomainState.SHUT_OFF else " while it runs"
        return (
            f"{snapshot.name} is internal, inside the image that {domain.name} writes to, and libvirt gives nobody its "
            f"data beside the domain{beside}: go back in place (`kvmsnapd restore {domain.name} {snapshot.name}` keeps "
            "the present state), or use kind: external for the snapshots to come"
        )
    if snapshot.kind is Kind.MIXED or not any(path for _, path in snapshot.covers):
        return f"{snapshot.name} is in parts internal, or its files are not known; it cannot be copied"
    return None
