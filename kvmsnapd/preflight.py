"""Pre-flight: may this domain be snapshotted now, and with which request? Decided from values, before any call."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from kvmsnapd.model import Consistency, DomainState, Kind, Mark, TakeRequest
from kvmsnapd.naming import MOST_ATTEMPTS, format_name
from kvmsnapd.policy import ConsistencyRule

if TYPE_CHECKING:
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Disk, Domain
    from kvmsnapd.policy import Policy


class RefusalReason(StrEnum):
    """Why a snapshot that is due is not taken. These words are metric labels."""

    STATE = "state"
    TRANSIENT = "transient"
    MANAGED_SAVE = "managed_save"
    BLOCK_JOB = "block_job"
    MIXED_KINDS = "mixed_kinds"
    UNSUPPORTED = "unsupported"
    DISK = "disk"
    CHAIN_FULL = "chain_full"
    AGENT = "agent"
    ATTEMPTS = "attempts"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer for a domain that must not be touched: what is in the way, and what to do about it."""

    reason: RefusalReason
    detail: str


def plan_take(
    domain: Domain,
    policy: Policy,
    capabilities: Capabilities,
    *,
    slot: datetime,
    now: datetime,
    attempt: int = 1,
) -> TakeRequest | Refusal:
    """Return the complete request for this slot's snapshot, or why the domain must be left alone.

    Everything is computed from the domain's XML before the first call; nothing is tried to see whether it works.
    """
    refusal = _refuse_domain(domain, policy) or _refuse_kind(domain, policy, capabilities)
    if refusal:
        return refusal
    consistency = _consistency(domain, policy)
    if isinstance(consistency, Refusal):
        return consistency
    taken_names = {snapshot.name for snapshot in domain.snapshots}
    numbers = (*range(attempt, MOST_ATTEMPTS + 1), *range(1, attempt))
    attempt = next((n for n in numbers if format_name(policy.name, slot, n) not in taken_names), 0)
    if not attempt:
        return Refusal(RefusalReason.ATTEMPTS, f"all {MOST_ATTEMPTS} names of this slot are taken; the next is tried")
    name = format_name(policy.name, slot, attempt)
    full = _refuse_full_chain(domain, policy, capabilities)
    if full:  # the last of all: room is made for it, which nothing else may then stand in the way of
        return full
    mark = Mark(policy.name, slot, now.replace(microsecond=0), consistency, policy.kind, attempt)  # as it is written
    if policy.kind is Kind.INTERNAL:
        # CD-ROMs and read-only disks take no part by themselves; a floppy would (measured, libvirt 9.0 and 11.3).
        floppies = tuple(disk.target for disk in domain.disks if disk.device == "floppy")
        return TakeRequest(domain.uuid, domain.name, name, mark, excluded=floppies)
    overlays = tuple((d.target, overlay_path(domain, d, name)) for d in domain.disks if d.holds_state)
    excluded = tuple(disk.target for disk in domain.disks if not disk.holds_state)
    return TakeRequest(domain.uuid, domain.name, name, mark, overlays, excluded)


def overlay_path(domain: Domain, disk: Disk, snapshot_name: str) -> str:
    """Return the file that receives the disk's writes from this snapshot on, beside the layer it covers.

    Explicit and with the target in it, since libvirt's own choice collides for two disks with one stem, and is
    refused for block devices.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", domain.name)[:100]
    if stem != domain.name:  # or two domains could be spelled alike
        stem = f"{stem}-{domain.uuid[:8]}"
    return str(PurePosixPath(disk.path or "").with_name(f"{stem}.{disk.target}.{snapshot_name}.qcow2"))


def chain_depth(domain: Domain) -> int:
    """Return how many overlays the deepest backing chain of the domain has, foreign ones included.

    A shut-off domain's XML need not list its backing chain, so its external snapshots count as well.
    """
    external = sum(snapshot.kind is not Kind.INTERNAL for snapshot in domain.snapshots)
    return max([external, *(len(disk.backing) for disk in domain.disks if disk.holds_state)])


def chain_limit(policy: Policy, capabilities: Capabilities) -> int:
    """Return the depth at which no further overlay may be put on a chain."""
    return min(policy.max_chain_depth, capabilities.chain_ceiling)


def _refuse_domain(domain: Domain, policy: Policy) -> Refusal | None:
    """Refuse for what the domain is doing, whatever kind of snapshot is wanted."""
    if domain.state is DomainState.UNSETTLED:
        return Refusal(
            RefusalReason.STATE,
            f"the domain is {domain.state_detail}; start it, resume it or shut it down, then it is snapshotted again",
        )
    if not domain.persistent:
        return Refusal(
            RefusalReason.TRANSIENT,
            "the domain is transient: when it ends libvirt forgets its snapshots and the next start would use the old "
            f"disks; make it persistent (virsh dumpxml {domain.name} >x.xml; virsh define x.xml)",
        )
    if domain.managed_save:
        return Refusal(
            RefusalReason.MANAGED_SAVE,
            "the domain has a managed-save image: its next start would write into files that a snapshot freezes; "
            f"start it (virsh start {domain.name}) or drop the image (virsh managedsave-remove {domain.name})",
        )
    busy = [disk.target for disk in domain.disks if disk.block_job]
    if busy:
        return Refusal(RefusalReason.BLOCK_JOB, f"a block job runs on {', '.join(busy)}; waiting for it to end")
    other = [s.name for s in domain.snapshots if s.kind is not policy.kind]
    if other:
        return Refusal(
            RefusalReason.MIXED_KINDS,
            f"the domain has {len(other)} snapshot(s) that are not {policy.kind} (such as {other[0]!r}), and mixing "
            "kinds loses data; delete them, or give the domain a policy of the kind it has",
        )
    return None


def _refuse_full_chain(domain: Domain, policy: Policy, capabilities: Capabilities) -> Refusal | None:
    depth, limit = chain_depth(domain), chain_limit(policy, capabilities)
    if policy.kind is not Kind.EXTERNAL or depth < limit:
        return None
    return Refusal(
        RefusalReason.CHAIN_FULL,
        f"the backing chain is {depth} deep and the limit is {limit}, and no snapshot can go now; "
        "keep fewer snapshots, or delete some by hand (virsh snapshot-delete)",
    )


def _refuse_kind(domain: Domain, policy: Policy, capabilities: Capabilities) -> Refusal | None:
    """Refuse for what the wanted kind cannot do with these disks on this libvirt."""
    state_disks = [disk for disk in domain.disks if disk.holds_state]
    if not state_disks:
        return Refusal(RefusalReason.DISK, "the domain has no writable disk, so there is nothing to snapshot")
    if policy.kind is Kind.EXTERNAL:
        if not capabilities.external_snapshots:
            return Refusal(
                RefusalReason.UNSUPPORTED,
                f"libvirt's {capabilities.driver} driver has no external snapshots; set kind: internal in the policy",
            )
        faults = [(disk, _external_fault(disk)) for disk in state_disks]
    else:
        if domain.pflash and not (capabilities.internal_with_pflash_offline and domain.state is DomainState.SHUT_OFF):
            return Refusal(
                RefusalReason.UNSUPPORTED,
                f"libvirt {capabilities.version} takes no internal snapshot of a {domain.state} domain with UEFI "
                "firmware; set kind: external in the policy",
            )
        # libvirt takes internal snapshots of all writable disks or none.
        left_out = [disk for disk in domain.disks if disk.left_out and not disk.readonly]
        faults = [(disk, _internal_fault(disk, capabilities)) for disk in (*state_disks, *left_out)]
    unfit = [f"{disk.target} {fault}" for disk, fault in faults if fault]
    if unfit:
        return Refusal(RefusalReason.DISK, f"{'; '.join(unfit)}; no {policy.kind} snapshot can hold it")
    return None


def _external_fault(disk: Disk) -> str | None:
    if disk.transient:
        return "is transient"
    if disk.shareable:
        return "is shared with other domains"
    if disk.source_type != "file" or not disk.path:
        return f"is of type {disk.source_type}, not a file"
    return None


def _internal_fault(disk: Disk, capabilities: Capabilities) -> str | None:
    if disk.transient:
        return "is transient"
    if disk.left_out:
        return "is left out by snapshot='no' in the domain's XML"
    if disk.format != "qcow2" and capabilities.internal_needs_qcow2:
        return f"has format {disk.format}, not qcow2"
    return None


def _consistency(domain: Domain, policy: Policy) -> Consistency | Refusal:
    """Return the consistency the snapshot will have, or refuse if the policy demands a better one."""
    if domain.state is DomainState.SHUT_OFF:
        return Consistency.OFFLINE
    if policy.kind is Kind.INTERNAL:
        return Consistency.MEMORY
    if policy.consistency is ConsistencyRule.CRASH:
        return Consistency.CRASH
    if domain.state is DomainState.RUNNING and domain.agent_connected:
        return Consistency.FILESYSTEM
    if policy.consistency is ConsistencyRule.FILESYSTEM_PREFERRED:
        return Consistency.CRASH
    missing = "is paused" if domain.state is DomainState.PAUSED else "has no guest agent connected"
    return Refusal(
        RefusalReason.AGENT,
        f"policy {policy.name} requires consistency: filesystem and the domain {missing}; start qemu-guest-agent "
        "in the guest, or set consistency: filesystem-preferred",
    )
