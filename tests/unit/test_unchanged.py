"""Is a shut-off domain as its newest snapshot? Yes only where nothing speaks against it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from kvmsnapd.model import Domain, DomainState, Kind, Layer, Snapshot, Storage
from kvmsnapd.policy import DiskSelection
from kvmsnapd.unchanged import find_unchanged
from tests.builders import a_chain, a_disk, a_domain, a_foreign_snapshot, a_policy, a_snapshot, at

if TYPE_CHECKING:
    from datetime import datetime

    from kvmsnapd.policy import Policy

NOON = at("2026-11-22T12:00")
SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)


@dataclass
class Ground:
    """A shut-off domain whose snapshots were taken one after the other, and what its files say."""

    targets: tuple[str, ...] = ("vda",)
    kind: Kind = Kind.EXTERNAL
    snapshots: list[Snapshot] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.active = {target: f"/images/{target}" for target in self.targets}
        self.layers = {path: Layer(path, NOON - 24 * HOUR) for path in self.active.values()}

    def take(
        self,
        slot: datetime,
        *,
        targets: tuple[str, ...] | None = None,
        made: timedelta = timedelta(0),
        foreign: bool = False,
        **fields: Any,  # noqa: ANN401  # whatever a snapshot has
    ) -> Snapshot:
        """Take one in whose time its overlays are made, or so much later."""
        targets = self.targets if targets is None else targets
        if foreign:
            snapshot = replace(a_foreign_snapshot(f"by-hand-{len(self.snapshots)}", kind=self.kind), created_at=slot)
        else:
            snapshot = a_snapshot(slot, kind=self.kind, taken_at=slot + 3 * SECOND, **fields)
        snapshot = replace(snapshot, offline=True, covers=tuple(self.active.items()))
        changed_at = snapshot.created_at + made
        if self.kind is Kind.INTERNAL:
            self.layers |= {path: Layer(path, changed_at) for path in self.active.values()}
        else:
            overlays = {target: f"/images/{target}.{len(self.snapshots)}" for target in targets}
            self.layers |= {path: Layer(path, changed_at, self.active[t]) for t, path in overlays.items()}
            self.active |= overlays
            snapshot = replace(snapshot, overlays=tuple(overlays.items()))
        self.snapshots.append(snapshot)
        return snapshot

    def touch(self, path: str, changed_at: datetime | None) -> None:
        self.layers[path] = replace(self.layers[path], changed_at=changed_at)

    @property
    def domain(self) -> Domain:
        disks = tuple(a_disk(target, path=path) for target, path in self.active.items())
        fields = {"state": DomainState.SHUT_OFF, "disks": disks} | self.fields
        return a_domain(*a_chain(*self.snapshots), **fields)

    def answer(self, policy: Policy | None = None) -> str | None:
        """Return the name of the snapshot that the domain is still as."""
        policy = policy or a_policy(kind=self.kind)
        found = find_unchanged(self.domain, policy, Storage(layers=self.layers))
        return found.name if found else None


@pytest.fixture(params=[Kind.EXTERNAL, Kind.INTERNAL])
def ground(request: pytest.FixtureRequest) -> Ground:
    return Ground(("vda", "vdb"), request.param)


@pytest.fixture
def external() -> Ground:
    return Ground(("vda", "vdb"))


# Yes


def test_a_domain_that_was_not_written_to_is_as_its_newest_snapshot(ground: Ground) -> None:
    ground.take(NOON - HOUR)
    newest = ground.take(NOON)
    assert ground.answer() == newest.name


@pytest.mark.parametrize("made", [0, -1, -5])
def test_files_may_be_made_a_little_before_the_time_that_libvirt_notes(ground: Ground, made: int) -> None:
    newest = ground.take(NOON, made=made * SECOND)
    assert ground.answer() == newest.name


def test_a_fraction_of_the_second_that_libvirt_notes_is_no_change(ground: Ground) -> None:
    newest = ground.take(NOON, made=timedelta(milliseconds=999))
    assert ground.answer() == newest.name


def test_of_one_slot_the_later_attempt_is_the_newest(external: Ground) -> None:
    external.take(NOON)
    second = external.take(NOON, attempt=2)
    assert external.answer() == second.name


def test_the_newest_slot_counts_in_whatever_order_libvirt_lists(external: Ground) -> None:
    external.take(NOON - HOUR)
    newest = external.take(NOON)
    external.snapshots.reverse()
    assert external.answer() == newest.name


def test_snapshots_of_others_above_the_policys_own_are_no_change(external: Ground) -> None:
    own = external.take(NOON)
    external.take(NOON + HOUR, policy="other")
    external.take(NOON + 2 * HOUR, policy="third")
    external.take(NOON + 3 * HOUR, foreign=True)
    assert external.answer() == own.name


def test_a_snapshot_of_others_that_covers_fewer_disks_is_no_change(external: Ground) -> None:
    own = external.take(NOON)
    external.take(NOON + HOUR, policy="other", targets=("vda",))
    assert external.answer() == own.name


def test_a_disk_that_the_policy_leaves_out_may_change() -> None:
    ground = Ground(("vda", "vdb"))
    own = ground.take(NOON, targets=("vda",))
    ground.touch("/images/vdb", NOON + HOUR)
    assert ground.answer(a_policy(disks=DiskSelection(exclude=("vdb",)))) == own.name


def test_layers_below_the_newest_snapshot_may_have_been_merged(external: Ground) -> None:
    external.take(NOON - HOUR)
    newest = external.take(NOON)
    del external.snapshots[0]
    for target in ("vda", "vdb"):
        external.touch(f"/images/{target}", NOON + SECOND)
    assert external.answer() == newest.name


def test_media_and_read_only_disks_do_not_matter(external: Ground) -> None:
    newest = external.take(NOON)
    disks = (*external.domain.disks, a_disk("sda", device="cdrom", readonly=True), a_disk("vdz", readonly=True))
    external.fields["disks"] = disks
    assert external.answer() == newest.name


# No: the domain


@pytest.mark.parametrize("state", [state for state in DomainState if state is not DomainState.SHUT_OFF])
def test_no_while_it_is_not_shut_off(ground: Ground, state: DomainState) -> None:
    ground.take(NOON)
    ground.fields["state"] = state
    assert ground.answer() is None


def test_no_with_a_managed_save_whose_ram_is_newer_than_any_snapshot(ground: Ground) -> None:
    ground.take(NOON)
    ground.fields["managed_save"] = True
    assert ground.answer() is None


def test_no_before_the_first_snapshot(ground: Ground) -> None:
    assert ground.answer() is None


def test_no_when_only_others_have_snapshots(ground: Ground) -> None:
    ground.take(NOON, policy="other")
    ground.take(NOON + HOUR, foreign=True)
    assert ground.answer() is None


def test_no_when_the_newest_was_taken_while_the_domain_ran(ground: Ground) -> None:
    ground.take(NOON - HOUR)
    ground.take(NOON)
    ground.snapshots[1] = replace(ground.snapshots[1], offline=False)
    assert ground.answer() is None


@pytest.mark.parametrize("kind", [Kind.EXTERNAL, Kind.INTERNAL])
def test_no_when_the_newest_is_of_another_kind_than_the_policy(kind: Kind) -> None:
    ground = Ground(kind=kind)
    ground.take(NOON)
    other = Kind.INTERNAL if kind is Kind.EXTERNAL else Kind.EXTERNAL
    assert ground.answer(a_policy(kind=other)) is None
    ground.snapshots[0] = replace(ground.snapshots[0], kind=Kind.MIXED)
    assert ground.answer() is None


# No: the files


@pytest.mark.parametrize("target", ["vda", "vdb"])
@pytest.mark.parametrize("later", [SECOND, HOUR, 5000 * HOUR])
def test_no_when_a_disk_was_written_to_since(ground: Ground, target: str, later: timedelta) -> None:
    newest = ground.take(NOON)
    ground.touch(ground.active[target], newest.created_at + later)
    assert ground.answer() is None


@pytest.mark.parametrize("earlier", [6 * SECOND, HOUR, 24 * 365 * HOUR])
def test_no_when_a_file_is_older_than_its_snapshot(ground: Ground, earlier: timedelta) -> None:
    """A clock that was ahead when the snapshot was taken: all that was written since looks older than it."""
    newest = ground.take(NOON)
    ground.touch(ground.active["vdb"], newest.created_at - earlier)
    assert ground.answer() is None


def test_no_when_the_snapshot_is_dated_by_a_clock_that_was_behind(ground: Ground) -> None:
    ground.take(NOON - 24 * HOUR)
    ground.touch(ground.active["vda"], NOON)
    ground.touch(ground.active["vdb"], NOON)
    assert ground.answer() is None


def test_no_when_libvirt_tells_nothing_of_a_file(ground: Ground) -> None:
    ground.take(NOON)
    del ground.layers[ground.active["vdb"]]
    assert ground.answer() is None


def test_no_when_libvirt_tells_no_time_of_a_file(ground: Ground) -> None:
    ground.take(NOON)
    ground.touch(ground.active["vdb"], None)
    assert ground.answer() is None


def test_no_when_libvirt_tells_nothing_at_all(ground: Ground) -> None:
    ground.take(NOON)
    ground.layers.clear()
    assert ground.answer() is None


def test_no_when_a_disk_has_no_file(ground: Ground) -> None:
    ground.take(NOON)
    ground.fields["disks"] = tuple(replace(disk, path=None) for disk in ground.domain.disks)
    assert ground.answer() is None


# No: the disks


def test_no_when_a_disk_was_added(ground: Ground) -> None:
    ground.take(NOON)
    ground.layers["/images/vdc"] = Layer("/images/vdc", NOON - HOUR)
    ground.fields["disks"] = (*ground.domain.disks, a_disk("vdc", path="/images/vdc"))
    assert ground.answer() is None


def test_no_when_a_disk_was_taken_away(external: Ground) -> None:
    external.take(NOON)
    external.fields["disks"] = external.domain.disks[:1]
    assert external.answer() is None


def test_no_when_a_disk_of_an_internal_snapshot_was_taken_away() -> None:
    ground = Ground(("vda", "vdb"), Kind.INTERNAL)
    ground.take(NOON)
    ground.fields["disks"] = ground.domain.disks[:1]
    assert ground.answer() is None


def test_no_when_the_policy_chooses_other_disks_than_then(external: Ground) -> None:
    external.take(NOON, targets=("vda",))
    assert external.answer() is None
    assert external.answer(a_policy(disks=DiskSelection(include=("vdb",)))) is None


def test_no_when_no_disk_is_left_to_compare(ground: Ground) -> None:
    ground.take(NOON)
    ground.fields["disks"] = ()
    assert ground.answer() is None


def test_no_when_a_disk_was_replaced_by_another_file(ground: Ground) -> None:
    ground.take(NOON)
    ground.layers["/images/new"] = Layer("/images/new", NOON + HOUR, ground.active["vda"])
    ground.active["vda"] = "/images/new"
    assert ground.answer() is None


# No: the layers between


def test_no_when_a_layer_of_nobody_lies_on_top(external: Ground) -> None:
    """What a revert leaves, or a backup in progress."""
    newest = external.take(NOON)
    external.layers["/images/x"] = Layer("/images/x", newest.created_at, external.active["vda"])
    external.active["vda"] = "/images/x"
    assert external.answer() is None


def test_no_after_a_revert_to_an_older_snapshot(external: Ground) -> None:
    older = external.take(NOON - HOUR)
    external.take(NOON)
    external.active = dict(older.overlays)
    assert external.answer() is None


def test_no_when_somebody_wrote_between_the_newest_and_a_later_snapshot_of_others(external: Ground) -> None:
    own = external.take(NOON)
    external.touch(dict(own.overlays)["vdb"], NOON + HOUR)
    external.take(NOON + 2 * HOUR, policy="other")
    assert external.answer() is None


def test_no_when_a_layer_above_was_written_to_by_a_merge(external: Ground) -> None:
    own = external.take(NOON)
    external.take(NOON + HOUR, policy="other")
    external.take(NOON + 2 * HOUR, policy="third")
    del external.snapshots[1]  # its overlay was merged into the one of the policy's own
    for target, path in own.overlays:
        external.touch(path, NOON + 2 * HOUR)
        external.layers[external.active[target]] = replace(external.layers[external.active[target]], backing=path)
    assert external.answer() is None


def test_no_when_a_later_snapshot_of_others_was_taken_while_the_domain_ran(external: Ground) -> None:
    external.take(NOON)
    external.take(NOON + HOUR, policy="other")
    external.snapshots[1] = replace(external.snapshots[1], offline=False)
    assert external.answer() is None


def test_no_when_the_chain_ends_before_the_newest_is_reached(external: Ground) -> None:
    external.take(NOON)
    external.take(NOON + HOUR, policy="other")
    external.layers[external.active["vda"]] = replace(external.layers[external.active["vda"]], backing=None)
    assert external.answer() is None


def test_no_when_layers_name_each_other_in_a_ring(external: Ground) -> None:
    external.take(NOON)
    external.take(NOON + HOUR, policy="other")
    top = external.active["vda"]
    external.layers[top] = replace(external.layers[top], backing=top)
    assert external.answer() is None


def test_no_when_the_newest_snapshot_has_no_overlay_on_a_disk_of_which_an_older_one_has(external: Ground) -> None:
    external.take(NOON - HOUR)
    external.take(NOON, targets=("vda",))
    assert external.answer() is None
