"""Restore drills on real guests: a good snapshot comes up, a damaged one does not, and nothing is left of either."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.audit import audit
from kvmsnapd.diagnosis import Level
from kvmsnapd.execute import Result
from kvmsnapd.model import Kind
from tests.builders import a_policy
from tests.lab.daemon import DaemonProcess
from tests.lab.images import check_image
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmsnapd.model import Mark
    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

    Command = Callable[..., subprocess.Popen[str]]

pytestmark = pytest.mark.qemu

POLICY = a_policy(keep="last=3")


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "state") as made:
        yield made


@pytest.fixture
def verify(libvirtd: Libvirtd, tmp_path: Path) -> Command:
    """Start `kvmsnapd verify` on the same locks as the runs have, with these drill rules for the guest's policy."""

    def start(guest: Guest, *words: str, rules: str = "{}") -> subprocess.Popen[str]:
        config = tmp_path / "kvmsnapd.yaml"
        config.write_text(
            f"policies: {{standard: {{schedule: hourly, keep: {{last: 3}}, verify: {rules}}}}}\n"
            f"domains: {{{guest.name}: [standard]}}\n"
            f"runtime_directory: {tmp_path}/state\nstate_directory: {tmp_path}/state\n"
        )
        options = ["--config", str(config), "--connect", libvirtd.uri]
        arguments = [sys.executable, "-m", "kvmsnapd", "verify", *options, guest.name, *words]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def take(runs: Runs, guest: Guest) -> str:
    outcome = runs.run(guest, POLICY).outcome
    assert outcome.result is Result.TAKEN
    return outcome.snapshot or ""


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        said = process.communicate(timeout=120)[0]
        return process.returncode, said


def mark_of(runs: Runs, guest: Guest, name: str) -> Mark:
    (mark,) = (s.mark for s in runs.host.domain(guest.domain.UUIDString()).snapshots if s.name == name)
    assert mark
    return mark


def left_over(guest: Guest) -> list[str]:
    domains = [d.name() for d in guest.libvirtd.connect().listAllDomains() if "drill" in d.name()]
    return domains + [path.name for path in guest.directory.iterdir() if "drill" in path.name]


@pytest.mark.parametrize("rules", ["{}", "{console: GUEST-UP, memory: 100MiB}"], ids=["agent", "console"])
def test_a_copy_comes_up_beside_the_guest_that_writes_on_and_nothing_is_left(
    rules: str, make_guest: Callable[..., Guest], runs: Runs, verify: Command
) -> None:
    guest = make_guest(writer=True, disks=2)
    name = take(runs, guest)
    before = guest.beats()
    code, said = ended(verify(guest, rules=rules))
    assert (code, "is a way back" in said) == (0, True), said
    assert guest.beats() > before
    assert guest.alive()
    drill = mark_of(runs, guest, name).drill
    assert drill
    assert (drill.failure, drill.verified_at) == (None, drill.ended_at)
    assert mark_of(runs, guest, name).linked == ()
    assert left_over(guest) == []
    # The next one knows of it when this one is gone.
    names = [take(runs, guest) for _ in range(4)]
    assert name not in guest.snapshots
    assert mark_of(runs, guest, names[-1]).drill == drill


def test_a_damaged_one_fails_with_a_reason_and_the_last_good_drill_is_remembered(
    make_guest: Callable[..., Guest], runs: Runs, verify: Command
) -> None:
    guest = make_guest()
    name = take(runs, guest)
    assert ended(verify(guest))[0] == 0
    good = mark_of(runs, guest, name).drill
    assert good
    with guest.images[0].open("r+b") as image:
        header = image.read(512)
        image.seek(0)
        image.write(b"\0" * 512)
    code, said = ended(verify(guest, "--json"))
    assert code == 1
    assert json.loads(said)["failure"].startswith("libvirt could ")
    bad = mark_of(runs, guest, name).drill
    assert bad
    assert (bool(bad.failure), bad.verified_at) == (True, good.ended_at)
    assert left_over(guest) == []
    assert guest.alive()
    with guest.images[0].open("r+b") as image:
        image.write(header)
    assert ended(verify(guest))[0] == 0


def test_one_that_does_not_come_up_in_time_fails_and_its_console_is_quoted(
    make_guest: Callable[..., Guest], runs: Runs, verify: Command
) -> None:
    guest = make_guest()
    name = take(runs, guest)
    code, said = ended(verify(guest, rules="{console: never said, deadline: 8s}"))
    assert code == 1
    assert "did not come up within 8 s, as 'never said' on its console would show; its console ends with: " in said
    drill = mark_of(runs, guest, name).drill
    assert drill
    assert drill.verified_at is None
    assert left_over(guest) == []


@pytest.mark.parametrize(
    ("options", "rules", "words"),
    [
        (
            {"agent": False},
            "{}",
            "no channel for the guest agent; add one, or give the policy `verify: {console: TEXT}",
        ),
        ({}, "{memory: 900GiB}", "MiB free; give the policy `verify: {memory: SIZE}`"),
    ],
    ids=["no sign", "no memory"],
)
def test_what_cannot_be_tried_is_refused_and_says_nothing_of_the_snapshot(  # noqa: PLR0917  # three are of the case
    options: dict[str, Any], rules: str, words: str, make_guest: Callable[..., Guest], runs: Runs, verify: Command
) -> None:
    guest = make_guest(boots=False, **options)
    name = take(runs, guest)
    code, said = ended(verify(guest, rules=rules))
    assert (code, words in said) == (1, True), said
    assert mark_of(runs, guest, name).drill is None
    assert mark_of(runs, guest, name).linked == ()
    assert left_over(guest) == []


def test_an_internal_one_cannot_be_tried(make_guest: Callable[..., Guest], runs: Runs, verify: Command) -> None:
    guest = make_guest(boots=False)
    runs.run(guest, a_policy(kind=Kind.INTERNAL))
    code, said = ended(verify(guest))
    assert (code, "is internal" in said) == (1, True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_stopped_in_a_drill_the_guest_goes_on_and_what_is_left_is_named(
    how: signal.Signals, make_guest: Callable[..., Guest], runs: Runs, verify: Command
) -> None:
    guest = make_guest()
    name = take(runs, guest)
    with verify(guest) as process:
        while not any(d.name().startswith("kvmsnapd-drill-") for d in guest.libvirtd.connect().listAllDomains()):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
        process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any("drill" in d.name() for d in guest.libvirtd.connect().listAllDomains()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert guest.alive()
    left = left_over(guest)
    if how is signal.SIGINT:
        assert left == []
        assert mark_of(runs, guest, name).linked == ()
    else:
        assert len(left) == 1
        findings = [f for f in _findings(runs, guest) if f.subject.endswith(left[0])]
        assert [f.command for f in findings] == [f"rm {guest.directory / left[0]}"]
        (guest.directory / left[0]).unlink()
    for _ in range(4):
        take(runs, guest)
    assert name not in guest.snapshots  # what held it went with the copy
    assert _findings(runs, guest) == []
    guest.destroy()
    check_image(guest.active_image())


def _findings(runs: Runs, guest: Guest) -> list[Any]:
    seen = audit(runs.host, runs.fleet({guest: (POLICY,)}), intents=[], now=runs.now)
    own = [f for f in seen.findings if f.subject == guest.name or f.subject.startswith(str(guest.directory))]
    return [f for f in own if f.level is not Level.NOTE]


def test_a_daemon_tries_on_schedule_and_exports_what_came_of_it(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, tmp_path: Path
) -> None:
    guest = make_guest()
    rules = "policies:\n  standard: {schedule: yearly, keep: {last: 2}, splay: 0s, verify: {schedule: every 1s}}\n"
    daemon = DaemonProcess(tmp_path / "daemon", libvirtd.uri, f"{rules}domains:\n  {guest.name}: [standard]\n")

    def exported(name: str) -> float | None:
        return daemon.metrics().get((name, guest.name, "standard"))

    daemon.start()
    try:
        daemon.wait_for(lambda: exported("kvmsnapd_last_verified_timestamp_seconds"))
        assert exported("kvmsnapd_drill_failed") == 0
        assert exported("kvmsnapd_verify_max_age_seconds") == 2
        with guest.images[0].open("r+b") as image:
            header = image.read(512)
            image.seek(0)
            image.write(b"\0" * 512)
        daemon.wait_for(lambda: exported("kvmsnapd_drill_failed") == 1)
        verified = exported("kvmsnapd_last_verified_timestamp_seconds")
        assert verified
        daemon.kill(signal.SIGTERM)
        daemon.start()
        daemon.wait_for(lambda: exported("kvmsnapd_drill_failed") == 1)
        assert exported("kvmsnapd_last_verified_timestamp_seconds") == verified
        with guest.images[0].open("r+b") as image:
            image.write(header)
        daemon.wait_for(lambda: exported("kvmsnapd_drill_failed") == 0)
    finally:
        assert daemon.kill(signal.SIGTERM) == 0
    assert left_over(guest) == []
    assert {event["ok"] for event in daemon.events("drill.finished")} == {True, False}
    assert guest.alive()
