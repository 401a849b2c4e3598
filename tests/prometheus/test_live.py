"""A real Prometheus scrapes a real daemon; something breaks: one alert comes, that one, and goes after the repair."""

from __future__ import annotations

import signal
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from kvmsnapd.demo import write_test_host
from tests.builders import UUID
from tests.lab.daemon import DaemonProcess
from tests.lab.guest import Guest
from tests.lab.history import write_host_with_history
from tests.lab.prometheus import Prometheus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.lab.libvirtd import Libvirtd
    from tests.lab.small_disk import SmallDisk

    Watch = Callable[..., tuple[DaemonProcess, Prometheus]]

pytestmark = [pytest.mark.qemu, pytest.mark.prometheus]

CALM_SECONDS = 6
"""Longer than any alert's ``for`` that a cause of its own does not silence, at the lab's speed."""

STANDARD = "policies:\n  standard: {schedule: daily, splay: 0s, keep: {last: 2}"


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Start a daemon and a Prometheus that scrapes it; return once all is well."""
    daemons: list[DaemonProcess] = []
    servers: list[Prometheus] = []

    def start(uri: str, policies: str, *, port: int = 0) -> tuple[DaemonProcess, Prometheus]:
        daemon = DaemonProcess(tmp_path / "daemon", uri, policies)
        daemon.write_config(policies, port=port or free_port())
        daemons.append(daemon)
        daemon.start()
        daemon.wait_for(lambda: daemon.new_events("run.finished"))
        prometheus = a_prometheus(tmp_path / "prometheus", {daemon: {"host": "kvm1"}})
        servers.append(prometheus)
        prometheus.wait_for(lambda: prometheus.query("kvmsnapd_last_success_timestamp_seconds"))
        assert prometheus.firing() == set()
        return daemon, prometheus

    yield start
    for server in servers:
        server.stop()
    for daemon in daemons:
        daemon.kill()


def a_prometheus(directory: Path, daemons: Mapping[DaemonProcess, Mapping[str, str]]) -> Prometheus:
    targets = [(address_of(daemon), labels) for daemon, labels in daemons.items()]
    prometheus = Prometheus(directory, targets)
    prometheus.start()
    # Before it has found its targets it says, rightly, that there are none.
    prometheus.wait_for(lambda: len(prometheus.query("up == 1")) == len(targets) and not prometheus.firing())
    return prometheus


def address_of(daemon: DaemonProcess) -> str:
    return urlsplit(daemon.new_events("daemon.started")[0]["metrics"]).netloc


def calm(prometheus: Prometheus) -> None:
    """Hold that nothing fires, for a while."""
    prometheus.wait_for(lambda: not prometheus.firing())
    until = time.monotonic() + CALM_SECONDS
    while time.monotonic() < until:
        assert prometheus.firing() == set()
        time.sleep(0.5)


def only(prometheus: Prometheus, alert: str) -> None:
    """Wait for an alert, and hold that no other one comes with it."""
    until = time.monotonic() + 60
    while alert not in (firing := prometheus.firing()):
        assert firing == set()
        assert time.monotonic() < until, prometheus.alerts()
        time.sleep(0.2)
    until = time.monotonic() + CALM_SECONDS
    while time.monotonic() < until:
        assert prometheus.firing() == {alert}
        time.sleep(0.5)


def test_a_killed_daemon(watch: Watch, tmp_path: Path) -> None:
    daemon, prometheus = watch(
        write_test_host(tmp_path, {"db01": True}), f"{STANDARD}, kind: internal}}\ndomains:\n  db01: [standard]\n"
    )
    daemon.kill()
    only(prometheus, "KvmsnapdDaemonAbsent")
    daemon.start()
    calm(prometheus)


def test_a_broken_configuration(watch: Watch, tmp_path: Path) -> None:
    daemon, prometheus = watch(
        write_test_host(tmp_path, {"db01": True}), f"{STANDARD}, kind: internal}}\ndomains:\n  db01: [standard]\n"
    )
    good = daemon.config.read_text()
    daemon.config.write_text(good.replace("schedule", "shedule"))
    daemon.reload()
    only(prometheus, "KvmsnapdConfigRejected")
    daemon.config.write_text(good)
    daemon.reload()
    calm(prometheus)


def test_an_edit_that_nobody_has_put_in_force(watch: Watch, tmp_path: Path) -> None:
    daemon, prometheus = watch(
        write_test_host(tmp_path, {"db01": True}), f"{STANDARD}, kind: internal}}\ndomains:\n  db01: [standard]\n"
    )
    daemon.config.write_text(daemon.config.read_text().replace("last: 2", "last: 3"))
    only(prometheus, "KvmsnapdConfigNotLoaded")
    daemon.reload()
    calm(prometheus)


def test_a_snapshot_that_does_not_boot(watch: Watch, make_guest: Callable[..., Guest], libvirtd: Libvirtd) -> None:
    guest = make_guest()
    drills = "verify: {schedule: every 2s, max_age: 20d}"
    daemon, prometheus = watch(libvirtd.uri, f"{STANDARD}, {drills}}}\ndomains:\n  {guest.name}: [standard]\n")
    prometheus.wait_for(lambda: prometheus.query("kvmsnapd_last_verified_timestamp_seconds"))
    with guest.images[0].open("r+b") as image:
        header = image.read(512)
        image.seek(0)
        image.write(b"\0" * 512)  # the guest has it open, and does not look there again
    only(prometheus, "KvmsnapdDrillFailed")
    assert any("libvirt could" in event["detail"] for event in daemon.events("drill.finished"))
    with guest.images[0].open("r+b") as image:
        image.write(header)
    calm(prometheus)
    assert guest.alive()


def test_a_libvirtd_that_is_gone(watch: Watch, make_guest: Callable[..., Guest], libvirtd: Libvirtd) -> None:
    guest = make_guest(running=False)
    _, prometheus = watch(libvirtd.uri, f"{STANDARD}}}\ndomains:\n  {guest.name}: [standard]\n")
    libvirtd.stop()
    try:
        only(prometheus, "KvmsnapdLibvirtDown")
    finally:
        libvirtd.start()
    calm(prometheus)


def test_a_guest_agent_that_stops_under_filesystem(
    watch: Watch, make_guest: Callable[..., Guest], libvirtd: Libvirtd
) -> None:
    guest = make_guest()
    policies = (
        "policies:\n  strict: {schedule: every 2s, splay: 0s, keep: {last: 2}, consistency: filesystem, max_age: 1h}\n"
    )
    daemon, prometheus = watch(libvirtd.uri, f"{policies}domains:\n  {guest.name}: [strict]\n")
    guest.hang_agent(70)
    only(prometheus, "KvmsnapdRunsFailing")
    (alert,) = prometheus.alerts()
    assert alert["labels"]["domain"] == guest.name
    assert "because of agent" in alert["annotations"]["description"]
    daemon.wait_for(lambda: daemon.metrics().get(("kvmsnapd_failures_in_a_row", guest.name, "strict", "")) == 0, 90)
    calm(prometheus)


def test_a_storage_that_is_full(watch: Watch, libvirtd: Libvirtd, small_disk: SmallDisk) -> None:
    guest = Guest(libvirtd, "small", small_disk.path / "small")
    guest.define()
    try:
        policies = f"{STANDARD.replace('daily', 'every 2s')}, min_free: 32MiB, max_age: 1h}}\n"
        _, prometheus = watch(libvirtd.uri, f"{policies}domains:\n  {guest.name}: [standard]\n")
        small_disk.fill(leave=16 * 2**20)
        only(prometheus, "KvmsnapdStorageLow")
        small_disk.relieve()
        calm(prometheus)
    finally:
        small_disk.relieve()
        guest.remove()


def test_a_domain_that_nobody_protects(watch: Watch, make_guest: Callable[..., Guest], libvirtd: Libvirtd) -> None:
    guest = make_guest(running=False)
    _, prometheus = watch(libvirtd.uri, f"{STANDARD}}}\ndomains:\n  {guest.name}: [standard]\n")
    forgotten = make_guest(running=False)
    only(prometheus, "KvmsnapdDomainUnprotected")
    (alert,) = prometheus.alerts()
    assert alert["labels"]["domain"] == forgotten.name
    forgotten.domain.undefine()
    calm(prometheus)


# Many hosts


MOVING = "policies:\n  p: {schedule: yearly, catch_up: skip, kind: internal, keep: {last: 9}, max_age: 1h}\n"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Start the daemon of a host whose domain db01 has a snapshot of this age; None is a host without the domain."""
    daemons: list[DaemonProcess] = []

    def start(name: str, age: timedelta | None, entry: str = "db*") -> DaemonProcess:
        directory = tmp_path / name
        directory.mkdir()
        if age is None:
            uri = write_test_host(directory, {"other": True})
            entry = f"{entry}: [p]\n  other"
        else:
            uri = write_host_with_history(directory, "p", [datetime.now(UTC).replace(microsecond=0) - age])
        daemon = DaemonProcess(directory / "daemon", uri, f"{MOVING}domains:\n  {entry}: [p]\n")
        daemons.append(daemon)
        daemon.start()
        return daemon

    yield start
    for daemon in daemons:
        daemon.kill()


def test_a_domain_that_has_moved_alerts_by_its_uuid_and_once(
    host: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    left, arrived = host("kvm1", timedelta(days=3)), host("kvm2", timedelta(minutes=5))
    prometheus = a_prometheus(tmp_path / "prometheus", {left: {"host": "kvm1"}, arrived: {"host": "kvm2"}})
    try:
        prometheus.wait_for(lambda: len(prometheus.query("kvmsnapd_last_success_timestamp_seconds")) == 2)
        calm(prometheus)
        arrived.kill(signal.SIGTERM)
        worse = host("kvm3", timedelta(days=2))
        targets = {left: {"host": "kvm1"}, worse: {"host": "kvm3"}}
        prometheus.stop()
        prometheus = a_prometheus(tmp_path / "again", targets)
        only(prometheus, "KvmsnapdSnapshotOverdue")
        (alert,) = prometheus.alerts()
        assert (alert["labels"]["domain"], alert["labels"]["uuid"]) == ("db01", UUID)
        assert "kvm1" in alert["annotations"]["description"]
        assert "kvm3" in alert["annotations"]["description"]
    finally:
        prometheus.stop()


def test_a_domain_that_another_host_has_is_not_missing(host: Callable[..., DaemonProcess], tmp_path: Path) -> None:
    has, named = host("kvm1", timedelta(minutes=5)), host("kvm2", None, "db01")
    prometheus = a_prometheus(tmp_path / "prometheus", {has: {"host": "kvm1"}, named: {"host": "kvm2"}})
    try:
        prometheus.wait_for(lambda: prometheus.query("kvmsnapd_domain_missing == 1"))
        time.sleep(CALM_SECONDS)
        assert prometheus.firing() == set()
        prometheus.stop()
        prometheus = a_prometheus(tmp_path / "alone", {named: {"host": "kvm2"}})
        only(prometheus, "KvmsnapdDomainMissing")
    finally:
        prometheus.stop()


def free_port() -> int:
    """Return a port that is free now, so that a daemon that starts again is found where it was."""
    import socket  # noqa: PLC0415

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
