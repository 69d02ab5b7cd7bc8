"""Dashboards, rules and monitors against reality: a real Prometheus, the installed monitors, a real vLLM.

Proves: the chart renders monitors and rules where their API is, and the API server accepts them; a scrape
configuration made of the installed monitors reaches every gateway pod, every operator pod and the engine;
after traffic of every kind (streams, failures, refusals, a queue, a cache, callers that leave) every panel
shows something, every rule is evaluated and all that it reads is there, or no_data.yaml says why not; what
we export is what the reference lists; vLLM's metrics that we use are what it exports; a renamed metric is
noticed; the dashboards can be drawn from it (hack/pictures.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cluster
import definitions
import httpx
import pytest
import releases
import yaml
from prometheus_server import Prometheus, running

import pictures
import promql
from metrics_catalogue import exported
from vllm_gateway.telemetry import Metrics as GatewayMetrics
from vllm_operator.metrics import Metrics as OperatorMetrics

pytestmark = pytest.mark.e2e
EXCUSES = yaml.safe_load(Path(__file__).with_name("no_data.yaml").read_text())
NO_DATA = {entry["asks"] for entry in EXCUSES}
BY_CHANCE = {entry["asks"] for entry in EXCUSES if entry.get("by_chance")}
VLLM = yaml.safe_load((cluster.ROOT / "tests" / "chart" / "vllm_metrics.yaml").read_text())
MONITORING_OFF = ("--set", "monitoring.monitors=false", "--set", "monitoring.rules.enabled=false")
WINDOW = "5m"
PARKED = "parked"
QUEUE = {"maxInFlight": 1, "maxQueue": 1, "responseCache": {"ttl": "5m"}}


@pytest.fixture(scope="module")
def monitors(release: None) -> Iterator[None]:
    """The chart with its monitors and rules, since the definitions of the Prometheus Operator are there."""
    with definitions.installed(definitions.MONITORING.read_text()):
        releases.install("--set", "monitoring.interval=2s")
        yield
        releases.install(*MONITORING_OFF)
    releases.install()


@pytest.fixture(scope="module")
def watched(monitors: None, smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, after two rounds of traffic: a counter's first value is not seen as an increase."""
    cluster.eventually(
        lambda: not ending(), "what earlier tests ended is gone", 240
    )  # it could not be scraped
    with running(tmp_path_factory.mktemp("prometheus")) as made:
        cluster.eventually(
            lambda: len(up(made)) >= 4, "the gateways, the operator and the engine are scraped", 120
        )
        for _ in range(2):
            a_model_in_trouble_that_recovers(made)
            traffic(smollm2)
            made.wait_scraped()
            made.wait_scraped()  # what the first found is stored by now
        yield made


def ending() -> list[str]:
    """Pods that are being deleted."""
    listed = json.loads(cluster.kubectl("get", "pods", "--all-namespaces", "-o", "json"))["items"]
    return [pod["metadata"]["name"] for pod in listed if "deletionTimestamp" in pod["metadata"]]


def up(made: Prometheus) -> list[dict[str, Any]]:
    return [target for target in made.targets() if target["health"] == "up"]


def traffic(model: str) -> None:
    """One round of everything that the cluster can be made to do within seconds."""
    with cluster.port_forward("svc/vllm-fleet-gateway", 3000) as port:
        url = f"http://127.0.0.1:{port}"
        cluster.eventually(lambda: chat(url, "hello").status_code == 200, "the model answers", 60)
        httpx.post(f"{url}/chat", json={"message": "x", "model": "nobody"}, timeout=60)
        with gateway_settings(model, QUEUE):
            cluster.eventually(lambda: 429 in at_once(chat, url, 4), "a caller is turned away", 60)
            for _ in range(2):
                chat(url, "what is kept?")
    for lines in (20, 3):
        with cluster.port_forward("svc/vllm-fleet-gateway", 3000) as port:
            stream(f"http://127.0.0.1:{port}", lines)


def chat(url: str, text: str) -> httpx.Response:
    body = {"message": text, "max_tokens": 16, "temperature": 0}
    return httpx.post(f"{url}/chat", json=body, timeout=60)


def at_once(ask: Callable[[str, str], httpx.Response], url: str, count: int) -> list[int]:
    """The statuses of as many different requests at the same time."""
    with ThreadPoolExecutor(count) as pool:
        texts = [f"{time.monotonic()} {number}" for number in range(count)]
        return [answer.status_code for answer in pool.map(lambda text: ask(url, text), texts)]


def stream(url: str, lines: int) -> None:
    """Reads that many lines of an answer, and leaves."""
    body = {"message": "Tell me a story.", "max_tokens": 40}
    with httpx.stream("POST", f"{url}/chat/stream", json=body, timeout=60) as answer:
        read = answer.iter_lines()
        for _ in range(lines):
            next(read, None)


class gateway_settings:  # noqa: N801 - read as a statement
    """Within, the model's `spec.gateway` is this; an edit of it restarts no engine."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self._model, self._settings = model, settings

    def __enter__(self) -> None:
        cluster.patch_spec(self._model, {"gateway": self._settings})

    def __exit__(self, *_: object) -> None:
        cluster.patch_spec(self._model, {"gateway": None})


def a_model_in_trouble_that_recovers(watching: Prometheus) -> None:
    """A stranger's Service has the child's name: a failed write, and a model that waits until it is gone."""
    port = {"port": 8000}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{PARKED}-engine"},
        "spec": {"ports": [port]},
    }
    manifest = cluster.example("smollm2.yaml")
    manifest["metadata"]["name"] = PARKED
    manifest["spec"] |= {"servedNames": [PARKED], "replicas": 1}
    cluster.apply(service)
    cluster.apply(manifest)
    cluster.eventually(
        lambda: cluster.condition(PARKED, "Ready").get("reason") == "ChildConflict", "the conflict", 60
    )
    watching.wait_scraped()
    cluster.delete("service", f"{PARKED}-engine")
    cluster.patch_spec(PARKED, {"replicas": 0})
    cluster.eventually(
        lambda: cluster.condition(PARKED, "Ready").get("reason") == "ScaledToZero", "it is Ready", 90
    )
    watching.wait_scraped()
    cluster.remove_model(PARKED)


def pod_names(pods: list[cluster.Manifest]) -> set[str]:
    return {pod["metadata"]["name"] for pod in pods}


def test_the_installed_monitors_reach_every_pod(watched: Prometheus, smollm2: str) -> None:
    watched.wait_scraped()
    targets = watched.targets()
    engines = pod_names(cluster.engine_pods(smollm2))
    ours = [pod for component in ("gateway", "operator") for pod in releases.component_pods(component)]
    wanted = pod_names(ours) | engines
    assert {target["labels"]["pod"] for target in targets} == wanted
    (engine,) = [target for target in targets if target["labels"]["pod"] in engines]
    assert engine["labels"]["model"] == f"default/{smollm2}"


def asked() -> dict[str, str]:
    """What must have data, by its text in no_data.yaml: panels as a whole, of rules all that they read."""
    panels = {
        query.expr: query.expanded(WINDOW).removesuffix(" or vector(0)")  # which hides that nothing is there
        for made in promql.dashboards().values()
        for query in promql.dashboard_queries(made)
    }
    read = {str(selector) for query in promql.rule_queries() for selector in promql.selectors(query.expr)}
    return panels | {text: text for text in read}


def test_every_panel_and_rule_has_data_or_a_reason(watched: Prometheus) -> None:
    questions = asked()

    def empty() -> set[str]:
        return {text for text, expr in questions.items() if not watched.query(expr)}

    # What one scrape missed comes with the next.
    cluster.eventually(lambda: empty() <= NO_DATA, lambda: f"data of {sorted(empty() - NO_DATA)}", 30)
    assert sorted(NO_DATA - empty() - listed() - BY_CHANCE) == [], (
        "these have data, so no_data.yaml need not excuse them"
    )


def test_every_rule_is_evaluated(watched: Prometheus) -> None:
    rules = watched.rules()
    assert len(rules) == len(promql.rules())
    cluster.eventually(
        lambda: all(rule["health"] == "ok" for rule in watched.rules()), "all rules are ok", 60
    )


def listed() -> set[str]:
    """The series of the reference."""
    ours = [*exported(GatewayMetrics().registry), *exported(OperatorMetrics(list).registry)]
    return {name for metric in ours for name in metric.series}


def test_what_is_exported_is_what_the_reference_lists(watched: Prometheus) -> None:
    found = {name for name in watched.names() if name.startswith(("vllm_gateway_", "vllm_operator_"))}
    assert sorted(found - listed()) == []
    assert sorted(listed() - found - NO_DATA) == []
    assert sorted((NO_DATA & found) - BY_CHANCE) == []


def test_vllms_metrics_are_what_it_exports(watched: Prometheus) -> None:
    suffixes = {"histogram": "_bucket"}
    wanted = {name + suffixes.get(facts["kind"], "") for name, facts in VLLM.items()}
    assert sorted(wanted - watched.names()) == []


def test_the_dashboards_are_drawn_from_it(watched: Prometheus, tmp_path: Path) -> None:
    assert pictures.main([watched.url, "--minutes", "2", "--window", "10s", "--out", str(tmp_path)]) == 0
    overview = (tmp_path / "overview.svg").read_text()
    assert "default/smollm2" in overview
    assert "This is not Grafana" in overview
    assert {path.stem for path in tmp_path.iterdir()} == {Path(name).stem for name in promql.dashboards()}


def metrics_in_use() -> list[str]:
    """What the gateway, the operator and vLLM export, and what rules record."""
    ours = [*exported(GatewayMetrics().registry), *exported(OperatorMetrics(list).registry)]
    recorded = [rule["record"] for rule in promql.rules() if "record" in rule]
    return [metric.name for metric in ours] + list(VLLM) + recorded


def without(metric: str, expr: str) -> str:
    """The expression as it meets a Prometheus in which the metric has another name."""
    return re.sub(rf"(?<![\w:]){re.escape(metric)}(_bucket|_sum|_count)?(?![\w:])", r"gone\g<0>", expr)


def readings() -> dict[str, list[str]]:
    """Of each metric what reads it and has data, as the metric's absence leaves it."""
    with_data = [expr for text, expr in asked().items() if text not in NO_DATA]
    changed = {metric: [without(metric, expr) for expr in with_data] for metric in metrics_in_use()}
    return {metric: sorted(set(exprs) - set(with_data)) for metric, exprs in changed.items()}


READINGS = readings()


def test_only_what_has_no_data_here_is_left_to_the_check_of_names() -> None:
    """Which finds each metric that is renamed, without data: tests/chart/test_dashboards.py."""
    assert {metric for metric, exprs in READINGS.items() if not exprs} == {
        "vllm_gateway_upstream_errors_total",
        "vllm_fleet:request_errors:ratio_rate5m",
    }


@pytest.mark.parametrize("metric", [metric for metric, exprs in READINGS.items() if exprs])
def test_a_renamed_metric_is_noticed(watched: Prometheus, metric: str) -> None:
    """By the test that every panel and rule has data: each metric, one at a time."""
    assert any(not watched.query(expr) for expr in READINGS[metric])
