"""Print the part of a requirements.lock that the program needs at run time, with its hashes.

The lock has what tests and builds need as well; which of it the program needs, and what that needs in turn, the
installed packages say themselves.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==(?:.*\\\n)*.*\n", re.MULTILINE)
"""A package of the lock, with the lines of its hashes, each but the last ended by a backslash."""


def needed(name: str) -> set[NormalizedName]:
    """Return the names of all that a package needs on this python, without its extras."""
    found: set[NormalizedName] = set()
    waiting = [name]
    while waiting:
        for text in requires(waiting.pop()) or ():
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(requirement.name)
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


def main() -> None:
    """Print the entries of the lock named on the command line."""
    lock = Path(sys.argv[1]).read_text()
    entries = {canonicalize_name(found[1]): found[0] for found in ENTRY.finditer(lock)}
    names = needed("kvmsnapd")
    if missing := names - entries.keys():
        sys.exit(f"the lock does not have {', '.join(sorted(missing))}: ./dev lock --no-upgrade")
    print("".join(entries[name] for name in sorted(names)), end="")


if __name__ == "__main__":
    main()
