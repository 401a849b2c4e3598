"""Gates: how much one storage bears at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.gates import StorageGates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SOON, LONG = 0.1, 30.0


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
