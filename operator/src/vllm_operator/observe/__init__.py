"""`observe(model, snapshot, now)`: the status that the cluster's objects amount to. Pure.

Ready is about serving: it is true while at least one pod serves, be it of the previous revision. Reconciling
is true while something changes by itself, Stalled where nothing will change without a person; never both.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vllm_operator import names
from vllm_operator.api.status import Condition, ConditionType, Reason, Served, Status
from vllm_operator.api.v1alpha1 import Metadata, VLLMModel
from vllm_operator.errors import clip
from vllm_operator.observe.pods import (
    Body,
    Finding,
    created,
    deployment_finding,
    is_ready,
    is_terminating,
    pod_finding,
    template_hash,
    uid,
    worst,
)
from vllm_operator.observe.prefetch import prefetch_finding
from vllm_operator.render.facts import RolledBack

__all__ = ["Refusal", "Snapshot", "observe", "observe_refused", "seconds_until_stalled"]

_STALLED_AT_ONCE = {
    Reason.MISSING_SECRET,
    Reason.MISSING_CONFIG_MAP,
    Reason.MISSING_VOLUME,
    Reason.QUOTA_EXCEEDED,
    Reason.WRONG_FLAG,
    Reason.MODEL_ACCESS_DENIED,
    Reason.DOWNLOAD_FAILED,
}
_STALLED_LATE = {
    Reason.IMAGE_PULL_FAILED,
    Reason.CRASH_LOOPING,
    Reason.OUT_OF_MEMORY,
    Reason.ENGINE_ERROR,
}


@dataclass(frozen=True)
class Refusal:
    """Why the objects are not as the spec wants them; `lasting` where only a person can change that."""

    reason: Reason
    message: str
    lasting: bool = True

    @property
    def keeps_the_old(self) -> bool:
        """Without its names a model is as it should be; every other refusal leaves what was there before."""
        return self.reason is not Reason.NAME_CONFLICT


@dataclass(frozen=True)
class Snapshot:
    """What was read of one model's children, and what was decided for it.

    `pods` are the model's engines, `workers` the pods that they are spread over, `warnings` the kubelet's
    last words about them, by uid; `prefetch` are those of the Job that they wait for, None for none, and
    `prefetch_refused` why it cannot make any.
    `template_hash` is that of the pod template that is to run: of the wanted one, unless `rolled_back` says
    why that is not so. `way_back` is the generation that comes back if the wanted one fails, 0 for none.
    `fit` is why no node has the GPUs, as far as is known, `advice` what a person had better know although
    nothing is wrong yet, and `rollout` why Auto did not surge.
    `upgrade_pending`: other pods are wanted, and wait for their turn. `autoscaler` is the name of one that
    targets the Deployment. `spec_hash` is that of the fields that ask for pods.
    """

    deployment: Body | None = None
    pods: tuple[Body, ...] = ()
    template_hash: str = ""
    image: str = ""
    gpu_resource: str = "nvidia.com/gpu"
    granted: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    refusal: Refusal | None = None
    fit: str = ""
    advice: str = ""
    rollout: str = ""
    warnings: Mapping[str, str] = field(default_factory=dict)
    rolled_back: RolledBack | None = None
    way_back: int = 0
    upgrade_pending: bool = False
    autoscaler: str = ""
    prefetch: tuple[Body, ...] | None = None
    prefetch_refused: str = ""
    workers: tuple[Body, ...] = ()
    spec_hash: str = ""


@dataclass(frozen=True)
class _Verdict:
    ready: bool
    reason: Reason
    message: str
    progress: Finding | None = None  # what Reconciling or Stalled tells
    stalled: bool = False


def observe(model: VLLMModel, snapshot: Snapshot, now: datetime.datetime) -> Status:
    verdict = _verdict(model, snapshot, now)
    if snapshot.rolled_back is not None:
        verdict = _turned_back(verdict, snapshot.rolled_back, snapshot.way_back)
    refusal = snapshot.refusal
    accepted = refusal or Refusal(*_acceptance(model, snapshot))
    if refusal is not None and refusal.keeps_the_old:
        # A scaled-down model is Ready for nothing else than that its objects are as the spec wants them.
        verdict = _refused(replace(verdict, ready=any(map(is_ready, snapshot.pods))), refusal)
    elif refusal is not None and verdict.progress is None:
        verdict = replace(verdict, progress=_finding(refusal), stalled=True)
    elif snapshot.upgrade_pending and verdict.progress is None:
        verdict = replace(verdict, progress=Finding(Reason.UPGRADE_PENDING, _UPGRADE_PENDING))
    conditions = _conditions(verdict, accepted, refused=refusal is not None)
    status = _status(model.metadata, model.status, snapshot, conditions, now)
    if refusal is not None and refusal.keeps_the_old and model.status.observed_generation:
        return status
    pin = {"image": snapshot.image, "image_default_for": "" if model.spec.image else model.spec.device}
    facts = {
        **(
            {} if snapshot.rolled_back is not None else pin
        ),  # else what was taken back would become the default
        "gpus": model.spec.gpu_count * model.spec.nodes * model.spec.wanted_replicas,
        "last_served": _last_served(model, snapshot),
    }
    return status.model_copy(update=facts)


def observe_refused(
    meta: Metadata, previous: Status, snapshot: Snapshot, refusal: Refusal, now: datetime.datetime
) -> Status:
    """For a spec that cannot be read: what runs is told as it is, and so is what was granted before."""
    serving = sum(is_ready(pod) for pod in snapshot.pods)
    verdict = _refused(_Verdict(serving > 0, Reason.SERVING, ""), refusal)
    return _status(meta, previous, snapshot, _conditions(verdict, refusal, refused=True), now)


def seconds_until_stalled(model: VLLMModel, snapshot: Snapshot, now: datetime.datetime) -> float | None:
    """When to look again without an event: a pod in trouble is Stalled once its start budget is spent."""
    verdict = _verdict(model, snapshot, now)
    if verdict.progress is None or verdict.stalled or verdict.progress.reason not in _STALLED_LATE:
        return None
    return max(1.0, model.spec.start_seconds - _seconds_tried(snapshot, now))


_UPGRADE_PENDING = (
    "a newer operator, its settings or a changed Secret ask for other pods; they are replaced when models "
    "before this one have been (settings.maxConcurrentRollouts)"
)


def _last_served(model: VLLMModel, snapshot: Snapshot) -> Served:
    if not any(is_ready(pod) and template_hash(pod) == snapshot.template_hash for pod in snapshot.pods):
        return model.status.last_served
    if snapshot.rolled_back is not None:
        served = {"generation": snapshot.way_back, "template": snapshot.template_hash}
        return model.status.last_served.model_copy(update=served)
    return Served(
        generation=model.metadata.generation, template=snapshot.template_hash, spec=snapshot.spec_hash
    )


def _turned_back(verdict: _Verdict, failed: RolledBack, good: int) -> _Verdict:
    """Ready is about serving, whatever serves; that the newest spec does not is for a person to mend."""
    back = f"generation {failed.generation} failed ({failed.why})"
    if verdict.progress is None and verdict.ready:
        message = f"{back}; generation {good} serves again. Edit the spec to try anew"
        return _Verdict(True, Reason.ROLLED_BACK, message, Finding(Reason.ROLLED_BACK, message), stalled=True)
    message = f"{back}; generation {good} comes back: {verdict.message}"
    return replace(verdict, reason=Reason.ROLLED_BACK, message=message)


def _acceptance(model: VLLMModel, snapshot: Snapshot) -> tuple[Reason, str]:
    if model.paused:
        return Reason.PAUSED, f"not reconciled until the annotation {names.ANNOTATION_PAUSED} is removed"
    if snapshot.autoscaler:
        return Reason.FOREIGN_AUTOSCALER, _foreign(model.metadata.name, snapshot.autoscaler)
    if model.spec.autoscaling is not None:
        return (
            Reason.ACCEPTED,
            f"autoscaling is not in force yet: held at {model.spec.wanted_replicas} replicas",
        )
    return Reason.ACCEPTED, snapshot.advice


def _foreign(model: str, autoscaler: str) -> str:
    return (
        f"HorizontalPodAutoscaler {autoscaler} targets Deployment {names.engine_name(model)}, whose replicas "
        "are set back to the model's: let its scaleTargetRef name "
        f"{names.KIND} {model} of {names.API_VERSION}"
    )


def _verdict(model: VLLMModel, snapshot: Snapshot, now: datetime.datetime) -> _Verdict:
    wanted = model.spec.wanted_replicas
    alive = [pod for pod in snapshot.pods if not is_terminating(pod)]
    serving = [pod for pod in alive if is_ready(pod)]
    current = [pod for pod in serving if template_hash(pod) == snapshot.template_hash]
    if wanted == 0 and not alive:
        return _scaled_to_zero(snapshot)
    if len(current) >= wanted and len(alive) == len(current) == wanted:
        return _Verdict(True, Reason.SERVING, f"{wanted} of {wanted} replicas serve")
    finding = _progress(snapshot, alive) if snapshot.prefetch is None else _prefetching(snapshot)
    tried = _seconds_tried(snapshot, now)
    late = finding.reason in _STALLED_LATE and tried >= model.spec.start_seconds
    # Where the last good spec comes back by itself, no person is needed yet.
    returns = bool(snapshot.way_back) and snapshot.rolled_back is None and not alive_elsewhere(snapshot)
    stalled = (late or finding.reason in _STALLED_AT_ONCE) and not returns
    if serving:
        message = f"{len(current)} of {wanted} replicas serve the current spec; {len(serving)} serve in all"
        message += _in_place(snapshot)
        message += f"; if it fails, generation {snapshot.way_back} comes back" if snapshot.way_back else ""
        return _Verdict(True, Reason.ROLLING_OUT, message, finding, stalled)
    return _Verdict(False, finding.reason, finding.message, finding, stalled)


def _scaled_to_zero(snapshot: Snapshot) -> _Verdict:
    draining = len(snapshot.pods)
    progress = Finding(Reason.DRAINING, f"{draining} pods end") if draining else None
    if snapshot.prefetch is not None:
        progress = _prefetching(snapshot)
    return _Verdict(True, Reason.SCALED_TO_ZERO, "no replica is wanted", progress)


def _prefetching(snapshot: Snapshot) -> Finding:
    return prefetch_finding(snapshot.prefetch or (), snapshot.prefetch_refused)


def _progress(snapshot: Snapshot, alive: list[Body]) -> Finding:
    """What keeps the current spec from serving. Pods of an older one are not asked: they are to go."""
    current = [pod for pod in alive if template_hash(pod) == snapshot.template_hash]
    current += [
        pod
        for pod in snapshot.workers
        if not is_terminating(pod) and template_hash(pod) == snapshot.template_hash
    ]
    found = [
        pod_finding(pod, snapshot.gpu_resource, snapshot.warnings.get(uid(pod), ""))
        for pod in current
        if not is_ready(pod)
    ]
    if not found and len(snapshot.pods) > len(alive):
        draining = len(snapshot.pods) - len(alive)
        return Finding(Reason.DRAINING, f"{draining} pods end before others begin{_in_place(snapshot)}")
    finding = worst(found) if found else deployment_finding(snapshot.deployment)
    told_ahead = finding.reason is Reason.STARTING and not alive  # the scheduler has the word, once it speaks
    if snapshot.fit and (told_ahead or finding.reason is Reason.INSUFFICIENT_GPU):
        return Finding(finding.reason, f"{finding.message} {snapshot.fit}", finding.since)
    return finding


def alive_elsewhere(snapshot: Snapshot) -> bool:
    """Whether pods of another revision live, which serve or will again without anybody's help."""
    return any(
        not is_terminating(pod) and template_hash(pod) != snapshot.template_hash for pod in snapshot.pods
    )


def _in_place(snapshot: Snapshot) -> str:
    return f"; in place, since {snapshot.rollout}" if snapshot.rollout else ""


def _seconds_tried(snapshot: Snapshot, now: datetime.datetime) -> float:
    """Since the oldest pod of the current spec that does not serve was made."""
    pods = snapshot.pods if snapshot.prefetch is None else snapshot.prefetch
    waiting = [pod for pod in pods if not is_ready(pod) and not is_terminating(pod)]
    times = [made for pod in waiting if (made := created(pod)) is not None]
    return (now - min(times)).total_seconds() if times else 0.0


def _refused(verdict: _Verdict, refusal: Refusal) -> _Verdict:
    message = refusal.message
    if verdict.ready:
        message = f"what ran before serves on; {message}"
    return _Verdict(verdict.ready, refusal.reason, message, _finding(refusal), stalled=refusal.lasting)


def _finding(refusal: Refusal) -> Finding:
    return Finding(refusal.reason, refusal.message)


def _conditions(
    verdict: _Verdict, accepted: Refusal, *, refused: bool
) -> list[tuple[ConditionType, bool, Finding]]:
    made: list[tuple[ConditionType, bool, Finding]] = [
        ("Accepted", not refused, _finding(accepted)),
        ("Ready", verdict.ready, Finding(verdict.reason, verdict.message)),
    ]
    if verdict.progress is not None:
        made.append(("Stalled" if verdict.stalled else "Reconciling", True, verdict.progress))
    return made


def _status(
    meta: Metadata,
    previous: Status,
    snapshot: Snapshot,
    conditions: list[tuple[ConditionType, bool, Finding]],
    now: datetime.datetime,
) -> Status:
    selector = ",".join(f"{key}={value}" for key, value in names.selector_labels(meta.name).items())
    return previous.model_copy(
        update={
            "observed_generation": meta.generation,
            "replicas": sum(not is_terminating(pod) for pod in snapshot.pods),
            "served_names": snapshot.granted,
            "adapters": snapshot.adapters,
            "ready_replicas": sum(is_ready(pod) for pod in snapshot.pods),
            "selector": selector,
            "endpoint": f"http://{names.engine_name(meta.name)}.{meta.namespace}.svc:{names.ENGINE_PORT}",
            "conditions": tuple(_condition(item, meta, previous, now) for item in conditions),
        }
    )


def _condition(
    item: tuple[ConditionType, bool, Finding], meta: Metadata, previous: Status, now: datetime.datetime
) -> Condition:
    kind, is_true, finding = item
    status, before = "True" if is_true else "False", previous.condition(kind)
    changed = before is None or before.status != status
    return Condition(
        type=kind,
        status="True" if is_true else "False",
        reason=finding.reason.value,
        message=clip(finding.message, 1000),
        last_transition_time=now.strftime("%Y-%m-%dT%H:%M:%SZ")
        if changed or before is None
        else before.last_transition_time,
        observed_generation=meta.generation,
    )
