"""From the file to the core's values: read, override by environment, validate, and show all problems at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from kvmsnapd.config.models import PolicySettings, Settings
from kvmsnapd.config.yaml_document import Document, Location, parse_yaml
from kvmsnapd.errors import ConfigError, InvalidValueError
from kvmsnapd.model import Kind
from kvmsnapd.policy import Policy
from kvmsnapd.schedule import parse_schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from zoneinfo import ZoneInfo

    from pydantic_core import ErrorDetails

DEFAULT_PATH = Path("/etc/kvmsnapd/kvmsnapd.yaml")
_LONGEST_SPLAY = timedelta(minutes=5)


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
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}; nothing was changed"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    document = parse_yaml(str(path), text)
    hidden = [key for key in document.data if key.startswith("_")]  # pydantic-settings has options of such names
    try:
        settings = Settings(**{key: value for key, value in document.data.items() if key not in hidden})
    except ValidationError as error:
        details = [(tuple(e["loc"]), _describe(e)) for e in error.errors()]
        raise ConfigError(_in_file_order(document, details)) from error
    return _resolve(path, settings, document, hidden)


def _resolve(path: Path, settings: Settings, document: Document, hidden: list[str]) -> Config:
    """Make the core's policies of validated settings, checking what no single key can tell."""
    problems: list[tuple[Location, str]] = [((key,), f"unknown key `{key}`") for key in hidden]
    policies: dict[str, Policy] = {}
    for name, written in settings.policies.items():
        try:
            policies[name] = _policy(name, written, settings.timezone)
        except InvalidValueError as error:
            problems.append((("policies", name, "keep"), str(error)))
    selectors: dict[str, tuple[Policy, ...]] = {}
    for selector, names in settings.domains.items():
        for index, name in enumerate(names):
            if name not in settings.policies:
                known = f"known are {', '.join(settings.policies)}" if settings.policies else "there is none"
                problem = f"unknown policy `{name}`{_suggest(name, settings.policies)}; {known}"
                problems.append((("domains", selector, index), problem))
            elif name in names[:index]:
                problems.append((("domains", selector, index), f"policy `{name}` is named twice"))
        chosen = tuple(policies[name] for name in names if name in policies)
        if len({policy.kind for policy in chosen}) > 1:
            kinds = ", ".join(f"{policy.name} is {policy.kind}" for policy in chosen)
            problem = f"a domain has one kind of snapshot, for ever, and {kinds}; mixing kinds loses data"
            problems.append((("domains", selector), problem))
        selectors[selector] = chosen
    if problems:
        raise ConfigError(_in_file_order(document, problems))
    return Config(path, settings, policies, selectors, tuple(_chain_warnings(document, selectors)))


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
        max_age=written.max_age or 2 * interval + splay,
        max_deletes_per_run=written.max_deletes_per_run,
        max_chain_depth=written.max_chain_depth,
    )


def _chain_warnings(document: Document, selectors: Mapping[str, tuple[Policy, ...]]) -> Iterable[str]:
    """Yield a warning for each selector whose external policies may keep more than the backing chain may hold."""
    for selector, policies in selectors.items():
        external = [policy for policy in policies if policy.kind is Kind.EXTERNAL]
        if not external:
            continue
        room = min(policy.max_chain_depth for policy in external)
        most = [(policy.name, policy.keep.most(policy.schedule.shortest_interval)) for policy in external]
        if any(count is None for _, count in most) or sum(count or 0 for _, count in most) >= room:
            # One more than is kept exists while the newest is taken and the oldest not yet deleted.
            place = document.place(("domains", selector), of_key=True)
            spelled = " + ".join(f"{'no limit' if n is None else n} ({name})" for name, n in most)
            yield (
                f"{place}: domains.{selector}: the policies may keep {spelled} snapshots, and one more is there while "
                f"a new one is taken, but max_chain_depth is {room}; takes are refused once the chain is full"
            )


def _describe(error: ErrorDetails) -> str:
    """Return pydantic's complaint in our words."""
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        names = _allowed_keys(location[:-1])
        return f"unknown key `{location[-1]}`{_suggest(str(location[-1]), names)}; allowed are {', '.join(names)}"
    if error["type"] == "missing":
        return f"`{location[-1]}` is missing"
    if "error" in error.get("ctx", {}) and isinstance(error["ctx"]["error"], InvalidValueError):
        return str(error["ctx"]["error"])
    given = error["input"]
    shown = f", not {given!r}" if isinstance(given, (str, int, float, bool)) or given is None else ""
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}{shown}"


def _allowed_keys(location: Location) -> list[str]:
    """Return the keys of the section at this location, by walking the models."""
    model: Any = Settings
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            model = PolicySettings if part == "policies" else annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _suggest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _in_file_order(document: Document, problems: Iterable[tuple[Location, str]]) -> list[str]:
    """Return the problems as lines ``place: key path: what``, sorted by place."""
    lines = []
    for location, problem in problems:
        variable = "KVMSNAPD_" + "__".join(map(str, location)).upper()
        path = ".".join(str(part) for part in location if part != "[key]")
        if variable in os.environ:
            lines.append(((0, 0), f"environment {variable}: {problem}"))
            continue
        known = tuple(part for part in location if part != "[key]")
        of_key = problem.startswith("unknown key") or "[key]" in location
        place = document.place(known, of_key=of_key)
        line, column = place.rsplit(":", 2)[1:]
        lines.append(((int(line), int(column)), f"{place}: {path}: {problem}"))
    return [line for _, line in sorted(lines)]
