"""Features that meet: prefetch, rollback, one upgrade at a time, engine keys, refusals.

Proves: models whose weights are fetched wait for their turn as others do; an edit that waited for weights is
no upgrade; a model whose key is another by now does not wait; what a rollback brought back does not become
the default image; a Deployment serves on while a group's weights are fetched; a refusal that lasts is told
once; a GPU-less Job that is short of CPU does not say that it is short of GPUs.
"""

from __future__ import annotations

from typing import Any

from kube_api import VLLM_MODELS, KubeApi, resource
from operator_rig import DEPLOYMENTS, Rig, make_rig
from vllm_models import model_body

from vllm_operator import names
from vllm_operator.names import ModelKey
from vllm_operator.observe.pods import pod_finding
from vllm_operator.settings import Settings, parse_settings

JOBS = resource("jobs")
CACHE = {"size": "10Gi", "prefetch": True}
KEYS = [ModelKey("ns", name) for name in "ab"]


def profile(cpu: str) -> Settings:
    return parse_settings({"profiles": {"p": {"resources": {"requests": {"cpu": cpu}}}}}, "test")


def end_jobs(api: KubeApi) -> None:
    for job in api.objects(JOBS):
        done = {"conditions": [{"type": "Complete", "status": "True"}]}
        api.patch_status(JOBS, "ns", job["metadata"]["name"], done)


async def test_models_with_fetched_weights_wait_for_their_turn(api: KubeApi) -> None:
    async with make_rig(api, profile("1")) as rig:
        for key in KEYS:
            api.create(VLLM_MODELS, "ns", model_body(key.name, profile="p", cache=CACHE))
            await rig.reconcile(key)
            end_jobs(api)
            await rig.reconcile(key)
            rig.pod(key.name, model=key.name)
            await rig.reconcile(key)
    async with make_rig(api, profile("2")) as rig:
        for key in KEYS:
            await rig.reconcile(key)
        asked = [rig.engine(key)["resources"]["requests"]["cpu"] for key in KEYS]
        assert asked == ["2", "1"]
        assert rig.condition("Reconciling", KEYS[1])[1] == "UpgradePending"


async def test_an_edit_that_waited_for_weights_is_no_upgrade(rig: Rig) -> None:
    rig.model(cache=CACHE)
    await rig.reconcile()
    end_jobs(rig.api)
    await rig.reconcile()
    rig.pod()
    await rig.reconcile()
    rig.edit(source={"huggingFace": {"revision": "v2"}})
    await rig.reconcile()
    await rig.reconcile()
    end_jobs(rig.api)
    await rig.reconcile()
    assert names.ANNOTATION_UPGRADE not in rig.annotations()


async def test_what_a_rollback_brought_back_does_not_become_the_default_image(rig: Rig) -> None:
    rig.model(image="example.com/custom:v1", rollout={"strategy": "InPlace"})
    await rig.serve()
    rig.edit(image=None)
    await rig.reconcile()
    crashed: dict[str, Any] = {
        "name": "engine",
        "ready": False,
        "restartCount": 2,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": {"exitCode": 2, "reason": "Error", "message": "x"}},
    }
    rig.replace_pods(containerStatuses=[crashed])
    await rig.reconcile()
    assert rig.engine()["image"] == "example.com/custom:v1"
    rig.replace_pods(ready=True)
    await rig.reconcile()
    await rig.reconcile()
    assert rig.condition("Ready")[:2] == ("True", "RolledBack")
    assert rig.status()["image"] == Settings().images.cuda
    assert rig.status()["lastServed"]["generation"] == 1


async def test_a_deployment_serves_on_while_a_groups_weights_are_fetched(rig: Rig) -> None:
    rig.model(cache=CACHE | {"accessModes": ["ReadWriteMany"]})
    await rig.reconcile()
    end_jobs(rig.api)
    await rig.reconcile()
    rig.pod()
    await rig.reconcile()
    two = {"huggingFace": {"revision": "v2"}}
    rig.edit(nodes=2, engine={"tensorParallelSize": 2}, source=two)
    await rig.reconcile()
    assert len(rig.api.objects(DEPLOYMENTS)) == 1
    assert rig.condition("Reconciling")[1] == "Downloading"


async def test_a_refusal_that_lasts_is_told_once(rig: Rig) -> None:
    rig.model(rollout={"strategy": "InPlace"})
    await rig.serve()
    rig.edit(engine={"maxModelLen": 2048})
    rig.api.fault("PATCH", "/deployments/", 403, times=100)
    await rig.reconcile()
    for _ in range(3):
        await rig.reconcile()
        assert "PATCH status" not in rig.writes()


def test_a_job_without_gpus_is_not_short_of_them() -> None:
    message = "0/1 nodes are available: 1 Insufficient cpu."
    scheduled = {"type": "PodScheduled", "status": "False", "message": message}
    pod = {"metadata": {"name": "p"}, "status": {"phase": "Pending", "conditions": [scheduled]}}
    assert pod_finding(pod, "").reason == "Unschedulable"
