"""Reloads of a daemon at work: no run is lost or doubled, nothing is deleted at once, and everybody can see it."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

from kvmsnapd import daemon as daemon_module
from kvmsnapd import outlets as outlets_module
from kvmsnapd.daemon import Daemon
from kvmsnapd.demo import write_test_host
from kvmsnapd.events import HookFinished, SnapshotTaken
from kvmsnapd.execute import Executor, Outcome, Result
from kvmsnapd.fleet import survey
from kvmsnapd.model import Kind
from kvmsnapd.naming import format_name
from kvmsnapd.policy import Hook, Hooks
from kvmsnapd.scheduler import JobScheduler, Wanted
from kvmsnapd.state_files import DomainLocks, FreezeIntents
from tests.builders import NOW, OTHER_UUID, UUID, a_domain, a_policy, at, hourly_snapshots
from tests.fakes import FakeHypervisor
from tests.lab.daemon import DaemonProcess
from tests.lab.history import write_host_with_history

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmsnapd.events import Event
    from kvmsnapd.fleet import Pair
    from kvmsnapd.model import Snapshot
    from kvmsnapd.policy import Policy

    Start = Callable[..., DaemonProcess]

SECOND, HOUR, DAY = timedelta(seconds=1), timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start daemons; they are gone after the test."""
    started: list[DaemonProcess] = []

    def start(uri: str, policies: str) -> DaemonProcess:
        daemon = DaemonProcess(tmp_path / "daemon", uri, policies)
        started.append(daemon)
        daemon.start()
        return daemon

    yield start
    for daemon in started:
        daemon.kill()


def kvmsnapd(daemon: DaemonProcess, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does beside the daemon."""
    line = [sys.executable, "-m", "kvmsnapd", command, "--config", str(daemon.config), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def slots_of(daemon: DaemonProcess) -> dict[tuple[str, str], list[datetime]]:
    """Return the slots that were taken, by domain and policy, in the order they were taken."""
    found: dict[tuple[str, str], list[datetime]] = {}
    for event in daemon.events("snapshot.taken"):
        found.setdefault((event["domain"], event["policy"]), []).append(datetime.fromisoformat(event["scheduled_at"]))
    return found


# A storm of reloads

STORM = 100


def stormy(number: int) -> str:
    """Return one of the configurations of the storm; every third one is broken."""
    toggled = ("every 1s", "every 2s")[number % 2]
    keep = 2 + number % 4
    lines = f"""\
policies:
  steady: {{schedule: every 1s, keep: {{last: 3}}, kind: internal, splay: 0s}}
  rare: {{schedule: every 1h, keep: {{last: 3}}, kind: internal, splay: 0s}}
  toggled: {{schedule: {toggled}, keep: {{last: {keep}}}, kind: internal, splay: 0s}}
domains:
  db01: [steady, rare]
  db02: [steady, toggled]
  db03: [steady]
  db04: {"[toggled]" if number % 4 else "[]"}
"""
    return lines.replace("schedule", "schedul", 1) if number % 3 == 2 else lines


class Tail:
    """A daemon's log as it grows; each line is read once."""

    def __init__(self, log: IO[str]) -> None:
        self._file = log
        self._rest = ""

    def wait_for(self, names: set[str]) -> str:
        """Return the name of the next event among these."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            line = self._rest + self._file.readline()
            self._rest = "" if line.endswith("\n") else line
            if self._rest or not line:
                time.sleep(0.002)
            elif (name := json.loads(line)["event"]) in names:
                return str(name)
        msg = f"none of {names} came"
        raise AssertionError(msg)


@pytest.mark.slow
def test_in_a_storm_of_reloads_no_run_is_lost_and_none_doubled(start: Start, tmp_path: Path) -> None:
    daemon = start(write_test_host(tmp_path, {f"db0{n}": True for n in range(1, 5)}), stormy(0))
    daemon.wait_for(lambda: len(slots_of(daemon)) == 5)
    assert daemon.process
    outcomes, began = [], time.monotonic()
    with daemon.log.open() as log:
        tail = Tail(log)
        tail.wait_for({"config.loaded"})  # at the start
        for number in range(1, STORM + 1):
            daemon.write_config(stormy(number))
            daemon.process.send_signal(signal.SIGHUP)
            outcomes.append(tail.wait_for({"config.loaded", "config.rejected"}))
            time.sleep(max(0.0, began + number / 10 - time.monotonic()))
    took = time.monotonic() - began
    assert outcomes == ["config.rejected" if n % 3 == 2 else "config.loaded" for n in range(1, STORM + 1)]
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 1
    before = len(daemon.events("snapshot.taken"))
    daemon.wait_for(lambda: len(daemon.events("snapshot.taken")) > before + 4)
    assert daemon.kill(signal.SIGTERM) == 0

    taken = slots_of(daemon)
    print(f"{STORM} reloads in {took:.1f} s, {sum(map(len, taken.values()))} snapshots")
    for domain in ("db01", "db02", "db03"):
        steady = taken[domain, "steady"]
        assert {later - earlier for earlier, later in pairwise(steady)} == {SECOND}, domain
        assert len(steady) >= took
    assert len(taken["db01", "rare"]) == len({slot.hour for slot in taken["db01", "rare"]})
    # The slots of every other second are those of both schedules.
    toggled = taken["db02", "toggled"]
    assert toggled == sorted(set(toggled))
    even = [slot for slot in toggled if slot.second % 2 == 0]
    assert {later - earlier for earlier, later in pairwise(even)} == {2 * SECOND}
    assert taken["db04", "toggled"] == sorted(set(taken["db04", "toggled"]))
    worse = [e for e in daemon.events() if e["level"] not in {"debug", "info"} and e["event"] != "config.rejected"]
    # db04 loses its policy again and again; a run whose policy is changed meanwhile, or whose job is, says so.
    known = ("config.domain_changed", "prune.blocked", "Execution of job")
    assert [event for event in worse if not event["event"].startswith(known)] == []
    assert {reason for event in worse for reason in event.get("blocked", ())} <= {"changed"}


# A retention that shrinks


def keeping(rule: str) -> str:
    return (
        f"policies:\n  p: {{schedule: every 1s, keep: {{{rule}}}, kind: internal, splay: 0s}}\ndomains: {{db01: [p]}}\n"
    )


@pytest.mark.slow
def test_a_retention_that_shrinks_deletes_nothing_beyond_the_fuse_and_shows_what_waits(
    start: Start, tmp_path: Path
) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    history = [midnight - n * DAY for n in range(29, 0, -1)]
    daemon = start(write_host_with_history(tmp_path, "p", history), keeping("daily: 30"))
    daemon.wait_for(lambda: len(daemon.events("snapshot.deleted")) >= 1)  # of today only the newest stays
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_snapshots", "db01", "p"] >= 30)
    old = {format_name("p", slot) for slot in history}
    assert not old & {event["snapshot"] for event in daemon.events("snapshot.deleted")}

    daemon.write_config(keeping("daily: 7"))
    daemon.reload()
    loaded = daemon.events("config.loaded")[-1]
    assert (loaded["policies_changed"], loaded["domains_changed"]) == ({"p": ["keep"]}, 1)
    (change,) = daemon.events("config.domain_changed")
    assert (change["domain"], change["changed"], change["level"]) == ("db01", {"p": ["keep"]}, "warning")
    assert change["releases"] == {"p": 23}
    assert change["fuse"] == ["p"]
    # Whatever run was going on while it was loaded, the second one after it began under the new rules.
    deleted = len(daemon.events("snapshot.deleted"))
    daemon.wait_for(lambda: len([e for e in daemon.events("prune.blocked") if "fuse" in e["blocked"]]) >= 2)
    blocked = [e for e in daemon.events("prune.blocked") if "fuse" in e["blocked"]]
    assert blocked[0]["blocked"]["fuse"] >= 23
    assert "max_deletes_per_run: 10" in blocked[0]["detail"]
    assert (blocked[0]["level"], blocked[0]["again"]) == ("warning", False)
    assert daemon.metrics()["kvmsnapd_prune_blocked", "db01", "p", "fuse"] >= 23
    assert daemon.metrics()["kvmsnapd_snapshots", "db01", "p"] >= 30
    gone = {event["snapshot"] for event in daemon.events("snapshot.deleted")}
    assert not old & gone
    assert len(gone) <= deleted + 1

    plan = kvmsnapd(daemon, "plan", "--connect", daemon.uri)
    waits = [line.split() for line in plan.stdout.splitlines() if line.startswith("  waits")]
    assert {name for _, name, *_ in waits} == {format_name("p", slot) for slot in history[:23]}
    assert {reason for _, _, reason, *_ in waits} == {"fuse:"}

    # A higher limit is the way to mean it.
    daemon.write_config(keeping("daily: 7").replace("kind", "max_deletes_per_run: 60, kind"))
    daemon.reload()
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_snapshots", "db01", "p"] <= 8)
    assert {e["snapshot"] for e in daemon.events("snapshot.deleted")} >= {format_name("p", s) for s in history[:23]}
    assert not [key for key in daemon.metrics() if key[0] == "kvmsnapd_prune_blocked"]


# Watched files

WATCHED = "policies:\n  p: {schedule: every 1h, keep: {last: 2}, kind: internal}\ndomains: {db01: [p]}\n"


@pytest.mark.slow
def test_a_watched_edit_is_loaded_by_itself_once_and_whole(start: Start, tmp_path: Path) -> None:
    daemon = start(write_test_host(tmp_path, {"db01": True}), WATCHED)
    daemon.wait_for(lambda: daemon.events("jobs.changed"))
    daemon.write_config(WATCHED + "watch: true\n")
    daemon.reload()  # from here on nobody sends a signal
    loaded = len(daemon.events("config.loaded"))

    # Written in steps: what stands there for a second in between is not even tried.
    part = daemon.config.parent / "conf.d" / "more.yaml"
    part.parent.mkdir()
    part.write_text("policies: {q: {schedule: every 2h, keep: {last: 2}, kind: internal}}\n")
    whole = daemon.config.read_text().replace("last: 2", "last: 5")
    daemon.config.write_text(whole[:40])
    time.sleep(1)
    daemon.config.write_text(whole)
    daemon.wait_for(lambda: len(daemon.events("config.loaded")) == loaded + 1)
    event = daemon.events("config.loaded")[-1]
    assert (event["policies_added"], event["policies_changed"]) == (["q"], {"p": ["keep"]})
    assert event["files"] == [str(daemon.config), str(part)]
    assert daemon.events("config.rejected") == []
    assert daemon.metrics()["kvmsnapd_config_stale",] == 0

    part.write_text("policies: {q: {schedul: every 2h}}\n")
    daemon.wait_for(lambda: daemon.events("config.rejected"))
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 0
    assert daemon.metrics()["kvmsnapd_config_stale",] == 1
    time.sleep(2.3)  # one more look
    assert len(daemon.events("config.rejected")) == 1

    part.unlink()
    daemon.wait_for(lambda: len(daemon.events("config.loaded")) == loaded + 2)
    assert daemon.events("config.loaded")[-1]["policies_removed"] == ["q"]
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 1
    assert daemon.metrics()["kvmsnapd_config_stale",] == 0


@pytest.mark.slow
def test_without_watch_an_edit_only_shows_as_stale_until_it_is_undone(start: Start, tmp_path: Path) -> None:
    daemon = start(write_test_host(tmp_path, {"db01": True}), WATCHED)
    before = daemon.config.read_text()
    assert daemon.metrics()["kvmsnapd_config_stale",] == 0
    daemon.config.write_text(before.replace("last: 2", "last: 5"))
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_config_stale",] == 1)
    daemon.config.write_text("policies: [")
    time.sleep(2.2)  # two more looks, and would the edit be loaded, it would have settled
    assert daemon.metrics()["kvmsnapd_config_stale",] == 1
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 1
    daemon.config.write_text(before)
    daemon.wait_for(lambda: daemon.metrics()["kvmsnapd_config_stale",] == 0)
    assert len(daemon.events("config.loaded")) == 1
    assert daemon.events("config.rejected") == []


# A refusal is told everywhere


@pytest.mark.slow
def test_a_refused_edit_is_told_in_the_log_the_metrics_and_by_status(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    config = tmp_path / "daemon" / "kvmsnapd.yaml"
    config.parent.mkdir()
    good = (
        WATCHED.replace("kind", "max_age: 9h, kind")
        + "metrics: {port: 0}\ntick: 1s\nlog: {level: debug, format: json}\n"
    )
    config.write_text(good)
    daemon = start(write_test_host(tmp_path, {"db01": True}), WATCHED)

    def status() -> tuple[list[str], int]:
        """Return what status says of the configuration, and how many snapshots the policy keeps that it goes by."""
        answer = json.loads(kvmsnapd(daemon, "status", "--json", "--connect", daemon.uri).stdout)
        return answer["configuration"], answer["pairs"][0]["max_age_seconds"] // 3600

    assert status() == ([], 9)

    config.write_text(good.replace("schedule", "schedul").replace("9h", "none"))
    daemon.reload()
    (rejected,) = daemon.events("config.rejected")
    checked = kvmsnapd(daemon, "check-config")
    assert checked.returncode == 78
    assert "\n".join(rejected["problems"]) == checked.stderr.strip("\n")
    assert (rejected["path"], rejected["level"]) == (str(config), "error")
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 0
    assert daemon.metrics()["kvmsnapd_config_stale",] == 1
    shown = kvmsnapd(daemon, "status", "--connect", daemon.uri)
    assert shown.returncode == 0
    assert "The daemon refused an edit, and goes on with what it read at" in shown.stdout
    assert checked.stderr.strip() in shown.stdout
    (first, *others), age = status()
    assert (first.split(" at ")[0], others, age) == (
        "The daemon refused an edit, and goes on with what it read",
        rejected["problems"],
        9,
    )

    config.write_text(good.replace("9h", "7h"))
    daemon.reload()
    assert status() == ([], 7)
    assert daemon.metrics()["kvmsnapd_config_last_reload_successful",] == 1
    config.write_text(good)
    (line,), age = status()
    assert ("edited since the daemon read them" in line, age) == (True, 7)

    # Nobody believes what a dead one has left behind.
    daemon.kill()
    assert status() == ([], 9)
    daemon.start()
    assert daemon.kill(signal.SIGTERM) == 0
    config.write_text("policies: [")
    assert kvmsnapd(daemon, "status", "--connect", daemon.uri).returncode == 78


# A reload while a run goes on


def waiting(directory: Path, keep: str, more: str = "domains: {db01: [p]}\n") -> str:
    """Return a policy whose runs wait for a file `go` once they have begun."""
    script = f"touch {directory}/begun; while [ ! -e {directory}/go ]; do sleep 0.02; done"
    hook = json.dumps({"before": {"command": ["/bin/sh", "-c", script]}})
    return f"policies:\n  p: {{schedule: hourly, splay: 0s, keep: {{{keep}}}, kind: internal, hooks: {hook}}}\n{more}"


@pytest.mark.parametrize(
    "edit", ["last: 9", None, pytest.param("last: 2, daily: 9", id="another rule")], ids=["longer", "gone", "other"]
)
def test_a_policy_that_is_changed_while_its_run_goes_on_deletes_nothing_by_the_old_rules(
    start: Start, tmp_path: Path, edit: str | None
) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    uri = write_host_with_history(tmp_path, "p", [hour - n * HOUR for n in range(5, 0, -1)])
    daemon = start(uri, waiting(tmp_path, "last: 2"))
    daemon.wait_for((tmp_path / "begun").exists)
    daemon.write_config(waiting(tmp_path, edit) if edit else waiting(tmp_path, "last: 2", "domains: {db01: []}\n"))
    daemon.reload()
    (tmp_path / "go").touch()
    daemon.wait_for(lambda: daemon.events("run.finished"))
    assert daemon.events("snapshot.deleted") == []
    # How many it held back depends on the hour of the day at which this runs: `daily` may claim two.
    assert {reason for event in daemon.events("prune.blocked") for reason in event["blocked"]} <= {"changed"}
    assert len(slots_of(daemon).get(("db01", "p"), [])) <= 1
    assert not [event for event in daemon.events() if event["event"].startswith("run of")]


# Timing: a daemon in this process, whose jobs are there and do not run


class StillDaemon:
    """A daemon without threads, on a hypervisor in memory; its jobs wait for ever, and tests tick it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, policies: str, fake: FakeHypervisor) -> None:
        self.now = NOW
        self.events: list[Event] = []
        self._seen: list[Any] = []
        monkeypatch.setattr(daemon_module.signal, "pthread_sigmask", lambda *_: set())
        monkeypatch.setattr(daemon_module, "configure_logging", lambda **_: None)
        monkeypatch.setattr(outlets_module, "log_event", self.events.append)
        monkeypatch.setattr(daemon_module, "read_clock", lambda: self.now)
        self._path = directory / "kvmsnapd.yaml"
        self._own = (
            f"metrics: {{enabled: false}}\nstate_directory: {directory}/state\nruntime_directory: {directory}/run\n"
        )
        self.write(policies)
        self.daemon = Daemon(self._path, connect="test:///default")
        self.daemon._host = fake  # type: ignore[assignment]
        self.daemon._executor.hypervisor = fake
        self.daemon._libvirt_up = True  # else the first tick starts an audit on a thread of its own
        self.scheduler: Any = self.daemon._scheduler._scheduler
        self.scheduler.start(paused=True)

    def write(self, policies: str) -> None:
        self._path.write_text(policies + self._own)

    def reload(self, policies: str) -> None:
        self.write(policies)
        self.daemon._reload(asked=True)

    def tick(self) -> None:
        self.daemon._tick()

    def jobs(self) -> dict[str, tuple[int, datetime]]:
        """Return the identity of APScheduler's job of each pair, and when it runs next."""
        jobs = self.scheduler.get_jobs()
        self._seen += jobs  # none may go, or another one could get its identity
        return {job.id: (id(job), job.next_run_time) for job in jobs}

    def said(self, name: str) -> list[Any]:
        return [event for event in self.events if name == event.NAME]

    def fail(self, key: str) -> None:
        """Have a run of this pair fail now."""
        self.daemon._executor.run = lambda pair: Outcome(Result.FAILED, pair.due.slot)  # type: ignore[method-assign]
        self.daemon._run_pair(key)

    def stop(self) -> None:
        self.scheduler.shutdown(wait=False)


TWO = """\
policies:
  a: {schedule: hourly, keep: {last: 9}, splay: 5m}
  b: {schedule: every 7m, keep: {last: 9}, splay: 1m}
domains: {web1: [a, b], web2: [a]}
"""
A1, B1, A2 = f"{UUID}/a", f"{UUID}/b", f"{OTHER_UUID}/a"


@pytest.fixture
def still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StillDaemon]:
    fake = FakeHypervisor()
    fake.add(a_domain(*hourly_snapshots(3, last="2026-11-22T12:00", policy="a")))
    fake.add(a_domain(name="web2", uuid=OTHER_UUID))
    still = StillDaemon(tmp_path, monkeypatch, TWO, fake)
    still.tick()
    yield still
    still.stop()


def test_a_reload_that_changes_nothing_touches_no_job(still: StillDaemon) -> None:
    before = still.jobs()
    assert set(before) == {A1, B1, A2}
    still.events.clear()
    for _ in range(3):
        still.now += SECOND
        still.reload("# the same\n" + TWO)
        still.tick()
    assert still.jobs() == before
    assert still.said("jobs.changed") == []
    assert still.said("config.domain_changed") == []


def test_a_reload_of_one_policy_leaves_the_runs_of_others_where_they_are(still: StillDaemon) -> None:
    before = still.jobs()
    still.now += SECOND
    still.reload(TWO.replace("every 7m", "every 11m"))
    still.tick()
    after = still.jobs()
    assert {key for key in before if after[key] != before[key]} == {B1}
    assert [(e.added, e.changed, e.removed) for e in still.said("jobs.changed")[1:]] == [(0, 1, 0)]


def test_an_edit_that_takes_protection_away_is_not_put_in_force_unasked(still: StillDaemon) -> None:
    still.write(TWO.replace(", web2: [a]", ""))
    still.daemon._live.look()
    still.daemon._reload(asked=False)
    (problem,) = still.said("config.rejected")[-1].problems
    assert "leaves web2 without protection; reload by hand" in problem
    assert A2 in still.daemon._pairs
    still.daemon._reload(asked=True)
    assert A2 not in still.daemon._pairs


def test_a_shorter_splay_does_not_give_up_the_slot_that_waits(still: StillDaemon) -> None:
    skip = TWO.replace("splay: 5m", "splay: 40m, catch_up: skip")
    still.now = NOW.replace(hour=13, minute=0, second=1)
    still.reload(skip)
    waiting = still.daemon._pairs[A1].due
    assert (waiting.slot, waiting.missed) == (None, None)
    still.now = waiting.run_at - SECOND
    still.reload(skip.replace("40m", "1s"))
    still.tick()
    assert still.daemon._pairs[A1].due == waiting
    still.now = waiting.run_at
    still.tick()
    assert still.daemon._pairs[A1].due.slot == NOW.replace(hour=13, minute=0)


def test_a_reload_keeps_the_pause_after_failures_of_pairs_that_it_does_not_change(still: StillDaemon) -> None:
    still.fail(A2)
    still.tick()
    retry_at = still.jobs()[A2][1]
    assert retry_at > still.now
    still.now += SECOND
    still.reload(TWO.replace("every 7m", "every 11m"))
    still.tick()
    assert still.jobs()[A2][1] == retry_at


def test_a_reload_ends_the_pause_after_failures_of_pairs_that_it_changes(still: StillDaemon) -> None:
    for key in (A2, B1):
        still.fail(key)
    still.tick()
    paused = still.jobs()
    still.reload(TWO.replace("web2: [a]", "web2: {a: {keep: {last: 8}}}"))
    still.tick()
    assert still.jobs()[A2][1] <= still.now
    assert still.jobs()[B1] == paused[B1]


def test_a_refused_reload_touches_nothing(still: StillDaemon) -> None:
    still.fail(A2)
    still.tick()
    before, fleet = still.jobs(), still.daemon.observe().fleet
    still.reload(TWO.replace("hourly", "hourley"))
    assert still.daemon.observe().fleet is fleet
    still.tick()
    assert still.jobs() == before


def test_a_policy_that_comes_back_goes_on_from_its_snapshots(still: StillDaemon) -> None:
    before = still.jobs()
    still.reload(TWO.replace("web1: [a, b]", "web1: [b]"))
    still.tick()
    assert set(still.jobs()) == {B1, A2}
    still.reload(TWO)
    still.tick()
    assert still.jobs()[A1][1] == before[A1][1]  # not at once, as if there were none
    (lost, gained) = still.said("config.domain_changed")
    assert (lost.lost, lost.leaves, gained.gained) == (("a",), 3, ("a",))


def test_a_run_that_begins_before_the_next_tick_goes_by_the_new_configuration(still: StillDaemon) -> None:
    pair = still.daemon._pairs[A1]
    still.reload(TWO.replace("last: 9", "last: 4", 1))
    now = still.daemon._current(pair)
    assert now
    assert now.policy.keep.last == 4
    still.reload(TWO.replace("web1: [a, b]", "web1: [b]"))
    assert still.daemon._current(pair) is None


def test_a_tick_that_began_before_a_reload_does_not_undo_it(still: StillDaemon) -> None:
    def reload_meanwhile() -> None:
        still.reload(TWO.replace("last: 9", "last: 4", 1))

    host: Any = still.daemon._host
    host.before["inventory"].append(reload_meanwhile)
    still.tick()
    assert still.daemon._pairs[A1].policy.keep.last == 4
    assert still.daemon._tick_wanted.is_set()
    still.tick()
    assert still.daemon._scheduler._jobs[A1][0].keep.last == 4


def test_without_libvirt_a_reload_is_taken_and_put_to_work_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHypervisor()
    still = StillDaemon(tmp_path, monkeypatch, TWO, fake)
    still.reload(TWO.replace("every 7m", "every 11m"))
    fake.add(a_domain())
    still.tick()
    assert still.daemon._pairs[B1].policy.schedule.text == "every 11m"
    still.stop()


# A run that goes on while its job is replaced


def test_a_job_that_is_changed_while_it_runs_is_not_started_beside_itself(caplog: pytest.LogCaptureFixture) -> None:
    started, release = threading.Event(), threading.Event()

    def run(_key: str) -> None:
        started.set()
        release.wait(10)

    scheduler = JobScheduler(run, workers=2)
    scheduler.start()
    past = at("2026-01-01T00:00")
    scheduler.sync({"a": Wanted(a_policy(schedule="yearly"), timedelta(0), past)})
    assert started.wait(10)
    other = a_policy(schedule="yearly", keep="last=9")
    done = threading.Event()
    with caplog.at_level(logging.WARNING, logger="apscheduler"):
        scheduler.sync({"a": Wanted(other, timedelta(0), past), "z": Wanted(other, timedelta(0), past)})
        done.wait(0.3)
    release.set()
    scheduler.stop(timedelta(seconds=10))
    assert caplog.messages == []


class Run:
    """Runs of one policy on the fake, and a configuration that changes once an event has come."""

    def __init__(self, directory: Path, policy: Policy, *snapshots: Snapshot) -> None:
        self.now = NOW
        self.events: list[Event] = []
        self.fake = FakeHypervisor(clock=lambda: self.now)
        self.policy = policy
        self.later: Policy | None = None
        """What is configured once `last_event` has come."""
        self.last_event: type[Event] = HookFinished
        self.fake.add(a_domain(*snapshots))
        self.executor = Executor(
            self.fake,
            DomainLocks(directory / "locks"),
            FreezeIntents(directory / "frozen"),
            self.events.append,
            clock=lambda: self.now,
            stopwatch=time.monotonic,
            current=self.current,
        )

    def current(self, pair: Pair) -> Pair | None:
        if not any(isinstance(event, self.last_event) for event in self.events):
            return pair
        return replace(pair, policy=self.later, policies=(self.later,)) if self.later else None

    def go(self) -> Outcome:
        (pair,) = survey(["standard"], {"*": (self.policy,)}, self.fake.inventory(), now=self.now).pairs
        return self.executor.run(pair)


HOOKS = Hooks(before=Hook(("true",), SECOND * 9))


def test_a_policy_that_goes_while_its_hook_runs_takes_nothing_that_nobody_would_prune(tmp_path: Path) -> None:
    run = Run(tmp_path, a_policy(hooks=HOOKS))
    outcome = run.go()
    assert outcome.result is Result.NOTHING_DUE
    assert run.fake.snapshot_names(UUID) == []


def test_a_policy_that_changes_its_kind_while_its_hook_runs_takes_none_of_the_old_kind(tmp_path: Path) -> None:
    run = Run(tmp_path, a_policy(hooks=HOOKS))
    run.later = a_policy(kind=Kind.INTERNAL, hooks=HOOKS, max_pause=HOUR)
    run.go()
    kinds = {snapshot.kind for snapshot in run.fake.domains[UUID].snapshots}
    assert kinds <= {Kind.INTERNAL}


def test_what_a_changed_policy_did_not_delete_is_no_debt_that_widens_the_fuse(tmp_path: Path) -> None:
    # The old rules release 10, the ones that are loaded after the take none.
    run = Run(tmp_path, a_policy(keep="last=11", max_chain_depth=60), *hourly_snapshots(20, last="2026-11-22T11:00"))
    run.later, run.last_event = a_policy(keep="last=30", max_chain_depth=60), SnapshotTaken
    assert run.go().blocked == 10
    assert len(run.fake.snapshot_names(UUID)) == 21
    # Then the file says something else once more, and 20 at once are more than 10.
    run.now += HOUR
    run.policy = run.later = a_policy(keep="last=2", max_chain_depth=60)
    assert run.go().deleted == 0
    assert len(run.fake.snapshot_names(UUID)) == 22


# A reload while the daemon starts


def test_a_reload_that_comes_while_the_daemon_starts_does_not_end_it(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "daemon", write_test_host(tmp_path, {"db01": True}), WATCHED)
    daemon.write_config(WATCHED)
    line = [sys.executable, "-m", "kvmsnapd", "run", "--config", str(daemon.config), "--connect", daemon.uri]
    with daemon.log.open("wb") as log:
        daemon.process = subprocess.Popen(line, stderr=log)
    try:
        maps = Path(f"/proc/{daemon.process.pid}/maps")
        daemon.wait_for(lambda: "pydantic_core" in maps.read_text())  # systemd takes it for started all the time
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for(lambda: daemon.events("daemon.started"))
    finally:
        daemon.kill()
