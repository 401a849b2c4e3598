"""Plans: what one run would do, as plain data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmsnapd.model import Consistency, DomainState, Hold, Kind, Layer, Storage, Unchanged
from kvmsnapd.plan import Plan, due_for, judge, plan_run
from kvmsnapd.prune import BlockReason
from kvmsnapd.refusal import RefusalReason
from tests.builders import (
    ANY_LIBVIRT,
    NOW,
    UUID,
    a_chain,
    a_disk,
    a_domain,
    a_foreign_snapshot,
    a_policy,
    a_snapshot,
    an_inventory,
    at,
    hourly_snapshots,
    kept,
)

if TYPE_CHECKING:
    from kvmsnapd.model import Domain, Snapshot
    from kvmsnapd.policy import Policy

DUE = "kvmsnapd-standard-20261122T120000Z"


def plan(domain: Domain, policy: Policy | None = None, *, attempt: int = 1) -> Plan:
    return plan_run(domain, policy or a_policy(), ANY_LIBVIRT, now=NOW, attempt=attempt)


def test_a_due_slot_is_taken() -> None:
    found = plan(a_domain(*hourly_snapshots(2)))
    assert found.due.slot == at("2026-11-22T12:00")
    assert found.take is not None
    assert found.take.name == DUE
    assert found.refusal is None
    assert (found.domain_uuid, found.domain_name, found.policy) == (UUID, "web1", "standard")


def test_a_done_slot_is_not_taken_again() -> None:
    found = plan(a_domain(a_snapshot("2026-11-22T12:00")))
    assert (found.take, found.refusal, found.due.slot) == (None, None, None)
    assert found.due.run_at == at("2026-11-22T13:00")


def test_a_slot_done_by_a_second_attempt_is_done() -> None:
    assert plan(a_domain(a_snapshot("2026-11-22T12:00", attempt=2))).take is None


def test_a_foreign_snapshot_of_our_name_does_not_make_the_slot_done() -> None:
    found = plan(a_domain(a_foreign_snapshot(DUE)))
    assert found.take is not None
    assert found.take.name == f"{DUE}-2"


def test_a_slot_of_another_policy_does_not_count() -> None:
    assert plan(a_domain(a_snapshot("2026-11-22T12:00", policy="other"))).take is not None


def test_a_refused_domain_is_not_taken_and_says_why() -> None:
    found = plan(a_domain(state=DomainState.UNSETTLED, state_detail="crashed"))
    assert found.take is None
    assert found.refusal is not None
    assert found.refusal.reason is RefusalReason.STATE


def test_nothing_is_refused_while_nothing_is_due() -> None:
    domain = a_domain(a_snapshot("2026-11-22T12:00"), state=DomainState.UNSETTLED)
    assert plan(domain).refusal is None


def test_the_snapshot_about_to_be_taken_counts_for_retention() -> None:
    snapshots = hourly_snapshots(3)
    found = plan(a_domain(*snapshots), a_policy(keep="last=3"))
    assert [step.snapshot for step in found.deletes] == [snapshots[0].name]
    assert kept(found.verdicts) == [DUE, snapshots[2].name, snapshots[1].name]


def test_without_a_take_only_what_exists_is_judged() -> None:
    refused = plan(a_domain(*hourly_snapshots(3), managed_save=True), a_policy(keep="last=3"))
    assert refused.deletes == ()
    assert len(kept(refused.verdicts)) == 3


def test_a_held_snapshot_is_not_deleted() -> None:
    held = a_snapshot("2026-11-22T09:00", hold=Hold("before the upgrade"))
    found = plan(a_domain(held, *hourly_snapshots(2)), a_policy(keep="last=1"))
    assert held.name not in [step.snapshot for step in found.deletes]
    assert found.verdicts[-1].reasons == ("held: before the upgrade",)


def test_a_hold_that_has_ended_holds_nothing() -> None:
    held = a_snapshot("2026-11-22T09:00", hold=Hold("for a day", at("2026-11-22T12:00")))
    assert [step.snapshot for step in plan(a_domain(held), a_policy(keep="last=1")).deletes] == [held.name]


def test_a_held_snapshot_makes_its_slot_done() -> None:
    assert plan(a_domain(a_snapshot("2026-11-22T12:00", hold=Hold("why")))).take is None


def test_a_snapshot_from_the_future_neither_blocks_the_take_nor_is_deleted() -> None:
    future = a_snapshot("2031-01-01T00:00")
    found = plan(a_domain(future, *hourly_snapshots(3)), a_policy(keep="last=1"))
    assert found.take is not None
    assert future.name in kept(found.verdicts)


def test_foreign_snapshots_get_no_verdict() -> None:
    found = plan(a_domain(a_foreign_snapshot(), *hourly_snapshots(1)))
    assert {verdict.point.name for verdict in found.verdicts} == {DUE, hourly_snapshots(1)[0].name}


def test_neither_the_newest_nor_a_foreign_snapshot_is_ever_in_deletes() -> None:
    foreign, *snapshots = a_chain(a_foreign_snapshot("kvmsnapd-standard-20200101T000000Z"), *hourly_snapshots(8))
    for keep in ("last=1", "daily=1", "within=1s"):
        done = a_domain(foreign, *snapshots, a_snapshot("2026-11-22T12:00", parent=snapshots[-1].name))
        for domain in (done, a_domain(foreign, *snapshots)):
            found = plan(domain, a_policy(keep=keep))
            names = [step.snapshot for step in found.deletes]
            assert names
            assert not {foreign.name, DUE} & set(names)


def test_retention_goes_by_the_slot_and_not_by_when_it_was_taken() -> None:
    late = a_snapshot("2026-11-20T23:00", taken_at=at("2026-11-21T02:00"))
    verdicts = judge(an_inventory(late, a_snapshot("2026-11-21T01:00")), a_policy(keep="daily=2"), now=NOW)
    assert [verdict.reasons for verdict in verdicts] == [("daily #1",), ("daily #2",)]


def test_a_later_attempt_is_passed_on() -> None:
    found = plan(a_domain(), attempt=3)
    assert found.take is not None
    assert (found.take.name, found.take.mark.attempt) == (f"{DUE}-3", 3)


def test_splay_is_the_domains_own() -> None:
    policy = a_policy(splay="5m")
    delay = policy.splay_of(UUID)
    inventory = an_inventory(a_snapshot("2026-11-22T11:00"))
    assert due_for(inventory, policy, at("2026-11-22T12:00") + delay).slot == at("2026-11-22T12:00")
    assert due_for(inventory, policy, at("2026-11-22T11:59:59") + delay).slot is None


# Shut-off domains that nothing has changed in


def shut_off(*snapshots: Snapshot, written_at: str | None = None, **fields: Any) -> tuple[Domain, Storage]:  # noqa: ANN401
    """Return a shut-off domain with the newest of these on top, and its files: untouched, or written to later."""
    older, newest = snapshots[:-1], snapshots[-1]
    newest = replace(newest, offline=True, overlays=(("vda", "/images/top"),))
    changed_at = at(written_at) if written_at else newest.created_at
    domain = a_domain(
        *a_chain(*older, newest), state=DomainState.SHUT_OFF, disks=(a_disk(path="/images/top"),), **fields
    )
    return domain, Storage(layers={"/images/top": Layer("/images/top", changed_at, "/images/base")})


def plan_off(domain: Domain, storage: Storage | None, policy: Policy | None = None) -> Plan:
    return plan_run(domain, policy or a_policy(), ANY_LIBVIRT, now=NOW, storage=storage)


def test_a_domain_that_is_still_as_its_newest_snapshot_is_confirmed_and_not_taken() -> None:
    newest = a_snapshot("2026-11-22T11:00")
    found = plan_off(*shut_off(newest))
    assert (found.take, found.refusal, found.due.slot) == (None, None, at("2026-11-22T12:00"))
    assert found.unchanged is not None
    assert found.unchanged.snapshot == newest.name
    assert newest.mark is not None
    assert found.unchanged.mark == replace(newest.mark, unchanged=Unchanged(at("2026-11-22T12:00"), NOW))


def test_a_domain_that_has_changed_or_of_which_nothing_is_known_is_taken() -> None:
    domain, storage = shut_off(a_snapshot("2026-11-22T11:00"), written_at="2026-11-22T11:59")
    for known in (storage, Storage(), None):
        found = plan_off(domain, known)
        assert (found.unchanged, found.take is None) == (None, False)


def test_nothing_is_confirmed_while_nothing_is_due() -> None:
    found = plan_off(*shut_off(a_snapshot("2026-11-22T12:00")))
    assert (found.unchanged, found.take) == (None, None)


def test_a_confirmed_slot_is_done_and_the_next_one_is_due() -> None:
    policy = a_policy()
    confirmed = an_inventory(a_snapshot("2026-11-20T11:00", unchanged="2026-11-22T12:00"))
    assert due_for(confirmed, policy, NOW).slot is None
    assert due_for(confirmed, policy, at("2026-11-22T13:00")).slot == at("2026-11-22T13:00")


def test_a_slot_confirmed_in_the_future_makes_nothing_done() -> None:
    confirmed = an_inventory(a_snapshot("2026-11-20T11:00", unchanged="2031-01-01T00:00"))
    assert due_for(confirmed, a_policy(), NOW).slot == at("2026-11-22T12:00")


def test_a_hold_and_what_is_left_out_stay_in_a_confirmed_mark() -> None:
    newest = a_snapshot("2026-11-22T11:00", hold=Hold("audit"))
    assert newest.mark is not None
    newest = replace(newest, mark=replace(newest.mark, excluded=("vdb",)))
    found = plan_off(*shut_off(newest))
    assert found.unchanged is not None
    assert (found.unchanged.mark.hold, found.unchanged.mark.excluded) == (Hold("audit"), ("vdb",))


def test_a_confirmed_run_prunes_what_is_released_and_counts_no_snapshot_that_is_not_taken() -> None:
    snapshots = hourly_snapshots(5)
    found = plan_off(*shut_off(*snapshots))
    assert found.unchanged is not None
    assert [step.snapshot for step in found.deletes] == [s.name for s in snapshots[:2]]
    assert kept(found.verdicts) == [s.name for s in reversed(snapshots[2:])]


def test_a_domain_that_is_held_unchanged_is_not_refused_for_what_a_take_would_need() -> None:
    domain, storage = shut_off(a_snapshot("2026-11-22T11:00"))
    starved = replace(storage, free_bytes={"/images": 0})
    found = plan_off(domain, starved, a_policy(min_free_bytes=2**30, keep="last=99"))
    assert (found.unchanged is None, found.refusal) == (False, None)


def test_after_slots_that_needed_no_snapshot_there_was_no_pause() -> None:
    *older, newest = hourly_snapshots(5, last="2026-11-20T11:00")
    assert newest.mark is not None
    seen = Unchanged(at("2026-11-22T11:00"), at("2026-11-22T11:00"))
    paused = plan(a_domain(*older, newest))
    served = plan(a_domain(*older, replace(newest, mark=replace(newest.mark, unchanged=seen))))
    assert {wait.reason for wait in paused.blocked} == {BlockReason.LONG_PAUSE}
    assert (served.blocked, len(served.deletes)) == ((), 3)


def test_after_a_long_pause_a_confirmed_slot_of_before_is_told() -> None:
    older, newest = hourly_snapshots(2, last="2026-11-18T11:00")
    assert newest.mark is not None
    seen = Unchanged(at("2026-11-20T11:00"), at("2026-11-20T11:00"))
    found = plan(a_domain(older, replace(newest, mark=replace(newest.mark, unchanged=seen))), a_policy(keep="last=1"))
    assert "the snapshot before is of 2026-11-20T11:00" in found.blocked[0].detail


def test_a_snapshot_dated_in_the_future_is_not_confirmed() -> None:
    found = plan_off(*shut_off(a_snapshot("2031-01-01T00:00")))
    assert (found.unchanged, found.take is None) == (None, False)


def test_policies_that_share_a_chain_share_its_budget() -> None:
    policy = a_policy(keep="last=10")
    both = plan_run(a_domain(), policy, ANY_LIBVIRT, now=NOW, policies=(policy, a_policy("b", keep="last=6")))
    assert both.refusal is not None
    assert both.refusal.reason is RefusalReason.CHAIN_BUDGET
    assert plan_run(a_domain(), policy, ANY_LIBVIRT, now=NOW).refusal is None


def test_a_missed_slot_is_given_up_where_the_policy_says_so() -> None:
    found = plan(a_domain(), a_policy(catch_up=False))
    assert (found.take, found.due.missed) == (None, at("2026-11-22T12:00"))


def test_planning_changes_nothing_so_twice_gives_the_same() -> None:
    domain = a_domain(*hourly_snapshots(4))
    assert plan(domain) == plan(domain)


def test_an_internal_policy_plans_an_internal_snapshot() -> None:
    found = plan(a_domain(), a_policy(kind=Kind.INTERNAL))
    assert found.take is not None
    assert (found.take.mark.kind, found.take.mark.consistency) == (Kind.INTERNAL, Consistency.MEMORY)


def test_the_plan_carried_out_leaves_nothing_to_do() -> None:
    domain = a_domain(*hourly_snapshots(3))
    first = plan(domain)
    assert first.take is not None
    taken = replace(a_snapshot(), mark=first.take.mark, name=first.take.name, parent=domain.snapshots[-1].name)
    gone = {step.snapshot for step in first.deletes}
    after = replace(domain, snapshots=tuple(s for s in (*domain.snapshots, taken) if s.name not in gone))
    second = plan(after)
    assert (second.take, second.deletes) == (None, ())
