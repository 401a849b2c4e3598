"""What has happened, in the words of a terminal."""

from __future__ import annotations

from kvmsnapd.cli.tell import describe_event
from kvmsnapd.events import (
    DeleteFailed,
    Event,
    GuestFrozen,
    HookFinished,
    RunSkipped,
    RunStarted,
    SnapshotDeleted,
    SnapshotDowngraded,
    SnapshotFailed,
    SnapshotTaken,
    ThawFailed,
)
from kvmsnapd.model import PairName
from tests.builders import NOW, UUID

PAIR = PairName("web1", UUID, "standard")


def test_a_take_says_how_good_it_is_and_what_it_cost() -> None:
    event = SnapshotTaken(
        pair=PAIR,
        snapshot="s1",
        scheduled_at=NOW,
        kind="external",
        consistency="memory",
        duration_seconds=2.04,
        excluded=("vdb",),
        paused_seconds=0.31,
    )
    assert describe_event(event) == (
        "web1: took s1 (external, memory, without vdb, 2.0 s, the guest stood still for 0.3 s)"
    )


def test_what_went_wrong_is_told_with_the_object_and_why() -> None:
    told: dict[Event, str] = {
        SnapshotDowngraded(pair=PAIR, snapshot="s1", error="no answer"): (
            "web1: the snapshot will be only crash-consistent, the guest agent did not freeze it: no answer"
        ),
        SnapshotFailed(pair=PAIR, snapshot="s1", scheduled_at=NOW, reason="busy", error="a job runs"): (
            "web1: s1 was not taken: a job runs"
        ),
        DeleteFailed(pair=PAIR, snapshot="s1", reason="busy", error="a job runs"): (
            "web1: s1 was not deleted: a job runs; `kvmsnapd doctor` says what state web1 is in"
        ),
        RunSkipped(pair=PAIR, reason="space", detail="/images is full"): "web1: nothing was taken: /images is full",
        GuestFrozen(pair=PAIR, error="by a backup"): (
            "web1: somebody has frozen this guest, and it was left so: by a backup"
        ),
        ThawFailed(domain=None, domain_uuid=UUID, error="no answer"): (
            f"{UUID}: may be frozen, and could not be thawed: no answer"
        ),
    }
    assert {event: describe_event(event) for event in told} == told


def test_a_delete_says_why_it_went() -> None:
    event = SnapshotDeleted(pair=PAIR, snapshot="s1", reasons=("last=2 used up",), duration_seconds=0.26)
    assert describe_event(event) == "web1: deleted s1 (last=2 used up; 0.3 s)"


def test_of_hooks_only_failures_are_told_and_of_the_rest_nothing() -> None:
    hook = {"pair": PAIR, "hook": "before", "output": "", "duration_seconds": 0.1}
    assert describe_event(HookFinished(ok=True, detail="ok", **hook)) is None  # type: ignore[arg-type]
    failed = HookFinished(ok=False, detail="exit code 3", **hook)  # type: ignore[arg-type]
    assert describe_event(failed) == "web1: the hook `before` failed: exit code 3"
    assert describe_event(RunStarted(pair=PAIR, started_at=NOW)) is None
