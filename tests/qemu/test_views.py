"""`list` and `status` on real guests: the sizes of overlays, and a refusal as libvirt has it."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from tests.builders import a_policy
from tests.lab.commands import run
from tests.lab.daemon import DaemonProcess
from tests.lab.runs import Runs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

POLICIES = """\
policies:
  standard: {{schedule: hourly, splay: 0s, keep: {{last: 3}}, min_free: 1MiB}}
domains:
  {name}: [standard]
"""


def asked(daemon: DaemonProcess, command: str) -> Any:  # noqa: ANN401  # JSON
    """Return what a command says as JSON, run as a process of its own."""
    words = [sys.executable, "-m", "kvmsnapd", command, "--json", "--config", str(daemon.config)]
    done = subprocess.run([*words, "--connect", daemon.uri], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("running", [True, False], ids=["running", "shut off"])
def test_a_list_has_the_size_of_each_overlay(
    libvirtd: Libvirtd, tmp_path: Path, make_guest: Callable[..., Guest], running: bool
) -> None:
    guest = make_guest(running=running, boots=False, agent=False)
    with Runs(libvirtd.uri, tmp_path / "runs", now=datetime(2026, 11, 1, 9, 0, 1, tzinfo=UTC)) as runs:
        assert runs.run(guest, a_policy(keep="last=3")).outcome.result == "taken"
    libvirtd.virsh("snapshot-create-as", guest.name, "by-hand", "--disk-only")
    lower, upper = (
        layer["filename"]
        for layer in reversed(
            json.loads(run("qemu-img", "info", "-U", "--backing-chain", "--output=json", guest.active_image()))[:2]
        )
    )
    daemon = DaemonProcess(tmp_path / "daemon", libvirtd.uri, "")
    daemon.write_config(POLICIES.format(name=guest.name))
    own, foreign = asked(daemon, "list")
    assert (own["own"], foreign["own"], foreign["parent"]) == (True, False, own["snapshot"])
    for row, path in ((own, lower), (foreign, upper)):
        allocated = json.loads(run("qemu-img", "info", "-U", "--output=json", path))["actual-size"]
        assert row["size_bytes"] == allocated, path
        assert allocated > 0


def test_a_domain_that_cannot_be_taken_says_so_before_its_run(
    libvirtd: Libvirtd, tmp_path: Path, make_guest: Callable[..., Guest]
) -> None:
    guest = make_guest(running=False, boots=False, agent=False)
    libvirtd.virsh("snapshot-create-as", guest.name, "inside")
    daemon = DaemonProcess(tmp_path / "daemon", libvirtd.uri, "")
    daemon.write_config(POLICIES.format(name=guest.name))
    (pair,) = asked(daemon, "status")["pairs"]
    assert [trouble["what"] for trouble in pair["troubles"]] == ["never", "refused"]
    assert pair["troubles"][1]["text"].startswith("the next run would take nothing: mixed_kinds: ")
    assert asked(daemon, "list")[0]["size_bytes"] is None
