"""A small file system of its own for tests that fill a disk to the brim, and what fills it."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.lab.commands import run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE_MIB = 384
"""Room for two guests of 64 MiB, and for the RAM of one."""


@dataclass(frozen=True)
class SmallDisk:
    """A file system mounted at `path`, in memory: what is not used costs nothing."""

    path: Path

    @property
    def free_bytes(self) -> int:
        """What is left on it."""
        seen = os.statvfs(self.path)
        return seen.f_bavail * seen.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Use up all but so many bytes, rounded to pages; called again, it takes what has become free since."""
        with self._filler.open("ab") as file:
            size, more = file.tell(), self.free_bytes - leave
            if more > 0:
                os.posix_fallocate(file.fileno(), size, more)

    def relieve(self) -> None:
        """Give back what `fill` has used."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.path / "filler"


@contextmanager
def small_disk_at(path: Path) -> Iterator[SmallDisk]:
    """Mount one for the block.

    Before the libvirtds that are to see it: each has a mount namespace of its own, which later mounts do not reach.
    """
    with _mounted(path, "-t", "tmpfs", "-o", f"size={SIZE_MIB}m,mode=755", "small"):
        yield SmallDisk(path)


@contextmanager
def ext4_at(path: Path, *, size_mib: int, reserved_percent: int) -> Iterator[None]:
    """Mount an ext4 for the block, part of which is reserved for root."""
    image = path.with_suffix(".ext4")
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    run("mkfs.ext4", "-q", "-m", str(reserved_percent), image)
    with _mounted(path, "-o", "loop", str(image)):
        yield


@contextmanager
def _mounted(path: Path, *what: str) -> Iterator[None]:
    """Mount something for the block; it is gone afterwards even if this process is killed."""
    path.mkdir()
    run("mount", *what, path)
    # Ends with the pipe from this process, however that closes.
    last_will = ["sh", "-c", 'cat; exec umount --lazy "$0"', str(path)]
    with subprocess.Popen(last_will, stdin=subprocess.PIPE, start_new_session=True):
        yield
