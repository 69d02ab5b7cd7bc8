"""What bench/operator computes without a cluster.

Proves: each client's requests are read from the API server's metrics by kind, and nobody else's; every
write but the Lease's counts as one; the tables say the ratio to the bare loop, and what was not measured; a
bound is missed as soon as one write, second or megabyte is too many; peers stand beside ours, each with its
own yardstick; text goes between the markers and nowhere else; what counts as rolled out and as ready follows
the object's generation, or the pods where a peer tells no more; another project's manifests come into one
namespace, and its settings are its chart's but for the addresses and the profile; a bare loop's Pod is the
Deployment's; a process that has to lead is not ready before it says so itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from course import written
from figures import (
    END,
    START,
    Bound,
    Idle,
    Lap,
    Phase,
    Restart,
    Results,
    Singles,
    Spent,
    between_markers,
    bound_table,
    bounds,
    lap_table,
    single_table,
)
from flows import (
    Client,
    children_writes,
    flow_schemas,
    flows,
    per_model,
    requests_of,
    server_cpu_seconds,
    writes,
)
from observer import is_rolled_out, model_serves, replicas_ready
from programs import Program, free_port
from subjects import KWOK, NAMESPACE, kubeai, kubeai_settings

from vllm_operator.kinds import DEPLOYMENTS, PODS, SERVICES

OURS = Client("ours", "ns", "operator", "vllm-fleet.dev", "vllmmodels")
DISPATCHED = "apiserver_flowcontrol_dispatched_requests_total"


def dispatched(schema: str, count: str) -> str:
    return f'{DISPATCHED}{{flow_schema="{schema}",priority_level="workload-low"}} {count}'


METRICS = "\n".join(
    (
        f"# HELP {DISPATCHED} [BETA] Number of requests executed by API Priority and Fairness subsystem",
        dispatched("bench-ours-create", "20"),
        dispatched("bench-ours-status", "1.2e+01"),
        dispatched("bench-ours-lease", "7"),
        dispatched("bench-ours-watch", "3"),
        dispatched("bench-other-create", "99"),
        dispatched("exempt", "1004"),
        "process_cpu_seconds_total 12.5",
        "",
    )
)


def test_a_clients_requests_are_its_own() -> None:
    found = requests_of(OURS, METRICS)
    assert found == {"create": 20, "status": 12, "lease": 7, "watch": 3}
    assert server_cpu_seconds(METRICS) == 12.5
    assert (writes(found), children_writes(found)) == (32, 20)
    assert per_model(found, 10) == 3.5  # without the Lease's
    assert requests_of(OURS, "") == {}


def test_each_request_has_one_schema_and_the_narrow_ones_come_first() -> None:
    schemas = flow_schemas(OURS)
    precedences = [schema["spec"]["matchingPrecedence"] for schema in schemas]
    assert precedences == sorted(set(precedences))
    rules = [schema["spec"]["rules"][0]["resourceRules"][0] for schema in schemas]
    verbs = [verb for rule in rules if rule["resources"] == ["*"] for verb in rule["verbs"]]
    known = {"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}
    assert sorted(verbs) == sorted(known)
    narrow = [rule["resources"] for rule in rules[:3]]
    assert narrow == [["leases"], ["events"], ["vllmmodels/status"]]
    accounts = [schema["spec"]["rules"][0]["subjects"][0]["serviceAccount"] for schema in schemas]
    assert all(account == {"name": "operator", "namespace": "ns"} for account in accounts)


def test_a_client_without_models_has_no_status_of_its_own() -> None:
    status = next(flow for flow in flows(Client("bare", "ns", "loop")) if flow.name == "status")
    assert (status.group, status.resource) == ("none", "none")


def lap(**changed: Any) -> Lap:
    requests = Counter(changed.get("requests", {"create": 20, "status": 20, "event": 10, "get": 10}))
    created = Phase(changed.get("children", 0.2), changed.get("ready", 1.15), Spent(requests, 0.5, 2.0))
    return Lap(10, created, changed.get("edited"), Phase(3.0, 3.0), changed.get("peak_mb", 199.0), load=7.5)


BARE = Lap(10, Phase(0.1, 1.0, Spent(server_cpu=1.0)), Phase(2.0, 2.0), Phase(1.5, 1.5))


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"children": 0.21}, ["10 models: children within 20 ms a model"]),
        ({"ready": 1.16}, ["10 models: ready within 1.15 x the bare loop"]),
        ({"peak_mb": 200.0}, ["10 models: under 200 MB"]),
        ({"requests": {"create": 21}}, ["10 models: a write a child, three more a model"]),
        ({"requests": {"status": 31}}, ["10 models: a write a child, three more a model"]),
    ],
)
def test_a_laps_bounds(changed: dict[str, Any], missed: list[str]) -> None:
    found = bounds(Results("ours", [lap(**changed)], [BARE]))
    assert len(found) == 4
    assert [bound.what for bound in found if not bound.holds] == missed


def test_bounds_of_single_models_are_of_the_median() -> None:
    slow_once = Singles([0.1, 0.2, 9.0], [0.1, 0.2, 9.0], [0.1, 1.0, 9.0])
    found = bounds(Results("ours", singles=slow_once))
    assert [bound.holds for bound in found] == [True, True, False]


def test_nothing_is_written_while_idle_and_after_a_restart() -> None:
    calm = Results("ours", idle=Idle(500, 60.0, 0.59, 0), restart=Restart(1000, 2.0, 1.0, 150.0, 0))
    assert [bound.holds for bound in bounds(calm)] == [True, True, True]
    busy = Results("ours", idle=Idle(500, 60.0, 0.61, 1), restart=Restart(1000, 2.0, 1.0, 150.0, 1))
    assert [bound.holds for bound in bounds(busy)] == [False, False, False]


def test_the_table_of_laps() -> None:
    text = lap_table(Results("ours", [lap(edited=Phase(5.0, 6.0, Spent(cpu=1.0))), lap()], [BARE]))
    lines = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines())
    assert lines["ours"] == "10 models | 10 models"
    assert lines["all ready"] == "1.1 s (1.15 x 1.0) | 1.1 s"
    assert lines["all edited and ready again"] == "6.0 s (3.00 x 2.0) | not measured"
    assert lines["CPU of the API server, create"] == "2.0 s (2.00 x 1.0) | 2.0 s"
    assert lines["CPU of the operator, create"] == "0.5 s (50.0 ms a model) | 0.5 s (50.0 ms a model)"
    assert lines["its requests a model, create"].startswith("6.0: create 2, status 2, ")
    assert lines["its requests a model, edit"] == "none | not measured"


def test_the_table_of_the_rest() -> None:
    results = Results("ours", singles=Singles([0.1, 0.3], [], [0.2]), idle=Idle(5, 60.0, 0.3, 0))
    text = single_table(results)
    assert "0.200 s (worst of 2: 0.300 s)" in text
    assert "| pod ready → model ready | none |" in text
    assert "| idle, 5 models | 0.50 % of a core, 0 writes in 60 s |" in text
    assert "restart" not in text


def test_peers_stand_beside_ours() -> None:
    ours = Results("ours", laps=[lap()], bare=[BARE], singles=Singles([0.1], [0.2], [0.3]))
    peer = Results("peer", [lap(ready=4.0)], singles=Singles([3.0], [], []), workload="Pod")
    peer.idle = Idle(10, 20.0, 1.0, 2)
    lines = dict(line.strip("| ").split(" | ", 1) for line in lap_table(ours, peer).splitlines()[2:])
    assert lap_table(ours, peer).splitlines()[0] == "|  | ours, 10 models | peer, 10 models |"
    assert lines["all ready"] == "1.1 s (1.15 x 1.0) | 4.0 s"
    assert lines["load of the machine at the end"] == "7.5 | 7.5"
    text = single_table(ours, peer)
    assert text.splitlines()[0] == "|  | ours | peer |"
    created = "| Deployment: 0.100 s (worst of 1: 0.100 s) | Pod: 3.000 s (worst of 1: 3.000 s) |"
    assert f"| model created → its workload exists {created}" in text
    assert "| idle, 10 models | not measured | 5.00 % of a core, 2 writes in 20 s |" in text


def test_a_bound_is_told_as_ok_or_missed() -> None:
    text = bound_table([Bound("a", "1", holds=True), Bound("b", "2", holds=False)])
    assert text.splitlines()[2:] == ["| a | 1 | ok |", "| b | 2 | missed |"]


def test_text_goes_between_the_markers() -> None:
    start, end = START.format(""), END.format("")
    other = f"{START.format(' QPS')}\nother\n{END.format(' QPS')}\n"
    document = f"before\n{other}{start}\nold\n{end}\nafter\n"
    once = between_markers(document, "new\n")
    assert once == f"before\n{other}{start}\n\nnew\n\n{end}\nafter\n"
    assert between_markers(once, "new\n") == once
    assert between_markers(once, "n", " QPS") == once.replace("\nother\n", "\n\nn\n\n")
    with pytest.raises(ValueError, match="bench/operator"):
        between_markers(f"{START.format('')} and no end", "new")


@pytest.mark.parametrize(
    ("status", "rolled_out"),
    [
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, True),
        ({"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, False),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 1, "availableReplicas": 2}, False),
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1}, False),
        ({}, False),
    ],
)
def test_rolled_out(status: dict[str, int], rolled_out: bool) -> None:
    assert (
        is_rolled_out({"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": status})
        is rolled_out
    )


def model(observed: int, **conditions: str) -> dict[str, Any]:
    listed = [{"type": name, "status": value} for name, value in conditions.items()]
    return {"metadata": {"generation": 2}, "status": {"observedGeneration": observed, "conditions": listed}}


def test_a_model_serves() -> None:
    assert model_serves(model(2, Ready="True"))
    assert not model_serves(model(1, Ready="True"))
    assert not model_serves(model(2, Ready="True", Reconciling="True"))
    assert not model_serves(model(2, Ready="False"))
    assert not model_serves({"metadata": {"generation": 1}})


@pytest.mark.parametrize(
    ("wanted", "status", "ready"),
    [
        (2, {"replicas": {"all": 2, "ready": 2}}, True),
        (2, {"replicas": {"all": 2, "ready": 1}}, False),
        (1, {"replicas": {"all": 2, "ready": 2}}, False),  # the pod that is replaced is there still
        (1, {"replicas": {"all": 2, "ready": 1}}, False),
        (1, {}, False),
        (0, {"replicas": {"all": 0, "ready": 0}}, False),
        (None, {}, False),
    ],
)
def test_a_model_of_kubeai_is_ready(wanted: int | None, status: dict[str, Any], ready: bool) -> None:
    spec = {} if wanted is None else {"replicas": wanted}
    assert replicas_ready({"spec": spec, "status": status}) is ready


CHART = [
    {"kind": "ServiceAccount", "metadata": {"name": "kubeai"}},
    {"kind": "ConfigMap", "metadata": {"name": "kubeai-autoscaler-state"}},
    {
        "kind": "ConfigMap",
        "metadata": {"name": "kubeai-config"},
        "data": {"system.yaml": "modelRollouts: {surge: 1}\nmetricsAddr: other\nresourceProfiles: {cpu: {}}"},
    },
    {"kind": "CustomResourceDefinition", "metadata": {"name": "models.kubeai.org"}},
    {"kind": "RoleBinding", "metadata": {"name": "kubeai"}},
    {"kind": "Deployment", "metadata": {"name": "kubeai"}},
]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder as bench/operator/kubeai leaves it, but for the program."""
    (tmp_path / "install.yaml").write_text("---\n" + yaml.safe_dump_all([*CHART, None]))
    return tmp_path


def test_what_kubeai_needs_is_made_in_the_namespace_of_its_models(built: Path) -> None:
    made = {(body["kind"], body["metadata"]["name"]): body for body in kubeai(built).prerequisites}
    assert ("Deployment", "kubeai") not in made
    assert made.pop(("Namespace", NAMESPACE))
    definition = made.pop(("CustomResourceDefinition", "models.kubeai.org"))
    assert "namespace" not in definition["metadata"]
    assert len(made) == 4
    assert {body["metadata"]["namespace"] for body in made.values()} == {NAMESPACE}


def test_kubeais_settings_are_its_charts_but_for_addresses_and_profile(built: Path) -> None:
    settings = kubeai_settings(built / "install.yaml", "127.0.0.1:1", "127.0.0.1:2")
    assert settings.pop("modelRollouts") == {"surge": 1}
    assert settings.pop("healthAddress") == "127.0.0.1:1"
    assert (settings.pop("metricsAddr"), settings.pop("fixedSelfMetricAddrs")) == (
        "127.0.0.1:2",
        ["127.0.0.1:2"],
    )
    assert list(settings) == ["resourceProfiles"]
    assert settings["resourceProfiles"]["bench"]["tolerations"] == [KWOK]
    name, _, count = kubeai(built).model("m")["spec"]["resourceProfile"].partition(":")
    assert (list(settings["resourceProfiles"]), count) == ([name], "1")


def test_the_bare_loop_writes_what_the_peer_makes() -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "engine"}]}}
    metadata = {"name": "m-engine", "namespace": "ns", "labels": {"of": "the Deployment"}}
    deployment = {"kind": "Deployment", "metadata": metadata, "spec": {"replicas": 1, "template": template}}
    bodies = [{"kind": "Service", "metadata": {"name": "m-engine"}}, deployment]
    assert written(bodies, (SERVICES, DEPLOYMENTS)) == bodies
    assert written(bodies, (PODS,)) == [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "m-engine", "namespace": "ns", "labels": {"a": "b"}},
            "spec": template["spec"],
        }
    ]


STANDBY = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/lead":
            print("leads", flush=True)
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


async def answers(url: str) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).close())
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


async def test_a_process_that_has_to_lead_is_ready_when_it_says_so(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    log.write_text("leads\n")  # of the process before
    url = f"http://127.0.0.1:{port}"
    program = Program([sys.executable, "-c", STANDBY, str(port)], {}, log, f"{url}/readyz", "leads")
    try:
        waiting = asyncio.create_task(program.ready())
        await answers(f"{url}/readyz")
        await asyncio.sleep(0.2)  # several looks
        assert not waiting.done()
        await answers(f"{url}/lead")
        assert await waiting > 0
    finally:
        program.stop()
