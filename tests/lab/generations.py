"""The libvirt generations that tests run on: the machine's own, and the other Debian's from a root of its own.

What libvirt can do, and how it fails, differs between its generations, and users have either. So each test with
guests runs once on libvirt 9 (Debian 12) and once on libvirt 11 (Debian 13), whichever of the two the machine
itself has. The `dev` script unpacks the other one below the directory named in `LAB_OTHER_ROOT`.
"""

from __future__ import annotations

import os
from pathlib import Path

OTHER_ROOT_VARIABLE = "LAB_OTHER_ROOT"

_EXPECTED = ("libvirt9", "libvirt11")


def own() -> str | None:
    """Name the generation of the machine itself, None when it has no libvirt."""
    return _generation(Path("/"))


def roots() -> dict[str, Path | None]:
    """Return each generation's name, the oldest first, with the root directory it runs from.

    The two that are to be tested are always there; None stands for one that this machine lacks.
    """
    found: dict[str, Path | None] = dict.fromkeys(_EXPECTED)
    for root in (Path(os.environ.get(OTHER_ROOT_VARIABLE, "/nonexistent")), Path("/")):
        name = _generation(root)
        if name is not None:
            found[name] = root
    return dict(sorted(found.items(), key=lambda item: int(item[0].removeprefix("libvirt"))))


def _generation(root: Path) -> str | None:
    """Read libvirt's major version from its library's name: libvirt.so.0.11003.0 is 11.3.0."""
    for library in root.glob("usr/lib/*/libvirt.so.0.*"):
        return f"libvirt{int(library.name.split('.')[3]) // 1000}"
    return None
