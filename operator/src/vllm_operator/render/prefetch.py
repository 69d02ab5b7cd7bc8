"""The Job that downloads weights into the cache before the pods need them, and what waits for it.

It is named after what it downloads, and stays when it is done: that is the record by which later pods are let
start. It has the environment of the engine (token, mirror, proxy, certificates), and no more rights than Pod
Security "restricted" leaves: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
It retries without end, since a Secret that is mended, or a Hub that is back, is noticed by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllm_operator import names
from vllm_operator.api.v1alpha1 import Spec, VLLMModel
from vllm_operator.render.facts import Facts, LiveJob, Manifest
from vllm_operator.render.groups import WORKLOADS
from vllm_operator.render.pod import NON_ROOT
from vllm_operator.render.prefetch_script import SCRIPT
from vllm_operator.render.storage import ADAPTER_VOLUME
from vllm_operator.render.workload import child, digest

REQUESTS = {"cpu": "500m", "memory": "1Gi"}
NEVER_GIVE_UP = 2**31 - 1
# What decides where the pod runs and how it reaches the Hub. Nothing of the GPUs.
_TAKEN_OVER = (
    "imagePullSecrets",
    "nodeSelector",
    "tolerations",
    "schedulerName",
    "priorityClassName",
    "dnsPolicy",
    "dnsConfig",
    "hostAliases",
)
_NOT_MOUNTED = {"shm", "weights", "chat-template"}
_NOT_SAID = {"HF_HUB_OFFLINE", "VLLM_API_KEY"}


def downloads(spec: Spec) -> list[str]:
    """Repositories, with `@revision` where one is asked for."""
    hub = spec.source.hugging_face
    own = [f"{spec.model}@{hub.revision}" if hub.revision else spec.model] if hub is not None else []
    repositories = (item.source.hugging_face for item in spec.adapters)
    return [*own, *sorted({source.id for source in repositories if source is not None})]


def live_job(body: Manifest) -> LiveJob:
    """What `render` needs to know of a Job that the API server has."""
    meta, conditions = body["metadata"], (body.get("status") or {}).get("conditions") or ()
    return LiveJob(
        created=meta.get("creationTimestamp", ""),
        template_hash=(meta.get("annotations") or {}).get(names.ANNOTATION_TEMPLATE_HASH, ""),
        is_complete=any(item["type"] == "Complete" and item["status"] == "True" for item in conditions),
    )


def prefetch_manifests(model: VLLMModel, engine: Manifest, facts: Facts) -> Iterator[Manifest]:
    """The Job, made of the engine's pod template. A Job cannot be changed: one that is out of date is left
    out, so that it is deleted, and then made anew.
    """
    asked = downloads(model.spec)
    name = names.prefetch_name(model.metadata.name, digest({"downloads": asked})[:8])
    template = _pod_template(model, engine, asked)
    template_hash = digest(template)
    if _out_of_date(facts.jobs.get(name), template_hash, facts):
        return
    manifest = child("batch/v1", "Job", model, name)
    manifest["metadata"]["labels"] = names.labels(model.metadata.name, model.metadata.uid, names.PREFETCH)
    manifest["metadata"]["annotations"] = {names.ANNOTATION_TEMPLATE_HASH: template_hash}
    manifest["spec"] = {"backoffLimit": NEVER_GIVE_UP, "template": template}
    yield manifest


def _out_of_date(live: LiveJob | None, template_hash: str, facts: Facts) -> bool:
    """Made for a claim that is gone, or of another template before it was done."""
    if live is None:
        return False
    if facts.claim is not None and live.created < facts.claim.created:
        return True
    return not live.is_complete and live.template_hash != template_hash


def held_back(spec: Spec, manifests: Iterable[Manifest], facts: Facts) -> list[Manifest]:
    """What is left as it is: a Job that is done, and until then pods that would need what it downloads."""
    if not spec.prefetches:
        return []
    found = list(manifests)
    done = [item for item in found if item["kind"] == "Job" and _is_done(item, facts)]
    return done or [item for item in found if _starts_pods(item, facts)]


def _is_done(job: Manifest, facts: Facts) -> bool:
    live = facts.jobs.get(job["metadata"]["name"])
    return live is not None and live.is_complete


def _starts_pods(manifest: Manifest, facts: Facts) -> bool:
    if manifest["kind"] not in WORKLOADS:
        return False
    wanted = manifest["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH]
    return facts.live is None or facts.live.template_hash != wanted


def _pod_template(model: VLLMModel, engine: Manifest, asked: list[str]) -> Manifest:
    meta, spec = engine["metadata"], engine["spec"]
    steps = [_step(spec["containers"][0], "plan", asked), _step(spec["containers"][0], "fetch", asked)]
    annotations = {key: value for key, value in meta["annotations"].items() if names.GROUP not in key}
    labels = {**meta["labels"], **names.labels(model.metadata.name, model.metadata.uid, names.PREFETCH)}
    return {
        "metadata": {"labels": labels, **({"annotations": annotations} if annotations else {})},
        "spec": {
            "restartPolicy": "OnFailure",
            "initContainers": steps[:1],
            "containers": steps[1:],
            "volumes": [item for item in spec["volumes"] if _is_mounted(item["name"])],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": NON_ROOT,
                "runAsGroup": NON_ROOT,
                "fsGroup": NON_ROOT,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **{key: spec[key] for key in _TAKEN_OVER if key in spec},
            **_affinity(model, spec),
        },
    }


def _step(engine: Manifest, step: str, asked: list[str]) -> Manifest:
    env = [item for item in engine["env"] if item["name"] not in _NOT_SAID]
    return {
        "name": step,
        "image": engine["image"],
        "command": ["python3", "-c", SCRIPT, step],
        "args": asked,
        "env": [
            *env,
            {"name": "HF_HUB_OFFLINE", "value": "0"},
            {"name": "HF_XET_CHUNK_CACHE_SIZE_BYTES", "value": "0"},  # or the cache would hold parts twice
        ],
        "volumeMounts": [item for item in engine["volumeMounts"] if _is_mounted(item["name"])],
        "resources": {"requests": dict(REQUESTS)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }


def _is_mounted(volume: str) -> bool:
    return volume not in _NOT_MOUNTED and not volume.startswith(ADAPTER_VOLUME)


def _affinity(model: VLLMModel, spec: Manifest) -> dict[str, Any]:
    """On the engine's kind of node; with a ReadWriteOnce claim, on the very node where it is mounted.

    The pod matches its own term, so that the first one may go anywhere:
    https://kubernetes.io/docs/concepts/scheduling-eviction/assign-pod-node/#inter-pod-affinity-and-anti-affinity
    """
    wanted = {key: value for key, value in (spec.get("affinity") or {}).items() if key == "nodeAffinity"}
    if not model.spec.mounts_anywhere:
        term = {
            "labelSelector": {"matchLabels": {names.LABEL_MODEL: model.metadata.name}},
            "topologyKey": "kubernetes.io/hostname",
        }
        wanted["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return {"affinity": wanted} if wanted else {}
