"""From the file to the core's values: read, override by environment, validate, and show all problems at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from kvmsnapd.config.models import BeforeHookSettings, HookSettings, PolicySettings, Settings
from kvmsnapd.config.yaml_document import Document, Location, parse_yaml
from kvmsnapd.errors import ConfigError, InvalidValueError
from kvmsnapd.model import CHAIN_CEILING, Kind
from kvmsnapd.policy import ConsistencyRule, DiskSelection, Hook, Hooks, Policy
from kvmsnapd.preflight import chain_shortage
from kvmsnapd.schedule import parse_schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from zoneinfo import ZoneInfo

    from pydantic_core import ErrorDetails

_LONGEST_SPLAY = timedelta(minutes=5)
_PREFIX = "KVMSNAPD_"
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True)
class Config:
    """A configuration that is valid as a whole."""

    path: Path
    settings: Settings
    policies: dict[str, Policy] = field(default_factory=dict)
    selectors: dict[str, tuple[Policy, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def state_directory(self) -> Path:
        """Where notes that must survive a reboot are kept."""
        return self.settings.state_directory or _service_directory("STATE_DIRECTORY", "/var/lib/kvmsnapd")

    @property
    def runtime_directory(self) -> Path:
        """Where the lock files are."""
        return self.settings.runtime_directory or _service_directory("RUNTIME_DIRECTORY", "/run/kvmsnapd")


def _service_directory(variable: str, otherwise: str) -> Path:
    # systemd separates several directories by colons; the unit asks for one.
    return Path(os.environ.get(variable, "").partition(":")[0] or otherwise)


def load_config(path: Path) -> Config:
    """Read the file and the environment.

    Raises:
        ConfigError: with every problem found, in the order of the file; nothing is in force then.
    """
    document = parse_yaml(str(path), _read(path))
    problems: list[tuple[Location, str]] = _unknown_variables()
    hidden = [key for key in document.data if key.startswith("_")]  # pydantic-settings has options of such names
    problems += [((key,), _unknown_key(key, ())) for key in hidden]
    settings = None
    try:
        settings = Settings(**{key: value for key, value in document.data.items() if key not in hidden})
    except ValidationError as error:
        problems += [(tuple(details["loc"]), _describe(details)) for details in error.errors()]
    except SettingsError as error:  # a variable that should hold JSON does not
        field = re.search(r'field "(\w+)"', str(error))
        name = f"{_PREFIX}{field[1].upper()}" if field else _PREFIX
        raise ConfigError([f"environment {name}: is no JSON; set single keys, as {name}__KEY"]) from error
    if settings is None:
        problems += _unknown_policies(document.data.get("policies"), document.data.get("domains"))
        raise ConfigError(_in_file_order(document, problems))
    policies, selectors = _resolve(settings, problems)
    if problems:
        raise ConfigError(_in_file_order(document, problems))
    return Config(path, settings, policies, selectors, tuple(_chain_warnings(document, settings, policies)))


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}; nothing was changed"]) from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}:1: is not UTF-8 text: {error.reason}"]) from error


def _unknown_variables() -> list[tuple[Location, str]]:
    """Return a problem for each variable of our prefix that names no setting."""
    problems: list[tuple[Location, str]] = []
    for variable in os.environ:
        if variable.upper().startswith(_PREFIX):
            name = variable[len(_PREFIX) :].partition("__")[0].lower()
            if name not in Settings.model_fields:
                problems.append(((name,), _unknown_key(name, ())))
    return problems


def _unknown_policies(policies: Any, domains: Any) -> list[tuple[Location, str]]:  # noqa: ANN401  # not yet validated
    """Return a problem for each name of a policy under ``domains`` that ``policies`` does not have."""
    known = list(policies) if isinstance(policies, dict) else []
    spelled = f"Known are {', '.join(known)}" if known else "No policy is defined"
    return [
        (("domains", selector, index), f"unknown policy `{name}`{_suggest(name, known)} {spelled}")
        for selector, names in (domains.items() if isinstance(domains, dict) else ())
        for index, name in enumerate(names if isinstance(names, list) else ())
        if isinstance(name, str) and name not in known
    ]


def _resolve(
    settings: Settings, problems: list[tuple[Location, str]]
) -> tuple[dict[str, Policy], dict[str, tuple[Policy, ...]]]:
    """Make the core's policies of validated settings; add to ``problems`` what no single key can tell."""
    policies: dict[str, Policy] = {}
    for name, written in settings.policies.items():
        try:
            policies[name] = _policy(name, written, settings.timezone)
        except InvalidValueError as error:
            problems.append((("policies", name, "keep"), str(error)))
        problems += [(("policies", name, *key.split(".")), text) for key, text in _contradictions(written)]
    problems += _unknown_policies(settings.policies, settings.domains)
    selectors: dict[str, tuple[Policy, ...]] = {}
    for selector, names in settings.domains.items():
        problems += [
            (("domains", selector, index), f"policy `{name}` is named twice")
            for index, name in enumerate(names)
            if name in names[:index]
        ]
        chosen = tuple(policies[name] for name in names if name in policies)
        if len({policy.kind for policy in chosen}) > 1:
            kinds = ", ".join(f"{policy.name} is {policy.kind}" for policy in chosen)
            problem = f"a domain has one kind of snapshot, for ever, and {kinds}; mixing kinds loses data"
            problems.append((("domains", selector), problem))
        key = selector.lower() if _UUID.fullmatch(selector) else selector
        if key in selectors:
            problems.append((("domains", selector), "this UUID is named twice, in capitals and not"))
        selectors[key] = chosen
    return policies, selectors


def _policy(name: str, written: PolicySettings, default_zone: ZoneInfo) -> Policy:
    zone = written.timezone or default_zone
    schedule = parse_schedule(written.schedule, zone)
    interval = schedule.longest_interval
    splay = min(interval / 10, _LONGEST_SPLAY) if written.splay is None else written.splay
    return Policy(
        name=name,
        schedule=schedule,
        keep=written.keep.rules(),
        timezone=zone,
        kind=Kind(written.kind),
        consistency=written.consistency,
        catch_up=written.catch_up == "once",
        splay=splay,
        max_age=2 * interval + splay if written.max_age is None else written.max_age,
        max_deletes_per_run=written.max_deletes_per_run,
        max_chain_depth=written.max_chain_depth,
        memory_live=written.memory == "live",
        max_pause=written.max_pause,
        min_free_bytes=int(written.min_free),
        overlay_directory=written.overlay_directory,
        disks=DiskSelection(tuple(written.disks.include), tuple(written.disks.exclude)),
        hooks=Hooks(_hook(written.hooks.before), _hook(written.hooks.after), _hook(written.hooks.on_failure)),
    )


def _hook(written: HookSettings | None) -> Hook | None:
    if written is None:
        return None
    required = isinstance(written, BeforeHookSettings) and written.required
    return Hook(tuple(written.command), written.timeout, required)


def _contradictions(written: PolicySettings) -> Iterable[tuple[str, str]]:
    """Yield key and problem for what is allowed alone and means nothing together."""
    internal, chosen = written.kind == "internal", "consistency" in written.model_fields_set
    if written.memory and internal:
        yield "memory", "an internal snapshot of a running guest always holds its RAM; remove this, or kind: internal"
    elif chosen and (internal or written.memory) and written.consistency is not ConsistencyRule.MEMORY:
        why = "kind: internal" if internal else "memory: live"
        yield "consistency", f"with {why} the guest's RAM is saved, so the consistency is memory; remove one of the two"
    elif written.consistency is ConsistencyRule.MEMORY and not internal and not written.memory:
        yield "consistency", "memory needs memory: live beside it, or kind: internal"
    if written.memory and (written.disks.include or written.disks.exclude):
        yield "disks", "with memory: live all disks are needed: the RAM cannot be resumed beside a disk of another time"
    if internal:
        for key in ("include", "exclude"):
            if getattr(written.disks, key):
                yield f"disks.{key}", "internal snapshots cover all disks or none; use kind: external"
        if written.overlay_directory:
            yield "overlay_directory", "internal snapshots have no overlays; use kind: external"


def _chain_warnings(document: Document, settings: Settings, policies: Mapping[str, Policy]) -> Iterable[str]:
    """Yield a warning for each selector whose external policies may keep more than the backing chain may hold."""
    for selector, names in settings.domains.items():
        shortage = chain_shortage([policies[name] for name in names], ceiling=CHAIN_CEILING)
        if shortage:
            place = document.place(("domains", selector), of_key=True)
            yield f"{place}: domains.{selector}: {shortage}; domains it applies to are refused"


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


def _describe(error: ErrorDetails) -> str:
    """Return pydantic's complaint in our words."""
    location, kind, context = error["loc"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(location[-1]), location[:-1])
    if kind == "missing":
        return f"`{location[-1]}` is missing"
    if isinstance(context.get("error"), InvalidValueError):
        return str(context["error"])
    if kind in {"literal_error", "enum"}:
        words = f"write one of {context['expected'].replace(' or ', ', ').replace(chr(39), '`')}"
    elif kind == "list_type" and location[0] == "domains":
        words = "write a list of policies, such as [standard]; [] means unprotected on purpose"
    elif kind in {"greater_than_equal", "less_than_equal"}:
        words = f"write a number {'from' if 'ge' in context else 'up to'} {context.get('ge', context.get('le'))}"
    else:
        words = _WORDS.get(kind, f"{error['msg'][:1].lower()}{error['msg'][1:]}")
    given = error["input"]
    if given is None:
        return f"{words}, not nothing"
    return f"{words}, not {given!r}" if isinstance(given, (str, int, float)) else words


def _unknown_key(key: str, section: Location) -> str:
    names = _allowed_keys(section)
    return f"unknown key `{key}`{_suggest(key, names)} Allowed are {', '.join(names)}"


def _allowed_keys(section: Location) -> list[str]:
    """Return the keys of the section at this location, by walking the models."""
    model: type[BaseModel] = Settings
    parts = list(section)
    while parts:
        part = parts.pop(0)
        if model is Settings and part == "policies":
            model, parts = PolicySettings, parts[1:]  # what follows is a policy's name
            continue
        annotation = model.model_fields[str(part)].annotation
        sections = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)


def _suggest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else "."


def _in_file_order(document: Document, problems: Iterable[tuple[Location, str]]) -> list[str]:
    """Return the problems as lines ``place: key path: what``, sorted by place; those of the environment come first."""
    lines: list[tuple[tuple[int, int], str]] = []
    for location, problem in problems:
        known = tuple(part for part in location if part != "[key]")
        variable = _variable(known)
        if variable:
            lines.append(((0, 0), f"environment {variable}: {problem}"))
            continue
        place = document.place(known, of_key=problem.startswith("unknown key") or "[key]" in location)
        line, column = place.rsplit(":", 2)[1:]
        lines.append(((int(line), int(column)), f"{place}: {'.'.join(map(str, known))}: {problem}"))
    return [line for _, line in sorted(lines)]


def _variable(location: Location) -> str | None:
    """Return the environment variable that set this key or a section around it, None if the file did."""
    given = {name.upper(): name for name in os.environ}
    for end in range(len(location), 0, -1):
        name = given.get(_PREFIX + "__".join(map(str, location[:end])).upper())
        if name:
            return name
    return None
