"""Pruning: what is deleted in which order, and what has to wait for which reason."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.model import Capabilities, DomainState, Kind
from kvmsnapd.plan import judge
from kvmsnapd.prune import Blocked, BlockReason, Delete, check_deleted, find_branch, find_obstacle, plan_deletes
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
    from kvmsnapd.model import Disk, Domain, Snapshot
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
                "4 deletes at once are more than max_deletes_per_run: 3; look at `kvmsnapd plan web1`, and if "
                "this is meant, `kvmsnapd prune web1` does it"
            ),
        )
    }


def test_what_is_blocked_anyway_does_not_blow_the_fuse() -> None:
    first, *others = hourly_snapshots(5)
    first, foreign, *others = a_chain(first, a_foreign_snapshot(), *others)
    # The first has a foreign child; two of the others are deleted.
    domain = a_domain(first, foreign, *others)
    assert deleted(domain, a_policy(keep="last=2", max_deletes_per_run=2)) == [s.name for s in others[:2]]


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


@pytest.mark.parametrize("place", [0, 1, 2, None], ids=["above it", "on it", "below it", "at the root"])
def test_nothing_is_deleted_wherever_the_tree_branches(place: int | None) -> None:
    chain = hourly_snapshots(4)
    released = a_policy(keep="last=1")
    below = chain[place].name if place is not None else None
    domain = a_domain(*chain, a_foreign_snapshot(parent=below))
    where = f"above {below!r}" if below else "at the root"
    detail = f"the snapshot tree branches {where}; delete one branch by hand (virsh snapshot-list --tree)"
    deletes, blocked = split(domain, released)
    assert deletes == ()
    assert blocked == tuple(Blocked(snapshot.name, BlockReason.BRANCH, detail) for snapshot in chain[:3])


def test_a_branch_of_our_own_snapshots_is_left_to_a_person_as_well() -> None:
    first, second, third = hourly_snapshots(3)
    branch = a_snapshot("2026-11-22T12:00", parent=first.name)
    assert set(waiting(a_domain(first, second, third, branch), a_policy(keep="last=2")).values()) == {
        BlockReason.BRANCH
    }


def test_branches_of_internal_snapshots_are_harmless() -> None:
    first, second, third = hourly_snapshots(3, kind=Kind.INTERNAL)
    branches = [a_foreign_snapshot(name, kind=Kind.INTERNAL, parent=p) for name, p in (("a", first.name), ("b", None))]
    domain = a_domain(first, second, third, *branches)
    assert find_branch(domain) is None
    assert deleted(domain, a_policy(keep="last=1", kind=Kind.INTERNAL)) == [first.name, second.name]


def test_one_line_is_no_branch_whatever_it_is_made_of() -> None:
    chain = a_chain(a_foreign_snapshot(), *hourly_snapshots(2), a_snapshot("2026-11-22T12:00", policy="other"))
    assert find_branch(a_domain(*reversed(chain))) is None
    assert find_branch(a_domain()) is None


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
        "libvirt 9.0.0 cannot delete it while the domain is shut off, since a snapshot was taken above it while it "
        "was; it goes when the domain runs"
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
    first, *others = hourly_snapshots(4)
    first, foreign, *others = a_chain(first, a_foreign_snapshot(), *others)
    domain = a_domain(first, foreign, *others)
    policy = a_policy(keep="last=2")
    assert deleted(domain, policy) == [others[0].name]
    assert waiting(domain, policy) == {first.name: BlockReason.FOREIGN_CHILD}


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


# The layers that an old libvirt looks at


def overlaid(*targets: str, number: int = 3) -> tuple[Snapshot, ...]:
    """Return a line of snapshots, oldest first, each with an overlay on these disks: /images/vda.1 and so on."""
    return tuple(
        replace(
            snapshot,
            overlays=tuple((target, f"/images/{target}.{count}") for target in targets),
            covers=tuple((target, f"/images/{target}.{count - 1}") for target in targets),
        )
        for count, snapshot in enumerate(hourly_snapshots(number), start=1)
    )


def layered(*targets: str, number: int = 3, listed: int = 3) -> tuple[Disk, ...]:
    """Return the disks that these snapshots leave; their XML lists so many layers below the active one."""
    return tuple(
        a_disk(
            target,
            path=f"/images/{target}.{number}",
            backing=tuple(f"/images/{target}.{count}" for count in range(number - 1, number - 1 - listed, -1)),
        )
        for target in targets
    )


def test_libvirt_9_deletes_of_a_shut_off_domain_what_its_xml_lists() -> None:
    chain = overlaid("vda")
    for listed, waits in ((0, [0, 1]), (1, [0]), (2, []), (3, [])):
        domain = a_domain(*chain, disks=layered("vda", listed=listed), state=DomainState.SHUT_OFF)
        found = [find_obstacle(domain, snapshot.name, LIBVIRT_9, take_first=True) for snapshot in chain]
        assert [number for number, obstacle in enumerate(found) if obstacle] == waits
        assert {obstacle.reason for obstacle in found if obstacle} <= {BlockReason.NEEDS_RUNNING}


def test_libvirt_9_has_to_find_the_layers_of_all_disks() -> None:
    first, *_ = chain = overlaid("vda", "vdb")
    disks = (*layered("vda"), *layered("vdb", listed=0))
    found = find_obstacle(a_domain(*chain, disks=disks, state=DomainState.SHUT_OFF), first.name, LIBVIRT_9)
    assert found is not None
    assert found.reason is BlockReason.NEEDS_RUNNING


def test_of_a_shut_off_domain_what_lies_right_below_the_newest_waits_for_another_one() -> None:
    first, second, third = chain = overlaid("vda")
    for state, take_first, waits in (
        (DomainState.SHUT_OFF, False, [second.name]),
        (DomainState.SHUT_OFF, True, []),
        (DomainState.RUNNING, False, []),
    ):
        domain = a_domain(*chain, disks=layered("vda"), state=state)
        found = [find_obstacle(domain, s.name, ANY_LIBVIRT, take_first=take_first) for s in (first, second, third)]
        assert [(o.snapshot, o.reason) for o in found if o] == [(name, BlockReason.NEEDS_RUNNING) for name in waits]


def test_newer_libvirts_need_nothing_listed() -> None:
    first, *_ = chain = overlaid("vda")
    domain = a_domain(*chain, disks=layered("vda", listed=0), state=DomainState.SHUT_OFF)
    assert find_obstacle(domain, first.name, ANY_LIBVIRT) is None


# What a delete has left


def after_deleting(position: int, *, number: int = 3) -> tuple[Domain, Domain, str]:
    """Return a running domain, the same after a proper delete of one of its snapshots, and that one's name."""
    chain = overlaid("vda", "vdb", number=number)
    before = a_domain(*chain, disks=layered("vda", "vdb", number=number, listed=number))
    gone = chain[position]
    left = [replace(s, parent=gone.parent) if s.parent == gone.name else s for s in chain if s is not gone]
    merged = dict(gone.overlays)
    disks = []
    for disk in before.disks:
        path, *backing = [layer for layer in (disk.path, *disk.backing) if layer and layer != merged[disk.target]]
        disks.append(replace(disk, path=path, backing=tuple(backing)))
    return before, replace(before, snapshots=tuple(left), disks=tuple(disks)), gone.name


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_proper_delete_is_nothing_to_complain_of(position: int) -> None:
    assert check_deleted(*after_deleting(position)) is None


def test_the_delete_of_the_only_snapshot_is_nothing_to_complain_of() -> None:
    assert check_deleted(*after_deleting(0, number=1)) is None


def test_the_delete_of_what_was_gone_is_nothing_to_complain_of() -> None:
    domain = a_domain(*overlaid("vda"))
    assert check_deleted(domain, domain, "kvmsnapd-standard-20200101T000000Z") is None


def test_a_snapshot_that_is_still_listed_is_told() -> None:
    before, after, name = after_deleting(1)
    assert check_deleted(before, replace(after, snapshots=before.snapshots), name) == (
        "libvirt reported success but still lists the snapshot"
    )


@pytest.mark.parametrize("position", [0, 1, 2])
def test_another_snapshot_that_is_gone_too_is_told(position: int) -> None:
    before, after, name = after_deleting(position)
    for lost in after.snapshots:
        left = tuple(snapshot for snapshot in after.snapshots if snapshot is not lost)
        assert check_deleted(before, replace(after, snapshots=left), name) == (
            f"snapshot {lost.name!r} is gone as well"
        )


@pytest.mark.parametrize("parent", [None, "elsewhere"])
def test_a_snapshot_with_another_parent_than_it_has_to_have_is_told(parent: str | None) -> None:
    before, after, name = after_deleting(1)
    first, last = after.snapshots
    moved = replace(after, snapshots=(first, replace(last, parent=parent)))
    assert check_deleted(before, moved, name) == f"snapshot {last.name!r} has another parent than before"


def test_a_snapshot_that_a_person_took_meanwhile_is_nothing_to_complain_of() -> None:
    before, after, name = after_deleting(1)
    disks = tuple(replace(d, path=f"/images/{d.target}.new", backing=(str(d.path), *d.backing)) for d in after.disks)
    new = a_foreign_snapshot(parent=after.snapshots[-1].name)
    assert check_deleted(before, replace(after, snapshots=(*after.snapshots, new), disks=disks), name) is None


def test_a_disk_that_is_gone_is_told() -> None:
    before, after, name = after_deleting(1)
    assert check_deleted(before, replace(after, disks=after.disks[:1]), name) == "disk vdb is gone"


def test_a_chain_that_lost_a_layer_more_is_told_with_what_is_left() -> None:
    before, after, name = after_deleting(2)
    shorter = replace(after.disks[1], backing=after.disks[1].backing[:-1])
    assert check_deleted(before, replace(after, disks=(after.disks[0], shorter)), name) == (
        "disk vdb now has the layers /images/vdb.2, /images/vdb.1"
    )


def test_an_overlay_that_is_still_in_its_chain_is_told() -> None:
    before, after, name = after_deleting(1)
    assert check_deleted(before, replace(after, disks=before.disks), name) == (
        "disk vda now has the layers /images/vda.3, /images/vda.2, /images/vda.1, /images/vda.0"
    )


def test_another_active_layer_is_told() -> None:
    before, after, name = after_deleting(0)
    other = replace(after.disks[0], path="/images/other")
    problem = check_deleted(before, replace(after, disks=(other, after.disks[1])), name)
    assert problem == "disk vda now has the layers /images/other, /images/vda.2, /images/vda.0"


@pytest.mark.parametrize("which", ["before", "after"])
def test_a_chain_that_libvirt_does_not_tell_is_not_judged(which: str) -> None:
    before, after, name = after_deleting(1)
    untold = tuple(replace(disk, backing=()) for disk in before.disks)
    if which == "before":
        before = replace(before, disks=untold)
    else:
        after = replace(after, disks=untold)
    assert check_deleted(before, after, name) is None


def test_of_an_internal_snapshot_the_tree_alone_is_looked_at() -> None:
    first, second = hourly_snapshots(2, kind=Kind.INTERNAL)
    before = a_domain(first, second)
    assert check_deleted(before, a_domain(replace(second, parent=None), disks=()), first.name) is None
    assert check_deleted(before, a_domain(), first.name) == f"snapshot {second.name!r} is gone as well"
