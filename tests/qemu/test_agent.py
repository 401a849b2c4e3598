"""Guest agents that are absent, dead, hung, forbidden or used by others: what is taken then, and that nobody is frozen.

Whatever happens, a guest that kvmsnapd may have frozen is thawed in the end, and one that somebody else froze is not.
"""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import libvirt
import pytest

from kvmsnapd.events import DomainThawed, GuestFrozen, RunSkipped, SnapshotDowngraded, SnapshotFailed, SnapshotTaken
from kvmsnapd.execute import Result
from kvmsnapd.model import Consistency
from kvmsnapd.policy import ConsistencyRule
from tests.builders import a_policy
from tests.lab.images import backing_chain
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmsnapd.model import TakeRequest
    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd
    from tests.lab.runs import Ran

pytestmark = pytest.mark.qemu

DEMANDED = a_policy("demanded", keep="last=5", consistency=ConsistencyRule.FILESYSTEM)
PREFERRED = a_policy("preferred", keep="last=5", consistency=ConsistencyRule.FILESYSTEM_PREFERRED)
AGENT = "qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -l /run/qemu-ga.log"
FROZEN_MARK = "/run/qga.state.isfrozen"
WITHIN_S = 60.0


@pytest.fixture
def runs(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Runs]:
    with Runs(libvirtd.uri, tmp_path / "state") as made:
        yield made


@pytest.fixture
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let libvirt wait for an agent for two seconds only, whatever it is asked, and return how many."""
    for name in ("take.AGENT_DEADLINE_SECONDS", "host.AGENT_DEADLINE_SECONDS", "host._AGENT_ANSWERS_WITHIN_SECONDS"):
        monkeypatch.setattr(f"kvmsnapd.libvirt_host.{name}", 2)
    return 2


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def in_background(guest: Guest, script: str) -> None:
    """Start a script in the guest that outlives its agent, a moment later: this command is still answered."""
    guest.execute(f"(sleep 0.3; {script}) >/dev/null 2>&1 &")


def connected(guest: Guest) -> bool:
    """Tell what libvirt says of the agent's channel."""
    target = ET.fromstring(guest.domain.XMLDesc()).find("devices/channel/target")  # noqa: S314  # libvirt's own
    return target is not None and target.get("state") == "connected"


def forbids(guest: Guest, command: str) -> bool:
    """Tell whether the agent is there and has been told not to carry out this command."""
    try:
        commands = guest.ask_agent("guest-info")["supported_commands"]
    except libvirt.libvirtError:
        return False
    return any(known["name"] == command and not known["enabled"] for known in commands)


def assert_taken(ran: Ran, runs: Runs, guest: Guest, consistency: Consistency) -> None:
    """Event, mark and libvirt's list all say that a snapshot of this consistency was taken."""
    assert ran.outcome.result is Result.TAKEN
    assert [event.consistency for event in ran.of(SnapshotTaken)] == [consistency]
    (snapshot,) = (s for s in runs.host.domain(guest.domain.UUIDString()).snapshots if s.name == ran.outcome.snapshot)
    assert snapshot.mark is not None
    assert snapshot.mark.consistency is consistency


def assert_failed(ran: Ran, guest: Guest, names: list[str], reason: str = "agent") -> None:
    """Nothing was taken, nothing changed, and it says why."""
    said = [event.reason for event in ran.events if isinstance(event, RunSkipped | SnapshotFailed)]
    assert (ran.outcome.wants_retry, said) == (True, [reason])
    assert ran.of(SnapshotTaken) == []
    assert guest.snapshots == names
    assert len(backing_chain(guest.active_image())) == 1 + len(names)


def test_without_a_channel_for_it(make_guest: Callable[..., Guest], runs: Runs) -> None:
    guest = make_guest(agent=False)
    assert_failed(runs.run(guest, DEMANDED), guest, [])
    assert_taken(runs.run(guest, PREFERRED), runs, guest, Consistency.CRASH)
    assert runs.intents.outstanding() == []


def test_not_there_and_there_again(make_guest: Callable[..., Guest], runs: Runs) -> None:
    guest = make_guest()
    in_background(guest, f"kill $(pidof qemu-ga); sleep 8; {AGENT}")
    wait_for(lambda: not connected(guest))
    assert_failed(runs.run(guest, DEMANDED), guest, [])
    assert_taken(runs.run(guest, PREFERRED), runs, guest, Consistency.CRASH)
    assert runs.intents.outstanding() == []
    wait_for(guest.agent_answers)
    assert not guest.frozen()
    assert_taken(runs.run(guest, DEMANDED), runs, guest, Consistency.FILESYSTEM)
    assert not guest.frozen()


@pytest.mark.usefixtures("short_deadline")
def test_hung_it_is_never_asked_to_freeze(make_guest: Callable[..., Guest], runs: Runs) -> None:
    """A freeze sent to it would be carried out when it wakes up, after everybody has gone."""
    guest = make_guest()
    guest.hang_agent(10)
    assert connected(guest)
    ran = runs.run(guest, DEMANDED)  # the agent has answered until now: libvirt is in sync with it
    assert_failed(ran, guest, [])
    ran = runs.run(guest, PREFERRED)  # and now it is not
    assert_taken(ran, runs, guest, Consistency.CRASH)
    (downgraded,) = ran.of(SnapshotDowngraded)
    assert downgraded.snapshot == ran.outcome.snapshot
    assert "agent" in downgraded.error
    assert not guest.agent_answers(), "the agent was back sooner than this test needs"
    assert runs.intents.outstanding() == []
    wait_for(guest.agent_answers)  # after all that it was asked before
    assert not guest.frozen()
    assert_taken(runs.run(guest, DEMANDED), runs, guest, Consistency.FILESYSTEM)
    assert not guest.frozen()


def test_hung_when_it_is_asked_to_freeze_the_guest_is_thawed_once_it_wakes_up(
    make_guest: Callable[..., Guest], runs: Runs, monkeypatch: pytest.MonkeyPatch, short_deadline: int
) -> None:
    """The freeze stays queued in the guest; libvirt has long said that it failed."""
    guest = make_guest(writer=True)
    uuid = guest.domain.UUIDString()
    ask = runs.host.filesystems

    def answer_and_hang(domain_uuid: str) -> tuple[str, ...]:
        answer = ask(domain_uuid)
        guest.hang_agent(4 * short_deadline)
        return answer

    monkeypatch.setattr(runs.host, "filesystems", answer_and_hang)
    ran = runs.run(guest, PREFERRED)
    assert_taken(ran, runs, guest, Consistency.CRASH)
    assert len(ran.of(SnapshotDowngraded)) == 1
    assert runs.intents.outstanding() == [uuid]
    wait_for(guest.agent_answers)
    wait_for(guest.frozen)  # else this test would show nothing
    runs.executor.thawer.thaw_all()  # as each tick does
    assert runs.events[-1] == DomainThawed(domain=guest.name, domain_uuid=uuid)
    assert runs.intents.outstanding() == []
    assert not guest.frozen()
    guest.write("/mnt/after", b"still writable")
    monkeypatch.setattr(runs.host, "filesystems", ask)
    assert_taken(runs.run(guest, PREFERRED), runs, guest, Consistency.FILESYSTEM)
    assert not guest.frozen()


@pytest.mark.usefixtures("short_deadline")
@pytest.mark.parametrize("end", ["hangs", "dies"])
def test_lost_in_the_middle_of_the_freeze_the_guest_is_thawed_once_it_is_back(
    make_guest: Callable[..., Guest], runs: Runs, end: str
) -> None:
    """One that was killed leaves the file systems frozen, and a note for the next one."""
    guest = make_guest(writer=True)
    uuid = guest.domain.UUIDString()
    stop, back = ("STOP", "kill -CONT $agent") if end == "hangs" else ("KILL", AGENT)
    # Built into the shell, so that it is done before the freeze is.
    loop = f"agent=$(pidof qemu-ga); while ! [ -e {FROZEN_MARK} ]; do :; done; kill -{stop} $agent"
    in_background(guest, f"{loop}; sleep 9; {back}")
    time.sleep(1)  # the loop begins
    ran = runs.run(guest, DEMANDED)
    assert ran.outcome.result is Result.FAILED
    assert ran.of(SnapshotTaken) == []
    assert runs.intents.outstanding() == [uuid]
    wait_for(guest.agent_answers)
    assert guest.frozen()  # else this test would show nothing
    runs.executor.thawer.thaw_all()
    assert runs.intents.outstanding() == []
    assert not guest.frozen()
    guest.write("/mnt/after", b"still writable")


def test_frozen_by_somebody_else_it_is_left_so_and_told(make_guest: Callable[..., Guest], runs: Runs) -> None:
    """A thaw would end somebody's backup; the run after their own thaw is as good as any."""
    guest = make_guest()
    guest.domain.fsFreeze()
    for _ in range(2):
        ran = runs.run(guest, DEMANDED)
        assert_failed(ran, guest, [], reason="frozen")
        assert len(ran.of(GuestFrozen)) == 1
        assert guest.frozen()
    ran = runs.run(guest, PREFERRED)
    assert_taken(ran, runs, guest, Consistency.CRASH)
    assert (len(ran.of(GuestFrozen)), len(ran.of(SnapshotDowngraded))) == (1, 1)
    assert guest.frozen()
    runs.executor.thawer.thaw_all()
    assert guest.frozen()
    assert runs.intents.outstanding() == []
    guest.domain.fsThaw()
    assert_taken(runs.run(guest, DEMANDED), runs, guest, Consistency.FILESYSTEM)
    assert not guest.frozen()


def test_frozen_by_somebody_else_in_the_very_moment_it_is_left_so(
    make_guest: Callable[..., Guest], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our question to the agent and libvirt's freeze, which is then refused."""
    guest = make_guest()
    take = runs.host.take_snapshot

    def freeze_and_take(request: TakeRequest) -> object:
        if request.quiesce:
            guest.domain.fsFreeze()
        return take(request)

    monkeypatch.setattr(runs.host, "take_snapshot", freeze_and_take)
    ran = runs.run(guest, DEMANDED)
    assert_failed(ran, guest, [], reason="frozen")
    assert len(ran.of(GuestFrozen)) == 1
    assert guest.frozen()
    assert runs.intents.outstanding() == []  # it was not us
    runs.executor.thawer.thaw_all()
    assert guest.frozen()
    guest.domain.fsThaw()


@pytest.mark.parametrize(
    "forbidden", ["guest-get-fsinfo", "guest-fsfreeze-freeze,guest-fsfreeze-thaw,guest-get-fsinfo"]
)
def test_forbidden_to_answer(make_guest: Callable[..., Guest], runs: Runs, forbidden: str) -> None:
    """To tell its file systems is not needed; to freeze is, and where it is forbidden nothing is left to thaw."""
    guest = make_guest()
    in_background(guest, f"kill $(pidof qemu-ga); sleep 0.5; {AGENT} -b {forbidden}")
    wait_for(lambda: forbids(guest, "guest-get-fsinfo"))
    if "freeze" not in forbidden:
        assert_taken(runs.run(guest, DEMANDED), runs, guest, Consistency.FILESYSTEM)
    else:
        assert_failed(runs.run(guest, DEMANDED), guest, [])
        ran = runs.run(guest, PREFERRED)
        assert_taken(ran, runs, guest, Consistency.CRASH)
        assert len(ran.of(SnapshotDowngraded)) == 1
    assert runs.intents.outstanding() == []
    assert not guest.frozen()
