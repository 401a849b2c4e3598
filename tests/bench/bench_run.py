"""What a run costs on top of libvirt's own calls: take and prune through the executor, against the bare calls."""

from __future__ import annotations

import itertools
import statistics
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.execute import Executor
from kvmsnapd.fleet import survey
from kvmsnapd.libvirt_host import LibvirtHost
from kvmsnapd.state_files import DomainLocks, FreezeIntents
from tests.builders import a_policy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

ROUNDS = 30
DISK_ONLY_ATOMIC_QUIESCE = 16 | 128 | 64


def test_a_run_against_the_bare_calls(
    make_guest: Callable[..., Guest], libvirtd: Libvirtd, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One take and one delete a round, in turn by the executor and by hand, on one running guest each."""
    ours, bare = make_guest(), make_guest()
    policy = a_policy(keep="last=1", schedule="hourly")
    slots = itertools.count()
    now = datetime(2026, 11, 22, tzinfo=UTC)
    host = LibvirtHost(libvirtd.uri)
    executor = Executor(
        host,
        DomainLocks(tmp_path / "locks"),
        FreezeIntents(tmp_path / "frozen"),
        lambda _event: None,
        clock=lambda: now,
        stopwatch=time.monotonic,
    )

    def run() -> None:
        nonlocal now
        now += timedelta(hours=1)
        fleet = survey([policy.name], {ours.name: (policy,)}, host.inventory(), now=now)
        assert executor.run(fleet.pairs[0]).result == "taken"

    domain = bare.domain

    def by_hand() -> None:
        name = f"s{next(slots)}"
        xml = f"""<domainsnapshot><name>{name}</name><disks><disk name='vda' snapshot='external' type='file'>
            <source file='{bare.directory}/{name}.qcow2'/></disk></disks></domainsnapshot>"""
        domain.snapshotCreateXML(xml, DISK_ONLY_ATOMIC_QUIESCE)
        for snapshot in domain.listAllSnapshots()[:-1]:
            snapshot.delete()

    seconds: dict[str, list[float]] = {"kvmsnapd": [], "bare calls": []}
    for _ in range(ROUNDS):
        for name, work in (("kvmsnapd", run), ("bare calls", by_hand)):
            started = time.monotonic()
            work()
            seconds[name].append(time.monotonic() - started)
    host.close()
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    with capsys.disabled():
        print(f"\none quiesced take and one delete on a running guest, median of {ROUNDS - 1}:")
        for name, median in medians.items():
            print(f"  {name:12} {median * 1000:6.1f} ms")
        print(f"  ratio        {medians['kvmsnapd'] / medians['bare calls']:6.2f}")
