"""Run a program where `/` is the root of a mount namespace: `python -m tests.lab.unchrooted PROGRAM ARGUMENT…`.

In a chroot, where CI may run, the kernel makes no user namespaces (EPERM, user_namespaces(7)), and so no service with
`PrivateUsers=`: what comes after a chroot inherits that. Here the same directory becomes the root by pivot_root(2).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_NEW_MOUNTS = 0x20000  # <linux/sched.h>, CLONE_NEWNS
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 0x1000, 0x4000, 0x40000, 2  # <linux/mount.h>
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """Become the program."""
    _checked("unshare", _libc.unshare(_NEW_MOUNTS))
    root, mounts = os.open("/", os.O_RDONLY), os.open("/proc/self/ns/mnt", os.O_RDONLY)
    _checked("setns", _libc.setns(mounts, _NEW_MOUNTS))  # outside of any chroot
    _checked("mount", _libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
    os.fchdir(root)
    place = Path.cwd()
    if place != Path("/"):
        _checked("mount", _libc.mount(b".", b".", None, _BIND | _RECURSIVE, None))
        os.chdir(place)  # onto what was just mounted there
        _checked("pivot_root", _libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."))
        _checked("umount", _libc.umount2(b".", _DETACH))
        os.chdir("/")
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606  # that is what it is for


if __name__ == "__main__":
    main()
