"""One model, once: read the tables, render, bring what differs into the cluster, observe, write the status.

The one function for every cause: a new model, an edit, a child that vanished, a pod that is ready, a restart.
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from vllm_operator import names
from vllm_operator.api.parsing import identify, parse, previous_status
from vllm_operator.api.status import Reason, Status
from vllm_operator.api.v1alpha1 import Metadata, VLLMModel
from vllm_operator.children import Api, Children, ModelGone, refers_to
from vllm_operator.clock import Clock
from vllm_operator.errors import (
    ApiError,
    Conflict,
    Forbidden,
    ForeignObject,
    FormerObject,
    Invalid,
    MissingApi,
    NotFound,
    SpecError,
)
from vllm_operator.events import Event, Recorder, transitions
from vllm_operator.kinds import MODELS, Body, key_of
from vllm_operator.names import ModelKey
from vllm_operator.observe import Refusal, Snapshot, observe, observe_refused, seconds_until_stalled
from vllm_operator.observe.engine_log import scrub
from vllm_operator.pacing import Pacing
from vllm_operator.render import engine_key_manifest, held_back, pod_template_of, render
from vllm_operator.render.facts import Facts
from vllm_operator.render.groups import WORKLOADS
from vllm_operator.render.secrets import engine_key_of
from vllm_operator.settings import Settings
from vllm_operator.survey import Plan, Survey, scaled, split
from vllm_operator.world import World

log = logging.getLogger(__name__)

# What no watch tells of: a foreign object that goes, a quota that is raised.
REFUSED_RETRY_SECONDS = 60.0
UNEXPECTED = "Unexpected"  # the reason of an error that is not the API server's
DRIFT_REPAIRED = "DriftRepaired"
_LACKS_RIGHT = re.compile(r"cannot \w+ resource")


@dataclass(frozen=True)
class Outcome:
    """How one run ended: see Telemetry. `again`: seconds after which to look again without an event."""

    result: str
    reason: str = ""
    again: float | None = None


class Telemetry(Protocol):
    def reconciled(self, result: str, reason: str, seconds: float) -> None:
        """One run: ok, refused, gone or error.

        `reason` is the status's of Ready or of the refusal, the kind of an error, and empty for gone.
        """

    def became_ready(self, seconds: float) -> None:
        """A model is Ready that many seconds after it was seen not to be."""


class Reconciler:
    """`engine_key` gives a model's key, empty where engines ask for none. `others_wait` says whether other
    models wait for their pods.
    """

    def __init__(
        self,
        api: Api,
        world: World,
        settings: Settings,
        recorder: Recorder,
        clock: Clock,
        telemetry: Telemetry,
        engine_key: Callable[[Metadata], str] = lambda _meta: "",
        others_wait: Callable[[], bool] = lambda: False,
        pacing: Pacing | None = None,
    ) -> None:
        self._api, self._world, self._settings = api, world, settings
        self._children, self._survey = Children(api, world), Survey(world, settings, engine_key)
        self._engine_key, self._others_wait = engine_key, others_wait
        self._recorder, self._clock, self._telemetry = recorder, clock, telemetry
        self._pacing = pacing or Pacing(clock)

    async def __call__(self, key: ModelKey) -> float | None:
        """Returns the seconds after which to look again without an event. Raises what is to be retried."""
        started = self._clock.monotonic()
        try:
            done = await self._reconcile(key)
        except Exception as error:
            kind = type(error).__name__ if isinstance(error, ApiError) else UNEXPECTED
            self._telemetry.reconciled("error", kind, self._clock.monotonic() - started)
            raise
        self._telemetry.reconciled(done.result, done.reason, self._clock.monotonic() - started)
        return done.again

    async def _reconcile(self, key: ModelKey) -> Outcome:
        body = self._world.fleet.models.get(key)
        if body is None or "deletionTimestamp" in body["metadata"]:
            return self._gone(key)
        meta = identify(body)
        try:
            return await self._work_on(meta, body)
        except ModelGone:
            for concerned in self._world.fleet.remove(key, meta.uid) - {key}:
                self._world.enqueue(concerned)  # a short name may have become free
            return self._gone(key)
        finally:
            self._world.upgrades.leave(key)

    def _gone(self, key: ModelKey) -> Outcome:
        self._world.upgrades.forget(key)
        self._pacing.forget(key)
        return Outcome("gone")

    async def _work_on(self, meta: Metadata, body: Body) -> Outcome:
        try:
            model = parse(body, self._settings.profiles)
            plan = self._plan(model)
        except SpecError as error:
            return await self._refuse(meta, previous_status(body), Refusal(Reason.INVALID_SPEC, str(error)))
        return await self._bring(model, plan)

    async def _refuse(self, meta: Metadata, before: Status, refusal: Refusal) -> Outcome:
        self._world.upgrades.forget(meta.key)
        pods, fleet = self._world.pods(meta.key, meta.uid), self._world.fleet
        snapshot = Snapshot(pods=pods, granted=fleet.kept(meta.key), adapters=fleet.kept_adapters(meta.key))
        await self._write(meta, before, observe_refused(meta, before, snapshot, refusal, self._clock.now()))
        return Outcome("refused", refusal.reason)

    async def _bring(self, model: VLLMModel, plan: Plan) -> Outcome:
        meta, refusal = model.metadata, None
        if plan.steps_aside and not model.paused:
            model = await self._warn(model, plan)
        try:
            if not model.paused:
                before = self._survey.workload(model)
                # Of a new one the watch has told, and the first write of its status says if it is gone since.
                alive = not model.status.observed_generation
                alive = await self._ensure_engine_key(model, plan, alive=alive) or alive
                kept = (*plan.waiting, *plan.held, *self._survey.outgoing(model, plan))
                repaired = await self._children.bring(meta, plan.wanted, kept, alive=alive)
                await self._tell_repairs(meta, repaired)
                made = before is None and self._survey.workload(model) is not None
                if made and self._others_wait():  # all new models have their pods before any has its status
                    return Outcome("ok", Reason.STARTING, 0.0)
        except (ForeignObject, FormerObject, Forbidden, Invalid, MissingApi) as error:
            refusal = refusal_of(error)
        snapshot = self._survey.snapshot(model, plan, refusal or self._name_conflict(meta.key))
        now = self._clock.now()
        status = observe(model, snapshot, now)
        held = await self._tell(meta, model.status, status)
        if refusal is not None:
            return Outcome("refused", refusal.reason, held or REFUSED_RETRY_SECONDS)
        due = [held, seconds_until_stalled(model, snapshot, now), plan.trial.again]
        again = min((seconds for seconds in due if seconds is not None), default=None)
        ready = status.condition("Ready")
        return Outcome("ok", ready.reason if ready is not None else "", again)

    async def _tell(self, meta: Metadata, before: Status, after: Status) -> float | None:
        """Writes the status, or returns the seconds for which that may wait; what is to be told then, the
        tables say then.
        """
        if held := self._pacing.hold(meta.key, before, after):
            return held
        await self._write(meta, before, after)
        self._pacing.forget(meta.key)
        return None

    async def _warn(self, model: VLLMModel, plan: Plan) -> VLLMModel:
        """Before the pods that serve are ended: who looks shall know what is about to happen, and why.

        Conditions alone; the edit is not acted on yet.
        """
        before, now = model.status, self._clock.now()
        accepted = before.condition("Accepted")
        if (
            accepted is not None
            and accepted.status == "False"
            and before.observed_generation == model.metadata.generation
        ):
            return model  # it was refused a moment ago, and told so
        ahead = observe(model, self._survey.snapshot(model, plan, None), now)
        if (ready := ahead.condition("Ready")) is None or ready.reason != Reason.ROLLING_OUT:
            return model
        warned = before.model_copy(update={"conditions": ahead.conditions})
        return model.model_copy(update={"status": await self._write(model.metadata, before, warned)})

    def _plan(self, model: VLLMModel) -> Plan:
        """Raises SpecError. A rollout that no edit asked for may have to wait for its turn."""
        facts, trial = self._survey.facts(model, self._clock.now())
        manifests = render(model, self._settings, facts)
        key, upgrades = model.metadata.key, self._world.upgrades
        held = held_back(model.spec, manifests, facts)
        rest = [body for body in manifests if body not in held]
        makes_pods = any(body["kind"] in WORKLOADS for body in rest)
        waits = False
        if not makes_pods or model.paused or not starts_upgrade(manifests, facts):
            upgrades.forget(key)
        else:
            waits = not upgrades.enter(key)
        plan = Plan(*split(rest, waits=waits), facts, trial, tuple(held))
        return scaled(plan, self._survey.workload(model))

    async def _ensure_engine_key(self, model: VLLMModel, plan: Plan, *, alive: bool) -> bool:
        """Where the pods that are to run now refer to it; others have that of their own revision."""
        if not (key := self._engine_key(model.metadata)):
            return False
        secret, live = engine_key_manifest(model, key), self._survey.workload(model)
        runs = plan.workload if plan.workload in plan.wanted else live
        if runs is not None and refers_to(runs, key_of(secret).name):
            return await self._children.ensure_engine_key(model.metadata, secret, live, alive=alive)
        return False

    async def _tell_repairs(self, meta: Metadata, repaired: tuple[str, ...]) -> None:
        for text in repaired:
            log.info("drift repaired", extra={"model": str(meta.key), "detail": text})
            event = Event("Warning", DRIFT_REPAIRED, f"set back what another hand changed: {text}", True)
            await self._recorder.record(meta, event, self._clock.now())

    def _name_conflict(self, key: ModelKey) -> Refusal | None:
        denied = [
            f"{name} is held by the older model {holder}" for name, holder in self._world.fleet.denied(key)
        ]
        if not denied:
            return None
        instead = f"Ask for {key} ({key}:<adapter> for an adapter), or change the name"
        return Refusal(Reason.NAME_CONFLICT, f"{'; '.join(denied)}. {instead}")

    async def _write(self, meta: Metadata, before: Status, after: Status) -> Status:
        """Only when something in it changes. Returns what stands; raises ModelGone."""
        if after == before:
            return before
        status = after.model_dump(by_alias=True, mode="json")
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": meta.name, "namespace": meta.namespace},
            "status": status,
        }
        try:
            written = await self._api.apply(MODELS, body, uid=meta.uid, subresource="status")
        except NotFound as error:
            raise ModelGone(meta.key) from error
        except Conflict:
            await self._children.ensure_alive(meta)  # it is another one of this name, or too much goes on
            raise
        for concerned in (self._world.fleet.put(written) or set()) - {meta.key}:
            self._world.enqueue(concerned)  # a short name may have become free
        if (waited := seconds_to_ready(before, after)) is not None:
            self._telemetry.became_ready(waited)
        for event in transitions(before, after):
            log.info(
                "status", extra={"model": str(meta.key), "reason": event.reason, "detail": event.message}
            )
            await self._recorder.record(meta, event, self._clock.now())
        return after


def seconds_to_ready(before: Status, after: Status) -> float | None:
    """How long Ready was not True; None unless it is now. A new model is first seen not to be Ready."""
    old, new = before.condition("Ready"), after.condition("Ready")
    if old is None or new is None or old.status == "True" or new.status != "True":
        return None
    began, ended = (datetime.datetime.fromisoformat(c.last_transition_time) for c in (old, new))
    return (ended - began).total_seconds()


def starts_upgrade(manifests: Iterable[Body], facts: Facts) -> bool:
    """Whether applying these would replace serving pods without an edit."""
    workload = next(body for body in manifests if body["kind"] in WORKLOADS)
    annotations, live = workload["metadata"]["annotations"], facts.live
    marked = annotations.get(names.ANNOTATION_UPGRADE)
    template_hash = annotations[names.ANNOTATION_TEMPLATE_HASH]
    if live is None or not facts.unedited or not marked == template_hash != live.template_hash:
        return False
    # Whose key is another by now serves nobody, so there is nothing to spare by waiting.
    asked = engine_key_of(live.template or {})
    return asked in ("", engine_key_of(pod_template_of(workload)))


def refusal_of(error: ForeignObject | FormerObject | MissingApi | ApiError) -> Refusal:
    """What the API server, or the absence of a takeover, means for the model."""
    if isinstance(error, ForeignObject):
        return Refusal(Reason.CHILD_CONFLICT, str(error))
    if isinstance(error, FormerObject):
        return Refusal(Reason.FORMER_OBJECT, str(error), lasting=False)
    if isinstance(error, MissingApi):
        return Refusal(
            Reason.MISSING_API,
            f"spec.nodes needs the {error} API, which this cluster does not have: install it "
            "(https://lws.sigs.k8s.io/docs/installation/), and within a minute it is taken up by itself",
        )
    words = scrub(error.message)  # a 422 quotes the value that it refuses
    if isinstance(error, Invalid):
        return Refusal(Reason.INVALID_SPEC, f"the API server refuses it: {words}")
    if _LACKS_RIGHT.search(words):
        return Refusal(Reason.API_ERROR, f"the operator lacks a right: {words}", lasting=False)
    return Refusal(Reason.QUOTA_EXCEEDED, words)
