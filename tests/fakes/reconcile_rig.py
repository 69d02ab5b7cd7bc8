"""A reconciler of the operator over real tables of the fake API server, called by hand in tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fake_clock import eventually
from kube_api import VLLM_MODELS, Json, KubeApi, resource
from kubernetes.aio.client import ApiClient, Configuration
from vllm_models import model_body

from vllm_operator.clock import SystemClock
from vllm_operator.cluster import Cluster
from vllm_operator.events import Recorder
from vllm_operator.names import ModelKey
from vllm_operator.reconcile import Reconciler
from vllm_operator.settings import Settings
from vllm_operator.world import World

DEPLOYMENTS, PODS = resource("deployments"), resource("pods")
KEY = ModelKey("ns", "m")


class Rig:
    """A reconciler over real tables of the fake API server, called by hand."""

    def __init__(self, api: KubeApi, client: ApiClient, settings: Settings) -> None:
        self.api = api
        self.results: list[str] = []
        cluster = Cluster(client)
        self.world = World(cluster, settings, SystemClock())
        recorder = Recorder(cluster)
        self._reconciler = Reconciler(
            cluster,
            self.world,
            settings,
            recorder,
            SystemClock(),
            lambda result, _s: self.results.append(result),
        )

    async def reconcile(self, key: ModelKey = KEY) -> float | None:
        """After the tables have heard of everything."""
        await eventually(self._caught_up, "the tables have caught up")
        self.world.fleet.replace(self.api.objects(VLLM_MODELS), self.api.store.version)
        self.api.requests.clear()
        return await self._reconciler(key)

    def _caught_up(self) -> bool:
        def versions(bodies: Any) -> set[str]:
            return {body["metadata"]["resourceVersion"] for body in bodies}

        return all(
            versions(reflector.table.values())
            == versions(
                body
                for body in self.api.objects(resource(kind.plural))
                if kind.plural in ("pods", "nodes")
                or "vllm-fleet.dev/model" in (body["metadata"].get("labels") or {})
            )
            for (kind, _), reflector in self.world._reflectors.items()
        )

    def model(self, **spec: Any) -> Json:
        return self.api.create(VLLM_MODELS, "ns", model_body(**spec))

    def edit(self, **spec: Any) -> None:
        self.api.patch(VLLM_MODELS, "ns", "m", {"spec": spec})

    def deployment(self) -> Json:
        return self.api.get(DEPLOYMENTS, "ns", "m-engine")

    def status(self, namespace: str = "ns", name: str = "m") -> Json:
        status: Json = self.api.get(VLLM_MODELS, namespace, name).get("status", {})
        return status

    def condition(self, kind: str) -> tuple[str, str, str]:
        found: Json = next((item for item in self.status()["conditions"] if item["type"] == kind), {})
        return found.get("status", ""), found.get("reason", ""), found.get("message", "")

    def writes(self) -> list[str]:
        """Method and what was written, Events left out."""
        found = [(request.method, request.path.split("/")) for request in self.api.writes()]
        named = [
            (method, path[-1] if path[-1] == "status" else path[-2] if method == "PATCH" else path[-1])
            for method, path in found
        ]
        return [f"{method} {what}" for method, what in named if what != "events"]

    def pod(self, name: str = "p", ready: bool = True, **extra: Any) -> Json:
        """A pod of the live Deployment, as its controller would make it."""
        template = self.deployment()["spec"]["template"]
        conditions = [{"type": "Ready", "status": str(ready)}, {"type": "PodScheduled", "status": "True"}]
        body = {
            "metadata": {"name": name, **template["metadata"]},
            "spec": {**template["spec"], "nodeName": "gpu-1"},
            "status": {"phase": "Running", "conditions": conditions, **extra},
        }
        return self.api.create(PODS, "ns", body)


async def make_rig(api: KubeApi, settings: Settings) -> AsyncIterator[Rig]:
    configuration = Configuration()
    configuration.host = api.url
    async with ApiClient(configuration) as client:
        rig = Rig(api, client, settings)
        task = asyncio.create_task(rig.world.run())
        await rig.world.synced()
        yield rig
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
