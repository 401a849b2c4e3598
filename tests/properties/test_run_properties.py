"""Whatever happens between and during runs, what they promise of a domain's snapshots holds."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvmsnapd.errors import (
    DomainBusyError,
    GuestAgentUnavailableError,
    HypervisorError,
    HypervisorUnreachableError,
    MergeFailedError,
    SnapshotExistsError,
)
from kvmsnapd.execute import Executor
from kvmsnapd.fleet import survey
from kvmsnapd.model import DomainState, Hold, Snapshot
from kvmsnapd.policy import ConsistencyRule
from kvmsnapd.state_files import DomainLocks, FreezeIntents
from tests.builders import a_domain, a_policy, at
from tests.fakes import FakeHypervisor, raising

ERRORS = [HypervisorError, HypervisorUnreachableError, GuestAgentUnavailableError, SnapshotExistsError, DomainBusyError]
ERRORS += [MergeFailedError]
OPERATIONS = ["take_snapshot", "delete_snapshot", "domain", "thaw", "storage", "filesystems", "describe_snapshot"]
POLICIES = [
    # The chain is just long enough for what they may keep, so that foreign and held ones fill it.
    a_policy("hourly", keep="last=2 hourly=3", max_chain_depth=14),
    a_policy("often", schedule="every 15m", keep="within=2h", max_chain_depth=14, max_deletes_per_run=3),
    a_policy("strict", schedule="daily", keep="last=1", consistency=ConsistencyRule.FILESYSTEM, max_chain_depth=16),
]


class Runs(RuleBasedStateMachine):
    """One domain under three policies, people, a clock that steps, and a libvirt that fails at any call."""

    def __init__(self) -> None:
        super().__init__()
        self.now = at("2026-10-24T00:00")
        self.fake = FakeHypervisor(clock=lambda: self.now, written={})
        self.writes = 0
        self.holds_writes: dict[str, int] = {}
        self.uuid = self.fake.add(a_domain(run_id=1)).uuid
        self.directory = tempfile.TemporaryDirectory()
        path, ticks = Path(self.directory.name), itertools.count()
        self.executor = Executor(
            self.fake,
            DomainLocks(path / "locks"),
            FreezeIntents(path / "frozen"),
            lambda _event: None,
            clock=lambda: self.now,
            stopwatch=lambda: float(next(ticks)),
        )
        self.foreign: set[str] = set()
        self.names = itertools.count()
        self.run_ids = itertools.count(2)

    def teardown(self) -> None:
        self.directory.cleanup()

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        return self.fake.domains[self.uuid].snapshots

    @rule(
        policy=st.sampled_from(POLICIES),
        faults=st.lists(
            st.tuples(
                st.sampled_from(OPERATIONS),
                st.integers(0, 2),
                st.sampled_from(ERRORS),
            ),
            max_size=3,
        ),
    )
    def run(self, policy: object, faults: list[tuple[str, int, type[HypervisorError]]]) -> None:
        """Run one policy, with calls that fail."""
        for operation, calls_before, error in faults:
            # Reading a domain or its storage does not end in an agent's or a snapshot's error.
            kind = HypervisorError if operation in {"domain", "storage"} else error
            if error is MergeFailedError and operation != "delete_snapshot":
                kind = HypervisorError
            skipped = [lambda: None] * calls_before
            self.fake.before[operation] += [*skipped, raising(kind("a fault", operation=operation))]
        self.run_and_compare(policy)

    @rule(hours=st.integers(2, 6))
    def the_daemon_runs_undisturbed(self, hours: int) -> None:
        for _ in range(hours):
            self.now += timedelta(hours=1)
            for policy in POLICIES:
                self.run_and_compare(policy)

    def run_and_compare(self, policy: object) -> None:
        """Run one policy and compare what was there with what is left."""
        fleet = survey([p.name for p in POLICIES], {"*": tuple(POLICIES)}, self.fake.inventory(), now=self.now)
        before, run_id = self.snapshots, self.fake.domains[self.uuid].run_id
        (pair,) = (pair for pair in fleet.pairs if pair.policy is policy)
        outcome = self.executor.run(pair)
        self.fake.before.clear()
        known = {snapshot.name for snapshot in before}
        self.holds_writes |= {s.name: self.writes for s in self.snapshots if s.name not in known}
        if outcome.result == "unchanged":
            assert self.holds_writes[outcome.snapshot or ""] == self.writes, "what was written since is in no snapshot"
            assert outcome.snapshot in {snapshot.name for snapshot in self.snapshots}, "the one it stands for is gone"
        left = {snapshot.name for snapshot in self.snapshots}
        gone = [snapshot for snapshot in before if snapshot.name not in left]
        for snapshot in gone:
            assert snapshot.mark, "a foreign snapshot was deleted"
            assert snapshot.mark.policy == pair.policy.name, "a snapshot of another policy was deleted"
            if snapshot.mark.deleting:
                continue  # no way back any more, whatever else it is
            assert not snapshot.mark.held(self.now), "a held snapshot was deleted"
            assert snapshot.mark.scheduled_at <= self.now, "a quarantined snapshot was deleted"
        counted = [
            s.mark.scheduled_at
            for s in self.snapshots
            if s.mark and s.mark.policy == pair.policy.name and s.mark.scheduled_at <= self.now and not s.mark.deleting
        ]
        if run_id and any(s.mark and s.mark.deleting and s.mark.deleting.failed_in == run_id for s in before):
            assert not gone, "something was merged by a QEMU in which a merge had failed"
        gone = [snapshot for snapshot in gone if snapshot.mark and not snapshot.mark.deleting]
        if gone:
            newest_gone = max(s.mark.scheduled_at for s in gone if s.mark)
            assert counted, "the last snapshot was deleted"
            assert max(counted) > newest_gone, "the newest snapshot was deleted"

    @rule(minutes=st.sampled_from([1, 15, 60, 60, 120, 1440, 14400, -60, -2880]))
    def time_passes(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule()
    def a_person_takes_one(self) -> None:
        name = f"by-hand-{next(self.names)}"
        self.fake.make_foreign(self.uuid, name)
        self.holds_writes[name] = self.writes
        self.foreign.add(name)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data(), hold=st.booleans())
    def a_person_deletes_or_holds_one(self, data: st.DataObject, *, hold: bool) -> None:
        snapshot = data.draw(st.sampled_from(self.snapshots))
        if not hold:
            self.fake.delete_snapshot(self.uuid, snapshot.name)
            self.foreign.discard(snapshot.name)
        elif snapshot.mark:
            held = replace(snapshot, mark=replace(snapshot.mark, hold=Hold("audit")))
            domain = self.fake.domains[self.uuid]
            self.fake.add(replace(domain, snapshots=tuple(held if s is snapshot else s for s in domain.snapshots)))

    @rule(state=st.sampled_from(DomainState), agent=st.booleans())
    def the_guest_changes(self, state: DomainState, *, agent: bool) -> None:
        domain = self.fake.domains[self.uuid]
        run_id = None if state is DomainState.SHUT_OFF else domain.run_id or next(self.run_ids)
        self.fake.add(replace(domain, state=state, agent_connected=agent, run_id=run_id))
        if state is not DomainState.SHUT_OFF:
            # Not in the second in which a snapshot was taken: no guest starts that fast.
            self.now += timedelta(seconds=7)
            self.fake.write_to(self.uuid)
            self.writes += 1

    @rule()
    def somebody_freezes_the_guest(self) -> None:
        self.fake.frozen.add(self.uuid)

    @invariant()
    def no_slot_is_taken_twice_and_foreign_ones_are_all_there(self) -> None:
        slots = [(s.mark.policy, slot) for s in self.snapshots if s.mark for slot in set(s.mark.slots)]
        assert len(slots) == len(set(slots))
        assert self.foreign == {s.name for s in self.snapshots if s.mark is None}


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
