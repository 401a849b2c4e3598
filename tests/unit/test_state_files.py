"""Locks and freeze intents: the small files outside libvirt."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.errors import DomainLockedError
from kvmsnapd.state_files import DomainLocks, FreezeIntents
from tests.builders import OTHER_UUID, UUID

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AT_ONCE, LONG = timedelta(0), timedelta(seconds=30)

_HOLDER = """
import sys
from datetime import timedelta
from pathlib import Path
from kvmsnapd.state_files import DomainLocks
with DomainLocks(Path(sys.argv[1])).hold(sys.argv[2], wait=timedelta(0)):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_holds(directory: Path, uuid: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _HOLDER, str(directory), uuid]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_lock_excludes_another_process_and_names_it(tmp_path: Path) -> None:
    locks = DomainLocks(tmp_path)
    with (
        another_process_holds(tmp_path, UUID) as process,
        pytest.raises(DomainLockedError, match=rf"being worked on by process {process.pid} "),
        locks.hold(UUID, wait=AT_ONCE),
    ):
        pass


def test_a_lock_is_freed_when_its_process_is_killed(tmp_path: Path) -> None:
    with another_process_holds(tmp_path, UUID) as process:
        process.kill()
        process.wait()
        with DomainLocks(tmp_path).hold(UUID, wait=AT_ONCE):
            pass


def test_a_lock_is_freed_at_the_end_of_the_block(tmp_path: Path) -> None:
    locks = DomainLocks(tmp_path)
    for _ in range(2):
        with locks.hold(UUID, wait=AT_ONCE):
            pass


def test_a_lock_is_freed_when_the_block_fails(tmp_path: Path) -> None:
    locks = DomainLocks(tmp_path)
    with pytest.raises(KeyError), locks.hold(UUID, wait=AT_ONCE):
        raise KeyError
    with locks.hold(UUID, wait=AT_ONCE):
        pass


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with (
        DomainLocks(tmp_path).hold(UUID, wait=AT_ONCE),
        pytest.raises(DomainLockedError),
        DomainLocks(tmp_path).hold(UUID, wait=AT_ONCE),
    ):
        pass


def test_domains_do_not_exclude_each_other(tmp_path: Path) -> None:
    locks = DomainLocks(tmp_path)
    with locks.hold(UUID, wait=AT_ONCE), locks.hold(OTHER_UUID, wait=AT_ONCE):
        pass


def test_whoever_waits_gets_the_lock_once_it_is_free(tmp_path: Path) -> None:
    locks = DomainLocks(tmp_path)
    got_it = threading.Event()

    def wait_for_it() -> None:
        with locks.hold(UUID, wait=LONG):
            got_it.set()

    waiting = threading.Thread(target=wait_for_it)
    with locks.hold(UUID, wait=AT_ONCE):
        waiting.start()
        assert not got_it.is_set()
    waiting.join(timeout=10)
    assert got_it.is_set()


def test_whoever_waits_is_told_once_who_has_it_and_for_what(tmp_path: Path) -> None:
    locks, told = DomainLocks(tmp_path), list[str]()
    free = threading.Event()

    def work() -> None:
        with locks.hold(UUID, wait=AT_ONCE, doing="the daemon's run of standard"):
            got_it.set()
            free.wait(20)

    got_it = threading.Event()
    working = threading.Thread(target=work)
    working.start()
    got_it.wait()
    threading.Timer(1.3, free.set).start()
    with locks.hold(UUID, wait=None, on_wait=told.append):
        assert told == [f"process {os.getpid()}: the daemon's run of standard"]
    working.join()


def test_a_short_wait_is_not_worth_a_word(tmp_path: Path) -> None:
    told: list[str] = []
    with DomainLocks(tmp_path).hold(UUID, wait=None, on_wait=told.append):
        pass
    assert told == []


def test_waiting_ends_when_nobody_wants_it_any_more(tmp_path: Path) -> None:
    with (
        DomainLocks(tmp_path).hold(UUID, wait=AT_ONCE),
        pytest.raises(DomainLockedError),
        DomainLocks(tmp_path).hold(UUID, wait=None, wanted=lambda: False),
    ):
        pass


def test_the_directory_of_locks_is_made(tmp_path: Path) -> None:
    with DomainLocks(tmp_path / "run" / "locks").hold(UUID, wait=AT_ONCE):
        pass
    assert [path.name for path in (tmp_path / "run" / "locks").iterdir()] == [f"{UUID}.lock"]


def test_an_intent_is_new_once(tmp_path: Path) -> None:
    intents = FreezeIntents(tmp_path)
    assert not intents.exists(UUID)
    assert intents.record(UUID) is True
    assert intents.record(UUID) is False
    assert intents.exists(UUID)


def test_intents_survive_their_process(tmp_path: Path) -> None:
    FreezeIntents(tmp_path / "frozen").record(UUID)
    FreezeIntents(tmp_path / "frozen").record(OTHER_UUID)
    again = FreezeIntents(tmp_path / "frozen")
    assert again.outstanding() == [UUID, OTHER_UUID]
    assert again.exists(UUID)


def test_a_cleared_intent_is_gone(tmp_path: Path) -> None:
    intents = FreezeIntents(tmp_path)
    intents.record(UUID)
    intents.record(OTHER_UUID)
    intents.clear(UUID)
    assert intents.outstanding() == [OTHER_UUID]
    assert intents.record(UUID) is True


def test_clearing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    FreezeIntents(tmp_path).clear(UUID)


def test_other_files_are_no_intents(tmp_path: Path) -> None:
    (tmp_path / "README").touch()
    assert FreezeIntents(tmp_path).outstanding() == []


def test_a_file_is_made_by_one_only_and_others_can_tell(tmp_path: Path) -> None:
    locks, others = DomainLocks(tmp_path), DomainLocks(tmp_path)
    path = "/images/new.vda.qcow2"
    assert not others.is_made(path)
    with locks.making(path):
        assert others.is_made(path)
        assert not others.is_made(f"{path}2")
        with (
            pytest.raises(DomainLockedError, match=f"{path} is being made by process {os.getpid()}"),
            others.making(path),
        ):
            pass
        with others.making(f"{path}2"):
            pass
    assert not others.is_made(path)
    with others.making(path):
        pass


# Beside a daemon that has a user of its own

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")


@pytest.fixture
def of_the_daemon(tmp_path: Path) -> Path:
    """Give a directory that belongs to another user."""
    directory = tmp_path / "run"
    directory.mkdir()
    os.chown(directory, 4711, 4712)
    return directory


def owners(directory: Path) -> set[tuple[int, int]]:
    return {(path.stat().st_uid, path.stat().st_gid) for path in directory.rglob("*")}


@as_root
def test_what_root_makes_belongs_to_the_owner_of_the_folder(of_the_daemon: Path) -> None:
    locks, intents = DomainLocks(of_the_daemon / "locks"), FreezeIntents(of_the_daemon / "frozen")
    with locks.hold(UUID, wait=AT_ONCE), locks.reading(UUID), locks.making("/images/copy.qcow2"):
        intents.record(UUID)
    assert len([path for path in of_the_daemon.rglob("*") if path.is_file()]) == 4
    assert owners(of_the_daemon) == {(4711, 4712)}


@as_root
def test_links_in_place_of_a_lock_or_its_folder_are_not_followed(of_the_daemon: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    locks = DomainLocks(of_the_daemon / "locks")
    (of_the_daemon / "locks" / f"{UUID}.lock").symlink_to(precious)
    with pytest.raises(OSError, match="Too many levels"), locks.hold(UUID, wait=AT_ONCE):
        pass
    (of_the_daemon / "links").symlink_to(tmp_path)
    with pytest.raises(OSError, match="Not a directory"), DomainLocks(of_the_daemon / "links").hold(UUID, wait=AT_ONCE):
        pass
    assert (precious.read_text(), precious.stat().st_uid) == ("mine", 0)
    assert not (tmp_path / f"{UUID}.lock").exists()
