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
from vllm_operator.observe.engine_log import cause_of_death, last_error_line, scrub

Body = dict[str, Any]

# The worst first: of several pods, the one that needs a person is the one to tell of.
SEVERITY = (
    Reason.OUT_OF_MEMORY,
    Reason.WRONG_FLAG,
    Reason.MODEL_ACCESS_DENIED,
    Reason.ENGINE_ERROR,
    Reason.CRASH_LOOPING,
    Reason.IMAGE_PULL_FAILED,
    Reason.DOWNLOAD_FAILED,
    Reason.MISSING_SECRET,
    Reason.MISSING_CONFIG_MAP,
    Reason.MISSING_VOLUME,
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
# Of a variable (the container's state), of a volume (the kubelet's event), of a key in either.
_MISSING_SECRET = re.compile(r"secret \"[^\"]*\" not found|in Secret |non-existent secret key", re.IGNORECASE)
_MISSING_CONFIG_MAP = re.compile(
    r"configmap \"[^\"]*\" not found|in ConfigMap |non-existent config key", re.IGNORECASE
)
_MISSING_CLAIM = re.compile(r"persistentvolumeclaim \"[^\"]*\" not found")
# Pods are made under a new name with every attempt.
_REFUSED_POD = re.compile(r"^(Error creating: )?(pods \"[^\"]*\" is forbidden: )?")


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


def uid(pod: Body) -> str:
    return str(pod["metadata"].get("uid", ""))


def created(pod: Body) -> datetime.datetime | None:
    return timestamp(pod["metadata"].get("creationTimestamp"))


def worst(findings: list[Finding]) -> Finding:
    return min(findings, key=lambda finding: SEVERITY.index(finding.reason))


def restarts(pod: Body) -> int:
    """The most that one of its containers has been started anew."""
    return max(
        (state.get("restartCount", 0) for state in _container_states(pod.get("status") or {})), default=0
    )


def pod_finding(pod: Body, gpu_resource: str, warning: str = "") -> Finding:
    """Why this pod is not ready. It is neither ready nor terminating.

    `warning` is the kubelet's last Event about it: what keeps a volume from being mounted stands only there.
    """
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
    mounted = _condition(pod, "PodReadyToStartContainers").get("status") == "True"
    warning = "" if mounted else clip(scrub(warning), 600)  # a warning of before stays for an hour
    if (reason := _missing(warning)) is not None:
        return Finding(reason, f"{warning}: create it, and the pod goes on by itself", since)
    node = (pod.get("spec") or {}).get("nodeName", "its node")
    said = f"{node} pulls the image or mounts volumes{_since(since)}"
    return Finding(Reason.PULLING, f"{said}: {warning}" if warning else said, since)


def deployment_finding(deployment: Body | None) -> Finding:
    """Why there is no pod at all."""
    conditions = ((deployment or {}).get("status") or {}).get("conditions") or ()
    failure: Body = next((item for item in conditions if item["type"] == "ReplicaFailure"), {})
    if failure.get("status") == "True":
        refusal = refusal_words(failure.get("message", ""))
        return Finding(
            Reason.QUOTA_EXCEEDED,
            clip(f"the pods are refused: {refusal}; {_way_out(refusal)}", 600),
            timestamp(failure.get("lastTransitionTime")),
        )
    return Finding(Reason.STARTING, "the pods are being made")


def refusal_words(said: str) -> str:
    """Why no pod could be made, of a controller's condition or Event that quotes the API server."""
    return _REFUSED_POD.sub("", scrub(said))


def _way_out(refusal: str) -> str:
    if "exceeded quota" in refusal:
        return "ask for less (gpu.count, resources, replicas), or have the ResourceQuota raised"
    if "violates PodSecurity" in refusal:
        return "the namespace's Pod Security level must allow it, or podTemplate must not ask for it"
    return "change resources, or what refuses them (a LimitRange, an admission policy)"


def _missing(message: str) -> Reason | None:
    """Which object that a pod refers to is not there."""
    if _MISSING_SECRET.search(message):
        return Reason.MISSING_SECRET
    return Reason.MISSING_CONFIG_MAP if _MISSING_CONFIG_MAP.search(message) else None


def _condition(pod: Body, kind: str) -> Body:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return next((item for item in conditions if item["type"] == kind), {})


def _unschedulable(scheduled: Body, gpu_resource: str) -> Finding:
    message = clip(scheduled.get("message") or "the scheduler has found no node yet", 600)
    if found := _MISSING_CLAIM.search(message):
        said = f"{found[0]}: create it in the model's namespace, or name another"
        return Finding(Reason.MISSING_VOLUME, said, timestamp(scheduled.get("lastTransitionTime")))
    short_of_gpus = bool(gpu_resource) and f"Insufficient {gpu_resource}" in message
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
    if why == "CreateContainerConfigError" and (reason := _missing(message)) is not None:
        return Finding(reason, f"{message}: create it, and the pod goes on by itself")
    if why in _START_FAILURES:
        return Finding(Reason.ENGINE_ERROR, f"{why}: {message}")
    return None


def _died(last: Body, restarts: int, *, looping: bool) -> Finding | None:
    """A container that ended; exit code 0 without a restart is an init container that did its work."""
    code, words = last.get("exitCode", 0), last.get("message") or ""
    if code == 0 and restarts == 0:
        return None
    if last.get("reason") == "OOMKilled":
        return Finding(Reason.OUT_OF_MEMORY, "the kernel killed the engine: raise resources.limits.memory")
    line = last_error_line(words)
    said = f"the engine ended with exit code {code}" + (f": {line}" if line else "")
    if (cause := cause_of_death(words)) is not None:
        return Finding(cause.reason, f"{said}; {cause.advice}")
    if code in _SIGNALS and not line:
        said += f" ({_SIGNALS[code]})"
    return Finding(Reason.CRASH_LOOPING if looping or restarts > 1 else Reason.ENGINE_ERROR, said)


_SIGNALS = {
    137: "it was killed: its probes failed, it did not serve within startTimeout, or its node lacks memory",
    139: "segmentation fault: a driver or a library of the image does not fit this node",
    143: "it was told to end: its probes failed, or it did not serve within startTimeout",
}


def _since(moment: datetime.datetime | None) -> str:
    return f" since {moment:%H:%M:%S} UTC" if moment else ""
