"""The port to the hypervisor: the few calls that execution and inventory need.

:mod:`kvmsnapd.libvirt_host` implements it for libvirt, ``tests/fakes.py`` in memory; one contract suite runs against
both, so the fake may not lie. Every call blocks the calling thread, may be made from several threads, and raises
:class:`~kvmsnapd.errors.HypervisorError` or one of its subclasses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvmsnapd.model import Capabilities, Domain, Inventory, Snapshot, TakeRequest


class Hypervisor(Protocol):
    """One libvirt, reachable or not."""

    def capabilities(self) -> Capabilities:
        """Return what this libvirt can do.

        Raises:
            HypervisorUnreachableError: there is no connection, and a new one could not be made now.
        """

    def inventory(self) -> tuple[Inventory, ...]:
        """Return all domains, persistent and transient, with their snapshots, ordered by name.

        Raises:
            HypervisorUnreachableError: as above. A domain that vanishes meanwhile is left out, not an error.
        """

    def domain(self, uuid: str) -> Domain:
        """Return everything about one domain, freshly read.

        Raises:
            DomainNotFoundError: it is not defined any more.
            HypervisorUnreachableError: as above.
        """

    def take_snapshot(self, request: TakeRequest) -> Snapshot:
        """Take one snapshot: every disk takes part, or none does. Returns when libvirt has answered.

        Raises:
            SnapshotExistsError: the name, or an overlay of that name, is taken; nothing was changed.
            GuestAgentUnavailableError: quiesce was asked for and the agent did not freeze; nothing was changed. Never
                retried without quiesce here: giving up consistency is the policy's decision.
            DomainBusyError: another job holds the domain; nothing was changed.
            HypervisorUnreachableError: the connection broke; whether the snapshot exists is unknown.
            HypervisorError: any other refusal.
        """

    def delete_snapshot(self, domain_uuid: str, name: str) -> None:
        """Delete one snapshot with its data, and no other. Deleting one that is gone is success.

        Raises:
            DomainBusyError, HypervisorUnreachableError, HypervisorError: as above.
        """

    def thaw(self, domain_uuid: str) -> None:
        """Thaw the file systems of a running guest; does nothing if they are not frozen.

        Raises:
            GuestAgentUnavailableError: the agent does not answer.
            HypervisorError: any other refusal, for example because the domain does not run.
        """
