"""What systemd is told, over a socket of our own, by the class and by the daemon."""

from __future__ import annotations

import os
import signal
import socket
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from kvmsnapd.demo import write_test_host
from kvmsnapd.service_manager import ServiceManager
from tests.lab.daemon import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Listener:
    """Systemd's end."""

    def __init__(self, address: str) -> None:
        self.address = address.replace("\0", "@")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(20)

    def next(self) -> dict[str, str]:
        """Return the next message."""
        lines = self.socket.recv(65536).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def until(self, key: str) -> list[dict[str, str]]:
        """Return messages up to the first that has this key."""
        messages = [self.next()]
        while key not in messages[-1]:
            messages.append(self.next())
        return messages


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    # Abstract names are one for the whole machine, whatever root a test run has.
    listener = Listener(str(tmp_path / "notify") if request.param == "path" else f"\0kvmsnapd-{uuid4()}")
    yield listener
    listener.socket.close()


def test_it_tells_what_the_protocol_has(listener: Listener) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": listener.address})
    manager.ready()
    assert listener.next() == {"READY": "1"}
    manager.reloading()
    message = listener.next()
    assert (message["RELOADING"], message["MONOTONIC_USEC"].isdecimal()) == ("1", True)
    manager.describe("fine", alive=True)
    assert listener.next() == {"STATUS": "fine", "WATCHDOG": "1"}
    manager.describe("the scheduler\nstands", alive=False)
    assert listener.next() == {"STATUS": "the scheduler stands"}
    manager.stopping()
    assert listener.next()["STOPPING"] == "1"


def test_a_long_text_is_cut_between_characters(listener: Listener) -> None:
    ServiceManager({"NOTIFY_SOCKET": listener.address}).describe("x" + "ö" * 1000, alive=True)
    status = listener.next()["STATUS"]
    assert status == "x" + "ö" * ((len(status.encode()) - 1) // 2)
    assert len(status.encode()) <= 400


def test_elsewhere_it_tells_nobody() -> None:
    manager = ServiceManager({})
    manager.ready()
    assert manager.watchdog is None


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    assert "the service manager cannot be told READY=1" in caplog.text


@pytest.mark.parametrize(
    ("pid", "expected"), [({}, 3), ({"WATCHDOG_PID": str(os.getpid())}, 3), ({"WATCHDOG_PID": "1"}, None)]
)
def test_the_watchdog_is_ours_unless_it_is_for_another_process(pid: dict[str, str], expected: int | None) -> None:
    manager = ServiceManager({"WATCHDOG_USEC": "3000000", **pid})
    assert manager.watchdog == (timedelta(seconds=expected) if expected else None)


def test_hooks_do_not_inherit_it() -> None:
    environment = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin"}
    ServiceManager(environment)
    assert environment == {"PATH": "/bin"}


POLICIES = """\
policies:
  slow: {schedule: every 1h, keep: {last: 2}, kind: internal}
domains:
  db01: [slow]
"""


def test_a_daemon_tells_how_it_is_from_start_to_end(
    listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    daemon = DaemonProcess(tmp_path / "daemon", write_test_host(tmp_path, {"db01": True}), POLICIES)
    request.addfinalizer(daemon.kill)
    monkeypatch.setenv("NOTIFY_SOCKET", listener.address)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    daemon.start()
    assert listener.next() == {"READY": "1"}
    daemon.wait_for(lambda: listener.next()["STATUS"].startswith("1 domain(s) protected, next db01/slow at "))
    assert all(listener.next()["WATCHDOG"] == "1" for _ in range(5))

    daemon.write_config(POLICIES.replace("schedule", "schedul"))
    daemon.reload()
    told = listener.until("RELOADING") + listener.until("READY") + listener.until("STATUS")
    assert told[-1]["STATUS"].startswith("the edited configuration is refused and the one before in force")
    daemon.write_config(POLICIES)
    daemon.reload()
    told = listener.until("RELOADING") + listener.until("READY") + listener.until("STATUS")
    assert told[-1]["STATUS"].startswith("1 domain(s) protected, next db01/slow at ")

    assert daemon.kill(signal.SIGTERM) == 0
    assert listener.until("STOPPING")[-1]["STATUS"].startswith("ending")
