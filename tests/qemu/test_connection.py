"""Connections to a real libvirtd: whose they are, and that they come back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.errors import HypervisorUnreachableError
from kvmsnapd.libvirt_host.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu


@pytest.fixture
def connection(libvirtd: Libvirtd) -> Iterator[Connection]:
    found = Connection(libvirtd.uri, read_only=False)
    yield found
    found.close()


def got_in_threads(connection: Connection, threads: int) -> list[Any]:
    """Return what each of several threads gets, all of them alive at once."""
    found: list[Any] = []
    together = threading.Barrier(threads + 1)

    def get() -> None:
        found.append(connection.get())
        together.wait()
        together.wait()

    started = [threading.Thread(target=get) for _ in range(threads)]
    for thread in started:
        thread.start()
    together.wait()
    copy = list(found)
    together.wait()
    for thread in started:
        thread.join()
    return copy


def test_no_two_threads_share_a_connection(connection: Connection) -> None:
    # libvirt's client crashes when they do and libvirtd hangs: CVE-2024-4418.
    assert len({id(one) for one in [connection.get(), *got_in_threads(connection, 5)]}) == 6


def test_one_thread_keeps_its_connection(connection: Connection) -> None:
    assert connection.get() is connection.get()


def test_a_closed_one_is_opened_anew(connection: Connection) -> None:
    together = threading.Barrier(2)
    types: list[str] = []

    def use() -> None:
        connection.get()
        together.wait()
        together.wait()
        types.append(connection.get().getType())

    thread = threading.Thread(target=use)
    thread.start()
    together.wait()
    connection.close()
    together.wait()
    thread.join()
    assert types == ["QEMU"]


def test_a_lost_one_fails_until_libvirtd_is_back(libvirtd: Libvirtd, connection: Connection) -> None:
    first = connection.get()
    libvirtd.kill()
    try:
        while first.isAlive():
            pass
        with pytest.raises(HypervisorUnreachableError):
            connection.get()
    finally:
        libvirtd.start()
    later = Connection(libvirtd.uri, read_only=False)
    assert later.get().isAlive()
    later.close()
