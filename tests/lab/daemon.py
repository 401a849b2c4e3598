"""The daemon as a process of its own, as systemd runs it: started, signalled, killed, and asked for its metrics."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from tests.lab.commands import LabError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_WITHIN_S = 40.0


@dataclass(eq=False)
class DaemonProcess:
    """One `kvmsnapd run` with a configuration of its own; what it says is in `log`, as JSON lines.

    A killed one can be started again on the same directories.
    """

    directory: Path
    uri: str
    policies: str
    """The YAML below `policies:` and `domains:`, from the first column."""
    process: subprocess.Popen[bytes] | None = None
    _read: int = field(default=0, repr=False)

    @property
    def config(self) -> Path:
        """The configuration file; edit it and `reload`."""
        return self.directory / "kvmsnapd.yaml"

    @property
    def log(self) -> Path:
        """What all processes on this directory have written to stderr."""
        return self.directory / "log"

    def write_config(self, policies: str, *, port: int = 0) -> None:
        """Write the configuration with these policies, this port (0 is any), and the directories of this instance."""
        self.directory.mkdir(parents=True, exist_ok=True)
        own = f"state_directory: {self.directory}/state\nruntime_directory: {self.directory}/run\n"
        self.config.write_text(
            f"{policies}\n{own}metrics: {{port: {port}}}\ntick: 1s\nlog: {{level: debug, format: json}}\n"
        )

    def start(self) -> None:
        """Start the daemon and return once it is ready to be scraped."""
        if not self.config.exists():
            self.write_config(self.policies)
        self._read = len(self.events())
        options = ["--config", str(self.config), "--connect", self.uri]
        command = [sys.executable, "-m", "kvmsnapd", "run", *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        self.wait_for(lambda: self.new_events("daemon.started"))

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End the daemon with a signal and return its exit code; does nothing to one that has ended."""
        if self.process is None:
            return 0
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # the daemon then says where each of its threads is
            self.process.wait()
            msg = f"the daemon did not end within {_WITHIN_S} s\n{self._log_tail(120)}"
            raise LabError(msg) from None

    def reload(self) -> None:
        """Send SIGHUP and return once the daemon has accepted or rejected the file."""
        before = len(self._reloads())
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)
        self.wait_for(lambda: len(self._reloads()) > before)

    def _reloads(self) -> list[dict[str, Any]]:
        return self.events("config.loaded") + self.events("config.rejected")

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the events logged by all processes on this directory, all or those of one name."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        # An empty line, seen twice after kills, is nothing that could be parsed wrongly; its source is not known yet.
        found = [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
        return found if name is None else [event for event in found if event["event"] == name]

    def new_events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name since the latest start."""
        return [event for event in self.events()[self._read :] if event["event"] == name]

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Return what a scrape gives: `(name, label values…)`, the labels in the order of their names, to value."""
        url = self.new_events("daemon.started")[0]["metrics"]
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  # our own daemon
            text = answer.read().decode()
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def wait_for(self, condition: Callable[[], Any], within_s: float = _WITHIN_S) -> Any:  # noqa: ANN401
        """Return the condition's first true value; LabError with the log's end if it takes too long."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                if value := condition():
                    return value
            except (urllib.error.URLError, IndexError, KeyError):
                pass  # not there yet
            ended = self.process is not None and self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                state = f"ended with {self.process.returncode}" if ended and self.process else "still runs"
                tail = self._log_tail(120 if ended else 25)  # all threads' stacks, should it have crashed
                msg = f"the daemon {state} and this did not come true within {within_s} s\n{tail}"
                raise LabError(msg)
            time.sleep(0.02)

    def _log_tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:]) if self.log.exists() else "(no log)"
