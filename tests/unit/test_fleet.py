"""The fleet: all pairs at one instant, from libvirt's list and the configuration."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.fleet import Fleet, survey
from kvmsnapd.matching import Coverage
from kvmsnapd.model import Unchanged
from tests.builders import (
    NOW,
    OTHER_UUID,
    UUID,
    a_foreign_snapshot,
    a_policy,
    a_snapshot,
    an_inventory,
    at,
    hourly_snapshots,
)

if TYPE_CHECKING:
    from kvmsnapd.model import Inventory, Snapshot
    from kvmsnapd.policy import Policy

STANDARD = a_policy()


def look(selectors: dict[str, tuple[Policy, ...]], *domains: Inventory) -> Fleet:
    return survey(["standard", "daily"], selectors, domains, now=NOW)


def test_every_domain_and_policy_is_a_pair() -> None:
    fleet = look(
        {"*": (STANDARD, a_policy("daily", schedule="daily"))},
        an_inventory(name="a"),
        an_inventory(name="b", uuid=OTHER_UUID),
    )
    assert [(pair.name.domain, pair.name.policy) for pair in fleet.pairs] == [
        ("a", "standard"),
        ("a", "daily"),
        ("b", "standard"),
        ("b", "daily"),
    ]
    assert fleet.at == NOW


def test_a_pair_is_known_by_uuid_and_policy_so_that_a_renamed_domain_keeps_it() -> None:
    one, other = (look({"*": (STANDARD,)}, an_inventory(name=name)).pairs[0] for name in ("old", "new"))
    assert one.name.key == other.name.key == f"{UUID}/standard"


def test_snapshots_of_a_pair_are_its_own_newest_slot_first() -> None:
    first, second, third = hourly_snapshots(3)
    domain = an_inventory(second, a_foreign_snapshot(), third, a_snapshot(policy="daily"), first)
    assert look({"*": (STANDARD,)}, domain).pairs[0].snapshots == (third, second, first)


def test_of_one_slot_the_later_attempt_comes_first() -> None:
    domain = an_inventory(a_snapshot(), a_snapshot(attempt=2))
    assert [s.mark.attempt for s in look({"*": (STANDARD,)}, domain).pairs[0].snapshots if s.mark] == [2, 1]


def test_the_last_success_is_when_the_snapshot_was_really_taken() -> None:
    caught_up = a_snapshot("2026-11-22T12:00", taken_at=at("2026-11-22T12:20"))
    (pair,) = look({"*": (STANDARD,)}, an_inventory(*hourly_snapshots(2), caught_up)).pairs
    assert pair.last_success_at == at("2026-11-22T12:20")
    assert pair.age(NOW) == timedelta(minutes=10)


def test_before_the_first_snapshot_there_is_no_success_and_no_age() -> None:
    (pair,) = look({"*": (STANDARD,)}, an_inventory(a_foreign_snapshot())).pairs
    assert (pair.last_success_at, pair.age(NOW)) == (None, None)
    assert pair.due.slot == at("2026-11-22T12:00")


def test_a_snapshot_dated_in_the_future_does_not_hide_that_the_last_real_one_is_old() -> None:
    future = a_snapshot("2031-01-01T00:00")
    (pair,) = look({"*": (STANDARD,)}, an_inventory(a_snapshot("2026-11-12T12:00"), future)).pairs
    age = pair.age(NOW)
    assert age is not None
    assert age > timedelta(days=9)


def test_a_snapshot_that_was_seen_unchanged_is_as_young_as_that() -> None:
    seen = a_snapshot("2026-11-20T12:00", unchanged="2026-11-22T12:00")
    (pair,) = look({"*": (STANDARD,)}, an_inventory(*hourly_snapshots(2, last="2026-11-20T11:00"), seen)).pairs
    assert (pair.newest, pair.last_success_at) == (seen, at("2026-11-22T12:00"))
    assert pair.age(NOW) == timedelta(minutes=30)
    assert (pair.due.slot, pair.due.run_at) == (None, at("2026-11-22T13:00"))


def test_a_snapshot_that_was_seen_unchanged_in_the_future_is_as_old_as_it_is() -> None:
    seen = a_snapshot("2026-11-20T12:00", unchanged="2031-01-01T00:00")
    (pair,) = look({"*": (STANDARD,)}, an_inventory(seen)).pairs
    assert pair.last_success_at == at("2026-11-20T12:00:03")
    assert pair.due.slot == at("2026-11-22T12:00")


def test_a_pair_knows_all_policies_of_its_domain() -> None:
    both = (STANDARD, a_policy("daily", schedule="daily"))
    fleet = look({"web1": both, "*": (STANDARD,)}, an_inventory(), an_inventory(name="b", uuid=OTHER_UUID))
    assert [pair.policies for pair in fleet.pairs] == [both, both, (STANDARD,)]


def test_a_domain_without_policies_has_no_pair() -> None:
    fleet = look({"scratch-*": ()}, an_inventory(name="scratch-1"), an_inventory(name="other", uuid=OTHER_UUID))
    assert fleet.pairs == ()


def test_unprotected_are_the_domains_nobody_thought_of() -> None:
    selectors = {"scratch-*": (), "db*": (STANDARD,), "*01": (a_policy("daily"),)}
    names = ["scratch-1", "db02", "db01", "lost"]
    fleet = look(selectors, *(an_inventory(name=name) for name in names))
    assert [(a.domain_name, a.coverage) for a in fleet.unprotected()] == [
        ("db01", Coverage.AMBIGUOUS),
        ("lost", Coverage.UNMATCHED),
    ]


def test_unmanaged_are_our_snapshots_of_policies_that_do_not_apply_any_more() -> None:
    left = a_snapshot(policy="dropped")
    fleet = look({"web1": (STANDARD,)}, an_inventory(left, a_snapshot(), a_foreign_snapshot()))
    assert [(domain.name, snapshots) for domain, snapshots in fleet.unmanaged()] == [("web1", (left,))]


def test_a_domain_that_lost_all_policies_has_unmanaged_snapshots() -> None:
    fleet = look({"web1": ()}, an_inventory(a_snapshot()))
    assert [domain.name for domain, _ in fleet.unmanaged()] == ["web1"]


def test_two_domains_of_one_name_but_different_uuids_are_told_apart() -> None:
    fleet = look({UUID: (STANDARD,)}, an_inventory(a_snapshot()), an_inventory(a_snapshot(), uuid=OTHER_UUID))
    assert [domain.uuid for domain, _ in fleet.unmanaged()] == [OTHER_UUID]


def test_configured_domains_that_libvirt_does_not_have_are_missing() -> None:
    assert look({"web1": (STANDARD,), "gone": ()}, an_inventory()).missing_domains == ("gone",)


def test_every_policy_has_its_number_of_domains_even_if_it_is_none() -> None:
    assert look({"web1": (STANDARD,)}, an_inventory()).domains_per_policy == {"standard": 1, "daily": 0}


# The clock


def seen(slot: str, seen_at: str) -> Snapshot:
    """Return a snapshot of some days ago whose domain was then seen unchanged at this slot."""
    snapshot = a_snapshot("2026-11-20T12:00")
    assert snapshot.mark is not None
    return replace(snapshot, mark=replace(snapshot.mark, unchanged=Unchanged(at(slot), at(seen_at))))


@pytest.mark.parametrize(
    "snapshot",
    [
        a_snapshot("2031-01-01T00:00"),
        a_snapshot("2026-11-22T12:00", taken_at=NOW + timedelta(minutes=1)),
        seen("2031-01-01T00:00", "2026-11-22T12:00"),
        seen("2026-11-22T12:00", "2031-01-01T00:00"),
    ],
    ids=["slot", "taken", "slot of an unchanged one", "seen unchanged"],
)
def test_a_snapshot_dated_in_the_future_makes_the_clock_suspect(snapshot: Snapshot) -> None:
    assert look({"*": (STANDARD,)}, an_inventory(*hourly_snapshots(2), snapshot)).clock_suspect()


@pytest.mark.parametrize(
    "snapshot",
    [
        a_snapshot("2026-11-22T12:00", taken_at=NOW),
        seen("2026-11-22T12:00", "2026-11-22T12:30"),
        a_foreign_snapshot("kvmsnapd-standard-20310101T000000Z"),
        a_snapshot("2031-01-01T00:00", policy="dropped"),
    ],
    ids=["taken now", "seen unchanged now", "foreign", "of a policy that does not apply"],
)
def test_any_other_snapshot_does_not(snapshot: Snapshot) -> None:
    assert not look({"*": (STANDARD,)}, an_inventory(*hourly_snapshots(2), snapshot)).clock_suspect()
