"""The rules for Prometheus: promtool's own checks and unit tests, and that none of it has gaps.

In `rules` each file holds cases of one theme. A case gives the series of a few hosts, and says which alerts fire; many
end with a look at ALERTS, that no other alert fired in all that time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvmsnapd.errors import HypervisorError
from kvmsnapd.prune import BlockReason
from kvmsnapd.refusal import RefusalReason
from tests.prometheus.cases import CASES, HOME, cases, for_promtool
from tests.prometheus.series import exported_series

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "config/prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((CONFIG / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})
README = (CONFIG / "README.md").read_text(encoding="utf-8")
RUNBOOK = re.compile(r"^### (Kvmsnapd\w+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(?<![\w:])kvmsnapd_\w+(?!:)")

each_alert = pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
each_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def promtool() -> str:
    unpacked = Path(os.environ.get("LAB_UNPACKED", "/nowhere"), "prometheus/usr/bin/promtool")
    found = str(unpacked) if unpacked.exists() else shutil.which("promtool")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is not there; ./dev test unpacks it")
        pytest.skip("promtool is not there; ./dev test unpacks it")
    return found


def answer(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def unit_tests() -> list[dict[str, Any]]:
    return [case for path in CASES for case in cases(path)]


def expectations(name: str) -> list[list[dict[str, Any]]]:
    """Return what the cases expect of an alert, each time they ask for it by name."""
    return [
        test.get("exp_alerts") or []
        for case in unit_tests()
        for test in case.get("alert_rule_test", ())
        if test["alertname"] == name
    ]


@pytest.mark.prometheus
def test_promtool_finds_nothing_to_complain_of_in_the_rules(promtool: str) -> None:
    said = answer(promtool, "check", "rules", "--lint=all", "--lint-fatal", CONFIG / "rules.yaml")
    assert (said.returncode, said.stderr) == (0, ""), said.stdout + said.stderr


@pytest.mark.prometheus
def test_promtool_takes_the_example_configuration_as_it_is(promtool: str) -> None:
    said = answer(promtool, "check", "config", CONFIG / "prometheus.yml")
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.prometheus
def test_promtool_takes_what_is_commented_out_in_the_example_as_well(promtool: str, tmp_path: Path) -> None:
    shutil.copytree(CONFIG, tmp_path, dirs_exist_ok=True)
    lines = (CONFIG / "prometheus.yml").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line == "  - job_name: kvmsnapd")
    fleet = next(number for number, line in enumerate(lines) if line == "  # - job_name: kvmsnapd")
    text = "\n".join([*lines[:first], *(line.replace("# ", "", 1) for line in lines[fleet:])])
    text = re.sub(r"^# (alerting:|  +)", r"\1", text, flags=re.MULTILINE)
    example = tmp_path / "prometheus.yml"
    example.write_text(text.replace("/etc/prometheus/", ""), encoding="utf-8")
    for name in ("kvmsnapd-ca.pem", "kvmsnapd-password"):
        (tmp_path / name).touch()
    assert {"alerting", "scrape_configs"} < yaml.safe_load(text).keys()
    said = answer(promtool, "check", "config", "--syntax-only", example)
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.prometheus
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_alert_fires_when_it_should_and_only_then(promtool: str, path: Path, tmp_path: Path) -> None:
    expanded = tmp_path / path.name
    expanded.write_text(for_promtool(path), encoding="utf-8")
    said = answer(promtool, "test", "rules", expanded)
    assert said.returncode == 0, said.stdout + said.stderr


def test_every_reason_that_the_rules_and_cases_name_is_one_that_the_daemon_gives() -> None:
    given = {
        *RefusalReason,
        *BlockReason,
        "",
        "hook",
        "locked",
        "misfire",
        "storage_busy",
        "state_directory",
        "unforeseen",
    }
    pending = [HypervisorError]
    while pending:
        kind = pending.pop()
        given.add(kind.reason)
        pending += kind.__subclasses__()
    texts = [(CONFIG / "rules.yaml").read_text(encoding="utf-8"), *(path.read_text(encoding="utf-8") for path in CASES)]
    found = [words for text in texts for words in re.findall(r'reason(?:=|!=|=~|!~)"([a-z_|]*)"', text)]
    named = {word for words in found for word in words.split("|")}
    assert len(named) > 10
    assert named <= given


@each_alert
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"{HOME}#{rule['alert'].lower()}"
    assert "\n" not in rule["annotations"]["description"] + rule["annotations"]["summary"]


@each_name
def test_an_alert_has_a_runbook(name: str) -> None:
    text = dict(RUNBOOK.findall(README))[name]
    for part in ("**Meaning**", "**Impact**", "**First three commands**", "**Then**"):
        assert text.count(part) == 1, part
    commands = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert commands
    assert len(commands[1].splitlines()) == 3


def test_there_is_no_runbook_without_an_alert() -> None:
    assert sorted(name for name, _ in RUNBOOK.findall(README)) == NAMES


@each_alert
def test_an_alert_is_in_the_table_with_its_severity(rule: dict[str, Any]) -> None:
    rows = [line for line in README.splitlines() if line.startswith(f"| [{rule['alert']}](#{rule['alert'].lower()}) |")]
    assert len(rows) == 1
    assert rule["labels"]["severity"] in rows[0].split("|")[2]


@each_alert
def test_each_alert_has_a_case_where_it_fires_with_all_it_says(rule: dict[str, Any]) -> None:
    fired = [alert for expected in expectations(rule["alert"]) for alert in expected]
    mine = [alert for alert in fired if alert["exp_labels"]["severity"] == rule["labels"]["severity"]]
    assert any(alert["exp_annotations"].keys() == rule["annotations"].keys() for alert in mine)


@each_name
def test_each_alert_has_a_case_where_it_is_silent(name: str) -> None:
    assert [] in expectations(name)


def test_no_case_asks_for_an_alert_that_is_not_there() -> None:
    asked = {test["alertname"] for case in unit_tests() for test in case.get("alert_rule_test", ())}
    counted = set(re.findall(r"\bKvmsnapd\w+", "".join(path.read_text(encoding="utf-8") for path in CASES)))
    assert asked | counted <= set(NAMES)


def test_no_two_cases_have_one_name() -> None:
    names = [case["name"] for case in unit_tests()]
    assert len(names) == len(set(names)) > 80


def test_rules_ask_for_series_only_that_the_daemon_exports() -> None:
    texts = [rule["expr"] for rule in RULES]
    texts += [text for rule in ALERTS for text in re.findall(r"\{\{.*?\}\}", rule["annotations"]["description"])]
    asked = {name for text in texts for name in OURS.findall(re.sub(r"\w+:kvmsnapd_\w+:\w+", "", text))}
    assert asked - exported_series() == set()
    assert len(asked) > 25


def test_cases_are_of_series_only_that_the_daemon_exports() -> None:
    given = {item["series"].partition("{")[0] for case in unit_tests() for item in case["input_series"]}
    assert given - exported_series() == {"up"}


def test_a_recording_rule_is_used_and_named_in_prometheus_way() -> None:
    recorded = [rule["record"] for rule in RULES if "record" in rule]
    everything = yaml.safe_dump(RULES, width=10_000)
    for name in recorded:
        assert re.fullmatch(r"\w+:\w+:\w+", name)
        assert everything.count(name) > 1, name


def test_an_alert_names_no_limit_of_its_own_where_the_daemon_exports_one() -> None:
    limits = {
        "KvmsnapdSnapshotOverdue": "kvmsnapd_max_age_seconds",
        "KvmsnapdStorageLow": "kvmsnapd_min_free_bytes",
        "KvmsnapdStorageFullSoon": "kvmsnapd_min_free_bytes",
        "KvmsnapdBackingChainFull": "kvmsnapd_max_chain_depth",
        "KvmsnapdSchedulerStalled": "kvmsnapd_scheduler_tick_interval_seconds",
    }
    expressions = {rule["alert"]: rule["expr"] for rule in ALERTS}
    assert [name for name, limit in limits.items() if limit not in expressions[name]] == []
