"""Write a file that others read so that nobody ever sees half of it."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_READABLE_BY_ALL = 0o644


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Put a file with this content in the place of whatever is there, readable for all; raise OSError if it cannot.

    A ``durable`` one is the old or the new file after a power cut too, never an empty one.
    """
    # Under a name that nobody can foresee: the folder may be another user's.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as draft:
        try:
            draft.write(content)
            os.fchmod(draft.fileno(), _READABLE_BY_ALL)
            if durable:
                draft.flush()
                os.fsync(draft.fileno())
            draft.close()
            os.replace(draft.name, path)  # noqa: PTH105
        except BaseException:
            os.unlink(draft.name)  # noqa: PTH108
            raise
