"""What one pod, or a Deployment that cannot make its pods, says about why a model is not up."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_operator import names
from vllm_operator.api.status import Reason
from vllm_operator.errors import clip
from vllm_operator.observe.engine_log import last_error_line, scrub

Body = dict[str, Any]

# The worst first: of several pods, the one that needs a person is the one to tell of.
SEVERITY = (
    Reason.OUT_OF_MEMORY,
    Reason.ENGINE_ERROR,
    Reason.CRASH_LOOPING,
    Reason.IMAGE_PULL_FAILED,
    Reason.DOWNLOAD_FAILED,
    Reason.MISSING_SECRET,
    Reason.QUOTA_EXCEEDED,
    Reason.INSUFFICIENT_GPU,
    Reason.UNSCHEDULABLE,
    Reason.PULLING,
    Reason.DOWNLOADING,
    Reason.LOADING,
    Reason.STARTING,
    Reason.DRAINING,
)
_PULL_FAILURES = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
    "ImageInspectError",
    "SignatureValidationFailed",
}
_START_FAILURES = {"CreateContainerError", "RunContainerError", "CreateContainerConfigError", "StartError"}
# The kubelet says the same again behind a prefix while it waits: one text, or the status would flip for ever.
_BACK_OFF = re.compile(r"^(Back-off pulling image \"[^\"]*\": )?(ErrImagePull: )?")
_MISSING = re.compile(r"(secret|configmap) \"[^\"]*\" not found|couldn't find key", re.IGNORECASE)
# Also when the weights leave no room for the KV cache: the same fields mend it.
_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|\bOOM\b|No available memory|available KV cache memory", re.IGNORECASE
)


@dataclass(frozen=True)
class Finding:
    """One reason with its words. `since` is when what it tells of began."""

    reason: Reason
    message: str
    since: datetime.datetime | None = None


def timestamp(text: str | None) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None


def is_terminating(pod: Body) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def is_ready(pod: Body) -> bool:
    return not is_terminating(pod) and _condition(pod, "Ready").get("status") == "True"


def template_hash(pod: Body) -> str:
    return str((pod["metadata"].get("annotations") or {}).get(names.ANNOTATION_TEMPLATE_HASH, ""))


def created(pod: Body) -> datetime.datetime | None:
    return timestamp(pod["metadata"].get("creationTimestamp"))


def worst(findings: list[Finding]) -> Finding:
    return min(findings, key=lambda finding: SEVERITY.index(finding.reason))


def pod_finding(pod: Body, gpu_resource: str) -> Finding:
    """Why this pod is not ready. It is neither ready nor terminating."""
    status = pod.get("status") or {}
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return _unschedulable(scheduled, gpu_resource)
    if status.get("phase") == "Failed":
        why = status.get("reason") or "the pod failed"
        return Finding(Reason.ENGINE_ERROR, clip(f"{why}: {status.get('message', '')}", 600))
    found = [finding for state in _container_states(status) if (finding := _container_finding(state))]
    if found:
        return worst(found)
    since = timestamp(status.get("startTime"))
    if not status.get("containerStatuses"):
        return Finding(Reason.STARTING, "the pod waits for its node", since)
    node = (pod.get("spec") or {}).get("nodeName", "its node")
    return Finding(Reason.PULLING, f"{node} pulls the image or mounts volumes{_since(since)}", since)


def deployment_finding(deployment: Body | None) -> Finding:
    """Why there is no pod at all."""
    conditions = ((deployment or {}).get("status") or {}).get("conditions") or ()
    failure: Body = next((item for item in conditions if item["type"] == "ReplicaFailure"), {})
    if failure.get("status") == "True":
        return Finding(Reason.QUOTA_EXCEEDED, clip(scrub(failure.get("message", "")), 600))
    return Finding(Reason.STARTING, "the pods are being made")


def _condition(pod: Body, kind: str) -> Body:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return next((item for item in conditions if item["type"] == kind), {})


def _unschedulable(scheduled: Body, gpu_resource: str) -> Finding:
    message = clip(scheduled.get("message") or "the scheduler has found no node yet", 600)
    short_of_gpus = f"Insufficient {gpu_resource}" in message
    reason = Reason.INSUFFICIENT_GPU if short_of_gpus else Reason.UNSCHEDULABLE
    return Finding(reason, message, timestamp(scheduled.get("lastTransitionTime")))


def _container_states(status: Body) -> Iterator[Body]:
    yield from status.get("initContainerStatuses") or ()
    yield from status.get("containerStatuses") or ()


def _container_finding(container: Body) -> Finding | None:
    state = container.get("state") or {}
    waiting, terminated, running = (state.get(kind) for kind in ("waiting", "terminated", "running"))
    last = terminated or (container.get("lastState") or {}).get("terminated")
    if waiting is not None and (finding := _waiting(waiting)):
        return finding
    if last is not None and not container.get("ready"):
        return _died(last, container.get("restartCount", 0), looping=waiting is not None)
    if running is not None and not container.get("ready"):
        since = timestamp(running.get("startedAt"))
        return Finding(Reason.LOADING, f"the engine loads the model{_since(since)}", since)
    return None


def _waiting(waiting: Body) -> Finding | None:
    why, message = waiting.get("reason", ""), clip(scrub(waiting.get("message") or ""), 600)
    if why in _PULL_FAILURES:
        return Finding(Reason.IMAGE_PULL_FAILED, _BACK_OFF.sub("", message) or why)
    if why in _START_FAILURES:
        missing = why == "CreateContainerConfigError" and _MISSING.search(message)
        return Finding(Reason.MISSING_SECRET if missing else Reason.ENGINE_ERROR, f"{why}: {message}")
    return None


def _died(last: Body, restarts: int, *, looping: bool) -> Finding | None:
    """A container that ended; exit code 0 without a restart is an init container that did its work."""
    code, line = last.get("exitCode", 0), last_error_line(last.get("message") or "")
    if code == 0 and restarts == 0:
        return None
    if last.get("reason") == "OOMKilled":
        return Finding(Reason.OUT_OF_MEMORY, "the kernel killed the engine: raise resources.limits.memory")
    said = f"the engine ended with exit code {code}" + (f": {line}" if line else "")
    if _NO_MEMORY.search(line):
        return Finding(Reason.OUT_OF_MEMORY, said)
    return Finding(Reason.CRASH_LOOPING if looping or restarts > 1 else Reason.ENGINE_ERROR, said)


def _since(moment: datetime.datetime | None) -> str:
    return f" since {moment:%H:%M:%S} UTC" if moment else ""
