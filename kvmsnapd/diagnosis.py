"""What is wrong on this host, or would be one day: judged from values; nothing is repaired here."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvmsnapd.copies import note_of, noted
from kvmsnapd.disks import file_stem
from kvmsnapd.model import CHAIN_CEILING, DomainState, Kind
from kvmsnapd.naming import DRILL_NAME, NAME_PATTERN
from kvmsnapd.preflight import chain_depth, chain_limit, find_restoring
from kvmsnapd.prune import BlockReason, find_branch, find_obstacle
from kvmsnapd.refusal import RefusalReason
from kvmsnapd.restore import files_on_the_way

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from kvmsnapd.model import Capabilities, Domain, Layer, Snapshot
    from kvmsnapd.plan import Plan
    from kvmsnapd.policy import Policy

_OUR_FILE = re.compile(rf".+\.{NAME_PATTERN}\.(qcow2|mem)")
_AFTER_STEM = (re.compile(rf"\.[^.]+\.{NAME_PATTERN}\.qcow2"), re.compile(rf"\.{NAME_PATTERN}\.mem"))
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
    if name.startswith(DRILL_NAME) and domain.state is DomainState.SHUT_OFF:
        text = "left of a copy of an internal snapshot that was cut off; it has nothing of its own"
        command = f"virsh undefine {name} --snapshots-metadata"
        yield Finding(Level.WARNING, name, text, command)
        return
    yield from _standstill(domain)
    refusals = _refusals(domain, plans)
    for (reason, detail), refused in refusals.items():
        subject = f"policy {refused[0]} is" if len(refused) == 1 else f"policies {', '.join(refused)} are"
        level = Level.WARNING if reason.heals else Level.PROBLEM
        yield Finding(level, name, f"{subject} refused ({reason}): {detail}")
    told = {reason for reason, _ in refusals}
    if len({s.kind for s in domain.snapshots}) > 1 and RefusalReason.MIXED_KINDS not in told:
        yield Finding(Level.PROBLEM, name, "has internal and external snapshots; going back to one may lose data")
    newer = sum(s.newer for s in domain.snapshots)
    if newer:
        text = f"{newer} snapshot(s) were made by a newer kvmsnapd: this one neither counts nor prunes them"
        yield Finding(Level.PROBLEM, name, f"{text}; install the newer one again")
    branch = find_branch(domain)
    if branch:
        command = f"virsh snapshot-list --tree {shlex.quote(name)}"
        yield Finding(Level.PROBLEM, name, f"nothing is pruned: {branch}", command)
    yield from _half_deleted(domain)
    yield from _half_restored(domain)
    yield from _stray_layers(domain, own, capabilities)
    limit = min((chain_limit(policy, capabilities) for policy in policies), default=capabilities.chain_ceiling)
    depth, external = chain_depth(domain), any(s.kind is not Kind.INTERNAL for s in domain.snapshots)
    if external and limit - depth <= _FEW_LAYERS_LEFT and RefusalReason.CHAIN_FULL not in told:
        yield Finding(Level.WARNING, name, f"its backing chain is {depth} deep, and the limit is {limit}")
    if domain.snapshots:
        text = f"has {len(domain.snapshots)} snapshot(s): libvirt refuses to migrate it and to undefine it"
        yield Finding(Level.NOTE, name, f"{text}; `kvmsnapd forget` takes ours away")


def _half_deleted(domain: Domain) -> Iterator[Finding]:
    for snapshot in domain.snapshots:
        deleting = snapshot.mark.deleting if snapshot.mark else None
        if deleting and deleting.failed_in is not None and deleting.failed_in == domain.run_id:
            text = (
                f"the merge of {snapshot.name} failed in this run of the guest, and a power cut could lose what is "
                "merged now, so nothing is: shut the guest down and start it again, a reboot is not enough"
            )
            yield Finding(Level.PROBLEM, domain.name, text, f"virsh shutdown {shlex.quote(domain.name)}")
        elif deleting:
            text = f"the delete of {snapshot.name} was cut off: do not go back to it, it goes with the next run"
            yield Finding(Level.WARNING, domain.name, text, f"kvmsnapd prune {shlex.quote(domain.name)}")


def _half_restored(domain: Domain) -> Iterator[Finding]:
    target = find_restoring(domain)
    if target:
        again = f"kvmsnapd restore {shlex.quote(domain.name)} {target.name}"
        text = (
            f"a restore to {target.name} was cut off; nothing is taken or pruned until `{again}` has finished it, or, "
            "where the domain has not gone back yet, `--abandon` added to it has taken it back"
        )
        yield Finding(Level.PROBLEM, domain.name, text, again)


def _standstill(domain: Domain) -> Iterator[Finding]:
    name = domain.name
    if domain.state is DomainState.UNSETTLED and domain.busy:
        yield Finding(Level.NOTE, name, "stands still while libvirt works on it; look again")
    elif domain.state is DomainState.UNSETTLED:
        command = f"virsh resume {shlex.quote(name)}" if domain.resumable else None
        yield Finding(Level.PROBLEM, name, f"is {domain.state_detail}", command)
    elif domain.state is DomainState.PAUSED and any(s.mark for s in domain.snapshots):
        text = (
            "is paused. Either somebody did that, and `virsh resume` lets it go on; or it was shut off, libvirt was "
            "interrupted while it deleted a snapshot, and only the QEMU that merged is left. Never resume that one: "
            "once it is powered off the delete is tried again. The command says why it is paused"
        )
        yield Finding(Level.WARNING, name, text, f"virsh domstate --reason {shlex.quote(name)}")


def _refusals(domain: Domain, plans: Iterable[Plan]) -> dict[tuple[RefusalReason, str], list[str]]:
    """Return the policies that are refused, by why; the state of a domain that stands still is told already."""
    found: dict[tuple[RefusalReason, str], list[str]] = defaultdict(list)
    still = domain.state is DomainState.UNSETTLED
    for plan in plans:
        if plan.refusal and not plan.room and not (still and plan.refusal.reason is RefusalReason.STATE):
            found[plan.refusal.reason, plan.refusal.detail].append(plan.policy)
    return found


def _stray_layers(domain: Domain, own: Iterable[Snapshot], capabilities: Capabilities) -> Iterator[Finding]:
    for snapshot in own:
        obstacle = find_obstacle(domain, snapshot.name, capabilities)
        if obstacle and obstacle.reason is BlockReason.FOREIGN_LAYER:
            command = _merge_strays(domain, snapshot)
            hint = "; if no backup program is at work on it, merge that layer; its file can go then" if command else ""
            text = f"{snapshot.name} cannot be deleted: {obstacle.detail}{hint}"
            yield Finding(Level.PROBLEM, domain.name, text, command)


def _merge_strays(domain: Domain, snapshot: Snapshot) -> str | None:
    """Return the command that makes the snapshot's overlay the active layer of a disk again.

    With top and base named: without a base all would be merged down to the first image, snapshots included (virsh(1)),
    and when the layers are no longer these libvirt refuses (measured, 9.0 and 11.3).
    """
    if domain.state not in {DomainState.RUNNING, DomainState.PAUSED}:
        return None
    known = {path for other in domain.snapshots for _, path in other.overlays}
    for disk in domain.disks:
        layers, base = (disk.path or "", *disk.backing), dict(snapshot.overlays).get(disk.target)
        if base in layers[1:] and not disk.block_job and known.isdisjoint(layers[: layers.index(base)]):
            words = ["virsh", "blockcommit", domain.name, disk.target, "--top", layers[0], "--base", base]
            return shlex.join([*words, "--active", "--pivot", "--wait"])
    return None


def diagnose_files(
    domains: Sequence[Domain],
    files: Mapping[str, tuple[Layer, ...]],
    is_made: Callable[[str], bool] = lambda _path: False,
) -> Iterator[Finding]:
    """Yield files of ours that nobody uses, and snapshots whose files are gone.

    Args:
        domains: all that this libvirt has; a file of one that is not among them would look unused.
        files: by folder, all files that libvirt knows there; a folder it cannot list is not among them.
        is_made: tells whether a copy is being made at this path now.
    """
    known = {layer.path: layer for layers in files.values() for layer in layers}
    used: set[str] = set()
    uncertain: set[str] = set()
    for domain in domains:
        chains = {below for path in _layers(domain) for below in _chain(path, known)}
        used |= chains | {s.memory_file for s in domain.snapshots if s.memory_file}
        if any(path.startswith("/") and _folder(path) not in {*files, "/dev"} for path in chains):
            uncertain.add(domain.uuid)
        yield from _gone(domain, known, files)
    # By name as well: a folder may have two names, by a symbolic link or a mount.
    used_names = {_name(path) for path in used}
    active = {disk.path: domain for domain in domains for disk in domain.disks}
    standing = {layer.backing: path for path, layer in known.items() if layer.backing}
    unfinished = {copy for copy in map(noted, known) if copy}
    restored = {path for domain in domains for path in files_on_the_way(domain)}
    yield from (_cut_off(at, known, used_names) for at in sorted(unfinished - restored) if not is_made(at))
    for path in sorted(known.keys() - unfinished):
        if not _is_ours(_name(path)) or _name(path) in used_names:
            continue
        owner = next((domain for domain in domains if _has_stem(path, file_stem(domain))), None)
        if owner and (owner.busy or path in files_on_the_way(owner)):
            continue  # it may just be made; of a restore that was cut off more is said of the domain
        if standing.get(path):
            yield Finding(Level.WARNING, path, f"belongs to no snapshot, but {standing[path]} stands on it: left alone")
            continue
        below = active.get(known[path].backing or "")
        if owner and not below and _name(known[path].backing or "") in {_name(d.path or "/") for d in owner.disks}:
            below = owner
        yield _unused(known[path], owner, below, certain=owner is not None and owner.uuid not in uncertain)


def _is_ours(name: str) -> bool:
    return bool(_OUR_FILE.fullmatch(name)) or name.startswith(DRILL_NAME)


def _cut_off(path: str, known: Collection[str], used_names: Collection[str]) -> Finding:
    """Return what is to be said of a copy that has a note which says that it is unfinished."""
    note = note_of(path)
    if _name(path) in used_names:
        text = f"{path} is a disk in use, and whole; only the note that it was being made is left"
        return Finding(Level.WARNING, note, text, f"rm {shlex.quote(note)}")
    if path not in known:
        return Finding(
            Level.WARNING, note, "left of a copy that was cut off before it began", f"rm {shlex.quote(note)}"
        )
    text = "left of a copy that was cut off: no domain uses it, and the same command makes it anew"
    return Finding(Level.WARNING, path, text, f"rm {shlex.quote(path)} {shlex.quote(note)}")


def _unused(file: Layer, owner: Domain | None, below: Domain | None, *, certain: bool) -> Finding:
    """Return what is to be said of a file of ours that libvirt does not know anybody to use.

    Args:
        owner: the domain that its name stands for.
        below: the domain whose active layer the file stands on.
        certain: whether all that this domain stands on is known.
    """
    remove = f"rm {shlex.quote(file.path)}"
    if _name(file.path).startswith(DRILL_NAME):
        return Finding(Level.WARNING, file.path, "an overlay that a restore drill left which was cut off", remove)
    empty = file.allocated is not None and file.allocated < _EMPTY_BYTES
    runs = below is not None and below.state is not DomainState.SHUT_OFF and owner in {None, below}
    if below and (runs or (owner is below and not empty)):
        # libvirtd was killed inside a take (measured, 9.0 and 11.3: rarely): QEMU has switched to the overlay, and what
        # libvirt would start the domain from next time lacks all that was written since.
        text = (
            f"libvirt was interrupted in a take of {below.name}, whose guest may have been writing to this "
            "file ever since; libvirt does not know it. Shut the guest down, and before it is started again, merge it"
        )
        return Finding(Level.PROBLEM, file.path, text, f"qemu-img commit {shlex.quote(file.path)} && {remove}")
    if owner and file.path.endswith(".mem"):
        text = f"the RAM of a snapshot of {owner.name} that is no more: no domain and no snapshot uses it"
        return Finding(Level.WARNING, file.path, text, remove)
    if certain and empty and file.backing and below in {None, owner}:
        text = f"an empty overlay that no domain and no snapshot uses: left by a take of {owner and owner.name}"
        return Finding(Level.WARNING, file.path, f"{text} that was cut off", remove)
    text = (
        "no domain of this libvirt uses it; it may be the disk of an undefined domain or of another host, or a copy "
        f"that was cut off. If nobody needs it: {remove}"
    )
    return Finding(Level.WARNING, file.path, text, f"qemu-img info -U --backing-chain {shlex.quote(file.path)}")


def _gone(domain: Domain, known: Mapping[str, Layer], files: Mapping[str, object]) -> Iterator[Finding]:
    """Yield the files of the domain and its snapshots that should be there and are not.

    A snapshot's data is in what it covers; its overlay holds what came after. libvirt itself removes an overlay when a
    revert leaves its branch (measured, 11.3).
    """

    def gone(path: str) -> bool:
        return path.startswith("/") and _folder(path) in files and path not in known

    disks = [disk for disk in domain.disks if disk.holds_state]
    chain = {at for disk in disks for path in (disk.path, *disk.backing) if path for at in _chain(path, known)}
    lost: dict[str, list[str]] = defaultdict(list)
    for snapshot in domain.snapshots:
        for path in filter(gone, _frozen_files(domain, snapshot)):
            lost[path].append(snapshot.name)
    held = {path: s.name for s in domain.snapshots for _, path in s.overlays if path in chain and gone(path)}
    needed = "the domain cannot start without it"
    if domain.state is not DomainState.SHUT_OFF:
        needed += "; do not end its QEMU, which may still have it open, before its disks are copied"
    for path, names in lost.items():
        text = f"the data of snapshot {', '.join(names)} is gone: there is no {path}"
        yield Finding(Level.PROBLEM, domain.name, f"{text}; {needed}" if path in chain else text)
    for path in held.keys() - lost.keys():
        text = f"{path} is gone, which held what was written since snapshot {held[path]}; {needed}"
        yield Finding(Level.PROBLEM, domain.name, text)
    for snapshot in domain.snapshots:
        if snapshot.memory_file and gone(snapshot.memory_file):
            text = f"the RAM of {snapshot.name} is gone, its disks are whole: there is no {snapshot.memory_file}"
            yield Finding(Level.WARNING, domain.name, text)


def _frozen_files(domain: Domain, snapshot: Snapshot) -> Iterator[str]:
    """Yield the files that hold the snapshot's data."""
    covered = {target for target, _ in snapshot.overlays}
    if snapshot.kind is not Kind.EXTERNAL:
        covered |= {disk.target for disk in domain.disks if disk.holds_state}
    yield from (path for target, path in snapshot.covers if target in covered)


def paths_of(domain: Domain) -> Iterator[str]:
    """Yield all files that the domain and its snapshots are known to need."""
    yield from _layers(domain)
    yield from (s.memory_file for s in domain.snapshots if s.memory_file)


def _layers(domain: Domain) -> Iterator[str]:
    disks = {disk.target: disk for disk in domain.disks if disk.device in {"disk", "lun"}}
    for disk in disks.values():
        yield from (path for path in (disk.path, *disk.backing) if path)
    for snapshot in domain.snapshots:
        yield from (path for _, path in snapshot.overlays)
        yield from (path for target, path in snapshot.covers if target in {*disks, *dict(snapshot.overlays)})


def _has_stem(path: str, stem: str) -> bool:
    name = _name(path)
    return name.startswith(f"{stem}.") and any(rest.fullmatch(name, len(stem)) for rest in _AFTER_STEM)


def _folder(path: str) -> str:
    folder = path.rpartition("/")[0]
    return "/dev" if folder.startswith("/dev/") else folder


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _chain(path: str, known: Mapping[str, Layer]) -> Iterator[str]:
    seen: set[str] = set()
    at: str | None = path
    while at and at not in seen:
        seen.add(at)
        yield at
        at = known[at].backing if at in known else None
