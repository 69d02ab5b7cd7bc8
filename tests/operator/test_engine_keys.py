"""The keys of the engines: one master key, one derived key a model, Secrets that are made and never read.

Proves: the master key is made once, taken up after a restart, comes back as it was when it is deleted, and a
bad one is refused in words; a model gets its Secret before its Deployment refers to it; nothing is written a
second time; a Secret that pods miss is made again; another master key rolls out; a restarted operator writes
nothing; the key itself stands in its Secret and nowhere else.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from typing import Any

import pytest
from fake_clock import eventually
from kube_api import VLLM_MODELS, Json, KubeApi, resource
from kubernetes.aio.client import ApiClient, Configuration
from vllm_models import model_body

from vllm_operator.app import Operator
from vllm_operator.clock import SystemClock
from vllm_operator.cluster import Cluster
from vllm_operator.engine_keys import EngineKeys, engine_key, master_of
from vllm_operator.errors import SettingsError
from vllm_operator.kinds import ObjectKey
from vllm_operator.settings import parse_settings

SECRETS, DEPLOYMENTS, PODS = resource("secrets"), resource("deployments"), resource("pods")
SETTINGS = parse_settings(
    {
        "managementPort": 0,
        "managementHost": "127.0.0.1",
        "lease": {"durationSeconds": 3, "renewSeconds": 2, "retrySeconds": 0.1},
        "gpu": {"watchNodes": False},
        "engineKeys": {"secret": "master"},
    },
    "test",
)


class Running:
    """An operator over the fake API server, until `stop`."""

    def __init__(self, api: KubeApi) -> None:
        configuration = Configuration()
        configuration.host = api.url
        self._client = ApiClient(configuration)
        self.operator = Operator(self._client, SETTINGS, "system", "one", SystemClock())
        self._task = asyncio.create_task(self.operator.run())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()


async def leading(api: KubeApi) -> Running:
    made = Running(api)
    await eventually(lambda: made.operator._lease.is_leader and not made.operator.ready(), "it leads")
    return made


def secret_names(api: KubeApi, namespace: str = "ns") -> list[str]:
    return [
        body["metadata"]["name"]
        for body in api.objects(SECRETS)
        if body["metadata"]["namespace"] == namespace
    ]


def key_reference(api: KubeApi) -> str:
    (engine,) = api.get(DEPLOYMENTS, "ns", "m-engine")["spec"]["template"]["spec"]["containers"]
    (variable,) = (item for item in engine["env"] if item["name"] == "VLLM_API_KEY")
    assert variable["valueFrom"]["secretKeyRef"]["key"] == "api-key"
    return str(variable["valueFrom"]["secretKeyRef"]["name"])


def derived(api: KubeApi) -> str:
    """What a model's Secret should hold."""
    master = base64.b64decode(api.get(SECRETS, "system", "master")["data"]["key"])
    return engine_key(master, "ns", "m", api.get(VLLM_MODELS, "ns", "m")["metadata"]["uid"])


async def deployed(api: KubeApi) -> None:
    await eventually(lambda: api.objects(DEPLOYMENTS), "the Deployment is there")
    await eventually(lambda: api.get(VLLM_MODELS, "ns", "m").get("status"), "the status is written")


def writes(api: KubeApi) -> list[str]:
    return [f"{item.method} {item.path}" for item in api.writes() if "/leases" not in item.path]


async def test_each_model_has_its_own_key(api: KubeApi) -> None:
    running = await leading(api)
    api.create(VLLM_MODELS, "ns", model_body())
    await deployed(api)
    (name,) = secret_names(api)
    assert name == key_reference(api)
    secret = api.get(SECRETS, "ns", name)
    assert base64.b64decode(secret["data"]["api-key"]).decode() == derived(api)
    assert secret["immutable"] is True
    (owner,) = secret["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("VLLMModel", "m")
    made = [path.rsplit("/", 1)[-1] for path in writes(api) if path.startswith("POST")]
    assert made.index("secrets", 1) < made.index("deployments")  # the first Secret is the master key
    await running.stop()


async def test_a_restart_writes_nothing_and_keeps_the_keys(api: KubeApi) -> None:
    running = await leading(api)
    api.create(VLLM_MODELS, "ns", model_body())
    await deployed(api)
    before = key_reference(api)
    await running.stop()
    api.requests.clear()
    running = await leading(api)
    await asyncio.sleep(0.3)
    await running.stop()
    assert writes(api) == []
    assert key_reference(api) == before


async def test_a_secret_that_pods_miss_is_made_again(api: KubeApi) -> None:
    running = await leading(api)
    api.create(VLLM_MODELS, "ns", model_body())
    await deployed(api)
    (name,) = secret_names(api)
    api.delete(SECRETS, "ns", name)
    template = api.get(DEPLOYMENTS, "ns", "m-engine")["spec"]["template"]
    waiting = {"reason": "CreateContainerConfigError", "message": f'secret "{name}" not found'}
    status = {"containerStatuses": [{"name": "engine", "state": {"waiting": waiting}}]}
    body = {"metadata": {"name": "p", **template["metadata"]}, "spec": template["spec"], "status": status}
    api.create(PODS, "ns", body)
    await eventually(lambda: secret_names(api) == [name], "the Secret is back")
    await running.stop()


async def test_a_deleted_master_key_comes_back_and_another_one_rolls_out(
    api: KubeApi,
) -> None:
    configuration = Configuration()
    configuration.host = api.url
    async with ApiClient(configuration) as client:
        keys = EngineKeys(Cluster(client), ObjectKey("system", "master"))
        assert await keys.ensure() is True
        before = api.get(SECRETS, "system", "master")["data"]
        assert await keys.ensure() is False
        api.delete(SECRETS, "system", "master")
        assert await keys.ensure() is False
        assert api.get(SECRETS, "system", "master")["data"] == before
        fresh = {"data": {"key": base64.b64encode(b"y" * 64).decode()}}
        api.patch(SECRETS, "system", "master", fresh)
        assert await keys.ensure() is True


async def test_without_the_setting_there_are_no_keys(api: KubeApi) -> None:
    configuration = Configuration()
    configuration.host = api.url
    async with ApiClient(configuration) as client:
        keys = EngineKeys(Cluster(client), None)
        assert await keys.ensure() is False
    assert api.objects(SECRETS) == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({}, "has no field key"),
        ({"other": "eA=="}, "has no field key"),
        ({"key": "not base64"}, "has no field key"),
        ({"key": base64.b64encode(b"short").decode()}, "shorter than 32 bytes"),
        ({"key": base64.b64encode(b" " * 64).decode()}, "shorter than 32 bytes"),
    ],
)
def test_a_master_key_that_cannot_be_used_is_refused(data: dict[str, str], why: str) -> None:
    with pytest.raises(SettingsError, match=f"Secret master.*{why}"):
        master_of({"metadata": {"name": "master"}, "data": data})


def test_the_key_depends_on_namespace_name_uid_and_master() -> None:
    base = (b"m" * 32, "ns", "m", "uid-1")
    others = [
        (b"n" * 32, "ns", "m", "uid-1"),
        (b"m" * 32, "n", "s/m", "uid-1"),
        (b"m" * 32, "ns", "m", "uid-2"),
    ]
    keys = {engine_key(*given) for given in (base, *others)}
    assert len(keys) == 4
    assert all(len(key) == 64 for key in keys)


async def test_the_key_stands_in_its_secret_alone(api: KubeApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    running = await leading(api)
    api.create(VLLM_MODELS, "ns", model_body())
    await deployed(api)
    key = derived(api)
    master = base64.b64decode(api.get(SECRETS, "system", "master")["data"]["key"]).decode()
    metrics = running.operator.metrics.text(leader=True).decode()
    await running.stop()
    elsewhere: list[Json] = [
        body
        for kind in ("deployments", "services", "events", "networkpolicies")
        for body in api.objects(resource(kind))
    ]
    said: Any = (
        json.dumps([*elsewhere, *api.objects(VLLM_MODELS)]) + caplog.text + repr(caplog.records) + metrics
    )
    encoded = base64.b64encode(key.encode()).decode()
    assert not [text for text in (key, master, encoded) if text in said]
