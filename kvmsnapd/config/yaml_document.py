"""YAML read with the position of every key and value, so that any problem can be shown where it stands.

Only what people expect is converted: ``true``/``false``, ``null``, decimal numbers. YAML 1.1 would also turn ``on``,
``no`` and ``22:30`` into something else; here they stay text. Keys are always text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from kvmsnapd.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

Location = tuple[str | int, ...]
"""The path of a key from the top of the document, such as ``("policies", "standard", "keep", "last")``."""

MOST_NODES = 200_000
"""Values in a file, those that aliases repeat counted each time: ten thousand domains with overrides fit."""

_DEEPEST = 20
_KNOWN_TAGS = ("tag:yaml.org,2002:", "None")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # those of YAML 1.1, by which the parser counts lines
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # YAML 1.1, 5.1
_WIDEST_EXCERPT = 110
_MOST_PROBLEMS = 200  # more than are told
_LONGEST_KEY = 255
_HINTS = {
    "mapping values are not allowed in this context": "; quote text that contains `: `, or look at the indentation",
    "but found another document": "; a file holds one, remove the line `---` or put the rest into conf.d",
    "did not find expected key": "; look at the indentation",
    "could not find expected ':'": "; or the line above lacks a colon, or the blank after it",
    "found unknown escape character": "; write text with a \\ in single quotes",
}
"""What to do about some of the parser's complaints."""

_QUOTE = 'what begins with * or @ must be quoted, such as schedule: "* * * * *" or "*-web": [standard]'
_ENDED = "found unexpected end of stream"
_OPENED = {
    "while parsing a flow mapping": "this brace",
    "while parsing a flow sequence": "this bracket",
    "while scanning a quoted scalar": "this quote",
}


@dataclass(frozen=True, slots=True)
class Span:
    """Where something stands on its first line; line and column count characters from 1."""

    line: int
    column: int
    width: int = 1


@dataclass
class Document:
    """A YAML file: its plain data, and where each key and value stands."""

    path: str
    lines: list[str]
    data: dict[str, Any] = field(default_factory=dict)
    keys: dict[Location, Span] = field(default_factory=dict)
    values: dict[Location, Span] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def span(self, location: Location, *, of_key: bool = False) -> Span:
        """Return where a location stands, or the nearest enclosing one that the file has.

        A value that begins in a line below its key is shown by the key.
        """
        while location and location not in self.values:
            location, of_key = location[:-1], True
        key, value = self.keys.get(location), self.values.get(location, Span(1, 1))
        return key if key and (of_key or value.line > key.line) else value

    def problem(self, span: Span, message: str, location: Location = ()) -> Problem:
        """Return a problem of this file that shows the line it is about."""
        return Problem(message, self.path, span.line, span.column, format_key(location), self._excerpt(span))

    def _excerpt(self, span: Span) -> str:
        """Return the line with a caret below, or the part of a long one that is around the place."""
        line = self.lines[span.line - 1] if span.line <= len(self.lines) else ""
        at = span.column - 1
        start = max(0, at - _WIDEST_EXCERPT // 2) if len(line) > _WIDEST_EXCERPT else 0
        part = printable(line[start:][:_WIDEST_EXCERPT].replace("\t", " "))
        before, marked = part[: at - start], part[at - start :][: span.width]
        return (
            f"{span.line:>5} | {part}".rstrip() + f"\n      | {' ' * _columns(before)}{'^' * max(1, _columns(marked))}"
        )


def printable(text: str) -> str:
    """Return the text without what a terminal would not show as it is."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def format_key(location: Location) -> str:
    """Return the path of a key as people write it: ``domains."web-*"[0]``."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            word = part if re.fullmatch(r"[\w-]+", part) else f'"{printable(part)}"'
            text += f".{word}" if text else word
    return text


def to_yaml(value: Any) -> str:  # noqa: ANN401  # YAML data
    """Return plain data as people write it in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def parse_yaml(path: str, text: str) -> Document:
    """Read a YAML document whose top level is a mapping; an empty one is an empty mapping.

    Duplicate keys and unknown tags are among the document's problems; its data is what remains without them.

    Raises:
        ConfigError: the text is no YAML, or too much of it.
    """
    document = Document(path, _LINE_BREAK.split(text.removeprefix("\ufeff")))
    forbidden = _FORBIDDEN.search(text.removeprefix("\ufeff"))
    if forbidden:
        before = _LINE_BREAK.split(text.removeprefix("\ufeff")[: forbidden.start()])
        place = Span(len(before), len(before[-1]) + 1)
        message = f"not YAML: the character U+{ord(forbidden[0]):04X} is not allowed; remove it"
        raise ConfigError([document.problem(place, message)])
    directives = re.search("^%TAG", text, re.MULTILINE)  # many of them take the parser minutes
    if directives:
        place = Span(len(_LINE_BREAK.split(text[: directives.start()])), 1)
        raise ConfigError([document.problem(place, "not YAML: %TAG is not understood; remove it")])
    try:
        _check_size(document, text)
        root = yaml.compose(text, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_explain(document, error)]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([document.problem(Span(1, 1), f"not YAML: {' '.join(str(error).split())}")]) from error
    if root is not None:
        data = _Reader(document).read(root, ())
        if isinstance(data, dict):
            document.data = data
        elif data is not None:
            word = "list" if isinstance(root, yaml.SequenceNode) else "single value"
            message = f"the file must hold `key: value` lines, not a {word}"
            raise ConfigError([document.problem(_span(root), message)])
    return document


def _check_size(document: Document, text: str) -> None:
    """Refuse what nobody writes before composing it, which is recursive and would crash, or take all memory."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > _DEEPEST or nodes > MOST_NODES:
            mark = event.start_mark
            place = Span(mark.line + 1, mark.column + 1) if mark else Span(1, 1)
            what = f"nested more than {_DEEPEST} deep" if depth > _DEEPEST else f"more than {MOST_NODES} values"
            raise ConfigError([document.problem(place, what)])


class _Reader:
    """Walks the node tree once, collecting data, positions and problems."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0

    def read(self, node: yaml.Node, location: Location) -> Any:  # noqa: ANN401  # YAML data
        self._nodes += 1
        self._document.values[location] = _span(node)
        if self._nodes > MOST_NODES or len(location) > _DEEPEST:  # aliases make a small file enormous, or endless
            message = f"more than {MOST_NODES} values, aliases counted in full"
            if len(location) > _DEEPEST:
                message = f"nested more than {_DEEPEST} deep, or an alias of what contains itself"
            raise ConfigError([self._document.problem(self._document.span(location[:1], of_key=True), message)])
        if node.tag != "!" and not str(node.tag).startswith(_KNOWN_TAGS):
            self._report(_span(node), f"tag {node.tag} is not understood; remove it", location)
        if isinstance(node, yaml.MappingNode):
            return {key: self.read(value, (*location, key)) for key, value in self._entries(node, location)}
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*location, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # noqa: S101  # YAML knows no fourth kind
        return self._scalar(node)

    def _entries(self, node: yaml.MappingNode, location: Location) -> Iterator[tuple[str, yaml.Node]]:
        seen: set[str] = set()
        for key_node, value in node.value:
            span = _span(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._report(span, "a key must be plain text", location)
                continue
            key = str(key_node.value)
            if len(key) > _LONGEST_KEY:
                self._report(span, f"a key of more than {_LONGEST_KEY} characters is no name of anything", location)
                continue
            if key in seen:
                first = self._document.keys[*location, key]
                places = f"first in {self._document.path}:{first.line}:{first.column}"
                self._report(
                    span, f"key `{printable(key)}` is given twice, {places}; keep one of them", (*location, key)
                )
                continue
            seen.add(key)
            self._document.keys[*location, key] = span
            yield key, value

    def _report(self, span: Span, message: str, location: Location) -> None:
        if len(self._document.problems) <= _MOST_PROBLEMS:
            self._document.problems.append(self._document.problem(span, message, location))

    def _scalar(self, node: yaml.ScalarNode) -> Any:  # noqa: ANN401
        text = str(node.value)
        if node.style:  # quoted, or a block of text
            return text
        if text in _WORDS:
            return _WORDS[text]
        return int(text) if _INTEGER.fullmatch(text) else text


def _span(node: yaml.Node) -> Span:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 1
    return Span(start.line + 1, start.column + 1, max(1, width))


def _columns(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _explain(document: Document, error: yaml.MarkedYAMLError) -> Problem:
    """Return the parser's complaint with its place, and a hint for the mistakes everybody makes once."""
    problem, opened = str(error.problem or error.context), error.context_mark
    mark = error.problem_mark or opened
    span = Span(mark.line + 1, mark.column + 1) if mark else Span(1, 1)
    if span.line > len(document.lines):  # the parser was waiting for more
        span = Span(len(document.lines), len(document.lines[-1]) + 1)
    if opened and str(error.context) in _OPENED and (opened.line + 1 < span.line or problem == _ENDED):
        # Where something is opened that is never closed, the place where that is noticed tells nothing.
        place = Span(opened.line + 1, opened.column + 1)
        return document.problem(place, f"not YAML: {_OPENED[str(error.context)]} is not closed by line {span.line}")
    source = document.lines[span.line - 1] if span.line <= len(document.lines) else ""
    hint = _HINTS.get(problem, "")
    above = document.lines[span.line - 2].partition(" #")[0].rstrip() if span.line > 1 else ""
    before = source[: span.column - 1].rstrip()
    if re.search(r"(^|[:\-\[{,])\s*[*@]", source):
        return document.problem(span, f"not YAML: {_QUOTE}")
    if "\t" in source:
        hint = "; indent with spaces, not with tabs"
    elif "\xa0" in source + above:
        hint = "; there is a no-break space (U+00A0) in this line or the one above, write a blank"
    elif problem.startswith("mapping values") and above and not above.endswith(":") and ": " not in above:
        hint = "; the line above lacks a colon, or the blank after it"
    elif problem == "did not find expected key" and before and before[-1] in "\"'])}":
        hint = "; there is a bracket or quote too many, or use the other kind of quotes"
    elif opened and opened.line + 1 < span.line and str(error.context).startswith("while"):
        hint = f" ({error.context}, begun in line {opened.line + 1}){hint}"
    return document.problem(span, f"not YAML: {problem}{hint}")
