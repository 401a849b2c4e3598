"""Pre-flight: may this domain be snapshotted now, and with which request? Decided from values, before any call."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvmsnapd.disks import cover_disks, data_folders, memory_path, overlay_path
from kvmsnapd.durations import format_duration
from kvmsnapd.model import Consistency, DomainState, Kind, Mark, Storage, TakeRequest
from kvmsnapd.naming import MOST_ATTEMPTS, format_name
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.refusal import Refusal, RefusalReason

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from kvmsnapd.model import Capabilities, Domain, Inventory, Snapshot
    from kvmsnapd.policy import Policy

_RAM_BYTES_PER_SECOND = 250e6
"""How fast QEMU writes the RAM of a guest that stands still: the lower end of what was measured (250-500 MB/s)."""

_RAM_MARGIN = 1.1


def plan_take(
    domain: Domain,
    policy: Policy,
    capabilities: Capabilities,
    *,
    slot: datetime,
    now: datetime,
    attempt: int = 1,
    storage: Storage | None = None,
    policies: Sequence[Policy] = (),
) -> TakeRequest | Refusal:
    """Return the complete request for this slot's snapshot, or why the domain must be left alone.

    Everything is computed from the domain's XML before the first call; nothing is tried to see whether it works.

    Args:
        storage: what is known of the storage below the domain; what is not known refuses nothing.
        policies: all policies of the domain, which share one backing chain; by default this one alone.
    """
    refusal = _refuse_domain(domain, policy) or _refuse_budget(policies or (policy,), capabilities)
    if refusal:
        return refusal
    cover = cover_disks(domain, policy, capabilities)
    if isinstance(cover, Refusal):
        return cover
    consistency = _consistency(domain, policy)
    if isinstance(consistency, Refusal):
        return consistency
    taken_names = {snapshot.name for snapshot in domain.snapshots}
    numbers = (*range(attempt, MOST_ATTEMPTS + 1), *range(1, attempt))
    attempt = next((n for n in numbers if format_name(policy.name, slot, n) not in taken_names), 0)
    if not attempt:
        return Refusal(RefusalReason.ATTEMPTS, f"all {MOST_ATTEMPTS} names of this slot are taken; the next is tried")
    short = _refuse_pause(domain, policy, consistency, capabilities) or _refuse_space(
        domain, policy, consistency, storage
    )
    if short:
        return short
    full = _refuse_full_chain(domain, policy, capabilities)
    if full:  # the last of all: room is made for it, which nothing else may then stand in the way of
        return full
    name = format_name(policy.name, slot, attempt)
    mark = Mark(
        policy=policy.name,
        scheduled_at=slot,
        taken_at=now.replace(microsecond=0),  # as it is written
        consistency=consistency,
        kind=policy.kind,
        attempt=attempt,
        excluded=cover.left_out_by_policy,
    )
    if policy.kind is Kind.INTERNAL:
        return TakeRequest(domain.uuid, domain.name, name, mark, excluded=cover.excluded)
    overlays = tuple((disk.target, overlay_path(domain, disk, policy, name)) for disk in cover.disks)
    memory = memory_path(domain, cover.disks[0], policy, name) if consistency is Consistency.MEMORY else None
    return TakeRequest(
        domain_uuid=domain.uuid,
        domain_name=domain.name,
        name=name,
        mark=mark,
        overlays=overlays,
        excluded=cover.excluded,
        memory_file=memory,
        max_pause_seconds=policy.max_pause.total_seconds(),
        min_free_bytes=policy.min_free_bytes,
    )


def in_chain(snapshot: Snapshot) -> bool:
    """Tell whether a snapshot has part in the domain's backing chain, and not its data in files of its own."""
    return snapshot.kind is not Kind.INTERNAL and not (snapshot.mark and snapshot.mark.standalone)


def find_restoring(inventory: Inventory) -> Snapshot | None:
    """Return the snapshot to which a restore in place was begun and not finished, None if there is none."""
    return next((s for s in inventory.snapshots if s.mark and s.mark.restoring), None)


def chain_depths(domain: Domain) -> dict[str, int]:
    """Return, by disk target, how many overlays its backing chain has, foreign ones included.

    A shut-off domain's XML need not list its backing chain, so the external snapshots of the disk count as well.
    """
    covering = Counter(
        target
        for snapshot in domain.snapshots
        if in_chain(snapshot)
        for target in {target for target, _ in snapshot.overlays}
    )
    return {disk.target: max(len(disk.backing), covering[disk.target]) for disk in domain.disks if disk.holds_state}


def chain_depth(domain: Domain) -> int:
    """Return how many overlays the deepest backing chain of the domain has, at least one for each external snapshot."""
    return max([sum(map(in_chain, domain.snapshots)), *chain_depths(domain).values()])


def chain_limit(policy: Policy, capabilities: Capabilities) -> int:
    """Return the depth at which no further overlay may be put on a chain."""
    return min(policy.max_chain_depth, capabilities.chain_ceiling)


def tightest_chain(policies: Sequence[Policy], *, ceiling: int) -> int | None:
    """Return the depth at which all of one domain's policies stop; None if none of them makes overlays."""
    limits = [policy.max_chain_depth for policy in policies if policy.kind is Kind.EXTERNAL]
    return min(ceiling, *limits) if limits else None


def chain_shortage(policies: Sequence[Policy], *, ceiling: int) -> str | None:
    """Return, as words, why a backing chain cannot hold all that these policies of one domain may keep; None if it can.

    One more than is kept exists while the newest is taken and the oldest not yet deleted.
    """
    room = tightest_chain(policies, ceiling=ceiling)
    if room is None:
        return None
    external = [policy for policy in policies if policy.kind is Kind.EXTERNAL]
    most = [(policy.name, policy.keep.most(policy.schedule.shortest_interval)) for policy in external]
    if all(count is not None for _, count in most) and sum(count or 0 for _, count in most) < room:
        return None
    spelled = " + ".join(f"{'no limit' if count is None else count} ({name})" for name, count in most)
    return (
        f"the policies may keep {spelled} snapshots, and one more is there while a new one is taken, but a backing "
        f"chain may be only {room} deep ({'max_chain_depth' if room < ceiling else 'the limit of this libvirt'})"
    )


def _refuse_budget(policies: Sequence[Policy], capabilities: Capabilities) -> Refusal | None:
    shortage = chain_shortage(policies, ceiling=capabilities.chain_ceiling)
    if shortage is None:
        return None
    return Refusal(RefusalReason.CHAIN_BUDGET, f"{shortage}; keep fewer, or set kind: internal")


def _refuse_pause(
    domain: Domain, policy: Policy, consistency: Consistency, capabilities: Capabilities
) -> Refusal | None:
    """Refuse an internal snapshot that would stop the guest for too long; an external one saves RAM while it runs."""
    if consistency is not Consistency.MEMORY or policy.kind is Kind.EXTERNAL or domain.state is DomainState.PAUSED:
        return None
    if not capabilities.internal_stops_guest:
        return None
    seconds = domain.memory_bytes / _RAM_BYTES_PER_SECOND
    if seconds <= policy.max_pause.total_seconds():
        return None
    return Refusal(
        RefusalReason.PAUSE,
        f"saving {_size(domain.memory_bytes)} of RAM may stop the guest for about {seconds:.0f} s and max_pause is "
        f"{format_duration(policy.max_pause)}; raise it, set kind: external, or shut the guest off",
    )


def _refuse_space(domain: Domain, policy: Policy, consistency: Consistency, storage: Storage | None) -> Refusal | None:
    """Refuse when a folder would have less than ``min_free`` left after the guest's RAM is saved in it."""
    ram = int(domain.memory_bytes * _RAM_MARGIN) if consistency is Consistency.MEMORY else 0
    for folder in data_folders(domain, policy):
        free = storage.free_bytes.get(folder) if storage else None
        need = policy.min_free_bytes + ram
        if free is not None and free < need:
            purpose = f" (min_free and {_size(ram)} for the guest's RAM)" if ram else " (min_free)"
            return Refusal(
                RefusalReason.SPACE,
                f"{folder} has {_size(free)} free and {_size(need)} are needed{purpose}; nothing was changed, "
                "free some space and it is tried again",
            )
        ram = 0  # it goes to the first disk's folder
    return None


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _refuse_domain(domain: Domain, policy: Policy) -> Refusal | None:
    """Refuse for what the domain is doing, whatever kind of snapshot is wanted."""
    restoring = find_restoring(domain)
    if restoring:
        return Refusal(
            RefusalReason.RESTORING,
            f"a restore to {restoring.name} was interrupted, and the disks are neither what they were nor what they "
            f"are to be; `kvmsnapd restore {domain.name} {restoring.name}` finishes it",
        )
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


def _consistency(domain: Domain, policy: Policy) -> Consistency | Refusal:
    """Return the consistency the snapshot will have, or refuse if the policy demands a better one."""
    if domain.state is DomainState.SHUT_OFF:
        return Consistency.OFFLINE
    if policy.memory_live and domain.state is DomainState.PAUSED:
        # QEMU returns from such a save only when the guest runs: until then the snapshot cannot be deleted and no other
        # with RAM be taken (measured, libvirt 9.0 and 11.3).
        return Refusal(
            RefusalReason.STATE,
            "the domain is paused, and with memory: live its RAM can be saved only while it runs; resume it or shut it "
            "down, then it is snapshotted again",
        )
    if policy.kind is Kind.INTERNAL or policy.memory_live:
        return Consistency.MEMORY
    if policy.consistency is ConsistencyRule.CRASH:
        return Consistency.CRASH
    if domain.state is DomainState.RUNNING and domain.agent_connected:
        return Consistency.FILESYSTEM
    if policy.consistency is ConsistencyRule.FILESYSTEM_PREFERRED:
        return Consistency.CRASH
    missing = "is paused" if domain.state is DomainState.PAUSED else "has no guest agent that answers"
    return Refusal(
        RefusalReason.AGENT,
        f"policy {policy.name} requires consistency: filesystem and the domain {missing}; start qemu-guest-agent "
        "in the guest, or set consistency: filesystem-preferred",
    )
