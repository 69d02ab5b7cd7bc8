"""Whether a new revision has failed for which every pod of the previous one had to go.

While pods of another revision live there is nothing to judge: they serve on, however long the new ones take.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from vllm_operator.api.status import Reason
from vllm_operator.api.v1alpha1 import VLLMModel
from vllm_operator.errors import clip
from vllm_operator.observe import Snapshot, alive_elsewhere
from vllm_operator.observe.pods import (
    Body,
    Finding,
    created,
    deployment_finding,
    is_ready,
    is_terminating,
    pod_finding,
    restarts,
    timestamp,
    uid,
    worst,
)
from vllm_operator.render.facts import LiveDeployment, RolledBack

# An engine that has ended so often ends for a reason; what ended it once may have been its node's trouble.
MANY_RESTARTS = 2
# For what needs a person but may also pass: a registry that is away, a Secret that is about to be made.
PATIENCE_SECONDS = 120

_CRASHED = {
    Reason.CRASH_LOOPING,
    Reason.ENGINE_ERROR,
    Reason.OUT_OF_MEMORY,
    Reason.WRONG_FLAG,
    Reason.MODEL_ACCESS_DENIED,
}
_NEEDS_A_PERSON = {
    Reason.IMAGE_PULL_FAILED,
    Reason.MISSING_SECRET,
    Reason.MISSING_CONFIG_MAP,
    Reason.MISSING_VOLUME,
    Reason.QUOTA_EXCEEDED,
    Reason.WRONG_FLAG,
}


@dataclass(frozen=True)
class Trial:
    """`failed` where the live template is to be taken back; `again`: seconds until that may be so."""

    failed: RolledBack | None = None
    again: float | None = None


def judge(model: VLLMModel, live: LiveDeployment | None, snapshot: Snapshot, now: datetime.datetime) -> Trial:
    """`snapshot` needs only what was read: deployment, pods, warnings, gpu_resource; and the live hash."""
    if live is None or not _on_trial(model, live, snapshot):
        return Trial()
    alive = [pod for pod in snapshot.pods if not is_terminating(pod)]
    if not alive and snapshot.pods:
        return Trial()  # the previous pods end first, and each end is an event
    findings = [pod_finding(pod, snapshot.gpu_resource, snapshot.warnings.get(uid(pod), "")) for pod in alive]
    finding = worst(findings) if findings else deployment_finding(snapshot.deployment)
    left = _allowance(model, finding, alive) - _seconds(finding, alive, now)
    if left > 0:
        return Trial(again=max(1.0, left))
    why = clip(f"{finding.reason.value}: {finding.message}", 400)
    return Trial(failed=RolledBack(live.template_hash, model.metadata.generation, why))


def _on_trial(model: VLLMModel, live: LiveDeployment, snapshot: Snapshot) -> bool:
    good = live.good
    if model.spec.rollout.rollback == "Never" or model.spec.wanted_replicas == 0 or model.paused:
        return False
    if good is None or good.template_hash == live.template_hash or live.rolled_back is not None:
        return False
    has_served = model.status.last_served.template == live.template_hash
    return not (has_served or alive_elsewhere(snapshot) or any(map(is_ready, snapshot.pods)))


def _allowance(model: VLLMModel, finding: Finding, alive: list[Body]) -> float:
    whole = float(model.spec.start_seconds)
    if finding.reason in _CRASHED and max(map(restarts, alive), default=0) >= MANY_RESTARTS:
        return 0.0
    return min(whole, PATIENCE_SECONDS) if finding.reason in _NEEDS_A_PERSON else whole


def _seconds(finding: Finding, alive: list[Body], now: datetime.datetime) -> float:
    """Since a node took the oldest pod, or since its making, or since no pod could be made."""
    times = [timestamp((pod.get("status") or {}).get("startTime")) or created(pod) for pod in alive]
    began = min((moment for moment in times if moment is not None), default=finding.since)
    return (now - began).total_seconds() if began is not None else 0.0
