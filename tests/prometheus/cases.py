"""The cases for the alert rules: promtool's unit tests, with what a healthy host exports said once.

What a case has beyond promtool's own keys: ``minutes`` and ``healthy``, which give hosts (``a``, ``b``…), their domains
(name and UUID) with their policies, all well for so long; ``without``, series of those that are not there. In a series
``@a`` stands for the labels of host a. What ``input_series`` has itself takes the place of what is healthy.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
RULES = HERE.parents[1] / "config/prometheus/rules.yaml"
CASES = sorted((HERE / "rules").glob("*.yaml"))
HOME = "https://github.com/kvmsnapd/kvmsnapd/blob/main/config/prometheus/README.md"

_HOST = {
    "up{@}": "1",
    'kvmsnapd_build_info{@, version="1.0"}': "1",
    "kvmsnapd_libvirt_up{@}": "1",
    "kvmsnapd_scheduler_last_tick_timestamp_seconds{@}": "0+60",
    "kvmsnapd_scheduler_tick_interval_seconds{@}": "30",
}
_DOMAIN = {
    'kvmsnapd_domain_info{@, domain="%s", uuid="%s"}': "1",
    'kvmsnapd_domain_unprotected{@, domain="%s"}': "0",
}
_PAIR = {
    "kvmsnapd_last_success_timestamp_seconds{%s}": "0+60",
    "kvmsnapd_last_attempt_timestamp_seconds{%s}": "0+60",
    "kvmsnapd_max_age_seconds{%s}": "7500",
    "kvmsnapd_next_run_timestamp_seconds{%s}": "3600+60",
    'kvmsnapd_failures_in_a_row{%s, reason=""}': "0",
}


def cases(path: Path) -> list[dict[str, Any]]:
    """Return the cases of one file as promtool takes them."""
    return [_expanded(case) for case in _read(path)["tests"]]


def for_promtool(path: Path) -> str:
    """Return one file as promtool takes it."""
    often = _read(path).get("evaluation_interval", "1m")
    return yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": often, "tests": cases(path)})


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def _expanded(case: dict[str, Any]) -> dict[str, Any]:
    series = {key: f"{value}x{case['minutes']}" for key, value in _healthy(case.pop("healthy", {}))}
    for gone in case.pop("without", []):
        del series[gone]
    series |= {given["series"]: given["values"] for given in case["input_series"]}
    case.pop("minutes", None)
    for test in case.get("alert_rule_test", []):
        for alert in test["exp_alerts"]:
            if "exp_annotations" in alert:
                alert["exp_annotations"]["runbook_url"] = f"{HOME}#{test['alertname'].lower()}"
    written = [{"series": re.sub(r"@(\w)", _labels, key), "values": values} for key, values in series.items()]
    return {"interval": "1m", **case, "input_series": written}


def _labels(found: re.Match[str]) -> str:
    host = found[1]
    return f'job="kvmsnapd", instance="{host}:9783", host="kvm{ord(host) - ord("a") + 1}"'


def _healthy(hosts: dict[str, dict[str, list[str]]]) -> Iterator[tuple[str, str]]:
    for host, domains in hosts.items():
        found = list(_HOST.items())
        for domain, policies in domains.items():
            name, uuid = domain.split()
            found += [(key % ((name, uuid) if "uuid" in key else name), value) for key, value in _DOMAIN.items()]
            for policy in policies:
                labels = f'@, domain="{name}", policy="{policy}"'
                found += [(key % labels, value) for key, value in _PAIR.items()]
        yield from ((key.replace("@", f"@{host}"), value) for key, value in found)
