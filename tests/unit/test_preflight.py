"""Pre-flight: every reason to leave a domain alone, and the complete request where there is none."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from kvmsnapd.model import Capabilities, Consistency, Domain, DomainState, Kind, Snapshot, Storage, TakeRequest
from kvmsnapd.policy import ConsistencyRule, DiskSelection, Policy
from kvmsnapd.preflight import chain_depth, chain_depths, plan_take
from kvmsnapd.refusal import Refusal, RefusalReason
from tests.builders import (
    ANY_LIBVIRT,
    NOW,
    a_disk,
    a_domain,
    a_foreign_snapshot,
    a_policy,
    a_snapshot,
    at,
    hourly_snapshots,
)

SLOT = at("2026-11-22T12:00")
NAME = "kvmsnapd-standard-20261122T120000Z"
INTERNAL = a_policy(kind=Kind.INTERNAL)
TEST_DRIVER = Capabilities(
    "test", "9.0.0", external_snapshots=False, internal_needs_qcow2=False, internal_stops_guest=False, storage_api=False
)


def answer(
    domain: Domain,
    policy: Policy | None = None,
    capabilities: Capabilities = ANY_LIBVIRT,
    **options: Any,  # noqa: ANN401  # whatever the function takes
) -> TakeRequest | Refusal:
    return plan_take(domain, policy or a_policy(), capabilities, slot=SLOT, now=NOW, **options)


def request(
    domain: Domain,
    policy: Policy | None = None,
    capabilities: Capabilities = ANY_LIBVIRT,
    **options: Any,  # noqa: ANN401
) -> TakeRequest:
    """Return the request, or fail with the refusal."""
    found = answer(domain, policy, capabilities, **options)
    assert isinstance(found, TakeRequest), found
    return found


def refusal(
    domain: Domain,
    policy: Policy | None = None,
    capabilities: Capabilities = ANY_LIBVIRT,
    **options: Any,  # noqa: ANN401
) -> Refusal:
    """Return the refusal, or fail with the request."""
    found = answer(domain, policy, capabilities, **options)
    assert isinstance(found, Refusal), found
    return found


# Refusals


def layers(count: int) -> tuple[str, ...]:
    """Return so many files below an active layer."""
    return tuple(f"/images/layer{number}" for number in range(count))


def test_an_unsettled_domain_is_refused() -> None:
    domain = a_domain(state=DomainState.UNSETTLED, state_detail="paused by a save that did not finish")
    assert refusal(domain) == Refusal(
        RefusalReason.STATE,
        "the domain is paused by a save that did not finish; start it, resume it or shut it down, then it is "
        "snapshotted again",
    )


def test_a_managed_save_image_is_refused_with_the_two_ways_out() -> None:
    domain = a_domain(state=DomainState.SHUT_OFF, managed_save=True)
    found = refusal(domain)
    assert found.reason is RefusalReason.MANAGED_SAVE
    assert "virsh start web1" in found.detail
    assert "virsh managedsave-remove web1" in found.detail


def test_a_block_job_is_refused_with_its_disks() -> None:
    disks = (a_disk("vda", block_job=True), a_disk("vdb"), a_disk("vdc", block_job=True))
    assert refusal(a_domain(disks=disks)) == Refusal(
        RefusalReason.BLOCK_JOB, "a block job runs on vda, vdc; waiting for it to end"
    )


@pytest.mark.parametrize("policy", [a_policy(), INTERNAL], ids=["external", "internal"])
@pytest.mark.parametrize(
    "snapshot",
    [a_foreign_snapshot(kind=Kind.MIXED), a_snapshot(kind=Kind.MIXED)],
    ids=["foreign", "ours"],
)
def test_a_mixed_snapshot_is_refused_by_both_kinds(policy: Policy, snapshot: Snapshot) -> None:
    assert refusal(a_domain(snapshot), policy).reason is RefusalReason.MIXED_KINDS


def test_an_external_policy_refuses_a_domain_with_an_internal_snapshot() -> None:
    assert refusal(a_domain(a_foreign_snapshot(kind=Kind.INTERNAL))) == Refusal(
        RefusalReason.MIXED_KINDS,
        "the domain has 1 snapshot(s) that are not external (such as 'before-upgrade'), and mixing kinds loses "
        "data; delete them, or give the domain a policy of the kind it has",
    )


def test_an_internal_policy_refuses_a_domain_with_an_external_snapshot() -> None:
    assert refusal(a_domain(a_foreign_snapshot()), INTERNAL).reason is RefusalReason.MIXED_KINDS


def test_a_tree_of_both_kinds_is_not_told_to_set_the_kind_it_has() -> None:
    domain = a_domain(a_snapshot(), a_foreign_snapshot(kind=Kind.INTERNAL))
    assert "set kind: external" not in refusal(domain).detail


def test_a_mixed_snapshot_is_not_told_to_set_a_kind_that_does_not_exist() -> None:
    assert "set kind: mixed" not in refusal(a_domain(a_foreign_snapshot(kind=Kind.MIXED))).detail


def test_a_full_chain_is_refused() -> None:
    domain = a_domain(*hourly_snapshots(4), disks=(a_disk(backing=layers(4)),))
    assert refusal(domain, a_policy(max_chain_depth=4)) == Refusal(
        RefusalReason.CHAIN_FULL,
        "the backing chain is 4 deep and the limit is 4, and no snapshot can go now; keep fewer snapshots, or delete "
        "some by hand (virsh snapshot-delete)",
    )


def test_a_chain_with_room_for_one_is_not_refused() -> None:
    request(a_domain(*hourly_snapshots(3), disks=(a_disk(backing=layers(3)),)), a_policy(max_chain_depth=4))


def test_a_chain_never_exceeds_what_this_libvirt_can_start() -> None:
    domain = a_domain(disks=(a_disk(backing=layers(24)),))
    capabilities = Capabilities("qemu", "11.3.0", chain_ceiling=24)
    assert refusal(domain, a_policy(max_chain_depth=100), capabilities).reason is RefusalReason.CHAIN_FULL


def test_a_chain_is_as_deep_as_its_deepest_disk() -> None:
    assert chain_depth(a_domain(disks=(a_disk("vda", backing=layers(1)), a_disk("vdb", backing=layers(5))))) == 5


def test_foreign_overlays_count_for_the_chain() -> None:
    domain = a_domain(a_foreign_snapshot(), *hourly_snapshots(2), disks=(a_disk(),))
    assert chain_depth(domain) == 3


def test_internal_snapshots_do_not_deepen_the_chain() -> None:
    assert chain_depth(a_domain(*hourly_snapshots(20, kind=Kind.INTERNAL))) == 0


def test_internal_snapshots_have_no_chain_limit() -> None:
    request(a_domain(*hourly_snapshots(20, kind=Kind.INTERNAL)), INTERNAL)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"agent_connected": False}, "has no guest agent that answers"),
        ({"state": DomainState.PAUSED}, "is paused"),
    ],
)
def test_a_demand_for_clean_file_systems_is_refused_without_the_agent(fields: dict[str, Any], missing: str) -> None:
    strict = a_policy(consistency=ConsistencyRule.FILESYSTEM)
    assert refusal(a_domain(**fields), strict) == Refusal(
        RefusalReason.AGENT,
        f"policy standard requires consistency: filesystem and the domain {missing}; start qemu-guest-agent in the "
        "guest, or set consistency: filesystem-preferred",
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            {"state": DomainState.UNSETTLED},
            {"managed_save": True},
        ),
        ({"managed_save": True}, {"disks": (a_disk(block_job=True),)}),
        ({"disks": (a_disk(block_job=True),)}, {"agent_connected": False}),
    ],
)
def test_of_several_reasons_the_most_urgent_is_told(first: dict[str, Any], second: dict[str, Any]) -> None:
    strict = a_policy(consistency=ConsistencyRule.FILESYSTEM)
    assert refusal(a_domain(**(second | first)), strict) == refusal(a_domain(**first), strict)


# Consistency

_RUNNING, _PAUSED, _OFF = DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUT_OFF
_CRASH, _PREFERRED, _STRICT = ConsistencyRule.CRASH, ConsistencyRule.FILESYSTEM_PREFERRED, ConsistencyRule.FILESYSTEM


@pytest.mark.parametrize(
    ("state", "agent", "rule", "consistency"),
    [
        (_RUNNING, True, _STRICT, Consistency.FILESYSTEM),
        (_RUNNING, True, _PREFERRED, Consistency.FILESYSTEM),
        (_RUNNING, True, _CRASH, Consistency.CRASH),
        (_RUNNING, False, _PREFERRED, Consistency.CRASH),
        (_RUNNING, False, _CRASH, Consistency.CRASH),
        (_PAUSED, True, _PREFERRED, Consistency.CRASH),
        (_PAUSED, True, _CRASH, Consistency.CRASH),
        (_OFF, False, _STRICT, Consistency.OFFLINE),
        (_OFF, False, _PREFERRED, Consistency.OFFLINE),
        (_OFF, False, _CRASH, Consistency.OFFLINE),
    ],
)
def test_consistency_follows_from_state_agent_and_rule(
    state: DomainState, agent: bool, rule: ConsistencyRule, consistency: Consistency
) -> None:
    found = request(a_domain(state=state, agent_connected=agent), a_policy(consistency=rule))
    assert found.mark.consistency is consistency
    assert found.quiesce is (consistency is Consistency.FILESYSTEM)


@pytest.mark.parametrize("rule", ConsistencyRule)
@pytest.mark.parametrize(
    ("state", "consistency"),
    [(_RUNNING, Consistency.MEMORY), (_PAUSED, Consistency.MEMORY), (_OFF, Consistency.OFFLINE)],
)
def test_an_internal_snapshot_holds_the_memory_of_a_guest_that_is_up(
    rule: ConsistencyRule, state: DomainState, consistency: Consistency
) -> None:
    policy = a_policy(kind=Kind.INTERNAL, consistency=rule)
    found = request(a_domain(state=state, agent_connected=False), policy)
    assert found.mark.consistency is consistency
    assert not found.quiesce


# Requests


def test_a_request_is_complete() -> None:
    disks = (
        a_disk("vda", path="/images/web1.qcow2"),
        a_disk("sdb", path="/images/data.img", format="raw"),
        a_disk("sda", device="cdrom", readonly=True, path=None),
        a_disk("fda", device="floppy", path=None),
        a_disk("vdc", readonly=True, path="/images/tools.img"),
    )
    found = request(a_domain(disks=disks))
    assert (found.domain_uuid, found.domain_name, found.name) == (a_domain().uuid, "web1", NAME)
    assert found.overlays == (
        ("vda", f"/images/web1.vda.{NAME}.qcow2"),
        ("sdb", f"/images/web1.sdb.{NAME}.qcow2"),
    )
    assert found.excluded == ("sda", "fda", "vdc")
    assert (found.mark.policy, found.mark.scheduled_at, found.mark.taken_at) == ("standard", SLOT, NOW)
    assert (found.mark.kind, found.mark.attempt, found.mark.hold) == (Kind.EXTERNAL, 1, None)
    assert (found.mark.excluded, found.memory_file) == ((), None)


def test_an_internal_request_names_no_files() -> None:
    disks = (a_disk(), a_disk("sda", device="cdrom", readonly=True))
    found = request(a_domain(disks=disks, memory_bytes=2**30), INTERNAL)
    assert (found.overlays, found.excluded, found.memory_file) == ((), (), None)


def test_a_later_attempt_has_a_name_of_its_own() -> None:
    found = request(a_domain(), attempt=2)
    assert (found.name, found.mark.attempt) == (f"{NAME}-2", 2)
    assert found.overlays == (("vda", f"/images/web1.vda.{NAME}-2.qcow2"),)


def test_a_name_that_a_foreign_snapshot_has_is_not_used_again() -> None:
    found = request(a_domain(a_foreign_snapshot(NAME), a_foreign_snapshot(f"{NAME}-2")))
    assert (found.name, found.mark.attempt) == (f"{NAME}-3", 3)


def test_a_transient_domain_is_refused() -> None:
    assert refusal(a_domain(persistent=False)).reason is RefusalReason.TRANSIENT


# RAM


LIVE = a_policy(memory_live=True, consistency=ConsistencyRule.MEMORY)


@pytest.mark.parametrize("agent", [True, False])
def test_a_live_snapshot_holds_the_memory_of_a_guest_that_runs_and_never_asks_the_agent(agent: bool) -> None:
    policy = a_policy(memory_live=True, max_pause=timedelta(seconds=2))
    found = request(a_domain(agent_connected=agent), policy)
    assert (found.mark.consistency, found.quiesce) == (Consistency.MEMORY, False)
    assert (found.memory_file, found.max_pause_seconds) == (f"/images/web1.{NAME}.mem", 2)


def test_a_live_snapshot_of_a_paused_domain_waits_until_it_runs() -> None:
    found = refusal(a_domain(state=_PAUSED), LIVE)
    assert found.reason is RefusalReason.STATE
    assert "resume it or shut it down" in found.detail


def test_a_live_snapshot_of_a_shut_off_domain_has_no_memory_to_save() -> None:
    found = request(a_domain(state=_OFF), LIVE)
    assert (found.mark.consistency, found.memory_file) == (Consistency.OFFLINE, None)


def test_the_memory_lies_with_the_overlay_of_the_first_disk_that_is_covered() -> None:
    disks = (
        a_disk("sda", device="cdrom", readonly=True, path="/iso/a.iso"),
        a_disk("vda", path="/slow/a.qcow2"),
        a_disk("vdb", path="/fast/b.qcow2"),
    )
    excluding = replace(LIVE, disks=DiskSelection(exclude=("vda",)))
    assert request(a_domain(disks=disks), LIVE).memory_file == f"/slow/web1.{NAME}.mem"
    assert request(a_domain(disks=disks), excluding).memory_file == f"/fast/web1.{NAME}.mem"


# How long a guest may stand still

PAUSES = a_policy(kind=Kind.INTERNAL, max_pause=timedelta(seconds=10))
LARGE = 2_500_000_001
"""Bytes of RAM that take just more than 10 s to save."""


def test_an_internal_snapshot_that_would_stop_the_guest_for_too_long_is_refused() -> None:
    assert refusal(a_domain(memory_bytes=16 * 2**30), PAUSES) == Refusal(
        RefusalReason.PAUSE,
        "saving 16.0 GiB of RAM may stop the guest for about 69 s and max_pause is 10s; raise it, set kind: external, "
        "or shut the guest off",
    )


def test_just_as_long_as_it_may_is_not_too_long() -> None:
    request(a_domain(memory_bytes=LARGE - 1), PAUSES)
    assert refusal(a_domain(memory_bytes=LARGE), PAUSES).reason is RefusalReason.PAUSE


@pytest.mark.parametrize("state", [_PAUSED, _OFF])
def test_a_guest_that_stands_still_anyway_is_not_stopped(state: DomainState) -> None:
    request(a_domain(memory_bytes=LARGE, state=state), PAUSES)


def test_a_snapshot_without_ram_or_with_a_running_guest_stops_nobody_for_long() -> None:
    for policy in (a_policy(), LIVE):
        request(a_domain(memory_bytes=2**40), replace(policy, max_pause=timedelta(seconds=1)))


def test_the_test_driver_stops_nobody() -> None:
    request(a_domain(memory_bytes=2**40), PAUSES, TEST_DRIVER)


# Free space

GIB = 2**30


def free(**folders: int) -> Storage:
    return Storage({f"/{folder}": count for folder, count in folders.items()})


def test_less_free_space_than_the_policy_wants_is_refused() -> None:
    policy = a_policy(min_free_bytes=GIB)
    assert refusal(a_domain(), policy, storage=free(images=500 * 2**20)) == Refusal(
        RefusalReason.SPACE,
        "/images has 500 MiB free and 1.0 GiB are needed (min_free); nothing was changed, free some space and it is "
        "tried again",
    )


def test_just_as_much_as_the_policy_wants_is_enough() -> None:
    policy = a_policy(min_free_bytes=GIB)
    request(a_domain(), policy, storage=free(images=GIB))
    assert refusal(a_domain(), policy, storage=free(images=GIB - 1)).reason is RefusalReason.SPACE


def test_space_that_nobody_can_tell_refuses_nothing() -> None:
    policy = a_policy(min_free_bytes=GIB)
    for storage in (None, Storage(), free(elsewhere=0)):
        request(a_domain(), policy, storage=storage)


def test_every_folder_needs_its_space_and_those_of_excluded_disks_do_not() -> None:
    disks = (a_disk("vda"), a_disk("vdb", path="/data/b.qcow2"))
    policy = a_policy(min_free_bytes=GIB)
    full = free(images=2 * GIB, data=0)
    assert refusal(a_domain(disks=disks), policy, storage=full).detail.startswith("/data has 0 MiB free")
    request(a_domain(disks=disks), replace(policy, disks=DiskSelection(exclude=("vdb",))), storage=full)


def test_an_internal_snapshot_needs_space_as_well() -> None:
    policy = replace(INTERNAL, min_free_bytes=GIB)
    assert refusal(a_domain(), policy, storage=free(images=0)).reason is RefusalReason.SPACE


def test_with_an_overlay_directory_its_space_counts_alone() -> None:
    policy = a_policy(min_free_bytes=GIB, overlay_directory="/overlays/")
    request(a_domain(), policy, storage=free(images=0, overlays=GIB))
    assert refusal(a_domain(), policy, storage=free(images=GIB, overlays=0)).detail.startswith("/overlays has")


@pytest.mark.parametrize("policy", [LIVE, INTERNAL], ids=["live", "internal"])
def test_the_ram_to_be_saved_comes_on_top_in_the_first_folder(policy: Policy) -> None:
    disks = (a_disk("vda"), a_disk("vdb", path="/data/b.qcow2"))
    domain = a_domain(disks=disks, memory_bytes=2 * GIB)
    wanting = replace(policy, min_free_bytes=GIB)
    request(domain, wanting, storage=free(images=int(3.3 * GIB), data=GIB))
    assert refusal(domain, wanting, storage=free(images=3 * GIB, data=GIB)).detail.startswith(
        "/images has 3.0 GiB free and 3.2 GiB are needed (min_free and 2.2 GiB for the guest's RAM)"
    )
    assert refusal(domain, wanting, storage=free(images=9 * GIB, data=GIB - 1)).detail.endswith(
        "are needed (min_free); nothing was changed, free some space and it is tried again"
    )


def test_a_guest_whose_ram_is_not_saved_needs_none_for_it() -> None:
    policy = a_policy(min_free_bytes=GIB)
    request(a_domain(memory_bytes=64 * GIB), policy, storage=free(images=GIB))
    request(a_domain(memory_bytes=64 * GIB, state=_OFF), replace(LIVE, min_free_bytes=GIB), storage=free(images=GIB))


# The budget of a chain that several policies share


def test_policies_that_may_keep_more_than_a_chain_holds_are_refused() -> None:
    hourly, daily = a_policy("hourly", keep="last=10"), a_policy("daily", keep="last=6", max_chain_depth=20)
    for policy in (hourly, daily):
        assert refusal(a_domain(), policy, policies=(hourly, daily)) == Refusal(
            RefusalReason.CHAIN_BUDGET,
            "the policies may keep 10 (hourly) + 6 (daily) snapshots, and one more is there while a new one is taken, "
            "but a backing chain may be only 16 deep (max_chain_depth); keep fewer, or set kind: internal",
        )


def test_policies_that_fit_with_the_one_that_is_taken_are_not_refused() -> None:
    hourly, daily = a_policy("hourly", keep="last=10"), a_policy("daily", keep="last=5")
    request(a_domain(), hourly, policies=(hourly, daily))


def test_a_policy_alone_may_be_too_much() -> None:
    request(a_domain(), a_policy(keep="last=15"))
    assert refusal(a_domain(), a_policy(keep="last=16")).reason is RefusalReason.CHAIN_BUDGET
    assert "no limit (standard)" in refusal(a_domain(), a_policy(keep="yearly=all")).detail


def test_what_this_libvirt_starts_limits_the_budget() -> None:
    policy = a_policy(keep="last=30", max_chain_depth=100)
    request(a_domain(), policy)
    found = refusal(a_domain(), policy, Capabilities("qemu", "11.3.0", chain_ceiling=24))
    assert (found.reason, "24 deep (the limit of this libvirt)" in found.detail) == (RefusalReason.CHAIN_BUDGET, True)


def test_a_rule_of_time_counts_with_the_shortest_interval() -> None:
    request(a_domain(), a_policy(keep="within=15h"))
    assert refusal(a_domain(), a_policy(keep="within=16h")).reason is RefusalReason.CHAIN_BUDGET


def test_internal_snapshots_have_no_budget() -> None:
    request(a_domain(), a_policy(kind=Kind.INTERNAL, keep="yearly=all"))


# The order, and which refusals heal


def test_what_no_time_heals_is_told_before_what_it_does() -> None:
    """A quarantine that came and went with the free space would be told again and again."""
    starved = {"storage": free(images=0)}
    unfit = a_domain(disks=(a_disk(shareable=True),), agent_connected=False)
    strict = a_policy(consistency=ConsistencyRule.FILESYSTEM, min_free_bytes=GIB)
    order = [
        refusal(replace(unfit, managed_save=True), replace(strict, keep=a_policy(keep="last=99").keep), **starved),
        refusal(unfit, replace(strict, keep=a_policy(keep="last=99").keep), **starved),
        refusal(unfit, strict, **starved),
        refusal(a_domain(agent_connected=False), strict, **starved),
        refusal(a_domain(memory_bytes=LARGE), replace(PAUSES, min_free_bytes=GIB), **starved),
        refusal(a_domain(disks=(a_disk(backing=layers(16)),)), a_policy(min_free_bytes=GIB), **starved),
        refusal(a_domain(disks=(a_disk(backing=layers(16)),))),
    ]
    assert [found.reason for found in order] == [
        RefusalReason.MANAGED_SAVE,
        RefusalReason.CHAIN_BUDGET,
        RefusalReason.DISK,
        RefusalReason.AGENT,
        RefusalReason.PAUSE,
        RefusalReason.SPACE,
        RefusalReason.CHAIN_FULL,
    ]


def test_only_what_a_person_has_to_change_does_not_heal() -> None:
    assert {reason for reason in RefusalReason if not reason.heals} == {
        RefusalReason.TRANSIENT,
        RefusalReason.MIXED_KINDS,
        RefusalReason.UNSUPPORTED,
        RefusalReason.DISK,
        RefusalReason.CHAIN_BUDGET,
        RefusalReason.PAUSE,
        RefusalReason.RESTORING,
    }


# How deep a chain is


def test_each_disk_has_a_chain_of_its_own() -> None:
    one, two = hourly_snapshots(2)
    overlaid = (replace(one, overlays=(("vda", "/a"), ("vdb", "/b"))), replace(two, overlays=(("vda", "/c"),)))
    disks = (a_disk("vda"), a_disk("vdb", backing=layers(4)), a_disk("sda", device="cdrom", readonly=True))
    assert chain_depths(a_domain(*overlaid, disks=disks)) == {"vda": 2, "vdb": 4}
