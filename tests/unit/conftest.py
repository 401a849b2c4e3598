"""What all unit tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.demo import write_test_host
from kvmsnapd.live_config import LiveConfig
from tests.builders import NOW
from tests.unit.command_line import CONFIG, open_shared_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.command_line import SharedHost, Write


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of them."""
    for variable in list(os.environ):
        if variable.upper().startswith("KVMSNAPD_") or variable in {"STATE_DIRECTORY", "RUNTIME_DIRECTORY"}:
            monkeypatch.delenv(variable)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "kvmsnapd.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def host(tmp_path: Path) -> str:
    """Provide the URI of a host with three domains and without any snapshot."""
    return write_test_host(tmp_path, {"db01": True, "web-1": True, "lab": False})


@pytest.fixture
def shared_host() -> Iterator[SharedHost]:
    """Provide the default test host, without snapshots."""
    with open_shared_host() as shared:
        yield shared


@pytest.fixture
def own_directories(tmp_path: Path) -> str:
    """Provide the lines of a configuration that keep its files below the test's directory."""
    return f"runtime_directory: {tmp_path}/run\nstate_directory: {tmp_path}/state\n"


@pytest.fixture
def running(write: Write, own_directories: str) -> Iterator[LiveConfig]:
    """Provide what a running daemon has of its configuration, with its lock."""
    live = LiveConfig(Path(write(CONFIG + own_directories)), clock=lambda: NOW)
    live.be_the_only_one()
    yield live
    assert live._lock is not None  # the process, whose end frees it, is this one
    os.close(live._lock)
