"""What is wrong with a key, in the words of somebody who has to mend it at night."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from pydantic import BaseModel

from kvmsnapd.config.fields import suggest
from kvmsnapd.config.files import PREFIX
from kvmsnapd.config.models import PolicyKeys, PolicySettings, Settings
from kvmsnapd.errors import InvalidValueError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from kvmsnapd.config.yaml_document import Location


class Complaint(NamedTuple):
    """What is wrong with a key, not yet at its place in a file."""

    location: Location
    message: str
    of_key: bool = False
    """Whether the key is wrong, and not its value."""


_WORDS = {
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "int_parsing": "write a whole number",
    "int_type": "write a whole number",
    "int_from_float": "write a whole number",
    "string_type": "write text, in quotes where it looks like something else",
    "model_type": "write `key: value` lines below it",
    "model_attributes_type": "write `key: value` lines below it",
    "dict_type": "write `key: value` lines below it",
    "list_type": "write a list, such as [one, two]",
    "byte_size": "write a size, such as 500MiB or 10GiB",
    "byte_size_unit": "write a size, such as 500MiB or 10GiB",
    "too_short": "write the program and its arguments as a list, such as [/usr/local/bin/hook, now]",
    "path_type": "write the path of a directory",
}
"""What to do, by pydantic's word for what is wrong."""

_FORMS = {"list", "mapping"}


def complaint_of(error: ErrorDetails) -> Complaint:
    """Return pydantic's complaint in our words, at the path without pydantic's own marks."""
    location = error["loc"]
    if location[:1] == ("domains",) and len(location) > 2 and location[2] in _FORMS:  # noqa: PLR2004  # of an entry
        location = (*location[:2], *location[3:])
    of_key = error["type"] == "extra_forbidden" or "[key]" in location
    location = tuple(part for part in location if part != "[key]")
    return Complaint(location, _describe(error, location), of_key)


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
        return f"{words}, not {given!r}{near}" if given is not None else f"{words}, not nothing"
    if kind == "list_type" and location[0] == "domains":
        words = "write a list of policies, such as [standard]; [] means unprotected on purpose"
    elif kind in {"greater_than_equal", "less_than_equal"}:
        words = f"write a number {'from' if 'ge' in context else 'up to'} {context.get('ge', context.get('le'))}"
    else:
        words = _WORDS.get(kind, f"{error['msg'][:1].lower()}{error['msg'][1:]}")
    if given is None:
        return f"{words}, not nothing"
    return f"{words}, not {given!r}" if isinstance(given, (str, int, float)) else words


def unknown_key(key: str, section: Location) -> str:
    """Return that a section has no such key, what was probably meant, and what there is."""
    names = list(_model_at(section).model_fields)
    near = suggest(key, names)
    if key == "<<":
        return "merge keys are not understood here; say `extends: POLICY` in a policy, or put it under `defaults`"
    if near == "." and key in PolicySettings.model_fields and section[:1] != ("policies",):
        near = "; it belongs to a policy, or under defaults."
    elif near == "." and key in Settings.model_fields:
        near = "; it belongs to the top of the file."
    return f"unknown key `{key}`{near} Allowed are {', '.join(names)}"


def unknown_variables() -> list[Complaint]:
    """Return a complaint for each environment variable of our prefix that names no setting."""
    found: list[Complaint] = []
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX):
            name = variable[len(PREFIX) :].partition("__")[0].lower()
            if name not in Settings.model_fields:
                found.append(Complaint((name,), unknown_key(name, ())))
    return found


def unknown_policies(data: dict[str, Any]) -> list[Complaint]:
    """Return a complaint for each name of a policy that ``policies`` does not have; the data is not yet validated."""
    policies, domains = data.get("policies"), data.get("domains")
    known = list(policies) if isinstance(policies, dict) else []
    spelled = f"Known are {', '.join(known)}" if known else "No policy is defined"
    named: list[tuple[Location, Any]] = []
    for name, policy in policies.items() if isinstance(policies, dict) else ():
        if isinstance(policy, dict):
            named.append((("policies", name, "extends"), policy.get("extends")))
    for selector, entry in domains.items() if isinstance(domains, dict) else ():
        if isinstance(entry, dict):
            named += [(("domains", selector, name), name) for name in entry]
        elif isinstance(entry, list):
            named += [(("domains", selector, index), name) for index, name in enumerate(entry)]
    return [
        Complaint(
            location,
            f"unknown policy `{name}`{suggest(name, known)} {spelled}",
            of_key=location[0] == "domains" and location[2] == name,
        )
        for location, name in named
        if isinstance(name, str) and name not in known
    ]


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
