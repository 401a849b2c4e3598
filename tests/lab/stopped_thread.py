"""One thread of a process that stands still, as if a bug had caught it, while the others go on."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.commands import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17  # <linux/ptrace.h>
_WALL = 0x40000000  # <linux/wait.h>: threads as well


@contextmanager
def stopped_thread(name: str, leader: int) -> Iterator[None]:
    """Stop the thread of this name while the block runs; its process may end meanwhile.

    Args:
        name: of the thread, as `ps -L` shows it. Of several it is the oldest: a new one bears the name of its maker for
            a moment.
        leader: a process; the thread's shares its namespace of processes.
    """
    namespace = Path(f"/proc/{leader}/ns/pid").readlink()
    thread = min(int(task.name) for task in Path("/proc").glob("[0-9]*/task/[0-9]*") if _is(task, name, namespace))
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (_SEIZE, _INTERRUPT):
        if libc.ptrace(request, thread, None, None) != 0:
            msg = f"cannot stop thread {thread}: {os.strerror(ctypes.get_errno())}"
            raise LabError(msg)
    os.waitpid(thread, _WALL)
    # Who traces a thread must see its end, or its process never ends.
    threading.Thread(target=_see_the_end, args=(thread,), daemon=True).start()
    try:
        yield
    finally:
        libc.ptrace(_DETACH, thread, None, None)  # no matter if it has gone


def _is(task: Path, name: str, namespace: Path) -> bool:
    try:
        return (task / "comm").read_text() == f"{name}\n" and (task / "ns/pid").readlink() == namespace
    except OSError:
        return False  # ended while we looked


def _see_the_end(thread: int) -> None:
    with suppress(ChildProcessError):  # it was let go
        os.waitpid(thread, _WALL)
