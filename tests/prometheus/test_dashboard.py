"""The Grafana dashboard: what can be held without Grafana, of its JSON and of all its expressions."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.prometheus.series import exported_series

if TYPE_CHECKING:
    from collections.abc import Iterator

DASHBOARD = Path(__file__).parents[2] / "config/grafana/kvmsnapd.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
VARIABLE = re.compile(r"\$\{?([a-zA-Z_]\w*)\}?")
GRAFANA_OWN = {"__range": "1d", "__interval": "1m", "__rate_interval": "5m", "__all": ".*"}
LABEL_VALUES = re.compile(r"label_values\((.+), *(\w+)\)")

Json = dict[str, Any]


@pytest.fixture(scope="module")
def dashboard() -> Json:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels(dashboard: Json) -> Iterator[Json]:
    """Yield all panels, also those inside a row that is folded."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


def expressions(dashboard: Json) -> Iterator[str]:
    """Yield every expression that Prometheus is asked, with Grafana's variables in it."""
    for panel in panels(dashboard):
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (note["expr"] for note in dashboard["annotations"]["list"] if "expr" in note)
    yield from (LABEL_VALUES.fullmatch(query)[1] for query in label_queries(dashboard))


def label_queries(dashboard: Json) -> list[str]:
    return [item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query"]


def substituted(expression: str) -> str:
    """Return the expression as Prometheus gets it; $1 and the like are label_replace's own."""
    return VARIABLE.sub(lambda found: GRAFANA_OWN.get(found[1], ".*"), expression)


def test_the_dashboard_can_be_imported_beside_others(dashboard: Json) -> None:
    assert dashboard["uid"] == "kvmsnapd"
    assert "id" not in dashboard
    assert "__inputs" not in dashboard


def test_no_two_panels_have_one_id(dashboard: Json) -> None:
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))


def test_each_panel_says_what_it_shows_and_when_to_worry(dashboard: Json) -> None:
    silent = [panel["id"] for panel in panels(dashboard) if not panel.get("title") or not panel.get("description")]
    assert silent == []
    careless = [
        panel["title"]
        for panel in panels(dashboard)
        if panel["type"] != "row" and not re.search(r"\b[Ww]orry\b|Empty is good", panel["description"])
    ]
    assert careless == []


def test_no_two_panels_have_one_title(dashboard: Json) -> None:
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(titles) == len(set(titles))


def test_each_panel_and_query_asks_the_data_source_that_was_chosen(dashboard: Json) -> None:
    asked = [item.get("datasource") for panel in panels(dashboard) for item in (panel, *panel.get("targets", ()))]
    asked += [note["datasource"] for note in dashboard["annotations"]["list"] if not note.get("builtIn")]
    asked += [item["datasource"] for item in dashboard["templating"]["list"] if item["type"] == "query"]
    assert [source for source in asked if source != DATASOURCE] == []


def test_each_panel_of_numbers_has_a_unit(dashboard: Json) -> None:
    without = [
        panel["title"]
        for panel in panels(dashboard)
        if panel["type"] in {"stat", "gauge", "bargauge", "timeseries", "table", "heatmap"}
        and not panel["fieldConfig"]["defaults"].get("unit")
    ]
    assert without == []


def test_each_column_that_is_formatted_sorted_or_hidden_exists(dashboard: Json) -> None:
    for panel in panels(dashboard):
        if panel["type"] != "table":
            continue
        columns = panel["transformations"][-1]["options"]
        titles = set(columns["renameByName"].values())
        used = {item["matcher"]["options"] for item in panel["fieldConfig"]["overrides"]}
        used |= {item["displayName"] for item in panel["options"]["sortBy"]}
        assert used <= titles, panel["title"]
        refs = {target["refId"] for target in panel["targets"]}
        values = {f"Value #{ref}" for ref in refs} if len(refs) > 1 else {"Value"}
        named = {*columns["renameByName"], *columns["excludeByName"]}
        assert values == {name for name in named if name.startswith("Value")}, panel["title"]


def test_no_panel_lies_on_another_or_beside_the_page(dashboard: Json) -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in dashboard["panels"]]
    assert [title for title, at in places if at["x"] < 0 or at["w"] < 1 or at["x"] + at["w"] > 24] == []
    overlaps = [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(places, 2)
        if a["x"] < b["x"] + b["w"]
        and b["x"] < a["x"] + a["w"]
        and a["y"] < b["y"] + b["h"]
        and b["y"] < a["y"] + a["h"]
    ]
    assert overlaps == []


def test_each_variable_that_is_used_is_defined_and_each_defined_one_is_used(dashboard: Json) -> None:
    defined = {item["name"] for item in dashboard["templating"]["list"]}
    used = set(VARIABLE.findall(json.dumps(dashboard))) - GRAFANA_OWN.keys()
    assert used == defined


def test_each_series_that_is_asked_for_is_exported(dashboard: Json) -> None:
    asked = {name for expression in expressions(dashboard) for name in re.findall(r"\bkvmsnapd_\w+", expression)}
    assert len(asked) > 30
    assert asked <= exported_series()


@pytest.mark.prometheus
def test_promtool_understands_each_expression(dashboard: Json, tmp_path: Path) -> None:
    promtool = Path(os.environ.get("LAB_UNPACKED", "/nowhere"), "prometheus/usr/bin/promtool")
    if not promtool.exists():
        if os.environ.get("CI"):
            pytest.fail("promtool is not there; ./dev test unpacks it")
        pytest.skip("promtool is not there; ./dev test unpacks it")
    rules = [
        {"record": f"dashboard:expression:{number}", "expr": substituted(expression)}
        for number, expression in enumerate(expressions(dashboard))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    answer = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{len(rules)} rules found" in answer.stdout
