"""The closed list of reasons: each is brought about here, and its message is one that a person can act on.

Proves: every Reason has a case of its own, found by its name; the condition that carries it, and the words
that say what to do or quote who refused. The pods are as a kubelet of 1.37 wrote them (kubelet_pods.json,
taken from the local cluster), where one can bring the case about without a GPU.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm_models import model_body

from vllm_operator.api.parsing import parse
from vllm_operator.api.status import DESCRIPTIONS, Reason
from vllm_operator.errors import Forbidden, ForeignObject, FormerObject, Invalid, MissingApi
from vllm_operator.inventory import slim_pod
from vllm_operator.observe import Refusal, Snapshot, observe
from vllm_operator.reconcile import refusal_of
from vllm_operator.render.facts import RolledBack
from vllm_operator.render.prefetch_script import NO_SPACE, REFUSED

Json = dict[str, Any]
KUBELET: Json = json.loads(Path(__file__).with_name("kubelet_pods.json").read_text())
HASH = "current"
NOW = datetime.datetime(2026, 11, 23, 3, 0, tzinfo=datetime.UTC)


def taken(name: str, template: str = HASH, **status: Any) -> Json:
    """A pod as the kubelet wrote it, and as the operator keeps it."""
    body: Json = KUBELET[name]
    mark = {"vllm-fleet.dev/template-hash": template}
    metadata = body["metadata"] | {"annotations": mark}
    return slim_pod({**body, "metadata": metadata, "status": body["status"] | status})


def died(words: str, restarts: int = 3, **more: Any) -> Json:
    """A pod whose engine ended with other words than the one that was taken."""
    (container,) = KUBELET["wrong flag"]["status"]["containerStatuses"]
    last = container["lastState"]["terminated"] | {"exitCode": 1, "message": words} | more
    changed = container | {"lastState": {"terminated": last}, "restartCount": restarts}
    return taken("wrong flag", containerStatuses=[changed])


@dataclass(frozen=True)
class Case:
    """`condition` is the type that carries the reason, and `words` must be in its message."""

    condition: str
    words: str
    pods: tuple[Json, ...] = ()
    spec: Json = field(default_factory=dict)
    snapshot: Json = field(default_factory=dict)
    paused: bool = False


def prefetching(words: str, code: int = 0, *, running: bool = False) -> Json:
    """The pod of a prefetch Job after its first container, which plans the download, said these words."""
    plan = {"name": "plan", "state": {"terminated": {"exitCode": code, "message": words}}}
    fetch = {"name": "fetch", "state": {"running": {"startedAt": "2026-11-23T02:58:00Z"}}}
    status = {"initContainerStatuses": [plan], "containerStatuses": [fetch] if running else []}
    return {"metadata": {"name": "p", "creationTimestamp": "2026-11-23T02:57:00Z"}, "status": status}


def refused(error: Forbidden | Invalid | ForeignObject | FormerObject | MissingApi) -> Json:
    return {"refusal": refusal_of(error)}


SERVES, ENDS = taken("serving"), taken("serving", "old")
ENDS = {**ENDS, "metadata": ENDS["metadata"] | {"deletionTimestamp": "2026-11-23T02:59:00Z"}}
QUOTA = 'pods "m-engine-6c9d7-x2z4q" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1'
FAILURE = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": QUOTA}
GATED = """\
(APIServer pid=1)     raise OSError(
(APIServer pid=1) OSError: You are trying to access a gated repo.
(APIServer pid=1) Make sure to have access to it at https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct.
(APIServer pid=1) 401 Client Error. (Request ID: Root=1-69)
"""

CASES: dict[Reason, list[Case]] = {
    Reason.SERVING: [Case("Ready", "1 of 1 replicas serve", (SERVES,))],
    Reason.SCALED_TO_ZERO: [Case("Ready", "no replica is wanted", spec={"replicas": 0})],
    Reason.ROLLING_OUT: [
        Case("Ready", "0 of 1 replicas serve the current spec; 1 serve", (taken("serving", "old"),)),
        Case(
            "Ready",
            "in place, since no room; if it fails, generation 4 comes back",
            (taken("serving", "old"),),
            snapshot={"rollout": "no room", "way_back": 4},
        ),
    ],
    Reason.ROLLED_BACK: [
        Case(
            "Stalled",
            "generation 5 failed (WrongFlag: x); generation 4 serves again. Edit the spec",
            (SERVES,),
            snapshot={"rolled_back": RolledBack("bad", 5, "WrongFlag: x"), "way_back": 4},
        )
    ],
    Reason.UPGRADE_PENDING: [
        Case("Reconciling", "settings.maxConcurrentRollouts", (SERVES,), snapshot={"upgrade_pending": True})
    ],
    Reason.ACCEPTED: [
        Case("Accepted", ""),
        Case("Accepted", "held at 1 replicas", spec={"autoscaling": {"minReplicas": 0, "maxReplicas": 2}}),
        Case("Accepted", "gpu.memory asks", snapshot={"advice": "gpu.memory asks"}),
    ],
    Reason.PAUSED: [Case("Accepted", "the annotation vllm-fleet.dev/paused is removed", paused=True)],
    Reason.FOREIGN_AUTOSCALER: [
        Case("Accepted", "let its scaleTargetRef name VLLMModel m", snapshot={"autoscaler": "h"})
    ],
    Reason.STARTING: [
        Case("Reconciling", "the pods are being made"),
        Case("Reconciling", "gpu-1 has most free: 0.", snapshot={"fit": "gpu-1 has most free: 0."}),
    ],
    Reason.PULLING: [Case("Reconciling", "pulls the image or mounts volumes", (taken("missing configmap"),))],
    Reason.LOADING: [Case("Reconciling", "the engine loads the model since", (taken("loading"),))],
    Reason.DRAINING: [
        Case("Reconciling", "1 pods end before others begin", (ENDS,)),
        Case("Reconciling", "1 pods end", (ENDS,), spec={"replicas": 0}),
    ],
    Reason.DOWNLOADING: [
        Case("Reconciling", "the download is about to begin", snapshot={"prefetch": ()}),
        Case(
            "Reconciling",
            "3.2 GB in 4 files since 02:58:00 UTC",
            snapshot={"prefetch": (prefetching("3.2 GB in 4 files", running=True),)},
        ),
    ],
    Reason.DOWNLOAD_FAILED: [
        Case(
            "Stalled",
            "the cache has 1.0 GB free, and 3.2 GB are to come; raise cache.size",
            snapshot={
                "prefetch": (prefetching("the cache has 1.0 GB free, and 3.2 GB are to come", NO_SPACE),)
            },
        ),
    ],
    Reason.FORMER_OBJECT: [
        Case(
            "Reconciling",
            "still being deleted, held by kubernetes.io/pvc-protection; when it is gone, the model goes on",
            snapshot=refused(
                FormerObject("PersistentVolumeClaim", "m-cache", ["kubernetes.io/pvc-protection"])
            ),
        ),
    ],
    Reason.MISSING_API: [
        Case("Accepted", "install it (https://lws", snapshot=refused(MissingApi("LeaderWorkerSet"))),
    ],
    Reason.UNSCHEDULABLE: [
        Case("Reconciling", "didn't match Pod's node affinity/selector", (taken("unschedulable"),)),
    ],
    Reason.INSUFFICIENT_GPU: [
        Case("Reconciling", "Insufficient nvidia.com/gpu", (taken("no gpu"),)),
        Case("Reconciling", "gpu-1 has most", (taken("no gpu"),), snapshot={"fit": "gpu-1 has most"}),
    ],
    Reason.IMAGE_PULL_FAILED: [
        Case("Stalled", "example.invalid/none:1", (taken("image backs off"),)),
        Case("Stalled", "example.invalid/none:1", (taken("image fails"),)),
    ],
    Reason.CRASH_LOOPING: [
        Case("Stalled", "exit code 1: KeyError: 'no-parser'", (died("KeyError: 'no-parser'"),)),
        Case("Stalled", "exit code 137 (it was killed: its probes failed", (died("", exitCode=137),)),
        Case("Stalled", 'exec: "vllm": executable file not found in $PATH', (taken("cannot start"),)),
    ],
    Reason.OUT_OF_MEMORY: [
        Case("Stalled", "raise resources.limits.memory", (taken("killed for memory"),)),
        Case(
            "Stalled",
            "CUDA out of memory. Tried to allocate 2.00 GiB.; lower engine.maxModelLen",
            (died("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),),
        ),
    ],
    Reason.ENGINE_ERROR: [
        Case("Stalled", 'Evicted: Usage of EmptyDir volume "d" exceeds the limit', (taken("evicted"),)),
        Case("Stalled", "exit code 1: KeyError: 'x'", (died("KeyError: 'x'", restarts=1),)),
    ],
    Reason.WRONG_FLAG: [
        Case(
            "Stalled", "unrecognized arguments: --no-such-flag; mend engine.extraArgs", (taken("wrong flag"),)
        ),
    ],
    Reason.MODEL_ACCESS_DENIED: [
        Case("Stalled", "accept the model's terms on huggingface.co", (died(GATED),)),
        Case(
            "Stalled",
            "Hugging Face refuses org/small without a token; check source.huggingFace.tokenSecret",
            snapshot={"prefetch": (prefetching("Hugging Face refuses org/small without a token", REFUSED),)},
        ),
        Case(
            "Stalled",
            "check spec.model, and the token in source.huggingFace.tokenSecret",
            (
                died(
                    "OSError: org/x is not a local folder and is not a valid model identifier listed on 'hf'"
                ),
            ),
        ),
    ],
    Reason.INVALID_SPEC: [
        Case("Stalled", "spec.template: bad", snapshot=refused(Invalid(422, "Invalid", "spec.template: bad")))
    ],
    Reason.NAME_CONFLICT: [
        Case(
            "Accepted",
            "held by a/b",
            (SERVES,),
            snapshot={"refusal": Refusal(Reason.NAME_CONFLICT, "held by a/b")},
        )
    ],
    Reason.CHILD_CONFLICT: [
        Case("Stalled", "delete it, or rename", snapshot=refused(ForeignObject("Service", "m-engine")))
    ],
    Reason.MISSING_SECRET: [
        Case("Stalled", 'secret "nope" not found: create it', (taken("missing secret"),))
    ],
    Reason.MISSING_CONFIG_MAP: [
        Case(
            "Stalled",
            'configmap "nope" not found: create it',
            (taken("missing configmap"),),
            snapshot={
                "warnings": {
                    KUBELET["missing configmap"]["metadata"]["uid"]: KUBELET["its warning"]["message"]
                }
            },
        )
    ],
    Reason.MISSING_VOLUME: [
        Case("Stalled", 'persistentvolumeclaim "nope" not found: create it', (taken("missing claim"),))
    ],
    Reason.QUOTA_EXCEEDED: [
        Case(
            "Stalled",
            "the pods are refused: exceeded quota: gpus",
            snapshot={"deployment": {"status": {"conditions": [FAILURE]}}},
        ),
        Case(
            "Stalled",
            "the download's pod is refused: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1; "
            "it asks for 500m cpu and 1Gi memory: have",
            snapshot={"prefetch": (), "prefetch_refused": f"Error creating: {QUOTA}"},
        ),
        Case(
            "Accepted", "exceeded quota", snapshot=refused(Forbidden(403, "Forbidden", "exceeded quota: few"))
        ),
    ],
    Reason.API_ERROR: [
        Case(
            "Reconciling",
            "the operator lacks a right",
            snapshot=refused(Forbidden(403, "Forbidden", 'User "x" cannot create resource "deployments"')),
        )
    ],
}


@pytest.mark.parametrize("reason", list(Reason))
def test_each_reason_has_a_case_and_a_description(reason: Reason) -> None:
    assert CASES.get(reason), f"no case brings {reason} about"
    assert DESCRIPTIONS[reason]


@pytest.mark.parametrize(
    ("reason", "case"),
    [pytest.param(reason, case, id=reason.value) for reason, cases in CASES.items() for case in cases],
)
def test_a_reason_is_told_in_words_to_act_on(reason: Reason, case: Case) -> None:
    body = model_body(**{"startTimeout": "1m"} | case.spec)
    if case.paused:
        body["metadata"]["annotations"] = {"vllm-fleet.dev/paused": "true"}
    status = observe(parse(body), Snapshot(pods=case.pods, template_hash=HASH, **case.snapshot), NOW)
    condition = next(item for item in status.conditions if item.type == case.condition)
    assert condition.reason == reason.value
    assert case.words in condition.message
    assert len(condition.message) <= 1000


@pytest.mark.parametrize("name", [name for name in KUBELET if name != "its warning"])
def test_no_pod_of_the_kubelets_goes_without_a_reason(name: str) -> None:
    status = observe(parse(model_body()), Snapshot(pods=(taken(name),), template_hash=HASH), NOW)
    ready = next(item for item in status.conditions if item.type == "Ready")
    assert ready.reason in set(Reason)
    assert ready.message
