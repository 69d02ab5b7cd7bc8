"""One reconcile at a time against the fake API server: what it reads, writes and says.

Proves: a model becomes Service and Deployment with its status, and the second run writes nothing; an edit
applies the Deployment alone; drift is repaired and what others added stays; a foreign object is never taken
over, nor does it leave a scaled-down model Ready; what is left of a former model of the name is told and
waited for; each run is counted by result and reason; nothing is made for a model that is gone; an invalid
spec touches nothing that runs; refusals (quota, right, content) become reasons and are tried again; an
unwanted child is pruned; pause; names between namespaces; pinned image; GPU hint; an operator killed between
two writes converges; Events are few.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_clock import eventually
from kube_api import VLLM_MODELS, KubeApi, resource
from operator_rig import DEPLOYMENTS, EVENTS, KEY, NODES, PODS, SERVICES, Rig, make_rig
from vllm_models import model_body

from vllm_operator.errors import Unavailable
from vllm_operator.names import ModelKey
from vllm_operator.reconcile import REFUSED_RETRY_SECONDS
from vllm_operator.settings import Settings, parse_settings

BUDGETS = resource("poddisruptionbudgets")


async def test_a_model_becomes_objects_and_a_status_and_then_nothing_is_written(rig: Rig) -> None:
    rig.model(replicas=1)
    await rig.reconcile()
    assert rig.writes() == ["POST services", "POST deployments", "PATCH status"]
    assert rig.deployment()["metadata"]["ownerReferences"][0]["name"] == "m"
    assert rig.condition("Ready")[:2] == ("False", "Starting")
    assert rig.condition("Ready")[2].startswith("the pods are being made")
    assert rig.status()["observedGeneration"] == 1
    await rig.reconcile()
    assert rig.api.requests == []
    rig.pod()
    await rig.reconcile()
    assert rig.writes() == ["PATCH status"]
    assert rig.condition("Ready") == ("True", "Serving", "1 of 1 replicas serve")
    assert [0 <= seconds < 60 for seconds in rig.waited] == [True]
    assert rig.condition("Reconciling")[0] == ""
    await rig.reconcile()
    assert rig.api.requests == []


async def test_an_edit_applies_what_differs_alone(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.edit(engine={"maxModelLen": 2048})
    await rig.reconcile()
    assert rig.writes() == ["PATCH deployments", "PATCH status"]
    assert "2048" in rig.deployment()["spec"]["template"]["spec"]["containers"][0]["args"]
    rig.edit(engine=None)
    await rig.reconcile()
    assert "--max-model-len" not in rig.deployment()["spec"]["template"]["spec"]["containers"][0]["args"]


async def test_an_edit_of_what_only_the_gateway_reads_restarts_nothing(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.edit(gateway={"weight": 5})
    await rig.reconcile()
    assert rig.writes() == ["PATCH status"]


async def test_drift_is_repaired_and_what_others_added_stays(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    sidecar = {"name": "sidecar", "image": "i"}
    containers = [*rig.deployment()["spec"]["template"]["spec"]["containers"], sidecar]
    containers[0]["image"] = "by-hand"
    patch = {"replicas": 7, "template": {"spec": {"containers": containers}}}
    rig.api.patch(DEPLOYMENTS, "ns", "m-engine", {"spec": patch, "metadata": {"labels": {"team": "a"}}})
    await rig.reconcile()
    spec = rig.deployment()["spec"]
    assert spec["replicas"] == 1
    assert [item["image"] for item in spec["template"]["spec"]["containers"]] == [
        "vllm/vllm-openai:v0.32.0",
        "i",
    ]
    assert rig.deployment()["metadata"]["labels"]["team"] == "a"


@pytest.mark.parametrize("kind", [DEPLOYMENTS, SERVICES])
async def test_a_deleted_child_comes_back(rig: Rig, kind: Any) -> None:
    rig.model()
    await rig.reconcile()
    rig.api.delete(kind, "ns", "m-engine")
    await rig.reconcile()
    assert rig.api.get(kind, "ns", "m-engine")


@pytest.mark.parametrize("labels", [{}, {"vllm-fleet.dev/model": "m"}])
async def test_a_foreign_object_is_never_taken_over(rig: Rig, labels: dict[str, str]) -> None:
    foreign = rig.api.create(
        SERVICES, "ns", {"metadata": {"name": "m-engine", "labels": labels}, "spec": {"a": 1}}
    )
    rig.model()
    assert await rig.reconcile() == REFUSED_RETRY_SECONDS
    assert rig.api.get(SERVICES, "ns", "m-engine") == foreign
    for kind, status in (("Accepted", "False"), ("Ready", "False"), ("Stalled", "True")):
        assert rig.condition(kind)[:2] == (status, "ChildConflict")
    assert "a Service named m-engine exists" in rig.condition("Ready")[2]
    rig.api.delete(SERVICES, "ns", "m-engine")
    await rig.reconcile()
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")


async def test_a_child_of_the_former_model_is_waited_for(rig: Rig) -> None:
    owner = {"apiVersion": "vllm-fleet.dev/v1alpha1", "kind": "VLLMModel", "name": "m", "controller": True}
    keeper = rig.api.create(resource("configmaps"), "ns", {"metadata": {"name": "keeps-the-owner-alive"}})
    owner["uid"] = keeper["metadata"]["uid"]
    rig.api.create(SERVICES, "ns", {"metadata": {"name": "m-engine", "ownerReferences": [owner]}})
    rig.model()
    await rig.reconcile()
    assert (rig.results, rig.reasons) == (["refused"], ["FormerObject"])
    assert rig.condition("Reconciling")[:2] == ("True", "FormerObject")
    assert "Service m-engine of the deleted model" in rig.condition("Ready")[2]
    assert rig.api.objects(EVENTS) == []  # it passes within a second, as a rule
    rig.api.delete(SERVICES, "ns", "m-engine")
    await rig.reconcile()
    assert rig.condition("Ready")[:2] == ("False", "Starting")


async def test_a_claim_that_pods_of_the_former_model_still_mount_is_told(rig: Rig) -> None:
    """It may last for as long as their streams, and ask for what the new model does not."""
    owner = {"apiVersion": "vllm-fleet.dev/v1alpha1", "kind": "VLLMModel", "name": "m", "controller": True}
    keeper = rig.api.create(resource("configmaps"), "ns", {"metadata": {"name": "keeps-the-owner-alive"}})
    owner["uid"] = keeper["metadata"]["uid"]
    meta = {
        "name": "m-cache",
        "labels": {"vllm-fleet.dev/model": "m"},
        "ownerReferences": [owner],
        "deletionTimestamp": "2026-01-01T00:00:00Z",
        "finalizers": ["kubernetes.io/pvc-protection"],
    }
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "9Ti"}}}
    rig.api.create(resource("persistentvolumeclaims"), "ns", {"metadata": meta, "spec": spec})
    rig.model(cache={"size": "1Gi"})
    await rig.reconcile()
    status, reason, message = rig.condition("Reconciling")
    assert (status, reason) == ("True", "FormerObject")
    assert message.startswith(
        "PersistentVolumeClaim m-cache of the deleted model that had this name is still"
    )
    assert "held by kubernetes.io/pvc-protection; when it is gone" in message
    assert rig.condition("Accepted")[:2] == ("False", "FormerObject")
    rig.enqueued.clear()
    rig.api.delete(resource("persistentvolumeclaims"), "ns", "m-cache")
    await rig.caught_up()
    assert KEY in rig.enqueued
    await rig.reconcile()
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")


async def test_a_scaled_down_model_that_is_refused_is_not_ready(rig: Rig) -> None:
    rig.api.create(SERVICES, "ns", {"metadata": {"name": "m-engine"}, "spec": {}})
    rig.model(replicas=0)
    await rig.reconcile()
    assert rig.condition("Ready")[:2] == ("False", "ChildConflict")
    assert rig.condition("Stalled")[:2] == ("True", "ChildConflict")
    assert "serves on" not in rig.condition("Ready")[2]


async def test_runs_are_counted_by_result_and_reason(rig: Rig) -> None:
    rig.model()
    await rig.serve()
    rig.edit(engine={"extraArgs": ["--port", "1"]})
    await rig.reconcile()
    rig.edit(engine=None, replicas=2)
    rig.api.fault("PATCH", "/deployments/", 503)
    with pytest.raises(Unavailable):
        await rig.reconcile()
    rig.api.delete(VLLM_MODELS, "ns", "m")
    await rig.reconcile()
    counted = list(zip(rig.results, rig.reasons, strict=True))
    assert counted == [
        ("ok", "Starting"),
        ("ok", "Serving"),
        ("refused", "InvalidSpec"),
        ("error", "Unavailable"),
        ("gone", ""),
    ]


async def test_nothing_is_made_for_a_model_that_is_gone(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    bodies = rig.api.objects(VLLM_MODELS)
    rig.api.delete(VLLM_MODELS, "ns", "m")
    await eventually(rig._caught_up)
    rig.world.fleet.replace(bodies, rig.api.store.version)
    rig.api.requests.clear()
    await rig._reconciler(KEY)
    assert rig.results[-1] == "gone"
    assert rig.writes() == []
    assert await rig.reconcile(ModelKey("ns", "never-heard-of")) is None


async def test_an_invalid_edit_touches_nothing_that_runs(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.pod()
    await rig.reconcile()
    before = rig.deployment()
    rig.edit(engine={"extraArgs": ["--tensor-parallel-siz", "2"]})
    await rig.reconcile()
    assert rig.results[-1] == "refused"
    assert rig.deployment() == before
    assert rig.condition("Accepted")[:2] == ("False", "InvalidSpec")
    assert rig.condition("Accepted")[2].startswith(
        "spec.engine.extraArgs[0]: --tensor-parallel-siz abbreviates"
    )
    assert rig.condition("Ready")[:2] == ("True", "InvalidSpec")
    assert rig.status()["observedGeneration"] == 2


async def test_several_replicas_have_a_disruption_budget_and_one_has_none(rig: Rig) -> None:
    rig.model(replicas=2)
    await rig.reconcile()
    (budget,) = rig.api.objects(BUDGETS)
    assert budget["spec"]["maxUnavailable"] == 1
    rig.edit(replicas=1)
    await rig.reconcile()
    assert not rig.api.objects(BUDGETS)


async def test_an_edit_outside_the_policy_touches_nothing_that_runs(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    before = rig.deployment()
    rig.edit(podTemplate={"spec": {"hostNetwork": True}})
    await rig.reconcile()
    assert rig.deployment() == before
    assert rig.condition("Accepted")[:2] == ("False", "InvalidSpec")
    assert rig.condition("Accepted")[2].startswith(
        "spec.podTemplate.spec.hostNetwork: is refused by settings"
    )


QUOTA = 'deployments.apps "m-engine" is forbidden: exceeded quota: few, requested: count/deployments.apps=1'
RIGHT = 'deployments.apps is forbidden: User "x" cannot create resource "deployments" in API group "apps"'


@pytest.mark.parametrize(
    ("code", "message", "reason", "kind"),
    [
        (403, QUOTA, "QuotaExceeded", "Stalled"),
        (403, RIGHT, "APIError", "Reconciling"),
        (422, 'Deployment "m-engine" is invalid: spec.template: bad', "InvalidSpec", "Stalled"),
    ],
)
async def test_refusals_become_reasons_and_are_tried_again(
    rig: Rig, code: int, message: str, reason: str, kind: str
) -> None:
    rig.model()
    rig.api.fault("POST", "/deployments", code, message=message)
    assert await rig.reconcile() == REFUSED_RETRY_SECONDS
    assert rig.condition("Accepted")[:2] == ("False", reason)
    assert rig.condition(kind)[:2] == ("True", reason)
    assert message in rig.condition("Ready")[2]
    await rig.reconcile()
    assert rig.deployment()
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_a_server_in_trouble_is_for_the_queue(rig: Rig, code: int) -> None:
    rig.model()
    rig.api.fault("POST", "/deployments", code, retry_after=9)
    with pytest.raises(Unavailable) as caught:
        await rig.reconcile()
    assert caught.value.retry_after == 9
    assert rig.writes() == ["POST services", "POST deployments"]
    await rig.reconcile()  # as another operator would, after this one was killed between the two
    assert rig.writes() == ["POST deployments", "PATCH status"]


async def test_an_unwanted_child_is_pruned_and_only_a_models_own(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    meta = rig.deployment()["metadata"]
    mine = {"name": "m-former", "labels": meta["labels"], "ownerReferences": meta["ownerReferences"]}
    rig.api.create(SERVICES, "ns", {"metadata": mine})
    rig.api.create(SERVICES, "ns", {"metadata": {"name": "not-ours", "labels": meta["labels"]}})
    await rig.reconcile()
    assert [body["metadata"]["name"] for body in rig.api.objects(SERVICES)] == ["m-engine", "not-ours"]


async def test_a_paused_model_is_left_alone(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    annotations = {"vllm-fleet.dev/paused": "true"}
    rig.api.patch(VLLM_MODELS, "ns", "m", {"metadata": {"annotations": annotations}, "spec": {"replicas": 4}})
    rig.api.delete(SERVICES, "ns", "m-engine")
    await rig.reconcile()
    assert rig.writes() == ["PATCH status"]
    assert rig.condition("Accepted")[:2] == ("True", "Paused")


async def test_a_short_name_is_held_by_the_older_namespace(rig: Rig) -> None:
    old = model_body("old", "a", servedNames=["chat"])
    old["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    rig.api.create(VLLM_MODELS, "a", old)
    await asyncio.sleep(1.1)  # creation times have whole seconds
    rig.model(servedNames=["chat", "own"])
    await rig.reconcile()
    assert rig.status()["servedNames"] == ["own"]
    assert rig.condition("Accepted")[:2] == ("False", "NameConflict")
    assert "chat is held by the older model a/old" in rig.condition("Accepted")[2]
    assert rig.deployment()
    rig.api.delete(VLLM_MODELS, "a", "old")
    await rig.reconcile()
    assert rig.status()["servedNames"] == ["chat", "own"]
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")


async def test_an_operator_with_a_newer_default_image_writes_nothing(api: KubeApi) -> None:
    async with make_rig(api, Settings()) as rig:
        rig.model()
        await rig.reconcile()
    newer = parse_settings({"images": {"cuda": "vllm/vllm-openai:v0.33.0"}}, "test")
    async with make_rig(api, newer) as rig:
        await rig.reconcile()
        assert rig.api.requests == []
        assert rig.status()["image"] == "vllm/vllm-openai:v0.32.0"


async def test_the_hint_names_the_node_with_most_gpus_free(rig: Rig) -> None:
    ready = {"type": "Ready", "status": "True"}
    status = {"allocatable": {"nvidia.com/gpu": "4"}, "conditions": [ready]}
    rig.api.create(NODES, "", {"metadata": {"name": "gpu-1"}, "status": status})
    limits = {"limits": {"nvidia.com/gpu": "3"}}
    stranger = {"nodeName": "gpu-1", "containers": [{"name": "c", "resources": limits}]}
    rig.api.create(
        PODS, "other", {"metadata": {"name": "x"}, "spec": stranger, "status": {"phase": "Running"}}
    )
    await eventually(rig.world.nodes)
    rig.model(engine={"tensorParallelSize": 2})
    await rig.reconcile()
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    rig.pod(conditions=[waits], phase="Pending")
    await rig.reconcile()
    assert rig.condition("Ready")[:2] == ("False", "InsufficientGPU")
    assert rig.condition("Ready")[2].startswith(message)
    assert "gpu-1 has most free" in rig.condition("Ready")[2]


async def test_trouble_is_looked_at_again_when_the_start_budget_is_spent(rig: Rig) -> None:
    rig.model(startTimeout="20m")
    await rig.reconcile()
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    last = {"terminated": {"exitCode": 1, "message": "ValueError: no such parser"}}
    crashed = {"name": "engine", "ready": False, "restartCount": 3, "state": state, "lastState": last}
    rig.pod(ready=False, containerStatuses=[crashed])
    again = await rig.reconcile()
    assert again is not None
    assert 1100 < again <= 1200
    assert rig.condition("Ready") == (
        "False",
        "CrashLooping",
        "the engine ended with exit code 1: ValueError: no such parser",
    )


async def test_pods_of_a_former_model_do_not_count(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.pod()
    rig.api.patch(PODS, "ns", "p", {"metadata": {"labels": {"vllm-fleet.dev/model-uid": "former"}}})
    await rig.reconcile()
    assert rig.status()["readyReplicas"] == 0


async def test_events_are_few_and_carry_the_reason(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.pod()
    await rig.reconcile()
    await rig.reconcile()
    rig.edit(engine={"extraArgs": ["--port=1"]})
    await rig.reconcile()
    told = [(event["type"], event["reason"]) for event in rig.api.objects(EVENTS)]
    assert sorted(told) == [("Normal", "Serving"), ("Warning", "InvalidSpec")]
    assert rig.api.objects(EVENTS)[0]["involvedObject"]["kind"] == "VLLMModel"


async def test_an_event_that_cannot_be_posted_stops_nothing(rig: Rig) -> None:
    rig.model(engine={"extraArgs": ["--port=1"]})
    rig.api.fault("POST", "/events", 403, times=9)
    await rig.reconcile()
    assert rig.results == ["refused"]


async def test_without_the_right_to_list_nodes_it_works(api: KubeApi) -> None:
    api.fault("GET", "/nodes", 403, times=99)
    async with make_rig(api, Settings(), wait_for_surroundings=False) as rig:
        rig.model()
        await rig.reconcile()
        assert rig.world.nodes() is None
        assert rig.deployment()["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
