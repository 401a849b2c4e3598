"""Hooks: commands of the admin's, run for real."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmsnapd import hooks
from kvmsnapd.hooks import OUTPUT_LIMIT, HookResult, run_hook

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SOON, LONG = timedelta(seconds=0.2), timedelta(seconds=30)
AT_ONCE = 5.0
"""Seconds: even on a busy machine; hooks that are not to be waited for take 60."""


def sh(
    script: str, *arguments: object, variables: Mapping[str, str] | None = None, timeout: timedelta = LONG
) -> HookResult:
    return run_hook(["/bin/sh", "-c", script, "sh", *map(str, arguments)], variables or {}, timeout=timeout)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_SIGTERM_SECONDS", 0.05)


@contextmanager
def killed_at_the_end(pid_file: Path) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Tell whether a process is there and not merely waiting to be reaped by init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


# How it ended


def test_a_hook_that_goes_well() -> None:
    result = sh("echo out; echo err >&2; echo out again")
    assert (result.ok, result.detail, result.output) == (True, "", "out\nerr\nout again")
    assert 0 < result.duration_seconds < AT_ONCE


def test_a_hook_without_output() -> None:
    assert sh("true").output == ""


def test_an_exit_code_is_told_with_the_output() -> None:
    result = sh("echo no space left; exit 3")
    assert (result.ok, result.detail, result.output) == (False, "exit code 3", "no space left")


def test_a_signal_is_told() -> None:
    result = sh("kill -9 $$")
    assert (result.ok, result.detail) == (False, "ended by signal 9")


def test_arguments_arrive_as_they_are_without_a_shell() -> None:
    assert run_hook(["/usr/bin/printf", "%s|", "a b", "$HOME;*", "", "ü"], {}, timeout=LONG).output == "a b|$HOME;*||ü|"


def test_a_script_is_run_by_the_program_it_names(tmp_path: Path) -> None:
    script = tmp_path / "hook"
    script.write_text('#!/bin/sh\necho "$0 $1"\n')
    script.chmod(0o755)
    assert run_hook([str(script), "x"], {}, timeout=LONG).output == f"{script} x"


# What cannot be started


@pytest.mark.parametrize(
    ("command", "variables", "detail"),
    [
        (["/nonexistent/hook"], {}, "No such file or directory"),
        (["/etc/passwd"], {}, "Permission denied"),
        (["/"], {}, "Permission denied"),
        (["no-such-hook"], {}, f"there is no program 'no-such-hook' in {PATH}"),
        (["no\0hook"], {}, f"there is no program 'no\\x00hook' in {PATH}"),
        ([""], {}, f"there is no program '' in {PATH}"),
        ([], {}, "the command is empty"),
        (["/bin/true", "a\0b"], {}, "embedded null byte"),
        (
            ["/bin/true", "\ud800"],
            {},
            "'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
        ),
        (["/bin/true", "x" * 5_000_000], {}, "Argument list too long"),
        (["/bin/true"], {"A": "a\0b"}, "embedded null byte"),
        (["/bin/true"], {"A=B": "x"}, "illegal environment variable name"),
        (["/bin/true"], {"": "x"}, "illegal environment variable name"),
        (["/bin/true"], {"A": 1}, "expected str, bytes or os.PathLike object, not int"),
    ],
)
def test_what_cannot_be_started_says_why(command: list[str], variables: dict[str, str], detail: str) -> None:
    result = run_hook(command, variables, timeout=LONG)
    assert (result.ok, result.detail, result.output) == (False, f"cannot be started: {detail}", "")


def test_a_script_that_names_no_program_cannot_be_started(tmp_path: Path) -> None:
    script = tmp_path / "hook"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    assert run_hook([str(script)], {}, timeout=LONG).detail == "cannot be started: Exec format error"


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_without_a_free_descriptor_nothing_is_started(spare: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(spare + 1)]
    for number in free:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], before[1]))
    try:
        result = run_hook(["/bin/true"], {}, timeout=LONG)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    # Two are enough: the pipe's writing end makes room for the pidfd.
    assert result.detail == ("" if spare == 2 else "cannot be started: Too many open files")


def test_a_hook_that_cannot_be_watched_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def refuse(pid: int) -> int:
        started.append(pid)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert sh("sleep 60").detail == "cannot be started: Too many open files"
    wait_until_gone(started[0])


# What it is given


def test_the_environment_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVMSNAPD_CONNECT", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "HOME"):
        monkeypatch.setenv(name, "/secret")
    output = run_hook(["/usr/bin/env"], {"KVMSNAPD_DOMAIN": "web 1\nx"}, timeout=LONG).output
    given = [f"PATH={PATH}", "LANG=C.UTF-8", "CREDENTIALS_DIRECTORY=/secret", "KVMSNAPD_DOMAIN=web 1", "x"]
    assert sorted(output.split("\n")) == sorted(given)


def test_a_name_is_looked_up_in_the_path_of_the_hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "our-hook"
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run_hook(["our-hook"], {}, timeout=LONG).detail.startswith("cannot be started: there is no program")
    assert run_hook(["our-hook"], {"PATH": str(tmp_path)}, timeout=LONG).output == "found"
    assert run_hook(["env"], {}, timeout=LONG).ok


def test_the_working_directory_is_that_of_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert run_hook(["pwd"], {}, timeout=LONG).output == "/"


def test_stdin_is_empty() -> None:
    assert sh("cat; readlink /proc/self/fd/0").output == "/dev/null"


def test_no_descriptor_is_passed_on() -> None:
    with Path(os.devnull).open() as file:
        numbers = [fcntl.fcntl(file, kind, 100) for kind in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC)]
        try:
            listed = run_hook(["ls", "/proc/self/fd"], {}, timeout=LONG).output.split()
        finally:
            for number in numbers:
                os.close(number)
    assert sorted(listed) == ["0", "1", "2", "3"]  # 3 is the directory that ls reads


def test_no_signal_is_blocked_or_ignored() -> None:
    ours = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        # Not a shell, which may set signals of its own.
        output = run_hook(["cat", "/proc/self/status"], {}, timeout=LONG).output
        assert ours <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGUSR1, handler)
    blocked, ignored = (int(mask, 16) for mask in re.findall(r"^Sig(?:Blk|Ign):\t(\w+)", output, re.MULTILINE))
    assert blocked == 0
    # glibc ignores its own 32 and 33 in what it spawns; no program may use them.
    assert not [number for number in signal.valid_signals() if ignored >> (number - 1) & 1]


def test_the_hook_leads_a_session_of_its_own() -> None:
    pid, group, session = sh("cut -d' ' -f1 /proc/$$/stat; cut -d' ' -f5,6 /proc/$$/stat").output.split()
    assert pid == group == session
    assert int(session) != os.getsid(0)


# Output


def test_a_flood_is_cut_and_neither_blocks_nor_grows() -> None:
    tracemalloc.start()
    try:
        result = sh("echo first; head -c 50000000 /dev/zero | tr '\\0' x; exit 4")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert result.detail == "exit code 4"  # it came to its end
    assert result.output == "first\n" + "x" * (OUTPUT_LIMIT - 6) + "\n[more output was dropped]"


def test_output_up_to_the_limit_is_not_cut() -> None:
    assert sh(f"head -c {OUTPUT_LIMIT} /dev/zero | tr '\\0' x").output == "x" * OUTPUT_LIMIT


def test_no_half_character_is_left_at_the_cut() -> None:
    output = sh("printf x; yes ü | head -c 9000 | tr -d '\\n'").output
    assert output == "x" + "ü" * ((OUTPUT_LIMIT - 1) // 2) + "\n[more output was dropped]"


def test_output_is_harmless_text() -> None:
    output = sh(r"printf '\033[2Ja\rb\000c\377d\tz\n\342\200\256e\303'").output
    assert output == "\ufffd[2Ja\ufffdb\ufffdc\ufffdd\tz\n\ufffde\ufffd"


def test_what_was_written_last_is_not_lost() -> None:
    for _ in range(20):
        assert sh("sleep 60 >/dev/null & printf last; kill $!").output == "last"


# The end


def test_a_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    result = sh('sleep 60 & echo $! >"$1"; echo waiting; wait', tmp_path / "pid", timeout=timedelta(seconds=1))
    assert (result.ok, result.detail, result.output) == (False, "no end after 1s, killed", "waiting")
    assert 1 <= result.duration_seconds < 3  # the grace is not used up
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_hook_may_tidy_up_at_sigterm() -> None:
    result = sh('trap "sleep 0.1; echo tidy; exit 0" TERM; sleep 60 & wait', timeout=SOON)
    assert (result.ok, result.output) == (False, "tidy")


@pytest.mark.usefixtures("short_grace")
def test_a_hook_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    result = sh('trap "" TERM; sleep 60 & echo $! >"$1"; echo stubborn; wait', tmp_path / "pid", timeout=SOON)
    assert result.detail.endswith(", killed")
    assert result.output == "stubborn"
    assert 0.25 <= result.duration_seconds < AT_ONCE
    wait_until_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.usefixtures("short_grace")
def test_a_child_that_ignores_sigterm_is_killed_though_the_hook_obeys(tmp_path: Path) -> None:
    script = '(trap "" TERM; exec sleep 60) & echo $! >"$1"; wait'
    result = sh(script, tmp_path / "pid", timeout=SOON)
    assert result.detail.endswith(", killed")
    wait_until_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.usefixtures("short_grace")
def test_a_flood_does_not_hold_up_the_timeout() -> None:
    result = sh('trap "" TERM; while :; do cat /dev/zero; done', timeout=SOON)
    assert result.detail.endswith(", killed")
    assert result.duration_seconds < AT_ONCE


@pytest.mark.usefixtures("short_grace")
def test_a_timed_out_hook_whose_session_was_left_is_not_waited_for(tmp_path: Path) -> None:
    script = 'setsid sh -c \'echo $$ >"$1"; exec sleep 60\' sh "$1" & sleep 60'
    with killed_at_the_end(tmp_path / "pid"):
        result = sh(script, tmp_path / "pid", timeout=SOON)
        assert result.detail.endswith(", killed")
        assert result.duration_seconds < AT_ONCE


@pytest.mark.parametrize("writes", [False, True])
def test_what_runs_in_the_background_is_neither_waited_for_nor_killed(tmp_path: Path, writes: bool) -> None:
    script = 'echo started; sh -c "$2" & echo $! >"$1"; exit 0'
    with killed_at_the_end(tmp_path / "pid"):
        result = sh(script, tmp_path / "pid", "trap '' PIPE; while :; do echo x; done" if writes else "exec sleep 60")
        assert (result.ok, result.duration_seconds < AT_ONCE) == (True, True)
        assert result.output.startswith("started")
        assert is_running(int((tmp_path / "pid").read_text()))


def test_a_hook_that_closes_its_output_is_waited_for() -> None:
    result = sh("exec >&- 2>&-; sleep 0.1; exit 5")
    assert result.detail == "exit code 5"


@pytest.mark.usefixtures("short_grace")
def test_a_hook_that_cannot_be_killed_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hooks, "_SIGKILL_SECONDS", 0.05)
    monkeypatch.setattr(os, "killpg", lambda *_: None)  # as if it waited for a dead disk
    result = sh('echo $$ >"$1"; exec sleep 60', tmp_path / "pid", timeout=SOON)
    assert result.detail.endswith(", SIGKILL had no effect")
    assert result.duration_seconds < AT_ONCE
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists():  # until it is reaped
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interrupt_kills_the_hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: hooks._Output) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hooks._Output, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sh('echo $$ >"$1"; echo go; exec sleep 60', tmp_path / "pid")
    wait_until_gone(int((tmp_path / "pid").read_text()))


# Nothing is left behind


def test_neither_descriptors_nor_children_are_left() -> None:
    before = descriptors(), children()
    for _ in range(10):
        assert sh("echo hello").ok
        assert not sh("exit 1").ok
        assert not sh("sleep 60", timeout=timedelta(milliseconds=5)).ok
        assert not run_hook(["/nonexistent"], {}, timeout=LONG).ok
        assert not run_hook(["/bin/true"], {"A": "\0"}, timeout=LONG).ok
    assert descriptors() <= before[0]
    assert children() <= before[1]


def test_hooks_of_several_threads_do_not_disturb_each_other() -> None:
    def run(number: int) -> HookResult:
        if number % 4 == 0:
            return run_hook(["/nonexistent"], {}, timeout=LONG)
        return sh('sleep 0.1; echo "$1 $N"; exit "$1"', number, variables={"N": f"is {number}"})

    with ThreadPoolExecutor(16) as pool:
        for number, result in enumerate(pool.map(run, range(64))):
            if number % 4 == 0:
                assert result.detail == "cannot be started: No such file or directory"
            else:
                assert (result.detail, result.output) == (f"exit code {number}", f"{number} is {number}")
