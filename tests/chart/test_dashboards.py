"""The dashboards name only what is exported.

Proves: every metric in every expression is exported by the gateway or the operator, or is in the list of
vLLM's; every label that is matched or grouped by exists on it; a legend uses labels that its expression
keeps; every panel asks the chosen data source; ids are unique and panels do not overlap; the check finds a
wrong name. That the queries return data is shown where there is a Prometheus.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import helm
from metrics_catalogue import Exported, exported
from vllm_gateway.telemetry import Metrics as GatewayMetrics
from vllm_operator.metrics import Metrics as OperatorMetrics

FILES = sorted((helm.ROOT / "grafana" / "dashboards").glob("*.json"))
# What a scrape through the Prometheus Operator adds to every series.
TARGET_LABELS = {"namespace", "pod", "container", "endpoint", "job", "instance"}
WORDS = {
    "by",
    "without",
    "and",
    "or",
    "unless",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "bool",
    "offset",
}


def vllm_metrics() -> Iterator[Exported]:
    listed = yaml.safe_load(Path(__file__).with_name("vllm_metrics.yaml").read_text())
    for name, facts in listed.items():
        # `model` comes from the PodMonitor's relabeling.
        labels = ("model_name", "engine", "model", *facts.get("labels", ()))
        yield Exported(name, facts["kind"], labels, "")


def series() -> dict[str, set[str]]:
    """Every series that Prometheus can have of us, with its labels."""
    ours = [*exported(GatewayMetrics().registry), *exported(OperatorMetrics(list).registry)]
    return {
        name: TARGET_LABELS | set(metric.labels) | ({"le"} if name.endswith("_bucket") else set())
        for metric in (*ours, *vllm_metrics())
        for name in metric.series
    }


class Query(NamedTuple):
    """An expression, and the legend of its series."""

    panel: str
    expr: str
    legend: str


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], target["expr"], target.get("legendFormat", ""))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert found, variable
            yield Query(variable["name"], found[1], f"{{{{{found[2]}}}}}")


def selectors(expr: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric name of an expression with the labels that are matched on it."""
    named = re.search(r'__name__=~"([^"]*)"', expr)
    bare = re.sub(r'"[^"]*"', '""', expr)  # values may hold braces of Grafana's variables
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)|\[[^\]]*\]", " ", bare)
    for name, matchers in re.findall(r"([A-Za-z_:][\w:]*)?\s*\{([^}]*)\}", bare):
        labels = set(re.findall(r"(\w+)\s*[=!]", matchers)) - {"__name__"}
        yield from ((each, labels) for each in (named[1].split("|") if named and not name else [name]))
    for name in re.findall(r"[A-Za-z_:][\w:]*(?!\s*[\w:({])", re.sub(r"\{[^}]*\}", "{}", bare)):
        if name not in WORDS:
            yield name, set()


def complaints(query: Query, known: dict[str, set[str]]) -> Iterator[str]:
    grouped = re.findall(r"\bby\s*\(([^)]*)\)", query.expr)
    kept = {label.strip() for labels in grouped for label in labels.split(",")}
    names = list(selectors(query.expr))
    for name, labels in names:
        if name not in known:
            yield f"{query.panel}: {name} is not exported"
        elif missing := (labels | kept) - known[name]:
            yield f"{query.panel}: {name} has no label {', '.join(sorted(missing))}"
    legend = set(re.findall(r"{{(\w+)}}", query.legend))
    shown = kept if grouped or not names else known.get(names[0][0], set())
    if legend - shown:
        yield f"{query.panel}: the legend's {', '.join(sorted(legend - shown))} is aggregated away"


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(json.loads(request.param.read_text()))


def test_every_query_names_what_is_exported(dashboard: dict[str, Any]) -> None:
    known = series()
    found = list(queries(dashboard))
    assert len(found) > 20
    assert [complaint for query in found for complaint in complaints(query, known)] == []


@pytest.mark.parametrize(
    ("expr", "legend", "complaint"),
    [
        ("sum(rate(vllm_gateway_request_total[5m]))", "", "vllm_gateway_request_total is not exported"),
        (
            'sum(vllm_gateway_requests_total{status="200"})',
            "",
            "vllm_gateway_requests_total has no label status",
        ),
        ("sum by (user) (vllm_gateway_requests_total)", "", "vllm_gateway_requests_total has no label user"),
        ("sum by (code) (vllm_gateway_requests_total)", "{{model}}", "the legend's model is aggregated away"),
        ("vllm_gateway_connections / up", "", "up is not exported"),
        (
            "rate(vllm_gateway_request_duration_seconds[5m])",
            "",
            "vllm_gateway_request_duration_seconds is not exported",
        ),
        ('{__name__=~"vllm:num_requests_running|vllm:gone"}', "", "vllm:gone is not exported"),
    ],
)
def test_the_check_finds_a_wrong_name(expr: str, legend: str, complaint: str) -> None:
    assert list(complaints(Query("panel", expr, legend), series())) == [f"panel: {complaint}"]


def test_panels_ask_the_chosen_data_source(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]


def test_panels_have_their_own_ids_and_places(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        cell
        for panel in dashboard["panels"]
        for cell in itertools.product(
            range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"]),
            range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"]),
        )
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_dashboards_are_told_apart() -> None:
    uids = [json.loads(file.read_text())["uid"] for file in FILES]
    assert len(uids) == len(set(uids))
    assert all(len(uid) <= 40 for uid in uids)
