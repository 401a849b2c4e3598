"""How a pair stands: what is wrong with it, and since when, from what libvirt lists and what the last runs found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import TYPE_CHECKING

from kvmsnapd.fleet import is_below
from kvmsnapd.model import Kind
from kvmsnapd.prune import BlockReason
from kvmsnapd.tally import PairTally

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from kvmsnapd.fleet import Pair
    from kvmsnapd.model import Inventory
    from kvmsnapd.refusal import Refusal


class State(StrEnum):
    """The age of the newest good snapshot in one word."""

    NEVER = "never"
    OVERDUE = "overdue"
    DUE = "due"
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong; ``what`` is a word for programs. ``since`` is None where nobody can tell."""

    what: str
    text: str
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """One pair, and all that is wrong with it, the worst first."""

    pair: Pair
    state: State
    troubles: tuple[Trouble, ...]


def stand(
    pair: Pair,
    inventory: Inventory,
    *,
    now: datetime,
    found: PairTally | None = None,
    refusal: Refusal | None = None,
) -> Standing:
    """Return how a pair stands.

    Args:
        pair: the pair.
        inventory: its domain.
        now: the present instant.
        found: what the daemon's last runs found, where that is known.
        refusal: why the next run would take nothing, if it were to begin now.
    """
    troubles = (
        *_of_age(pair, now),
        *_of_runs(pair, found or PairTally(), refusal),
        *_of_snapshots(pair, inventory, now),
        *_of_domain(inventory),
    )
    return Standing(pair, _state(pair, now), troubles)


def worst_first(standings: Iterable[Standing], *, now: datetime) -> list[Standing]:
    """Sort: what is over its limit, by how far; then what has troubles; then the rest, by age as share of the limit."""

    def rank(standing: Standing) -> tuple[int, float, str, str]:
        pair, age = standing.pair, standing.pair.age(now)
        share = age / pair.policy.max_age if age is not None else float("inf")
        group = 0 if share > 1 else 1 if standing.troubles else 2
        return group, -share, pair.name.domain, pair.name.policy

    return sorted(standings, key=rank)


def _state(pair: Pair, now: datetime) -> State:
    age = pair.age(now)
    if age is None:
        return State.NEVER
    if age > pair.policy.max_age:
        return State.OVERDUE
    return State.DUE if pair.due.slot else State.OK


def _of_age(pair: Pair, now: datetime) -> Iterator[Trouble]:
    if pair.last_success_at is None:
        yield Trouble("never", "no good snapshot exists")
    elif pair.last_success_at + pair.policy.max_age < now:
        yield Trouble("overdue", "older than its limit", pair.last_success_at + pair.policy.max_age)
    if pair.due.missed:
        yield Trouble("missed", "its last slot was missed, and catch_up is skip", pair.due.missed)


def _of_runs(pair: Pair, found: PairTally, refusal: Refusal | None) -> Iterator[Trouble]:
    failures = found.failures
    if failures and pair.last_success_at and pair.last_success_at > failures.last_at:
        failures = None  # somebody took one since
    same = failures is not None and refusal is not None and failures.reason == refusal.reason
    if failures:
        detail = f"{failures.reason}: {refusal.detail}" if same and refusal else failures.reason
        yield Trouble("failing", f"{failures.count} run(s) in a row took nothing: {detail}", failures.first_at)
    if refusal and not same:
        yield Trouble("refused", f"the next run would take nothing: {refusal.reason}: {refusal.detail}")
    if found.quarantine and not (failures and failures.reason == found.quarantine):
        yield Trouble("quarantined", f"left alone until a person has changed something: {found.quarantine}")
    for reason, count in found.blocked.items():
        advice = f"; `kvmsnapd prune {pair.name.domain}` shows them and asks" if reason == BlockReason.FUSE else ""
        yield Trouble("waiting", f"{count} released snapshot(s) wait: {reason}{advice}")


def _of_snapshots(pair: Pair, inventory: Inventory, now: datetime) -> Iterator[Trouble]:
    good = [s.mark for s in pair.snapshots if s.mark and max(s.mark.scheduled_at, s.mark.taken_at) <= now]
    if pair.below_consistency:
        below = list(takewhile(lambda mark: is_below(mark.consistency, pair.policy), good))
        text = f"the newest is {below[0].consistency} only, and the policy asks for {pair.policy.consistency}"
        yield Trouble("consistency", text, below[-1].taken_at)
    ahead = len(pair.snapshots) - len(good)
    if ahead:
        yield Trouble("future", f"{ahead} snapshot(s) dated in the future, which count for nothing: a clock was wrong")
    half = [s.mark.deleting.begun_at for s in inventory.half_deleted(pair.name.policy) if s.mark and s.mark.deleting]
    if half:
        yield Trouble("half_deleted", f"{len(half)} half deleted snapshot(s): no way back", min(half))
    drills = [mark.drill for mark in good if mark.drill]
    drill = max(drills, key=lambda drill: drill.ended_at, default=None)
    if drill and drill.failure is not None:
        yield Trouble("drill", f"the last restore drill failed: {drill.failure}", drill.ended_at)


def _of_domain(inventory: Inventory) -> Iterator[Trouble]:
    for snapshot in inventory.snapshots:
        if snapshot.mark and snapshot.mark.restoring:
            advice = f"`kvmsnapd restore {inventory.name} {snapshot.name}` finishes it"
            text = f"a restore to {snapshot.name} was interrupted; {advice}"
            yield Trouble("restoring", text, snapshot.mark.restoring.begun_at)
    kinds = {s.kind for s in inventory.snapshots}
    if Kind.MIXED in kinds or len(kinds) > 1:
        mixed = next(
            s for s in inventory.snapshots if s.kind is not inventory.snapshots[0].kind or s.kind is Kind.MIXED
        )
        text = "internal and external snapshots are mixed, on which libvirt loses data; `kvmsnapd doctor` says more"
        yield Trouble("mixed", text, mixed.created_at)
