"""Runs with hooks around their takes: small shell scripts, run for real."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.errors import GuestAgentUnavailableError, HypervisorError, HypervisorUnreachableError
from kvmsnapd.events import Event, HookFinished, RunSkipped, SnapshotDeleted, SnapshotTaken
from kvmsnapd.gates import StorageGates
from kvmsnapd.model import DomainState
from kvmsnapd.naming import format_name
from kvmsnapd.policy import Hook, Hooks, Policy
from tests.builders import a_policy
from tests.fakes import raising
from tests.unit.test_execute import HOUR, NOON, Bench, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = format_name("standard", NOON)


class HookBench(Bench):
    """A bench whose policy has all three hooks; each notes that it was run, with its environment."""

    def __init__(self, directory: Path, *, before: str = "", required: bool = False, **fields: object) -> None:
        self.notes = directory / "notes"
        self.notes.touch()
        words = {word: self.hook(script) for word, script in (("before", before), ("after", ""), ("on_failure", ""))}
        words["before"] = replace(words["before"], required=required)
        super().__init__(directory, a_policy(hooks=Hooks(**words), **fields))  # type: ignore[arg-type]

    def hook(self, script: str = "") -> Hook:
        line = 'echo "$SNAPSHOT_HOOK $SNAPSHOT_RESULT $SNAPSHOT_NAME $SNAPSHOT_CONSISTENCY" >>"$0"'
        return Hook(("/bin/sh", "-c", f"{line}\n{script}", str(self.notes)), timedelta(seconds=30))

    @property
    def ran(self) -> list[str]:
        """Return which hooks were run and with which result, and forget them."""
        lines = self.notes.read_text().splitlines()
        self.notes.write_text("")
        return [" ".join(line.split()[:2]) for line in lines]


@pytest.fixture
def bench(tmp_path: Path) -> HookBench:
    return HookBench(tmp_path)


def when(bench: Bench, kind: type[Event]) -> int:
    return [type(event) for event in bench.events].index(kind)


def test_before_and_after_are_run_around_the_take_and_before_anything_is_deleted(bench: HookBench) -> None:
    for _ in range(4):
        bench.events.clear()
        assert bench.run().result == "taken"
        assert bench.ran == ["before due", "after taken"]
        bench.now += HOUR
    order = [type(event) for event in bench.events if isinstance(event, HookFinished | SnapshotTaken | SnapshotDeleted)]
    assert order == [HookFinished, SnapshotTaken, HookFinished, SnapshotDeleted]


def test_a_hook_is_told_all_that_it_may_want_and_nothing_of_the_daemons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    told = tmp_path / "told"
    bench = HookBench(tmp_path, before=f"env >{told}")
    bench.run()
    variables = dict(line.split("=", 1) for line in told.read_text().splitlines())
    assert {key: value for key, value in variables.items() if key.startswith("SNAPSHOT_")} == {
        "SNAPSHOT_HOOK": "before",
        "SNAPSHOT_DOMAIN": "web1",
        "SNAPSHOT_DOMAIN_UUID": bench.uuid,
        "SNAPSHOT_POLICY": "standard",
        "SNAPSHOT_NAME": NAME,
        "SNAPSHOT_CONSISTENCY": "filesystem",
        "SNAPSHOT_RESULT": "due",
    }
    assert "SECRET" not in variables


def test_how_a_hook_ended_is_told(tmp_path: Path) -> None:
    bench = HookBench(tmp_path, before="echo no; exit 3")
    bench.run()
    before, after = bench.said(HookFinished)
    assert (before.hook, before.ok, before.detail, before.output) == ("before", False, "exit code 3", "no")
    assert (after.hook, after.ok, after.detail) == ("after", True, "")


def test_a_hook_that_fails_stops_nothing_unless_it_is_required(tmp_path: Path) -> None:
    bench = HookBench(tmp_path, before="exit 1")
    assert bench.run().result == "taken"
    assert bench.ran == ["before due", "after taken"]


def test_a_required_hook_that_fails_stops_the_take_and_is_tried_again(tmp_path: Path) -> None:
    bench = HookBench(tmp_path, before="exit 1", required=True)
    outcome = bench.run()
    assert (outcome.result, outcome.scheduled_at, outcome.wants_retry) == ("skipped", NOON, True)
    assert (bench.names, bench.said(RunSkipped)[0].reason) == ([], "hook")
    assert bench.ran == ["before due", "on_failure skipped"]


def test_a_required_hook_that_succeeds_stops_nothing(tmp_path: Path) -> None:
    assert HookBench(tmp_path, required=True).run().result == "taken"


def test_a_program_that_is_not_there_is_a_hook_that_failed(tmp_path: Path) -> None:
    missing = Hook(("/nowhere/hook",), timedelta(seconds=5), required=True)
    bench = Bench(tmp_path, a_policy(hooks=Hooks(before=missing)))
    assert bench.run().result == "skipped"
    assert bench.said(HookFinished)[0].detail.startswith("cannot be started")


def test_no_hook_is_run_while_nothing_is_due(bench: HookBench) -> None:
    bench.run()
    assert bench.ran == ["before due", "after taken"]
    assert bench.run().result == "nothing_due"
    assert bench.ran == []


def test_no_hook_is_run_for_a_domain_that_is_refused(bench: HookBench) -> None:
    bench.fake.add(replace(bench.fake.domains[bench.uuid], managed_save=True))
    assert bench.run().result == "skipped"
    assert bench.ran == []


def test_no_hook_is_run_where_the_newest_snapshot_will_do(bench: HookBench) -> None:
    bench.fake.written = {}
    bench.fake.add(replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF))
    bench.run()
    bench.now += HOUR
    _ = bench.ran
    assert bench.run().result == "unchanged"
    assert bench.ran == []


def interfering(bench: HookBench, interfere: Callable[[], object]) -> None:
    """Have something done between the plan and the reading after the hook ``before``, which is the second."""
    bench.fake.before["domain"] = [lambda: None, lambda: interfere() and None]


def test_what_the_hook_before_did_to_the_domain_is_seen(bench: HookBench) -> None:
    off = replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF, agent_connected=False)
    interfering(bench, lambda: bench.fake.add(off))
    assert bench.run().result == "taken"
    assert bench.said(SnapshotTaken)[0].consistency == "offline"


def test_a_domain_that_the_hook_before_made_unfit_is_not_taken(bench: HookBench) -> None:
    saved = replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF, managed_save=True)
    interfering(bench, lambda: bench.fake.add(saved))
    assert bench.run().result == "skipped"
    assert (bench.names, bench.ran) == ([], ["before due", "on_failure skipped"])


def test_the_hook_after_is_told_what_was_taken_and_not_what_was_planned(bench: HookBench) -> None:
    off = replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF, agent_connected=False)
    interfering(bench, lambda: bench.fake.add(off))
    bench.run()
    assert bench.notes.read_text().splitlines()[-1] == f"after taken {NAME} offline"


def test_what_the_hook_before_began_is_ended_where_no_snapshot_was_needed_after_all(bench: HookBench) -> None:
    bench.fake.written = {}
    off = replace(bench.fake.domains[bench.uuid], state=DomainState.SHUT_OFF)
    bench.fake.add(off)
    bench.run()
    bench.now += HOUR
    off = bench.fake.domains[bench.uuid]
    bench.fake.add(replace(off, state=DomainState.RUNNING))
    interfering(bench, lambda: bench.fake.add(off))
    _ = bench.ran
    assert bench.run().result == "unchanged"
    assert len(bench.ran) == 2


@pytest.mark.parametrize(
    "error",
    [
        HypervisorError("no space left", operation="snapshot_create"),
        HypervisorUnreachableError("connection lost", operation="snapshot_create"),
    ],
)
def test_after_a_take_that_failed_on_failure_is_run(bench: HookBench, error: HypervisorError) -> None:
    bench.fake.before["take_snapshot"] = [raising(error)]
    assert bench.run().result == "failed"
    assert bench.ran == ["before due", "on_failure failed"]


def test_a_take_that_was_downgraded_is_no_failure(bench: HookBench) -> None:
    silent = GuestAgentUnavailableError("agent did not answer", operation="snapshot_create", code=86)
    bench.fake.before["take_snapshot"] = [raising(silent)]
    assert bench.run().result == "taken"
    assert bench.ran == ["before due", "after taken"]


def test_a_libvirt_that_went_away_during_the_hook_before_is_a_failure(bench: HookBench) -> None:
    gone = HypervisorUnreachableError("connection lost", operation="read_domain")
    bench.fake.before["domain"] = [lambda: None, raising(gone)]
    assert bench.run().result == "skipped"
    assert (bench.names, bench.ran) == ([], ["before due", "on_failure failed"])
    assert bench.said(RunSkipped)[0].reason == "connection"


def test_notes_that_cannot_be_written_are_a_failure(bench: HookBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_uuid: str) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.intents, "record", full)
    assert bench.run().result == "skipped"
    assert bench.ran == ["before due", "on_failure failed"]


def test_each_hook_may_be_left_out(tmp_path: Path) -> None:
    bench = HookBench(tmp_path)
    every: Policy = bench.policy
    for left_out in ("before", "after", "on_failure"):
        bench.policy = replace(every, hooks=replace(every.hooks, **{left_out: None}))
        bench.fake.before["take_snapshot"] = [raising(HypervisorError("refused", operation="snapshot_create"))]
        assert [bench.run().result, bench.run().result] == ["failed", "taken"]
        expected = ["before due", "on_failure failed", "before due", "after taken"]
        assert bench.ran == [word for word in expected if not word.startswith(f"{left_out} ")]
        bench.now += HOUR


def test_an_error_that_nobody_foresaw_is_a_failure(bench: HookBench) -> None:
    bench.fake.before["take_snapshot"] = [raising(KeyError("serial"))]
    assert bench.run().result == "skipped"
    assert bench.ran == ["before due", "on_failure failed"]
    assert bench.said(RunSkipped)[0].reason == "unforeseen"


def test_the_hook_before_is_run_once_there_is_a_place_on_the_storage(bench: HookBench) -> None:
    """What it stops in the guest would else stand still for as long as others take."""
    bench.executor.gates = gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/images"], heavy=False):
        thread, outcomes = in_a_thread(bench)
        thread.join(0.1)
        assert (thread.is_alive(), bench.ran) == (True, [])
    thread.join(30)
    assert [outcome.result for outcome in outcomes] == ["taken"]
    assert bench.ran == ["before due", "after taken"]


def test_no_hook_is_run_where_the_storage_stays_busy(bench: HookBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.executor.gates = gates = StorageGates(takes=1, heavy=1)
    hold = gates.hold
    with hold(["/images"], heavy=False):
        monkeypatch.setattr(gates, "hold", lambda folders, *, heavy: hold(folders, heavy=heavy, wait=timedelta(0)))
        assert bench.run().result == "skipped"
    assert (bench.ran, bench.said(RunSkipped)[0].reason) == ([], "storage_busy")


def test_no_hook_is_run_for_a_domain_that_became_unfit_while_it_waited(bench: HookBench) -> None:
    bench.executor.gates = gates = StorageGates(takes=1, heavy=1)
    with gates.hold(["/images"], heavy=False):
        thread, _ = in_a_thread(bench)
        thread.join(0.1)
        bench.change(managed_save=True)
    thread.join(30)
    assert (bench.names, bench.ran) == ([], [])
