"""A machine on which the package is installed, and what its administrator does and sees there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from tests.lab.guest import Guest
    from tests.lab.machine import Machine

CONFIG = Path("/etc/kvmsnapd/kvmsnapd.yaml")
DROP_IN = Path("/etc/systemd/system/kvmsnapd.service.d/test.conf")
_SCRAPE = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9783/metrics', timeout=10).read().decode())"


class Installed:
    """One machine, the service on it and a guest."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.shell = machine.shell
        self.wait_for = machine.wait_for
        self.guest: Guest
        self._since = ""
        self._shipped = ""

    def use(self, guest: Guest) -> None:
        """Have this guest, and events from now on only."""
        self.guest, self._since = guest, self.shell("date -u +%Y-%m-%dT%H:%M:%S.%N").strip()

    def install(self) -> None:
        """Install the package by dpkg, which refuses where something that it depends on is not there."""
        print(self.shell("dpkg -i /srv/kvmsnapd.deb 2>&1"))
        self._shipped = self._shipped or self._place(CONFIG).read_text()

    def configure(self, text: str, *, drop_in: str = "") -> None:
        """Write the configuration; `{guest}` in it stands for the guest's name. And a drop-in for the unit, or none."""
        self.machine.put(CONFIG, text.replace("{guest}", self.guest.name))
        self._place(DROP_IN).unlink(missing_ok=True)
        if drop_in:
            self.machine.put(DROP_IN, drop_in)
        self.shell("systemctl daemon-reload")

    def clean(self) -> None:
        """Go back to how it was after the installation."""
        self.shell("systemctl disable --now kvmsnapd.service; systemctl reset-failed kvmsnapd.service || true")
        self.configure(self._shipped)
        self.shell("rm -rf /var/lib/kvmsnapd/*")
        name = self.guest.name
        self.shell(
            f"virsh destroy {name} || true; virsh undefine --snapshots-metadata {name}; rm -r /srv/guests/{name}"
        )
        self.shell("for pool in $(virsh pool-list --name); do virsh pool-destroy $pool; done")

    def _place(self, file: Path) -> Path:
        return self.machine.root / file.relative_to("/")

    # ---- what one sees ------------------------------------------------------------------------------------------

    def show(self, name: str) -> str:
        """Return a property of the service."""
        return self.shell(f"systemctl show -P {name} kvmsnapd.service").strip()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name that the service has logged since the guest is there."""
        lines = self.shell("journalctl --no-pager -o cat -u kvmsnapd.service").splitlines()
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return [record for record in records if record.get("event") == name and record["timestamp"] > self._since]

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return what a scrape gives: `(name, label values…)`, the labels in the order of their names, to value."""
        text = self.shell(f'/usr/bin/python3 -c "{_SCRAPE}"')
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def taken(self) -> list[dict[str, Any]]:
        """Return the runs of the guest in which a snapshot was taken."""
        return [run for run in self.events("run.finished") if run["result"] == "taken"]

    def wait_taken(self, count: int) -> None:
        """Return once that many snapshots of the guest have been taken."""
        self.wait_for(lambda: len(self.taken()) >= count)
