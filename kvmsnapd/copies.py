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
    domain: Domain, snapshot: Snapshot, *, name: str | None = None, folder: str | None = None
) -> CopyPlan | str:
    """Return what a copy of the snapshot's disks consists of, or why there can be none, with what to do about it.

    Args:
        name: that of the domain which the copy is for; None for files that are no domain's.
        folder: where they go to, instead of beside each disk.
    """
    problem = find_unreadable(domain, snapshot)
    if problem:
        return problem
    frozen, active = dict(snapshot.covers), {disk.target: disk.path or "" for disk in domain.disks}
    sources = {target: frozen[target] for target, _ in snapshot.overlays}
    beside = {target: (active.get(target) or overlay).rpartition("/")[0] for target, overlay in snapshot.overlays}
    # Without the snapshot's name: `<domain>.<target>.<snapshot>` is what an overlay of that domain is called.
    stem, label = (_word(name), "") if name else (file_stem(domain), f".{_word(snapshot.name)}")
    files = {t: f"{(folder or beside[t]).rstrip('/')}/{stem}.{t}{label}.qcow2" for t in sources}
    return CopyPlan(sources, files)


def note_of(path: str) -> str:
    """Return the empty file that is beside a copy from before it is begun until it has its use.

    So what a copy leaves that was cut off can be told from a finished one: libvirt cannot rename a file.
    """
    return path + _UNFINISHED


def noted(path: str) -> str | None:
    """Return the copy that a file of this name is the note of, None if it is none."""
    return path.removesuffix(_UNFINISHED) if path.endswith(f".qcow2{_UNFINISHED}") else None


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]


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
    frozen = dict(snapshot.covers)
    if snapshot.kind is Kind.MIXED or not snapshot.overlays:
        return f"{snapshot.name} is in parts internal, or its files are not known; it cannot be copied"
    remote = [target for target, _ in snapshot.overlays if not frozen.get(target)]
    return _not_in_files(domain, snapshot, remote) if remote else None


def find_not_in_files(domain: Domain, snapshot: Snapshot, plan: CopyPlan) -> str | None:
    """Return why full copies cannot be made, though overlays could stand on it; None if they can."""
    devices = [t for t, path in plan.sources.items() if not path.startswith("/") or path.startswith("/dev/")]
    return _not_in_files(domain, snapshot, devices) if devices else None


def _not_in_files(domain: Domain, snapshot: Snapshot, targets: list[str]) -> str:
    return (
        f"{snapshot.name} has the data of {', '.join(targets)} in a block device, a pool or on the network, and only "
        f"files can be copied; `kvmsnapd restore {shlex.quote(domain.name)} {shlex.quote(snapshot.name)}` goes back in "
        "place"
    )
