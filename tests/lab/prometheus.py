"""A real Prometheus on loopback, with the project's own alert rules in quick motion."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.lab.commands import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RULES = Path(__file__).parents[2] / "config/prometheus/rules.yaml"
_WITHIN_S = 60.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def program(name: str) -> str:
    """Return the path of ``prometheus`` or ``promtool``, unpacked by `./dev` or installed; LabError without."""
    unpacked = Path(os.environ.get("LAB_UNPACKED", "")) / "prometheus/usr/bin" / name
    found = str(unpacked) if unpacked.is_file() else shutil.which(name)
    if found is None:
        msg = f"there is no {name}"
        raise LabError(msg)
    return found


@dataclass
class Prometheus:
    """One server that scrapes each second and evaluates the rules each second.

    The rules are the shipped ones; only lengths of time after ``for`` and ``offset`` and in brackets are divided by
    ``speed``, so that an alert comes, and goes, in seconds.
    """

    directory: Path
    targets: Sequence[tuple[str, Mapping[str, str]]]
    """``host:port`` of each daemon, with the labels that file_sd would give it."""
    speed: float = 200.0
    scrape: Mapping[str, Any] = field(default_factory=dict)
    """More of the scrape job's settings."""
    process: subprocess.Popen[bytes] | None = None
    url: str = ""

    def start(self) -> None:
        """Start the server and return once it is ready."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "rules.yaml").write_text(in_quick_motion(RULES.read_text(), self.speed))
        job = {"job_name": "kvmsnapd", "file_sd_configs": [{"files": ["targets.json"]}], **self.scrape}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [job],
        }
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        discovered = [{"targets": [target], "labels": dict(labels)} for target, labels in self.targets]
        (self.directory / "targets.json").write_text(json.dumps(discovered))
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}"
        command = [
            *(program("prometheus"), f"--config.file={self.directory}/prometheus.yml"),
            *(f"--storage.tsdb.path={self.directory}/data", f"--web.listen-address={address}"),
        ]
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_for(lambda: self._get("/-/ready"))

    def stop(self) -> None:
        """End the server."""
        if self.process:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=_WITHIN_S)
            self.process = None

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.alerts() if alert["state"] == "firing"}

    def alerts(self) -> list[dict[str, Any]]:
        """Return all alerts, pending ones as well, with labels and annotations."""
        found: list[dict[str, Any]] = json.loads(self._get("/api/v1/alerts"))["data"]["alerts"]
        return found

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression gives now."""
        answer = json.loads(self._get(f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def wait_for(self, condition: Callable[[], Any], within_s: float = _WITHIN_S) -> Any:  # noqa: ANN401
        """Return the condition's first true value; LabError with the alerts as they are if it takes too long."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                if value := condition():
                    return value
            except (urllib.error.URLError, ConnectionError):
                pass  # not there yet
            if time.monotonic() > deadline or (self.process and self.process.poll() is not None):
                msg = f"this did not come true within {within_s} s\n{self._state()}"
                raise LabError(msg)
            time.sleep(0.1)

    def _state(self) -> str:
        try:
            return "\n".join(str({key: alert[key] for key in ("state", "labels")}) for alert in self.alerts())
        except OSError:
            return (self.directory / "log").read_text()[-3000:]

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:  # noqa: S310  # our own server
            text: str = answer.read().decode()
        return text


def in_quick_motion(rules: str, speed: float) -> str:
    """Return the rules with all lengths of time divided, but to no less than three scrapes."""

    def shortened(found: re.Match[str]) -> str:
        seconds = int(found[2]) * _UNITS[found[3]]
        return f"{found[1]}{max(3, round(seconds / speed))}s"

    return re.sub(r"(\bfor: |\boffset |\[)(\d+)([smhd])\b", shortened, rules)
