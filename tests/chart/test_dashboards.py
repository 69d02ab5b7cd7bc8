"""The dashboards and rules name only what is exported, and all of it.

Proves: every expression is PromQL; every metric in it is exported by the gateway or the operator, recorded by
a rule, or in the list of vLLM's; every label that is matched or grouped by exists on it; a legend uses labels
that its expression keeps; every exported metric is shown or watched somewhere; Grafana's own SDK reads each
dashboard and loses nothing; ids are unique and panels do not overlap; panels say what they show where there
is no data; each has the variables and the subjects that it is for; every alert has a severity, a summary, a
runbook that exists and a line in the docs; each check finds a fault. That
the queries return data is shown where there is a Prometheus (tests/e2e/test_8_monitoring.py).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

import dashboards
import helm
import promql
from metrics_catalogue import Exported, exported
from promql import Query
from vllm_gateway.telemetry import Metrics as GatewayMetrics
from vllm_operator.metrics import Metrics as OperatorMetrics

DASHBOARDS = promql.dashboards()
RULES = promql.rules()
# What a scrape through the Prometheus Operator adds to every series.
TARGET_LABELS = {"namespace", "pod", "container", "endpoint", "job", "instance"}
TROUBLESHOOTING = "docs/troubleshooting.md"


def ours() -> list[Exported]:
    return [*exported(GatewayMetrics().registry), *exported(OperatorMetrics(list).registry)]


def vllm_metrics() -> Iterator[Exported]:
    listed = yaml.safe_load(Path(__file__).with_name("vllm_metrics.yaml").read_text())
    for name, facts in listed.items():
        # `model` comes from the PodMonitor's relabeling.
        labels = ("model_name", "engine", "model", *facts.get("labels", ()))
        yield Exported(name, facts["kind"], labels, "")


def series() -> dict[str, set[str]]:
    """Every series that Prometheus can have of us, with its labels."""
    found = {
        name: TARGET_LABELS | set(metric.labels) | ({"le"} if name.endswith("_bucket") else set())
        for metric in (*ours(), *vllm_metrics())
        for name in metric.series
    }
    return found | {rule["record"]: set(promql.grouped(rule["expr"])) for rule in RULES if "record" in rule}


def every_query() -> list[Query]:
    shown = [query for made in DASHBOARDS.values() for query in promql.dashboard_queries(made)]
    return [*shown, *promql.rule_queries()]


def complaints(query: Query, known: dict[str, set[str]]) -> Iterator[str]:
    expr = query.expanded()
    kept = promql.grouped(expr)
    found = list(promql.selectors(expr))
    for selector in found:
        if selector.name not in known:
            yield f"{query.where}: {selector.name} is not exported"
        elif missing := (selector.labels | kept) - known[selector.name]:
            yield f"{query.where}: {selector.name} has no label {', '.join(sorted(missing))}"
    legend = set(re.findall(r"{{(\w+)}}", query.legend))
    shown = kept or (known.get(found[0].name, set()) if found else set())
    if legend - shown:
        yield f"{query.where}: the legend's {', '.join(sorted(legend - shown))} is aggregated away"


@pytest.fixture(params=list(DASHBOARDS.values()), ids=list(DASHBOARDS))
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def test_every_query_names_what_is_exported() -> None:
    known = series()
    assert len(every_query()) > 100
    assert [complaint for query in every_query() for complaint in complaints(query, known)] == []


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
            "rate(vllm_gateway_request_duration_seconds[$__rate_interval])",
            "",
            "vllm_gateway_request_duration_seconds is not exported",
        ),
        ('{__name__=~"vllm:num_requests_running|vllm:gone"}', "", "vllm:gone is not exported"),
    ],
)
def test_the_check_finds_a_wrong_name(expr: str, legend: str, complaint: str) -> None:
    assert list(complaints(Query("panel", expr, legend), series())) == [f"panel: {complaint}"]


@pytest.mark.parametrize("metric", [*ours(), *vllm_metrics()], ids=lambda metric: metric.name)
def test_the_check_finds_each_metric_that_is_renamed(metric: Exported) -> None:
    """As if the gateway, the operator or vLLM exported it by another name from now on."""
    known = series()
    for name in metric.series:
        known[f"{name}_renamed"] = known.pop(name)
    found = [complaint for query in every_query() for complaint in complaints(query, known)]
    assert [text for text in found if re.search(rf": {metric.name}\w* is not exported$", text)]
    assert found == [text for text in found if "is not exported" in text or "legend" in text]


@pytest.mark.parametrize("record", [rule["record"] for rule in RULES if "record" in rule])
def test_the_check_finds_each_recorded_series_that_is_renamed(record: str) -> None:
    known = series()
    known[f"{record}_renamed"] = known.pop(record)
    found = [complaint for query in every_query() for complaint in complaints(query, known)]
    assert [text for text in found if text.endswith(f": {record} is not exported")]


def test_an_expression_that_is_no_promql_is_an_error() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        list(promql.selectors("sum(rate(x[5m])"))


def test_every_metric_is_shown_or_watched() -> None:
    used = {selector.name for query in every_query() for selector in promql.selectors(query.expanded())}
    assert [metric.name for metric in ours() if not used & set(metric.series)] == []


def lost(given: Any, back: Any, path: str = "") -> Iterator[str]:
    """What is not in `back` as it is in `given`."""
    if isinstance(given, dict) and isinstance(back, dict):
        for key, value in given.items():
            yield from lost(value, back.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        for number, (one, other) in enumerate(zip(given, back, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != back:
        yield f"{path}: {given!r} became {back!r}"


def through_grafanas_types(made: dict[str, Any]) -> Any:
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(made)))


def test_grafanas_own_types_hold_the_whole_dashboard(dashboard: dict[str, Any]) -> None:
    assert list(lost(dashboard, through_grafanas_types(dashboard))) == []


def test_the_check_finds_a_field_that_grafana_does_not_have(dashboard: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(dashboard))
    changed["panels"][0]["fieldConfig"]["defaults"]["units"] = "s"
    assert list(lost(changed, through_grafanas_types(changed))) == [
        ".panels[0].fieldConfig.defaults.units: 's' became None"
    ]


def test_panels_ask_the_chosen_data_source(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["targets"]
            for asked in (panel, *panel["targets"]):
                assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_say_what_no_data_means(dashboard: dict[str, Any]) -> None:
    shown = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["fieldConfig"]["defaults"]["noValue"] for panel in shown)
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in shown)


def test_series_of_one_panel_are_told_apart(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        legends = [target.get("legendFormat", "") for target in panel.get("targets", ())]
        if panel["type"] != "table" and len(legends) > 1:
            assert all(legends), panel["title"]
            assert len(set(legends)) == len(legends), panel["title"]


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


def test_panels_flow_into_the_next_line() -> None:
    cursor = dashboards.Cursor()
    places = [cursor.place(width, height)["gridPos"] for width, height in ((16, 4), (8, 8), (8, 8))]
    assert [(place["x"], place["y"]) for place in places] == [(0, 0), (16, 0), (0, 8)]


def test_dashboards_are_told_apart_and_linked() -> None:
    uids = [made["uid"] for made in DASHBOARDS.values()]
    assert len(uids) == len(set(uids)) == 4
    for made in DASHBOARDS.values():
        (link,) = made["links"]
        assert set(link["tags"]) <= set(made["tags"])
    linked = set(re.findall(r"/d/([\w-]+)\?", json.dumps(DASHBOARDS)))
    assert linked <= set(uids)


def anchors(text: str) -> set[str]:
    """Of a Markdown page's headings, as the usual hosts make them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def labels_of(expr: str) -> frozenset[str]:
    """What the series of an expression can have."""
    read = [series().get(selector.name, set()) for selector in promql.selectors(expr)]
    return promql.grouped(expr) or frozenset(read[0])


def alert_faults(rule: dict[str, Any], known: set[str]) -> Iterator[str]:
    page, _, anchor = rule["annotations"].get("runbook_url", "").partition("#")
    if page != TROUBLESHOOTING or anchor not in known:
        yield f"{rule['alert']}: no runbook at {page}#{anchor}"
    if not rule["annotations"].get("summary"):
        yield f"{rule['alert']}: no summary"
    if rule["labels"].get("severity") not in {"warning", "critical"}:
        yield f"{rule['alert']}: no severity"
    used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    if gone := used - labels_of(rule["expr"]):
        yield f"{rule['alert']}: {', '.join(sorted(gone))} is aggregated away"


def test_every_alert_tells_what_it_is_and_what_to_do() -> None:
    known = anchors((helm.ROOT / TROUBLESHOOTING).read_text())
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len(alerts) > 12
    assert [fault for rule in alerts for fault in alert_faults(rule, known)] == []


def test_the_check_finds_a_poor_alert() -> None:
    rule = {
        "alert": "A",
        "expr": "sum by (pod) (up)",
        "labels": {},
        "annotations": {"description": "{{ $labels.model }}"},
    }
    assert list(alert_faults(rule, {"a"})) == [
        "A: no runbook at #",
        "A: no summary",
        "A: no severity",
        "A: model is aggregated away",
    ]


def test_every_alert_has_an_entry_of_its_own() -> None:
    headings = re.findall(r"^### (\w+)$", (helm.ROOT / TROUBLESHOOTING).read_text(), flags=re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in RULES if "alert" in rule)


VARIABLES = {
    "overview.json": ["datasource", "namespace", "model"],
    "model.json": ["datasource", "namespace", "model"],
    "gateway.json": ["datasource", "release"],
    "operator.json": ["datasource", "release"],
}
# What each has to show, whatever else it does.
SUBJECTS = {
    "overview.json": {
        "vllm_gateway_requests_total",
        "vllm_gateway_request_duration_seconds_bucket",
        "vllm_gateway_time_to_first_token_seconds_bucket",
        "vllm_gateway_inter_token_seconds_bucket",
        "vllm_gateway_in_flight",
        "vllm_gateway_queued",
        "vllm_gateway_tokens_total",
        "vllm:kv_cache_usage_perc",
        "vllm_operator_gpus",
        "vllm_operator_model_ready",
    },
    "operator.json": {"vllm_operator_time_to_ready_seconds_bucket", "vllm_operator_gpus"},
    "gateway.json": {"vllm_gateway_connections"},
}


def test_dashboards_can_be_narrowed_down() -> None:
    found = {name: [v["name"] for v in made["templating"]["list"]] for name, made in DASHBOARDS.items()}
    assert found == VARIABLES


@pytest.mark.parametrize("name", SUBJECTS)
def test_dashboards_show_what_they_are_for(name: str) -> None:
    queries = promql.dashboard_queries(DASHBOARDS[name])
    read = {selector.name for query in queries for selector in promql.selectors(query.expanded())}
    assert SUBJECTS[name] <= read


def test_every_alert_is_in_the_table_of_the_docs() -> None:
    page = (helm.ROOT / "docs/monitoring.md").read_text()
    assert [rule["alert"] for rule in RULES if "alert" in rule and rule["alert"] not in page] == []
