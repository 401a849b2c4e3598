"""Links: a snapshot on whose data other domains stand, for as long as libvirt has these."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvmsnapd.errors import DomainNotFoundError

if TYPE_CHECKING:
    from kvmsnapd.hypervisor import Hypervisor
    from kvmsnapd.model import Domain


def drop_gone_links(hypervisor: Hypervisor, domain: Domain) -> Domain:
    """Take copies that libvirt no longer has out of the domain's descriptions; return the domain as it is then.

    So the hold that a linked copy is ends by itself when the copy is undefined. To be called under the domain's lock.

    Raises:
        HypervisorError: libvirt does not answer, or does not let us write; then links stay.
    """
    snapshots = []
    for snapshot in domain.snapshots:
        mark = snapshot.mark
        linked = tuple(uuid for uuid in mark.linked if _exists(hypervisor, uuid)) if mark else ()
        if mark and linked != mark.linked:
            mark = replace(mark, linked=linked)
            hypervisor.describe_snapshot(domain.uuid, snapshot.name, mark)
            snapshots.append(replace(snapshot, mark=mark))
        else:
            snapshots.append(snapshot)
    return replace(domain, snapshots=tuple(snapshots))


def _exists(hypervisor: Hypervisor, uuid: str) -> bool:
    try:
        hypervisor.domain(uuid)
    except DomainNotFoundError:
        return False
    return True
