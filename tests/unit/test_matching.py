"""Which domain gets which policies."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.errors import InvalidValueError
from kvmsnapd.matching import Assignment, Coverage, assign, check_selector, fits, is_pattern, missing_domains, weight
from tests.builders import OTHER_UUID, UUID, a_policy, an_inventory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmsnapd.policy import Policy

HOURLY, DAILY = a_policy("hourly"), a_policy("daily", schedule="daily")


def assign_one(
    selectors: Mapping[str, tuple[Policy, ...]], *, name: str = "web-1", uuid: str = UUID
) -> tuple[Coverage, list[str], tuple[str, ...]]:
    """Return how one domain is covered, the names of its policies, and the patterns that decided."""
    (found,) = assign(selectors, [an_inventory(name=name, uuid=uuid)])
    return found.coverage, [policy.name for policy in found.policies], found.patterns


def test_a_domain_is_matched_by_its_name() -> None:
    assert assign_one({"web-1": (HOURLY,)}) == (Coverage.PROTECTED, ["hourly"], ("web-1",))


def test_a_domain_is_matched_by_its_uuid() -> None:
    assert assign_one({UUID: (HOURLY,)}) == (Coverage.PROTECTED, ["hourly"], (UUID,))


def test_a_domain_gets_all_policies_of_its_entry_in_their_order() -> None:
    assert assign_one({"web-1": (DAILY, HOURLY)})[1] == ["daily", "hourly"]


def test_a_name_beats_every_pattern() -> None:
    selectors = {"web-?": (HOURLY,), "web-1": (DAILY,), "*": (HOURLY,)}
    assert assign_one(selectors) == (Coverage.PROTECTED, ["daily"], ("web-1",))


def test_a_uuid_beats_every_pattern() -> None:
    assert assign_one({"web-*": (HOURLY,), UUID: (DAILY,)})[1] == ["daily"]


def test_a_name_and_a_uuid_that_disagree_are_ambiguous() -> None:
    assert assign_one({UUID: (HOURLY,), "web-1": (DAILY,)})[:2] == (Coverage.AMBIGUOUS, [])
    assert assign_one({UUID: (DAILY,), "web-1": (DAILY,)})[1] == ["daily"]


def test_of_patterns_the_most_specific_wins() -> None:
    selectors = {"*": (HOURLY,), "web-*": (DAILY,), "w*": (HOURLY,)}
    assert assign_one(selectors) == (Coverage.PROTECTED, ["daily"], ("web-*",))


def test_only_that_entry_counts_and_others_are_not_merged() -> None:
    assert assign_one({"web-*": (HOURLY,), "*": (DAILY,)})[1] == ["hourly"]


def test_two_equally_specific_patterns_that_disagree_leave_the_domain_ambiguous() -> None:
    selectors = {"web-*": (HOURLY,), "*eb-1": (DAILY,), "*": (HOURLY,)}
    assert assign_one(selectors) == (Coverage.AMBIGUOUS, [], ("*eb-1", "web-*"))


def test_two_equally_specific_patterns_that_agree_are_fine() -> None:
    assert assign_one({"web-*": (HOURLY,), "*eb-1": (HOURLY,)})[:2] == (Coverage.PROTECTED, ["hourly"])


def test_a_pattern_for_nothing_on_purpose_disagrees_with_a_policy() -> None:
    assert assign_one({"web-*": (), "*eb-1": (HOURLY,)})[0] is Coverage.AMBIGUOUS


def test_less_specific_patterns_that_disagree_do_not_matter() -> None:
    assert assign_one({"web-1*": (HOURLY,), "web-*": (HOURLY,), "*eb-1": (DAILY,)})[1] == ["hourly"]


def test_an_empty_list_is_unprotected_on_purpose() -> None:
    assert assign_one({"web-*": ()}) == (Coverage.UNPROTECTED_ON_PURPOSE, [], ("web-*",))


def test_an_empty_list_for_a_name_takes_it_out_of_a_pattern() -> None:
    assert assign_one({"web-*": (HOURLY,), "web-1": ()})[0] is Coverage.UNPROTECTED_ON_PURPOSE


def test_a_domain_that_fits_nothing_is_unmatched() -> None:
    assert assign_one({"db*": (HOURLY,)}) == (Coverage.UNMATCHED, [], ())


def test_patterns_mind_capitals() -> None:
    assert assign_one({"WEB-*": (HOURLY,)})[0] is Coverage.UNMATCHED


def test_a_pattern_does_not_match_uuids() -> None:
    assert assign_one({"1111*": (HOURLY,)})[0] is Coverage.UNMATCHED


def test_a_class_matches_one_of_its_characters() -> None:
    assert assign_one({"web-[12]": (HOURLY,)})[0] is Coverage.PROTECTED
    assert assign_one({"web-[!12]": (HOURLY,)})[0] is Coverage.UNMATCHED


def test_a_domain_whose_name_looks_like_a_pattern_is_matched_by_that_name() -> None:
    assert assign_one({"vm[1]": (HOURLY,)}, name="vm[1]")[0] is Coverage.PROTECTED


def test_assignments_come_in_the_order_of_the_domains() -> None:
    domains = [an_inventory(name="b"), an_inventory(name="a", uuid=OTHER_UUID)]
    assert assign({"a": (HOURLY,)}, domains) == (
        Assignment(UUID, "b", Coverage.UNMATCHED),
        Assignment(OTHER_UUID, "a", Coverage.PROTECTED, (HOURLY,), ("a",)),
    )


@pytest.mark.parametrize(
    ("pattern", "fixed"),
    [
        ("*", (0, 0)),
        ("web-*", (4, 4)),
        ("web-?", (4, 5)),
        ("web-[0-9]", (4, 5)),
        ("web-[!0-9]x", (5, 6)),
        ("web-[]x]", (4, 5)),  # a bracket that comes first belongs to the class
        ("/.*/", (0, 0)),
        ("/web-[0-9]+/", (4, 5)),
        (r"/web-\d{2}/", (4, 6)),
        ("/(web|db)-[0-9]+/", (3, 4)),
        ("/(web-)?x/", (1, 1)),
        ("/web-(a|b)/", (4, 5)),
        ("/a{3}/", (3, 3)),
        (r"/db\.example\.org/", (14, 14)),
    ],
)
def test_a_pattern_is_as_specific_as_what_it_fixes_of_a_name(pattern: str, fixed: tuple[int, int]) -> None:
    assert weight(pattern) == fixed


@pytest.mark.parametrize(
    ("pattern", "name", "fit"),
    [
        ("/web-[0-9]+/", "web-12", True),
        ("/web-[0-9]+/", "web-12a", False),
        ("/web-[0-9]+/", "old-web-12", False),
        ("/^web$/", "web", True),
        ("/(web|db)-1/", "db-1", True),
        ("/(?i)WEB/", "web", True),
    ],
)
def test_a_regular_expression_fits_whole_names(pattern: str, name: str, fit: bool) -> None:
    assert fits(pattern, name) is fit


@pytest.mark.parametrize("selector", ["db01", UUID, "web-*", "/web-[0-9]+/", "/(a|b)?c{1,3}/", "a b", "ü"])
def test_what_can_select_domains_is_accepted_as_it_is(selector: str) -> None:
    assert check_selector(selector) == selector


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("", "write the name"),
        ("/web", "begins and ends with one"),
        ("a/b", "begins and ends with one"),
        ("/", "begins and ends with one"),
        ("//", "begins and ends with one"),
        ("/[/", "no regular expression"),
        ("/[[a]/", "no regular expression: [[ ]"),
        ("/[a--b]/", "no regular expression: [[ ]"),
        ("web-[", "bracket that is not closed"),
        ("/(a+)+/", "may be repeated"),
        ("/(a|aa)*/", "may be repeated"),
        ("/.*a.*b.*c.*d/", "too long to match"),
        ("/" + "(a|b|aa)" * 18 + "x/", "too long to match"),
        (r"/(a)\1/", "not understood here"),
        ("/a(?=b)/", "not understood here"),
        ("/" + "(" * 5000 + ")" * 5000 + "/", "up to 255 characters"),
    ],
)
def test_a_selector_that_fits_nothing_or_may_match_for_ever_is_refused(selector: str, words: str) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(words)):
        check_selector(selector)


def test_the_slowest_expression_that_is_accepted_is_fast_enough_on_the_longest_name() -> None:
    for pattern in ("/.*a.*a.*b/", "/" + "([^b]|[^c]|[^d])" * 14 + "x/", "/(.*|.+)a.*b/"):
        started = time.process_time()
        assert not fits(check_selector(pattern), "a" * 255)
        assert time.process_time() - started < 30  # half a second here; without the limit it would not end


def test_entries_that_name_the_same_policies_in_another_order_agree() -> None:
    assert assign_one({"web-*": (HOURLY, DAILY), "*eb-1": (DAILY, HOURLY)})[0] is Coverage.PROTECTED


def test_a_regular_expression_is_more_specific_than_a_glob_that_fixes_less() -> None:
    assert assign_one({"web-*": (HOURLY,), "/web-[0-9]+/": (DAILY,)})[1] == ["daily"]
    assert assign_one({"web-1*": (HOURLY,), "/web-[0-9]+/": (DAILY,)})[1] == ["hourly"]
    assert assign_one({"*": (HOURLY,), "/.*/": (DAILY,)})[0] is Coverage.AMBIGUOUS


@pytest.mark.parametrize(
    ("selector", "pattern"), [("web-1", False), ("web-*", True), ("web?", True), ("[ab]", True), ("/web/", True)]
)
def test_a_selector_with_a_glob_character_is_a_pattern(selector: str, pattern: bool) -> None:
    assert is_pattern(selector) is pattern


def test_a_name_that_no_domain_has_is_missing() -> None:
    selectors = ["web-1", "db01", "old-*", UUID, OTHER_UUID]
    assert missing_domains(selectors, [an_inventory(name="web-1")]) == ("db01", OTHER_UUID)


def test_splay_is_the_policys_and_the_domains_own() -> None:
    policy = a_policy(splay="5m")
    assert policy.splay_of(UUID) == policy.splay_of(UUID) != policy.splay_of(OTHER_UUID)
