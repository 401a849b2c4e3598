"""Names and descriptions in examples; what holds for all of them is in tests/properties."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvmsnapd.errors import InvalidValueError
from kvmsnapd.model import Consistency, Deleting, Hold, Kind, Mark, Unchanged
from kvmsnapd.naming import check_policy_name, format_description, format_name, is_newer, parse_mark, parse_name
from tests.builders import NOW, at

ROOT = Path(__file__).parents[2]
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


def test_disks_left_out_and_a_later_slot_are_written_and_read_back() -> None:
    seen = Unchanged(at("2026-11-23T09:00"), at("2026-11-23T09:00:07"))
    mark = replace(MARK, excluded=("vdb", "sdc"), unchanged=seen)
    fields = json.loads(format_description(mark))
    assert fields["excluded"] == ["vdb", "sdc"]
    assert fields["unchanged"] == {"scheduled": "2026-11-23T09:00:00Z", "seen": "2026-11-23T09:00:07Z"}
    assert parse_mark(NAME, format_description(mark)) == mark


@pytest.mark.parametrize("failed_in", [None, 0, 7])
def test_a_delete_that_was_begun_is_written_and_read_back(failed_in: int | None) -> None:
    mark = replace(MARK, deleting=Deleting(at("2026-11-23T09:00:07"), failed_in))
    fields = json.loads(format_description(mark))
    assert fields["deleting"] == {"begun": "2026-11-23T09:00:07Z"} | (
        {} if failed_in is None else {"failed_in": failed_in}
    )
    assert parse_mark(NAME, format_description(mark)) == mark


def test_what_is_owed_is_written_and_read_back_and_left_out_where_it_is_nothing() -> None:
    owing = replace(MARK, owed=12)
    assert json.loads(format_description(owing))["owed"] == 12
    assert parse_mark(NAME, format_description(owing)) == owing
    assert "owed" not in json.loads(format_description(MARK))


@pytest.mark.parametrize(
    "fields",
    [
        {"deleting": {"failed_in": 7}},
        {"deleting": {"begun": "2026-11-23T09:00:07"}},
        {"deleting": {"begun": "soon"}},
        {"deleting": "2026-11-23T09:00:07Z"},
        {"deleting": True},
        {"owed": "some"},
        {"owed": None},
        {"owed": [1]},
        {"owed": 1e999},
    ],
    ids=str,
)
def test_a_note_or_debts_that_cannot_be_read_make_it_foreign(fields: dict[str, object]) -> None:
    assert parse_mark(NAME, json.dumps(json.loads(format_description(MARK)) | fields)) is None


def test_a_description_that_was_written_before_there_was_any_of_this_has_none_of_it() -> None:
    older = (
        '{"kvmsnapd": 1, "policy": "standard", "scheduled": "2026-11-22T09:00:00Z", '
        '"taken": "2026-11-22T09:00:03Z", "consistency": "crash", "kind": "external"}'
    )
    assert parse_mark(NAME, older) == MARK


@pytest.mark.parametrize(
    "unchanged",
    [7, "2026-11-23T09:00:00Z", ["a"], {"scheduled": "2026-11-23T09:00:00Z"}, {"scheduled": "soon", "seen": "soon"}],
)
def test_a_later_slot_that_cannot_be_read_makes_it_foreign(unchanged: object) -> None:
    fields = json.loads(format_description(MARK)) | {"unchanged": unchanged}
    assert parse_mark(NAME, json.dumps(fields)) is None


def test_a_later_slot_without_a_time_zone_makes_it_foreign() -> None:
    seen = {"scheduled": "2026-11-23T09:00:00", "seen": "2026-11-23T09:00:07Z"}
    assert parse_mark(NAME, json.dumps(json.loads(format_description(MARK)) | {"unchanged": seen})) is None


def test_a_snapshot_is_good_until_it_was_last_seen_unchanged() -> None:
    seen = replace(MARK, unchanged=Unchanged(at("2026-11-22T10:00"), at("2026-11-22T10:00:07")))
    assert MARK.good_at(NOW) == at("2026-11-22T09:00:03")
    assert seen.good_at(NOW) == at("2026-11-22T10:00:07")
    assert seen.slots == (at("2026-11-22T09:00"), at("2026-11-22T10:00"))


def test_what_was_seen_in_the_future_or_before_it_was_taken_is_not_believed() -> None:
    for seen_at in (at("2031-01-01T00:00"), at("2026-11-21T00:00")):
        mark = replace(MARK, unchanged=Unchanged(at("2026-11-22T10:00"), seen_at))
        assert mark.good_at(NOW) == at("2026-11-22T09:00:03")


def test_our_name_without_our_description_is_foreign() -> None:
    assert parse_mark(NAME, "") is None
    assert parse_mark(NAME, "made by hand") is None


def test_our_description_under_another_name_is_foreign() -> None:
    assert parse_mark("before-upgrade", format_description(MARK)) is None


@pytest.mark.parametrize("fields", [{"kvmsnapd": 2}, {"kvmsnapd": 2, "policy": 7}, {"needed_by": "somebody"}], ids=str)
def test_what_a_newer_one_wrote_is_foreign_and_known_to_be_newer(fields: dict[str, object]) -> None:
    newer = json.dumps(json.loads(format_description(MARK)) | fields)
    assert parse_mark(NAME, newer) is None
    assert is_newer(NAME, newer)
    assert not is_newer("before-upgrade", newer)


@pytest.mark.parametrize("text", ["", "made by hand", "[]", "{}", '{"kvmsnapd": "x"}', format_description(MARK)])
def test_what_a_person_or_this_one_wrote_is_not_newer(text: str) -> None:
    assert not is_newer(NAME, text)


OLDER = (ROOT / "tests/samples/descriptions.txt").read_text().splitlines()
"""Name and description of snapshots as every version so far has written them. Lines are only ever added."""


@pytest.mark.parametrize("line", OLDER, ids=lambda line: line.split("\t")[0])
def test_what_every_older_version_wrote_is_understood_and_kept_whole(line: str) -> None:
    _, name, description = line.split("\t")
    mark = parse_mark(name, description)
    assert mark is not None
    assert json.loads(format_description(mark)) == json.loads(description)


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
