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
        *("unknown_policy", "unknown_policy_where_there_is_none", "unknown_policy_without_likeness"),
    ),
    "time zones that the host knows": ("bad_timezone", "timezone_of_a_policy"),
    "times that never come": ("cron_out_of_range", "cron_step_beyond_range", "impossible_cron"),
    "lengths that are too short or too long": (
        *("hook_timeout_zero", "keep_within_zero", "max_age_zero", "max_pause_zero", "tick_too_long", "tick_too_short"),
    ),
    "keys that contradict each other, or need another": (
        *("consistency_memory_alone", "internal_with_another_consistency", "internal_with_disks"),
        *("internal_with_memory_live", "internal_with_overlay_directory", "keep_missing", "schedule_missing"),
        *("many_new_contradictions_in_file_order", "memory_live_with_another_consistency"),
        *("memory_live_without_a_disk", "two_kinds_on_one_domain"),
    ),
    "what is given twice": ("policy_named_twice", "uuid_twice"),
}
"""Errors that the schema cannot know, by sample; ``check-config`` tells them."""


def read(path: Path) -> object:
    """Return the data of a file; skip one that is no YAML, or says a thing twice: there the parser refuses."""
    try:
        document = parse_yaml(str(path), path.read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError):
        pytest.skip("refused by the parser already")
    if document.problems:
        pytest.skip("refused by the parser already")
    return document.data


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


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("invalid/*.yaml")), ids=lambda path: path.stem)
def test_the_schema_refuses_every_error_of_structure(path: Path) -> None:
    beyond = {name for names in BEYOND_STRUCTURE.values() for name in names}
    assert EDITOR.is_valid(read(path)) == (path.stem in beyond)


def test_no_sample_is_excused_that_is_not_there() -> None:
    beyond = {name for names in BEYOND_STRUCTURE.values() for name in names}
    assert beyond - {path.stem for path in SAMPLES.glob("invalid/*.yaml")} == set()
