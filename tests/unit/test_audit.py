"""The audit looks twice, and does not judge what it cannot know."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd import audit as module
from kvmsnapd.audit import Audit, audit
from kvmsnapd.diagnosis import Level
from kvmsnapd.errors import HypervisorError, HypervisorUnreachableError
from kvmsnapd.fleet import survey
from kvmsnapd.model import Capabilities, DomainState, Kind, Layer, Snapshot, Storage
from kvmsnapd.state_files import DomainLocks
from tests.builders import NOW, OTHER_UUID, UUID, a_disk, a_domain, a_policy
from tests.fakes import FakeHypervisor, raising

if TYPE_CHECKING:
    from pathlib import Path

    from kvmsnapd.model import Domain

BASE = "/images/web1-vda.qcow2"
OVERLAY = "/images/web1.vda.kvmsnapd-standard-20261122T080000Z.qcow2"
OFF = DomainState.SHUT_OFF
LEFT = Storage(layers={BASE: Layer(BASE), OVERLAY: Layer(OVERLAY, backing=BASE, allocated=1000)})
REFUSED = HypervisorError("internal error", operation="read_domain")


@dataclass
class Bench:
    """One fake host, and the pauses of its audits."""

    fake: FakeHypervisor = field(default_factory=lambda: FakeHypervisor(stored=LEFT))
    pauses: list[float] = field(default_factory=list)

    def look(self, **options: Any) -> Audit:  # noqa: ANN401  # whatever the function takes
        policy = a_policy()
        fleet = survey(["standard"], {"*": (policy,)}, self.fake.inventory(), now=NOW)
        return audit(self.fake, fleet, **({"intents": [], "now": NOW, "pause": self.pauses.append} | options))


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.fake.add(a_domain(state=OFF))
    return bench


def told(seen: Audit) -> list[tuple[str, str]]:
    return [(finding.level.value, finding.subject) for finding in seen.findings]


def changing(bench: Bench, operation: str, *steps: Storage | Domain) -> None:
    """Have the n-th call of an operation find the n-th of these."""

    def put(step: Storage | Domain) -> None:
        if isinstance(step, Storage):
            bench.fake.stored = step
        else:
            bench.fake.add(step)

    bench.fake.before[operation] += [lambda step=step: put(step) for step in steps]


def test_what_is_found_twice_is_told_after_one_pause(bench: Bench) -> None:
    assert told(bench.look()) == [("warning", OVERLAY)]
    assert bench.pauses == [2.0]


def test_what_is_in_order_needs_no_second_look(bench: Bench) -> None:
    bench.fake.stored = Storage(layers={BASE: Layer(BASE)})
    assert told(bench.look()) == []
    assert bench.pauses == []


def test_a_file_that_was_there_for_a_moment_is_not_told(bench: Bench) -> None:
    changing(bench, "files", LEFT, Storage(layers={BASE: Layer(BASE)}))
    assert told(bench.look()) == []


def test_a_state_that_lasted_for_a_moment_is_not_told(bench: Bench) -> None:
    bench.fake.stored = Storage(layers={BASE: Layer(BASE)})
    saving = a_domain(state=DomainState.UNSETTLED, state_detail="paused by a snapshot in progress")
    changing(bench, "domain", saving, a_domain())
    assert told(bench.look()) == []


@pytest.mark.parametrize("calls_before", [0, 1])
def test_one_domain_that_cannot_be_read_voids_the_comparison_of_all(bench: Bench, calls_before: int) -> None:
    """In the second look as well: the domain may be the one that uses the file."""
    bench.fake.add(a_domain(name="db1", uuid=OTHER_UUID, disks=(a_disk(path="/images/db1"),), state=OFF))
    stored = {**LEFT.layers, "/images/db1": Layer("/images/db1")}
    bench.fake.stored = Storage(layers=stored)
    reads = 2 * calls_before
    bench.fake.before["domain"] = [lambda: None] * reads + [raising(REFUSED)] * 3
    seen = bench.look()
    (note,) = [finding for finding in seen.findings if "not compared" in finding.text]
    assert note.level is Level.NOTE
    assert "cannot be read" in note.text
    assert [finding for finding in seen.findings if finding.command] == []


def test_a_snapshot_that_nobody_understands_voids_the_comparison(bench: Bench) -> None:
    odd = Snapshot("odd", NOW, Kind.MIXED)
    bench.fake.add(a_domain(odd, state=OFF))
    seen = bench.look()
    assert "files were not compared: web1 cannot be read" in [finding.text for finding in seen.findings]
    assert [finding for finding in seen.findings if finding.subject == OVERLAY] == []


def test_a_domain_defined_since_the_first_look_is_known_in_the_second(bench: Bench) -> None:
    taken = a_domain(name="new", uuid=OTHER_UUID, disks=(a_disk(path=OVERLAY, backing=(BASE,)),), state=OFF)
    changing(bench, "files", LEFT)
    bench.fake.before["inventory"] = [lambda: None, lambda: bench.fake.add(taken) and None]
    assert told(bench.look()) == []


@pytest.mark.parametrize(("pool", "level"), [("images", Level.WARNING), (None, Level.NOTE)])
def test_a_folder_that_cannot_be_listed_is_told_and_its_files_are_not_judged(
    bench: Bench, pool: str | None, level: Level
) -> None:
    bench.fake.closed["/images"] = pool
    (found,) = bench.look().findings
    assert (found.level, found.subject) == (level, "/images")
    assert found.command == (f"virsh pool-start {pool}" if pool else None)


def test_an_empty_folder_is_not_one_that_cannot_be_listed(bench: Bench) -> None:
    bench.fake.stored = Storage()
    assert told(bench.look()) == []


def test_the_folders_of_policies_are_looked_into_without_a_domain_there(bench: Bench) -> None:
    stray = OVERLAY.replace("/images", "/overlays")
    bench.fake.stored = Storage(layers={BASE: Layer(BASE), stray: Layer(stray, backing="/x", allocated=1000)})
    assert told(bench.look()) == []
    policy = a_policy("unused", overlay_directory="/overlays/")
    assert told(bench.look(policies=[policy])) == [("warning", stray)]


def test_the_folder_of_a_backing_file_is_looked_into(bench: Bench) -> None:
    golden = "/golden/debian.qcow2"
    bench.fake.stored = Storage(layers={BASE: Layer(BASE, backing=golden), golden: Layer(golden)})
    assert told(bench.look()) == []
    assert ("files", "/golden") in bench.fake.calls


def test_without_a_storage_api_files_are_not_compared(bench: Bench) -> None:
    bench.fake.limits = Capabilities("test", "1.0.0", storage_api=False)
    assert told(bench.look()) == []


def test_the_second_look_holds_the_locks(bench: Bench, tmp_path: Path) -> None:
    locks = DomainLocks(tmp_path)
    held = []

    def try_lock() -> None:
        try:
            with locks.hold(UUID, wait=timedelta()):
                held.append(False)
        except Exception:  # noqa: BLE001  # that it is held
            held.append(True)

    bench.fake.before["files"] = [try_lock, try_lock]
    assert told(bench.look(locks=locks)) == [("warning", OVERLAY)]
    assert held == [False, True]
    assert bench.pauses == []


def test_what_somebody_works_on_is_not_judged(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_WAIT", timedelta(milliseconds=1))
    locks = DomainLocks(tmp_path)
    bench.fake.add(a_domain(state=DomainState.UNSETTLED, state_detail="crashed"))
    with locks.hold(UUID, wait=timedelta()):
        (found,) = bench.look(locks=locks).findings
    assert (found.level, found.subject, found.text) == (Level.NOTE, "web1", "is being worked on; look again")


def test_locks_that_cannot_be_used_are_replaced_by_a_pause(bench: Bench, tmp_path: Path) -> None:
    locks = DomainLocks(tmp_path / "locks")
    (tmp_path / "locks").rmdir()
    assert told(bench.look(locks=locks)) == [("warning", OVERLAY)]
    assert bench.pauses == [2.0]


def test_an_intent_that_a_take_has_for_a_moment_is_not_told(bench: Bench) -> None:
    bench.fake.stored = Storage(layers={BASE: Layer(BASE)})
    answers = iter([[UUID]])
    assert told(bench.look(intents=lambda: next(answers, []))) == []
    assert told(bench.look(intents=[UUID, OTHER_UUID])) == [("problem", OTHER_UUID), ("problem", "web1")]


def test_figures_that_change_between_the_looks_do_not_hide_a_finding(bench: Bench) -> None:
    bench.fake.stored = Storage(free_bytes={"/images": 5 * 2**20}, layers={BASE: Layer(BASE)})
    later = replace(bench.fake.stored, free_bytes={"/images": 4 * 2**20})
    bench.fake.before["storage"] = [lambda: None, lambda: setattr(bench.fake, "stored", later)]
    fleet = survey(["standard"], {"*": (a_policy(min_free_bytes=2**30),)}, bench.fake.inventory(), now=NOW)
    seen = audit(bench.fake, fleet, intents=[], now=NOW, pause=bench.pauses.append)
    (found,) = seen.findings
    assert "/images has 4 MiB free" in found.text


def test_storage_that_may_not_be_asked_is_unknown(bench: Bench) -> None:
    gone = HypervisorUnreachableError("refused", operation="connect")
    bench.fake.stored = Storage(layers={BASE: Layer(BASE)})
    bench.fake.before["storage"] = [raising(gone)] * 3
    assert told(bench.look()) == []
