"""Disk images seen from outside, with the tools of QEMU and ext4: a second opinion on what a snapshot holds.

All of it works on images in use (`-U`, do not lock), since a frozen layer is interesting while the guest
writes to the layer above it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.lab.commands import LabError, run


def read_file_in_image(image: Path, path: str) -> bytes:
    """Return the content of a file in the ext4 file system that fills this image.

    `path` is as seen from its root: what the guest has as `/mnt/name` is `/name`. Layers below are included.
    The answer is only good for an image that nobody writes to.
    """
    with tempfile.TemporaryDirectory() as directory:
        raw, content = Path(directory, "raw"), Path(directory, "content")
        run("qemu-img", "convert", "-U", "-O", "raw", image, raw)
        said = run("debugfs", "-R", f'dump "{path}" {content}', raw)
        if not content.exists():  # debugfs always reports success
            msg = f"{image}: no file {path} {said}"
            raise LabError(msg)
        return content.read_bytes()


def check_image(image: Path) -> None:
    """Raise AssertionError with `qemu-img check`'s findings unless this one layer is in order.

    A raw image has no structure that could be broken: always in order.
    """
    if _info(image)[0]["format"] != "raw":
        try:
            run("qemu-img", "check", "-U", image)
        except LabError as error:
            raise AssertionError(str(error)) from error


def backing_chain(image: Path) -> list[Path]:
    """Return the image and all below it, the oldest last."""
    return [Path(layer["filename"]) for layer in _info(image)]


def _info(image: Path) -> list[dict[str, str]]:
    said = run("qemu-img", "info", "-U", "--backing-chain", "--output=json", image)
    layers: list[dict[str, str]] = json.loads(said)
    return layers
