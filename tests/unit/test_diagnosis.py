"""What doctor says of files and domains: no advice that could cost anybody data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmsnapd.diagnosis import Finding, Level, diagnose_domain, diagnose_files
from kvmsnapd.model import Deleting, Domain, DomainState, Kind, Layer, Snapshot
from kvmsnapd.plan import plan_run
from tests.builders import ANY_LIBVIRT, NOW, OTHER_UUID, a_chain, a_disk, a_domain, a_policy, a_snapshot

BASE = "/images/web1-vda.qcow2"
NAME = "kvmsnapd-standard-20261122T080000Z"
OVERLAY = f"/images/web1.vda.{NAME}.qcow2"
MEMORY = f"/images/web1.{NAME}.mem"
OFF = DomainState.SHUT_OFF
EMPTY, FULL = 200 * 1024, 10 * 2**20


def judged(*domains: Domain, layers: list[Layer], closed: str | None = None) -> list[Finding]:
    """Return the findings when these files are there, but for a folder that cannot be listed."""
    folders = {"/images", *(layer.path.rpartition("/")[0] for layer in layers)} - {closed}
    files = {f: tuple(layer for layer in layers if layer.path.rpartition("/")[0] == f) for f in folders}
    return list(diagnose_files(domains, files))


def an_overlay(path: str = OVERLAY, *, allocated: int | None = EMPTY, on: str | None = BASE) -> Layer:
    return Layer(path, backing=on, allocated=allocated)


def a_line(count: int) -> tuple[tuple[Snapshot, ...], list[str]]:
    """Return snapshots of one disk in a line, and the files from the base to the active layer."""
    slots = [f"2026-11-22T{hour:02}:00" for hour in range(count)]
    paths = [BASE, *(f"/images/web1.vda.{a_snapshot(slot).name}.qcow2" for slot in slots)]
    made = [
        a_snapshot(slot, overlays=(("vda", paths[n + 1]),), covers=(("vda", paths[n]), ("sda", "/iso/gone.iso")))
        for n, slot in enumerate(slots)
    ]
    return a_chain(*made), paths


def stacked(paths: list[str]) -> list[Layer]:
    return [Layer(path, backing=below, allocated=FULL) for path, below in zip(paths, [None, *paths], strict=False)]


def test_an_empty_overlay_of_a_shut_off_domain_and_a_memory_file_may_be_removed() -> None:
    found = judged(a_domain(state=OFF), layers=[Layer(BASE), an_overlay(), Layer(MEMORY, allocated=FULL)])
    assert {(f.subject, f.level, f.command) for f in found} == {
        (OVERLAY, Level.WARNING, f"rm {OVERLAY}"),
        (MEMORY, Level.WARNING, f"rm {MEMORY}"),
    }


@pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.PAUSED, DomainState.UNSETTLED])
@pytest.mark.parametrize("allocated", [EMPTY, FULL])
def test_what_stands_on_the_active_layer_of_a_guest_that_is_on_is_merged(state: DomainState, allocated: int) -> None:
    (found,) = judged(a_domain(state=state), layers=[Layer(BASE), an_overlay(allocated=allocated)])
    assert (found.level, found.command) == (Level.PROBLEM, f"qemu-img commit {OVERLAY} && rm {OVERLAY}")


def test_an_overlay_with_data_on_a_shut_off_domains_active_layer_is_merged() -> None:
    (found,) = judged(a_domain(state=OFF), layers=[Layer(BASE), an_overlay(allocated=FULL)])
    assert (found.level, found.command) == (Level.PROBLEM, f"qemu-img commit {OVERLAY} && rm {OVERLAY}")


@pytest.mark.parametrize(
    ("layer", "closed"),
    [
        (an_overlay(f"/images/web2.vda.{NAME}.qcow2"), None),
        (an_overlay(f"/images/web2.vda.{NAME}.qcow2", allocated=FULL), None),
        (Layer(f"/images/web2.{NAME}.mem", allocated=FULL), None),
        (an_overlay(f"/images/web1.extra.vda.{NAME}.qcow2"), None),
        (an_overlay(allocated=FULL, on="/images/old.qcow2"), None),
        (an_overlay(allocated=None, on="/images/old.qcow2"), None),
        (an_overlay(on=None), None),
        # What the domain stands on is not all known.
        (an_overlay(f"/overlays/web1.vda.{NAME}.qcow2", on="/images/old.qcow2"), "/images"),
    ],
)
def test_all_that_may_be_somebodys_is_only_to_be_looked_at(layer: Layer, closed: str | None) -> None:
    layers = [layer] if closed else [Layer(BASE), layer]
    (found,) = judged(a_domain(state=OFF), layers=layers, closed=closed)
    assert (found.subject, found.level) == (layer.path, Level.WARNING)
    assert "undefined domain or of another host" in found.text
    assert found.command == f"qemu-img info -U --backing-chain {layer.path}"


def test_the_overlay_of_one_domain_on_the_active_layer_of_another_is_only_to_be_looked_at() -> None:
    other = a_domain(name="web2", uuid=OTHER_UUID, disks=(a_disk(path="/images/web2.qcow2"),))
    layers = [Layer(BASE), Layer("/images/web2.qcow2"), an_overlay(on="/images/web2.qcow2")]
    for state in (OFF, DomainState.RUNNING):
        (found,) = judged(a_domain(state=OFF), replace(other, state=state), layers=layers)
        assert found.command == f"qemu-img info -U --backing-chain {OVERLAY}"


def test_a_folder_with_two_names_does_not_make_an_overlay_unused() -> None:
    snapshots, paths = a_line(1)
    domain = a_domain(*snapshots, state=OFF, disks=(a_disk(path=paths[-1]),))
    twice = [*stacked(paths), an_overlay(paths[-1].replace("/images", "/mnt/images"), on=BASE)]
    assert judged(domain, layers=twice) == []
    elsewhere = an_overlay(OVERLAY.replace("/images", "/mnt/images"), on=BASE.replace("/images", "/mnt/images"))
    (found,) = judged(a_domain(), layers=[Layer(BASE), elsewhere])
    assert found.level is Level.PROBLEM


def test_what_another_file_stands_on_is_left_alone() -> None:
    layers = [Layer(BASE), an_overlay(on="/images/old.qcow2"), an_overlay("/images/clone.qcow2", on=OVERLAY)]
    (found,) = judged(a_domain(state=OFF), layers=layers)
    assert (found.level, found.command) == (Level.WARNING, None)
    assert "/images/clone.qcow2 stands on it" in found.text


def test_nothing_is_said_of_files_of_a_domain_that_libvirt_works_on() -> None:
    assert judged(a_domain(busy=True), layers=[Layer(BASE), an_overlay(), Layer(MEMORY)]) == []


@pytest.mark.parametrize("below", [True, False])
def test_a_covered_file_that_is_gone_is_the_data_of_its_snapshot(below: bool) -> None:
    snapshots, paths = a_line(3)
    disk = a_disk(path=paths[-1], backing=tuple(reversed(paths[:-1])) if below else ())
    there = [layer for layer in stacked(paths) if layer.path != paths[1]]
    (found,) = judged(a_domain(*snapshots, state=OFF, disks=(disk,)), layers=there)
    assert (found.level, found.command) == (Level.PROBLEM, None)
    assert f"the data of snapshot {snapshots[1].name} is gone: there is no {paths[1]}" in found.text
    assert "cannot start" in found.text


def test_an_active_layer_that_is_gone_does_not_take_its_snapshot_along() -> None:
    snapshots, paths = a_line(2)
    domain = a_domain(*snapshots, state=OFF, disks=(a_disk(path=paths[-1]),))
    (found,) = judged(domain, layers=stacked(paths[:-1]))
    assert (found.level, found.command) == (Level.PROBLEM, None)
    assert f"{paths[-1]} is gone" in found.text
    assert "cannot start" in found.text
    assert "the data of snapshot" not in found.text


def test_the_layer_that_a_revert_left_behind_and_libvirt_removed_is_not_missed() -> None:
    snapshots, paths = a_line(2)
    now = "/images/web1.new"
    domain = a_domain(*snapshots, state=OFF, disks=(a_disk(path=now),))
    assert judged(domain, layers=[*stacked(paths[:-1]), Layer(now, backing=BASE)]) == []


def test_ram_that_is_gone_leaves_the_disks() -> None:
    snapshot = a_snapshot(memory_file=MEMORY, covers=(("vda", BASE),))
    (found,) = judged(a_domain(snapshot), layers=[Layer(BASE)])
    assert (found.level, found.command) == (Level.WARNING, None)
    assert "its disks are whole" in found.text


def test_nothing_is_missed_in_a_folder_that_is_not_listed() -> None:
    snapshots, paths = a_line(2)
    domain = a_domain(*snapshots, state=OFF, disks=(a_disk(path=paths[-1]),))
    assert judged(domain, layers=[], closed="/images") == []


def said(domain: Domain, *policies: str, **keep: str) -> list[Finding]:
    chosen = [a_policy(name, **keep) for name in policies]
    plans = [plan_run(domain, policy, ANY_LIBVIRT, now=NOW, policies=chosen) for policy in chosen]
    return [f for f in diagnose_domain(domain, chosen, plans, ANY_LIBVIRT) if f.level is not Level.NOTE]


def test_snapshots_of_a_newer_kvmsnapd_are_named_as_such() -> None:
    newer = replace(a_snapshot(), mark=None, newer=True)
    (found,) = said(a_domain(newer))
    assert found.level is Level.PROBLEM
    assert found.text.startswith("1 snapshot(s) were made by a newer kvmsnapd")


def test_a_paused_guest_is_not_to_be_powered_off_unseen() -> None:
    (found,) = said(a_domain(a_snapshot(), state=DomainState.PAUSED))
    assert (found.level, found.command) == (Level.WARNING, "virsh domstate --reason web1")
    assert "Either somebody did that" in found.text
    assert said(a_domain(state=DomainState.PAUSED)) == []


def test_only_a_pause_that_a_person_ends_names_resume_and_is_told_once() -> None:
    domain = a_domain(state=DomainState.UNSETTLED, state_detail="crashed")
    assert [(f.text, f.command) for f in said(domain, "standard")] == [("is crashed", None)]
    (found,) = said(replace(domain, resumable=True))
    assert (found.level, found.command) == (Level.PROBLEM, "virsh resume web1")
    assert said(replace(domain, resumable=True, busy=True), "standard") == []


def test_a_shortage_of_several_policies_and_mixed_kinds_are_told_once() -> None:
    (found,) = said(a_domain(), "one", "two", keep="last=30")
    assert "policies one, two are refused (chain_budget)" in found.text
    mixed = a_domain(*a_chain(a_snapshot("2026-11-22T10:00"), a_snapshot("2026-11-22T11:00", kind=Kind.INTERNAL)))
    (found,) = said(mixed, "standard")
    assert "mixed_kinds" in found.text
    (found,) = said(mixed)
    assert "internal and external" in found.text


def test_a_stray_layer_names_the_command_that_merges_down_to_the_snapshots_overlay_and_no_further() -> None:
    snapshots, paths = a_line(2)
    disk = a_disk(path="/images/b2", backing=("/images/b1", *reversed(paths)))
    (found,) = said(a_domain(*snapshots, disks=(disk,)))
    words = f"--top /images/b2 --base {paths[-1]} --active --pivot --wait"
    assert (found.level, found.command) == (Level.PROBLEM, f"virsh blockcommit web1 vda {words}")
    assert "/images/b1" in found.text
    assert "backup program" in found.text
    assert [f.command for f in said(a_domain(*snapshots, disks=(disk,), state=OFF))] == [None]
    assert [f.command for f in said(a_domain(*snapshots, disks=(replace(disk, block_job=True),)))] == [None]
    # Not on top: a snapshot was taken since.
    buried = a_snapshot("2026-11-22T05:00", overlays=(("vda", "/images/top"),), parent=snapshots[-1].name)
    under = a_disk(path="/images/top", backing=(disk.path or "", *disk.backing))
    assert [f.command for f in said(a_domain(*snapshots, buried, disks=(under,)))] == [None]


@pytest.mark.parametrize(
    ("failed_in", "level", "command"),
    [
        (7, Level.PROBLEM, "virsh shutdown web1"),
        (6, Level.WARNING, "kvmsnapd prune web1"),
        (None, Level.WARNING, "kvmsnapd prune web1"),
    ],
)
def test_a_half_deleted_snapshot_is_told_and_what_a_failed_merge_needs(
    failed_in: int | None, level: Level, command: str | None
) -> None:
    snapshot = a_snapshot("2026-11-22T08:00")
    assert snapshot.mark is not None
    half = replace(snapshot, mark=replace(snapshot.mark, deleting=Deleting(NOW, failed_in)))
    found = diagnose_domain(a_domain(half, run_id=7), [], [], ANY_LIBVIRT)
    told = [finding for finding in found if half.name in finding.text]
    assert [(finding.level, finding.command) for finding in told] == [(level, command)]
