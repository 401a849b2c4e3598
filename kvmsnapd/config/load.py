"""From the files to the core's values: read, override by environment, validate, and show all problems at once."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kvmsnapd.config.environment import Environment, read_environment
from kvmsnapd.config.files import SECTIONS, Contents, Sources, parse_contents, read_contents
from kvmsnapd.config.models import FileSettings, Settings
from kvmsnapd.config.problems import MOST_TOLD, Complaint, complaint_of, not_a_section, unknown_key, unknown_policies
from kvmsnapd.config.resolve import Policies, resolve, resolve_keys
from kvmsnapd.config.web_config import load_web_config
from kvmsnapd.durations import format_duration
from kvmsnapd.errors import ConfigError, Problem
from kvmsnapd.model import CHAIN_CEILING
from kvmsnapd.preflight import chain_shortage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmsnapd.config.yaml_document import Location
    from kvmsnapd.policy import Policy


@dataclass(frozen=True)
class Setting:
    """One key as it applies."""

    key: str
    value: Any
    """Plain data, as in YAML."""
    place: str
    """``file:line:column`` or environment variable; or ``default``, or what it is computed from."""


_DIRECTORIES = {"STATE_DIRECTORY": "/var/lib/kvmsnapd", "RUNTIME_DIRECTORY": "/run/kvmsnapd"}
_DEPTHS = {"defaults": 1, "policies": 2, "domains": 3}
"""Where the keys of a policy are."""

_STAND_INS = {"schedule": "hourly", "keep": {"last": 1}}
"""For what a policy needs and has wrong, so that nobody is told that it is missing."""

_MOST_LOOKED_AT = 2000
"""Of pydantic's complaints; a hostile file makes millions."""


@dataclass(frozen=True)
class Config:
    """A configuration that is valid as a whole."""

    path: Path
    settings: Settings
    policies: dict[str, Policy]
    """By name, as they are for domains whose entry overrides nothing; without those that need an entry's keys."""
    selectors: dict[str, tuple[Policy, ...]]
    warnings: tuple[str, ...]
    contents: Contents
    """The files it was read from, the main one first, and what was in them."""
    environment: Environment
    _sources: Sources
    _spelled: dict[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """The files it was read from, the main one first."""
        return tuple(str(path) for path, _ in self.contents)

    @property
    def expected_policies(self) -> tuple[str, ...]:
        """The policies that should apply to some domain: all but those that others extend and no entry names."""
        named = {policy.name for policies in self.selectors.values() for policy in policies}
        bases = {policy.extends for policy in self.settings.policies.values()}
        return tuple(name for name in self.settings.policies if name in named or name not in bases)

    @property
    def all_policies(self) -> tuple[Policy, ...]:
        """All policies, those with a domain's overrides as well."""
        selected = (policy for policies in self.selectors.values() for policy in policies)
        return tuple(dict.fromkeys((*self.policies.values(), *selected)))

    @property
    def state_directory(self) -> Path:
        """Where notes that must survive a reboot are kept."""
        return (
            Path(self.settings.state_directory)
            if self.settings.state_directory
            else service_directory("STATE_DIRECTORY")
        )

    @property
    def runtime_directory(self) -> Path:
        """Where the lock files are."""
        return (
            Path(self.settings.runtime_directory)
            if self.settings.runtime_directory
            else service_directory("RUNTIME_DIRECTORY")
        )

    def place_of(self, selector: str) -> str:
        """Return ``file:line:column`` of an entry under ``domains``."""
        return self._place(("domains", self._spelled[selector]))

    def explain(self, selector: str, policy: str) -> list[Setting]:
        """Return every key of a policy as it applies to a selector's domains, and where its value comes from."""
        resolved = resolve_keys(self.settings, policy, self._spelled[selector])
        applied = next(p for p in self.selectors[selector] if p.name == policy)
        values = resolved.keys.model_dump(mode="json", exclude_none=True)
        # What is computed if nobody gives it; a null that is given asks for that as well.
        computed = {
            "splay": (format_duration(applied.splay), "from the schedule"),
            "max_age": (format_duration(applied.max_age), "from the schedule"),
            "timezone": (str(applied.timezone), self._place(("timezone",))),
            "consistency": (str(applied.consistency), "default"),
        }
        settings = []
        for key in type(resolved.keys).model_fields:
            place = self._place(resolved.origins[key]) if key in resolved.origins else "default"
            value = values.get(key)
            if key in computed and value is None:
                value, source = computed[key]
                place = f"{source} (null in {place})" if key in resolved.origins else source
            settings.append(Setting(key, value, place))
        return settings

    def _place(self, location: Location) -> str:
        variable = self.environment.variable_of(location)
        if variable:
            return f"environment {variable}"
        return self._sources.place(location) if self._sources.has(location) else "default"


def service_directory(variable: str) -> Path:
    """Return where systemd, by this environment variable, or else custom keeps such files."""
    # systemd separates several directories by colons; the unit asks for one.
    return Path(os.environ.get(variable, "").partition(":")[0] or _DIRECTORIES[variable])


def runtime_directory_of(path: Path) -> Path:
    """Return where the runtime files of a configuration are that need not be valid."""
    try:
        written = parse_contents(read_contents(path)[0]).data.get("runtime_directory")
    except ConfigError:
        written = None
    return Path(written) if isinstance(written, str) else service_directory("RUNTIME_DIRECTORY")


def load_config(path: Path, *, check_web: bool = False) -> Config:
    """Read the files and the environment.

    Args:
        check_web: whether to read the web configuration as well, which not everybody may, and have its problems told
            together with the others.

    Raises:
        ConfigError: with every problem found, in the order of the files; nothing is in force then.
    """
    return load_contents(*read_contents(path), check_web=check_web)


def load_contents(contents: Contents, warnings: Iterable[str] = (), *, check_web: bool = False) -> Config:
    """Make a configuration of files that were read already, and of the environment; raise ConfigError if it is none."""
    sources, environment = parse_contents(contents), read_environment()
    # pydantic-settings does not mind capitals, and has options that begin with an underscore.
    data = {key: value for key, value in sources.data.items() if key in Settings.model_fields}
    complaints = [Complaint((key,), unknown_key(key, ()), of_key=True) for key in sources.data if key not in data]
    # Else a variable's key would take the place of whatever is there.
    other = [name for name in SECTIONS if not isinstance(data.get(name), (dict, type(None)))]
    wrong = [Complaint((name,), not_a_section(data.pop(name))) for name in other]
    problems = [*environment.problems, *sources.problems]
    policies = Policies()
    if sources.whole and not sources.data and not sources.problems:
        message = "says nothing at all; for a host on which nothing is to be protected write `domains: {}`"
        problems.append(Problem(message, str(contents[0][0])))
    settings, more = _validate(data, use_environment=not environment.problems)
    wrong += more
    if settings is None:
        settings, _ = _validate(_without(data, wrong), use_environment=False)
    if sources.whole:  # else names may be missing that the rest of a file has
        unknown = unknown_policies(data)
        beyond = {c.location for c in unknown}
        complaints += [*unknown, *(c for c in wrong if c.location[:3] not in beyond)]
        policies = resolve(settings) if settings else policies
        doomed = [_policy_key(complaint.location) for complaint in (*wrong, *unknown)]
        complaints += [c for c in policies.complaints if not _follows(c, doomed)]
    else:
        complaints += wrong
    problems += [_place(complaint, sources, environment) for complaint in complaints]
    if check_web and settings and settings.metrics.enabled and settings.metrics.web_config:
        problems += _web_problems(Path(settings.metrics.web_config))
    if settings is None or problems:
        raise ConfigError(_in_order(problems, contents))
    return Config(
        path=contents[0][0],
        settings=settings,
        policies=policies.by_name,
        selectors=policies.selectors,
        warnings=(*warnings, *_chain_warnings(sources, policies)),
        contents=contents,
        environment=environment,
        _sources=sources,
        _spelled=policies.spelled,
    )


def _web_problems(path: Path) -> list[Problem]:
    try:
        load_web_config(path)
    except ConfigError as error:
        return error.problems
    return []


def _validate(data: dict[str, Any], *, use_environment: bool) -> tuple[Settings | None, list[Complaint]]:
    try:
        return (Settings if use_environment else FileSettings)(**data), []
    except ValidationError as error:
        return None, [complaint_of(details) for details in error.errors(include_url=False)[:_MOST_LOOKED_AT]]


def _without(data: dict[str, Any], wrong: Iterable[Complaint]) -> dict[str, Any]:
    """Return the data without the keys that are wrong, so that problems between the others are told as well."""
    rest = deepcopy(data)
    for complaint in wrong:
        location = _policy_key(complaint.location)
        holder: Any = rest
        for part in location[:-1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, list) and isinstance(location[-1], int):  # of a domain; others of it may be right
            holder[location[-1]] = "0"
        elif isinstance(holder, dict) and location[-1] in _STAND_INS:
            holder[location[-1]] = _STAND_INS[str(location[-1])]
        elif isinstance(holder, dict) and location[:-1] == ("policies",) and not complaint.of_key:
            holder[location[-1]] = dict(_STAND_INS)
        elif isinstance(holder, dict):
            holder.pop(location[-1], None)
    return rest


def _policy_key(location: Location) -> Location:
    """Return the path of the policy's key in which this one is, or of the whole section elsewhere."""
    return location[: _DEPTHS.get(str(location[0]), 0) + 1]


def _follows(complaint: Complaint, doomed: Iterable[Location]) -> bool:
    """Tell whether a complaint may only follow from what is wrong itself."""
    location, inputs = complaint.location, complaint.inputs
    return any(
        location[: len(other)] == other or any(key[: len(other)] == other[: len(key)] for key in inputs)
        for other in doomed
    )


def _place(complaint: Complaint, sources: Sources, environment: Environment) -> Problem:
    variable = environment.variable_of(complaint.location)
    if variable:
        return Problem(complaint.message, f"environment {variable}")
    message = complaint.message
    if complaint.first:
        message += f", first in {sources.place(complaint.first)}; keep one of them"
    return sources.problem(complaint.location, message, of_key=complaint.of_key)


def _in_order(problems: Iterable[Problem], contents: Contents) -> list[Problem]:
    """Return the problems sorted by place: those of the environment first, then file by file; each once."""
    names = dict.fromkeys([*(str(path) for path, _ in contents), *(p.file for p in problems if p.line)])
    rank = {name: index for index, name in enumerate(names)}  # other files last
    # What an alias repeats is told once, by the path that comes first.
    once = {(p.file, p.line, p.column, p.message): p for p in reversed(list(problems))}.values()
    ordered = sorted(once, key=lambda p: (rank.get(p.file, -1), p.line, p.column, p.message))
    if len(ordered) > MOST_TOLD:
        more = Problem(f"and {len(ordered) - MOST_TOLD} more problems", str(contents[0][0]))
        return [*ordered[:MOST_TOLD], more]
    return ordered


def _chain_warnings(sources: Sources, policies: Policies) -> Iterable[str]:
    """Yield a warning for each selector whose external policies may keep more than the backing chain may hold."""
    for selector, chosen in policies.selectors.items():
        shortage = chain_shortage(chosen, ceiling=CHAIN_CEILING)
        if shortage:
            location = ("domains", policies.spelled[selector])
            problem = sources.problem(location, f"{shortage}; domains it applies to are refused", of_key=True)
            yield f"{problem.place}: {problem.key}: {problem.message}"
