"""Restore drills: when one is due, what is noted of it, and what is left of one that broke."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.drill import drill_of, due_drills
from kvmsnapd.driller import Driller
from kvmsnapd.drills import Drills
from kvmsnapd.errors import DrillFailedError, DrillRefusedError, HypervisorError, HypervisorUnreachableError
from kvmsnapd.events import DrillFinished, DrillSkipped
from kvmsnapd.fleet import survey
from kvmsnapd.matching import Coverage, assign
from kvmsnapd.model import Drill, PairName
from kvmsnapd.plan import plan_run
from kvmsnapd.policy import DrillRules
from kvmsnapd.schedule import parse_schedule
from tests.builders import ANY_LIBVIRT, BERLIN, NOW, OTHER_UUID, UUID, a_policy, an_inventory, hourly_snapshots
from tests.fakes import FakeHypervisor, raising
from tests.unit.test_restore import taken_on, with_mark

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from kvmsnapd.events import Event
    from kvmsnapd.fleet import Pair
    from kvmsnapd.model import Snapshot

RULES = DrillRules(schedule=parse_schedule("daily", BERLIN), max_age=timedelta(days=2))
POLICY = a_policy(drill=RULES)
NAME = PairName("web1", UUID, "standard")


def pairs(*snapshots: Snapshot, now: datetime = NOW) -> list[Pair]:
    return list(survey(["standard"], {"web1": (POLICY,)}, [an_inventory(*snapshots)], now=now).pairs)


def drilled(snapshot: Snapshot, ended_at: datetime, failure: str | None = None) -> Snapshot:
    return with_mark(snapshot, drill=Drill(ended_at, failure))


def test_one_is_due_when_none_has_ended_since_the_latest_slot_and_there_is_something_to_try() -> None:
    old, new = hourly_snapshots(2)
    midnight = NOW.astimezone(BERLIN).replace(hour=0, minute=0)
    assert due_drills(pairs(), now=NOW) == []
    assert [pair.name for pair in due_drills(pairs(old, new), now=NOW)] == [NAME]
    assert due_drills(pairs(drilled(old, midnight + timedelta(minutes=1)), new), now=NOW) == []
    assert due_drills(pairs(drilled(old, midnight + timedelta(minutes=1), "no boot"), new), now=NOW) == []
    assert due_drills(pairs(drilled(old, midnight - timedelta(minutes=1)), new), now=NOW)


def test_without_a_schedule_none_is_due() -> None:
    found = survey(["standard"], {"web1": (a_policy(),)}, [an_inventory(*hourly_snapshots(1))], now=NOW).pairs
    assert due_drills(found, now=NOW) == []


def test_a_new_snapshot_carries_the_last_drill_on() -> None:
    old, new = hourly_snapshots(2)
    last = Drill(NOW, "no boot", NOW - timedelta(days=1))
    domain = taken_on(with_mark(old, drill=last), drilled(new, NOW - timedelta(hours=1)))
    take = plan_run(domain, POLICY, ANY_LIBVIRT, now=NOW).take
    assert take
    assert take.mark.drill == last
    assert drill_of(replace(pairs(old)[0], snapshots=domain.snapshots)) == last


def test_a_drill_s_domain_is_nobody_s_to_protect() -> None:
    inventory = an_inventory(name="kvmsnapd-drill-1234abcd", uuid=OTHER_UUID)
    (assignment,) = assign({"*": (POLICY,)}, [inventory])
    assert (assignment.coverage, assignment.policies) == (Coverage.UNPROTECTED_ON_PURPOSE, ())


@dataclass
class Ground:
    """A domain with one snapshot, and who tries it."""

    fake: FakeHypervisor
    events: list[Event] = field(default_factory=list)
    wanted: bool = True
    read: bool = False

    def __post_init__(self) -> None:
        self.driller = Driller(
            self.fake,
            self.events.append,
            lambda: NOW,
            lambda _pair: nullcontext(),
            self.reading,
            wanted=lambda: self.wanted,
        )

    @contextmanager
    def reading(self, _domain_uuid: str) -> Iterator[None]:
        self.read = True
        yield
        self.read = False

    @property
    def snapshot(self) -> Snapshot:
        return self.fake.domain(UUID).snapshots[0]

    def drill(self) -> Drill:
        return self.driller.drill(NAME, self.snapshot.name, RULES)


@pytest.fixture
def ground() -> Ground:
    fake = FakeHypervisor(clock=lambda: NOW)
    fake.add(taken_on(*hourly_snapshots(1)))
    return Ground(fake)


def test_a_good_one_is_noted_and_nothing_is_left(ground: Ground) -> None:
    seen: list[bool] = []
    ground.fake.before["run_drill"].append(lambda: seen.append(ground.read))
    drill = ground.drill()
    assert drill == Drill(NOW, None, NOW)
    assert ground.snapshot.mark
    assert ground.snapshot.mark.drill == drill
    assert (seen, ground.read) == ([True], False)
    assert ground.fake.copies == {}
    (event,) = ground.events
    assert isinstance(event, DrillFinished)
    assert (event.ok, event.reason) == (True, "")


def test_a_failed_one_is_noted_with_its_reason_and_the_last_good_one(ground: Ground) -> None:
    ground.drill()
    ground.fake.before["run_drill"].append(raising(DrillFailedError("the copy ended", reason="ended")))
    assert ground.drill() == Drill(NOW, "the copy ended", NOW)
    event = ground.events[-1]
    assert isinstance(event, DrillFinished)
    assert (event.ok, event.reason, event.detail) == (False, "ended", "the copy ended")
    assert ground.fake.copies == {}


def test_what_libvirt_says_of_a_damaged_image_is_a_failure_of_the_snapshot(ground: Ground) -> None:
    ground.fake.before["create_overlays"].append(raising(HypervisorError("not in qcow2 format", operation="x")))
    assert ground.drill().failure == "libvirt could put no overlay on it: not in qcow2 format"


@pytest.mark.parametrize("error", [HypervisorUnreachableError("gone", operation="x"), DrillRefusedError("no memory")])
def test_what_is_no_word_on_the_snapshot_is_not_noted(ground: Ground, error: Exception) -> None:
    ground.fake.before["run_drill"].append(raising(error))
    with pytest.raises(type(error)):
        ground.drill()
    assert ground.snapshot.mark
    assert ground.snapshot.mark.drill is None
    assert (ground.fake.copies, ground.events) == ({}, [])


def test_that_of_an_older_snapshot_says_nothing_of_the_newest(ground: Ground) -> None:
    ground.fake.add(taken_on(*hourly_snapshots(2)))
    old, new = ground.fake.domain(UUID).snapshots
    assert ground.driller.drill(NAME, old.name, RULES).failure is None
    assert ground.fake.domain(UUID).snapshots == (old, new)
    ground.driller.drill(NAME, new.name, RULES)
    assert ground.fake.domain(UUID).snapshots[0] == old
    assert (ground.fake.domain(UUID).snapshots[1].mark or old.mark) != new.mark


@pytest.mark.parametrize("pruned", [False, True])
def test_that_of_one_that_was_the_newest_is_noted_on_what_was_taken_meanwhile(ground: Ground, pruned: bool) -> None:
    first, second = taken_on(*hourly_snapshots(2)).snapshots
    ground.fake.add(taken_on(first))
    after = (replace(second, parent=None),) if pruned else (first, second)
    ground.fake.before["run_drill"].append(lambda: ground.fake.add(taken_on(*after)))
    drill = ground.driller.drill(NAME, first.name, RULES)
    newest = ground.fake.domain(UUID).snapshots[-1]
    assert (newest.name, newest.mark and newest.mark.drill) == (second.name, drill)


def test_one_that_cannot_be_made_is_told_and_tried_again_in_an_hour(ground: Ground) -> None:
    now, ended = [NOW], []
    drills = Drills(ground.driller, lambda: now[0], lambda: ended.append(now[0]))
    found = pairs(*ground.fake.domain(UUID).snapshots)
    ground.fake.before["run_drill"].append(raising(DrillRefusedError("no memory")))
    assert drills.run_next(found)
    assert [type(event) for event in ground.events] == [DrillSkipped]
    assert not drills.run_next(found)
    now[0] += timedelta(hours=1)
    assert drills.run_next(found)
    assert isinstance(ground.events[-1], DrillFinished)
    assert ended == [NOW, NOW + timedelta(hours=1)]
    assert not drills.run_next(pairs(*ground.fake.domain(UUID).snapshots))
