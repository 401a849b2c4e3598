"""What a reload changes: names of policies, what applies to each domain, and how many snapshots it releases."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.changes import compare_fleets, compare_policies, refuse_loss
from kvmsnapd.errors import ConfigError
from kvmsnapd.events import Severity
from kvmsnapd.fleet import survey, waiting_slots
from kvmsnapd.model import Inventory
from kvmsnapd.plan import plan_run
from kvmsnapd.policy import ConsistencyRule, DiskSelection, Hook, Hooks
from tests.builders import (
    ANY_LIBVIRT,
    NOW,
    OTHER_UUID,
    UUID,
    a_domain,
    a_policy,
    a_snapshot,
    an_inventory,
    half_deleted,
    hourly_snapshots,
)

if TYPE_CHECKING:
    from datetime import datetime

    from kvmsnapd.daemon_events import DomainPoliciesChanged
    from kvmsnapd.fleet import Fleet
    from kvmsnapd.model import Snapshot
    from kvmsnapd.policy import Policy

STANDARD = a_policy()
DAILY = a_policy("daily", schedule="daily")


def look(selectors: dict[str, tuple[Policy, ...]], *domains: Inventory, now: datetime = NOW) -> Fleet:
    names = {policy.name for policies in selectors.values() for policy in policies}
    return survey(sorted(names), selectors, domains, now=now)


def changes_of(
    before: tuple[Policy, ...], after: tuple[Policy, ...], *snapshots: Snapshot
) -> tuple[DomainPoliciesChanged, ...]:
    """Return what changes for one domain with these snapshots."""
    domain = an_inventory(*snapshots)
    return compare_fleets(look({"web1": before}, domain), look({"web1": after}, domain), now=NOW)


def change_of(before: tuple[Policy, ...], after: tuple[Policy, ...], *snapshots: Snapshot) -> DomainPoliciesChanged:
    (change,) = changes_of(before, after, *snapshots)
    return change


# Policies by name


def test_added_removed_and_changed_policies_are_told_in_the_order_of_the_file() -> None:
    before = {"a": a_policy("a"), "b": a_policy("b"), "c": a_policy("c"), "gone": a_policy("gone")}
    after = {
        "new": a_policy("new"),
        "c": a_policy("c", keep="last=4"),
        "b": a_policy("b"),
        "a": a_policy("a", splay="1s"),
    }
    changes = compare_policies(before, after)
    assert (changes.added, changes.removed) == (("new",), ("gone",))
    assert list(changes.changed.items()) == [("c", ("keep",)), ("a", ("splay",))]


def test_policies_that_are_equal_are_no_change_though_they_were_read_anew() -> None:
    changes = compare_policies({"a": a_policy("a")}, {"a": a_policy("a")})
    assert (changes.added, changes.removed, changes.changed) == ((), (), {})


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({"schedule": "every 2h"}, ("schedule",)),
        ({"keep": "last=3 daily=7"}, ("keep",)),
        ({"timezone": "Europe/Berlin"}, ("schedule", "timezone")),
        ({"consistency": ConsistencyRule.CRASH}, ("consistency",)),
        ({"catch_up": False}, ("catch_up",)),
        ({"max_age": "9h", "splay": "5m"}, ("splay", "max_age")),
        ({"max_deletes_per_run": 11}, ("max_deletes_per_run",)),
        ({"max_chain_depth": 15}, ("max_chain_depth",)),
        ({"memory_live": True}, ("memory",)),
        ({"max_pause": timedelta(seconds=1)}, ("max_pause",)),
        ({"min_free_bytes": 1}, ("min_free",)),
        ({"overlay_directory": "/overlays"}, ("overlay_directory",)),
        ({"disks": DiskSelection(exclude=("vdb",))}, ("disks",)),
        ({"hooks": Hooks(after=Hook(("true",), timedelta(seconds=1)))}, ("hooks",)),
    ],
)
def test_settings_that_differ_are_called_as_in_the_configuration(fields: dict[str, Any], keys: tuple[str, ...]) -> None:
    after = a_policy(**fields)
    assert compare_policies({"standard": STANDARD}, {"standard": after}).changed == {"standard": keys}
    assert change_of((STANDARD,), (after,)).changed == {"standard": keys}


# Domains


def test_a_domain_to_which_the_same_applies_is_not_told() -> None:
    assert changes_of((STANDARD, DAILY), (a_policy(), DAILY), *hourly_snapshots(9)) == ()
    assert changes_of((STANDARD, DAILY), (DAILY, STANDARD), *hourly_snapshots(9)) == ()


def test_only_the_domains_that_change_are_told() -> None:
    domains = an_inventory(name="a"), an_inventory(name="b", uuid=OTHER_UUID)
    before = look({"a": (STANDARD,), "b": (STANDARD,)}, *domains)
    after = look({"a": (STANDARD,), "b": (a_policy(keep="last=4"),)}, *domains)
    (change,) = compare_fleets(before, after, now=NOW)
    assert (change.domain, change.domain_uuid, change.changed) == ("b", OTHER_UUID, {"standard": ("keep",)})


def test_what_a_domain_gains_and_loses_is_told_with_what_stays_behind() -> None:
    foreign = replace(a_snapshot(policy="other"), name="by-hand", mark=None)
    change = change_of((STANDARD,), (DAILY,), *hourly_snapshots(5), foreign)
    assert (change.gained, change.lost, change.leaves) == (("daily",), ("standard",), 5)
    assert (change.changed, change.releases, change.fuse) == ({}, {"daily": 0}, ())
    assert change.severity is Severity.WARNING


def test_a_policy_that_is_lost_without_snapshots_is_no_reason_to_worry() -> None:
    change = change_of((STANDARD, DAILY), (STANDARD,), *hourly_snapshots(5))
    assert (change.lost, change.leaves, change.severity) == (("daily",), 0, Severity.INFO)


def test_a_policy_that_comes_back_finds_its_snapshots_again() -> None:
    change = change_of((), (STANDARD,), *hourly_snapshots(3))
    assert (change.gained, change.lost, change.leaves) == (("standard",), (), 0)


def test_a_domain_that_becomes_ambiguous_loses_what_it_had() -> None:
    domain = an_inventory(*hourly_snapshots(2))
    before = look({"web*": (STANDARD,)}, domain)
    after = look({"web*": (STANDARD,), "*eb1": (DAILY,)}, domain)
    (change,) = compare_fleets(before, after, now=NOW)
    assert (change.gained, change.lost, change.leaves) == ((), ("standard",), 2)


def test_a_domain_is_told_apart_by_its_uuid_and_not_by_its_name() -> None:
    before = look({"*": (STANDARD,)}, an_inventory(name="old"))
    after = look({"*": (STANDARD,)}, an_inventory(name="new"))
    assert compare_fleets(before, after, now=NOW) == ()


# Releases


def test_a_shorter_retention_tells_how_many_more_it_releases() -> None:
    change = change_of((a_policy(keep="last=20"),), (a_policy(keep="last=15"),), *hourly_snapshots(18))
    assert (change.releases, change.fuse, change.severity) == ({"standard": 3}, (), Severity.INFO)


def test_what_was_released_before_is_not_counted_again() -> None:
    change = change_of((a_policy(keep="last=5"),), (a_policy(keep="last=3"),), *hourly_snapshots(8))
    assert change.releases == {"standard": 2}


def test_a_longer_retention_releases_nothing() -> None:
    change = change_of((STANDARD,), (a_policy(keep="last=30"),), *hourly_snapshots(8))
    assert (change.releases, change.fuse) == ({"standard": 0}, ())


def test_a_policy_that_comes_back_with_a_shorter_retention_tells_what_it_releases() -> None:
    change = change_of((), (a_policy(keep="last=3"),), *hourly_snapshots(20))
    assert (change.gained, change.releases, change.fuse) == (("standard",), {"standard": 17}, ("standard",))


def test_what_is_more_than_may_go_at_once_is_told_to_wait() -> None:
    daily = [a_snapshot(NOW.replace(hour=0, minute=0) - timedelta(days=n)) for n in range(30)]
    change = change_of((a_policy(keep="daily=30"),), (a_policy(keep="daily=7"),), *daily)
    assert (change.releases, change.fuse, change.severity) == ({"standard": 23}, ("standard",), Severity.WARNING)


def test_a_higher_limit_lets_it_go() -> None:
    after = a_policy(keep="last=3", max_deletes_per_run=30)
    change = change_of((a_policy(keep="last=30"),), (after,), *hourly_snapshots(25))
    assert (change.releases, change.fuse) == ({"standard": 22}, ())
    assert change.changed == {"standard": ("keep", "max_deletes_per_run")}


def owing(count: int, snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
    """Return the snapshots with the note in the newest one that so many deletes had to wait."""
    *older, newest = snapshots
    assert newest.mark
    return (*older, replace(newest, mark=replace(newest.mark, owed=count)))


def test_what_had_to_wait_before_does_not_blow_the_fuse() -> None:
    snapshots = owing(12, hourly_snapshots(25))
    assert change_of((a_policy(keep="last=9"),), (a_policy(keep="last=8"),), *snapshots).fuse == ()
    assert change_of((a_policy(keep="last=9"),), (a_policy(keep="last=1"),), *snapshots).fuse == ("standard",)


def fuse_blows(policy: Policy, *snapshots: Snapshot) -> bool:
    """Tell whether the run that begins now deletes nothing because of its fuse."""
    plan = plan_run(a_domain(*snapshots), policy, ANY_LIBVIRT, now=NOW)
    return any(wait.reason == "fuse" for wait in plan.blocked)


@pytest.mark.parametrize(
    "kept",
    [
        7,
        8,
        10,
        11,
        12,
    ],
)
def test_the_fuse_that_is_announced_is_the_one_that_the_next_run_meets(kept: int) -> None:
    snapshots, after = hourly_snapshots(20), a_policy(keep=f"last={kept}")
    change = change_of((a_policy(keep="last=20"),), (after,), *snapshots)
    assert bool(change.fuse) is fuse_blows(after, *snapshots)


def test_half_deleted_snapshots_count_for_the_fuse_that_is_announced() -> None:
    *older, newest = hourly_snapshots(20)
    snapshots = (*(half_deleted(s) for s in older[:3]), *older[3:], newest)
    after = a_policy(keep="last=8", max_deletes_per_run=11)
    change = change_of((a_policy(keep="last=20"),), (after,), *snapshots)
    assert fuse_blows(after, *snapshots)
    assert change.fuse == ("standard",)


def test_each_policy_of_a_domain_has_its_own_count_and_fuse() -> None:
    other = hourly_snapshots(25, policy="other")
    change = change_of(
        (a_policy(keep="last=20"), a_policy("other", keep="last=20")),
        (a_policy(keep="last=15"), a_policy("other", keep="last=2")),
        *hourly_snapshots(18),
        *other,
    )
    assert change.releases == {"standard": 3, "other": 18}
    assert change.fuse == ("other",)


def test_a_domain_that_is_gained_by_nothing_is_no_change() -> None:
    domain = Inventory(UUID, "web1", hourly_snapshots(3))
    assert compare_fleets(look({}, domain), look({"other": (STANDARD,)}, domain), now=NOW) == ()


# Protection that is lost


def test_a_domain_that_loses_its_protection_without_a_word_is_a_warning() -> None:
    domain = an_inventory()
    before = look({"web*": (STANDARD,)}, domain)
    for selectors in ({}, {"web*": (STANDARD,), "*eb1": (DAILY,)}):
        (change,) = compare_fleets(before, look(selectors, domain), now=NOW)
        assert (change.unprotected, change.leaves, change.severity) == (True, 0, Severity.WARNING)
        with pytest.raises(ConfigError, match=f"leaves {domain.name} without protection"):
            refuse_loss([change], "/etc/kvmsnapd/kvmsnapd.yaml")


def test_what_is_unprotected_on_purpose_or_was_before_is_no_loss() -> None:
    domain = an_inventory()
    on_purpose = compare_fleets(look({"web*": (STANDARD,)}, domain), look({"web*": ()}, domain), now=NOW)
    gained = compare_fleets(look({}, domain), look({"web*": (STANDARD,)}, domain), now=NOW)
    assert [change.unprotected for change in (*on_purpose, *gained)] == [False, False]
    refuse_loss((*on_purpose, *gained), "file")


def test_of_many_domains_that_lose_protection_some_are_named() -> None:
    domains = [an_inventory(name=f"web{n}", uuid=f"11111111-2222-3333-4444-{n:012}") for n in range(12)]
    changes = compare_fleets(look({"web*": (STANDARD,)}, *domains), look({}, *domains), now=NOW)
    with pytest.raises(ConfigError, match=r"leaves web0, .*, web9 and 2 more without protection"):
        refuse_loss(changes, "file")


# Slots that wait


def test_a_slot_that_waits_for_its_splay_is_not_missed_because_of_an_edit() -> None:
    at_four = NOW.replace(hour=4, minute=0)
    domain = an_inventory(a_snapshot(at_four.replace(hour=0) - timedelta(days=1)))
    fields = {"schedule": "daily", "catch_up": False}
    before = look({"*": (a_policy(splay="23h", **fields),)}, domain, now=at_four)
    shorter = {"*": (a_policy(splay="1s", **fields),)}
    (was,), (becomes,) = before.pairs, look(shorter, domain, now=at_four).pairs
    assert (was.due.missed, was.due.run_at > at_four) == (None, True)
    assert becomes.due.missed == at_four.replace(hour=0)
    waiting = waiting_slots(before, look(shorter, domain, now=at_four), now=at_four)
    (kept,) = survey(["standard"], shorter, [domain], now=at_four, waiting=waiting).pairs
    assert kept.due == was.due
    tomorrow = at_four + timedelta(days=2)
    (later,) = survey(["standard"], shorter, [domain], now=tomorrow, waiting=waiting).pairs
    assert later.due.missed == tomorrow.replace(hour=0)
