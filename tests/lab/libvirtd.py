"""A private libvirtd of the machine's own version, or of another root directory's, beside any other one.

Tests must be free to kill, restart and fill a libvirtd without touching the host's, and to leave nothing
behind however they end. Two kernel namespaces give both, without systemd and without a container:

* A *mount namespace* puts a directory of our own under each path that libvirt has compiled in
  (`/etc/libvirt`, `/run/libvirt` …), the daemon itself where it is not installed, and a `/dev` without a
  `kvm` node: one that cannot run guests costs libvirt four seconds per start, and guests here run under
  emulation (TCG) anyway.
* A *process namespace* whose process 1 is a `cat` that waits for the end of a pipe from this process. When
  the pipe closes, because the test is done or because it was killed, `cat` ends and the kernel ends all other
  processes of the namespace with it: the daemon, its guests and nothing else. The mounts go with the last of
  them.

libvirtd is started *into* these namespaces, so it can die and come back while its guests run on. All that is
left on the host are the empty directories that had to be made to mount something on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import libvirt

from tests.lab.commands import LabError, run

if TYPE_CHECKING:
    from types import TracebackType

_READY_WITHIN_S = 60.0
"""Covers a first start on a slow machine, where libvirt asks every QEMU binary what it can do."""

_SOCKET_PATH_MAX = 107
"""Bytes that fit into `sockaddr_un.sun_path`, the final NUL not counted."""

_NAMESPACE_SCRIPT = Path(__file__).with_name("namespace.sh")
_NEW_NAMESPACES = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "sh")

_LIBVIRTD_CONF = """
unix_sock_dir = "{sockets}"
unix_sock_rw_perms = "0700"
unix_sock_ro_perms = "0700"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""

_QEMU_CONF = """
user = "root"
group = "root"
max_core = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


def unpacked_programs(root: Path = Path("/")) -> str | None:
    """Return the folders, joined by colons, that stand in for a libvirtd not installed in `root`, or None.

    They come from the `dev` script, which unpacks libvirt's daemon below `LAB_UNPACKED` instead of
    installing it, because Debian 13 would start it. Raises LabError when it is in neither place.
    """
    if (root / "usr/sbin/libvirtd").exists():
        return None
    packages = Path(os.environ.get("LAB_UNPACKED", "/nonexistent"))
    if not list(packages.glob("libvirt-*/usr/sbin/libvirtd")):
        msg = "libvirtd is neither installed nor unpacked below $LAB_UNPACKED"
        raise LabError(msg)
    return ":".join(str(folder) for folder in sorted(packages.glob("libvirt-*/usr")))


class Libvirtd:
    """One private libvirtd and the namespaces it lives in; root only.

    `directory` holds all it writes: settings, state, logs (`log/`), sockets. Its path must be short, since a
    socket's is limited to 107 bytes. `root` is the root directory to run libvirtd and QEMU from; another one
    than `/`, say an unpacked newer Debian, tests another libvirt generation. Nothing is written to it, so several
    may run from one. What such a daemon must see of ours (disk images, the guest's kernel) is named in `shared`.

    `start` and `stop` are the host's boot and power cut; between them `kill` and `start` are the daemon's own
    death and return, which guests survive. Used as a context manager it is up inside and gone after.
    """

    def __init__(self, directory: Path, root: Path = Path("/"), shared: tuple[Path, ...] = ()) -> None:
        self.directory = directory.resolve()
        self.root = root
        self.shared = shared
        self._sockets = self.directory / "sock"
        self._holder: subprocess.Popen[bytes] | None = None
        longest = self._sockets / "libvirt-admin-sock"
        if len(os.fsencode(longest)) > _SOCKET_PATH_MAX:
            msg = f"{longest}: longer than the {_SOCKET_PATH_MAX} bytes a socket's path may have"
            raise LabError(msg)

    @property
    def uri(self) -> str:
        """Where clients outside the namespaces reach it, with all rights."""
        return f"qemu+unix:///system?socket={self._sockets}/libvirt-sock"

    @property
    def readonly_uri(self) -> str:
        """For `libvirt.openReadOnly`, which does not choose the read-only socket when the URI names one."""
        return f"qemu+unix:///system?socket={self._sockets}/libvirt-sock-ro"

    @property
    def pid(self) -> int | None:
        """The daemon's process id as seen by the caller (to stop or kill it), None when it does not run."""
        return self.pid_from_file("libvirtd.pid")

    def pid_from_file(self, name: str) -> int | None:
        """Translate the process id in a file below `/run/libvirt` to the caller's; None when it does not run.

        libvirt writes the number that holds inside the process namespace, which is another process outside.
        """
        try:
            inside = int((self.directory / "run" / name).read_text())
        except FileNotFoundError:
            return None
        return self.processes().get(inside)

    def qemu_log(self, name: str) -> Path:
        """Return where libvirt logs what this domain's QEMU says."""
        return self.directory / f"log/qemu/{name}.log"

    def processes(self) -> dict[int, int]:
        """Return all that runs in the process namespace: the process id inside → the caller's."""
        if self._holder is None:
            return {}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str((process / "ns/pid").readlink()) == self._namespace:
                    ids = (process / "status").read_text().partition("NSpid:")[2].split("\n")[0].split()
                    found[int(ids[-1])] = int(process.name)
            except OSError:
                continue  # ended while we looked, or not ours to look at
        return found

    def start(self) -> None:
        """Return once the daemon answers; does nothing when it runs. Opens the namespaces if there are none.

        Raises LabError with the end of the log when it does not answer in time.
        """
        if self._holder is None:
            self._open_namespaces()
        deadline = time.monotonic() + _READY_WITHIN_S
        if self.pid is None:
            (self.directory / "run/libvirtd.pid").unlink(missing_ok=True)
            self._inside("libvirtd", "--daemon", "--pid-file", "/run/libvirt/libvirtd.pid")
        while not self._answers(deadline):
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL the daemon alone and return when it is gone. Its guests run on, its socket files stay."""
        pid = self.pid
        if pid is None:
            msg = "libvirtd does not run"
            raise LabError(msg)
        os.kill(pid, signal.SIGKILL)
        while self.pid is not None:
            time.sleep(0.01)

    def restart(self) -> None:
        """Kill the daemon and start it again around its running guests.

        By SIGKILL: on SIGTERM libvirt 11 takes half a minute while guests run, and a client must bear the
        worse.
        """
        self.kill()
        self.start()

    def stop(self) -> None:
        """End the daemon, all its guests and the mounts. A later `start` finds the persistent state again."""
        if self._holder is None:
            return
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait()  # the kernel reports process 1 gone only after all others of its namespace
        self._holder = None

    def connect(self) -> libvirt.virConnect:
        """Open a new raw connection with all rights."""
        return libvirt.open(self.uri)

    def virsh(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Return what `virsh` prints for these arguments; raise LabError when it fails or takes too long."""
        return run("virsh", "--quiet", "--connect", self.uri, *arguments, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self, deadline: float) -> bool:
        try:
            self.virsh("list", timeout_s=max(0.1, deadline - time.monotonic()))
        except LabError as error:
            if self.pid is None or time.monotonic() > deadline:
                msg = f"libvirtd does not answer: {error}\n{self._log_tail()}"
                raise LabError(msg) from error
            return False
        return True

    def _open_namespaces(self) -> None:
        for kind in ("etc", "run", "lib", "cache", "log", "sock"):
            (self.directory / kind).mkdir(parents=True, exist_ok=True)
        (self.directory / "etc/libvirtd.conf").write_text(_LIBVIRTD_CONF.format(sockets=self._sockets))
        (self.directory / "etc/qemu.conf").write_text(_QEMU_CONF)
        unpacked = unpacked_programs(self.root) or ""
        with (self.directory / "log/namespace.log").open("wb") as log:
            holder = subprocess.Popen(
                [*_NEW_NAMESPACES, str(_NAMESPACE_SCRIPT), str(self.directory), str(self.root), unpacked]
                + [str(path) for path in self.shared],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C in the terminal is for the test run, which then stops us
            )
        self._holder = holder
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            self.stop()
            msg = f"cannot open namespaces: {(self.directory / 'log/namespace.log').read_text()}"
            raise LabError(msg)
        self._namespace = str(Path(f"/proc/{holder.pid}/ns/pid_for_children").readlink())

    def _inside(self, *command: str) -> str:
        """Run a command in the daemon's namespaces and root; it must end or send itself to the background."""
        assert self._holder is not None
        process = f"/proc/{self._holder.pid}"
        enter = ["nsenter", f"--mount={process}/ns/mnt", f"--pid={process}/ns/pid_for_children"]
        # By itself a mount namespace is entered at its very root, outside of any chroot that we are in.
        enter += [f"--root={process}/root", f"--wd={process}/root"]
        return run(*enter, "chroot", str(self.root), *command, timeout_s=_READY_WITHIN_S)

    def _log_tail(self, lines: int = 30) -> str:
        log = self.directory / "log/libvirtd.log"
        text = log.read_text(errors="replace") if log.exists() else "(no log)"
        return "\n".join(text.splitlines()[-lines:])
