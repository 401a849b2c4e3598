"""The environment variables that override single values of the files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmsnapd.config.models import LogSettings, MetricsSettings, PolicyKeys, Settings
from kvmsnapd.config.problems import unknown_key
from kvmsnapd.config.yaml_document import printable
from kvmsnapd.errors import Problem

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kvmsnapd.config.yaml_document import Location

_SECTIONS: dict[str, type[BaseModel]] = {"metrics": MetricsSettings, "log": LogSettings, "defaults": PolicyKeys}
_IN_FILES = {"policies", "domains", "keep", "disks", "hooks"}
"""What has a structure, and case that variables do not keep."""


@dataclass
class Environment:
    """Which variable gives which value, and what is wrong with those of our prefix that give none."""

    variables: dict[Location, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def variable_of(self, location: Location) -> str | None:
        """Return the variable that gives this key, None if a file does."""
        return self.variables.get(location[:1]) or self.variables.get(location[:2])


def read_environment() -> Environment:
    """Look at the variables of our prefix; pydantic-settings reads their values."""
    prefix = str(Settings.model_config["env_prefix"])
    environment = Environment()
    for variable in sorted(os.environ):
        if variable.upper().startswith(prefix):
            location = tuple(variable[len(prefix) :].lower().split("__"))
            wrong = _wrong(location, prefix) if _is_text(variable) else "is not UTF-8 text"
            if location in environment.variables:
                wrong = f"gives the same as {environment.variables[location]}; unset one of them"
            if wrong:
                environment.problems.append(Problem(wrong, f"environment {printable(variable)}"))
            else:
                environment.variables[location] = variable
    return environment


def _wrong(location: tuple[str, ...], prefix: str) -> str | None:
    section, *keys = location
    if section in _SECTIONS and not keys:
        return f"a section cannot be given whole; set single keys, as {prefix}{section.upper()}__KEY"
    if section in _IN_FILES or (section in _SECTIONS and keys[0] in _IN_FILES):
        return f"`{'.'.join(location)}` belongs into a file, such as conf.d/10-this-host.yaml"
    if section not in Settings.model_fields:
        return unknown_key(section, ())
    if section in _SECTIONS and keys[0] not in _SECTIONS[section].model_fields:
        return unknown_key(keys[0], (section,))
    if len(location) > (2 if section in _SECTIONS else 1):
        return f"`{'.'.join(location[:-1])}` is a single value, and has no `{location[-1]}`"
    return None


def _is_text(variable: str) -> bool:
    """Tell whether name and value are UTF-8; python keeps other bytes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in variable + os.environ[variable])
