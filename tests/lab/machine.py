"""A whole Debian with systemd as process 1 and a libvirt of its own: the host that the package is made for.

Booted by systemd-nspawn from a root that mmdebstrap has put together, it is up within seconds and shares nothing with
the machine that tests run on but the kernel. Each release's root is made once, kept below `LAB_MACHINES`, and copied
for each machine.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar
from uuid import uuid4

import libvirt

from tests.lab import ingredients
from tests.lab.commands import LabError, run
from tests.lab.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

MACHINES_VARIABLE = "LAB_MACHINES"
RELEASES = ("bookworm", "trixie")

_CHECKOUT = Path(__file__).parents[2]
_TOOLS = ("mmdebstrap", "systemd-nspawn", "nsenter", "dpkg-deb", "tar")
_PACKAGES = (
    # A host with libvirt as a newcomer has it, and what the package of ours depends on; nothing that builds it.
    "ca-certificates,systemd,systemd-sysv,dbus,polkitd,libvirt-daemon-system,libvirt-clients,qemu-system-x86,"
    "qemu-utils,python3,tzdata,procps"
)
# Nobody reads there, but what comes with our own package is to be seen.
_LEFT_OUT = "path-exclude=/usr/share/locale/* path-exclude=/usr/share/doc/* path-include=/usr/share/doc/kvmsnapd/*"
_UNCHROOTED = (sys.executable, "-m", "tests.lab.unchrooted")
_UP_WITHIN_S = 60.0
_BOOT_FILES = Path("/srv/boot")
_GUESTS = Path("/srv/guests")

T = TypeVar("T")


def missing() -> str | None:
    """Say why no machine can be made here, in words for a person; None when one can."""
    if os.geteuid() != 0:
        return "not root"
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(absent)}"
    if MACHINES_VARIABLE not in os.environ:
        return f"${MACHINES_VARIABLE} is not set"
    return ingredients.missing()


def own_release() -> str:
    """Name the Debian that this runs on."""
    found = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def build_package(release: str, work: Path) -> Path:
    """Build the package for a release with `./dev package` and return its file, below `work`.

    For the machine's own release here; for another one in a root of that release, which is kept, since half of its time
    goes into its set-up.
    """
    if release == own_release():
        run(_CHECKOUT / "systemd/deb/build", sys.executable, work / "build", work, timeout_s=600)
    else:
        _build_elsewhere(release, work)
    (package,) = work.glob("*.deb")
    return package


def _build_elsewhere(release: str, work: Path) -> None:
    with _kept_root(f"{release}-build", release) as root:
        project = root / "srv/project"
        project.mkdir(exist_ok=True)
        for entry in project.iterdir():
            if entry.name != ".dev":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        leave_out = [f"--exclude=./{name}" for name in (".dev", ".git", "dist")]
        packed = work / "checkout.tar"
        run("tar", "-C", _CHECKOUT, *leave_out, "--exclude=__pycache__", "-cf", packed, ".")
        run("tar", "-C", project, "--no-same-owner", "-xf", packed)
        packed.unlink()
        options, words = _ways_to_packages(root)
        nspawn = ["systemd-nspawn", "-q", "-D", str(root), "--register=no", "--keep-unit", "--pipe"]
        script = f"cd /srv/project && {words} ./dev package"
        run(*nspawn, "--resolv-conf=replace-host", *options, "sh", "-c", script, timeout_s=900)
        for package in (project / "dist").glob("*.deb"):
            shutil.copy(package, work)


def _ways_to_packages(root: Path) -> tuple[list[str], str]:
    """Have pip find what it finds here: return options of systemd-nspawn and assignments for a shell.

    A machine's administrator may have set an index, certificates or folders of wheels.
    """
    settings = run(sys.executable, "-m", "pip", "config", "list")
    folders = {Path(path) for path in re.findall(r"(?<![\w.:])(?:file://)?(/[\w./-]+)", settings)}
    names = ("PIP_", "SSL_CERT_", "REQUESTS_CA_")
    variables = {name: value for name, value in os.environ.items() if name.startswith(names)}
    options = [f"--bind-ro={folder}" for folder in sorted(folders) if folder.is_dir()]
    for file in (Path("/etc/pip.conf"), Path("/etc/hosts"), Path("/etc/ssl/certs/ca-certificates.crt")):
        if file.exists():
            shutil.copy(file, root / file.relative_to("/"))
    return options, shlex.join(f"{name}={value}" for name, value in variables.items())


@contextmanager
def _kept_root(name: str, release: str) -> Iterator[Path]:
    """Give the block this root for itself; made first if there is none, or one of other packages."""
    place = Path(os.environ[MACHINES_VARIABLE])
    place.mkdir(parents=True, exist_ok=True)
    root, stamp = place / name, place / f"{name}.stamp"
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = f"{_PACKAGES} {_LEFT_OUT}"
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            shutil.rmtree(root, ignore_errors=True)
            _make_root(release, root)
            stamp.write_text(wanted)
        yield root


def _make_root(release: str, root: Path) -> None:
    mirror = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian")
    settings = [
        f"--aptopt={line.rstrip(';')}"
        for line in run("apt-config", "dump").splitlines()
        if re.match(r"Acquire::(https?|Retries|Check-|ForceIP)", line)
    ]
    # apt's own user may not be able to read where the packages lie.
    settings += ['--aptopt=APT::Sandbox::User "root"', '--aptopt=APT::Install-Recommends "false"']
    slim = [f"--dpkgopt={rule}" for rule in _LEFT_OUT.split()]
    options = ["--quiet", "--mode=root", "--variant=minbase", f"--include={_PACKAGES}", *settings, *slim]
    run("mmdebstrap", *options, release, root, mirror.split()[0], timeout_s=900)
    with (root / "etc/libvirt/qemu.conf").open("a") as qemu:
        qemu.write("\ncgroup_controllers = []\n")  # they are not for a guest of a guest
    # It would wait at power off for guests that have nothing to shut down with.
    (root / "etc/systemd/system/multi-user.target.wants/libvirt-guests.service").unlink(missing_ok=True)


class Machine:
    """One Debian, installed when made and gone after `remove`; between `start` and `stop` it is up.

    Its libvirt answers on connections from outside, so a `Guest` of it can be used like any other, but for its files,
    whose paths hold inside.
    """

    def __init__(self, release: str, directory: Path) -> None:
        self.release = release
        self.root = directory / release
        self._log = directory / f"{release}.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        with _kept_root(release, release) as kept:
            run("cp", "-a", "--reflink=auto", kept, self.root, timeout_s=300)
        # Its own; and without one systemd would take this for a first boot, and enable whatever a unit suggests.
        (self.root / "etc/machine-id").write_text(f"{uuid4().hex}\n")

    @property
    def leader(self) -> int:
        """Its process 1, as this machine numbers it."""
        assert self._nspawn is not None
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        if not children:
            msg = f"{self.release} does not run: {self._log.read_text()}"
            raise LabError(msg)
        return int(children[0])

    def start(self) -> None:
        """Boot, and return once all is up."""
        # Nothing is registered with this machine's systemd: where there is one, it is not to know.
        options = ["--quiet", "--register=no", "--keep-unit", "--private-network", "--console=pipe", "--boot"]
        with self._log.open("ab") as log:
            self._nspawn = subprocess.Popen(
                [*_UNCHROOTED, "systemd-nspawn", "-D", str(self.root), "-M", f"{self.release}-{os.getpid()}", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_for(lambda: self.shell("systemctl is-system-running || true").strip() in {"running", "degraded"})

    def stop(self) -> None:
        """Power off properly, as for a reboot; guests go off with it."""
        if self._nspawn is None:
            return
        self.shell("systemctl poweroff")
        try:
            self._nspawn.wait(timeout=_UP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._kill()
            msg = f"{self.release} does not power off"
            raise LabError(msg) from None
        self._nspawn = None

    def _kill(self) -> None:
        """Pull the plug."""
        if self._nspawn is not None:
            try:
                os.kill(self.leader, signal.SIGKILL)
            except (LabError, OSError):
                self._nspawn.kill()
            self._nspawn.wait()
            self._nspawn = None

    def remove(self) -> None:
        """Pull the plug and delete the disk."""
        self._kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def shell(self, script: str, *, timeout_s: float = 60.0) -> str:
        """Return what a shell script prints that root runs inside; LabError with its complaint when it fails."""
        return run(*self._enter(), "sh", "-euc", script, timeout_s=timeout_s)

    def _enter(self) -> tuple[str, ...]:
        # By itself a mount namespace is entered at its very root, outside of any chroot that this runs in.
        enter = ("nsenter", "-t", str(self.leader), "--all", "--root", "--wd")
        return (*enter, "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8")

    def put(self, file: Path, text: str) -> None:
        """Write a file inside."""
        place = self.root / file.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def wait_for(self, condition: Callable[[], T], within_s: float = _UP_WITHIN_S) -> T:
        """Return the condition's first true value; LabError with the journal's end if it takes too long."""
        deadline, error = time.monotonic() + within_s, None
        while time.monotonic() < deadline:
            try:
                if value := condition():
                    return value
            except (LabError, libvirt.libvirtError, OSError) as failed:
                error = failed
            time.sleep(0.2)
        try:
            journal = self.shell("journalctl --no-pager -n 60")
        except LabError as failed:
            journal = str(failed)
        msg = f"{self.release}: this did not come true within {within_s:.0f} s (last: {error})\n{journal}"
        raise LabError(msg)

    # ---- libvirt ------------------------------------------------------------------------------------------------

    def connect(self) -> libvirt.virConnect:
        """Open a new raw connection with all rights."""
        return libvirt.open(f"qemu+unix:///system?socket=/proc/{self.leader}/root/run/libvirt/libvirt-sock")

    def pid_from_file(self, name: str) -> int | None:
        """Nobody needs to know: what is done to a QEMU is done inside."""
        raise NotImplementedError(name)

    def qemu_log(self, name: str) -> Path:
        """Return where libvirt logs what QEMU says."""
        return self.root / f"var/log/libvirt/qemu/{name}.log"

    def add_guest(self, name: str) -> Guest:
        """Define a guest with an agent, start it, and return it once its agent answers."""
        boot = ingredients.boot()
        files = self.root / _BOOT_FILES.relative_to("/")
        files.mkdir(exist_ok=True)
        for file in (boot.kernel, boot.initramfs):
            shutil.copyfile(file, files / file.name)  # without what another libvirt has noted in its attributes
        guest = Guest(self, name, _GUESTS / name)
        for image in guest.images:
            place = self.root / image.relative_to("/")
            place.parent.mkdir(parents=True)
            ingredients.copy_of_disk(place, guest.image_format, guest.size_mib)
        self.connect().defineXML(guest.xml().replace(str(boot.kernel.parent), str(_BOOT_FILES)))
        guest.start()
        self.wait_for(guest.agent_answers)
        return guest

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
