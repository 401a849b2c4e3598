"""Run the daemon in virtual time: `python -m tests.soak.daemon START HOURS REPORT SOCKET run --config …`.

REPORT gets a JSON line for each six virtual hours: what the process takes then. SOCKET is where the metrics are; the
last ones are left in REPORT.metrics.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import datetime, timedelta
from pathlib import Path

from tests.soak.virtual_time import VirtualTime


def main() -> int:
    """Return the daemon's exit code."""
    start, hours, report, metrics, *arguments = sys.argv[1:]
    virtual = VirtualTime(datetime.fromisoformat(start))

    from kvmsnapd.cli import main as kvmsnapd  # noqa: PLC0415
    from kvmsnapd.scheduler import JobScheduler  # noqa: PLC0415  # sees the virtual time only if imported now

    schedulers: list[JobScheduler] = []
    make = JobScheduler.__init__

    def noted(self: JobScheduler, *words: object, **named: object) -> None:
        schedulers.append(self)
        make(self, *words, **named)  # type: ignore[arg-type]

    JobScheduler.__init__ = noted  # type: ignore[method-assign]

    def busy() -> bool:
        return any(scheduler.active() or scheduler._owed_since is not None for scheduler in schedulers)

    def look() -> None:
        text = _scrape(metrics)
        Path(f"{report}.metrics").write_bytes(text)
        taken = {
            "hours": virtual.elapsed / 3600,
            "scrape": len(text),
            "resident_mib": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20,
            "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
            "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        }
        with Path(report).open("a") as file:
            file.write(f"{json.dumps(taken)}\n")

    virtual.drive(timedelta(hours=float(hours)), busy=busy, every=timedelta(hours=6), look=look)
    return kvmsnapd(arguments)


def _scrape(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n")
        answer = b""
        while more := client.recv(65536):
            answer += more
    return answer


if __name__ == "__main__":
    sys.exit(main())
