"""The fuse: with one retention for all time it never blows, whatever makes deletes wait."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from kvmsnapd.model import Capabilities, Domain, DomainState
from kvmsnapd.plan import plan_run
from kvmsnapd.prune import BlockReason
from tests.builders import a_chain, a_domain, a_foreign_snapshot, a_policy, a_snapshot, at

LIBVIRT_9 = Capabilities("qemu", "9.0.0", delete_external_in_chain_offline=False)
# Each releases one snapshot an hour at most.
POLICIES = [
    a_policy(keep=keep, max_deletes_per_run=1, max_chain_depth=140) for keep in ("last=1", "last=4", "within=5h")
]
FOREIGN = a_foreign_snapshot("branch")
hours = st.lists(st.tuples(st.sampled_from(["none", "off", "branch", "failed"]), st.booleans()), max_size=60)


@given(st.sampled_from(POLICIES), hours)
def test_debts_never_blow_it(policy: object, story: list[tuple[str, bool]]) -> None:
    assert isinstance(policy, type(POLICIES[0]))
    domain, now = a_domain(), at("2026-11-20T00:00")
    for trouble, libvirt_deletes in story:
        state = DomainState.SHUT_OFF if trouble == "off" else DomainState.RUNNING
        shown = replace(domain, state=state, snapshots=(*domain.snapshots, *([FOREIGN] * 2 * (trouble == "branch"))))
        found = plan_run(shown, policy, LIBVIRT_9, now=now)
        assert BlockReason.FUSE not in {wait.reason for wait in found.blocked}
        assert found.take is not None
        gone = {step.snapshot for step in found.deletes} if libvirt_deletes and trouble != "failed" else set()
        left = len(found.deletes) - len(gone)  # which the run adds to what was owed when it was planned
        mark = replace(found.take.mark, owed=found.take.mark.owed + left)
        domain = after(domain, replace(a_snapshot(now), mark=mark), gone)
        now += timedelta(hours=1)


def after(domain: Domain, taken: object, gone: set[str]) -> Domain:
    return replace(domain, snapshots=a_chain(*(s for s in (*domain.snapshots, taken) if s.name not in gone)))  # type: ignore[attr-defined, arg-type]
