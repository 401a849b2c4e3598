"""Image files by way of libvirt's storage API: free space, times, overlays made and files removed. None is opened here.

So the daemon needs no rights on images and cannot race libvirt for them. Source of all that is said about libvirt here:
measured with 9.0 and 11.3.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import libvirt

from kvmsnapd.copies import note_of
from kvmsnapd.errors import HypervisorError
from kvmsnapd.libvirt_host.translate import broken_connection, translated_errors
from kvmsnapd.model import Layer

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmsnapd.libvirt_host.connection import Connection

_OURS = "kvmsnapd-"
_CHUNK = 256 * 1024
"""libvirt sends no more at a time."""
_REFRESHED_WITHIN_SECONDS = 30.0
_PAUSE_SECONDS = 0.2
_DEEPEST = 200
"""libvirt itself gives up on a chain of this depth."""


class StoragePools:
    """Finds the pool of a folder, or makes a transient one. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        """Work through this connection, which must be one that may write."""
        self._connection = connection
        self._local = urlsplit(connection.uri).netloc == ""
        self._made: set[str] = set()
        self._lock = threading.Lock()
        self._folder_locks: dict[str, threading.Lock] = {}

    def free_bytes(self, folder: str) -> int | None:
        """Return what is free in a folder for others than root, freshly read; None if that cannot be known.

        A storage pool counts what is reserved for root as free, which on ext4 is 5 % of the disk and of no use to a
        QEMU that runs as another user. So on this host the file system is asked; no image is touched by that.
        """
        if self._local:
            try:
                seen = os.statvfs(folder)
            except OSError:
                pass  # not there, or not ours to look at: libvirt may know
            else:
                return seen.f_bavail * seen.f_frsize
        pool = self._pool(folder)
        if pool is None:
            return None
        _refresh(pool)
        with translated_errors("storage_info"):
            return int(pool.info()[3])

    def chain(self, path: str) -> list[Layer]:
        """Return the file and the layers below it, as far as they are in folders that have a pool."""
        layers: list[Layer] = []
        at: str | None = path
        while at and len(layers) < _DEEPEST:
            layer = self.layer(at)
            if layer is None:
                break
            layers.append(layer)
            at = layer.backing
        return layers

    def layer(self, path: str) -> Layer | None:
        """Return what libvirt says of one file; None if it is in no pool, or not there."""
        volume = self._volume(path)
        if volume is None:
            return None
        try:  # its XML is made anew each time; that of its pool is not
            return _parse_volume(volume.XMLDesc(0))
        except libvirt.libvirtError:  # deleted since it was looked up
            return None

    def files(self, folder: str) -> tuple[Layer, ...] | None:
        """Return all files of a folder that libvirt can make out as volumes; None if it cannot list them now."""
        pool = self._pool(folder)
        if pool is None or not _refresh(pool):
            return None
        found = []
        with translated_errors("list_volumes"):
            for volume in pool.listAllVolumes(0):
                try:
                    found.append(_parse_volume(volume.XMLDesc(0)))
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:  # deleted since it was listed
                        raise
        return tuple(found)

    def create_overlay(self, path: str, *, below: str, below_format: str) -> bool:
        """Make an empty qcow2 file for its owner alone, with ``below`` as backing file; False if there is no pool.

        Raises:
            SnapshotExistsError: there is a file of this name.
            StorageFullError: no space; nothing is left.
        """
        folder, _, name = path.rpartition("/")
        pool = self._pool(folder)
        if pool is None:
            return False
        root = ET.Element("volume")
        ET.SubElement(root, "name").text = name
        ET.SubElement(root, "capacity").text = "0"  # that of the backing file
        target = ET.SubElement(root, "target")
        ET.SubElement(target, "format", type="qcow2")
        ET.SubElement(target, "compat").text = "1.1"  # libvirt 9.0 would make it 0.10 here, and nowhere else
        ET.SubElement(ET.SubElement(target, "permissions"), "mode").text = "0600"
        backing = ET.SubElement(root, "backingStore")
        ET.SubElement(backing, "path").text = below
        ET.SubElement(backing, "format", type=below_format)
        with translated_errors("overlay_create"):
            pool.createXML(ET.tostring(root, encoding="unicode"), 0)
        return True

    def copy(self, source: str, destination: str) -> None:
        """Make a stand-alone qcow2 file, for its owner alone, of all that is in a file and the layers below it.

        libvirt lets qemu-img do it; blocks for as long as that takes, and cannot be cancelled.

        Raises:
            SnapshotExistsError: there is a file of this name.
            StorageFullError: no space; nothing is left.
            HypervisorError: a folder has no storage pool and none can be made, or the source is not there.
        """
        folder, _, name = destination.rpartition("/")
        pool, volume = self._pool(folder), self._volume(source)
        if pool is None or volume is None:
            missing = f"{source} is not there" if pool else f"libvirt can make no storage pool of {folder}"
            msg = f"{source} was not copied to {destination}: {missing}"
            raise HypervisorError(msg, operation="file_copy")
        root = ET.Element("volume")
        ET.SubElement(root, "name").text = name
        ET.SubElement(root, "capacity").text = "0"  # that of the source
        target = ET.SubElement(root, "target")
        ET.SubElement(target, "format", type="qcow2")
        ET.SubElement(target, "compat").text = "1.1"
        ET.SubElement(ET.SubElement(target, "permissions"), "mode").text = "0600"
        with translated_errors("file_copy"):
            pool.createXMLFrom(ET.tostring(root, encoding="unicode"), volume, 0)

    def copy_as(self, source_format: str, source: str, destination: str) -> None:
        """Copy a file as one of this format, whatever it looks like; see :meth:`copy`.

        libvirt copies a volume as what its pool took it for, and it looks into raw files as well: one that begins like
        a qcow2 file is copied with the layer that it names, from anywhere on the host. An overlay says what is below.
        """
        overlay = note_of(destination)
        self.remove(overlay)
        if not self.create_overlay(overlay, below=source, below_format=source_format):
            msg = f"{source} was not copied: libvirt can make no storage pool for {destination}"
            raise HypervisorError(msg, operation="file_copy")
        try:
            self.copy(overlay, destination)
        finally:
            with contextlib.suppress(HypervisorError):
                self.remove(overlay)

    def create_empty(self, path: str) -> None:
        """Make a file without content, for its owner alone.

        Raises:
            SnapshotExistsError: there is a file of this name.
            HypervisorError: the folder has no storage pool and none can be made.
        """
        folder, _, name = path.rpartition("/")
        pool = self._pool(folder)
        if pool is None:
            msg = f"{path} was not made: libvirt can make no storage pool of {folder}"
            raise HypervisorError(msg, operation="file_create")
        root = ET.Element("volume")
        ET.SubElement(root, "name").text = name
        ET.SubElement(root, "capacity").text = "0"
        target = ET.SubElement(root, "target")
        ET.SubElement(target, "format", type="raw")
        ET.SubElement(ET.SubElement(target, "permissions"), "mode").text = "0600"
        with translated_errors("file_create"):
            pool.createXML(ET.tostring(root, encoding="unicode"), 0)

    def duplicate(self, source: str, destination: str, *, wanted: Callable[[], bool]) -> bool:
        """Write all bytes of a qcow2 file into an empty one; False if it was given up as no longer wanted.

        They go through this process, and stretches of zeroes become holes. A volume's format is what its pool saw when
        it was read, so the pool is read anew.

        Raises:
            StorageFullError: no space.
            HypervisorError: a file is not there, or libvirt works in that folder and cannot read it anew.
        """
        there, empty = self._volume(source), self._volume(destination)
        if there is None or empty is None:
            msg = f"{destination if there else source} is not there"
            raise HypervisorError(msg, operation="file_duplicate")
        with translated_errors("file_duplicate"):
            if not _pour(self._connection.get(), there, empty, wanted):
                return False
            pool = empty.storagePoolLookupByVolume()
            deadline = time.monotonic() + _REFRESHED_WITHIN_SECONDS
            while not _refresh(pool) or _format_of(pool.storageVolLookupByName(empty.name())) != "qcow2":
                if time.monotonic() > deadline:
                    msg = f"libvirt works in {destination.rpartition('/')[0]} and does not see a new file there"
                    raise HypervisorError(msg, operation="file_duplicate")
                time.sleep(_PAUSE_SECONDS)
        return True

    def remove(self, path: str) -> None:
        """Delete one file; deleting one that is gone is success. The caller knows that nobody uses it."""
        volume = self._volume(path)
        if volume is not None:
            with translated_errors("file_delete"):
                volume.delete(0)

    def close(self) -> None:
        """Forget the pools that were made here; their files stay."""
        with self._lock:
            made, self._made = self._made, set()
        for folder in made:
            with contextlib.suppress(libvirt.libvirtError, HypervisorError):
                # By its name: somebody may have defined another one for the folder since.
                self._connection.get().storagePoolLookupByName(_name_for(folder)).destroy()

    def _volume(self, path: str) -> Any | None:  # noqa: ANN401
        """Look a file up; one that was made by others is known to its pool only after a refresh."""
        pool = self._pool(path.rpartition("/")[0])
        if pool is None:
            return None
        for attempt in (1, 2):
            try:
                return self._connection.get().storageVolLookupByPath(path)
            except libvirt.libvirtError as error:
                if broken_connection(error):
                    with translated_errors("volume_lookup"):
                        raise
                if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                    return None
            if attempt == 1:
                _refresh(pool)
        return None

    def _pool(self, folder: str) -> Any | None:  # noqa: ANN401
        """Return the folder's pool; None if there is none and none can be made."""
        if not folder.startswith("/") or folder.startswith("/dev/") or folder == "/dev":
            return None
        connection = self._connection.get()
        with self._lock:
            folder_lock = self._folder_locks.setdefault(folder, threading.Lock())
        with folder_lock:  # two pools of one folder are refused
            try:
                return connection.storagePoolLookupByTargetPath(folder)
            except libvirt.libvirtError as error:
                if broken_connection(error):
                    with translated_errors("pool_lookup"):
                        raise
                if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
                    return None  # a libvirt without the storage driver, for one
            return self._make_pool(connection, folder)

    def _make_pool(self, connection: Any, folder: str) -> Any | None:  # noqa: ANN401
        root = ET.Element("pool", type="dir")
        ET.SubElement(root, "name").text = _name_for(folder)
        ET.SubElement(ET.SubElement(root, "target"), "path").text = folder
        try:
            pool = connection.storagePoolCreateXML(ET.tostring(root, encoding="unicode"), 0)
        except libvirt.libvirtError as error:
            if broken_connection(error):
                with translated_errors("pool_create"):
                    raise
            return None
        self._made.add(folder)
        return pool


def target_of(pool: Any) -> str | None:  # noqa: ANN401
    """Return the folder of a pool, active or not; None if it has none, or is gone."""
    try:
        path = ET.fromstring(pool.XMLDesc(0)).findtext("target/path")  # noqa: S314  # from libvirt, which wrote it itself
    except libvirt.libvirtError:
        return None
    return path.rstrip("/") if path else None


def _pour(connection: Any, source: Any, destination: Any, wanted: Callable[[], bool]) -> bool:  # noqa: ANN401
    """Send the bytes of one volume to another; return False if they were no longer wanted."""
    outlet, inlet = connection.newStream(0), connection.newStream(0)
    source.download(outlet, 0, 0, 0)
    try:
        destination.upload(inlet, 0, 0, libvirt.VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)
        try:
            zeroes = bytes(_CHUNK)
            while chunk := outlet.recv(_CHUNK):
                if not wanted():
                    inlet.abort()
                    outlet.abort()
                    return False
                if chunk == zeroes[: len(chunk)]:
                    inlet.sendHole(len(chunk), 0)
                else:
                    rest = chunk
                    while rest:
                        rest = rest[inlet.send(rest) :]
            inlet.finish()
        except BaseException:
            with contextlib.suppress(libvirt.libvirtError):
                inlet.abort()
            raise
        outlet.finish()
    except BaseException:
        with contextlib.suppress(libvirt.libvirtError):
            outlet.abort()
        raise
    return True


def _format_of(volume: Any) -> str | None:  # noqa: ANN401
    found = ET.fromstring(volume.XMLDesc(0)).find("target/format")  # noqa: S314  # from libvirt, which wrote it itself
    return found.get("type") if found is not None else None


def _name_for(folder: str) -> str:
    return _OURS + hashlib.sha256(folder.encode()).hexdigest()[:12]


def _refresh(pool: Any) -> bool:  # noqa: ANN401
    """Read a pool anew, and return whether that was done; while somebody copies a volume in it, it is refused."""
    try:
        pool.refresh(0)
    except libvirt.libvirtError as error:
        if broken_connection(error):
            with translated_errors("pool_refresh"):
                raise
        with contextlib.suppress(libvirt.libvirtError):
            if not pool.isActive():  # a refresh that failed has ended it; that must not be our doing
                pool.create(0)
        return False
    return True


def _parse_volume(text: str) -> Layer:
    root = ET.fromstring(text)  # noqa: S314  # from libvirt, which wrote it itself
    changed = root.findtext("target/timestamps/mtime")
    sizes = [int(text) for text in (root.findtext("allocation"), root.findtext("physical")) if text]
    return Layer(
        path=root.findtext("target/path") or root.findtext("key") or "",
        changed_at=datetime.fromtimestamp(float(changed), UTC) if changed else None,
        backing=root.findtext("backingStore/path"),
        # The larger of both: a file system that compresses allocates little for much.
        allocated=max(sizes, default=None),
    )
