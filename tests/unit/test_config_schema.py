"""The JSON Schema, as an editor uses it: what is right is accepted, and every error of structure is refused."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from kvmsnapd.config.schema import settings_schema
from kvmsnapd.config.yaml_document import parse_yaml
from kvmsnapd.errors import ConfigError

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests/samples"
RIGHT = [ROOT / "config/kvmsnapd.yaml", *sorted((ROOT / "config/examples").glob("*.yaml"))]
EDITOR = jsonschema.Draft202012Validator(settings_schema())

BEYOND_STRUCTURE = {
    "names that must exist elsewhere in the file": (
        *("emoji_before_the_place", "extends_an_unknown_policy", "extends_an_unknown_policy_that_has_all"),
        *("long_line_of_domains", "marks_without_width_before_the_place", "override_of_an_unknown_policy"),
        *("unknown_policy", "unknown_policy_where_there_is_none", "unknown_policy_without_likeness"),
        *("wide_characters_before_the_place", "windows_line_ends_and_a_problem"),
    ),
    "time zones that the host knows": ("bad_timezone", "timezone_of_a_policy"),
    "times that never come": ("cron_out_of_range", "cron_step_beyond_range", "impossible_cron"),
    "lengths that are too short or too long": ("tick_too_long", "tick_too_short"),
    "keys that contradict each other, or need another": (
        *("base_without_schedule_on_a_domain", "consistency_memory_alone", "contradiction_with_what_it_extends"),
        *("defaults_that_contradict_a_policy", "defaults_that_contradict_themselves"),
        *("internal_with_another_consistency", "internal_with_disks"),
        *("internal_with_memory_live", "internal_with_overlay_directory", "keep_missing", "schedule_missing"),
        *("many_new_contradictions_in_file_order", "memory_live_with_another_consistency"),
        *("memory_live_without_a_disk", "override_that_contradicts_what_its_policy_extends"),
        *("override_that_repeats_a_contradiction", "override_to_another_kind", "policy_without_anything"),
        *("schedule_missing_everywhere", "two_kinds_on_one_domain"),
    ),
    "policies that extend without end": (
        *("extends_in_a_circle_of_three", "extends_in_a_circle_of_two", "extends_itself"),
    ),
    "what regular expressions mean and cost": (
        *("regex_not_closed", "regex_that_looks_ahead", "regex_with_a_range_the_wrong_way", "regex_with_a_reference"),
        *("regex_with_nested_repeats", "regex_with_too_many_repeats"),
    ),
    "a file that says nothing, which may be right in conf.d": ("empty", "only_comments"),
    "passwords within a URI": ("password_in_connect",),
    "what is given twice": ("uuid_twice",),
}
"""Errors that the schema cannot know, by sample; ``check-config`` tells them."""


def read(path: Path) -> object:
    """Return the data of a file; None for one that is no YAML, or says a thing twice: there the parser refuses."""
    try:
        document = parse_yaml(str(path), path.read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError):
        return None
    return None if document.problems else document.data


PARSED = [path for path in sorted(SAMPLES.glob("invalid/*.yaml")) if read(path)]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(settings_schema())


@pytest.mark.parametrize("path", RIGHT, ids=lambda path: path.stem)
def test_the_schema_accepts_every_example(path: Path) -> None:
    EDITOR.validate(read(path))


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("valid/*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_every_valid_sample(path: Path) -> None:
    if path.stem == "numbers_as_text":  # the program is patient with quoted numbers, an editor need not be
        assert not EDITOR.is_valid(read(path))
    else:
        EDITOR.validate(read(path))


@pytest.mark.parametrize("path", PARSED, ids=lambda path: path.stem)
def test_the_schema_refuses_every_error_of_structure(path: Path) -> None:
    beyond = {name for names in BEYOND_STRUCTURE.values() for name in names}
    assert EDITOR.is_valid(read(path)) == (path.stem in beyond)


def test_no_sample_is_excused_that_is_not_there() -> None:
    beyond = {name for names in BEYOND_STRUCTURE.values() for name in names}
    assert beyond - {path.stem for path in SAMPLES.glob("invalid/*.yaml")} == set()
