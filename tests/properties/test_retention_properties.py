"""What retention promises for every history and every set of rules."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from kvmsnapd.retention import ALL, KeepRules, Point, parse_keep, plan_retention

ZONES = [ZoneInfo(name) for name in ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe")]
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)

counts = st.one_of(st.just(0), st.integers(1, 6), st.just(ALL))
rules = (
    st.fixed_dictionaries(
        dict.fromkeys(("last", "hourly", "daily", "weekly", "monthly", "yearly"), counts)
        | {"within": st.one_of(st.just(timedelta(0)), st.integers(1, 400).map(lambda hours: timedelta(hours=hours)))}
    )
    .filter(lambda given: any(given.values()))
    .map(lambda given: KeepRules(**given))
)
# Dense enough that several points share an hour, a day and a week, and wide enough for years.
ages = st.one_of(st.integers(-7200, 400_000), st.integers(0, 3 * 366 * 86400))
histories = st.lists(ages, max_size=40).map(
    lambda seconds: [Point(f"p{i}", NOW - timedelta(seconds=age)) for i, age in enumerate(seconds)]
)
zones = st.sampled_from(ZONES)


def kept(points: list[Point], keep: KeepRules, zone: ZoneInfo, now: datetime = NOW) -> set[str]:
    return {v.point.name for v in plan_retention(points, keep, timezone=zone, now=now) if v.keep}


@given(histories, rules, zones)
def test_every_point_gets_one_verdict_with_reasons_newest_first(
    points: list[Point], keep: KeepRules, zone: ZoneInfo
) -> None:
    verdicts = plan_retention(points, keep, timezone=zone, now=NOW)
    assert sorted(v.point.name for v in verdicts) == sorted(p.name for p in points)
    assert [v.point.at for v in verdicts] == sorted((p.at for p in points), reverse=True)
    assert all(v.reasons for v in verdicts)


def reference(points: list[Point], keep: KeepRules, zone: ZoneInfo) -> set[str]:
    """Say the rule once more, as plainly and slowly as possible: groups by period, then newest of each."""
    order = sorted((p for p in points if p.at <= NOW), key=lambda p: p.at, reverse=True)
    survivors = {p.name for p in points if p.at > NOW} | {p.name for p in order[: keep.last]}
    formats = {"hourly": "%Y-%m-%d %H %z", "daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m", "yearly": "%Y"}
    for rule, pattern in formats.items():
        count = getattr(keep, rule)
        periods = defaultdict(list)
        for point in order:
            periods[point.at.astimezone(zone).strftime(pattern)].append(point)
        survivors |= {group[0].name for group in list(periods.values())[:count]}
        if order and count > len(periods):
            survivors.add(order[-1].name)
    if order and keep.within:
        survivors |= {p.name for p in order if p.at > order[0].at - keep.within}
    return survivors


@given(histories, rules, zones)
def test_verdicts_equal_a_second_statement_of_the_rule(points: list[Point], keep: KeepRules, zone: ZoneInfo) -> None:
    assert kept(points, keep, zone) == reference(points, keep, zone)


@given(histories, rules, zones, st.randoms())
def test_input_order_is_irrelevant(points: list[Point], keep: KeepRules, zone: ZoneInfo, random: object) -> None:
    unique = list({p.at: p for p in points}.values())  # of equal instants the order decides, by promise
    shuffled = unique[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert kept(unique, keep, zone) == kept(shuffled, keep, zone)


@given(histories, rules, zones)
def test_planning_the_survivors_again_deletes_nothing_the_rules_still_count(
    points: list[Point], keep: KeepRules, zone: ZoneInfo
) -> None:
    """All but claims to the oldest are stable: once it is gone a rule may have its claim for a younger one."""
    survivors = [p for p in points if p.name in kept(points, keep, zone)]
    assert kept(survivors, keep, zone) == {p.name for p in survivors}


@given(histories, rules, zones)
def test_the_newest_point_is_never_deleted(points: list[Point], keep: KeepRules, zone: ZoneInfo) -> None:
    past = [p for p in points if p.at <= NOW]
    if past:
        assert max(past, key=lambda p: p.at).at in {p.at for p in points if p.name in kept(points, keep, zone)}


@given(histories, rules, zones)
def test_future_points_stay_and_change_no_other_verdict(points: list[Point], keep: KeepRules, zone: ZoneInfo) -> None:
    future = [Point(f"f{i}", NOW + timedelta(hours=i + 1)) for i in range(3)]
    assert kept(points + future, keep, zone) == kept(points, keep, zone) | {p.name for p in future}


@given(histories, rules, zones, st.data())
def test_held_points_stay_and_are_counted_by_no_rule(
    points: list[Point], keep: KeepRules, zone: ZoneInfo, data: st.DataObject
) -> None:
    names = data.draw(st.sets(st.sampled_from([p.name for p in points]))) if points else set()
    held = [replace(p, held="before the upgrade") if p.name in names else p for p in points]
    rest = [p for p in points if p.name not in names]
    assert kept(held, keep, zone) == kept(rest, keep, zone) | names


@given(histories, rules, zones, st.sampled_from(["last", "hourly", "daily", "weekly", "monthly", "yearly"]))
def test_raising_a_count_never_deletes_more_of_what_counts_claim(
    points: list[Point], keep: KeepRules, zone: ZoneInfo, rule: str
) -> None:
    before = getattr(keep, rule)
    raised = replace(keep, **{rule: ALL if before == ALL else before + 1})
    assert kept(points, keep, zone) <= kept(points, raised, zone)


@given(histories, rules, zones)
def test_no_more_survive_than_the_rules_can_claim(points: list[Point], keep: KeepRules, zone: ZoneInfo) -> None:
    past = [p for p in points if p.at <= NOW]
    most = replace(keep, within=timedelta(0)).most(timedelta(hours=1)) if any(c for _, c in keep.counts()) else None
    if most is not None and not keep.within:
        assert len(kept(past, keep, zone)) <= max(most, 0)


@given(histories, rules, zones, st.integers(0, 10**9))
def test_nothing_expires_while_no_snapshots_are_taken(
    points: list[Point], keep: KeepRules, zone: ZoneInfo, seconds: int
) -> None:
    past = [p for p in points if p.at <= NOW]
    assert kept(past, keep, zone) == kept(past, keep, zone, now=NOW + timedelta(seconds=seconds))


@given(rules)
def test_rules_read_back_as_they_are_written(keep: KeepRules) -> None:
    assert parse_keep(str(keep)) == keep
