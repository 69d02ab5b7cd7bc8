"""What others make that concerns a model: autoscalers, Secrets, the kubelet's warnings.

Proves: a HorizontalPodAutoscaler at the child is told in Accepted, and no more once it is gone or targets the
model; with secretAccess a changed Secret rolls out, and neither turning it on or off, nor a Secret that goes,
restarts anything; one that comes where it was missing does; only Secrets that variables come from count;
their content is never asked for; without secretAccess they are not looked at; a volume that cannot be mounted
is told by the kubelet's own words until it is mounted; without the rights everything else works.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from kube_api import Json, KubeApi, resource
from operator_rig import DEPLOYMENTS, EVENTS, KEY, PODS, Rig, make_rig

from vllm_operator import names
from vllm_operator.names import ModelKey
from vllm_operator.render.secrets import referenced
from vllm_operator.settings import Settings, parse_settings

HPAS, SECRETS = resource("horizontalpodautoscalers"), resource("secrets")
SEEING = parse_settings({"secretAccess": True}, "test")
TOKEN = {"source": {"huggingFace": {"tokenSecret": {"name": "hf"}}}}


# Autoscalers


def autoscaler(kind: str, name: str) -> Json:
    api = "apps/v1" if kind == "Deployment" else names.API_VERSION
    target = {"apiVersion": api, "kind": kind, "name": name}
    return {"metadata": {"name": "hpa"}, "spec": {"scaleTargetRef": target, "maxReplicas": 3}}


async def test_an_autoscaler_of_the_child_is_told(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.enqueued.clear()
    rig.api.create(HPAS, "ns", autoscaler("Deployment", "m-engine"))
    await rig.caught_up()
    assert rig.enqueued == [KEY]
    await rig.reconcile()
    status, reason, message = rig.condition("Accepted")
    assert (status, reason) == ("True", "ForeignAutoscaler")
    assert "HorizontalPodAutoscaler hpa targets Deployment m-engine" in message
    assert "scaleTargetRef name VLLMModel m of vllm-fleet.dev/v1alpha1" in message
    assert [event["reason"] for event in rig.api.objects(EVENTS)] == ["ForeignAutoscaler"]
    retarget = {"spec": {"scaleTargetRef": {"kind": "VLLMModel", "name": "m"}}}
    rig.api.patch(HPAS, "ns", "hpa", retarget)
    await rig.reconcile()
    assert rig.condition("Accepted")[:2] == ("True", "Accepted")
    rig.api.delete(HPAS, "ns", "hpa")
    rig.api.create(HPAS, "ns", autoscaler("Deployment", "m-engine"))
    await rig.reconcile()
    assert rig.condition("Accepted")[1] == "ForeignAutoscaler"
    rig.api.delete(HPAS, "ns", "hpa")
    await rig.reconcile()
    assert rig.condition("Accepted")[1] == "Accepted"


@pytest.mark.parametrize(("kind", "name"), [("StatefulSet", "m-engine"), ("Deployment", "other")])
async def test_other_autoscalers_are_nobodys_business(rig: Rig, kind: str, name: str) -> None:
    rig.model()
    await rig.reconcile()
    rig.enqueued.clear()
    rig.api.create(HPAS, "ns", autoscaler(kind, name))
    await rig.caught_up()
    assert rig.enqueued == []


# Secrets


def secret(api: KubeApi, name: str = "hf", content: str = "one") -> None:
    api.create(SECRETS, "ns", {"metadata": {"name": name}, "data": {"token": content}})


def versions(rig: Rig) -> dict[str, str]:
    template = rig.deployment()["spec"]["template"]["metadata"]["annotations"]
    found: dict[str, str] = json.loads(template.get(names.ANNOTATION_SECRET_VERSIONS, "{}"))
    return found


def rotate(rig: Rig, name: str = "hf", content: str = "two") -> str:
    changed = rig.api.patch(SECRETS, "ns", name, {"data": {"token": content}})
    return str(changed["metadata"]["resourceVersion"])


async def test_a_changed_secret_rolls_out(api: KubeApi) -> None:
    secret(api)
    async with make_rig(api, SEEING) as rig:
        rig.model(**TOKEN)
        await rig.serve()
        before = rig.deployment()
        assert versions(rig) == {}
        await rig.reconcile()
        assert rig.writes() == []
        rig.enqueued.clear()
        version = rotate(rig)
        await rig.caught_up()
        assert rig.enqueued == [KEY]
        await rig.reconcile()
        assert versions(rig) == {"hf": version}
        assert rig.annotations()[names.ANNOTATION_UPGRADE]  # one model at a time
        assert rig.deployment()["spec"]["template"] != before["spec"]["template"]
        await rig.reconcile()
        assert rig.writes() == []


async def test_no_content_of_a_secret_is_asked_for(api: KubeApi) -> None:
    secret(api, content="t0psecret")
    async with make_rig(api, SEEING) as rig:
        rig.model(**TOKEN)
        await rig.reconcile()
        rotate(rig, content="n0ther")
        await rig.reconcile()
        tables = str([reflector.table for reflector in rig.world.surroundings.reflectors])
        assert "hf" in tables
        assert "t0psecret" not in tables
        assert "n0ther" not in tables


async def test_turning_it_on_or_off_restarts_nothing(api: KubeApi) -> None:
    secret(api)
    async with make_rig(api, Settings()) as rig:
        rig.model(**TOKEN)
        await rig.serve()
        template = rig.deployment()["spec"]["template"]
    async with make_rig(api, SEEING) as rig:
        await rig.reconcile()
        assert rig.deployment()["spec"]["template"] == template
        rotate(rig)
        await rig.reconcile()
        template = rig.deployment()["spec"]["template"]
    async with make_rig(api, Settings()) as rig:
        await rig.reconcile()
        assert rig.writes() == []
        assert rig.deployment()["spec"]["template"] == template


async def test_a_secret_that_goes_and_comes_as_it_was_or_new(api: KubeApi) -> None:
    secret(api)
    async with make_rig(api, SEEING) as rig:
        rig.model(**TOKEN)
        await rig.serve()
        api.delete(SECRETS, "ns", "hf")
        await rig.reconcile()
        assert rig.writes() == []
        secret(api, content="new")
        await rig.reconcile()
        assert list(versions(rig)) == ["hf"]


async def test_a_secret_that_comes_where_it_was_missing_starts_the_pods_anew(api: KubeApi) -> None:
    async with make_rig(api, SEEING) as rig:
        rig.model(**TOKEN)
        await rig.reconcile()
        assert versions(rig) == {}
        rig.enqueued.clear()
        secret(api)
        await rig.caught_up()
        assert rig.enqueued == [KEY]
        await rig.reconcile()
        assert list(versions(rig)) == ["hf"]


async def test_only_secrets_that_variables_come_from_count(api: KubeApi) -> None:
    reference = {"secretRef": {"name": "from-template"}}
    template = {"spec": {"containers": [{"name": "engine", "envFrom": [reference]}]}}
    settings = parse_settings({"secretAccess": True, "policy": {"podTemplate": "full"}}, "test")
    for name in ("hf", "from-template", "pull", "stranger"):
        secret(api, name)
    async with make_rig(api, settings) as rig:
        rig.model(imagePullSecrets=[{"name": "pull"}], podTemplate=template, **TOKEN)
        await rig.reconcile()
        assert set(json.loads(rig.annotations()[names.ANNOTATION_SECRETS])) == {"hf", "from-template"}
        rig.enqueued.clear()
        rotate(rig, "stranger")
        rotate(rig, "pull")
        await rig.caught_up()
        assert rig.enqueued == []


def test_the_engines_own_key_is_no_secret_of_others() -> None:
    key = {"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "m-engine-1", "key": "api-key"}}}
    other = {"name": "A", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    assert referenced({"containers": [{"name": "engine", "env": [key, other]}]}) == ("hf",)
    assert referenced({"containers": "nonsense", "initContainers": [{"env": [3], "envFrom": {}}]}) == ()


async def test_without_consent_secrets_are_not_looked_at(api: KubeApi) -> None:
    secret(api)
    async with make_rig(api, Settings()) as rig:
        rig.model(**TOKEN)
        await rig.serve()
        assert names.ANNOTATION_SECRETS not in rig.annotations()
    assert not [request for request in api.requests if "/secrets" in request.path]


# The kubelet's warnings


def warn(api: KubeApi, message: str, at: str, pod: str = "p", **more: Any) -> None:
    about = {
        "kind": "Pod",
        "namespace": "ns",
        "name": pod,
        "uid": api.get(PODS, "ns", pod)["metadata"]["uid"],
    }
    meta = {"name": f"{pod}.{at.replace(':', '')}"}
    event = {"metadata": meta, "type": "Warning", "reason": "FailedMount", "involvedObject": about}
    api.create(EVENTS, "ns", event | {"message": message, "lastTimestamp": f"2026-01-01T{at}Z"} | more)


CREATING = {"name": "engine", "ready": False, "restartCount": 0}
CREATING |= {"state": {"waiting": {"reason": "ContainerCreating"}}}
MOUNT = 'MountVolume.SetUp failed for volume "chat-template" : '


@pytest.mark.parametrize(
    ("words", "kind", "reason"),
    [
        ('configmap "chat" not found', "Stalled", "MissingConfigMap"),
        ("references non-existent config key: template.jinja", "Stalled", "MissingConfigMap"),
        ('secret "tls" not found', "Stalled", "MissingSecret"),
        ("references non-existent secret key: crt", "Stalled", "MissingSecret"),
        ("mount failed: exit status 32", "Reconciling", "Pulling"),
    ],
)
async def test_a_volume_that_cannot_be_mounted(rig: Rig, words: str, kind: str, reason: str) -> None:
    rig.model()
    await rig.reconcile()
    rig.pod(ready=False, containerStatuses=[CREATING])
    await rig.reconcile()
    rig.enqueued.clear()
    warn(rig.api, "an older word", "10:00:00")
    warn(rig.api, MOUNT + words, "10:05:00")
    await rig.caught_up()
    assert KEY in rig.enqueued
    await rig.reconcile()
    assert rig.condition(kind)[:2] == ("True", reason)
    assert words in rig.condition("Ready")[2]
    mounted = {"type": "PodReadyToStartContainers", "status": "True"}
    rig.api.patch_status(PODS, "ns", "p", {"conditions": [mounted]})
    await rig.reconcile()
    assert rig.condition("Ready")[1] == "Pulling"
    assert words not in rig.condition("Ready")[2]


async def test_warnings_that_say_nothing_new_are_not_asked_for(rig: Rig) -> None:
    rig.model()
    await rig.reconcile()
    rig.pod(ready=False, containerStatuses=[CREATING])
    warn(rig.api, "Startup probe failed", "10:00:00", reason="Unhealthy")
    warn(rig.api, "all is well", "10:00:01", type="Normal")
    await rig.reconcile()
    assert not any(
        reflector.table
        for reflector in rig.world.surroundings.reflectors
        if reflector.kind.plural == "events"
    )


async def test_a_warning_about_a_strangers_pod_concerns_no_model(rig: Rig) -> None:
    rig.api.create(PODS, "ns", {"metadata": {"name": "stranger"}})
    rig.enqueued.clear()
    warn(rig.api, MOUNT, "10:00:00", pod="stranger")
    await rig.caught_up()
    assert rig.enqueued == []


async def test_without_the_rights_everything_else_works(api: KubeApi) -> None:
    for path in ("/events", "/horizontalpodautoscalers", "/secrets"):
        api.fault("GET", path, 403, times=99)
    async with make_rig(api, SEEING, wait_for_surroundings=False) as rig:
        rig.model(**TOKEN)
        await rig.serve()
        assert rig.condition("Ready")[:2] == ("True", "Serving")
        assert rig.world.surroundings.secrets("ns") is None
        assert names.ANNOTATION_SECRETS not in rig.annotations()


async def test_secrets_are_those_of_the_models_namespace(api: KubeApi) -> None:
    settings = parse_settings({"secretAccess": True, "watchNamespaces": ["ns", "b"]}, "test")
    secret(api)
    async with make_rig(api, settings) as rig:
        assert list(rig.world.surroundings.secrets("ns") or ()) == ["hf"]
        assert rig.world.surroundings.secrets("b") == {}
        assert rig.world.surroundings.secrets("elsewhere") is None
        assert rig.world.surroundings.autoscaler(ModelKey("ns", "none")) == ""
    assert api.get(SECRETS, "ns", "hf")["data"]
    assert not api.objects(DEPLOYMENTS)
