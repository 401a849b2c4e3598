"""README's transcripts, from a real run on a real guest; ``TRANSCRIPTS=write`` puts those of this run there.

What differs from run to run (times, ages, sizes, identities) is not compared.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt
import pytest

from kvmsnapd.cli.parser import make_parser
from tests.lab.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"<!-- transcript: (?P<name>[a-z-]+) -->\n```\n(?P<text>.*?)```\n", re.DOTALL)
_VOLATILE = (
    (re.compile(r"kvmsnapd-([A-Za-z]+)-\d{8}T\d{6}Z(-\d+)?"), r"kvmsnapd-\1-SLOT"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?([+-]\d\d:\d\d|Z)?"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d"), "DAY"),
    (re.compile(r"\b\d+(\.\d+)? ?(KiB|MiB|GiB|B|kB|ms|s|m|h|d|w|%)(?=[\s,;)]|$)"), "N"),
    (re.compile(r"\b\d+\.\d+\.\d+\b"), "VERSION"),
    (re.compile(r"process \d+"), "process PID"),
    (re.compile(r"[ ]{2,}"), "  "),
)
_IMAGES = "/var/lib/libvirt/images"
CONFIG = """\
timezone: UTC
runtime_directory: {directory}/run
state_directory: {directory}/state
policies:
  standard:
    schedule: hourly
    keep: {{last: 2, daily: 5}}
    splay: 0s
    verify: {{schedule: weekly}}
domains:
  db01: [standard]
"""


class Session:
    """A person at a prompt, whose commands and their answers are noted."""

    def __init__(self, directory: Path, uri: str) -> None:
        self.directory, self._uri = directory, uri
        self.config = directory / "kvmsnapd.yaml"
        self.config.write_text(CONFIG.format(directory=directory))
        self.blocks: dict[str, str] = {}

    def run(self, block: str, line: str, *, code: int = 0, most_lines: int = 40) -> str:
        """Run a command of the program and note it in a block, with the paths that a host would have."""
        word, *words = shlex.split(line)
        arguments = [sys.executable, "-m", "kvmsnapd", word, "--config", str(self.config), "--connect", self._uri]
        arguments += [word.replace(_IMAGES, str(self.directory)) for word in words]
        environment = os.environ | {"COLUMNS": "120"}
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        lines = [line.rstrip() for line in said.splitlines()]
        lines = lines if len(lines) <= most_lines else [*lines[:most_lines], "…"]
        text = "\n".join([f"$ kvmsnapd {line}", *lines]) + "\n"
        text = text.replace(str(self.directory), _IMAGES).replace(self._uri, "qemu:///system")
        text = text.replace('connect: "qemu:///system"\n', "")  # only another one than this is written down
        self.blocks[block] = self.blocks.get(block, "") + text
        return said


@pytest.fixture
def libvirtd(generations: Callable[[str], Libvirtd]) -> Libvirtd:
    """One generation is enough for the words."""
    return generations("libvirt11")


@pytest.fixture
def db01(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(libvirtd, "db01", tmp_path / "images", size_mib=64)
    guest.define()
    guest.start()
    guest.wait_up()
    yield guest
    connection = libvirtd.connect()
    for name in ("db01-look", "db01-thin"):
        try:
            connection.lookupByName(name).undefine()
        except libvirt.libvirtError as error:
            assert error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN  # noqa: PT017
    guest.remove()


def without_volatile(text: str) -> str:
    for found, shown in _VOLATILE:
        text = found.sub(shown, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_readme_shows_what_the_commands_say(db01: Guest, libvirtd: Libvirtd) -> None:
    session = Session(db01.directory, libvirtd.uri)
    run = session.run
    run("init", "init")
    run("check-config", "check-config")
    run("schema", "schema", most_lines=4)
    run("simulate", "simulate --policy standard --now 2026-11-23T00:00:00+00:00 --days 4")
    run("plan", "plan db01")
    run("take", "take db01")
    time.sleep(1)  # the next one's slot is another second
    run("take", "take db01 --hold 'before the upgrade'")
    held = newest(db01)
    run("status", "status")
    run("list", "list db01")
    run("hold", "hold db01 newest 'until the audit is over' --until 30d")
    run("hold", f"release db01 {held}")
    run("verify", "verify db01")
    run("restore-as", "restore db01 newest --as db01-look")
    (db01.directory / "out").mkdir()
    run("export", f"export db01 newest --files {_IMAGES}/out")
    db01.write("/mnt/x", b"x")
    run("restore", f"restore db01 {held} --yes")
    kept = next(name for name in db01.snapshots if name != held)
    wait_up(db01)
    assert kept
    for _ in range(3):
        time.sleep(1)
        run("none", "take db01")
    run("prune", "prune db01 --yes")
    run("doctor", "doctor", code=1)
    run("forget", "forget db01 --yes")
    run("completion", "completion bash", most_lines=3)
    run("manual", "manual", most_lines=6)
    session.blocks.pop("none")

    text = README.read_text()
    if os.environ.get("TRANSCRIPTS") == "write":
        text = _BLOCK.sub(lambda m: f"<!-- transcript: {m['name']} -->\n```\n{session.blocks[m['name']]}```\n", text)
        README.write_text(text)
    shown = {match["name"]: match["text"] for match in _BLOCK.finditer(text)}
    assert set(shown) == set(session.blocks)
    for name, block in session.blocks.items():
        assert without_volatile(shown[name]) == without_volatile(block), name
    (commands,) = (action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    said = "\n".join(shown.values())
    assert [name for name in commands if f"$ kvmsnapd {name}" not in said] == ["run"]


def newest(guest: Guest) -> str:
    return max(guest.snapshots)


def wait_up(guest: Guest) -> None:
    for _ in range(600):
        if guest.agent_answers():
            return
        time.sleep(0.1)
    raise AssertionError(guest.state)
