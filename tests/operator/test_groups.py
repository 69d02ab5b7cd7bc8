"""`spec.nodes`: one replica over several nodes.

Proves: the GPUs are shared out evenly; leaders serve and workers do not, and both are of one engine; a worker
outlives its leader's streams; only leaders are selected by the Service, and all may speak among themselves
behind a NetworkPolicy; Auto is in place; the workers' trouble is the model's; without the API the model says
how to get it, what ran before serves on, and it comes up once the API is there; another number of nodes
replaces the workload; a second run writes nothing; a watch of an API that is not there holds nothing up.
Left out: that vLLM's processes find each other, which needs GPUs.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from typing import Any

import pytest
from fake_clock import eventually
from kube_api import Json, KubeApi, resource
from kubernetes.aio.client import ApiClient, Configuration
from operator_rig import Rig
from own_port import OwnPort
from vllm_models import model_body

from vllm_operator import kinds, names
from vllm_operator.api.parsing import parse
from vllm_operator.backoff import Backoff
from vllm_operator.clock import SystemClock
from vllm_operator.cluster import Cluster
from vllm_operator.observe import Snapshot, observe
from vllm_operator.reflector import Reflector
from vllm_operator.render import render
from vllm_operator.settings import Settings, parse_settings

GROUPS, DEPLOYMENTS, PODS = resource("leaderworkersets"), resource("deployments"), resource("pods")
SPREAD: Json = {"nodes": 2, "engine": {"tensorParallelSize": 8, "pipelineParallelSize": 2}}


def manifests(settings: Settings | None = None, **spec: Any) -> dict[str, Json]:
    made = render(parse(model_body(**SPREAD | spec)), settings or Settings())
    return {manifest["kind"]: manifest for manifest in made}


@pytest.fixture
def group() -> Json:
    template: Json = manifests()["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return template


def engine(template: Json) -> Json:
    (found,) = template["spec"]["containers"]
    return dict(found)


def test_each_node_has_an_equal_share_of_the_gpus(group: Json) -> None:
    for template in ("leaderTemplate", "workerTemplate"):
        assert engine(group[template])["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert group["size"] == 2


def test_leader_and_workers_are_one_engine(group: Json) -> None:
    leader, worker = engine(group["leaderTemplate"]), engine(group["workerTemplate"])
    rank = leader["args"].index("--node-rank")
    assert leader["args"][rank : rank + 4] == ["--node-rank", "0", "--master-addr", "$(LWS_LEADER_ADDRESS)"]
    assert worker["args"][rank : rank + 3] == ["--node-rank", "$(LWS_WORKER_INDEX)", "--headless"]
    assert [*worker["args"][: rank + 1], *worker["args"][rank + 3 :]] == [
        *leader["args"][: rank + 1],
        *leader["args"][rank + 2 :],
    ]
    assert worker.keys() == leader.keys() - {"ports", "startupProbe", "readinessProbe", "livenessProbe"}
    marks = {str(group[name]["metadata"]["annotations"]) for name in ("leaderTemplate", "workerTemplate")}
    assert len(marks) == 1


def test_the_service_selects_leaders_alone(group: Json) -> None:
    selector = manifests()["Service"]["spec"]["selector"].items()
    assert selector <= group["leaderTemplate"]["metadata"]["labels"].items()
    assert not selector <= group["workerTemplate"]["metadata"]["labels"].items()


def test_behind_a_network_policy_the_pods_of_a_model_speak_freely_among_themselves() -> None:
    peers = parse_settings({"networkPolicy": {"allowFrom": [{"podLabels": {"app": "gateway"}}]}}, "test")
    policy = manifests(peers)["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"vllm-fleet.dev/model": "m"}}
    assert policy["ingress"][0]["ports"] == [{"port": 8000, "protocol": "TCP"}]
    assert policy["ingress"][1] == {"from": [{"podSelector": policy["podSelector"]}]}


def test_auto_is_in_place_and_an_explicit_strategy_is_kept() -> None:
    rollout = manifests()["LeaderWorkerSet"]["spec"]["rolloutStrategy"]
    assert rollout["rollingUpdateConfiguration"] == {"maxSurge": 0, "maxUnavailable": 1}
    surge = manifests(rollout={"strategy": "Surge"})["LeaderWorkerSet"]["spec"]["rolloutStrategy"]
    assert surge["rollingUpdateConfiguration"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_a_worker_that_is_told_to_end_waits_for_its_leaders_port_to_close(group: Json) -> None:
    port = OwnPort()
    *python, code = engine(group["workerTemplate"])["lifecycle"]["preStop"]["exec"]["command"]
    assert python == ["python3", "-c"]
    here = code.replace("8000", str(port.number))
    env = {"LWS_LEADER_ADDRESS": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", port.number)) as listener:
        waiting = subprocess.Popen([sys.executable, "-c", here], env=env)
        for _ in range(2):
            listener.accept()[0].close()
            assert waiting.poll() is None
    assert waiting.wait(20) == 0


def test_the_workers_trouble_is_the_models() -> None:
    model = parse(model_body(**SPREAD))
    waits = {"type": "PodScheduled", "status": "False", "message": "0/4 nodes: Insufficient nvidia.com/gpu"}
    worker = {
        "metadata": {"annotations": {names.ANNOTATION_TEMPLATE_HASH: "h"}},
        "status": {"conditions": [waits]},
    }
    status = observe(model, Snapshot(workers=(worker,), template_hash="h"), SystemClock().now())
    ready = status.condition("Ready")
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", "InsufficientGPU")
    assert status.gpus == 16


async def test_a_group_is_made_and_then_nothing_is_written(rig: Rig) -> None:
    rig.model(**SPREAD)
    await rig.reconcile()
    assert rig.writes() == ["POST services", "POST leaderworkersets", "PATCH status"]
    await rig.reconcile()
    assert rig.api.requests == []
    leader_pod(rig)
    await rig.reconcile()
    assert rig.condition("Ready")[:2] == ("True", "Serving")


def leader_pod(rig: Rig) -> None:
    (group,) = rig.api.objects(GROUPS)
    template = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    conditions = [{"type": "Ready", "status": "True"}]
    body = {"metadata": {"name": "m-nodes-0", **template["metadata"]}, "spec": template["spec"]}
    rig.api.create(PODS, "ns", body | {"status": {"conditions": conditions}})


async def test_another_number_of_nodes_replaces_the_workload(rig: Rig) -> None:
    rig.model(engine=SPREAD["engine"])
    await rig.reconcile()
    rig.edit(nodes=2)
    await rig.reconcile()
    assert rig.api.objects(DEPLOYMENTS) == []
    assert len(rig.api.objects(GROUPS)) == 1
    rig.edit(nodes=None)
    await rig.reconcile()
    assert rig.api.objects(GROUPS) == []
    assert len(rig.api.objects(DEPLOYMENTS)) == 1


async def test_without_the_api_the_model_says_how_to_get_it_and_then_comes_up(rig: Rig) -> None:
    rig.model(engine=SPREAD["engine"])
    await rig.reconcile()
    rig.pod()
    absent = rig.api.fault("POST", "/leaderworkersets", 404, times=99)
    rig.edit(nodes=2)
    assert await rig.reconcile() == 60
    assert rig.condition("Accepted")[:2] == ("False", "MissingAPI")
    assert rig.condition("Ready")[:2] == ("True", "MissingAPI")
    assert "install it" in rig.condition("Stalled")[2]
    assert rig.deployment()
    absent.times = 0
    await rig.reconcile()
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")
    assert rig.api.objects(DEPLOYMENTS) == []


async def test_a_watch_of_an_api_that_is_not_there_holds_nothing_up(api: KubeApi) -> None:
    absent = api.fault("GET", "/leaderworkersets", 404, times=99)
    async with ApiClient(configuration_of(api)) as client:
        backoff = Backoff(0.01, 0.05)
        follower = Reflector(Cluster(client), kinds.GROUPS, SystemClock(), lambda *_: None, backoff=backoff)
        task = asyncio.create_task(follower.run())
        async with asyncio.timeout(30):
            await follower.synced.wait()
        assert follower.table == {}
        absent.times = 0
        api.create(GROUPS, "ns", {"metadata": {"name": "m-nodes"}})
        await eventually(lambda: follower.table, "the API is taken up")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def configuration_of(api: KubeApi) -> Configuration:
    made = Configuration()
    made.host = api.url
    return made
