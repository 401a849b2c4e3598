"""What is wrong with a key, in the words of somebody who has to mend it at night."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from pydantic import BaseModel

from kvmsnapd.config.fields import suggest
from kvmsnapd.config.models import KeepSettings, PolicyKeys, PolicySettings, Settings
from kvmsnapd.config.yaml_document import printable
from kvmsnapd.errors import InvalidValueError, shown
from kvmsnapd.naming import is_policy_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic_core import ErrorDetails

    from kvmsnapd.config.yaml_document import Location


class Complaint(NamedTuple):
    """What is wrong with a key, not yet at its place in a file."""

    location: Location
    message: str
    of_key: bool = False
    """Whether the key is wrong, and not its value."""
    inputs: tuple[Location, ...] = ()
    """The keys, or whole sections, it follows from, if it is of several."""
    first: Location | None = None
    """Where the same is said already."""


_WORDS = {
    "string_type": "write text, in quotes where it looks like something else",
    "model_type": "write `key: value` lines below it",
    "model_attributes_type": "write `key: value` lines below it",
    "dict_type": "write `key: value` lines below it",
    "list_type": "write a list, such as [one, two]",
    "time_delta_type": "write a duration, such as 90s or 15m",
    "byte_size": "write a size, such as 500MiB or 10GiB",
    "byte_size_unit": "write a size, such as 500MiB or 10GiB",
    "too_short": "write the program and its arguments as a list, such as [/usr/local/bin/hook, now]",
}
"""What to do, by pydantic's word for what is wrong."""

_DOMAIN_WORDS = {
    "too_short": "write [] for a domain that is unprotected on purpose",
    "string_type": "write the name of a policy; to override its keys write a mapping, without the dash or bracket",
    "list_type": "write a list of policies, such as [standard]; [] means unprotected on purpose",
}
"""The same, for entries of ``domains``."""

MOST_TOLD = 100
"""Problems that are told at once; nobody reads more."""

_MOST_LISTED = 20
_FORMS = {"list", "mapping"}


def complaint_of(error: ErrorDetails, unknown_key: Callable[[str, Location], str] | None = None) -> Complaint:
    """Return pydantic's complaint in our words, at the path without pydantic's own marks.

    Args:
        unknown_key: says that a section has no such key, for other files than the configuration's own.
    """
    location = error["loc"]
    if location[:1] == ("domains",) and len(location) > 2 and location[2] in _FORMS:  # noqa: PLR2004  # of an entry
        location = (*location[:2], *location[3:])
    unknown = error["type"] == "extra_forbidden"
    of_name = not unknown and location[2:] == ("[key]",)  # a policy or domain may be called so as well
    location = location[:2] if of_name else location
    if unknown and unknown_key:
        return Complaint(location, unknown_key(str(location[-1]), location[:-1]), of_key=True)
    return Complaint(location, _describe(error, location), of_key=unknown or of_name)


def _describe(error: ErrorDetails, location: Location) -> str:
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        return unknown_key(str(location[-1]), location[:-1])
    if kind == "missing":
        return f"`{location[-1]}` is missing"
    if isinstance(context.get("error"), InvalidValueError):
        return str(context["error"])
    if kind in {"literal_error", "enum"}:
        allowed = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        near = suggest(given, allowed).rstrip(".") if isinstance(given, str) else ""
        words = f"write one of {', '.join(f'`{word}`' for word in allowed)}"
        return f"{words}, not {_told(given)}{near}" if given is not None else f"{words}; nothing is written here"
    special = _DOMAIN_WORDS.get(kind) if location[0] == "domains" else None
    if kind in {"greater_than_equal", "less_than_equal"}:
        special = f"write a number {'from' if 'ge' in context else 'up to'} {context.get('ge', context.get('le'))}"
    if kind == "string_type" and location[-1] == "extends":
        special = "write the name of one policy"
    words = special or _WORDS.get(kind, f"{error['msg'][:1].lower()}{error['msg'][1:]}")
    if given is None:
        return f"{words}; nothing is written here"
    return f"{words}, not {_told(given)}" if _told(given) and kind != "too_short" else words


def not_a_section(given: Any) -> str:  # noqa: ANN401
    """Return what is wrong with a section that is none."""
    return f"{_WORDS['model_type']}, not {_told(given)}"


def _told(given: Any) -> str:  # noqa: ANN401
    """Return what was written, in a word; nothing for a section."""
    if isinstance(given, list):
        return "a list"
    return shown(given) if isinstance(given, (str, int, float)) else ""


def unknown_key(key: str, section: Location) -> str:
    """Return that a section has no such key, what was probably meant, and what there is."""
    names = list(_model_at(section).model_fields)
    near = suggest(key, names)
    if key == "<<":
        return "merge keys are not understood here; say `extends: POLICY` in a policy, or put it under `defaults`"
    if key == "extends":
        near = "; it belongs to a policy under policies."
    elif near == "." and key in KeepSettings.model_fields and ("keep" in names or not section):
        near = "; it belongs below `keep` of a policy."
    elif near == "." and key in PolicySettings.model_fields and section[:1] != ("policies",):
        near = "; it belongs to a policy, or under defaults."
    elif near == "." and key in Settings.model_fields:
        near = "; it belongs to the top of the file."
    return f"unknown key `{printable(key[:60])}`{near} Allowed are {', '.join(names)}"


def unknown_policies(data: dict[str, Any]) -> list[Complaint]:
    """Return a complaint for each name of a policy that ``policies`` does not have; the data is not yet validated."""
    policies, domains = data.get("policies"), data.get("domains")
    known = list(policies) if isinstance(policies, dict) else []
    names = set(known)
    spelled = f"Known are {', '.join(known[:_MOST_LISTED])}" if known else "No policy is defined"
    if len(known) > _MOST_LISTED:
        spelled += f" and {len(known) - _MOST_LISTED} more"
    named: list[tuple[Location, Any]] = []
    for name, policy in policies.items() if isinstance(policies, dict) else ():
        if isinstance(policy, dict):
            named.append((("policies", name, "extends"), policy.get("extends")))
    for selector, entry in domains.items() if isinstance(domains, dict) else ():
        if isinstance(entry, dict):
            named += [(("domains", selector, name), name) for name in entry]
        elif isinstance(entry, list):
            named += [(("domains", selector, index), name) for index, name in enumerate(entry)]
    # What cannot be a name is told as such.
    unknown = [(at, name) for at, name in named if isinstance(name, str) and name not in names and is_policy_name(name)]
    return [
        Complaint(
            location,
            _unknown_policy(name, location, known if index < MOST_TOLD else [], spelled),
            of_key=location[0] == "domains" and location[2] == name,
        )
        for index, (location, name) in enumerate(unknown)
    ]


def _unknown_policy(name: str, location: Location, known: list[str], spelled: str) -> str:
    if location[0] == "domains" and location[-1] == name and name in PolicyKeys.model_fields:
        return f"`{name}` is a key of a policy; write the policy's name above it, as {{standard: {{{name}: …}}}}"
    return f"unknown policy `{printable(name[:60])}`{suggest(name, known)} {spelled}"


def _model_at(section: Location) -> type[BaseModel]:
    """Return the model of the section at this location, by walking the models."""
    model: type[BaseModel] = Settings
    parts = list(section)
    if parts and parts[0] in {"policies", "domains"}:
        model = PolicySettings if parts[0] == "policies" else PolicyKeys
        parts = parts[2 if parts[0] == "policies" else 3 :]
    for part in parts:
        annotation = model.model_fields[str(part)].annotation
        model = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel))
    return model
