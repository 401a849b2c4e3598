"""Machines with the package installed, one of each release for the whole session."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.lab import machine as lab
from tests.systemd.installed import Installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_numbers = itertools.count(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `systemd` where they cannot run; in CI that is a failure, or nobody would notice."""
    if item.get_closest_marker("systemd") and (reason := lab.missing()):
        if os.environ.get("CI"):
            pytest.fail(f"cannot boot machines: {reason}", pytrace=False)
        pytest.skip(f"cannot boot machines: {reason}")


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the package of a release, built when first asked for."""
    built: dict[str, Path] = {}

    def get(release: str) -> Path:
        if release not in built:
            built[release] = lab.build_package(release, tmp_path_factory.mktemp(f"package-{release}"))
        return built[release]

    return get


@pytest.fixture(scope="session")
def machines(
    tmp_path_factory: pytest.TempPathFactory, packages: Callable[[str], Path]
) -> Iterator[Callable[[str], Installed]]:
    """Give the machine of a release, booted and with the package installed when first asked for."""
    directory = tmp_path_factory.mktemp("machines")
    running: dict[str, Installed] = {}
    with contextlib.ExitStack() as clean_up:

        def get(release: str) -> Installed:
            if release not in running:
                machine = lab.Machine(release, directory)
                clean_up.enter_context(machine)
                shutil.copy(packages(release), machine.root / "srv/kvmsnapd.deb")
                host = Installed(machine)
                host.install()
                running[release] = host
            return running[release]

        yield get
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=lab.RELEASES)
def host(request: pytest.FixtureRequest, machines: Callable[[str], Installed]) -> Iterator[Installed]:
    """Provide a host with the package; the service is stopped and not enabled, the configuration the shipped one.

    It has one running guest of its own, `host.guest`.
    """
    host = machines(request.param)
    host.use(host.machine.add_guest(f"db{next(_numbers)}"))
    yield host
    print(host.shell("journalctl --no-pager -n 80 -u kvmsnapd.service || true"))  # pytest shows it if the test failed
    host.clean()
