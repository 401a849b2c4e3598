"""What a scrape costs with many domains, and whether a host that is taking snapshots of all of them slows it down."""

from __future__ import annotations

import gzip
import statistics
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsnapd.demo import write_test_host
from tests.lab.daemon import DaemonProcess

if TYPE_CHECKING:
    import pytest

DOMAINS, POLICIES = 1000, 3
SCRAPES = 8


def test_a_scrape_of_a_thousand_domains_idle_and_in_a_full_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scrape while all pairs are due at once, as after a night's pause, and again when all is done."""
    uri = write_test_host(tmp_path, {f"vm-{number:04}": False for number in range(DOMAINS)})
    names = [f"p{number}" for number in range(POLICIES)]
    policies = "".join(f"  {n}: {{schedule: hourly, splay: 0s, kind: internal, keep: {{last: 3}}}}\n" for n in names)
    daemon = DaemonProcess(tmp_path / "d", uri, f"policies:\n{policies}domains:\n  vm-*: [{', '.join(names)}]")
    try:
        daemon.start()
        url = daemon.new_events("daemon.started")[0]["metrics"]
        daemon.wait_for(lambda: daemon.new_events("snapshot.taken"))
        busy, begun, taken = [], time.monotonic(), 0
        while taken < DOMAINS * POLICIES and time.monotonic() < begun + 300:
            busy.append(_scrape(url)[0])
            time.sleep(2)  # so that the answer of the scrape before is not given once more
            taken = len(daemon.new_events("snapshot.taken"))
        run_seconds = time.monotonic() - begun
        time.sleep(5)
        idle = []
        for _ in range(SCRAPES):
            seconds, size, packed = _scrape(url)
            idle.append(seconds)
            time.sleep(2)
        status = Path(f"/proc/{daemon.process.pid if daemon.process else 0}/status").read_text()
        memory = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    finally:
        daemon.kill()
    slow, quick = statistics.median(busy), statistics.median(idle)
    with capsys.disabled():
        print(
            f"\n{DOMAINS} domains x {POLICIES} policies: {size / 2**20:.1f} MiB of text, {packed >> 10} KiB gzip\n"
            f"idle {quick:.3f} s, during a full run of {run_seconds:.0f} s {slow:.3f} s (worst {max(busy):.3f} s): "
            f"ratio {slow / quick:.2f}; the daemon has {int(memory) / 2**10:.0f} MiB"
        )
    assert taken == DOMAINS * POLICIES


def _scrape(url: str) -> tuple[float, int, int]:
    """Return the time of one scrape as Prometheus makes it, and the sizes of its text, unpacked and as it came."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})  # noqa: S310  # our own daemon
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        packed = answer.read()
    return time.perf_counter() - started, len(gzip.decompress(packed)), len(packed)
