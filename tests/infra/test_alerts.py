"""The alerts are rules that Prometheus knows, and send to a page that exists; a scrape tests what they ask for."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.infra.files import INFRA, check_texts, misspelt, passes, walk

KEYS_OF_ALERTS = {
    "": "groups",
    "groups": "name rules",
    "rules": "alert expr for labels annotations",
    "labels": "severity",
    "annotations": "summary description",
}
TEXTS_OF_ALERTS = {"rules.for": "[0-9]+m", "labels.severity": "critical|warning"}
OTHER_TEXTS_OF_ALERTS = {"groups.name", "rules.alert", "rules.expr", "annotations.summary", "annotations.description"}


def check_alerts(alerts: dict[str, Any]) -> None:
    for path, value in walk(alerts):
        if isinstance(value, dict):
            (inside,) = [name for name in path if isinstance(name, str)][-1:] or [""]
            assert set(value) <= set(KEYS_OF_ALERTS[inside].split()), path
    check_texts(alerts, TEXTS_OF_ALERTS, OTHER_TEXTS_OF_ALERTS)
    for rule in [rule for group in alerts["groups"] for rule in group["rules"]]:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule), rule
        query = re.sub(r"\bray_\w+|\{.*?\}", "", rule["expr"])
        words = {"sum", "max", "by", "run", "unless", "or", "and", "offset"}
        assert set(re.findall(r"(?<!\d)[a-z]\w*", query)) <= words, query
        assert query.count("(") == query.count(")"), query
        title = re.findall(r"docs/runbook\.md, ([^.]+)\.", rule["annotations"]["description"])
        assert len(title) == 1
        assert f"\n## {title[0]}\n" in (ROOT / "docs" / "runbook.md").read_text()


@pytest.fixture(scope="module")
def alerts() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((INFRA / "alerts.yaml").read_text())
    return made


def test_prometheus_knows_every_field_of_the_alerts_and_a_misspelt_one_is_seen(alerts):
    check_alerts(alerts)
    assert [path for path, wrong in misspelt(alerts, free=()) if passes(check_alerts, wrong)] == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("sum by", "sun by"), ("unless", "unles"), ("runbook.md, E", "runbook.md, ")]
)
def test_a_misspelt_word_of_the_alerts_is_seen(alerts, right, wrong):
    text = json.dumps(alerts)
    assert right in text
    with pytest.raises(AssertionError):
        check_alerts(json.loads(text.replace(right, wrong, 1)))
