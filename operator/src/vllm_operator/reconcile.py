"""One model, once: read the tables, render, bring what differs into the cluster, observe, write the status.

The one function for every cause: a new model, an edit, a child that vanished, a pod that is ready, a restart.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from vllm_operator import names
from vllm_operator.api.parsing import identify, parse, previous_status
from vllm_operator.api.status import Reason, Status
from vllm_operator.api.v1alpha1 import Metadata, VLLMModel
from vllm_operator.children import Api, Children, ModelGone
from vllm_operator.clock import Clock
from vllm_operator.errors import ApiError, Conflict, Forbidden, ForeignObject, Invalid, NotFound, SpecError
from vllm_operator.events import Recorder, transitions
from vllm_operator.kinds import DEPLOYMENTS, MODELS, Body, ObjectKey
from vllm_operator.names import ModelKey
from vllm_operator.observe import Refusal, Snapshot, observe, observe_refused, seconds_until_stalled
from vllm_operator.render import engine_key_manifest, render
from vllm_operator.render.facts import Facts, ImagePin, LiveDeployment
from vllm_operator.render.scheduling import gpu_resource, suitable_nodes
from vllm_operator.settings import Settings
from vllm_operator.world import World

log = logging.getLogger(__name__)

# What no watch tells of: a foreign object that goes, a quota that is raised.
REFUSED_RETRY_SECONDS = 60.0
_LACKS_RIGHT = re.compile(r"cannot \w+ resource")

Outcome = Callable[[str, float], None]


class Reconciler:
    """`count(result, seconds)` is told of each run: ok, refused, gone or error. `engine_key` gives a
    model's key, empty where engines ask for none.
    """

    def __init__(
        self,
        api: Api,
        world: World,
        settings: Settings,
        recorder: Recorder,
        clock: Clock,
        count: Outcome,
        engine_key: Callable[[Metadata], str] = lambda _meta: "",
    ) -> None:
        self._api, self._world, self._settings = api, world, settings
        self._children, self._engine_key = Children(api, world), engine_key
        self._recorder, self._clock, self._count = recorder, clock, count

    async def __call__(self, key: ModelKey) -> float | None:
        """Returns the seconds after which to look again without an event. Raises what is to be retried."""
        started, result = self._clock.monotonic(), "error"
        try:
            result, again = await self._reconcile(key)
            return again
        finally:
            self._count(result, self._clock.monotonic() - started)

    async def _reconcile(self, key: ModelKey) -> tuple[str, float | None]:
        body = self._world.fleet.models.get(key)
        if body is None or "deletionTimestamp" in body["metadata"]:
            return "gone", None
        meta, before = identify(body), previous_status(body)
        try:
            model = parse(body, self._settings.profiles)
            manifests = render(model, self._settings, self._facts(model))
        except SpecError as error:
            return await self._refuse(meta, before, Refusal(Reason.INVALID_SPEC, str(error)))
        try:
            return await self._bring(model, manifests)
        except ModelGone:
            for concerned in self._world.fleet.remove(key, meta.uid) - {key}:
                self._world.enqueue(concerned)  # a short name may have become free
            return "gone", None

    async def _refuse(self, meta: Metadata, before: Status, refusal: Refusal) -> tuple[str, float | None]:
        snapshot = Snapshot(pods=self._world.pods(meta.key, meta.uid))
        await self._write(meta, before, observe_refused(meta, before, snapshot, refusal, self._clock.now()))
        return "refused", None

    async def _bring(self, model: VLLMModel, manifests: tuple[Body, ...]) -> tuple[str, float | None]:
        meta, refusal = model.metadata, None
        try:
            if not model.paused:
                if key := self._engine_key(meta):
                    await self._children.ensure_engine_key(meta, engine_key_manifest(model, key))
                await self._children.bring(meta, manifests)
        except (ForeignObject, Forbidden, Invalid) as error:
            refusal = refusal_of(error)
        snapshot = self._snapshot(model, manifests, refusal or self._name_conflict(meta.key))
        now = self._clock.now()
        await self._write(meta, model.status, observe(model, snapshot, now))
        if refusal is not None:
            return "refused", REFUSED_RETRY_SECONDS
        return "ok", seconds_until_stalled(model, snapshot, now)

    def _facts(self, model: VLLMModel) -> Facts:
        child = ObjectKey(model.metadata.namespace, names.engine_name(model.metadata.name))
        status = model.status
        pin = ImagePin(status.image_default_for, status.image) if status.image_default_for else None
        return Facts(
            nodes=self._world.nodes(),
            live=live_deployment(self._world.child(DEPLOYMENTS, child)),
            pin=pin,
            engine_key=self._engine_key(model.metadata),
        )

    def _snapshot(self, model: VLLMModel, manifests: tuple[Body, ...], refusal: Refusal | None) -> Snapshot:
        key = model.metadata.key
        wanted = next(body for body in manifests if body["kind"] == DEPLOYMENTS.kind)
        template = wanted["spec"]["template"]
        return Snapshot(
            deployment=self._world.child(DEPLOYMENTS, ObjectKey(key.namespace, names.engine_name(key.name))),
            pods=self._world.pods(key, model.metadata.uid),
            template_hash=template["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH],
            image=template["spec"]["containers"][0]["image"],
            gpu_resource=gpu_resource(model.spec, self._settings),
            granted=self._world.fleet.granted(key),
            adapters=self._world.fleet.granted_adapters(key),
            refusal=refusal,
            hint=self._hint(model, template["spec"]),
            rollout=wanted["metadata"]["annotations"].get(names.ANNOTATION_ROLLOUT, ""),
        )

    def _hint(self, model: VLLMModel, pod: Body) -> str:
        """The node with the most free GPUs: what a person compares the request with."""
        nodes = self._world.nodes()
        if nodes is None or model.spec.gpu_count == 0:
            return ""
        resource = gpu_resource(model.spec, self._settings)
        fitting = suitable_nodes(pod, nodes)
        if not fitting:
            return "No node matches the selectors and taints."
        best = min(fitting, key=lambda node: (-node.free.get(resource, 0), node.name))
        free = max(best.free.get(resource, 0), 0)
        return f"The model asks for {model.spec.gpu_count} per pod; {best.name} has most free: {free}."

    def _name_conflict(self, key: ModelKey) -> Refusal | None:
        denied = [
            f"{name} is held by the older model {holder}" for name, holder in self._world.fleet.denied(key)
        ]
        if not denied:
            return None
        instead = f"Ask for {key} ({key}:<adapter> for an adapter), or change the name"
        return Refusal(Reason.NAME_CONFLICT, f"{'; '.join(denied)}. {instead}")

    async def _write(self, meta: Metadata, before: Status, after: Status) -> None:
        """Only when something in it changes. A model that is gone needs no status."""
        if after == before:
            return
        status = after.model_dump(by_alias=True, mode="json")
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": meta.name, "namespace": meta.namespace},
            "status": status,
        }
        try:
            self._world.fleet.put(await self._api.apply(MODELS, body, uid=meta.uid, subresource="status"))
        except (NotFound, Conflict):
            return
        for event in transitions(before, after):
            log.info(
                "status", extra={"model": str(meta.key), "reason": event.reason, "detail": event.message}
            )
            await self._recorder.record(meta, event, self._clock.now())


def live_deployment(body: Body | None) -> LiveDeployment | None:
    if body is None:
        return None
    annotations = body["metadata"].get("annotations") or {}
    return LiveDeployment(
        annotations.get(names.ANNOTATION_TEMPLATE_HASH, ""),
        body["spec"].get("strategy") or {},
        annotations.get(names.ANNOTATION_ROLLOUT, ""),
    )


def refusal_of(error: ForeignObject | ApiError) -> Refusal:
    """What the API server, or the absence of a takeover, means for the model."""
    if isinstance(error, ForeignObject):
        return Refusal(Reason.CHILD_CONFLICT, str(error))
    if isinstance(error, Invalid):
        return Refusal(Reason.INVALID_SPEC, f"the API server refuses it: {error.message}")
    if _LACKS_RIGHT.search(error.message):
        return Refusal(Reason.API_ERROR, f"the operator lacks a right: {error.message}", lasting=False)
    return Refusal(Reason.QUOTA_EXCEEDED, error.message)
