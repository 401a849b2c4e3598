"""The kinds of values that keys take: how they are written, read, and described to editors."""

from __future__ import annotations

import re
from datetime import timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BeforeValidator, ByteSize, PlainSerializer, WithJsonSchema
from pydantic_core import core_schema

from kvmsnapd.durations import DURATION_PATTERN, format_duration, parse_duration
from kvmsnapd.errors import InvalidValueError, shown
from kvmsnapd.matching import check_selector
from kvmsnapd.naming import POLICY_NAME_PATTERN, check_policy_name
from kvmsnapd.retention import ALL, parse_count, parse_within
from kvmsnapd.schedule import ALIASES, parse_schedule

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

UTC_ZONE = ZoneInfo("UTC")
SIZE_PATTERN = r"^([0-9]+ *[bB]?|[0-9]+(\.[0-9]+)? *[kmgtpKMGTP]i?[bB]?)$"


_SWITCHES: dict[bool | str, bool] = {
    **dict.fromkeys((True, "true", "yes", "on"), True),
    **dict.fromkeys((False, "false", "no", "off"), False),
}
_LONGEST_WORD = 60
_MOST_COMPARED = 1000


def suggest(word: str, known: list[str]) -> str:
    """Return the end of a sentence: the nearest known word, if there is one."""
    if len(word) > _LONGEST_WORD or len(known) > _MOST_COMPARED:  # comparing takes its time
        return "."
    close = get_close_matches(word, known, n=1) or get_close_matches(word.lower(), known, n=1)
    return f"; did you mean `{close[0]}`?" if close else "."


def _duration(value: Any) -> Any:  # noqa: ANN401  # before validation anything may come
    if isinstance(value, bool):
        msg = "write a duration, such as 90s or 15m"
        raise InvalidValueError(msg)
    return parse_duration(str(value)) if isinstance(value, (str, int)) else value


def _positive(value: timedelta) -> timedelta:
    if not value:
        msg = "write a duration above zero"
        raise InvalidValueError(msg)
    return value


def between(shortest: timedelta, longest: timedelta) -> AfterValidator:
    """Return the validator of a duration with limits."""

    def check(value: timedelta) -> timedelta:
        if not shortest <= value <= longest:
            msg = f"write a duration from {format_duration(shortest)} to {format_duration(longest)}"
            raise InvalidValueError(msg)
        return value

    return AfterValidator(check)


def _or_empty(value: Any) -> Any:  # noqa: ANN401
    return {} if value is None else value


class OrEmpty:
    """Marks a section of which the key may stand alone, because all below it is commented out."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:  # noqa: ANN401
        """Read nothing as an empty section."""
        return core_schema.no_info_before_validator_function(_or_empty, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Tell editors that nothing is allowed as well."""
        return {"anyOf": [handler(schema), {"type": "null"}]}


def _count(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        msg = "write a whole number from 1, or all"
        raise InvalidValueError(msg)
    if isinstance(value, str) and re.fullmatch("0[0-9]+", value):
        msg = f"write a whole number without 0 in front, not {shown(value)}"
        raise InvalidValueError(msg)
    return parse_count(value)


def _within(value: Any) -> Any:  # noqa: ANN401
    return parse_within(str(value))


def _timezone(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, ZoneInfo):
        return value
    if not isinstance(value, str):
        msg = "write the name of a time zone, such as Europe/Berlin or UTC"
        raise InvalidValueError(msg)
    try:
        return ZoneInfo(value)
    except (KeyError, ValueError, OSError) as error:
        near = suggest(value, sorted(available_timezones()))
        msg = f"{shown(value)} is no time zone this host knows{near} Write a name such as Europe/Berlin or UTC"
        raise InvalidValueError(msg) from error


def _schedule(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        msg = 'write a schedule, such as hourly, "every 15m" or "7 * * * *"'
        raise InvalidValueError(msg)
    try:
        return parse_schedule(str(value), UTC_ZONE).text  # in the policy's own zone once that is known
    except InvalidValueError as error:
        near = suggest(str(value), list(ALIASES)).rstrip(".")
        msg = f"{error}{near}"
        raise InvalidValueError(msg) from error


def _number(value: Any) -> Any:  # noqa: ANN401
    # python would also read 010, 1_000 and 2.0, which other programs read as something else.
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", value):
        return int(value)
    hint = " without 0 in front" if isinstance(value, str) and re.fullmatch(r"0[0-9]+", value) else ""
    msg = f"write a whole number{hint}, not {shown(value)}" if value is not None else "write a whole number"
    raise InvalidValueError(msg)


def _flag(value: Any) -> Any:  # noqa: ANN401
    word = value.lower() if isinstance(value, str) else value
    if isinstance(word, (bool, str)) and word in _SWITCHES:
        return _SWITCHES[word]
    msg = f"write true or false, not {shown(value)}" if value is not None else "write true or false"
    raise InvalidValueError(msg)


def _size(value: Any) -> Any:  # noqa: ANN401
    # pydantic looks at the beginning only, and reads "1,5GiB" as one byte.
    if isinstance(value, bool) or (isinstance(value, str) and not re.fullmatch(SIZE_PATTERN, value)):
        msg = "write a size, such as 500MiB or 10GiB"
        raise InvalidValueError(msg)
    return value


def _format_size(size: int) -> str | int:
    units = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((f"{size // unit}{name}" for name, unit in units if size and size % unit == 0), int(size))


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        msg = "write an absolute path"
        raise InvalidValueError(msg)
    return value


def _prom_file(value: str) -> str:
    if not _absolute(value).endswith(".prom"):
        msg = "write a path that ends in .prom: node_exporter reads no other files"
        raise InvalidValueError(msg)
    return value


def _no_secret(value: str) -> str:
    if not value:
        msg = "write a URI of libvirt, such as qemu:///system"
        raise InvalidValueError(msg)
    if re.match(r"[^/]*://[^/@:]*:.*@", value):
        msg = "a password does not belong into a file that others may read; libvirt takes it from its auth.conf"
        raise InvalidValueError(msg)
    return value


Duration = Annotated[
    timedelta,
    BeforeValidator(_duration),
    PlainSerializer(format_duration),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN}),
]
_NOT_ZERO = DURATION_PATTERN.replace("^", "^(?=.*[1-9])")
PositiveDuration = Annotated[
    Duration, AfterValidator(_positive), WithJsonSchema({"type": "string", "pattern": _NOT_ZERO})
]
Within = Annotated[Duration, BeforeValidator(_within), WithJsonSchema({"type": "string", "pattern": _NOT_ZERO})]
Count = Annotated[
    int,
    BeforeValidator(_count),
    PlainSerializer(lambda count: "all" if count == ALL else count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "all"}]}),
]
TimeZone = Annotated[ZoneInfo, BeforeValidator(_timezone), PlainSerializer(str), WithJsonSchema({"type": "string"})]
Size = Annotated[
    ByteSize,
    BeforeValidator(_size),
    PlainSerializer(_format_size),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": SIZE_PATTERN}, {"type": "integer", "minimum": 0}]}),
]
NUMBER = BeforeValidator(_number)  # to be given after any limits, or the schema loses them
Flag = Annotated[
    bool,
    BeforeValidator(_flag),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["on", "off", "yes", "no"]}]}),
]
AbsolutePath = Annotated[str, AfterValidator(_absolute), WithJsonSchema({"type": "string", "pattern": "^/"})]
PromFile = Annotated[str, AfterValidator(_prom_file), WithJsonSchema({"type": "string", "pattern": r"^/.*\.prom$"})]
Uri = Annotated[str, AfterValidator(_no_secret)]
ScheduleText = Annotated[
    str,
    BeforeValidator(_schedule),
    WithJsonSchema(
        {
            "type": "string",
            "anyOf": [
                {"enum": list(ALIASES)},
                {"pattern": r"^@[a-z]+$"},
                {"pattern": r"^every +[0-9wdhms ]+$"},
                {"pattern": r"^ *([^ ]+ +){4}[^ ]+ *$"},
            ],
        }
    ),
]
PolicyName = Annotated[
    str, AfterValidator(check_policy_name), WithJsonSchema({"type": "string", "pattern": POLICY_NAME_PATTERN})
]
Selector = Annotated[
    str, AfterValidator(check_selector), WithJsonSchema({"type": "string", "minLength": 1, "pattern": "^(/.+/|[^/]+)$"})
]
