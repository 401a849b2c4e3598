"""Names and descriptions in examples; what holds for all of them is in tests/properties."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvmsnapd.errors import InvalidValueError
from kvmsnapd.model import Consistency, Hold, Kind, Mark
from kvmsnapd.naming import check_policy_name, format_description, format_name, parse_mark, parse_name
from tests.builders import NOW, at

MARK = Mark("standard", at("2026-11-22T09:00"), at("2026-11-22T09:00:03"), Consistency.CRASH, Kind.EXTERNAL)
NAME = "kvmsnapd-standard-20261122T090000Z"


def test_a_name_tells_policy_and_slot() -> None:
    assert format_name("standard", at("2026-11-22T10:00+01:00")) == NAME


def test_a_second_attempt_has_a_name_of_its_own() -> None:
    assert format_name("standard", at("2026-11-22T09:00"), 2) == f"{NAME}-2"
    assert parse_name(f"{NAME}-2") == ("standard", at("2026-11-22T09:00"), 2)


def test_a_policy_name_may_hold_dashes_and_digits() -> None:
    name = "kvmsnapd-web-2-20250101T000000Z-20261122T090000Z"
    assert parse_name(name) == ("web-2-20250101T000000Z", at("2026-11-22T09:00"), 1)


@pytest.mark.parametrize(
    "name",
    [
        "before-upgrade",
        "kvmsnapd",
        "kvmsnapd--20261122T090000Z",
        "kvmsnapd-standard-20261322T090000Z",
        "kvmsnapd-standard-20261122T090000",
        f"{NAME}-1",
        f"{NAME}-02",
        f"{NAME}-100",
        f"{NAME} ",
        f"{NAME}\n",
        f"x{NAME}",
    ],
)
def test_any_other_name_is_not_ours(name: str) -> None:
    assert parse_name(name) is None


def test_a_description_is_one_line_of_json() -> None:
    assert json.loads(format_description(MARK)) == {
        "kvmsnapd": 1,
        "policy": "standard",
        "scheduled": "2026-11-22T09:00:00Z",
        "taken": "2026-11-22T09:00:03Z",
        "consistency": "crash",
        "kind": "external",
    }


def test_a_hold_is_written_with_reason_and_end() -> None:
    held = replace(MARK, hold=Hold("before\nthe upgrade", at("2026-12-01T00:00")))
    description = format_description(held)
    assert "\n" not in description
    assert json.loads(description)["hold"] == {"reason": "before\nthe upgrade", "until": "2026-12-01T00:00:00Z"}
    assert parse_mark(NAME, description) == held


def test_our_name_without_our_description_is_foreign() -> None:
    assert parse_mark(NAME, "") is None
    assert parse_mark(NAME, "made by hand") is None


def test_our_description_under_another_name_is_foreign() -> None:
    assert parse_mark("before-upgrade", format_description(MARK)) is None


def test_a_description_of_another_slot_is_foreign() -> None:
    other = replace(MARK, scheduled_at=at("2026-11-22T10:00"))
    assert parse_mark(NAME, format_description(other)) is None


def test_a_hold_ends_at_its_end() -> None:
    assert replace(MARK, hold=Hold("why", NOW)).held(NOW) is None
    assert replace(MARK, hold=Hold("why", at("2026-11-23T00:00"))).held(NOW) == "why"
    assert replace(MARK, hold=Hold("why")).held(NOW) == "why"


@pytest.mark.parametrize("name", ["standard", "a", "7", "Web.2_x-y", "a" * 32])
def test_a_short_plain_word_names_a_policy(name: str) -> None:
    assert check_policy_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a:b", "ä", "a" * 33, "a\n"])
def test_anything_else_cannot_name_a_policy(name: str) -> None:
    with pytest.raises(InvalidValueError, match="cannot name a policy: use 1 to 32 letters, digits"):
        check_policy_name(name)
