"""What of the tables concerns one model: the facts that render takes, and the snapshot that observe takes."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_operator import names
from vllm_operator.api.v1alpha1 import Metadata, VLLMModel
from vllm_operator.kinds import CLAIMS, DEPLOYMENTS, GROUPS, JOBS, Body, ObjectKey, key_of
from vllm_operator.observe import Refusal, Snapshot
from vllm_operator.observe.failure import Trial, judge
from vllm_operator.observe.fit import gpu_shortage, memory_shortage
from vllm_operator.observe.pods import is_ready, template_hash
from vllm_operator.render.annotations import live_deployment
from vllm_operator.render.claim import live_claim
from vllm_operator.render.facts import Facts, ImagePin, LiveDeployment, Node
from vllm_operator.render.groups import WORKLOADS, pod_template_of
from vllm_operator.render.prefetch import live_job
from vllm_operator.render.rollback import has_key
from vllm_operator.render.scheduling import gpu_resource
from vllm_operator.render.secrets import engine_key_of, referenced
from vllm_operator.render.workload import resized, spec_hash
from vllm_operator.settings import Settings
from vllm_operator.world import World


@dataclass(frozen=True)
class Plan:
    """What was rendered for a model, what of it waits for its turn, and what it was decided on."""

    wanted: tuple[Body, ...]
    waiting: tuple[Body, ...]
    facts: Facts
    trial: Trial
    held: tuple[Body, ...] = ()  # until weights have been fetched

    @property
    def workload(self) -> Body:
        """What makes the pods, as it is to be, now or later."""
        every = (*self.waiting, *self.held, *self.wanted)
        return next(body for body in every if body["kind"] in WORKLOADS)

    @property
    def steps_aside(self) -> bool:
        """Whether pods end before others begin, for want of room; not where those have failed anyway."""
        annotations, live = self.workload["metadata"]["annotations"], self.facts.live
        changed = live is not None and live.template_hash != annotations[names.ANNOTATION_TEMPLATE_HASH]
        return (
            changed
            and self.workload in self.wanted
            and self.trial.failed is None
            and names.ANNOTATION_ROLLOUT in annotations
        )


class Survey:
    def __init__(
        self, world: World, settings: Settings, engine_key: Callable[[Metadata], str] = lambda _meta: ""
    ) -> None:
        self._world, self._settings, self._engine_key = world, settings, engine_key

    def facts(self, model: VLLMModel, now: datetime.datetime) -> tuple[Facts, Trial]:
        status = model.status
        claim = ObjectKey(model.metadata.namespace, names.cache_name(model.metadata.name))
        owned = self._world.owned_children(model.metadata.key, model.metadata.uid)
        claims = {key_of(body): body for kind, body in owned if kind is CLAIMS}
        live = live_deployment(self.workload(model))
        read = self._read(model)
        trial = judge(model, live, replace(read, template_hash=live.template_hash if live else ""), now)
        facts = Facts(
            nodes=self._world.nodes(),
            live=live,
            pin=ImagePin(status.image_default_for, status.image) if status.image_default_for else None,
            failed=trial.failed,
            unedited=_asks_for_no_other(model, live) and any(map(is_ready, read.pods)),
            secrets=self._world.surroundings.secrets(model.metadata.namespace),
            engine_key=self._engine_key(model.metadata),
            claim=live_claim(claims.get(claim)),
            jobs={key_of(body).name: live_job(body) for kind, body in owned if kind is JOBS},
        )
        return facts, trial

    def snapshot(self, model: VLLMModel, plan: Plan, refusal: Refusal | None) -> Snapshot:
        """After the children were brought."""
        deployed = plan.workload
        template = pod_template_of(deployed)
        self._world.surroundings.follow(model.metadata.key, referenced(template["spec"]))
        live = live_deployment(self.workload(model))
        runs = template["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH]
        if plan.waiting and live is not None:
            runs = live.template_hash
        granted, adapters = self._granted(model, refusal)
        read = self._read(model)
        return replace(
            read,
            template_hash=runs,
            image=template["spec"]["containers"][0]["image"],
            granted=granted,
            adapters=adapters,
            **(self._prefetching(model) if _waits_for_weights(plan) else {}),
            refusal=refusal,
            fit=self._fit(model, template["spec"], plan.facts.nodes)
            if _lacks_pods(model, read, runs)
            else "",
            advice=self._advice(model, template["spec"], plan.facts.nodes),
            rollout=deployed["metadata"]["annotations"].get(names.ANNOTATION_ROLLOUT, ""),
            rolled_back=live.rolled_back if live is not None else None,
            way_back=_way_back(model, live, runs, engine_key_of(template)),
            upgrade_pending=bool(plan.waiting),
            autoscaler=self._world.surroundings.autoscaler(model.metadata.key),
            spec_hash=spec_hash(model.spec),
        )

    def _granted(self, model: VLLMModel, refusal: Refusal | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The model's own names, and its adapters'.

        What an edit asks for is granted with it; one that is refused leaves the names that were served.
        """
        key, fleet = model.metadata.key, self._world.fleet
        refused = refusal is not None and refusal.keeps_the_old
        if refused and model.status.observed_generation:
            return fleet.kept(key), fleet.kept_adapters(key)
        return fleet.granted(key), fleet.granted_adapters(key)

    def workload(self, model: VLLMModel) -> Body | None:
        """The live object that makes the pods."""
        namespace, name = model.metadata.key
        if model.spec.nodes > 1:
            return self._world.child(GROUPS, ObjectKey(namespace, names.group_name(name)))
        return self._world.child(DEPLOYMENTS, ObjectKey(namespace, names.engine_name(name)))

    def outgoing(self, model: VLLMModel, plan: Plan) -> tuple[Body, ...]:
        """The workload of the other kind, after an edit of spec.nodes: it serves until weights are there."""
        owned = self._world.owned_children(model.metadata.key, model.metadata.uid)
        return (
            tuple(body for kind, body in owned if kind.kind in WORKLOADS) if _waits_for_weights(plan) else ()
        )

    def _prefetching(self, model: VLLMModel) -> dict[str, Any]:
        """What a snapshot says of the Job."""
        key, uid = model.metadata.key, model.metadata.uid
        jobs = [body for kind, body in self._world.owned_children(key, uid) if kind is JOBS]
        refused = self._world.surroundings.warnings(jobs)
        return {
            "prefetch": self._world.pods(key, uid, names.PREFETCH),
            "prefetch_refused": next(iter(refused.values()), ""),
        }

    def _read(self, model: VLLMModel) -> Snapshot:
        pods = self._world.pods(model.metadata.key, model.metadata.uid)
        return Snapshot(
            deployment=self.workload(model),
            pods=pods,
            workers=self._world.pods(model.metadata.key, model.metadata.uid, names.WORKER),
            gpu_resource=gpu_resource(model.spec, self._settings),
            warnings=self._world.surroundings.warnings(pods),
        )

    def _fit(self, model: VLLMModel, pod: Body, nodes: Sequence[Node] | None) -> str:
        count = model.spec.gpu_count
        if nodes is None or count == 0:
            return ""
        resource = gpu_resource(model.spec, self._settings)
        namespace = model.metadata.namespace
        return gpu_shortage(pod, resource, count, nodes, self._world.holders, namespace)

    def _advice(self, model: VLLMModel, pod: Body, nodes: Sequence[Node] | None) -> str:
        needed = model.spec.gpu.memory
        if nodes is None or needed is None or model.spec.gpu_count == 0:
            return ""
        resource = gpu_resource(model.spec, self._settings)
        return memory_shortage(pod, resource, model.spec.gpu_count, str(needed), nodes)


def _asks_for_no_other(model: VLLMModel, live: LiveDeployment | None) -> bool:
    """Whether pods were made of the newest spec, or of one that differs in replicas and the like alone. That
    it was observed says less: it may have been refused, or wait for weights.
    """
    served = model.status.last_served
    tried = live.rolled_back.generation if live is not None and live.rolled_back is not None else 0
    if model.metadata.generation in (served.generation, tried):
        return True
    runs = live is not None and live.template_hash == served.template
    return runs and served.spec == spec_hash(model.spec)


def _lacks_pods(model: VLLMModel, read: Snapshot, runs: str) -> bool:
    """Whether it may matter what room there is: every node is looked at for the answer."""
    ready = sum(is_ready(pod) and template_hash(pod) == runs for pod in read.pods)
    return ready < model.spec.wanted_replicas


def _waits_for_weights(plan: Plan) -> bool:
    return any(body["kind"] in WORKLOADS for body in plan.held)


def _way_back(model: VLLMModel, live: LiveDeployment | None, runs: str, key_secret: str) -> int:
    """The generation to which a failure would return, or has returned; 0 where there is none."""
    if live is None or live.good is None:
        return 0
    if live.rolled_back is not None:
        return live.good.generation
    useful = runs not in (live.good.template_hash, model.status.last_served.template)
    useful = useful and has_key(live.good.template, key_secret)
    return live.good.generation if useful and model.spec.rollout.rollback != "Never" else 0


def split(manifests: Sequence[Body], *, waits: bool) -> tuple[tuple[Body, ...], tuple[Body, ...]]:
    """What is brought now, and what waits: the Deployment alone, whose pods serve meanwhile."""
    if not waits:
        return tuple(manifests), ()
    now = tuple(body for body in manifests if body["kind"] != DEPLOYMENTS.kind)
    return now, tuple(body for body in manifests if body["kind"] == DEPLOYMENTS.kind)


def scaled(plan: Plan, live: Body | None) -> Plan:
    """With the Deployment's replicas, where all else of it waits for a turn or for weights."""
    later = next((body for body in (*plan.waiting, *plan.held) if body["kind"] == DEPLOYMENTS.kind), None)
    if later is None or live is None or live["spec"].get("replicas") == later["spec"]["replicas"]:
        return plan
    return replace(plan, wanted=(*plan.wanted, resized(later, live)))
