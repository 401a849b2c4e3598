"""Which disks a snapshot covers and where its files go, from the domain's XML alone.

Sources of the rules: measured with libvirt 9.0 and 11.3. libvirt leaves out CD-ROMs and read-only disks by itself, but
puts an overlay on a floppy, so each disk that takes no part is named. An external snapshot gets explicit paths, since
libvirt's own choice collides for two disks with one stem and is refused for block devices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from kvmsnapd.model import DomainState, Kind
from kvmsnapd.refusal import Refusal, RefusalReason

if TYPE_CHECKING:
    from kvmsnapd.model import Capabilities, Disk, Domain
    from kvmsnapd.policy import Policy


@dataclass(frozen=True, slots=True)
class Cover:
    """How the disks of one domain take part: those that do, those the policy leaves out, and all that do not."""

    disks: tuple[Disk, ...]
    left_out_by_policy: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


def cover_disks(domain: Domain, policy: Policy, capabilities: Capabilities) -> Cover | Refusal:
    """Return which disks a snapshot of this policy's kind covers, or which one cannot be covered and why."""
    with_state = [disk for disk in domain.disks if disk.holds_state]
    chosen = covered(domain, policy)
    if not chosen:
        reason = "its policy excludes every disk" if with_state else "the domain has no writable disk"
        return Refusal(RefusalReason.DISK, f"{reason}, so there is nothing to snapshot")
    if policy.kind is Kind.EXTERNAL:
        if not capabilities.external_snapshots:
            return Refusal(
                RefusalReason.UNSUPPORTED,
                f"libvirt's {capabilities.driver} driver has no external snapshots; set kind: internal in the policy",
            )
        affected = list(chosen)
        if policy.memory_live and domain.state is not DomainState.SHUT_OFF:
            # RAM is saved as for a migration: "migration with transient disk is not supported", left out or not.
            affected += [disk for disk in domain.disks if disk.transient and disk not in chosen]
        faults = [(disk, _external_fault(domain, disk, policy)) for disk in affected]
        excluded = tuple(disk.target for disk in domain.disks if disk not in chosen)
    else:
        if domain.pflash and not (capabilities.internal_with_pflash_offline and domain.state is DomainState.SHUT_OFF):
            return Refusal(
                RefusalReason.UNSUPPORTED,
                f"libvirt {capabilities.version} takes no internal snapshot of a {domain.state} domain with UEFI "
                "firmware; set kind: external in the policy",
            )
        if chosen != tuple(with_state):
            left = ", ".join(disk.target for disk in with_state if disk not in chosen)
            text = f"the policy leaves out {left}, and an internal snapshot covers all disks or none"
            return Refusal(RefusalReason.DISK, text)
        # All writable disks or none, a floppy too: "disk 'fda' must use snapshot mode 'internal'".
        writable = [disk for disk in domain.disks if not disk.readonly]
        faults = [(disk, _internal_fault(disk, capabilities)) for disk in writable]
        excluded = ()
    unfit = [f"{disk.target} {fault}" for disk, fault in faults if fault]
    if unfit:
        return Refusal(RefusalReason.DISK, f"{'; '.join(unfit)}; no {policy.kind} snapshot can hold it")
    by_policy = tuple(disk.target for disk in with_state if disk not in chosen)
    return Cover(chosen, by_policy, excluded)


def covered(domain: Domain, policy: Policy) -> tuple[Disk, ...]:
    """Return the disks that a snapshot of this policy is of."""
    return tuple(disk for disk in domain.disks if disk.holds_state and not policy.disks.excludes(domain, disk))


def data_folders(domain: Domain, policy: Policy) -> tuple[str, ...]:
    """Return the folders that a snapshot's overlays and RAM go to, that of the RAM first; devices have none."""
    disks = [disk for disk in covered(domain, policy) if disk.path or policy.overlay_directory]
    folders = dict.fromkeys(_folder(disk, policy) for disk in disks)
    return tuple(folder for folder in folders if folder and not f"{folder}/".startswith("/dev/"))


def overlay_path(domain: Domain, disk: Disk, policy: Policy, snapshot_name: str) -> str:
    """Return the file that receives the disk's writes from this snapshot on."""
    return f"{_folder(disk, policy)}/{file_stem(domain)}.{disk.target}.{snapshot_name}.qcow2"


def memory_path(domain: Domain, disk: Disk, policy: Policy, snapshot_name: str) -> str:
    """Return the file for the guest's RAM, in the folder that the overlay of this disk goes to."""
    return f"{_folder(disk, policy)}/{file_stem(domain)}.{snapshot_name}.mem"


def _folder(disk: Disk, policy: Policy) -> str:
    return (policy.overlay_directory or str(PurePosixPath(disk.path or "").parent)).rstrip("/")


def file_stem(domain: Domain) -> str:
    """Return the word that the names of all files made for the domain begin with."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", domain.name)[:100]
    # With the UUID where two domains could otherwise be spelled alike.
    return stem if stem == domain.name else f"{stem}-{domain.uuid[:8]}"


def _external_fault(domain: Domain, disk: Disk, policy: Policy) -> str | None:
    if disk.device == "lun":
        return "is a SCSI device passed through"
    if disk.source_type == "network" and domain.state is DomainState.SHUT_OFF:
        return "is of type network, which libvirt covers while the domain runs"
    if disk.source_type in {"block", "network"} or (disk.path or "").startswith("/dev/"):
        missing = f"is of type {disk.source_type}: set overlay_directory in the policy"
        return _common_fault(disk) or (None if policy.overlay_directory else missing)
    if disk.source_type not in {"file", "volume"} or not disk.path:
        return f"is of type {disk.source_type}, not a file or block device"
    return _common_fault(disk)


def _internal_fault(disk: Disk, capabilities: Capabilities) -> str | None:
    if disk.device == "floppy":
        return "is a floppy: take it out, or make it read-only" if disk.path else None  # an empty drive holds nothing
    if disk.left_out:
        return "is left out by snapshot='no' in the domain's XML"
    if disk.source_type == "network":
        return "is of type network"
    if disk.format != "qcow2" and capabilities.internal_needs_qcow2:
        return _common_fault(disk) or f"has format {disk.format}, not qcow2"
    return _common_fault(disk)


def _common_fault(disk: Disk) -> str | None:
    if disk.transient:
        return "is transient"
    return "is shared with other domains" if disk.shareable else None
