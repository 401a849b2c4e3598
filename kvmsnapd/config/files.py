"""The files of a configuration, read as one: the main file, and ``conf.d/*.yaml`` beside it."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmsnapd.config.problems import not_a_section
from kvmsnapd.config.yaml_document import MOST_NODES, Document, parse_yaml
from kvmsnapd.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pathlib import Path

    from kvmsnapd.config.yaml_document import Location

MOST_BYTES = 4 * 2**20
_MOST_FILES = 1000
SECTIONS = ("policies", "domains", "defaults", "metrics", "log")
"""Sections of which each file may give some entries."""

Contents = list[tuple["Path", bytes]]
"""The files of a configuration, the main one first, with what is in them."""


@dataclass
class Sources:
    """What all files say together, and which of them says it."""

    documents: list[Document]
    data: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    whole: bool = True
    """Whether all files could be understood."""
    _holders: dict[Location, Document] = field(default_factory=dict)

    def problem(self, location: Location, message: str, *, of_key: bool = False) -> Problem:
        """Return a problem of the key at this location, where it was given."""
        document = self._holder(location)
        return document.problem(document.span(location, of_key=of_key), message, location)

    def place(self, location: Location) -> str:
        """Return ``file:line:column`` of a key."""
        document = self._holder(location)
        span = document.span(location, of_key=True)
        return f"{document.path}:{span.line}:{span.column}"

    def has(self, location: Location) -> bool:
        """Tell whether some file gives this key."""
        return location in self._holder(location).keys

    def add(self, document: Document) -> None:
        """Take in one more file; what an earlier one has said already becomes a problem that names both places."""
        self.problems += document.problems
        for key, value in document.data.items():
            known = self.data.get(key)
            if key not in self.data or (known is None and key in SECTIONS):
                self.data[key] = dict(value) if isinstance(value, dict) else value
                self._holders[key,] = document
                if isinstance(value, dict):
                    self._holders.update({(key, entry): document for entry in value})
            elif key not in SECTIONS:
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
                given = value if wrong is document else known
                self.problems.append(wrong.problem(wrong.span((key,)), not_a_section(given), (key,)))

    def _holder(self, location: Location) -> Document:
        first = self._holders.get(location[:1], self.documents[0])
        return self._holders.get(location[:2], first)

    def _conflict(self, location: Location, document: Document) -> None:
        message = f"`{location[-1]}` is given twice, first in {self.place(location)}; keep one of them"
        self.problems.append(document.problem(document.span(location, of_key=True), message, location))


def read_contents(path: Path) -> tuple[Contents, list[str]]:
    """Read the main file and those of ``conf.d`` beside it, in the order of their names; and warnings.

    Raises:
        ConfigError: one cannot be read, or somebody else could write into it; problems of all files.
    """
    contents: Contents = []
    problems: list[Problem] = []
    parts, warnings = list_parts(path)
    left, owner = MOST_BYTES, owner_of(path)
    for file in (path, *parts):
        try:
            contents.append((file, read_file(file, owner, left)))
        except ConfigError as error:
            problems += error.problems
        else:
            left -= len(contents[-1][1])
    if problems:
        raise ConfigError(problems)
    return contents, warnings


def parse_contents(contents: Contents) -> Sources:
    """Return what the files say together; those that are no YAML are left out, with a problem each."""
    sources = Sources([Document(str(contents[0][0]), [])])
    nodes = 0
    for file, content in contents:
        try:
            document = parse_yaml(str(file), decode(file, content))
        except ConfigError as error:
            sources.problems += error.problems
            sources.whole = False
            continue
        nodes += len(document.values)
        if nodes > MOST_NODES:
            raise ConfigError([Problem(f"the files up to this one have more than {MOST_NODES} values", str(file))])
        if file == contents[0][0]:
            sources.documents.clear()
        sources.documents.append(document)
        sources.add(document)
    return sources


def fingerprint(contents: Contents) -> str:
    """Return what changes when, and only when, what is in the files changes."""
    digest, folder = hashlib.sha256(), contents[0][0].parent
    for file, content in contents:
        digest.update(f"{file.relative_to(folder)}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()


def list_parts(path: Path) -> tuple[list[Path], list[str]]:
    """Return the files of ``conf.d``, sorted, and warnings of those that look as if they were meant to be."""
    folder = path.parent / "conf.d"
    owner = owner_of(path)
    try:
        status = folder.stat()
    except FileNotFoundError:
        if folder.is_symlink():  # to what is not mounted, say; its domains must not be lost without a word
            raise ConfigError([Problem("leads to nothing; nothing was changed", str(folder))]) from None
        return [], []
    except ValueError:  # a path that cannot be; told when the main file is read
        return [], []
    except OSError as error:
        raise ConfigError([Problem(f"cannot be read: {error.strerror}; nothing was changed", str(folder))]) from error
    try:
        _check_owner(status, folder, owner)
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ConfigError([Problem(f"cannot be read: {error.strerror}; nothing was changed", str(folder))]) from error
    # What editors (.#a.yaml, a.yaml~) and packages (a.yaml.dpkg-new, a.yaml.rpmsave) leave behind is passed over.
    visible = [name for name in names if not name.startswith((".", "#"))]
    parts = [folder / name for name in visible if name.endswith(".yaml")]
    if len(parts) > _MOST_FILES:
        raise ConfigError([Problem(f"has more than {_MOST_FILES} files; nothing was changed", str(folder))])
    missed = [name for name in visible if name.lower().endswith((".yml", ".yaml")) and not name.endswith(".yaml")]
    return parts, [str(Problem("is not read; files of conf.d end in .yaml", str(folder / name))) for name in missed]


def owner_of(main: Path) -> int | None:
    """Return the user to whom a file belongs, None if that cannot be seen."""
    try:
        return main.stat().st_uid
    except (OSError, ValueError):  # told when it is read
        return None


def _check_owner(status: os.stat_result, file: Path, owner: int | None) -> None:
    """Refuse what users can change to whom the main file does not belong: hooks run with our rights."""
    if status.st_mode & stat.S_IWOTH:
        raise ConfigError([Problem("can be written to by everybody; `chmod o-w` it; nothing was changed", str(file))])
    if status.st_uid not in {0, os.geteuid(), owner}:
        who = f"belongs to user {status.st_uid}, not to root or the owner of the main file"
        raise ConfigError([Problem(f"{who}; nothing was changed", str(file))])


def read_file(path: Path, owner: int | None, most: int) -> bytes:
    """Return what is in a file; raise ConfigError if it cannot be read, is too large, or anybody could change it."""
    try:
        # Without O_NONBLOCK a pipe that nobody writes into would hold us up for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError([Problem("cannot be read: it is no regular file; nothing was changed", str(path))])
            _check_owner(status, path, owner)
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError([Problem(f"cannot be read: {why}; nothing was changed", str(path))]) from error
    if len(content) > most:
        message = f"the file is larger than {MOST_BYTES} bytes, or makes all files larger than that"
        raise ConfigError([Problem(message, str(path))])
    return content


def decode(path: Path, content: bytes) -> str:
    """Return the text of a file; raise ConfigError with the place where it is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ConfigError([Problem("is UTF-16 text; save it as UTF-8", str(path), 1, 1)]) from error
        before = content[: error.start].decode()
        line = before.count("\n") + 1
        column = len(before) - before.rfind("\n")
        raise ConfigError(
            [Problem(f"is not UTF-8 text ({error.reason}); save it as UTF-8", str(path), line, column)]
        ) from error
