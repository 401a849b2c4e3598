"""Configurations of a large host: checked fast, and a reload that changes one policy touches its jobs alone."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.demo import write_test_host
from kvmsnapd.fleet import survey
from kvmsnapd.scheduler import JobChanges, JobScheduler, Wanted
from tests.builders import NOW, a_domain, a_policy, an_inventory
from tests.fakes import FakeHypervisor
from tests.lab.daemon import DaemonProcess
from tests.unit.test_reload import StillDaemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmsnapd.policy import Policy

pytestmark = pytest.mark.slow

DOMAINS, POLICIES, OF_EACH = 5_000, 50, 2


def policies_of(number: int) -> list[str]:
    """Return the names of the policies of one domain."""
    return [f"p{(number + n) % POLICIES:02}" for n in range(OF_EACH)]


def uuid_of(number: int) -> str:
    return f"11111111-2222-3333-4444-{number:012}"


def a_large_configuration(*, overrides: bool = False, keep: int = 2) -> str:
    """Return policies and domains; ``keep`` is what the first policy keeps."""
    lines = ["policies:"]
    for number in range(POLICIES):
        rules = f"last: {keep if number == 0 else 2}, daily: 5"
        lines.append(f'  p{number:02}: {{schedule: "{number} * * * *", keep: {{{rules}}}, kind: internal}}')
    lines.append("domains:")
    for number in range(DOMAINS):
        first, *others = policies_of(number)
        entry = f"[{first}, {', '.join(others)}]"
        if overrides:
            entry = f"{{{first}: {{keep: {{last: {number % 9 + 1}}}}}, {', '.join(f'{o}: ' for o in others)}}}"
        lines.append(f"  vm{number:04}: {entry}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("overrides", "runs"), [(False, 3), (True, 1)], ids=["lists", "overrides"])
def test_a_file_of_five_thousand_domains_is_checked_in_seconds(tmp_path: Path, overrides: bool, runs: int) -> None:
    config = tmp_path / "kvmsnapd.yaml"
    config.write_text(a_large_configuration(overrides=overrides))
    command = [sys.executable, "-m", "kvmsnapd", "check-config", "--config", str(config)]
    times = []
    for _ in range(runs):
        began = time.monotonic()
        checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        times.append(time.monotonic() - began)
    assert f"valid; {POLICIES} policies, {DOMAINS} entries" in checked.stdout
    took = statistics.median(times)
    print(f"check-config of {DOMAINS} domains and {POLICIES} policies: {took:.2f} s")
    assert took < 10  # two are wanted; what grows with the square of them takes minutes


# Jobs


def touched_by(before: dict[str, tuple[int, Any]], after: dict[str, tuple[int, Any]]) -> set[str]:
    return {key for key in before | after if before.get(key) != after.get(key)}


def jobs_of(scheduler: JobScheduler) -> dict[str, tuple[int, Any]]:
    """Return the identity of each of APScheduler's jobs, which live on in `_jobs` or here, and its time."""
    return {job.id: (id(job), job.next_run_time) for job in scheduler._scheduler.get_jobs()}


def pairs_of(policies: dict[str, Policy]) -> dict[str, Wanted]:
    """Return what is wanted of all pairs of the host."""
    selectors = {f"vm{n:04}": tuple(policies[name] for name in policies_of(n)) for n in range(DOMAINS)}
    domains = [an_inventory(name=f"vm{n:04}", uuid=uuid_of(n)) for n in range(DOMAINS)]
    fleet = survey(list(policies), selectors, domains, now=NOW)
    return {
        pair.name.key: Wanted(pair.policy, pair.policy.splay_of(pair.name.domain_uuid), pair.due.run_at)
        for pair in fleet.pairs
    }


def test_one_policy_of_fifty_that_changes_moves_only_its_jobs_of_ten_thousand() -> None:
    scheduler = JobScheduler(lambda _key: None, workers=1)
    scheduler._scheduler.start(paused=True)
    try:
        policies = {f"p{n:02}": a_policy(f"p{n:02}", schedule=f"{n} * * * *", splay="5m") for n in range(POLICIES)}
        began = time.monotonic()
        assert scheduler.sync(pairs_of(policies)) == JobChanges(added=DOMAINS * OF_EACH)
        print(f"survey and {DOMAINS * OF_EACH} jobs added: {time.monotonic() - began:.2f} s")
        first = scheduler._scheduler.get_jobs()
        before = jobs_of(scheduler)

        again = {name: a_policy(name, schedule=str(p.schedule), splay="5m") for name, p in policies.items()}
        began = time.monotonic()
        assert scheduler.sync(pairs_of(again)) == JobChanges()
        print(f"survey and nothing changed: {time.monotonic() - began:.2f} s")
        assert jobs_of(scheduler) == before

        changed = again | {"p07": a_policy("p07", schedule="7 * * * *", splay="5m", keep="last=9")}
        began = time.monotonic()
        assert scheduler.sync(pairs_of(changed)) == JobChanges(changed=DOMAINS * OF_EACH // POLICIES)
        print(f"survey and {DOMAINS * OF_EACH // POLICIES} jobs changed: {time.monotonic() - began:.2f} s")
        expected = {key for key in before if key.endswith("/p07")}
        assert touched_by(before, jobs_of(scheduler)) == expected

        gone = {key: want for key, want in pairs_of(changed).items() if not key.endswith("/p07")}
        assert scheduler.sync(gone) == JobChanges(removed=len(expected))
        assert len(first) == DOMAINS * OF_EACH
    finally:
        scheduler._scheduler.shutdown(wait=False)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StillDaemon]:
    fake = FakeHypervisor()
    for number in range(DOMAINS):
        fake.add(a_domain(name=f"vm{number:04}", uuid=uuid_of(number)))
    still = StillDaemon(tmp_path, monkeypatch, a_large_configuration(), fake)
    yield still
    still.stop()


def test_a_reload_of_a_large_configuration_moves_only_the_jobs_of_the_policy_that_changed(large: StillDaemon) -> None:
    large.tick()
    before = large.jobs()
    assert len(before) == DOMAINS * OF_EACH
    began = time.monotonic()
    large.reload(a_large_configuration(keep=3))
    took = time.monotonic() - began
    large.tick()
    print(f"reload: {took:.2f} s, and a tick {time.monotonic() - began - took:.2f} s")
    expected = {key for key in before if key.endswith("/p00")}
    assert touched_by(before, large.jobs()) == expected
    assert len(expected) == DOMAINS * OF_EACH // POLICIES
    assert len(large.said("config.domain_changed")) == len(expected)
    assert [(e.added, e.changed, e.removed) for e in large.said("jobs.changed")] == [
        (len(before), 0, 0),
        (0, len(expected), 0),
    ]


MANY = 300


def test_a_daemon_with_hundreds_of_domains_reloads_without_a_run_lost_or_doubled(tmp_path: Path) -> None:
    uri = write_test_host(tmp_path, {f"vm{n:03}": n % 2 == 0 for n in range(MANY)})
    policies = """\
policies:
  rare: {schedule: every 1h, keep: {last: 2}, kind: internal, splay: 0s}
  other: {schedule: every 2h, keep: {last: 2}, kind: internal, splay: 0s}
  fast: {schedule: every 2s, keep: {last: 2}, kind: internal, splay: 0s}
domains:
  "*": [rare]
  "vm00[0-9]": [rare, other]
  vm299: [rare, fast]
"""
    daemon = DaemonProcess(tmp_path / "daemon", uri, policies)
    daemon.start()
    try:
        daemon.wait_for(lambda: len({(e["domain"], e["policy"]) for e in daemon.events("snapshot.taken")}) == MANY + 11)
        daemon.write_config(policies.replace("every 2h", "every 3h"))
        began = time.monotonic()
        daemon.reload()
        print(f"reload of {MANY} domains: {time.monotonic() - began:.2f} s")
        daemon.wait_for(lambda: len(daemon.events("jobs.changed")) == 2)
        change = daemon.events("jobs.changed")[-1]
        assert (change["added"], change["changed"], change["removed"]) == (0, 10, 0)
        assert len(daemon.events("config.domain_changed")) == 10
        taken = [(e["domain"], e["policy"], e["scheduled_at"]) for e in daemon.events("snapshot.taken")]
        assert len(taken) == len(set(taken))
        assert daemon.kill(15) == 0
    finally:
        daemon.kill()
