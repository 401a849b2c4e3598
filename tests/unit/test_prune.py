"""Pruning: what is deleted in which order, and what has to wait for which reason."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.model import Capabilities, DomainState, Kind
from kvmsnapd.plan import judge
from kvmsnapd.prune import Blocked, BlockReason, Delete, find_obstacle, plan_deletes
from tests.builders import (
    ANY_LIBVIRT,
    NOW,
    a_chain,
    a_disk,
    a_domain,
    a_foreign_snapshot,
    a_policy,
    a_snapshot,
    hourly_snapshots,
)

if TYPE_CHECKING:
    from kvmsnapd.model import Domain
    from kvmsnapd.policy import Policy

LIBVIRT_9 = Capabilities("qemu", "9.0.0", delete_external_in_chain_offline=False)
NO_DELETE = Capabilities("qemu", "8.0.0", delete_external=False)


def split(
    domain: Domain, policy: Policy, capabilities: Capabilities = ANY_LIBVIRT
) -> tuple[tuple[Delete, ...], tuple[Blocked, ...]]:
    return plan_deletes(domain, policy, capabilities, judge(domain, policy, now=NOW))


def deleted(domain: Domain, policy: Policy, capabilities: Capabilities = ANY_LIBVIRT) -> list[str]:
    return [step.snapshot for step in split(domain, policy, capabilities)[0]]


def waiting(domain: Domain, policy: Policy, capabilities: Capabilities = ANY_LIBVIRT) -> dict[str, BlockReason]:
    return {wait.snapshot: wait.reason for wait in split(domain, policy, capabilities)[1]}


def test_released_snapshots_are_deleted_oldest_first_with_their_reasons() -> None:
    snapshots = hourly_snapshots(4)
    deletes, blocked = split(a_domain(*reversed(snapshots)), a_policy(keep="last=2"))
    assert deletes == (
        Delete(snapshots[0].name, ("last=2 used up",)),
        Delete(snapshots[1].name, ("last=2 used up",)),
    )
    assert blocked == ()


def test_nothing_is_deleted_while_the_rules_claim_everything() -> None:
    assert split(a_domain(*hourly_snapshots(3)), a_policy(keep="last=3")) == ((), ())


def test_a_snapshot_of_another_policy_is_not_deleted() -> None:
    other = hourly_snapshots(5, policy="other")
    assert deleted(a_domain(*other, a_snapshot("2026-11-22T11:30")), a_policy(keep="last=1")) == []


@pytest.mark.parametrize("kind", [Kind.EXTERNAL, Kind.INTERNAL])
def test_a_foreign_snapshot_is_never_deleted(kind: Kind) -> None:
    foreign = [a_foreign_snapshot(f"by-hand-{n}", kind=kind) for n in range(5)]
    # One that has our form of name, but not our description.
    foreign.append(a_foreign_snapshot("kvmsnapd-standard-20260101T000000Z", kind=kind))
    domain = a_domain(*foreign, *hourly_snapshots(5, kind=kind))
    deletes, blocked = split(domain, a_policy(keep="last=1", kind=kind))
    named = {step.snapshot for step in deletes} | {wait.snapshot for wait in blocked}
    assert named.isdisjoint(snapshot.name for snapshot in foreign)


@pytest.mark.parametrize("keep", ["last=1", "hourly=1", "yearly=1", "within=1s"])
def test_the_newest_snapshot_is_never_deleted(keep: str) -> None:
    snapshots = hourly_snapshots(6)
    domain = a_domain(*snapshots)
    assert snapshots[-1].name not in deleted(domain, a_policy(keep=keep))


def test_of_two_snapshots_of_one_slot_the_later_attempt_is_the_newest() -> None:
    first, second = a_chain(a_snapshot(), a_snapshot(attempt=2))
    assert deleted(a_domain(first, second), a_policy(keep="last=1")) == [first.name]


# The fuse


def test_as_many_deletes_as_the_fuse_allows_are_carried_out() -> None:
    assert len(deleted(a_domain(*hourly_snapshots(6)), a_policy(keep="last=3", max_deletes_per_run=3))) == 3


def test_one_delete_more_than_the_fuse_allows_deletes_nothing() -> None:
    snapshots = hourly_snapshots(7)
    deletes, blocked = split(a_domain(*snapshots), a_policy(keep="last=3", max_deletes_per_run=3))
    assert deletes == ()
    assert [wait.snapshot for wait in blocked] == [snapshot.name for snapshot in snapshots[:4]]
    assert {(wait.reason, wait.detail) for wait in blocked} == {
        (
            BlockReason.FUSE,
            (
                "4 deletes at once are more than max_deletes_per_run: 3; look at `kvmsnapd plan web1` and raise "
                "the limit if this is meant"
            ),
        )
    }


def test_what_is_blocked_anyway_does_not_blow_the_fuse() -> None:
    snapshots = hourly_snapshots(5)
    child = a_foreign_snapshot(parent=snapshots[0].name)
    domain = a_domain(*snapshots, child)
    # The first has two children, one of them foreign; the other two are deleted.
    assert deleted(domain, a_policy(keep="last=2", max_deletes_per_run=2)) == [s.name for s in snapshots[1:3]]


# What has to wait


def test_a_snapshot_with_a_foreign_child_waits() -> None:
    ours, foreign, newest = a_chain(
        a_snapshot("2026-11-22T10:00"), a_foreign_snapshot(), a_snapshot("2026-11-22T11:00")
    )
    deletes, blocked = split(a_domain(ours, foreign, newest), a_policy(keep="last=1"))
    assert deletes == ()
    assert blocked == (
        Blocked(
            ours.name,
            BlockReason.FOREIGN_CHILD,
            "deleting it would merge into 'before-upgrade', a snapshot that kvmsnapd did not make",
        ),
    )


def test_a_foreign_parent_is_no_obstacle() -> None:
    _, ours, newest = chain = a_chain(
        a_foreign_snapshot(), a_snapshot("2026-11-22T10:00"), a_snapshot("2026-11-22T11:00")
    )
    assert newest.parent == ours.name
    assert deleted(a_domain(*chain), a_policy(keep="last=1")) == [ours.name]


def test_a_snapshot_of_another_policy_as_child_is_no_obstacle() -> None:
    chain = a_chain(a_snapshot("2026-11-22T10:00"), a_snapshot(policy="other"), a_snapshot("2026-11-22T11:00"))
    assert deleted(a_domain(*chain), a_policy(keep="last=1")) == [chain[0].name]


def test_a_snapshot_where_branches_begin_waits() -> None:
    first, second, third = hourly_snapshots(3)
    branch = a_snapshot("2026-11-22T12:00", parent=first.name)
    blocked = split(a_domain(first, second, third, branch), a_policy(keep="last=3"))[1]
    assert blocked == (Blocked(first.name, BlockReason.BRANCH, "2 branches of the snapshot tree begin here"),)


def test_libvirt_9_deletes_from_within_a_chain_only_while_the_domain_runs() -> None:
    snapshots = hourly_snapshots(3)
    policy = a_policy(keep="last=2")
    off = a_domain(*snapshots, state=DomainState.SHUT_OFF)
    assert waiting(off, policy, LIBVIRT_9) == {snapshots[0].name: BlockReason.NEEDS_RUNNING}
    assert deleted(off, policy) == [snapshots[0].name]
    assert deleted(a_domain(*snapshots), policy, LIBVIRT_9) == [snapshots[0].name]


def test_needs_running_says_which_libvirt_and_when_it_goes() -> None:
    domain = a_domain(*hourly_snapshots(3), state=DomainState.SHUT_OFF)
    assert split(domain, a_policy(keep="last=2"), LIBVIRT_9)[1][0].detail == (
        "libvirt 9.0.0 deletes only the newest external snapshot of a shut-off domain; the others go when it runs"
    )


def test_the_last_of_a_chain_needs_no_running_domain() -> None:
    first, second = hourly_snapshots(2)
    domain = a_domain(first, second, state=DomainState.SHUT_OFF)
    assert find_obstacle(domain, second.name, LIBVIRT_9) is None


def test_a_libvirt_that_cannot_delete_external_snapshots_lets_them_wait() -> None:
    first, second = hourly_snapshots(2)
    blocked = split(a_domain(first, second), a_policy(keep="last=1"), NO_DELETE)[1]
    assert blocked == (Blocked(first.name, BlockReason.UNSUPPORTED, "libvirt 8.0.0 cannot delete external snapshots"),)


def test_a_mixed_snapshot_waits_on_every_libvirt() -> None:
    first, second = a_chain(a_snapshot("2026-11-22T10:00", kind=Kind.MIXED), a_snapshot("2026-11-22T11:00"))
    assert waiting(a_domain(first, second), a_policy(keep="last=1")) == {first.name: BlockReason.UNSUPPORTED}


@pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.SHUT_OFF])
def test_an_internal_snapshot_waits_for_nothing(state: DomainState) -> None:
    first, second = hourly_snapshots(2, kind=Kind.INTERNAL)
    child = a_foreign_snapshot(kind=Kind.INTERNAL, parent=first.name)
    domain = a_domain(first, second, child, state=state)
    assert deleted(domain, a_policy(keep="last=1", kind=Kind.INTERNAL), LIBVIRT_9) == [first.name]


def test_a_snapshot_that_is_gone_meets_no_obstacle() -> None:
    assert find_obstacle(a_domain(), "kvmsnapd-standard-20261122T120000Z", ANY_LIBVIRT) is None


def test_blocked_snapshots_do_not_hold_up_the_others() -> None:
    snapshots = hourly_snapshots(4)
    foreign = a_foreign_snapshot(parent=snapshots[0].name)
    domain = a_domain(*snapshots, foreign)
    policy = a_policy(keep="last=2")
    assert deleted(domain, policy) == [snapshots[1].name]
    assert waiting(domain, policy) == {snapshots[0].name: BlockReason.BRANCH}


def test_an_overlay_that_carries_an_unknown_layer_is_not_merged() -> None:
    ours = replace(a_snapshot(), overlays=(("vda", "/images/ours"),))
    disk = a_disk("vda", path="/images/backup", backing=("/images/ours", "/images/base"))
    found = find_obstacle(a_domain(ours, disks=(disk,)), ours.name, ANY_LIBVIRT)
    assert found is not None
    assert (found.reason, "/images/backup" in found.detail) == (BlockReason.FOREIGN_LAYER, True)


def test_an_overlay_below_a_known_one_may_be_merged() -> None:
    older, newer = a_chain(a_snapshot("2026-11-22T11:00"), a_snapshot("2026-11-22T12:00"))
    older = replace(older, overlays=(("vda", "/images/older"),))
    newer = replace(newer, overlays=(("vda", "/images/newer"),))
    disk = a_disk("vda", path="/images/newer", backing=("/images/older", "/images/base"))
    assert find_obstacle(a_domain(older, newer, disks=(disk,)), older.name, ANY_LIBVIRT) is None
