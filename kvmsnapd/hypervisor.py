"""The port to the hypervisor: the few calls that execution and inventory need.

:mod:`kvmsnapd.libvirt_host` implements it for libvirt, ``tests/fakes.py`` in memory; one contract suite runs against
both, so the fake may not lie. Every call blocks the calling thread, may be made from several threads, and raises
:class:`~kvmsnapd.errors.HypervisorError` or one of its subclasses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from kvmsnapd.model import (
        Capabilities,
        Domain,
        DrillRequest,
        Inventory,
        Layer,
        Mark,
        Snapshot,
        Storage,
        TakeRequest,
    )


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

    def storage(self, domain: Domain, folders: Collection[str]) -> Storage:
        """Return the free bytes of these folders, and of a shut-off domain the layers of its disks.

        Image files are never opened. What libvirt cannot say is left out. A folder that has no storage pool yet gets a
        transient one, which is gone when we end or libvirt starts anew.

        Raises:
            HypervisorUnreachableError: as above.
        """

    def free_bytes(self, folder: str) -> int | None:
        """Return what is free in a folder now; None if that cannot be told.

        Raises:
            HypervisorError: libvirt went away, or refuses to tell.
        """

    def allocated(self, overlays: Iterable[tuple[str, str]]) -> Mapping[str, int]:
        """Return, by disk target, the bytes these overlays take; those that cannot be told are left out."""

    def files(self, folder: str) -> tuple[Layer, ...] | None:
        """Return all files of a folder as they are now; None if they cannot be listed.

        As :meth:`storage` it makes a storage pool where there is none. It cannot list a folder whose pool is not
        active, one in which somebody just copies a volume, or any while we may only read.

        Raises:
            HypervisorUnreachableError: as above.
        """

    def sleeping_pool(self, folder: str) -> str | None:
        """Return the name of a storage pool that is defined for the folder and not active, None if there is none."""

    def filesystems(self, domain_uuid: str) -> tuple[str, ...]:
        """Return the mount points that a freeze of this guest would cover; none if its agent does not know.

        Also the question whether the agent is there at all, which freezes nothing.

        Raises:
            GuestFrozenError: the guest is frozen already.
            GuestAgentUnavailableError: the agent does not answer.
            HypervisorError: any other refusal.
        """

    def take_snapshot(self, request: TakeRequest) -> Snapshot:
        """Take one snapshot: every disk takes part, or none does. Returns when libvirt has answered.

        Raises:
            SnapshotExistsError: the name, or an overlay of that name, is taken; nothing was changed.
            GuestFrozenError: quiesce was asked for and the guest is frozen already; nothing was changed.
            GuestAgentUnavailableError: quiesce was asked for and the agent did not freeze; nothing was changed. Never
                retried without quiesce here: giving up consistency is the policy's decision.
            DomainBusyError: another job holds the domain; nothing was changed.
            HypervisorUnreachableError: the connection broke; whether the snapshot exists is unknown.
            HypervisorError: any other refusal.
        """

    def describe_snapshot(self, domain_uuid: str, name: str, mark: Mark) -> None:
        """Write this mark into the description of a snapshot of ours; nothing else of it changes.

        Raises:
            SnapshotNotFoundError: it is gone.
            DomainBusyError, HypervisorUnreachableError, HypervisorError: as above.
        """

    def delete_snapshot(self, domain_uuid: str, name: str) -> None:
        """Delete one snapshot with its data, and no other. Deleting one that is gone is success.

        Raises:
            DomainBusyError, HypervisorUnreachableError, HypervisorError: as above.
        """

    def progress(self, domain_uuid: str) -> tuple[int, int] | None:
        """Return how many bytes of how many the merge or save that goes on in a domain has done; None if unknown.

        To be asked from another thread than the one whose call it is about; it does not disturb that call. Of some
        work nothing is known: an internal snapshot with RAM, and the start of the QEMU that merges for a shut-off
        domain, for as long as which it may not even answer.

        Raises:
            HypervisorUnreachableError: as above.
        """

    def copy_file(self, source: str, destination: str, *, source_format: str = "qcow2") -> None:
        """Make a stand-alone qcow2 file of all that is in an image file and the layers below it.

        Nobody may write to any of them meanwhile: they are frozen layers, or the domain is shut off.

        Args:
            source_format: what the domain says that the file is. What it looks like does not count, since a guest could
                write into a raw disk what makes it a qcow2 file on top of any file of the host.

        Raises:
            SnapshotExistsError: there is a file of this name; nothing was changed.
            StorageFullError: no space; nothing is left.
            HypervisorUnreachableError: the connection broke; libvirt may go on copying, or leave part of a file.
            HypervisorError: any other refusal.
        """

    def take_out(
        self, domain_uuid: str, snapshot: str, images: Mapping[str, str], *, wanted: Callable[[], bool]
    ) -> None:
        """Write the state of an internal snapshot into these empty files, by disk target; the domain is only read.

        They become qcow2 files that hold the domain's other internal snapshots as well.

        Args:
            wanted: asked again and again; once it says no this is given up.

        Raises:
            SnapshotNotFoundError: it is gone.
            CopyRefusedError: it was given up; the files are of no use.
            DomainBusyError: the domain is not shut off, or its images were changed meanwhile; likewise.
            StorageFullError, HypervisorUnreachableError, HypervisorError: as above; likewise.
        """

    def create_empty(self, path: str) -> None:
        """Make a file without content.

        Raises:
            SnapshotExistsError: there is a file of this name; nothing was changed.
            StorageFullError, HypervisorUnreachableError, HypervisorError: as above.
        """

    def remove_file(self, path: str) -> None:
        """Delete one file that nobody uses, which the caller knows. Deleting one that is gone is success."""

    def define_copy(
        self, domain_uuid: str, snapshot: str, *, name: str, uuid: str, disks: Mapping[str, str], network: bool
    ) -> tuple[str, ...]:
        """Define a second domain, which does not run, as the snapshot's was, on these qcow2 files by disk target.

        Returns:
            In words, what is not in it.

        Raises:
            SnapshotNotFoundError: the snapshot is gone.
            HypervisorError: the name or the UUID is another domain's, or any other refusal; nothing was changed.
        """

    def create_overlays(self, domain_uuid: str, snapshot: str, files: Mapping[str, str]) -> None:
        """Make empty qcow2 files, by disk target, on what a snapshot froze.

        Raises:
            SnapshotExistsError: there is a file of this name.
            StorageFullError, HypervisorUnreachableError, HypervisorError: as above.
        """

    def run_drill(self, request: DrillRequest, *, wanted: Callable[[], bool]) -> None:
        """Boot a throw-away domain, return once it shows that it is up, and end it in any case.

        It dies with this process. Nothing of it is left but its overlays.

        Args:
            wanted: asked again and again; once it says no the drill is given up.

        Raises:
            DrillRefusedError: the host has not the memory, or nothing could show that it is up, or it was given up.
            DrillFailedError: it did not come up.
            HypervisorUnreachableError: as above.
        """

    def shut_down(self, domain_uuid: str) -> None:
        """Ask a running guest to shut down; returns at once, whatever the guest does."""

    def power_off(self, domain_uuid: str) -> None:
        """Pull the plug of a domain. Doing that to one that is off is success."""

    def start(self, domain_uuid: str, *, memory_file: str | None = None) -> None:
        """Start a domain that is off; with the RAM of a snapshot, on whose data its disks must stand."""

    def revert_snapshot(self, domain_uuid: str, name: str) -> None:
        """Go back to an internal snapshot; afterwards the guest runs, or is off, as it was then.

        Raises:
            SnapshotNotFoundError: it is gone.
            DomainBusyError, HypervisorUnreachableError, HypervisorError: as above.
        """

    def record_standalone(self, request: TakeRequest) -> None:
        """Make a snapshot of files that exist: the request's ``overlays``, each stand-alone. Nothing else is changed.

        Raises:
            SnapshotExistsError: the name is taken.
        """

    def go_on_from(self, domain_uuid: str, name: str, overlays: Mapping[str, str]) -> None:
        """Put a domain that is off on new, empty overlays on the files that an external snapshot froze.

        The snapshot becomes the current one, with these overlays. Done again it changes nothing.

        Args:
            overlays: by disk target; a file of that name which the domain does not use is replaced.

        Raises:
            DomainBusyError: the domain is not off; nothing was changed.
        """

    def forget_snapshot(self, domain_uuid: str, name: str) -> None:
        """Take an external snapshot out of libvirt's records; its files stay. One that is gone is success."""

    def thaw(self, domain_uuid: str) -> None:
        """Thaw the file systems of a running guest; does nothing if they are not frozen.

        Raises:
            GuestAgentUnavailableError: the agent does not answer.
            HypervisorError: any other refusal, for example because the domain does not run.
        """
