"""From the files to the core's values: read, override by environment, validate, and show all problems at once."""

from __future__ import annotations

import os
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from kvmsnapd.config.files import PREFIX, Sources, read_files
from kvmsnapd.config.models import Settings
from kvmsnapd.config.problems import Complaint, complaint_of, unknown_key, unknown_policies, unknown_variables
from kvmsnapd.config.resolve import Policies, resolve, resolve_keys
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


@dataclass(frozen=True)
class Config:
    """A configuration that is valid as a whole."""

    path: Path
    settings: Settings
    policies: dict[str, Policy]
    """By name, as they are for domains whose entry overrides nothing."""
    selectors: dict[str, tuple[Policy, ...]]
    only_extended: frozenset[str]
    """Policies no domain is meant to have, since others extend them."""
    warnings: tuple[str, ...]
    fingerprint: str
    """Changes when the content of the files does: see :func:`kvmsnapd.config.files.fingerprint`."""
    _sources: Sources
    _spelled: dict[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """The files it was read from, the main one first."""
        return tuple(document.path for document in self._sources.documents)

    @property
    def expected_policies(self) -> tuple[str, ...]:
        """The policies that should apply to some domain."""
        return tuple(name for name in self.policies if name not in self.only_extended)

    @property
    def all_policies(self) -> tuple[Policy, ...]:
        """All policies, those with a domain's overrides as well."""
        selected = (policy for policies in self.selectors.values() for policy in policies)
        return tuple(dict.fromkeys((*self.policies.values(), *selected)))

    @property
    def state_directory(self) -> Path:
        """Where notes that must survive a reboot are kept."""
        return self.settings.state_directory or service_directory("STATE_DIRECTORY")

    @property
    def runtime_directory(self) -> Path:
        """Where the lock files are."""
        return self.settings.runtime_directory or service_directory("RUNTIME_DIRECTORY")

    def place_of(self, selector: str) -> str:
        """Return ``file:line:column`` of an entry under ``domains``."""
        return self._sources.place(("domains", self._spelled[selector]))

    def explain(self, selector: str, policy: str) -> list[Setting]:
        """Return every key of a policy as it applies to a selector's domains, and where its value comes from."""
        resolved = resolve_keys(self.settings, policy, self._spelled[selector])
        applied = next(p for p in self.selectors[selector] if p.name == policy)
        values = resolved.keys.model_dump(mode="json", exclude_none=True)
        # What is computed if nobody gives it; a null that is given asks for that as well.
        computed = {"splay": format_duration(applied.splay), "max_age": format_duration(applied.max_age)}
        settings = []
        for key in type(resolved.keys).model_fields:
            origin = resolved.origins.get(key)
            if key == "timezone" and key not in values:
                origin = ("timezone",) if "timezone" in self.settings.model_fields_set else None
            place = self._sources.place(origin) if origin else "default"
            if key in computed and key not in values:
                place = "from the schedule"
            value = values.get(key, computed.get(key, str(applied.timezone) if key == "timezone" else None))
            settings.append(Setting(key, value, place))
        return settings


def service_directory(variable: str) -> Path:
    """Return where systemd, by this environment variable, or else custom keeps such files."""
    # systemd separates several directories by colons; the unit asks for one.
    return Path(os.environ.get(variable, "").partition(":")[0] or _DIRECTORIES[variable])


def load_config(path: Path) -> Config:
    """Read the files and the environment.

    Raises:
        ConfigError: with every problem found, in the order of the files; nothing is in force then.
    """
    sources = read_files(path)
    data = {key: value for key, value in sources.data.items() if not key.startswith("_")}
    hidden = sources.data.keys() - data.keys()  # pydantic-settings has options of such names
    complaints = [Complaint((key,), unknown_key(key, ()), of_key=True) for key in hidden]
    complaints += unknown_variables() + unknown_policies(data)
    wrong: list[Location] = []
    settings: Settings | None = None
    try:
        settings = _validate(data)
    except ValidationError as error:
        found = [complaint_of(details) for details in error.errors()]
        complaints += found
        wrong = [complaint.location for complaint in found]
        settings = _validate_rest(data, wrong)
    policies = resolve(settings) if settings else Policies()
    complaints += [c for c in policies.complaints if not any(_overlap(c.location, other) for other in wrong)]
    problems = sources.problems + [sources.problem(c.location, c.message, of_key=c.of_key) for c in complaints]
    if settings is None or problems:
        raise ConfigError(sources.in_order(problems))
    warnings = (*sources.warnings, *_chain_warnings(sources, policies))
    return Config(
        path,
        settings,
        policies.by_name,
        policies.selectors,
        policies.only_extended,
        warnings,
        sources.fingerprint,
        sources,
        policies.spelled,
    )


def _validate(data: dict[str, Any]) -> Settings:
    try:
        return Settings(**data)
    except SettingsError as error:  # a variable that should hold JSON does not
        field = re.search(r'field "(\w+)"', str(error))
        name = f"{PREFIX}{field[1].upper()}" if field else PREFIX
        raise ConfigError([Problem(f"is no JSON; set single keys, as {name}__KEY", f"environment {name}")]) from error


def _validate_rest(data: dict[str, Any], wrong: Iterable[Location]) -> Settings | None:
    """Validate what is left without the keys that are wrong, so that problems between the others are told as well."""
    rest = deepcopy(data)
    for location in wrong:
        holder: Any = rest
        depth = _DEPTHS.get(str(location[0]), 0)
        for index, part in enumerate(location):
            if not isinstance(holder, dict) or part not in holder:
                break
            if index == depth and part in _STAND_INS:
                holder[part] = _STAND_INS[part]
                break
            if index + 1 == len(location) or not isinstance(holder[part], dict):
                del holder[part]
                break
            holder = holder[part]
    try:
        return Settings(**rest)
    except ValidationError:  # the environment's
        return None


def _overlap(location: Location, other: Location) -> bool:
    shorter = min(len(location), len(other))
    return location[:shorter] == other[:shorter]


def _chain_warnings(sources: Sources, policies: Policies) -> Iterable[str]:
    """Yield a warning for each selector whose external policies may keep more than the backing chain may hold."""
    for selector, chosen in policies.selectors.items():
        shortage = chain_shortage(chosen, ceiling=CHAIN_CEILING)
        if shortage:
            location = ("domains", policies.spelled[selector])
            problem = sources.problem(location, f"{shortage}; domains it applies to are refused", of_key=True)
            yield f"{problem.place}: {problem.key}: {problem.message}"
