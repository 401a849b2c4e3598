"""The files of a configuration, read as one: the main file, and ``conf.d/*.yaml`` beside it."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmsnapd.config.yaml_document import MOST_NODES, Document, parse_yaml
from kvmsnapd.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvmsnapd.config.yaml_document import Location

PREFIX = "KVMSNAPD_"
"""Of the environment variables that override the files."""

_MOST_BYTES = 4 * 2**20
_MERGED = ("policies", "domains", "defaults", "metrics", "log")
"""Sections of which each file may give some entries."""


@dataclass
class Sources:
    """What all files say together, and which of them says it."""

    documents: list[Document]
    data: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fingerprint: str = ""
    _holders: dict[Location, Document] = field(default_factory=dict)

    def problem(self, location: Location, message: str, *, of_key: bool = False) -> Problem:
        """Return a problem of the key at this location, at the place where its value was given."""
        variable = variable_of(location)
        if variable:
            return Problem(message, f"environment {variable}")
        document = self._holder(location)
        return document.problem(document.span(location, of_key=of_key), message, location)

    def place(self, location: Location) -> str:
        """Return ``file:line:column`` of a key, or the environment variable that gave it."""
        variable = variable_of(location)
        if variable:
            return f"environment {variable}"
        document = self._holder(location)
        span = document.span(location, of_key=True)
        return f"{document.path}:{span.line}:{span.column}"

    def in_order(self, problems: Iterable[Problem]) -> list[Problem]:
        """Return the problems sorted by place: those of the environment first, then file by file; each once."""
        rank = {document.path: index for index, document in enumerate(self.documents)}
        return sorted(dict.fromkeys(problems), key=lambda p: (rank.get(p.file, -1), p.line, p.column, p.message))

    def add(self, document: Document) -> None:
        """Take in one more file; what an earlier one has said already becomes a problem that names both places."""
        self.problems += document.problems
        for key, value in document.data.items():
            known = self.data.get(key)
            if key not in self.data or known is None:
                self.data[key] = dict(value) if isinstance(value, dict) else value
                self._holders[key,] = document
                if isinstance(value, dict):
                    self._holders.update({(key, entry): document for entry in value})
            elif key not in _MERGED:
                self._conflict((key,), document)
            elif isinstance(known, dict) and isinstance(value, dict):
                for entry, content in value.items():
                    if entry in known:
                        self._conflict((key, entry), document)
                    else:
                        known[entry] = content
                        self._holders[key, entry] = document
            elif value is not None:
                wrong = document if isinstance(known, dict) else self._holders[key,]
                self.problems.append(wrong.problem(wrong.span((key,)), "write `key: value` lines below it", (key,)))

    def _holder(self, location: Location) -> Document:
        first = self._holders.get(location[:1], self.documents[0])
        return self._holders.get(location[:2], first)

    def _conflict(self, location: Location, document: Document) -> None:
        message = f"`{location[-1]}` is given twice, first in {self.place(location)}; keep one of them"
        self.problems.append(document.problem(document.span(location, of_key=True), message, location))


def read_files(path: Path) -> Sources:
    """Read the main file and those of ``conf.d``, in the order of their names.

    Raises:
        ConfigError: one cannot be read or is no YAML; problems of all files.
    """
    sources = Sources([])
    problems: list[Problem] = []
    contents: list[tuple[Path, bytes]] = []
    nodes = 0
    parts, sources.warnings = _list_parts(path)
    for file in (path, *parts):
        try:
            contents.append((file, _read(file)))
            document = parse_yaml(str(file), _decode(*contents[-1]))
        except ConfigError as error:
            problems += error.problems
            continue
        nodes += len(document.values)
        if nodes > MOST_NODES:
            raise ConfigError([Problem(f"the files up to this one have more than {MOST_NODES} values", str(file))])
        sources.documents.append(document)
        sources.add(document)
    if problems:
        raise ConfigError(problems + sources.problems)
    sources.fingerprint = _digest(contents)
    return sources


def fingerprint(path: Path) -> str:
    """Return what changes when, and only when, what is in the files changes; unreadable ones count as such."""
    try:
        return _digest((file, _read(file)) for file in (path, *_list_parts(path)[0]))
    except ConfigError as error:
        return f"unreadable: {error}"


def _digest(contents: Iterable[tuple[Path, bytes]]) -> str:
    digest = hashlib.sha256()
    for file, content in contents:
        digest.update(f"{file}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()


def variable_of(location: Location) -> str | None:
    """Return the environment variable that set this key or a section around it, None if a file did."""
    given = {name.upper(): name for name in os.environ}
    for end in range(len(location), 0, -1):
        name = given.get(PREFIX + "__".join(map(str, location[:end])).upper())
        if name:
            return name
    return None


def _list_parts(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files of ``conf.d``, sorted, and warnings of those that look as if they were meant to be."""
    folder = path.parent / "conf.d"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise ConfigError([Problem(f"cannot be read: {error.strerror}; nothing was changed", str(folder))]) from error
    # What editors (.#a.yaml, a.yaml~) and packages (a.yaml.dpkg-new, a.yaml.rpmsave) leave behind is passed over.
    visible = [name for name in names if not name.startswith(".")]
    warnings = [f"{folder / n}: is not read; files of conf.d end in .yaml" for n in visible if n.endswith(".yml")]
    return [folder / name for name in visible if name.endswith(".yaml")], warnings


def _read(path: Path) -> bytes:
    try:
        # Without O_NONBLOCK a pipe that nobody writes into would hold us up for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError([Problem("cannot be read: it is no regular file; nothing was changed", str(path))])
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError([Problem(f"cannot be read: {why}; nothing was changed", str(path))]) from error
    if len(content) > _MOST_BYTES:
        raise ConfigError([Problem(f"the file is larger than {_MOST_BYTES} bytes", str(path), 1, 1)])
    return content


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        line = before.count("\n") + 1
        column = len(before) - before.rfind("\n")
        raise ConfigError([Problem(f"is not UTF-8 text: {error.reason}", str(path), line, column)]) from error
