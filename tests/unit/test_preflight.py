"""Pre-flight: every reason to leave a domain alone, and the complete request where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from kvmsnapd.model import Capabilities, Consistency, Disk, Domain, DomainState, Kind, Snapshot, TakeRequest
from kvmsnapd.policy import ConsistencyRule, Policy
from kvmsnapd.preflight import Refusal, RefusalReason, chain_depth, overlay_path, plan_take
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
TEST_DRIVER = Capabilities("test", "9.0.0", external_snapshots=False, internal_needs_qcow2=False)


def answer(
    domain: Domain,
    policy: Policy | None = None,
    capabilities: Capabilities = ANY_LIBVIRT,
    *,
    attempt: int = 1,
) -> TakeRequest | Refusal:
    return plan_take(domain, policy or a_policy(), capabilities, slot=SLOT, now=NOW, attempt=attempt)


def request(
    domain: Domain, policy: Policy | None = None, capabilities: Capabilities = ANY_LIBVIRT, *, attempt: int = 1
) -> TakeRequest:
    """Return the request, or fail with the refusal."""
    found = answer(domain, policy, capabilities, attempt=attempt)
    assert isinstance(found, TakeRequest), found
    return found


def refusal(domain: Domain, policy: Policy | None = None, capabilities: Capabilities = ANY_LIBVIRT) -> Refusal:
    """Return the refusal, or fail with the request."""
    found = answer(domain, policy, capabilities)
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


def test_a_domain_without_a_writable_disk_is_refused() -> None:
    media = (a_disk("sda", device="cdrom", readonly=True), a_disk("fda", device="floppy"), a_disk("vdb", readonly=True))
    assert refusal(a_domain(disks=media)) == Refusal(
        RefusalReason.DISK, "the domain has no writable disk, so there is nothing to snapshot"
    )


def test_a_driver_without_external_snapshots_is_refused_with_the_setting_that_helps() -> None:
    assert refusal(a_domain(), a_policy(), TEST_DRIVER) == Refusal(
        RefusalReason.UNSUPPORTED,
        "libvirt's test driver has no external snapshots; set kind: internal in the policy",
    )


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
    ("disk", "fault"),
    [
        (a_disk("vdb", transient=True), "vdb is transient"),
        (a_disk("vdb", shareable=True), "vdb is shared with other domains"),
        (a_disk("vdb", source_type="block", path="/dev/vg/lv"), "vdb is of type block, not a file"),
        (a_disk("vdb", source_type="network", path=None), "vdb is of type network, not a file"),
        (a_disk("vdb", source_type="volume", path=None), "vdb is of type volume, not a file"),
    ],
)
def test_a_disk_that_no_overlay_can_cover_is_refused(disk: Disk, fault: str) -> None:
    assert refusal(a_domain(disks=(a_disk(), disk))) == Refusal(
        RefusalReason.DISK, f"{fault}; no external snapshot can hold it"
    )


def test_all_unfit_disks_are_named_at_once() -> None:
    disks = (a_disk("vda", transient=True), a_disk("vdb", shareable=True))
    assert refusal(a_domain(disks=disks)).detail.startswith("vda is transient; vdb is shared with other domains")


def test_an_unfit_cdrom_does_not_matter() -> None:
    disks = (a_disk(), a_disk("sda", device="cdrom", source_type="network", path=None, readonly=True))
    request(a_domain(disks=disks))


def test_an_external_snapshot_holds_a_raw_disk() -> None:
    request(a_domain(disks=(a_disk(format="raw"),)))


def test_an_internal_snapshot_needs_qcow2() -> None:
    assert refusal(a_domain(disks=(a_disk(), a_disk("vdb", format="raw"))), INTERNAL) == Refusal(
        RefusalReason.DISK, "vdb has format raw, not qcow2; no internal snapshot can hold it"
    )


def test_an_internal_snapshot_of_a_transient_disk_is_refused() -> None:
    assert refusal(a_domain(disks=(a_disk(transient=True),)), INTERNAL).reason is RefusalReason.DISK


def test_the_test_driver_needs_no_qcow2() -> None:
    request(a_domain(disks=(a_disk(format="raw"),)), INTERNAL, TEST_DRIVER)


def test_an_internal_snapshot_of_a_running_domain_with_uefi_is_refused() -> None:
    assert refusal(a_domain(pflash=True), INTERNAL) == Refusal(
        RefusalReason.UNSUPPORTED,
        "libvirt 11.3.0 takes no internal snapshot of a running domain with UEFI firmware; set kind: external in the "
        "policy",
    )


def test_an_internal_snapshot_of_a_shut_off_domain_with_uefi_depends_on_libvirt() -> None:
    domain = a_domain(pflash=True, state=DomainState.SHUT_OFF)
    old = Capabilities("qemu", "9.0.0", internal_with_pflash_offline=False)
    assert refusal(domain, INTERNAL, old).reason is RefusalReason.UNSUPPORTED
    request(domain, INTERNAL)


def test_an_external_snapshot_of_a_domain_with_uefi_is_fine() -> None:
    request(a_domain(pflash=True))


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"agent_connected": False}, "has no guest agent connected"),
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


def test_an_internal_request_names_no_files_and_leaves_floppies_out() -> None:
    disks = (a_disk(), a_disk("fda", device="floppy"), a_disk("sda", device="cdrom", readonly=True))
    found = request(a_domain(disks=disks), INTERNAL)
    assert (found.overlays, found.excluded) == ((), ("fda",))


def test_a_later_attempt_has_a_name_of_its_own() -> None:
    found = request(a_domain(), attempt=2)
    assert (found.name, found.mark.attempt) == (f"{NAME}-2", 2)
    assert found.overlays == (("vda", f"/images/web1.vda.{NAME}-2.qcow2"),)


def test_a_name_that_a_foreign_snapshot_has_is_not_used_again() -> None:
    found = request(a_domain(a_foreign_snapshot(NAME), a_foreign_snapshot(f"{NAME}-2")))
    assert (found.name, found.mark.attempt) == (f"{NAME}-3", 3)


def test_an_overlay_lies_beside_the_layer_it_covers() -> None:
    path = overlay_path(a_domain(name="web1"), a_disk(path="/pool/a.b/web1.vda.older.qcow2"), "newer")
    assert path == "/pool/a.b/web1.vda.newer.qcow2"


def test_two_disks_with_one_stem_get_different_overlays() -> None:
    a, b = a_disk("vda", path="/images/web1.img"), a_disk("vdb", path="/images/web1.qcow2")
    assert overlay_path(a_domain(name="web1"), a, NAME) != overlay_path(a_domain(name="web1"), b, NAME)


def test_characters_that_do_not_belong_in_file_names_become_underscores() -> None:
    assert overlay_path(a_domain(name="a b/c:ä", uuid="12345678-0"), a_disk(path="/images/x"), "s") == (
        "/images/a_b_c__-12345678.vda.s.qcow2"
    )


def test_a_long_domain_name_still_gives_a_file_name_the_file_system_takes() -> None:
    path = overlay_path(a_domain(name="x" * 300), a_disk(), "kvmsnapd-" + "p" * 32 + "-20261122T120000Z-99")
    assert len(path.rsplit("/", 1)[1]) <= 255


@pytest.mark.parametrize(("one", "other"), [("web 1", "web_1"), ("x" * 100 + "a", "x" * 100 + "b")])
def test_two_domains_in_one_folder_get_different_overlays(one: str, other: str) -> None:
    domains = a_domain(name=one, uuid="1111"), a_domain(name=other, uuid="2222")
    assert overlay_path(domains[0], a_disk(), NAME) != overlay_path(domains[1], a_disk(), NAME)


def test_a_transient_domain_is_refused() -> None:
    assert refusal(a_domain(persistent=False)).reason is RefusalReason.TRANSIENT


def test_a_disk_its_owner_left_out_takes_no_part_in_an_external_snapshot() -> None:
    disks = (a_disk("vda"), a_disk("vdb", left_out=True))
    asked = request(a_domain(disks=disks))
    assert [target for target, _ in asked.overlays] == ["vda"]
    assert asked.excluded == ("vdb",)


def test_a_disk_its_owner_left_out_makes_an_internal_snapshot_impossible() -> None:
    found = refusal(a_domain(disks=(a_disk("vda"), a_disk("vdb", left_out=True))), INTERNAL)
    assert found.reason is RefusalReason.DISK
    assert "vdb is left out by snapshot='no'" in found.detail
