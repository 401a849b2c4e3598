"""YAML read with the position of every key and value, so that any problem can be shown where it stands.

Only what people expect is converted: ``true``/``false``, ``null``, decimal numbers. YAML 1.1 would also turn ``on``,
``no`` and ``22:30`` into something else; here they stay text. Keys are always text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from kvmsnapd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

Location = tuple[str | int, ...]
"""The path of a key from the top of the document, such as ``("policies", "standard", "keep", "last")``."""

_MOST_BYTES = 4 * 2**20
_MOST_NODES = 500_000
_DEEPEST = 20
_KNOWN_TAGS = ("tag:yaml.org,2002:", "None")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass
class Document:
    """A YAML file: its plain data, and line and column (from 1) of each key and value."""

    path: str
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Location, tuple[int, int]] = field(default_factory=dict)
    values: dict[Location, tuple[int, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, location: Location, *, of_key: bool = False) -> str:
        """Return ``file:line:column`` of a location, or of the nearest enclosing one that the file has."""
        positions = self.keys if of_key else self.values
        while location and location not in positions:
            location, positions = location[:-1], self.keys
        line, column = positions.get(location, (1, 1))
        return f"{self.path}:{line}:{column}"


def parse_yaml(path: str, text: str) -> Document:
    """Read a YAML document whose top level is a mapping; an empty one is an empty mapping.

    Raises:
        ConfigError: the text is no YAML, has duplicate keys or unknown tags, or is too large; every problem found.
    """
    if len(text) > _MOST_BYTES:
        raise ConfigError([f"{path}:1:1: the file is larger than {_MOST_BYTES} characters"])
    document = Document(path)
    try:
        _check_depth(path, text)
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_explain(path, text, error)]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([f"{path}:1:1: not YAML: {' '.join(str(error).split())}"]) from error
    if root is not None:
        data = _Reader(document).read(root, ())
        if isinstance(data, dict):
            document.data = data
        elif data is not None:
            document.problems.append(f"{path}:1:1: the file must hold `key: value` lines, not a {_word(root)}")
    if document.problems:
        raise ConfigError(document.problems)
    return document


def _check_depth(path: str, text: str) -> None:
    """Refuse nesting that nobody writes, before composing it, which is recursive and would crash."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            place = f"{event.start_mark.line + 1}:{event.start_mark.column + 1}" if event.start_mark else "1:1"
            raise ConfigError([f"{path}:{place}: nested more than {_DEEPEST} deep"])


class _Reader:
    """Walks the node tree once, collecting data, positions and problems."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def read(self, node: yaml.Node, location: Location) -> Any:  # noqa: ANN401  # YAML data
        self._nodes += 1
        self._document.values[location] = _position(node)
        if self._nodes > _MOST_NODES or len(location) > _DEEPEST:  # aliases make a small file enormous, or endless
            place = self._document.place(location)
            raise ConfigError(
                [f"{place}: more than {_MOST_NODES} values or {_DEEPEST} levels, aliases counted in full"]
            )
        if node.tag != "!" and not str(node.tag).startswith(_KNOWN_TAGS):
            self._document.problems.append(f"{self._document.place(location)}: tag {node.tag} is not understood")
        if isinstance(node, yaml.MappingNode):
            return {key: self.read(value, (*location, key)) for key, value in self._entries(node, location)}
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*location, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # noqa: S101  # YAML knows no fourth kind
        return self._scalar(node)

    def _entries(self, node: yaml.MappingNode, location: Location) -> Iterator[tuple[str, yaml.Node]]:
        first: dict[str, int] = {}
        for key_node, value in node.value:
            line, column = _position(key_node)
            place = f"{self._document.path}:{line}:{column}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._document.problems.append(f"{place}: a key must be plain text")
                continue
            key = str(key_node.value)
            if key in first:
                self._document.problems.append(f"{place}: key `{key}` is given twice (first in line {first[key]})")
                continue
            first[key] = line
            self._document.keys[*location, key] = (line, column)
            yield key, value

    def _scalar(self, node: yaml.ScalarNode) -> Any:  # noqa: ANN401
        text = str(node.value)
        if node.style:  # quoted, or a block of text
            return text
        if text in _WORDS:
            return _WORDS[text]
        return int(text) if _INTEGER.fullmatch(text) else text


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _word(node: yaml.Node) -> str:
    return "list" if isinstance(node, yaml.SequenceNode) else "single value"


def _explain(path: str, text: str, error: yaml.MarkedYAMLError) -> str:
    """Return the parser's complaint with its place, and a hint for the mistakes everybody makes once."""
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    lines = text.splitlines()
    source = lines[line - 1] if line <= len(lines) else ""
    hint = ""
    if re.search(r"(^|[:\-\[{,])\s*[*@]", source):
        hint = '; what begins with * or @ must be quoted, such as schedule: "* * * * *" or "*-web": [standard]'
    elif "\t" in source:
        hint = "; indent with spaces, not with tabs"
    return f"{path}:{line}:{column}: not YAML: {error.problem or error.context}{hint}"
