"""What all tests share: the `qemu` marker and the guests behind it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from typing import TYPE_CHECKING

import libvirt
import pytest

from tests.lab import ingredients
from tests.lab.commands import LabError
from tests.lab.guest import Guest
from tests.lab.libvirtd import Libvirtd, unpacked_programs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_QEMU_TOOLS = ("virsh", "qemu-system-x86_64", "unshare", "nsenter", "debugfs")


def pytest_configure() -> None:
    """Keep libvirt from printing every error that a test provokes."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `qemu` where they cannot run; in CI that is a failure, or nobody would notice."""
    if item.get_closest_marker("qemu") is None:
        return
    reason = _why_no_guests()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"cannot run guests: {reason}", pytrace=False)
        pytest.skip(f"cannot run guests: {reason}")


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    """Provide one private libvirtd for the whole session; a test that kills it must start it again."""
    with Libvirtd(tmp_path_factory.mktemp("libvirtd")) as daemon:
        yield daemon


@pytest.fixture
def make_guest(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Make guests with the options of `Guest`, plus `running`: up when returned (the default) or shut off.

    Each has a name of its own and is gone after the test, with its snapshots and files. So are storage pools,
    which the program under test makes.
    """
    with contextlib.ExitStack() as clean_up:

        def make(*, running: bool = True, **options: object) -> Guest:
            name = f"guest{next(_numbers)}"
            guest = Guest(libvirtd, name, tmp_path / name, **options)  # type: ignore[arg-type]
            clean_up.callback(guest.remove)
            guest.define()
            if running:
                guest.start()
                guest.wait_up()
            return guest

        yield make
        libvirtd.start()  # a failed test may have left it dead
        for pool in libvirtd.connect().listAllStoragePools():
            pool.destroy()


_numbers = itertools.count(1)


def _why_no_guests() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    absent = [tool for tool in _QEMU_TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    try:
        unpacked_programs()
    except LabError as error:
        return str(error)
    return ingredients.missing()
