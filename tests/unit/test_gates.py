"""Gates: how much one storage bears at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.errors import StorageBusyError
from kvmsnapd.gates import HostGate, StorageGates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SOON, LONG = 0.1, 30.0
NO_WAIT, SHORT = timedelta(0), timedelta(seconds=0.05)


@contextmanager
def waiting(gates: StorageGates, folders: Iterable[str], *, heavy: bool) -> Iterator[threading.Event]:
    """Have a thread go through the gates; the event says that it is in. It leaves at the end of the block."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gates.hold(folders, heavy=heavy):
            entered.set()
            leave.wait(LONG)

    threading.Thread(target=work, daemon=True).start()
    try:
        yield entered
    finally:
        leave.set()


@pytest.mark.parametrize("heavy", [False, True])
def test_no_more_than_allowed_go_on_at_once_in_one_folder(heavy: bool) -> None:
    gates = StorageGates(takes=1 if heavy else 2, heavy=2 if heavy else 1)
    with gates.hold(["/a"], heavy=heavy), waiting(gates, ["/a"], heavy=heavy) as second:
        assert second.wait(LONG)
        with waiting(gates, ["/a"], heavy=heavy) as third:
            assert not third.wait(SOON)


def test_who_waits_goes_on_when_a_place_is_free() -> None:
    gates = StorageGates(takes=1, heavy=1)
    with waiting(gates, ["/a"], heavy=True) as first:
        assert first.wait(LONG)
        with waiting(gates, ["/a"], heavy=False) as light:
            assert light.wait(LONG)  # takes and merges do not wait for each other
    with waiting(gates, ["/a"], heavy=True) as next_one:
        assert next_one.wait(LONG)


def test_folders_do_not_wait_for_each_other() -> None:
    gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/a"], heavy=True), waiting(gates, ["/b"], heavy=True) as other:
        assert other.wait(LONG)


def test_a_domain_in_two_folders_waits_for_both() -> None:
    gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/b"], heavy=True), waiting(gates, ["/a", "/b"], heavy=True) as both:
        assert not both.wait(SOON)


def test_a_domain_in_no_folder_waits_for_nobody() -> None:
    gates = StorageGates(takes=1, heavy=1)
    with gates.hold([], heavy=True), waiting(gates, [], heavy=True) as other:
        assert other.wait(LONG)


def test_a_folder_named_twice_takes_one_place() -> None:
    with StorageGates(takes=1, heavy=1).hold(["/a", "/a"], heavy=False):
        pass


def test_a_place_is_given_back_after_an_error() -> None:
    gates = StorageGates(takes=1, heavy=1)
    with pytest.raises(ZeroDivisionError), gates.hold(["/a"], heavy=False):
        _ = 1 // 0
    with waiting(gates, ["/a"], heavy=False) as again:
        assert again.wait(LONG)


def test_two_that_name_the_same_folders_in_another_order_never_wait_for_ever() -> None:
    gates = StorageGates(takes=1, heavy=1)
    done = []

    def work(number: int) -> None:
        order = ["/a", "/b", "/c"]
        for step in range(200):
            turn = (number + step) % 3
            with gates.hold([*order[turn:], *order[:turn]], heavy=True):
                done.append(number)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result(timeout=LONG)
    assert len(done) == 800


# Not for ever


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("wait", [NO_WAIT, SHORT])
def test_who_gets_no_place_in_time_is_told_so(heavy: bool, wait: timedelta) -> None:
    gates = StorageGates(takes=1, heavy=1)
    with (
        gates.hold(["/a"], heavy=heavy),
        pytest.raises(StorageBusyError, match="same storage; tried again later"),
        gates.hold(["/a"], heavy=heavy, wait=wait),
    ):
        pytest.fail("there is no place")


def test_who_gives_up_gives_back_what_it_had_already() -> None:
    gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/b"], heavy=True):
        for _ in range(3):
            with pytest.raises(StorageBusyError), gates.hold(["/a", "/b", "/c"], heavy=True, wait=SHORT):
                pytest.fail("there is no place in /b")
        with gates.hold(["/a", "/c"], heavy=True, wait=NO_WAIT) as waited:
            assert not waited
    with gates.hold(["/a", "/b", "/c"], heavy=True, wait=NO_WAIT) as waited:
        assert not waited


def test_the_time_to_wait_is_for_all_folders_together() -> None:
    gates = StorageGates(takes=1, heavy=1)
    with ExitStack() as stack:
        for folder in "abcdefgh":
            stack.enter_context(gates.hold([folder], heavy=True))
        started = time.monotonic()
        with pytest.raises(StorageBusyError), gates.hold("abcdefgh", heavy=True, wait=SHORT):
            pytest.fail("there is no place")
        assert time.monotonic() - started < LONG


def test_who_had_to_wait_is_told_that_things_may_have_changed() -> None:
    gates, told, began = StorageGates(takes=1, heavy=1), [], threading.Event()

    def work() -> None:
        began.set()
        with gates.hold(["/a", "/b"], heavy=True) as waited:
            told.append(waited)

    with gates.hold(["/b"], heavy=True):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert began.wait(LONG)
        thread.join(SOON)
    thread.join(LONG)
    assert told == [True]
    with gates.hold(["/a", "/b"], heavy=True) as waited:
        assert not waited


# The host


@contextmanager
def running(gate: HostGate, on_stuck: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """Have a run on a thread of its own; the event says that it has its place. It ends with the block."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gate.hold(on_stuck):
            entered.set()
            leave.wait(LONG)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield entered
    finally:
        leave.set()
        if entered.is_set():  # else it waits for those around it
            thread.join(LONG)


def test_a_host_bears_so_many_runs_at_once_and_the_next_when_one_ends() -> None:
    gate = HostGate(places=2, patience=timedelta(hours=1))
    with running(gate) as first:
        assert first.wait(LONG)
        with running(gate) as second:
            assert second.wait(LONG)
            with running(gate) as third:
                assert not third.wait(SOON)
    with running(gate) as fourth:
        assert fourth.wait(LONG)


def test_a_run_that_takes_too_long_gives_its_place_up_and_says_so() -> None:
    gate, stuck = HostGate(places=1, patience=SHORT), threading.Event()
    with running(gate, stuck.set) as first:
        assert first.wait(LONG)
        with running(gate) as second:
            assert second.wait(LONG)
            assert stuck.wait(LONG)


def test_a_place_that_was_given_up_is_not_given_back_once_more() -> None:
    gate, stuck = HostGate(places=1, patience=SHORT), threading.Event()
    with running(gate, stuck.set) as first:
        assert first.wait(LONG)
        assert stuck.wait(LONG)
    assert gate._places._value == 1


def test_a_run_that_ends_in_time_is_not_called_stuck() -> None:
    gate, stuck = HostGate(places=1, patience=SHORT), threading.Event()
    with gate.hold(stuck.set):
        pass
    assert not stuck.wait(SOON)
    assert gate._places._value == 1


def test_a_run_that_breaks_gives_its_place_back() -> None:
    gate = HostGate(places=1, patience=timedelta(hours=1))
    with pytest.raises(ZeroDivisionError), gate.hold(lambda: None):
        _ = 1 // 0
    with running(gate) as again:
        assert again.wait(LONG)
