"""What tests of commands share: hosts of libvirt's test driver, and what a command answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import libvirt
import pytest

from kvmsnapd.cli import main
from kvmsnapd.domain_xml import format_request
from kvmsnapd.model import Consistency, Hold, Kind, Mark, TakeRequest
from kvmsnapd.naming import format_name

if TYPE_CHECKING:
    from collections.abc import Iterator

Write = Callable[[str], str]
Capture = pytest.CaptureFixture[str]

DEFAULT_HOST = "test:///default"
DEFAULT_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"  # of its one domain, `test`
UNREACHABLE = "qemu+unix:///system?socket=/nonexistent"
THIS_YEAR = datetime(datetime.now(UTC).year, 1, 1, tzinfo=UTC)
LAST_YEAR = datetime(THIS_YEAR.year - 1, 1, 1, tzinfo=UTC)

CONFIG = """\
policies:
  standard: {schedule: yearly, keep: {last: 2}, kind: internal, splay: 0s, max_age: 400d}
domains:
  test: [standard]
"""
HOST_CONFIG = """\
policies:
  standard: {schedule: yearly, keep: {last: 2}, kind: internal, splay: 0s}
domains:
  db01: [standard]
  "web-*": [standard]
  lab: []
"""


class SharedHost:
    """libvirt's default test host, which all connections of this process share while one is open."""

    def __init__(self, connection: Any) -> None:  # noqa: ANN401  # the binding has no types
        self.domain = connection.lookupByName("test")

    def take(
        self,
        slot: datetime,
        *,
        policy: str = "standard",
        taken_at: datetime | None = None,
        hold: Hold | None = None,
    ) -> str:
        """Make a snapshot of ours and return its name."""
        mark = Mark(policy, slot, taken_at or datetime.now(UTC), Consistency.MEMORY, Kind.INTERNAL, hold=hold)
        name = format_name(policy, slot)
        self.domain.snapshotCreateXML(format_request(TakeRequest(DEFAULT_UUID, "test", name, mark)), 0)
        return name

    def take_by_hand(self, name: str, description: str = "") -> None:
        fields = f"<name>{name}</name><description>{description}</description>"
        self.domain.snapshotCreateXML(f"<domainsnapshot>{fields}</domainsnapshot>", 0)


@contextmanager
def open_shared_host() -> Iterator[SharedHost]:
    connection = libvirt.open(DEFAULT_HOST)
    shared = SharedHost(connection)
    try:
        yield shared
    finally:
        for snapshot in shared.domain.listAllSnapshots(0):
            snapshot.delete(0)
        connection.close()


def answer(capsys: Capture, *arguments: str, code: int = 0) -> str:
    """Return what a command prints; it must end with this code and complain of nothing."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def complaint(capsys: Capture, *arguments: str, code: int) -> str:
    """Return the complaint of a command that prints nothing else."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *rest = captured.err.removesuffix("\n").split("\n")
    assert [line for line in rest if line[5:8] != " | "] == []  # the line of the file it is about
    return first
