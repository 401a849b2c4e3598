"""Which domain has which policies.

A selector is a domain's name, its UUID, a glob pattern (``web-*``) or a regular expression (``/web-[0-9]+/``). Name and
UUID come first, then the most specific pattern. An empty list of policies means "unprotected on purpose".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from math import comb
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

from kvmsnapd.errors import InvalidValueError, shown
from kvmsnapd.naming import DRILL_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmsnapd.model import Inventory
    from kvmsnapd.policy import Policy

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NESTED_SET = re.compile(r"\[\^?\[|\[[^\]]*(--|&&|~~|\|\|)")
_ONE_CHARACTER = {op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN}
_REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT}
_LONGEST_NAME = 255  # libvirt makes a file of it
_MOST_STEPS = 20_000_000
"""That matching one name may take: about half a second, on a name made for the purpose."""


class Coverage(StrEnum):
    """Why a domain has the policies it has, or none."""

    PROTECTED = "protected"
    UNPROTECTED_ON_PURPOSE = "unprotected on purpose"
    UNMATCHED = "unmatched"
    AMBIGUOUS = "ambiguous"


@dataclass(frozen=True, slots=True)
class Assignment:
    """The policies of one domain, and the patterns that decided it (several only when they disagree)."""

    domain_uuid: str
    domain_name: str
    coverage: Coverage
    policies: tuple[Policy, ...] = ()
    patterns: tuple[str, ...] = ()


def assign(selectors: Mapping[str, tuple[Policy, ...]], domains: Iterable[Inventory]) -> tuple[Assignment, ...]:
    """Decide which policies each domain has, in the order given.

    Of several patterns that fit, the one that fixes most of the name wins (:func:`weight`). If two equally specific
    ones name different policies the domain is ambiguous and gets none: guessing could delete snapshots.
    """
    patterns = [selector for selector in selectors if is_pattern(selector)]
    patterns.sort()  # the name makes the order stable
    patterns.sort(key=weight, reverse=True)
    return tuple(_assign_one(selectors, patterns, domain) for domain in domains)


def _assign_one(selectors: Mapping[str, tuple[Policy, ...]], patterns: list[str], domain: Inventory) -> Assignment:
    if domain.name.startswith(DRILL_NAME):  # ours, and gone in a moment
        return Assignment(domain.uuid, domain.name, Coverage.UNPROTECTED_ON_PURPOSE, patterns=(DRILL_NAME,))

    def assigned(coverage: Coverage, *deciding: str) -> Assignment:
        policies = selectors[deciding[0]] if coverage is Coverage.PROTECTED else ()
        return Assignment(domain.uuid, domain.name, coverage, policies, deciding)

    def decided(pattern: str) -> Assignment:
        purpose = Coverage.PROTECTED if selectors[pattern] else Coverage.UNPROTECTED_ON_PURPOSE
        return assigned(purpose, pattern)

    exact = [selector for selector in (domain.name, domain.uuid) if selector in selectors]
    if exact:
        agree = all(set(selectors[selector]) == set(selectors[exact[0]]) for selector in exact)
        return decided(exact[0]) if agree else assigned(Coverage.AMBIGUOUS, *exact)
    matching = [pattern for pattern in patterns if fits(pattern, domain.name)]
    if not matching:
        return assigned(Coverage.UNMATCHED)
    best = [pattern for pattern in matching if weight(pattern) == weight(matching[0])]
    if any(set(selectors[pattern]) != set(selectors[best[0]]) for pattern in best):
        return assigned(Coverage.AMBIGUOUS, *best)
    return decided(best[0])


def fits(pattern: str, name: str) -> bool:
    """Tell whether a pattern fits a domain's name as a whole."""
    return bool(_compile(pattern).fullmatch(name)) if is_regex(pattern) else fnmatchcase(name, pattern)


def is_pattern(selector: str) -> bool:
    """Tell whether a selector is a glob pattern or a regular expression, and not a name."""
    return is_regex(selector) or any(character in selector for character in "*?[")


def is_regex(selector: str) -> bool:
    """Tell whether a selector is a regular expression; libvirt has no domain with a slash in its name."""
    return len(selector) > 2 and selector[0] == selector[-1] == "/"  # noqa: PLR2004


def is_uuid(selector: str) -> bool:
    """Tell whether a selector is a UUID."""
    return bool(_UUID.fullmatch(selector))


def weight(pattern: str) -> tuple[int, int]:
    """Return how many characters of a domain's name the pattern fixes, and how long the name is; both at least.

    A class such as ``[0-9]`` fixes none, nor does ``(a|b)``. Of longer alternatives the one that fixes least counts.
    """
    if is_regex(pattern):
        return _regex_weight(pattern)
    without_classes = re.sub(r"\[!?\]?[^\]]*\]", "?", pattern)
    shortest = len(without_classes) - without_classes.count("*")
    return shortest - without_classes.count("?"), shortest


def check_selector(selector: str) -> str:
    """Return ``selector`` unchanged if it can select domains.

    Raises:
        InvalidValueError: it is empty, or no regular expression, or one that could take for ever to match some name.
    """
    if not 0 < len(selector) <= _LONGEST_NAME:
        msg = f"write the name, UUID or pattern of a domain, in up to {_LONGEST_NAME} characters"
        raise InvalidValueError(msg)
    if is_regex(selector):
        if _NESTED_SET.search(selector):  # of which python only warns
            msg = f"{shown(selector)} is no regular expression: [[ ] and doubled signs in [ ] are ambiguous"
            raise InvalidValueError(msg)
        try:
            _compile(selector)
            repeats, ways = _choices(_parser.parse(selector[1:-1]))
        except (re.error, RecursionError, OverflowError) as error:
            msg = f"{shown(selector)} is no regular expression: {error}"
            raise InvalidValueError(msg) from error
        if comb(_LONGEST_NAME + repeats, repeats) * ways > _MOST_STEPS:
            msg = f"{shown(selector)} takes too long to match some names: use fewer of * + ? {{}} |, or several entries"
            raise InvalidValueError(msg)
    elif "/" in selector:
        msg = f"{shown(selector)} fits no domain, no name has a slash; a regular expression begins and ends with one"
        raise InvalidValueError(msg)
    elif "[" in selector and "]" not in selector[selector.index("[") :]:
        msg = f"{shown(selector)} has a bracket that is not closed"
        raise InvalidValueError(msg)
    return selector


def missing_domains(selectors: Iterable[str], domains: Iterable[Inventory]) -> tuple[str, ...]:
    """Return the selectors that name one domain and fit none: a typing error, or the domain is gone."""
    known = {word for domain in domains for word in (domain.name, domain.uuid)}
    return tuple(selector for selector in selectors if selector not in known and not is_pattern(selector))


@lru_cache(maxsize=2**16)
def _compile(selector: str) -> re.Pattern[str]:
    return re.compile(selector[1:-1])


@lru_cache(maxsize=2**16)
def _regex_weight(selector: str) -> tuple[int, int]:
    return _fixed(_parser.parse(selector[1:-1]))


def _fixed(items: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
    """Return the least number of literal characters, and of all characters, in what the parsed expression matches."""
    fixed = shortest = 0
    for kind, argument in items:
        more = (int(kind is op.LITERAL), int(kind in _ONE_CHARACTER))
        if kind is op.BRANCH:
            more = min(map(_fixed, argument[1]))
        elif kind is op.SUBPATTERN:
            more = _fixed(argument[-1])
        elif kind in _REPEATS:
            once = _fixed(argument[2])
            more = (argument[0] * once[0], argument[0] * once[1])
        fixed, shortest = fixed + more[0], shortest + more[1]
    return fixed, shortest


def _choices(items: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
    """Return how many repeats of variable length there are, and in how many ways alternatives can be chosen.

    Raises:
        InvalidValueError: it may backtrack without limit.
    """
    repeats, ways = 0, 1
    for kind, argument in items:
        inner: list[tuple[int, int]] = []
        if kind in _REPEATS:
            shortest, longest, body = argument
            if longest > 1 and any(part not in _ONE_CHARACTER for part, _ in body):
                msg = "only single characters and [classes] may be repeated, or some names take for ever to match"
                raise InvalidValueError(msg)
            repeats += shortest != longest
            inner = [_choices(body)]
        elif kind is op.BRANCH:
            inner = [_choices(alternative) for alternative in argument[1]]
            ways *= len(inner)
        elif kind is op.SUBPATTERN:
            inner = [_choices(argument[-1])]
        elif kind not in {*_ONE_CHARACTER, op.AT}:
            msg = "look-around, references and the like are not understood here; use [classes], (a|b) and * + ? {}"
            raise InvalidValueError(msg)
        for more, factor in inner:
            repeats, ways = repeats + more, ways * factor
    return repeats, ways
