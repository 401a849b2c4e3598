"""Copies and restores that stand on snapshots, and states that stand beside the chain: what may still be deleted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.links import drop_gone_links
from kvmsnapd.model import DomainState, Kind, Restoring
from kvmsnapd.plan import plan_run
from kvmsnapd.preflight import chain_depth, chain_depths
from kvmsnapd.prune import BlockReason, check_deleted, find_branch, find_obstacle
from kvmsnapd.pruner import merge_folders
from kvmsnapd.refusal import RefusalReason
from tests.builders import (
    ANY_LIBVIRT,
    NOW,
    OTHER_UUID,
    UUID,
    a_domain,
    a_foreign_snapshot,
    a_policy,
    a_snapshot,
    hourly_snapshots,
)
from tests.fakes import FakeHypervisor

if TYPE_CHECKING:
    from kvmsnapd.model import Domain, Snapshot

GONE = "00000000-0000-0000-0000-000000000001"


def marked(snapshot: Snapshot, **fields: Any) -> Snapshot:  # noqa: ANN401  # whatever the class takes
    assert snapshot.mark is not None
    return replace(snapshot, mark=replace(snapshot.mark, **fields))


def standalone(parent: str | None, **fields: Any) -> Snapshot:  # noqa: ANN401
    """Return the state that a restore kept."""
    return marked(a_snapshot("2026-11-22T11:30", parent=parent, **fields), standalone=True)


def obstacles(domain: Domain) -> list[BlockReason | None]:
    found = [find_obstacle(domain, s.name, ANY_LIBVIRT) for s in domain.snapshots]
    return [blocked.reason if blocked else None for blocked in found]


@pytest.mark.parametrize(("position", "blocked"), [(0, 1), (1, 2), (3, 4)])
def test_what_a_linked_copy_stands_on_is_not_deleted(position: int, blocked: int) -> None:
    snapshots = list(hourly_snapshots(4))
    snapshots[position] = marked(snapshots[position], linked=(OTHER_UUID,))
    assert obstacles(a_domain(*snapshots)) == [BlockReason.LINKED] * blocked + [None] * (4 - blocked)


def test_a_copy_of_an_internal_or_a_stand_alone_one_keeps_that_one_only() -> None:
    first, second = (replace(s, kind=Kind.INTERNAL) for s in hourly_snapshots(2))
    assert obstacles(a_domain(first, marked(second, linked=(OTHER_UUID,)))) == [None, BlockReason.LINKED]
    first, second = hourly_snapshots(2)
    kept = marked(standalone(second.name), linked=(OTHER_UUID,))
    assert obstacles(a_domain(first, second, kept)) == [None, None, BlockReason.LINKED]


def test_the_obstacle_names_the_copy_and_what_ends_it() -> None:
    (snapshot,) = hourly_snapshots(1)
    found = find_obstacle(a_domain(marked(snapshot, linked=(OTHER_UUID,))), snapshot.name, ANY_LIBVIRT)
    assert found is not None
    assert found.detail == (
        f"the linked copy {OTHER_UUID} stands on {snapshot.name}; it goes once that domain is undefined"
    )


@pytest.mark.parametrize("kind", [Kind.EXTERNAL, Kind.INTERNAL])
def test_nothing_is_deleted_or_taken_in_the_middle_of_a_restore(kind: Kind) -> None:
    first, second, third = (replace(s, kind=kind) for s in hourly_snapshots(3))
    domain = a_domain(first, marked(second, restoring=Restoring(NOW)), third)
    assert obstacles(domain) == [BlockReason.RESTORING] * 3
    found = plan_run(domain, a_policy(kind=kind, keep="last=1"), ANY_LIBVIRT, now=NOW)
    assert found.take is None
    assert found.refusal is not None
    assert found.refusal.reason is RefusalReason.RESTORING
    assert f"`kvmsnapd restore web1 {second.name}` finishes it" in found.refusal.detail
    assert found.deletes == ()


def test_a_kept_state_is_beside_the_chain() -> None:
    first, second = hourly_snapshots(2)
    aside = replace(standalone(first.name), overlays=(("vda", "/kept/state"),), covers=(("vda", "/kept/below"),))
    with_it, without = a_domain(first, second, aside), a_domain(first, second)
    assert find_branch(with_it) is None
    assert (chain_depth(with_it), chain_depths(with_it)) == (chain_depth(without), chain_depths(without))
    assert merge_folders(with_it) == merge_folders(without)


@pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.SHUT_OFF])
def test_a_kept_state_may_go_at_any_time_and_is_nobodys_child(state: DomainState) -> None:
    first, second = hourly_snapshots(2)
    libvirt_9 = replace(ANY_LIBVIRT, delete_external_in_chain_offline=False)
    domain = a_domain(first, second, standalone(second.name), state=state)
    assert find_obstacle(domain, domain.snapshots[2].name, libvirt_9) is None
    assert find_obstacle(domain, second.name, libvirt_9) is None  # still the newest of the chain


def test_a_kept_state_may_go_without_a_layer_less() -> None:
    (first,) = hourly_snapshots(1)
    domain = a_domain(first, standalone(first.name))
    after = replace(domain, snapshots=domain.snapshots[:1])
    assert check_deleted(domain, after, domain.snapshots[1].name) is None
    assert check_deleted(domain, domain, domain.snapshots[1].name) is not None


def test_an_internal_child_of_a_persons_still_keeps_an_external_one() -> None:
    (first,) = hourly_snapshots(1)
    domain = a_domain(first, a_foreign_snapshot(kind=Kind.INTERNAL, parent=first.name))
    assert obstacles(domain) == [BlockReason.FOREIGN_CHILD, None]


def test_links_to_domains_that_are_gone_are_dropped_and_others_stay() -> None:
    fake = FakeHypervisor()
    first, second = hourly_snapshots(2)
    fake.add(a_domain(name="copy", uuid=OTHER_UUID))
    domain = fake.add(a_domain(marked(first, linked=(GONE,)), marked(second, linked=(GONE, OTHER_UUID))))
    found = drop_gone_links(fake, domain)
    assert [s.mark.linked for s in found.snapshots if s.mark] == [(), (OTHER_UUID,)]
    assert fake.domains[UUID].snapshots == found.snapshots
    fake.calls.clear()
    assert drop_gone_links(fake, found) == found
    assert "describe_snapshot" not in {call[0] for call in fake.calls}
