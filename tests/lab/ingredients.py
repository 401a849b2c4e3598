"""What a test guest boots from: kernel, initial file system and disk templates, each made once and then kept.

The guest is a Debian kernel and an initramfs with busybox and the QEMU guest agent, nothing else, so that it
is up within seconds under emulation. Its ingredients are Debian packages that are *unpacked* below the
directory named in the environment variable `LAB_UNPACKED` (by the `dev` script), not installed: a test
must not change the host.

Everything lands in a cache directory under a name that says what went in (a hash, or the disk's size). It is
written beside its place and renamed there, so that two test runs may build at once and nobody ever sees half
of it.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.commands import LabError, run

if TYPE_CHECKING:
    from collections.abc import Iterator

UNPACKED_VARIABLE = "LAB_UNPACKED"
CACHE = Path(__file__).parents[2] / ".dev/guest"

_INIT = Path(__file__).with_name("guest-init.sh")
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")


@dataclass(frozen=True)
class Boot:
    """What a domain's XML names to boot the guest."""

    kernel: Path
    initramfs: Path


@dataclass(frozen=True)
class _Ingredients:
    """The files found below the unpacked packages."""

    kernel: Path
    modules: Path
    """`lib/modules/<release>` of that kernel."""
    busybox: Path
    agent: Path

    @classmethod
    def find(cls) -> _Ingredients:
        """Look for them; raise LabError naming the one that is not there."""
        if UNPACKED_VARIABLE not in os.environ:
            msg = f"${UNPACKED_VARIABLE} is not set"
            raise LabError(msg)
        unpacked = Path(os.environ[UNPACKED_VARIABLE])

        def newest(pattern: str) -> Path:
            found = sorted(unpacked.glob(pattern))
            if not found:
                msg = f"{unpacked / pattern}: no such file"
                raise LabError(msg)
            return found[-1]

        kernel = newest("linux-image*/boot/vmlinuz-*")
        release = kernel.name.removeprefix("vmlinuz-")
        return cls(
            kernel=kernel,
            modules=newest(f"linux-image*/**/lib/modules/{release}"),  # below usr/ since Debian 13
            busybox=newest("busybox-static/**/bin/busybox"),
            agent=newest("qemu-guest-agent/**/sbin/qemu-ga"),
        )

    def key(self) -> str:
        """Return a name that changes with any ingredient and with the code that puts them together."""
        digest = hashlib.sha256(self.modules.name.encode())
        for file in (self.kernel, self.busybox, self.agent, _INIT, Path(__file__)):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:16]


def missing() -> str | None:
    """Say why no guest can be built here, in words for a person; None when one can."""
    tools = ("qemu-img", "mkfs.ext4", "cpio", "modinfo", "ldd")
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    try:
        _Ingredients.find()
    except LabError as error:
        return str(error)
    return None


def boot(cache: Path = CACHE) -> Boot:
    """Return kernel and initramfs of the guest, built on first use (half a second)."""
    ingredients = _Ingredients.find()
    built = cache / f"boot-{ingredients.key()}"
    if not built.exists():
        with _made_beside(built) as unfinished:
            unfinished.mkdir()
            shutil.copyfile(ingredients.kernel, unfinished / "vmlinuz")
            _build_initramfs(ingredients, unfinished / "initramfs.gz")
    return Boot(built / "vmlinuz", built / "initramfs.gz")


def copy_of_disk(target: Path, image_format: str, size_mib: int, cache: Path = CACHE) -> None:
    """Put a disk with an empty ext4 file system at `target`.

    Without a journal, so that the file system of a frozen image can be read from outside without replaying
    one.
    """
    template = cache / f"ext4-{size_mib}M.{image_format}"
    if not template.exists():
        with _made_beside(template) as unfinished:
            raw = unfinished.with_name(unfinished.name + ".raw")
            try:
                with raw.open("wb") as file:
                    file.truncate(size_mib << 20)
                run("mkfs.ext4", "-q", "-F", "-O", "^has_journal,^metadata_csum", raw)
                run("qemu-img", "convert", "-f", "raw", "-O", image_format, raw, unfinished)
            finally:
                raw.unlink(missing_ok=True)
    run("cp", "--sparse=always", template, target)


@contextmanager
def _made_beside(place: Path) -> Iterator[Path]:
    """Give the block a path to fill; move that to `place` when it succeeds and delete it otherwise."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=place.parent) as directory:
        unfinished = Path(directory) / place.name
        yield unfinished
        try:
            unfinished.rename(place)
        except OSError:
            if not place.exists():  # else another run was faster and made the same
                raise


def _build_initramfs(ingredients: _Ingredients, target: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name in ("bin", "dev", "etc", "mnt", "modules", "proc", "run", "sys", "tmp"):
            (root / name).mkdir()
        shutil.copy(_INIT, root / "init")
        (root / "init").chmod(0o755)
        shutil.copy(ingredients.busybox, root / "bin/busybox")
        for applet in run(root / "bin/busybox", "--list").split():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        shutil.copy(ingredients.agent, root / "bin/qemu-ga")
        shutdown = root / "sbin/shutdown"  # what the agent runs when libvirt asks the guest to shut down
        shutdown.parent.mkdir(exist_ok=True)
        shutdown.write_text("#!/bin/sh\nsync\nexec poweroff -f\n")
        shutdown.chmod(0o755)
        for library in _libraries(ingredients.agent):
            copy = root / library.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, copy)
        modules = _with_dependencies(ingredients.modules, _MODULES)
        for module in modules:
            (root / "modules" / _module_name(module)).write_bytes(_decompressed(module))
        (root / "modules/order").write_text("".join(f"{_module_name(module)}\n" for module in modules))

        files = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        archive = root / "archive"
        run("cpio", "--quiet", "-o", "-H", "newc", "-D", root, "-F", archive, stdin=files.encode())
        target.write_bytes(gzip.compress(archive.read_bytes(), compresslevel=6, mtime=0))


def _libraries(program: Path) -> list[Path]:
    """Return the shared libraries that a program loads, from the host: QEMU's own packages bring them all."""
    listing = run("ldd", program)
    # A library, or a version of one when package and host are of different releases.
    if "not found" in listing:
        msg = f"{program}: {listing}"
        raise LabError(msg)
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", listing)]


def _with_dependencies(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files of these kernel modules in loading order; what is built into the kernel needs none.

    Asks each file for its dependencies: `modules.dep`, which modprobe reads, is only made when a kernel is
    installed.
    """
    files = {_module_name(path): path for path in modules.glob("kernel/**/*.ko*")}
    built_in = {_module_name(Path(line)) for line in (modules / "modules.builtin").read_text().split()}
    order: list[Path] = []

    def add(name: str) -> None:
        if name in built_in:
            return
        if name not in files:
            msg = f"{modules}: no module {name}"
            raise LabError(msg)
        for dependency in run("modinfo", "-F", "depends", files[name]).strip().split(","):
            if dependency:
                add(dependency.replace("-", "_"))
        if files[name] not in order:
            order.append(files[name])

    for name in names:
        add(name)
    return order


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _decompressed(module: Path) -> bytes:
    """Debian 13 compresses its modules, and busybox cannot load them so."""
    content = module.read_bytes()
    return lzma.decompress(content) if module.suffix == ".xz" else content
