"""The dashboard is one that Grafana knows; a scrape tests what it asks for."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.infra.files import (
    INFRA,
    check_texts,
    misspelt,
    passes,
    walk,
)

KEYS_OF_DASHBOARD = {
    "": "title uid schemaVersion timezone refresh time templating panels",
    "time": "from to",
    "templating": "list",
    "list": "name type query label datasource refresh includeAll multi current",
    "datasource": "type uid",
    "panels": "id type title description datasource gridPos fieldConfig targets",
    "gridPos": "x y w h",
    "fieldConfig": "defaults overrides",
    "defaults": "unit min",
    "targets": "refId expr legendFormat",
}
TEXTS_OF_DASHBOARD = {
    "timezone": "browser",
    "refresh": "[0-9]+s",
    "time.from": "now-[0-9]+h",
    "time.to": "now",
    "list.type": "datasource|query",
    "datasource.type": "prometheus",
    "datasource.uid": r"\$\{datasource\}",
    "panels.type": "timeseries|stat|gauge|table",
    "defaults.unit": "short|percentunit|Bps",
    "targets.refId": "[A-Z]",
}
OTHER_TEXTS_OF_DASHBOARD = {
    "title", "uid", "list.name", "list.label", "list.query", "panels.title", "panels.description", "targets.expr",
    "targets.legendFormat",
}  # fmt: skip


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((INFRA / "grafana.json").read_text())
    return made


def check_dashboard(dashboard: dict[str, Any]) -> None:
    for path, value in walk(dashboard):
        if isinstance(value, dict):
            (inside,) = [name for name in path if isinstance(name, str)][-1:] or [""]
            if inside != "current":
                assert set(value) <= set(KEYS_OF_DASHBOARD[inside].split()), path
    check_texts(dashboard, TEXTS_OF_DASHBOARD, OTHER_TEXTS_OF_DASHBOARD)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) == variables
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for target in panel["targets"]:
            assert set(re.findall(r"(\w+) ?\(", target["expr"])) <= {"sum", "by", "rate"}, target["expr"]
            assert set(re.findall(r"\[(.*?)\]", target["expr"])) <= {"2m"}, target["expr"]
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}) == 6


def test_grafana_knows_every_field_of_the_dashboard_and_a_misspelt_one_is_seen(dashboard):
    check_dashboard(dashboard)
    assert [path for path, wrong in misspelt(dashboard) if passes(check_dashboard, wrong)] == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("rate(", "rat("), ("sum(", "sun("), ("$run", "$runs"), ("[2m]", "[2n]")]
)
def test_a_misspelt_query_of_the_dashboard_is_seen(dashboard, right, wrong):
    text = json.dumps(dashboard)
    assert right in text
    with pytest.raises(AssertionError):
        check_dashboard(json.loads(text.replace(right, wrong, 1)))
