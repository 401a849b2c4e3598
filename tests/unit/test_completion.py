"""Completion, as a real shell asks for it, and the manual page, as man(1) reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from kvmsnapd.cli import main
from kvmsnapd.naming import format_name
from tests.lab.history import write_host_with_history

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Complete = Callable[[str], list[str]]

SLOT = datetime(2026, 11, 22, 9, tzinfo=UTC)
NAME = format_name("standard", SLOT)


@pytest.fixture
def options(tmp_path: Path) -> str:
    config = tmp_path / "kvmsnapd.yaml"
    config.write_text("policies: {standard: {schedule: daily, keep: {last: 2}, kind: internal}}\ndomains: {}\n")
    return f"--config {config} --connect {write_host_with_history(tmp_path, 'standard', [SLOT])}"


@pytest.fixture
def complete(tmp_path: Path) -> Complete:
    """Return what bash would offer at the end of a line, by the script that the program prints."""
    program = tmp_path / "bin/kvmsnapd"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n# PYTHON_ARGCOMPLETE_OK\nexec {sys.executable} -m kvmsnapd "$@"\n')
    program.chmod(0o755)

    def ask(line: str) -> list[str]:
        # As bash does it: split at blanks, = and :, and the function fills COMPREPLY.
        script = f"""
            source <(kvmsnapd completion bash)
            COMP_LINE={line!r} COMP_POINT={len(line)} COMP_TYPE=9 COMP_KEY=9
            COMP_WORDS=({line} "") COMP_CWORD={len(line.split())}
            _python_argcomplete kvmsnapd
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["/bin/bash", "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        assert done.stderr == ""
        return done.stdout.split()

    return ask


def test_bash_completes_commands_domains_snapshots_and_policies(complete: Complete, options: str) -> None:
    assert {"status", "restore", "verify"} <= set(complete("kvmsnapd "))
    assert complete(f"kvmsnapd list {options} d") == ["db01"]
    assert set(complete(f"kvmsnapd restore {options} db01 ")) >= {"newest", NAME}
    assert complete(f"kvmsnapd take {options} db01 --policy ") == ["standard"]


def test_one_that_knows_nothing_offers_nothing_and_spoils_no_line(complete: Complete, tmp_path: Path) -> None:
    assert complete(f"kvmsnapd list --config {tmp_path}/none.yaml d") == []
    assert complete("kvmsnapd list --connect qemu+unix:///system?socket=/nonexistent d") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_for_this_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "kvmsnapd" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)


def test_the_manual_page_has_every_command_and_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manual"]) == 0
    page = capsys.readouterr().out
    assert page.startswith('.TH KVMSNAPD "8"')
    for command in ("run", "status", "restore", "verify", "forget"):
        assert f".SS \\fBkvmsnapd {command}\\fR" in page
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww"],
            input=page,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stderr == ""
