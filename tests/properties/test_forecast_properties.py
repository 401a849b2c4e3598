"""The forecast against its plain statement: every slot taken, and retention's verdicts carried out, one by one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmsnapd.forecast import Release, forecast, release_dates
from kvmsnapd.model import Hold
from kvmsnapd.plan import due_for, own_points
from kvmsnapd.retention import Point, plan_retention
from tests.builders import NOW, a_policy, a_snapshot, an_inventory, at

if TYPE_CHECKING:
    from kvmsnapd.model import Inventory
    from kvmsnapd.policy import Policy

SCHEDULES = st.sampled_from(["hourly", "daily", "every 5h", "30 6 * * 1,4", "weekly", "15 */7 * * *"])
ZONES = st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata", "America/St_Johns"])
SPAN = timedelta(days=45)


@st.composite
def rules(draw: st.DrawFn) -> str:
    """Return keep rules whose releases mostly lie within the span."""
    counts = st.sampled_from(["1", "2", "3", "7", "all"])
    names = draw(st.sets(st.sampled_from(["last", "hourly", "daily", "weekly", "monthly", "within"]), min_size=1))
    words = {"within": st.sampled_from(["5h", "3d", "10d"])}
    return " ".join(f"{name}={draw(words.get(name, counts))}" for name in sorted(names))


@st.composite
def histories(draw: st.DrawFn) -> Inventory:
    """Return a domain with snapshots, some of them held, or of slots that the schedule does not have."""
    hours = draw(st.lists(st.integers(-24 * 40, 24 * 3), unique=True, max_size=12))
    slots = [NOW.replace(minute=7) + timedelta(hours=h) for h in hours]  # a slot that is done would have no run
    holds = (
        st.none()
        | st.just(Hold("why"))
        | st.integers(-24, 24 * 30).map(lambda h: Hold("why", NOW + timedelta(hours=h)))
    )
    return an_inventory(*(a_snapshot(slot, hold=draw(holds)) for slot in slots))


def walked(inventory: Inventory, policy: Policy) -> dict[str, datetime | None]:
    """Return the slot of the run that deletes each snapshot, None for one that is left at the end of the span."""
    due = due_for(inventory, policy, NOW).slot
    coming = [*([due] if due else []), *takewhile(lambda s: s < NOW + SPAN, policy.schedule.slots_after(NOW))]
    gone: dict[str, datetime | None] = {}
    taken: list[Point] = []
    for slot in coming:
        now = max(NOW, slot)
        taken.insert(0, Point("", slot))
        left = [point for point in own_points(inventory, policy, now=now) if point.name not in gone]
        verdicts = plan_retention([*taken, *left], policy.keep, timezone=policy.timezone, now=now)
        gone.update({v.point.name: slot for v in verdicts if not v.keep and v.point.name})
        taken = [v.point for v in verdicts if v.keep and not v.point.name]
    return {point.name: gone.get(point.name) for point in own_points(inventory, policy, now=NOW)}


@settings(max_examples=150, deadline=None)
@given(inventory=histories(), schedule=SCHEDULES, keep=rules(), timezone=ZONES)
def test_each_release_is_that_of_the_run_which_deletes_it(
    inventory: Inventory, schedule: str, keep: str, timezone: str
) -> None:
    policy = a_policy(schedule=schedule, keep=keep, timezone=timezone)
    found = release_dates(inventory, policy, now=NOW)
    expected = walked(inventory, policy)
    assert found.keys() == expected.keys()
    for name, slot in expected.items():
        if slot is None:
            assert found[name].at is None or found[name].at >= NOW + SPAN, name
        else:
            assert found[name] == Release(max(NOW, slot)), name


@settings(max_examples=50, deadline=None)
@given(schedule=SCHEDULES, keep=rules(), timezone=ZONES, step=st.integers(1, 20), start=st.integers(0, 20000))
def test_longer_spans_end_as_single_slots_would(schedule: str, keep: str, timezone: str, step: int, start: int) -> None:
    policy = a_policy(schedule=schedule, keep=keep, timezone=timezone)
    begin = at("2026-01-01T00:00") + timedelta(hours=start)
    *_, last = forecast(policy, start=begin, days=40, step=step)
    points: list[Point] = []
    midnight = datetime.combine(last.last + timedelta(days=1), datetime.min.time(), policy.timezone).astimezone(UTC)
    for slot in takewhile(lambda s: s < midnight, policy.schedule.slots_after(begin)):
        verdicts = plan_retention([Point("", slot), *points], policy.keep, timezone=policy.timezone, now=slot)
        points = [verdict.point for verdict in verdicts if verdict.keep]
    assert last.slots == tuple(point.at for point in points)
