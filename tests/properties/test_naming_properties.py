"""Names and descriptions: what is written is read back, and nothing else is taken for ours."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from kvmsnapd.model import Consistency, Deleting, Drill, Hold, Kind, Mark, Restoring, Unchanged
from kvmsnapd.naming import POLICY_NAME_PATTERN, format_description, format_name, parse_mark, parse_name

policies = st.from_regex(POLICY_NAME_PATTERN, fullmatch=True).map(lambda name: name.rstrip("\n"))
instants = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).map(lambda at: at.replace(microsecond=0, tzinfo=UTC))
attempts = st.integers(1, 99)
marks = st.builds(
    Mark,
    policy=policies,
    scheduled_at=instants,
    taken_at=instants,
    consistency=st.sampled_from(Consistency),
    kind=st.sampled_from([Kind.EXTERNAL, Kind.INTERNAL]),
    attempt=attempts,
    hold=st.one_of(st.none(), st.builds(Hold, reason=st.text(), until=st.one_of(st.none(), instants))),
    excluded=st.lists(st.text(), max_size=3).map(tuple),
    unchanged=st.one_of(st.none(), st.builds(Unchanged, instants, instants)),
    deleting=st.one_of(st.none(), st.builds(Deleting, instants, st.one_of(st.none(), st.integers(0)))),
    owed=st.integers(0, 10_000),
    standalone=st.booleans(),
    linked=st.lists(st.text(), max_size=3).map(tuple),
    restoring=st.one_of(
        st.none(), st.builds(Restoring, instants, st.lists(st.text(), max_size=3).map(tuple), st.booleans())
    ),
    drill=st.one_of(
        st.none(), st.builds(Drill, instants, st.one_of(st.none(), st.text()), st.one_of(st.none(), instants))
    ),
)


@given(policies, instants, attempts)
def test_a_name_is_read_back_as_it_was_written(policy: str, slot: datetime, attempt: int) -> None:
    name = format_name(policy, slot, attempt)
    assert parse_name(name) == (policy, slot, attempt)
    assert len(name) <= 64


@given(policies, instants, attempts)
def test_names_hold_only_characters_every_libvirt_accepts(policy: str, slot: datetime, attempt: int) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    assert set(format_name(policy, slot, attempt)) <= allowed


@given(st.one_of(st.text(), st.from_regex(r"kvmsnapd-[a-z0-9.-]{1,40}-[0-9]{8}T[0-9]{6}Z(-[0-9]{1,3})?")))
def test_what_parses_is_exactly_what_we_would_write(name: str) -> None:
    parsed = parse_name(name)
    assert parsed is None or format_name(*parsed) == name


@given(marks)
def test_a_mark_is_read_back_from_name_and_description(mark: Mark) -> None:
    description = format_description(mark)
    assert "\n" not in description
    assert parse_mark(format_name(mark.policy, mark.scheduled_at, mark.attempt), description) == mark


@given(marks, policies)
def test_a_description_of_another_policy_is_foreign(mark: Mark, other: str) -> None:
    name = format_name(other, mark.scheduled_at, mark.attempt)
    parsed = parse_mark(name, format_description(mark))
    assert (parsed is not None) == (other == mark.policy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(marks, st.one_of(st.text(), json_values.map(json.dumps)))
def test_any_other_description_is_foreign_and_never_an_error(mark: Mark, description: str) -> None:
    name = format_name(mark.policy, mark.scheduled_at, mark.attempt)
    assert parse_mark(name, description) is None


KEYS = ["kvmsnapd", "policy", "scheduled", "taken", "consistency", "kind", "hold", "excluded", "unchanged"]
KEYS += ["deleting", "owed", "standalone", "linked", "restoring", "drill"]


@given(marks, st.sampled_from(KEYS), json_values)
def test_a_damaged_description_is_foreign_or_unchanged_in_meaning(mark: Mark, key: str, value: object) -> None:
    fields = json.loads(format_description(mark)) | {key: value}
    name = format_name(mark.policy, mark.scheduled_at, mark.attempt)
    parsed = parse_mark(name, json.dumps(fields))
    assert parsed is None or (parsed.policy, parsed.scheduled_at) == (mark.policy, mark.scheduled_at)


def test_a_newer_format_is_foreign() -> None:
    mark = Mark(
        "p", datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC), Consistency.CRASH, Kind.EXTERNAL
    )
    description = format_description(mark).replace('"kvmsnapd": 1', '"kvmsnapd": 2')
    assert parse_mark(format_name("p", mark.scheduled_at), description) is None
