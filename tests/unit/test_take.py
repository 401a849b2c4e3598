"""Takes with a quiesced guest: what is noted of the freeze, when the note goes, and what is told."""

from __future__ import annotations

import pytest

from kvmsnapd.errors import (
    DomainBusyError,
    FreezeRefusedError,
    GuestAgentRefusedError,
    GuestAgentUnavailableError,
    GuestFrozenError,
    HypervisorError,
    HypervisorUnreachableError,
    SnapshotExistsError,
    StorageFullError,
)
from kvmsnapd.events import DomainThawed, GuestFrozen, SnapshotDowngraded, SnapshotFailed, SnapshotTaken, ThawFailed
from kvmsnapd.model import DomainState
from kvmsnapd.policy import ConsistencyRule
from tests.builders import a_policy
from tests.fakes import raising
from tests.unit.test_execute import Bench, calls, the_request, void

# Errors after which nobody knows whether the guest is frozen.
OPEN = [HypervisorError, DomainBusyError, StorageFullError]
AGENT = [GuestAgentUnavailableError, GuestAgentRefusedError]
RULES = [ConsistencyRule.FILESYSTEM, ConsistencyRule.FILESYSTEM_PREFERRED]


@pytest.fixture
def bench(tmp_path: object) -> Bench:
    return Bench(tmp_path, a_policy(consistency=ConsistencyRule.FILESYSTEM))  # type: ignore[arg-type]


def error(kind: type[HypervisorError], text: str = "it failed") -> HypervisorError:
    return kind(text, operation="snapshot_create")


def silent() -> HypervisorError:
    return error(GuestAgentUnavailableError, "agent did not answer")


# The create fails


@pytest.mark.parametrize("kind", [*OPEN, *AGENT])
def test_after_an_error_of_the_create_the_guest_is_thawed_at_once(bench: Bench, kind: type[HypervisorError]) -> None:
    def freeze_and_fail() -> None:
        bench.fake.frozen.add(bench.uuid)
        raise error(kind)

    bench.fake.before["take_snapshot"] = [freeze_and_fail]
    assert bench.run().result == "failed"
    assert calls(bench, "take_snapshot", "thaw") == ["take_snapshot", "thaw"]
    assert (bench.fake.frozen, bench.intents.outstanding()) == (set(), [])
    assert (len(bench.said(DomainThawed)), len(bench.said(SnapshotFailed))) == (1, 1)


@pytest.mark.parametrize("kind", [*OPEN, *AGENT])
def test_the_intent_stays_for_later_where_that_thaw_fails(bench: Bench, kind: type[HypervisorError]) -> None:
    bench.fake.before["take_snapshot"] = [raising(error(kind))]
    bench.fake.before["thaw"] = [raising(silent())] * 2
    assert bench.run().result == "failed"
    bench.fake.before.clear()
    assert bench.intents.outstanding() == [bench.uuid]
    assert (len(bench.said(ThawFailed)), bench.said(DomainThawed)) == (1, [])
    bench.executor.thawer.thaw_all()
    assert bench.intents.outstanding() == []


def test_while_it_is_thawed_the_intent_is_still_on_disk(bench: Bench) -> None:
    seen: list[bool] = []
    bench.fake.before["take_snapshot"] = [raising(error(HypervisorError))]
    bench.fake.before["thaw"] = [lambda: seen.append(bench.intents.exists(bench.uuid))]
    bench.run()
    assert (seen, bench.intents.outstanding()) == ([True], [])


def test_a_connection_that_broke_is_not_asked_for_a_thaw_and_the_intent_stays(bench: Bench) -> None:
    bench.fake.before["take_snapshot"] = [raising(error(HypervisorUnreachableError))]
    assert bench.run().result == "failed"
    assert (calls(bench, "thaw"), bench.intents.outstanding()) == ([], [bench.uuid])


def test_a_guest_that_was_shut_off_by_then_needs_no_thaw(bench: Bench) -> None:
    def shut_off_and_fail() -> None:
        bench.change(state=DomainState.SHUT_OFF)
        raise error(HypervisorError)

    bench.fake.before["take_snapshot"] = [shut_off_and_fail]
    bench.run()
    assert (calls(bench, "thaw"), bench.intents.outstanding()) == ([], [])


def test_a_take_without_a_freeze_leaves_nothing_to_thaw(tmp_path: object) -> None:
    bench = Bench(tmp_path, a_policy(consistency=ConsistencyRule.CRASH))  # type: ignore[arg-type]
    seen: list[bool] = []

    def fail() -> None:
        seen.append(bench.intents.exists(bench.uuid))
        raise error(HypervisorError)

    bench.fake.before["take_snapshot"] = [fail]
    assert bench.run().result == "failed"
    assert (seen, calls(bench, "thaw"), bench.intents.outstanding()) == ([False], [], [])


def test_a_take_that_was_finished_already_leaves_no_intent(bench: Bench) -> None:
    earlier = the_request(bench)
    bench.fake.before["take_snapshot"] = [lambda: void(bench.fake.finish_take(earlier))]
    assert bench.run().result == "taken"
    assert bench.intents.outstanding() == []


def test_a_name_that_is_taken_by_something_else_is_thawed_for_all_the_same(bench: Bench) -> None:
    bench.fake.before["take_snapshot"] = [raising(error(SnapshotExistsError))]
    assert bench.run().result == "failed"
    assert (calls(bench, "thaw"), bench.intents.outstanding()) == (["thaw"], [])


# Refused, or frozen by somebody else


@pytest.mark.parametrize("kind", [FreezeRefusedError, GuestFrozenError])
@pytest.mark.parametrize("rule", RULES)
def test_a_freeze_that_was_answered_with_no_leaves_no_intent_and_is_not_thawed(
    tmp_path: object, kind: type[HypervisorError], rule: ConsistencyRule
) -> None:
    bench = Bench(tmp_path, a_policy(consistency=rule))  # type: ignore[arg-type]
    bench.fake.before["take_snapshot"] = [raising(error(kind))]
    outcome = bench.run()
    assert (calls(bench, "thaw"), bench.intents.outstanding()) == ([], [])
    if rule is ConsistencyRule.FILESYSTEM:
        assert (outcome.result, len(bench.said(SnapshotFailed))) == ("failed", 1)
    else:
        assert (outcome.result, bench.said(SnapshotTaken)[0].consistency) == ("taken", "crash")
        assert len(bench.said(SnapshotDowngraded)) == 1
    assert len(bench.said(GuestFrozen)) == (kind is GuestFrozenError)


@pytest.mark.parametrize("kind", [FreezeRefusedError, GuestFrozenError])
def test_an_intent_that_was_there_before_outlives_such_an_answer(bench: Bench, kind: type[HypervisorError]) -> None:
    def find_an_older_intent() -> None:
        bench.intents.record(bench.uuid)

    bench.fake.before["filesystems"] = [find_an_older_intent]
    bench.fake.before["take_snapshot"] = [raising(error(kind))]
    bench.fake.before["thaw"] = [raising(silent())] * 2
    bench.run()
    assert bench.intents.outstanding() == [bench.uuid]


def test_an_agent_that_does_not_answer_is_asked_for_one_thaw(bench: Bench) -> None:
    """Each takes as long as libvirt waits for the agent, with the domain locked and its storage's place held."""
    bench.fake.before["take_snapshot"] = [raising(silent())]
    bench.fake.before["thaw"] = [raising(silent())] * 2
    bench.run()
    assert calls(bench, "thaw") == ["thaw"]


# Thaws that the agent refuses


def refused() -> HypervisorError:
    return error(GuestAgentRefusedError, "command disabled")


def test_an_agent_without_a_thaw_that_answers_as_one_that_is_not_frozen_has_nothing_to_thaw(bench: Bench) -> None:
    bench.intents.record(bench.uuid)
    bench.fake.before["thaw"] = [raising(refused())]
    bench.executor.thawer.thaw(bench.uuid)
    assert (bench.intents.outstanding(), bench.said(ThawFailed)) == ([], [])
    assert calls(bench, "filesystems") == ["filesystems"]


@pytest.mark.parametrize(
    "kind", [GuestFrozenError, GuestAgentUnavailableError, GuestAgentRefusedError, HypervisorError]
)
def test_an_agent_without_a_thaw_that_does_not_say_so_keeps_its_intent(
    bench: Bench, kind: type[HypervisorError]
) -> None:
    bench.intents.record(bench.uuid)
    bench.fake.before["thaw"] = [raising(refused())]
    bench.fake.before["filesystems"] = [raising(error(kind))]
    bench.executor.thawer.thaw(bench.uuid)
    assert bench.intents.outstanding() == [bench.uuid]
    assert [event.error for event in bench.said(ThawFailed)] == ["command disabled"]


def test_an_agent_that_does_not_answer_the_thaw_is_asked_nothing_else(bench: Bench) -> None:
    bench.intents.record(bench.uuid)
    bench.fake.before["thaw"] = [raising(silent())]
    bench.executor.thawer.thaw(bench.uuid)
    assert (bench.intents.outstanding(), calls(bench, "filesystems")) == ([bench.uuid], [])


def test_a_guest_that_cannot_be_thawed_is_told_once_and_for_another_reason_again(bench: Bench) -> None:
    bench.intents.record(bench.uuid)
    texts = ["silent", "silent", "silent", "busy", "busy"]
    bench.fake.before["thaw"] = [raising(error(HypervisorError, text)) for text in texts]
    for _ in texts:
        bench.executor.thawer.thaw_all()
    assert [event.error for event in bench.said(ThawFailed)] == ["silent", "busy"]
    bench.executor.thawer.thaw_all()
    assert (len(bench.said(DomainThawed)), bench.intents.outstanding()) == (1, [])


def trouble(bench: Bench) -> None:
    """Have a guest that may be frozen, and cannot be thawed."""
    bench.intents.record(bench.uuid)
    bench.fake.before["thaw"] = [raising(refused())]
    bench.fake.before["filesystems"] = [raising(silent())]
    bench.executor.thawer.thaw(bench.uuid)


def test_after_a_thaw_the_next_trouble_is_told_again(bench: Bench) -> None:
    trouble(bench)
    bench.executor.thawer.thaw(bench.uuid)
    trouble(bench)
    assert len(bench.said(ThawFailed)) == 2


def test_after_an_agent_said_that_it_is_not_frozen_the_next_trouble_is_told_again(bench: Bench) -> None:
    trouble(bench)
    bench.fake.before["thaw"] = [raising(refused())]
    bench.executor.thawer.thaw(bench.uuid)
    assert bench.intents.outstanding() == []
    trouble(bench)
    assert len(bench.said(ThawFailed)) == 2
