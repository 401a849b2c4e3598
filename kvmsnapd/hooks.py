"""Run one command of the admin's and say how it ended. Nothing here waits for longer than it was told to."""

from __future__ import annotations

import codecs
import os
import select
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsnapd.durations import format_duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

OUTPUT_LIMIT = 4096
"""Bytes of a hook's output that are kept, from its beginning."""

_CUT = "\n[more output was dropped]"
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_CREDENTIALS = "CREDENTIALS_DIRECTORY"
_SIGTERM_SECONDS = 2.0
_SIGKILL_SECONDS = 2.0  # it acts at once, or not for as long as the kernel waits for something
_LONGEST_POLL_SECONDS = 3600.0  # poll(2) counts milliseconds in an int


@dataclass(frozen=True, slots=True)
class HookResult:
    """How one hook ended.

    ``detail`` is empty if it went well, else says why not. ``output`` is the beginning of stdout and stderr together,
    fit for a terminal, without white space at its end.
    """

    ok: bool
    detail: str
    output: str
    duration_seconds: float


def run_hook(command: Sequence[str], variables: Mapping[str, str], *, timeout: timedelta) -> HookResult:
    """Run ``command`` to its end, or kill it; what goes wrong is in the result, not raised. Safe in several threads.

    The hook has no stdin, no other file of ours, a session of its own, no signal blocked or ignored, and an environment
    of PATH, LANG, systemd's CREDENTIALS_DIRECTORY if there is one, and ``variables``, in whose PATH a name without a
    slash is looked up. Its working directory is this
    process's, which systemd makes ``/``: posix_spawn cannot set it, and chdir here would move all threads.

    After ``timeout`` its process group gets SIGTERM, and SIGKILL 2 seconds later if its main process, or anything that
    holds its output, is still there; so the call returns within ``timeout`` and 4 seconds, even if SIGKILL has no
    effect (a process waiting for a dead disk), and then a thread waits for the process.

    A hook ends when its main process does. What it leaves running in the background is neither waited for nor killed,
    as it may be meant to stay; it must send its output elsewhere, for there is no reader any more (SIGPIPE).
    """
    started = time.monotonic()
    credentials = {_CREDENTIALS: os.environ[_CREDENTIALS]} if _CREDENTIALS in os.environ else {}
    try:
        pid, pidfd, pipe = _start(command, {**_ENVIRONMENT, **credentials, **variables})
    except (OSError, TypeError, ValueError) as error:  # the latter two: a NUL, no text, no command, a name with "="
        reason = (isinstance(error, OSError) and error.strerror) or error
        took = time.monotonic() - started
        return HookResult(ok=False, detail=f"cannot be started: {reason}", output="", duration_seconds=took)
    output = _Output(pipe)
    try:
        in_time = _watch(pid, pidfd, output, started + timeout.total_seconds())
    finally:
        os.close(pidfd)
        os.close(pipe)
        code = _reap(pid)
    detail = ""
    if not in_time:
        detail = f"no end after {format_duration(timeout)}, {'SIGKILL had no effect' if code is None else 'killed'}"
    elif code:
        detail = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    took = time.monotonic() - started
    return HookResult(ok=not detail, detail=detail, output=output.text(), duration_seconds=took)


@dataclass
class _Output:
    """The reading end of a hook's output: keeps the beginning and drops the rest."""

    pipe: int
    kept: bytearray = field(default_factory=bytearray)
    closed: bool = False

    def read(self) -> None:
        """Take what is there, at most one chunk, which is more than is kept; never wait."""
        with suppress(BlockingIOError):
            chunk = os.read(self.pipe, 65536)
            self.closed = not chunk
            self.kept += chunk[: OUTPUT_LIMIT + 1 - len(self.kept)]  # one byte more tells that something was cut

    def text(self) -> str:
        cut = len(self.kept) > OUTPUT_LIMIT
        # Not final if cut: half a character at the end is then left out.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(self.kept[:OUTPUT_LIMIT]), not cut)
        harmless = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        return harmless.rstrip() + (_CUT if cut else "")


def _start(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Return the hook's process ID, its pidfd and the pipe with its output, which is not blocking."""
    if not command:
        msg = "the command is empty"
        raise ValueError(msg)
    # Not posix_spawnp, which looks into the PATH of the daemon.
    program = command[0] if "/" in command[0] else shutil.which(command[0], path=environment["PATH"])
    if program is None:
        msg = f"there is no program {command[0]!r} in {environment['PATH']}"
        raise ValueError(msg)
    # Ours are closed on exec anyway; a C library's, or those that we were started with, may not be. glibc does not mind
    # one that is gone meanwhile, but refuses numbers beyond the limit.
    limit = os.sysconf("SC_OPEN_MAX")
    others = [number for entry in Path("/proc/self/fd").iterdir() if 2 < (number := int(entry.name)) < limit]  # noqa: PLR2004
    reading, writing = os.pipe()
    try:
        os.set_blocking(reading, False)  # the other end has a flag of its own
        try:
            pid = os.posix_spawn(
                program,
                list(command),
                environment,
                # stdin is not the first, in case the daemon was started without one and the pipe got its number.
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, writing, 1),
                    (os.POSIX_SPAWN_DUP2, writing, 2),
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    *((os.POSIX_SPAWN_CLOSE, number) for number in others),
                ],
                setsid=True,
                setsigmask=(),  # the daemon's threads block the signals that are to end a hook
                setsigdef=signal.valid_signals(),  # Python ignores SIGPIPE
            )
        finally:
            os.close(writing)
        try:
            return pid, os.pidfd_open(pid), reading
        except OSError:
            _reap(pid)
            raise
    except BaseException:
        os.close(reading)
        raise


def _watch(pid: int, pidfd: int, output: _Output, deadline: float) -> bool:
    """Read output until the hook has ended or all means to end it are used up; return whether it ended in time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(output.pipe, select.POLLIN)
    means = [(signal.SIGTERM, _SIGTERM_SECONDS), (signal.SIGKILL, _SIGKILL_SECONDS)]
    ended, in_time = False, True
    # After SIGTERM alone, somebody who still holds the output is somebody who has not obeyed yet.
    while not ended or (len(means) == 1 and not output.closed):
        left = deadline - time.monotonic()
        if left <= 0:
            in_time = False
            if not means:
                break
            number, wait_seconds = means.pop(0)
            _signal_group(pid, number)
            deadline = time.monotonic() + wait_seconds
            continue
        ready = {descriptor for descriptor, _ in poll.poll(min(left, _LONGEST_POLL_SECONDS) * 1000)}
        if output.pipe in ready:
            output.read()
            if output.closed:
                poll.unregister(output.pipe)
        if pidfd in ready:
            ended = True
            poll.unregister(pidfd)
    output.read()  # what the hook wrote last; only once, as what it left in the background may write for ever
    return in_time


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to the hook's group, whose number is its own as long as the hook is not reaped."""
    with suppress(ProcessLookupError, PermissionError):  # the latter: a command such as sudo, run by a plain user
        os.killpg(pid, number)


def _reap(pid: int) -> int | None:
    """Return the exit code, negative for a signal; or None, having killed it and left a thread to wait for it."""
    reaped, status = os.waitpid(pid, os.WNOHANG)
    if reaped:
        return os.waitstatus_to_exitcode(status)
    _signal_group(pid, signal.SIGKILL)
    threading.Thread(target=os.waitpid, args=(pid, 0), name="hook", daemon=True).start()
    return None
