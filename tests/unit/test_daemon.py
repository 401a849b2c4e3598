"""The daemon as a process, on libvirt's test driver: start, reload, metrics, stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.demo import write_test_host
from tests.lab.daemon import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POLICIES = """\
policies:
  fast: {schedule: every 1s, keep: {last: 2}, kind: internal}
  slow: {schedule: every 1h, keep: {last: 2}, kind: internal}
domains:
  db01: [fast, slow]
  "web-*": [slow]
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    uri = write_test_host(tmp_path, {"db01": True, "web-1": False, "other": True})
    daemon = DaemonProcess(tmp_path / "daemon", uri, POLICIES)
    daemon.start()
    yield daemon
    daemon.kill()


def test_every_pair_has_its_series_and_snapshots_come_and_go(daemon: DaemonProcess) -> None:
    daemon.wait_for(lambda: len(daemon.events("snapshot.deleted")) >= 2)
    scrape = daemon.wait_for(lambda: (m := daemon.metrics())["kvmsnapd_snapshots", "web-1", "slow"] == 1 and m)
    assert scrape["kvmsnapd_snapshots", "db01", "fast"] in {2, 3}  # a scrape may fall between take and delete
    assert scrape["kvmsnapd_domain_unprotected", "other"] == 1
    assert scrape["kvmsnapd_domain_unprotected", "db01"] == 0
    assert {e["consistency"] for e in daemon.events("snapshot.taken") if e["domain"] == "web-1"} == {"offline"}
    slots = [(e["domain"], e["policy"], e["scheduled_at"]) for e in daemon.events("snapshot.taken")]
    assert len(slots) == len(set(slots))


def test_sigterm_and_sigint_end_it_with_0(daemon: DaemonProcess) -> None:
    daemon.wait_for(lambda: daemon.events("snapshot.taken"))
    assert daemon.kill(signal.SIGTERM) == 0
    daemon.start()
    assert daemon.kill(signal.SIGINT) == 0
    assert len(daemon.events("daemon.stopped")) == 2


def test_a_bad_edit_keeps_the_old_configuration_and_says_where(daemon: DaemonProcess) -> None:
    daemon.write_config(POLICIES.replace("schedule: every 1h", "schedul: every 1h", 1))
    daemon.reload()
    (rejected,) = daemon.events("config.rejected")
    places = [problem.split(": unknown key")[0] for problem in rejected["problems"]]
    assert f"{daemon.config}:3:10: policies.slow.schedul" in places
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 0
    taken = len(daemon.events("snapshot.taken"))
    daemon.wait_for(lambda: len(daemon.events("snapshot.taken")) > taken + 1)
    daemon.write_config(POLICIES)
    daemon.reload()
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 1


def test_a_missing_file_at_a_reload_changes_nothing(daemon: DaemonProcess) -> None:
    daemon.config.unlink()
    daemon.reload()
    assert "cannot be read" in daemon.events("config.rejected")[0]["problems"][0]
    taken = len(daemon.events("snapshot.taken"))
    daemon.wait_for(lambda: len(daemon.events("snapshot.taken")) > taken + 1)


def test_a_reload_touches_only_the_jobs_of_the_changed_policy(daemon: DaemonProcess) -> None:
    daemon.wait_for(lambda: daemon.events("jobs.changed"))
    daemon.write_config(POLICIES.replace("every 1h", "every 2h"))
    daemon.reload()
    daemon.wait_for(lambda: len(daemon.events("jobs.changed")) == 2)
    first, second = daemon.events("jobs.changed")
    assert (first["added"], first["changed"], first["removed"]) == (3, 0, 0)
    assert (second["added"], second["changed"], second["removed"]) == (0, 2, 0)
    assert daemon.metrics()["kvmsnapd_expected_interval_seconds", "db01", "slow"] == 7200


def test_a_policy_that_no_longer_applies_leaves_its_snapshots_and_takes_its_series_along(
    daemon: DaemonProcess,
) -> None:
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_snapshots", "web-1", "slow"] == 1)
    daemon.write_config(POLICIES.replace('"web-*": [slow]', '"web-*": []'))
    daemon.reload()
    scrape = daemon.wait_for(lambda: (m := daemon.metrics())["kvmsnapd_snapshots_unmanaged", "web-1"] == 1 and m)
    assert not [key for key in scrape if "web-1" in key and "slow" in key]
    assert scrape["kvmsnapd_domain_unprotected", "web-1"] == 0


def test_health_is_answered_and_other_paths_are_not(daemon: DaemonProcess) -> None:
    base = daemon.new_events("daemon.started")[0]["metrics"].removesuffix("/metrics")
    daemon.wait_for(lambda: urllib.request.urlopen(f"{base}/-/ready", timeout=5).status == 200)  # noqa: S310
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{base}/", timeout=5)  # noqa: S310


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("policies: [", 78, ":1:12: not YAML"),
        ("policies: {p: {schedule: hourly, keep: {}}}", 78, "keep has no rule"),
        (None, 78, "cannot be read"),
        ("runtime_directory: /proc/kvmsnapd\nmetrics: {enabled: false}", 1, "cannot use /proc/kvmsnapd"),
    ],
)
def test_what_it_cannot_start_with_ends_it_with_a_message(
    tmp_path: Path, content: str | None, code: int, words: str
) -> None:
    config = tmp_path / "kvmsnapd.yaml"
    if content is not None:
        config.write_text(content)
    command = [sys.executable, "-m", "kvmsnapd", "run", "--config", config, "--connect", "test:///default"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == code
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unreachable_libvirt_is_waited_for_and_told(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "daemon", f"qemu+unix:///system?socket={tmp_path}/none", POLICIES)
    daemon.start()
    daemon.wait_for(lambda: daemon.events("libvirt.lost"))
    assert daemon.metrics()["kvmsnapd_libvirt_up",] == 0
    assert daemon.kill(signal.SIGTERM) == 0


def test_a_missed_slot_that_is_not_to_be_caught_up_is_told_once_and_not_taken(tmp_path: Path) -> None:
    policies = (
        "policies:\n  p: {schedule: yearly, keep: {last: 1}, kind: internal, catch_up: skip}\ndomains: {db01: [p]}\n"
    )
    daemon = DaemonProcess(tmp_path / "daemon", write_test_host(tmp_path, {"db01": True}), policies)
    daemon.start()
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_runs_skipped_total", "db01", "p", "misfire"] == 1)
    ticked_at = daemon.metrics()["kvmsnapd_scheduler_last_tick_timestamp_seconds",]
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_scheduler_last_tick_timestamp_seconds",] > ticked_at + 1)
    assert len(daemon.events("run.skipped")) == 1
    assert daemon.events("snapshot.taken") == []
    daemon.kill()


def test_a_refused_domain_is_tried_again_after_pauses(tmp_path: Path) -> None:
    policies = "policies:\n  p: {schedule: every 6s, splay: 0s, keep: {last: 1}}\ndomains: {db01: [p]}\n"
    daemon = DaemonProcess(tmp_path / "daemon", write_test_host(tmp_path, {"db01": True}), policies)
    daemon.start()
    skips = daemon.wait_for(lambda: (found := daemon.events("run.skipped"))[3:] and found)
    daemon.kill()
    assert {event["reason"] for event in skips} == {"unsupported"}
    times = [datetime.fromisoformat(event["timestamp"]) for event in skips]
    # After half of the interval, or sooner where a new slot begins; not again and again at once.
    assert all(later - earlier < timedelta(seconds=5) for earlier, later in pairwise(times))
    assert times[3] - times[0] > timedelta(seconds=4)
