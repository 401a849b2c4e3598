"""`kvmsnapd init` on real guests of every kind: what it proposes can be taken."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.guest import Guest
    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu


def kvmsnapd(uri: str, config: Path, *words: str) -> str:
    command = [sys.executable, "-m", "kvmsnapd", words[0], "--config", str(config), "--connect", uri, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_it_proposes_can_be_taken(libvirtd: Libvirtd, make_guest: Callable[..., Guest], tmp_path: Path) -> None:
    guests = {
        "frozen": make_guest(),
        "plain": make_guest(agent=False),
        "raw": make_guest(image_format="raw", running=False, agent=False),
        "inner": make_guest(running=False, agent=False),
        "saved": make_guest(agent=False),
        "brief": make_guest(agent=False),
    }
    libvirtd.virsh("snapshot-create-as", guests["inner"].name, "by-hand")
    libvirtd.virsh("snapshot-create-as", guests["saved"].name, "by-hand")
    libvirtd.virsh("managedsave", guests["saved"].name)
    libvirtd.virsh("undefine", guests["brief"].name)
    config = tmp_path / "kvmsnapd.yaml"
    kvmsnapd(libvirtd.uri, config, "init", "--write")
    own = f"runtime_directory: {tmp_path}/run\nstate_directory: {tmp_path}/state\n"
    config.write_text(config.read_text() + own)
    print(config.read_text())
    kvmsnapd(libvirtd.uri, config, "check-config")
    libvirtd.virsh("managedsave-remove", guests["saved"].name)  # as the comment says

    protected = {name: guest for name, guest in guests.items() if name != "brief"}
    kvmsnapd(libvirtd.uri, config, "plan")
    kvmsnapd(libvirtd.uri, config, "take", *(guest.name for guest in protected.values()))
    listed = json.loads(kvmsnapd(libvirtd.uri, config, "list", "--json"))
    found = {(s["domain"], s["kind"], s["consistency"]) for s in listed if s["policy"]}
    assert found == {
        (guests["frozen"].name, "external", "filesystem"),
        (guests["plain"].name, "external", "crash"),
        (guests["raw"].name, "external", "offline"),
        (guests["inner"].name, "internal", "offline"),
        (guests["saved"].name, "internal", "offline"),
    }
