"""What the pod of a prefetch Job says: how far the download is, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_operator.api.status import Reason
from vllm_operator.errors import clip
from vllm_operator.observe.engine_log import scrub
from vllm_operator.observe.pods import (
    Body,
    Finding,
    created,
    is_terminating,
    pod_finding,
    refusal_words,
    timestamp,
)
from vllm_operator.render.prefetch import REQUESTS
from vllm_operator.render.prefetch_script import NO_REVISION, NO_SPACE, NOT_FOUND, REFUSED

# Exit code of the script -> the reason, and what a person can do. Any other may pass by itself.
ENDS = {
    REFUSED: (Reason.MODEL_ACCESS_DENIED, "check source.huggingFace.tokenSecret"),
    NOT_FOUND: (
        Reason.MODEL_ACCESS_DENIED,
        "check spec.model, and for a private one source.huggingFace.tokenSecret",
    ),
    NO_REVISION: (Reason.DOWNLOAD_FAILED, "check source.huggingFace.revision"),
    NO_SPACE: (Reason.DOWNLOAD_FAILED, "raise cache.size"),
}


def prefetch_finding(pods: Iterable[Body], refused: str = "") -> Finding:
    """`pods` are the Job's; it is not done. `refused` is its last Event about a pod that it could not make:
    a Job has no condition that says so.
    """
    alive = sorted((pod for pod in pods if not is_terminating(pod)), key=lambda pod: str(created(pod)))
    if not alive and refused:
        asks = " and ".join(f"{count} {name}" for name, count in REQUESTS.items())
        said = f"the download's pod is refused: {refusal_words(refused)}; it asks for {asks}"
        way_out = "have what refuses it (a quota, a LimitRange, an admission policy) let it pass"
        return Finding(Reason.QUOTA_EXCEEDED, f"{clip(said, 500)}: {way_out}")
    if not alive:
        return Finding(Reason.DOWNLOADING, "the download is about to begin")
    pod = alive[-1]
    status = pod.get("status") or {}
    planned, fetching = (_first(status.get(key)) for key in ("initContainerStatuses", "containerStatuses"))
    failures = (_failure(container) for container in (fetching, planned))
    return next(filter(None, failures), None) or _progress(pod, planned, fetching)


def _progress(pod: Body, planned: Body, fetching: Body) -> Finding:
    """Of what goes well. Between two containers nothing runs, and that is no pull of an image."""
    plan = (planned.get("state") or {}).get("terminated")
    if plan is None:
        asked = (planned.get("state") or {}).get("running") is not None
        told = Finding(Reason.DOWNLOADING, "the Hub is asked what there is to download")
        return told if asked else pod_finding(pod, "")
    what, state = _said(plan) or "the weights", fetching.get("state") or {}
    if "terminated" in state:
        return Finding(Reason.DOWNLOADING, f"{what} are there, and pods may start")
    found = pod_finding(pod, "")
    if "running" not in state and found.reason is not Reason.PULLING:
        return found
    since = timestamp((state.get("running") or {}).get("startedAt"))
    return Finding(Reason.DOWNLOADING, f"{what}{_since(since)}", since)


def _failure(container: Body) -> Finding | None:
    """Told until a later try succeeds, also while that is under way."""
    states = (container.get("state") or {}, container.get("lastState") or {})
    ended = next((found for state in states if (found := state.get("terminated"))), None)
    if ended is None or (code := ended.get("exitCode", 0)) == 0:
        return None
    why = "the kernel killed the download" if ended.get("reason") == "OOMKilled" else _said(ended)
    tries = container.get("restartCount", 0)
    if code in ENDS:
        reason, advice = ENDS[code]
        return Finding(reason, f"{why}; {advice}")
    again = "is tried again" if tries < 2 else f"has been tried {tries} times, and is again"
    return Finding(Reason.DOWNLOADING, f"the download failed and {again}: {why or f'exit code {code}'}")


def _first(statuses: list[Body] | None) -> Body:
    return statuses[0] if statuses else {}


def _said(ended: Body) -> str:
    return clip(scrub((ended.get("message") or "").strip()), 400)


def _since(moment: object) -> str:
    return f" since {moment:%H:%M:%S} UTC" if moment else ""
