"""The contract of imports is worth something: it breaks when the core is given an effect."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("retention.py", "import libvirt", "The core touches no effect BROKEN"),
        ("schedule.py", "import time", "The core touches no effect BROKEN"),
        ("plan.py", "from kvmsnapd import execute", "Data flows one way BROKEN"),
        ("newcomer.py", "", "kvmsnapd.newcomer"),
    ],
)
def test_an_import_against_the_flow_is_found(tmp_path: Path, module: str, line: str, broken: str) -> None:
    shutil.copytree(ROOT / "kvmsnapd", tmp_path / "kvmsnapd")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "kvmsnapd" / module).open("a") as file:
        file.write(f"\n{line}\n")
    command = ["lint-imports", "--no-cache", "--no-logo"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert broken in ended.stdout
