"""The demo: the daemon, unchanged, with a live table beside it.

Without arguments it works on libvirt's in-process ``test:///`` driver with three domains that exist only in memory,
on schedules of seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter, deque
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from kvmsnapd.daemon import Daemon, read_clock
from kvmsnapd.durations import rough_duration
from kvmsnapd.events import (
    DeleteFailed,
    PruneBlocked,
    RunSkipped,
    SnapshotDeleted,
    SnapshotDowngraded,
    SnapshotFailed,
    SnapshotTaken,
)
from kvmsnapd.plan import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmsnapd.events import Event

CONFIG = """\
policies:
  fast:
    schedule: every 2s
    keep: {last: 3, within: 8s}
    kind: internal          # the test driver has no external snapshots
  steady:
    schedule: every 5s
    keep: {last: 2, hourly: 1}
    kind: internal
domains:
  db01: [fast, steady]
  "web-*": [steady]
  lab: [steady]             # shut off
metrics: {port: 0}          # any free one
log: {level: error}         # the table shows the rest
tick: 1s
"""

_DOMAIN = """<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
<name>{name}</name><memory unit='MiB'>512</memory><os><type>hvm</type></os><test:runstate>{state}</test:runstate>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/{name}.qcow2'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>"""


def write_test_host(directory: Path, domains: dict[str, bool]) -> str:
    """Write a host for libvirt's test driver with these domains (name to running) and return its URI."""
    running, shut_off = 1, 5
    nodes = "".join(_DOMAIN.format(name=name, state=running if up else shut_off) for name, up in domains.items())
    path = directory / "host.xml"
    path.write_text(f"<node>{nodes}<cpu><mhz>1000</mhz><model>demo</model></cpu><memory>8000000</memory></node>")
    return f"test://{path}"


class Show:
    """What the demo shows: events as they come, and on a terminal a live table as well."""

    def __init__(self, title: str) -> None:
        """Begin with nothing seen."""
        self._title = title
        self._console = Console()
        self._lines: deque[str] = deque(maxlen=12)
        self._counts: Counter[str] = Counter()
        self._ended = threading.Event()

    def see(self, event: Event) -> None:
        """Take note of one event of the daemon."""
        self._counts[event.NAME] += 1
        text = _describe(event)
        if text is None:
            return
        line = f"{datetime.now().astimezone():%H:%M:%S}  {text}"
        self._lines.append(line)
        if not self._console.is_terminal:
            print(line, flush=True)

    def run(self, daemon: Daemon) -> int:
        """Run the daemon until Ctrl-C, showing it meanwhile; return its exit code."""
        url = daemon.outlets.url or "off"
        print(f"{self._title}\nmetrics: {url}\nCtrl-C ends it.\n", flush=True)
        drawing = threading.Thread(target=self._draw, args=(daemon, url), daemon=True)
        if self._console.is_terminal:
            drawing.start()
        code = daemon.run()
        self._ended.set()
        if drawing.is_alive():
            drawing.join()
        elif not self._console.is_terminal:
            Console(width=150).print(self._picture(daemon, url))
        fleet = daemon.observe().fleet
        left = sum(len(pair.snapshots) for pair in fleet.pairs) if fleet else 0
        failed = self._counts[SnapshotFailed.NAME] + self._counts[DeleteFailed.NAME]
        print(
            f"demo ended: {self._counts[SnapshotTaken.NAME]} snapshots taken, "
            f"{self._counts[SnapshotDeleted.NAME]} deleted, {failed} failed; {left} are left"
        )
        return code

    def _draw(self, daemon: Daemon, url: str) -> None:
        with Live(console=self._console, auto_refresh=False) as live:
            while not self._ended.wait(0.25):
                live.update(self._picture(daemon, url), refresh=True)

    def _picture(self, daemon: Daemon, url: str) -> Group:
        fleet, now = daemon.observe().fleet, read_clock()
        table = Table(title="snapshots that exist, and the keep rules that claim them", expand=True)
        for column in ("domain", "policy", "age / limit", "next", "snapshots (newest first)"):
            table.add_column(column)
        inventories = {domain.uuid: domain for domain in fleet.domains} if fleet else {}
        for pair in fleet.pairs if fleet else ():
            verdicts = judge(inventories[pair.name.domain_uuid], pair.policy, now=now)
            age = pair.age(now)
            table.add_row(
                pair.name.domain,
                f"{pair.name.policy}: {pair.policy.schedule}\nkeep {pair.policy.keep}",
                f"{rough_duration(age) if age is not None else '-'} / {rough_duration(pair.policy.max_age)}",
                f"in {max(0, round((pair.due.run_at - now).total_seconds()))}s",
                "\n".join(f"{v.point.at:%H:%M:%S}Z  {', '.join(v.reasons)}" for v in verdicts),
            )
        for assignment in fleet.assignments if fleet else ():
            if not assignment.policies:
                table.add_row(assignment.domain_name, f"none: {assignment.coverage}", "-", "-", "-")
        return Group(table, Panel("\n".join(self._lines), title="what happened"), f"metrics: {url}")


def _describe(event: Event) -> str | None:
    """Return one line for the events that a person wants to see."""
    match event:
        case SnapshotTaken(pair=pair):
            return f"taken    {pair.domain:8} {event.snapshot}  {event.kind}, {event.consistency}"
        case SnapshotDeleted(pair=pair):
            return f"deleted  {pair.domain:8} {event.snapshot}  {', '.join(event.reasons)}"
        case SnapshotFailed(pair=pair) | DeleteFailed(pair=pair) | SnapshotDowngraded(pair=pair):
            return f"PROBLEM  {pair.domain:8} {event.snapshot}  {event.error}"
        case RunSkipped(pair=pair) | PruneBlocked(pair=pair):
            return f"waiting  {pair.domain:8} {pair.policy}: {event.detail}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo on the test driver, or on a given configuration and libvirt."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument("--config", type=Path, help="show the daemon with this configuration instead")
    parser.add_argument("--connect", metavar="URI", help="and this libvirt")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="kvmsnapd-demo-") as name:
        directory = Path(name)
        path = arguments.config
        if path is None:
            path = directory / "kvmsnapd.yaml"
            directories = f"state_directory: {directory / 'state'}\nruntime_directory: {directory / 'run'}\n"
            path.write_text(CONFIG + directories)
        uri = arguments.connect
        if arguments.config is None and uri is None:
            uri = write_test_host(directory, {"db01": True, "web-1": True, "lab": False})
        show = Show("kvmsnapd demo: the daemon on libvirt's test driver, three domains that exist only in memory")
        return show.run(Daemon(path, connect=uri, watch=show.see))


if __name__ == "__main__":
    sys.exit(main())
