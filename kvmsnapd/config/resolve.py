"""From what is written to what applies: defaults, what a policy extends, and what a domain's entry overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kvmsnapd.config.models import BeforeHookSettings, HookSettings, PolicyKeys, Settings, VerifySettings
from kvmsnapd.config.problems import Complaint
from kvmsnapd.config.yaml_document import format_key
from kvmsnapd.matching import is_uuid
from kvmsnapd.model import Kind
from kvmsnapd.policy import ConsistencyRule, DiskSelection, DrillRules, Hook, Hooks, Policy
from kvmsnapd.schedule import parse_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from zoneinfo import ZoneInfo

    from kvmsnapd.config.yaml_document import Location

_LONGEST_SPLAY = timedelta(minutes=5)
_NEEDED = ("schedule", "keep")
_DEEPEST = 20
"""Policies between one and what it extends in the end."""


@dataclass(frozen=True)
class Resolved:
    """One policy as it applies, and which place each key came from; keys that no place gives have their default."""

    keys: PolicyKeys
    origins: dict[str, Location]
    """Where each key that is given is given; a null counts, and takes back what others give."""
    depths: dict[str, int]
    """How near to the domain that place is; the larger, the nearer."""

    def to_policy(self, name: str, default_zone: ZoneInfo) -> Policy:
        """Return the core's value of it; all keys are there."""
        keys = self.keys
        zone = keys.timezone or default_zone
        schedule = parse_schedule(keys.schedule, zone)
        interval = schedule.longest_interval
        splay = min(interval / 10, _LONGEST_SPLAY) if keys.splay is None else keys.splay
        return Policy(
            name=name,
            schedule=schedule,
            keep=keys.keep.rules(),
            timezone=zone,
            kind=Kind(keys.kind),
            consistency=keys.consistency or ConsistencyRule.FILESYSTEM_PREFERRED,
            catch_up=keys.catch_up == "once",
            splay=splay,
            max_age=2 * interval + splay if keys.max_age is None else keys.max_age,
            max_deletes_per_run=keys.max_deletes_per_run,
            max_chain_depth=keys.max_chain_depth,
            memory_live=keys.memory == "live",
            max_pause=keys.max_pause,
            min_free_bytes=int(keys.min_free),
            overlay_directory=keys.overlay_directory,
            disks=DiskSelection(tuple(keys.disks.include), tuple(keys.disks.exclude)),
            hooks=Hooks(_hook(keys.hooks.before), _hook(keys.hooks.after), _hook(keys.hooks.on_failure)),
            drill=_drill(keys.verify, zone),
        )


@dataclass
class Policies:
    """All policies, and which selector has which."""

    by_name: dict[str, Policy] = field(default_factory=dict)
    """Those that are complete by themselves."""
    selectors: dict[str, tuple[Policy, ...]] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    """How each selector is written; a UUID may be in capitals."""
    complaints: list[Complaint] = field(default_factory=list)


def resolve(settings: Settings) -> Policies:
    """Make the core's policies of validated settings; complain of what no single key can tell."""
    answer = Policies()
    circular = _circles(settings)
    answer.complaints += [Complaint(("policies", name, "extends"), text) for name, text in circular.items() if text]
    named = {name for entry in settings.domains.values() for name in entry}
    bases = {policy.extends for policy in settings.policies.values()}
    for name in settings.policies.keys() - circular.keys():
        policy = _make(settings, name, None, answer, must=name not in named and name not in bases)
        if policy:
            answer.by_name[name] = policy
    answer.by_name = {name: answer.by_name[name] for name in settings.policies if name in answer.by_name}
    for selector, entry in settings.domains.items():
        _select(settings, selector, [name for name in dict.fromkeys(entry) if name not in circular], answer)
    return answer


def resolve_keys(settings: Settings, name: str, selector: str | None = None) -> Resolved:
    """Return the keys of one policy as they apply, to the domains of ``selector`` if one is given."""
    values: dict[str, Any] = {}
    origins: dict[str, Location] = {}
    depths: dict[str, int] = {}
    for depth, (location, keys) in enumerate(_places(settings, name, selector)):
        for key in keys.model_fields_set - {"extends"}:
            values[key] = getattr(keys, key)
            origins[key] = (*location, key)
            depths[key] = depth
    return Resolved(PolicyKeys.model_construct(**values), origins, depths)


def _places(settings: Settings, name: str, selector: str | None) -> Iterator[tuple[Location, PolicyKeys]]:
    """Yield the places that say something about a policy, the nearest last."""
    yield ("defaults",), settings.defaults
    line = [name]
    while base := _base(settings, line[-1]):
        line.append(base)
    for policy in reversed(line):
        yield ("policies", policy), settings.policies[policy]
    entry = settings.domains.get(selector or "")
    if isinstance(entry, dict):
        yield ("domains", selector or "", name), entry[name]


def _base(settings: Settings, name: str) -> str | None:
    base = settings.policies[name].extends
    return base if base in settings.policies else None


def _circles(settings: Settings) -> dict[str, str | None]:
    """Return the policies that extend without end, with what is wrong; None for those that only lead into a circle."""
    found: dict[str, str | None] = {}
    for name in settings.policies:
        line = [name]
        while (base := _base(settings, line[-1])) and base not in line and len(line) <= _DEEPEST:
            line.append(base)
        if base == name:
            circle = " extends ".join(f"`{policy}`" for policy in [*line, base])
            found[name] = f"{circle}; one of them must stand on its own"
        elif base:
            deep = f"more than {_DEEPEST} policies extend one another here; take some out"
            found[name] = None if base in line else deep
    return found


def _select(settings: Settings, selector: str, names: list[str], answer: Policies) -> None:
    """Give a selector the policies of these names."""
    entry = settings.domains[selector]
    if isinstance(entry, list):
        answer.complaints += [
            Complaint(("domains", selector, index), f"policy `{name}` is named twice; remove one")
            for index, name in enumerate(entry)
            if name in entry[:index]
        ]
    chosen = []
    for name in names:
        plain = answer.by_name.get(name) if isinstance(entry, list) or not entry[name].model_fields_set else None
        policy = plain or _make(settings, name, selector, answer, must=True)
        if policy:
            chosen.append(policy)
    if len({policy.kind for policy in chosen}) > 1:
        kinds = ", ".join(f"{policy.name} is {policy.kind}" for policy in chosen)
        problem = f"a domain has one kind of snapshot, for ever, and {kinds}; give them one kind, or take one out"
        answer.complaints.append(Complaint(("domains", selector), problem))
    known = selector.lower() if is_uuid(selector) else selector
    if known in answer.selectors:
        first = ("domains", answer.spelled[known])
        answer.complaints.append(Complaint(("domains", selector), "this UUID is given twice", of_key=True, first=first))
    answer.selectors[known] = tuple(chosen)
    answer.spelled[known] = selector


def _make(settings: Settings, name: str, selector: str | None, answer: Policies, *, must: bool) -> Policy | None:
    """Return one policy as it applies; None if it contradicts itself, or is not complete, which it need not be."""
    if name not in settings.policies:
        return None
    resolved = resolve_keys(settings, name, selector)
    complaints = list(_contradictions(resolved))
    missing = [key for key in _NEEDED if key not in resolved.origins]
    if missing and must:
        user = f"; `{format_key(('domains', selector))}` uses it without" if selector else ""
        text = f"is missing: give it here, in defaults, in what it extends, or in each domain's entry{user}"
        places = tuple(place for place, _ in _places(settings, name, selector))
        told = {complaint.location for complaint in answer.complaints}
        complaints += [
            Complaint(("policies", name, key), f"`{key}` {text}", inputs=places)
            for key in missing
            if ("policies", name, key) not in told
        ]
    answer.complaints += complaints
    return None if complaints or missing else resolved.to_policy(name, settings.timezone)


def _drill(written: VerifySettings, zone: ZoneInfo) -> DrillRules:
    schedule = parse_schedule(written.schedule, zone) if written.schedule else None
    max_age = written.max_age or (2 * schedule.longest_interval if schedule else None)
    memory = int(written.memory) if written.memory else None
    return DrillRules(written.deadline, schedule, max_age, written.console, memory)


def _hook(written: HookSettings | None) -> Hook | None:
    if written is None:
        return None
    required = isinstance(written, BeforeHookSettings) and written.required
    return Hook(tuple(written.command), written.timeout, required)


def _contradictions(resolved: Resolved) -> Iterator[Complaint]:
    """Yield key and problem for what is allowed alone and means nothing together."""
    keys = resolved.keys
    internal = keys.kind == "internal"
    if keys.memory and internal:
        text = "an internal snapshot of a running guest always holds its RAM; remove this, or kind: internal"
        yield _blame(resolved, text, "memory", "kind")
    elif keys.consistency not in {None, ConsistencyRule.MEMORY} and (internal or keys.memory):
        why = "kind: internal" if internal else "memory: live"
        text = f"with {why} the guest's RAM is saved, so the consistency is memory; remove one of the two"
        yield _blame(resolved, text, "consistency", "kind" if internal else "memory")
    elif keys.consistency is ConsistencyRule.MEMORY and not internal and not keys.memory:
        text = "memory needs memory: live beside it, or kind: internal"
        yield _blame(resolved, text, "consistency", "kind", "memory")
    if keys.memory and (keys.disks.include or keys.disks.exclude):
        text = "with memory: live all disks are needed: the RAM cannot be resumed beside a disk of another time"
        yield _blame(resolved, text, "disks", "memory")
    if internal and (keys.disks.include or keys.disks.exclude):
        yield _blame(resolved, "internal snapshots cover all disks or none; use kind: external", "disks", "kind")
    if internal and keys.overlay_directory:
        text = "internal snapshots have no overlays; use kind: external"
        yield _blame(resolved, text, "overlay_directory", "kind")


def _blame(resolved: Resolved, text: str, *involved: str) -> Complaint:
    """Return the complaint at the nearest of the places that give these keys, and how to take back the others."""
    given = {key: resolved.origins[key] for key in involved if key in resolved.origins}
    nearest = max(given, key=lambda key: resolved.depths[key])
    for key, location in given.items():
        if location[:-1] != given[nearest][:-1]:
            text += f"; `{key}` is given under {format_key(location[:-1])}"
            text += "" if key == "kind" else f", `{key}: null` here takes it back"
    return Complaint(given[nearest], text, inputs=tuple(given.values()))
