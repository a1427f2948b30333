"""What Prometheus sees of a run, scraped from Ray as it does, and the dashboard that shows it."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from shard_embedder.jobs.support.metrics import REPEAT_S, Metrics
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from tests.conftest import METRICS_INTERVAL_S, ROOT, sample_members, write_shards, write_tar

_SAMPLE = re.compile(r"(?P<name>\w+)\{(?P<tags>[^}]*)\} (?P<value>\S+)")


def scrape() -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every sample that this machine's Ray exports, by metric."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for match in _SAMPLE.finditer(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', match["tags"]))
        found.setdefault(match["name"], []).append((tags, float(match["value"])))
    return found


# Ray forgets a gauge in two intervals, and each is shorter here.
_LONG_S = 3 * METRICS_INTERVAL_S
_REPEAT_S = REPEAT_S * METRICS_INTERVAL_S / 10


@pytest.fixture(scope="module", autouse=True)
def slow_since(ray_session: None) -> Iterator[float]:
    """When the run `slow` began its pass, of which no part is stored while the other tests run."""
    metrics = Metrics("slow", _REPEAT_S)
    with metrics.repeated():
        metrics.begin_pass(3)
        yield time.monotonic()


def test_a_scrape_tells_of_a_run_and_has_all_that_the_dashboard_and_the_alerts_ask_for(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=2, samples_each=4)
    write_tar(tmp_path / "in" / "bad.tar", [*sample_members("a", 1), ("b.jpg", b"no image")])
    (tmp_path / "in" / "broken.tar").write_bytes(b"no tar")
    settings = {"backbone": "squeezenet1_1", "weights": "random:3", "image_size": "64", "precision": "fp32"}
    job = prepare_job(parse({"input": [str(tmp_path / "in")], "output": str(tmp_path / "out"), **settings}))
    metrics = Metrics(job.run, _REPEAT_S)
    watcher = Watcher(
        lambda *_: None,
        lambda number, pending, problems: metrics.begin_pass(len(pending)),
        metrics.part,
    )
    report = run(job, make_plan(job.shards, job.config.output), watcher, OnRay())

    def ours(name: str, **tags: str) -> list[float]:
        wanted = {"run": report["run"], **tags}
        return [value for has, value in found.get(name, ()) if wanted.items() <= has.items()]

    deadline = time.monotonic() + 60
    # Ray exports each of them when it likes, and forgets a gauge that is not set again.
    with metrics.repeated():
        while True:
            found = scrape()
            is_there = ours("ray_embed_images_total") == [9.0] and ours("ray_embed_pending_shards")
            if (is_there and ours("ray_embed_stage_busy_ratio", stage="embed")) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
    assert ours("ray_embed_images_total") == [9.0]
    assert ours("ray_embed_errors_total", reason="not an image of a known format") == [1.0]
    assert ours("ray_embed_read_bytes_total") == [float(report["read_bytes"])]
    assert ours("ray_embed_written_bytes_total") == [float(report["written_bytes"])]
    assert ours("ray_embed_errors_total", reason="shard fault") == [1.0]
    assert ours("ray_embed_pending_shards") == [1.0]
    (busy,) = ours("ray_embed_stage_busy_ratio", stage="embed")
    assert 0.0 < busy <= 1.0
    named = set(re.findall(r"\bray_embed_\w+", (ROOT / "infra" / "README.md").read_text()))
    assert len(named) >= 6
    assert named <= found.keys(), f"the README names metrics that no run exports: {named - found.keys()}"
    for query, labels in queries_of_dashboard():
        for metric in re.findall(r"\bray_\w+", query):
            assert metric in found, f"the dashboard names a metric that no run exports: {metric}"
            assert all(labels <= tags.keys() for tags, _ in found[metric]), query
    for query, values in queries_of_alerts():
        for metric, matchers in re.findall(r"\b(ray_\w+)(?:\{(.*?)\})?", query):
            assert metric in found, f"an alert names a metric that no run exports: {metric}"
            assert all("run" in tags for tags, _ in found[metric]), query
            for label, value in re.findall(r'(\w+)!?="(.*?)"', matchers):
                assert value in {tags[label] for tags, _ in found[metric]}, query
        assert values <= {"$labels.run", "$value"}, query


@pytest.mark.slow
def test_a_run_whose_parts_take_long_stays_seen(slow_since: float) -> None:
    time.sleep(max(0.0, slow_since + _LONG_S - time.monotonic()))
    found = scrape()
    assert [value for tags, value in found["ray_embed_pending_shards"] if tags["run"] == "slow"] == [3.0]


def queries_of_alerts() -> list[tuple[str, set[str]]]:
    """The expression of every alert, with the values that its texts show."""
    rules: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "alerts.yaml").read_text())
    queries = []
    for rule in [rule for group in rules["groups"] for rule in group["rules"]]:
        shown = re.findall(r"\{\{ (\S+)(?: \| humanizePercentage)? \}\}", json.dumps(rule["annotations"]))
        assert json.dumps(rule["annotations"]).count("{{") == len(shown), rule
        queries.append((rule["expr"], set(shown)))
    assert len(queries) >= 3
    return queries


def queries_of_dashboard() -> list[tuple[str, set[str]]]:
    """Every query of the dashboard, with the labels that it and its legend name."""
    dashboard: dict[str, Any] = json.loads((ROOT / "infra" / "grafana.json").read_text())
    queries = []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            matched = re.findall(r"(\w+) *(?:=~|!~|!=|=)", query)
            kept = re.findall(r"\w+", " ".join(re.findall(r"\bby *\((.*?)\)", query)))
            shown = re.findall(r"\{\{ *(\w+) *\}\}", target["legendFormat"])
            # What is summed has no labels but those that it is summed by.
            assert set(shown) <= set(kept) or "sum" not in query, target
            queries.append((query, {*matched, *kept, *shown}))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\(\w+, (\w+)\)", variable["query"])
            assert found, variable
            queries.append((variable["query"], {found[1]}))
    assert len(queries) >= 8
    return queries
