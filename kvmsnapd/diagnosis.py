"""What is wrong on this host, or would be one day: judged from values; nothing is repaired here."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvmsnapd.model import CHAIN_CEILING, DomainState, Kind
from kvmsnapd.naming import NAME_PATTERN
from kvmsnapd.preflight import chain_depth, chain_limit
from kvmsnapd.prune import BlockReason, find_branch, find_obstacle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvmsnapd.model import Capabilities, Domain, Layer, Snapshot
    from kvmsnapd.plan import Plan
    from kvmsnapd.policy import Policy

_OUR_FILE = re.compile(rf".+\.{NAME_PATTERN}\.(qcow2|mem)")
_FEW_LAYERS_LEFT = 2

_EMPTY_BYTES = 256 * 1024
"""An overlay without data takes 200 KiB; the first cluster adds 64 KiB (measured, QEMU 7.2 and 10.0)."""


class Level(StrEnum):
    """How much a finding matters."""

    PROBLEM = "problem"
    """Something is broken, or a domain is not protected."""
    WARNING = "warning"
    """Something is left over, or will be a problem."""
    NOTE = "note"
    """Good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: about whom, what it is, and the command that ends it, None where there is none to give."""

    level: Level
    subject: str
    text: str
    command: str | None = None


def explain_capabilities(capabilities: Capabilities) -> list[str]:
    """Return in words what this libvirt cannot do, or does in a way that matters."""
    said = []
    if not capabilities.external_snapshots:
        said.append(f"the {capabilities.driver} driver takes internal snapshots only")
    elif not capabilities.delete_external:
        said.append("cannot delete external snapshots: policies of kind external fill their chains and stop")
    elif not capabilities.delete_external_in_chain_offline:
        said.append("deletes some older external snapshots of a shut-off domain only when it runs again")
    if capabilities.external_snapshots and not capabilities.revert_external:
        said.append("cannot revert external snapshots (virsh snapshot-revert)")
    if not capabilities.internal_with_pflash_offline:
        said.append("takes no internal snapshots of domains with UEFI firmware")
    elif capabilities.external_snapshots:
        said.append("takes no internal snapshots of running domains with UEFI firmware, unless its NVRAM is qcow2")
    if capabilities.chain_ceiling < CHAIN_CEILING:
        said.append(f"cannot start a domain with more than about {capabilities.chain_ceiling} overlays on a disk")
    return said


def diagnose_domain(
    domain: Domain, policies: Iterable[Policy], plans: Iterable[Plan], capabilities: Capabilities
) -> Iterator[Finding]:
    """Yield what is to be said of one domain and its snapshots."""
    name, own = domain.name, [s for s in domain.snapshots if s.mark]
    if domain.state is DomainState.UNSETTLED:
        yield Finding(Level.PROBLEM, name, f"is {domain.state_detail}", _way_on(domain))
    elif domain.state is DomainState.PAUSED and own:
        text = (
            "is paused; if nobody did that, and it was shut off, libvirt was interrupted while it deleted a snapshot: "
            "power it off, and the delete is tried again"
        )
        yield Finding(Level.WARNING, name, text, f"virsh destroy {name}")
    for plan in plans:
        if plan.refusal and not plan.room:
            level = Level.WARNING if plan.refusal.reason.heals else Level.PROBLEM
            text = f"policy {plan.policy} is refused ({plan.refusal.reason}): {plan.refusal.detail}"
            yield Finding(level, name, text)
    if len({s.kind for s in domain.snapshots}) > 1:
        yield Finding(Level.PROBLEM, name, "has internal and external snapshots; going back to one may lose data")
    branch = find_branch(domain)
    if branch:
        yield Finding(Level.PROBLEM, name, f"nothing is pruned: {branch}", f"virsh snapshot-list --tree {name}")
    yield from _stray_layers(domain, own, capabilities)
    limit = min((chain_limit(policy, capabilities) for policy in policies), default=capabilities.chain_ceiling)
    depth = chain_depth(domain)
    if any(s.kind is not Kind.INTERNAL for s in domain.snapshots) and limit - depth <= _FEW_LAYERS_LEFT:
        yield Finding(Level.WARNING, name, f"its backing chain is {depth} deep, and the limit is {limit}")
    if domain.snapshots:
        text = f"has {len(domain.snapshots)} snapshot(s): libvirt refuses to migrate it and to undefine it"
        yield Finding(Level.NOTE, name, f"{text}; README.md, `A domain that moves or goes`, has the way out")


def _way_on(domain: Domain) -> str | None:
    """Return the command that ends the state, where it is safe to name one."""
    safe = ("I/O error", "did not finish")  # not while a migration goes on
    return f"virsh resume {domain.name}" if any(words in domain.state_detail for words in safe) else None


def _stray_layers(domain: Domain, own: Iterable[Snapshot], capabilities: Capabilities) -> Iterator[Finding]:
    for snapshot in own:
        obstacle = find_obstacle(domain, snapshot.name, capabilities)
        if obstacle and obstacle.reason is BlockReason.FOREIGN_LAYER:
            yield Finding(Level.PROBLEM, domain.name, f"{snapshot.name} cannot be deleted: {obstacle.detail}")


def diagnose_files(domains: Sequence[Domain], files: Mapping[str, tuple[Layer, ...]]) -> Iterator[Finding]:
    """Yield files of ours that nobody uses, and snapshots whose files are gone.

    Args:
        files: by folder, all files that libvirt knows there; a folder it cannot list is not among them.
    """
    known = {layer.path: layer for layers in files.values() for layer in layers}
    used: dict[str, str] = {}
    for domain in domains:
        recorded = {path: snapshot.name for snapshot in domain.snapshots for path in snapshot.files}
        for path in (*(p for disk in domain.disks for p in (disk.path, *disk.backing) if p), *recorded):
            for below in _chain(path, known):
                used[below] = domain.name
        for path, snapshot in recorded.items():
            if path.rpartition("/")[0] in files and path not in known:
                text = f"the file of snapshot {snapshot} is gone: {path}"
                command = f"virsh snapshot-delete --metadata {domain.name} {snapshot}"
                yield Finding(Level.PROBLEM, domain.name, text, command)
    active = {disk.path: domain for domain in domains for disk in domain.disks}
    standing = {layer.backing: path for path, layer in known.items() if layer.backing}
    for path in sorted(known):
        if _OUR_FILE.fullmatch(path.rpartition("/")[2]) and path not in used:
            yield _unused(known[path], active.get(known[path].backing or ""), standing.get(path))


def _unused(file: Layer, below: Domain | None, above: str | None) -> Finding:
    """Return what is to be said of a file of ours that libvirt does not know anybody to use.

    Args:
        below: the domain whose active layer the file stands on.
        above: a file that stands on this one.
    """
    if above:
        return Finding(Level.WARNING, file.path, f"belongs to no snapshot, but {above} stands on it: left alone")
    remove = f"rm {shlex.quote(file.path)}"
    empty = file.path.endswith(".mem") or (file.allocated is not None and file.allocated < _EMPTY_BYTES)
    if below and (not empty or below.state is not DomainState.SHUT_OFF):
        # libvirtd was killed inside a take (measured, 9.0 and 11.3: rarely): QEMU has switched to the overlay, and what
        # libvirt would start the domain from next time lacks all that was written since.
        text = (
            f"libvirt was interrupted in a take of {below.name}, whose guest may have been writing to this "
            "file ever since; libvirt does not know it. Shut the guest down, and before it is started again, merge it"
        )
        return Finding(Level.PROBLEM, file.path, text, f"qemu-img commit {shlex.quote(file.path)} && {remove}")
    if empty:
        text = "a file of ours that no domain and no snapshot uses: left by a call that was cut off"
        return Finding(Level.WARNING, file.path, text, remove)
    text = "no domain and no snapshot uses it, but it has data, maybe the last of a domain that is gone; look at it"
    return Finding(Level.WARNING, file.path, text, f"qemu-img info -U --backing-chain {shlex.quote(file.path)}")


def _chain(path: str, known: Mapping[str, Layer]) -> Iterator[str]:
    seen: set[str] = set()
    at: str | None = path
    while at and at not in seen:
        seen.add(at)
        yield at
        at = known[at].backing if at in known else None
