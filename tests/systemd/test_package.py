"""What is in the package; that it works, the other tests here show."""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvmsnapd
from tests.lab.commands import run
from tests.lab.machine import RELEASES

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.systemd, pytest.mark.slow]

_CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(params=RELEASES)
def package(request: pytest.FixtureRequest, packages: Callable[[str], Path]) -> Path:
    return packages(request.param)


@pytest.fixture
def unpacked(package: Path, tmp_path: Path) -> Path:
    run("dpkg-deb", "-R", package, tmp_path / "root")
    return tmp_path / "root"


def test_version_and_dependencies_are_of_the_release(package: Path) -> None:
    fields = dict(
        line.split(": ", 1)
        for line in run("dpkg-deb", "-f", package, "Version", "Depends", "Architecture")
        .replace("\n ", " ")
        .splitlines()
    )
    release, python, libvirt = {"bookworm": ("12", "11", "9.0.0"), "trixie": ("13", "13", "11.3.0")}[
        "bookworm" if "deb12" in package.name else "trixie"
    ]
    assert fields["Version"] == f"{kvmsnapd.__version__}~deb{release}"
    assert package.name == f"kvmsnapd_{fields['Version']}_{fields['Architecture']}.deb"
    depends = fields["Depends"]
    assert f"python3 (>= 3.{python}), python3 (<< 3.{int(python) + 1})" in depends
    assert f"libvirt0 (>= {libvirt})" in depends


def test_all_belongs_to_root_and_nothing_can_be_written_to_by_others(package: Path) -> None:
    lines = run("dpkg-deb", "-c", package).splitlines()
    assert len(lines) > 500
    for line in lines:
        mode, owner = line.split()[:2]
        assert owner == "root/root", line
        assert mode.startswith("l") or (mode[5], mode[8]) == ("-", "-"), line


def test_no_file_names_the_place_it_was_built_in(unpacked: Path) -> None:
    places = [str(_CHECKOUT).encode(), b"/srv/project", b"pytest-of"]
    for path in unpacked.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert not [place for place in places if place in content], path


def test_what_the_administrator_may_edit_is_kept(unpacked: Path) -> None:
    assert (unpacked / "DEBIAN/conffiles").read_text().split() == [
        "/etc/kvmsnapd/kvmsnapd.schema.json",
        "/etc/kvmsnapd/kvmsnapd.yaml",
    ]


def test_of_programs_only_ours_is_there_and_it_is_python_of_the_release(unpacked: Path) -> None:
    programs = unpacked / "opt/kvmsnapd/bin"
    assert {path.name for path in programs.iterdir()} == {"kvmsnapd", "python", "python3"}
    assert (programs / "python3").readlink() == Path("/usr/bin/python3")
    assert (programs / "kvmsnapd").read_text().startswith("#!/opt/kvmsnapd/bin/python3\n")
    assert (unpacked / "usr/bin/kvmsnapd").readlink() == Path("/opt/kvmsnapd/bin/kvmsnapd")


def test_each_module_is_compiled_as_nobody_can_do_it_later(unpacked: Path) -> None:
    site = unpacked / "opt/kvmsnapd/lib"
    sources = {path for path in site.rglob("*.py") if "kvmsnapd/" in str(path.relative_to(site))}
    compiled = {path.parent.parent / f"{path.name.partition('.')[0]}.py" for path in site.rglob("*.pyc")}
    assert sources - compiled == set()


def test_the_manual_page_is_where_man_looks_for_it(unpacked: Path) -> None:
    page = gzip.decompress((unpacked / "usr/share/man/man8/kvmsnapd.8.gz").read_bytes()).decode()
    assert page.startswith('.TH KVMSNAPD "8"')
    unit = (unpacked / "usr/lib/systemd/system/kvmsnapd.service").read_text()
    assert "Documentation=man:kvmsnapd(8)" in unit


def test_the_scripts_can_be_read_by_a_shell(unpacked: Path) -> None:
    for name in ("postinst", "prerm", "postrm"):
        subprocess.run(["sh", "-n", unpacked / "DEBIAN" / name], check=True)


def test_documents_find_what_they_link_to(unpacked: Path) -> None:
    documents = unpacked / "usr/share/doc/kvmsnapd"
    for path in documents.rglob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists() or "tests/" in link or link in {"CONTRIBUTING.md", "LICENSE"}, link
