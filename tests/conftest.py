"""What all tests share: the `qemu` marker and the guests behind it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from typing import TYPE_CHECKING, NoReturn

import libvirt
import pytest

from tests.lab import ingredients
from tests.lab.commands import LabError
from tests.lab.generations import OTHER_ROOT_VARIABLE
from tests.lab.generations import roots as generation_roots
from tests.lab.guest import guests_on
from tests.lab.libvirtd import Libvirtd, unpacked_programs
from tests.lab.small_disk import small_disk_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.lab.guest import Guest
    from tests.lab.small_disk import SmallDisk

_QEMU_TOOLS = ("virsh", "qemu-system-x86_64", "unshare", "nsenter", "debugfs")


def pytest_configure() -> None:
    """Keep libvirt from printing every error that a test provokes."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    # A run that was started in the background ignores Ctrl-C, and so would every program that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `qemu` where they cannot run; in CI that is a failure, or nobody would notice."""
    if item.get_closest_marker("qemu") is None:
        return
    reason = _why_no_guests()
    if reason is not None:
        _cannot_run(reason)


@pytest.fixture(autouse=True)
def _signals_are_not_blocked() -> Iterator[None]:
    """Take back what a daemon in this process does to the signals, which programs that are started later inherit."""
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM})


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """Provide a small file system that all libvirtds of the session see; a test that fills it must empty it again."""
    with small_disk_at(tmp_path_factory.getbasetemp() / "small") as disk:
        yield disk


@pytest.fixture(scope="session")
def generations(tmp_path_factory: pytest.TempPathFactory, small_disk: SmallDisk) -> Iterator[Callable[[str], Libvirtd]]:
    """Provide private libvirtds by the name of their generation, each started when first asked for.

    One of each lives through the whole session; a test that kills it must start it again.
    """
    roots = generation_roots()
    shared = (tmp_path_factory.getbasetemp(), small_disk.path, ingredients.CACHE)
    running: dict[str, Libvirtd] = {}
    with contextlib.ExitStack() as clean_up:

        def get(name: str) -> Libvirtd:
            if name not in running:
                root = roots.get(name)
                if root is None:
                    _cannot_run(f"{name} is neither the machine's own nor below ${OTHER_ROOT_VARIABLE}")
                daemon = Libvirtd(tmp_path_factory.mktemp(name, numbered=False), root, shared)
                running[name] = clean_up.enter_context(daemon)
            return running[name]

        yield get


@pytest.fixture(params=list(generation_roots()))
def libvirtd(request: pytest.FixtureRequest, generations: Callable[[str], Libvirtd]) -> Libvirtd:
    """Provide a private libvirtd; whoever uses it runs once on each generation."""
    return generations(request.param)


@pytest.fixture
def make_guest(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Make guests on `libvirtd`; they are gone after the test. See `guests_on` for the options."""
    with guests_on(libvirtd, tmp_path) as make:
        yield make


def _cannot_run(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"cannot run guests: {reason}", pytrace=False)
    pytest.skip(f"cannot run guests: {reason}")


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
