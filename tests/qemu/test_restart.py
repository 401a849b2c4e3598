"""A restart of the daemon moves no series of state: nothing that would hide an alert, or raise one."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.lab.daemon import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

# Counters and durations begin at 0, as Prometheus expects of them; the process and its clock are others.
BEGIN_ANEW = ("_total", "_bucket", "_count", "_sum")
OF_THE_PROCESS = {
    "kvmsnapd_scheduler_last_tick_timestamp_seconds",
    "kvmsnapd_config_last_reload_success_timestamp_seconds",
    "kvmsnapd_storage_free_bytes",
}
POLICIES = """
policies:
  good: {schedule: daily, splay: 0s, keep: {last: 3}}
  full: {schedule: daily, splay: 0s, keep: {last: 3}, min_free: 1000TiB}
  deep: {schedule: daily, splay: 0s, keep: {last: 9}, max_chain_depth: 3}
domains:
"""


def state(daemon: DaemonProcess) -> dict[tuple[str, ...], float]:
    """Return the series of state of one scrape."""
    return {
        series: value
        for series, value in daemon.metrics().items()
        if series[0].startswith("kvmsnapd_") and not series[0].endswith(BEGIN_ANEW) and series[0] not in OF_THE_PROCESS
    }


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_first_scrape_after_a_restart_is_the_last_one_before(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, tmp_path: Path, how: signal.Signals
) -> None:
    good, frozen, full, deep = make_guest(), make_guest(), make_guest(running=False), make_guest(running=False)
    frozen.ask_agent("guest-fsfreeze-freeze")
    assigned = {good.name: "good", frozen.name: "good", full.name: "full", deep.name: "deep", "gone": "good"}
    entries = "".join(f"  {domain}: [{policy}]\n" for domain, policy in assigned.items())
    daemon = DaemonProcess(tmp_path / "daemon", libvirtd.uri, POLICIES + entries)
    try:
        daemon.start()
        daemon.wait_for(lambda: len(daemon.events("run.finished")) >= 4 and len(daemon.events("snapshot.taken")) == 2)
        # The look from which the age of the new snapshots is known, and after which all is noted.
        key = ("kvmsnapd_last_success_timestamp_seconds", frozen.name, "good")
        daemon.wait_for(lambda: key in daemon.metrics())
        ended = len(daemon.events("run.finished"))
        before = daemon.wait_for(lambda: (first := state(daemon)) == state(daemon) and first)
        daemon.wait_for((tmp_path / "daemon/state/findings.json").exists)
        daemon.kill(how)
        daemon.start()
        after = state(daemon)
        assert len(daemon.events("run.finished")) - ended <= 2  # those that fail are tried anew at once
    finally:
        daemon.kill()
        frozen.ask_agent("guest-fsfreeze-thaw")
    for name, labels in (
        ("guest_frozen", (frozen.name,)),
        ("newest_below_consistency", (frozen.name, "good", "filesystem-preferred")),
        ("quarantined", (deep.name, "deep", "chain_budget")),
        ("domain_missing", ("gone",)),
    ):
        assert before[f"kvmsnapd_{name}", *labels] == 1
    assert before["kvmsnapd_failures_in_a_row", full.name, "full", "space"] >= 1
    assert before["kvmsnapd_backing_chain_depth", good.name, "vda"] == 1
    # Chains and folders are looked at in the background; runs that failed may have failed once more.
    late = {"kvmsnapd_backing_chain_depth", "kvmsnapd_max_chain_depth", "kvmsnapd_min_free_bytes"}
    again = {"kvmsnapd_failures_in_a_row", "kvmsnapd_last_attempt_timestamp_seconds"}
    assert _without(after, late | again) == _without(before, late | again)
    for series, count in before.items():
        if series[0] == "kvmsnapd_failures_in_a_row":
            assert after[series] - count in {0, 1}


def test_a_guest_that_is_thawed_again_is_not_called_frozen_until_the_next_run(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = make_guest()
    guest.ask_agent("guest-fsfreeze-freeze")
    daemon = DaemonProcess(tmp_path / "daemon", libvirtd.uri, f"{POLICIES}  {guest.name}: [good]\n")
    series = ("kvmsnapd_guest_frozen", guest.name)
    try:
        daemon.start()
        daemon.wait_for(lambda: daemon.metrics()[series] == 1)
        time.sleep(2.5)  # it is looked at again, and is still frozen
        assert daemon.metrics()[series] == 1
        guest.ask_agent("guest-fsfreeze-thaw")
        daemon.wait_for(lambda: daemon.metrics()[series] == 0)
        assert len(daemon.events("run.started")) == 1
    finally:
        daemon.kill()


def test_chains_and_folders_are_known_again_within_seconds_though_nothing_is_due(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = make_guest()
    daemon = DaemonProcess(tmp_path / "daemon", libvirtd.uri, f"{POLICIES}  {guest.name}: [good]\n")
    try:
        daemon.start()
        daemon.wait_for(lambda: daemon.events("run.finished"))
        daemon.kill(signal.SIGTERM)
        daemon.start()
        chain = ("kvmsnapd_backing_chain_depth", guest.name, "vda")
        scrape = daemon.wait_for(lambda: chain in (seen := daemon.metrics()) and seen)
        assert not daemon.new_events("run.started")
    finally:
        daemon.kill()
    folder = str(guest.directory)
    assert scrape[chain] == 1
    assert scrape["kvmsnapd_max_chain_depth", guest.name] == 16
    assert scrape["kvmsnapd_min_free_bytes", folder] == 2**30
    assert scrape["kvmsnapd_storage_free_bytes", folder] > 0


def _without(scrape: dict[tuple[str, ...], float], names: set[str]) -> dict[tuple[str, ...], float]:
    return {series: value for series, value in scrape.items() if series[0] not in names}
