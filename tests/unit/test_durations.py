"""Durations: what people write is read, and written as people say it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from kvmsnapd.durations import format_duration, parse_duration, rough_duration
from kvmsnapd.errors import InvalidValueError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("15m", 900),
        ("36h", 129_600),
        ("7d", 604_800),
        ("2w", 1_209_600),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        (" 5m ", 300),
        ("0s", 0),
    ],
)
def test_a_number_with_a_unit_is_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "90", "m", "1.5h", "-5m", "5M", "5 minutes", "1y", "٣m", "5m!"])
def test_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidValueError) as refusal:
        parse_duration(text)
    assert str(refusal.value) == (
        f"{text!r} is not a duration: write a number with a unit, such as 90s, 15m, 36h, 7d or 1h30m"
    )


def test_more_than_a_hundred_years_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"^'36501d' is longer than a hundred years$"):
        parse_duration("36501d")


def test_a_number_too_long_for_python_is_refused_like_any_other() -> None:
    with pytest.raises(InvalidValueError):
        parse_duration("9" * 5000 + "s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0d"),
        (42, "42s"),
        (90, "90s"),
        (120, "2m"),
        (5400, "90m"),
        (7500, "2h5m"),
        (36 * 3600, "36h"),
        (365 * 86400, "365d"),
        (90_061, "1d1h1m1s"),
    ],
)
def test_a_length_is_written_as_people_say_it(seconds: int, text: str) -> None:
    assert format_duration(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (259_199, "71h"),
        (259_200, "3d"),
        (-90, "-90s"),
        (-86_400 * 4, "-4d"),
    ],
)
def test_a_rough_length_has_one_unit(seconds: int, text: str) -> None:
    assert rough_duration(timedelta(seconds=seconds)) == text
