"""A reconciler over the fake API server, called by hand: what one reconcile reads, writes and says."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fake_clock import eventually
from kube_api import VLLM_MODELS, Json, KubeApi, resource
from kube_select import selected
from kubernetes.aio.client import ApiClient, Configuration
from vllm_models import model_body

from vllm_operator.clock import SystemClock
from vllm_operator.cluster import Cluster
from vllm_operator.events import Recorder
from vllm_operator.names import ModelKey
from vllm_operator.pacing import Pacing
from vllm_operator.reconcile import Reconciler
from vllm_operator.settings import Settings
from vllm_operator.world import World

DEPLOYMENTS, SERVICES, PODS = resource("deployments"), resource("services"), resource("pods")
NODES, EVENTS = resource("nodes"), resource("events")
KEY = ModelKey("ns", "m")


class MovableClock(SystemClock):
    """Real time, and as much more as a test says."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    def now(self) -> datetime.datetime:
        return super().now() + datetime.timedelta(seconds=self.ahead)


class Rig:
    """A reconciler over real tables of the fake API server, called by hand."""

    def __init__(self, api: KubeApi, client: ApiClient, settings: Settings, hold_seconds: float) -> None:
        self.api = api
        self.results: list[str] = []
        self.reasons: list[str] = []
        self.waited: list[float] = []
        self.crowded = False
        self.engine_key = ""
        self.enqueued: list[ModelKey] = []
        self.clock = MovableClock()
        cluster = Cluster(client)
        self.world = World(cluster, settings, SystemClock())
        self.world.enqueue = self.enqueued.append
        recorder = Recorder(cluster)
        self._reconciler = Reconciler(
            cluster,
            self.world,
            settings,
            recorder,
            self.clock,
            self,
            lambda _meta: self.engine_key,
            others_wait=lambda: self.crowded,
            pacing=Pacing(self.clock, hold_seconds),
        )

    def reconciled(self, result: str, reason: str, seconds: float) -> None:
        self.results.append(result)
        self.reasons.append(reason)

    def became_ready(self, seconds: float) -> None:
        self.waited.append(seconds)

    async def reconcile(self, key: ModelKey = KEY) -> float | None:
        """After the tables have heard of everything."""
        await self.caught_up()
        self.world.fleet.replace(self.api.objects(VLLM_MODELS), self.api.store.version)
        self.api.requests.clear()
        return await self._reconciler(key)

    async def caught_up(self) -> None:
        await eventually(self._caught_up, "the tables have caught up")

    def _caught_up(self) -> bool:
        def versions(bodies: Any) -> set[str]:
            return {body["metadata"]["resourceVersion"] for body in bodies}

        return (
            all(
                versions(reflector.table.values())
                == versions(
                    body
                    for body in self.api.objects(resource(kind.plural))
                    if kind.plural in ("pods", "nodes")
                    or "vllm-fleet.dev/model" in (body["metadata"].get("labels") or {})
                )
                for (kind, _), reflector in self.world._reflectors.items()
            )
            and self._surroundings_caught_up()
        )

    def _surroundings_caught_up(self) -> bool:
        """Nodes among them; those that there is no right to watch are not waited for."""
        nodes = [self.world._nodes] if self.world._nodes else []
        return all(
            {body["metadata"]["resourceVersion"] for body in reflector.table.values()}
            == {
                body["metadata"]["resourceVersion"]
                for body in self.api.objects(resource(reflector.kind.plural))
                if selected(body, "", reflector._fields)
            }
            for reflector in (*self.world.surroundings.reflectors, *nodes)
            if reflector.synced.is_set()
        )

    def model(self, **spec: Any) -> Json:
        return self.api.create(VLLM_MODELS, "ns", model_body(**spec))

    def edit(self, **spec: Any) -> None:
        self.api.patch(VLLM_MODELS, "ns", "m", {"spec": spec})

    def pause(self, name: str = "m") -> None:
        mark = {"metadata": {"annotations": {"vllm-fleet.dev/paused": "true"}}}
        self.api.patch(VLLM_MODELS, "ns", name, mark)

    def deployment(self, key: ModelKey = KEY) -> Json:
        return self.api.get(DEPLOYMENTS, key.namespace, f"{key.name}-engine")

    def annotations(self, key: ModelKey = KEY) -> dict[str, str]:
        found: dict[str, str] = self.deployment(key)["metadata"]["annotations"]
        return found

    def status(self, key: ModelKey = KEY) -> Json:
        status: Json = self.api.get(VLLM_MODELS, *key).get("status", {})
        return status

    def condition(self, kind: str, key: ModelKey = KEY) -> tuple[str, str, str]:
        conditions = self.status(key)["conditions"]
        found: Json = next((item for item in conditions if item["type"] == kind), {})
        return found.get("status", ""), found.get("reason", ""), found.get("message", "")

    def writes(self) -> list[str]:
        """Method and what was written; Events left out, and who owns a field (ownership.py)."""
        sent = [item for item in self.api.writes() if item.content_type != "application/merge-patch+json"]
        found = [(request.method, request.path.split("/")) for request in sent]
        named = [
            (method, path[-1] if path[-1] == "status" else path[-2] if method == "PATCH" else path[-1])
            for method, path in found
        ]
        return [f"{method} {what}" for method, what in named if what != "events"]

    async def serve(self) -> None:
        """The live Deployment's pods come up, and the model is seen to serve."""
        await self.reconcile()
        self.pod(f"p-{len(self.api.objects(PODS))}-{self.api.store.version}")
        await self.reconcile()

    def replace_pods(self, *, ready: bool = False, **status: Any) -> None:
        """What its controller does in place: every pod goes, and one of the live template comes."""
        for body in self.api.objects(PODS, "ns"):
            self.api.delete(PODS, "ns", body["metadata"]["name"])
        self.pod(f"p-{self.api.store.version}", ready, **status)

    def engine(self, key: ModelKey = KEY) -> Json:
        container: Json = self.deployment(key)["spec"]["template"]["spec"]["containers"][0]
        return container

    def pod(self, name: str = "p", ready: bool = True, model: str = "m", **extra: Any) -> Json:
        """A pod of the live Deployment, as its controller would make it."""
        template = self.deployment(ModelKey("ns", model))["spec"]["template"]
        conditions = [{"type": "Ready", "status": str(ready)}, {"type": "PodScheduled", "status": "True"}]
        body = {
            "metadata": {"name": name, **template["metadata"]},
            "spec": {**template["spec"], "nodeName": "gpu-1"},
            "status": {"phase": "Running", "conditions": conditions, **extra},
        }
        return self.api.create(PODS, "ns", body)


@asynccontextmanager
async def make_rig(
    api: KubeApi, settings: Settings, *, wait_for_surroundings: bool = True, hold_seconds: float = 0
) -> AsyncIterator[Rig]:
    """As an operator that has just started: its tables are filled, nothing else is known. Every status is
    written at once unless `hold_seconds` says otherwise (test_pacing).
    """
    configuration = Configuration()
    configuration.host = api.url
    async with ApiClient(configuration) as client:
        rig = Rig(api, client, settings, hold_seconds)
        task = asyncio.create_task(rig.world.run())
        await rig.world.synced()
        if wait_for_surroundings:
            reflectors = [item for item in rig.world._all() if not item.kind.optional]
            async with asyncio.timeout(30):
                await asyncio.gather(*(item.synced.wait() for item in reflectors))
            await eventually(lambda: api.watches >= len(reflectors), "all of them watch")
        yield rig
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
