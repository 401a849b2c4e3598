"""Going back with libvirt: power, revert, copies, and a new line of overlays where libvirt has no revert of its own.

Source of all that is said about libvirt here: measured with 9.0 and 11.3.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import libvirt

from kvmsnapd.domain_copy import format_copy
from kvmsnapd.domain_xml import format_standalone, formats_of, parse_domain, with_disk_files, with_overlays
from kvmsnapd.errors import DomainBusyError, HypervisorError, SnapshotNotFoundError
from kvmsnapd.libvirt_host.drill import run_drill
from kvmsnapd.libvirt_host.internal_copy import take_out
from kvmsnapd.libvirt_host.take import resolve_volume
from kvmsnapd.libvirt_host.translate import broken_connection, translated_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmsnapd.libvirt_host.connection import Connection
    from kvmsnapd.libvirt_host.storage import StoragePools
    from kvmsnapd.model import DrillRequest, Snapshot, TakeRequest

_SECRETS = libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE
_DEFINITION = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE


@contextmanager
def _off_is_enough(handle: Any) -> Iterator[None]:  # noqa: ANN401
    """Pass an error over where the domain is off: a quick guest is, before libvirt has an answer (measured, 11.3)."""
    try:
        yield
    except libvirt.libvirtError as error:
        if broken_connection(error) or handle.isActive():
            raise


class WaysBack:
    """The part of the port that restores; :class:`.host.LibvirtHost` has it."""

    _writing: Connection
    _pools: StoragePools

    def copy_file(self, source: str, destination: str, *, source_format: str = "qcow2") -> None:
        """See the port."""
        if source_format == "qcow2":
            self._pools.copy(source, destination)
        else:
            self._pools.copy_as(source_format, source, destination)

    def take_out(
        self, domain_uuid: str, snapshot: str, images: Mapping[str, str], *, wanted: Callable[[], bool]
    ) -> None:
        """See the port."""
        with translated_errors("snapshot_take_out", domain=domain_uuid):
            take_out(self._writing.get(), self._pools, self._look_up(domain_uuid), snapshot, images, wanted)

    def create_empty(self, path: str) -> None:
        """See the port."""
        self._pools.create_empty(path)

    def remove_file(self, path: str) -> None:
        """See the port."""
        self._pools.remove(path)

    def shut_down(self, domain_uuid: str) -> None:
        """See the port; by the guest agent or ACPI, as libvirt sees fit."""
        with translated_errors("shut_down", domain=domain_uuid):
            handle = self._look_up(domain_uuid)
            with _off_is_enough(handle):
                handle.shutdown()

    def power_off(self, domain_uuid: str) -> None:
        """See the port."""
        with translated_errors("power_off", domain=domain_uuid):
            handle = self._look_up(domain_uuid)
            with _off_is_enough(handle):
                handle.destroy()

    def start(self, domain_uuid: str, *, memory_file: str | None = None) -> None:
        """See the port. RAM is loaded as that of a saved domain, with its disks replaced by those of now."""
        with translated_errors("start", domain=domain_uuid):
            handle = self._look_up(domain_uuid)
            if memory_file is None:
                handle.create()
                return
            connection = self._writing.get()
            files = {disk.target: disk.path or "" for disk in parse_domain(handle.XMLDesc(0)).disks}
            saved = connection.saveImageGetXMLDesc(memory_file, libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
            text = with_disk_files(saved, files)
            connection.restoreFlags(memory_file, text, libvirt.VIR_DOMAIN_SAVE_RUNNING)

    def revert_snapshot(self, domain_uuid: str, name: str) -> None:
        """See the port."""
        with translated_errors("snapshot_revert", domain=domain_uuid):
            handle = self._look_up(domain_uuid)
            handle.revertToSnapshot(handle.snapshotLookupByName(name, 0), 0)

    def record_standalone(self, request: TakeRequest) -> None:
        """See the port. Its overlays are files that are never there: only a revert by virsh would make them."""
        with translated_errors("snapshot_define", domain=request.domain_name):
            handle = self._look_up(request.domain_uuid)
            text = format_standalone(request, handle.XMLDesc(_DEFINITION), int(time.time()))
            handle.snapshotCreateXML(text, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)

    def go_on_from(self, domain_uuid: str, name: str, overlays: Mapping[str, str]) -> None:
        """See the port."""
        with translated_errors("snapshot_go_on", domain=domain_uuid):
            handle = self._look_up(domain_uuid)
            record = handle.snapshotLookupByName(name, 0)
            text = record.getXMLDesc(_SECRETS)
            active = {disk.target: disk.path for disk in parse_domain(handle.XMLDesc(0)).disks}
            if any(active.get(target) != path for target, path in overlays.items()):
                if handle.isActive():
                    msg = f"{handle.name()} runs, and its disks cannot be changed; nothing was changed"
                    raise DomainBusyError(msg, operation="snapshot_go_on", domain=handle.name())
                for path in overlays.values():
                    self._pools.remove(path)  # of an attempt that was cut off; nobody uses it
                self._make_overlays(text, overlays)
                self._writing.get().defineXML(with_disk_files(handle.XMLDesc(_DEFINITION), overlays))
            flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT
            handle.snapshotCreateXML(with_overlays(text, overlays), flags)

    def create_overlays(self, domain_uuid: str, snapshot: str, files: Mapping[str, str]) -> None:
        """See the port."""
        with translated_errors("overlay_create", domain=domain_uuid):
            self._make_overlays(self._text_of(domain_uuid, snapshot), files)

    def define_copy(
        self, domain_uuid: str, snapshot: str, *, name: str, uuid: str, disks: Mapping[str, str], network: bool
    ) -> tuple[str, ...]:
        """See the port."""
        with translated_errors("define_copy", domain=name):
            origin = f"A copy of {self._look_up(domain_uuid).name()} as of {snapshot}, made by kvmsnapd"
            text = self._text_of(domain_uuid, snapshot)
            copy = format_copy(text, name=name, uuid=uuid, disks=disks, origin=origin, network=network)
            self._writing.get().defineXML(copy.xml)
            return copy.left_out

    def run_drill(self, request: DrillRequest, *, wanted: Callable[[], bool]) -> None:
        """See the port."""
        with translated_errors("drill", domain=request.domain_uuid):
            text = self._text_of(request.domain_uuid, request.snapshot)
            run_drill(self._writing.get(), text, request, wanted=wanted, remove=self._pools.remove)

    def _text_of(self, domain_uuid: str, snapshot: str) -> str:
        return str(self._look_up(domain_uuid).snapshotLookupByName(snapshot, 0).getXMLDesc(_SECRETS))

    def _make_overlays(self, snapshot_xml: str, overlays: Mapping[str, str]) -> None:
        connection = self._writing.get()
        for disk in formats_of(snapshot_xml):
            path = overlays.get(disk.target)
            below = resolve_volume(connection, disk)
            if path is None:
                continue
            if not below.path or not self._pools.create_overlay(path, below=below.path, below_format=below.format):
                msg = f"libvirt can make no storage pool for {path}; nothing was changed"
                raise HypervisorError(msg, operation="overlay_create")

    def forget_snapshot(self, domain_uuid: str, name: str) -> None:
        """See the port."""
        try:
            with translated_errors("snapshot_forget", domain=domain_uuid):
                snapshot = self._look_up(domain_uuid).snapshotLookupByName(name, 0)
                snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        except SnapshotNotFoundError:
            return

    def _look_up(self, domain_uuid: str) -> Any:  # noqa: ANN401
        return self._writing.get().lookupByUUIDString(domain_uuid)


def delete_standalone(pools: StoragePools, snapshot: Any, record: Snapshot) -> None:  # noqa: ANN401
    """Delete a snapshot whose data is in files of its own; libvirt would look for them in the domain's chain."""
    taking_part = dict(record.overlays)
    for target, path in record.covers:
        if target in taking_part:
            pools.remove(path)
    snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
